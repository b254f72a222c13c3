"""Top-1 routing of a Switch layer, with an explicit rule for tokens beyond an expert's capacity.

transformers up to 5.17 means to drop tokens beyond `expert_capacity` but counts them along the wrong axis and drops
none; from 5.18 on it counts per sequence and drops. Which of the two a run does is a setting here, not a version.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from .errors import SwitchError

Capacity = Literal["none", "per_sequence"]
CAPACITIES: tuple[str, ...] = get_args(Capacity)


@dataclass(frozen=True, slots=True)
class Routing:
    """Where each token of a batch goes.

    expert : int64[batch, sequence]    the expert, -1 for a token that is dropped
    weight : float[batch, sequence]    the router's probability of that expert, by which its output is scaled
    """

    expert: torch.Tensor
    weight: torch.Tensor


def assign(probabilities: torch.Tensor, *, capacity: int | None) -> Routing:
    """Send each token to its most probable expert, the lowest-numbered one of several.

    probabilities : float[batch, sequence, experts]
    capacity : tokens that one expert takes per sequence, in order of position; None for no limit
    """
    weight, expert = probabilities.max(dim=-1)
    if capacity is not None:
        # Not one_hot, which may look at the numbers: routing must not make the host wait for the device.
        taken = expert.unsqueeze(-1) == torch.arange(probabilities.shape[-1], device=expert.device)
        rank = taken.cumsum(dim=-2).gather(-1, expert.unsqueeze(-1)).squeeze(-1)
        expert = torch.where(rank <= capacity, expert, -1)
    return Routing(expert, weight)


class Top1Router(torch.nn.Module):
    """Compute the router's probabilities as transformers does: in `router_dtype`, then in the dtype of the input."""

    def __init__(self, config: Any, *, capacity: Capacity) -> None:
        super().__init__()
        if capacity not in CAPACITIES:
            raise SwitchError(f"capacity is {capacity!r}, not one of {', '.join(CAPACITIES)}")
        if capacity == "per_sequence" and config.expert_capacity < 1:
            raise SwitchError(f"config.json: expert_capacity is {config.expert_capacity}, which drops every token")
        self.dtype: torch.dtype = getattr(torch, config.router_dtype)
        self.capacity: int | None = int(config.expert_capacity) if capacity == "per_sequence" else None
        self.classifier = torch.nn.Linear(config.d_model, config.num_experts, bias=config.router_bias, dtype=self.dtype)

    def forward(self, states: torch.Tensor) -> Routing:
        """Route float[batch, sequence, d_model]."""
        logits = self.classifier(states.to(self.dtype))
        probabilities = torch.nn.functional.softmax(logits, dim=-1, dtype=self.dtype).to(states.dtype)
        return assign(probabilities, capacity=self.capacity)
