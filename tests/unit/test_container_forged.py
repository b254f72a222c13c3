"""Packed files made by hand, codeword by codeword: what reading and verifying say of them, and of which place."""

import importlib
import json
import os
import pathlib
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import qmoecodec
from qmoecodec.container import packed as packed_module
from qmoecodec.container import unpack, verify
from qmoecodec.container.reader import File
from qmoecodec.container.verify import find_errors
from qmoecodec.dictionary import parse
from qmoecodec.dictionary.serial import pack_two_bits
from qmoecodec.errors import FormatError

# The dictionary: 0 is a zero, 1 is -, 2 is +, 3 is two zeros, 4 is + and a zero; all others are unused.
ZERO, MINUS, PLUS, ZEROS, PLUS_ZERO, UNUSED = range(6)
DICTIONARY = bytes([1, 1, 1, 2, 2] + [0] * 251) + pack_two_bits(np.uint8([0, 1, 2, 0, 0, 2, 0]))
Tensors = dict[str, list[Any]]  # name -> [dtype, shape, bytes]
SIZES = {"U64": 8, "F32": 4, "U32": 4, "U16": 2}
verify_module = importlib.import_module("qmoecodec.container.verify")  # the name in the package is the function
Change = Callable[[Tensors, dict[str, Any]], None]
GOOD = [[[ZERO, MINUS, PLUS, ZERO], [ZEROS, ZEROS], [PLUS, ZEROS, MINUS]]] * 2


