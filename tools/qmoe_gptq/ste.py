"""Ternary matrices that can be trained: digits follow latent margins, straight through.

Source: Bengio et al. 2013 (straight-through estimator). The forward pass uses the exact
ternary matrix; the backward pass hands a digit's gradient to its margin as if rounding
were the identity. One threshold for all rows decides how many digits are zero, so the
rate is held by moving that one number while the gradient decides *which* digits are zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .experts import round_levels
from .gptq import Ternary
from .rate import mirrored_entropies

Tensor = torch.Tensor

# How fast the threshold answers a rate error; 1 would correct it fully in one step.
CONTROL_GAIN = 0.5
LOWEST_THRESHOLD, HIGHEST_THRESHOLD = 1e-3, 1e3


class _Expand(torch.autograd.Function):
    """margins, log levels, threshold -> ternary values; straight-through backward."""

    @staticmethod
    def forward(ctx: Any, margin: Tensor, log_levels: Tensor, threshold: float) -> Tensor:
        size = log_levels.exp()
        plus, minus = margin > threshold, margin < -threshold
        ctx.save_for_backward(plus, minus, size)
        return torch.where(plus, size[..., 1:], 0.0) - torch.where(minus, size[..., :1], 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        plus, minus, size = ctx.saved_tensors
        (grad,) = grads
        low = -(grad * minus).sum(-1, keepdim=True) * size[..., :1]
        high = (grad * plus).sum(-1, keepdim=True) * size[..., 1:]
        # A margin is measured in thresholds, about half a level: the scale keeps rows comparable.
        return grad * size.mean(-1, keepdim=True), torch.cat([low, high], -1), None


class Trainable:
    """One stack of expert matrices in trainable form.

    margin : float32[experts, rows, cols]      beyond the threshold +, below minus it -
    log_levels : float32[experts, rows, 2]     logarithms of -lo and hi
    """

    def __init__(self, ternary: Ternary) -> None:
        """Start from a solver's result, whose digits are those at threshold 1."""
        levels = ternary.levels.abs()
        floor = 1e-4 * levels.mean(-1, keepdim=True) + 1e-30
        self.margin = ternary.margin.clone().requires_grad_()
        self.log_levels = levels.maximum(floor).log().requires_grad_()

    def values(self, threshold: float) -> Tensor:
        """Expand to float32[experts, rows, cols], differentiably."""
        return _Expand.apply(self.margin, self.log_levels, threshold)  # type: ignore[no-any-return, no-untyped-call]

    def digits(self, threshold: float) -> Tensor:
        """Decide the digits, int8[experts, rows, cols]."""
        margin = self.margin.detach()
        return (margin > threshold).to(torch.int8) - (margin < -threshold).to(torch.int8)

    def levels(self, dtype: torch.dtype) -> Tensor:
        """Give the levels as the checkpoint's dtype can hold them, float32[experts, rows, 2]."""
        size = self.log_levels.detach().exp()
        return round_levels(torch.cat([-size[..., :1], size[..., 1:]], -1), dtype)

    def result(self, threshold: float, dtype: torch.dtype) -> Ternary:
        """Freeze into digits and stored levels."""
        digits = self.digits(threshold)
        return Ternary(digits, self.levels(dtype), self.margin.detach() / threshold)


def mean_entropy(matrices: Iterable[Trainable], threshold: float) -> float:
    """Average order-0 entropy per digit over matrices, weighted by their sizes.

    With fewer zeros than at its maximum it is mirrored there, so that it falls with the threshold throughout.
    """
    bits = weights = 0.0
    for matrix in matrices:
        rates = mirrored_entropies(matrix.digits(threshold))
        size = matrix.margin[0].numel()
        bits += float(rates.sum()) * size
        weights += rates.numel() * size
    return bits / weights


def steer(threshold: float, entropy: float, target: float) -> float:
    """Move the threshold a step towards the target rate."""
    moved = threshold * (max(entropy, 1e-6) / target) ** CONTROL_GAIN
    return float(min(max(moved, LOWEST_THRESHOLD), HIGHEST_THRESHOLD))


def settle(matrices: Sequence[Trainable], target: float, *, steps: int = 20) -> float:
    """Find the lowest threshold whose entropy is at most ``target``."""
    low, high = LOWEST_THRESHOLD, 8.0
    while mean_entropy(matrices, high) > target and high < HIGHEST_THRESHOLD:
        low, high = high, high * 2
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_entropy(matrices, middle) > target else (low, middle)
    return high
