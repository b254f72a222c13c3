"""Pack and unpack: names, layouts, directories, shards, wrong inputs."""

import json
import os
import pathlib
import shutil
import struct
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from qmoecodec import codec
from qmoecodec.container import open as open_packed
from qmoecodec.container import pack, unpack, verify
from qmoecodec.container.header import header_bytes, lay_out
from qmoecodec.container.naming import find_candidates, name_groups, short_name, split_expert_name
from qmoecodec.errors import FormatError

Raw = dict[str, tuple[str, tuple[int, ...], bytes]]


def ternary(shape: tuple[int, ...], seed: int = 0, zeros: float = 0.8, dtype: Any = np.float32) -> Any:
    """Random ternary rows; every level exact in every float type."""
    rng = np.random.default_rng(seed)
    digits = rng.choice([0, -1, 1], size=shape, p=[zeros, (1 - zeros) / 2, (1 - zeros) / 2])
    low = -rng.integers(1, 64, size=(*shape[:-1], 1)) / 16
    high = rng.integers(1, 64, size=(*shape[:-1], 1)) / 16
    return np.where(digits < 0, low, np.where(digits > 0, high, 0)).astype(dtype)


def dense(shape: tuple[int, ...], seed: int = 0, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def write_raw(path: pathlib.Path, tensors: Raw, metadata: dict[str, str] | None = None) -> None:
    """Write any dtype, as the safetensors library does."""
    placed = lay_out((name, dtype, shape) for name, (dtype, shape, _) in tensors.items())
    path.write_bytes(header_bytes(placed, metadata) + b"".join(tensors[name][2] for name in placed))


def read_raw(path: pathlib.Path) -> Raw:
    """Read a safetensors file without this package."""
    data = path.read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + n])
    header.pop("__metadata__", None)
    body = data[8 + n :]
    return {
        name: (e["dtype"], tuple(e["shape"]), body[e["data_offsets"][0] : e["data_offsets"][1]])
        for name, e in header.items()
    }


def check_official(path: pathlib.Path) -> set[str]:
    """Open with the official library and touch every tensor; return the names."""
    with safetensors.safe_open(path, "np") as f:
        for name in f.keys():  # noqa: SIM118  # not a dict
            assert -1 not in f.get_slice(name).get_shape()
            f.get_tensor(name) if f.get_slice(name).get_dtype() != "BF16" else None
        return set(f.keys())


MODEL = {
    **{f"encoder.mlp.experts.expert_{i}.wi.weight": ternary((24, 40), i) for i in range(3)},
    **{f"encoder.mlp.experts.expert_{i}.wo.weight": ternary((40, 24), i + 9, 0.5) for i in range(3)},
    **{f"layers.0.experts.{i}.w1.weight": ternary((16, 32), i + 20, dtype=np.float16) for i in (0, 1, 3)},
    "layers.0.experts.2.w1.weight": dense((16, 32), dtype=np.float16),
    "fused.experts.gate_up": ternary((2, 20, 30), 5),
    "head.weight": ternary((30, 50), 6, dtype=np.float64),
    "norm.weight": np.ones(40, np.float32),
    "embedding.weight": dense((30, 20), 3),
    "steps": np.arange(5),
    "flag": np.array(True),
    "empty": np.zeros((0, 7), np.float32),
}


@pytest.fixture
def model(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(MODEL, path, metadata={"format": "pt", "é": 'x"\n'})
    return path


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
    assert {n: reasons[n] for n in cases} == {n: f"not ternary: row {row}" for n, (row, _) in cases.items()}
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


# --- names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("encoder.block.1.layer.1.mlp.experts.expert_3.wi.weight", "encoder.block.1.layer.1.mlp.experts.expert_{}.wi.weight"),
        ("model.layers.0.block_sparse_moe.experts.7.w1.weight", "model.layers.0.block_sparse_moe.experts.{}.w1.weight"),
        ("experts.0", "experts.{}"),
        ("experts.4294967295.w", "experts.{}.w"),
        ("experts.4294967296.w", None),
        ("experts.03.w", None),
        ("experts.expert_00.w", None),
        ("experts.-1.w", None),
        ("experts.1a.w", None),
        ("experts.٣.w", None),
        ("myexperts.1.w", None),
        ("layers.3.weight", None),
        ("experts.{}.1.w", None),
        ("a{}.experts.1.w", None),
        ("experts.1.experts.2.w", "experts.1.experts.{}.w"),
    ],
)
def test_expert_names(name: str, expected: str | None) -> None:
    found = split_expert_name(name)
    assert (found[0] if found else None) == expected
    if found:
        assert found[0].replace("{}", str(found[1])) == name


