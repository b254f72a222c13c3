"""The metadata text (spec §3, §4.1, §6.1): every rule by one change to a good text."""

import copy
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jsonschema
import numpy as np
import pytest
import safetensors.numpy

from qmoecodec.container.json_text import canonical
from qmoecodec.container.metadata import DictionaryEntry, GroupInfo, Metadata, from_text, to_ranges, to_text
from qmoecodec.errors import FormatError

SCHEMA = json.loads((pathlib.Path(__file__).parents[2] / "spec/schema/header.schema.json").read_text())

METADATA = Metadata(
    (DictionaryEntry("aivf", 8, 100, 0x0123ABCD), DictionaryEntry("table", 8, 256, 0)),
    (
        GroupInfo("a.wi", "stacked", "a.{}.wi", ((0, 2), (7, 8)), (3, 4, 5), "BF16", 8, 2),
        GroupInfo("b", "fused", "b", (), (2, 4, 5), "F32", 8, 0),
        GroupInfo("é", "matrix", "é.weight", (), (1, 4, 5), "F64", 8, 0),
    ),
    {"norm": 1, "x-ray": 0xFFFFFFFF},
)
GOOD = json.loads(to_text(METADATA))


def is_valid(value: object) -> bool:
    validator = jsonschema.Draft202012Validator({**SCHEMA["$defs"]["metadata"], "$defs": SCHEMA["$defs"]})
    return bool(validator.is_valid(value))


def test_text_and_back() -> None:
    text = to_text(METADATA)
    assert from_text(text) == METADATA
    assert canonical(GOOD) == text
    assert is_valid(GOOD)


def test_empty_metadata() -> None:
    text = to_text(Metadata())
    assert text == (
        '{"dictionaries":[],"format_version":"1.0","groups":[],"optional_features":[],"passthrough":{},"required_features":[]}'
    )
    assert from_text(text) == Metadata()


def change(path: str, new: object) -> Callable[[Any], None]:
    *keys, last = path.split("/")

    def apply(value: Any) -> None:
        for key in keys:
            value = value[int(key)] if isinstance(value, list) else value[key]
        if new is ...:
            del value[last]
        else:
            value[int(last) if isinstance(value, list) else last] = new

    return apply


