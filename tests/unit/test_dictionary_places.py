"""What is said of a damaged dictionary: the byte, and in words."""

from __future__ import annotations

import numpy as np
import pytest

from qmoecodec.dictionary import parse
from qmoecodec.dictionary.serial import pack_two_bits
from qmoecodec.errors import FormatError

LEAF, INCOMPLETE, INTERNAL, NONE = range(4)


def symbols(*numbers: int) -> bytes:
    return pack_two_bits(np.uint8(numbers))


@pytest.mark.parametrize(
    ("data", "threshold", "reason", "byte", "message"),
    [
        (b"", 3, "dictionary_size", 0, "the trees go on beyond the last byte"),
        (symbols(INTERNAL, LEAF, LEAF, LEAF), 9, "dictionary_size", 1, "the trees go on beyond the last byte"),
        (symbols(LEAF, LEAF, LEAF, LEAF, LEAF, LEAF, LEAF, LEAF, LEAF), 9, "dictionary_size", 2, "bytes follow the last node"),
        (symbols(LEAF, LEAF, LEAF, LEAF, LEAF) + b"\0", 9, "dictionary_size", 2, "bytes follow the last node"),
        (symbols(INCOMPLETE, INCOMPLETE, LEAF, LEAF, LEAF, INCOMPLETE, LEAF, LEAF) + b"\0", 9, "dictionary_size", 2,
         "bytes follow the last node"),
        (symbols(LEAF, LEAF, LEAF, LEAF, LEAF, NONE), 9, "dictionary_padding", 1, None),
        (symbols(NONE), 9, "dictionary_symbol", 0, "node symbol 3"),
        (symbols(LEAF, LEAF, LEAF, NONE), 9, "dictionary_symbol", 0, "node symbol 3"),
        (symbols(LEAF, LEAF, LEAF, LEAF, NONE), 9, "dictionary_symbol", 1, "node symbol 3"),
        (symbols(LEAF, LEAF, LEAF, LEAF, LEAF), 2, "dictionary_threshold", None, "tree 0 has more than 2 leaves"),
        (symbols(*[INCOMPLETE, LEAF] * 3, *[INCOMPLETE] * 9), 254, "dictionary_threshold", None,
         "tree 0 has more than 2 incomplete nodes"),
        (symbols(*[INCOMPLETE] * 255, LEAF, LEAF, LEAF, LEAF, LEAF), 3, "dictionary_phrase_length", 63, None),
        (symbols(INTERNAL, LEAF, *[INTERNAL] * 255), 9, "dictionary_phrase_length", 63, None),
        (symbols(INTERNAL, LEAF, LEAF, *[INTERNAL] * 255), 9, "dictionary_phrase_length", 64, None),
        (symbols(LEAF, LEAF, LEAF, LEAF, LEAF), 257, "dictionary_threshold", None, "threshold 257 is not in 0..2^8"),
        (symbols(LEAF, LEAF, LEAF, LEAF, LEAF), -1, "dictionary_threshold", None, "threshold -1 is not in 0..2^8"),
    ],
)  # fmt: skip
def test_trees(data: bytes, threshold: int, reason: str, byte: int | None, message: str | None) -> None:
    code_bits = 12 if reason == "dictionary_phrase_length" else 8
    with pytest.raises(FormatError) as caught:
        parse(data, kind="aivf", code_bits=code_bits, threshold=threshold)  # type: ignore[arg-type]
    assert caught.value.reason == reason
    assert caught.value.where == ({} if byte is None else {"byte": byte})
    assert message is None or caught.value.message == message


@pytest.mark.parametrize(
    ("lengths", "digits", "reason", "byte", "message"),
    [
        ([3, 2], [0, 1, 2, 3, 0], "dictionary_symbol", 256, "digit 3"),
        ([3, 2], [0, 1, 2, 1, 3], "dictionary_symbol", 257, "digit 3"),
        ([3, 2], [3, 1, 2, 1, 3], "dictionary_symbol", 256, "digit 3"),
        ([3, 2], [0, 1, 2, 1, 2, 1], "dictionary_padding", 257, None),
        ([3, 2], [0, 1, 2, 1], "dictionary_size", None, "1 bytes for 5 digits"),
        ([3, 2], [0] * 9, "dictionary_size", None, "3 bytes for 5 digits"),
        ([2, 2], [0, 1, 0, 1], "dictionary_duplicate", None, None),
    ],
)
def test_tables(lengths: list[int], digits: list[int], reason: str, byte: int | None, message: str | None) -> None:
    data = bytes(lengths).ljust(256, b"\0") + symbols(*digits)
    with pytest.raises(FormatError) as caught:
        parse(data, kind="table", code_bits=8, threshold=256)
    assert caught.value.reason == reason
    assert caught.value.where == ({} if byte is None else {"byte": byte})
    assert message is None or caught.value.message == message


def test_lengths_and_thresholds_of_a_table() -> None:
    for data, threshold, message in (
        (bytes(255), 256, "255 bytes cannot hold 256 lengths"), (bytes(256), 255, "a table has threshold 256, not 255"),
    ):  # fmt: skip
        with pytest.raises(FormatError) as caught:
            parse(data, kind="table", code_bits=8, threshold=threshold)
        assert caught.value.message == message
