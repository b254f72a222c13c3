"""Values that cannot be changed, their properties, and the places that errors give."""

import dataclasses
import importlib
import json
import os
import pathlib
import pkgutil
import struct
from typing import Any

import pytest

import qmoecodec
from qmoecodec.container import header
from qmoecodec.container.header import TensorInfo, header_bytes, parse_header, read_header, read_header_bytes
from qmoecodec.container.metadata import GroupInfo, from_text, to_ranges, to_text
from qmoecodec.errors import FormatError


def test_values_are_frozen_and_take_no_other_attributes() -> None:
    found = {}
    for module in pkgutil.walk_packages(qmoecodec.__path__, "qmoecodec."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, type) and dataclasses.is_dataclass(value) and value.__module__ == module.name:
                if module.name == "qmoecodec.container.pack" and value.__name__.startswith("_"):  # a writer's own notes
                    continue
                found[value.__qualname__] = value
    assert len(found) > 15
    for name, value in found.items():
        assert value.__dataclass_params__.frozen, name  # type: ignore[attr-defined]
        assert "__slots__" in vars(value), name


@pytest.mark.parametrize(
    ("data", "n_file", "reason", "byte", "message"),
    [
        (b"\0\0\0\0\0\0\0", 7, "truncated", 7, "7 bytes cannot hold a header"),
        (struct.pack("<Q", 1), 16, "header_size", 0, "the header's length 1 is not in 2..100000000"),
        (struct.pack("<Q", 12), 20, "header_size", 0, "the header's length 12 is not a multiple of 8"),
        (struct.pack("<Q", 8) + b"{}     ", 15, "truncated", 15, "the header ends at byte 16, the file at 15"),
        (struct.pack("<Q", 24) + b"{}     ", 16, "truncated", 16, "the header ends at byte 32, the file at 16"),
        (struct.pack("<Q", 8) + b"{}     ", 99, "truncated", 15, "the file became shorter while it was read"),
    ],
)
def test_places_in_the_bytes(
    tmp_path: pathlib.Path, data: bytes, n_file: int, reason: str, byte: int, message: str
) -> None:
    (tmp_path / "f").write_bytes(data)
    fd = os.open(tmp_path / "f", os.O_RDONLY)
    try:
        with pytest.raises(FormatError) as caught:
            read_header_bytes(fd, n_file)
    finally:
        os.close(fd)
    assert (caught.value.reason, caught.value.where, caught.value.message) == (reason, {"byte": byte}, message)


def header_error(text: bytes, n_data: int = 0) -> FormatError:
    text += b" " * (-len(text) % 8)
    with pytest.raises(FormatError) as caught:
        parse_header(struct.pack("<Q", len(text)) + text, 8 + len(text) + n_data)
    return caught.value


def test_places_in_the_header() -> None:
    assert header_error(b'{"\xff').where == {"byte": 10}
    assert header_error(b"[]").where == {"byte": 8}
    assert header_error(b'{"a":x').where == {"byte": 13}
    entry = json.dumps({"t": {"dtype": "A" * 50, "shape": [], "data_offsets": [0, 0]}}).encode()
    assert header_error(entry).message == f"dtype '{'A' * 40}'"


def test_an_entry_may_be_as_deep_as_any_value() -> None:
    assert header_error(b'{"a":' + b"[" * 15 + b"]" * 15 + b"}").reason == "header_schema"
    assert header_error(b'{"a":' + b"[" * 16 + b"]" * 16 + b"}").reason == "json_depth"


def test_values_of_the_header_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """In an entry that has the usual form as in one that has another: 6 values and the dimensions."""
    usual = '"t":{"dtype":"U8","shape":[2,1,4],"data_offsets":[0,8]}'
    other = usual.replace(":", ": ")
    for text, n in ((f"{{{usual}}}", 10), (f"{{{other}}}", 10), (f'{{"__metadata__":{{"a":"b"}},{usual}}}', 12)):
        data = text.encode() + b" " * (-len(text) % 8)
        data = struct.pack("<Q", len(data)) + data
        monkeypatch.setattr(header, "MAX_VALUES", n)
        assert parse_header(data, len(data) + 8).tensors.keys() == {"t"}
        monkeypatch.setattr(header, "MAX_VALUES", n - 1)
        with pytest.raises(FormatError, match="json_size"):
            parse_header(data, len(data) + 8)
        assert parse_header(data, len(data) + 8, strict=False).tensors.keys() == {"t"}


