"""The torch operators `qmoecodec::grouped_matvec` and `qmoecodec::moe_mlp`, with fake implementations.

An operator takes experts by their handle, an integer, since its arguments are tensors and numbers; the functions of this
module take the experts themselves and keep them alive.
"""

from __future__ import annotations

import torch

from qmoecodec_gpu import matvec
from qmoecodec_gpu.experts import GpuExperts, find


@torch.library.custom_op("qmoecodec::grouped_matvec", mutates_args=(), device_types="cuda")
def _grouped_matvec(x: torch.Tensor, expert: torch.Tensor, handle: int) -> torch.Tensor:
    return matvec.grouped_matvec(find(handle), x, expert)


@_grouped_matvec.register_fake
def _(x: torch.Tensor, expert: torch.Tensor, handle: int) -> torch.Tensor:
    return x.new_empty((x.shape[0], find(handle).shape[1]))


@torch.library.custom_op("qmoecodec::moe_mlp", mutates_args=(), device_types="cuda")
def _moe_mlp(
    x: torch.Tensor, expert: torch.Tensor, scale: torch.Tensor | None, wi_handle: int, wo_handle: int
) -> torch.Tensor:
    return matvec.moe_mlp(x, expert, find(wi_handle), find(wo_handle), scale=scale)


@_moe_mlp.register_fake
def _(
    x: torch.Tensor, expert: torch.Tensor, scale: torch.Tensor | None, wi_handle: int, wo_handle: int
) -> torch.Tensor:
    return x.new_empty((x.shape[0], find(wo_handle).shape[1]))


def grouped_matvec(x: torch.Tensor, expert: torch.Tensor, experts: GpuExperts) -> torch.Tensor:
    """Multiply each token with its expert (`matvec.grouped_matvec`) as a torch operator."""
    result: torch.Tensor = torch.ops.qmoecodec.grouped_matvec(x, expert, experts.handle)
    return result


def moe_mlp(
    x: torch.Tensor, expert: torch.Tensor, wi: GpuExperts, wo: GpuExperts, *, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Run the two matrices of each token's expert (`matvec.moe_mlp`) as a torch operator."""
    result: torch.Tensor = torch.ops.qmoecodec.moe_mlp(x, expert, scale, wi.handle, wo.handle)
    return result
