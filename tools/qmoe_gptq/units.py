"""The unit of work, (layer, expert group), and its form on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch

from .checkpoint import PROJECTIONS, Checkpoint, SparseLayer
from .gptq import Ternary
from .store import UnitStore

Tensor = torch.Tensor
_POWERS = (1, 3, 9, 27, 81)


@dataclass(slots=True)
class Unit:
    """A quantized expert group.

    matrices : by projection
    fallback : by projection, experts (index in the group) rounded to nearest
    paper_entropy : by projection, float32[experts], NaN when not asked for
    keep_margins : store margins too (tuning the whole model starts from them)
    """

    matrices: dict[str, Ternary]
    fallback: dict[str, tuple[int, ...]]
    paper_entropy: dict[str, Tensor]
    keep_margins: bool


def unit_key(layer: SparseLayer, group: range) -> str:
    """Name a unit's file."""
    return f"{layer.stack}-{layer.block:03d}-{group[0]:05d}-{group[-1]:05d}"


def squeeze(digits: Tensor) -> Tensor:
    """Store five digits per byte, base 3: int8[...] -> uint8[n]."""
    flat = (digits.flatten().to(torch.int16) + 1).cpu()
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % 5)).view(-1, 5)
    return (flat * torch.tensor(_POWERS, dtype=torch.int16)).sum(1).to(torch.uint8)


def expand(squeezed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo ``squeeze``."""
    digits = squeezed[:, None].to(torch.int16) // torch.tensor(_POWERS, dtype=torch.int16) % 3 - 1
    count = int(torch.tensor(shape).prod())
    return digits.flatten()[:count].to(torch.int8).view(shape)


def save_unit(store: UnitStore, layer: SparseLayer, group: range, unit: Unit) -> None:
    """Put a finished unit into the store."""
    tensors = {}
    for which in PROJECTIONS:
        matrix = unit.matrices[which]
        tensors[f"{which}.digits"] = squeeze(matrix.digits)
        tensors[f"{which}.levels"] = matrix.levels
        tensors[f"{which}.paper_entropy"] = unit.paper_entropy[which]
        if unit.keep_margins:
            tensors[f"{which}.margin"] = matrix.margin
    store.save(unit_key(layer, group), tensors, {"fallback": json.dumps(unit.fallback)})


def load_unit(store: UnitStore, layer: SparseLayer, group: range, checkpoint: Checkpoint) -> Unit | None:
    """Take a finished unit from the store, or None."""
    found = store.load(unit_key(layer, group))
    if found is None:
        return None
    tensors, facts = found
    matrices = {}
    for which in PROJECTIONS:
        shape = (len(group), *checkpoint.shape(layer.expert_name(group[0], which)))
        digits = expand(tensors[f"{which}.digits"], shape)
        matrices[which] = Ternary(digits, tensors[f"{which}.levels"], tensors.get(f"{which}.margin", digits))
    return Unit(
        matrices=matrices,
        fallback={which: tuple(found) for which, found in json.loads(facts["fallback"]).items()},
        paper_entropy={which: tensors[f"{which}.paper_entropy"] for which in PROJECTIONS},
        keep_margins=f"{PROJECTIONS[0]}.margin" in tensors,
    )
