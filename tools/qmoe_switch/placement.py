"""Several devices: which holds what, and how states get from one to the next.

Either each holds a run of layers (`place`, `Moves`), the dense parts of a block beside its experts, or each holds a range
of every layer's experts and the first all dense parts (`SplitLayer`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch

from .backends import ExpertLayer
from .errors import BackendError, SwitchError

Split = Literal["layers", "experts"]
SPLITS: tuple[str, ...] = get_args(Split)


def parse_devices(names: str) -> tuple[torch.device, ...]:
    """Read "cpu", "cuda", or several devices with commas between them. Raises BackendError."""
    return tuple(_parse_device(name.strip()) for name in names.split(","))


def _parse_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BackendError(f"{name!r} is not a device: cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise BackendError(f"the runtime knows the devices cpu and cuda, not {name}")
    if device.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise BackendError(f"the device {name} was asked for, and torch finds no CUDA device (the CPU is not used instead)")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise BackendError(f"the device {name} was asked for, and torch finds {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", index)


def share(weights: Sequence[int], n: int) -> list[int]:
    """Cut a row of weights into n runs, none of them empty, the heaviest as light as can be; return the run of each weight.

    Of cuts with equal heaviest runs one with a small sum of squares is taken.
    """
    sums = [0]
    for weight in weights:
        sums.append(sums[-1] + weight)
    # best[end]: the cost of the first `end` weights in the runs so far, and where the last of these begins
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (0, 0, ())}
    for _ in range(n):
        best = {
            end: min(
                (max(heaviest, sums[end] - sums[begin]), squares + (sums[end] - sums[begin]) ** 2, (*begins, begin))
                for begin, (heaviest, squares, begins) in best.items()
                if begin < end
            )
            for end in range(min(best) + 1, len(sums))
        }
    begins = best[len(weights)][2]
    return [sum(i >= begin for begin in begins) - 1 for i in range(len(weights))]


def place(blocks: Sequence[str], n_bytes: Mapping[str, int], devices: Sequence[torch.device]) -> dict[str, torch.device]:
    """Give every block a device, in runs that hold about as many bytes of experts each.

    blocks : names in the order in which they run
    n_bytes : of the experts, of each block that has some; a block without goes where the next one with experts goes
    """
    sparse = [block for block in blocks if block in n_bytes]
    if len(devices) == 1:
        return dict.fromkeys(blocks, devices[0])
    if len(sparse) < len(devices):
        raise SwitchError(f"{len(sparse)} sparse layers cannot be spread over {len(devices)} devices; split the experts instead")
    runs = share([n_bytes[block] for block in sparse], len(devices))
    placed, at = {}, 0
    for block in blocks:
        placed[block] = devices[runs[min(at, len(runs) - 1)]]
        at += block in n_bytes
    return placed


class Moves:
    """Moves what the parts of a transformers stack are given to the device that they are on.

    What many blocks of a stack are given, masks and the encoder's output, is moved once per device and pass.
    """

    def __init__(self) -> None:
        self._moved: dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}

    def attach(self, stack: torch.nn.Module, parts: Mapping[torch.nn.Module, torch.device]) -> None:
        """Let each of the stack's parts have its inputs on its device."""
        for part, device in parts.items():
            part.register_forward_pre_hook(self._hook(device), with_kwargs=True)
        stack.register_forward_pre_hook(lambda *_: self._moved.clear())
        stack.register_forward_hook(lambda *_: self._moved.clear())

    def _hook(self, device: torch.device) -> Any:
        def move(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or value.device == device:
                return value
            key = id(value), device
            if key not in self._moved:
                self._moved[key] = value, value.to(device)  # the original is kept too, so that its id stays its own
            return self._moved[key][1]

        def hook(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return tuple(move(value) for value in args), {key: move(value) for key, value in kwargs.items()}

        return hook


class SplitLayer:
    """The experts of one layer, ranges of them on several devices. Every device runs the tokens that come to its range."""

    def __init__(self, parts: Sequence[tuple[int, int, torch.device, ExpertLayer]]) -> None:
        """Take (first expert, last + 1, device, the layer with these experts numbered from 0) in order."""
        self._parts = parts

    def __call__(self, states: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        """Compute `wo[e] @ activation(wi[e] @ x)` for every token, as `ExpertLayer` has it."""
        # All are queued before the first result is fetched: devices work at the same time.
        results = []
        for first, end, device, layer in self._parts:
            mine = torch.where((expert >= first) & (expert < end), expert - first, -1)
            results.append(layer(states.to(device), mine.to(device)))
        out = results[0].to(states.device)
        for result in results[1:]:
            out = out + result.to(states.device)  # all but one of them are zeros
        return out