def test_group_names_do_not_collide() -> None:
    shape = (8, 8)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = dict.fromkeys(
        ["a", "a.weight", "b.weight", "b_codes", "c_levels", "c", "experts.0.w.weight", "experts.w", ".weight"],
        ("F32", shape),
    )
    tensors["experts.1.w.weight"] = ("F32", (8, 9))
    tensors["experts.2.w.weight"] = ("F16", (8, 8))
    candidates, others = find_candidates(tensors)
    assert others == {}
    names = name_groups(candidates, tensors.keys())
    by_source = dict(zip(((c.source, c.dtype, c.shape) for c in candidates), names, strict=True))
    assert len(set(names)) == len(names) == 11
    assert by_source["a", "F32", shape] == "a"
    assert by_source["a.weight", "F32", shape] == "a.weight"
    assert by_source["b.weight", "F32", shape] == "b.weight"  # `b_codes` is a tensor
    assert by_source["c", "F32", shape] == "c_2"  # `c_levels` is one too
    assert by_source[".weight", "F32", shape] == ".weight"
    stacks = [n for (source, _, _), n in by_source.items() if source == "experts.{}.w.weight"]
    assert by_source["experts.w", "F32", shape] == "experts.w"
    assert stacks == ["experts.{}.w.weight", "experts.w_2", "experts.w_3"]
    assert short_name(candidates[0]) == ".weight"


