"""Products of large items by way of two-bit digits: kernels/decode_digits.cu and kernels/multiply_digits.cu, for Hopper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from qmoecodec_gpu import modules, plan

if TYPE_CHECKING:
    from qmoecodec_gpu.experts import GpuExperts
    from qmoecodec_gpu.matvec import Route

#: Bytes of digits at a time; beyond, items are decoded and multiplied in parts. One item is always taken.
SCRATCH_BYTES: Final = 256 << 20


@dataclass(frozen=True, slots=True)
class Options:
    """What measurements may choose; 0 and None for what suits the shape.

    groups : row groups of 64 that a block multiplies at a time, 2 to 4
    share : warpgroups share the columns of chunks of one group; up to 3 groups
    slots, depth : stages of the ring, and of x under way
    rows, warps, blocks : of the decoder, per warp, per block and per multiprocessor
    swizzled : x lies in shared memory so that nothing meets in a bank
    readers_fence : those who multiply see to it that they see x
    """

    groups: int = 0
    share: bool | None = None
    slots: int = 0
    depth: int = 4
    rows: int = 0
    warps: int = 8
    blocks: int = 2
    swizzled: bool = True
    readers_fence: bool = False


_DEFAULT: Final = Options()


def fits(experts: GpuExperts, x: torch.Tensor) -> bool:
    """Whether `launch` takes these experts and such x."""
    return (
        x.dtype == {0: torch.bfloat16, 1: torch.float16}.get(experts.level_kind)
        and bool(experts.shape[1])
        and modules.is_sm_90(experts.device)
        and _plan_decode(experts, 8, _DEFAULT) is not None
    )


def _plan_decode(experts: GpuExperts, rows: int, options: Options) -> plan.DecodePlan | None:
    if experts.layout is None:
        return None
    return plan.plan_decode(
        experts.layout,
        cols=experts.shape[2],
        max_phrase=max(d.max_phrase for d in experts.bank.dictionaries),
        max_nonzeros=max(p.max_nonzeros for p in experts.bank.phrases),
        max_shared_bytes=modules.max_shared_bytes(experts.device),
        rows=options.rows or rows,
        warps=options.warps,
        blocks=options.blocks,
    )


def _plans(experts: GpuExperts, n_decoded: int, n_items: int, options: Options) -> tuple[plan.DecodePlan, plan.MultiplyPlan]:
    """Plan for so many items at most."""
    _, rows, _ = experts.shape
    n_multiprocessors = modules.n_multiprocessors(experts.device)
    least = 32 // experts.layout.lanes if experts.layout is not None else 1
    decode = _plan_decode(experts, plan.choose_decode_rows(n_decoded * rows, least, n_multiprocessors), options)
    if decode is None:
        raise ValueError("digits need experts of 8-bit codewords whose rows fit into shared memory")
    groups = options.groups or plan.choose_groups(rows)
    share = options.share
    if share is None:
        share = groups < 4 and n_items * -(-rows // 64) < 4 * groups * n_multiprocessors
    multiply = plan.plan_multiply(
        groups,
        max_shared_bytes=modules.max_shared_bytes(experts.device),
        share=share,
        slots=options.slots,
        depth=options.depth,
    )
    return decode, multiply


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """Return x, or a copy, with rows on 16-byte boundaries and of a multiple of 8 columns, the further ones 0."""
    if x.shape[1] % 8 == 0 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    padded = x.new_zeros((len(x), -(-x.shape[1] // 8) * 8))
    padded[:, : x.shape[1]] = x
    return padded


def launch(
    experts: GpuExperts,
    items: Route,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    relu: bool = False,
    scale: torch.Tensor | None = None,
    is_one_expert: bool = False,
    options: Options = _DEFAULT,
) -> None:
    """Queue the large items, of up to `plan.DIGITS_TOKENS` tokens. Trusts its arguments, of which `fits` says whether they do.

    is_one_expert : all large items are of one expert, which is decoded once
    May be captured in a CUDA graph once it has run for these experts and this number of tokens.
    """
    _, rows, cols = experts.shape
    if not items.max_large:
        return
    device, p, i32 = experts.device, modules.pointer, modules.i32
    item_bytes = -(-cols // 64) * -(-rows // 64) * 1024
    at_once = items.max_large if is_one_expert else min(items.max_large, max(1, SCRATCH_BYTES // item_bytes))
    n_decoded = 1 if is_one_expert else at_once
    decode, multiply = _plans(experts, n_decoded, at_once, options)
    x = _aligned(x)
    scratch = torch.empty(n_decoded * item_bytes, dtype=torch.uint8, device=device)
    n_items, item_expert, slot_token = items.n_items[4:], items.item_expert[4], items.item_tokens[4]
    item_first, item_count = slot_token[6 * items.n_tokens :], slot_token[7 * items.n_tokens :]
    n_multiprocessors = modules.n_multiprocessors(device)
    base = {"SHARED_BASE": modules.shared_base(device)}
    decoder = modules.function(device, "decode_digits.cu", "decode_digits", decode.macros() | base)
    macros = multiply.macros(is_f16=x.dtype == torch.float16) | base
    macros |= {"SWIZZLED": int(options.swizzled), "READERS_FENCE": int(options.readers_fence)}
    multiplier = modules.function(device, "multiply_digits.cu", "multiply_digits", macros)
    leader = None
    if not is_one_expert:
        leader = torch.empty(items.max_large, dtype=torch.int32, device=device)
        modules.launch(
            device,
            modules.function(device, "decode_digits.cu", "find_leaders", decode.macros() | base),
            -(-items.max_large // 8),
            256,
            (p(n_items), p(item_expert), i32(at_once), p(leader)),
        )
    for first in range(0, items.max_large, at_once):
        count = min(at_once, items.max_large - first)
        modules.launch(
            device,
            decoder,
            min(decode.blocks * n_multiprocessors, min(count, n_decoded) * -(-rows // decode.tile)),
            32 * decode.warps,
            (
                p(experts.codes),
                p(experts.expert_start),
                p(experts.row_start),
                p(experts.dictionary_index),
                p(experts.bank.thresholds),
                p(experts.bank.table(decode.form)),
                p(n_items),
                p(item_expert),
                p(leader),
                p(scratch),
                i32(rows),
                i32(cols),
                i32(decode.pitch),
                i32(first),
                i32(min(count, n_decoded)),
            ),
            shared_bytes=decode.shared_bytes,
        )
        modules.launch(
            device,
            multiplier,
            min(n_multiprocessors, count * -(-rows // 64)),
            multiply.threads,
            (
                p(scratch),
                p(experts.levels),
                p(x),
                2 * x.stride(0),
                p(y),
                y.stride(0),
                p(scale),
                i32(int(relu)),
                i32(rows),
                i32(x.shape[1]),
                p(n_items),
                p(item_expert),
                p(item_first),
                p(item_count),
                p(slot_token),
                p(leader),
                i32(first),
                i32(count),
                item_bytes,
            ),
            shared_bytes=multiply.shared_bytes,
        )
