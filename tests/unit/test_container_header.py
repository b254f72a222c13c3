"""The strict parser of headers (spec §2), case by case."""

import json
import os
import pathlib
import struct
import tracemalloc

import numpy as np
import pytest
import safetensors.numpy

from qmoecodec.container.header import Header, header_bytes, lay_out, parse_header, read_header
from qmoecodec.container.json_text import canonical, parse_object
from qmoecodec.errors import FormatError

GOOD = '{"__metadata__":{"a":"b"},"t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'


def parse(text: str | bytes, n_data: int = 8, *, strict: bool = True, pad: bool = True) -> Header:
    data = text.encode() if isinstance(text, str) else text
    if pad:
        data += b" " * (-len(data) % 8)
    return parse_header(struct.pack("<Q", len(data)) + data, 8 + len(data) + n_data, strict=strict)


def reason(text: str | bytes, n_data: int = 8, *, strict: bool = True, pad: bool = True) -> str:
    with pytest.raises(FormatError) as caught:
        parse(text, n_data, strict=strict, pad=pad)
    return caught.value.reason


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> str:
    return json.dumps({"t": {"dtype": dtype, "shape": shape, "data_offsets": offsets}})


def test_a_good_header() -> None:
    header = parse(GOOD)
    assert header.metadata == {"a": "b"}
    assert header.data_begin % 8 == 0
    info = header.tensors["t"]
    assert (info.dtype, info.shape, info.begin, info.end) == ("F32", (2,), 0, 8)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"\xef\xbb\xbf{}", "header_encoding"),
        (b'{"\xff":1}', "header_encoding"),
        (b'{"\xed\xa0\x80":1}', "header_encoding"),
        (' {"a":1}', "header_json"),
        ("[]", "header_json"),
        ("{", "header_json"),
        ('{"a":1,}', "header_json"),
        ('{"a":[1,]}', "header_json"),
        ('{"a":1}x', "header_json"),
        ('{"a":1}{}', "header_json"),
        ('{"a":01}', "header_json"),
        ('{"a":NaN}', "header_json"),
        ('{"a":Infinity}', "header_json"),
        ("{'a':1}", "header_json"),
        ('{"a\n":1}', "header_json"),
        ('{"\\x":1}', "header_json"),
        ('{"\\u12":1}', "header_json"),
        ('{/**/"a":1}', "header_json"),
        ('{"a" 1}', "header_json"),
        ('{"a":٣}', "header_json"),
        ('{"a":1\u00a0}', "header_json"),
        ('{"a":1,"a":1}', "duplicate_key"),
        ('{"a":1,"\\u0061":1}', "duplicate_key"),
        ('{"a":{"dtype":1,"dtype":1}}', "duplicate_key"),
        ('{"__metadata__":{},"__metadata__":{}}', "duplicate_key"),
        ('{"a":' + "[" * 16 + "]" * 16 + "}", "json_depth"),
        ('{"a":' + "[" * 100_000 + "}", "json_depth"),
        ('{"a":' * 100_000, "json_depth"),
        ('{"a":1.0}', "json_number"),
        ('{"a":1e3}', "json_number"),
        ('{"a":-1}', "json_number"),
        ('{"a":-0}', "json_number"),
        ('{"a":9223372036854775808}', "json_number"),
        ('{"a":' + "9" * 100_000 + "}", "json_number"),
        ('{"\\ud800":1}', "header_encoding"),
        ('{"\\udc00\\ud800":1}', "header_encoding"),
        ('{"a":1}', "header_schema"),
        ('{"a":null}', "header_schema"),
        ('{"__metadata__":1,' + entry()[1:], "header_schema"),
        ('{"__metadata__":null,' + entry()[1:], "header_schema"),
        ('{"__metadata__":{"a":1},' + entry()[1:], "header_schema"),
        ('{"__metadata__":1}', "trailing_data"),
        ('{"\\ud800\\c":1}', "header_encoding"),
        ('{"\\c\\ud800":1}', "header_json"),
        ('{"a":1,"a":1.5}', "json_number"),
        ('{"t":{"dtype":"U8","shape":[8]}}', "header_schema"),
        ('{"t":{"dtype":"U8","shape":[8],"data_offsets":[0,8],"x":1}}', "header_schema"),
        (entry(dtype=1), "header_schema"),
        (entry(shape=[True]), "header_schema"),
        (entry(shape="2"), "header_schema"),
        (entry(offsets=[0]), "header_schema"),
        (entry(offsets=[0, 8, 8]), "header_schema"),
        (entry(offsets=[0, None]), "header_schema"),
        (entry(shape=[1] * 9), "shape_rank"),
        (entry(dtype="F4"), "unknown_dtype"),
        (entry(dtype="f32"), "unknown_dtype"),
        (entry(shape=[1 << 62, 1 << 62]), "shape_overflow"),
        (entry(shape=[1 << 32, 1 << 31]), "shape_overflow"),
        (entry(offsets=[8, 0]), "offset_order"),
        (entry(shape=[3]), "tensor_size"),
        (entry(shape=[]), "tensor_size"),
        (entry(shape=[500_000_000], offsets=[0, 2_000_000_000]), "truncated"),
        ("{}", "trailing_data"),
        (entry(shape=[1], offsets=[0, 4]), "trailing_data"),
        (entry(shape=[1], offsets=[4, 8]), "tensor_hole"),
    ],
)  # fmt: skip
def test_rejections(text: str | bytes, expected: str, strict: bool) -> None:
    assert reason(text, strict=strict) == expected


