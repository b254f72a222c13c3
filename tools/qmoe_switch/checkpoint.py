"""Checkpoint directories as the runtime sees them: dense tensors by name, and the experts of each sparse layer.

Two kinds are read, plain (safetensors as transformers writes them) and packed (this project's format). Which one a
directory is shows in the metadata of its files. Nothing but headers is read when a directory is opened; what is read
later is checked then.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open

from qmoecodec.container.header import DTYPE_SIZES
from qmoecodec.types import Encoded

from .errors import SwitchError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PROJECTIONS = ("wi", "wo")
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class PackedMatrix(Protocol):
    """One expert matrix in compressed form."""

    def matvec(self, x: npt.NDArray[np.float32], begin: int, end: int) -> npt.NDArray[np.float32]:
        """Multiply rows begin..end with float32[cols] without storing them decoded; float32[end - begin]."""

    def matrix(self) -> npt.NDArray[np.float32]:
        """Decode to float32[rows, cols]."""


@dataclass(frozen=True, slots=True, eq=False)
class Compressed:
    """Consecutive experts of one group of a packed file, checked but not decoded.

    levels : [experts, rows, 2]    low and high level in `dtype` (BF16 as uint16 bits)
    dtype : "BF16", "F16", "F32" or "F64"
    """

    encoded: Encoded
    levels: npt.NDArray[Any]
    dtype: str

    def part(self, first: int, end: int) -> Compressed:
        """Return the experts first..end-1."""
        e = self.encoded
        offsets = e.code_offsets[first : end + 1]
        encoded = Encoded(
            shape=(end - first, *e.shape[1:]),
            codes=e.codes[int(offsets[0]) : int(offsets[-1])],
            code_offsets=offsets - offsets[0],
            row_lengths=e.row_lengths[first:end],
            dictionary_index=e.dictionary_index[first:end],
            dictionaries=e.dictionaries,
        )
        return Compressed(encoded, self.levels[first:end], self.dtype)


class ExpertStack(Protocol):
    """One projection, `wi` or `wo`, of all experts of one sparse layer."""

    @property
    def name(self) -> str:
        """What an error calls it."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts, rows, cols)."""

    @property
    def n_bytes(self) -> int:
        """Bytes of all experts as they are stored; no weights are read for it."""

    def compressed(self) -> Compressed | None:
        """Read all experts in compressed form; None where they are not all compressed in one group."""

    def packed(self, expert: int) -> PackedMatrix | None:
        """Return the expert in compressed form, None if it is stored as a plain tensor."""

    def dense(self, expert: int) -> torch.Tensor:
        """Return the expert's matrix [rows, cols] in its stored dtype."""


class Checkpoint(Protocol):
    """An opened directory."""

    @property
    def directory(self) -> Path: ...

    @property
    def is_packed(self) -> bool: ...

    def has(self, name: str) -> bool:
        """Say whether there is a dense tensor of that name."""

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Read a dense tensor in its stored dtype. SwitchError where it is missing, misshapen or not finite."""

    def experts(self, prefix: str, projection: str, shape: tuple[int, int, int]) -> ExpertStack:
        """Find the experts `{prefix}.expert_{i}.{projection}.weight`; reads no weights."""

    def unclaimed(self) -> list[str]:
        """Name what nobody has asked for with `tensor` or `experts`."""

    def close(self) -> None: ...


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Open a packed or plain checkpoint directory."""
    directory = Path(directory)
    if not directory.is_dir():
        raise SwitchError(f"{directory}: not a directory (a checkpoint is a directory with config.json and weights)")
    files = _locate(directory)
    if _is_packed(files):
        from .packed import PackedCheckpoint

        return PackedCheckpoint(directory)
    if (directory / INDEX).exists() and (directory / SINGLE).exists():  # in a packed one the index counts (spec §8)
        raise SwitchError(f"{directory} holds both {SINGLE} and {INDEX}: which of them counts?")
    return PlainCheckpoint(directory, files)


def read_config(directory: Path) -> dict[str, Any]:
    """Read config.json."""
    return _read_json(directory / "config.json")


def expert_name(prefix: str, expert: int, projection: str) -> str:
    """Name one expert's tensor as transformers does."""
    return f"{prefix}.expert_{expert}.{projection}.weight"


