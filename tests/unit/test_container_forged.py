"""Packed files made by hand, codeword by codeword: what reading says of them, and of which place."""

import json
import os
import pathlib
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from forged_files import (
    GOOD,
    MINUS,
    PLUS,
    PLUS_ZERO,
    UNUSED,
    ZERO,
    ZEROS,
    Tensors,
    directory,
    error_of,
    forge,
    found,
    put,
    set_text,
)

import qmoecodec
from qmoecodec.container import packed as packed_module
from qmoecodec.container import verify
from qmoecodec.container.reader import File
from qmoecodec.errors import FormatError


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "f.safetensors"


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
