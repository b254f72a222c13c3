"""Tune one expert group against the original block's outputs: the form that scales.

Source of the idea: block reconstruction (Li et al. 2021, BRECQ), with straight-through
digits (``ste``). A token belongs to one expert, so the experts of a layer are independent
and each is tuned on its own tokens: whatever the compressed model feeds it, its output
should complete the residual stream to what the original model had there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from .gptq import Ternary
from .model import SwitchConfig, expert_ffn
from .settings import Settings
from .ste import Trainable, mean_entropy, settle, steer

Tensor = torch.Tensor

MARGIN_RATE, LEVEL_RATE = 1e-2, 3e-3
WARMUP = 0.05
BATCH_TOKENS = 1024
FEWEST_BATCHES = 4


def refine_group(
    config: SwitchConfig,
    matrices: Mapping[str, Ternary],
    tokens: Sequence[Tensor],
    probabilities: Sequence[Tensor],
    wanted: Sequence[Tensor],
    *,
    settings: Settings,
    dtype: torch.dtype,
    seed: tuple[int, ...],
) -> dict[str, Ternary]:
    """Tune digits and levels of a group at its present rate.

    matrices : ``wi`` and ``wo`` from the solver
    tokens : per expert float32[n, d_model]        normed inputs, from the compressed model
    probabilities : per expert float32[n]          the router's
    wanted : per expert float32[n, d_model]        original block output minus the residual input
    """
    parts: dict[str, list[Ternary]] = {"wi": [], "wo": []}
    for i, (x, p, y) in enumerate(zip(tokens, probabilities, wanted, strict=True)):
        start = {which: Ternary(m.digits[i : i + 1], m.levels[i : i + 1], m.margin[i : i + 1]) for which, m in matrices.items()}
        rng = np.random.default_rng([settings.seed, 3, *seed, i])
        tuned = refine_expert(config, start, x, p, y, settings=settings, dtype=dtype, rng=rng)
        for which in parts:
            parts[which].append(tuned[which])
    return {
        which: Ternary(
            torch.cat([t.digits for t in group]),
            torch.cat([t.levels for t in group]),
            torch.cat([t.margin for t in group]),
        )
        for which, group in parts.items()
    }


@torch.enable_grad()
def refine_expert(
    config: SwitchConfig,
    start: Mapping[str, Ternary],
    x: Tensor,
    probability: Tensor,
    wanted: Tensor,
    *,
    settings: Settings,
    dtype: torch.dtype,
    rng: np.random.Generator,
) -> dict[str, Ternary]:
    """Tune one expert; one with too few tokens to tell signal from noise stays as it is."""
    batch = min(BATCH_TOKENS, len(x) // FEWEST_BATCHES)
    if batch * FEWEST_BATCHES < max(x.shape[1] // FEWEST_BATCHES, 1):
        return dict(start)
    trainable = {which: Trainable(t) for which, t in start.items()}
    matrices = list(trainable.values())
    threshold, target = 1.0, mean_entropy(matrices, 1.0)
    if target == 0:
        return dict(start)
    optimizer = torch.optim.Adam(
        [
            {"params": [m.margin for m in matrices], "lr": MARGIN_RATE},
            {"params": [m.log_levels for m in matrices], "lr": LEVEL_RATE},
        ],
        betas=(0.9, 0.95), eps=1e-12, fused=True,
    )  # fmt: skip
    rates = [group["lr"] for group in optimizer.param_groups]
    scale = float(wanted.square().mean()) or 1.0
    per_epoch = len(x) // batch
    steps = max(1, round(settings.epochs * per_epoch))
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        at = step % per_epoch
        if at == 0:
            order = torch.from_numpy(rng.permutation(len(x)))
        rows = order[at * batch : (at + 1) * batch].to(x.device)
        factor = min(1.0, (step + 1) / max(1.0, WARMUP * steps)) * (1 - step / steps)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        optimizer.zero_grad(set_to_none=True)
        wi, wo = (trainable[which].values(threshold)[0] for which in ("wi", "wo"))
        out = expert_ffn(config, wi, wo, x[rows]) * probability[rows, None]
        loss = (out - wanted[rows]).square().mean() / scale
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        threshold = steer(threshold, mean_entropy(matrices, threshold), target)
    threshold = settle(matrices, target)
    return {which: m.result(threshold, dtype) for which, m in trainable.items()}
