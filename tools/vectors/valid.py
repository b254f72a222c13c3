"""Vectors that every reader accepts, and those of later versions and of writers that are not canonical."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from vectors import codebook
from vectors.codebook import Codebook, Row
from vectors.draft import SIZES, Draft, Group, Levels, Matrix, Tensor, make, restored

FLOATS = ("F16", "BF16", "F32", "F64")
TINY = {"F16": b"\1\0", "BF16": b"\1\0", "F32": b"\1\0\0\0", "F64": b"\1" + bytes(7)}  # the least subnormal
GREATEST = {"F16": b"\xff\x7b", "BF16": b"\x7f\x7f", "F32": b"\xff\xff\x7f\x7f", "F64": b"\xff" * 6 + b"\xef\x7f"}


@dataclass
class Vector:
    """A vector before it is written. `content` maps file names to bytes; a single file has the name ''."""

    id: str
    note: str
    reqs: Sequence[str]
    content: dict[str, bytes]
    tensors: dict[str, Tensor] | None = None
    error: str | None = None
    deep: str | None = None
    draft: Draft | None = None
    drafts: dict[str, Draft] = field(default_factory=dict)  # of a directory
    base: str | None = None
    before: dict[str, bytes] | None = None  # with the patch alone, checksums not refreshed
    encode: bool = False
    gzip: bool = False
    seconds: float | None = None
    size: int | None = None
    links: dict[str, str] | None = None


def level(dtype: str, value: float) -> bytes:
    """Return the bytes of a number that the dtype holds exactly, or of its upper half."""
    if dtype == "BF16":
        return struct.pack("<f", value)[2:]
    return struct.pack({"F16": "<e", "F32": "<f", "F64": "<d"}[dtype], value)


def negative(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 0x80])


def ranges_of(experts: int) -> list[list[int]]:
    return [[0, experts]] if experts else []


def random_matrix(rng: random.Random, rows: int, cols: int, dtype: str, p_zero: float = 0.7, dictionary: int = 0) -> Matrix:
    weights = [p_zero, (1 - p_zero) / 2, (1 - p_zero) / 2]
    digits = [bytes(rng.choices(range(3), weights, k=cols)) for _ in range(rows)]
    levels = []
    for row in digits:
        low, high = level(dtype, -rng.randint(1, 64) / 64), level(dtype, rng.randint(1, 64) / 64)
        levels.append((low if 1 in row else bytes(len(low)), high if 2 in row else bytes(len(high))))
    return Matrix(digits, levels, dictionary)


def group_of(
    name: str,
    layout: str,
    dtype: str,
    bits: int,
    experts: list[Matrix],
    shape: tuple[int, int, int] | None = None,
    source: str | None = None,
    ranges: list[list[int]] | None = None,
) -> Group:
    if shape is None:
        shape = (len(experts), len(experts[0].rows), len(experts[0].rows[0]))
    if layout == "stacked":
        ranges = ranges_of(shape[0]) if ranges is None else ranges
        return Group(name, layout, source or f"{name}.{{}}.weight", dtype, bits, shape, experts, ranges)
    return Group(name, layout, source if source is not None else f"{name}.weight", dtype, bits, shape, experts)


def of_rows(rows: Sequence[Row], dtype: str = "F32", dictionary: int = 0) -> Matrix:
    """Return a matrix of these digits with levels of -1 and 1 where they occur."""
    zero = bytes(SIZES[dtype])
    pairs = [(level(dtype, -1) if 1 in row else zero, level(dtype, 1) if 2 in row else zero) for row in rows]
    return Matrix([*rows], pairs, dictionary)


def digits(text: str) -> Row:
    return bytes("0-+".index(character) for character in text)


# ---- Dictionaries ----------------------------------------------------------------------------------------------------

TREE_0 = (2, 1, 0, 0, 0, 2, 1, 0, 0, 0, 0)  # 0, 00 (incomplete), 000, 0-, 0+, -, -0 (incomplete), -00, --, -+, +
TREE_1 = (0, 1, 0)  # -, + (incomplete), +0


@cache
def hand(bits: int) -> Codebook:
    """A dictionary that is easily followed by hand."""
    return codebook.aivf(bits, 2 ** (bits - 1), TREE_0, TREE_1)


@cache
def smallest(bits: int) -> Codebook:
    return codebook.aivf(bits, 3, (0, 0, 0), (0, 0))


@cache
def table(bits: int) -> Codebook:
    phrases = ["0", "-", "+", "00", "0000", "0000000", "0+", "-0", "00-", "0-0+", "+-"]
    return codebook.table(bits, {5 * i + 2: digits(phrase) for i, phrase in enumerate(phrases)})


@cache
def deepest(bits: int) -> Codebook:
    """255 digits: a chain of incomplete nodes, then a leaf."""
    return codebook.aivf(bits, 2**bits - 254, [*[1] * 254, 0, 0, 0], (0, 0))


@cache
def built(bits: int, p_zero: float) -> Codebook:
    """The dictionary that qmoecodec builds for a share of zeros."""
    from qmoecodec.dictionary import aivf, serial

    made = aivf.build((1 - p_zero) / 2, p_zero, (1 - p_zero) / 2, code_bits=bits)
    symbols = [value >> shift & 3 for value in made.data for shift in (0, 2, 4, 6)]
    trees = []
    for roots in ((0, 1, 2), (1, 2)):
        n = sum(1 for _ in codebook.walk(iter(symbols), roots))
        trees.append(symbols[:n])
        symbols = symbols[n:]
    assert serial.parse(made.data, kind="aivf", code_bits=bits, threshold=made.threshold)
    return codebook.aivf(bits, made.threshold, *trees)


@cache
def qmoe_2023() -> Codebook:
    from qmoecodec.dictionary import qmoe2023

    data = qmoe2023.table().data
    ends, at, phrases = data[: 2**16], 0, {}
    values = [value >> shift & 3 for value in data[2**16 :] for shift in (0, 2, 4, 6)]
    for code, n in enumerate(ends):
        phrases[code] = bytes(values[at : at + n])
        at += n
    return codebook.table(16, phrases)


# ---- Vectors ---------------------------------------------------------------------------------------------------------

PLAIN = {"bias": Tensor("U8", [3], b"\x07\x08\x09"), "scale": Tensor("F32", [2], struct.pack("<2f", 0.5, -2.0))}
ROWS = [digits(text) for text in ("00+-00000-0+", "000000000000", "+-+-+-+-+-+-", "-00-0000--00", "0000000000-0")]


def plain(
    identity: str,
    note: str,
    reqs: Sequence[str],
    groups: Sequence[Group] = (),
    bank: Sequence[Codebook] = (),
    passthrough: dict[str, Tensor] | None = None,
    change: Callable[[Draft], None] | None = None,
    **flags: Any,
) -> Vector:
    draft = make(groups, bank, passthrough)
    if change is not None:
        change(draft)
    return Vector(identity, note, reqs, {"": draft.render()}, restored(groups, passthrough or {}), draft=draft, **flags)


def bases() -> Iterator[Vector]:
    """Yield the small files that most invalid vectors are made of."""
    for bits in (8, 12, 16):
        groups = [group_of("w", "matrix", "F32", bits, [of_rows(ROWS)])]
        yield plain(
            f"valid/base-{bits}",
            f"one matrix, {bits}-bit codewords",
            ["REQ-ROW-001", "REQ-CON-001", "REQ-CRC-001"],
            groups,
            [hand(bits)],
            PLAIN,
            encode=True,
        )
    for dtype in ("F16", "BF16", "F64"):
        groups = [group_of("w", "matrix", dtype, 8, [of_rows(ROWS, dtype)])]
        yield plain(
            f"valid/base-{dtype.lower()}",
            f"one matrix of {dtype}",
            ["REQ-LEV-001", "REQ-GRP-007"],
            groups,
            [hand(8)],
            PLAIN,
            encode=True,
        )
    groups = [group_of("w", "matrix", "F32", 8, [of_rows(ROWS)])]
    yield plain("valid/base-table", "one matrix, an explicit table", ["REQ-DIC-009", "REQ-DIC-011"], groups, [table(8)], PLAIN)
    rng = random.Random(1)
    stacked = group_of(
        "a", "stacked", "F32", 8, [random_matrix(rng, 3, 20, "F32", dictionary=i % 2) for i in range(3)], ranges=[[0, 2], [4, 5]]
    )
    fused = group_of("z", "fused", "BF16", 12, [random_matrix(rng, 2, 9, "BF16", dictionary=2) for i in range(2)])
    bank = [hand(8), codebook.random_aivf(rng, 8, 200, 30, 0.6), hand(12)]
    yield plain(
        "valid/base-groups",
        "a stacked and a fused group, three dictionaries",
        ["REQ-GRP-002", "REQ-GRP-004"],
        [stacked, fused],
        bank,
        PLAIN,
        encode=True,
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
            f"row lengths: {name}",
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


def metadata(rng: random.Random) -> Iterator[Vector]:
    def groups(name: str = "w", **flags: Any) -> list[Group]:
        layout = flags.pop("layout", "matrix")
        n = flags.pop("experts", 1)
        return [group_of(name, layout, "F32", 8, [random_matrix(rng, 2, 8, "F32") for _ in range(n)], **flags)]

    def nested(depth: int) -> Any:
        return [nested(depth - 1)] if depth > 1 else []

    def extended(draft: Draft) -> None:
        draft.metadata["x-all"] = {"a": [1, "b", None, True, {"c": False}], "": 2**63 - 1}
        draft.metadata["x-"] = None
        draft.metadata["dictionaries"][0]["x-note"] = "kept"
        draft.metadata["groups"][0]["x-rotation"] = [1, 2, 3]

    yield plain("valid/x-keys", "keys that begin with x-, at every level", ["REQ-MET-010"], groups(), [hand(8)], PLAIN, extended)
    yield plain(
        "valid/x-deep",
        "a value 16 deep",
        ["REQ-JSN-003", "REQ-MET-010"],
        groups(),
        [hand(8)],
        PLAIN,
        lambda draft: draft.metadata.update({"x-deep": nested(15)}),
    )
    names = {
        "quote": 'w"\\/',
        "control": "w\0\1\b\t\n\f\r\x1f\x7f",
        "unicode": "wäδ中",
        "astral": "w\U0001d11e\U0010ffff",
        "braces": "w{}{}",
    }
    for key, name in names.items():
        yield plain(
            f"valid/name-{key}",
            f"names: {name!r}",
            ["REQ-MET-003", "REQ-JSN-006"],
            groups(f"g.{name}", source=name),
            [hand(8)],
            {f"p.{name}": PLAIN["bias"]},
        )
    yield plain(
        "valid/name-empty",
        "a source tensor and a passthrough tensor with short names",
        ["REQ-GRP-001"],
        groups(source=""),
        [hand(8)],
        {" ": PLAIN["bias"]},
    )
    yield plain(
        "valid/name-passthrough-empty", "a passthrough tensor without a name", ["REQ-MET-011"], passthrough={"": PLAIN["bias"]}
    )
    yield plain(
        "valid/name-passthrough-x",
        "a passthrough tensor whose name begins with x-",
        ["REQ-MET-010", "REQ-CRC-003"],
        groups(),
        [hand(8)],
        {"x-bias": PLAIN["bias"]},
    )
    yield plain(
        "valid/name-near-reserved",
        "names that are nearly reserved",
        ["REQ-MET-013"],
        groups("qmoecodec", source="w"),
        [hand(8)],
        {"qmoecodec": PLAIN["bias"], "Qmoecodec.a": PLAIN["bias"], " qmoecodec.a": PLAIN["bias"]},
    )
    yield plain(
        "valid/name-4096", "a group name of 4,096 bytes", ["REQ-GRP-001"], groups("é" * 2048, source="s"), [hand(8)], gzip=True
    )
    yield plain(
        "valid/name-roles",
        "names that look like role tensors",
        ["REQ-MET-011"],
        groups("w_codes") + groups("w"),
        [hand(8)],
        {"w_weights": PLAIN["bias"], "codes": PLAIN["bias"]},
    )
    yield plain(
        "valid/names-sorted",
        "sorted by code point, not by UTF-16",
        ["REQ-MET-003", "REQ-GRP-002"],
        groups("g\uff5e") + groups("g\U0001d11e") + groups("gé") + groups("gz"),
        [hand(8)],
        {"\uff5e": PLAIN["bias"], "\U0001d11e": PLAIN["bias"], "é": PLAIN["bias"], "z": PLAIN["bias"]},
    )
    yield plain(
        "valid/source-as-role",
        "a source tensor with the name of a role tensor",
        ["REQ-GRP-005"],
        groups(source="w_codes"),
        [hand(8)],
    )
    cases: dict[str, tuple[str, list[list[int]]]] = {
        "gaps": ("e.{}", [[0, 1], [2, 3], [5, 7]]),
        "large": ("e.{}", [[2**32 - 4, 2**32]]),
        "first": ("{}.w", [[7, 11]]),
        "last": ("w{}", [[0, 4]]),
        "only": ("{}", [[9, 13]]),
        "digits": ("1{}2", [[0, 4]]),
    }
    for key, (source, ranges) in cases.items():
        yield plain(
            f"valid/ranges-{key}",
            f"template {source}, numbers {ranges}",
            ["REQ-GRP-004", "REQ-GRP-005"],
            groups(layout="stacked", experts=4, source=source, ranges=ranges),
            [hand(8)],
        )
    yield plain(
        "valid/ranges-alike",
        "templates whose names differ",
        ["REQ-GRP-005"],
        groups("a", layout="stacked", experts=2, source="w{}", ranges=[[0, 2]])
        + groups("b", layout="stacked", experts=2, source="w1{}", ranges=[[0, 2]])
        + groups("c", source="w2"),
        [hand(8)],
        {"w01": PLAIN["bias"], "w{}": PLAIN["bias"]},
    )
    yield plain(
        "valid/strings",
        "other entries of __metadata__",
        ["REQ-MET-001"],
        groups(),
        [hand(8)],
        PLAIN,
        lambda draft: draft.strings.update({"format": "pt", "": "", "é\U0001d11e": "\u2028\0"}),
    )
    yield plain("valid/nothing", "no tensor but the header checksum", ["REQ-MET-011", "REQ-CRC-004"])
    yield plain("valid/passthrough-only", "passthrough tensors alone", ["REQ-CRC-003"], passthrough=PLAIN, encode=True)
    yield plain("valid/groups-only", "no passthrough tensor", ["REQ-MET-008"], groups(), [hand(8)], encode=True)


def headers(rng: random.Random) -> Iterator[Vector]:
    groups = [group_of("w", "matrix", "F32", 8, [of_rows(ROWS)])]

    def one(name: str, note: str, reqs: Sequence[str], change: Callable[[Draft], None] | None = None, **flags: Any) -> Vector:
        return plain(f"valid/header-{name}", note, reqs, groups, [hand(8)], PLAIN, change, **flags)

    def setter(**values: Any) -> Callable[[Draft], None]:
        def change(draft: Draft) -> None:
            for key, value in values.items():
                setattr(draft, key, value)

        return change

    def spaced(text: str) -> str:
        return json.dumps(json.loads(text), indent="\t\n\r ", ensure_ascii=False)

    def escaped(text: str) -> str:
        return text.replace('"dtype"', '"\\u0064type"').replace('"F32"', '"\\u00463\\u0032"').replace("shape", "s\\u0068ape")

    def pad(n: int) -> Callable[[str], str]:  # make the text need n spaces modulo 8
        return lambda text: text[:-1] + " " * ((-len(text.encode()) - n) % 8) + "}"

    for n in (0, 1, 8, 32, 56, 63):
        yield one(
            f"spaces-{n}", f"{n} spaces after the object", ["REQ-CON-006", "REQ-CON-003"], setter(header_text=pad(n), padding=n)
        )
    yield one("whitespace", "white space of all kinds between the tokens", ["REQ-JSN-001"], setter(header_text=spaced))
    yield one("escapes", "escaped letters in keys and values", ["REQ-JSN-002", "REQ-TEN-001"], setter(header_text=escaped))
    names = [*make(groups, [hand(8)], PLAIN).tensors]

    def mixed(draft: Draft) -> None:  # every element size before and after every other, padded by nothing: sizes must fit
        draft.order = sorted(draft.tensors, key=lambda name: (-SIZES[draft.tensors[name].dtype], rng.random()))

    yield one("order", "tensors of one element size in no order", ["REQ-TEN-010", "REQ-TEN-011"], mixed)
    yield one(
        "metadata-last",
        "__metadata__ after the tensors",
        ["REQ-MET-001"],
        setter(header=lambda header: {name: header[name] for name in [*names, "__metadata__"]}),
    )
    yield one(
        "shuffled",
        "entries in another order than the data",
        ["REQ-TEN-010"],
        setter(header=lambda header: dict(sorted(header.items(), key=lambda item: item[0][::-1]))),
    )
    yield one(
        "keys",
        "the keys of an entry in another order",
        ["REQ-TEN-001"],
        setter(header=lambda header: {name: dict(reversed(entry.items())) for name, entry in header.items()}),
    )
    small_first = {
        "aa": Tensor("U8", [8], bytes(range(8))),
        "ab": Tensor("F64", [1], struct.pack("<d", 1.5)),
        "ac": Tensor("U16", [2], b"\1\2\3\4"),
    }
    yield plain(
        "valid/header-small-first",
        "a byte tensor before one of eight bytes",
        ["REQ-TEN-009"],
        passthrough=small_first,
        change=lambda draft: setattr(draft, "order", ["aa", "ab", "ac", "qmoecodec.header_crc32"]),
    )
    every = {f"t.{dtype}": Tensor(dtype, [2], bytes(range(1, 2 * size + 1))) for dtype, size in SIZES.items()}
    yield plain("valid/dtypes", "passthrough tensors of every dtype", ["REQ-TEN-004"], passthrough=every, encode=True)
    empty = {f"e{i}": Tensor("F32", [0], b"") for i in range(5)} | {
        "f": Tensor("U8", [0, 2**62, 2**62], b""),
        "g": PLAIN["scale"],
    }
    yield plain(
        "valid/tensors-empty",
        "empty tensors, some of a large shape",
        ["REQ-TEN-006", "REQ-TEN-007", "REQ-GEN-001"],
        passthrough=empty,
    )
    ranks = {f"r{n}": Tensor("U16", [1] * n, b"\1\2") for n in range(9)}
    yield plain("valid/ranks", "0 to 8 dimensions", ["REQ-TEN-003"], passthrough=ranks, encode=True)
    floats = {
        "nan": Tensor("F32", [3], bytes.fromhex("0100c07f010080ffffffff7f")),
        "negative-zero": Tensor("F32", [2, 2], struct.pack("<4f", -0.0, 0.0, 1.0, -1.0)),
        "infinite": Tensor("F16", [2], b"\0\x7c\0\xfc"),
    }
    yield plain(
        "valid/passthrough-floats", "NaN payloads, negative zeros, infinities", ["REQ-CRC-003"], passthrough=floats, encode=True
    )
    many = {f"{i:x}": Tensor("U8", [0], b"") for i in range(65_535)}
    yield plain(
        "valid/tensors-65536", "as many tensors as there may be", ["REQ-TEN-002"], passthrough=many, gzip=True, seconds=30
    )


def at_random(rng: random.Random, count: int, prefix: str = "valid/random") -> Iterator[Vector]:
    """Yield files of random groups, dictionaries and passthrough tensors."""
    for k in range(count):
        bits = [rng.choice((8, 8, 8, 12, 16)) for _ in range(rng.randint(1, 3))]
        bank = []
        for b in bits:
            if b == 8 and rng.random() < 0.3:
                bank.append(codebook.random_table(rng, b, rng.randint(3, 60), 12, rng.random()))
            else:
                p = rng.random()
                bank.append(codebook.random_aivf(rng, b, rng.randint(40, 2**b - 1), rng.randint(0, 60), p))
        groups = []
        for name in rng.sample("abcdefg", rng.randint(0, 3)):
            b = rng.choice(bits)
            fitting = [i for i, own in enumerate(bits) if own == b]
            layout, dtype, p_zero = (
                rng.choice(("stacked", "fused", "matrix")),
                rng.choice(FLOATS),
                rng.choice((0, 0.3, 0.6, 0.9, 1)),
            )
            n_rows, cols = rng.randint(0, 4), rng.randint(0, 40)
            n = 1 if layout == "matrix" else rng.randint(0, 4)
            experts = [random_matrix(rng, n_rows, cols, dtype, p_zero, rng.choice(fitting)) for _ in range(n)]
            groups.append(group_of(name, layout, dtype, b, experts, (n, n_rows, cols)))
        passthrough = {}
        for i in range(rng.randint(0, 3)):
            dtype = rng.choice([*SIZES])
            shape = [rng.randint(0, 3) for _ in range(rng.randint(0, 3))]
            n_bytes = SIZES[dtype]
            for n in shape:
                n_bytes *= n
            passthrough[f"p{i}"] = Tensor(dtype, shape, rng.randbytes(n_bytes))
        yield plain(
            f"{prefix}-{k}",
            "groups, dictionaries and tensors drawn at random",
            ["REQ-ROW-001", "REQ-GRP-008"],
            groups,
            bank,
            passthrough,
        )


# ---- Directories -----------------------------------------------------------------------------------------------------


def index_text(weight_map: dict[str, Any], metadata: Any = None, **more: Any) -> bytes:
    value = ({} if metadata is None else {"metadata": metadata}) | {"weight_map": weight_map} | more
    return json.dumps(value, indent=2).encode() + b"\n"


INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def weight_map_of(drafts: dict[str, Draft]) -> dict[str, str]:
    return {name: file for file, draft in drafts.items() for name in draft.tensors if not name.startswith("qmoecodec.")}


def two_shards() -> tuple[dict[str, Draft], dict[str, Tensor]]:
    rng = random.Random(3)
    first = [group_of("a", "stacked", "F32", 8, [random_matrix(rng, 2, 9, "F32") for _ in range(2)], source="e.{}.wi")]
    second = [group_of("b", "matrix", "BF16", 12, [random_matrix(rng, 2, 7, "BF16")], source="wo")]
    drafts = {
        SHARDS[0]: make(first, [hand(8)], {"bias": PLAIN["bias"]}),
        SHARDS[1]: make(second, [hand(12)], {"scale": PLAIN["scale"]}),
    }
    return drafts, restored(first, {"bias": PLAIN["bias"]}) | restored(second, {"scale": PLAIN["scale"]})


def directories() -> Iterator[Vector]:
    drafts, tensors = two_shards()
    files = {name: draft.render() for name, draft in drafts.items()}
    weight_map = weight_map_of(drafts)
    reqs = ["REQ-SHD-001", "REQ-SHD-002", "REQ-SHD-004"]

    def one(
        name: str, note: str, index: bytes, more: dict[str, bytes] | None = None, reqs: Sequence[str] = reqs, **flags: Any
    ) -> Vector:
        return Vector(f"valid/{name}", note, reqs, files | {INDEX: index} | (more or {}), tensors, drafts=drafts, **flags)

    yield one("base-shards", "two shards and their index", index_text(weight_map, {"total_size": 123}))
    yield one("shards-no-metadata", "an index without metadata", index_text(weight_map))
    yield one(
        "shards-numbers",
        "any number in metadata, and only there",
        index_text(weight_map, {"total_size": 1.5, "a": [-1, {"b": 1e300}], "c": 2**70}, version=1),
    )
    yield one("shards-other-keys", "other keys of the index", index_text(weight_map, {}, note=[1, None, {"deep": True}]))
    yield one(
        "shards-order", "the index in another order", index_text(dict(sorted(weight_map.items(), key=lambda item: item[0][::-1])))
    )
    yield one(
        "shards-other-files",
        "files that the index does not name",
        index_text(weight_map),
        {"config.json": b"{}", "other.safetensors": b"no"},
    )
    yield one(
        "shards-compact", "an index without white space", json.dumps({"weight_map": weight_map}, separators=(",", ":")).encode()
    )
    yield one(
        "shards-escapes",
        "escapes in the index",
        index_text(weight_map).replace(b"bias", b"b\\u0069as").replace(b"00001", b"0000\\u0031"),
    )
    link = "linked.safetensors"
    linked = {name: link if file == SHARDS[0] else file for name, file in weight_map.items()}
    yield one(
        "shards-link-inside",
        "a symbolic link that stays inside",
        index_text(linked),
        links={link: SHARDS[0]},
        reqs=["REQ-SHD-005"],
    )
    odd = {"shard one…": SHARDS[0], "-": SHARDS[1]}
    renamed = {new: files[old] for new, old in odd.items()}
    names = {old: new for new, old in odd.items()}
    yield Vector(
        "valid/shards-names",
        "unusual file names",
        ["REQ-SHD-003"],
        renamed | {INDEX: index_text({name: names[file] for name, file in weight_map.items()})},
        tensors,
    )
    only = {name: tensor for name, tensor in tensors.items() if name in ("e.0.wi", "e.1.wi", "bias")}
    yield Vector(
        "valid/directory-one-file",
        "a directory without an index",
        ["REQ-SHD-004"],
        {"model.safetensors": files[SHARDS[0]]},
        only,
        drafts=drafts,
    )
    yield Vector(
        "valid/shards-one",
        "an index of one file",
        reqs,
        {SHARDS[0]: files[SHARDS[0]], INDEX: index_text({n: f for n, f in weight_map.items() if f == SHARDS[0]})},
        only,
    )
    yield Vector("valid/shards-none", "an index of no file", ["REQ-SHD-001"], {INDEX: index_text({})}, {})


# ---- Later versions, and encodings that are not canonical ------------------------------------------------------------


def future() -> Iterator[Vector]:
    groups = [group_of("w", "matrix", "F32", 8, [of_rows(ROWS)])]

    def accepted(name: str, note: str, reqs: Sequence[str], **values: Any) -> Vector:
        return plain(f"future/{name}", note, reqs, groups, [hand(8)], PLAIN, lambda draft: draft.metadata.update(values))

    def nested(draft: Draft) -> None:
        draft.metadata |= {"format_version": "1.2", "optional_features": ["rotation", "x-hash"], "x-hash": {"kind": "sha256"}}
        draft.metadata["dictionaries"][0]["x-origin"] = "built"
        draft.metadata["groups"][0] |= {"x-rotation": {"seed": 3}, "x-name": None}

    yield accepted("minor-1", "a later minor version", ["REQ-MET-005"], format_version="1.1")
    yield accepted("minor-9999", "the last minor version", ["REQ-MET-004"], format_version="1.9999")
    yield accepted("optional", "an unknown optional feature", ["REQ-MET-007"], optional_features=["rotation"])
    yield accepted("optional-several", "several", ["REQ-MET-007"], optional_features=["", "a", "a b", "z", "\u00e9"])
    yield accepted(
        "optional-minor", "a later minor version with one", ["REQ-MET-007"], format_version="1.7", optional_features=["x-y"]
    )
    yield accepted("key", "an unknown key with x-", ["REQ-MET-010"], **{"x-new": {"a": [0, 1]}})
    yield accepted("key-minor", "the same in a later minor version", ["REQ-MET-010"], format_version="1.1", **{"x-new": "yes"})
    yield plain("future/keys-everywhere", "all of it", ["REQ-MET-007", "REQ-MET-010"], groups, [hand(8)], PLAIN, nested)

    base = make(groups, [hand(8)], PLAIN)

    def refused(name: str, note: str, reqs: Sequence[str], error: str, change: Callable[[Draft], None]) -> Vector:
        draft = base.copy()
        change(draft)
        return Vector(
            f"future/{name}",
            note,
            reqs,
            {"": draft.render()},
            error=error,
            base="valid/base-8",
            before={"": draft.render(refresh=False)},
        )

    def other(**values: Any) -> Callable[[Draft], None]:
        return lambda draft: draft.metadata.update(values)

    def everything(draft: Draft) -> None:
        draft.metadata = {"format_version": "2.0", "layers": [{"a": 1}]}

    def feature_and_kind(draft: Draft) -> None:
        draft.metadata["required_features"] = ["huffman"]
        draft.metadata["dictionaries"][0]["kind"] = "huffman"

    for version in ("2.0", "0.9", "10.0", "9999.9999", "3.1"):
        yield refused(
            f"major-{version.replace('.', '-')}",
            f"version {version}",
            ["REQ-MET-005"],
            "unsupported_version",
            other(format_version=version),
        )
    yield refused("major-all-new", "version 2.0 with other keys", ["REQ-MET-005"], "unsupported_version", everything)
    yield refused(
        "required", "an unknown required feature", ["REQ-MET-006"], "unsupported_feature", other(required_features=["huffman"])
    )
    yield refused(
        "required-x", "its name begins with x-", ["REQ-MET-006"], "unsupported_feature", other(required_features=["x-a"])
    )
    yield refused("required-empty", "its name is empty", ["REQ-MET-006"], "unsupported_feature", other(required_features=[""]))
    yield refused(
        "required-minor",
        "in a later minor version",
        ["REQ-MET-006"],
        "unsupported_feature",
        other(format_version="1.3", required_features=["a", "b"]),
    )
    yield refused("required-kind", "with a new kind of dictionary", ["REQ-MET-006"], "unsupported_feature", feature_and_kind)
    yield refused(
        "key-not-extensible",
        "a new key without x- in a later minor version",
        ["REQ-MET-009"],
        "metadata_schema",
        other(format_version="1.1", layers=1),
    )


def everything(seed: int) -> Iterator[Vector]:
    """Yield all of these vectors."""
    rng = random.Random(seed)
    yield from bases()
    yield from systematic(rng)
    yield from shapes()
    yield from rows()
    yield from lengths()
    yield from levels()
    yield from dictionaries(rng)
    yield from metadata(rng)
    yield from headers(rng)
    yield from at_random(rng, 30)
    yield from directories()
    yield from future()
