"""Two-tree dictionaries: rates, validity for every string, limits, determinism (spec §4.2)."""

import hashlib
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qmoecodec import reference
from qmoecodec.dictionary import parse
from qmoecodec.dictionary.aivf import MIN_PROBABILITY, build, expected_rate
from qmoecodec.types import Dictionary

# P(0), then bits per digit with 8 and with 12 bits (design table) and with 16 bits (measured here).
RATES = [
    (1 / 3, 1.5914, 1.6043, 1.5910),
    (0.40, 1.5791, 1.5768, 1.5748),
    (0.50, 1.5012, 1.5004, 1.5000),
    (0.60, 1.3796, 1.3767, 1.3750),
    (0.70, 1.1936, 1.1894, 1.1868),
    (0.80, 0.9395, 0.9339, 0.9310),
    (0.85, 0.7839, 0.7758, 0.7716),
    (0.885, 0.6623, 0.6488, 0.6421),
    (0.92, 0.5221, 0.4978, 0.4945),
    (0.95, 0.3704, 0.3510, 0.3528),
    (0.97, 0.2410, 0.2464, 0.2367),
    (0.99, 0.1041, 0.1157, 0.1042),
]

# Weights of -, 0, +: extreme, lopsided and ordinary.
WEIGHTS = [(0, 1, 0), (1, 0, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 1), (1e-300, 1, 0), (3, 90, 7), (5, 2, 1), (1, 3, 1)]

weights = st.one_of(st.sampled_from(WEIGHTS), st.tuples(*[st.floats(0, 1)] * 3).filter(lambda p: sum(p) > 0))
rows = st.one_of(
    st.lists(st.integers(0, 2), max_size=300),
    st.builds(lambda digit, cols: [digit] * cols, st.integers(0, 2), st.integers(0, 300)),
    st.builds(
        lambda seed, cols, zeros: [int(d) for d in _draw((1 - zeros, 2 * zeros, 1 - zeros), cols, seed)],
        st.integers(0, 2**32 - 1),
        st.integers(0, 300),
        st.sampled_from([0.3, 0.5, 0.8, 0.9, 0.97, 0.999]),
    ),
)


def _draw(weights: tuple[float, float, float], n: int, seed: int) -> np.ndarray:
    """Independent digits 0, 1, 2 with these weights of -, 0, +."""
    p = np.array([weights[1], weights[0], weights[2]]) / sum(weights)
    return np.random.default_rng(seed).choice(3, size=n, p=p)


def _max_nonzeros(dictionary: Dictionary) -> int:
    return max(
        sum(d != 0 for d in dictionary.phrase(state, codeword))
        for state in range(2)
        for codeword in range(dictionary.n_codewords)
    )


def _check_structure(dictionary: Dictionary) -> None:
    """Each node has the children that spec §4.2 gives it, and the codewords are numbered in preorder."""
    for state in range(2):
        leaves: set[tuple[int, ...]] = set()
        incomplete: set[tuple[int, ...]] = set()
        for codeword in range(dictionary.n_codewords):
            phrase = dictionary.phrase(state, codeword)
            if phrase:
                (leaves if codeword < dictionary.threshold else incomplete).add(phrase)
        nodes = {p[:n] for p in leaves | incomplete for n in range(1, len(p) + 1)}
        assert leaves.isdisjoint(incomplete)
        for node in nodes - leaves:
            children = {d for d in range(3) if (*node, d) in nodes}
            assert children == ({0} if node in incomplete else {0, 1, 2})
        assert {n for n in nodes if len(n) == 1} == ({(1,), (2,)} if state else {(0,), (1,), (2,)})
        assert all((*leaf, d) not in nodes for leaf in leaves for d in range(3))
        assert sorted(leaves) == [dictionary.phrase(state, c) for c in range(len(leaves))]  # preorder, from 0 on
        first = dictionary.threshold
        assert sorted(incomplete) == [dictionary.phrase(state, first + c) for c in range(len(incomplete))]


@pytest.mark.parametrize("code_bits", [8, 12, 16])
@pytest.mark.parametrize("row", RATES, ids=lambda row: f"{row[0]:.4f}")
def test_rate_reaches_the_design(row: tuple[float, ...], code_bits: int) -> None:
    p_zero, bar = row[0], row[{8: 1, 12: 2, 16: 3}[code_bits]]
    q = (1 - p_zero) / 2
    rate = expected_rate(build(q, p_zero, q, code_bits=code_bits), q, p_zero, q)
    entropy = -p_zero * math.log2(p_zero) - 2 * q * math.log2(q)
    assert entropy <= rate <= bar + 0.0005


