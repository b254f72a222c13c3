"""Value types shared by all layers: dictionaries and encoded stacks. Frozen, validated when built, without behaviour."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

Int8Array = npt.NDArray[np.int8]
UInt8Array = npt.NDArray[np.uint8]
UInt32Array = npt.NDArray[np.uint32]
UInt64Array = npt.NDArray[np.uint64]
AnyArray = npt.NDArray[Any]

DictionaryKind = Literal["aivf", "table"]

CODE_BITS: Final = (8, 12, 16)
MAX_PHRASE: Final = 255
MAX_DICTIONARIES: Final = 256
MAX_DIM: Final = 2**31 - 1
MAX_WEIGHTS: Final = 2**62 - 1


def check_array(value: object, name: str, dtype: npt.DTypeLike, shape: tuple[int, ...] | None = None) -> AnyArray:
    """Return an array, not copied, after checking that it is one of the dtype, and of the shape if one is given.

    Nothing is converted. Raises TypeError, ValueError; the argument is named.
    """
    wanted = np.dtype(dtype)
    if not isinstance(value, np.ndarray) or isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} is a numpy array of {wanted}, not {type(value).__name__}")
    if value.dtype != wanted:
        raise TypeError(f"{name} is a numpy array of {wanted}, not of {value.dtype}")
    if shape is not None and value.shape != shape:
        raise ValueError(f"{name} has the shape {shape}, not {value.shape}")
    return value.view(np.ndarray)


@dataclass(frozen=True, slots=True, eq=False)
class Dictionary:
    """One or two parse trees in expanded form (spec §4.1); what every decoder works from.

    kind : "aivf" (two trees, spec §4.2) or "table" (one tree, spec §4.3)
    code_bits : 8, 12 or 16
    threshold : codewords at or above it are followed by state 1 (spec §4.1); 2**code_bits for one tree
    lengths : uint8[states, 2**code_bits]    digits per phrase, 0 for an unused codeword
    starts : uint32[states, 2**code_bits]    where the phrase begins in `digits`
    digits : uint8[n]    all phrases back to back (0, 1 for -, 2 for +), state by state in codeword order
    data : bytes    the serialised form (spec §4.2, §4.3), which `dictionary.parse` reads
    """

    kind: DictionaryKind
    code_bits: int
    threshold: int
    lengths: UInt8Array
    starts: UInt32Array
    digits: UInt8Array
    data: bytes

    @property
    def n_states(self) -> int:
        """Number of parse trees."""
        return int(self.lengths.shape[0])

    @property
    def n_codewords(self) -> int:
        """Codewords of one state, used or not: 2**code_bits."""
        return 1 << self.code_bits

    @property
    def max_phrase(self) -> int:
        """Digits of the longest phrase."""
        return int(self.lengths.max(initial=0))

    def phrase(self, state: int, codeword: int) -> tuple[int, ...]:
        """Digits (0, 1, 2) of one codeword; empty where it is unused."""
        start = int(self.starts[state, codeword])
        return tuple(int(d) for d in self.digits[start : start + int(self.lengths[state, codeword])])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Dictionary):
            return NotImplemented
        return (self.kind, self.code_bits, self.threshold, self.data) == (
            other.kind,
            other.code_bits,
            other.threshold,
            other.data,
        )

    def __hash__(self) -> int:
        return hash((self.kind, self.code_bits, self.threshold, self.data))

    def __repr__(self) -> str:
        return f"<Dictionary {self.kind} {self.code_bits} bit, T={self.threshold}, {len(self.data)} bytes>"


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A stack of ternary experts as codewords, without levels (spec §5, §6.2).

    shape : (experts, rows, cols)
    codes : uint8[n_bytes]    rows back to back, each byte-aligned
    code_offsets : uint64[experts + 1]    byte in `codes` where each expert begins
    row_lengths : uint32[experts, rows]    codewords per row
    dictionary_index : uint8[experts]    index into `dictionaries`
    dictionaries : the bank; those an expert names share one `code_bits`
    is_matrix : True when built from a two-dimensional array, which `decode` then returns

    Types and shapes are checked when a stack is built (TypeError, ValueError), what the arrays hold when it is decoded.
    """

    shape: tuple[int, int, int]
    codes: UInt8Array
    code_offsets: UInt64Array
    row_lengths: UInt32Array
    dictionary_index: UInt8Array
    dictionaries: tuple[Dictionary, ...]
    is_matrix: bool = False

    def __post_init__(self) -> None:
        experts, rows, _ = dims = tuple(operator.index(n) for n in self.shape)
        if min(dims) < 0:
            raise ValueError(f"shape has no negative numbers: {self.shape}")
        if self.is_matrix and experts != 1:
            raise ValueError(f"a matrix is one expert, not {experts}")
        codes = check_array(self.codes, "codes", np.uint8)
        if codes.ndim != 1:
            raise ValueError(f"codes has one dimension, not the shape {codes.shape}")
        check_array(self.code_offsets, "code_offsets", np.uint64, (experts + 1,))
        check_array(self.row_lengths, "row_lengths", np.uint32, (experts, rows))
        check_array(self.dictionary_index, "dictionary_index", np.uint8, (experts,))
        for dictionary in self.dictionaries:
            if not isinstance(dictionary, Dictionary):
                raise TypeError(f"dictionaries holds Dictionary objects, not {type(dictionary).__name__}")

    @property
    def code_bits(self) -> int:
        """Bits per codeword (8 where there is no expert)."""
        return self.dictionaries[int(self.dictionary_index[0])].code_bits if len(self.dictionary_index) else 8

    @property
    def n_weights(self) -> int:
        """experts x rows x cols."""
        return self.shape[0] * self.shape[1] * self.shape[2]

    @property
    def payload_bits(self) -> int:
        """Bits of all codewords, alignment of rows to bytes included."""
        return 8 * int(self.codes.size)
