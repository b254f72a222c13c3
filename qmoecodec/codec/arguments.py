"""What callers hand in, checked before a kernel sees it: each mistake is one error that names the argument."""

from __future__ import annotations

import operator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qmoecodec.types import CODE_BITS, Dictionary, Encoded, Int8Array, UInt8Array, UInt32Array, check_array

_BACKENDS: Final = ("numba", "reference")
_SHAPES: Final = {2: "[rows, cols]", 3: "[experts, rows, cols]"}


def check_integer(value: Any, name: str, *, least: int | None = None) -> int:
    """Return an integer of any type that is one, bool excepted.

    Raises TypeError; ValueError where it is below `least`.
    """
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} is an integer, not {type(value).__name__}")
    number = operator.index(value)
    if least is not None and number < least:
        raise ValueError(f"{name} is at least {least}, not {number}")
    return number


def check_threads(threads: Any) -> int | None:
    """Return a number of threads, None for one per core."""
    return None if threads is None else check_integer(threads, "threads", least=1)


def check_code_bits(code_bits: Any) -> Any:
    """Return a number of code bits, or "auto"."""
    if isinstance(code_bits, str) and code_bits == "auto":
        return code_bits
    if isinstance(code_bits, str) or check_integer(code_bits, "code_bits") not in CODE_BITS:
        raise ValueError(f"code_bits is 'auto' or one of {CODE_BITS}, not {code_bits!r}")
    return int(code_bits)


def check_backend(backend: Any) -> None:
    """Check the name of a backend."""
    if backend not in _BACKENDS:
        raise ValueError(f"backend is 'numba' or 'reference', not {backend!r}")


def check_dictionary(dictionary: Any) -> None:
    """Check that a dictionary is one."""
    if not isinstance(dictionary, Dictionary):
        raise TypeError(f"dictionary is a Dictionary, not {type(dictionary).__name__}")


def check_encoded(encoded: Any) -> None:
    """Check that a stack is one."""
    if not isinstance(encoded, Encoded):
        raise TypeError(f"encoded is an Encoded, as `encode` returns it, not {type(encoded).__name__}")


def check_digits(digits: Any, *ndims: int) -> Int8Array:
    """Return digits as a C-contiguous int8 array after checking that all are -1, 0 or 1.

    ndims : the numbers of dimensions that will do
    """
    values = check_array(digits, "digits", np.int8)
    if values.ndim not in ndims:
        raise ValueError(f"digits has the shape {' or '.join(_SHAPES[n] for n in sorted(ndims))}, not {values.shape}")
    if values.size and (int(values.min()) < -1 or int(values.max()) > 1):
        bad = np.argwhere((values < -1) | (values > 1))[0]
        raise ValueError(f"digit {int(values[tuple(bad)])} at {tuple(int(i) for i in bad)} is not -1, 0 or 1")
    return np.ascontiguousarray(values)


def check_rows(codes: Any, row_lengths: Any, dictionary: Any) -> tuple[UInt8Array, UInt32Array]:
    """Return codes and row lengths of an expert as C-contiguous arrays; what they hold is not looked at."""
    check_dictionary(dictionary)
    codes = check_array(codes, "codes", np.uint8)
    row_lengths = check_array(row_lengths, "row_lengths", np.uint32)
    for name, values in (("codes", codes), ("row_lengths", row_lengths)):
        if values.ndim != 1:
            raise ValueError(f"{name} has one dimension, not the shape {values.shape}")
    return np.ascontiguousarray(codes), np.ascontiguousarray(row_lengths)


def check_out(out: Any, shape: tuple[int, int]) -> None:
    """Check an array that digits are to be written into."""
    values = check_array(out, "out", np.int8, shape)
    if not values.flags.c_contiguous:
        raise ValueError("out is not C-contiguous")
    if not values.flags.writeable:
        raise ValueError("out is read-only")


def to_float32(value: Any, name: str) -> npt.NDArray[np.float32]:
    """Return numbers as a float32 array; what is neither float nor a signed integer is refused.

    Unsigned integers are, above all, the bits of BF16 as `Group.levels` has them, which mean nothing as numbers.
    """
    try:
        values = np.asarray(value)
        if values.dtype.kind not in "fiV":  # V: bfloat16 and the like of the package ml_dtypes
            hint = " (BF16 as bits? `levels_as` converts them)" if values.dtype == np.uint16 else ""
            raise TypeError(f"{values.dtype} is no float dtype{hint}")
        return np.asarray(values, np.float32)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: torch, where a gradient is wanted
        raise TypeError(f"{name} cannot be taken as float32: {error}") from None