def test_overlap_and_hole_between_tensors() -> None:
    def two(a: tuple[int, int], b: tuple[int, int]) -> str:
        return json.dumps(
            {n: {"dtype": "U8", "shape": [e - s], "data_offsets": [s, e]} for n, (s, e) in {"a": a, "b": b}.items()}
        )

    assert parse(two((4, 8), (0, 4))).tensors.keys() == {"a", "b"}
    assert parse(two((0, 8), (8, 8))).tensors["b"].shape == (0,)
    assert parse(two((0, 0), (0, 8))).tensors["a"].shape == (0,)
    assert reason(two((0, 5), (4, 8))) == "tensor_overlap"
    assert reason(two((0, 8), (0, 8))) == "tensor_overlap"
    assert reason(two((0, 3), (4, 8))) == "tensor_hole"
    assert reason(two((0, 8), (4, 4))) == "tensor_overlap"


def test_what_only_the_strict_profile_rejects() -> None:
    shifted = json.dumps({
        "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
        "b": {"dtype": "F64", "shape": [1], "data_offsets": [4, 12]},
    })  # fmt: skip
    assert reason(shifted, 12) == "misaligned"
    assert parse(shifted, 12, strict=False).tensors["b"].begin == 4
    assert reason(GOOD + " " * 64, pad=False) == "header_json"
    assert parse(GOOD + " " * 63, pad=False).metadata == {"a": "b"}
    assert reason(GOOD + "\n", pad=False) == "header_json"
    assert parse(GOOD + "\n\t " * 50, strict=False).metadata == {"a": "b"}


def test_white_space_and_key_order_do_not_matter() -> None:
    text = '{ "t" :\n{"shape":[ 2 ],"data_offsets": [0 ,8],"dtype":"F3\\u0032"} }'
    assert parse(text).tensors == parse(GOOD).tensors
    for name in ("T", "0", "", "__metadata_", "__metadata__ ", "~", "é"):  # before and after __metadata__
        assert parse(text.replace('"t"', f'"{name}"')).tensors == {name: parse(GOOD).tensors["t"]}


def test_too_many_tensors() -> None:
    def many(n: int) -> str:
        entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
        return json.dumps({str(i): entry for i in range(n)}, separators=(",", ":"))

    assert len(parse(many(65_536), 0).tensors) == 65_536
    assert reason(many(65_537), 0) == "tensor_count"
    assert len(parse(many(65_537), 0, strict=False).tensors) == 65_537


def test_too_many_values() -> None:
    entry = '{"dtype":"U8","shape":[0,1,1,1,1,1,1,1],"data_offsets":[0,0]}'
    tensors = ",".join(f'"{i}":{entry}' for i in range(65_536))
    strings = ",".join(f'"{i}":""' for i in range((1 << 20) - 65_536 * 14 - 2))
    full = f'{{{tensors},"__metadata__":{{{strings}}}}}'
    assert len(parse(full, 0).tensors) == 65_536
    one_more = full[:-2] + ',"":""}}'
    assert reason(one_more, 0) == "json_size"
    assert len(parse(one_more, 0, strict=False).tensors) == 65_536  # the header of a source may hold more
    items = ",".join(["0"] * ((1 << 20) - 2))
    assert len(parse_object(f'{{"a":[{items}]}}')["a"]) == (1 << 20) - 2
    with pytest.raises(FormatError, match="json_size"):
        parse_object(f'{{"a":[{items},0]}}')
    with pytest.raises(FormatError, match="json_size"):  # it stops there
        parse_object(f'{{"a":[{items},0,x')


