"""The compiled kernels against the reference: every short sequence of codewords, every width, every kind of phrase."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Sequence

import numpy as np
import pytest

import qmoecodec as q
from qmoecodec._kernels.decode import BLOCK
from qmoecodec.codec.rows import explain
from qmoecodec.dictionary import aivf_from_symbols, table_from_phrases

LEAF, INCOMPLETE, INTERNAL = 0, 1, 2
WIDTHS = range(12)


def trees(code_bits: int) -> q.Dictionary:
    """Two states; the incomplete node of tree 0 has the codeword in the middle, which uses the upper bits."""
    first = [INTERNAL, INCOMPLETE, LEAF, LEAF, LEAF, LEAF, LEAF]  # 0, 00, 000, 0-, 0+, -, +
    return aivf_from_symbols([np.array(first, np.uint8), np.array([LEAF, LEAF], np.uint8)], code_bits=code_bits,
                             threshold=1 << (code_bits - 1))  # fmt: skip


def table(code_bits: int, phrases: Sequence[bytes]) -> tuple[q.Dictionary, list[int]]:
    """A table whose phrases have codewords all over the range, and these codewords with an unused one."""
    n = 1 << code_bits
    codewords = [0, n - 1, n // 2 + 1, n // 16 + 3, n // 3, 7][: len(phrases)]
    full = [b""] * n
    for codeword, phrase in zip(codewords, phrases, strict=True):
        full[codeword] = phrase
    return table_from_phrases(full, code_bits=code_bits), [*codewords, n - 2]


def pack(rows: Sequence[Sequence[int]], code_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Write rows of codewords as bytes."""
    data = b"".join(q.reference.pack_row(row, code_bits=code_bits) for row in rows)
    return np.frombuffer(data, np.uint8), np.array([len(row) for row in rows], np.uint32)


CASES = {
    **{f"trees-{bits}": (trees(bits), [0, 1, 3, 1 << (bits - 1), 5]) for bits in (8, 12, 16)},
    "two-nonzeros": table(8, [b"\0", b"\2\0\1", b"\0\1\0\0", b"\1\1"]),
    "three-nonzeros": table(8, [b"\0\0", b"\1\2\1", b"\0\2\0\1\2", b"\2"]),
    "four-nonzeros": table(8, [b"\0", b"\1\2\1\2", b"\0\0\0\0\0\0\0\0\2", b"\1\0"]),
    "three-nonzeros-12": table(12, [b"\0\0", b"\1\2\1", b"\0\2\0\1\2", b"\2"]),
    "four-nonzeros-16": table(16, [b"\0", b"\1\2\1\2\0\0\0\0", b"\2\0"]),
}


def outcome(call: Callable[..., np.ndarray], *arguments: object, **options: object) -> list[object]:
    """Return the values, or reason and place of the error."""
    try:
        return call(*arguments, **options).tolist()  # type: ignore[no-any-return]
    except q.FormatError as error:
        return [error.reason, error.where]


def product(digits: list[object], levels: np.ndarray, x: np.ndarray) -> list[object]:
    """Return what multiplying digits gives; an error as it is."""
    if digits and isinstance(digits[0], str):
        return digits
    numbers = np.array(digits, int).reshape(len(levels), len(x))
    return (np.where(numbers < 0, levels[:, :1], np.where(numbers > 0, levels[:, 1:], 0)) @ x).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CASES)
def test_every_short_row(name: str) -> None:
    """Decoding and multiplying accept, refuse and give the same as the reference; numbers are whole, so sums are exact."""
    d, codewords = CASES[name]
    x = np.float32([3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41])
    levels = np.float32([[-2, 64]])
    accepted = refused = 0
    for n in range(4):
        for row in itertools.product(codewords[:4] if n == 3 else codewords, repeat=n):
            codes, lengths = pack([row], d.code_bits)
            for cols in WIDTHS:
                expected = outcome(q.decode_rows, codes, lengths, cols=cols, dictionary=d, backend="reference")
                assert outcome(q.decode_rows, codes, lengths, cols=cols, dictionary=d) == expected
                multiplied = outcome(q.matvec_rows, codes, lengths, levels, x[:cols], dictionary=d)
                assert multiplied == product(expected, levels, x[:cols])
                if isinstance(expected[0], str):
                    refused += 1
                    continue
                accepted += 1
                counts = q.count_digits(codes, lengths, rows=1, cols=cols, dictionary=d)
                assert counts.tolist() == [expected[0].count(v) for v in (0, -1, 1)]  # type: ignore[attr-defined]
    assert accepted > 20 and refused > 200


