"""One unit of work: quantize both matrices of a group of experts.

``wi`` sees the layer's normed inputs, ``wo`` what the expert's activation makes of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from . import gptq
from .gptq import Factors, Ternary
from .model import SwitchConfig, activate
from .rate import HIGHEST_ENTROPY, PAPER_MARGIN, TYPICAL_OVERHEAD, entropies, mirrored_entropies, total_payload
from .settings import Settings

Tensor = torch.Tensor

# Rate search: rows do not interact, so a sample of them tells the whole matrix's rate.
SEARCH_ROWS = 64
SEARCH_SHARE = 8
SEARCH_STEPS = 12
SEARCH_TOLERANCE = 0.01
LOWEST_PRICE, FIRST_PRICE, HIGHEST_PRICE = -1.0, 0.6, 64.0
# A slope flatter than this is noise.
FLATTEST_SLOPE = 0.02
RATE_TOLERANCE = 0.003
REFITS = 2
CORRECTIONS = 3
PAYLOAD_TOLERANCE, PAYLOAD_ROUNDS = 0.006, 4


@dataclass(frozen=True, slots=True)
class Matrix:
    """A quantized stack of expert matrices.

    ternary : digits, levels (already representable in the checkpoint's dtype), margins
    fallback : experts (index in the group) that were rounded to nearest
    paper_entropy : float32[experts]  what the paper's method would have spent; NaN when not asked for
    """

    ternary: Ternary
    fallback: tuple[int, ...]
    paper_entropy: Tensor


def hessian(tokens: Iterable[Tensor], weights: Sequence[Tensor] | None) -> Tensor:
    """Average outer products of each expert's inputs: [n_e, cols] each -> float32[experts, cols, cols].

    ``weights`` [n_e] scale a token's share; an expert without tokens gets zeros.
    """
    out = []
    for i, x in enumerate(tokens):
        scaled = x if weights is None else x * weights[i][:, None]
        out.append(scaled.T @ scaled / max(len(x), 1))
    return torch.stack(out)


def quantize_group(
    config: SwitchConfig,
    wi: Tensor,
    wo: Tensor,
    tokens: Sequence[Tensor],
    probabilities: Sequence[Tensor],
    *,
    settings: Settings,
    dtype: torch.dtype,
    target_bits: float | None,
) -> dict[str, Matrix]:
    """Quantize a group of experts.

    wi : float32[experts, d_ff, d_model]
    wo : float32[experts, d_model, d_ff]
    tokens : per expert float32[n, d_model]   the normed inputs it is calibrated on
    probabilities : per expert float32[n]     the router's, what its output is scaled by
    dtype : the levels are rounded to it before the digits are chosen on them
    target_bits : payload bits per weight to aim at; None is the paper's rate on the same data
    """
    ours = settings.method == "gptq"
    enough = torch.tensor([len(x) >= settings.min_tokens for x in tokens], device=wi.device)
    # An error in an expert's output reaches the model scaled by the router's probability.
    shares = probabilities if ours else None
    out = {}
    for which, weights in (("wi", wi), ("wo", wo)):
        if settings.method == "rtn":
            levels = round_levels(gptq.extreme_levels(weights), dtype)
            out[which] = Matrix(rounded(weights, levels), (), torch.full((len(weights),), float("nan")))
            continue
        # One expert's wide activations at a time.
        hidden = (activate(config, x @ w.T) for x, w in zip(tokens, wi, strict=True))
        h = hessian(tokens if which == "wi" else hidden, shares)
        factors = gptq.factorize(h, damping=settings.damping)
        factors = Factors(factors.upper, factors.dead, factors.usable & enough)
        levels = round_levels(gptq.extreme_levels(weights), dtype)
        paper_entropy = torch.full((len(weights),), float("nan"))
        if not ours or target_bits is None:
            result = replace_unusable(gptq.solve(weights, levels, factors), rounded(weights, levels), factors.usable)
            paper_entropy = entropies(result.digits).cpu()
        if ours:
            usable = factors.usable.cpu()
            paper = PAPER_MARGIN * float(paper_entropy[usable].mean()) if bool(usable.any()) else HIGHEST_ENTROPY
            result = at_bits(weights, h, factors, bits=target_bits, entropy=paper, settings=settings, dtype=dtype)
        if not bool(factors.usable.all()) and target_bits is not None:
            plain = rounded_at_rate(weights, plain_rate(result, factors, target_bits), dtype)
        else:
            plain = rounded(weights, levels)
        result = replace_unusable(result, plain, factors.usable)
        fallback = tuple(int(i) for i in (~factors.usable).nonzero().flatten())
        out[which] = Matrix(result, fallback, paper_entropy)
    return out


def round_levels(levels: Tensor, dtype: torch.dtype) -> Tensor:
    """Round levels to the checkpoint's dtype, so that what is tuned is what is stored."""
    largest = torch.finfo(dtype).max
    return levels.clamp(-largest, largest).to(dtype).float()


def rounded(weights: Tensor, levels: Tensor) -> Ternary:
    """Round to nearest, as a Ternary."""
    edges = torch.where(levels == 0, torch.inf, (levels.abs() / 2).clamp_min(1e-30))
    margin = weights / torch.where(weights < 0, edges[..., :1], edges[..., 1:])
    return Ternary((margin > 1).to(torch.int8) - (margin < -1).to(torch.int8), levels, margin)


def rounded_at_rate(weights: Tensor, entropy: float, dtype: torch.dtype) -> Ternary:
    """Round with, per expert, the threshold that leaves ``entropy`` bits per digit."""
    margin = rounded(weights, gptq.lloyd_levels(weights)).margin
    target = min(entropy, HIGHEST_ENTROPY - 0.005)
    # Fewer zeros than this entropy's maximum would lower it again: search above that point.
    magnitude = margin.abs().flatten(1)
    low = torch.quantile(magnitude[:, :: max(1, magnitude.shape[1] // 1_000_000)], 1 / 3, dim=1)
    high = magnitude.amax(1)
    for _ in range(24):
        middle = (low + high) / 2
        edge = middle[:, None, None]
        above = entropies((margin > edge).to(torch.int8) - (margin < -edge).to(torch.int8)) > target
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    margin = margin / high[:, None, None].clamp_min(1e-30)
    low_side, high_side = margin < -1, margin > 1
    count = torch.stack([low_side.sum(-1), high_side.sum(-1)], -1).clamp_min(1)
    levels = torch.stack([(weights * low_side).sum(-1), (weights * high_side).sum(-1)], -1) / count
    return Ternary(high_side.to(torch.int8) - low_side.to(torch.int8), round_levels(levels, dtype), margin)


def plain_rate(result: Ternary, factors: Factors, bits: float) -> float:
    """Choose the entropy at which experts rounded to nearest spend ``bits`` too: what the others needed."""
    if not bool(factors.usable.any()):
        return bits / TYPICAL_OVERHEAD
    return float(entropies(result.digits[factors.usable]).mean())


def replace_unusable(result: Ternary, plain: Ternary, usable: Tensor) -> Ternary:
    """Take the experts whose Hessian could not be used from ``plain``."""
    if bool(usable.all()):
        return result
    keep = usable[:, None, None]
    return Ternary(
        torch.where(keep, result.digits, plain.digits),
        torch.where(keep, result.levels, plain.levels),
        torch.where(keep, result.margin, plain.margin),
    )


def at_bits(
    weights: Tensor,
    h: Tensor,
    factors: Factors,
    *,
    bits: float | None,
    entropy: float,
    settings: Settings,
    dtype: torch.dtype,
) -> Ternary:
    """Solve at ``bits`` payload bits per weight, or at ``entropy`` bits per digit when that is None."""
    if not bool(factors.usable.any()):
        return rounded(weights, gptq.extreme_levels(weights))  # replaced by the caller
    if bits is None:
        return at_rate(weights, h, factors, target=entropy, settings=settings, dtype=dtype)
    target = bits / TYPICAL_OVERHEAD
    for _ in range(PAYLOAD_ROUNDS):
        result = at_rate(weights, h, factors, target=target, settings=settings, dtype=dtype)
        spent = total_payload([result.digits[factors.usable]])
        if abs(spent / bits - 1) <= PAYLOAD_TOLERANCE or target >= HIGHEST_ENTROPY:
            break
        target = min(target * bits / spent, HIGHEST_ENTROPY)
    return result


def at_rate(weights: Tensor, h: Tensor, factors: Factors, *, target: float, settings: Settings, dtype: torch.dtype) -> Ternary:
    """Solve with the price of a bit that brings the mean entropy to ``target`` bits per digit."""
    target = min(target, HIGHEST_ENTROPY - 0.005)
    rows = weights.shape[1]
    bits = code_lengths(target).to(weights.device).expand(len(weights), 3)
    step = max(1, min(SEARCH_SHARE, rows // SEARCH_ROWS))
    sample = weights[:, ::step].contiguous()

    def attempt(w: Tensor, price: float) -> tuple[Ternary, float]:
        result = rate_solve(w, h, factors, price=price, bits=bits, damping=settings.damping)
        return result, spread(result.digits[factors.usable])

    price, slope = find_price(lambda p: attempt(sample, p)[1], target)
    result, rate = attempt(weights, price)
    for _ in range(CORRECTIONS):
        if abs(rate / target - 1) <= RATE_TOLERANCE:
            break
        # The sample's rate is a little off but its slope is good enough to correct by.
        price += (target - rate) / slope
        result, rate = attempt(weights, price)
    return Ternary(result.digits, round_levels(result.levels, dtype), result.margin)


def find_price(rate_at: Callable[[float], float], target: float) -> tuple[float, float]:
    """Find the price at which a falling function gives ``target``: secant steps inside a bracket.

    Every evaluation solves the problem anew, so few of them matter more than simplicity.
    Returns the price and the function's slope there.
    """
    low, high = LOWEST_PRICE, HIGHEST_PRICE
    price, slope = FIRST_PRICE, -1.0
    before: tuple[float, float] | None = None
    for _ in range(SEARCH_STEPS):
        rate = rate_at(price)
        if before is not None and price != before[0]:
            measured = (rate - before[1]) / (price - before[0])
            slope = min(measured, -FLATTEST_SLOPE)
        if abs(rate / target - 1) <= SEARCH_TOLERANCE:
            break
        low, high = (price, high) if rate > target else (low, price)
        before = (price, rate)
        step = (target - rate) / slope
        price += max(-1.0, min(step, max(1.0, price)))
        if not low < price < high:
            price = (low + high) / 2
    return price, slope


def spread(digits: Tensor) -> float:
    """Give the mean entropy of the digits, mirrored at its maximum so that it falls with the zeros throughout."""
    if not digits.numel():
        return 0.0
    return float(mirrored_entropies(digits).mean())


def code_lengths(entropy: float) -> Tensor:
    """Give the code lengths float32[3] of -, 0, + where both signs are equally likely.

    Lengths measured on the digits instead would feed back: rare digits grow dearer, so
    rarer still, and low rates could not be held.
    """
    low, high = 1 / 3, 1.0 - 1e-6
    for _ in range(40):
        zero = (low + high) / 2
        side = (1 - zero) / 2
        spent = -zero * math.log2(zero) - 2 * side * math.log2(side)
        low, high = (zero, high) if spent > entropy else (low, zero)
    return -torch.log2(torch.tensor([(1 - low) / 2, low, (1 - low) / 2]))


def rate_solve(weights: Tensor, h: Tensor, factors: Factors, *, price: float, bits: Tensor, damping: float) -> Ternary:
    """Alternate between digits (GPTQ at a price per bit) and levels (least squares)."""
    levels = gptq.lloyd_levels(weights)
    for _ in range(REFITS):
        digits = gptq.solve(weights, levels, factors, price=price, bits=bits).digits
        levels = gptq.refit_levels(weights, digits, levels, h, damping=damping)
    result = gptq.solve(weights, levels, factors, price=price, bits=bits)
    levels = gptq.refit_levels(weights, result.digits, levels, h, damping=damping)
    return Ternary(result.digits, levels, result.margin)