ZEROS = f"[{','.join(['0'] * 10_000)}]"
KEYS = json.dumps({f"{i:05x}": 0 for i in range(3_000)}, separators=(",", ":"))


@pytest.mark.parametrize(
    ("text", "most"),
    [
        (f'{{"t":{ZEROS}}}', 3.0),
        (f'{{"t":[[{ZEROS}]]}}', 3.0),
        (f'{{"t":{{"shape":[{ZEROS}]}}}}', 3.0),
        (f'{{"__metadata__":{{"a":{ZEROS}}}}}', 3.0),
        (f'{{"__metadata__":[{ZEROS}]}}', 3.0),
        (f'{{"__metadata__":{{"a":{KEYS}}}}}', 13.0),  # the keys themselves are remembered, for none may stand twice
        (f'{{"t":[[{KEYS}]]}}', 13.0),
    ],
    ids=["array", "nested", "shape", "metadata", "array of metadata", "keys of metadata", "keys"],
)
def test_nothing_is_built_of_values_that_stand_where_none_may(text: str, most: float) -> None:
    """The text is decoded; a list would take eight bytes for each two of it."""
    data = text.encode() + b" " * (-len(text) % 8)
    data = struct.pack("<Q", len(data)) + data
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="header_schema"):
            parse_header(data, len(data))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < most * len(text)


def test_sixteen_deep_is_allowed() -> None:
    text = "[" * 15 + "]" * 15
    assert parse_object('{"a":' + text + "}") == {"a": json.loads(text)}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "truncated"),
        (b"\2\0\0\0\0\0\0", "truncated"),
        (struct.pack("<Q", 0) + b"{}      ", "header_size"),
        (struct.pack("<Q", 1) + b"{}      ", "header_size"),
        (struct.pack("<Q", 2) + b"{}", "header_size"),
        (struct.pack("<Q", 100_000_008), "header_size"),
        (struct.pack("<Q", 2**63) + b"{}      ", "header_size"),
        (struct.pack("<Q", 16) + b"{}      ", "truncated"),
        (struct.pack("<Q", 8) + b"{}     ", "truncated"),
    ],
)
def test_length_of_the_header(tmp_path: pathlib.Path, data: bytes, expected: str) -> None:
    path = tmp_path / "f"
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(FormatError) as caught:
            read_header(fd)
    finally:
        os.close(fd)
    assert caught.value.reason == expected


def test_a_length_that_is_no_multiple_of_eight_is_legal_elsewhere(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(struct.pack("<Q", 2) + b"{}")
    fd = os.open(path, os.O_RDONLY)
    try:
        assert read_header(fd, strict=False).tensors == {}
    finally:
        os.close(fd)


def test_errors_name_byte_and_tensor() -> None:
    with pytest.raises(FormatError) as caught:
        parse('{"é":1,"é":2}')
    assert caught.value.where == {"byte": 8 + len('{"é":1,'.encode())}
    with pytest.raises(FormatError) as caught:
        parse(entry(shape=[3]))
    assert caught.value.where == {"tensor": "t"}


def test_written_headers_are_those_of_the_safetensors_library() -> None:
    tensors = {
        'quote " \\ / \n \x01 \x7f é 😀': np.arange(3, dtype=np.uint8),
        "b": np.zeros((2, 3), np.float32),
        "a": np.zeros((2, 3), np.float32),
        "bool": np.zeros((), np.bool_),
        "nothing": np.zeros((0, 2), np.int64),
        **{t: np.zeros(3, t) for t in ("u2", "i2", "f2", "u4", "i4", "f8", "u8", "i8", "c8")},
    }
    data = safetensors.numpy.save(tensors, metadata={"z": 'x"\n', "é": "ü"})
    (n,) = struct.unpack("<Q", data[:8])
    header = parse_header(data[: 8 + n], len(data))
    assert header.metadata is not None
    placed = lay_out((name, info.dtype, info.shape) for name, info in header.tensors.items())
    assert placed == header.tensors
    assert list(placed) == list(header.tensors)
    assert header_bytes(placed, header.metadata) == data[: 8 + n]


def test_canonical_text() -> None:
    value = {"é": 1, "b": {"y": [], "x": ["\x7f\u2028\"\\/\b\f\n\r\t\x00"]}, "\U0001f600": 0, "B": 2}
    text = canonical(value)
    assert text == (
        r'{"B":2,"b":{"x":["\u007f\u2028\"\\/\b\f\n\r\t\u0000"],"y":[]},"\u00e9":1,"\ud83d\ude00":0}'
    )
    assert parse_object(text) == value
