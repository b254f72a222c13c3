"""The bytes of dictionaries: what `parse` accepts, and each reason it gives for what it does not (spec §4)."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmoecodec.dictionary import aivf_from_symbols, parse, table_from_phrases
from qmoecodec.dictionary.serial import pack_two_bits
from qmoecodec.errors import FormatError

L, I, N = 0, 1, 2  # noqa: E741  leaf, incomplete, internal

# Tree 0: 0 incomplete, 00, -, +; tree 1: -, + incomplete, +0.
SMALL = [I, L, L, L, L, I, L]


def _symbols(*symbols: int) -> bytes:
    return pack_two_bits(np.array(symbols, np.uint8))


def _aivf(data: bytes, threshold: int = 3, code_bits: int = 8) -> Callable[[], object]:
    return lambda: parse(data, kind="aivf", code_bits=code_bits, threshold=threshold)


def _table(lengths: bytes, digits: bytes, threshold: int = 256) -> Callable[[], object]:
    return lambda: parse(lengths.ljust(256, b"\0") + digits, kind="table", code_bits=8, threshold=threshold)


def _chain(depth: int, *, state: int) -> list[int]:
    """Tree whose first branch is `depth` digits deep: incomplete nodes down to a leaf."""
    return [I] * (depth - 1) + [L] * (3 - state)


def test_small_trees_expand() -> None:
    dictionary = parse(_symbols(*SMALL), kind="aivf", code_bits=8, threshold=3)
    assert [dictionary.phrase(0, c) for c in range(5)] == [(0, 0), (1,), (2,), (0,), ()]
    assert [dictionary.phrase(1, c) for c in range(5)] == [(1,), (2, 0), (), (2,), ()]
    assert (dictionary.n_states, dictionary.max_phrase) == (2, 2)
    assert (
        aivf_from_symbols([np.array(SMALL[:4], np.uint8), np.array(SMALL[4:], np.uint8)], code_bits=8, threshold=3) == dictionary
    )


def test_small_table_expands() -> None:
    dictionary = parse(bytes([1, 0, 2, 1]).ljust(256, b"\0") + _symbols(2, 1, 0, 0), kind="table", code_bits=8, threshold=256)
    assert [dictionary.phrase(0, c) for c in range(5)] == [(2,), (), (1, 0), (0,), ()]
    assert table_from_phrases([b"\2", b"", b"\1\0", b"\0", *[b""] * 252], code_bits=8) == dictionary


def test_expanded_arrays_are_read_only() -> None:
    dictionary = parse(_symbols(*SMALL), kind="aivf", code_bits=8, threshold=3)
    for array in (dictionary.lengths, dictionary.starts, dictionary.digits):
        assert not array.flags.writeable


def test_phrases_of_255_digits_are_accepted() -> None:
    dictionary = _aivf(_symbols(*_chain(255, state=0), *_chain(1, state=1)), threshold=3, code_bits=12)()
    assert dictionary.max_phrase == 255  # type: ignore[attr-defined]
    assert parse(bytes([255]).ljust(256, b"\0") + bytes(64), kind="table", code_bits=8, threshold=256).max_phrase == 255


def test_a_table_may_be_empty() -> None:
    assert parse(bytes(256), kind="table", code_bits=8, threshold=256).max_phrase == 0


MALFORMED = {
    "aivf: threshold below 0": ("dictionary_threshold", _aivf(_symbols(*SMALL), -1)),
    "aivf: threshold above 2^b": ("dictionary_threshold", _aivf(_symbols(*SMALL), 257)),
    "aivf: more leaves than the threshold": ("dictionary_threshold", _aivf(_symbols(*SMALL), 2)),
    "aivf: more leaves than the threshold, tree 1": (
        "dictionary_threshold",
        _aivf(_symbols(L, L, L, N, L, L, L, L)),
    ),
    "aivf: no room for incomplete nodes": ("dictionary_threshold", _aivf(_symbols(*SMALL), 256)),
    "aivf: no room for incomplete nodes, tree 1": ("dictionary_threshold", _aivf(_symbols(L, L, L, L, I, L), 256)),
    "aivf: node symbol 3": ("dictionary_symbol", _aivf(_symbols(3, *SMALL[1:]))),
    "aivf: node symbol 3, last node": ("dictionary_symbol", _aivf(_symbols(*SMALL[:-1], 3))),
    "aivf: empty": ("dictionary_size", _aivf(b"")),
    "aivf: tree 1 missing": ("dictionary_size", _aivf(_symbols(*SMALL[:4]))),
    "aivf: last byte missing": ("dictionary_size", _aivf(_symbols(*SMALL)[:-1])),
    "aivf: one byte too many": ("dictionary_size", _aivf(_symbols(*SMALL) + b"\0")),
    "aivf: padding set": ("dictionary_padding", _aivf(_symbols(*SMALL, 1))),
    "aivf: padding set, high bit": ("dictionary_padding", _aivf(_symbols(*SMALL, 2))),
    "aivf: phrase of 256 digits": (
        "dictionary_phrase_length",
        _aivf(_symbols(*_chain(256, state=0), *_chain(1, state=1)), 3, 12),
    ),
    "aivf: phrase of 256 digits below an internal node": (
        "dictionary_phrase_length",
        _aivf(_symbols(*[N] * 255, *[L] * 513, L, L), 2048, 12),
    ),
    "table: threshold below 2^b": ("dictionary_threshold", _table(b"\1", b"\0", 255)),
    "table: threshold above 2^b": ("dictionary_threshold", _table(b"\1", b"\0", 257)),
    "table: empty": ("dictionary_size", lambda: parse(b"", kind="table", code_bits=8, threshold=256)),
    "table: lengths missing": ("dictionary_size", lambda: parse(bytes(255), kind="table", code_bits=8, threshold=256)),
    "table: digits missing": ("dictionary_size", _table(b"\5", b"\0")),
    "table: one byte too many": ("dictionary_size", _table(b"\4", b"\0\0")),
    "table: one byte for no digit": ("dictionary_size", _table(b"", b"\0")),
    "table: digit 3": ("dictionary_symbol", _table(b"\4", _symbols(0, 3, 0, 0))),
    "table: digit 3 and padding set": ("dictionary_symbol", _table(b"\3", _symbols(0, 1, 3, 1))),
    "table: padding set": ("dictionary_padding", _table(b"\3", _symbols(0, 1, 2, 1))),
    "table: padding set, high bit": ("dictionary_padding", _table(b"\3", _symbols(0, 1, 2, 2))),
    "table: phrase twice": ("dictionary_duplicate", _table(b"\1\1", _symbols(2, 2))),
    "table: phrase twice, far apart": ("dictionary_duplicate", _table(b"\2\1\0\2", _symbols(1, 2, 1, 1, 2))),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_dictionaries_are_rejected_with_their_reason(case: str) -> None:
    reason, read = MALFORMED[case]
    with pytest.raises(FormatError) as error:
        read()
    assert error.value.reason == reason


def test_every_reason_has_two_cases() -> None:
    reasons = [reason for reason, _ in MALFORMED.values()]
    assert all(reasons.count(r) >= 2 for r in reasons)


@pytest.mark.parametrize("code_bits", [0, 7, 9, 32])
def test_code_bits_that_do_not_exist(code_bits: int) -> None:
    with pytest.raises(ValueError, match="code_bits"):
        parse(b"", kind="aivf", code_bits=code_bits, threshold=0)


@pytest.mark.parametrize("kind", ["", "a", "huffman", "tables", "zip"])
def test_a_kind_that_does_not_exist(kind: str) -> None:
    with pytest.raises(ValueError, match="kind"):
        parse(b"", kind=kind, code_bits=8, threshold=0)  # type: ignore[arg-type]


@given(data=st.binary(max_size=400), kind=st.sampled_from(["aivf", "table"]), threshold=st.integers(-1, 257))
def test_any_bytes_are_expanded_or_rejected(data: bytes, kind: str, threshold: int) -> None:
    try:
        dictionary = parse(data, kind=kind, code_bits=8, threshold=threshold)  # type: ignore[arg-type]
    except FormatError as error:
        assert error.reason.startswith("dictionary_")
    else:
        assert dictionary.data == data


@given(st.data())
def test_random_trees_round_trip(data: st.DataObject) -> None:
    trees = []
    for state in range(2):
        symbols: list[int] = []
        left = 3 - state
        while left:
            symbol = data.draw(st.sampled_from([L, L, L, I, N] if len(symbols) < 40 else [L]))
            symbols.append(symbol)
            left += (-1, 0, 2)[symbol]
        trees.append(np.array(symbols, np.uint8))
    built = aivf_from_symbols(trees, code_bits=8, threshold=128)
    assert parse(built.data, kind="aivf", code_bits=8, threshold=128) == built
    for state, tree in enumerate(trees):
        assert np.count_nonzero(built.lengths[state, :128]) == np.count_nonzero(tree == L)
        assert np.count_nonzero(built.lengths[state, 128:]) == np.count_nonzero(tree == I)


@given(st.sets(st.binary(min_size=1, max_size=9).map(lambda b: bytes(d % 3 for d in b)), max_size=256))
def test_random_tables_round_trip(phrases: set[bytes]) -> None:
    ordered = sorted(phrases, key=lambda p: p[::-1])
    built = table_from_phrases(ordered + [b""] * (256 - len(ordered)), code_bits=8)
    assert [bytes(built.phrase(0, c)) for c in range(len(ordered))] == ordered


def test_a_table_has_a_phrase_or_none_for_each_codeword() -> None:
    with pytest.raises(ValueError, match="3 phrases"):
        table_from_phrases([b"\0"] * 3, code_bits=8)