def test_the_largest_product_of_dimensions() -> None:
    for n, reason in ((2**63 - 1, "tensor_size"), (2**62, "tensor_size")):
        entry = json.dumps({"t": {"dtype": "U8", "shape": [n], "data_offsets": [0, 8]}}).encode()
        assert header_error(entry, 8).reason == reason
    entry = json.dumps({"t": {"dtype": "U8", "shape": [2, 2**62], "data_offsets": [0, 8]}}).encode()
    assert header_error(entry, 8).reason == "shape_overflow"


def test_the_largest_header_that_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"t": TensorInfo("U8", (3,), 0, 3)}
    n = len(header_bytes(tensors, None)) - 8
    monkeypatch.setattr(header, "MAX_HEADER", n)
    assert len(header_bytes(tensors, None)) == 8 + n
    monkeypatch.setattr(header, "MAX_HEADER", n - 1)
    with pytest.raises(ValueError, match=f"{n} bytes of {n - 1}"):
        header_bytes(tensors, None)


def test_the_longest_header_that_is_read(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(struct.pack("<Q", 16) + b"{}" + b" " * 14)
    fd = os.open(tmp_path / "f", os.O_RDONLY)
    try:
        monkeypatch.setattr(header, "MAX_HEADER", 16)
        assert read_header(fd).tensors == {}
        monkeypatch.setattr(header, "MAX_HEADER", 15)
        with pytest.raises(FormatError, match="header_size"):
            read_header(fd)
    finally:
        os.close(fd)


# --- metadata


def group(**changes: Any) -> GroupInfo:
    values = {"name": "g", "layout": "stacked", "source": "e.{}.w", "expert_ranges": ((2, 4), (7, 10)), "shape": (5, 3, 7),
              "dtype": "F32", "code_bits": 8, "row_length_base": 0}  # fmt: skip
    return GroupInfo(**(values | changes))


def test_what_a_group_says_of_its_sources() -> None:
    stacked = group()
    names = ["e.2.w", "e.3.w", "e.7.w", "e.8.w", "e.9.w"]
    assert list(stacked.source_names()) == names
    assert [stacked.expert_name(e) for e in range(5)] == names
    with pytest.raises(IndexError):
        stacked.expert_name(5)
    assert (stacked.n_weights, stacked.source_shape) == (105, (3, 7))
    fused = group(layout="fused", source="w", expert_ranges=())
    assert (list(fused.source_names()), fused.expert_name(3), fused.source_shape) == (["w"], "w", (5, 3, 7))
    matrix = group(layout="matrix", source="w", expert_ranges=(), shape=(1, 3, 7))
    assert (list(matrix.source_names()), matrix.expert_name(0), matrix.source_shape) == (["w"], "w", (3, 7))


def test_a_file_without_groups_is_written_again() -> None:
    accepted(lambda v: v.update(groups=[], dictionaries=[], passthrough={}))
    accepted(lambda v: None)


def test_ranges_have_gaps_between_them() -> None:
    assert to_ranges([]) == ()
    assert to_ranges([3]) == ((3, 4),)
    assert to_ranges([0, 1, 3, 4, 5, 9]) == ((0, 2), (3, 6), (9, 10))


def changed(change: Any) -> str:
    """Return a metadata text after a change of its value."""
    value: dict[str, Any] = {
        "format_version": "1.0", "required_features": [], "optional_features": [],
        "dictionaries": [{"kind": "table", "code_bits": 8, "threshold": 256, "crc32": "00000000"} for _ in range(2)],
        "groups": [{"name": name, "layout": "matrix", "source": name, "shape": [1, 2, 3], "dtype": "F32", "code_bits": 8,
                    "row_length_base": 0} for name in ("a", "b")],
        "passthrough": {"t": "00000000"},
    }  # fmt: skip
    change(value)
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def accepted(change: Any) -> None:
    """Check that the metadata may be so, and is written again as it was."""
    assert to_text(from_text(changed(change))) == changed(change)


def metadata_error(change: Any) -> FormatError:
    with pytest.raises(FormatError) as caught:
        from_text(changed(change))
    return caught.value


def test_places_in_the_metadata() -> None:
    assert metadata_error(lambda v: v["groups"][1].update(dtype="F8")).where == {"group": "b"}
    assert metadata_error(lambda v: v["groups"][1].pop("dtype")).where == {"group": "b"}
    assert metadata_error(lambda v: v["groups"][1].update(shape=[1, 2**31, 1])).where == {"group": "b"}
    assert metadata_error(lambda v: v["groups"][1].update(name="qmoecodec.")).where == {"group": "qmoecodec."}
    assert metadata_error(lambda v: v["groups"][1].update(name=3)).where == {}
    assert metadata_error(lambda v: v["dictionaries"][1].update(kind="zip")).where == {"dictionary": 1}
    assert metadata_error(lambda v: v["dictionaries"][1].update(threshold=257)).where == {"dictionary": 1}
    assert metadata_error(lambda v: v["dictionaries"][1].update(threshold=255)).where == {"dictionary": 1}
    assert metadata_error(lambda v: v["dictionaries"][1].update(crc32="")).where == {"dictionary": 1}
    assert metadata_error(lambda v: v["passthrough"].update(t="x")).where == {"tensor": "t"}


def test_places_without_a_name_are_not_made_up() -> None:
    assert metadata_error(lambda v: v["groups"].insert(0, 3)).where == {}
    assert metadata_error(lambda v: v["groups"][0].update(name="")).message == "a group's name has 1 to 4096 bytes"


def test_numbers_of_the_metadata_at_their_limits() -> None:
    def shaped(*shape: int, layout: str = "fused") -> Any:
        return lambda v: v["groups"][0].update(shape=list(shape), layout=layout)

    def ranged(*ranges: Any) -> Any:
        n = sum(end - first for first, end in ranges)
        return lambda v: v["groups"][0].update(layout="stacked", source="{}", shape=[n, 2, 3], expert_ranges=list(ranges))

    accepted(shaped(3, 715827883, 2147483647))  # 2^62 - 1 weights
    assert metadata_error(shaped(4, 2**30, 2**30)).reason == "shape_overflow"
    assert metadata_error(shaped(2**30, 4, 2**30)).reason == "shape_overflow"
    assert metadata_error(shaped(2**31, 0, 0)).reason == "shape_overflow"
    accepted(shaped(2**31 - 1, 0, 0))
    accepted(shaped(2, 2**31 - 1, 1))
    for n in (0, 2):
        assert metadata_error(shaped(n, 2, 3, layout="matrix")).message == f"{n} experts in a matrix"
    accepted(lambda v: v["groups"][0].update(row_length_base=2**32 - 1))
    for base in (2**32, 2**32 + 1):
        assert metadata_error(lambda v, base=base: v["groups"][0].update(row_length_base=base)).reason == "metadata_schema"
    accepted(ranged([0, 2], [3, 5], [6, 7]))
    accepted(ranged([2**32 - 1, 2**32]))
    for ranges in ([[3, 1], [5, 8]], [[0, 2], [5, 7], [3, 4]], [[0, 2], [2, 3]], [[1, 1]], [[2**32, 2**32 + 1]]):
        assert metadata_error(ranged(*ranges)).message == "expert ranges are not ascending, with gaps, below 2^32"
    for threshold, message in ((257, "threshold 257 is not in 0..2^8"), (255, "a table has threshold 256, not 255")):
        assert metadata_error(lambda v, t=threshold: v["dictionaries"][0].update(threshold=t)).message == message
    accepted(lambda v: v["dictionaries"][0].update(kind="aivf", threshold=0))
    accepted(lambda v: v["dictionaries"][0].update(kind="aivf", threshold=256))
    assert "'a1'" in metadata_error(lambda v: v.update(required_features=["a1", "b1"])).message


def test_messages_about_metadata_quote_the_beginning_of_what_is_long() -> None:
    long = "~" * 100
    messages = [
        metadata_error(lambda v: v.update({long: 1})).message,
        metadata_error(lambda v: v.update(required_features=[long])).message,
        metadata_error(lambda v: v["dictionaries"][0].update(kind=long)).message,
        metadata_error(lambda v: v["groups"][0].update(layout=long)).message,
        metadata_error(lambda v: v["groups"][0].update(dtype=long)).message,
    ]
    assert [message.count("~") for message in messages] == [80, 80, 40, 40, 40]
