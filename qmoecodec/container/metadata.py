"""The metadata text (spec §3, §4, §6.1): its values, their checks, and its one canonical form."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, cast

from qmoecodec.container.json_text import canonical, parse_object
from qmoecodec.errors import FormatError
from qmoecodec.types import CODE_BITS, MAX_DICTIONARIES, MAX_DIM, MAX_WEIGHTS, DictionaryKind

FORMAT_VERSION: Final = "1.0"
MAJOR: Final = "1"
METADATA_KEY: Final = "qmoecodec"
RESERVED_PREFIX: Final = "qmoecodec."
HEADER_METADATA: Final = "__metadata__"
HEADER_CRC32: Final = "qmoecodec.header_crc32"
MAX_NAME: Final = 4096
FLOAT_DTYPES: Final = ("F16", "BF16", "F32", "F64")
LAYOUTS: Final = ("stacked", "fused", "matrix")

_VERSION = re.compile(r"(0|[1-9][0-9]{0,3})\.(0|[1-9][0-9]{0,3})")
_CRC32 = re.compile(r"[0-9a-f]{8}")


@dataclass(frozen=True, slots=True)
class DictionaryEntry:
    """One dictionary of the bank, without its bytes (spec §4.1)."""

    kind: DictionaryKind
    code_bits: int
    threshold: int
    crc32: int


@dataclass(frozen=True, slots=True)
class GroupInfo:
    """One group, without its tensors (spec §6.1).

    expert_ranges : pairs (first, last + 1) of the numbers put into the template; empty unless `layout` is "stacked"
    shape : (experts, rows, cols)
    """

    name: str
    layout: str
    source: str
    expert_ranges: tuple[tuple[int, int], ...]
    shape: tuple[int, int, int]
    dtype: str
    code_bits: int
    row_length_base: int

    @property
    def n_weights(self) -> int:
        """experts x rows x cols."""
        return self.shape[0] * self.shape[1] * self.shape[2]

    def source_names(self) -> Iterator[str]:
        """Yield the names of the source tensors, in order of expert for a stacked group."""
        if self.layout != "stacked":
            yield self.source
            return
        head, tail = self.source.split("{}")
        for first, end in self.expert_ranges:
            for number in range(first, end):
                yield f"{head}{number}{tail}"

    def expert_name(self, expert: int) -> str:
        """Return the name of the source tensor that holds the expert."""
        if self.layout != "stacked":
            return self.source
        head, tail = self.source.split("{}")
        for first, end in self.expert_ranges:
            if expert < end - first:
                return f"{head}{first + expert}{tail}"
            expert -= end - first
        raise IndexError(expert)

    @property
    def source_shape(self) -> tuple[int, ...]:
        """Shape of each source tensor."""
        return self.shape if self.layout == "fused" else self.shape[1:]


@dataclass(frozen=True, slots=True)
class Metadata:
    """The parsed metadata text.

    passthrough : name -> crc32 of the tensor's bytes
    """

    dictionaries: tuple[DictionaryEntry, ...] = ()
    groups: tuple[GroupInfo, ...] = ()
    passthrough: Mapping[str, int] = field(default_factory=dict)
    format_version: str = FORMAT_VERSION
    required_features: tuple[str, ...] = ()
    optional_features: tuple[str, ...] = ()

    def source_names(self) -> Iterator[str]:
        """Yield the names of all tensors that the file stands for."""
        yield from self.passthrough
        for group in self.groups:
            yield from group.source_names()


def is_reserved(name: str) -> bool:
    """Say whether no tensor or group of this name may be stored (spec §3.6).

    >>> [is_reserved(name) for name in ("qmoecodec.a", "__metadata__", "__metadata__.a")]
    [True, True, False]
    """
    return name.startswith(RESERVED_PREFIX) or name == HEADER_METADATA


def to_ranges(numbers: list[int]) -> tuple[tuple[int, int], ...]:
    """Write ascending numbers as ranges with gaps between them.

    >>> to_ranges([0, 1, 2, 5])
    ((0, 3), (5, 6))
    """
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number:
            ranges[-1] = (ranges[-1][0], number + 1)
        else:
            ranges.append((number, number + 1))
    return tuple(ranges)


def to_text(metadata: Metadata) -> str:
    """Write the metadata text in canonical form (spec §3.2)."""
    groups = []
    for g in sorted(metadata.groups, key=lambda g: g.name):
        value: dict[str, object] = {
            "name": g.name,
            "layout": g.layout,
            "source": g.source,
            "shape": g.shape,
            "dtype": g.dtype,
            "code_bits": g.code_bits,
            "row_length_base": g.row_length_base,
        }
        if g.layout == "stacked":
            value["expert_ranges"] = g.expert_ranges
        groups.append(value)
    dictionaries = [
        {"kind": d.kind, "code_bits": d.code_bits, "threshold": d.threshold, "crc32": f"{d.crc32:08x}"}
        for d in metadata.dictionaries
    ]
    return canonical(
        {
            "format_version": metadata.format_version,
            "required_features": metadata.required_features,
            "optional_features": metadata.optional_features,
            "dictionaries": dictionaries,
            "groups": groups,
            "passthrough": {name: f"{crc:08x}" for name, crc in metadata.passthrough.items()},
        }
    )


def _bad(message: str, **where: object) -> FormatError:
    return FormatError("metadata_schema", message).at(**where)


def _take(value: Any, types: Mapping[str, type], what: str, **where: object) -> dict[str, Any]:
    """Return the keys of an object that this version defines, checked to be there and of their type."""
    if not isinstance(value, dict):
        raise _bad(f"{what} is not an object", **where)
    for key in value:
        if key not in types and not key.startswith("x-"):
            raise _bad(f"{what} has an unknown key {key[:80]!r}", **where)
    for key, kind in types.items():
        if key not in value:
            raise _bad(f"{what} has no {key!r}", **where)
        if not isinstance(value[key], kind) or isinstance(value[key], bool):
            raise _bad(f"{key!r} of {what} is not of type {_JSON_TYPES[kind]}", **where)
    return {key: value[key] for key in types}


_JSON_TYPES: Final = {str: "string", int: "integer", list: "array", dict: "object"}
_TOP: Final[dict[str, type]] = {
    "format_version": str,
    "required_features": list,
    "optional_features": list,
    "dictionaries": list,
    "groups": list,
    "passthrough": dict,
}
_DICTIONARY: Final[dict[str, type]] = {"kind": str, "code_bits": int, "threshold": int, "crc32": str}
_GROUP: Final[dict[str, type]] = {
    "name": str,
    "layout": str,
    "source": str,
    "shape": list,
    "dtype": str,
    "code_bits": int,
    "row_length_base": int,
}


def from_text(text: str) -> Metadata:
    """Parse and check the metadata text by itself (spec §3.2 to §3.5, §4.1, §6.1), without a look at the tensors.

    Raises FormatError: the reasons of spec §2.2, metadata_canonical, metadata_schema, unsupported_version,
    unsupported_feature, dictionary_threshold, shape_overflow, reserved_name.
    """
    value = parse_object(text)
    version = value.get("format_version")
    if not isinstance(version, str) or _VERSION.fullmatch(version) is None:
        raise _bad("format_version is not MAJOR.MINOR")
    if version.split(".")[0] != MAJOR:
        raise FormatError("unsupported_version", f"format version {version}; this reader knows {MAJOR}.x")
    required = _features(value.get("required_features"), "required_features")
    if required:
        raise FormatError("unsupported_feature", f"required feature {required[0][:80]!r}")
    if canonical(value) != text:
        raise FormatError("metadata_canonical")
    top = _take(value, _TOP, "the metadata")
    optional = _features(top["optional_features"], "optional_features")
    if len(top["dictionaries"]) > MAX_DICTIONARIES:
        raise _bad(f"{len(top['dictionaries'])} dictionaries, more than {MAX_DICTIONARIES}")
    dictionaries = tuple(_dictionary(d, i) for i, d in enumerate(top["dictionaries"]))
    groups: list[GroupInfo] = []
    for g in top["groups"]:
        groups.append(_group(g, groups[-1].name if groups else ""))
    passthrough: dict[str, int] = {}
    for name, crc in top["passthrough"].items():
        if not isinstance(crc, str) or _CRC32.fullmatch(crc) is None:
            raise _bad("a crc32 is not 8 lower-case hexadecimal digits", tensor=name)
        if is_reserved(name):
            raise FormatError("reserved_name", tensor=name)
        passthrough[name] = int(crc, 16)
    return Metadata(dictionaries, tuple(groups), passthrough, version, (), optional)


def _features(value: Any, key: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(f, str) for f in value):
        raise _bad(f"{key} is not an array of strings")
    if any(a >= b for a, b in itertools.pairwise(value)):
        raise _bad(f"{key} is not sorted, without duplicates")
    return tuple(value)


def _dictionary(value: Any, index: int) -> DictionaryEntry:
    d = _take(value, _DICTIONARY, "a dictionary", dictionary=index)
    if d["kind"] not in ("aivf", "table") or d["code_bits"] not in CODE_BITS:
        raise _bad(f"kind {d['kind'][:40]!r} or code_bits {d['code_bits']} does not exist", dictionary=index)
    if _CRC32.fullmatch(d["crc32"]) is None:
        raise _bad("a crc32 is not 8 lower-case hexadecimal digits", dictionary=index)
    if d["threshold"] > 1 << d["code_bits"]:
        message = f"threshold {d['threshold']} is not in 0..2^{d['code_bits']}"
        raise FormatError("dictionary_threshold", message, dictionary=index)
    if d["kind"] == "table" and d["threshold"] != 1 << d["code_bits"]:
        message = f"a table has threshold {1 << d['code_bits']}, not {d['threshold']}"
        raise FormatError("dictionary_threshold", message, dictionary=index)
    return DictionaryEntry(cast(DictionaryKind, d["kind"]), d["code_bits"], d["threshold"], int(d["crc32"], 16))


def _group(value: Any, before: str) -> GroupInfo:
    """Check a group; `before` is the name of the one before it, "" for the first."""
    name = value.get("name") if isinstance(value, dict) else None
    place: dict[str, object] = {"group": name} if isinstance(name, str) else {}
    stacked = isinstance(value, dict) and value.get("layout") == "stacked"
    ranges_type: dict[str, type] = {"expert_ranges": list}
    g = _take(value, {**_GROUP, **(ranges_type if stacked else {})}, "a group", **place)
    if not 0 < len(g["name"].encode()) <= MAX_NAME:
        raise _bad(f"a group's name has 1 to {MAX_NAME} bytes", **place)
    if g["layout"] not in LAYOUTS or g["dtype"] not in FLOAT_DTYPES or g["code_bits"] not in CODE_BITS:
        raise _bad(f"layout {g['layout'][:40]!r}, dtype {g['dtype'][:40]!r} or code_bits {g['code_bits']} does not exist",
                   **place)  # fmt: skip
    if g["row_length_base"] >= 1 << 32:
        raise _bad("row_length_base is not below 2^32", **place)
    if len(g["source"].encode()) > MAX_NAME:
        raise _bad(f"the source has more than {MAX_NAME} bytes", **place)
    if stacked and g["source"].count("{}") != 1:
        raise _bad("the template does not have exactly one {}", **place)
    shape = g["shape"]
    if len(shape) != 3 or not all(isinstance(n, int) and not isinstance(n, bool) for n in shape):
        raise _bad("shape is not three integers", **place)
    if before >= g["name"]:
        raise _bad("groups are not sorted by name, without duplicates", **place)
    if g["layout"] == "matrix" and shape[0] != 1:
        raise _bad(f"{shape[0]} experts in a matrix", **place)
    ranges = _ranges(g["expert_ranges"], shape[0], place) if stacked else ()
    if max(shape) > MAX_DIM or shape[0] * shape[1] * shape[2] > MAX_WEIGHTS:
        raise FormatError("shape_overflow", f"shape {shape}").at(**place)
    if is_reserved(g["name"]) or is_reserved(g["source"]):
        raise FormatError("reserved_name").at(**place)
    return GroupInfo(
        g["name"],
        g["layout"],
        g["source"],
        ranges,
        (shape[0], shape[1], shape[2]),
        g["dtype"],
        g["code_bits"],
        g["row_length_base"],
    )


def _ranges(value: list[Any], n_experts: int, place: Mapping[str, object]) -> tuple[tuple[int, int], ...]:
    """Check `expert_ranges` (spec §6.1): ascending, none empty, gaps between, and `n_experts` numbers."""
    ranges: list[tuple[int, int]] = []
    for pair in value:
        if not isinstance(pair, list) or len(pair) != 2:
            raise _bad("an expert range is not a pair", **place)
        first, end = pair
        if not all(isinstance(n, int) and not isinstance(n, bool) for n in pair):
            raise _bad("an expert range is not a pair of integers", **place)
        if first >= end or end > 1 << 32 or (ranges and first <= ranges[-1][1]):
            raise _bad("expert ranges are not ascending, with gaps, below 2^32", **place)
        ranges.append((first, end))
    if sum(end - first for first, end in ranges) != n_experts:
        raise _bad(f"the expert ranges do not name {n_experts} experts", **place)
    return tuple(ranges)
