"""Round trips of the codec for any digits, any shape and any dictionary; both backends give the same bytes."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qmoecodec as q
from qmoecodec.dictionary import aivf, qmoe2023

SPARSITIES = (0.02, 1 / 3, 0.5, 0.7, 0.885, 0.95, 0.995)


@lru_cache(maxsize=64)
def dictionary(name: str) -> q.Dictionary:
    if name == "qmoe-2023":
        return qmoe2023.table()
    bits, zero, balance = name.split()
    p = float(zero)
    return aivf.build((1 - p) * float(balance), p, (1 - p) * (1 - float(balance)), code_bits=int(bits))


NAMES = [f"{b} {p} {s}" for b in (8, 12) for p in SPARSITIES for s in (0.5, 0.9)] + ["16 0.885 0.5", "qmoe-2023"]


@st.composite
def matrices(draw: st.DrawFn) -> np.ndarray:
    rows, cols = draw(st.integers(0, 9)), draw(st.integers(0, 300))
    kind = draw(st.sampled_from(("iid", "zero", "plus", "minus", "runs")))
    if kind in ("zero", "plus", "minus"):
        return np.full((rows, cols), {"zero": 0, "plus": 1, "minus": -1}[kind], np.int8)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if kind == "runs":  # nothing like independent digits
        return np.repeat(rng.integers(-1, 2, (rows, cols // 7 + 1)), 7, axis=1)[:, :cols].astype(np.int8)
    p = draw(st.sampled_from(SPARSITIES))
    return rng.choice(np.array([0, -1, 1], np.int8), (rows, cols), p=[p, (1 - p) / 2, (1 - p) / 2])


@pytest.mark.parametrize("name", NAMES)
@given(digits=matrices())
@settings(max_examples=25)
def test_decode_inverts_encode(name: str, digits: np.ndarray) -> None:
    d = dictionary(name)
    codes, row_lengths = q.encode_rows(digits, dictionary=d)
    assert int(((row_lengths.astype(int) * d.code_bits + 7) // 8).sum()) == len(codes)
    decoded = q.decode_rows(codes, row_lengths, cols=digits.shape[1], dictionary=d)
    assert decoded.dtype == np.int8
    np.testing.assert_array_equal(decoded, digits)
    counts = q.count_digits(codes, row_lengths, rows=digits.shape[0], cols=digits.shape[1], dictionary=d)
    assert counts.tolist() == [(digits == value).sum() for value in (0, -1, 1)]


@pytest.mark.parametrize("name", ["8 0.885 0.5", "8 0.3333333333333333 0.5", "12 0.7 0.9", "8 0.995 0.9"])
@given(digits=matrices())
@settings(max_examples=8)
def test_kernels_match_the_reference_bit_for_bit(name: str, digits: np.ndarray) -> None:
    d = dictionary(name)
    digits = digits[:3]
    fast, slow = (q.encode_rows(digits, dictionary=d, backend=b) for b in ("numba", "reference"))
    np.testing.assert_array_equal(fast[0], slow[0])
    np.testing.assert_array_equal(fast[1], slow[1])
    np.testing.assert_array_equal(
        q.decode_rows(*fast, cols=digits.shape[1], dictionary=d, backend="reference"), digits
    )


@pytest.mark.parametrize("name", ["8 0.885 0.5", "8 0.5 0.9", "12 0.95 0.5", "qmoe-2023"])
@given(digits=matrices(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25)
def test_matvec_is_the_product_with_the_decoded_matrix(name: str, digits: np.ndarray, seed: int) -> None:
    rng = np.random.default_rng(seed)
    levels = np.sort(rng.standard_normal((len(digits), 2)), axis=1).astype(np.float32)
    x = rng.standard_normal(digits.shape[1]).astype(np.float32)
    encoded = q.encode(digits, dictionary=dictionary(name))
    weights = np.where(digits < 0, levels[:, :1], np.where(digits > 0, levels[:, 1:], 0)).astype(np.float64)
    scale = np.abs(weights) @ np.abs(x.astype(np.float64)) + 1e-30
    assert (np.abs(q.matvec(encoded, levels, x) - weights @ x) <= 1e-5 * scale).all()


@given(
    shape=st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 40)),
    p=st.sampled_from(SPARSITIES),
    threads=st.integers(1, 3),
)
@settings(max_examples=40)
def test_stacks_do_not_depend_on_threads(shape: tuple[int, int, int], p: float, threads: int) -> None:
    rng = np.random.default_rng(sum(shape))
    digits = rng.choice(np.array([0, -1, 1], np.int8), shape, p=[p, (1 - p) / 2, (1 - p) / 2])
    one, many = q.encode(digits, threads=1), q.encode(digits, threads=threads)
    assert one.codes.tobytes() == many.codes.tobytes()
    assert one.dictionaries == many.dictionaries
    np.testing.assert_array_equal(q.decode(many, threads=threads), digits)
    for e in range(shape[0]):
        np.testing.assert_array_equal(q.decode(one, expert=e), digits[e])


@given(data=st.data())
@settings(max_examples=300)
def test_any_bytes_decode_or_are_refused_alike(data: st.DataObject) -> None:
    d = dictionary(data.draw(st.sampled_from(["8 0.885 0.5", "12 0.885 0.5", "8 0.3333333333333333 0.5", "8 0.995 0.9"])))
    row_lengths = np.array(data.draw(st.lists(st.integers(0, 6), max_size=4)), np.uint32)
    n_bytes = int(((row_lengths.astype(int) * d.code_bits + 7) // 8).sum())
    codes = np.frombuffer(data.draw(st.binary(min_size=n_bytes, max_size=n_bytes)), np.uint8)
    cols = data.draw(st.integers(0, 80))
    results = []
    for backend in ("numba", "reference"):
        try:
            results.append(q.decode_rows(codes, row_lengths, cols=cols, dictionary=d, backend=backend).tobytes())
        except q.FormatError as error:
            results.append((error.reason, str(error)))
    assert results[0] == results[1]
