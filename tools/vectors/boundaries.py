"""Vectors at the last value that is allowed and at the first that is not, and where sums of 32 or 64 bits would wrap."""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Iterator, Sequence
from typing import Any

from vectors import codebook, valid
from vectors.codebook import Codebook
from vectors.draft import HEADER_CRC, SIZES, Draft, Matrix, Tensor
from vectors.faults import (
    BASES,
    Case,
    Fault,
    added,
    bank,
    broken,
    dictionary,
    entry,
    keep,
    many,
    meta,
    meta_text,
    put,
    recode,
    removed,
    replaced,
    setting,
    text,
    whole,
    word,
)
from vectors.parts import (
    FLOATS,
    INDEX,
    PLAIN,
    ROWS,
    SHARDS,
    Vector,
    digits,
    group_of,
    hand,
    index_text,
    level,
    negative,
    of_rows,
    plain,
    two_shards,
    weight_map_of,
)

MOST_VALUES = 2**20
MOST_PRODUCT = [7, 7, 73, 127, 337, 92_737, 649_657]  # 2^63 - 1
WRAPS = {8: 2**29, 12: 2**30, 16: 2**28}  # so many codewords take a multiple of 2^32 bits
MOST_WEIGHTS = [3, 715_827_883, 2**31 - 1]  # 2^62 - 1


