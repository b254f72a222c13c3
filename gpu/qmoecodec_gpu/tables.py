"""What the kernels look codewords up in, made from a dictionary (spec §4). Plain numpy: no device is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from qmoecodec.types import Dictionary

#: Nonzeros that an entry of the gather kernel has room for.
MAX_GATHER_NONZEROS: Final = 7

UInt32Array = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Phrases:
    """The phrases of one dictionary as arrays over [state, codeword], states doubled where there is one.

    lengths : uint8[2, 2**b]
    n_nonzeros : uint8[2, 2**b]
    columns, digits : uint8[n]    offset in the phrase and digit (1, 2) of every nonzero, phrase by phrase
    starts : uint32[2, 2**b]      where the phrase's nonzeros begin
    """

    lengths: npt.NDArray[np.uint8]
    n_nonzeros: npt.NDArray[np.uint8]
    columns: npt.NDArray[np.uint8]
    digits: npt.NDArray[np.uint8]
    starts: UInt32Array

    @property
    def max_nonzeros(self) -> int:
        """Nonzeros of the phrase that has most."""
        return int(self.n_nonzeros.max(initial=0))


def list_phrases(dictionary: Dictionary) -> Phrases:
    """List the nonzeros of all phrases."""
    both = [0, 1] if dictionary.n_states == 2 else [0, 0]
    lengths = dictionary.lengths.astype(np.int64)
    flat_lengths = lengths.reshape(-1)
    owner = np.repeat(np.arange(flat_lengths.size), flat_lengths)
    first = np.repeat(dictionary.starts.reshape(-1).astype(np.int64), flat_lengths)
    offset = np.arange(owner.size) - np.repeat(np.cumsum(flat_lengths) - flat_lengths, flat_lengths)
    digit = dictionary.digits[first + offset]
    keep = digit != 0
    counts = np.bincount(owner[keep], minlength=flat_lengths.size).reshape(lengths.shape)
    starts = (np.cumsum(counts.reshape(-1)) - counts.reshape(-1)).reshape(lengths.shape)
    return Phrases(
        lengths=lengths[both].astype(np.uint8),
        n_nonzeros=counts[both].astype(np.uint8),
        columns=offset[keep].astype(np.uint8),
        digits=digit[keep].astype(np.uint8),
        starts=starts[both].astype(np.uint32),
    )


def general_entries(phrases: Phrases) -> tuple[UInt32Array, npt.NDArray[np.uint16]]:
    """Build the entries and the list of nonzeros of the kernels for any dictionary (kernels/common.cuh).

    Returns uint32[2, 2**b, 2]: length | nonzeros << 8 | offset of the last << 16 | digits seen << 24, and where the
    nonzeros begin; and uint16[n]: offset | (digit is +) << 8.
    """
    counts = phrases.n_nonzeros.astype(np.int64)
    starts = phrases.starts.astype(np.int64)
    last = np.zeros(counts.shape, np.int64)
    seen = np.zeros(counts.shape, np.int64)
    some = counts > 0
    last[some] = phrases.columns[starts[some] + counts[some] - 1]
    for digit in (1, 2):
        up_to = np.concatenate([[0], np.cumsum(phrases.digits == digit)])
        seen |= (up_to[starts + counts] > up_to[starts]).astype(np.int64) << (digit - 1)
    entries = np.empty((*counts.shape, 2), np.uint32)
    entries[..., 0] = phrases.lengths | counts << 8 | last << 16 | seen << 24
    entries[..., 1] = starts
    return entries, (phrases.columns | (phrases.digits.astype(np.uint16) - 1) << 8).astype(np.uint16)


@dataclass(frozen=True, slots=True)
class EntryForm:
    """How the gather kernel's entries are scaled (kernels/gather.cu, items 3, 6 and 7).

    tokens : 1, 2, 4 or 8
    segmented : x is spread over the banks
    n_nonzeros : places for nonzeros; more than 3 take two words
    """

    tokens: int
    segmented: bool
    n_nonzeros: int

    @property
    def scale(self) -> int:
        """What byte 0 holds per digit of the phrase, and a nonzero's byte per column."""
        return 4 if self.tokens > 1 else 3 if self.segmented else 2

    @property
    def max_phrase(self) -> int:
        """Digits of the longest phrase whose entry fits; natural order with one token keeps the top bit for itself."""
        return 64 - 1 if self.scale == 4 else 85 if self.scale == 3 else 64

    @property
    def n_words(self) -> int:
        """32-bit words per entry."""
        return 1 if self.n_nonzeros <= 3 else 2


def gather_entries(phrases: Phrases, form: EntryForm) -> UInt32Array:
    """Build the gather kernel's table of one 8-bit dictionary.

    Returns uint32[256, 2, words]: codeword-major, so that the state is the lowest bit of the place.
    Raises ValueError where the dictionary does not fit the form.
    """
    if phrases.lengths.shape[1] != 256:
        raise ValueError("the gather kernel takes 8-bit codewords")
    if phrases.max_nonzeros > form.n_nonzeros or int(phrases.lengths.max(initial=0)) > form.max_phrase:
        raise ValueError(f"phrases do not fit {form}")
    missing = 0x80 if form.tokens == 1 and not form.segmented else 2
    table = np.full((256, 2, 4 * form.n_words), missing, np.uint8)
    for state in range(2):
        for codeword in range(256):
            entry = table[codeword, state]
            entry[0] = form.scale * int(phrases.lengths[state, codeword])
            start = int(phrases.starts[state, codeword])
            for z in range(int(phrases.n_nonzeros[state, codeword])):
                is_plus = int(phrases.digits[start + z]) == 2
                flag = int(is_plus) if form.tokens == 1 else int(not is_plus)
                entry[1 + z] = form.scale * int(phrases.columns[start + z]) + flag
    return np.ascontiguousarray(table).view("<u4")