@pytest.mark.parametrize(
    ("path", "new", "reason"),
    [
        *((key, ..., "metadata_schema") for key in GOOD),
        *((key, None, "metadata_schema") for key in GOOD),
        *((f"groups/0/{key}", ..., "metadata_schema") for key in GOOD["groups"][0]),
        *((f"groups/0/{key}", True, "metadata_schema") for key in GOOD["groups"][0]),
        *((f"dictionaries/0/{key}", ..., "metadata_schema") for key in GOOD["dictionaries"][0]),
        *((f"dictionaries/0/{key}", False, "metadata_schema") for key in GOOD["dictionaries"][0]),
        ("format_version", "1", "metadata_schema"),
        ("format_version", "01.0", "metadata_schema"),
        ("format_version", "1.00000", "metadata_schema"),
        ("format_version", "1.0\n", "metadata_schema"),
        ("format_version", "2.0", "unsupported_version"),
        ("format_version", "0.9", "unsupported_version"),
        ("required_features", ["x"], "unsupported_feature"),
        ("required_features", ["b", "a"], "metadata_schema"),
        ("required_features", [1], "metadata_schema"),
        ("optional_features", ["b", "a"], "metadata_schema"),
        ("optional_features", ["a", "a"], "metadata_schema"),
        ("optional_features", [None], "metadata_schema"),
        ("unknown", 1, "metadata_schema"),
        ("dictionaries", [GOOD["dictionaries"][0]] * 257, "metadata_schema"),
        ("dictionaries/0/unknown", 1, "metadata_schema"),
        ("dictionaries/0/kind", "huffman", "metadata_schema"),
        ("dictionaries/0/code_bits", 10, "metadata_schema"),
        ("dictionaries/0/threshold", 257, "dictionary_threshold"),
        ("dictionaries/0/crc32", "0123ABCD", "metadata_schema"),
        ("dictionaries/0/crc32", "123abcd", "metadata_schema"),
        ("dictionaries/0", 1, "metadata_schema"),
        ("groups/0", [], "metadata_schema"),
        ("groups/0/unknown", 1, "metadata_schema"),
        ("groups/0/name", "z", "metadata_schema"),
        ("groups/0/name", "b", "metadata_schema"),
        ("groups/0/name", "", "metadata_schema"),
        ("groups/2/name", "é" * 2049, "metadata_schema"),
        ("groups/0/name", "Qmoecodec", None),
        ("groups/2/name", "qmoecodec.x", "reserved_name"),
        ("groups/2/source", "qmoecodec.x", "reserved_name"),
        ("passthrough/qmoecodec.x", "00000000", "reserved_name"),
        ("passthrough/norm", "0000000", "metadata_schema"),
        ("passthrough/norm", 1, "metadata_schema"),
        ("groups/0/layout", "matrix", "metadata_schema"),
        ("groups/0/layout", "loose", "metadata_schema"),
        ("groups/1/layout", "stacked", "metadata_schema"),
        ("groups/1/layout", "matrix", "metadata_schema"),
        ("groups/1/expert_ranges", [[0, 2]], "metadata_schema"),
        ("groups/0/source", "a.wi", "metadata_schema"),
        ("groups/2/source", "w" * 4097, "metadata_schema"),
        ("groups/2/source", "w" * 4096, None),
        ("groups/0/source", "a.{}.{}", "metadata_schema"),
        ("groups/1/source", "a.{}.{}", None),
        ("groups/0/dtype", "F8_E4M3", "metadata_schema"),
        ("groups/0/code_bits", 9, "metadata_schema"),
        ("groups/0/row_length_base", 1 << 32, "metadata_schema"),
        ("groups/0/shape", [3, 4], "metadata_schema"),
        ("groups/0/shape", [3, 4, "5"], "metadata_schema"),
        ("groups/0/shape", [3, 4, True], "metadata_schema"),
        ("groups/1/shape", [1 << 31, 1, 1], "shape_overflow"),
        ("groups/1/shape", [1 << 21, 1 << 21, 1 << 20], "shape_overflow"),
        ("groups/0/shape", [4, 4, 5], "metadata_schema"),
        ("groups/0/expert_ranges", [], "metadata_schema"),
        ("groups/0/expert_ranges", [[0, 3], [3, 3]], "metadata_schema"),
        ("groups/0/expert_ranges", [[0, 2], [2, 3]], "metadata_schema"),
        ("groups/0/expert_ranges", [[7, 8], [0, 2]], "metadata_schema"),
        ("groups/0/expert_ranges", [[0, 2, 3]], "metadata_schema"),
        ("groups/0/expert_ranges", [[0, True], [7, 9]], "metadata_schema"),
        ("groups/0/expert_ranges", [3], "metadata_schema"),
        ("groups/0/expert_ranges", [[(1 << 32) - 1, 1 << 32], [1 << 33, (1 << 33) + 2]], "metadata_schema"),
        ("groups/0/expert_ranges", [[(1 << 32) - 3, 1 << 32]], None),
        ("format_version", "1.7", None),
        ("optional_features", ["a", "b"], None),
        ("x-note", {"any": [True, None]}, None),
        ("groups/0/x-note", False, None),
        ("dictionaries/0/x-", 0, None),
    ],
)  # fmt: skip
def test_one_change(path: str, new: object, reason: str | None) -> None:
    value = copy.deepcopy(GOOD)
    change(path, new)(value)
    text = canonical(value)
    if reason is None:
        from_text(text)
        assert is_valid(value)
        return
    with pytest.raises(FormatError) as caught:
        from_text(text)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("path", "new"),
    [
        *((key, ...) for key in GOOD),
        *((f"groups/0/{key}", ...) for key in GOOD["groups"][0]),
        *((f"dictionaries/0/{key}", ...) for key in GOOD["dictionaries"][0]),
        ("format_version", "2.0"),
        ("format_version", "1.0\n"),
        ("required_features", ["x"]),
        ("unknown", 1),
        ("groups/0/unknown", 1),
        ("groups/0/name", ""),
        ("groups/0/layout", "matrix"),
        ("groups/1/layout", "stacked"),
        ("groups/1/layout", "matrix"),
        ("groups/1/expert_ranges", [[0, 2]]),
        ("groups/0/source", "a.{}.{}"),
        ("groups/0/dtype", "U8"),
        ("groups/0/shape", [3, 4]),
        ("groups/1/shape", [1 << 31, 1, 1]),
        ("groups/2/name", "qmoecodec.x"),
        ("dictionaries/0/threshold", 257),
        ("dictionaries/0/crc32", "0123ABCD"),
        ("dictionaries/1/threshold", 255),
        ("passthrough/qmoecodec.x", "00000000"),
        ("passthrough/norm", "zzzzzzzz"),
    ],
)  # fmt: skip
def test_the_schema_says_the_same(path: str, new: object) -> None:
    value = copy.deepcopy(GOOD)
    change(path, new)(value)
    assert not is_valid(value)


@pytest.mark.parametrize(
    "text",
    [
        to_text(METADATA).replace(",", ", ", 1),
        to_text(METADATA) + " ",
        to_text(METADATA).replace("\\u00e9", "é"),
        to_text(METADATA).replace("\\u00e9", "\\u00E9"),
        to_text(METADATA).replace('"norm"', '"\\u006eorm"'),
        json.dumps(dict(reversed(GOOD.items())), separators=(",", ":")),
    ],
)
def test_other_forms_are_not_canonical(text: str) -> None:
    with pytest.raises(FormatError) as caught:
        from_text(text)
    assert caught.value.reason == "metadata_canonical"


def test_source_names() -> None:
    stacked, fused, matrix = METADATA.groups
    assert list(stacked.source_names()) == ["a.0.wi", "a.1.wi", "a.7.wi"]
    assert [stacked.expert_name(e) for e in range(3)] == list(stacked.source_names())
    assert list(fused.source_names()) == ["b"]
    assert list(matrix.source_names()) == ["é.weight"]
    assert (stacked.source_shape, fused.source_shape, matrix.source_shape) == ((4, 5), (2, 4, 5), (4, 5))
    assert to_ranges([]) == ()


def test_the_schema_fits_real_headers(tmp_path: pathlib.Path) -> None:
    from qmoecodec.container import pack

    validator = jsonschema.Draft202012Validator(SCHEMA)
    validator.check_schema(SCHEMA)
    tensors = {f"experts.{i}.w": np.ones((9, 20), np.float32) for i in range(2)} | {"n": np.arange(3)}
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "np"})
    pack(tmp_path / "a.safetensors", tmp_path / "p.safetensors")
    for path in (tmp_path / "p.safetensors", pathlib.Path(__file__).parents[2] / "spec/examples/minimal.safetensors"):
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        assert [e.message for e in validator.iter_errors(header)] == []
        assert is_valid(json.loads(header["__metadata__"]["qmoecodec"]))
        del header["qmoecodec.header_crc32"]
        assert not validator.is_valid(header)
