"""What digits cost: entropy as an estimate, the codec for the real figure."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from .gptq import count_digits

Tensor = torch.Tensor

# Codec over entropy on real experts, used only until the codec has encoded something.
TYPICAL_OVERHEAD = 1.037
# "The paper's rate" is measured on Hessians a little different from those of a run of the
# paper's method (special tokens, router weights): staying 1% below means no more bits than it.
PAPER_MARGIN = 0.99
HIGHEST_ENTROPY = float(np.log2(3))


def entropies(digits: Tensor) -> Tensor:
    """Give each matrix's order-0 entropy in bits per digit: int8[..., rows, cols] -> float32[...]."""
    return _bits(_shares(digits))


def mirrored_entropies(digits: Tensor) -> Tensor:
    """Give entropies, mirrored at their maximum where less than a third of the digits are zeros: they fall with the zeros."""
    shares = _shares(digits)
    rates = _bits(shares)
    return torch.where(shares[..., 1] < 1 / 3, 2 * HIGHEST_ENTROPY - rates, rates)


def _shares(digits: Tensor) -> Tensor:
    counts = count_digits(digits)
    return counts / counts.sum(-1, keepdim=True)


def _bits(shares: Tensor) -> Tensor:
    return -(shares * shares.clamp_min(1e-30).log2()).sum(-1)


def payload_bits(digits: Tensor) -> int:
    """Count the payload bits the codec spends on int8[experts, rows, cols]."""
    import qmoecodec

    if not digits.numel():
        return 0
    return 8 * len(qmoecodec.encode(digits.cpu().numpy(), dictionary="auto", code_bits="auto").codes)


def total_payload(groups: Iterable[Tensor]) -> float:
    """Give payload bits per weight over several groups int8[experts, rows, cols]."""
    bits = weights = 0
    for digits in groups:
        bits += payload_bits(digits)
        weights += digits.numel()
    return bits / max(weights, 1)
