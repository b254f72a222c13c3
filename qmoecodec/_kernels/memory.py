"""Loads and stores that NumPy arrays cannot express: several elements at once, at any byte offset."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, offset: Any, element: Any) -> Any:
    data = cgutils.create_struct_proxy(array_type)(context, builder, array).data
    data = builder.bitcast(data, ir.IntType(8).as_pointer())
    return builder.bitcast(builder.gep(data, [offset]), element.as_pointer())


@intrinsic
def store_u64(typing_context: Any, array: Any, offset: Any, value: Any) -> Any:
    """Store eight bytes at a byte offset, aligned or not; the caller answers for the bounds."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], args[0], args[1], ir.IntType(64))
        builder.store(args[2], pointer, align=1)
        return context.get_dummy_value()

    return types.void(array, types.uint64, types.uint64), generate


@intrinsic
def clear_bytes(typing_context: Any, array: Any, n: Any) -> Any:
    """Set the first n bytes of an array to 0 (a slice assignment goes byte by byte)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], args[0], ir.Constant(ir.IntType(64), 0), ir.IntType(8))
        cgutils.memset(builder, pointer, args[1], 0)
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


@intrinsic
def copy_bytes(typing_context: Any, target: Any, offset: Any, source: Any, n: Any) -> Any:
    """Copy the first n bytes of source to byte `offset` of target, which must not overlap it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to = _pointer(context, builder, signature.args[0], args[0], args[1], ir.IntType(8))
        zero = ir.Constant(ir.IntType(64), 0)
        from_ = _pointer(context, builder, signature.args[2], args[2], zero, ir.IntType(8))
        cgutils.raw_memcpy(builder, to, from_, args[3], 1)
        return context.get_dummy_value()

    return types.void(target, types.int64, source, types.int64), generate


@intrinsic
def add_pair(typing_context: Any, total: Any, array: Any, index: Any) -> Any:
    """Add two neighbouring float32 of an array, at any index, to a pair of float32 kept in a uint64 (low, high)."""
    pair = ir.VectorType(ir.FloatType(), 2)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        offset = builder.shl(args[2], ir.Constant(ir.IntType(64), 2))
        value = builder.load(_pointer(context, builder, signature.args[1], args[1], offset, pair), align=4)
        return builder.bitcast(builder.fadd(builder.bitcast(args[0], pair), value), ir.IntType(64))

    return types.uint64(types.uint64, array, types.uint64), generate


@intrinsic
def low_float(typing_context: Any, total: Any) -> Any:
    """Return the first float32 of a pair."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = builder.bitcast(args[0], ir.VectorType(ir.FloatType(), 2))
        return builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))

    return types.float32(types.uint64), generate


@intrinsic
def high_float(typing_context: Any, total: Any) -> Any:
    """Return the second float32 of a pair."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = builder.bitcast(args[0], ir.VectorType(ir.FloatType(), 2))
        return builder.extract_element(vector, ir.Constant(ir.IntType(32), 1))

    return types.float32(types.uint64), generate
