"""Loss of a model on token files: mean cross-entropy, in nats, per label token that counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .errors import SwitchError
from .model import SwitchModel
from .tokens import IGNORED, TokenSet


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Mean cross-entropy over `n_tokens` labels."""

    loss: float
    n_tokens: int


@torch.inference_mode()
def logits(model: SwitchModel, tokens: TokenSet) -> torch.Tensor:
    """Return float[n, length, vocabulary] for the labels of `tokens`, all samples as one batch."""
    if tokens.decoder_input_ids is None:
        raise SwitchError("these tokens hold no decoder input")
    result: torch.Tensor = model.module(
        input_ids=torch.from_numpy(tokens.input_ids).to(model.device),
        attention_mask=torch.from_numpy(tokens.attention_mask).to(model.device),
        decoder_input_ids=torch.from_numpy(tokens.decoder_input_ids).to(model.device),
        use_cache=False,
    ).logits
    return result


def evaluate(
    model: SwitchModel, tokens: TokenSet, *, batch_size: int = 16, progress: Callable[[int], None] | None = None
) -> Evaluation:
    """Compute the loss on all samples; `progress` is told the samples done after each batch."""
    if tokens.labels is None:
        raise SwitchError("these tokens hold no labels")
    if not tokens.n_labels:
        raise SwitchError(f"no label counts: all of the {len(tokens)} samples' are {IGNORED} or the pad token")
    if batch_size < 1:
        raise SwitchError(f"batch_size is {batch_size}, not at least 1")
    total, count = 0.0, 0
    for begin in range(0, len(tokens), batch_size):
        part = tokens.slice(begin, begin + batch_size)
        assert part.labels is not None
        labels = torch.from_numpy(part.labels).to(model.device)
        scores = logits(model, part).to(torch.float32)
        sums = torch.nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
        total += float(sums.sum(dtype=torch.float64))
        count += int((labels != IGNORED).sum())
        if progress is not None:
            progress(min(begin + batch_size, len(tokens)))
    loss = total / count
    if not loss < float("inf"):
        raise SwitchError(f"{model.checkpoint.directory}: the loss is {loss}")
    return Evaluation(loss, count)
