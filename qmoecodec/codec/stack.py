"""Stacks of experts: encode, decode, multiply. One thread per expert at a time; results do not depend on their number."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt

from qmoecodec.codec.arguments import check_backend, check_digits, check_encoded, check_integer, check_threads, to_float32
from qmoecodec.codec.bank import BankPlanner, CodeBits, DictionaryChoice, cheapest, given_bank
from qmoecodec.codec.rows import RowBackend, decode_rows, encode_rows, matvec_rows
from qmoecodec.errors import FormatError
from qmoecodec.types import Dictionary, Encoded, Int8Array, UInt8Array, UInt32Array

_T = TypeVar("_T")


def _map(work: Callable[[int], _T], items: Iterable[int], threads: int | None) -> list[_T]:
    numbers = list(items)
    n = min(check_threads(threads) or os.cpu_count() or 1, len(numbers))
    if n <= 1:
        return [work(i) for i in numbers]
    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(work, numbers))


def _bank(
    experts: Int8Array, dictionary: DictionaryChoice | Dictionary | Sequence[Dictionary], code_bits: CodeBits
) -> tuple[Dictionary, ...]:
    if isinstance(dictionary, str):
        planner = BankPlanner(dictionary, code_bits)
        for expert in experts:
            planner.add(expert)
        return planner.choose()
    return given_bank(dictionary, code_bits)


def encode(
    digits: Int8Array,
    *,
    dictionary: DictionaryChoice | Dictionary | Sequence[Dictionary] = "auto",
    code_bits: CodeBits = "auto",
    threads: int | None = None,
) -> Encoded:
    """Encode a stack of experts (spec §5).

    digits : int8[experts, rows, cols] or int8[rows, cols]    values -1, 0, 1
    dictionary : "auto" builds the dictionaries that fit the digits, "qmoe-2023" takes the paper's table; or a dictionary,
        or a bank of them from which each expert takes the one that encodes it shortest
    code_bits : 8, 12, 16, or "auto" for what comes out smallest
    threads : experts encoded at a time; None for one per core
    Raises EncodeError where a table has no phrase for a row; ValueError, TypeError for a caller's mistakes.

    >>> import numpy as np, qmoecodec as q
    >>> digits = np.array([[0, 0, 1, 0], [-1, 0, 0, 0]], np.int8)
    >>> bool((q.decode(q.encode(digits)) == digits).all())
    True
    """
    digits = check_digits(digits, 2, 3)
    experts = digits if digits.ndim == 3 else digits[None]
    check_threads(threads)
    bank = _bank(experts, dictionary, code_bits)

    def one(e: int) -> tuple[int, UInt8Array, UInt32Array]:
        index = cheapest(experts[e], bank)
        return (index, *encode_rows(experts[e], dictionary=bank[index]))

    n_experts, rows, cols = experts.shape
    parts = _map(one, range(n_experts), threads)
    code_offsets = np.zeros(n_experts + 1, np.uint64)
    np.cumsum([len(codes) for _, codes, _ in parts], out=code_offsets[1:])
    return Encoded(
        shape=(n_experts, rows, cols),
        codes=np.concatenate([codes for _, codes, _ in parts] or [np.zeros(0, np.uint8)]),
        code_offsets=code_offsets,
        row_lengths=np.array([lengths for _, _, lengths in parts], np.uint32).reshape(n_experts, rows),
        dictionary_index=np.array([index for index, _, _ in parts], np.uint8),
        dictionaries=bank,
        is_matrix=digits.ndim == 2,
    )


def _expert(encoded: Encoded, e: int) -> tuple[UInt8Array, UInt32Array, Dictionary]:
    """Return codes, row lengths and dictionary of one expert after checking that they are there."""
    begin, end = int(encoded.code_offsets[e]), int(encoded.code_offsets[e + 1])
    if not begin <= end <= len(encoded.codes):
        raise FormatError("code_offsets", expert=e)
    index = int(encoded.dictionary_index[e])
    if index >= len(encoded.dictionaries):
        raise FormatError("dictionary_index", expert=e)
    return encoded.codes[begin:end], encoded.row_lengths[e], encoded.dictionaries[index]


def _index(encoded: Encoded, expert: int) -> int:
    n, expert = encoded.shape[0], check_integer(expert, "expert")
    if not -n <= expert < n:
        raise IndexError(f"expert {expert} of {n}")
    return expert % n


def decode(
    encoded: Encoded, *, expert: int | None = None, backend: RowBackend = "numba", threads: int | None = None
) -> Int8Array:
    """Decode a stack, or one expert of it (spec §5.2).

    Returns int8[experts, rows, cols], or int8[rows, cols] for one expert or what was encoded from a matrix.
    expert : decode this expert alone; negative numbers count from the end
    Raises FormatError: code_offsets, dictionary_index, and as `decode_rows`, with the expert and row; IndexError for an
    expert that is not there; TypeError, ValueError for a caller's other mistakes.
    """
    check_encoded(encoded)
    check_threads(threads)
    check_backend(backend)
    n_experts, rows, cols = encoded.shape

    def one(e: int, out: Int8Array | None = None) -> Int8Array:
        codes, row_lengths, dictionary = _expert(encoded, e)
        try:
            return decode_rows(codes, row_lengths, cols=cols, dictionary=dictionary, backend=backend, out=out)
        except FormatError as error:
            raise error.at(expert=e) from None

    if expert is not None:
        return one(_index(encoded, expert))
    if encoded.is_matrix:
        return one(0)
    for e in range(n_experts):  # the bound of spec §6.4, before the whole stack is allocated
        _, row_lengths, dictionary = _expert(encoded, e)
        if rows * cols > dictionary.max_phrase * int(row_lengths.sum(dtype=np.int64)):
            raise FormatError("row_underrun", expert=e)
    out = np.empty((n_experts, rows, cols), np.int8)
    _map(lambda e: one(e, out[e]), range(n_experts), threads)
    return out


def matvec(
    encoded: Encoded,
    levels: npt.NDArray[np.float32],
    x: npt.NDArray[np.float32],
    *,
    expert: int | None = None,
    threads: int | None = None,
) -> npt.NDArray[np.float32]:
    """Multiply compressed experts with vectors, without storing a decoded matrix; accumulates in float32.

    levels : float32[experts, rows, 2]    low and high level of each row (any float dtype is converted, but BF16 is not
        taken as bits: see `Group.levels_as`); float32[rows, 2] will do for one expert or an encoded matrix
    x : float32[cols] for all, or float32[experts, cols]
    expert : multiply this expert alone
    Returns float32[experts, rows], or float32[rows] for one expert or what was encoded from a matrix.
    Raises FormatError and IndexError like `decode`; ValueError where shapes do not fit, TypeError for other dtypes.
    """
    check_encoded(encoded)
    check_threads(threads)
    n_experts, rows, cols = encoded.shape
    single = _index(encoded, expert) if expert is not None else 0 if encoded.is_matrix else None
    levels, x = to_float32(levels, "levels"), to_float32(x, "x")
    if levels.shape == (rows, 2) and single is not None:
        levels = np.broadcast_to(levels, (n_experts, rows, 2))
    if levels.shape != (n_experts, rows, 2):
        raise ValueError(f"levels have the shape {levels.shape}, not {(n_experts, rows, 2)}")
    if x.shape != (cols,) and (single is not None or x.shape != (n_experts, cols)):
        raise ValueError(f"x has the shape {x.shape}, not {(cols,)}")

    def one(e: int) -> npt.NDArray[np.float32]:
        codes, row_lengths, dictionary = _expert(encoded, e)
        try:
            return matvec_rows(codes, row_lengths, levels[e], x if x.ndim == 1 else x[e], dictionary=dictionary)
        except FormatError as error:
            raise error.at(expert=e) from None

    if single is not None:
        return one(single)
    parts = _map(one, range(n_experts), threads)
    return cast("npt.NDArray[np.float32]", np.array(parts, np.float32).reshape(n_experts, rows))
