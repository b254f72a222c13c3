"""Checkpoints as published with the QMoE paper (2023): what their files hold, read and checked layer by layer.

| file | content |
|---|---|
| `config.json` | transformers' configuration |
| `noexp.pt` | state dict of everything that is no expert |
| `exp00.pt`, `exp01.pt`, ... | one per sparse layer, encoder first: for every expert and projection the tensors below |
| `sizes.pt` | matrix name -> number of codewords |

| tensor of `{encoder or decoder}.block.{i}.layer.{1 or 2}.mlp.experts.expert_{j}.{wi or wo}` | |
|---|---|
| `w_comp` | int16[n], bits of unsigned codewords, row after row |
| `row_off` | int32[rows + 1], where each row begins, in codewords |
| `ter_minmax` | bfloat16[2 * rows], low and high level of each row |
| `weight` | empty |

The files are pickles. They are read with `weights_only=True` and in no other way, which runs no code from them.
Nothing in them is trusted: sizes, offsets and streams are checked, and the first thing wrong is the one error.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qmoecodec.codec.rows import decode_rows, encode_rows
from qmoecodec.container.metadata import RESERVED_PREFIX
from qmoecodec.dictionary import qmoe2023
from qmoecodec.errors import FormatError

from .errors import CheckpointImportError

DENSE_FILE, SIZES_FILE, CONFIG_FILE = "noexp.pt", "sizes.pt", "config.json"
PARTS = ("w_comp", "row_off", "ter_minmax", "weight")
PROJECTIONS = ("wi", "wo")
_EXPERT_FILE = re.compile(r"exp\d+\.pt")


@dataclass(frozen=True, slots=True)
class Layer:
    """A sparse layer: the file that holds it and the prefix of its tensors."""

    file: Path
    prefix: str

    def matrix(self, expert: int, projection: str) -> str:
        """Name of one expert's matrix."""
        return f"{self.prefix}.expert_{expert}.{projection}"


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """One expert matrix as published, checked.

    codes : uint8[2 * codewords]    16-bit little-endian codewords, row after row
    row_lengths : uint32[rows]      in codewords
    levels : uint16[rows, 2]        bits of bfloat16, low and high
    digits : int8[rows, cols]       what the codewords stand for
    is_canonical : the codewords are the greedy parse, which this project's format requires of kept ones (spec §5.1)
    """

    name: str
    codes: npt.NDArray[np.uint8]
    row_lengths: npt.NDArray[np.uint32]
    levels: npt.NDArray[np.uint16]
    digits: npt.NDArray[np.int8]
    is_canonical: bool


