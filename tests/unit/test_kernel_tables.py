"""What the kernels look up: every phrase can be read back from each table, and what is kept is bounded."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest

import qmoecodec as q
from qmoecodec._kernels import tables
from qmoecodec.dictionary import aivf, aivf_from_symbols, parse, table_from_phrases

PHRASES = {
    "none": [],
    "zeros": [b"\0", b"\0" * 255, b"\0" * 8],
    "one": [b"", b"\2", b"\0\1\0", b"\0" * 6 + b"\1", b"\0" * 200],
    "two": [b"\1\2", b"\0\2\0\1", b"\0\2", b"\0", b"\0" * 15 + b"\1"],
    "three": [b"\1\2\1", b"\0\2\2\0\2", b"\0" * 252 + b"\1\1\2", b"\0\1", b"", b"\2\0\0\1"],
    "four": [b"\1\2\1\2", b"\0" * 3 + b"\2", b"\1" * 24],
}
VALUES = {0: 0, 1: -1, 2: 1}


def dictionary(name: str) -> q.Dictionary:
    if name == "trees":  # 000, 0-, 0+, -, +, 00 (incomplete); -, +
        return aivf_from_symbols([np.uint8([2, 1, 0, 0, 0, 0, 0]), np.uint8([0, 0])], code_bits=8, threshold=200)
    if name == "built":
        return aivf.build(0.06, 0.88, 0.06, code_bits=8)
    return table_from_phrases(PHRASES[name] + [b""] * (256 - len(PHRASES[name])), code_bits=8)


@pytest.mark.parametrize("name", [*PHRASES, "trees", "built"])
def test_phrases_can_be_read_back(name: str) -> None:
    """Entry state << code_bits | codeword of each table stands for the phrase of that state and codeword."""
    d = dictionary(name)
    t = tables.decode_tables(d)
    phrases = [[VALUES[digit] for digit in d.phrase(state, c)] for state in range(d.n_states) for c in range(256)]
    nonzeros = [sum(map(abs, phrase)) for phrase in phrases]
    assert t.lengths.tolist() == [len(phrase) for phrase in phrases]
    assert t.last_nonzero.tolist() == [max((k + 1 for k, v in enumerate(phrase) if v), default=0) for phrase in phrases]
    assert t.counts.tolist() == [[phrase.count(v) for v in (0, -1, 1)] for phrase in phrases]
    width = -(-max(map(len, phrases)) // 8) * 8
    assert t.words.view(np.int8).tolist() == [phrase + [0] * (width - len(phrase)) for phrase in phrases]
    assert t.three == (max(nonzeros) == 3)
    if max(nonzeros) > 3:
        assert len(t.scatter) == len(t.gather) == 0
        return
    for phrase, scatter, gather in zip(phrases, t.scatter.tolist(), t.gather.tolist(), strict=True):
        assert scatter >> 63 == gather >> 63 == (not phrase)
        stored = scatter.to_bytes(8, "little")
        assert stored[0] == len(phrase) and stored[7] & 127 == 0
        digits = [0] * (len(phrase) or 1)
        for place, value in zip(stored[1:4], np.frombuffer(stored[4:7], np.int8).tolist(), strict=True):
            digits[place] = value
        assert digits == (phrase or [0])
        length, *fields = (gather >> shift & 0xFFFF for shift in (0, 16, 32, 48))
        assert length == 3 * len(phrase)
        digits = [0] * len(phrase)
        for field in (fields[0], fields[1], fields[2] & 0x7FFF):
            if field:
                assert field % 3 in (1, 2)
                digits[field // 3] += 1 if field % 3 == 1 else -1
        assert digits == phrase


def leaves(threshold: int) -> q.Dictionary:
    return parse(bytes(2), kind="aivf", code_bits=8, threshold=threshold)


@pytest.fixture
def memory() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_kept", OrderedDict())
        yield patch


def builder(name: str, built: list[tuple[str, int]]) -> Any:
    """Return a kept function that notes what it builds: twelve bytes for each codeword below the threshold."""

    def build(d: q.Dictionary) -> tables.EncodeTables:
        built.append((name, d.threshold))
        return tables.EncodeTables(np.zeros(d.threshold, np.uint64), np.zeros(d.threshold, np.int32))

    build.__name__ = name
    return tables.kept(build)


def test_tables_are_built_once(memory: pytest.MonkeyPatch) -> None:
    built: list[tuple[str, int]] = []
    one, other = builder("one", built), builder("other", built)
    first = one(leaves(7))
    assert one(leaves(7)) is first and len(first.steps) == 7
    assert one(leaves(9)) is not first and other(leaves(7)) is not first
    assert one(leaves(7)) is first and one.__name__ == "one"
    assert built == [("one", 7), ("one", 9), ("other", 7)]


def test_tables_of_equal_dictionaries_are_the_same() -> None:
    one, two = dictionary("trees"), dictionary("trees")
    assert one is not two
    for build in (tables.decode_tables, tables.encode_tables, tables.trie):
        assert build(one) is build(two)


def test_tables_used_longest_ago_make_room(memory: pytest.MonkeyPatch) -> None:
    memory.setattr(tables, "KEPT_BYTES", 12 * 60)
    built: list[tuple[str, int]] = []
    one = builder("one", built)
    for size in (10, 20, 30, 10):  # full to the last byte
        one(leaves(size))
    assert built == [("one", 10), ("one", 20), ("one", 30)]
    one(leaves(19))  # in place of 20, although 10 is older
    one(leaves(29))  # in place of 30
    for size in (10, 19, 29):
        one(leaves(size))
    assert built[3:] == [("one", 19), ("one", 29)]
    one(leaves(20))  # in place of 10 and 19
    one(leaves(29))
    assert built[5:] == [("one", 20)]
    one(leaves(200))  # in place of all: the last is kept, whatever it takes
    one(leaves(200))
    assert built[6:] == [("one", 200)]
    for size in (29, 20):
        one(leaves(size))
    assert built[7:] == [("one", 29), ("one", 20)]


def test_24_mebibytes_of_tables_are_kept(memory: pytest.MonkeyPatch) -> None:
    """As SECURITY.md and LIMITS.md of the specification say."""
    built: list[int] = []

    @tables.kept
    def build(d: q.Dictionary) -> tables.EncodeTables:
        built.append(d.threshold)
        return tables.EncodeTables(np.zeros(1 << 17, np.uint64), np.zeros(0, np.int32))

    for threshold in [*range(3, 27), *range(3, 27)]:
        build(leaves(threshold))
    assert built == [*range(3, 27)]
    for threshold in (27, 4, 3):  # 3 made room for 27
        build(leaves(threshold))
    assert built[24:] == [27, 3]
