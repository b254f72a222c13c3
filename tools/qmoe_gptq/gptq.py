"""Ternary GPTQ for a batch of experts at once.

Source: Frantar et al. 2022 (GPTQ) for the column-by-column solver, Frantar and Alistarh
2023 (QMoE) for the ternary grid; the rate term is ours. Rows never interact, experts
never interact, so every operation below carries the leading expert dimension.

Naive form, for one row w with Hessian H and U = upper Cholesky factor of inverse(H):

    for c in columns:
        q[c] = cheapest of (lo, 0, hi) for w[c]
        e = (w[c] - q[c]) / U[c, c]
        w[c+1:] -= e * U[c, c+1:]        # the columns to come make up for the error
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

Tensor = torch.Tensor
BLOCK_COLUMNS = 128


@dataclass(frozen=True, slots=True)
class Factors:
    """What the solver needs of a batch of Hessians.

    upper : float32[experts, cols, cols]   upper Cholesky factor of the damped inverse
    dead : bool[experts, cols]             columns whose input was always zero
    usable : bool[experts]                 False: singular or not finite, round to nearest
    """

    upper: Tensor
    dead: Tensor
    usable: Tensor


@dataclass(frozen=True, slots=True)
class Ternary:
    """Ternary experts.

    digits : int8[experts, rows, cols]     -1, 0, +1
    levels : float32[experts, rows, 2]     lo <= 0 <= hi
    margin : float32[experts, rows, cols]  the weight each digit was decided on, in units of
        the threshold it was compared with: beyond 1 is +, below -1 is -
    """

    digits: Tensor
    levels: Tensor
    margin: Tensor

    def to(self, device: str) -> Ternary:
        """Move to a device."""
        return Ternary(self.digits.to(device), self.levels.to(device), self.margin.to(device))


def factorize(hessian: Tensor, *, damping: float) -> Factors:
    """Damp and factorize Hessians, float32[experts, cols, cols].

    ``damping`` is a share of the mean diagonal. Factorizing in float64 keeps nearly
    singular experts usable; one expert at a time, as it takes several float64 matrices.
    """
    # Columns adjacent, as the factorization itself gives them.
    upper = torch.empty_like(hessian).transpose(-1, -2)
    dead = torch.empty(hessian.shape[:-1], dtype=torch.bool, device=hessian.device)
    usable = torch.empty(len(hessian), dtype=torch.bool, device=hessian.device)
    for i in range(len(hessian)):
        one = slice(i, i + 1)
        upper[one], dead[one], usable[one] = _factorize(hessian[one].double(), damping)
    return Factors(upper=upper, dead=dead, usable=usable)


def _factorize(h: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    dead = diagonal <= 0
    usable = torch.isfinite(h).all(-1).all(-1) & (diagonal.mean(-1) > 0)
    h = torch.where(usable[:, None, None], h, torch.eye(h.shape[-1], dtype=h.dtype, device=h.device))
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    diagonal += damping * diagonal.mean(-1, keepdim=True) + torch.where(dead, 1.0, 0.0)
    lower, failed = torch.linalg.cholesky_ex(h)
    usable &= failed == 0
    lower = torch.where(usable[:, None, None], lower, torch.eye(h.shape[-1], dtype=h.dtype, device=h.device))
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    usable &= (failed == 0) & torch.isfinite(upper).all(-1).all(-1)
    return upper, dead, usable


def extreme_levels(weights: Tensor) -> Tensor:
    """Take each row's minimum and maximum (0 included) as levels, the paper's grid.

    weights : float32[..., rows, cols] -> float32[..., rows, 2]
    """
    return torch.stack([weights.amin(-1).clamp_max(0), weights.amax(-1).clamp_min(0)], -1)


def lloyd_levels(weights: Tensor, *, rounds: int = 10) -> Tensor:
    """Fit each row's two levels by Lloyd iterations from one standard deviation out."""
    deviation = weights.pow(2).mean(-1).sqrt()
    levels = torch.stack([-1.3 * deviation, 1.3 * deviation], -1)
    for _ in range(rounds):
        low, high = weights < levels[..., :1] / 2, weights > levels[..., 1:] / 2
        count = torch.stack([low.sum(-1), high.sum(-1)], -1)
        total = torch.stack([(weights * low).sum(-1), (weights * high).sum(-1)], -1)
        levels = torch.where(count > 0, total / count.clamp_min(1), levels)
    return levels


