"""Comparing products with float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what imports this may be collected where torch is not, and skipped
    import torch


def check(
    y: torch.Tensor,
    dense: torch.Tensor,
    x: torch.Tensor,
    numbers: torch.Tensor,
    *,
    relu: bool = False,
    scale: torch.Tensor | None = None,
) -> None:
    """y[t] is scale[t] * relu(dense[numbers[t]] @ x[t]), within the rounding of 16-bit output and float32 sums; 0 for number -1.

    dense : float64[experts, rows, cols] where y, x and the numbers are
    Expert by expert: a matrix for each token would take gigabytes.
    """
    assert y.shape == (len(x), dense.shape[1])
    for e in numbers.unique().tolist():
        chosen = numbers == e
        some, matrix = x[chosen].double(), dense[e] * (e >= 0)
        exact = some @ matrix.T
        bound = 2.0**-8 * exact.abs() + 1e-5 * (some.abs() @ matrix.abs().T) + 1e-6
        if relu:
            exact = exact.clamp(min=0)
        if scale is not None:
            exact, bound = exact * scale[chosen, None], bound * scale[chosen, None]
        assert bool(((y[chosen].double() - exact).abs() <= bound).all()), f"expert {e}"