class Published:
    """A directory in the 2023 layout. Opening it checks which files are there and what config.json says."""

    def __init__(self, directory: str | Path) -> None:
        """Open a directory; raises CheckpointImportError."""
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CheckpointImportError(f"{self.directory}: not a directory")
        config = _read_config(self.directory / CONFIG_FILE)
        self.experts, self.d_model, self.d_ff = config["num_experts"], config["d_model"], config["d_ff"]
        self.vocabulary = config["vocab_size"]
        prefixes = _sparse_prefixes(config, most=sum(1 for _ in self.directory.glob("exp*.pt")) + 1)
        if not prefixes:
            raise CheckpointImportError(f"{self.directory / CONFIG_FILE}: the model has no sparse layer, nothing to import")
        names = [f"exp{i:02d}.pt" for i in range(len(prefixes))]
        self.layers = tuple(Layer(self.directory / n, p) for n, p in zip(names, prefixes, strict=True))
        self._check_files({DENSE_FILE, SIZES_FILE, *names})
        self.sizes = self._read_sizes()

    def shape(self, projection: str) -> tuple[int, int, int]:
        """(experts, rows, cols) of one projection's stack."""
        rows, cols = (self.d_ff, self.d_model) if projection == "wi" else (self.d_model, self.d_ff)
        return self.experts, rows, cols

    def dense(self) -> dict[str, torch.Tensor]:
        """Read `noexp.pt`: name -> tensor."""
        path = self.directory / DENSE_FILE
        tensors = _load(path)
        for name, tensor in tensors.items():
            if not isinstance(tensor, torch.Tensor):
                raise CheckpointImportError(f"{path}: {name} is not a tensor")
            if tensor.layout != torch.strided or tensor.device.type != "cpu":
                raise CheckpointImportError(f"{path}: {name} is a tensor without plain values ({tensor.layout}, {tensor.device})")
            if name == "__metadata__" or name.startswith(RESERVED_PREFIX):
                raise CheckpointImportError(f"{path}: {name} is a name that the format keeps for itself")
            if ".mlp.experts." in name:
                raise CheckpointImportError(f"{path}: {name} belongs to an expert, and this file holds everything else")
        needed = {"shared.weight": (self.vocabulary, self.d_model)}
        for layer in self.layers:
            router = f"{layer.prefix.removesuffix('.experts')}.router.classifier.weight"
            needed[router] = (self.experts, self.d_model)
        for name, shape in needed.items():
            if name not in tensors:
                raise CheckpointImportError(f"{path}: {name} is missing")
            if tuple(tensors[name].shape) != shape:
                raise CheckpointImportError(
                    f"{path}: {name} has shape {list(tensors[name].shape)}, {CONFIG_FILE} asks for {list(shape)}"
                )
        return tensors

    def read_layer(self, layer: Layer) -> dict[str, Any]:
        """Map one layer's file into memory and check the names in it; `matrix` looks at what they hold."""
        tensors = _load(layer.file)
        expected = {f"{layer.matrix(e, p)}.{part}" for e in range(self.experts) for p in PROJECTIONS for part in PARTS}
        if missing := sorted(expected - tensors.keys()):
            raise CheckpointImportError(f"{layer.file}: {missing[0]} is missing ({len(missing)} tensors are)")
        if extra := sorted(tensors.keys() - expected):
            raise CheckpointImportError(f"{layer.file}: {extra[0]} does not belong to this layer ({len(extra)} tensors do not)")
        return tensors

    def matrix(self, layer: Layer, tensors: Mapping[str, Any], expert: int, projection: str) -> Matrix:
        """Take one matrix out of what `read_layer` gave, check it and decode it."""
        name = layer.matrix(expert, projection)
        _, rows, cols = self.shape(projection)
        words = _array(layer.file, f"{name}.w_comp", tensors, torch.int16, None).view("<u2")
        offsets = _array(layer.file, f"{name}.row_off", tensors, torch.int32, rows + 1).astype(np.int64)
        levels = _array(layer.file, f"{name}.ter_minmax", tensors, torch.bfloat16, 2 * rows).reshape(rows, 2)
        weight = tensors[f"{name}.weight"]
        if not isinstance(weight, torch.Tensor) or weight.numel():
            raise CheckpointImportError(f"{layer.file}: {name}.weight is not an empty tensor")
        if self.sizes[name] != len(words):
            raise CheckpointImportError(f"{layer.file}: {name} has {len(words)} codewords, {SIZES_FILE} says {self.sizes[name]}")
        steps = np.diff(offsets)
        if offsets[0] != 0 or offsets[-1] != len(words) or (steps < 0).any():
            at = 0 if offsets[0] != 0 else int(np.argmax(steps < 0)) + 1 if (steps < 0).any() else rows
            raise CheckpointImportError(
                f"{layer.file}: {name}.row_off[{at}] is {int(offsets[at])}: offsets begin at 0, do not fall and end "
                f"at the {len(words)} codewords there are"
            )
        lengths, codes = steps.astype(np.uint32), words.view(np.uint8)
        try:
            digits = decode_rows(codes, lengths, cols=cols, dictionary=qmoe2023.table())
        except FormatError as error:
            raise CheckpointImportError(
                f"{layer.file}: {name}: the codewords of a row do not give {cols} digits: {error}"
            ) from None
        levels = _usable_levels(layer.file, name, levels, digits)
        again, again_lengths = encode_rows(digits, dictionary=qmoe2023.table())
        is_canonical = np.array_equal(lengths, again_lengths) and np.array_equal(codes, again)
        return Matrix(name, codes, lengths, levels, digits, is_canonical)

    def _check_files(self, expected: set[str]) -> None:
        found = {file.name for file in self.directory.iterdir() if file.suffix == ".pt"}
        if missing := sorted(expected - found):
            raise CheckpointImportError(f"{self.directory}: {missing[0]} is missing")
        if extra := sorted(found - expected):
            is_layer = _EXPERT_FILE.fullmatch(extra[0]) is not None
            why = f"{CONFIG_FILE} has {len(self.layers)} sparse layers" if is_layer else "it is not of this layout"
            raise CheckpointImportError(f"{self.directory}: {extra[0]} is left over ({why})")

    def _read_sizes(self) -> dict[str, int]:
        path = self.directory / SIZES_FILE
        sizes = _load(path)
        # One by one: config.json may claim any number of experts.
        expected = set()
        for name in (layer.matrix(e, p) for layer in self.layers for e in range(self.experts) for p in PROJECTIONS):
            if name not in sizes:
                raise CheckpointImportError(f"{path}: {name} is missing")
            expected.add(name)
        if extra := sorted(sizes.keys() - expected):
            raise CheckpointImportError(f"{path}: {extra[0]} is no matrix of the model that {CONFIG_FILE} describes")
        for name, size in sizes.items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 0:
                raise CheckpointImportError(f"{path}: {name} is {size!r}, not a number of codewords")
        return sizes


