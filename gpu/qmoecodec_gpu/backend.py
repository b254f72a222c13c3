"""The entry point `qmoecodec.backends: cuda`."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

from qmoecodec.errors import MissingExtraError

if TYPE_CHECKING:
    from qmoecodec_gpu.experts import GpuExperts


@dataclass(frozen=True, slots=True)
class Backend:
    """What the CUDA backend offers.

    name : "cuda"
    experts : the class `GpuExperts`, whose `load` takes a group
    ops : the module with the functions `grouped_matvec` and `moe_mlp` and the torch operators of the same names
    encoding : the module with `encode`
    """

    name: str
    experts: type[GpuExperts]
    ops: ModuleType
    encoding: ModuleType


def load() -> Backend:
    """Load CuPy and torch and return the backend.

    Raises MissingExtraError where one is not installed; RuntimeError where there is no CUDA device.
    """
    for module, extra in (("torch", "torch"), ("cupy", "cuda")):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise MissingExtraError(f"the CUDA backend needs {module}: pip install 'qmoecodec[{extra}]'") from error
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("the CUDA backend needs a CUDA device")
    from qmoecodec_gpu import encoding, ops
    from qmoecodec_gpu.experts import GpuExperts

    return Backend("cuda", GpuExperts, ops, encoding)
