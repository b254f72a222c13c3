"""Look-up tables that the kernels run on, built once per dictionary and kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from typing import Any, Final, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt
from numba import int64

from qmoecodec._numba import njit
from qmoecodec.types import Dictionary, UInt8Array

# Field positions in an encoder step (uint64): next node x 4, number of codewords emitted, and the codewords.
STEP_COUNT_SHIFT: Final = 24
STEP_FIRST_SHIFT: Final = 32
STEP_SECOND_SHIFT: Final = 48

#: A phrase with more nonzero digits than this is copied digit by digit instead of scattered.
MAX_SCATTER: Final = 3


#: Bytes of tables that are kept, of those used last; the very last ones are kept whatever they take.
KEPT_BYTES: Final = 24 << 20

Tables = TypeVar("Tables", bound=tuple[Any, ...])
_kept: OrderedDict[tuple[str, Dictionary], tuple[Any, int]] = OrderedDict()
_lock = threading.Lock()


def kept(build: Callable[[Dictionary], Tables]) -> Callable[[Dictionary], Tables]:
    """Keep what a function has built, up to a number of bytes: a file may have 256 dictionaries of some bytes each."""

    @wraps(build)
    def look_up(dictionary: Dictionary) -> Tables:
        key = build.__name__, dictionary
        with _lock:
            known = _kept.get(key)
            if known is not None:
                _kept.move_to_end(key)
                return cast(Tables, known[0])
        tables = build(dictionary)
        n_bytes = sum(part.nbytes for part in tables if isinstance(part, np.ndarray))
        with _lock:
            _kept[key] = tables, n_bytes
            total = sum(size for _, size in _kept.values())
            while total > KEPT_BYTES and len(_kept) > 1:
                total -= _kept.popitem(last=False)[1][1]
        return tables

    return look_up


class Trie(NamedTuple):
    """The parse trees as arrays; node s is the root of tree s.

    children : int32[nodes, 3]    node under digit 0, 1 (-), 2 (+), or -1
    codeword : int32[nodes]       the node's codeword, or -1
    """

    children: npt.NDArray[np.int32]
    codeword: npt.NDArray[np.int32]


class EncodeTables(NamedTuple):
    """The aivf encoder as a finite automaton over digits.

    steps : uint64[nodes * 4]    indexed by 4 x node + (digit as int8 & 3), so 0 is 0, 1 is +, 3 is -
    final : int32[nodes]         codeword that ends a row on this node, or -1 (a root)
    """

    steps: npt.NDArray[np.uint64]
    final: npt.NDArray[np.int32]


class DecodeTables(NamedTuple):
    """What a decoder looks up per (state, codeword), flat: index state << code_bits | codeword.

    lengths : uint8[n]      digits per phrase, 0 = unused
    scatter : uint64[n]     byte 0 length; bytes 1-3 positions of nonzeros; bytes 4-6 their values (int8); bit 63 set for
                            an unused codeword. A missing nonzero repeats the first; a phrase without any stores a 0
                            at position 0. Empty where a phrase has more than MAX_SCATTER nonzeros.
    gather : uint64[n]      16-bit fields for the fused matvec: 3 x length, then 3 x position + plane of each nonzero,
                            plane 0 (which holds zeros) for a missing one; bit 63 as above. Empty like `scatter`.
    three : bool            whether a phrase has three nonzeros, and none has more
    last_nonzero : uint8[n] 1 + position of the last nonzero digit
    words : uint64[n, w]    the phrase as int8 values, eight digits a word, zero-padded
    counts : int64[n, 3]    how many 0, -, + the phrase has
    """

    lengths: UInt8Array
    scatter: npt.NDArray[np.uint64]
    gather: npt.NDArray[np.uint64]
    three: bool
    last_nonzero: UInt8Array
    words: npt.NDArray[np.uint64]
    counts: npt.NDArray[np.int64]


@njit(cache=True, nogil=True)
def _build_trie(lengths: Any, starts: Any, digits: Any, children: Any, codeword: Any) -> int:
    """Insert every phrase; return the number of nodes. Arrays hold one node per digit, plus one per state."""
    n_states, n_codewords = lengths.shape
    n_nodes = n_states
    for state in range(n_states):
        for c in range(n_codewords):
            if lengths[state, c] == 0:
                continue
            node = state
            for k in range(lengths[state, c]):
                digit = digits[starts[state, c] + k]
                if children[node, digit] < 0:
                    children[node, digit] = n_nodes
                    n_nodes += 1
                node = children[node, digit]
            codeword[node] = c
    return n_nodes


@kept
def trie(dictionary: Dictionary) -> Trie:
    """Return the parse trees of a dictionary as arrays."""
    size = len(dictionary.digits) + dictionary.n_states
    if dictionary.kind == "aivf":  # each node below the roots has a symbol of two bits
        size = min(size, 4 * len(dictionary.data) + dictionary.n_states)
    children = np.full((size, 3), -1, np.int32)
    codeword = np.full(size, -1, np.int32)
    n = _build_trie(dictionary.lengths, dictionary.starts, dictionary.digits, children, codeword)
    return Trie(children[:n].copy(), codeword[:n].copy())


@kept
def encode_tables(dictionary: Dictionary) -> EncodeTables:
    """Return the automaton of an aivf dictionary (spec §5.1)."""
    nodes = trie(dictionary)
    children, codeword = nodes.children, nodes.codeword
    n = len(codeword)
    is_leaf = (codeword >= 0) & (codeword < dictionary.threshold)
    steps = np.zeros((n, 4), np.uint64)
    for digit, column in ((0, 0), (1, 3), (2, 1)):
        child = children[:, digit]
        inside = child >= 0
        # A step inside the tree emits only where it ends on a leaf; from an incomplete node the node's own codeword
        # goes out and the digit is taken again from the root of tree 1, where it may end on a leaf at once.
        restart = int(children[1, digit]) if digit else -1
        target = np.where(inside, child, restart)
        ends = np.where(target >= 0, is_leaf[target], False)
        first = np.where(inside, np.where(ends, codeword[target], 0), np.maximum(codeword, 0))
        second = np.where(~inside & ends, codeword[target], 0)
        count = ends.astype(np.int64) + ~inside
        following = np.where(ends, 0, np.maximum(target, 0))
        steps[:, column] = (
            (following.astype(np.uint64) << 2)
            | count.astype(np.uint64) << STEP_COUNT_SHIFT
            | first.astype(np.uint64) << STEP_FIRST_SHIFT
            | second.astype(np.uint64) << STEP_SECOND_SHIFT
        )
    final = codeword.copy()
    at = np.arange(n)
    while True:  # nodes without a codeword go on to their 0-child
        missing = np.flatnonzero((final < 0) & (at >= dictionary.n_states))
        if not len(missing):
            break
        at[missing] = children[at[missing], 0]
        final[missing] = codeword[at[missing]]
    return EncodeTables(steps.reshape(-1), final)


@njit(cache=True, nogil=True)
def _fill_decode_tables(
    lengths: Any, starts: Any, digits: Any, scatter: Any, gather: Any, last: Any, word_bytes: Any, counts: Any
) -> int:
    """Fill all tables; return the largest number of nonzeros in a phrase."""
    most = 0
    for i in range(len(lengths)):
        length, n_nonzero, g = int64(lengths[i]), 0, 3 * int64(lengths[i])
        s = length
        for k in range(length):
            digit = int64(digits[starts[i] + k])
            counts[i, digit] += 1
            if digit == 0:
                continue
            value = 255 if digit == 1 else 1
            word_bytes[i, k] = value
            last[i] = k + 1
            if n_nonzero < MAX_SCATTER:
                s |= k << (8 * (1 + n_nonzero)) | value << (8 * (4 + n_nonzero))
                g |= (3 * k + (2 if digit == 1 else 1)) << (16 * (1 + n_nonzero))
            n_nonzero += 1
        for z in range(n_nonzero, MAX_SCATTER):
            if n_nonzero:
                s |= (s >> 8 & 255) << (8 * (1 + z)) | (s >> 32 & 255) << (8 * (4 + z))
        scatter[i] = s
        gather[i] = g
        most = max(most, n_nonzero)
    return most


@kept
def decode_tables(dictionary: Dictionary) -> DecodeTables:
    """Return the decoder's tables of a dictionary."""
    n = dictionary.lengths.size
    n_words = (dictionary.max_phrase + 7) // 8
    scatter, gather = np.zeros(n, np.uint64), np.zeros(n, np.uint64)
    last, word_bytes = np.zeros(n, np.uint8), np.zeros((n, 8 * n_words), np.uint8)
    counts = np.zeros((n, 3), np.int64)
    lengths, starts = dictionary.lengths.ravel(), dictionary.starts.ravel()
    most = _fill_decode_tables(lengths, starts, dictionary.digits, scatter, gather, last, word_bytes, counts)
    unused = (lengths == 0).astype(np.uint64) << np.uint64(63)
    scatter, gather = scatter | unused, gather | unused
    if most > MAX_SCATTER:
        scatter = gather = np.zeros(0, np.uint64)
    return DecodeTables(lengths, scatter, gather, most == MAX_SCATTER, last, word_bytes.view("<u8"), counts)
