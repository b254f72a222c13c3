"""What gpu_sanitize.py records: groups of drawn digits that reach every kernel and form (plan.py), and what is done with them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np


def symmetric(p_zero: float, code_bits: int = 8) -> Any:
    from qmoecodec.dictionary import aivf

    return aivf.build((1 - p_zero) / 2, p_zero, (1 - p_zero) / 2, code_bits=code_bits)


def five_digits() -> Any:
    """A table of 8-bit codewords: all strings of five digits."""
    from qmoecodec.dictionary import table_from_phrases

    return table_from_phrases([bytes((n // 3**k) % 3 for k in range(5)) for n in range(243)] + [b""] * 13, code_bits=8)


def paper_table() -> Any:
    from qmoecodec.dictionary import qmoe2023

    return qmoe2023.table()


@dataclasses.dataclass(frozen=True)
class Case:
    """A group of drawn digits, and what is done with it.

    tokens : how many are multiplied, in turn
    sparse : P(0) of the digits; rows differ
    """

    make: Callable[[], Any]
    shape: tuple[int, int, int]
    tokens: tuple[int, ...]
    sparse: float = 0.885
    levels: str = "bfloat16"
    x: str = "bfloat16"
    layout: str = "auto"
    recode: bool = False


#: The list with Hopper's own kernels; what the others record runs on any architecture.
HOPPER = "hopper"

# By name, in lists that are recorded at the same time. Shapes are the least that reach a form (plan.py).
CASES: dict[str, dict[str, Case]] = {
    "usual": {
        "4 lanes, one block, all classes": Case(lambda: symmetric(0.885), (3, 37, 520), (1, 2, 3, 7, 30, 80)),
        "32 lanes, one block": Case(lambda: symmetric(0.885), (2, 9, 6144), (1, 12, 30)),
        "16 lanes, smaller tiles": Case(lambda: symmetric(0.885), (1, 200, 3072), (40,)),
        "tiles of 64 and 128 rows": Case(lambda: symmetric(0.885), (2, 9000, 64), (20, 130)),
    },
    "orders": {
        "natural order for 8": Case(lambda: symmetric(0.885), (2, 19, 1031), (1, 30)),
        "natural order for 1": Case(lambda: symmetric(0.885), (2, 5, 14000), (1, 12)),
        "natural order for 4": Case(lambda: symmetric(0.885), (2, 3, 20200), (1, 12)),
        "long phrases": Case(lambda: symmetric(0.95), (2, 9, 3072), (1, 12), sparse=0.95),
    },
    "dense": {
        "7 nonzeros, 32 lanes, several blocks": Case(lambda: symmetric(1 / 3), (2, 5, 6144), (1, 9, 40), sparse=1 / 3),
        "5 nonzeros, 8 lanes": Case(lambda: symmetric(0.5), (2, 9, 1031), (1, 9), sparse=0.5),
        "3 nonzeros, 4 lanes, several blocks": Case(lambda: symmetric(0.8), (2, 13, 1031), (1, 9), sparse=0.8),
        "3 nonzeros, 16 lanes, several blocks": Case(lambda: symmetric(0.7), (2, 7, 3072), (1, 40), sparse=0.7),
        "a table": Case(five_digits, (2, 9, 520), (1, 9, 40), sparse=0.8),
    },
    "types": {
        "float16": Case(lambda: symmetric(0.885), (2, 9, 520), (1, 9, 40), levels="float16", x="float16"),
        "float32 levels": Case(lambda: symmetric(0.885), (2, 9, 520), (1, 9, 40), levels="float32", x="float16"),
        "float64 levels": Case(lambda: symmetric(0.885), (2, 9, 48), (3,), levels="float64"),
        "one weight": Case(lambda: symmetric(0.885), (1, 1, 1), (1, 3)),
        "few columns": Case(lambda: symmetric(0.885), (3, 5, 31), (1, 9)),
        "all zero": Case(lambda: symmetric(0.885), (2, 5, 3072), (1, 9), sparse=1.0),
    },
    "general": {
        "file order": Case(lambda: symmetric(0.885), (3, 7, 520), (1, 2, 30), layout="file"),
        "12 bit": Case(lambda: symmetric(0.885, 12), (3, 7, 521), (1, 30)),
        "16 bit": Case(lambda: symmetric(0.885, 16), (2, 7, 3001), (1, 30)),
        "table of 16 bit, recoded": Case(paper_table, (2, 7, 600), (1, 9), recode=True),
        "too sparse for the gather kernel": Case(lambda: symmetric(0.99), (2, 7, 9000), (1, 9), sparse=0.99),
    },
    HOPPER: {  # odd columns where items are few: tile.cu would take even ones
        "10, 28, 58 and 14 + 64 tokens": Case(lambda: symmetric(0.885), (1, 200, 521), (12, 30, 60, 80)),
        "several items per expert": Case(lambda: symmetric(0.885), (3, 130, 521), (300,)),
        "many rows, columns not shared": Case(lambda: symmetric(0.885), (8, 13000, 64), (100,)),
        "16 lanes": Case(lambda: symmetric(0.885), (1, 70, 3073), (20,)),
        "32 lanes, several blocks of words": Case(lambda: symmetric(0.885), (1, 70, 9001), (40,)),
        "odd columns, several blocks of words": Case(lambda: symmetric(0.8), (2, 70, 1031), (30,), sparse=0.8),
        "float16": Case(lambda: symmetric(0.885), (2, 130, 521), (30, 70), levels="float16", x="float16"),
        "7 nonzeros": Case(lambda: symmetric(1 / 3), (2, 70, 1033), (30, 66), sparse=1 / 3),
    },
}


def draw(shape: tuple[int, int, int], sparse: float, rng: np.random.Generator) -> Any:
    """Digits, int8[experts, rows, cols]; some rows sparser than the rest."""
    p_zero = np.where(rng.random((*shape[:2], 1)) < 0.25, (1 + sparse) / 2, sparse)
    draws = rng.random(shape)
    return np.where(draws < p_zero, 0, np.where(draws < (1 + p_zero) / 2, -1, 1)).astype(np.int8)


def run_case(case: Case, rng: np.random.Generator) -> None:
    """Encode, load, decode, multiply; and the same with damage."""
    import torch

    import qmoecodec
    from qmoecodec_gpu import encoding, matvec
    from qmoecodec_gpu.experts import GpuExperts

    n_experts, _, cols = case.shape
    dictionary = case.make()
    digits = draw(case.shape, case.sparse, rng)
    staged = encoding.encode(torch.from_numpy(digits).cuda(), dictionary)
    encoded = encoding.to_encoded(staged, dictionary)
    pairs = np.stack([-rng.random(case.shape[:2]) - 0.1, rng.random(case.shape[:2]) + 0.1], -1)
    levels = torch.from_numpy(pairs).to(getattr(torch, case.levels))
    experts = GpuExperts.load(encoded, levels, layout=case.layout, recode=case.recode)
    if not (experts.decode().cpu().numpy() == digits).all():
        raise AssertionError("decode is wrong")
    experts.decode(0, dtype=torch.bfloat16)
    experts.decode(dtype=torch.float16)
    for tokens in case.tokens:
        x = torch.from_numpy(rng.standard_normal((tokens, cols))).to("cuda", getattr(torch, case.x))
        # Few experts, so that items are large; the last tokens of many go nowhere.
        numbers = rng.integers(0, n_experts, size=tokens) if tokens < 40 else np.zeros(tokens, np.int64)
        if tokens > 8:
            numbers[-2:] = (-1, n_experts)
        y = matvec.grouped_matvec(experts, x, torch.from_numpy(numbers).cuda())
        good = (numbers >= 0) & (numbers < n_experts)
        if not bool(y.float().cpu()[good].isfinite().all()):
            raise AssertionError("an output was not written")
    matvec.matvec(experts, x[0], 0)
    for _ in range(6):
        codes = encoded.codes.copy()
        codes[rng.integers(codes.size)] ^= np.uint8(1 << rng.integers(8))
        with contextlib.suppress(qmoecodec.FormatError):
            GpuExperts.load(dataclasses.replace(encoded, codes=codes), levels).decode()
