"""Decoders: bytes of codewords to digits, digit counts, and the fused matrix-vector product (spec §5.2, §5.3).

All kernels take rows as (codes, row_starts, row_lengths): row r has row_lengths[r] codewords of code_bits bits from byte
row_starts[r] on. They trust that those bytes exist; they trust no codeword. A row that breaks a rule of §5.2 or §5.3 ends
the kernel, which returns that row's number, or -1 when all is well; the caller asks the reference codec what is wrong.
What Python calls lets other threads run meanwhile.

Each row is read in two passes. The first (`index_row`) turns its codewords into table indices, state included; as the
state depends on the preceding codeword alone, the compiler makes that a loop over vectors. The second walks the table.
Its position only grows, so it is compared with the row's end once in BLOCK codewords, for the sake of memory, and exactly
at the end: if the last codeword begins inside the row, so do all others.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
from numba import float32, int8, int64, uint32, uint64

from qmoecodec._kernels.memory import add_pair, clear_bytes, copy_bytes, high_float, low_float, store_u64
from qmoecodec._numba import njit
from qmoecodec.types import MAX_PHRASE

#: Codewords between two comparisons of the position with the end of the row.
BLOCK: Final = 16
#: Digits that a walk may reach beyond the end of a row: a block of the longest phrases.
SLACK: Final = BLOCK * MAX_PHRASE
#: Bit of a table entry that marks an unused codeword.
UNUSED_BIT: Final = 63


@njit(cache=True)
def _unpack_codewords(codes: Any, start: int, n: int, code_bits: int, out: Any) -> bool:
    """Read n codewords into out (uint16[n] or more); say whether the row's unused bits are 0."""
    if code_bits == 8:
        row = codes[start:]
        for k in range(n):
            out[k] = row[k]
        return True
    if code_bits == 16:
        row = codes[start:]
        for k in range(n):
            out[k] = row[2 * k] | row[2 * k + 1] << 8
        return True
    at = start
    for k in range(0, n - 1, 2):
        triple = uint32(codes[at]) | uint32(codes[at + 1]) << uint32(8) | uint32(codes[at + 2]) << uint32(16)
        out[k] = triple & uint32(0xFFF)
        out[k + 1] = triple >> uint32(12)
        at += 3
    if n & 1:
        out[n - 1] = codes[at] | (codes[at + 1] & 15) << 8
        return codes[at + 1] < 16
    return True


@njit(cache=True)
def index_row(codes: Any, start: int, n: int, code_bits: int, threshold: int, codewords: Any, line: Any) -> bool:
    """Write state << code_bits | codeword for the n codewords of a row into line (uint32[n] or more).

    codewords : uint16[n] or more, scratch. Returns whether the row's unused bits are 0.
    """
    if n == 0:
        return True
    well = _unpack_codewords(codes, start, n, code_bits, codewords)
    line[0] = codewords[0]
    here, before, rest = codewords[1:n], codewords, line[1:n]
    shift, limit = uint32(code_bits), uint32(threshold)
    for k in range(len(rest)):
        rest[k] = uint32(here[k]) | uint32(uint32(before[k]) >= limit) << shift
    return well


@njit(cache=True)
def _scatter_row(line: Any, n: int, scatter: Any, three: bool, last: Any, scratch: Any, cols: int) -> bool:
    """Decode one row whose phrases have at most two or three nonzeros: clear it, then store as many digits per codeword."""
    if n == 0:
        return cols == 0
    clear_bytes(scratch, int64(cols))
    limit, count = uint64(cols), uint64(n)
    position = length = seen = k = uint64(0)
    byte = uint64(255)
    while k < count:
        if position >= limit:
            return False
        stop = min(k + uint64(BLOCK), count)
        while k < stop:
            entry = scatter[line[k]]
            scratch[position + (entry >> uint64(8) & byte)] = int8(entry >> uint64(32))
            scratch[position + (entry >> uint64(16) & byte)] = int8(entry >> uint64(40))
            if three:
                scratch[position + (entry >> uint64(24) & byte)] = int8(entry >> uint64(48))
            length = entry & byte
            position += length
            seen |= entry
            k += uint64(1)
    if seen >> uint64(UNUSED_BIT) or position < limit or position - length >= limit:
        return False
    return position - length + uint64(last[line[n - 1]]) <= limit


@njit(cache=True)
def _copy_row(line: Any, n: int, lengths: Any, last: Any, words: Any, scratch: Any, cols: int) -> bool:
    """Decode one row of any dictionary: copy each phrase, eight digits at a time."""
    limit = uint64(cols)
    position = length = uint64(0)
    for k in range(n):
        index = line[k]
        length = uint64(lengths[index])
        if length == uint64(0) or position >= limit:
            return False
        store_u64(scratch, position, words[index, 0])
        for w in range(1, (length + uint64(7)) >> uint64(3)):
            store_u64(scratch, position + uint64(8 * w), words[index, w])
        position += length
    if position < limit:
        return False
    return n == 0 or position - length + uint64(last[line[n - 1]]) <= limit


@njit(cache=True)
def _room(row_lengths: Any, cols: int) -> int:
    """Return the codewords of the longest row that may be well: each is at least one digit."""
    most = 0
    for n in row_lengths:
        most = max(most, int64(n))
    return min(most, cols)