def round_to_nearest(weights: Tensor, levels: Tensor) -> Tensor:
    """Round weights [..., rows, cols] to int8 digits, thresholds half way."""
    return (weights > levels[..., 1:] / 2).to(torch.int8) - (weights < levels[..., :1] / 2).to(torch.int8)


def dense(digits: Tensor, levels: Tensor) -> Tensor:
    """Expand digits int8[..., rows, cols] to the float32 values they stand for."""
    return torch.where(digits > 0, levels[..., 1:], 0.0) + torch.where(digits < 0, levels[..., :1], 0.0)


def count_digits(digits: Tensor) -> Tensor:
    """Count -, 0, + per matrix: int8[..., rows, cols] -> float32[..., 3]."""
    return torch.stack([(digits == v).float().sum((-1, -2)) for v in (-1, 0, 1)], -1)


def solve(
    weights: Tensor,
    levels: Tensor,
    factors: Factors,
    *,
    price: float = 0.0,
    bits: Tensor | None = None,
    block: int = BLOCK_COLUMNS,
) -> Ternary:
    """Quantize a batch of experts with error feedback.

    weights : float32[experts, rows, cols]
    levels : float32[experts, rows, 2]
    price : what one bit costs, in units of the row's variance; 0 is the paper's rule, and a
        negative price asks for more bits than rounding to the nearest level spends
    bits : float32[experts, 3]  code length of -, 0, + (needed unless price is 0)

    The rate term is price * variance(row) * bits(digit) * U[c,c]^2 / mean(U[c,c]^2):
    dividing by U[c,c]^2 the squared error becomes the increase of the objective, so a
    bit costs the same in every column.
    """
    # Columns first: the loop below reads and writes whole columns.
    w = weights.transpose(-1, -2).masked_fill(factors.dead[:, :, None], 0.0).contiguous()
    cols = w.shape[1]
    margin = torch.empty_like(w)
    upper = factors.upper
    lo, hi = levels[..., 0], levels[..., 1]
    edges = Edges(weights, lo, hi, upper.diagonal(dim1=-2, dim2=-1), price=price, bits=bits)
    solve_block = _solve_block
    if w.is_cuda:
        from .cuda import solve_block  # here, as it needs CuPy
    for start in range(0, cols, block):
        stop = min(start + block, cols)
        errors = solve_block(
            w[:, start:stop], upper[:, start:stop, start:stop], lo, hi, *edges.of(start, stop), margin=margin[:, start:stop]
        )
        if stop < cols:
            w[:, stop:].baddbmm_(upper[:, start:stop, stop:].transpose(-1, -2), errors, alpha=-1)
    margin = margin.transpose(-1, -2).contiguous()
    return Ternary(digits=(margin > 1).to(torch.int8) - (margin < -1).to(torch.int8), levels=levels, margin=margin)