def test_dense_ternary_stays_below_five_trits_per_byte() -> None:
    for p_zero in (0.30, 1 / 3, 0.3334, 0.36):
        q = (1 - p_zero) / 2
        assert expected_rate(build(q, p_zero, q, code_bits=8), q, p_zero, q) < 1.6


@pytest.mark.parametrize("code_bits", [8, 12])
@pytest.mark.parametrize("p", [(0.0575, 0.885, 0.0575), (0.02, 0.9, 0.08), (0.3, 0.4, 0.3)])
def test_expected_rate_is_what_long_rows_take(p: tuple[float, float, float], code_bits: int) -> None:
    dictionary = build(*p, code_bits=code_bits)
    digits = _draw(p, 200_000, seed=1).tolist()
    rate = code_bits * len(reference.encode_row(digits, dictionary)) / len(digits)
    assert rate == pytest.approx(expected_rate(dictionary, *p), rel=0.01)


def test_expected_rate_of_other_digits_than_built_for() -> None:
    dictionary = build(1, 8, 1, code_bits=8)
    digits = _draw((2, 5, 3), 100_000, seed=2).tolist()
    rate = 8 * len(reference.encode_row(digits, dictionary)) / len(digits)
    assert rate == pytest.approx(expected_rate(dictionary, 2, 5, 3), rel=0.01)
    assert rate > 1.02 * expected_rate(build(2, 5, 3, code_bits=8), 2, 5, 3)


def test_lopsided_digits_cost_less() -> None:
    even = expected_rate(build(5, 90, 5, code_bits=8), 5, 90, 5)
    lopsided = expected_rate(build(1, 90, 9, code_bits=8), 1, 90, 9)
    assert lopsided < 0.92 * even
    assert lopsided == pytest.approx(expected_rate(build(9, 90, 1, code_bits=8), 9, 90, 1), rel=1e-3)  # mirrored


@given(weights=weights, row=rows)
@settings(max_examples=150)
@example(weights=(0, 1, 0), row=[1, 2] * 150)
@example(weights=(1, 0, 0), row=[0] * 300)
@example(weights=(0, 0, 1), row=[1] * 300)
def test_every_row_survives_8_bits(weights: tuple[float, float, float], row: list[int]) -> None:
    dictionary = build(*weights, code_bits=8)
    codewords = reference.encode_row(row, dictionary)
    assert reference.decode_row(codewords, cols=len(row), dictionary=dictionary) == row


@given(weights=st.sampled_from(WEIGHTS), row=rows)
@settings(max_examples=25)
def test_every_row_survives_12_bits(weights: tuple[float, float, float], row: list[int]) -> None:
    dictionary = build(*weights, code_bits=12)
    codewords = reference.encode_row(row, dictionary)
    assert reference.decode_row(codewords, cols=len(row), dictionary=dictionary) == row


def test_every_row_survives_16_bits() -> None:
    dictionary = build(1, 12, 2, code_bits=16)
    for cols, p in ((1, (1, 0, 0)), (299, (1, 1, 1)), (300, (1, 20, 1))):
        row = _draw(p, cols, seed=cols).tolist()
        assert reference.decode_row(reference.encode_row(row, dictionary), cols=cols, dictionary=dictionary) == row


@given(
    weights=weights,
    max_phrase=st.one_of(st.none(), st.integers(1, 255)),
    max_nonzeros=st.one_of(st.none(), st.integers(1, 255)),
    max_threshold=st.one_of(st.none(), st.integers(3, 256)),
)
@settings(max_examples=150)
@example(weights=(1, 1, 1), max_phrase=1, max_nonzeros=1, max_threshold=3)
@example(weights=(0, 1, 0), max_phrase=255, max_nonzeros=255, max_threshold=256)
def test_limits_hold_and_trees_are_complete(
    weights: tuple[float, float, float], max_phrase: int | None, max_nonzeros: int | None, max_threshold: int | None
) -> None:
    dictionary = build(*weights, code_bits=8, max_phrase=max_phrase, max_nonzeros=max_nonzeros, max_threshold=max_threshold)
    assert dictionary.max_phrase <= (max_phrase or 255)
    assert _max_nonzeros(dictionary) <= (max_nonzeros or 255)
    assert dictionary.threshold <= (max_threshold or 256)
    _check_structure(dictionary)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_trees_of_12_bits_are_complete(weights: tuple[float, float, float]) -> None:
    _check_structure(build(*weights, code_bits=12))


