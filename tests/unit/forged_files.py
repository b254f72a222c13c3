"""Packed files made by hand, codeword by codeword, for the tests of the container."""

import json
import pathlib
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from qmoecodec.container import verify
from qmoecodec.dictionary.serial import pack_two_bits
from qmoecodec.errors import FormatError

# The dictionary: 0 is a zero, 1 is -, 2 is +, 3 is two zeros, 4 is + and a zero; all others are unused.
ZERO, MINUS, PLUS, ZEROS, PLUS_ZERO, UNUSED = range(6)
DICTIONARY = bytes([1, 1, 1, 2, 2] + [0] * 251) + pack_two_bits(np.uint8([0, 1, 2, 0, 0, 2, 0]))
Tensors = dict[str, list[Any]]  # name -> [dtype, shape, bytes]
SIZES = {"U64": 8, "F32": 4, "U32": 4, "U16": 2}
Change = Callable[[Tensors, dict[str, Any]], None]
GOOD = [[[ZERO, MINUS, PLUS, ZERO], [ZEROS, ZEROS], [PLUS, ZEROS, MINUS]]] * 2


def forge(
    experts: Sequence[Sequence[Sequence[int]]] = GOOD, *, cols: int = 4, name: str = "g", levels: Any = (-1, 1), first: int = 0,
    change: Change | None = None, passthrough: str = "t", late: Change | None = None,
) -> bytes:  # fmt: skip
    """Return a packed file with one stacked group; `change` is made before the checksums, `late` after those of experts."""
    n, rows = len(experts), len(experts[0])
    codes = [b"".join(bytes(row) for row in expert) for expert in experts]
    lengths = np.uint8([[len(row) for row in expert] for expert in experts]).reshape(n, rows)
    base = int(lengths.min(initial=255)) if lengths.size else 0
    tensors: Tensors = {
        f"{name}_levels": ["F32", [n, rows, 2], np.broadcast_to(np.float32(levels), (n, rows, 2)).tobytes()],
        f"{name}_checksums": ["U32", [n], bytes(4 * n)],
        f"{name}_code_offsets": ["U64", [n + 1], np.cumsum([0, *map(len, codes)]).astype(np.uint64).tobytes()],
        f"{name}_codes": ["U8", [sum(map(len, codes))], b"".join(codes)],
        f"{name}_dictionary_index": ["U8", [n], bytes(n)],
        f"{name}_row_lengths": ["U8", [n, rows], (lengths - base).tobytes()],
        "qmoecodec.dictionary.0": ["U8", [len(DICTIONARY)], DICTIONARY],
        passthrough: ["U8", [3], b"abc"],
        "qmoecodec.header_crc32": ["U32", [1], bytes(4)],
    }
    text: dict[str, Any] = {
        "format_version": "1.0", "required_features": [], "optional_features": [],
        "dictionaries": [{"kind": "table", "code_bits": 8, "threshold": 256, "crc32": ""}],
        "groups": [{"name": name, "layout": "stacked", "source": f"{name}.{{}}.w", "shape": [n, rows, cols], "dtype": "F32",
                    "code_bits": 8, "row_length_base": base, "expert_ranges": [[first, first + n]] if n else []}],
        "passthrough": {passthrough: ""},
    }  # fmt: skip
    if change is not None:
        change(tensors, text)
    offsets = np.frombuffer(tensors[f"{name}_code_offsets"][2], np.uint64)
    sums = b""
    for e in range(text["groups"][0]["shape"][0]):
        parts = [tensors[f"{name}_codes"][2][int(offsets[e]) : int(offsets[e + 1])]]
        for role in ("row_lengths", "levels", "dictionary_index"):
            data = tensors[f"{name}_{role}"][2]
            parts.append(data[e * len(data) // n : (e + 1) * len(data) // n])
        sums += struct.pack("<I", zlib.crc32(b"".join([*parts, offsets[e : e + 2].tobytes()])))
    tensors[f"{name}_checksums"][2] = sums
    for i, entry in enumerate(text["dictionaries"]):
        entry["crc32"] = f"{zlib.crc32(tensors[f'qmoecodec.dictionary.{i}'][2]):08x}"
    for key in text["passthrough"]:
        text["passthrough"][key] = f"{zlib.crc32(tensors[key][2]):08x}"
    if late is not None:
        late(tensors, text)
    (own,) = tensors.pop("__metadata__", [{}])
    metadata = own | {"qmoecodec": json.dumps(text, sort_keys=True, separators=(",", ":"))}
    header: dict[str, Any] = {"__metadata__": metadata}
    body = b""
    for key in sorted(tensors, key=lambda key: -SIZES.get(tensors[key][0], 1)):
        dtype, shape, data = tensors[key]
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    return assemble(header, body)


def join(one: bytes, two: bytes) -> bytes:
    """Put two files with a group and the same dictionary into one."""
    both = []
    for data in (one, two):
        (n,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + n])
        text = json.loads(header.pop("__metadata__")["qmoecodec"])
        both.append((text, {key: (e, data[8 + n :][slice(*e["data_offsets"])]) for key, e in header.items()}))
    text, tensors = both[0][0], both[0][1] | both[1][1]
    text["groups"] += both[1][0]["groups"]
    text["passthrough"] |= both[1][0]["passthrough"]
    header = {"__metadata__": {"qmoecodec": json.dumps(text, sort_keys=True, separators=(",", ":"))}}
    body = b""
    for key, (entry, data) in sorted(tensors.items(), key=lambda item: -SIZES.get(item[1][0]["dtype"], 1)):
        header[key] = entry | {"data_offsets": [len(body), len(body) + len(data)]}
        body += data
    return assemble(header, body)


def assemble(header: dict[str, Any], body: bytes) -> bytes:
    """Put header and data together, with the header's checksum."""
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    head = struct.pack("<Q", len(head)) + head
    at = header["qmoecodec.header_crc32"]["data_offsets"][0]
    return head + body[:at] + struct.pack("<I", zlib.crc32(head)) + body[at + 4 :]


def found(path: pathlib.Path, *, deep: bool = False) -> list[tuple[str, dict[str, object]]]:
    return [(problem.reason, problem.where) for problem in verify(path, deep=deep).problems]


def error_of(touch: Callable[[], object]) -> FormatError:
    with pytest.raises(FormatError) as caught:
        touch()
    return caught.value


def put(name: str, data: bytes, at: int = 0) -> Change:
    def change(tensors: Tensors, text: dict[str, Any]) -> None:
        old = tensors[name][2]
        tensors[name][2] = old[:at] + data + old[at + len(data) :]

    return change


def set_text(key: str, value: object) -> Change:
    def change(tensors: Tensors, text: dict[str, Any]) -> None:
        text["groups"][0][key] = value

    return change


def directory(folder: pathlib.Path, **parts: bytes) -> pathlib.Path:
    """Write shards and the index that fits them."""
    folder.mkdir()
    weight_map: dict[str, str] = {}
    for name, data in parts.items():
        (folder / f"{name}.safetensors").write_bytes(data)
        (n,) = struct.unpack("<Q", data[:8])
        stored = json.loads(data[8 : 8 + n])
        for key in stored:
            if not key.startswith(("qmoecodec.", "__")):
                weight_map.setdefault(key, f"{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
