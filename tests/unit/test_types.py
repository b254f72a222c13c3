"""The value types: limits of the specification, equality of dictionaries, and what a stack says of itself."""

import numpy as np

import qmoecodec as q
from qmoecodec import types
from qmoecodec.dictionary import aivf_from_symbols, parse, table_from_phrases


def table(**phrases: bytes) -> q.Dictionary:
    full = [b""] * 256
    for name, phrase in phrases.items():
        full[int(name[1:])] = phrase
    return table_from_phrases(full, code_bits=8)


def test_limits_are_those_of_the_specification() -> None:
    assert types.CODE_BITS == (8, 12, 16)
    assert (types.MAX_PHRASE, types.MAX_DICTIONARIES) == (255, 256)
    assert (types.MAX_DIM, types.MAX_WEIGHTS) == (2147483647, 4611686018427387903)


def test_dictionaries_are_equal_where_their_bytes_and_their_use_are() -> None:
    one = table(c0=b"\0", c7=b"\1\2")
    same = parse(one.data, kind="table", code_bits=8, threshold=256)
    assert one == same and hash(one) == hash(same) and one is not same
    assert one != table(c0=b"\0", c7=b"\1\1")
    assert one != 256
    assert one.__eq__(256) is NotImplemented
    leaves = np.array([0, 0, 0], np.uint8), np.array([0, 0], np.uint8)
    low, high = (aivf_from_symbols(leaves, code_bits=8, threshold=t) for t in (200, 201))
    assert low.data == high.data and low != high and hash(low) != hash(high)
    assert len({one, same, low, high}) == 3
    assert repr(one) == f"<Dictionary table 8 bit, T=256, {len(one.data)} bytes>"


def test_what_a_dictionary_says_of_itself() -> None:
    one = table(c0=b"\0", c7=b"\1\2\0", c9=b"\2")
    assert [one.phrase(0, c) for c in (0, 1, 7, 8, 9)] == [(0,), (), (1, 2, 0), (), (2,)]
    assert (one.n_states, one.n_codewords, one.max_phrase) == (1, 256, 3)
    assert (table().max_phrase, table().n_codewords) == (0, 256)


def test_what_a_stack_says_of_itself() -> None:
    digits = np.zeros((3, 5, 7), np.int8)
    digits[:, 0, 0] = 1
    wide = table_from_phrases([b"\0", b"\2", *[b""] * 4094], code_bits=12)
    encoded = q.encode(digits, dictionary=wide)
    assert (encoded.n_weights, encoded.code_bits) == (105, 12)
    assert encoded.payload_bits == 8 * len(encoded.codes) == 8 * 3 * 5 * 11
    assert q.encode(digits[:0], dictionary=wide).code_bits == 8
    assert q.encode(digits[:0], dictionary=wide).n_weights == 0
    assert not encoded.is_matrix and q.encode(digits[0], dictionary=wide).is_matrix


def test_stacks_are_compared_by_identity() -> None:
    one, two = (q.encode(np.zeros((1, 1, 1), np.int8)) for _ in range(2))
    assert one.__eq__(one) is True and one != two and len({one, two}) == 2
    again = q.Encoded(one.shape, one.codes, one.code_offsets, one.row_lengths, one.dictionary_index, one.dictionaries)
    assert again.is_matrix is False
