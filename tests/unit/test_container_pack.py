"""Pack and unpack: what comes back, options, wrong inputs."""

import json
import os
import pathlib
import struct
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from dense_files import MODEL, Raw, check_official, dense, read_raw, ternary, write_checkpoint, write_raw

from qmoecodec import codec
from qmoecodec.container import open as open_packed
from qmoecodec.container import pack, unpack, verify
from qmoecodec.errors import FormatError


def test_a_file_comes_back_byte_for_byte(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    packed, again = tmp_path / "packed.safetensors", tmp_path / "again.safetensors"
    report = pack(model, packed)
    assert {g.name: (g.layout, g.source, g.shape) for g in report.groups} == {
        "encoder.mlp.experts.wi": ("stacked", "encoder.mlp.experts.expert_{}.wi.weight", (3, 24, 40)),
        "encoder.mlp.experts.wo": ("stacked", "encoder.mlp.experts.expert_{}.wo.weight", (3, 40, 24)),
        "layers.0.experts.w1": ("stacked", "layers.0.experts.{}.w1.weight", (3, 16, 32)),
        "fused.experts.gate_up": ("fused", "fused.experts.gate_up", (2, 20, 30)),
        "head": ("matrix", "head.weight", (1, 30, 50)),
    }
    assert {t.name: t.reason for t in report.passthrough} == {
        "embedding.weight": "not ternary: row 0",
        "empty": "no elements",
        "flag": "dtype BOOL",
        "layers.0.experts.2.w1.weight": "not ternary: row 0",
        "norm.weight": "rank 1",
        "steps": "dtype I64",
    }
    assert report.n_source_bytes == model.stat().st_size
    assert report.n_packed_bytes == packed.stat().st_size
    assert report.files == ("packed.safetensors",)
    names = check_official(packed)
    assert {"encoder.mlp.experts.wi_codes", "head_levels", "steps", "qmoecodec.header_crc32"} <= names
    assert verify(packed, deep=True).problems == ()
    unpacked = unpack(packed, again)
    assert again.read_bytes() == model.read_bytes()
    assert unpacked.n_tensors == len(MODEL)
    assert unpacked.n_dense_bytes == model.stat().st_size


def test_a_group_keeps_the_numbers_of_its_experts(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    pack(model, tmp_path / "p.safetensors")
    with open_packed(tmp_path / "p.safetensors") as f:
        assert f["layers.0.experts.w1"].info.expert_ranges == ((0, 2), (3, 4))
        assert (f["layers.0.experts.w1"].expert(2).dense() == MODEL["layers.0.experts.3.w1.weight"]).all()


def test_packing_twice_gives_the_same_bytes(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    pack(model, tmp_path / "a.safetensors", threads=1)
    pack(model, tmp_path / "b.safetensors", threads=4)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("code_bits", ["auto", 8, 12, 16])
def test_code_bits(model: pathlib.Path, tmp_path: pathlib.Path, code_bits: Any) -> None:
    pack(model, tmp_path / "p.safetensors", code_bits=code_bits)
    unpack(tmp_path / "p.safetensors", tmp_path / "u.safetensors")
    assert (tmp_path / "u.safetensors").read_bytes() == model.read_bytes()
    with open_packed(tmp_path / "p.safetensors") as f:
        used = {g.info.code_bits for g in f.groups.values()}
    assert used == {code_bits} if code_bits != "auto" else used < {8, 12}


def test_the_table_of_the_paper(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    pack(model, tmp_path / "p.safetensors", dictionary="qmoe-2023")
    unpack(tmp_path / "p.safetensors", tmp_path / "u.safetensors")
    assert (tmp_path / "u.safetensors").read_bytes() == model.read_bytes()
    with open_packed(tmp_path / "p.safetensors") as f:
        assert {e.dictionary.kind for g in f.groups.values() for e in g} == {"table"}


def test_own_dictionaries_and_the_bank_holds_only_what_is_used(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def design(zeros: float) -> Any:
        planner = codec.BankPlanner(code_bits=8)
        planner.add(np.sign(ternary((200, 400), 1, zeros)).astype(np.int8))
        (dictionary,) = planner.choose()
        return dictionary

    unused, used = design(0.3), design(0.95)
    packed = tmp_path / "p.safetensors"
    safetensors.numpy.save_file({"x": ternary((200, 400), 2, 0.95)}, tmp_path / "sparse.safetensors")
    pack(tmp_path / "sparse.safetensors", packed, dictionary=(unused, used))
    with open_packed(packed) as f:
        assert len(f.files[0].metadata.dictionaries) == 1
        assert f["x"].expert(0).dictionary == used
    assert verify(packed, deep=True).ok
    size = packed.stat().st_size
    pack(tmp_path / "sparse.safetensors", packed, dictionary=unused)
    assert packed.stat().st_size > size
    with pytest.raises(ValueError, match="code bits"):
        pack(model, tmp_path / "x.safetensors", dictionary=(used, codec.BankPlanner(code_bits=12).choose()[0]))


def test_special_values_are_kept(tmp_path: pathlib.Path) -> None:
    u32 = np.uint32
    base = ternary((6, 50), 1).view(u32)
    cases = {
        "negative_zero": (2, 0x8000_0000),
        "nan": (5, 0x7FC0_0001),
        "signalling_nan": (0, 0x7F80_0001),
        "infinity": (3, 0xFF80_0000),
        "third_value": (4, 0x3E00_1234),
    }
    tensors: Raw = {}
    for name, (row, bits) in cases.items():
        changed = base.copy()
        changed[row, 17] = bits
        tensors[name] = ("F32", (6, 50), changed.tobytes())
    changed = base.copy()
    changed[:, 0] = np.where(changed == 0, u32(1), u32(0)).max(axis=1)  # subnormal: a third value
    tensors["subnormal_third"] = ("F32", (6, 50), changed.tobytes())
    levels = np.where(base == 0, u32(0), np.where(base >> u32(31), u32(0x8000_0001), u32(0x7F7F_FFFF)))
    tensors["extreme_levels"] = ("F32", (6, 50), levels.tobytes())
    both_negative = np.where(base == 0, u32(0), np.where(base >> u32(31), u32(0xC000_0000), u32(0xBF80_0000)))
    tensors["both_negative"] = ("F32", (6, 50), both_negative.tobytes())
    both_positive = both_negative & u32(0x7FFF_FFFF)
    tensors["both_positive"] = ("F32", (6, 50), both_positive.tobytes())
    tensors["all_zero"] = ("F32", (6, 50), bytes(1200))
    tensors["only_negative"] = ("F32", (6, 50), np.where(base >> u32(31), base, u32(0)).tobytes())
    tensors["constant"] = ("F32", (6, 50), np.full((6, 50), 1.5, np.float32).tobytes())
    for name, bits in {"bf16_nan": 0x7FC1, "bf16_minus_zero": 0x8000, "bf16_inf": 0x7F80}.items():
        row = np.zeros((6, 50), np.uint16)
        row[1, 1] = bits
        tensors[name] = ("BF16", (6, 50), row.tobytes())
    tensors["f8"] = ("F8_E4M3", (6, 50), bytes(range(100)) * 3)
    tensors["c64"] = ("C64", (6, 5), bytes(240))
    source, packed, again = (tmp_path / f"{n}.safetensors" for n in "abc")
    write_raw(source, tensors)
    report = pack(source, packed)
    assert {g.name for g in report.groups} == {
        "extreme_levels", "both_negative", "both_positive", "all_zero", "only_negative", "constant",
    }  # fmt: skip
    reasons = {t.name: t.reason for t in report.passthrough}
    assert {n: reasons[n] for n in cases} == {
        n: f"{'ternary but for -0' if n == 'negative_zero' else 'not ternary'}: row {row}" for n, (row, _) in cases.items()
    }
    assert reasons["bf16_minus_zero"] == "ternary but for -0: row 1"
    assert reasons["f8"] == "dtype F8_E4M3"
    unpack(packed, again)
    assert read_raw(again) == tensors
    assert again.read_bytes() == source.read_bytes()
    with open_packed(packed) as f:
        assert f["only_negative"].expert(0).levels[:, 1].tolist() == [0.0] * 6
        assert f["both_negative"].expert(0).levels[0].tolist() == [-2.0, -1.0]
        assert f["both_positive"].expert(0).levels[0].tolist() == [1.0, 2.0]
        assert f["constant"].expert(0).decode().min() == 1


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
def test_every_float_type(tmp_path: pathlib.Path, dtype: str) -> None:
    numbers = ternary((3, 40, 60), 4)
    data = {
        "F16": numbers.astype(np.float16).tobytes(),
        "BF16": (numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes(),
        "F32": numbers.tobytes(),
        "F64": numbers.astype(np.float64).tobytes(),
    }[dtype]
    write_raw(tmp_path / "a.safetensors", {"x": (dtype, (3, 40, 60), data)})
    assert [g.dtype for g in pack(tmp_path / "a.safetensors", tmp_path / "p.safetensors").groups] == [dtype]
    unpack(tmp_path / "p.safetensors", tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    with open_packed(tmp_path / "p.safetensors") as f:
        assert (f["x"].dense(np.float32) == numbers).all()
        assert f["x"].dense().tobytes() == data
        assert check_official(tmp_path / "p.safetensors")


def test_what_would_not_become_smaller_passes_through(tmp_path: pathlib.Path) -> None:
    safetensors.numpy.save_file({"narrow.weight": ternary((50, 2))}, tmp_path / "a.safetensors")
    report = pack(tmp_path / "a.safetensors", tmp_path / "p.safetensors")
    assert report.groups == ()
    assert report.passthrough[0].reason.startswith("not smaller: ")
    with open_packed(tmp_path / "p.safetensors") as f:
        assert f.files[0].metadata.dictionaries == ()
    unpack(tmp_path / "p.safetensors", tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_no_tensors_at_all(tmp_path: pathlib.Path) -> None:
    safetensors.numpy.save_file({}, tmp_path / "a.safetensors")
    pack(tmp_path / "a.safetensors", tmp_path / "p.safetensors")
    assert verify(tmp_path / "p.safetensors", deep=True).ok
    unpack(tmp_path / "p.safetensors", tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_a_source_of_another_writer(tmp_path: pathlib.Path) -> None:
    """Unaligned tensors, an odd header, another order: legal safetensors; the tensors come back, the layout does not."""
    a, b = ternary((20, 30), 1), dense((4,), 2, np.float64)
    header = json.dumps({
        "odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F64", "shape": [4], "data_offsets": [3, 35]},
        "a": {"dtype": "F32", "shape": [20, 30], "data_offsets": [35, 35 + a.nbytes]},
    }, indent=1).encode() + b"  \n "  # fmt: skip
    header += b" " * (len(header) % 2 == 0)
    source = tmp_path / "a.safetensors"
    source.write_bytes(struct.pack("<Q", len(header)) + header + b"xyz" + b.tobytes() + a.tobytes())
    pack(source, tmp_path / "p.safetensors")
    check_official(tmp_path / "p.safetensors")
    unpack(tmp_path / "p.safetensors", tmp_path / "b.safetensors")
    assert read_raw(tmp_path / "b.safetensors") == read_raw(source)


def test_wrong_inputs(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    packed = tmp_path / "p.safetensors"
    pack(model, packed)
    with pytest.raises(ValueError, match="already packed"):
        pack(packed, tmp_path / "q.safetensors")
    with pytest.raises(FormatError) as caught:
        unpack(model, tmp_path / "q.safetensors")
    assert caught.value.reason == "not_packed"
    with pytest.raises(FileNotFoundError):
        pack(tmp_path / "gone", tmp_path / "q.safetensors")
    (tmp_path / "void").mkdir()
    with pytest.raises(FileNotFoundError):
        pack(tmp_path / "void", tmp_path / "q.safetensors")
    before = model.read_bytes()
    os.link(model, tmp_path / "hard.safetensors")
    for same in (model, tmp_path / "hard.safetensors", tmp_path / "void/../model.safetensors"):
        with pytest.raises(ValueError, match="same"):
            pack(model, same)
    assert model.read_bytes() == before
    folder = write_checkpoint(tmp_path / "in", 1)
    with pytest.raises(ValueError, match="inside"):
        pack(folder, folder / "out")
    with pytest.raises(ValueError, match="inside"):
        pack(folder / "model.safetensors", tmp_path / "in")
    (folder / "model-00001-of-00001.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="no part of the checkpoint"):
        pack(folder, tmp_path / "out")
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="both"):
        pack(folder, tmp_path / "out")
    write_raw(tmp_path / "r.safetensors", {"qmoecodec.x": ("U8", (1,), b"a")})
    with pytest.raises(FormatError) as caught:
        pack(tmp_path / "r.safetensors", tmp_path / "q.safetensors")
    assert caught.value.reason == "reserved_name"
    (tmp_path / "t.safetensors").write_bytes(model.read_bytes()[:-1])
    with pytest.raises(FormatError) as caught:
        pack(tmp_path / "t.safetensors", tmp_path / "q.safetensors")
    assert caught.value.reason == "truncated"
    assert not (tmp_path / "q.safetensors").exists()
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob(".*"))


def test_progress_reaches_its_end(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    calls: list[tuple[str, int, int]] = []
    pack(model, tmp_path / "p.safetensors", progress=lambda *call: calls.append(call))
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    assert {stage for stage, _, _ in calls} == {"scan", "encode"}
    assert calls[-1][1] == calls[-1][2] == 2 * sum(t.nbytes for t in MODEL.values())
    calls.clear()
    unpack(tmp_path / "p.safetensors", tmp_path / "u.safetensors", progress=lambda *call: calls.append(call))
    assert calls[-1] == ("decode", sum(t.nbytes for t in MODEL.values()), sum(t.nbytes for t in MODEL.values()))
