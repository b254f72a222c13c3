"""Write minimal.safetensors, and minimal.md, which explains each of its bytes. Standard library only: `python make_minimal.py`.

The file holds one ternary matrix, `w`, float32 [2, 8], and one passthrough tensor, `b`, uint8 [2].
"""

import json
import struct
import sys
import zlib
from pathlib import Path

# Dictionary (spec §4.2), T = 200. Tree 0 has the nodes 0 (internal), 00 (incomplete), 000, 0-, 0+, -, + (leaves);
# tree 1 has - and + (leaves). Symbols in preorder: 2 1 0 0 0 0 0, then 0 0.
DICTIONARY = [
    (
        b"\x06\x00\x00",
        (
            "node symbols, lowest bits first: 2 1 0 0, 0 0 0 0, 0 and three unused pairs of bits. "
            "Leaves of tree 0 in preorder: 0 = `000`, 1 = `0-`, 2 = `0+`, 3 = `-`, 4 = `+`; incomplete: 200 = `00`. "
            "Tree 1: 0 = `-`, 1 = `+`. All other codewords are unused"
        ),
    ),
]

# Row 0: 00|+ -> 200, then tree 1's 1; - -> 3; 000 -> 0; the last 0 is padded with a 0 to 00 -> 200.
# Row 1: 000 000, then 0+ -> 0 0 2.
CODES = [
    (
        b"\xc8\x01\x03\x00\xc8",
        (
            "row 0: `00` (so the next codeword is read from tree 1), `+`, `-`, `000`, `00`, "
            "of which one digit is overrun: 0 0 + - 0 0 0 0"
        ),
    ),
    (b"\x00\x00\x02", "row 1: `000`, `000`, `0+`: 0 0 0 0 0 0 0 +"),
]
OFFSETS = [(struct.pack("<2Q", 0, 8), "expert 0 takes bytes 0 to 8 of `w_codes`")]
LENGTHS = [(b"\x02\x00", "row 0 has 2 + 3 codewords, row 1 has 0 + 3: `row_length_base` is 3")]
LEVELS = [
    (struct.pack("<2f", -0.5, 0.25), "row 0: `-` is -0.5, `+` is 0.25"),
    (struct.pack("<2f", 0.0, 1.0), "row 1: `-` does not occur, so its level is +0; `+` is 1.0"),
]
INDEX = [(b"\x00", "expert 0 uses dictionary 0")]
BIAS = [(b"\x07\x09", "the passthrough tensor `b`, as it was")]


def crc32(*parts):
    return zlib.crc32(b"".join(parts))


def joined(pieces):
    return b"".join(data for data, _ in pieces)


def build():
    """Return [(bytes, explanation), ...] of the whole file."""
    checksum = crc32(joined(CODES), joined(LENGTHS), joined(LEVELS), joined(INDEX), joined(OFFSETS))
    metadata = {
        "format_version": "1.0",
        "required_features": [],
        "optional_features": [],
        "dictionaries": [
            {"kind": "aivf", "code_bits": 8, "threshold": 200, "crc32": f"{crc32(joined(DICTIONARY)):08x}"},
        ],
        "groups": [
            {"name": "w", "layout": "matrix", "source": "w", "shape": [1, 2, 8], "dtype": "F32", "code_bits": 8,
             "row_length_base": 3},
        ],
        "passthrough": {"b": f"{crc32(joined(BIAS)):08x}"},
    }  # fmt: skip
    tensors = [  # by falling size of dtype, then by name
        ("w_code_offsets", "U64", [2], OFFSETS),
        ("qmoecodec.header_crc32", "U32", [1], None),
        ("w_checksums", "U32", [1], [(struct.pack("<I", checksum), "crc32 of all that expert 0 owns (§7.1)")]),
        ("w_levels", "F32", [1, 2, 2], LEVELS),
        ("b", "U8", [2], BIAS),
        ("qmoecodec.dictionary.0", "U8", [3], DICTIONARY),
        ("w_codes", "U8", [8], CODES),
        ("w_dictionary_index", "U8", [1], INDEX),
        ("w_row_lengths", "U8", [1, 2], LENGTHS),
    ]
    header = {"__metadata__": {"qmoecodec": json.dumps(metadata, sort_keys=True, separators=(",", ":"))}}
    at = 0
    for name, dtype, shape, pieces in tensors:
        size = 4 if pieces is None else len(joined(pieces))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    whole = [(head[:8], f"n = {len(text)}: length of the header"), (head[8:], "the header")]
    for name, _, _, pieces in tensors:
        if pieces is None:
            pieces = [(struct.pack("<I", crc32(head)), f"crc32 of the first {len(head)} bytes")]
        whole += [(data, f"`{name}`: {text}") for data, text in pieces]
    return whole


def explain(whole):
    """Return minimal.md."""
    lines = [
        "# Every byte of minimal.safetensors",
        "",
        "Written by `make_minimal.py`. The file stands for two tensors: `w`, F32 `[2, 8]`, which is",
        "`[[0, 0, 0.25, -0.5, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1]]`, and `b`, U8 `[2]`, which is `[7, 9]`.",
        "",
        "| bytes | content | meaning |",
        "|---|---|---|",
    ]
    at = 0
    for data, meaning in whole:
        content = "see below" if len(data) > 40 else " ".join(f"{byte:02x}" for byte in data)
        lines.append(f"| {at}..{at + len(data) - 1} | {content} | {meaning} |")
        at += len(data)
    header = whole[1][0].decode()
    metadata = json.loads(json.loads(header)["__metadata__"]["qmoecodec"])
    spaces = len(header) - len(header.rstrip())
    lines += ["", f"The header, wrapped here for reading ({spaces} spaces at its end):", "", "```json"]
    lines += [json.dumps(json.loads(header), indent=1), "```", "", "The metadata text in it, likewise:", "", "```json"]
    lines += [json.dumps(metadata, indent=1), "```", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
    content = build()
    (folder / "minimal.safetensors").write_bytes(joined(content))
    (folder / "minimal.md").write_text(explain(content))
