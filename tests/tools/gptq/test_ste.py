"""Trainable digits: gradients, rate control, and that training them helps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qmoe_gptq import gptq
from qmoe_gptq.block import refine_expert
from qmoe_gptq.experts import rounded
from qmoe_gptq.model import SwitchConfig
from qmoe_gptq.settings import Settings
from qmoe_gptq.ste import Trainable, mean_entropy, settle, steer


def start(rows: int = 64, cols: int = 48, experts: int = 2, seed: int = 0) -> gptq.Ternary:
    """Round a random stack."""
    weights = torch.randn(experts, rows, cols, generator=torch.Generator().manual_seed(seed))
    return rounded(weights, gptq.extreme_levels(weights).bfloat16().float())


def test_values_start_as_the_solver_left_them() -> None:
    ternary = start()
    trainable = Trainable(ternary)
    assert torch.equal(trainable.digits(1.0), ternary.digits)
    torch.testing.assert_close(trainable.values(1.0), gptq.dense(ternary.digits, ternary.levels))
    torch.testing.assert_close(trainable.levels(torch.bfloat16), ternary.levels)


def test_level_gradients_are_exact() -> None:
    trainable = Trainable(start(rows=4, cols=6))
    probe = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))
    (trainable.values(1.0) * probe).sum().backward()
    grad = trainable.log_levels.grad
    assert grad is not None
    step = 1e-3
    for index in [(0, 1, 0), (1, 3, 1), (0, 2, 1)]:
        results = []
        for sign in (1, -1):
            moved = Trainable(start(rows=4, cols=6))
            with torch.no_grad():
                moved.log_levels[index] += sign * step
            results.append(float((moved.values(1.0) * probe).sum().detach()))
        assert float(grad[index]) == pytest.approx((results[0] - results[1]) / (2 * step), rel=1e-2, abs=1e-4)


def test_margin_gradient_goes_straight_through() -> None:
    trainable = Trainable(start())
    probe = torch.randn(2, 64, 48, generator=torch.Generator().manual_seed(1))
    (trainable.values(1.0) * probe).sum().backward()
    assert trainable.margin.grad is not None
    assert torch.equal(trainable.margin.grad.sign(), probe.sign())


def test_settle_hits_the_rate_from_below() -> None:
    matrices = [Trainable(start(seed=s)) for s in (0, 1)]
    for target in (0.3, 0.8, 1.2):
        threshold = settle(matrices, target)
        assert target - 0.005 < mean_entropy(matrices, threshold) <= target


def test_rates_near_the_highest_are_held_with_a_third_of_zeros() -> None:
    """Entropy falls on both sides of its maximum: with few zeros it must not pass for a low rate."""
    matrices = [Trainable(start(seed=s)) for s in (0, 1)]
    for target in (1.45, 1.55):
        threshold = settle(matrices, target)
        assert target - 0.005 < mean_entropy(matrices, threshold) <= target
        assert all((m.digits(threshold) == 0).float().mean() > 1 / 3 for m in matrices)
        steered = 1e-2
        for _ in range(200):
            steered = steer(steered, mean_entropy(matrices, steered), target)
        assert steered == pytest.approx(threshold, rel=0.02)


def test_a_huge_level_leaves_the_others_as_they_are() -> None:
    ternary = start()
    ternary.levels[0, 0, 1] = 1e12
    ternary.levels[1, 1] = 0
    kept = Trainable(ternary).levels(torch.bfloat16)
    torch.testing.assert_close(kept[:, 2:], ternary.levels[:, 2:])
    assert kept[1, 1].abs().max() < 1e-20


def test_steering_converges() -> None:
    matrices = [Trainable(start(rows=256))]
    threshold = 1.0
    for _ in range(40):
        threshold = steer(threshold, mean_entropy(matrices, threshold), 0.9)
    assert mean_entropy(matrices, threshold) == pytest.approx(0.9, rel=0.01)


def test_block_tuning_helps_on_tokens_it_did_not_see() -> None:
    config = SwitchConfig.from_json(
        {"model_type": "switch_transformers", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4,
         "num_layers": 2, "num_experts": 1, "vocab_size": 64}
    )  # fmt: skip
    g = torch.Generator().manual_seed(3)
    wi, wo = torch.randn(1, 64, 32, generator=g) / 6, torch.randn(1, 32, 64, generator=g) / 8
    x = torch.randn(3000, 32, generator=g) @ (torch.randn(32, 32, generator=g) / 6)
    p = torch.rand(3000, generator=g) / 2 + 0.5
    wanted = torch.relu(x @ wi[0].T) @ wo[0].T * p[:, None]
    matrices = {"wi": rounded(wi, gptq.extreme_levels(wi)), "wo": rounded(wo, gptq.extreme_levels(wo))}
    tuned = refine_expert(
        config, matrices, x[:2000], p[:2000], wanted[:2000],
        settings=Settings(epochs=20), dtype=torch.bfloat16, rng=np.random.default_rng(0),
    )  # fmt: skip

    def error(result: dict[str, gptq.Ternary]) -> float:
        a, b = (gptq.dense(result[w].digits, result[w].levels)[0] for w in ("wi", "wo"))
        return float((torch.relu(x[2000:] @ a.T) @ b.T * p[2000:, None] - wanted[2000:]).square().mean())

    def rate(result: dict[str, gptq.Ternary]) -> float:
        return mean_entropy([Trainable(t) for t in result.values()], 1.0)

    assert error(tuned) < 0.7 * error(matrices)
    assert rate(tuned) <= rate(matrices) + 1e-6
    for which, t in tuned.items():
        assert torch.equal(t.levels, t.levels.bfloat16().float()), which