def forge(
    experts: Sequence[Sequence[Sequence[int]]] = GOOD, *, cols: int = 4, name: str = "g", levels: Any = (-1, 1), first: int = 0,
    change: Change | None = None, passthrough: str = "t", late: Change | None = None,
) -> bytes:  # fmt: skip
    """Return a packed file with one stacked group; `change` is made before the checksums, `late` after those of experts."""
    n, rows = len(experts), len(experts[0])
    codes = [b"".join(bytes(row) for row in expert) for expert in experts]
    lengths = np.uint8([[len(row) for row in expert] for expert in experts]).reshape(n, rows)
    base = int(lengths.min(initial=255)) if lengths.size else 0
    tensors: Tensors = {
        f"{name}_levels": ["F32", [n, rows, 2], np.broadcast_to(np.float32(levels), (n, rows, 2)).tobytes()],
        f"{name}_checksums": ["U32", [n], bytes(4 * n)],
        f"{name}_code_offsets": ["U64", [n + 1], np.cumsum([0, *map(len, codes)]).astype(np.uint64).tobytes()],
        f"{name}_codes": ["U8", [sum(map(len, codes))], b"".join(codes)],
        f"{name}_dictionary_index": ["U8", [n], bytes(n)],
        f"{name}_row_lengths": ["U8", [n, rows], (lengths - base).tobytes()],
        "qmoecodec.dictionary.0": ["U8", [len(DICTIONARY)], DICTIONARY],
        passthrough: ["U8", [3], b"abc"],
        "qmoecodec.header_crc32": ["U32", [1], bytes(4)],
    }
    text: dict[str, Any] = {
        "format_version": "1.0", "required_features": [], "optional_features": [],
        "dictionaries": [{"kind": "table", "code_bits": 8, "threshold": 256, "crc32": ""}],
        "groups": [{"name": name, "layout": "stacked", "source": f"{name}.{{}}.w", "shape": [n, rows, cols], "dtype": "F32",
                    "code_bits": 8, "row_length_base": base, "expert_ranges": [[first, first + n]] if n else []}],
        "passthrough": {passthrough: ""},
    }  # fmt: skip
    if change is not None:
        change(tensors, text)
    offsets = np.frombuffer(tensors[f"{name}_code_offsets"][2], np.uint64)
    sums = b""
    for e in range(text["groups"][0]["shape"][0]):
        parts = [tensors[f"{name}_codes"][2][int(offsets[e]) : int(offsets[e + 1])]]
        for role in ("row_lengths", "levels", "dictionary_index"):
            data = tensors[f"{name}_{role}"][2]
            parts.append(data[e * len(data) // n : (e + 1) * len(data) // n])
        sums += struct.pack("<I", zlib.crc32(b"".join([*parts, offsets[e : e + 2].tobytes()])))
    tensors[f"{name}_checksums"][2] = sums
    for i, entry in enumerate(text["dictionaries"]):
        entry["crc32"] = f"{zlib.crc32(tensors[f'qmoecodec.dictionary.{i}'][2]):08x}"
    for key in text["passthrough"]:
        text["passthrough"][key] = f"{zlib.crc32(tensors[key][2]):08x}"
    if late is not None:
        late(tensors, text)
    (own,) = tensors.pop("__metadata__", [{}])
    metadata = own | {"qmoecodec": json.dumps(text, sort_keys=True, separators=(",", ":"))}
    header: dict[str, Any] = {"__metadata__": metadata}
    body = b""
    for key in sorted(tensors, key=lambda key: -SIZES.get(tensors[key][0], 1)):
        dtype, shape, data = tensors[key]
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    return assemble(header, body)


def join(one: bytes, two: bytes) -> bytes:
    """Put two files with a group and the same dictionary into one."""
    both = []
    for data in (one, two):
        (n,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + n])
        text = json.loads(header.pop("__metadata__")["qmoecodec"])
        both.append((text, {key: (e, data[8 + n :][slice(*e["data_offsets"])]) for key, e in header.items()}))
    text, tensors = both[0][0], both[0][1] | both[1][1]
    text["groups"] += both[1][0]["groups"]
    text["passthrough"] |= both[1][0]["passthrough"]
    header = {"__metadata__": {"qmoecodec": json.dumps(text, sort_keys=True, separators=(",", ":"))}}
    body = b""
    for key, (entry, data) in sorted(tensors.items(), key=lambda item: -SIZES.get(item[1][0]["dtype"], 1)):
        header[key] = entry | {"data_offsets": [len(body), len(body) + len(data)]}
        body += data
    return assemble(header, body)


def assemble(header: dict[str, Any], body: bytes) -> bytes:
    """Put header and data together, with the header's checksum."""
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    head = struct.pack("<Q", len(head)) + head
    at = header["qmoecodec.header_crc32"]["data_offsets"][0]
    return head + body[:at] + struct.pack("<I", zlib.crc32(head)) + body[at + 4 :]


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "f.safetensors"


def found(path: pathlib.Path, *, deep: bool = False) -> list[tuple[str, dict[str, object]]]:
    return [(problem.reason, problem.where) for problem in verify(path, deep=deep).problems]


def error_of(touch: Callable[[], object]) -> FormatError:
    with pytest.raises(FormatError) as caught:
        touch()
    return caught.value


def put(name: str, data: bytes, at: int = 0) -> Change:
    def change(tensors: Tensors, text: dict[str, Any]) -> None:
        old = tensors[name][2]
        tensors[name][2] = old[:at] + data + old[at + len(data) :]

    return change


def set_text(key: str, value: object) -> Change:
    def change(tensors: Tensors, text: dict[str, Any]) -> None:
        text["groups"][0][key] = value

    return change


def test_a_file_made_by_hand_is_good(path: pathlib.Path) -> None:
    path.write_bytes(forge())
    assert found(path) == []
    with qmoecodec.open(path) as f:
        assert f["g"].decode().tolist() == [[[0, -1, 1, 0], [0, 0, 0, 0], [1, 0, 0, -1]]] * 2
        assert f.n_file_bytes == path.stat().st_size
        assert repr(f) == f"<File {str(path)!r}: 1 groups, 1 tensors>"
        assert repr(f["g"]) == "<Group 'g' stacked [2, 3, 4] F32>"
        assert f["g"].data.n_bytes == sum(
            f.files[0].header.tensors[f"g_{role}"].n_bytes
            for role in ("codes", "code_offsets", "row_lengths", "levels", "dictionary_index", "checksums")
        )


@pytest.mark.parametrize(
    ("row", "reason", "codeword"),
    [
        ([ZERO, UNUSED, ZERO, ZERO], "unused_codeword", {"codeword": 1}),
        ([ZERO, ZERO, ZERO], "row_underrun", {}),
        ([ZERO], "row_underrun", {}),
        ([ZERO, ZERO, ZERO, ZERO, ZERO], "row_overrun", {"codeword": 4}),
        ([ZEROS, ZERO, PLUS, ZEROS, ZERO], "row_overrun", {"codeword": 3}),
        ([ZERO, ZERO, ZERO, PLUS_ZERO], None, {}),
        ([ZERO, ZERO, ZEROS, ZEROS], "row_overrun", {"codeword": 3}),
    ],
)
def test_a_broken_row_is_named_however_it_is_read(
    path: pathlib.Path, row: list[int], reason: str | None, codeword: dict[str, int]
) -> None:
    good = [ZERO, MINUS, PLUS, ZERO]
    path.write_bytes(forge([[good] * 5, [good, good, good, row, good]]))
    where = {"group": "g", "expert": 1, "row": 3, **codeword}
    assert found(path) == ([(reason, where)] if reason else [])
    with qmoecodec.open(path) as f:
        group = f["g"]
        expert = group.expert(1)
        if reason is None:
            assert group.decode()[1, 3].tolist() == expert.rows(3, 4)[0].tolist() == [0, 0, 0, 1]
            return
        for touch in (group.decode, group.dense, expert.decode, expert.dense, lambda: expert.rows(3, 4),
                      lambda: expert.rows(0, 4), lambda: expert.rows(2, 5), lambda: expert.rows(3, 5)):  # fmt: skip
            error = error_of(touch)
            assert (error.reason, error.where) == (reason, where)
        assert expert.rows(0, 3).tolist() == [[0, -1, 1, 0]] * 3
        assert expert.rows(4, 5).tolist() == [[0, -1, 1, 0]]
        assert group.expert(0).decode().tolist() == [[0, -1, 1, 0]] * 5


@pytest.mark.parametrize("row", [[ZERO], [ZERO, ZERO, ZERO], []])
def test_the_first_of_two_short_rows_is_named(path: pathlib.Path, row: list[int]) -> None:
    """The expert as a whole has enough codewords; a range of rows may not."""
    good = [ZERO, MINUS, PLUS, ZERO]
    path.write_bytes(forge([[good] * 6, [good, good, good, row, row, good]]))
    with qmoecodec.open(path) as f:
        expert = f["g"].expert(1)
        for begin, end in ((3, 5), (3, 6), (2, 5), (0, 6), (3, 4)):
            error = error_of(lambda b=begin, e=end: expert.rows(b, e))
            assert (error.reason, error.where) == ("row_underrun", {"group": "g", "expert": 1, "row": 3})
        error = error_of(lambda: expert.rows(4, 6))
        assert (error.reason, error.where) == ("row_underrun", {"group": "g", "expert": 1, "row": 4})
        assert expert.rows(5, 6).tolist() == [[0, -1, 1, 0]]


def test_two_rows_of_which_the_second_is_short(path: pathlib.Path) -> None:
    """Three codewords cannot give eight digits; only one row is to blame."""
    path.write_bytes(forge([[[ZEROS, ZEROS], [ZERO], [ZERO] * 4, [ZERO] * 4]]))
    with qmoecodec.open(path) as f:
        for begin, end in ((0, 2), (0, 3), (0, 4)):
            error = error_of(lambda b=begin, e=end: f["g"].expert(0).rows(b, e))
            assert (error.reason, error.where) == ("row_underrun", {"group": "g", "expert": 0, "row": 1})


@pytest.mark.parametrize("chunk", [1, 2, 3, 4])
@pytest.mark.parametrize("mapped", [True, False])
def test_passthrough_tensors_are_checked_in_chunks(
    path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, chunk: int, mapped: bool
) -> None:
    monkeypatch.setattr(packed_module, "_CHUNK_BYTES", chunk)
    path.write_bytes(forge())
    with File(path, mapped=mapped) as f:
        assert f.tensor_bytes("t").tobytes() == b"abc"
    for at in range(3):
        path.write_bytes(forge(late=put("t", b"x", at)))
        with File(path, mapped=mapped) as f:
            error = error_of(lambda: f.tensor_bytes("t"))
        assert (error.reason, error.where) == ("checksum", {"tensor": "t"})


def test_numbers_of_experts_and_rows_that_are_not_there(path: pathlib.Path) -> None:
    path.write_bytes(forge())
    with qmoecodec.open(path) as f:
        for expert in (-1, 2, 5):
            with pytest.raises(IndexError, match=f"expert {expert} of 2"):
                f["g"].expert(expert)
        for begin, end in ((-1, 2), (2, 1), (0, 4), (4, 5)):
            with pytest.raises(IndexError, match=rf"rows {begin}\.\.{end} of 3"):
                f["g"].expert(0).rows(begin, end)
        assert f["g"].expert(1).rows(1, 1).shape == (0, 4)
        assert [expert.index for expert in f["g"]] == [0, 1]


def test_levels_are_named_by_row(path: pathlib.Path) -> None:
    levels = np.float32([[[-1, 1]] * 3] * 2)
    levels[1, 2] = [0, 1]  # the row has a -
    path.write_bytes(forge(levels=levels))
    where = {"group": "g", "expert": 1, "row": 2}
    assert found(path) == [("level_zero", where)]
    with qmoecodec.open(path) as f:
        for touch in (f["g"].decode, lambda: f["g"].expert(1).rows(1, 3), lambda: f["g"].expert(1).rows(2, 3)):
            error = error_of(touch)
            assert (error.reason, error.where) == ("level_zero", where)
    levels[1, 2] = [1, -1]
    path.write_bytes(forge(levels=levels))
    assert found(path) == [("level_value", where)]


def test_row_lengths_are_checked_before_anything_is_decoded(path: pathlib.Path) -> None:
    place = {"group": "g", "expert": 0}
    for change, where, message in (
        (put("g_row_lengths", b"\x09", 2), {**place, "row": 2}, "a row has more codewords than its expert bytes"),
        (put("g_row_lengths", b"\x01", 1), place, "the rows take 10 bytes, the expert has 9"),
        (put("g_row_lengths", b"\x01\x00", 0), place, "the rows take 8 bytes, the expert has 9"),
    ):
        path.write_bytes(forge(change=change))
        with qmoecodec.open(path) as f:
            error = error_of(lambda: f["g"].expert(0))
        assert (error.reason, error.where, error.message) == ("row_lengths", where, message)
    path.write_bytes(forge(change=put("g_row_lengths", b"\x0a", 4)))
    with qmoecodec.open(path) as f:
        error = error_of(lambda: f["g"].expert(1))
    assert error.where == {"group": "g", "expert": 1, "row": 1}
    assert error.message == "a row has more codewords than its expert bytes"
    path.write_bytes(forge(change=put("g_row_lengths", b"\1", 4)))
    with qmoecodec.open(path) as f:
        assert error_of(lambda: f["g"].expert(1)).message == "the rows take 10 bytes, the expert has 9"
    path.write_bytes(forge([[[ZERO] * 9], [[ZERO] * 9]], cols=18))
    assert found(path) == [("row_underrun", {**place, "row": 0}), ("row_underrun", {**place, "expert": 1, "row": 0})]
    path.write_bytes(forge([[[ZERO] * 9], [[ZERO] * 9]], cols=19))
    assert found(path) == [("row_underrun", place), ("row_underrun", {**place, "expert": 1})]
    with qmoecodec.open(path) as f:
        assert error_of(lambda: f["g"].expert(0)).message == "9 codewords cannot give 1 x 19 digits"


def test_a_dictionary_that_is_not_there_or_does_not_fit(path: pathlib.Path) -> None:
    path.write_bytes(forge(change=put("g_dictionary_index", b"\1", 1)))
    assert found(path) == [("dictionary_index", {"group": "g", "expert": 1})]
    with qmoecodec.open(path) as f:
        assert error_of(f["g"].decode).message == "dictionary 1 of 1"
    path.write_bytes(forge(change=set_text("code_bits", 12)))
    assert found(path) == [("dictionary_index", {"group": "g", "expert": e}) for e in (0, 1)]
    with qmoecodec.open(path) as f:
        assert error_of(f["g"].decode).message == "dictionary 0 has 8 code bits, the group 12"


@pytest.mark.parametrize("offsets", [(1, 9, 18), (0, 9, 17), (0, 9, 19), (0, 19, 18), (9, 0, 18)])
def test_offsets(path: pathlib.Path, offsets: tuple[int, ...]) -> None:
    path.write_bytes(forge(late=put("g_code_offsets", struct.pack("<3Q", *offsets))))
    assert found(path) == [("code_offsets", {"group": "g", "tensor": "g_code_offsets"})]


def test_checksums_are_named(path: pathlib.Path) -> None:
    for change, where in (
        (put("g_checksums", b"\xff\xff\xff\xff", 4), {"group": "g", "expert": 1}),
        (put("t", b"x", 1), {"tensor": "t"}),
        (put("qmoecodec.dictionary.0", b"\2", 2), {"tensor": "qmoecodec.dictionary.0"}),
    ):
        path.write_bytes(forge(late=change))
        assert found(path) == [("checksum", where)]
    path.write_bytes(forge(change=put("qmoecodec.dictionary.0", b"\3\3", 256)))
    assert found(path) == [("dictionary_symbol", {"tensor": "qmoecodec.dictionary.0", "byte": 256})]


@pytest.mark.parametrize("layout", ["stacked", "fused", "matrix"])
def test_layouts(path: pathlib.Path, layout: str) -> None:
    def change(tensors: Tensors, text: dict[str, Any]) -> None:
        group = text["groups"][0]
        group["layout"] = layout
        if layout != "stacked":
            group["source"] = "w"
            del group["expert_ranges"]

    path.write_bytes(forge(GOOD[:1], change=change))
    with qmoecodec.open(path) as f:
        group = f["g"]
        shape = (3, 4) if layout == "matrix" else (1, 3, 4)
        encoded = group.encoded()
        assert encoded.is_matrix == (layout == "matrix") and qmoecodec.decode(encoded).shape == shape
        assert group.decode().shape == group.dense().shape == group.dense(np.float64).shape == shape
        assert (group.shape, group.levels.shape, len(group)) == ((1, 3, 4), (1, 3, 2), 1)


def test_a_file_without_experts_or_rows_or_columns(path: pathlib.Path) -> None:
    path.write_bytes(forge([[], []], cols=4))
    assert found(path) == []
    with qmoecodec.open(path) as f:
        assert f["g"].decode().shape == (2, 0, 4)
        assert f["g"].levels.shape == (2, 0, 2)
    path.write_bytes(forge([[[], []], [[], []]], cols=0))
    assert found(path, deep=True) == []
    with qmoecodec.open(path) as f:
        assert f["g"].dense().shape == (2, 2, 0)


# --- several files


def directory(folder: pathlib.Path, **parts: bytes) -> pathlib.Path:
    """Write shards and the index that fits them."""
    folder.mkdir()
    weight_map: dict[str, str] = {}
    for name, data in parts.items():
        (folder / f"{name}.safetensors").write_bytes(data)
        (n,) = struct.unpack("<Q", data[:8])
        stored = json.loads(data[8 : 8 + n])
        for key in stored:
            if not key.startswith(("qmoecodec.", "__")):
                weight_map.setdefault(key, f"{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_errors_of_shards_name_the_file(tmp_path: pathlib.Path) -> None:
    broken = forge(name="h", passthrough="u", late=put("u", b"x"))
    folder = directory(tmp_path / "a", one=forge(), two=broken)
    assert found(folder) == [("checksum", {"file": "two.safetensors", "tensor": "u"})]
    with qmoecodec.open(folder) as f:
        assert sorted(f) == ["g", "h"] and sorted(f.tensors) == ["t", "u"]
        assert f.n_file_bytes == sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    (folder / "two.safetensors").write_bytes(broken[:-1])
    assert found(folder)[0][1]["file"] == "two.safetensors"
    alone = directory(tmp_path / "b", one=forge(late=put("t", b"x")))
    assert found(alone) == [("checksum", {"tensor": "t"})]
    (alone / "one.safetensors").write_bytes(forge()[:-1])
    assert "file" not in found(alone)[0][1]


def test_names_in_two_shards(tmp_path: pathlib.Path) -> None:
    for name, other, tensor in (
        ("a", forge(name="g", passthrough="u"), "g_code_offsets"),
        ("b", forge(name="h", passthrough="t"), "t"),
    ):
        folder = directory(tmp_path / name, one=forge(), two=other)
        assert found(folder) == [("source_conflict", {"tensor": tensor, "file": "two.safetensors"})]
        assert verify(folder).problems[0].message.startswith("[source_conflict] one.safetensors has it too")

    def same_source(tensors: Tensors, text: dict[str, Any]) -> None:
        text["groups"][0]["source"] = "g.{}.w"

    folder = directory(tmp_path / "c", one=forge(), two=forge(name="h", passthrough="u", first=1, late=same_source))
    assert found(folder) == [("source_conflict", {"tensor": "g.1.w", "file": "two.safetensors"})]
    folder = directory(tmp_path / "d", one=forge(), two=forge(name="h", passthrough="u", first=2, late=same_source))
    assert found(folder) == []


def test_the_first_tensor_that_index_and_shards_do_not_agree_on(tmp_path: pathlib.Path) -> None:
    folder = directory(tmp_path / "a", one=forge(), two=forge(name="h", passthrough="u"))
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    for change, name in (
        (lambda m: m.update({"h_levels": "one.safetensors", "u": "one.safetensors"}), "h_levels"),
        (lambda m: m.pop("t"), "t"),
        (lambda m: m.update({"zz": "one.safetensors"}), "zz"),
    ):
        wrong = dict(weight_map)
        change(wrong)
        index.write_text(json.dumps({"weight_map": wrong}))
        assert found(folder) == [("shard_mismatch", {"tensor": name})]


def test_a_file_may_have_descriptor_0(path: pathlib.Path) -> None:
    """It does where standard input is closed."""
    path.write_bytes(forge())
    kept = os.dup(0)
    try:
        for mapped in (True, False):
            os.close(0)
            with File(path, mapped=mapped) as f:
                assert f.files[0].fd == 0
                assert f["g"].decode().shape == (2, 3, 4)
                assert f.tensor_bytes("t").tobytes() == b"abc"
            with pytest.raises(OSError, match="descriptor"):
                os.fstat(0)
            os.dup2(kept, 0)
    finally:
        os.dup2(kept, 0)
        os.close(kept)


def test_groups_that_are_not_there(path: pathlib.Path) -> None:
    path.write_bytes(forge())
    with qmoecodec.open(path) as f:
        for name in ("", "f", "g ", "h"):
            with pytest.raises(KeyError):
                f[name]
            with pytest.raises(KeyError):
                f.files[0].group(name)


def test_two_readings_of_an_expert_are_not_the_same(path: pathlib.Path) -> None:
    """They hold arrays, so that they are compared and hashed by what they are, not by what they hold."""
    path.write_bytes(forge())
    with qmoecodec.open(path) as f:
        one, two = (f["g"].data.expert(0) for _ in range(2))
        assert one == one and one != two
        assert len({one, two}) == 2


def test_files_are_closed_where_opening_fails(tmp_path: pathlib.Path, still_open: Callable[[], list[str]]) -> None:
    folder = directory(tmp_path / "a", one=forge(), two=forge(name="h", passthrough="u")[:-1])
    path = tmp_path / "f.safetensors"
    path.write_bytes(forge(late=set_text("dtype", "F8")))

    with path.open("rb"):
        assert still_open() == [str(path)]
    for broken in (folder, path):
        for mapped in (True, False):
            with pytest.raises(FormatError):
                File(broken, mapped=mapped)
    assert still_open() == []


# --- verify


GOOD_ROW, BAD_ROW, OTHER_ROW = [PLUS, ZEROS, ZERO], [ZERO, UNUSED, ZERO], [PLUS, ZERO, ZERO, ZERO]


def empty(offset: int) -> bytes:
    """A stacked group without experts, whose one offset is given."""

    def change(tensors: Tensors, text: dict[str, Any]) -> None:
        text["groups"][0].update(shape=[0, 3, 4], expert_ranges=[], row_length_base=0)
        shapes = {"levels": [0, 3, 2], "checksums": [0], "codes": [0], "dictionary_index": [0], "row_lengths": [0, 3]}
        for role, shape in shapes.items():
            tensors[f"g_{role}"][1:] = [shape, b""]
        tensors["g_code_offsets"][1:] = [[1], struct.pack("<Q", offset)]

    return forge([[[ZERO]]], change=change)


def canonical(rows: int) -> list[list[int]]:
    """Rows + 0 0 0 as `deep` wants them."""
    digits = np.int8([[1, 0, 0, 0]])
    codes, _ = qmoecodec.encode_rows(digits, dictionary=parse(DICTIONARY, kind="table", code_bits=8, threshold=256))
    return [codes.tolist() for _ in range(rows)]


@pytest.mark.parametrize("block", [1, 4, 7, 8, 4 * 16, 4 * 17, 1 << 20])
def test_how_many_rows_of_an_expert_are_named(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(verify_module, "BLOCK_BYTES", block)
    good = canonical(1)[0]
    for bad in (range(40), range(16), range(3, 40, 2), range(0, 40, 3), [39], [0, 39], []):
        rows = [BAD_ROW if r in bad else good for r in range(40)]
        path.write_bytes(forge([rows, [good] * 40]))
        expected = [("unused_codeword", {"group": "g", "expert": 0, "row": r, "codeword": 1}) for r in bad][:16]
        assert found(path) == expected
        assert found(path, deep=True) == expected
        rows = [OTHER_ROW if r in bad else good for r in range(40)]
        path.write_bytes(forge([rows, [good] * 40]))
        assert found(path) == []
        expected = [("not_canonical", {"group": "g", "expert": 0, "row": r}) for r in bad][:16]
        assert found(path, deep=True) == expected


@pytest.mark.parametrize("block", [4, 12, 1 << 20])
@pytest.mark.parametrize(("n_bad", "n_zero"), [(2, 3), (3, 20), (20, 3), (16, 1), (15, 2), (0, 17), (0, 16), (1, 15)])
def test_rows_are_named_before_levels(
    path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, block: int, n_bad: int, n_zero: int
) -> None:
    """Levels that are zero come first in the file, and last in the report."""
    monkeypatch.setattr(verify_module, "BLOCK_BYTES", block)
    levels = np.float32([[[-1, 1]] * 40])
    levels[0, :n_zero] = [-1, 0]
    path.write_bytes(forge([[GOOD_ROW] * (40 - n_bad) + [BAD_ROW] * n_bad], levels=levels))
    place = {"group": "g", "expert": 0}
    expected = [("unused_codeword", {**place, "row": r, "codeword": 1}) for r in range(40 - n_bad, 40)]
    expected += [("level_zero", {**place, "row": r}) for r in range(n_zero)]
    assert found(path) == expected[:16]


def test_what_is_not_canonical_comes_after_all_else(path: pathlib.Path) -> None:
    path.write_bytes(forge([[OTHER_ROW] * 2, [BAD_ROW] * 2, [OTHER_ROW, GOOD_ROW]], late=put("t", b"x")))
    assert [(reason, where.get("expert")) for reason, where in found(path, deep=True)][:3] == [
        ("unused_codeword", 1), ("unused_codeword", 1), ("checksum", None),
    ]  # fmt: skip
    rest = found(path, deep=True)[3:]
    assert {reason for reason, _ in rest} == {"not_canonical"}
    assert {"group": "g", "expert": 0, "row": 1} in [where for _, where in rest]
    report = verify(path)
    assert (report.n_groups, report.n_experts, report.n_tensors, report.ok, report.deep) == (1, 3, 1, False, False)
    path.write_bytes(forge([canonical(2)] * 3))
    report = verify(path, deep=True)
    assert (report.path, report.deep, report.ok, report.problems) == (str(path), True, True, ())


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The rows that `verify` decodes, as they come."""
    ranges: list[tuple[int, int]] = []
    decode = verify_module.decode_expert

    def note(group: Any, expert: int, parts: Any, begin: int, end: int) -> Any:
        ranges.append((begin, end))
        return decode(group, expert, parts, begin, end)

    monkeypatch.setattr(verify_module, "decode_expert", note)
    return ranges


def test_rows_are_decoded_in_blocks(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, decoded: list[tuple[int, int]]) -> None:
    """Of at most as many digits as are said, but never less than a row."""
    for cols, block, sizes in ((4, None, [6]), (4, 3, [1] * 6), (4, 4, [1] * 6), (4, 11, [2] * 3), (4, 20, [5, 1]), (4, 24, [6]),
                               (1, 4, [4, 2]), (1, 3, [3, 3]), (0, 3, [3, 3])):  # fmt: skip
        if block is not None:
            monkeypatch.setattr(verify_module, "BLOCK_BYTES", block)
        path.write_bytes(forge([[[ZERO] * cols] * 6], cols=cols))
        decoded.clear()
        assert found(path) == []
        ends = np.cumsum(sizes).tolist()
        assert decoded == list(zip([0, *ends[:-1]], ends, strict=True))


def test_no_more_rows_are_looked_at_than_are_named(
    path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, decoded: list[tuple[int, int]]
) -> None:
    """However many are wrong: a row by itself is decoded slowly."""

    def single(begin: int, end: int) -> list[tuple[int, int]]:
        return [(row, row + 1) for row in range(begin, end)]

    monkeypatch.setattr(verify_module, "BLOCK_BYTES", 20 * 4)
    path.write_bytes(forge([[BAD_ROW] * 60]))
    assert len(found(path)) == 16
    assert decoded == [(0, 20), *single(0, 16)]
    decoded.clear()
    path.write_bytes(forge([[GOOD_ROW] * 20 + [GOOD_ROW, BAD_ROW] * 20]))
    assert len(found(path)) == 16
    assert decoded == [(0, 20), (20, 40), *single(20, 40), (40, 60), *single(40, 52)]
    decoded.clear()
    path.write_bytes(forge([[GOOD_ROW] * 60], levels=(-1, 0)))  # other errors of later blocks would come first
    assert len(found(path)) == 16
    assert decoded == [(0, 20), *single(0, 16), (20, 40), (40, 60)]
    decoded.clear()
    path.write_bytes(forge([[GOOD_ROW] * 19 + [BAD_ROW] + [GOOD_ROW] * 40], levels=(-1, 0)))
    assert [reason for reason, _ in found(path)] == ["unused_codeword"] + ["level_zero"] * 15
    assert decoded == [(0, 20), *single(0, 20), (20, 40), (40, 60)]


def test_what_is_wrong_with_one_group_does_not_hide_the_next(tmp_path: pathlib.Path) -> None:
    """Nor is anything of the first group reported but what is known of it."""
    one, two = (forge(name=name, passthrough=name + "t") for name in "gh")
    path = tmp_path / "both.safetensors"
    path.write_bytes(join(one, two))
    assert found(path) == []
    with qmoecodec.open(path) as f:
        places = {name: f.files[0].header.data_begin + info.begin for name, info in f.files[0].header.tensors.items()}
    data = bytearray(path.read_bytes())
    data[places["g_code_offsets"]] ^= 1
    data[places["h_codes"] + 9] ^= 1  # of the second expert
    path.write_bytes(data)
    assert found(path) == [
        ("code_offsets", {"group": "g", "tensor": "g_code_offsets"}), ("checksum", {"group": "h", "expert": 1}),
    ]  # fmt: skip


def test_row_lengths_that_do_not_fit_stay_too_long() -> None:
    """Only an expert of 4 GiB or more has such rows."""
    lengths = np.array([0, 5, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**33], np.int64)
    assert packed_module.saturate(lengths).tolist() == [0, 5, 2**31, *[2**32 - 1] * 4]


def test_a_whole_file_is_not_mapped_to_check_it(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A map counts as memory of the process, and ends it where the file becomes shorter."""
    path.write_bytes(forge(late=put("t", b"x")))
    monkeypatch.setattr(packed_module, "mmap", SimpleNamespace(mmap=None, ACCESS_READ=None))  # of that module alone
    assert found(path) == [("checksum", {"tensor": "t"})]
    path.write_bytes(forge())
    unpack(path, path.with_name("u.safetensors"))
    with pytest.raises(TypeError):
        qmoecodec.open(path)


def large(rows: int, n_passthrough: int) -> bytes:
    """A file whose expert has 62,500 digits a row, of 250 codewords."""

    def change(tensors: Tensors, text: dict[str, Any]) -> None:
        data = bytes([250, 1, 2] + [0] * 253) + pack_two_bits(np.uint8([0] * 250 + [1, 0, 2]))
        tensors["qmoecodec.dictionary.0"][1:] = [[len(data)], data]
        tensors["t"][1:] = [[n_passthrough], bytes(n_passthrough)]

    return forge([[[0] * 250] * rows], cols=250 * 250, change=change)


def most_memory(work: Callable[[], object]) -> int:
    work()  # loads what is loaded once
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_to_verify_does_not_grow_with_the_file(path: pathlib.Path) -> None:
    """30 MiB of digits, of which two blocks of 8 MiB are there at once, and a tensor of 32 MiB, one block of 16."""
    path.write_bytes(large(510, 32 << 20))
    assert most_memory(lambda: found(path)) < 24 << 20


def test_memory_to_unpack_does_not_grow_with_the_file(path: pathlib.Path) -> None:
    """30 MiB of numbers, of which two blocks of 8 MiB are there at once."""
    path.write_bytes(large(130, 3))
    assert most_memory(lambda: unpack(path, path.with_name("u.safetensors"))) < 24 << 20
    assert path.with_name("u.safetensors").stat().st_size > 30 << 20


def test_nothing_is_counted_in_a_file_that_cannot_be_opened(path: pathlib.Path) -> None:
    path.write_bytes(forge()[:-1])
    report = verify(path, deep=True)
    assert (report.n_groups, report.n_experts, report.n_tensors, report.ok, report.deep) == (0, 0, 0, False, True)


def test_a_table_that_cannot_encode_what_it_decodes(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """+ and "0 -" give + 0 -, but an encoder takes "+ 0" first and has nothing for the - (spec §5.1)."""

    def change(tensors: Tensors, text: dict[str, Any]) -> None:
        data = bytes([1, 2, 2] + [0] * 253) + pack_two_bits(np.uint8([2, 2, 0, 0, 1]))
        tensors["qmoecodec.dictionary.0"][1:] = [[len(data)], data]

    path.write_bytes(forge([[[1, 0], [0, 2]], [[0, 2], [0, 2]]], cols=3, change=change))
    with qmoecodec.open(path) as f:
        assert f["g"].decode().tolist() == [[[1, 0, 1], [1, 0, -1]], [[1, 0, -1]] * 2]
        assert list(find_errors(f)) == []
    assert found(path) == []
    for block in (1 << 20, 3):
        monkeypatch.setattr(verify_module, "BLOCK_BYTES", block)
        problems = verify(path, deep=True).problems
        places = [{"group": "g", "expert": e, "row": r} for e, r in ((0, 1), (1, 0), (1, 1))]
        assert [(p.reason, p.where) for p in problems] == [("not_canonical", place) for place in places]
        assert "the dictionary has no encoding of the row" in problems[0].message


def test_what_no_expert_needs_is_checked_too(path: pathlib.Path) -> None:
    """A group without experts: only its offsets can be wrong."""
    path.write_bytes(empty(0))
    assert found(path) == []
    unpack(path, path.with_name("u.safetensors"))
    path.write_bytes(empty(1))
    assert found(path) == [("code_offsets", {"group": "g", "tensor": "g_code_offsets"})]
    assert error_of(lambda: unpack(path, path.with_name("v.safetensors"))).reason == "code_offsets"


def test_codes_have_one_dimension(path: pathlib.Path) -> None:
    for shape in ([], [1, 1]):

        def change(tensors: Tensors, text: dict[str, Any], shape: list[int] = shape) -> None:
            tensors["g_codes"][1] = shape

        path.write_bytes(forge([[[ZERO]]], cols=1, change=change))
        assert found(path) == [("role_shape", {"group": "g", "tensor": "g_codes"})]


def test_the_first_of_several_bad_levels_is_named(path: pathlib.Path) -> None:
    levels = np.float32([[[-1, 1]] * 4])
    levels[0, 1:3] = [np.inf, 1]
    path.write_bytes(forge([[GOOD_ROW] * 4], levels=levels))
    assert found(path) == [("level_value", {"group": "g", "expert": 0, "row": 1})]
    levels[0, 1:3] = [-1, 0]
    path.write_bytes(forge([[GOOD_ROW] * 4], levels=levels))
    with qmoecodec.open(path) as f:
        assert error_of(f["g"].decode).where == {"group": "g", "expert": 0, "row": 1}


def test_a_file_may_become_longer_while_it_is_open(path: pathlib.Path) -> None:
    path.write_bytes(forge())
    with qmoecodec.open(path) as f:
        with path.open("ab") as more:
            more.write(b"more")
        assert f["g"].decode().shape == (2, 3, 4)


def test_metadata_of_shards_that_differs_is_noted_in_either_order(tmp_path: pathlib.Path) -> None:
    def noted(value: str) -> Change:
        def change(tensors: Tensors, text: dict[str, Any]) -> None:
            tensors["__metadata__"] = [{"k": value}]

        return change

    for n, (first, second) in enumerate((("5", "4"), ("4", "5"), ("4", "4"))):
        one, two = forge(late=noted(first)), forge(name="h", passthrough="u", late=noted(second))
        with qmoecodec.open(directory(tmp_path / str(n), one=one, two=two)) as f:
            merged, notes = f.merged_metadata()
        assert merged == {"k": first}
        assert len(notes) == (first != second) and all("'k'" in note for note in notes)


def test_a_broken_dictionary_is_reported_once(path: pathlib.Path) -> None:
    path.write_bytes(forge(late=put("qmoecodec.dictionary.0", b"\2", 2)))
    assert found(path) == [("checksum", {"tensor": "qmoecodec.dictionary.0"})]
    path.write_bytes(forge(change=put("qmoecodec.dictionary.0", b"\3\3", 256)))
    assert found(path) == [("dictionary_symbol", {"tensor": "qmoecodec.dictionary.0", "byte": 256})]


@pytest.mark.parametrize(
    ("stored", "widest", "narrowest"),
    [("U8", 255, "U8"), ("U16", 255, "U8"), ("U16", 256, "U16"), ("U32", 255, "U8"), ("U32", 256, "U16"), ("U32", 65535, "U16"),
     ("U32", 65536, "U32")],
)  # fmt: skip
@pytest.mark.parametrize("base", [0, 1])
def test_row_lengths_are_stored_as_narrow_as_can_be(
    path: pathlib.Path, stored: str, widest: int, narrowest: str, base: int
) -> None:
    def change(tensors: Tensors, text: dict[str, Any]) -> None:
        dtype = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32}[stored]
        tensors["g_row_lengths"][::2] = [stored, np.array([0, widest], dtype).tobytes()]
        tensors["g_codes"][1:] = [[base * 2 + widest], bytes([UNUSED]) * (base * 2 + widest)]
        tensors["g_code_offsets"][2] = struct.pack("<2Q", 0, base * 2 + widest)
        text["groups"][0]["row_length_base"] = base

    path.write_bytes(forge([[[ZERO], [ZERO]]], cols=1, change=change))
    messages = [p.message for p in verify(path, deep=True).problems if p.reason == "not_canonical"]
    expected = [] if stored == narrowest else [f"[not_canonical] the row lengths fit {narrowest} (group g, tensor g_row_lengths)"]
    assert messages == expected


def test_the_base_is_the_least_row_length(path: pathlib.Path) -> None:
    def lower(tensors: Tensors, text: dict[str, Any]) -> None:
        text["groups"][0]["row_length_base"] -= 1
        tensors["g_row_lengths"][2] = bytes(n + 1 for n in tensors["g_row_lengths"][2])

    path.write_bytes(forge([canonical(3)], change=lower))
    assert found(path) == []
    problem = verify(path, deep=True).problems[0]
    assert (problem.reason, problem.where) == ("not_canonical", {"group": "g", "tensor": "g_row_lengths"})
    assert "row_length_base" in problem.message
    for rows, base, reasons in (([], 0, []), ([], 1, ["not_canonical"]), ([[], []], 0, [])):
        path.write_bytes(forge([rows], cols=0, change=set_text("row_length_base", base)))
        assert [reason for reason, _ in found(path, deep=True)] == reasons

