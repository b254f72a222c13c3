"""Products of large items by way of two-bit digits: kernels/decode_digits.cu and kernels/multiply_digits.cu, for Hopper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from qmoecodec_gpu import modules, plan, tiles

if TYPE_CHECKING:
    from qmoecodec_gpu.experts import GpuExperts
    from qmoecodec_gpu.matvec import Route


@dataclass(frozen=True, slots=True)
class Options:
    """What may be chosen, for measurements.

    groups : row groups of 64 that a block multiplies at a time, 2 to 4
    rows, warps, blocks : of the decoder, per warp, per block and per multiprocessor
    is_guarded : the decoder leaves out a missing second nonzero
    share : warpgroups without rows of their own share the columns of others'
    fork : arrange x on a stream of its own, while the first items are decoded
    at_once : items decoded before they are multiplied; 0 for all
    beside : decode items while the ones before are multiplied, on a stream of its own; a multiprocessor has a block of each
    """

    groups: int = 4
    rows: int = 8
    warps: int = 16
    blocks: int = 1
    is_guarded: bool = True
    share: bool = False
    fork: bool = False
    at_once: int = 0
    beside: bool = False


#: Beside each other: three row groups, so 512 threads of 96 registers, and 256 of 64 that decode, are all that there are.
BESIDE: Final = Options(groups=3, rows=8, warps=8, blocks=2, beside=True)


def plans_for(experts: GpuExperts, options: Options) -> tuple[plan.DecodePlan, plan.MultiplyPlan] | None:
    """Return the two kernels for these experts; None where they do not fit."""
    if experts.layout is None or experts.level_kind == 2 or not modules.is_sm_90(experts.device):
        return None
    most = modules.max_shared_bytes(experts.device)
    decode = plan.plan_decode(
        experts.layout,
        cols=experts.shape[2],
        max_phrase=max(d.max_phrase for d in experts.bank.dictionaries),
        max_nonzeros=max(p.max_nonzeros for p in experts.bank.phrases),
        max_shared_bytes=most,
        rows=options.rows,
        warps=options.warps,
        blocks=options.blocks,
        resident=4 if options.beside else 0,
        is_guarded=options.is_guarded,
    )
    if decode is None:
        return None
    left = most - 1024 - decode.shared_bytes if options.beside else most
    entry = 96 if options.beside else 0
    return decode, plan.plan_multiply(options.groups, max_shared_bytes=left, entry=entry, share=options.share)


def scratch_bytes(experts: GpuExperts, n_items: int) -> int:
    """Bytes of the digits of so many items."""
    _, rows, cols = experts.shape
    return n_items * -(-cols // 64) * -(-rows // 64) * 1024


def launch(
    experts: GpuExperts,
    items: Route,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    scratch: torch.Tensor,
    options: Options,
    relu: bool = False,
    scale: torch.Tensor | None = None,
    is_one_expert: bool = False,
) -> None:
    """Queue the large items, of up to `plan.DIGITS_TOKENS` tokens. Trusts its arguments.

    scratch : uint8[scratch_bytes]    of all items; of twice `at_once` items if that is given; of one if they are of one expert
    is_one_expert : all large items are of one expert, which is decoded once
    Raises ValueError where the kernels do not take these experts.
    """
    found = plans_for(experts, options)
    if found is None or x.dtype != {0: torch.bfloat16, 1: torch.float16}[experts.level_kind]:
        raise ValueError("digits need Hopper, experts of 8-bit codewords and levels of x's type")
    decode, multiply = found
    _, rows, cols = experts.shape
    device, p, i32 = experts.device, modules.pointer, modules.i32
    at_once = items.max_large if is_one_expert else min(options.at_once or items.max_large, items.max_large)
    n_parts = -(-items.max_large // at_once)
    part_bytes = scratch_bytes(experts, 1 if is_one_expert else at_once)
    if scratch.numel() < part_bytes * min(2, n_parts):
        raise ValueError(f"scratch has {scratch.numel()} bytes, not {part_bytes * min(2, n_parts)}")
    n_items, item_expert, slot_token = items.n_items[4:], items.item_expert[4], items.item_tokens[4]
    item_first, item_count = slot_token[6 * items.n_tokens :], slot_token[7 * items.n_tokens :]
    base, is_f16 = {"SHARED_BASE": modules.shared_base(device)}, x.dtype == torch.float16
    decoder = modules.function(device, "decode_digits.cu", "decode_digits", decode.macros() | base)
    multiplier = modules.function(device, "multiply_digits.cu", "multiply_digits", multiply.macros(is_f16=is_f16) | base)
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
    n_multiprocessors = modules.n_multiprocessors(device)
    if options.beside:  # blocks of both fit only if all of the memory that can be shared is
        decoder.preferred_shared_memory_carveout = multiplier.preferred_shared_memory_carveout = 100

    def queue_decode(part: int) -> None:
        count = 1 if is_one_expert else min(at_once, items.max_large - part * at_once)
        modules.launch(
            device,
            decoder,
            min((1 if options.beside and part else decode.blocks) * n_multiprocessors, count * -(-rows // decode.tile)),
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
                p(scratch[part % 2 * part_bytes :]),
                i32(rows),
                i32(cols),
                i32(decode.pitch),
                i32(part * at_once),
                i32(count),
            ),
            shared_bytes=decode.shared_bytes,
        )

    def queue_multiply(part: int, arranged: torch.Tensor) -> None:
        count = min(at_once, items.max_large - part * at_once)
        modules.launch(
            device,
            multiplier,
            min(n_multiprocessors, count * -(-rows // 64)),
            multiply.threads,
            (
                p(scratch[part % 2 * part_bytes :]),
                p(experts.levels),
                p(arranged),
                p(y),
                y.stride(0),
                p(scale),
                i32(int(relu)),
                i32(rows),
                i32(cols),
                p(n_items),
                p(item_expert),
                p(item_first),
                p(item_count),
                p(slot_token),
                p(leader),
                i32(part * at_once),
                i32(count),
                scratch_bytes(experts, 1),
            ),
            shared_bytes=multiply.shared_bytes,
        )

    if not (options.beside or options.fork):
        arranged = tiles.arrange(items, x)
        for part in range(n_parts):
            queue_decode(part)
            queue_multiply(part, arranged)
        return
    main = torch.cuda.current_stream(device)
    other = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    other.wait_stream(main)
    if not options.beside:
        with torch.cuda.stream(other):
            arranged = tiles.arrange(items, x)
            arranged.record_stream(main)
        queue_decode(0)
        main.wait_stream(other)
        for part in range(n_parts):
            if part:
                queue_decode(part)
            queue_multiply(part, arranged)
        return
    multiplied: list[torch.cuda.Event] = []
    decoded: list[torch.cuda.Event] = []
    arranged = tiles.arrange(items, x)
    for part in range(n_parts):
        with torch.cuda.stream(other):
            if part >= 2:
                other.wait_event(multiplied[part - 2])  # that part's digits are no longer needed
            queue_decode(part)
            decoded.append(other.record_event())
        main.wait_event(decoded[part])
        queue_multiply(part, arranged)
        multiplied.append(main.record_event())
    main.wait_stream(other)
