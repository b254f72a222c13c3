"""The run's ternary matrices, read back unit by unit: no more than one unit is held."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .checkpoint import PROJECTIONS, Checkpoint, SparseLayer
from .errors import QuantizeError
from .gptq import Ternary, dense
from .settings import Settings
from .store import UnitStore
from .tune import Tuned, matrix_key
from .units import Unit, load_unit

Tensor = torch.Tensor


class Results:
    """All quantized matrices: those of the store, or the tuned ones that replace them."""

    def __init__(self, checkpoint: Checkpoint, store: UnitStore, settings: Settings) -> None:
        """Nothing is read yet."""
        self._checkpoint, self._store, self._size = checkpoint, store, settings.group
        self._tuned: dict[str, Ternary] = {}
        self._held: tuple[SparseLayer, range, Unit] | None = None

    def replace(self, tuned: Tuned) -> None:
        """Use tuned matrices from now on."""
        self._tuned = {key: ternary.to("cpu") for key, ternary in tuned.matrices.items()}

    def groups(self) -> list[range]:
        """List the expert groups of a layer."""
        n = self._checkpoint.config.experts
        return [range(i, min(i + self._size, n)) for i in range(0, n, self._size)]

    def unit(self, layer: SparseLayer, group: range) -> Unit:
        """Read one unit as the walk left it."""
        if self._held is None or self._held[:2] != (layer, group):
            unit = load_unit(self._store, layer, group, self._checkpoint)
            if unit is None:
                raise QuantizeError(f"{self._store.directory}: a finished unit has disappeared")
            self._held = (layer, group, unit)
        return self._held[2]

    def stack(self, layer: SparseLayer, which: str) -> Ternary:
        """Read all experts of a layer as the walk left them."""
        parts = [self.unit(layer, group).matrices[which] for group in self.groups()]
        return Ternary(*(torch.cat([getattr(p, name) for p in parts]) for name in ("digits", "levels", "margin")))

    def start(self) -> dict[str, Ternary]:
        """Read everything: what tuning the whole model starts from."""
        return {matrix_key(layer, which): self.stack(layer, which) for layer in self._checkpoint.layers for which in PROJECTIONS}

    def parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Go through all final digits int8[experts, rows, cols], with the paper's entropies float32[experts]."""
        for layer in self._checkpoint.layers:
            for group in self.groups():
                for which in PROJECTIONS:
                    unit = self.unit(layer, group)
                    tuned = self._tuned.get(matrix_key(layer, which))
                    digits = unit.matrices[which].digits if tuned is None else tuned.digits[group[0] : group[-1] + 1]
                    yield digits, unit.paper_entropy[which]

    def values(self, layer: SparseLayer, which: str, expert: int) -> Tensor:
        """Expand one expert's final matrix, float32[rows, cols]."""
        tuned = self._tuned.get(matrix_key(layer, which))
        if tuned is not None:
            return dense(tuned.digits[expert], tuned.levels[expert])
        group = self.groups()[expert // self._size]
        matrix = self.unit(layer, group).matrices[which]
        return dense(matrix.digits[expert - group[0]], matrix.levels[expert - group[0]])