@pytest.mark.parametrize("code_bits", [8, 12, 16])
def test_nearly_all_codewords_are_used(code_bits: int) -> None:
    dictionary = build(1, 15, 1, code_bits=code_bits)
    for state in range(2):  # parity leaves one of the trees one short
        assert np.count_nonzero(dictionary.lengths[state]) >= dictionary.n_codewords - 1


def test_default_limits_of_8_bits_suit_the_kernels() -> None:
    for p_zero in np.linspace(0.70, 0.93, 24).tolist():
        q = (1 - p_zero) / 2
        dictionary = build(q, p_zero, q, code_bits=8)
        assert dictionary.max_phrase <= 60
        assert _max_nonzeros(dictionary) <= 3
        assert dictionary.threshold <= 128


@pytest.mark.parametrize("p_zero", [1 / 3, 0.45, 0.6, 0.7, 0.885, 0.93, 0.95, 0.97, 0.98, 0.99])
def test_default_limits_of_8_bits_cost_next_to_nothing(p_zero: float) -> None:
    q = (1 - p_zero) / 2
    free = build(q, p_zero, q, code_bits=8, max_phrase=255, max_nonzeros=255, max_threshold=256)
    assert expected_rate(build(q, p_zero, q, code_bits=8), q, p_zero, q) <= 1.0003 * expected_rate(free, q, p_zero, q)


@pytest.mark.parametrize("code_bits", [8, 12, 16])
def test_serialised_form_expands_to_the_same(code_bits: int) -> None:
    built = build(2, 17, 1, code_bits=code_bits)
    parsed = parse(built.data, kind="aivf", code_bits=code_bits, threshold=built.threshold)
    assert parsed == built
    for field in ("lengths", "starts", "digits"):
        np.testing.assert_array_equal(getattr(parsed, field), getattr(built, field))


_DIGEST = """
import hashlib
from qmoecodec.dictionary.aivf import build
digest = hashlib.sha256()
for code_bits in (8, 12, 16):
    for p in ((0.0575, 0.885, 0.0575), (0.25, 0.5, 0.25), (0.02, 0.9, 0.08), (1, 1, 1), (0, 1, 0), (7, 3, 11), (1, 200, 2)):
        d = build(*p, code_bits=code_bits)
        digest.update(d.threshold.to_bytes(4, "little") + d.data)
print(digest.hexdigest())
"""


def test_same_bytes_in_a_fresh_process_and_on_every_machine() -> None:
    fresh = subprocess.run([sys.executable, "-c", _DIGEST], capture_output=True, text=True, check=True)
    digest = hashlib.sha256()
    for code_bits in (8, 12, 16):
        for p in ((0.0575, 0.885, 0.0575), (0.25, 0.5, 0.25), (0.02, 0.9, 0.08), (1, 1, 1), (0, 1, 0), (7, 3, 11), (1, 200, 2)):
            d = build(*p, code_bits=code_bits)
            digest.update(d.threshold.to_bytes(4, "little") + d.data)
    assert fresh.stdout.strip() == digest.hexdigest() == KNOWN_DIGEST


# Of the machine that this was written on. A change of the construction may change it; a change of the machine may not.
KNOWN_DIGEST = "f2cf67936c85aa5675be25af347dc2e20c5b7486440ccf22b518e03cf33cf4a5"


def test_repeated_and_scaled_calls_share_one_dictionary() -> None:
    assert build(1, 8, 1, code_bits=8) is build(1, 8, 1, code_bits=8)
    assert build(10, 80, 10, code_bits=8) == build(1, 8, 1, code_bits=8)


def test_tiny_probabilities_count_as_the_least_one() -> None:
    assert build(0, 1, 0, code_bits=8) == build(MIN_PROBABILITY / 2, 1, 1e-300, code_bits=8)


@pytest.mark.parametrize("p", [(0, 0, 0), (-0.1, 1, 0.1), (math.nan, 1, 1), (1, math.inf, 1), (1e308, 1e308, 1e308)])
def test_improbable_probabilities_are_refused(p: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="not probabilities"):
        build(*p, code_bits=8)


@pytest.mark.parametrize(
    "limits",
    [
        {"code_bits": 10},
        {"code_bits": 8, "max_phrase": 0},
        {"code_bits": 8, "max_phrase": 256},
        {"code_bits": 8, "max_nonzeros": 0},
        {"code_bits": 8, "max_threshold": 2},
        {"code_bits": 8, "max_threshold": 257},
    ],
    ids=str,
)
def test_limits_out_of_range_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(reversed(limits))):
        build(1, 1, 1, **limits)
