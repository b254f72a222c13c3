"""The table of tensors of a safetensors file (spec §2): parse it strictly, lay tensors out, write it."""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from qmoecodec.container.json_text import MAX_NUMBER, MAX_VALUES, Reader, compact, decode_utf8
from qmoecodec.errors import FormatError

MIN_HEADER: Final = 2
MAX_HEADER: Final = 100_000_000
MAX_TENSORS: Final = 65_536
MAX_RANK: Final = 8
MAX_PADDING: Final = 63

#: Bytes per element (spec §2.3.2), in the order of the safetensors library's own list, which is how it sorts tensors.
DTYPE_SIZES: Final[dict[str, int]] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "C64": 8, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
_DTYPE_RANK: Final = {dtype: rank for rank, dtype in enumerate(DTYPE_SIZES)}

# A tensor's entry as every known writer puts it; anything else takes the general way.
_N = r"(?:0|[1-9][0-9]{0,17})"
_ENTRY = re.compile(rf'\{{"dtype":"([A-Z0-9_]+)","shape":\[((?:{_N}(?:,{_N})*)?)\],"data_offsets":\[({_N}),({_N})\]\}}')


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of the header.

    begin, end : bytes, relative to the start of the data
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Header:
    """The header of one file.

    tensors : name -> entry, in the order of the header
    metadata : `__metadata__` in its order; None where the header has none
    data_begin : byte of the file at which the data begins
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] | None
    data_begin: int


def read_header(fd: int, *, strict: bool = True) -> Header:
    """Read the header of an open file (spec §2).

    strict : False for files of other writers: the length of the header need not be a multiple of 8, tensors need not be
        aligned, they and the values of the header need not be few, and any white space may follow the object
    Raises FormatError: the reasons of spec §2.
    """
    n_file = os.fstat(fd).st_size
    return parse_header(read_header_bytes(fd, n_file, strict=strict), n_file, strict=strict)


def read_header_bytes(fd: int, n_file: int, *, strict: bool = True) -> bytes:
    """Read the length and the header itself (spec §2.1), 8 + n bytes; nothing is allocated for a length that lies."""
    if n_file < 8:
        raise FormatError("truncated", f"{n_file} bytes cannot hold a header", byte=n_file)
    (n,) = struct.unpack("<Q", os.pread(fd, 8, 0))
    if not MIN_HEADER <= n <= MAX_HEADER:
        raise FormatError("header_size", f"the header's length {n} is not in {MIN_HEADER}..{MAX_HEADER}", byte=0)
    if strict and n % 8:
        raise FormatError("header_size", f"the header's length {n} is not a multiple of 8", byte=0)
    if n > n_file - 8:
        raise FormatError("truncated", f"the header ends at byte {8 + n}, the file at {n_file}", byte=n_file)
    data = os.pread(fd, 8 + n, 0)
    if len(data) != 8 + n:
        raise FormatError("truncated", "the file became shorter while it was read", byte=len(data))
    return data


def parse_header(data: bytes, n_file: int, *, strict: bool = True) -> Header:
    """Parse the first 8 + n bytes of a file of `n_file` bytes (spec §2.1 to §2.3).

    Raises FormatError: header_encoding, header_json, duplicate_key, json_depth, json_number, json_size, header_schema,
    tensor_count, shape_rank, unknown_dtype, shape_overflow, offset_order, tensor_size, truncated, misaligned,
    tensor_overlap, tensor_hole, trailing_data.
    """
    text = decode_utf8(memoryview(data)[8:], base=8)
    if not text.startswith("{"):
        raise FormatError("header_json", "the header does not begin with '{'", byte=8)
    reader = Reader(text, base=8, max_values=MAX_VALUES if strict else MAX_HEADER)
    reader.count(1)
    raw: dict[str, Any] = {key: _read_entry(reader, key) for key in reader.keys(1)}
    end = reader.at
    if strict and (text[end:].strip(" ") or len(text) - end > MAX_PADDING):
        raise reader.fail("header_json", f"other than 0 to {MAX_PADDING} spaces after the object")
    if not strict and reader.peek():
        raise reader.fail("header_json", "something follows the object")

    has_metadata = "__metadata__" in raw
    metadata = raw.pop("__metadata__", None)
    if strict and len(raw) > MAX_TENSORS:
        raise FormatError("tensor_count", f"{len(raw)} tensors, more than {MAX_TENSORS}")
    n_data = n_file - len(data)
    for name, value in raw.items():
        raw[name] = _check_entry(name, value, n_data, strict=strict)
    tensors: dict[str, TensorInfo] = raw
    _check_layout(tensors, n_data)
    if has_metadata and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise FormatError("header_schema", "__metadata__ is not an object of strings")
    return Header(tensors, metadata, len(data))


def _read_entry(reader: Reader, key: str) -> Any:
    """Read the value of one key of the header: a TensorInfo where it has the usual form, else as it is.

    Nothing is built of values that stand where none may, for they are many times larger than their text.
    """
    character = reader.peek()
    match = _ENTRY.match(reader.text, reader.at)
    if match is None:
        return reader.value(2, 0 if character != "{" else 1 if key == "__metadata__" else 2)
    reader.at = match.end()
    shape = tuple(int(n) for n in match[2].split(",")) if match[2] else ()
    reader.count(6 + len(shape))
    return TensorInfo(match[1], shape, int(match[3]), int(match[4]))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_entry(name: str, value: Any, n_data: int, *, strict: bool) -> TensorInfo:
    """Check one tensor (spec §2.3.1 to §2.3.3)."""
    if not isinstance(value, TensorInfo):
        if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
            raise FormatError("header_schema", "an entry has exactly dtype, shape and data_offsets", tensor=name)
        dtype, dims, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype, str):
            raise FormatError("header_schema", "dtype is not a string", tensor=name)
        if not isinstance(dims, list) or not all(_is_count(n) for n in dims):
            raise FormatError("header_schema", "shape is not an array of integers", tensor=name)
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(n) for n in offsets):
            raise FormatError("header_schema", "data_offsets is not an array of two integers", tensor=name)
        value = TensorInfo(dtype, tuple(dims), *offsets)
    info: TensorInfo = value
    if len(info.shape) > MAX_RANK:
        raise FormatError("shape_rank", f"{len(info.shape)} dimensions", tensor=name)
    if info.dtype not in DTYPE_SIZES:
        raise FormatError("unknown_dtype", f"dtype {info.dtype[:40]!r}", tensor=name)
    if info.begin > info.end:
        raise FormatError("offset_order", f"[{info.begin}, {info.end}]", tensor=name)
    n_items = math.prod(info.shape)
    if n_items > MAX_NUMBER:
        raise FormatError("shape_overflow", f"shape {list(info.shape)}", tensor=name)
    size = DTYPE_SIZES[info.dtype]
    if info.n_bytes != n_items * size:
        message = f"{info.n_bytes} bytes for {info.dtype} {list(info.shape)}"
        raise FormatError("tensor_size", message, tensor=name)
    if info.end > n_data:
        raise FormatError("truncated", f"it ends at byte {info.end} of the data, the file at {n_data}", tensor=name)
    if strict and info.begin % size:
        raise FormatError("misaligned", f"{info.dtype} at byte {info.begin} of the data", tensor=name)
    return info


def _check_layout(tensors: Mapping[str, TensorInfo], n_data: int) -> None:
    """Check that the tensors fill the data without overlap or hole (spec §2.3.4)."""
    at = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin < at:
            raise FormatError("tensor_overlap", f"it begins at byte {info.begin}, before {at}", tensor=name)
        if info.begin > at:
            raise FormatError("tensor_hole", f"it begins at byte {info.begin}, after {at}", tensor=name)
        at = info.end
    if at != n_data:
        raise FormatError("trailing_data", f"the last tensor ends at byte {at} of the data, the file at {n_data}")


def data_order(name: str, dtype: str) -> tuple[int, str]:
    """Return the sort key by which the safetensors library lays tensors out: dtype (so size) falling, then name."""
    return -_DTYPE_RANK[dtype], name


def lay_out(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> dict[str, TensorInfo]:
    """Place (name, dtype, shape) back to back as the safetensors library does.

    >>> lay_out([("b", "U8", (3,)), ("a", "F32", (1,))])["b"]
    TensorInfo(dtype='U8', shape=(3,), begin=4, end=7)
    """
    placed: dict[str, TensorInfo] = {}
    at = 0
    for name, dtype, shape in sorted(tensors, key=lambda t: data_order(t[0], t[1])):
        end = at + math.prod(shape) * DTYPE_SIZES[dtype]
        placed[name] = TensorInfo(dtype, shape, at, end)
        at = end
    return placed


def header_bytes(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None) -> bytes:
    """Write length and header as the safetensors library does: compact, padded with spaces to a multiple of 8.

    Raises ValueError where the header would be larger than spec §2.1 allows.
    """
    entries = [] if metadata is None else [f'"__metadata__":{compact(dict(metadata))}']
    for name, info in tensors.items():  # an entry at a time: many small objects take far more memory than their text
        entry = {"dtype": info.dtype, "shape": info.shape, "data_offsets": (info.begin, info.end)}
        entries.append(f"{compact(name)}:{compact(entry)}")
    text = f"{{{','.join(entries)}}}".encode()
    del entries
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ValueError(f"the header would take {len(text)} bytes of {MAX_HEADER}; use a smaller shard size")
    return struct.pack("<Q", len(text)) + text