class Edges:
    """The sizes beyond which a weight becomes - or +, per column and row.

    "+ beats 0" in squared error plus price is w > hi/2 + rent/hi, and alike for -. A digit
    whose level is 0 would say what 0 says, and never comes.
    """

    def __init__(self, weights: Tensor, lo: Tensor, hi: Tensor, diagonal: Tensor, *, price: float, bits: Tensor | None) -> None:
        """Prepare; weights [experts, rows, cols], lo and hi [experts, rows], diagonal [experts, cols]."""
        # Of its own row: no row may decide what another's weights become.
        self._floor = 1e-6 * weights.abs().mean(-1)[:, None] + 1e-30
        never = torch.full_like(lo[:, None], torch.inf)
        self._half = tuple(torch.where(level > 0, level / 2, never) for level in (-lo[:, None], hi[:, None]))
        self._share: Tensor | None = None
        if price != 0:
            if bits is None:
                raise ValueError("a price needs code lengths")
            floor = self._floor[:, 0]
            scale = price * weights.pow(2).mean(-1) / 2
            rent_low = scale * (bits[:, :1] - bits[:, 1:2]) / (-lo).clamp_min(floor)
            rent_high = scale * (bits[:, 2:] - bits[:, 1:2]) / hi.clamp_min(floor)
            self._rent = (rent_low[:, None], rent_high[:, None])
            self._share = (diagonal.pow(2) / diagonal.pow(2).mean(-1, keepdim=True))[:, :, None]

    def of(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Give the edges of some columns, both positive, float32[experts, columns, rows]."""
        low, high = self._half
        if self._share is not None:
            share = self._share[:, start:stop]
            low, high = low + share * self._rent[0], high + share * self._rent[1]
        shape = (-1, stop - start, -1)
        return torch.maximum(low, self._floor).expand(shape), torch.maximum(high, self._floor).expand(shape)


def _solve_block(
    w: Tensor, upper: Tensor, lo: Tensor, hi: Tensor, low_edges: Tensor, high_edges: Tensor, *, margin: Tensor
) -> Tensor:
    """Quantize a block of columns, float32[experts, columns, rows]; fills ``margin``.

    Returns the errors, divided by the diagonal. On a CUDA device a kernel does the same.
    """
    w = w.clone()
    errors = torch.empty_like(w)
    diagonal = upper.diagonal(dim1=-2, dim2=-1)[:, :, None]
    for c in range(w.shape[1]):
        value = w[:, c]
        ratio = torch.div(value, torch.where(value < 0, low_edges[:, c], high_edges[:, c]), out=margin[:, c])
        quantized = torch.where(ratio > 1, hi, torch.where(ratio < -1, lo, 0.0))
        error = torch.div(value - quantized, diagonal[:, c], out=errors[:, c])
        if c + 1 < w.shape[1]:
            w[:, c + 1 :].addcmul_(upper[:, c, c + 1 :, None], error[:, None, :], value=-1)
    return errors


def refit_levels(weights: Tensor, digits: Tensor, levels: Tensor, hessian: Tensor, *, damping: float) -> Tensor:
    """Refit each row's levels in the Hessian metric, digits fixed (least squares).

    Keeps the old level where the digits do not determine a new one of the right sign.
    """
    ridge = damping * hessian.diagonal(dim1=-2, dim2=-1).mean(-1)
    h = hessian.clone()
    h.diagonal(dim1=-2, dim2=-1).add_(ridge[:, None])
    minus, plus = (digits < 0).float(), (digits > 0).float()
    minus_h, plus_h = minus @ h, plus @ h
    a, b, d = (minus_h * minus).sum(-1), (minus_h * plus).sum(-1), (plus_h * plus).sum(-1)
    x, y = (minus_h * weights).sum(-1), (plus_h * weights).sum(-1)
    determinant = a * d - b * b
    safe = determinant.abs() > 1e-6 * (a * d).abs().clamp_min(1e-30)
    divisor = torch.where(safe, determinant, 1.0)
    lo = torch.where(safe, (x * d - y * b) / divisor, levels[..., 0])
    hi = torch.where(safe, (a * y - b * x) / divisor, levels[..., 1])
    lo = torch.where((lo < 0) & torch.isfinite(lo), lo, levels[..., 0])
    hi = torch.where((hi > 0) & torch.isfinite(hi), hi, levels[..., 1])
    return torch.stack([lo, hi], -1)
