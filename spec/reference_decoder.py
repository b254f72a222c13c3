#!/usr/bin/env python3
"""Reference decoder of the qmoecodec file format 1.0: standard library only, plain loops, the order of SPEC.md §9.

    reference_decoder.py decode IN --out DIR [--deep]      (see conformance/PROTOCOL.md)

It is written to be read beside the specification, whose section and requirement numbers it names. It keeps whole
files in memory and is slow.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2}
SIZES |= {"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8}
EXPONENTS = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F80_0000, "F64": 0x7FF0_0000_0000_0000}
RESERVED = "qmoecodec."
ROLES = ("codes", "code_offsets", "row_lengths", "levels", "dictionary_index", "checksums")
ENTRY = {"kind": str, "code_bits": int, "threshold": int, "crc32": str}
GROUP = {"name": str, "layout": str, "source": str, "shape": list, "dtype": str, "code_bits": int, "row_length_base": int}


class RejectedError(Exception):
    """Bytes that the specification forbids; the argument is the reason."""


def need(condition: object, reason: str) -> None:
    """Reject the file unless the condition holds."""
    if not condition:
        raise RejectedError(reason)


# ---- §2.2: JSON ------------------------------------------------------------------------------------------------------

SPACE = re.compile(r"[ \t\n\r]*")
NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
WORD = re.compile("true|false|null")
CHARACTERS = re.compile(r'(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u(?![dD][89a-fA-F])[0-9a-fA-F]{4})+')
SURROGATES = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}")
LONE = re.compile(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")


class Parser:
    """A text and a place in it; `free` is the key of the one member in which any number may stand (§8)."""

    def __init__(self, text: str, free: str | None = None) -> None:
        self.text, self.at, self.free, self.values = text, 0, free, 0

    def skip(self, pattern: re.Pattern[str] = SPACE) -> str:
        """Step over what the pattern matches here."""
        found = pattern.match(self.text, self.at)
        if found is None:
            return ""
        self.at = found.end()
        return found.group()

    def take(self, character: str) -> bool:
        """Step over white space, and over this character if it is the next."""
        self.skip()
        found = self.text.startswith(character, self.at)
        self.at += found
        return found

    def string(self) -> str:
        start = self.at
        need(self.take('"'), "header_json")
        while not self.text.startswith('"', self.at):
            if not self.skip(CHARACTERS) and not self.skip(SURROGATES):
                raise RejectedError("header_encoding" if LONE.match(self.text, self.at) else "header_json")  # REQ-JSN-006
        self.at += 1
        return str(json.loads(self.text[start : self.at]))

    def value(self, depth: int = 0, any_number: bool = False) -> Any:
        self.skip()
        self.values += 1
        need(self.values <= 2**20, "json_size")  # REQ-JSN-007
        first = self.text[self.at : self.at + 1]
        if first == '"':
            return self.string()
        if first in ("{", "["):
            need(depth < 16, "json_depth")  # REQ-JSN-003
            self.at += 1
            keys: list[str] = []
            values: list[Any] = []
            while not self.take("}" if first == "{" else "]"):
                need(not values or self.take(","), "header_json")
                if first == "{":
                    self.skip()
                    keys.append(self.string())
                    need(self.take(":"), "header_json")
                values.append(self.value(depth + 1, any_number or (depth == 0 and keys[-1:] == [self.free])))
            need(len(set(keys)) == len(keys), "duplicate_key")  # REQ-JSN-002
            return dict(zip(keys, values, strict=True)) if first == "{" else values
        number = self.skip(NUMBER)
        word = number or self.skip(WORD)
        need(word, "header_json")
        whole = number.isdigit() and len(number) < 20 and int(number) < 2**63
        need(whole or any_number or not number, "json_number")  # REQ-JSN-004
        return int(number) if whole else {"true": True, "false": False}.get(word)


def parse(text: str, free: str | None = None) -> dict[str, Any]:
    """Return the object that a whole text holds."""
    parser = Parser(text, free)
    need(not text.startswith("\ufeff"), "header_encoding")
    parser.skip()
    need(text.startswith("{", parser.at), "header_json")
    value: dict[str, Any] = parser.value()
    parser.skip()
    need(parser.at == len(text), "header_json")
    return value


def is_int(value: object) -> bool:
    return type(value) is int


def ints(value: object, count: int | None = None) -> bool:
    return isinstance(value, list) and all(map(is_int, value)) and count in (None, len(value))


# ---- §2 and §3: container and metadata -------------------------------------------------------------------------------


class Tensor(NamedTuple):
    dtype: str
    shape: list[int]
    data: memoryview


def tensor(entry: Any, data: memoryview) -> tuple[Tensor, tuple[int, int]]:
    """Check one entry of the header (§2.3.1 to §2.3.3)."""
    need(isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}, "header_schema")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    need(isinstance(dtype, str) and ints(shape) and ints(offsets, 2), "header_schema")
    begin, end = offsets
    need(len(shape) <= 8, "shape_rank")
    need(dtype in SIZES, "unknown_dtype")
    need(begin <= end, "offset_order")
    need(math.prod(shape) < 2**63, "shape_overflow")
    need(end - begin == math.prod(shape) * SIZES[dtype], "tensor_size")
    need(end <= len(data), "truncated")
    need(begin % SIZES[dtype] == 0, "misaligned")
    return Tensor(dtype, shape, data[begin:end]), (begin, end)


def check_role(part: Tensor, dtype: str, shape: list[int] | None) -> None:
    need(part.dtype == dtype, "role_dtype")
    need(part.shape == shape or (shape is None and len(part.shape) == 1), "role_shape")


def check_roles(group: dict[str, Any], parts: dict[str, Tensor]) -> None:
    """§6.2: dtypes and shapes of the role tensors."""
    experts, rows, _ = group["shape"]
    check_role(parts["codes"], "U8", None)
    check_role(parts["code_offsets"], "U64", [experts + 1])
    lengths = parts["row_lengths"].dtype
    check_role(parts["row_lengths"], lengths if lengths in ("U8", "U16") else "U32", [experts, rows])
    check_role(parts["levels"], group["dtype"], [experts, rows, 2])
    check_role(parts["dictionary_index"], "U8", [experts])
    check_role(parts["checksums"], "U32", [experts])


def check_keys(value: Any, types: dict[str, type]) -> None:
    """All these keys with these types, and no others but those that begin with x- (REQ-MET-008 to REQ-MET-010)."""
    need(isinstance(value, dict) and all(type(value.get(key)) is types[key] for key in types), "metadata_schema")
    need(all(key in types or key.startswith("x-") for key in value), "metadata_schema")


def is_reserved(name: str) -> bool:
    return name.startswith(RESERVED) or name == "__metadata__"


def is_crc(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{8}", value) is not None


def check_group(group: dict[str, Any], before: bytes) -> bytes:
    """Check one entry of `groups`, which follows the group of the name `before`, and return its own name (§6.1)."""
    stacked = isinstance(group, dict) and group.get("layout") == "stacked"
    check_keys(group, GROUP | ({"expert_ranges": list} if stacked else {}))
    need(0 < len(group["name"].encode()) <= 4096 and group["layout"] in ("stacked", "fused", "matrix"), "metadata_schema")
    need(group["dtype"] in EXPONENTS and group["code_bits"] in (8, 12, 16), "metadata_schema")
    need(group["row_length_base"] < 2**32 and ints(group["shape"], 3), "metadata_schema")
    need(len(group["source"].encode()) <= 4096, "metadata_schema")
    need(not stacked or group["source"].count("{}") == 1, "metadata_schema")
    name: bytes = group["name"].encode()
    need(before < name, "metadata_schema")  # REQ-GRP-002
    need(group["layout"] != "matrix" or group["shape"][0] == 1, "metadata_schema")  # REQ-GRP-003
    if stacked:  # REQ-GRP-004
        ranges = group["expert_ranges"]
        need(all(ints(pair, 2) and pair[0] < pair[1] <= 2**32 for pair in ranges), "metadata_schema")
        need(all(a[1] < b[0] for a, b in itertools.pairwise(ranges)), "metadata_schema")
        need(sum(b - a for a, b in ranges) == group["shape"][0], "metadata_schema")
    need(max(group["shape"]) < 2**31 and math.prod(group["shape"]) < 2**62, "shape_overflow")  # REQ-GRP-006
    need(not is_reserved(group["name"]) and not is_reserved(group["source"]), "reserved_name")  # REQ-MET-013
    return name


def check_metadata(text: str) -> dict[str, Any]:
    """§3.2 to §3.5."""
    metadata = parse(text)
    version = metadata.get("format_version")
    need(isinstance(version, str) and re.fullmatch(r"(0|[1-9][0-9]{0,3})\.(0|[1-9][0-9]{0,3})", version), "metadata_schema")
    need(str(version).startswith("1."), "unsupported_version")
    for key in ("required_features", "optional_features"):
        features = metadata.get(key)
        need(isinstance(features, list) and all(isinstance(f, str) for f in features), "metadata_schema")
        need(features == sorted(set(features or [])), "metadata_schema")
        need(key != "required_features" or not features, "unsupported_feature")
        if key == "required_features":
            need(text == json.dumps(metadata, sort_keys=True, separators=(",", ":"), ensure_ascii=True), "metadata_canonical")
    lists = {"required_features": list, "optional_features": list, "dictionaries": list, "groups": list}
    check_keys(metadata, lists | {"format_version": str, "passthrough": dict})
    need(len(metadata["dictionaries"]) <= 256, "metadata_schema")
    for entry in metadata["dictionaries"]:
        check_keys(entry, ENTRY)
        need(entry["kind"] in ("aivf", "table") and entry["code_bits"] in (8, 12, 16), "metadata_schema")
        need(is_crc(entry["crc32"]), "metadata_schema")
        most = 2 ** entry["code_bits"]
        need(entry["threshold"] <= most and (entry["kind"] == "aivf" or entry["threshold"] == most), "dictionary_threshold")
    name = b""
    for group in metadata["groups"]:
        name = check_group(group, name)
    for key, crc in metadata["passthrough"].items():
        need(is_crc(crc), "metadata_schema")
        need(not is_reserved(key), "reserved_name")  # REQ-MET-013
    return metadata


class File:
    """A file whose header and metadata are right."""

    def __init__(self, content: bytes) -> None:
        need(len(content) >= 8, "truncated")
        n = int.from_bytes(content[:8], "little")
        need(2 <= n <= 100_000_000 and n % 8 == 0, "header_size")
        need(len(content) >= 8 + n, "truncated")
        try:
            text = content[8 : 8 + n].decode()
        except UnicodeDecodeError:
            raise RejectedError("header_encoding") from None
        need(not text.startswith("\ufeff"), "header_encoding")
        need(text.startswith("{"), "header_json")
        parser, data = Parser(text), memoryview(content)[8 + n :]
        header = parser.value()
        parser.skip(re.compile(" {0,63}"))
        need(parser.at == len(text), "header_json")

        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        need(len(entries) <= 65_536, "tensor_count")
        checked = {name: tensor(entry, data) for name, entry in entries.items()}
        self.tensors = {name: part for name, (part, _) in checked.items()}
        at = 0
        for begin, end in sorted(place for _, place in checked.values()):
            need(begin >= at, "tensor_overlap")
            need(begin <= at, "tensor_hole")
            at = end
        need(at == len(data), "trailing_data")

        need("__metadata__" in header, "not_packed")
        strings = header["__metadata__"]
        need(isinstance(strings, dict) and all(isinstance(value, str) for value in strings.values()), "header_schema")
        need("qmoecodec" in strings, "not_packed")
        need("qmoecodec.header_crc32" in self.tensors, "missing_tensor")
        checksum = self.tensors["qmoecodec.header_crc32"]
        check_role(checksum, "U32", [1])
        need(zlib.crc32(content[: 8 + n]) == int.from_bytes(checksum.data, "little"), "checksum")
        metadata = check_metadata(strings["qmoecodec"])
        self.canonical = True
        self.dictionaries, self.groups = metadata["dictionaries"], metadata["groups"]
        self.passthrough: dict[str, str] = metadata["passthrough"]

        named = ["qmoecodec.header_crc32", *(f"qmoecodec.dictionary.{i}" for i in range(len(self.dictionaries)))]
        named += [f"{group['name']}_{role}" for group in self.groups for role in ROLES]
        twice = self.tensors.keys() & self.passthrough.keys() & set(named)
        need(self.tensors.keys() <= {*named, *self.passthrough} and not twice, "orphan_tensor")
        need(self.tensors.keys() >= {*named, *self.passthrough}, "missing_tensor")
        for i in range(len(self.dictionaries)):
            check_role(self.tensors[f"qmoecodec.dictionary.{i}"], "U8", None)  # REQ-DIC-001
        for group in self.groups:
            check_roles(group, self.roles(group))
        need(unique(self.sources()), "source_conflict")  # the number of experts is bounded by now

    def roles(self, group: dict[str, Any]) -> dict[str, Tensor]:
        return {role: self.tensors[f"{group['name']}_{role}"] for role in ROLES}

    def sources(self) -> Iterator[str]:
        """The names of the restored tensors (§6.1)."""
        return itertools.chain(self.passthrough, *map(source_names, self.groups))


def source_names(group: dict[str, Any]) -> Iterator[str]:
    if group["layout"] != "stacked":
        return iter([group["source"]])
    return (group["source"].replace("{}", str(i)) for first, end in group["expert_ranges"] for i in range(first, end))


def unique(names: Iterator[str]) -> bool:
    """Whether no name stands twice. Digests are kept: the names of experts may take far more than the file."""
    seen: set[bytes] = set()
    for count, name in enumerate(names, 1):
        seen.add(hashlib.sha256(name.encode()).digest())
        if len(seen) < count:
            return False
    return True


# ---- §4: dictionaries ------------------------------------------------------------------------------------------------


class Dictionary:
    """`phrases[state]` maps each used codeword to its phrase."""

    def __init__(self, entry: dict[str, Any], part: Tensor) -> None:
        need(f"{zlib.crc32(part.data):08x}" == entry["crc32"], "checksum")
        self.bits, self.threshold, self.table = entry["code_bits"], entry["threshold"], entry["kind"] == "table"
        self.phrases = [self.read_table(part.data)] if self.table else self.read_trees(part.data)
        self.longest = max((len(phrase) for tree in self.phrases for phrase in tree.values()), default=0)
        self.known = {phrase: code for code, phrase in self.phrases[0].items()} if self.table else {}

    def read_trees(self, data: memoryview) -> list[dict[int, bytes]]:  # §4.2
        symbols = [byte >> shift & 3 for byte in data for shift in (0, 2, 4, 6)]
        at, trees = 0, []
        for roots in ((0, 1, 2), (1, 2)):
            leaves: list[bytes] = []
            incomplete: list[bytes] = []
            stack = [bytes([digit]) for digit in reversed(roots)]
            while stack:
                node = stack.pop()
                need(at < len(symbols), "dictionary_size")
                need(symbols[at] != 3, "dictionary_symbol")
                if symbols[at] < 2:
                    (leaves, incomplete)[symbols[at]].append(node)
                need(len(leaves) <= self.threshold, "dictionary_threshold")  # REQ-DIC-008
                need(len(incomplete) <= 2**self.bits - self.threshold, "dictionary_threshold")
                need(symbols[at] == 0 or len(node) < 255, "dictionary_phrase_length")
                stack += [node + bytes([child]) for child in reversed(range((0, 1, 3)[symbols[at]]))]
                at += 1
            trees.append((leaves, incomplete))
        need(len(data) == -(-at // 4), "dictionary_size")
        need(not any(symbols[at:]), "dictionary_padding")
        return [dict(enumerate(leaves)) | dict(enumerate(incomplete, self.threshold)) for leaves, incomplete in trees]

    def read_table(self, data: memoryview) -> dict[int, bytes]:  # §4.3
        lengths = bytes(data[: 2**self.bits])
        need(len(lengths) == 2**self.bits and len(data) - len(lengths) == -(-sum(lengths) // 4), "dictionary_size")
        digits = bytes(byte >> shift & 3 for byte in data[len(lengths) :] for shift in (0, 2, 4, 6))
        need(3 not in digits[: sum(lengths)], "dictionary_symbol")
        need(not any(digits[sum(lengths) :]), "dictionary_padding")
        ends = list(itertools.accumulate(lengths))
        phrases = {code: digits[end - n : end] for code, (n, end) in enumerate(zip(lengths, ends, strict=True)) if n}
        need(len(set(phrases.values())) == len(phrases), "dictionary_duplicate")
        return phrases

    # ---- §5: rows ----------------------------------------------------------------------------------------------------

    def decode_row(self, codes: list[int], cols: int) -> bytes:
        row, state = b"", 0
        for code in codes:
            need(len(row) < cols, "row_overrun")
            phrase = self.phrases[state].get(code, b"")
            need(phrase, "unused_codeword")
            row += phrase
            state = int(code >= self.threshold)
        need(len(row) >= cols, "row_underrun")
        need(not any(row[cols:]), "overrun_nonzero")
        return row[:cols]

    def encode_row(self, row: bytes) -> list[int]:
        """The canonical encoding (§5.1) of a row that the dictionary can express."""
        codes: list[int] = []
        at, ahead = 0, row + bytes(255)
        known = [self.known] if self.table else [{phrase: code for code, phrase in tree.items()} for tree in self.phrases]
        while at < len(row):
            tree = known[int(bool(codes) and codes[-1] >= self.threshold)]
            fitting = [n for n in range(1, self.longest + 1) if ahead[at : at + n] in tree]
            reaching = [n for n in fitting if at + n >= len(row)]
            n = min(reaching) if reaching else max(fitting, default=0)
            if n == 0:
                break  # no phrase fits
            codes.append(tree[ahead[at : at + n]])
            at += n
        return codes


def unpack_codes(data: memoryview, bits: int, count: int) -> list[int]:
    """Codewords of one row (§5.3)."""
    value = int.from_bytes(data, "little")
    return [value >> bits * k & (1 << bits) - 1 for k in range(count)]


# ---- §6: groups ------------------------------------------------------------------------------------------------------


def check_levels(low: bytes, high: bytes, dtype: str) -> None:
    """§6.3; numbers are compared by their bits, sign and magnitude."""
    values = []
    for level in (low, high):
        bits, sign = int.from_bytes(level, "little"), 1 << 8 * len(level) - 1
        need(bits & EXPONENTS[dtype] != EXPONENTS[dtype] and bits != sign, "level_value")  # REQ-LEV-001
        values.append(sign - bits if bits & sign else bits)
    need(values[0] < values[1] or values == [0, 0], "level_value")  # REQ-LEV-002


Parts = dict[str, Tensor]


def decode_group(group: dict[str, Any], parts: Parts, bank: list[Dictionary], deep: bool) -> tuple[list[bytes], bool]:
    """Return the bytes of each expert, and whether they are encoded as §5.1 and §6.2 say (if deep)."""
    (experts, rows, cols), dtype, size = group["shape"], group["dtype"], SIZES[group["dtype"]]
    codes, levels, index = parts["codes"].data, parts["levels"].data, parts["dictionary_index"].data
    offsets = struct.unpack(f"<{experts + 1}Q", parts["code_offsets"].data)
    checksums = struct.unpack(f"<{experts}I", parts["checksums"].data)
    width = SIZES[parts["row_lengths"].dtype]
    stored = [int.from_bytes(parts["row_lengths"].data[i : i + width], "little") for i in range(0, experts * rows * width, width)]
    need(offsets[0] == 0 and list(offsets) == sorted(offsets) and offsets[-1] == len(codes), "code_offsets")  # REQ-GRP-009

    restored, canonical = [], True
    for e in range(experts):
        need(index[e] < len(bank) and bank[index[e]].bits == group["code_bits"], "dictionary_index")
        dictionary = bank[index[e]]
        own_levels = levels[e * rows * 2 * size : (e + 1) * rows * 2 * size]
        own = [codes[offsets[e] : offsets[e + 1]], parts["row_lengths"].data[e * rows * width : (e + 1) * rows * width]]
        own += [own_levels, index[e : e + 1], parts["code_offsets"].data[8 * e : 8 * e + 16]]
        need(zlib.crc32(b"".join(own)) == checksums[e], "checksum")  # REQ-CRC-001
        counts = [n + group["row_length_base"] for n in stored[e * rows : (e + 1) * rows]]
        ends = list(itertools.accumulate((-(-n * dictionary.bits // 8) for n in counts), initial=offsets[e]))
        need(ends[-1] == offsets[e + 1], "row_lengths")  # REQ-GRP-010
        need(rows * cols <= dictionary.longest * sum(counts), "row_underrun")  # REQ-GRP-014
        each = [bytes(own_levels[i : i + size]) for i in range(0, rows * 2 * size, size)]
        pairs = list(zip(each[::2], each[1::2], strict=True))
        for low, high in pairs:
            check_levels(low, high, dtype)
        decoded = []
        for count, (begin, end) in zip(counts, itertools.pairwise(ends), strict=True):
            row_codes = unpack_codes(codes[begin:end], dictionary.bits, count)
            row = dictionary.decode_row(row_codes, cols)
            need(int.from_bytes(codes[begin:end], "little") >> count * dictionary.bits == 0, "row_padding")  # REQ-ROW-006
            canonical = canonical and (not deep or dictionary.encode_row(row) == row_codes)  # REQ-ROW-001
            decoded.append(row)
        for row, pair in zip(decoded, pairs, strict=True):
            need(not any(digit in row and not any(pair[digit - 1]) for digit in (1, 2)), "level_zero")  # REQ-LEV-003
        restored.append(b"".join((bytes(size), *pair)[d] for row, pair in zip(decoded, pairs, strict=True) for d in row))
    least, most = min(stored, default=group["row_length_base"]), max(stored, default=0)
    canonical = canonical and least == 0 and width == (1 if most < 2**8 else 2 if most < 2**16 else 4)  # REQ-GRP-013
    return restored, canonical


Restored = dict[str, tuple[str, list[int], bytes]]


def decode_file(file: File, deep: bool) -> Restored:
    """Return dtype, shape and bytes of every source tensor."""
    tensors, restored = file.tensors, {}
    dictionaries = [Dictionary(entry, tensors[f"qmoecodec.dictionary.{i}"]) for i, entry in enumerate(file.dictionaries)]
    for group in file.groups:
        experts, canonical = decode_group(group, file.roles(group), dictionaries, deep)
        file.canonical = file.canonical and canonical
        if group["layout"] == "stacked":
            for name, expert in zip(source_names(group), experts, strict=True):
                restored[name] = (group["dtype"], group["shape"][1:], expert)
        else:
            restored[group["source"]] = (group["dtype"], group["shape"][group["layout"] == "matrix" :], b"".join(experts))
    for name, crc in file.passthrough.items():
        need(f"{zlib.crc32(tensors[name].data):08x}" == crc, "checksum")  # REQ-CRC-003
        restored[name] = (tensors[name].dtype, tensors[name].shape, bytes(tensors[name].data))
    return restored


def decode_files(files: list[File], deep: bool) -> Restored:
    """Decode files that belong together; only what is right otherwise is said to be not canonical."""
    restored = {name: tensor for file in files for name, tensor in decode_file(file, deep).items()}
    need(not deep or all(file.canonical for file in files), "not_canonical")
    return restored


# ---- §8: several files -----------------------------------------------------------------------------------------------


def member(directory: Path, name: str) -> Path:
    need(name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}, "shard_path")  # REQ-SHD-003
    path = directory / name
    need(len(os.fsencode(name)) < 256 and path.exists(), "shard_missing")  # REQ-SHD-004
    need(path.is_file() and directory.resolve() in path.resolve().parents, "shard_path")  # REQ-SHD-005, REQ-SHD-008
    return path


def decode_directory(directory: Path, deep: bool) -> Restored:
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return decode_files([File(member(directory, "model.safetensors").read_bytes())], deep)
    member(directory, index.name)
    need(index.stat().st_size <= 100_000_000, "shard_index")
    try:
        text = index.read_bytes().decode()
    except UnicodeDecodeError:
        raise RejectedError("header_encoding") from None
    need(not text.startswith("\ufeff"), "header_encoding")
    value = parse(text, free="metadata")
    need(isinstance(value.get("weight_map"), dict) and isinstance(value.get("metadata", {}), dict), "shard_index")
    weight_map: dict[str, Any] = value["weight_map"]  # REQ-SHD-001
    need(all(isinstance(name, str) for name in weight_map.values()), "shard_index")
    contents = {name: member(directory, name).read_bytes() for name in dict.fromkeys(weight_map.values())}
    files = {name: File(content) for name, content in contents.items()}
    there = {name: [tensor for tensor in file.tensors if not tensor.startswith(RESERVED)] for name, file in files.items()}
    need(unique(itertools.chain(*there.values())), "source_conflict")  # REQ-SHD-006
    need(unique(itertools.chain(*(file.sources() for file in files.values()))), "source_conflict")
    need(weight_map == {tensor: name for name in files for tensor in there[name]}, "shard_mismatch")  # REQ-SHD-002
    return decode_files(list(files.values()), deep)


def main(arguments: list[str]) -> int:
    deep = arguments[4:] == ["--deep"]
    if len(arguments) != 4 + deep or arguments[0] != "decode" or arguments[2] != "--out":
        print(__doc__, file=sys.stderr)
        return 2
    source, out = Path(arguments[1]), Path(arguments[3])
    try:
        restored = decode_directory(source, deep) if source.is_dir() else decode_files([File(source.read_bytes())], deep)
    except RejectedError as error:
        print(json.dumps({"error": str(error)}))
        return 1
    out.mkdir(exist_ok=True)
    listing = [{"name": n, "dtype": d, "shape": s, "file": f"{i}.bin"} for i, (n, (d, s, _)) in enumerate(restored.items())]
    for entry, (_, _, content) in zip(listing, restored.values(), strict=True):
        (out / str(entry["file"])).write_bytes(content)
    (out / "tensors.json").write_text(json.dumps(listing, indent=1))
    print(json.dumps({"accepted": len(restored)}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