def n_values(value: Any) -> int:
    """Count as REQ-JSN-007 does."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(n_values, parts))


def of(base: Vector, cases: Sequence[Case], kind: str = "invalid", **flags: Any) -> Iterator[Vector]:
    """Break any valid vector, as `broken` does the base files."""
    for name, reason, reqs, fault in cases:
        assert base.draft is not None
        draft = base.draft.copy()
        fault(draft)
        yield Vector(
            f"{kind}/{name}",
            name.replace("-", " "),
            [f"REQ-{req}" for req in reqs.split()],
            {"": draft.render()},
            base.tensors if kind == "noncanonical" else None,
            base=base.id,
            before={"": draft.render(refresh=False)},
            **({"deep": reason} if kind == "noncanonical" else {"error": reason}),
            **flags,
        )


def named(vectors: Iterator[Vector], name: str) -> Vector:
    return next(vector for vector in vectors if vector.id == f"valid/{name}")


# ---- §2 --------------------------------------------------------------------------------------------------------------


def json_text() -> Iterator[Vector]:
    def full(header: str) -> str:  # `invalid/json-size` is what lies beyond
        zeros = MOST_VALUES - n_values(json.loads(header)) - 1
        return f'{header[:-1]},"a":[{",".join(["0"] * zeros)}]}}'

    def extra(value: str) -> Fault:
        return setting(header_text=lambda header: f'{header[:-1]},"a":{value}}}')

    def encoded(data: bytes) -> Fault:
        return setting(header_bytes=lambda header: header.replace(b"w_codes", data, 1))

    shape = '"shape":[1,5]'
    yield from broken(
        "8",
        [
            ("header-smallest", "not_packed", "CON-002 MET-001", whole(lambda file: struct.pack("<Q", 8) + b"{}      ")),
            ("header-overlong-of-three", "header_encoding", "CON-004", encoded(b"w_\xe0\x9f\xbfes")),
            ("header-overlong-of-four", "header_encoding", "CON-004", encoded(b"w_\xf0\x8f\xbf\xbfs")),
            ("header-last-surrogate-bytes", "header_encoding", "CON-004", encoded(b"w_\xed\xbf\xbfes")),
            ("header-lone-continuation", "header_encoding", "CON-004", encoded(b"w_\x80odes")),
            ("header-continuation-missing", "header_encoding", "CON-004", encoded(b"w_\xe4\xb8des")),
            ("header-byte-f5", "header_encoding", "CON-004", encoded(b"w_\xf5\x80\x80\x80s")),
            ("header-byte-ff", "header_encoding", "CON-004", encoded(b"w_\xffodes")),
            # Nothing may stand there, so these are wrong for another reason than what lies beyond the limit.
            ("json-depth-16", "header_schema", "JSN-003 TEN-001", extra("[" * 15 + "]" * 15)),
            ("json-depth-16-objects", "header_schema", "JSN-003 TEN-001", extra('{"a":' * 14 + "{}" + "}" * 14)),
            ("json-2-63-less-1", "shape_overflow", "JSN-004 TEN-007", text(shape, f'"shape":[{2**63 - 1},5]')),
            ("json-19-digits", "json_number", "JSN-004", text(shape, f'"shape":[{"9" * 19},5]')),
            ("json-first-low-surrogate", "header_encoding", "JSN-006", text("w_codes", "w_\\udc00")),
            ("json-last-low-surrogate", "header_encoding", "JSN-006", text("w_codes", "w_\\udfff")),
            ("json-first-surrogate-no-low", "header_encoding", "JSN-006", text("w_codes", "w_\\ud800\\ue000")),
            ("json-last-high-surrogate-twice", "header_encoding", "JSN-006", text("w_codes", "w_\\udbff\\udbff")),
        ],
    )
    for vector in broken(
        "8",
        [
            ("json-values-2-20", "header_schema", "JSN-007 TEN-001", setting(header_text=full)),
            ("text-values-2-20-and-1", "json_size", "JSN-007", full_metadata(1)),
        ],
    ):
        vector.gzip, vector.seconds = True, 30
        yield vector
    groups = [group_of("w", "matrix", "F32", 8, [of_rows(ROWS)])]
    yield plain(
        "valid/text-values-2-20", "a metadata text of 2^20 values", ["REQ-JSN-007", "REQ-MET-010"], groups, [hand(8)], PLAIN,
        full_metadata(0), gzip=True, seconds=30,
    )  # fmt: skip
    edges = {"\x80\u07ff\u0800\ud7ff\ue000\uffff\U00010000\U0010ffff": PLAIN["bias"], " ~": PLAIN["scale"]}
    yield plain(
        "valid/name-edges", "the first and the last character of each length of UTF-8, and those next to surrogates",
        ["REQ-CON-004", "REQ-JSN-006", "REQ-MET-003"], groups, [hand(8)], edges,
    )  # fmt: skip

    def escaped(draft: Draft) -> None:
        draft.header_text = lambda header: json.dumps(json.loads(header), separators=(",", ":"))

    yield plain("valid/name-edges-escaped", "the same, escaped in the header", ["REQ-JSN-006"], groups, [hand(8)], edges, escaped)


def full_metadata(more: int) -> Fault:
    """Fill the metadata text up to 2^20 values and some."""

    def fault(draft: Draft) -> None:
        draft.metadata["x-many"] = [0] * (MOST_VALUES + more - n_values(draft.metadata) - 1)

    return fault


def tensors() -> Iterator[Vector]:
    header = BASES["8"].render()
    entries = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    del entries["__metadata__"]
    inner = entries["bias"]["data_offsets"][1]  # all after it are U8
    end = max(value["data_offsets"][1] for value in entries.values())
    assert inner % 8

    def empty(dtype: str, at: int) -> Fault:
        value = json.dumps({"dtype": dtype, "shape": [0], "data_offsets": [at, at]})
        return setting(header_text=lambda header: f'{header[:-1]},"a":{value}}}')

    def moved(header: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value
            if name == "__metadata__" or value["data_offsets"][0] < inner
            else value | {"data_offsets": [at + 1 for at in value["data_offsets"]]}
            for name, value in header.items()
        }

    yield from broken(
        "8",
        [
            ("tensor-product-2-63-less-1", "tensor_size", "TEN-007 TEN-006", entry("bias", shape=[2**63 - 1])),
            ("tensor-product-2-63-less-1-of-seven", "tensor_size", "TEN-007 TEN-006", entry("bias", shape=MOST_PRODUCT)),
            ("tensor-product-2-63-of-eight", "shape_overflow", "TEN-007", entry("bias", shape=[2**7, *[2**8] * 7])),
            ("tensor-product-2-63-less-1-wide", "tensor_size", "TEN-007 GEN-001", entry("w_code_offsets", shape=[2**63 - 1])),
            ("tensor-bytes-wrap-wide", "tensor_size", "TEN-006 GEN-001", entry("w_code_offsets", shape=[2**61 + 2])),
            ("tensor-begin-after-end-by-one", "offset_order", "TEN-005",
             entry("bias", shape=[0], data_offsets=[inner + 1, inner])),
            ("tensor-empty-beyond-data", "truncated", "TEN-008", empty("U8", end + 1)),
            ("tensor-empty-misaligned", "misaligned", "TEN-009", empty("U64", inner)),
            ("tensor-hole-by-one", "tensor_hole", "TEN-011",
             setting(header=moved, data=lambda data: data[:inner] + b"\0" + data[inner:])),
            ("checksum-passthrough-empty", "checksum", "CRC-003",
             keep("passthrough", many(added("a", Tensor("U8", [0], b""), passthrough=True),
                                      meta("passthrough/a", "00000001")))),
        ],
    )  # fmt: skip
    places = {
        "a": Tensor("U8", [0], b""),
        "b": Tensor("F64", [1], struct.pack("<d", 1.5)),
        "c": Tensor("U64", [0], b""),
        "d": Tensor("U16", [2], b"\1\2\3\4"),
        "e": Tensor("C64", [2**63 - 1, 2**63 - 1, 0], b""),
    }
    yield plain(
        "valid/tensors-empty-places", "empty tensors at the beginning, between others, and at the end",
        ["REQ-TEN-007", "REQ-TEN-009", "REQ-TEN-010"], passthrough=places,
        change=lambda draft: setattr(draft, "order", ["a", "b", "c", HEADER_CRC, "d", "e"]),
    )  # fmt: skip


# ---- §3 and §4 -------------------------------------------------------------------------------------------------------


def metadata() -> Iterator[Vector]:
    characters = {"space": " ", "tilde": "~", "quote": '"', "backslash": "\\", "backspace": "\b", "tab": "\t",
                  "form-feed": "\f", "return": "\r"}  # fmt: skip
    one = BASES["8"].metadata["dictionaries"][0]
    crc = "dictionaries/0/crc32"
    cases: list[Case] = [
        *[
            (f"text-escaped-{name}", "metadata_canonical", "MET-003",
             many(meta("x-a", character), meta_text(json.dumps({"x-a": character}, separators=(",", ":"))[1:-1],
                                                    f'"x-a":"\\u{ord(character):04x}"')))
            for name, character in characters.items()
        ],
        ("text-2-63", "json_number", "JSN-004", meta("groups/0/row_length_base", 2**63)),
        ("version-major-five-digits", "metadata_schema", "MET-004", meta("format_version", "10000.0")),
        ("dictionaries-257", "metadata_schema", "MET-008", meta("dictionaries", [one] * 257)),
        ("passthrough-nine-digits", "metadata_schema", "MET-008", keep("passthrough", meta("passthrough/bias", "abcdef012"))),
        ("dictionary-crc-seven-digits", "metadata_schema", "MET-008", keep("dictionaries", meta(crc, "abcdef0"))),
        ("dictionary-crc-nine-digits", "metadata_schema", "MET-008", keep("dictionaries", meta(crc, "abcdef012"))),
        ("dictionary-crc-upper-case", "metadata_schema", "MET-008", keep("dictionaries", meta(crc, "ABCDEF01"))),
        ("reserved-prefix-alone", "reserved_name", "MET-013", added("qmoecodec.", PLAIN["bias"], passthrough=True)),
    ]  # fmt: skip
    yield from broken("8", cases)
    every = "".join(map(chr, range(0x80))) + "\x80\xff\u2028\ud7ff\ue000\uffff\U00010000\U0010ffff"
    groups = [group_of("w", "matrix", "F32", 8, [of_rows(ROWS)])]
    yield plain(
        "valid/x-characters", "every character of ASCII in the metadata text", ["REQ-MET-003"], groups, [hand(8)], PLAIN,
        lambda draft: draft.metadata.update({"x-a": every, f"x-{every}": 0}),
    )  # fmt: skip


def dictionaries() -> Iterator[Vector]:
    name, threshold = "qmoecodec.dictionary.0", "dictionaries/0/threshold"
    deep_1 = codebook.pack_pairs([0, 0, 0, *[1] * 255, 0, 0])
    incomplete_1 = codebook.pack_pairs([1, 0, 0, 0, 1, 1, 0, 0])
    yield from broken(
        "8",
        [
            ("dictionary-without-dimensions", "role_shape", "DIC-001", replaced(name, "U8", [], b"\0")),
            ("dictionary-tree-1-incomplete", "dictionary_threshold", "DIC-008", dictionary(incomplete_1, 255)),
        ],
    )
    yield from broken(
        "12",
        [
            ("dictionary-threshold-4097", "dictionary_threshold", "DIC-003", meta(threshold, 4097)),
            ("dictionary-depth-256-tree-1", "dictionary_phrase_length", "DIC-007", dictionary(deep_1, 2048)),
        ],
    )
    yield from broken("16", [("dictionary-threshold-65537", "dictionary_threshold", "DIC-003", meta(threshold, 65_537))])
    ends = codebook.table(8, {0: b"\0", 1: b"\1", 2: b"\2", 255: b"\0"})
    yield from broken("table", [("table-duplicate-ends", "dictionary_duplicate", "DIC-013", bank(0, ends))])

    def one(identity: str, note: str, reqs: Sequence[str], book: Codebook, rows: Sequence[bytes]) -> Vector:
        groups = [group_of("w", "matrix", "F32", book.bits, [of_rows(rows)])]
        return plain(f"valid/dictionary-{identity}", note, reqs, groups, [book])

    yield one("tree-1-255", "a phrase of 255 digits in tree 1", ["REQ-DIC-007"],
              codebook.aivf(12, 2**12 - 254, (1, 0, 0, 0), (*[1] * 254, 0, 0)),
              [b"\0\1" + bytes(254), bytes(256), b"\0\2" * 128])  # fmt: skip
    yield one("comb-255", "internal nodes 254 deep, leaves 255 deep", ["REQ-DIC-007"],
              codebook.aivf(12, 600, (*[2] * 254, *[0] * (1 + 2 * 254), 0, 0), (0, 0)),
              [bytes(255), bytes(254) + b"\1", bytes(254) + b"\2", b"\1" * 255, bytes(253) + b"\2\2"])  # fmt: skip
    yield one("tree-1-leaves", "as many leaves in tree 1 as the threshold says, fewer in tree 0", ["REQ-DIC-008"],
              codebook.aivf(8, 4, (1, 0, 0, 0), (2, 0, 0, 0, 0)), [digits("0-00+0-+0--"), digits("00000000000")])  # fmt: skip
    yield one("tree-1-incomplete", "as many incomplete nodes in tree 1 as codewords are left, fewer in tree 0", ["REQ-DIC-008"],
              codebook.aivf(8, 254, (1, 0, 0, 0), (1, 1, 0, 0)), [digits("0-0+0-00+0-"), digits("00-000-0000")])  # fmt: skip
    for n in range(4):
        book = codebook.table(8, {0: b"\0", 1: b"\1", 2: b"\2", 255: bytes(5 + n)})
        yield one(f"table-padding-{-len(b''.join(book.phrases[0].values())) % 4}", f"a table of {8 + n} digits",
                  ["REQ-DIC-011", "REQ-DIC-012"], book, [bytes(9), digits("00+-00000")])  # fmt: skip
    yield plain(
        "valid/group-without-dictionary", "a group without experts, and an empty bank", ["REQ-GRP-011"],
        [group_of("w", "fused", "F32", 8, [], (0, 2, 3))],
    )  # fmt: skip


# ---- §5 and §6 -------------------------------------------------------------------------------------------------------


def of_length(difference: int) -> list[bytes]:
    """Return two rows whose numbers of codewords (single digits, 16 zeros) differ by so many."""
    for cols in itertools.count(difference):
        if cols - -(-cols // 16) == difference:
            return [b"\1" * cols, bytes(cols)]
    raise AssertionError


def lengths() -> Iterator[Vector]:
    book = codebook.table(8, {0: b"\0", 1: b"\1", 2: b"\2", 3: bytes(16)})
    exact = {}
    for dtype, difference in (("u8", 255), ("u16", 256), ("u16", 65_535), ("u32", 65_536)):
        vector = plain(
            f"valid/lengths-{dtype}-exactly-{difference}", f"row lengths that differ by {difference}", ["REQ-GRP-013"],
            [group_of("w", "matrix", "F16", 8, [of_rows(of_length(difference), "F16")])], [book], gzip=difference > 256,
        )  # fmt: skip
        assert vector.draft is not None and vector.draft.tensors["w_row_lengths"].dtype == dtype.upper()
        exact[difference] = vector
        yield vector

    def wider(draft: Draft) -> None:
        old = draft.tensors["w_row_lengths"]
        n, dtype = SIZES[old.dtype], {"U8": "U16", "U16": "U32"}[old.dtype]
        parts = [old.data[i : i + n] + bytes(n) for i in range(0, len(old.data), n)]
        draft.tensors["w_row_lengths"] = Tensor(dtype, old.shape, b"".join(parts))

    for difference in (255, 65_535):
        case = (f"row-lengths-wider-{difference}", "not_canonical", "GRP-013", wider)
        yield from of(exact[difference], [case], "noncanonical", gzip=difference > 256)
    most = meta("groups/0/row_length_base", 2**32 - 1)
    for name in ("fused-0-2-3", "fused-2-0-5"):
        base = named(valid.shapes(), f"shape-{name}")
        yield from of(base, [(f"row-length-base-largest-{name}", "not_canonical", "GRP-013", most)], "noncanonical")


def rows() -> Iterator[Vector]:
    def set_row(row: int, words: list[int], bits: int) -> Fault:
        return recode(lambda rows: rows.__setitem__(row, words), hand(bits))

    for bits in (8, 12, 16):
        top = 2 ** (bits - 1)  # the threshold, and the codeword of 00
        yield from broken(
            str(bits),
            [
                (f"row-underrun-by-one-{bits}", "row_underrun", "ROW-003", set_row(1, [0, 0, 0, top], bits)),
                (f"codeword-unused-last-of-leaves-{bits}", "unused_codeword", "ROW-002", word(0, 0, top - 1, hand(bits))),
                (f"row-length-bits-wrap-{bits}", "row_lengths", "GRP-010 GEN-001", longer(WRAPS[bits])),
            ],
        )
    for bits in (8, 12):
        base = named(valid.rows(), f"row-overrun-254-{bits}")
        for name, phrase in (("first", b"\2\1" + bytes(253)), ("last", b"\2" + bytes(253) + b"\1")):
            book = codebook.table(bits, {1: phrase, 2: b"\0"})
            yield from of(base, [(f"overrun-{name}-of-254-{bits}", "overrun_nonzero", "ROW-005", bank(0, book))])

    def wrapped(draft: Draft) -> None:  # length + base is the true number of codewords and 2^32
        group, tensor = draft.metadata["groups"][0], draft.tensors["w_row_lengths"]
        tensor.data = bytes(n + group["row_length_base"] + 1 for n in tensor.data)
        group["row_length_base"] = 2**32 - 1

    def largest(draft: Draft) -> None:
        draft.metadata["groups"][0]["row_length_base"] = 2**32 - 1
        draft.tensors["w_row_lengths"] = Tensor("U32", [1, 5], b"\xff" * 20)

    yield from broken(
        "8",
        [
            ("row-length-wraps", "row_lengths", "GRP-010 GEN-001", wrapped),
            ("row-length-largest", "row_lengths", "GRP-010 GEN-001", largest),
            ("columns-none", "row_overrun", "ROW-004", meta("groups/0/shape", [1, 5, 0])),
        ],
    )


def longer(more: int) -> Fault:
    def fault(draft: Draft) -> None:
        draft.metadata["groups"][0]["row_length_base"] += more

    return fault


def groups() -> Iterator[Vector]:
    shape, shape_1, ranges = "groups/0/shape", "groups/1/shape", "groups/0/expert_ranges"
    large = 2**31 - 1
    yield from broken(
        "8",
        [
            ("matrix-without-experts", "metadata_schema", "GRP-003", meta(shape, [0, 5, 12])),
            ("matrix-product-largest", "role_shape", "GRP-006 GRP-008", meta(shape, [1, large, large])),
            ("group-base-2-32-and-1", "metadata_schema", "GRP-001", meta("groups/0/row_length_base", 2**32 + 1)),
            ("group-base-2-63-less-1", "metadata_schema", "GRP-001", meta("groups/0/row_length_base", 2**63 - 1)),
            ("group-without-bank", "dictionary_index", "GRP-011",
             many(removed("qmoecodec.dictionary.0"), meta("dictionaries", []))),
        ],
    )  # fmt: skip
    codes = BASES["groups"].tensors["a_codes"].data
    yield from broken(
        "groups",
        [
            ("group-product-largest", "role_shape", "GRP-006 GRP-008", meta(shape_1, MOST_WEIGHTS)),
            ("group-product-2-62-exactly", "shape_overflow", "GRP-006", meta(shape_1, [4, 2**30, 2**30])),
            *[
                (f"ranges-{name}", "metadata_schema", "GRP-004", meta(ranges, value))
                for name, value in {
                    "fall-back-at-last": [[0, 1], [4, 5], [2, 3]],
                    "touch-at-last": [[0, 1], [3, 4], [4, 5]],
                    "touch-backwards": [[2, 3], [0, 2]],
                    "same": [[5, 6], [5, 6], [7, 8]],
                    "same-at-last": [[0, 1], [3, 4], [3, 4]],
                    "inside": [[0, 2], [0, 1]],
                }.items()
            ],
            ("ranges-empty-of-none", "metadata_schema", "GRP-004", many(meta(shape, [0, 3, 20]), meta(ranges, [[7, 7]]))),
            ("ranges-count-wraps", "metadata_schema", "GRP-004 GEN-001",
             many(meta(shape, [0, 3, 20]), meta(ranges, [[0, 2**32]]))),
            *[
                (f"role-shape-{role.replace('_', '-')}-{name}", "role_shape", "GRP-008", replaced(f"a_{role}", dtype, dims, data))
                for role, name, dtype, dims, data in (
                    ("codes", "without-dimensions", "U8", [], codes[:1]),
                    ("code_offsets", "without-dimensions", "U64", [], bytes(8)),
                    ("row_lengths", "without-dimensions", "U8", [], b"\0"),
                    ("row_lengths", "experts-more", "U8", [4, 3], bytes(12)),
                    ("row_lengths", "rows-more", "U8", [3, 4], bytes(12)),
                    ("row_lengths", "rows-less", "U8", [3, 2], bytes(6)),
                    ("levels", "without-dimensions", "F32", [], bytes(4)),
                    ("levels", "rows-more", "F32", [3, 4, 2], bytes(96)),
                    ("levels", "of-one", "F32", [3, 3, 1], bytes(36)),
                    ("levels", "of-three", "F32", [3, 3, 3], bytes(108)),
                    ("dictionary_index", "without-dimensions", "U8", [], b"\0"),
                    ("dictionary_index", "long", "U8", [4], bytes(4)),
                    ("checksums", "long", "U32", [4], bytes(16)),
                )
            ],
        ],
    )  # fmt: skip
    none, no_rows = named(valid.shapes(), "shape-fused-0-2-3"), named(valid.shapes(), "shape-fused-2-0-5")

    def with_codes(*offsets: int) -> Fault:
        return many(
            replaced("w_codes", "U8", [1], b"\0"),
            lambda draft: setattr(draft.tensors["w_code_offsets"], "data", struct.pack(f"<{len(offsets)}Q", *offsets)),
        )

    yield from of(
        none,
        [
            ("offsets-of-none-begin-at-1", "code_offsets", "GRP-009", put("w_code_offsets", 0, b"\1")),
            ("offsets-of-none-with-codes", "code_offsets", "GRP-009", with_codes(0)),
            ("offsets-of-none-end-of-codes", "code_offsets", "GRP-009", with_codes(1)),
        ],
    )
    yield from of(
        no_rows,
        [
            ("codes-without-rows", "row_lengths", "GRP-010", with_codes(0, 0, 1)),
            ("checksum-without-rows", "checksum", "CRC-001", keep("experts", put("w_checksums", 7, b"\xaa"))),
        ],
    )
    two = [of_rows(ROWS)] * 2
    for name, source, first in (("braces", "{{}}", 0), ("longest", "x" * 4094 + "{}", 2**32 - 2)):
        yield plain(
            f"valid/template-{name}", f"a template of {len(source)} bytes", ["REQ-GRP-001", "REQ-GRP-004"],
            [group_of("w", "stacked", "F32", 8, two, source=source, ranges=[[first, first + 2]])], [hand(8)],
            gzip=name == "longest",
        )  # fmt: skip


def levels() -> Iterator[Vector]:
    for dtype in FLOATS:
        size, one = SIZES[dtype], level(dtype, 1.0)
        above = (int.from_bytes(one, "little") + 1).to_bytes(size, "little")
        name = dtype.lower()
        pairs = [(one, above), (negative(above), negative(one))]
        matrix = Matrix([digits("0+-0")] * 2, pairs)
        yield plain(f"valid/levels-adjacent-{name}", "levels next to each other", ["REQ-LEV-002"],
                    [group_of("w", "matrix", dtype, 8, [matrix])], [hand(8)])  # fmt: skip
        base = "8" if dtype == "F32" else name
        yield from broken(
            base,
            [
                (f"level-swapped-by-one-{name}", "level_value", "LEV-002", put("w_levels", 0, above + one)),
                (f"level-nan-largest-{name}", "level_value", "LEV-001", put("w_levels", size, b"\xff" * (size - 1) + b"\x7f")),
            ],
        )


# ---- §8 --------------------------------------------------------------------------------------------------------------


def directories() -> Iterator[Vector]:
    drafts, restored = two_shards()
    files = {name: draft.render() for name, draft in drafts.items()}
    weight_map = weight_map_of(drafts)

    def linked(name: str) -> dict[str, Any]:
        return {tensor: name if file == SHARDS[0] else file for tensor, file in weight_map.items()}

    def one(identity: str, note: str, reqs: Sequence[str], index: bytes, **flags: Any) -> Vector:
        return Vector(f"valid/{identity}", note, reqs, files | {INDEX: index}, restored, **flags)

    def wrong(identity: str, reason: str, reqs: Sequence[str], index: bytes) -> Vector:
        content = files | {INDEX: index}
        return Vector(f"invalid/{identity}", identity.replace("-", " "), reqs, content, error=reason, base="valid/base-shards",
                      before=content)  # fmt: skip

    longest = "m" * 255  # of a file's name on most systems
    yield one("shards-deep", "an index 16 deep", ["REQ-JSN-003"],
              index_text(weight_map, {"a": json.loads("[" * 14 + "]" * 14)}))  # fmt: skip
    yield one("shards-number-largest", "2^63 - 1 outside of metadata", ["REQ-JSN-004"], index_text(weight_map, {}, a=2**63 - 1))
    yield one("shards-name-255", "a file name of 255 bytes", ["REQ-SHD-003", "REQ-SHD-004"], index_text(linked(longest)),
              links={longest: SHARDS[0]})  # fmt: skip
    yield one("shards-name-dots", "a file name of three dots", ["REQ-SHD-003"], index_text(linked("...")),
              links={"...": SHARDS[0]})  # fmt: skip
    yield wrong("index-number-2-63", "json_number", ["REQ-JSN-004"], index_text(weight_map, {}, a=2**63))
    yield wrong("shard-missing-name-256", "shard_missing", ["REQ-SHD-004"], index_text(linked("m" * 256)))
