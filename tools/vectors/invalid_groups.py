"""Vectors with a fault in rows, groups or levels (spec §5, §6)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from vectors.draft import Draft, Tensor
from vectors.faults import (
    BASES,
    Fault,
    added,
    broken,
    keep,
    many,
    meta,
    put,
    recode,
    replaced,
    word,
    words_of,
)
from vectors.parts import (
    Vector,
    hand,
    level,
    negative,
    table,
)


def rows() -> Iterator[Vector]:
    for bits, base in ((8, "8"), (12, "12"), (16, "16")):
        book, top = hand(bits), 2 ** (bits - 1)
        last = words_of(BASES[base], "w", book)

        def append(rows: list[list[int]], value: int = top) -> None:
            rows[1].append(value)

        yield from broken(
            base,
            [
                (f"codeword-unused-{bits}", "unused_codeword", "ROW-002", word(0, 0, 7, book)),
                (f"codeword-unused-top-{bits}", "unused_codeword", "ROW-002", word(1, 1, 2 * top - 1, book)),
                (f"codeword-unused-incomplete-{bits}", "unused_codeword", "ROW-002", word(2, 1, top + 2, book)),
                (f"codeword-unused-in-state-1-{bits}", "unused_codeword", "ROW-002", word(0, 1, 2, book)),
                (f"codeword-unused-first-of-state-1-{bits}", "unused_codeword", "ROW-002", word(0, 1, top + 1, book)),
                (f"row-underrun-{bits}", "row_underrun", "ROW-003", recode(lambda rows: rows[0].pop(), book)),
                (f"row-underrun-last-{bits}", "row_underrun", "ROW-003", recode(lambda rows: rows[-1].pop(), book)),
                (f"row-without-codewords-{bits}", "row_underrun", "ROW-003", recode(lambda rows: rows[3].clear(), book)),
                (f"row-overrun-{bits}", "row_overrun", "ROW-004", recode(append, book)),
                (f"row-overrun-leaf-{bits}", "row_overrun", "ROW-004", recode(lambda rows: rows[2].append(0), book)),
                (f"row-overrun-two-{bits}", "row_overrun", "ROW-004", recode(lambda rows: rows[4].extend([0, 0]), book)),
                (f"overrun-plus-{bits}", "overrun_nonzero", "ROW-005", word(2, len(last[2]) - 1, 5, book)),
                (f"overrun-minus-{bits}", "overrun_nonzero", "ROW-005", word(2, len(last[2]) - 1, 4, book)),
            ],
        )
    for index in (0, 1):
        book = hand(12)
        rows = words_of(BASES["12"], "w", book)
        odd = [i for i, row in enumerate(rows) if len(row) % 2][index]
        at = sum(-(-len(row) * 12 // 8) for row in rows[: odd + 1]) - 1
        data = BASES["12"].tensors["w_codes"].data
        for name, mask in (("low", 0x10), ("high", 0x80), ("all", 0xF0)):
            yield from broken(
                "12", [(f"row-padding-{name}-{index}", "row_padding", "ROW-006", put("w_codes", at, bytes([data[at] | mask])))]
            )
    tables = table(8)
    words = words_of(BASES["table"], "w", tables)
    yield from broken(
        "table",
        [
            ("table-codeword-unused", "unused_codeword", "ROW-002", word(0, 0, 3, tables)),
            ("table-codeword-unused-255", "unused_codeword", "ROW-002", word(1, 0, 255, tables)),
            ("table-row-underrun", "row_underrun", "ROW-003", recode(lambda rows: rows[1].pop(), tables)),
            ("table-row-overrun", "row_overrun", "ROW-004", recode(lambda rows: rows[1].append(2), tables)),
            ("table-overrun-nonzero", "overrun_nonzero", "ROW-005", word(3, len(words[3]) - 1, 5 * 8 + 2, tables)),
        ],
    )


def groups() -> Iterator[Vector]:
    entry = "groups/0/"
    simple: dict[str, tuple[str, Any]] = {
        "name-empty": ("name", ""),
        "name-number": ("name", 1),
        "name-4097": ("name", "w" * 4097),
        "name-4098-bytes": ("name", "é" * 2049),
        "name-missing": ("name", ...),
        "layout-unknown": ("layout", "tiled"),
        "layout-null": ("layout", None),
        "layout-missing": ("layout", ...),
        "source-number": ("source", 0),
        "source-missing": ("source", ...),
        "shape-two": ("shape", [5, 12]),
        "shape-four": ("shape", [1, 5, 12, 1]),
        "shape-string": ("shape", ["1", "5", "12"]),
        "shape-missing": ("shape", ...),
        "dtype-integer": ("dtype", "I8"),
        "dtype-f8": ("dtype", "F8_E4M3"),
        "dtype-unknown": ("dtype", "F128"),
        "dtype-missing": ("dtype", ...),
        "bits-9": ("code_bits", 9),
        "bits-string": ("code_bits", "8"),
        "bits-missing": ("code_bits", ...),
        "base-2-32": ("row_length_base", 2**32),
        "base-missing": ("row_length_base", ...),
        "base-string": ("row_length_base", "0"),
        "ranges-of-matrix": ("expert_ranges", [[0, 1]]),
        "ranges-null": ("expert_ranges", None),
        "source-4097": ("source", "w" * 4097),
        "source-4098-bytes": ("source", "é" * 2049),
    }
    yield from broken(
        "8", [(f"group-{name}", "metadata_schema", "GRP-001", meta(entry + key, value)) for name, (key, value) in simple.items()]
    )

    def swap(draft: Draft) -> None:
        draft.metadata["groups"].reverse()

    def twice(draft: Draft) -> None:
        draft.metadata["groups"].append(draft.metadata["groups"][1])

    def fuse(draft: Draft) -> None:
        draft.metadata["groups"][1]["layout"] = "matrix"

    ranges = "groups/0/expert_ranges"
    large = 2**31
    yield from broken(
        "groups",
        [
            ("groups-unsorted", "metadata_schema", "GRP-002", swap),
            ("groups-twice", "metadata_schema", "GRP-002", twice),
            ("groups-unsorted-and-large", "metadata_schema", "GRP-002", many(meta("groups/0/shape", [3, large, 20]), swap)),
            ("matrix-of-two-experts", "metadata_schema", "GRP-003", fuse),
            ("ranges-missing", "metadata_schema", "GRP-001", meta(ranges, ...)),
            ("template-without-braces", "metadata_schema", "GRP-001", meta("groups/0/source", "a.weight")),
            ("template-two-braces", "metadata_schema", "GRP-001", meta("groups/0/source", "a.{}.{}")),
            ("template-braces-with-number", "metadata_schema", "GRP-001", meta("groups/0/source", "a.{0}")),
            *[
                (f"ranges-{name}", "metadata_schema", "GRP-004", meta(ranges, value))
                for name, value in {
                    "empty-range": [[0, 0], [1, 4]],
                    "backward": [[4, 1]],
                    "descending": [[4, 5], [0, 2]],
                    "overlap": [[0, 2], [1, 2]],
                    "adjacent": [[0, 2], [2, 3]],
                    "too-few": [[0, 2]],
                    "too-many": [[0, 4]],
                    "none": [],
                    "beyond-2-32": [[2**32 - 2, 2**32 + 1]],
                    "far": [[2**40, 2**40 + 3]],
                    "numbers": [0, 1, 4],
                    "triples": [[0, 1, 2]],
                    "single": [[3]],
                    "strings": [["0", "3"]],
                    "object": {"0": 3},
                }.items()
            ],
            ("source-twice", "source_conflict", "GRP-005", meta("groups/1/source", "a.4.weight")),
            ("source-is-passthrough", "source_conflict", "GRP-005", meta("groups/1/source", "bias")),
            (
                "source-templates-meet",
                "source_conflict",
                "GRP-005",
                many(
                    meta("groups/0/source", "w{}"),
                    meta("groups/1/layout", "stacked"),
                    meta("groups/1/source", "{}0"),
                    meta("groups/1/expert_ranges", [[2, 4]]),
                    meta("groups/0/expert_ranges", [[0, 3]]),
                    meta("groups/1/source", "w{}"),
                ),
            ),
            (
                "source-templates-meet-digits",
                "source_conflict",
                "GRP-005",
                many(
                    meta("groups/0/source", "w{}"),
                    meta("groups/0/expert_ranges", [[10, 13]]),
                    meta("groups/1/layout", "stacked"),
                    meta("groups/1/source", "w1{}"),
                    meta("groups/1/expert_ranges", [[1, 3]]),
                ),
            ),
            (
                "source-stacked-is-passthrough",
                "source_conflict",
                "GRP-005",
                many(
                    meta("groups/0/source", "bia{}"),
                    added("bia5", Tensor("U8", [1], b"\1"), passthrough=True),
                    meta(ranges, [[3, 6]]),
                ),
            ),
        ],
    )

    def index(e: int, value: int) -> Fault:
        return put("a_dictionary_index", e, bytes([value]))

    offsets = struct.unpack("<4Q", BASES["groups"].tensors["a_code_offsets"].data)
    n = offsets[-1]

    def shift(*values: int) -> Fault:
        return put("a_code_offsets", 0, struct.pack("<4Q", *values))

    yield from broken(
        "groups",
        [
            ("group-dimension-2-31", "shape_overflow", "GRP-006", meta("groups/1/shape", [2, 2, large])),
            ("group-rows-2-31", "shape_overflow", "GRP-006", meta("groups/1/shape", [2, large, 9])),
            ("group-experts-2-31", "shape_overflow", "GRP-006", meta("groups/1/shape", [large, 2, 9])),
            ("group-product-2-62", "shape_overflow", "GRP-006 GEN-001", meta("groups/1/shape", [2, large - 1, large - 1])),
            ("group-product-wraps", "shape_overflow", "GRP-006 GEN-001", meta("groups/1/shape", [2**22, 2**22, 2**22])),
            *[
                (
                    f"role-dtype-{role.replace('_', '-')}-{dtype.lower()}",
                    "role_dtype",
                    "GRP-007",
                    replaced(f"a_{role}", dtype, shape),
                )
                for role, dtype, shape in (
                    ("codes", "I8", [n]),
                    ("code_offsets", "I64", [4]),
                    ("code_offsets", "F64", [4]),
                    ("row_lengths", "I8", [3, 3]),
                    ("levels", "I32", [3, 3, 2]),
                    ("levels", "U32", [3, 3, 2]),
                    ("dictionary_index", "BOOL", [3]),
                    ("checksums", "I32", [3]),
                    ("checksums", "F32", [3]),
                )
            ],
            ("role-dtype-levels-of-group", "role_dtype", "GRP-007", replaced("a_levels", "F64", [3, 3, 1])),
            *[
                (
                    f"role-shape-{role.replace('_', '-')}-{name}",
                    "role_shape",
                    "GRP-008",
                    replaced(f"a_{role}", dtype, shape, data),
                )
                for role, name, dtype, shape, data in (
                    ("codes", "two-dimensions", "U8", [1, n], None),
                    ("code_offsets", "short", "U64", [3], bytes(24)),
                    ("code_offsets", "long", "U64", [5], bytes(40)),
                    ("row_lengths", "flat", "U8", [9], None),
                    ("row_lengths", "transposed", "U8", [1, 9], None),
                    ("levels", "flat", "F32", [3, 6], None),
                    ("levels", "swapped", "F32", [3, 2, 3], None),
                    ("dictionary_index", "short", "U8", [2], b"\0\1"),
                    ("dictionary_index", "two-dimensions", "U8", [3, 1], None),
                    ("checksums", "short", "U32", [2], bytes(8)),
                    ("checksums", "scalar", "U32", [], bytes(4)),
                )
            ],
            (
                "group-more-experts",
                "role_shape",
                "GRP-008",
                many(meta("groups/0/shape", [4, 3, 20]), meta(ranges, [[0, 2], [4, 6]])),
            ),
            ("group-more-rows", "role_shape", "GRP-008", meta("groups/0/shape", [3, 4, 20])),
            ("offsets-begin-at-1", "code_offsets", "GRP-009", shift(1, *offsets[1:])),
            ("offsets-fall", "code_offsets", "GRP-009", shift(0, offsets[2], offsets[1], n)),
            ("offsets-end-early", "code_offsets", "GRP-009", shift(*offsets[:3], n - 1)),
            ("offsets-end-late", "code_offsets", "GRP-009", shift(*offsets[:3], n + 1)),
            ("offsets-beyond", "code_offsets", "GRP-009", shift(0, n + 5, n + 6, n)),
            ("offsets-2-63", "code_offsets", "GRP-009 GEN-001", shift(0, 2**63, 2**63, n)),
            ("offsets-2-64", "code_offsets", "GRP-009 GEN-001", shift(0, 2**64 - 1, 2**64 - 1, n)),
            ("offsets-shifted", "row_lengths", "GRP-010", shift(0, offsets[1] + 1, *offsets[2:])),
            ("offsets-shifted-back", "row_lengths", "GRP-010", shift(0, offsets[1] - 1, *offsets[2:])),
            ("dictionary-index-3", "dictionary_index", "GRP-011", index(0, 3)),
            ("dictionary-index-255", "dictionary_index", "GRP-011", index(2, 255)),
            ("dictionary-index-other-bits", "dictionary_index", "GRP-012", index(1, 2)),
            ("group-other-bits", "dictionary_index", "GRP-012", meta("groups/0/code_bits", 12)),
        ],
    )
    lengths = BASES["8"].tensors["w_row_lengths"].data
    yield from broken(
        "8",
        [
            ("row-length-one-more", "row_lengths", "GRP-010", put("w_row_lengths", 0, bytes([lengths[0] + 1]))),
            ("row-length-255", "row_lengths", "GRP-010", put("w_row_lengths", 4, b"\xff")),
            ("row-length-base-more", "row_lengths", "GRP-010", meta(entry + "row_length_base", 9)),
            ("row-length-base-2-32-less-1", "row_lengths", "GRP-010 GEN-001", meta(entry + "row_length_base", 2**32 - 1)),
            ("codes-longer", "row_lengths", "GRP-010", _longer),
            ("columns-more", "row_underrun", "ROW-003", meta(entry + "shape", [1, 5, 13 + 1])),
            ("columns-fewer", "row_overrun", "ROW-004", meta(entry + "shape", [1, 5, 8])),
            ("columns-beyond-bound", "row_underrun", "GRP-014", meta(entry + "shape", [1, 5, 1000])),
            (
                "columns-beyond-bound-by-one",
                "row_underrun",
                "GRP-014",
                meta(entry + "shape", [1, 5, 3 * len(BASES["8"].tensors["w_codes"].data) // 5 + 1]),
            ),
        ],
    )


def _longer(draft: Draft) -> None:
    codes = draft.tensors["w_codes"].data + b"\0"
    draft.tensors["w_codes"] = Tensor("U8", [len(codes)], codes)
    draft.tensors["w_code_offsets"].data = struct.pack("<2Q", 0, len(codes))


def levels() -> Iterator[Vector]:
    for dtype in ("F16", "BF16", "F32", "F64"):
        base, size = (dtype.lower() if dtype != "F32" else "8"), len(level(dtype, 1.0))
        one = level(dtype, 1.0)
        infinite = {"F16": b"\0\x7c", "BF16": b"\x80\x7f", "F32": b"\0\0\x80\x7f", "F64": bytes(6) + b"\xf0\x7f"}[dtype]
        nan, tail = b"\1" + infinite[1:], dtype.lower()
        yield from broken(
            base,
            [
                (f"level-infinite-{tail}", "level_value", "LEV-001", put("w_levels", size, infinite)),
                (f"level-minus-infinite-{tail}", "level_value", "LEV-001", put("w_levels", 0, negative(infinite))),
                (f"level-nan-{tail}", "level_value", "LEV-001", put("w_levels", 2 * 2 * size, nan)),
                (f"level-minus-zero-{tail}", "level_value", "LEV-001", put("w_levels", 2 * size, negative(bytes(size)))),
                (
                    f"level-high-minus-zero-{tail}",
                    "level_value",
                    "LEV-001",
                    put("w_levels", 3 * 2 * size + size, negative(bytes(size))),
                ),
                (f"level-equal-{tail}", "level_value", "LEV-002", put("w_levels", 0, one)),
                (f"level-swapped-{tail}", "level_value", "LEV-002", put("w_levels", 0, one + negative(one))),
                (
                    f"level-both-negative-swapped-{tail}",
                    "level_value",
                    "LEV-002",
                    put("w_levels", size, negative(level(dtype, 2.0))),
                ),
                (f"level-high-zero-low-positive-{tail}", "level_value", "LEV-002", put("w_levels", 0, one + bytes(size))),
                (f"level-zero-used-{tail}", "level_zero", "LEV-003", put("w_levels", 0, bytes(size))),
                (f"level-high-zero-used-{tail}", "level_zero", "LEV-003", put("w_levels", 2 * 2 * size + size, bytes(size))),
            ],
        )
    zero = put("w_levels", 0, bytes(4))
    yield from broken(
        "8",
        [
            ("order-codeword-before-level-zero", "unused_codeword", "ROW-002", many(zero, word(4, 0, 7, hand(8)))),
            (
                "order-expert-before-passthrough",
                "level_zero",
                "LEV-003",
                many(zero, keep("passthrough", meta("passthrough/bias", "00000000"))),
            ),
        ],
    )
