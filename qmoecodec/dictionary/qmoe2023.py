"""The dictionary of the QMoE paper (arXiv 2310.16795), as a dictionary of kind "table" (spec §4.3).

Its phrases are the 65,536 most probable strings of 1 to 14 pairs of digits at P(0) = .885, P(-) = P(+), prefixes
included. A pair is the number d0 + 3 * d1 in 0..8. Codewords are numbered by falling probability, and among equally
probable strings in lexicographic order of their pairs; the probabilities are float64 products taken from the first pair on, as
their rounding decides nearly all of the order (exact arithmetic would change 65,050 numbers of 65,536).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np

from qmoecodec.dictionary.serial import table_from_phrases
from qmoecodec.types import Dictionary

P_ZERO: Final = 0.885
MAX_PAIRS: Final = 14
CODE_BITS: Final = 16

#: SHA-256 of the published decode table: for each codeword two little-endian uint32, each with the number of pairs in bits
#: 0..3 and then seven of the fourteen pairs, a digit in two bits.
DECODE_TABLE_SHA256: Final = "c09862c453fe122634070a475357ff81a679aff65829d84a56f806c02a54ed45"


@lru_cache(maxsize=1)
def table() -> Dictionary:
    """Return the 65,536-codeword dictionary of the QMoE paper.

    >>> table().phrase(0, 0), table().max_phrase
    ((0, 0), 28)
    """
    n_codewords = 1 << CODE_BITS
    single = [P_ZERO, (1 - P_ZERO) / 2, (1 - P_ZERO) / 2]
    pair = np.array([first * second for second in single for first in single])

    # A string is more probable than any it begins: so the best strings of up to n pairs are among the best of up to n - 1
    # pairs and the continuations of those of n - 1. A key holds the pairs plus one as decimal digits, and sorts like them.
    probabilities, keys, n_pairs = np.empty(0), np.empty(0, np.int64), np.empty(0, np.int64)
    longest, longest_keys = np.ones(1), np.zeros(1, np.int64)
    for n in range(1, MAX_PAIRS + 1):
        longest = (longest[:, None] * pair).reshape(-1)
        longest_keys = (longest_keys[:, None] + np.arange(1, 10) * 10 ** (MAX_PAIRS - n)).reshape(-1)
        probabilities = np.concatenate([probabilities, longest])
        keys = np.concatenate([keys, longest_keys])
        n_pairs = np.concatenate([n_pairs, np.full(len(longest), n)])
        best = np.lexsort((keys, -probabilities))[:n_codewords]
        probabilities, keys, n_pairs = probabilities[best], keys[best], n_pairs[best]
        longest, longest_keys = probabilities[n_pairs == n], keys[n_pairs == n]

    pairs = keys[:, None] // 10 ** np.arange(MAX_PAIRS - 1, -1, -1) % 10 - 1
    digits = np.stack([pairs % 3, pairs // 3], axis=-1).reshape(n_codewords, 2 * MAX_PAIRS).astype(np.uint8)
    phrases = [row[: 2 * n].tobytes() for row, n in zip(digits, n_pairs.tolist(), strict=True)]
    return table_from_phrases(phrases, code_bits=CODE_BITS)
