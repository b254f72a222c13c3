"""Encoders: rows of digits to bytes of codewords (spec §5.1, §5.3)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import int64, uint8, uint16, uint32, uint64

from qmoecodec._kernels.tables import STEP_COUNT_SHIFT, STEP_FIRST_SHIFT, STEP_SECOND_SHIFT
from qmoecodec._numba import njit

#: Rows encoded side by side, so that their table look-ups overlap.
LANES = 4


@njit(cache=True, nogil=True)
def pack_codewords(codewords: Any, n: int, code_bits: int, out: Any, at: int) -> int:
    """Write n codewords from byte `at` of `out` (spec §5.3); return the byte after them. Trusts that they fit."""
    if code_bits == 8:
        for k in range(n):
            out[at + k] = codewords[k]
        return at + n
    if code_bits == 16:
        for k in range(n):
            out[at + 2 * k] = codewords[k] & 255
            out[at + 2 * k + 1] = codewords[k] >> 8
        return at + 2 * n
    for k in range(0, n - 1, 2):
        pair = uint32(codewords[k]) | uint32(codewords[k + 1]) << uint32(12)
        out[at] = pair & 255
        out[at + 1] = pair >> 8 & 255
        out[at + 2] = pair >> 16
        at += 3
    if n & 1:
        out[at] = codewords[n - 1] & 255
        out[at + 1] = codewords[n - 1] >> 8
        at += 2
    return at


@njit(cache=True, nogil=True)
def encode_aivf(digits: Any, steps: Any, final: Any, code_bits: int, out: Any, row_lengths: Any) -> int:
    """Encode rows with the automaton of an aivf dictionary; return the bytes written.

    digits : int8[rows, cols], values -1, 0, 1 (trusted)
    steps, final : EncodeTables
    out : uint8[rows * ceil(cols * code_bits / 8)] at least (trusted); row_lengths : uint32[rows], written

    Naive form, one row:
        node = root of tree 0
        for digit in row: emit the codewords of step (node, digit); node = its next node
        emit the node's final codeword, if it is not a root
    Here LANES rows advance together, and every step stores two codewords and moves on by 0, 1 or 2 of them, so that the
    loop has no branch. A codeword takes at least one digit: a row never needs more than cols of them.
    """
    rows, cols = digits.shape
    lanes = np.empty((LANES, cols + 2), np.uint16)
    nodes = np.zeros(LANES, np.uint64)
    ends = np.zeros(LANES, np.uint64)
    at = 0
    first = 0
    while first < rows:
        here = min(LANES, rows - first)
        if here == LANES:
            n0 = n1 = n2 = n3 = uint64(0)
            p0 = p1 = p2 = p3 = uint64(0)
            d0, d1, d2, d3 = digits[first], digits[first + 1], digits[first + 2], digits[first + 3]
            l0, l1, l2, l3 = lanes[0], lanes[1], lanes[2], lanes[3]
            for c in range(cols):
                s0 = steps[n0 + uint64(uint8(d0[c]) & uint8(3))]
                s1 = steps[n1 + uint64(uint8(d1[c]) & uint8(3))]
                s2 = steps[n2 + uint64(uint8(d2[c]) & uint8(3))]
                s3 = steps[n3 + uint64(uint8(d3[c]) & uint8(3))]
                l0[p0] = uint16(s0 >> uint64(STEP_FIRST_SHIFT))
                l1[p1] = uint16(s1 >> uint64(STEP_FIRST_SHIFT))
                l2[p2] = uint16(s2 >> uint64(STEP_FIRST_SHIFT))
                l3[p3] = uint16(s3 >> uint64(STEP_FIRST_SHIFT))
                l0[p0 + uint64(1)] = uint16(s0 >> uint64(STEP_SECOND_SHIFT))
                l1[p1 + uint64(1)] = uint16(s1 >> uint64(STEP_SECOND_SHIFT))
                l2[p2 + uint64(1)] = uint16(s2 >> uint64(STEP_SECOND_SHIFT))
                l3[p3 + uint64(1)] = uint16(s3 >> uint64(STEP_SECOND_SHIFT))
                p0 += (s0 >> uint64(STEP_COUNT_SHIFT)) & uint64(3)
                p1 += (s1 >> uint64(STEP_COUNT_SHIFT)) & uint64(3)
                p2 += (s2 >> uint64(STEP_COUNT_SHIFT)) & uint64(3)
                p3 += (s3 >> uint64(STEP_COUNT_SHIFT)) & uint64(3)
                n0 = s0 & uint64(0xFFFFFF)
                n1 = s1 & uint64(0xFFFFFF)
                n2 = s2 & uint64(0xFFFFFF)
                n3 = s3 & uint64(0xFFFFFF)
            nodes[0], nodes[1], nodes[2], nodes[3] = n0, n1, n2, n3
            ends[0], ends[1], ends[2], ends[3] = p0, p1, p2, p3
        else:
            for lane in range(here):
                node = position = uint64(0)
                for c in range(cols):
                    step = steps[node + uint64(uint8(digits[first + lane, c]) & uint8(3))]
                    lanes[lane, position] = uint16(step >> uint64(STEP_FIRST_SHIFT))
                    lanes[lane, position + uint64(1)] = uint16(step >> uint64(STEP_SECOND_SHIFT))
                    position += (step >> uint64(STEP_COUNT_SHIFT)) & uint64(3)
                    node = step & uint64(0xFFFFFF)
                nodes[lane], ends[lane] = node, position
        for lane in range(here):
            n = int64(ends[lane])
            last = final[nodes[lane] >> uint64(2)]
            if last >= 0:
                lanes[lane, n] = last
                n += 1
            row_lengths[first + lane] = n
            at = pack_codewords(lanes[lane], n, code_bits, out, at)
        first += here
    return at


@njit(cache=True, nogil=True)
def encode_table(digits: Any, children: Any, codeword: Any, code_bits: int, out: Any, row_lengths: Any) -> Any:
    """Encode rows by longest match over one parse tree; return (bytes written, first row that cannot be encoded or -1).

    digits : int8[rows, cols], values -1, 0, 1 (trusted); children, codeword : Trie; out, row_lengths as in encode_aivf
    """
    rows, cols = digits.shape
    line = np.empty(cols + 1, np.uint16)
    at = 0
    for r in range(rows):
        n = 0
        c = 0
        while c < cols:
            node = depth = best = 0
            best_codeword = -1
            while True:
                digit = digits[r, c + depth] if c + depth < cols else 0
                node = children[node, 1 if digit < 0 else 2 * digit]
                if node < 0:
                    break
                depth += 1
                if codeword[node] >= 0:
                    best, best_codeword = depth, codeword[node]
                    if c + depth >= cols:
                        break
            if best_codeword < 0:
                return at, r
            line[n] = best_codeword
            n += 1
            c += best
        row_lengths[r] = n
        at = pack_codewords(line, n, code_bits, out, at)
    return at, -1
