"""The solver's inner loop on a CUDA device: one launch for a block of columns instead of ten for each column.

Importing needs CuPy, which compiles the kernel on first use.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

import cupy
import torch

from qmoecodec_gpu import modules

Tensor = torch.Tensor

# As in solve_block.cu.
THREADS = 128
SHARED_BYTES = 4 * 32 * 32


def solve_block(
    w: Tensor, upper: Tensor, lo: Tensor, hi: Tensor, low_edges: Tensor, high_edges: Tensor, *, margin: Tensor
) -> Tensor:
    """Quantize a block of columns, float32[experts, columns, rows]; fills ``margin``.

    Takes and returns what ``gptq._solve_block`` does, bit for bit. Raises ValueError when
    the rows of ``margin`` are not adjacent in memory, TypeError for other types.
    """
    if any(x.dtype != torch.float32 for x in (w, upper, lo, hi, low_edges, high_edges, margin)):
        raise TypeError("the solver's kernel takes float32 alone")
    experts, columns, rows = w.shape
    w, low_edges, high_edges = _rows_adjacent(w), _rows_adjacent(low_edges), _rows_adjacent(high_edges)
    if rows > 1 and margin.stride(2) != 1:
        raise ValueError("the rows of a margin must be adjacent")
    lo, hi = lo.contiguous(), hi.contiguous()
    errors = torch.empty((experts, columns, rows), dtype=w.dtype, device=w.device)
    arguments = (
        *_array(w),
        modules.pointer(upper), *upper.stride(),
        modules.pointer(lo),
        modules.pointer(hi),
        *_array(low_edges),
        *_array(high_edges),
        *_array(margin),
        modules.pointer(errors),
        modules.i32(columns),
        modules.i32(rows),
    )  # fmt: skip
    grid = (-(-rows // THREADS), experts)
    modules.launch(w.device, _kernel(w.device.index), grid, THREADS, arguments, shared_bytes=SHARED_BYTES)
    return errors


def _rows_adjacent(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _array(x: Tensor) -> tuple[int, int, int]:
    return modules.pointer(x), x.stride(0), x.stride(1)


@cache
def _kernel(device: int) -> Any:
    code = resources.files("qmoe_gptq").joinpath("solve_block.cu").read_text(encoding="utf-8")
    with cupy.cuda.Device(device):
        return cupy.RawModule(code=code, options=("-std=c++17", "--fmad=false"), backend="nvrtc").get_function("solve_block")
