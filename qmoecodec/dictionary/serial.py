"""Reading and writing of dictionaries (spec §4.2, §4.3): plain loops, the only place that knows their bytes."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Final

import numpy as np

from qmoecodec.errors import FormatError
from qmoecodec.types import CODE_BITS, MAX_PHRASE, Dictionary, DictionaryKind, UInt8Array

LEAF: Final = 0
INCOMPLETE: Final = 1
INTERNAL: Final = 2


def parse(data: bytes, *, kind: DictionaryKind, code_bits: int, threshold: int) -> Dictionary:
    """Expand a serialised dictionary (spec §4).

    data : the bytes of a dictionary tensor
    Raises FormatError: dictionary_threshold, dictionary_symbol, dictionary_size, dictionary_padding,
    dictionary_phrase_length, dictionary_duplicate; ValueError for a kind or code_bits that does not exist.
    """
    if code_bits not in CODE_BITS:
        raise ValueError(f"code_bits is one of {CODE_BITS}, not {code_bits}")
    if not 0 <= threshold <= 1 << code_bits:
        raise FormatError("dictionary_threshold", f"threshold {threshold} is not in 0..2^{code_bits}")
    if kind == "aivf":
        return _parse_aivf(data, code_bits, threshold)
    if kind == "table":
        return _parse_table(data, code_bits, threshold)
    raise ValueError(f"no dictionary kind {kind!r}")


def _assemble(
    kind: DictionaryKind, code_bits: int, threshold: int, trees: Sequence[dict[int, list[bytes]]], data: bytes
) -> Dictionary:
    """Lay phrases out as arrays; trees[state] maps the first of some codewords to their phrases (b"" where unused)."""
    shape = len(trees), 1 << code_bits
    n_codewords = shape[0] * shape[1]
    # Most of a small dictionary of 16 bits is not touched, and costs nothing where the memory is new; what numpy hands out
    # may have been used before.
    blank = mmap.mmap(-1, 5 * n_codewords, mmap.MAP_PRIVATE)
    starts = np.frombuffer(blank, np.uint32, n_codewords).reshape(shape)
    lengths = np.frombuffer(blank, np.uint8, n_codewords, 4 * n_codewords).reshape(shape)
    at = 0
    for state, tree in enumerate(trees):
        for first, phrases in tree.items():
            n = np.fromiter(map(len, phrases), np.uint8, len(phrases))
            ends = at + np.cumsum(n, dtype=np.uint32)
            lengths[state, first : first + len(n)] = n
            starts[state, first : first + len(n)] = ends - n
            at = int(ends[-1]) if len(n) else at
    digits = np.frombuffer(b"".join(p for tree in trees for phrases in tree.values() for p in phrases), np.uint8)
    for array in (lengths, starts, digits):
        array.setflags(write=False)
    return Dictionary(kind, code_bits, threshold, lengths, starts, digits, data)


def _parse_aivf(data: bytes, code_bits: int, threshold: int) -> Dictionary:
    n_codewords = 1 << code_bits
    at = 0  # node symbols read
    trees: list[dict[int, list[bytes]]] = []
    for state in range(2):
        leaves: list[bytes] = []
        incomplete: list[bytes] = []
        # Strings whose node symbol is still to come; the last one is next in preorder.
        pending = [b"\x02", b"\x01", b"\x00"][: 3 - state]
        while pending:
            phrase = pending.pop()
            if at >= 4 * len(data):
                raise FormatError("dictionary_size", "the trees go on beyond the last byte", byte=len(data))
            symbol = data[at // 4] >> (2 * (at % 4)) & 3
            at += 1
            if symbol == LEAF:
                if len(leaves) == threshold:
                    raise FormatError("dictionary_threshold", f"tree {state} has more than {threshold} leaves")
                leaves.append(phrase)
                continue
            if symbol == INCOMPLETE:
                if len(incomplete) == n_codewords - threshold:
                    raise FormatError("dictionary_threshold", f"tree {state} has more than {len(incomplete)} incomplete nodes")
                incomplete.append(phrase)
                children: tuple[bytes, ...] = (b"\x00",)
            elif symbol == INTERNAL:
                children = (b"\x02", b"\x01", b"\x00")
            else:
                raise FormatError("dictionary_symbol", "node symbol 3", byte=(at - 1) // 4)
            if len(phrase) == MAX_PHRASE:
                raise FormatError("dictionary_phrase_length", byte=(at - 1) // 4)
            pending.extend(phrase + child for child in children)
        trees.append({0: leaves, threshold: incomplete})
    if (at + 3) // 4 != len(data):
        raise FormatError("dictionary_size", "bytes follow the last node", byte=(at + 3) // 4)
    if at % 4 and data[-1] >> (2 * (at % 4)):
        raise FormatError("dictionary_padding", byte=len(data) - 1)
    return _assemble("aivf", code_bits, threshold, trees, data)


def _parse_table(data: bytes, code_bits: int, threshold: int) -> Dictionary:
    n_codewords = 1 << code_bits
    if threshold != n_codewords:
        raise FormatError("dictionary_threshold", f"a table has threshold {n_codewords}, not {threshold}")
    if len(data) < n_codewords:
        raise FormatError("dictionary_size", f"{len(data)} bytes cannot hold {n_codewords} lengths")
    lengths = data[:n_codewords]
    n_digits = sum(lengths)
    packed = np.frombuffer(data, np.uint8)[n_codewords:]
    if len(packed) != (n_digits + 3) // 4:
        raise FormatError("dictionary_size", f"{len(packed)} bytes for {n_digits} digits")
    digits = (packed[:, None] >> np.array([0, 2, 4, 6], np.uint8) & 3).ravel().astype(np.uint8)
    bad = np.flatnonzero(digits[:n_digits] == 3)
    if len(bad):
        raise FormatError("dictionary_symbol", "digit 3", byte=n_codewords + int(bad[0]) // 4)
    if digits[n_digits:].any():
        raise FormatError("dictionary_padding", byte=len(data) - 1)
    raw = digits[:n_digits].tobytes()
    phrases, at = [], 0
    for length in lengths:
        phrases.append(raw[at : at + length])
        at += length
    used = [p for p in phrases if p]
    if len(set(used)) != len(used):
        raise FormatError("dictionary_duplicate")
    return _assemble("table", code_bits, threshold, [{0: phrases}], data)


def pack_two_bits(symbols: UInt8Array) -> bytes:
    """Pack numbers 0..3, four to a byte, the first lowest (spec §4.2).

    symbols : uint8[n]
    """
    padded = np.zeros((len(symbols) + 3) // 4 * 4, np.uint8)
    padded[: len(symbols)] = symbols
    quads = padded.reshape(-1, 4)
    return (quads[:, 0] | quads[:, 1] << 2 | quads[:, 2] << 4 | quads[:, 3] << 6).astype(np.uint8).tobytes()


def table_from_phrases(phrases: Sequence[bytes], *, code_bits: int) -> Dictionary:
    """Build a dictionary of kind "table" from its phrases (spec §4.3).

    phrases : phrases[codeword], digits 0, 1, 2 as bytes; b"" where the codeword is unused
    """
    if len(phrases) != 1 << code_bits:
        raise ValueError(f"{len(phrases)} phrases for {code_bits} bits")
    lengths = bytes(len(p) for p in phrases)
    data = lengths + pack_two_bits(np.frombuffer(b"".join(phrases), np.uint8))
    return parse(data, kind="table", code_bits=code_bits, threshold=1 << code_bits)


def aivf_from_symbols(trees: Sequence[UInt8Array], *, code_bits: int, threshold: int) -> Dictionary:
    """Build a dictionary of kind "aivf" from the node symbols of its two trees in preorder (spec §4.2)."""
    data = pack_two_bits(np.concatenate(trees))
    return parse(data, kind="aivf", code_bits=code_bits, threshold=threshold)
