"""Products of large items: the tile kernels (kernels/tile_sm90.cu, kernels/tile.cu)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from qmoecodec_gpu import modules, plan

if TYPE_CHECKING:
    from qmoecodec_gpu.experts import GpuExperts
    from qmoecodec_gpu.matvec import Route

#: Tokens per expert from which tiles are wide (docs/performance-gpu.md).
WIDE_FROM: Final = 24

#: Columns of a block, as x is arranged for kernels/tile_sm90.cu.
_BLOCK_COLUMNS: Final = 64


def plan_for(experts: GpuExperts, x: torch.Tensor, *, max_rows: int = 128, is_wide: bool = False) -> plan.TilePlan | None:
    """Return the tile kernel that takes these experts and such x; None where none does."""
    if x.dtype != {0: torch.bfloat16, 1: torch.float16}.get(experts.level_kind) or not experts.shape[1]:
        return None
    if any(experts.gather_plan(tokens) is None for tokens in plan.TOKEN_CLASSES):  # the rest of an expert's tokens
        return None
    found = experts.tile_plan(max_rows, is_wide=is_wide)
    if found is not None and found.file == "tile.cu" and (x.stride(0) % 8 or x.data_ptr() % 16):
        return None
    return found


def launch(
    experts: GpuExperts, items: Route, x: torch.Tensor, y: torch.Tensor, *, relu: bool, scale: torch.Tensor | None
) -> None:
    """Queue the large items. Trusts its arguments but for what the kernel asks of x.

    Raises ValueError where no tile kernel takes these experts and x.
    """
    _, rows, cols = experts.shape
    device, n_multiprocessors = experts.device, modules.n_multiprocessors(experts.device)
    is_wide = items.n_tokens >= WIDE_FROM * items.n_experts
    max_rows = plan.choose_tile_rows(items.max_large, rows, n_multiprocessors)
    tile = plan_for(experts, x, max_rows=max_rows, is_wide=is_wide)
    if tile is None and max_rows < 64:  # not on 16-byte boundaries, perhaps
        tile = plan_for(experts, x, max_rows=64)
    if tile is None:
        raise ValueError("large items need experts of 8-bit codewords, levels of x's type, and x on 16-byte boundaries")
    p, i32 = modules.pointer, modules.i32
    macros = tile.macros(is_f16=x.dtype == torch.float16)
    is_sm_90 = tile.file == "tile_sm90.cu"
    if is_sm_90:
        macros["SHARED_BASE"] = modules.shared_base(device)
    kernel = modules.function(device, tile.file, "matmul_tile", macros)
    n_items, item_expert, slot_token = items.n_items[4:], items.item_expert[4], items.item_tokens[4]
    item_first = slot_token[6 * items.n_tokens :]
    item_count = slot_token[7 * items.n_tokens :]
    arranged = arrange(items, x) if is_sm_90 else None
    vector = (p(x), x.stride(0)) if arranged is None else (p(arranged),)
    arguments = (
        p(experts.codes),
        p(experts.expert_start),
        p(experts.row_start),
        p(experts.levels),
        p(experts.dictionary_index),
        p(experts.bank.thresholds),
        *vector,
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
    grid = min(tile.blocks * n_multiprocessors, items.max_large * -(-rows // tile.tile))
    modules.launch(device, kernel, grid, tile.threads, arguments, shared_bytes=tile.shared_bytes)


def arrange(items: Route, x: torch.Tensor) -> torch.Tensor:
    """Put x of the large items' tokens into the order of kernels/arrange.cu: uint8[bytes]."""
    blocks = -(-x.shape[1] // _BLOCK_COLUMNS)
    slots = items.n_tokens + 7 * items.max_large
    out = torch.empty(slots * blocks * _BLOCK_COLUMNS * 2, dtype=torch.uint8, device=x.device)
    slot_token = items.item_tokens[4]
    p = modules.pointer
    # A thread takes one block of a token; enough blocks of threads for all multiprocessors, whatever the number of items.
    shares = min(-(-8 * modules.n_multiprocessors(x.device) // items.max_large), -(-plan.TILE_TOKENS * blocks // 256))
    modules.launch(
        x.device,
        modules.function(x.device, "arrange.cu", "arrange_x"),
        (items.max_large, shares),
        256,
        (
            p(x),
            x.stride(0),
            modules.i32(x.shape[1]),
            p(items.n_items[4:]),
            p(slot_token[6 * items.n_tokens :]),
            p(slot_token[7 * items.n_tokens :]),
            p(slot_token),
            p(out),
        ),
    )
    return out
