"""Loads and stores that NumPy arrays cannot express: several elements at once, at any element."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_PAIR = ir.VectorType(ir.FloatType(), 2)


def _pointer(context: Any, builder: Any, array_type: Any, array: Any) -> Any:
    """Return the pointer to an array's first element."""
    return cgutils.create_struct_proxy(array_type)(context, builder, array).data


@intrinsic
def store_u64(typing_context: Any, array: Any, offset: Any, value: Any) -> Any:
    """Store eight bytes at an offset in an array of bytes, aligned or not; the caller answers for the bounds."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data, at, number = args
        place = builder.gep(_pointer(context, builder, array, data), [at])
        builder.store(number, builder.bitcast(place, number.type.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(array, types.uint64, types.uint64), generate


@intrinsic
def clear_bytes(typing_context: Any, array: Any, n: Any) -> Any:
    """Set the first n bytes of an array to 0 (a slice assignment goes byte by byte)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data, n_bytes = args
        cgutils.memset(builder, _pointer(context, builder, array, data), n_bytes, 0)
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


@intrinsic
def copy_bytes(typing_context: Any, target: Any, offset: Any, source: Any, n: Any) -> Any:
    """Copy the first n bytes of source to `offset` in target, both arrays of bytes, which must not overlap."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to, at, from_, n_bytes = args
        place = builder.gep(_pointer(context, builder, target, to), [at])
        cgutils.raw_memcpy(builder, place, _pointer(context, builder, source, from_), n_bytes, 1)
        return context.get_dummy_value()

    return types.void(target, types.int64, source, types.int64), generate


@intrinsic
def add_pair(typing_context: Any, total: Any, array: Any, index: Any) -> Any:
    """Add two neighbouring elements of a float32 array, at any index, to a pair of float32 in a uint64 (low, high)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pair, data, at = args
        # In bytes: counted in elements, the product is 2% slower.
        data_bytes = builder.bitcast(_pointer(context, builder, array, data), cgutils.voidptr_t)
        place = builder.gep(data_bytes, [builder.shl(at, at.type(2))])
        two = builder.load(builder.bitcast(place, _PAIR.as_pointer()), align=4)
        return builder.bitcast(builder.fadd(builder.bitcast(pair, _PAIR), two), pair.type)

    return types.uint64(types.uint64, array, types.uint64), generate


@intrinsic
def low_float(typing_context: Any, total: Any) -> Any:
    """Return the first float32 of a pair."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (pair,) = args
        return builder.extract_element(builder.bitcast(pair, _PAIR), cgutils.int32_t(0))

    return types.float32(types.uint64), generate


@intrinsic
def high_float(typing_context: Any, total: Any) -> Any:
    """Return the second float32 of a pair."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (pair,) = args
        return builder.extract_element(builder.bitcast(pair, _PAIR), cgutils.int32_t(1))

    return types.float32(types.uint64), generate
