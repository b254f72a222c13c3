"""A file of the format as a value that can be changed anywhere, and the writer that turns it into bytes."""

from __future__ import annotations

import copy
import difflib
import json
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vectors.codebook import Codebook, Row

SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2}
SIZES |= {"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8}
HEADER_CRC = "qmoecodec.header_crc32"
Levels = tuple[bytes, bytes]
Edit = list[Any]  # [offset, old, new]


def canonical(value: Any) -> str:
    """Write JSON as §3.2 asks for."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def crc_text(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}"


@dataclass
class Matrix:
    """One expert: the digits and levels of its rows, and the number of its dictionary."""

    rows: list[Row]
    levels: list[Levels]
    dictionary: int = 0

    def dense(self, size: int) -> bytes:
        return b"".join((bytes(size), *pair)[digit] for row, pair in zip(self.rows, self.levels, strict=True) for digit in row)


@dataclass
class Group:
    name: str
    layout: str
    source: str
    dtype: str
    bits: int
    shape: tuple[int, int, int]
    experts: list[Matrix]
    ranges: list[list[int]] | None = None

    def source_names(self) -> list[str]:
        if self.layout != "stacked":
            return [self.source]
        return [self.source.replace("{}", str(i)) for first, end in self.ranges or [] for i in range(first, end)]


@dataclass
class Tensor:
    dtype: str
    shape: list[int]
    data: bytes


@dataclass
class Draft:
    """What a file holds. The functions change its text on the way to bytes."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    strings: dict[str, Any] = field(default_factory=dict)
    order: list[str] | None = None  # of the tensors in the data and the header, else by size of dtype and name
    keep: set[str] = field(default_factory=set)  # checksums that `refresh` leaves as they are
    metadata_text: Callable[[str], str] = lambda text: text
    header: Callable[[dict[str, Any]], dict[str, Any]] = lambda header: header
    header_text: Callable[[str], str] = lambda text: text
    header_bytes: Callable[[bytes], bytes] = lambda text: text
    padding: int | None = None
    data: Callable[[bytes], bytes] = lambda data: data
    whole: Callable[[bytes], bytes] = lambda whole: whole

    def copy(self) -> Draft:
        return copy.deepcopy(self)

    def refresh(self) -> None:
        """Compute the checksums again that depend on the tensors, where they can be."""
        groups, bank, passthrough = (self.metadata.get(key) for key in ("groups", "dictionaries", "passthrough"))
        for group in groups if isinstance(groups, list) else []:
            if "experts" in self.keep or not isinstance(group, dict):
                break
            part = {role: self.tensors.get(f"{group.get('name')}_{role}") for role in ROLES}
            if all(part.values()):
                part["checksums"].data = expert_checksums(part)  # type: ignore[union-attr,arg-type]
        for i, entry in enumerate(bank if isinstance(bank, list) else []):
            tensor = self.tensors.get(f"qmoecodec.dictionary.{i}")
            if "dictionaries" not in self.keep and tensor is not None and isinstance(entry, dict):
                entry["crc32"] = crc_text(tensor.data)
        for name in passthrough if isinstance(passthrough, dict) else {}:
            if "passthrough" not in self.keep and name in self.tensors:
                self.metadata["passthrough"][name] = crc_text(self.tensors[name].data)

    def render(self, *, refresh: bool = True) -> bytes:
        """Return the file; with the checksums that are there, or computed again."""
        draft = self.copy()
        if refresh:
            draft.refresh()
        strings = dict(draft.strings)
        if draft.metadata:
            strings["qmoecodec"] = draft.metadata_text(canonical(draft.metadata))
        names = draft.order or sorted(draft.tensors, key=lambda name: (-SIZES[draft.tensors[name].dtype], name.encode()))
        header: dict[str, Any] = {"__metadata__": strings}
        at, crc_at = 0, None
        for name in names:
            tensor = draft.tensors[name]
            header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [at, at + len(tensor.data)]}
            crc_at = at if name == HEADER_CRC else crc_at
            at += len(tensor.data)
        text = draft.header_text(json.dumps(draft.header(header), separators=(",", ":"), ensure_ascii=False))
        content = text.encode("utf-8", "surrogatepass")
        padding = -len(content) % 8 if draft.padding is None else draft.padding
        content = draft.header_bytes(content + b" " * padding)
        data = bytearray(draft.data(b"".join(draft.tensors[name].data for name in names)))
        head = struct.pack("<Q", len(content)) + content
        if refresh and crc_at is not None and "header" not in self.keep and len(data) >= crc_at + 4:
            data[crc_at : crc_at + 4] = struct.pack("<I", zlib.crc32(head))
        return draft.whole(head + bytes(data))


ROLES = ("codes", "code_offsets", "row_lengths", "levels", "dictionary_index", "checksums")


def expert_checksums(part: dict[str, Tensor]) -> bytes:
    """§7.1, as far as the tensors are long enough."""
    experts = len(part["checksums"].data) // 4
    offsets = part["code_offsets"].data
    sums = b""
    for e in range(experts):
        begin, end = (int.from_bytes(offsets[8 * i : 8 * i + 8], "little") for i in (e, e + 1))
        pieces = [part["codes"].data[begin:end]]
        for role in ("row_lengths", "levels"):
            each = len(part[role].data) // experts
            pieces.append(part[role].data[e * each : (e + 1) * each])
        pieces += [part["dictionary_index"].data[e : e + 1], offsets[8 * e : 8 * e + 16]]
        sums += struct.pack("<I", zlib.crc32(b"".join(pieces)))
    return sums


