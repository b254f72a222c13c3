"""Decoding 8-bit codewords to rows or to two-bit digits (kernels/decode_digits.cu), and on Hopper products with such digits for
large items (kernels/multiply_digits.cu)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from qmoecodec_gpu import modules, plan

if TYPE_CHECKING:
    from qmoecodec_gpu.experts import GpuExperts
    from qmoecodec_gpu.matvec import Route

#: Bytes of digits at a time; where experts need more, items are decoded and multiplied in parts. One item is always taken.
SCRATCH_BYTES: Final = 512 << 20


@dataclass(frozen=True, slots=True)
class Options:
    """What measurements may choose; 0 and None for what suits the shape.

    groups : row groups of 64 that a block multiplies at a time, 2 or 3
    slots : stages of the ring
    rows, warps, blocks : of the decoder, per warp, per block and per multiprocessor
    """

    groups: int = 0
    slots: int = 0
    rows: int = 0
    warps: int = 8
    blocks: int = 2


_DEFAULT: Final = Options()


def fits(experts: GpuExperts, x: torch.Tensor) -> bool:
    """Whether `launch` takes these experts and such x."""
    return (
        x.dtype == experts.level_dtype
        and 0 < experts.shape[1] < 1 << 27  # a block of columns takes 16 bytes per row, counted in 32 bits
        and modules.is_sm_90(experts.device)
        and 2 * len(x) * max(x.stride(0), _padded(x.shape[1])) <= 1 << 36  # and x in units of 16 bytes, too
        and experts.decode_plan(8, _DEFAULT.warps, _DEFAULT.blocks) is not None
    )


def _plan_product(experts: GpuExperts, options: Options) -> plan.MultiplyPlan:
    groups = options.groups or plan.choose_groups(experts.shape[1])
    return plan.plan_multiply(groups, max_shared_bytes=modules.max_shared_bytes(experts.device), slots=options.slots)


def _padded(cols: int) -> int:
    return -(-cols // 8) * 8


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """Return x, or a copy, with rows on 16-byte boundaries and of a multiple of 8 columns, the further ones 0."""
    if x.shape[1] % 8 == 0 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    padded = x.new_zeros((len(x), _padded(x.shape[1])))
    padded[:, : x.shape[1]] = x
    return padded


def _launch_decoder(
    experts: GpuExperts,
    form: plan.DecodePlan,
    out: torch.Tensor,
    macros: dict[str, int],
    *,
    listed: tuple[torch.Tensor, torch.Tensor] | None = None,
    first: int = 0,
    most: int,
    zero: torch.Tensor | None = None,
) -> None:
    """Decode `most` experts at most, from place or number `first` on.

    listed : int32 on the device, how many experts, and their numbers; None for all
    zero : int32 on the device, becomes 0
    """
    _, rows, cols = experts.shape
    device, p, i32 = experts.device, modules.pointer, modules.i32
    macros = macros | form.macros() | {"SHARED_BASE": modules.shared_base(device)}
    modules.launch(
        device,
        modules.function(device, "decode_digits.cu", "decode_digits", macros),
        min(form.blocks * modules.n_multiprocessors(device), most * -(-rows // form.tile)),
        32 * form.warps,
        (
            p(experts.codes),
            p(experts.expert_start),
            p(experts.row_start),
            p(experts.dictionary_index),
            p(experts.bank.thresholds),
            p(experts.bank.table(form.form)),
            p(experts.levels),
            *map(p, listed or (None, None)),
            i32(first),
            i32(most),
            p(out),
            i32(rows),
            i32(cols),
            i32(form.pitch),
            i32(len(experts.bank.dictionaries)),
            p(zero),
            i32(0 if zero is None else len(zero)),
        ),
        shared_bytes=form.shared_bytes,
        early=True,
    )


def _plan_decoder(experts: GpuExperts, n_decoded: int, options: Options = _DEFAULT) -> plan.DecodePlan | None:
    """Plan for so many experts; None where the kernel does not fit their codewords, rows or levels."""
    least = 32 // experts.layout.lanes if experts.layout is not None else 1
    rows = options.rows or plan.choose_decode_rows(n_decoded * experts.shape[1], least, modules.n_multiprocessors(experts.device))
    return experts.decode_plan(rows, options.warps, options.blocks)


def decode(experts: GpuExperts, first: int, n: int, out: torch.Tensor) -> bool:
    """Decode experts, where their codewords, rows and levels suit this kernel; return whether they do.

    out : int8 for digits, bfloat16 or float16 for levels, contiguous, for n experts from `first` on
    """
    form = _plan_decoder(experts, n)
    if form is None:
        return False
    macros = {"OUT_BYTES": out.itemsize, "X_F16": int(out.dtype == torch.float16), "LEVEL_KIND": experts.level_kind}
    _launch_decoder(experts, form, out, macros, first=first, most=n)
    return True


def launch(
    experts: GpuExperts,
    items: Route,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    relu: bool = False,
    scale: torch.Tensor | None = None,
    options: Options = _DEFAULT,
) -> None:
    """Queue the large items, of up to `plan.DIGITS_TOKENS` tokens. Trusts its arguments, of which `fits` says whether they do.

    May be captured in a CUDA graph once it has run for these experts and this number of tokens.
    """
    n_experts, rows, cols = experts.shape
    if not items.max_large:
        return
    device, p, i32 = experts.device, modules.pointer, modules.i32
    expert_bytes = -(-cols // 64) * -(-rows // 64) * 1024
    n_decoded = min(n_experts, items.max_large)
    at_once = items.max_large
    if n_decoded * expert_bytes > SCRATCH_BYTES:
        n_decoded = at_once = min(at_once, max(1, SCRATCH_BYTES // expert_bytes))
    # How many there are is not known here: there may be so many if each has the least number of tokens. A quarter is the guess.
    decoder = _plan_decoder(experts, min(n_decoded, -(-items.max_large // 4)), options)
    if decoder is None:
        raise ValueError("digits need experts of 8-bit codewords whose rows fit into shared memory")
    multiply = _plan_product(experts, options)
    x = _aligned(x)
    scratch = torch.empty(n_decoded * expert_bytes, dtype=torch.uint8, device=device)
    n_items, item_expert, slot_token = items.n_items[4:], items.item_expert[4], items.item_tokens[4]
    item_first, item_count = slot_token[6 * items.n_tokens :], slot_token[7 * items.n_tokens :]
    # Chunks that several blocks share: two parts' sums for each block, and how many have left theirs.
    n_blocks = modules.n_multiprocessors(device)
    sums = torch.empty((2 * n_blocks, multiply.groups * 64 * plan.DIGITS_TOKENS), dtype=torch.float32, device=device)
    arrived = torch.empty(n_blocks * multiply.groups, dtype=torch.int32, device=device)
    base = {"SHARED_BASE": modules.shared_base(device)}
    macros = multiply.macros(is_f16=x.dtype == torch.float16) | base
    n_parts = -(-items.max_large // at_once)
    # Where an expert may have several items, the experts of each part are listed, and each is decoded once.
    slot = None
    if items.n_tokens > items.largest and at_once > 1:
        lists = torch.empty(2 * items.max_large + n_parts * (1 + n_experts), dtype=torch.int32, device=device)
        listed, slot, n_listed = lists, lists[items.max_large :], lists[2 * items.max_large :]
        modules.launch(
            device,
            modules.function(device, "decode_digits.cu", "list_experts", decoder.macros() | base),
            n_parts,
            512,
            (p(n_items), p(item_expert), i32(at_once), i32(n_experts), p(n_listed), p(listed), p(slot), p(n_listed[n_parts:])),
            early=True,
        )
    for part in range(n_parts):
        first = part * at_once
        count = min(at_once, items.max_large - first)
        n_here = min(count, n_decoded)
        numbers, begin = ((n_items, item_expert), first) if slot is None else ((n_listed[part:], listed[first:]), 0)
        _launch_decoder(experts, decoder, scratch, {"OUT_BYTES": 0}, listed=numbers, first=begin, most=n_here, zero=arrived)
        modules.launch(
            device,
            modules.function(device, "multiply_digits.cu", "multiply_digits", macros),
            n_blocks,
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
                p(slot),
                i32(first),
                i32(count),
                expert_bytes,
                p(sums),
                p(arrived),
            ),
            shared_bytes=multiply.shared_bytes,
            early=True,
        )