def _load(path: Path) -> dict[str, Any]:
    """Read one file as a dict of tensors or numbers, without running anything that is in it."""
    try:
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise CheckpointImportError(f"{path}: no such file") from None
    except Exception as error:  # there is no end to what damaged pickles raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointImportError(f"{path}: cannot be read as a file of tensors ({first})") from None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise CheckpointImportError(f"{path}: holds no dictionary of names")
    n_file = path.stat().st_size
    for name, tensor in value.items():
        # A view may repeat its memory: nothing is copied that the file's own bytes cannot account for.
        if isinstance(tensor, torch.Tensor) and tensor.numel() * tensor.element_size() > n_file:
            raise CheckpointImportError(f"{path}: {name} claims {tensor.numel()} elements, more than the file holds")
    return dict(value)


def _array(path: Path, name: str, tensors: Mapping[str, Any], dtype: torch.dtype, size: int | None) -> npt.NDArray[Any]:
    """Return a one-dimensional tensor as an array (bfloat16 as its bits)."""
    tensor = tensors[name]
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != dtype or tensor.dim() != 1:
        kind = f"{tensor.dtype}{list(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise CheckpointImportError(f"{path}: {name} is {kind}, not a one-dimensional {dtype}")
    if size is not None and len(tensor) != size:
        raise CheckpointImportError(f"{path}: {name} has {len(tensor)} entries, {CONFIG_FILE} asks for {size}")
    bits = tensor.contiguous().view(torch.int16) if dtype == torch.bfloat16 else tensor.contiguous()
    array: npt.NDArray[Any] = bits.numpy()
    return array.view(np.uint16) if dtype == torch.bfloat16 else array


def _usable_levels(path: Path, name: str, levels: npt.NDArray[np.uint16], digits: npt.NDArray[np.int8]) -> npt.NDArray[np.uint16]:
    """Return the levels as the format takes them (spec §6.3), with the same values for all digits that occur.

    A level whose digit does not occur becomes +0, or stays where the two would not be in order otherwise.
    """
    used = np.stack([(digits < 0).any(axis=1), (digits > 0).any(axis=1)], axis=1)
    cleared = np.where(used, levels, 0).astype(np.uint16)
    result = np.where(_in_order(cleared)[:, None], cleared, levels)
    bad = ~_in_order(result) | (used & (result == 0)).any(axis=1)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        low, high = _bfloat16_values(levels[row])
        raise CheckpointImportError(
            f"{path}: {name}.ter_minmax, row {row}: {low:g} and {high:g} are not two finite levels in order, other than 0"
        )
    return result


def _in_order(levels: npt.NDArray[np.uint16]) -> npt.NDArray[np.bool_]:
    values = _bfloat16_values(levels)
    fine = np.isfinite(values).all(axis=1) & (levels != 0x8000).all(axis=1)
    in_order: npt.NDArray[np.bool_] = fine & ((values[:, 0] < values[:, 1]) | (levels == 0).all(axis=1))
    return in_order


def _bfloat16_values(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointImportError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointImportError(f"{path}: not readable JSON ({error})") from None
    if not isinstance(config, dict) or config.get("model_type") != "switch_transformers":
        raise CheckpointImportError(f"{path}: not the configuration of a Switch Transformer")
    config.setdefault("num_decoder_layers", config.get("num_layers"))
    for key in (
        "num_experts", "d_model", "d_ff", "vocab_size", "num_layers", "num_decoder_layers",
        "num_sparse_encoder_layers", "num_sparse_decoder_layers",
    ):  # fmt: skip
        value = config.get(key)
        least = 0 if "sparse" in key else 1
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
            raise CheckpointImportError(f"{path}: {key} is {value!r}, not a number of something")
    return config


def _sparse_prefixes(config: Mapping[str, Any], *, most: int) -> list[str]:
    """Prefixes of the experts of the sparse layers, encoder first, by transformers' rule; no more than `most` per stack."""
    prefixes = []
    for stack, layer in (("encoder", 1), ("decoder", 2)):
        blocks = config["num_layers" if stack == "encoder" else "num_decoder_layers"]
        sparse = config[f"num_sparse_{stack}_layers"]
        step = config.get(f"{stack}_sparse_step", blocks // sparse if sparse else blocks)
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise CheckpointImportError(f"{CONFIG_FILE}: {stack}_sparse_step is {step!r}")
        numbers = range(step > 1, blocks, step) if step else ()
        prefixes += [f"{stack}.block.{i}.layer.{layer}.mlp.experts" for i in numbers[:most]]
    return prefixes
