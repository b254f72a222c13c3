"""Products of large items by the tile kernel (kernels/tile.cu), on any architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qmoecodec_gpu import modules, plan

if TYPE_CHECKING:
    from qmoecodec_gpu.experts import GpuExperts
    from qmoecodec_gpu.matvec import Route


def plan_for(experts: GpuExperts, x: torch.Tensor, *, max_rows: int = 128) -> plan.TilePlan | None:
    """Return the plan of the tile kernel for these experts and such x; None where it does not take them."""
    if x.dtype != experts.level_dtype or not experts.shape[1]:
        return None
    return None if x.stride(0) % 8 or x.data_ptr() % 16 else experts.tile_plan(max_rows)


def launch(
    experts: GpuExperts, items: Route, x: torch.Tensor, y: torch.Tensor, *, relu: bool, scale: torch.Tensor | None
) -> None:
    """Queue the large items. Trusts its arguments but for what the kernel asks of x.

    Raises ValueError where the tile kernel does not take these experts and x.
    """
    _, rows, cols = experts.shape
    device, n_multiprocessors = experts.device, modules.n_multiprocessors(experts.device)
    tile = plan_for(experts, x, max_rows=plan.choose_tile_rows(items.max_large, rows, n_multiprocessors))
    if tile is None:
        raise ValueError("large items need experts of 8-bit codewords, levels of x's type, and x on 16-byte boundaries")
    p, i32 = modules.pointer, modules.i32
    kernel = modules.function(device, "tile.cu", "matmul_tile", tile.macros(is_f16=x.dtype == torch.float16))
    n_items, item_expert, slot_token = items.n_items[4:], items.item_expert[4], items.item_tokens[4]
    item_first = slot_token[6 * items.n_tokens :]
    item_count = slot_token[7 * items.n_tokens :]
    arguments = (
        p(experts.codes),
        p(experts.expert_start),
        p(experts.row_start),
        p(experts.levels),
        p(experts.dictionary_index),
        p(experts.bank.thresholds),
        p(x),
        x.stride(0),
        p(y),
        y.stride(0),
        p(scale),
        i32(int(relu)),
        i32(rows),
        i32(cols),
        p(experts.bank.table(tile.form)),
        p(n_items),
        p(item_expert),
        p(item_first),
        p(item_count),
        p(slot_token),
        i32(tile.pitch),
    )
    grid = min(n_multiprocessors, items.max_large * -(-rows // tile.tile))
    modules.launch(device, kernel, grid, plan.TILE_THREADS, arguments, shared_bytes=tile.shared_bytes)