def check_tensor(what: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the tensor if it has the shape that config.json asks for, is floating point and finite."""
    if tuple(tensor.shape) != shape:
        raise SwitchError(f"{what} has shape {list(tensor.shape)}, config.json asks for {list(shape)}")
    if tensor.dtype not in _FLOATING:
        raise SwitchError(f"{what} is {tensor.dtype}, not floating point of 16, 32 or 64 bits")
    if not bool(torch.isfinite(tensor).all()):
        raise SwitchError(f"{what} holds NaN or infinite weights")
    return tensor


class PlainCheckpoint:
    """safetensors files as transformers writes them, one or several with an index."""

    is_packed = False

    def __init__(self, directory: Path, files: dict[str, Path]) -> None:
        self.directory = directory
        self._files = files
        self._claimed: set[str] = set()
        self._open = contextlib.ExitStack()
        self._handles: dict[Path, Any] = {}

    def has(self, name: str) -> bool:
        """Say whether there is a tensor of that name."""
        return name in self._files

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Read a tensor."""
        self._claimed.add(name)
        return check_tensor(f"{self.directory}: {name}", self._read(name), shape)

    def experts(self, prefix: str, projection: str, shape: tuple[int, int, int]) -> ExpertStack:
        """Check that every expert has a tensor."""
        for expert in range(shape[0]):
            name = expert_name(prefix, expert, projection)
            if name not in self._files:
                raise SwitchError(f"{self.directory}: tensor {name} is missing")
            self._claimed.add(name)
        return _PlainStack(self, prefix, projection, shape)

    def unclaimed(self) -> list[str]:
        """Name the tensors that nobody has asked for."""
        return sorted(self._files.keys() - self._claimed)

    def close(self) -> None:
        """Close all files."""
        self._handles.clear()
        self._open.close()

    def n_bytes(self, name: str) -> int:
        """Return the bytes of a tensor, from the header alone."""
        part = self._take(name, lambda handle: handle.get_slice(name))
        shape: list[int] = part.get_shape()
        return math.prod(shape) * DTYPE_SIZES[part.get_dtype()]

    def _read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._take(name, lambda handle: handle.get_tensor(name))
        return tensor

    def _take(self, name: str, take: Callable[[Any], Any]) -> Any:
        file = self._files.get(name)
        if file is None:
            raise SwitchError(f"{self.directory}: tensor {name} is missing")
        try:
            if file not in self._handles:
                self._handles[file] = self._open.enter_context(safe_open(file, framework="pt", device="cpu"))
            return take(self._handles[file])
        except (OSError, SafetensorError) as error:
            raise SwitchError(f"{file}: {name} cannot be read ({error})") from None


class StackRange:
    """The experts first..end-1 of a stack, numbered from 0."""

    def __init__(self, stack: ExpertStack, first: int, end: int) -> None:
        self.name = f"{stack.name} from expert {first} to {end - 1}"
        self.shape = (end - first, *stack.shape[1:])
        self._stack, self._first, self._end = stack, first, end

    @property
    def n_bytes(self) -> int:
        return self._stack.n_bytes * self.shape[0] // self._stack.shape[0]

    def compressed(self) -> Compressed | None:
        whole = self._stack.compressed()
        return None if whole is None else whole.part(self._first, self._end)

    def packed(self, expert: int) -> PackedMatrix | None:
        return self._stack.packed(self._first + expert)

    def dense(self, expert: int) -> torch.Tensor:
        return self._stack.dense(self._first + expert)


class _PlainStack:
    def __init__(self, checkpoint: PlainCheckpoint, prefix: str, projection: str, shape: tuple[int, int, int]) -> None:
        self.name = f"{prefix}.{projection}"
        self.shape = shape
        self._checkpoint, self._prefix, self._projection = checkpoint, prefix, projection

    @property
    def n_bytes(self) -> int:
        names = (expert_name(self._prefix, expert, self._projection) for expert in range(self.shape[0]))
        return sum(self._checkpoint.n_bytes(name) for name in names)

    def compressed(self) -> None:
        return None

    def packed(self, expert: int) -> None:
        return None

    def dense(self, expert: int) -> torch.Tensor:
        return self._checkpoint.tensor(expert_name(self._prefix, expert, self._projection), self.shape[1:])


def _locate(directory: Path) -> dict[str, Path]:
    """Map tensor names to files, by the index if there is one."""
    index, single = directory / INDEX, directory / SINGLE
    if not index.is_file():
        if not single.is_file():
            pickled = sorted(file.name for file in directory.glob("pytorch_model*.bin"))
            hint = f", only {pickled[0]}: save it again with transformers, which writes safetensors" if pickled else ""
            raise SwitchError(f"{directory}: holds neither {SINGLE} nor {INDEX}{hint}")
        return dict.fromkeys(_keys(single), single)
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise SwitchError(f"{index}: no usable weight_map")
    held: dict[str, frozenset[str]] = {}
    for shard in sorted(set(weight_map.values())):
        file = directory / shard
        if shard != file.name or not file.is_file():
            raise SwitchError(f"{directory}: shard {shard}, which {INDEX} lists, is missing")
        held[shard] = _keys(file)
    for name, shard in weight_map.items():
        if name not in held[shard]:
            raise SwitchError(f"{directory}: tensor {name} is not in {shard}, where {INDEX} puts it")
    return {name: directory / shard for name, shard in weight_map.items()}


def _keys(file: Path) -> frozenset[str]:
    try:
        with safe_open(file, framework="pt", device="cpu") as handle:
            return frozenset(handle.keys())
    except (OSError, SafetensorError) as error:
        raise SwitchError(f"{file}: not a readable safetensors file ({error})") from None


def _is_packed(files: dict[str, Path]) -> bool:
    kinds = {}
    for file in sorted(set(files.values())):
        with safe_open(file, framework="pt", device="cpu") as handle:
            kinds[file] = "qmoecodec" in (handle.metadata() or {})
            stray = () if kinds[file] else sorted(name for name in handle.keys() if files.get(name) != file)  # noqa: SIM118
        if stray:
            raise SwitchError(f"{file}: holds tensor {stray[0]}, which {INDEX} does not list there")
    if len(set(kinds.values())) > 1:
        plain = next(file.name for file, packed in kinds.items() if not packed)
        raise SwitchError(f"{next(iter(kinds)).parent}: some shards are packed and {plain} is not")
    return any(kinds.values())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SwitchError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise SwitchError(f"{path}: not readable JSON ({error})") from None
    if not isinstance(value, dict):
        raise SwitchError(f"{path}: not a JSON object")
    return value