def add_group(draft: Draft, group: Group, bank: Sequence[Codebook]) -> None:
    """Encode a group and add its tensors and its entry."""
    experts, rows, cols = group.shape
    codes, offsets, lengths, levels = b"", [0], [], b""
    for expert in group.experts:
        assert len(expert.rows) == len(expert.levels) == rows and all(len(row) == cols for row in expert.rows)
        book = bank[expert.dictionary]
        for row, pair in zip(expert.rows, expert.levels, strict=True):
            words = book.encode(row)
            codes += book.pack(words)
            lengths.append(len(words))
            levels += b"".join(pair)
        offsets.append(len(codes))
    base = min(lengths, default=0)
    most = max(lengths, default=0) - base
    dtype = "U8" if most < 2**8 else "U16" if most < 2**16 else "U32"
    part = {
        "codes": Tensor("U8", [len(codes)], codes),
        "code_offsets": Tensor("U64", [experts + 1], struct.pack(f"<{experts + 1}Q", *offsets)),
        "row_lengths": Tensor(dtype, [experts, rows], b"".join((n - base).to_bytes(SIZES[dtype], "little") for n in lengths)),
        "levels": Tensor(group.dtype, [experts, rows, 2], levels),
        "dictionary_index": Tensor("U8", [experts], bytes(expert.dictionary for expert in group.experts)),
        "checksums": Tensor("U32", [experts], bytes(4 * experts)),
    }
    draft.tensors |= {f"{group.name}_{role}": tensor for role, tensor in part.items()}
    entry: dict[str, Any] = {"name": group.name, "layout": group.layout, "source": group.source, "shape": [*group.shape]}
    entry |= {"dtype": group.dtype, "code_bits": group.bits, "row_length_base": base}
    if group.layout == "stacked":
        entry["expert_ranges"] = group.ranges
    draft.metadata["groups"].append(entry)


def make(groups: Sequence[Group] = (), bank: Sequence[Codebook] = (), passthrough: dict[str, Tensor] | None = None) -> Draft:
    """Return a valid draft."""
    draft = Draft()
    draft.metadata = {"format_version": "1.0", "required_features": [], "optional_features": [], "groups": []}
    draft.metadata["dictionaries"] = [
        {"kind": book.kind, "code_bits": book.bits, "threshold": book.threshold, "crc32": crc_text(book.data)} for book in bank
    ]
    for i, book in enumerate(bank):
        draft.tensors[f"qmoecodec.dictionary.{i}"] = Tensor("U8", [len(book.data)], book.data)
    draft.tensors[HEADER_CRC] = Tensor("U32", [1], bytes(4))
    for group in sorted(groups, key=lambda group: group.name.encode()):
        add_group(draft, group, bank)
    draft.metadata["passthrough"] = {name: crc_text(tensor.data) for name, tensor in (passthrough or {}).items()}
    draft.tensors |= passthrough or {}
    draft.refresh()
    return draft


def restored(groups: Sequence[Group], passthrough: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the source tensors that a draft stands for."""
    tensors = dict(passthrough)
    for group in groups:
        size = SIZES[group.dtype]
        if group.layout == "stacked":
            for name, expert in zip(group.source_names(), group.experts, strict=True):
                tensors[name] = Tensor(group.dtype, [*group.shape[1:]], expert.dense(size))
        else:
            shape = [*group.shape] if group.layout == "fused" else [*group.shape[1:]]
            tensors[group.source] = Tensor(group.dtype, shape, b"".join(expert.dense(size) for expert in group.experts))
    return tensors


def edits(old: bytes, new: bytes) -> list[Edit]:
    """Return the edits that make `new` of `old`; offsets count in `old`."""
    if old == new:
        return []
    begin = 0
    while begin < min(len(old), len(new)) and old[begin] == new[begin]:
        begin += 1
    end = 0
    while end < min(len(old), len(new)) - begin and old[-1 - end] == new[-1 - end]:
        end += 1
    middle, other = old[begin : len(old) - end], new[begin : len(new) - end]
    if len(middle) == len(other):
        found: list[Edit] = []
        for i, (a, b) in enumerate(zip(middle, other, strict=True)):
            if a == b:
                continue
            if found and found[-1][0] + len(found[-1][1]) // 2 == begin + i:
                found[-1][1] += f"{a:02x}"
                found[-1][2] += f"{b:02x}"
            else:
                found.append([begin + i, f"{a:02x}", f"{b:02x}"])
        return found
    if max(len(middle), len(other)) > 3000:
        return [[begin, middle.hex(), other.hex()]]
    blocks = difflib.SequenceMatcher(None, middle, other, autojunk=False).get_opcodes()
    return [[begin + a, middle[a:b].hex(), other[c:d].hex()] for tag, a, b, c, d in blocks if tag != "equal"]