@pytest.mark.parametrize("name", ["trees-8", "trees-12", "three-nonzeros", "four-nonzeros"])
@pytest.mark.parametrize("n", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1, 3 * BLOCK + 5])
def test_rows_of_whole_blocks(name: str, n: int) -> None:
    """Rows that end before, at and after the places where the kernels look at the end of the row."""
    d, codewords = CASES[name]
    one = next(c for c in codewords if len(d.phrase(0, c)) == 1 or d.phrase(0, c) in ((0, 0), (0, 1)))
    width, good = len(d.phrase(0, one)), [one] * n
    rows = [(good, n * width + extra) for extra in (-BLOCK * width, -width, -1, 0, 1)]
    rows += [([*good[:k], codewords[-1], *good[k + 1 :]], n * width) for k in range(0, n, 5)]  # with one that is unused
    levels = np.float32([[-1, 1], [-3, 3]])
    for row, cols in rows:
        if cols >= 0:
            codes, lengths = pack([good, row], d.code_bits)
            expected = outcome(q.decode_rows, codes, lengths, cols=cols, dictionary=d, backend="reference")
            assert outcome(q.decode_rows, codes, lengths, cols=cols, dictionary=d) == expected
            x = np.arange(cols, dtype=np.float32)
            assert outcome(q.matvec_rows, codes, lengths, levels, x, dictionary=d) == product(expected, levels, x)


@pytest.mark.parametrize("code_bits", [8, 12, 16])
def test_rows_lie_back_to_back(code_bits: int) -> None:
    """Rows of different lengths, empty ones among them: each begins where the one before ends, in state 0."""
    d = trees(code_bits)
    incomplete = 1 << (code_bits - 1)
    rows = [[0], [incomplete, 1, 0], [3, incomplete], [1, 2, 3, 4], [], [incomplete, 0, 0]]
    for begin, end in itertools.combinations(range(len(rows) + 1), 2):
        codes, lengths = pack(rows[begin:end], code_bits)
        for cols in range(10):
            expected = outcome(q.decode_rows, codes, lengths, cols=cols, dictionary=d, backend="reference")
            assert outcome(q.decode_rows, codes, lengths, cols=cols, dictionary=d) == expected


