"""The choice of dictionaries for a file: which designs its bank holds, and how many bits their codewords have.

Everything is decided by counting bytes of encoded samples, in integers: the same input gives the same bank on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from qmoecodec.codec.arguments import check_code_bits, check_dictionary, check_digits
from qmoecodec.codec.rows import encode_rows
from qmoecodec.types import MAX_DICTIONARIES, Dictionary, Int8Array

CodeBits = Literal["auto", 8, 12, 16]
DictionaryChoice = Literal["auto", "qmoe-2023"]

#: Code bits that "auto" tries. 16-bit dictionaries save about another percent, but are as large as a small expert and
#: decode several times slower; they are there for who asks.
AUTO_CODE_BITS: Final = (8, 12)
#: Digits that a sample of one expert has at least, if the expert has them; whole rows.
SAMPLE_DIGITS: Final = 1 << 16
#: Experts whose samples are kept at most; beyond, every second one is dropped.
MAX_SAMPLES: Final = 512
#: Designs considered at most: the ones that most weights fall on.
MAX_DESIGNS: Final = 32
#: What a further dictionary costs beside its own bytes: its metadata and its entry in the header.
ENTRY_BYTES: Final = 192
#: Step between the grid's odds of a zero; half a step off costs less than 0.1% of the rate.
ODDS_STEP: Final = 1.15
#: The grid's share of - among nonzero digits is a multiple of 1 / SIGN_STEPS.
SIGN_STEPS: Final = 16


class Design(NamedTuple):
    """A point of the grid of digit statistics that dictionaries are built for."""

    odds: int  # P(0) / (1 - P(0)) is ODDS_STEP ** odds
    sign: int  # P(-) / (P(-) + P(+)) is sign / SIGN_STEPS

    def build(self, code_bits: int) -> Dictionary:
        """Return the dictionary of this design."""
        from qmoecodec.dictionary import aivf

        ratio = 1.0  # by repeated multiplication, which is the same on every machine
        for _ in range(abs(self.odds)):
            ratio *= ODDS_STEP
        zero, nonzero = (ratio, 1.0) if self.odds >= 0 else (1.0, ratio)
        minus = nonzero * self.sign / SIGN_STEPS
        return aivf.build(minus, zero, nonzero - minus, code_bits=code_bits)


def design_of(counts: npt.NDArray[np.int64]) -> Design:
    """Return the grid point nearest to the digit counts (0, -, +)."""
    zeros, minus, plus = (int(n) for n in counts)
    nonzeros = minus + plus
    odds, ratio = 0, 1.0
    step, sign = ((ODDS_STEP, 1) if zeros >= nonzeros else (1 / ODDS_STEP, -1))
    half = math.sqrt(step)  # exact to the last bit by IEEE 754, like + - * /: the same on every machine
    while abs(odds) < 60 and (ratio * half * nonzeros < zeros if sign > 0 else ratio * half * nonzeros > zeros):
        ratio *= step
        odds += sign
    share = (2 * SIGN_STEPS * minus + nonzeros) // (2 * nonzeros) if nonzeros else SIGN_STEPS // 2
    return Design(odds, share)


def sample_rows(digits: Int8Array, *, n_digits: int) -> Int8Array:
    """Return evenly spaced rows with n_digits digits or more between them, or all rows.

    digits : int8[rows, cols]
    """
    rows, cols = digits.shape
    wanted = -(-n_digits // max(cols, 1))
    if wanted >= rows:
        return digits
    return np.ascontiguousarray(digits[np.arange(wanted) * rows // wanted])


class _Sample(NamedTuple):
    digits: Int8Array
    n_digits: int  # of the whole expert
    design: Design


class BankPlanner:
    """Collects experts one after another, then chooses the bank of dictionaries for all of them.

    dictionary : "auto", or "qmoe-2023" for the paper's table
    code_bits : "auto", 8, 12 or 16
    Raises ValueError for other choices, and for "qmoe-2023" with code_bits other than "auto" or 16.
    """

    def __init__(self, dictionary: DictionaryChoice = "auto", code_bits: CodeBits = "auto") -> None:
        if dictionary not in ("auto", "qmoe-2023"):
            raise ValueError(f"no dictionary {dictionary!r}: it is 'auto' or 'qmoe-2023'")
        code_bits = check_code_bits(code_bits)
        if dictionary == "qmoe-2023" and code_bits not in ("auto", 16):
            raise ValueError("the table of qmoe-2023 has 16-bit codewords")
        self._dictionary = dictionary
        self._code_bits = code_bits
        self._samples: list[_Sample] = []
        self._n_seen = 0
        self._stride = 1

    def add(self, digits: Int8Array) -> None:
        """Take note of one expert.

        digits : int8[rows, cols]    values -1, 0, 1
        """
        if digits.ndim != 2:
            raise ValueError(f"an expert is a two-dimensional array, not {digits.shape}")
        if self._dictionary != "auto" or not digits.size:
            return
        if self._n_seen % self._stride == 0:
            sample = check_digits(sample_rows(digits, n_digits=SAMPLE_DIGITS), 2)
            counts = np.array([(sample == value).sum() for value in (0, -1, 1)], np.int64)
            self._samples.append(_Sample(sample, digits.size, design_of(counts)))
            if len(self._samples) > MAX_SAMPLES:
                self._samples = self._samples[::2]
                self._stride *= 2
        self._n_seen += 1

    def choose(self) -> tuple[Dictionary, ...]:
        """Return the bank: the dictionaries, all of the same code_bits, that make the experts seen the fewest bytes."""
        if self._dictionary == "qmoe-2023":
            from qmoecodec.dictionary import qmoe2023

            return (qmoe2023.table(),)
        if not self._samples:
            return (Design(8, SIGN_STEPS // 2).build(8 if self._code_bits == "auto" else self._code_bits),)
        # The designs are sifted with 8-bit dictionaries, which are quick to build, and then used for every size.
        designs = self._sift(self._common_designs(), 8)[0]
        tried = AUTO_CODE_BITS if self._code_bits == "auto" else (self._code_bits,)
        best: tuple[Dictionary, ...] = ()
        least: int | None = None
        for code_bits in tried:
            kept, n_bytes = self._sift(designs, code_bits)
            if least is None or n_bytes < least:
                least, best = n_bytes, tuple(design.build(code_bits) for design in kept)
        return best

    def _common_designs(self) -> list[Design]:
        weight: dict[Design, int] = {}
        for sample in self._samples:
            weight[sample.design] = weight.get(sample.design, 0) + sample.n_digits
        return sorted(sorted(weight, key=lambda d: (-weight[d], d))[:MAX_DESIGNS])

    def _sift(self, designs: Sequence[Design], code_bits: int) -> tuple[list[Design], int]:
        """Add design after design while that saves more bytes than it costs; return them and the bytes in all."""
        dictionaries = [design.build(code_bits) for design in designs]
        costs = np.empty((len(self._samples), len(designs)), object)  # exact integers: bytes of whole experts
        for i, sample in enumerate(self._samples):
            for k, dictionary in enumerate(dictionaries):
                n_bytes = len(encode_rows(sample.digits, dictionary=dictionary)[0])
                costs[i, k] = n_bytes * sample.n_digits * self._stride // sample.digits.size
        prices = [len(dictionary.data) + ENTRY_BYTES for dictionary in dictionaries]
        chosen: list[int] = []
        total: int | None = None
        while len(chosen) < min(len(designs), MAX_DICTIONARIES):
            trials = [
                (sum(min(row[j] for j in (*chosen, k)) for row in costs) + sum(prices[j] for j in (*chosen, k)), k)
                for k in range(len(designs))
                if k not in chosen
            ]
            cheapest, k = min(trials)
            if total is not None and cheapest >= total:
                break
            total = cheapest
            chosen.append(k)
        assert total is not None
        return [designs[k] for k in sorted(chosen)], total


def given_bank(dictionary: Dictionary | Sequence[Dictionary], code_bits: CodeBits) -> tuple[Dictionary, ...]:
    """Return the bank that a caller brings, as a tuple.

    Raises TypeError for what is no dictionary; ValueError for too many, none, or other code bits than asked for.
    """
    if not isinstance(dictionary, (Dictionary, Sequence)):
        raise TypeError(f"dictionary is a string, a Dictionary or a sequence of them, not {type(dictionary).__name__}")
    bank = (dictionary,) if isinstance(dictionary, Dictionary) else tuple(dictionary)
    for one in bank:
        check_dictionary(one)
    if not 1 <= len(bank) <= MAX_DICTIONARIES:
        raise ValueError(f"a bank holds 1 to {MAX_DICTIONARIES} dictionaries, not {len(bank)}")
    bits = {d.code_bits for d in bank}
    if len(bits) > 1:
        raise ValueError(f"the dictionaries of a bank have one number of code bits, not {sorted(bits)}")
    if check_code_bits(code_bits) not in ("auto", *bits):
        raise ValueError(f"the dictionary has {bank[0].code_bits}-bit codewords; code_bits is {code_bits}")
    return bank


def cheapest(digits: Int8Array, bank: Sequence[Dictionary]) -> int:
    """Return the index of the dictionary that encodes an expert in the fewest bytes, measured on a sample of its rows."""
    if len(bank) == 1 or not digits.size:
        return 0
    sample = sample_rows(digits, n_digits=4 * SAMPLE_DIGITS)
    return min(range(len(bank)), key=lambda k: (len(encode_rows(sample, dictionary=bank[k])[0]), k))
