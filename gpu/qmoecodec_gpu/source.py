"""What `GpuExperts.load` accepts: a group of a file or an `Encoded`, as host arrays. No device is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from qmoecodec.errors import FormatError
from qmoecodec.types import MAX_DIM, Dictionary, Encoded

#: dtypes of levels, in the order of the number that kernels get.
LEVEL_DTYPES: Final = ("BF16", "F16", "F32", "F64")
_ITEMSIZE: Final = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}


class Stack(Protocol):
    """The attributes of `qmoecodec.Encoded`; a container's group has them too."""

    @property
    def shape(self) -> tuple[int, int, int]: ...
    @property
    def codes(self) -> npt.NDArray[np.uint8]: ...
    @property
    def code_offsets(self) -> npt.NDArray[np.uint64]: ...
    @property
    def row_lengths(self) -> npt.NDArray[np.uint32]: ...
    @property
    def dictionary_index(self) -> npt.NDArray[np.uint8]: ...
    @property
    def dictionaries(self) -> tuple[Dictionary, ...]: ...


@dataclass(frozen=True, slots=True)
class RawLevels:
    """Levels as bytes.

    data : uint8[experts, rows, 2 * itemsize]
    dtype : one of `LEVEL_DTYPES`
    """

    data: npt.NDArray[np.uint8]
    dtype: str


def raw_levels(levels: Any, shape: tuple[int, int, int], dtype: str | None) -> RawLevels:
    """Take levels of any array type: numpy (uint16 with `dtype` for bfloat16), ml_dtypes, or a torch tensor.

    levels : [experts, rows, 2], or [rows, 2] for one expert
    Raises FormatError: role_shape, role_dtype; TypeError for what is no array.
    """
    if not isinstance(levels, np.ndarray):
        if not hasattr(levels, "detach"):
            raise TypeError(f"levels are a NumPy array or a torch tensor, not a {type(levels).__name__}")
        name = str(levels.dtype).removeprefix("torch.")
        levels = levels.detach().cpu().contiguous()
        if name == "bfloat16":
            import torch

            levels = levels.view(torch.int16)
        levels = levels.numpy()
    else:
        name = levels.dtype.name
        if not levels.dtype.isnative:
            levels = levels.astype(levels.dtype.newbyteorder("="))
    names = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
    found = "BF16" if (name, dtype) == ("uint16", "BF16") else names.get(name)  # no other bits are taken for numbers
    if found not in LEVEL_DTYPES or (dtype is not None and found != dtype):
        raise FormatError("role_dtype", f"levels are {name}, not {dtype or LEVEL_DTYPES}")
    experts, rows, _ = shape
    if levels.dtype.itemsize != _ITEMSIZE[found]:
        raise FormatError("role_dtype", f"levels of {levels.dtype.itemsize} bytes are not {found}")
    if levels.shape != (experts, rows, 2) and not (experts == 1 and levels.shape == (rows, 2)):
        raise FormatError("role_shape", f"levels have the shape {levels.shape}")
    data = np.ascontiguousarray(levels).reshape(experts, rows, 2).view(np.uint8)
    return RawLevels(data, found)


def check_stack(stack: Stack) -> None:
    """Check everything about a stack that can be seen without its codewords (spec §6.2).

    Raises FormatError: role_shape, role_dtype, shape_overflow, code_offsets, dictionary_index.
    """
    experts, rows, cols = stack.shape
    if min(stack.shape) < 0 or max(stack.shape) > MAX_DIM or experts * rows * cols >= 1 << 62:
        raise FormatError("shape_overflow", f"shape {stack.shape}")
    for name, array, kind, shape in (
        ("codes", stack.codes, "u1", None),
        ("code_offsets", stack.code_offsets, "u8", (experts + 1,)),
        ("row_lengths", stack.row_lengths, "u4", (experts, rows)),
        ("dictionary_index", stack.dictionary_index, "u1", (experts,)),
    ):
        if array.dtype.str[1:] != kind:
            raise FormatError("role_dtype", f"{name} is {array.dtype}")
        if array.ndim != 1 if shape is None else array.shape != shape:
            raise FormatError("role_shape", f"{name} has the shape {array.shape}")
    offsets = stack.code_offsets
    if int(offsets[0]) != 0 or bool((offsets[1:] < offsets[:-1]).any()) or int(offsets[-1]) != stack.codes.size:
        raise FormatError("code_offsets")
    bad = np.flatnonzero(stack.dictionary_index >= len(stack.dictionaries))
    if len(bad):
        raise FormatError("dictionary_index", expert=int(bad[0]))
    if len({stack.dictionaries[i].code_bits for i in np.unique(stack.dictionary_index)}) > 1:
        raise FormatError("dictionary_index", "the experts' dictionaries differ in code bits")


def first_experts(stack: Stack, n: int) -> Encoded:
    """Return the first n experts of a stack whose offsets are right."""
    return Encoded(
        shape=(n, *stack.shape[1:]),
        codes=stack.codes[: int(stack.code_offsets[n])],
        code_offsets=stack.code_offsets[: n + 1],
        row_lengths=stack.row_lengths[:n],
        dictionary_index=stack.dictionary_index[:n],
        dictionaries=tuple(stack.dictionaries),
    )
