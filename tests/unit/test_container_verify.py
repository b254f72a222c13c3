"""What `verify` finds in packed files made by hand: all that is wrong, in order, in bounded memory."""

import importlib
import pathlib
import struct
import tracemalloc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from forged_files import (
    DICTIONARY,
    PLUS,
    UNUSED,
    ZERO,
    ZEROS,
    Change,
    Tensors,
    directory,
    error_of,
    forge,
    found,
    join,
    put,
    set_text,
)

import qmoecodec
from qmoecodec.container import packed as packed_module
from qmoecodec.container import unpack, verify
from qmoecodec.container.verify import find_errors
from qmoecodec.dictionary import parse
from qmoecodec.dictionary.serial import pack_two_bits

verify_module = importlib.import_module("qmoecodec.container.verify")  # the name in the package is the function


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "f.safetensors"


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
