"""Vectors that every reader accepts: matrices, rows, levels, dictionaries."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from vectors import codebook
from vectors.codebook import Codebook
from vectors.draft import SIZES, Levels, Matrix
from vectors.parts import (
    FLOATS,
    GREATEST,
    PLAIN,
    ROWS,
    TINY,
    Vector,
    built,
    deepest,
    digits,
    group_of,
    hand,
    level,
    negative,
    of_rows,
    plain,
    qmoe_2023,
    random_matrix,
    smallest,
    table,
)


def systematic(rng: random.Random) -> Iterator[Vector]:
    for bits in (8, 12, 16):
        for dtype in FLOATS:
            for layout in ("stacked", "fused", "matrix"):
                experts = [random_matrix(rng, 3, rng.randint(15, 40), dtype)]
                if layout != "matrix":
                    experts += [random_matrix(rng, 3, len(experts[0].rows[0]), dtype) for _ in range(2)]
                book = codebook.random_aivf(rng, bits, 2**bits - 40, 40, 0.7)
                yield plain(
                    f"valid/{layout}-{dtype.lower()}-{bits}",
                    f"layout {layout}, dtype {dtype}, {bits}-bit codewords",
                    ["REQ-GRP-001", "REQ-GRP-007", "REQ-GRP-008"],
                    [group_of("w", layout, dtype, bits, experts)],
                    [book],
                    encode=True,
                )


def shapes() -> Iterator[Vector]:
    large = 2**31 - 1
    cases = [
        ("stacked", (0, 2, 3)),
        ("fused", (0, 2, 3)),
        ("fused", (2, 0, 5)),
        ("fused", (2, 3, 0)),
        ("matrix", (1, 0, 0)),
        ("fused", (0, 0, 0)),
        ("matrix", (1, 1, 1)),
        ("fused", (0, large, large)),
        ("fused", (2, 0, large)),
        ("matrix", (1, 0, large)),
        ("matrix", (1, 3, 0)),
        ("stacked", (2, 1, 1)),
        ("fused", (1, 1, 40)),
    ]
    for layout, shape in cases:
        experts = [of_rows([(b"\0\1\2" * 14)[: shape[2]]] * shape[1]) for _ in range(shape[0])]
        text = "-".join("max" if n == large else str(n) for n in shape)
        yield plain(
            f"valid/shape-{layout}-{text}",
            f"experts, rows, columns: {', '.join(map(str, shape))}",
            ["REQ-GRP-006", "REQ-GRP-008"],
            [group_of("w", layout, "F32", 8, experts, shape)],
            [hand(8)],
        )


def rows() -> Iterator[Vector]:
    cases = {
        "zeros": ["0" * 40],
        "minus": ["-" * 17],
        "plus": ["+" * 17],
        "one-zero": ["0"],
        "one-minus": ["-"],
        "one-plus": ["+"],
        "ends-on-leaf": ["000", "+", "0-"],
        "ends-on-incomplete": ["00", "-0", "00+00"],
        "ends-inside": ["0", "-", "--0"],
        "ends-in-state-1": ["00+", "-0-", "00-"],
        "mixed": ["0+-0", "--00", "00++", "+0+0"],
    }
    for name, texts in cases.items():
        for bits, book in ((8, hand(8)), (12, hand(12)), (16, hand(16)), (8, table(8))):
            kind = "table" if book.kind == "table" else str(bits)
            groups = [group_of(f"w{i}", "matrix", "F32", bits, [of_rows([digits(text)])]) for i, text in enumerate(texts)]
            yield plain(
                f"valid/row-{name}-{kind}",
                f"rows {', '.join(texts)}",
                ["REQ-ROW-001", "REQ-ROW-003", "REQ-ROW-005"],
                groups,
                [book],
            )
    for cols in (254, 255, 256, 511, 765):
        groups = [group_of("w", "matrix", "F32", 12, [of_rows([bytes(cols), bytes(cols - 1) + b"\1", b"\2" + bytes(cols - 1)])])]
        yield plain(
            f"valid/row-longest-{cols}",
            f"phrases of 255 digits, {cols} columns",
            ["REQ-DIC-007", "REQ-ROW-005"],
            groups,
            [deepest(12)],
        )
    for bits in (8, 12, 16):
        groups = [group_of("w", "matrix", "F32", bits, [of_rows([b"\2"])])]
        yield plain(
            f"valid/row-overrun-254-{bits}",
            "one digit, and an overrun of 254",
            ["REQ-ROW-005"],
            groups,
            [codebook.table(bits, {1: b"\2" + bytes(254), 2: b"\0"})],
        )


def lengths() -> Iterator[Vector]:
    one = smallest(8)
    for name, cols, dtype, row_texts in (
        ("base-3", 3, "U8", [b"\1\2\1", b"\0\0\0"]),
        ("u8-255", 260, "U8", [b"\1" * 260, b"\1" * 5 + bytes(255)]),
        ("u16-256", 261, "U16", [b"\1" * 261, b"\1" * 5 + bytes(256)]),
        ("u32-65536", 70_000, "U32", [b"\1" * 70_000, b"\1" * 4 + bytes(69_996)]),
    ):
        longest = 16 if name.startswith("u32") else 255
        book = one if name == "base-3" else codebook.table(8, {0: b"\0", 1: b"\1", 2: b"\2", 3: bytes(longest)})
        draft_groups = [group_of("w", "matrix", "F16", 8, [of_rows(row_texts, "F16")])]
        del cols, dtype
        yield plain(
            f"valid/lengths-{name}",
            f"rows of {' and '.join(str(len(book.encode(row))) for row in row_texts)} codewords",
            ["REQ-GRP-010", "REQ-GRP-013"],
            draft_groups,
            [book],
            gzip=name.startswith("u32"),
        )


def levels() -> Iterator[Vector]:
    for dtype in FLOATS:
        zero, one, two = bytes(SIZES[dtype]), level(dtype, 1.0), level(dtype, 2.0)
        cases: dict[str, list[tuple[str, Levels]]] = {
            "same-sign": [("0+-", (one, two)), ("0+-", (negative(two), negative(one)))],
            "extremes": [("-+", (negative(GREATEST[dtype]), GREATEST[dtype])), ("-+", (negative(TINY[dtype]), TINY[dtype]))],
            "zero": [("000", (zero, zero)), ("+00", (zero, one)), ("-00", (negative(one), zero)), ("+00", (zero, TINY[dtype]))],
            "unused": [("000", (negative(one), one)), ("+0+", (negative(two), one)), ("0-0", (one, two))],
        }
        for name, cases_of_rows in cases.items():
            cols = max(len(text) for text, _ in cases_of_rows)
            matrix = Matrix([digits(text.ljust(cols, "0")) for text, _ in cases_of_rows], [pair for _, pair in cases_of_rows])
            yield plain(
                f"valid/levels-{name}-{dtype.lower()}",
                f"levels: {name}",
                ["REQ-LEV-001", "REQ-LEV-002", "REQ-LEV-003"],
                [group_of("w", "matrix", dtype, 8, [matrix])],
                [hand(8)],
            )


def dictionaries(rng: random.Random) -> Iterator[Vector]:
    def one(
        name: str, note: str, reqs: Sequence[str], book: Codebook, p_zero: float = 0.8, *, cols: int = 60, **flags: Any
    ) -> Vector:
        return plain(
            f"valid/dictionary-{name}",
            note,
            reqs,
            [group_of("w", "matrix", "F32", book.bits, [random_matrix(rng, 4, cols, "F32", p_zero)])],
            [book],
            **flags,
        )

    for bits in (8, 12, 16):
        yield one(f"smallest-{bits}", "five leaves; most codewords unused", ["REQ-DIC-008"], smallest(bits))
        yield one(
            f"no-incomplete-{bits}",
            "threshold 2^b: no incomplete node",
            ["REQ-DIC-003"],
            codebook.aivf(bits, 2**bits, (2, 0, 2, 0, 0, 0, 0, 0, 0), (0, 0)),
        )
    yield one("full-8", "every codeword of tree 0 stands for a phrase", ["REQ-DIC-008"], _full(8))
    for bits, p_zero in ((8, 0.885), (8, 0.3334), (8, 0.95), (8, 0.5), (12, 0.885)):
        yield one(
            f"built-{bits}-{str(p_zero)[2:]}",
            f"built for P(0) = {p_zero}",
            ["REQ-DIC-005"],
            built(bits, p_zero),
            p_zero,
            cols=200,
            encode=True,
        )
    yield one("built-16-885", "built for P(0) = .885", ["REQ-DIC-005"], built(16, 0.885), 0.885, cols=200, gzip=True)
    yield one("qmoe-2023", "the table of the QMoE paper", ["REQ-DIC-011"], qmoe_2023(), 0.885, cols=200, gzip=True)
    yield one(
        "qmoe-2023-dense", "the table of the QMoE paper on few zeros", ["REQ-DIC-011"], qmoe_2023(), 0.3, cols=50, gzip=True
    )
    yield one(
        "table-12", "an explicit table of 12 bits", ["REQ-DIC-011"], codebook.random_table(rng, 12, 100, 12, 0.7), gzip=True
    )
    yield one(
        "table-16", "an explicit table of 16 bits", ["REQ-DIC-011"], codebook.random_table(rng, 16, 100, 12, 0.7), gzip=True
    )
    yield one("table-full", "a table of 256 phrases", ["REQ-DIC-013"], _full_table(rng))
    yield one(
        "table-prefixes",
        "phrases that are prefixes of others",
        ["REQ-DIC-013"],
        codebook.table(8, dict(enumerate([b"\0" * n for n in range(1, 9)] + [b"\1", b"\2"]))),
    )
    yield one(
        "table-255",
        "a phrase of 255 digits",
        ["REQ-DIC-011"],
        codebook.table(8, {0: bytes(255), 1: b"\0", 2: b"\1", 3: b"\2"}),
        0.99,
        cols=300,
    )
    yield one("random-8", "trees grown at random", ["REQ-DIC-004"], codebook.random_aivf(rng, 8, 128, 300, 0.8))

    for n in range(4):
        count = len(smallest(8).data) * 4 - 5
        del count
        nodes = [(0, 0, 0), (1, 0, 0, 0), (2, 0, 0, 0, 0, 0), (1, 0, 1, 0, 0)][n]
        book = codebook.aivf(8, 100, nodes, (0, 0))
        yield one(f"padding-{-(len(nodes) + 2) % 4}", f"{len(nodes) + 2} node symbols", ["REQ-DIC-006"], book)
    empty = codebook.table(8, {})
    yield plain(
        "valid/dictionary-table-empty",
        "a table without a phrase, used by no row",
        ["REQ-DIC-011"],
        [group_of("w", "fused", "F32", 8, [of_rows([], "F32")], (1, 0, 7))],
        [empty],
    )
    yield plain(
        "valid/dictionary-unused",
        "dictionaries that no expert uses",
        ["REQ-GRP-011"],
        [group_of("w", "matrix", "F32", 8, [random_matrix(rng, 2, 10, "F32", dictionary=1)])],
        [smallest(16), hand(8), table(8)],
    )
    yield plain(
        "valid/dictionary-twice",
        "the same dictionary twice",
        ["REQ-GRP-011"],
        [group_of("w", "fused", "F32", 8, [random_matrix(rng, 2, 10, "F32", dictionary=i) for i in range(2)])],
        [hand(8), hand(8)],
    )
    yield plain(
        "valid/dictionary-kinds",
        "both kinds in one group",
        ["REQ-GRP-012"],
        [group_of("w", "stacked", "F32", 8, [random_matrix(rng, 2, 10, "F32", dictionary=i) for i in range(3)])],
        [hand(8), table(8), smallest(8)],
    )
    yield plain(
        "valid/dictionary-256",
        "a bank of 256 dictionaries",
        ["REQ-MET-008", "REQ-GRP-011"],
        [group_of("w", "fused", "F32", 8, [random_matrix(rng, 1, 5, "F32", dictionary=i) for i in (0, 10, 100, 255)])],
        [smallest(8)] * 256,
        gzip=True,
    )
    yield plain(
        "valid/dictionary-idle",
        "the second dictionary is not used",
        ["REQ-GRP-011"],
        [group_of("w", "matrix", "F32", 8, [of_rows(ROWS)])],
        [hand(8), smallest(8)],
        PLAIN,
    )


def _full(bits: int) -> Codebook:
    """Use every codeword of tree 0: leaves 0 to T - 1, incomplete nodes T to 2^b - 1."""
    tree: list[int] = []

    def zeros(n: int) -> list[int]:  # a chain of n incomplete nodes and a leaf
        return [1] * n + [0]

    # The root's children: 0 with 60 incomplete nodes, - an internal node whose children are chains, + a comb of internal nodes.
    tree += [*zeros(60), 2, *zeros(30), *zeros(20), *zeros(17)]
    leaves, incomplete = 4, 127
    while leaves + 1 + 2 <= 2**bits - incomplete - 1:
        tree += [2, 0, 0]
        leaves += 2
    tree += [0]
    leaves += 1
    return codebook.aivf(bits, 2**bits - incomplete, tree, (0, 0))


def _full_table(rng: random.Random) -> Codebook:
    phrases = {bytes([digit]) for digit in range(3)}
    while len(phrases) < 256:
        phrases.add(bytes(rng.choices(range(3), [6, 1, 1], k=rng.randint(2, 9))))
    return codebook.table(8, dict(enumerate(sorted(phrases))))