@njit(cache=True, nogil=True)
def decode(
    codes: Any, row_starts: Any, row_lengths: Any, code_bits: int, threshold: int,
    lengths: Any, scatter: Any, three: bool, last: Any, words: Any, out: Any,
) -> int:
    """Decode rows into out (int8[rows, cols], C-contiguous); see the module's text for the contract."""
    rows, cols = out.shape
    flat = out.reshape(rows * cols)
    scratch = np.empty(cols + SLACK, np.int8)
    room = _room(row_lengths, cols)
    codewords, line = np.empty(room, np.uint16), np.empty(room, np.uint32)
    for r in range(rows):
        n = int64(row_lengths[r])
        if n > cols or not index_row(codes, row_starts[r], n, code_bits, threshold, codewords, line):
            return r
        if len(scatter):
            if not _scatter_row(line, n, scatter, three, last, scratch, cols):
                return r
        elif not _copy_row(line, n, lengths, last, words, scratch, cols):
            return r
        copy_bytes(flat, int64(r * cols), scratch, int64(cols))
    return -1


@njit(cache=True, nogil=True)
def histogram(
    codes: Any, row_starts: Any, row_lengths: Any, code_bits: int, threshold: int, cols: int, out: Any
) -> int:
    """Count the codewords of rows by (state, codeword) into out (int64[states << code_bits]), added to what is there."""
    room = _room(row_lengths, cols)
    codewords, line = np.empty(room, np.uint16), np.empty(room, np.uint32)
    for r in range(len(row_lengths)):
        n = int64(row_lengths[r])
        if n > cols or not index_row(codes, row_starts[r], n, code_bits, threshold, codewords, line):
            return r
        for k in range(n):
            out[line[k]] += 1
    return -1


def spread_x(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Lay x out for the fused kernel: 0, 0, x[0], 0, 0, x[1], ... and zeros that a walk may reach beyond the end."""
    out = np.zeros((len(x) + SLACK, 3), np.float32)
    out[: len(x), 2] = x
    return out.ravel()


@njit(cache=True, nogil=True)
def matvec_gather(
    codes: Any, row_starts: Any, row_lengths: Any, code_bits: int, threshold: int,
    gather: Any, three: bool, last: Any, levels: Any, spread: Any, cols: int, out: Any,
) -> int:
    """Multiply rows with x without decoding them; phrases have at most two nonzeros, or three.

    levels : float32[rows, 2]; spread : spread_x(x); out : float32[rows], written

    Naive form, one row:
        for codeword, position in row:
            for (offset, sign) in nonzeros of its phrase: sums[sign] += x[position + offset]
        out = low level * sums[-] + high level * sums[+]
    1. Two neighbouring floats of `spread` are (0, x) for +, (x, 0) for - and (0, 0) for a nonzero that is not there, so each
       nonzero is one load of a pair and one addition of a pair, without a branch.
    2. The first, second and third nonzeros have sums of their own: three chains of additions instead of one.
    3. Unused codewords are seen by or-ing all entries, not by looking at each.
    """
    room = _room(row_lengths, cols)
    codewords, line = np.empty(room, np.uint16), np.empty(room, np.uint32)
    limit = uint64(3 * cols)
    field = uint64(0xFFFF)
    for r in range(len(row_lengths)):
        n = int64(row_lengths[r])
        if n > cols or not index_row(codes, row_starts[r], n, code_bits, threshold, codewords, line):
            return r
        count = uint64(n)
        position = length = seen = k = uint64(0)
        a = b = c = uint64(0)  # pairs of float32
        while k < count:
            if position >= limit:
                return r
            stop = min(k + uint64(BLOCK), count)
            while k < stop:
                entry = gather[line[k]]
                a = add_pair(a, spread, position + (entry >> uint64(16) & field))
                b = add_pair(b, spread, position + (entry >> uint64(32) & field))
                if three:
                    c = add_pair(c, spread, position + (entry >> uint64(48) & uint64(0x7FFF)))
                length = entry & field
                position += length
                seen |= entry
                k += uint64(1)
        if n:
            if seen >> uint64(UNUSED_BIT) or position < limit or position - length >= limit:
                return r
            if position - length + uint64(3) * uint64(last[line[n - 1]]) > limit:
                return r
        elif cols:
            return r
        minus = low_float(a) + low_float(b) + low_float(c)
        plus = high_float(a) + high_float(b) + high_float(c)
        out[r] = levels[r, 0] * minus + levels[r, 1] * plus
    return -1


@njit(cache=True, fastmath={"reassoc", "nsz"})
def _signed_sums(digits: Any, x: Any) -> Any:
    """Return the sums of x where digits are -1 and where they are 1; reassociated, so that it runs on vectors."""
    minus = plus = float32(0)
    for c in range(len(x)):
        minus += x[c] if digits[c] < 0 else float32(0)
        plus += x[c] if digits[c] > 0 else float32(0)
    return minus, plus


@njit(cache=True, nogil=True)
def matvec_copy(
    codes: Any, row_starts: Any, row_lengths: Any, code_bits: int, threshold: int,
    lengths: Any, last: Any, words: Any, levels: Any, x: Any, out: Any,
) -> int:
    """Multiply rows with x by decoding one row at a time into a buffer that stays in the cache; any dictionary."""
    cols = len(x)
    scratch = np.empty(cols + SLACK, np.int8)
    room = _room(row_lengths, cols)
    codewords, line = np.empty(room, np.uint16), np.empty(room, np.uint32)
    for r in range(len(row_lengths)):
        n = int64(row_lengths[r])
        if n > cols or not index_row(codes, row_starts[r], n, code_bits, threshold, codewords, line):
            return r
        if not _copy_row(line, n, lengths, last, words, scratch, cols):
            return r
        minus, plus = _signed_sums(scratch, x)
        out[r] = levels[r, 0] * minus + levels[r, 1] * plus
    return -1