@dataclass(frozen=True, slots=True)
class ScatterForm:
    """The entries of the decoder to two-bit digits (kernels/decode_digits.cu, item 1).

    n_nonzeros : places for nonzeros; more than 3 take two words
    """

    n_nonzeros: int

    #: Digits of the longest phrase whose entry fits.
    max_phrase = 127

    @property
    def n_words(self) -> int:
        """32-bit words per entry."""
        return 1 if self.n_nonzeros <= 3 else 2


def scatter_entries(phrases: Phrases, form: ScatterForm) -> UInt32Array:
    """Build the table of one 8-bit dictionary for the decoder to two-bit digits.

    Returns uint32[256, 2, words]: byte 0 is twice the phrase's length, byte z twice the offset of nonzero z, plus 1 for a +; a
    phrase with fewer nonzeros than places repeats its last one; without any, the last byte is 255.
    Raises ValueError where the dictionary does not fit the form.
    """
    if phrases.lengths.shape[1] != 256:
        raise ValueError("two-bit digits take 8-bit codewords")
    if phrases.max_nonzeros > form.n_nonzeros or int(phrases.lengths.max(initial=0)) > form.max_phrase:
        raise ValueError(f"phrases do not fit {form}")
    table = np.zeros((256, 2, 4 * form.n_words), np.uint8)
    for state in range(2):
        for codeword in range(256):
            entry = table[codeword, state]
            entry[0] = 2 * int(phrases.lengths[state, codeword])
            start, n = int(phrases.starts[state, codeword]), int(phrases.n_nonzeros[state, codeword])
            for z in range(form.n_nonzeros if n else 0):
                at = start + min(z, n - 1)
                entry[1 + z] = 2 * int(phrases.columns[at]) + int(phrases.digits[at] == 2)
            if not n:
                entry[-1] = 255
    return np.ascontiguousarray(table).view("<u4")


def encoder_trees(dictionary: Dictionary) -> tuple[npt.NDArray[np.int32], tuple[int, int]]:
    """Build the parse trees as the encoder walks them (kernels/encode.cu).

    Returns int32[nodes, 4]: the children for the digits 0, - and +, and the codeword, -1 for none; and the two roots.
    """
    nodes: list[list[int]] = []

    def new() -> int:
        nodes.append([-1, -1, -1, -1])
        return len(nodes) - 1

    roots = []
    raw = dictionary.digits.tobytes()
    for state in range(dictionary.n_states):
        root = new()
        roots.append(root)
        for codeword in range(dictionary.n_codewords):
            length = int(dictionary.lengths[state, codeword])
            if not length:
                continue
            start = int(dictionary.starts[state, codeword])
            node = root
            for digit in raw[start : start + length]:
                if nodes[node][digit] < 0:
                    child = new()
                    nodes[node][digit] = child
                node = nodes[node][digit]
            nodes[node][3] = codeword
    return np.array(nodes, np.int32).reshape(-1, 4), (roots[0], roots[-1])


def encoder_transitions(dictionary: Dictionary) -> UInt32Array | None:
    """Build the one-look-up-per-digit form of two small parse trees (`count_rows_small` in kernels/encode.cu).

    Returns uint32[nodes, 4], leaves left out; None where the dictionary is too large or a table.
    """
    if dictionary.kind != "aivf" or dictionary.code_bits != 8:
        return None
    nodes, roots = encoder_trees(dictionary)
    is_leaf = (nodes[:, 3] >= 0) & (nodes[:, 0] < 0)
    inner = np.flatnonzero(~is_leaf)
    number = np.full(len(nodes), -1)
    number[inner] = np.arange(len(inner))  # root 0 is node 0
    if len(inner) > 8192:
        return None

    def arrive(node: int) -> tuple[int, int]:
        """Next node's number, and the codeword + 1 of a leaf."""
        return (0, int(nodes[node, 3]) + 1) if is_leaf[node] else (int(number[node]), 0)

    table = np.zeros((len(inner), 4), np.uint32)
    for row, node in enumerate(inner.tolist()):
        for digit, place in ((0, 0), (1, 3), (2, 1)):
            child, put = int(nodes[node, digit]), []
            if child < 0:
                if node == roots[1]:
                    continue  # a 0 never comes here
                put.append(int(nodes[node, 3]) + 1)
                child = int(nodes[roots[1], digit])
            following, leaf = arrive(child)
            put = [*put, *([leaf] if leaf else [])]
            first, second = [*put, 0, 0][:2]
            table[row, place] = following | first << 14 | second << 23
        end = node
        if node not in roots:
            while nodes[end, 3] < 0:
                end = int(nodes[end, 0])
            table[row, 2] = (int(nodes[end, 3]) + 1) << 14
    return table