@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_unused_bits_at_the_end_of_a_row(backend: str) -> None:
    """Each bit of the padding counts, for odd numbers of 12-bit codewords."""
    d = trees(12)
    for n in (1, 3):
        codes, lengths = pack([[3] * n, [4] * n], 12)
        for row in (0, 1):
            for bit in range(4, 8):
                damaged = codes.copy()
                damaged[(row + 1) * len(codes) // 2 - 1] |= 1 << bit
                with pytest.raises(q.FormatError) as caught:
                    q.decode_rows(damaged, lengths, cols=n, dictionary=d, backend=backend)
                assert (caught.value.reason, caught.value.where) == ("row_padding", {"row": row})
        for row in (0, 1):
            damaged = codes.copy()
            damaged[(row + 1) * len(codes) // 2 - 1] |= 1 << 4
            with pytest.raises(q.FormatError) as caught:
                q.count_digits(damaged, lengths, rows=2, cols=n, dictionary=d)
            assert (caught.value.reason, caught.value.where) == ("row_padding", {"row": row})


def test_counts_are_refused_where_digits_are_missing() -> None:
    d, codewords = CASES["two-nonzeros"]
    codes, lengths = pack([[codewords[1]] * 2], 8)
    assert q.count_digits(codes, lengths, rows=1, cols=6, dictionary=d).tolist() == [2, 2, 2]
    assert q.count_digits(codes, lengths, rows=1, cols=5, dictionary=d).tolist() == [1, 2, 2]
    with pytest.raises(q.FormatError, match="row_underrun"):
        q.count_digits(codes, lengths, rows=1, cols=7, dictionary=d)
    codes, lengths = pack([[codewords[1], codewords[-1]]], 8)
    with pytest.raises(q.FormatError, match="unused_codeword"):
        q.count_digits(codes, lengths, rows=1, cols=3, dictionary=d)


def test_a_row_that_a_kernel_refuses_and_the_reference_accepts_is_a_bug() -> None:
    codes, lengths = pack([[3], [3, 3], [0]], 8)
    with pytest.raises(AssertionError, match="row 1"):
        explain(codes, np.array([0, 1, 3, 4]), lengths, 1, cols=2, dictionary=trees(8))


@pytest.mark.parametrize("nonzeros", [1, 3, 4])
@pytest.mark.parametrize("cols", [17, 256, 5000])
def test_a_row_that_goes_on_for_megabytes_is_refused_at_its_end(nonzeros: int, cols: int) -> None:
    """Nothing is written where the digits beyond the end of the row would be: that is far outside of all memory taken."""
    long = b"\0" * (255 - nonzeros) + b"\2" * nonzeros
    d = table_from_phrases([long, b"\0", *[b""] * 254], code_bits=8)
    for first in (0, 17):
        row = np.zeros(200_000, np.uint8)
        row[:first] = 1
        lengths = np.array([len(row)], np.uint32)
        expected = ["row_overrun", {"row": 0, "codeword": min(cols, first) + -(-max(cols - first, 0) // 255)}]
        assert outcome(q.decode_rows, row, lengths, cols=cols, dictionary=d) == expected
        levels, x = np.ones((1, 2), np.float32), np.ones(cols, np.float32)
        assert outcome(q.matvec_rows, row, lengths, levels, x, dictionary=d) == expected


@pytest.mark.parametrize("code_bits", [8, 12, 16])
def test_a_long_row_is_explained_in_time_that_grows_with_its_length(code_bits: int) -> None:
    """A row of 600,000 codewords: as one large number it would take minutes."""
    d = table_from_phrases([b"\0", b"\2", *[b""] * ((1 << code_bits) - 2)], code_bits=code_bits)
    pair = (1 << code_bits | 1).to_bytes(code_bits // 4, "little")
    codes, lengths = np.frombuffer(pair * 300_000, np.uint8), np.array([600_000], np.uint32)
    assert outcome(q.decode_rows, codes, lengths, cols=17, dictionary=d) == ["row_overrun", {"row": 0, "codeword": 17}]


def test_kernels_do_without_a_cache_on_disk() -> None:
    """A user without home directory, in an installation of somebody else, has no place for Numba's cache."""
    program = (
        "import sys, warnings, numpy as np, numba.core.caching as caching\n"
        "for kind in (caching.CacheImpl, *caching.CacheImpl.__subclasses__()): kind._locator_classes = []\n"
        "import qmoecodec as q\n"
        "digits = np.zeros((2, 3), np.int8)\n"
        "with warnings.catch_warnings(record=True) as found:\n"
        "    warnings.simplefilter('always')\n"
        "    assert (q.decode(q.encode(digits)) == digits).all()\n"
        "assert [w.category for w in found] == [RuntimeWarning], found\n"
        "assert 'NUMBA_CACHE_DIR' in str(found[0].message)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def resident(key: str) -> int:
    """Return bytes of this process: VmRSS now, VmHWM at most."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(key))


@pytest.mark.parametrize("code_bits", [8, 12, 16])
def test_a_row_that_goes_on_takes_no_more_memory_than_its_bytes(code_bits: int) -> None:
    """No row that is well has more codewords than columns: the others are neither laid out nor read to their end."""
    d = table_from_phrases([b"\0", b"\2", *[b""] * ((1 << code_bits) - 2)], code_bits=code_bits)
    codes, lengths = np.ones(48 << 20, np.uint8), np.uint32([(48 << 20) * 8 // code_bits])
    codes[:24] = 0
    levels, x = np.ones((1, 2), np.float32), np.ones(3, np.float32)
    expected = ["row_overrun", {"row": 0, "codeword": 3}]
    calls = [
        lambda c, n: outcome(q.decode_rows, c, n, cols=3, dictionary=d),
        lambda c, n: outcome(q.decode_rows, c, n, cols=3, dictionary=d, backend="reference"),
        lambda c, n: outcome(q.matvec_rows, c, n, levels, x, dictionary=d),
        lambda c, n: outcome(q.count_digits, c, n, rows=1, cols=3, dictionary=d),
    ]
    for call in calls:
        assert call(codes[:12], np.uint32([12 * 8 // code_bits])) == expected  # compiles
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # from here on the highest is counted
        before = resident("VmRSS:")
        assert call(codes, lengths) == expected
        assert resident("VmHWM:") - before < 60 << 20
