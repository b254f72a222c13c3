"""The reference codec: spec §5 with plain loops, one row at a time. Slow on purpose; every fast path must match it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from qmoecodec.errors import EncodeError, FormatError
from qmoecodec.types import Dictionary


def encode_row(digits: Sequence[int], dictionary: Dictionary) -> list[int]:
    """Encode one row into codewords, the only canonical way (spec §5.1).

    digits : numbers 0, 1 (for -) and 2 (for +)
    Raises EncodeError where no phrase matches (only a table can be so incomplete).
    """
    return (_encode_aivf if dictionary.kind == "aivf" else _encode_table)(digits, dictionary)


def _encode_aivf(digits: Sequence[int], dictionary: Dictionary) -> list[int]:
    # A node is named by its state and its string; the trees are given by the codewords' nodes and all their prefixes.
    codeword_of: dict[tuple[int, tuple[int, ...]], int] = {}
    nodes: set[tuple[int, tuple[int, ...]]] = set()
    for state in range(2):
        for codeword in range(dictionary.n_codewords):
            phrase = dictionary.phrase(state, codeword)
            if phrase:
                codeword_of[state, phrase] = codeword
                nodes.update((state, phrase[:k]) for k in range(len(phrase) + 1))

    codewords: list[int] = []
    state = 0
    string: tuple[int, ...] = ()
    for digit in digits:
        if (state, (*string, digit)) not in nodes:  # incomplete, and the digit is not 0
            codewords.append(codeword_of[state, string])
            state, string = 1, ()
        string = (*string, digit)
        if codeword_of.get((state, string), dictionary.threshold) < dictionary.threshold:  # a leaf
            codewords.append(codeword_of[state, string])
            state, string = 0, ()
    if string:
        while (state, string) not in codeword_of:
            string = (*string, 0)
        codewords.append(codeword_of[state, string])
    return codewords


def _encode_table(digits: Sequence[int], dictionary: Dictionary) -> list[int]:
    codeword_of = {dictionary.phrase(0, c): c for c in range(dictionary.n_codewords) if dictionary.lengths[0, c]}
    codewords: list[int] = []
    at = 0
    while at < len(digits):
        left = len(digits) - at
        ahead = (*digits[at : at + dictionary.max_phrase], *([0] * dictionary.max_phrase))
        matches = [n for n in range(1, dictionary.max_phrase + 1) if ahead[:n] in codeword_of]
        if not matches:
            raise EncodeError(f"no phrase of the dictionary matches at column {at}")
        reaching = [n for n in matches if n >= left]
        length = reaching[0] if reaching else matches[-1]
        codewords.append(codeword_of[ahead[:length]])
        at += length
    return codewords


def decode_row(codewords: Iterable[int], *, cols: int, dictionary: Dictionary) -> list[int]:
    """Expand the codewords of one row into its digits 0, 1, 2 (spec §5.2).

    Raises FormatError: unused_codeword, row_overrun, row_underrun, overrun_nonzero.
    """
    digits: list[int] = []
    state = 0
    for k, codeword in enumerate(codewords):
        if len(digits) >= cols:
            raise FormatError("row_overrun", codeword=k)
        phrase = dictionary.phrase(state, codeword)
        if not phrase:
            raise FormatError("unused_codeword", codeword=k)
        digits.extend(phrase)
        state = int(codeword >= dictionary.threshold)
    if len(digits) < cols:
        raise FormatError("row_underrun", f"{len(digits)} digits for {cols} columns")
    if any(digits[cols:]):
        raise FormatError("overrun_nonzero")
    return digits[:cols]


def pack_row(codewords: Sequence[int], *, code_bits: int) -> bytes:
    """Write codewords as bytes, lowest bit first (spec §5.3)."""
    number = 0
    for k, codeword in enumerate(codewords):
        number |= codeword << (code_bits * k)
    return number.to_bytes((len(codewords) * code_bits + 7) // 8, "little")


def unpack_row(data: bytes, *, n_codewords: int, code_bits: int) -> list[int]:
    """Read codewords from the bytes of one row (spec §5.3).

    Raises FormatError: row_padding.
    """
    check_padding(data, n_codewords=n_codewords, code_bits=code_bits)
    return list(_codewords(data, n_codewords, code_bits))


def _codewords(data: bytes, n_codewords: int, code_bits: int) -> Iterator[int]:
    # One at a time, for a row may go on for megabytes beyond the codeword that is wrong. Two bytes hold any codeword.
    mask = (1 << code_bits) - 1
    places = (divmod(code_bits * k, 8) for k in range(n_codewords))
    return (int.from_bytes(data[byte : byte + 2], "little") >> bit & mask for byte, bit in places)


def check_padding(data: bytes, *, n_codewords: int, code_bits: int) -> None:
    """Check that the bits of a row beyond its codewords are 0 (spec §5.3).

    Raises FormatError: row_padding.
    """
    byte, bit = divmod(n_codewords * code_bits, 8)
    if int.from_bytes(data[byte:], "little") >> bit:
        raise FormatError("row_padding")


def read_row(data: bytes, *, n_codewords: int, cols: int, dictionary: Dictionary) -> list[int]:
    """Expand the bytes of one row into its digits 0, 1, 2, with the checks in the order of spec §9: the padding last.

    Raises FormatError: unused_codeword, row_overrun, row_underrun, overrun_nonzero, row_padding.
    """
    digits = decode_row(_codewords(data, n_codewords, dictionary.code_bits), cols=cols, dictionary=dictionary)
    check_padding(data, n_codewords=n_codewords, code_bits=dictionary.code_bits)
    return digits
