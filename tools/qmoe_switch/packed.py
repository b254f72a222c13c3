"""Packed checkpoints (this project's format) for the runtime: mapped into memory, each expert read when it is used."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qmoecodec import container
from qmoecodec.codec import matvec_rows
from qmoecodec.container.header import DTYPE_SIZES
from qmoecodec.container.ternary import fill_rows
from qmoecodec.errors import FormatError

from .checkpoint import Compressed, ExpertStack, check_tensor, expert_name
from .errors import SwitchError

#: Experts of one stack whose row tables are kept (about 20 bytes a row; the codewords stay in the mapped file).
PREPARED_EXPERTS = 256

_TORCH = {
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class PackedCheckpoint:
    """A packed file or several of them with an index."""

    is_packed = True

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            self._file = container.open(directory)
        except (OSError, ValueError) as error:
            if isinstance(error, FormatError):
                raise
            raise SwitchError(str(error)) from None
        # Stacks by the template of their names; what holds one tensor, by its name. No names of experts are listed:
        # there may be a hundred thousand.
        self._stacks: dict[str, list[container.Group]] = {}
        self._single: dict[str, container.Group] = {}
        for group in self._file.groups.values():
            if group.info.layout == "stacked":
                self._stacks.setdefault(group.info.source, []).append(group)
            else:
                self._single[group.info.source] = group
        self._unclaimed = {*self._stacks, *self._single, *self._file.tensors}

    def has(self, name: str) -> bool:
        """Say whether there is a dense tensor of that name."""
        return name in self._single or name in self._file.tensors

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Read a dense tensor, decoded if it is a ternary matrix outside the experts."""
        what = f"{self.directory}: {name}"
        self._unclaimed.discard(name)
        group = self._single.get(name)
        if group is not None:
            return check_tensor(what, _to_torch(group.dense(), group.dtype), shape)
        if name not in self._file.tensors:
            raise SwitchError(f"{self.directory}: tensor {name} is missing")
        return check_tensor(what, _to_torch(self._file.tensors[name], self._file.tensors.dtype_name(name)), shape)

    def experts(self, prefix: str, projection: str, shape: tuple[int, int, int]) -> ExpertStack:
        """Find the groups and tensors that hold the experts of one projection."""
        template = f"{prefix}.expert_{{}}.{projection}.weight"
        groups = self._stacks.get(template, [])
        for group in groups:
            if group.shape[1:] != shape[1:]:
                raise SwitchError(
                    f"{self.directory}: group {group.name} has experts of {list(group.shape[1:])}, "
                    f"config.json asks for {list(shape[1:])}"
                )
        stack = _PackedStack(self, prefix, projection, shape, groups)
        for expert in stack.numbers_not_in_groups():
            name = expert_name(prefix, expert, projection)
            if name not in self._file.tensors:
                raise SwitchError(f"{self.directory}: tensor {name} is missing")
            self._unclaimed.discard(name)
        if all(end <= shape[0] for group in groups for _, end in group.info.expert_ranges):
            self._unclaimed.discard(template)
        return stack

    def n_bytes(self, name: str) -> int:
        """Return the bytes of a plain tensor, from the header alone."""
        tensors = self._file.tensors
        return math.prod(tensors.shape(name)) * DTYPE_SIZES[tensors.dtype_name(name)]

    def unclaimed(self) -> list[str]:
        """Name what nobody has asked for; of experts beyond those asked for, the template of their names."""
        return sorted(self._unclaimed)

    def close(self) -> None:
        """Close the files."""
        self._file.close()


