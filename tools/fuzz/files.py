"""Fuzz input for whole files: header, metadata text and data apart, so that a mutation need not fix lengths and checksums."""

from __future__ import annotations

import contextlib
import json
import struct
import zlib
from typing import Any

MARK = "@@"
RAW, REFRESH = 1, 2
CHECKSUM = "qmoecodec.header_crc32"
#: What may happen on the way through an input that describes no file.
NOT_A_FILE = (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError, struct.error)


def split(file: bytes) -> bytes:
    """Return the fuzz input that `join` makes the file of; the file itself where its header is no header."""
    raw = bytes([RAW]) + file
    n = int.from_bytes(file[:8], "little")
    if len(file) < 8 or n > len(file) - 8:
        return raw
    try:
        text = file[8 : 8 + n].decode()
        header = json.loads(text)
        metadata = header["__metadata__"]["qmoecodec"]
        spelled = json.dumps(metadata, ensure_ascii=False)
    except (ValueError, KeyError, TypeError, RecursionError):
        return raw
    if not isinstance(metadata, str) or spelled not in text or "\0" in text + metadata:
        return raw
    outer = text.replace(spelled, f'"{MARK}"').rstrip(" ")
    parts = [outer.encode(), metadata.encode(errors="surrogatepass"), file[8 + n :]]
    return bytes([REFRESH]) + b"\0".join(parts)


def join(data: bytes) -> bytes:
    """Return the file that a fuzz input stands for; with flag REFRESH its checksums are made to fit, where that is possible."""
    flags, data = data[:1] or b"\0", data[1:]
    if flags[0] & RAW:
        return data
    outer, _, rest = data.partition(b"\0")
    metadata, _, tensors = rest.partition(b"\0")
    if flags[0] & REFRESH:
        with contextlib.suppress(*NOT_A_FILE):
            metadata, tensors = refresh(json.loads(outer), json.loads(metadata), tensors, metadata)
    spelled = json.dumps(metadata.decode(errors="replace"), ensure_ascii=False).encode()
    header = outer.replace(f'"{MARK}"'.encode(), spelled)
    header += b" " * (-len(header) % 8)
    start = struct.pack("<Q", len(header)) + header
    if flags[0] & REFRESH:
        with contextlib.suppress(*NOT_A_FILE):
            begin, end = json.loads(outer)[CHECKSUM]["data_offsets"]
            if begin >= 0 and end == begin + 4 <= len(tensors):
                tensors = tensors[:begin] + struct.pack("<I", zlib.crc32(start)) + tensors[end:]
    return start + tensors


def refresh(header: Any, metadata: Any, tensors: bytes, text: bytes) -> tuple[bytes, bytes]:
    """Return metadata text and data with all checksums but the header's made to fit."""
    data = bytearray(tensors)

    def part(name: str) -> tuple[int, int]:
        begin, end = header[name]["data_offsets"]
        if not 0 <= begin <= end <= len(data):
            raise ValueError("no such bytes")
        return begin, end

    for group in metadata["groups"]:
        name, (experts, rows, _) = group["name"], group["shape"]
        place = {role: part(f"{name}_{role}")[0] for role in
                 ("codes", "code_offsets", "row_lengths", "levels", "dictionary_index", "checksums")}  # fmt: skip
        width = {"U8": 1, "U16": 2, "U32": 4}[header[f"{name}_row_lengths"]["dtype"]]
        size = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}[group["dtype"]]
        for e in range(min(experts, 1000)):
            at = place["code_offsets"] + 8 * e
            begin, end = struct.unpack("<QQ", data[at : at + 16])
            crc = zlib.crc32(data[place["codes"] + begin : place["codes"] + end])
            for role, n in (("row_lengths", rows * width), ("levels", 2 * rows * size), ("dictionary_index", 1)):
                crc = zlib.crc32(data[place[role] + n * e : place[role] + n * (e + 1)], crc)
            crc = zlib.crc32(data[at : at + 16], crc)
            there = place["checksums"] + 4 * e
            if there + 4 <= len(data):
                data[there : there + 4] = struct.pack("<I", crc)
    changed = text
    named = [(f"qmoecodec.dictionary.{i}", entry["crc32"]) for i, entry in enumerate(metadata["dictionaries"])]
    for name, old in [*named, *metadata["passthrough"].items()]:
        begin, end = part(name)
        if isinstance(old, str) and len(old) == 8:
            changed = changed.replace(f'"{old}"'.encode(), f'"{zlib.crc32(data[begin:end]):08x}"'.encode())
    return changed, bytes(data)
