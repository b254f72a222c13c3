"""Reading: one expert, a range of rows, levels, passthrough tensors; only what is asked for is touched."""

import pathlib
import struct
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import qmoecodec
from qmoecodec import codec
from qmoecodec.container import File, pack
from qmoecodec.container import open as open_packed
from qmoecodec.container.header import header_bytes, lay_out
from qmoecodec.container.ternary import check_levels, fill_rows, split_rows
from qmoecodec.errors import FormatError

RNG = np.random.default_rng(0)
DIGITS = RNG.choice([-1, 0, 1], size=(4, 30, 70), p=[0.1, 0.8, 0.1]).astype(np.int8)
LEVELS = np.stack([-RNG.integers(1, 9, (4, 30)), RNG.integers(1, 9, (4, 30))], axis=-1).astype(np.float32) / 4
DENSE = np.where(DIGITS < 0, LEVELS[..., :1], np.where(DIGITS > 0, LEVELS[..., 1:], 0)).astype(np.float32)


@pytest.fixture
def packed(tmp_path: pathlib.Path) -> pathlib.Path:
    tensors: dict[str, Any] = {f"m.experts.{i}.w.weight": DENSE[i] for i in range(4)}
    tensors |= {"fused": DENSE, "one.weight": DENSE[0].astype(np.float16)}
    tensors |= {"bias": np.float32([1, 2]), "flags": np.array([True, False]), "count": np.array(3)}
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors")
    pack(tmp_path / "a.safetensors", tmp_path / "p.safetensors")
    return tmp_path / "p.safetensors"


def test_groups(packed: pathlib.Path) -> None:
    with qmoecodec.open(packed) as f:
        assert list(f) == list(f.groups) == ["fused", "m.experts.w", "one"]
        assert len(f) == 3
        assert "one" in f
        assert "two" not in f
        group = f["m.experts.w"]
        assert (group.shape, group.dtype, len(group), group.name) == ((4, 30, 70), "F32", 4, "m.experts.w")
        assert (group.decode() == DIGITS).all()
        assert (group.dense() == DENSE).all()
        assert group.dense().dtype == np.float32
        assert group.dense(np.float64).dtype == np.float64
        assert (group.levels == LEVELS).all()
        assert (f["fused"].decode() == DIGITS).all()
        assert f["one"].shape == (1, 30, 70)
        assert f["one"].decode().shape == (30, 70)
        assert f["one"].dense().dtype == np.float16
        assert (f["one"].dense(np.float32) == DENSE[0].astype(np.float16)).all()
        assert "m.experts.w" in repr(group)
        assert "3 groups" in repr(f)
        with pytest.raises(KeyError):
            f["two"]


def test_experts_and_rows(packed: pathlib.Path) -> None:
    with open_packed(packed) as f:
        group = f["m.experts.w"]
        for e in range(4):
            expert = group.expert(e)
            assert expert.shape == (30, 70)
            assert (expert.decode() == DIGITS[e]).all()
            assert (expert.dense() == DENSE[e]).all()
            assert (expert.levels == LEVELS[e]).all()
            assert (expert.levels_as(np.float64) == LEVELS[e]).all()
            for begin, end in ((0, 30), (0, 0), (30, 30), (7, 8), (10, 20)):
                assert (expert.rows(begin, end) == DIGITS[e, begin:end]).all()
                assert expert.rows(begin, end).shape == (end - begin, 70)
            own = codec.decode_rows(expert.codes, expert.row_lengths, cols=70, dictionary=expert.dictionary)
            assert (own == DIGITS[e]).all()
        assert [expert.index for expert in group] == [0, 1, 2, 3]
        for bad in (-1, 4):
            with pytest.raises(IndexError):
                group.expert(bad)
        for begin, end in ((-1, 3), (4, 3), (0, 31)):
            with pytest.raises(IndexError):
                group.expert(0).rows(begin, end)


