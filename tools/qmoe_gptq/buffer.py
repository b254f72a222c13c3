"""Activations of all calibration samples in one flat list of tokens.

Source: QMoE, section 3.2 ("list buffer"): one allocation, samples addressed by offset,
experts by token indices; the storage may be memory or a file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

Tensor = torch.Tensor
CHUNK_TOKENS = 1 << 16


class ListBuffer:
    """float32[samples * length, width] in memory, or memory-mapped from a scratch file.

    Batches are copied to the compute device when read and back when written, so only
    what one batch needs is ever on the device.
    """

    def __init__(self, samples: int, length: int, width: int, *, device: str, scratch: Path | None = None) -> None:
        """Allocate; with ``scratch`` the tokens live in that file instead of in memory."""
        self.samples, self.length, self.width = samples, length, width
        self._device = device
        shape = (samples * length, width)
        if scratch is None:
            self._tokens = torch.zeros(shape)
        else:
            scratch.parent.mkdir(parents=True, exist_ok=True)
            self._tokens = torch.from_numpy(np.memmap(scratch, np.float32, "w+", shape=shape))

    @property
    def n_bytes(self) -> int:
        """Bytes held, in memory or on disk."""
        return self._tokens.numel() * 4

    def batch(self, start: int, stop: int) -> Tensor:
        """Read samples ``start`` to ``stop`` as [n, length, width]."""
        rows = self._tokens[start * self.length : stop * self.length]
        return rows.view(-1, self.length, self.width).to(self._device)

    def write(self, start: int, values: Tensor) -> None:
        """Write samples [n, length, width] from sample ``start`` on."""
        n = values.shape[0]
        rows = values.detach().reshape(n * self.length, self.width)
        self._tokens[start * self.length : (start + n) * self.length].copy_(rows)

    def gather(self, tokens: Tensor) -> Tensor:
        """Read tokens by index, [n, width]."""
        return self._tokens[tokens].to(self._device)

    def scatter(self, tokens: Tensor, values: Tensor) -> None:
        """Write tokens by index."""
        self._tokens[tokens] = values.detach().to("cpu")
