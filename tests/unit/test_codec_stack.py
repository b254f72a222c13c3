"""Stacks of experts: which expert is meant, how products are shaped, and what is said of damage."""

from __future__ import annotations

import dataclasses
import os
import threading
from typing import Any

import numpy as np
import pytest

import qmoecodec as q
from qmoecodec.codec import stack
from qmoecodec.dictionary import table_from_phrases

RNG = np.random.default_rng(6)
DIGITS = RNG.choice(np.int8([-1, 0, 1]), (3, 4, 9))
LEVELS = np.float32(RNG.integers(1, 9, (3, 4, 2))) * [-1, 1]
WEIGHTS = np.where(DIGITS < 0, LEVELS[..., :1], np.where(DIGITS > 0, LEVELS[..., 1:], 0))
X = np.float32(RNG.integers(-9, 9, (3, 9)))
TABLE = table_from_phrases([b"\0", b"\1", b"\2", *[b""] * 253], code_bits=8)
STACK = q.encode(DIGITS, dictionary=TABLE)


@pytest.mark.parametrize("expert", [-3, -2, -1, 0, 1, 2])
def test_one_expert_by_number(expert: int) -> None:
    assert q.decode(STACK, expert=expert).tolist() == DIGITS[expert].tolist()
    expected = (WEIGHTS[expert] @ X[expert]).tolist()
    assert q.matvec(STACK, LEVELS, X[expert], expert=expert).tolist() == expected
    assert q.matvec(STACK, LEVELS[expert], X[expert], expert=expert).tolist() == expected


def test_fewer_rows_than_experts() -> None:
    stack = q.encode(DIGITS[:, :2], dictionary=TABLE)
    for levels in (LEVELS[:, :2], LEVELS[1, :2]):
        assert q.matvec(stack, levels, X[1], expert=1).tolist() == (WEIGHTS[1, :2] @ X[1]).tolist()
    with pytest.raises(ValueError, match="levels have the shape"):
        q.matvec(stack, np.ones((5, 2, 2), np.float32), X[1], expert=1)


@pytest.mark.parametrize("expert", [-5, -4, 3, 4])
def test_experts_that_are_not_there(expert: int) -> None:
    for call in (lambda: q.decode(STACK, expert=expert), lambda: q.matvec(STACK, LEVELS, X[0], expert=expert)):
        with pytest.raises(IndexError, match=f"expert {expert} of 3"):
            call()


@pytest.mark.parametrize("threads", [None, 1, 2, 5])
def test_products_of_all_experts(threads: int | None) -> None:
    each = q.matvec(STACK, LEVELS, X, threads=threads)
    assert each.dtype == np.float32 and each.tolist() == np.einsum("erc,ec->er", WEIGHTS, X).tolist()
    assert q.matvec(STACK, LEVELS, X[0], threads=threads).tolist() == (WEIGHTS @ X[0]).tolist()
    assert q.decode(STACK, threads=threads).tolist() == DIGITS.tolist()
    assert q.decode(STACK, threads=threads, backend="reference").tolist() == DIGITS.tolist()


def test_a_matrix_is_one_expert() -> None:
    matrix = q.encode(DIGITS[0], dictionary=TABLE)
    assert q.decode(matrix).tolist() == q.decode(matrix, expert=0).tolist() == DIGITS[0].tolist()
    for levels in (LEVELS[0], LEVELS[:1]):
        assert q.matvec(matrix, levels, X[0]).tolist() == (WEIGHTS[0] @ X[0]).tolist()
    empty = q.encode(DIGITS[:0], dictionary=TABLE)
    assert q.matvec(empty, LEVELS[:0], X[0]).shape == (0, 4)
    assert q.decode(empty).shape == (0, 4, 9)


