"""Rows that hold only 0, one low and one high level: find them by value, bit for bit, and write them again (spec §6.3)."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from qmoecodec.errors import FormatError
from qmoecodec.types import AnyArray, Int8Array

#: The unsigned type of a float dtype's bits.
BITS_TYPE: Final[dict[str, Any]] = {"F16": np.uint16, "BF16": np.uint16, "F32": np.uint32, "F64": np.uint64}
_EXPONENT: Final = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F80_0000, "F64": 0x7FF0_0000_0000_0000}
#: numpy's type of a dtype; the types that numpy lacks are given as their bits.
NUMPY_TYPE: Final[dict[str, Any]] = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "F8_E5M2": np.uint8, "F8_E4M3": np.uint8, "F8_E8M0": np.uint8,
    "I16": np.int16, "U16": np.uint16, "F16": np.float16, "BF16": np.uint16, "I32": np.int32, "U32": np.uint32,
    "F32": np.float32, "C64": np.complex64, "F64": np.float64, "I64": np.int64, "U64": np.uint64,
}  # fmt: skip


def sign_bit(dtype: str) -> Any:
    """Return the bits of -0 in a float dtype."""
    unsigned = BITS_TYPE[dtype]
    return unsigned(1 << (8 * np.dtype(unsigned).itemsize - 1))


def split_rows(bits: AnyArray, *, dtype: str) -> tuple[Int8Array, AnyArray, int]:
    """Split dense rows into digits and levels (spec §6.3).

    bits : uint[rows, cols]    the bits of numbers of float dtype `dtype`
    Returns digits int8[rows, cols], levels uint[rows, 2] (low, high; +0 where unused) and the first row that is not
    ternary, -1 where all are; the arrays mean nothing from that row on.

    >>> dense = np.array([[0, 0.5, -0.25], [3, 3, 0]], np.float32)
    >>> digits, levels, bad_row = split_rows(dense.view(np.uint32), dtype="F32")
    >>> digits.tolist(), levels.view(np.float32).tolist(), bad_row
    ([[0, 1, -1], [1, 1, 0]], [[-0.25, 0.5], [0.0, 3.0]], -1)
    """
    from qmoecodec._kernels import ternary  # loads Numba

    digits = np.empty(bits.shape, np.int8)
    levels = np.empty((bits.shape[0], 2), bits.dtype)
    sign = sign_bit(dtype)
    bad_row = ternary.split_rows(np.ascontiguousarray(bits), sign, bits.dtype.type(_EXPONENT[dtype]), digits, levels)
    return digits, levels, int(bad_row)


def why_not_ternary(row: AnyArray, *, dtype: str) -> str:
    """Say what kind of row one that is not ternary is: -0 among the zeros is common and easily put right.

    row : uint[1, cols]    bits

    >>> why_not_ternary(np.array([[0.5, -0.0, 0]], np.float16).view(np.uint16), dtype="F16")
    'ternary but for -0'
    """
    without = np.where(row == sign_bit(dtype), row.dtype.type(0), row)
    return "ternary but for -0" if split_rows(without, dtype=dtype)[2] < 0 else "not ternary"


def fill_rows(digits: Int8Array, levels: AnyArray) -> AnyArray:
    """Write dense rows: the inverse of `split_rows`.

    digits : int8[rows, cols];  levels : uint[rows, 2]
    Returns uint[rows, cols], the numbers' bits.
    """
    from qmoecodec._kernels import ternary  # loads Numba

    out = np.empty(digits.shape, levels.dtype)
    ternary.fill_rows(np.ascontiguousarray(digits), np.ascontiguousarray(levels), out)
    return out


def to_float(bits: AnyArray, *, dtype: str, to: Any) -> AnyArray:
    """Convert the bits of a float dtype to numbers of the numpy type `to`.

    Raises TypeError where `to` is no float type: integers would make 0 of most levels.

    >>> to_float(np.array([0x3F80], np.uint16), dtype="BF16", to=np.float32).tolist()
    [1.0]
    """
    if to is None or "float" not in np.dtype(to).name:  # also bfloat16 and the like of the package ml_dtypes
        raise TypeError(f"dtype is a numpy float type, not {to!r}")
    if dtype == "BF16":
        bits, dtype = bits.astype(np.uint32) << np.uint32(16), "F32"
    numbers: AnyArray = bits.view(NUMPY_TYPE[dtype]).astype(to)
    return numbers


def check_levels(levels: AnyArray, *, dtype: str, first_row: int = 0) -> None:
    """Check the levels of some rows (spec §6.3).

    levels : uint[rows, 2]
    Raises FormatError: level_value.
    """
    low, high = levels[:, 0], levels[:, 1]
    sign = sign_bit(dtype)
    exponent = levels.dtype.type(_EXPONENT[dtype])
    bad = ((levels == sign) | ((levels & exponent) == exponent)).any(axis=1)
    # A key that rises with the number: negative numbers complemented, the others above them.
    key_low = np.where(low & sign, ~low, low | sign)
    key_high = np.where(high & sign, ~high, high | sign)
    bad |= (key_low >= key_high) & ((low | high) != 0)
    if bad.any():
        raise FormatError("level_value", row=first_row + int(np.flatnonzero(bad)[0]))


def check_zero_levels(digits: Int8Array, levels: AnyArray, *, first_row: int = 0) -> None:
    """Check that no digit stands for a level that is +0 (spec §6.3).

    digits : int8[rows, cols];  levels : uint[rows, 2]
    Raises FormatError: level_zero.
    """
    bad = np.zeros(len(levels), np.bool_)
    for column, digit in ((0, -1), (1, 1)):
        rows = np.flatnonzero(levels[:, column] == 0)
        if len(rows) == len(levels):
            bad |= (digits == digit).any(axis=1)
        elif len(rows):
            bad[rows] |= (digits[rows] == digit).any(axis=1)
    if bad.any():
        raise FormatError("level_zero", row=first_row + int(np.flatnonzero(bad)[0]))