def test_encoded(packed: pathlib.Path) -> None:
    with open_packed(packed) as f:
        encoded = f["m.experts.w"].encoded()
        again = codec.encode(DIGITS, dictionary=encoded.dictionaries)
        assert (codec.decode(encoded) == DIGITS).all()
        assert (encoded.codes == again.codes).all()
        assert (encoded.row_lengths == again.row_lengths).all()
        assert (encoded.code_offsets == again.code_offsets).all()
        assert codec.decode(f["one"].encoded()).shape == (30, 70)


def test_tensors(packed: pathlib.Path) -> None:
    with open_packed(packed) as f:
        assert list(f.tensors) == ["bias", "count", "flags"]
        assert len(f.tensors) == 3
        assert f.tensors["bias"].tolist() == [1, 2]
        assert f.tensors["count"].shape == ()
        assert int(f.tensors["count"]) == 3
        assert f.tensors["flags"].tolist() == [True, False]
        assert f.tensors.dtype_name("flags") == "BOOL"
        assert f.tensors.shape("bias") == (2,)
        assert f.tensor_bytes("bias").tobytes() == struct.pack("<ff", 1, 2)
        assert not f.tensors["bias"].flags.writeable
        with pytest.raises(KeyError):
            f.tensors["fused"]


def test_types_that_numpy_lacks(tmp_path: pathlib.Path) -> None:
    bits = (DENSE.view(np.uint32) >> 16).astype(np.uint16)
    raw = {"w": ("BF16", DENSE.shape, bits.tobytes()), "b": ("BF16", (2,), b"\x80\x3f\x00\x40"), "f8": ("F8_E5M2", (1,), b"<")}
    placed = lay_out((name, dtype, shape) for name, (dtype, shape, _) in raw.items())
    data = header_bytes(placed, None) + b"".join(raw[name][2] for name in placed)
    (tmp_path / "a.safetensors").write_bytes(data)
    pack(tmp_path / "a.safetensors", tmp_path / "p.safetensors")
    with open_packed(tmp_path / "p.safetensors") as f:
        assert f.tensors["b"].dtype == np.uint16
        assert f.tensors.dtype_name("b") == "BF16"
        assert f.tensors["f8"].tolist() == [0x3C]
        assert (f["w"].dense() == bits).all()
        assert (f["w"].dense(np.float32) == DENSE).all()
        assert (f["w"].expert(1).levels == (LEVELS[1].view(np.uint32) >> 16)).all()
        assert (f["w"].expert(1).levels_as(np.float32) == LEVELS[1]).all()


@pytest.mark.parametrize("mapped", [True, False])
def test_damage_elsewhere_does_not_matter(packed: pathlib.Path, mapped: bool) -> None:
    """One expert is readable when all others, and every other tensor, are broken: nothing else is touched."""
    with open_packed(packed) as f:
        (file,) = f.files
        begin = file.header.data_begin
        codes = file.header.tensors["m.experts.w_codes"]
        keep = range(*(int(n) for n in file.group("m.experts.w").code_offsets[2:4]))
        spare = {codes.begin + i for i in keep}
        others = [file.header.tensors[n] for n in ("fused_codes", "one_codes", "bias", "count", "flags")]
    data = bytearray(packed.read_bytes())
    for info in (codes, *others):
        for i in range(info.begin, info.end):
            if i not in spare:
                data[begin + i] ^= 0xFF
    packed.write_bytes(data)
    with File(packed, mapped=mapped) as f:
        assert (f["m.experts.w"].expert(2).decode() == DIGITS[2]).all()
        for touch in (lambda: f["m.experts.w"].expert(1), lambda: f["fused"].decode(), lambda: f.tensors["bias"]):
            with pytest.raises(FormatError) as caught:
                touch()
            assert caught.value.reason == "checksum"


