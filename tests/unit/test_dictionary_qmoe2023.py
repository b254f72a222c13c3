"""The QMoE paper's table: its published SHA-256, and rows as the paper's own packer wrote them."""

import hashlib
import heapq

import numpy as np

from qmoecodec import reference
from qmoecodec.dictionary import parse, qmoe2023


def _decode_table() -> bytes:
    """The table in the paper's layout: per codeword 2 x uint32, (number of pairs) + 7 pairs x 2 digits x 2 bits each."""
    dictionary = qmoe2023.table()
    words = np.zeros((65536, 2), np.uint64)
    digits = np.zeros((65536, 28), np.uint64)
    for codeword in range(65536):
        phrase = dictionary.phrase(0, codeword)
        digits[codeword, : len(phrase)] = phrase
    for k in range(14):
        words[:, 0] |= digits[:, k] << np.uint64(4 + 2 * k)
        words[:, 1] |= digits[:, 14 + k] << np.uint64(4 + 2 * k)
    words |= (dictionary.lengths[0] // 2).astype(np.uint64)[:, None]
    return words.astype("<u4").tobytes()


def test_decode_table_is_the_published_one() -> None:
    assert hashlib.sha256(_decode_table()).hexdigest() == qmoe2023.DECODE_TABLE_SHA256


def test_order_is_that_of_a_heap_of_float64_products() -> None:
    p = [0.885, (1 - 0.885) / 2, (1 - 0.885) / 2]
    heap: list[tuple[float, tuple[int, ...]]] = [(-1.0, ())]
    for codeword in range(-1, 20_000):
        probability, pairs = heapq.heappop(heap)
        if pairs:
            assert qmoe2023.table().phrase(0, codeword) == tuple(d for pair in pairs for d in (pair % 3, pair // 3))
        for pair in range(9 if len(pairs) < 14 else 0):
            heapq.heappush(heap, (probability * (p[pair // 3] * p[pair % 3]), (*pairs, pair)))


def test_properties() -> None:
    dictionary = qmoe2023.table()
    assert (dictionary.kind, dictionary.code_bits, dictionary.threshold, dictionary.n_states) == ("table", 16, 65536, 1)
    assert dictionary.max_phrase == 28
    phrases = {dictionary.phrase(0, c) for c in range(65536)}
    assert len(phrases) == 65536
    assert all(len(p) % 2 == 0 and (len(p) == 2 or p[:-2] in phrases) for p in phrases)  # prefixes included
    assert qmoe2023.table() is dictionary


def test_serialised_form_expands_to_the_same() -> None:
    dictionary = qmoe2023.table()
    assert parse(dictionary.data, kind="table", code_bits=16, threshold=65536) == dictionary


# Two rows of a real expert and what the paper's GPU packer made of them.
# fmt: off
PACKED_IN_2023 = [
    (
        (
            "010100200000000000000000100000000002000010000000000000011000000000000000000000020002000002010000"
            "000020012000000020000111000000000000000001000000100022010001200002000020000000001000000000000020"
            "0110000020001201000000000010000000001000000000020000200000010001"
        ),
        [53627, 52062, 7250, 12415, 13052, 12816, 60400, 8329, 9427, 54062, 18490, 8224, 53170, 62132, 14],
    ),
    (
        (
            "000000002000000000000001000000000101000012010001000220001000000000000000001000100010002020002020"
            "000111020002000000000000000200001020000210001000000021000000000000000100120001020001000002010101"
            "0000000100000000000002000000100000010000201002001200000202101201"
        ),
        [7168, 1068, 8316, 9437, 63210, 9195, 8588, 8277, 53766, 9324,
         52123, 8632, 10958, 8300, 60225, 32615, 493, 8753, 400, 6648],
    ),
]
# fmt: on


def test_rows_are_packed_as_in_2023() -> None:
    for text, codewords in PACKED_IN_2023:
        row = [int(d) for d in text]
        assert reference.encode_row(row, qmoe2023.table()) == codewords
        assert reference.decode_row(codewords, cols=len(row), dictionary=qmoe2023.table()) == row


def test_odd_and_tiny_rows() -> None:
    for cols in (0, 1, 29, 57):
        for row in ([0] * cols, [k % 3 for k in range(cols)]):
            codewords = reference.encode_row(row, qmoe2023.table())
            assert reference.decode_row(codewords, cols=cols, dictionary=qmoe2023.table()) == row