@pytest.mark.parametrize(
    ("levels", "x", "expert", "match"),
    [
        ((4, 2), (9,), None, "levels have the shape"), ((3, 4, 3), (9,), None, "levels have the shape"),
        ((2, 4, 2), (9,), None, "levels have the shape"), ((2, 4), (9,), 0, "levels have the shape"),
        ((3, 4, 2), (8,), None, "x has the shape"), ((3, 4, 2), (2, 9), None, "x has the shape"),
        ((3, 4, 2), (3, 9), 0, "x has the shape"), ((3, 4, 2), (9, 3), None, "x has the shape"),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit(levels: tuple[int, ...], x: tuple[int, ...], expert: int | None, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        q.matvec(STACK, np.ones(levels, np.float32), np.ones(x, np.float32), expert=expert)


def test_the_shape_that_levels_should_have_is_said() -> None:
    with pytest.raises(ValueError, match=r"^levels have the shape \(1, 2\), not \(3, 4, 2\)$"):
        q.matvec(STACK, np.ones((1, 2), np.float32), X)
    with pytest.raises(ValueError, match=r"^x has the shape \(5,\), not \(9,\)$"):
        q.matvec(STACK, LEVELS, np.ones(5, np.float32))


def changed(**changes: Any) -> q.Encoded:
    return dataclasses.replace(STACK, **changes)


@pytest.mark.parametrize(
    ("offsets", "expert"),
    [((0, 37, 36, 108), 1), ((0, 36, 72, 109), 2), ((37, 36, 72, 108), 0), ((109, 109, 109, 109), 0)],
)
def test_offsets_outside_the_codes(offsets: tuple[int, ...], expert: int) -> None:
    broken = changed(code_offsets=np.uint64(offsets))
    for call in (lambda: q.decode(broken), lambda: q.decode(broken, expert=expert),
                 lambda: q.matvec(broken, LEVELS, X[0], expert=expert)):  # fmt: skip
        with pytest.raises(q.FormatError) as caught:
            call()
        assert (caught.value.reason, caught.value.where) == ("code_offsets", {"expert": expert})


def test_dictionaries_that_are_not_there() -> None:
    for index in (1, 7):
        with pytest.raises(q.FormatError) as caught:
            q.decode(changed(dictionary_index=np.uint8([0, index, 0])))
        assert (caught.value.reason, caught.value.where) == ("dictionary_index", {"expert": 1})


def test_damage_names_expert_and_row() -> None:
    codes = STACK.codes.copy()
    codes[2 * 36 + 9 + 3] = 200
    broken = changed(codes=codes)
    where = {"expert": 2, "row": 1, "codeword": 3}
    for call in (lambda: q.decode(broken), lambda: q.decode(broken, expert=-1), lambda: q.matvec(broken, LEVELS, X),
                 lambda: q.matvec(broken, LEVELS, X[0], expert=2)):  # fmt: skip
        with pytest.raises(q.FormatError) as caught:
            call()
        assert (caught.value.reason, caught.value.where) == ("unused_codeword", where)
    assert q.decode(broken, expert=1).tolist() == DIGITS[1].tolist()


def test_the_bound_on_what_codewords_can_give() -> None:
    """Nine codewords of one digit: nine columns and no more."""
    lengths = STACK.row_lengths.copy()
    lengths[1] = [9, 9, 9, 8]
    with pytest.raises(q.FormatError) as caught:
        q.decode(changed(row_lengths=lengths))
    assert (caught.value.reason, caught.value.where) == ("row_underrun", {"expert": 1})
    lengths[1] = [9, 9, 9, 10]
    with pytest.raises(q.FormatError) as caught:
        q.decode(changed(row_lengths=lengths))
    assert (caught.value.reason, caught.value.where) == ("row_lengths", {"expert": 1})
    assert caught.value.message == "the rows take 37 bytes, the expert has 36"
    with pytest.raises(q.FormatError) as caught:
        q.decode_rows(STACK.codes[:36], STACK.row_lengths[0], cols=10, dictionary=TABLE)
    assert (caught.value.reason, caught.value.where) == ("row_underrun", {})
    assert caught.value.message == "36 codewords cannot give 4 x 10 digits"


def test_the_caller_may_give_the_memory() -> None:
    for backend in ("numba", "reference"):
        out = np.full((4, 9), 7, np.int8)
        result = q.decode_rows(STACK.codes[:36], STACK.row_lengths[0], cols=9, dictionary=TABLE, out=out, backend=backend)  # type: ignore[arg-type]
        assert result is out and out.tolist() == DIGITS[0].tolist()


@pytest.mark.parametrize(("threads", "cores", "experts", "together"), [
    (1, 4, 4, 1), (2, 1, 2, 2), (2, 1, 4, 2), (3, None, 6, 3), (5, 2, 3, 3), (4, 4, 1, 1), (1, 4, 0, 1),
    (None, 1, 4, 1), (None, 2, 4, 2), (None, 3, 6, 3), (None, 8, 2, 2), (None, None, 4, 1),
])  # fmt: skip
def test_how_many_experts_are_worked_on_at_a_time(
    threads: int | None, cores: int | None, experts: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as threads, as cores without a number, and never more than experts; one at a time needs no other thread."""
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    meeting = threading.Barrier(together, timeout=10)
    most, now, lock = 0, 0, threading.Lock()

    def work(e: int) -> tuple[int, bool]:
        nonlocal most, now
        with lock:
            now += 1
            most = max(most, now)
        meeting.wait()  # returns when as many are here
        with lock:
            now -= 1
        return e, threading.current_thread() is threading.main_thread()

    done = stack._map(work, range(experts), threads)
    assert done == [(e, together == 1) for e in range(experts)]
    assert most == min(together, experts)