def test_checksums_are_computed_once(packed: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zlib

    with open_packed(packed) as f:
        first = f["m.experts.w"].expert(0)
        f.tensors["bias"]
        monkeypatch.setattr(zlib, "crc32", None)
        assert (f["m.experts.w"].expert(0).codes == first.codes).all()
        assert f.tensors["bias"].tolist() == [1, 2]


def test_a_closed_file(packed: pathlib.Path) -> None:
    f = open_packed(packed)
    kept = f.tensors["bias"]
    expert = f["one"].expert(0)
    f.close()
    f.close()
    assert kept.tolist() == [1, 2]
    for touch in (lambda: f.tensors["bias"], lambda: f["one"].expert(0), expert.decode):
        with pytest.raises(ValueError, match="closed"):
            touch()


def test_what_is_not_a_packed_file(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_packed(tmp_path / "gone")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(FormatError) as caught:
        open_packed(tmp_path / "empty")
    assert caught.value.reason == "truncated"
    safetensors.numpy.save_file({"a": np.zeros(3)}, tmp_path / "plain.safetensors", metadata={"format": "np"})
    with pytest.raises(FormatError) as caught:
        open_packed(tmp_path / "plain.safetensors")
    assert caught.value.reason == "not_packed"


# --- values


@pytest.mark.parametrize("unsigned", [np.uint16, np.uint32, np.uint64])
def test_splitting_keeps_every_bit(unsigned: Any) -> None:
    dtype = {2: "F16", 4: "F32", 8: "F64"}[np.dtype(unsigned).itemsize]
    float_type = {2: np.float16, 4: np.float32, 8: np.float64}[np.dtype(unsigned).itemsize]
    tiny, huge = np.finfo(float_type).smallest_subnormal, np.finfo(float_type).max
    pairs = [(-huge, huge), (-tiny, tiny), (tiny, 2 * tiny), (-huge, -tiny), (-1, 0), (0, 1), (0, 0), (tiny, huge), (1, 3)]
    cols = 1100  # beyond one block of the kernel
    digits = np.random.default_rng(1).integers(-1, 2, (len(pairs), cols)).astype(np.int8)
    levels = np.array(pairs, float_type)
    digits[levels[:, 0] == 0] = np.abs(digits[levels[:, 0] == 0])
    digits[levels[:, 1] == 0] = -np.abs(digits[levels[:, 1] == 0])
    digits[(levels == 0).all(axis=1)] = 0
    dense = np.where(digits < 0, levels[:, :1], np.where(digits > 0, levels[:, 1:], 0)).astype(float_type)
    got, got_levels, bad_row = split_rows(dense.view(unsigned), dtype=dtype)
    assert bad_row == -1
    assert (got == digits).all()
    assert (got_levels.view(float_type) == levels).all()
    assert (fill_rows(got, got_levels) == dense.view(unsigned)).all()
    check_levels(got_levels, dtype=dtype)
    for at in (0, 511, 512, 1099):
        for value in (np.nan, np.inf, -np.inf, -0.0, 7):
            broken = dense.copy()
            broken[8, at] = value
            assert split_rows(broken.view(unsigned), dtype=dtype)[2] == 8


@pytest.mark.parametrize(
    ("pair", "good"),
    [
        ((-1, 1), True), ((0, 1), True), ((-1, 0), True), ((0, 0), True), ((-2, -1), True), ((1, 2), True),
        ((1, 1), False), ((1, -1), False), ((1, 0), False), ((0, -1), False), ((-1, -2), False), ((-0.0, 1), False),
        ((-1, -0.0), False), ((-0.0, -0.0), False), ((np.nan, 1), False), ((-1, np.nan), False), ((-np.inf, 1), False),
        ((-1, np.inf), False),
    ],
)  # fmt: skip
def test_levels(pair: tuple[float, float], good: bool) -> None:
    levels = np.array([(-1, 1), pair], np.float32).view(np.uint32)
    if good:
        check_levels(levels, dtype="F32")
        return
    with pytest.raises(FormatError) as caught:
        check_levels(levels, dtype="F32")
    assert (caught.value.reason, caught.value.where) == ("level_value", {"row": 1})