def test_colliding_names_round_trip(tmp_path: pathlib.Path) -> None:
    tensors = {
        "a": ternary((30, 40), 1),
        "a.weight": ternary((30, 40), 2),
        "a_codes": dense((3, 3)),
        "a.weight_levels": dense((3,)),
        "experts.0.w": ternary((30, 40), 3),
        "experts.1.w": ternary((30, 41), 4),
        "experts.w": ternary((30, 40), 5),
        "experts.{}.w": ternary((30, 40), 6),
    }
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors")
    report = pack(tmp_path / "a.safetensors", tmp_path / "p.safetensors")
    assert len(report.groups) == 6
    unpack(tmp_path / "p.safetensors", tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


# --- directories


def write_checkpoint(folder: pathlib.Path, shards: int) -> pathlib.Path:
    """A Hugging Face directory; experts of one layer are spread over the shards."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "x"}')
    (folder / "sub").mkdir()
    (folder / "sub/tokenizer.model").write_bytes(b"\0\1")
    names = sorted(MODEL)
    if shards == 1:
        safetensors.numpy.save_file(MODEL, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i::shards]
        safetensors.numpy.save_file({n: MODEL[n] for n in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1, "total_parameters": 2.5}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read_checkpoint(folder: pathlib.Path) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= safetensors.numpy.load_file(file)
    return tensors


def check_same(tensors: dict[str, Any]) -> None:
    assert tensors.keys() == MODEL.keys()
    for name, value in MODEL.items():
        assert tensors[name].dtype == value.dtype
        assert tensors[name].shape == value.shape
        assert tensors[name].tobytes() == value.tobytes()


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("max_shard_size", [5_000_000_000, 2_500])
def test_directories(tmp_path: pathlib.Path, shards: int, max_shard_size: int) -> None:
    source = write_checkpoint(tmp_path / "in", shards)
    report = pack(source, tmp_path / "packed", max_shard_size=max_shard_size)
    packed = tmp_path / "packed"
    files = {p.relative_to(packed).as_posix() for p in packed.rglob("*") if p.is_file()}
    assert set(report.files) == files
    assert {"config.json", "sub/tokenizer.model"} <= files
    weights = sorted(packed.glob("*.safetensors"))
    assert len(weights) == 1 if max_shard_size > 10_000 else len(weights) > 2
    assert sum(w.stat().st_size for w in weights) == report.n_packed_bytes
    for file in weights:
        check_official(file)
        assert len(weights) == 1 or verify(file, deep=True).ok
    assert verify(packed, deep=True).problems == ()
    assert len(report.groups) == 5
    with open_packed(packed) as f:
        assert f["encoder.mlp.experts.wi"].shape == (3, 24, 40)
        assert (f.tensors["norm.weight"] == 1).all()
        assert len(f.groups) == 5
        assert len(f.tensors) == 6
    again = unpack(packed, tmp_path / "out", max_shard_size=max_shard_size)
    check_same(read_checkpoint(tmp_path / "out"))
    assert (tmp_path / "out/sub/tokenizer.model").read_bytes() == b"\0\1"
    if max_shard_size < 10_000:
        index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == MODEL.keys()
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in MODEL.values())
        if shards > 1:
            assert index["metadata"]["total_parameters"] == 2.5
        for file_name in set(index["weight_map"].values()):
            with safetensors.safe_open(tmp_path / "out" / file_name, "np") as g:
                assert g.metadata() == {"format": "pt"}
    assert again.n_tensors == len(MODEL)


def test_a_sharded_directory_into_one_file_and_back(tmp_path: pathlib.Path) -> None:
    source = write_checkpoint(tmp_path / "in", 3)
    report = pack(source, tmp_path / "p.safetensors")
    assert report.files == ("p.safetensors",)
    pack(source, tmp_path / "packed", max_shard_size=2_500)
    unpack(tmp_path / "packed", tmp_path / "u.safetensors")
    unpack(tmp_path / "p.safetensors", tmp_path / "v.safetensors")
    check_same(safetensors.numpy.load_file(tmp_path / "u.safetensors"))
    assert (tmp_path / "u.safetensors").read_bytes() == (tmp_path / "v.safetensors").read_bytes()


def test_existing_outputs(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    target = tmp_path / "p.safetensors"
    target.write_text("old")
    with pytest.raises(FileExistsError):
        pack(model, target, overwrite=False)
    assert target.read_text() == "old"
    pack(model, target)
    assert verify(target).ok
    source = write_checkpoint(tmp_path / "in", 1)
    other = tmp_path / "documents"
    other.mkdir()
    (other / "letter").write_text("dear")
    with pytest.raises(FileExistsError, match="left alone"):
        pack(source, other)
    assert (other / "letter").read_text() == "dear"
    (tmp_path / "new").mkdir()
    pack(source, tmp_path / "new", max_shard_size=2_500)
    with pytest.raises(FileExistsError):
        pack(source, tmp_path / "new", overwrite=False)
    pack(source, tmp_path / "new")  # the shards of before are gone
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"config.json", "model.safetensors", "sub"}
    with pytest.raises(FileExistsError, match="directory"):
        pack(model, tmp_path / "new")
    with pytest.raises(FileNotFoundError):
        pack(model, tmp_path / "nowhere/p.safetensors")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def index_with(folder: pathlib.Path, **changes: object) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].update(changes)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("what", ["source", "packed"])
@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("/etc/hostname", "shard_path"),
        ("../in/model-00001-of-00003.safetensors", "shard_path"),
        ("..", "shard_path"),
        ("", "shard_path"),
        ("a\\b", "shard_path"),
        ("a\0b", "shard_path"),
        ("gone.safetensors", "shard_missing"),
        ("link.safetensors", "shard_path"),
        ("loop.safetensors", "shard_missing"),
        ("sub", "shard_path"),
        (3, "shard_index"),
    ],
)
def test_bad_names_in_an_index(tmp_path: pathlib.Path, file: object, reason: str, what: str) -> None:
    folder = write_checkpoint(tmp_path / "in", 3)
    if what == "packed":
        pack(folder, tmp_path / "packed", max_shard_size=2_500)
        folder = tmp_path / "packed"
    shutil.copy(next(folder.glob("*.safetensors")), tmp_path / "outside.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    index_with(folder, steps=file)
    with pytest.raises(FormatError) as caught:
        if what == "packed":
            open_packed(folder)
        else:
            pack(folder, tmp_path / "out")
    assert caught.value.reason == reason
    assert not (tmp_path / "out").exists()


def test_a_packed_directory_with_and_without_an_index(tmp_path: pathlib.Path) -> None:
    pack(write_checkpoint(tmp_path / "in", 3), tmp_path / "packed", max_shard_size=2_500)
    folder = tmp_path / "packed"
    (folder / "model.safetensors").write_bytes(b"not named by the index, so ignored")
    with open_packed(folder) as f:
        assert [file.path.name for file in f.files] == list(dict.fromkeys((f.shards.weight_map or {}).values()))
    unpack(folder, tmp_path / "out.safetensors")
    index = folder / "model.safetensors.index.json"
    kept = index.read_bytes()
    os.truncate(index, 100_000_001)

    def reason() -> str:
        with pytest.raises(FormatError) as caught:
            open_packed(folder)
        return caught.value.reason

    assert reason() == "shard_index"
    index.write_bytes(kept)
    assert verify(folder).ok
    index.unlink()
    assert reason() == "header_size"
    (folder / "model.safetensors").unlink()
    assert reason() == "shard_missing"
    assert [p.reason for p in verify(folder).problems] == ["shard_missing"]


@pytest.mark.parametrize("what", ["source", "packed"])
def test_index_and_shards_must_agree(tmp_path: pathlib.Path, what: str) -> None:
    folder = write_checkpoint(tmp_path / "in", 3)
    if what == "packed":
        pack(folder, tmp_path / "packed", max_shard_size=2_500)
        folder = tmp_path / "packed"
    index = folder / "model.safetensors.index.json"
    good = index.read_text()

    def reason() -> str:
        with pytest.raises(FormatError) as caught:
            open_packed(folder) if what == "packed" else pack(folder, tmp_path / "out")
        return caught.value.reason

    index_with(folder, unknown=json.loads(good)["weight_map"]["steps"])
    assert reason() == "shard_mismatch"
    value = json.loads(good)
    del value["weight_map"]["steps"]
    index.write_text(json.dumps(value))
    assert reason() == "shard_mismatch"
    index.write_text("[]")
    assert reason() == "header_json"
    index.write_text("{}")
    assert reason() == "shard_index"
    index.write_text('{"weight_map":{},"metadata":1}')
    assert reason() == "shard_index"
    index.write_text('{"weight_map":{"a":"b","a":"b"}}')
    assert reason() == "duplicate_key"
    index.write_text('{"weight_map":{"a":1.5}}')
    assert reason() == "json_number"


def test_two_shards_with_the_same_tensor(tmp_path: pathlib.Path) -> None:
    folder = write_checkpoint(tmp_path / "in", 3)
    safetensors.numpy.save_file({"steps": MODEL["steps"]}, folder / "more.safetensors")
    index_with(folder, more="more.safetensors")
    with pytest.raises(FormatError) as caught:
        pack(folder, tmp_path / "out")
    assert caught.value.reason == "source_conflict"


def test_two_packed_shards_that_stand_for_the_same_source(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "packed"
    folder.mkdir()
    safetensors.numpy.save_file({"x.weight": ternary((30, 40))}, tmp_path / "a.safetensors")
    safetensors.numpy.save_file({"x.weight": dense((30, 40))}, tmp_path / "b.safetensors")
    weight_map = {}
    for name in "ab":
        pack(tmp_path / f"{name}.safetensors", folder / f"{name}.safetensors")
        names = [n for n in read_raw(folder / f"{name}.safetensors") if not n.startswith("qmoecodec.")]
        weight_map |= dict.fromkeys(names, f"{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(FormatError) as caught:
        open_packed(folder)
    assert caught.value.reason == "source_conflict"


def test_a_hugging_face_cache(tmp_path: pathlib.Path) -> None:
    """Its snapshots are links into `blobs` beside them."""
    home = tmp_path / "models--x"
    (home / "blobs").mkdir(parents=True)
    (home / "snapshots").mkdir()
    plain = write_checkpoint(tmp_path / "in", 1)
    snapshot = home / "snapshots/0123"
    snapshot.mkdir()
    for i, name in enumerate(["config.json", "model.safetensors"]):
        shutil.move(plain / name, home / f"blobs/{i}")
        (snapshot / name).symlink_to(f"../../blobs/{i}")
    pack(snapshot, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "out")
    check_same(read_checkpoint(tmp_path / "out"))
    assert not (tmp_path / "packed/config.json").is_symlink()
    (snapshot / "vocab").symlink_to(tmp_path / "in/sub/tokenizer.model")
    with pytest.raises(ValueError, match="leaves the directory"):
        pack(snapshot, tmp_path / "packed2")
    assert not (tmp_path / "packed2").exists()


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


def test_metadata_that_differs_between_shards_is_reported(tmp_path: pathlib.Path) -> None:
    folder = write_checkpoint(tmp_path / "in", 3)
    file = folder / "model-00002-of-00003.safetensors"
    tensors = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file(tensors, file, metadata={"format": "np", "more": "1"})
    report = pack(folder, tmp_path / "p.safetensors")
    assert len(report.notes) == 1
    assert "'format'" in report.notes[0]
    with open_packed(tmp_path / "p.safetensors") as f:
        assert f.merged_metadata() == ({"format": "pt", "more": "1"}, [])


def test_progress_reaches_its_end(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    calls: list[tuple[str, int, int]] = []
    pack(model, tmp_path / "p.safetensors", progress=lambda *call: calls.append(call))
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    assert {stage for stage, _, _ in calls} == {"scan", "encode"}
    assert calls[-1][1] == calls[-1][2] == 2 * sum(t.nbytes for t in MODEL.values())
    calls.clear()
    unpack(tmp_path / "p.safetensors", tmp_path / "u.safetensors", progress=lambda *call: calls.append(call))
    assert calls[-1] == ("decode", sum(t.nbytes for t in MODEL.values()), sum(t.nbytes for t in MODEL.values()))
