"""Construction of two-tree dictionaries for independent digits (spec §4.2).

An AIVF code (almost instantaneous variable-to-fixed; Yamamoto and Yokoo, IEEE Trans. Inf. Theory 47(5), 2001) may end a
codeword at an incomplete node, when a digit other than 0 follows; the decoder then knows that much of the next digit and
reads the next codeword from tree 1. Since the state depends on the codeword alone (codeword >= threshold), both trees share
the threshold T: at most T leaves and 2^b - T incomplete nodes each.

That makes the search short. Every node of a tree is a leaf, or *extended* by its 0-child (incomplete), or extended and
*completed* by its other two children (internal). T fixes how many nodes of each tree may be extended (E) and completed (C).
Extending a node of probability P adds P*P(0) digits and the probability P*(1 - P(0)) of ending in state 1; completing it
turns the latter into digits. So both are worth a fixed multiple of P, whatever the next state is worth, and the best
tree completes the C most probable nodes there are, and extends the E most probable of those that then exist. What remains
is the threshold, found by trying: a trial takes microseconds, since nodes are counted by type (`_aivf_kernels`).
Bounds by Lagrange duality, computed for eight symmetric cases of 8 and 12 bits, leave at most 0.07% between this rate and
that of any trees with the same threshold.

The result is the same on every machine: it rests on IEEE multiplication, addition, division and comparison alone, in a fixed
order. Nobody but an encoder needs it, as files carry their dictionaries.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qmoecodec.dictionary.serial import INCOMPLETE, INTERNAL, LEAF, aivf_from_symbols
from qmoecodec.types import CODE_BITS, MAX_PHRASE, Dictionary, UInt8Array

#: Digits less probable than this count as this probable, so that also what never occurred gets a sensible codeword.
MIN_PROBABILITY: Final = 2.0**-40

#: What 8-bit kernels like (digits per phrase, nonzeros per phrase, threshold), best first: the first that multiplies the
#: rate by no more than `TOLERANCE` is taken. 3 * 85 fits a byte, 127 and a sign do; a threshold to 128 saves an instruction.
FAST_LIMITS: Final = ((60, 3, 128), (85, 3, 128), (127, 3, 128), (MAX_PHRASE, 3, 128))
TOLERANCE: Final = 1.0003


def build(
    p_minus: float,
    p_zero: float,
    p_plus: float,
    *,
    code_bits: int,
    max_phrase: int | None = None,
    max_nonzeros: int | None = None,
    max_threshold: int | None = None,
) -> Dictionary:
    """Build the two-tree dictionary with the most digits per codeword for independent digits (spec §4.2).

    p_minus, p_zero, p_plus : probabilities of the digits, in any proportion (counts will do); some may be 0
    code_bits : 8, 12 or 16
    max_phrase : digits per phrase, 1..255
    max_nonzeros : digits other than 0 per phrase, at least 1
    max_threshold : 3..2**code_bits

    A limit that is None is 255, 255 and 2**code_bits, except with 8 bits: those are the codewords that kernels are made
    for, and the first line of `FAST_LIMITS` is used that costs at most 0.03%. Measured for P(-) = P(+): P(0) from .694 to
    .936 gets 60 digits, 3 nonzeros and threshold 128; to .952 85 digits, to .966 127 (60 digits would cost 1.2% at .95, 12%
    at .97), to .99 255. Denser digits, which need 4 to 6 nonzeros and thresholds to 243, get no limit, nor do .976 to .984.

    Every string of digits can be encoded with every dictionary, whatever it was built for.
    Raises ValueError for probabilities or limits out of range.

    >>> dictionary = build(0.0575, 0.885, 0.0575, code_bits=8)
    >>> round(expected_rate(dictionary, 0.0575, 0.885, 0.0575), 4)
    0.6623
    """
    if code_bits not in CODE_BITS:
        raise ValueError(f"code_bits is one of {CODE_BITS}, not {code_bits}")
    for name, value, least, most in (
        ("max_phrase", max_phrase, 1, MAX_PHRASE),
        ("max_nonzeros", max_nonzeros, 1, MAX_PHRASE),
        ("max_threshold", max_threshold, 3, 1 << code_bits),
    ):
        if value is not None and not least <= value <= most:
            raise ValueError(f"{name} is {least}..{most}, not {value}")
    return _build(_normalise(p_minus, p_zero, p_plus), code_bits, (max_phrase, max_nonzeros, max_threshold))


def expected_rate(dictionary: Dictionary, p_minus: float, p_zero: float, p_plus: float) -> float:
    """Bits per digit that a two-tree dictionary spends on long rows of independent digits.

    dictionary : of kind "aivf"; it need not have been built for these probabilities
    p_minus, p_zero, p_plus : probabilities of the digits, in any proportion
    """
    if dictionary.kind != "aivf":
        raise ValueError(f"only an aivf dictionary has a rate in closed form, not a {dictionary.kind}")
    p_minus, p_zero, p_plus = _normalise(p_minus, p_zero, p_plus)
    powers = _powers(p_minus, p_zero, p_plus)
    mean_digits, to_state_1 = [], []
    for state in range(2):
        used = np.flatnonzero(dictionary.lengths[state])
        lengths = dictionary.lengths[state, used].astype(np.int64)
        starts = dictionary.starts[state, used].astype(np.int64)
        probability = np.ones(len(used))
        for digit, row in enumerate(powers):
            upto = np.concatenate([[0], np.cumsum(dictionary.digits == digit)])
            probability *= row[upto[starts + lengths] - upto[starts]]
        if state == 1:
            probability /= p_minus + p_plus
        incomplete = used >= dictionary.threshold
        probability[incomplete] *= p_minus + p_plus
        mean_digits.append(math.fsum(probability * lengths))
        to_state_1.append(math.fsum(probability[incomplete]))
    in_state_1 = to_state_1[0] / (1.0 - to_state_1[1] + to_state_1[0])
    return dictionary.code_bits / ((1.0 - in_state_1) * mean_digits[0] + in_state_1 * mean_digits[1])


def _normalise(p_minus: float, p_zero: float, p_plus: float) -> tuple[float, float, float]:
    """Scale to probabilities of at least MIN_PROBABILITY that add up to 1 but for rounding."""
    given = (float(p_minus), float(p_zero), float(p_plus))
    total = given[0] + given[1] + given[2]
    if not (min(given) >= 0.0 and 0.0 < total < math.inf):
        raise ValueError(f"{given} are not probabilities")
    p_minus, p_zero, p_plus = (max(p / total, MIN_PROBABILITY) for p in given)
    return p_minus, p_zero, p_plus


def _powers(p_minus: float, p_zero: float, p_plus: float) -> npt.NDArray[np.float64]:
    """Powers 0..255 of P(0), P(-), P(+) by repeated multiplication: `pow` differs between machines."""
    table = np.ones((3, MAX_PHRASE + 1))
    for row, p in zip(table, (p_zero, p_minus, p_plus), strict=True):
        for n in range(MAX_PHRASE):
            row[n + 1] = row[n] * p
    return table


@lru_cache(maxsize=256)
def _build(
    probabilities: tuple[float, float, float], code_bits: int, asked: tuple[int | None, int | None, int | None]
) -> Dictionary:
    from qmoecodec.dictionary import _aivf_kernels  # compiles, so not before it is needed

    best_threshold: Any = _aivf_kernels.best_threshold
    count_nodes: Any = _aivf_kernels.count_nodes
    n_codewords = 1 << code_bits
    powers = _powers(*probabilities)
    size = 3 * n_codewords + 3
    workspace = (np.empty(size), np.empty(size, np.int64), np.empty(size, np.int64), np.empty((n_codewords, 3), np.int64))

    def search(phrase: int, nonzeros: int, last: int) -> tuple[int, float]:
        threshold, digits = best_threshold(powers, n_codewords, 3, last, phrase, nonzeros, workspace)
        return int(threshold), float(digits)

    widest = (MAX_PHRASE, MAX_PHRASE, n_codewords)
    limits = tuple(most if value is None else value for value, most in zip(asked, widest, strict=True))
    threshold, digits = search(*limits)
    for fast in FAST_LIMITS if code_bits == 8 else ():
        narrowed = tuple(preferred if value is None else value for value, preferred in zip(asked, fast, strict=True))
        narrow_threshold, narrow_digits = search(*narrowed)
        if narrow_digits * TOLERANCE >= digits:
            limits, threshold = narrowed, narrow_threshold
            break

    trees = []
    for state in range(2):
        n_types, _, _ = count_nodes(powers, state, n_codewords, threshold, *limits[:2], workspace)
        trees.append(_lay_out(workspace[3][:n_types], state=state, symmetric=probabilities[0] == probabilities[2]))
    return aivf_from_symbols(trees, code_bits=code_bits, threshold=threshold)


def _lay_out(counts: npt.NDArray[np.int64], *, state: int, symmetric: bool) -> UInt8Array:
    """Choose the nodes that the counts speak of, the first in preorder of each type, and write their symbols.

    counts : int64[types, 3]    type (length << 16 | minus signs << 8 | plus signs), nodes extended, nodes completed
    symmetric : types count - and + together, as minus signs
    Returns uint8[nodes], node symbols in preorder.
    """
    left = {int(t): [int(extended), int(completed)] for t, extended, completed in counts}
    children = (1 << 16 | (1 << 8 if symmetric else 1), 1 << 16 | 1 << 8, 1 << 16)  # +, -, 0: the last is next in preorder
    nothing = [0, 0]
    symbols = bytearray()
    pending = list(children[: 3 - state])
    while pending:
        t = pending.pop()
        budget = left.get(t, nothing)
        if budget[1]:
            budget[0] -= 1
            budget[1] -= 1
            symbols.append(INTERNAL)
            pending.extend([t + child for child in children])
        elif budget[0]:
            budget[0] -= 1
            symbols.append(INCOMPLETE)
            pending.append(t + children[2])
        else:
            symbols.append(LEAF)
    return np.frombuffer(bytes(symbols), np.uint8)