class PackedExpert:
    """One compressed expert with its levels as float32."""

    def __init__(self, expert: container.Expert, where: dict[str, object]) -> None:
        self._expert, self._where = expert, where
        self._levels: npt.NDArray[np.float32] = expert.levels_as(np.float32)
        n_bytes = (expert.row_lengths.astype(np.int64) * expert.dictionary.code_bits + 7) // 8
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(n_bytes)])
        if (self._levels == 0).any():
            expert.decode()  # checks that no digit stands for a level that is +0 (spec §6.3); matvec does not

    def matvec(self, x: npt.NDArray[np.float32], begin: int, end: int) -> npt.NDArray[np.float32]:
        """Multiply rows begin..end with float32[cols] from their codewords: float32[end - begin]."""
        e = self._expert
        codes = e.codes[self._starts[begin] : self._starts[end]]
        try:
            return matvec_rows(codes, e.row_lengths[begin:end], self._levels[begin:end], x, dictionary=e.dictionary)
        except FormatError as error:
            row = error.where.get("row")
            if isinstance(row, int):
                error.where["row"] = begin + row
            raise error.at(**self._where) from None

    def matrix(self) -> npt.NDArray[np.float32]:
        """Decode to float32[rows, cols], in one pass over the digits: the levels' bits are those of float32."""
        return fill_rows(self._expert.decode(), self._levels.view(np.uint32)).view(np.float32)


class _PackedStack:
    def __init__(
        self,
        checkpoint: PackedCheckpoint,
        prefix: str,
        projection: str,
        shape: tuple[int, int, int],
        groups: list[container.Group],
    ) -> None:
        self.name = f"{prefix}.{projection}"
        self.shape = shape
        self._checkpoint, self._prefix, self._projection = checkpoint, prefix, projection
        # Which numbers each group holds: (first, last + 1, index of the first in the group, group).
        self._ranges: list[tuple[int, int, int, container.Group]] = []
        self._prepared: OrderedDict[int, PackedExpert] = OrderedDict()
        self._lock = Lock()
        for group in groups:
            index = 0
            for first, end in group.info.expert_ranges:
                self._ranges.append((first, end, index, group))
                index += end - first
        self._ranges.sort(key=lambda item: item[0])

    @property
    def n_bytes(self) -> int:
        groups = {group.name: group for *_, group in self._ranges}.values()
        plain = (expert_name(self._prefix, expert, self._projection) for expert in self.numbers_not_in_groups())
        return sum(group.data.n_bytes for group in groups) + sum(self._checkpoint.n_bytes(name) for name in plain)

    def compressed(self) -> Compressed | None:
        if len(self._ranges) != 1 or self._ranges[0][:2] != (0, self.shape[0]):
            return None
        group = self._ranges[0][3]
        return Compressed(group.encoded(), group.levels, group.dtype)

    def numbers_not_in_groups(self) -> Iterator[int]:
        """Yield the experts that can only be plain tensors."""
        at = 0
        for first, end, _, _ in self._ranges:
            yield from range(at, min(first, self.shape[0]))
            at = max(at, end)
        yield from range(at, self.shape[0])

    def _find(self, expert: int) -> tuple[container.Group, int] | None:
        at = bisect_right(self._ranges, expert, key=lambda item: item[0]) - 1
        if at < 0:
            return None
        first, end, index, group = self._ranges[at]
        return (group, index + expert - first) if expert < end else None

    def packed(self, expert: int) -> PackedExpert | None:
        place = self._find(expert)
        if place is None:
            return None
        with self._lock:
            known = self._prepared.pop(expert, None)
            if known is not None:
                self._prepared[expert] = known
                return known
        group, index = place
        made = PackedExpert(group.expert(index), {"group": group.name, "expert": index})
        with self._lock:
            self._prepared[expert] = made
            if len(self._prepared) > PREPARED_EXPERTS:
                self._prepared.popitem(last=False)
        return made

    def dense(self, expert: int) -> torch.Tensor:
        place = self._find(expert)
        if place is None:
            return self._checkpoint.tensor(expert_name(self._prefix, expert, self._projection), self.shape[1:])
        group, index = place
        return _to_torch(group.expert(index).dense(), group.dtype)


def _to_torch(array: npt.NDArray[Any], dtype: str) -> torch.Tensor:
    """Copy an array into a tensor; what numpy has no type for comes as bits."""
    if dtype not in _TORCH:
        raise SwitchError(f"the runtime knows no tensors of dtype {dtype}")
    signed = array.view(np.int16) if dtype == "BF16" else array
    return torch.from_numpy(signed.copy()).view(_TORCH[dtype])
