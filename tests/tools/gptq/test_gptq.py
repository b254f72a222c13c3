"""The solver against the naive algorithm, its levels, its failures."""

from __future__ import annotations

import math

import pytest
import torch

from qmoe_gptq import gptq
from qmoe_gptq.experts import at_rate, code_lengths, find_price, hessian, round_levels, rounded, rounded_at_rate
from qmoe_gptq.rate import entropies
from qmoe_gptq.settings import Settings
from qmoe_gptq.units import expand, squeeze


def problem(
    experts: int = 3, rows: int = 32, cols: int = 40, tokens: int = 200, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw weights and Hessians of correlated inputs."""
    g = torch.Generator().manual_seed(seed)
    weights = torch.randn(experts, rows, cols, generator=g)
    mix = torch.randn(cols, cols, generator=g) / cols**0.5
    inputs = [torch.randn(tokens, cols, generator=g) @ mix for _ in range(experts)]
    return weights, hessian(inputs, None)


def naive(weights: torch.Tensor, levels: torch.Tensor, h: torch.Tensor, damping: float) -> torch.Tensor:
    """Quantize one matrix column by column, by removing columns from the problem one at a time.

    Independent of the Cholesky trick: the optimal update of the remaining weights is
    solved from the Hessian of the remaining columns each time.
    """
    w = weights.double().clone()
    h = h.double() + damping * h.double().diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    digits = torch.zeros_like(weights, dtype=torch.int8)
    for c in range(w.shape[1]):
        choices = torch.stack([levels[:, 0], torch.zeros(len(w)), levels[:, 1]], 1).double()
        pick = (w[:, c, None] - choices).abs().argmin(1)
        digits[:, c] = pick - 1
        error = w[:, c] - choices.gather(1, pick[:, None])[:, 0]
        if c + 1 < w.shape[1]:
            rest = h[c + 1 :, c + 1 :]
            w[:, c + 1 :] += error[:, None] * torch.linalg.solve(rest, h[c + 1 :, c])[None]
    return digits


@pytest.mark.parametrize("block", [1, 7, 40, 128])
def test_solver_equals_naive_elimination(block: int) -> None:
    weights, h = problem()
    levels = gptq.extreme_levels(weights) * 0.7
    result = gptq.solve(weights, levels, gptq.factorize(h, damping=0.1), block=block)
    for e in range(len(weights)):
        expected = naive(weights[e], levels[e], h[e], 0.1)
        # Ties of float32 against float64 may fall either way, and then change the rest of the row.
        same = (result.digits[e] == expected).all(1).float().mean()
        assert same >= 0.95


def test_experts_do_not_interact() -> None:
    weights, h = problem()
    levels = gptq.extreme_levels(weights)
    together = gptq.solve(weights, levels, gptq.factorize(h, damping=0.1))
    alone = gptq.solve(weights[1:2], levels[1:2], gptq.factorize(h[1:2], damping=0.1))
    assert (together.digits[1] == alone.digits[0]).float().mean() > 0.999


def test_error_feedback_beats_rounding() -> None:
    weights, h = problem()
    levels = gptq.extreme_levels(weights)
    solved = gptq.solve(weights, levels, gptq.factorize(h, damping=0.1)).digits

    def loss(digits: torch.Tensor) -> float:
        delta = weights - gptq.dense(digits, levels)
        return float(((delta @ h) * delta).sum())

    assert loss(solved) < 0.8 * loss(gptq.round_to_nearest(weights, levels))


def test_digits_are_what_the_margins_say() -> None:
    weights, h = problem()
    factors = gptq.factorize(h, damping=0.1)
    bits = code_lengths(0.9).expand(3, 3)
    result = gptq.solve(weights, gptq.lloyd_levels(weights), factors, price=0.4, bits=bits)
    assert torch.equal(result.digits, (result.margin > 1).to(torch.int8) - (result.margin < -1).to(torch.int8))
    assert 0.02 < float((result.digits != 0).float().mean()) < 0.6


def test_price_lowers_the_rate() -> None:
    weights, h = problem()
    factors = gptq.factorize(h, damping=0.1)
    bits = code_lengths(0.9).expand(3, 3)
    levels = gptq.lloyd_levels(weights)
    rates = [
        float(entropies(gptq.solve(weights, levels, factors, price=p, bits=bits).digits).mean())
        for p in (0.0, 0.1, 0.3, 1.0, 3.0)
    ]
    assert rates == sorted(rates, reverse=True) and rates[0] - rates[-1] > 0.8


def test_refit_is_the_least_squares_optimum() -> None:
    weights, h = problem()
    levels = gptq.lloyd_levels(weights)
    digits = gptq.round_to_nearest(weights, levels)
    best = gptq.refit_levels(weights, digits, levels, h, damping=1e-9)

    def loss(at: torch.Tensor) -> float:
        delta = weights - gptq.dense(digits, at)
        return float(((delta @ h) * delta).sum())

    assert loss(best) < loss(levels)
    for nudge in (1.01, 0.99):
        for side in (0, 1):
            moved = best.clone()
            moved[..., side] *= nudge
            assert loss(moved) > loss(best)


@pytest.mark.parametrize("target", [0.25, 0.6, 0.9, 1.3, 1.55])
def test_rate_is_hit(target: float) -> None:
    weights, h = problem(rows=256, cols=64)
    factors = gptq.factorize(h, damping=0.1)
    result = at_rate(weights, h, factors, target=target, settings=Settings(), dtype=torch.bfloat16)
    assert float(entropies(result.digits).mean()) == pytest.approx(target, rel=0.015)


@pytest.mark.parametrize("target", [0.05, 0.4, 0.9, 1.4, 1.5])
def test_price_search_needs_few_evaluations(target: float) -> None:
    asked: list[float] = []

    def rate(price: float) -> float:
        asked.append(price)
        return 1.58 / (1 + math.exp(1.7 * price - 1.5))

    price, slope = find_price(rate, target)
    assert rate(price) == pytest.approx(target, rel=0.011)
    assert len(asked) <= 9 and len(set(asked[:-1])) == len(asked) - 1
    assert slope < 0


@pytest.mark.parametrize("target", [0.3, 0.9, 1.5])
def test_rounding_hits_the_rate_too(target: float) -> None:
    weights, _ = problem(rows=128, cols=64)
    rate = entropies(rounded_at_rate(weights, target, torch.bfloat16).digits)
    assert torch.allclose(rate, torch.full_like(rate, target), rtol=0.01)


def test_unusable_hessians_are_found() -> None:
    _, h = problem(experts=4)
    h[1] = 0
    h[2, 3, 3] = float("nan")
    factors = gptq.factorize(h, damping=0.1)
    assert factors.usable.tolist() == [True, False, False, True]
    assert torch.isfinite(factors.upper).all()


def test_rank_one_hessian_is_usable_with_damping() -> None:
    x = torch.randn(1, 40, generator=torch.Generator().manual_seed(0))
    factors = gptq.factorize(hessian([x], None), damping=0.1)
    assert bool(factors.usable.all())


def test_dead_inputs_get_zero_digits() -> None:
    weights, h = problem()
    h[:, 5, :] = 0
    h[:, :, 5] = 0
    factors = gptq.factorize(h, damping=0.1)
    digits = gptq.solve(weights, gptq.extreme_levels(weights), factors).digits
    assert int(digits[:, :, 5].abs().sum()) == 0 and int(digits[:, :, 6].abs().sum()) > 0


def test_rounding_thresholds_are_half_way() -> None:
    levels = torch.tensor([[-2.0, 1.0]])
    weights = torch.tensor([[-1.01, -0.99, 0.49, 0.51, 0.0]])
    assert rounded(weights, levels).digits.tolist() == [[-1, 0, 0, 1, 0]]
    assert gptq.round_to_nearest(weights, levels).tolist() == [[-1, 0, 0, 1, 0]]


def test_squeeze_round_trip() -> None:
    digits = torch.randint(-1, 2, (3, 7, 11), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    small = squeeze(digits)
    assert len(small) == -(-digits.numel() // 5)
    assert torch.equal(expand(small, (3, 7, 11)), digits)


@pytest.mark.parametrize("price", [0.0, 0.5])
def test_a_huge_weight_changes_no_other_row(price: float) -> None:
    weights, h = problem()
    factors = gptq.factorize(h, damping=0.1)
    bits = code_lengths(1.0).expand(len(weights), 3)
    before = gptq.solve(weights, gptq.lloyd_levels(weights), factors, price=price, bits=bits).digits
    weights[0, 0, 0] = 1e12
    after = gptq.solve(weights, gptq.lloyd_levels(weights), factors, price=price, bits=bits).digits
    assert torch.equal(after[0, 1:], before[0, 1:]) and torch.equal(after[1:], before[1:])
    assert before[0, 1:].any()


def test_a_digit_whose_level_is_zero_never_comes() -> None:
    weights, h = problem()
    weights[0, :4] = weights[0, :4].abs()
    weights[1, :4] = 0
    levels = gptq.extreme_levels(weights)
    digits = gptq.solve(weights, levels, gptq.factorize(h, damping=0.1)).digits
    assert (levels[0, :4, 0] == 0).all() and (digits[0, :4] >= 0).all() and (digits[0, :4] > 0).any()
    assert not digits[1, :4].any() and not rounded(weights, levels).digits[1, :4].any()


def test_levels_stay_finite_in_a_dtype_with_a_small_range() -> None:
    assert round_levels(torch.tensor([-1e6, 70000.0]), torch.float16).tolist() == [-65504.0, 65504.0]
