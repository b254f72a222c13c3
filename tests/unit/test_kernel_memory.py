"""The kernels by their contract: no byte outside of the arrays given, other threads at work meanwhile, compiled once.

Each array ends where memory ends, before a page that nobody may touch: who reads or writes beyond it ends the process.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import qmoecodec as q
from qmoecodec._kernels import decode, encode, tables, ternary
from qmoecodec._kernels.decode import BLOCK, SLACK
from qmoecodec.dictionary import table_from_phrases

LONGEST = 255
PAGE = mmap.PAGESIZE


def guarded(array: np.ndarray) -> np.ndarray:
    """Return a copy whose last byte is the last before a page without access."""
    array = np.ascontiguousarray(array)
    n_pages = -(-array.nbytes // PAGE) or 1
    memory = mmap.mmap(-1, (n_pages + 1) * PAGE)
    end = n_pages * PAGE
    first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(first + end), PAGE, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = np.frombuffer(memory, array.dtype, array.size, end - array.nbytes).reshape(array.shape)
    copy[...] = array
    copy.flags.writeable = array.flags.writeable  # for a kernel, another type
    return copy


def table(*phrases: bytes, code_bits: int = 8) -> q.Dictionary:
    """A table whose last phrases have the last codewords; the others are unused."""
    return table_from_phrases([b""] * ((1 << code_bits) - len(phrases)) + list(phrases), code_bits=code_bits)


#: Two, three and four nonzeros in the longest phrase, which is the last; before it phrases of 1, 16 and no digits.
DICTIONARIES = {
    f"{nonzeros}-nonzeros-{code_bits}": table(b"\1", b"", b"\0" * 15 + b"\2", b"\2",
                                              b"\0" * (LONGEST - nonzeros) + b"\1" * nonzeros, code_bits=code_bits)
    for nonzeros in (2, 3, 4) for code_bits in (8, 12, 16)
}  # fmt: skip
DICTIONARIES["words"] = table(b"\0", b"\1\2\1\2\1\2\1\2")  # as long as a word
SHORTER = {name.rpartition("-")[0]: d for name, d in DICTIONARIES.items() if name.endswith("-8")}


class Kernels:
    """The kernels on rows, all arrays guarded."""

    def __init__(self, d: q.Dictionary, rows: list[list[int]], cols: int) -> None:
        self.d, self.cols = d, cols
        data = [q.reference.pack_row(row, code_bits=d.code_bits) for row in rows]
        self.codes, self.lengths = guarded(np.frombuffer(b"".join(data), np.uint8)), guarded(np.uint32([len(r) for r in rows]))
        self.starts = guarded(np.cumsum([0, *map(len, data)]))
        self.tables = tables.DecodeTables(*(guarded(t) if isinstance(t, np.ndarray) else t for t in tables.decode_tables(d)))
        self.x = guarded(np.arange(1, cols + 1, dtype=np.float32))
        self.levels = guarded(np.float32([[-1, 2]] * len(rows)).reshape(-1, 2))

    @property
    def rows(self) -> tuple[Any, ...]:
        return self.codes, self.starts, self.lengths, self.d.code_bits, self.d.threshold

    def decode(self) -> tuple[int, np.ndarray]:
        t, out = self.tables, guarded(np.full((len(self.lengths), self.cols), 7, np.int8))
        return decode.decode(*self.rows, t.lengths, t.scatter, t.three, t.last_nonzero, t.words, out), out

    def histogram(self) -> tuple[int, np.ndarray]:
        out = guarded(np.zeros(len(self.tables.lengths), np.int64))
        return decode.histogram(*self.rows, self.cols, out), out

    def gather(self) -> tuple[int, np.ndarray]:
        t, out, spread = self.tables, guarded(np.zeros(len(self.lengths), np.float32)), guarded(decode.spread_x(self.x))
        end = decode.matvec_gather(*self.rows, t.gather, t.three, t.last_nonzero, self.levels, spread, self.cols, out)
        return end, out

    def copy(self) -> tuple[int, np.ndarray]:
        t, out = self.tables, guarded(np.zeros(len(self.lengths), np.float32))
        return decode.matvec_copy(*self.rows, t.lengths, t.last_nonzero, t.words, self.levels, self.x, out), out

    def products(self) -> list[tuple[int, np.ndarray]]:
        return [self.copy(), self.gather()] if len(self.tables.gather) else [self.copy()]

    def expected(self) -> np.ndarray | int:
        """Return digits, or the row that the reference refuses."""
        out = np.zeros((len(self.lengths), self.cols), np.int8)
        for r in range(len(self.lengths)):
            codes = self.codes[self.starts[r] : self.starts[r + 1]]
            try:
                out[r] = q.decode_rows(codes, self.lengths[r : r + 1], cols=self.cols, dictionary=self.d, backend="reference")
            except q.FormatError:
                return r
        return out


@pytest.mark.parametrize("name", DICTIONARIES)
def test_rows_that_end_with_the_memory(name: str) -> None:
    """Rows that are well, of even and odd numbers of codewords, and none."""
    d = DICTIONARIES[name]
    long = d.n_codewords - 1
    width = len(d.phrase(0, long))
    for rows in ([[long]], [[long], [], [long]], [[long] * 2] * 2, [[long] * BLOCK], [[long] * (BLOCK + 1)], [[]], []):
        for cols in {len(row) * width for row in rows} or {0, 5}:
            kernels = Kernels(d, rows, cols)
            expected = kernels.expected()
            end, out = kernels.decode()
            if isinstance(expected, int):
                assert end == expected
                assert [end for end, _ in kernels.products()] == [expected] * len(kernels.products())
                continue
            assert end == -1 and out.tolist() == expected.tolist()
            weights = np.where(expected < 0, -1.0, 2.0 * expected)
            for end, out in kernels.products():
                assert end == -1 and out.tolist() == (weights @ kernels.x).tolist()
            end, out = kernels.histogram()
            assert end == -1 and out.tolist() == np.bincount([c for row in rows for c in row], minlength=len(out)).tolist()


@pytest.mark.parametrize("name", DICTIONARIES)
@pytest.mark.parametrize("first", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1])
def test_rows_that_go_on_beyond_their_end(name: str, first: int) -> None:
    """Phrases up to the last column or the end of the row, then the longest: as many as columns are left, and more."""
    d = DICTIONARIES[name]
    long = d.n_codewords - 1
    before = long if name == "words" else long - 2
    position = first * len(d.phrase(0, before))
    for cols in (position, position + 1, (first + BLOCK) * len(d.phrase(0, long))):
        for more in {cols - first, 3 * BLOCK} - {0}:
            if position + more * len(d.phrase(0, long)) > cols:
                kernels = Kernels(d, [[before] * first + [long] * more], cols)
                assert kernels.expected() == kernels.decode()[0] == 0
                assert [end for end, _ in kernels.products()] == [0] * len(kernels.products())


@pytest.mark.parametrize("name", SHORTER)
def test_a_walk_stays_within_the_slack(name: str) -> None:
    """The memory for one row of digits: exactly what the kernels take is enough, whatever the codewords are."""
    d = DICTIONARIES[f"{name}-8"]
    t = tables.decode_tables(d)
    line = guarded(np.full(3 * BLOCK, 255, np.uint32))
    for cols, n in itertools.product([0, 1, 7, LONGEST - 1, LONGEST, BLOCK * LONGEST - 1, BLOCK * LONGEST], range(len(line) + 1)):
        scratch = guarded(np.zeros(cols + SLACK, np.int8))
        well = cols == n * LONGEST
        if len(t.scatter):
            assert decode._scatter_row(line, n, t.scatter, t.three, t.last_nonzero, scratch, cols) == well
        assert decode._copy_row(line, n, t.lengths, t.last_nonzero, t.words, scratch, cols) == well
    assert q.decode_rows(np.full(2, 255, np.uint8), np.uint32([2]), cols=2 * LONGEST, dictionary=d)[0, -1] == -1


@pytest.mark.parametrize("code_bits", [8, 12, 16])
def test_indices_of_a_row_take_no_more_than_its_codewords(code_bits: int) -> None:
    """Scratch of as many codewords as the row has, none among them; where the row begins does not matter."""
    threshold = 1 << (code_bits - 1)
    for n in range(20):
        row = [(k * 77 + 13) % (1 << code_bits) for k in range(n)]
        data = q.reference.pack_row(row, code_bits=code_bits)
        for begin in (0, 1, 5):
            codes = guarded(np.frombuffer(b"\xff" * begin + data, np.uint8))
            codewords, line = guarded(np.zeros(n, np.uint16)), guarded(np.zeros(n, np.uint32))
            assert decode.index_row(codes, begin, n, code_bits, threshold, codewords, line)
            states = [0, *(int(codeword >= threshold) for codeword in row)]
            assert line.tolist() == [state << code_bits | codeword for state, codeword in zip(states, row, strict=False)]
    d = table(b"\0", code_bits=code_bits)
    assert q.decode_rows(np.zeros(0, np.uint8), np.uint32([0]), cols=0, dictionary=d).shape == (1, 0)


def test_levels_that_end_with_the_memory() -> None:
    for rows, cols in ((1, 1), (3, 5), (2, 0), (0, 3)):
        digits = guarded((np.arange(rows * cols) % 3 - 1).astype(np.int8).reshape(rows, cols))
        levels, out = guarded(np.uint16([[9, 5]] * rows).reshape(rows, 2)), guarded(np.full((rows, cols), 7, np.uint16))
        ternary.fill_rows(digits, levels, out)
        assert out.tolist() == np.where(digits < 0, 9, np.where(digits > 0, 5, 0)).tolist()


def writes_while_others_run(kernel: Callable[..., Any], arguments: tuple[Any, ...], written: np.ndarray) -> bool:
    """Say whether this thread sees, while another runs a kernel, what the kernel has written first, but not what last."""
    kernel(*arguments)  # compiles
    assert written[0] and written[-1]
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        written[...] = 0
        thread = threading.Thread(target=kernel, args=arguments)
        thread.start()
        while thread.is_alive():
            first, last = written[0], written[-1]  # in this order
            if first and not last:
                thread.join()
                return True
    return False


def test_other_threads_run_while_a_kernel_works() -> None:
    """Were the interpreter locked, this thread would see all that a kernel writes at once."""
    rows, cols = 4000, 2000
    codes, lengths = np.full(rows * cols, 254, np.uint8), np.full(rows, cols, np.uint32)
    given = codes, np.arange(rows + 1) * cols, lengths, 8, 256
    levels, x = np.ones((rows, 2), np.float32), np.ones(cols, np.float32)
    out, sums, counts = np.zeros((rows, cols), np.int8), np.zeros(rows, np.float32), np.zeros(256, np.int64)
    few, many = (tables.decode_tables(table(b"\2", long)) for long in (b"\2\2", b"\2\2\2\2"))
    gather = *given, few.gather, few.three, few.last_nonzero, levels, decode.spread_x(x), cols, sums
    assert decode.matvec_gather(*gather) == -1 and (sums == cols).all()
    assert writes_while_others_run(decode.matvec_gather, gather, sums)
    copy = *given, many.lengths, many.last_nonzero, many.words, levels, x, sums
    assert decode.matvec_copy(*copy) == -1 and (sums == cols).all()
    assert writes_while_others_run(decode.matvec_copy, copy, sums)
    digits = *given, few.lengths, few.scatter, few.three, few.last_nonzero, few.words, out
    assert decode.decode(*digits) == -1 and out.all()
    assert writes_while_others_run(decode.decode, digits, out[:, -1])
    last = codes.copy()
    last[-1] = 255
    assert writes_while_others_run(decode.histogram, (last, *given[1:], cols, counts), counts[254:])
    bits = np.zeros((rows, cols), np.uint32)
    assert writes_while_others_run(ternary.fill_rows, (out, np.ones((rows, 2), np.uint32), bits), bits[:, -1])
    n = 20_000
    phrases = np.full(n, LONGEST, np.uint8), np.zeros(n, np.uint32), np.full(LONGEST, 2, np.uint8)
    filled = np.zeros(n, np.uint64), np.zeros(n, np.uint64), np.zeros(n, np.uint8)
    arrays = (*phrases, *filled, np.zeros((n, 256), np.uint8), np.zeros((n, 3), np.int64))
    assert writes_while_others_run(tables._fill_decode_tables, arrays, filled[2])


COMPILED = (
    decode._unpack_codewords, decode.index_row, decode._scatter_row, decode._copy_row, decode._room, decode.decode,
    decode.histogram, decode.matvec_gather, decode._signed_sums, decode.matvec_copy, ternary.fill_rows, ternary.split_rows,
    tables._fill_decode_tables, tables._build_trie, encode.encode_aivf, encode.encode_table,
)  # fmt: skip


@pytest.mark.parametrize("kernel", COMPILED, ids=lambda kernel: kernel.__name__)
def test_machine_code_is_kept_in_files(kernel: Any) -> None:
    """A second process does not compile again."""
    assert kernel.stats.cache_path is not None
