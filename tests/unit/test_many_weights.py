"""Groups of more than 2**31 weights in the codec on the host."""

import hashlib
import resource
import sys

import numpy as np
import pytest

import qmoecodec
from qmoecodec import codec
from qmoecodec.dictionary import aivf


def pieces(digits):
    """Hash an array in pieces of 64 MiB."""
    found = hashlib.sha256()
    flat = digits.reshape(-1)
    for at in range(0, flat.size, 64 << 20):
        found.update(flat[at : at + (64 << 20)])
    return found.hexdigest()


@pytest.mark.long
@pytest.mark.parametrize("shape", [(180, 2080, 6144), (1, 33000, 70000)], ids=str)
def test_more_weights_than_32_bits_count(shape):
    """Decoded whole, and expert by expert or rows at a time, they are the digits that were encoded."""
    n_experts, rows, cols = shape
    rng = np.random.default_rng(rows)
    draws = rng.random(10_000_019)  # a prime: the drawn piece never comes back at the same column of a row
    piece = np.where(draws < 0.885, 0, np.where(draws < 0.9425, -1, 1)).astype(np.int8)
    digits = np.empty(shape, np.int8)
    flat = digits.reshape(-1)
    assert flat.size > 2**31
    for at in range(0, flat.size, piece.size):
        flat[at : at + piece.size] = piece[: flat.size - at]
    expected = pieces(digits)
    dictionary = aivf.build(0.0575, 0.885, 0.0575, code_bits=8)
    encoded = qmoecodec.encode(digits, dictionary=dictionary)
    del digits, flat

    assert 0.6 < encoded.codes.size * 8 / np.prod(shape, dtype=np.int64) < 0.7
    decoded = qmoecodec.decode(encoded)
    assert pieces(decoded) == expected
    del decoded
    found = hashlib.sha256()
    for e in range(n_experts):
        codes = encoded.codes[int(encoded.code_offsets[e]) : int(encoded.code_offsets[e + 1])]
        lengths = encoded.row_lengths[e]
        starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])  # of 8-bit codewords
        for begin in range(0, rows, 4096):
            end = min(rows, begin + 4096)
            part = codes[starts[begin] : starts[end]]
            found.update(codec.decode_rows(part, lengths[begin:end], cols=cols, dictionary=dictionary))
    assert found.hexdigest() == expected
    if sys.platform == "linux":
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 6 << 20  # KiB
