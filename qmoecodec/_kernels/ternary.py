"""Kernels between dense rows and digits with levels, on the bits of the numbers (spec §6.3).

Trusted: arrays are C-contiguous, of the shapes given, and of one unsigned type per call.
"""

from __future__ import annotations

from typing import Any

from qmoecodec._numba import njit

# Columns that are looked at in one vectorised step before the exact one.
_BLOCK = 512


@njit(nogil=True, cache=True)
def split_rows(bits: Any, sign: Any, exponent: Any, digits: Any, levels: Any) -> int:
    """Split rows into digits and levels; return the first row that is not ternary, or -1.

    bits : uint[rows, cols]    the numbers' bits
    sign, exponent : the type's sign bit and exponent bits
    digits : int8[rows, cols]    out
    levels : uint[rows, 2]    out, low and high level, 0 where unused

    Per row: collect the distinct numbers other than +0 ("first" and "second"); fail at a third, at -0, at infinity and
    NaN; then compare every number with the two.
    """
    rows, cols = bits.shape
    zero = bits.dtype.type(0)
    for r in range(rows):
        row = bits[r]
        first = zero
        second = zero
        begin = 0
        while begin < cols:
            end = min(begin + _BLOCK, cols)
            n_new = 0
            for k in range(begin, end):
                v = row[k]
                n_new += (v != zero) & (v != first) & (v != second)
            if n_new:
                for k in range(begin, end):
                    v = row[k]
                    if v != zero and v != first and v != second:
                        if v == sign or (v & exponent) == exponent:
                            return r
                        if first == zero:
                            first = v
                        elif second == zero:
                            second = v
                        else:
                            return r
            begin = end
        if second == zero:
            low = first if first & sign else zero
            high = zero if first & sign else first
        else:
            # Sign and magnitude: below zero the larger magnitude is the smaller number.
            both_negative = (first & sign) != zero and (second & sign) != zero
            if (first & sign) != (second & sign):
                ascending = (first & sign) != zero
            elif both_negative:
                ascending = first > second
            else:
                ascending = first < second
            low = first if ascending else second
            high = second if ascending else first
        levels[r, 0] = low
        levels[r, 1] = high
        # An unused level must not match the zeros; -0 does not occur in the row.
        low_match = low if low != zero else sign
        high_match = high if high != zero else sign
        out = digits[r]
        for k in range(cols):
            v = row[k]
            out[k] = (v == high_match) * 1 - (v == low_match) * 1
    return -1


@njit(nogil=True, cache=True)
def fill_rows(digits: Any, levels: Any, out: Any) -> None:
    """Replace digits by levels.

    digits : int8[rows, cols]
    levels : uint[rows, 2]    low and high level
    out : uint[rows, cols]    out
    """
    rows, cols = digits.shape
    zero = out.dtype.type(0)
    for r in range(rows):
        low = levels[r, 0]
        high = levels[r, 1]
        source = digits[r]
        target = out[r]
        for k in range(cols):
            d = source[k]
            target[k] = high if d > 0 else (low if d < 0 else zero)
