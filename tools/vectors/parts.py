"""What vectors are made of: matrices, dictionaries, and the small files that others are derived from."""

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
from vectors.draft import SIZES, Draft, Group, Matrix, Tensor, make, restored

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
    sizes: dict[str, int] | None = None
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
