"""Products with compressed experts: routing, choice of kernel, launch checks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Final

import torch

from qmoecodec_gpu import digits, modules, plan, tiles
from qmoecodec_gpu.experts import GpuExperts

#: Up to so many tokens are routed by one block.
_ONE_BLOCK: Final = 512
#: Tokens and experts of a block where more are routed (kernels/route.cu).
_CHUNK: Final = 256


@dataclass(frozen=True, slots=True)
class Route:
    """Work lists on the device: items of 1, 2, 4 and 8 tokens, and large ones (kernels/route.cu).

    n_items : int32[6];  item_expert : int32[5, tokens];  item_tokens : int32[5, 8 * tokens]
    n_tokens : the number of tokens, which bounds the lists
    n_experts : the experts that they were routed to
    largest : tokens per item at most
    least : tokens of a large item at least
    max_large : large items at most
    """

    n_items: torch.Tensor
    item_expert: torch.Tensor
    item_tokens: torch.Tensor
    n_tokens: int
    n_experts: int
    largest: int
    least: int
    max_large: int


def largest_class(experts: GpuExperts) -> int:
    """Return the greatest number of tokens that one pass of the gather or the general kernel over an expert serves."""
    if experts.gather_plan(1) is None:
        return 8
    return max(tokens for tokens in plan.TOKEN_CLASSES if experts.gather_plan(tokens) is not None)


def max_large(n_tokens: int, n_experts: int, largest: int, least: int) -> int:
    """Return how many large items there may be."""
    return 0 if largest < least else min(n_tokens // least, n_tokens // largest + n_experts)


def choose_sizes(*groups: tuple[GpuExperts, torch.Tensor], n_experts: int | None = None) -> tuple[int, int]:
    """Return the sizes of the largest item and of the smallest large one for products with these experts and such tokens.

    groups : those that share a route
    n_experts : to which the tokens go at most; all if None
    """
    experts, x = groups[0]
    small = min(largest_class(experts) for experts, _ in groups)
    least = max(small + 1, 5)
    if len(x) < least or small < 4:
        return small, least
    n_items = max_large(len(x), n_experts or experts.shape[0], plan.DIGITS_TOKENS, least)
    n_row_groups = n_items * min(-(-experts.shape[1] // 64) for experts, _ in groups)
    is_few = n_row_groups < modules.n_multiprocessors(experts.device)  # tiles of fewer rows keep more of the device busy
    may_tile = all(tiles.plan_for(experts, x) is not None for experts, x in groups)
    if not (is_few and may_tile) and all(digits.fits(experts, x) for experts, x in groups):
        return plan.DIGITS_TOKENS, least
    return plan.TILE_TOKENS if may_tile else small, least


def route(expert: torch.Tensor, *, n_experts: int, largest: int, least: int = plan.TOKEN_CLASSES[-1] + 1) -> Route:
    """Group tokens by expert, on the device and without asking it anything.

    expert : int64[tokens]    -1 for a token that is dropped; a number that does not exist makes y NaN
    largest : 1, 2, 4 or 8 tokens, or more for large items
    least : tokens of the smallest large item, if there are any; both from `choose_sizes`

    Takes 180 bytes per token, and of more than 512 tokens for a moment 1/64 byte per token and expert.
    """
    check_expert(expert)
    if largest not in (*plan.TOKEN_CLASSES, plan.TILE_TOKENS, plan.DIGITS_TOKENS):
        raise ValueError(f"items have 1, 2, 4, 8, {plan.TILE_TOKENS} or {plan.DIGITS_TOKENS} tokens at most, not {largest}")
    if not 5 <= least <= plan.TOKEN_CLASSES[-1] + 1 and largest > plan.TOKEN_CLASSES[-1]:
        raise ValueError(f"large items have 5 to {plan.TOKEN_CLASSES[-1] + 1} tokens at least, not {least}")
    if len(expert) >= 1 << 28 or not 0 <= n_experts < 1 << 31:
        raise ValueError(f"{len(expert)} tokens cannot be routed to {n_experts} experts at once")
    if largest <= plan.TOKEN_CLASSES[-1]:
        least = plan.TOKEN_CLASSES[-1] + 1  # there are no large items, and the kernel asks for no `least`
    tokens, device = len(expert), expert.device
    expert = expert.contiguous()
    lists = torch.empty(8 + 45 * tokens, dtype=torch.int32, device=device)
    n_items, item_expert, item_tokens = lists[:6], lists[8 : 8 + 5 * tokens], lists[8 + 5 * tokens :]
    p, i32 = modules.pointer, modules.i32
    sizes = (i32(tokens), i32(n_experts))
    to = (*sizes, i32(largest), i32(least), p(n_items), p(item_expert), p(item_tokens))

    def launch(name: str, grid: int, threads: int, shared_bytes: int, *args: Any) -> None:
        kernel = modules.function(device, "route.cu", name)
        modules.launch(device, kernel, grid, threads, args, shared_bytes=shared_bytes, early=True)

    if tokens <= _ONE_BLOCK:
        launch("route_tokens", 1, max(32, -(-tokens // 32) * 32), 20 * tokens, p(expert), *to)
    else:
        n_chunks = -(-tokens // _CHUNK)
        counts = torch.zeros(n_chunks * n_experts, dtype=torch.int32, device=device)
        rank = torch.empty(tokens, dtype=torch.int32, device=device)
        places = torch.empty(4 * n_experts, dtype=torch.int32, device=device)
        launch("rank_tokens", n_chunks, _CHUNK, 4 * _CHUNK, p(expert), *sizes, p(n_items), p(counts), p(rank))
        launch("make_items", -(-n_experts // _CHUNK), _CHUNK, 0, *to, p(counts), p(places))
        launch("place_tokens", n_chunks, _CHUNK, 0, p(expert), *to, p(counts), p(rank), p(places))
    most = max_large(tokens, n_experts, largest, least)
    return Route(
        n_items, item_expert.view(5, tokens), item_tokens.view(5, 8 * tokens), tokens, n_experts, largest, least, most
    )


def check_expert(expert: torch.Tensor) -> None:
    """Check the experts' numbers of some tokens."""
    if expert.dtype != torch.int64 or expert.ndim != 1 or not expert.is_cuda:
        raise TypeError("expert is a one-dimensional int64 CUDA tensor")


def check_x(experts: GpuExperts, x: torch.Tensor) -> None:
    """Check x[tokens, cols] before a launch."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"x is bfloat16 or float16, not {x.dtype}")
    if x.device != experts.device:
        raise ValueError(f"x is on {x.device}, the experts on {experts.device}")
    if x.ndim != 2 or x.shape[1] != experts.shape[2]:
        raise ValueError(f"x has the shape {tuple(x.shape)}, not [tokens, {experts.shape[2]}]")
    if x.shape[0] and x.stride(1) != 1 and x.shape[1] > 1:
        raise ValueError("x must be contiguous in its last dimension")
    check_no_grad(x)


def check_apart(x: torch.Tensor, y: torch.Tensor, name: str) -> None:
    """Refuse to write y, contiguous, where x[tokens, cols] lies: rows are written while others are computed."""
    if not x.numel() or not y.numel():
        return
    x_end = x.data_ptr() + ((len(x) - 1) * x.stride(0) + x.shape[1]) * x.element_size()
    if x.data_ptr() < y.data_ptr() + y.numel() * y.element_size() and y.data_ptr() < x_end:
        raise ValueError(f"{name} overlaps x in memory")


def check_no_grad(tensor: torch.Tensor) -> None:
    """Refuse what a gradient is wanted of, outside the operators, which refuse to go backward by themselves."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError("products with compressed experts have no gradient: detach the tensor, or use torch.no_grad()")


def run(
    experts: GpuExperts,
    items: Route | torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    relu: bool = False,
    scale: torch.Tensor | None = None,
) -> None:
    """Queue the products of all items: y[token] = expert @ x[token].

    items : from `route`; for one token also its expert's number, int64[1] on the device, which needs no routing
    scale : float32[tokens] or None    factor of each token's y, after relu
    """
    check_x(experts, x)
    if isinstance(items, torch.Tensor):
        check_expert(items)
        if (len(items), items.device) != (1, x.device) or len(x) != 1:
            raise ValueError(f"{len(items)} expert numbers on {items.device} and x {tuple(x.shape)}: several must be routed")
    elif (items.n_tokens, items.n_experts) != (x.shape[0], experts.shape[0]) or items.n_items.device != x.device:
        raise ValueError(f"{items.n_tokens} tokens were routed to {items.n_experts} experts; this is {tuple(x.shape)}, {experts}")
    if isinstance(items, Route) and items.max_large and not _takes(experts, x, items.largest):
        raise ValueError(f"items of {items.largest} tokens need fitting experts, levels of x's type and x aligned, within 64 GiB")
    if y.shape != (x.shape[0], experts.shape[1]) or y.dtype != x.dtype or y.device != x.device or not y.is_contiguous():
        raise ValueError(f"y must be a contiguous {x.dtype} tensor [tokens, {experts.shape[1]}]")
    check_apart(x, y, "y")
    if scale is not None:
        if scale.dtype != torch.float32 or scale.shape != x.shape[:1] or not scale.is_contiguous():
            raise TypeError("scale is a contiguous float32 tensor, one number per token")
        if scale.device != x.device:
            raise ValueError(f"scale is on {scale.device}, x on {x.device}")
        check_no_grad(scale)
    _launch(experts, items, x, y, relu=relu, scale=scale)
    if isinstance(items, Route) and items.max_large:
        large = digits if items.largest == plan.DIGITS_TOKENS else tiles
        large.launch(experts, items, x, y, relu=relu, scale=scale)


def _takes(experts: GpuExperts, x: torch.Tensor, largest: int) -> bool:
    """Whether there is a kernel for large items of up to `largest` tokens."""
    return digits.fits(experts, x) if largest == plan.DIGITS_TOKENS else tiles.plan_for(experts, x) is not None


def _largest_used(n_tokens: int, items: Route) -> int:
    """The largest class that may have items: a class of 2, 4 or 8 takes more than half as many tokens."""
    largest = min(items.largest, items.least - 1)
    return max(tokens for tokens in plan.TOKEN_CLASSES if tokens <= largest and (tokens == 1 or tokens // 2 < n_tokens))


def _lists(items: Route | torch.Tensor | int, number: int, n_experts: int = 0) -> tuple[Any, ...]:
    """The kernels' arguments for class `number` of the work lists, or for one token."""
    p, i32 = modules.pointer, modules.i32
    if isinstance(items, Route):
        lists = (p(items.n_items[number:]), p(items.item_expert[number]), p(items.item_tokens[number]))
        return (*lists, i32(0), 0, i32(n_experts))
    only, at = (items, 0) if isinstance(items, int) else (0, p(items))
    return (0, 0, 0, i32(only), at, i32(n_experts))


def _launch(
    experts: GpuExperts,
    items: Route | torch.Tensor | int,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    relu: bool = False,
    scale: torch.Tensor | None = None,
) -> None:
    """Queue the kernels for the items, or for one token and the expert of that number. Trusts its arguments."""
    n_experts, rows, cols = experts.shape
    n_tokens = x.shape[0]
    if rows == 0 or n_tokens == 0:
        return
    if n_tokens * rows >= 1 << 31:
        raise ValueError(f"{n_tokens} tokens with {rows} rows are too many for one launch; take fewer tokens at a time")
    experts.use()
    p, i32, device = modules.pointer, modules.i32, experts.device
    is_f16 = x.dtype == torch.float16
    largest = _largest_used(n_tokens, items) if isinstance(items, Route) else 1
    lists = _lists(items, 0, n_experts)
    vectors = (p(x), x.stride(0), p(y), y.stride(0), p(scale), i32(int(relu)), i32(rows), i32(cols))
    gather = experts.gather_launch(largest)
    if gather is None:
        for number, tokens in enumerate(plan.TOKEN_CLASSES):
            if tokens > largest:
                break
            macros = {"TOK": tokens, "X_F16": int(is_f16), "LEVEL_KIND": experts.level_kind}
            kernel = modules.function(device, "rows.cu", "matvec_general", macros)
            grid = modules.warp_grid(device, n_tokens * rows)
            lists = _lists(items, number, n_experts)
            arguments = (*experts.rows_arguments(), *lists, *vectors, *experts.layout_arguments())
            modules.launch(device, kernel, grid, modules.THREADS, arguments)
        return
    macros = gather.macros(is_f16=is_f16, level_kind=experts.level_kind) | {"SHARED_BASE": modules.shared_base(device)}
    kernel = modules.function(device, "gather.cu", "matvec_gather", macros)
    warps = n_tokens * -(-rows * gather.plans[0].layout.lanes // 32)
    grid = min(modules.n_multiprocessors(device), warps)
    tables = [p(experts.bank.table(chosen.form)) for chosen in (gather.plans[0], gather.plans[-1])]
    arguments = (
        p(experts.codes),
        p(experts.expert_start),
        p(experts.row_start),
        p(experts.levels),
        p(experts.dictionary_index),
        p(experts.bank.thresholds),
        i32(len(experts.bank.dictionaries)),
        *vectors,
        *tables,
        *lists,
        n_tokens,
        *(modules.u32(v) for four in gather.geometry() for v in four),
    )
    modules.launch(device, kernel, grid, gather.threads, arguments, shared_bytes=gather.shared_bytes, early=True)


def empty_y(experts: GpuExperts, x: torch.Tensor) -> torch.Tensor:
    """Allocate y[tokens, rows]."""
    return torch.empty((x.shape[0], experts.shape[1]), dtype=x.dtype, device=x.device)


def matvec(experts: GpuExperts, x: torch.Tensor, expert: int, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply one expert, known to the host, with one vector: [rows, cols] @ x[cols]."""
    expert = experts.check_number(expert)
    if x.ndim != 1:
        raise ValueError(f"x has the shape {tuple(x.shape)}, not [{experts.shape[2]}]")
    row = x[None]
    check_x(experts, row)
    y = torch.empty(experts.shape[1], dtype=x.dtype, device=x.device) if out is None else out
    if y.shape != experts.shape[1:2] or y.dtype != x.dtype or y.device != x.device or not y.is_contiguous():
        raise ValueError(f"out must be a contiguous {x.dtype} tensor of {experts.shape[1]} elements")
    check_apart(row, y, "out")
    _launch(experts, expert, row, y[None])
    return y


def matmul(
    experts: GpuExperts,
    x: torch.Tensor,
    expert: int,
    *,
    scratch: torch.Tensor | None = None,
    dense_from: int | None = None,
) -> torch.Tensor:
    """Multiply one expert, known to the host, with many vectors: x[tokens, cols] @ expert.T -> [tokens, rows].

    scratch : [rows, cols] of x's dtype    where the expert is decoded to for the dense product; allocated if None
    dense_from : tokens from which that is done, where the levels are numbers of x's type, or near to some; None for
        what measurements say (`plan.choose_dense_from`)
    """
    check_x(experts, x)
    expert = experts.check_number(expert)
    if dense_from is None:
        dense_from = plan.choose_dense_from(*experts.shape[1:])
    if len(x) >= dense_from and experts.fit(x.dtype):
        if scratch is not None:
            check_apart(x, scratch, "scratch")
        return x @ experts.decode(expert, dtype=x.dtype, out=scratch).T
    numbers = torch.full((len(x),), expert, dtype=torch.int64, device=x.device)
    largest, least = choose_sizes((experts, x), n_experts=1)
    items = route(numbers, n_experts=experts.shape[0], largest=largest, least=least)
    if items.max_large:
        items = dataclasses.replace(items, max_large=-(-len(x) // items.largest))
    y = empty_y(experts, x)
    run(experts, items, x, y)
    return y


def grouped_matvec(experts: GpuExperts, x: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    """Multiply each token with its expert: y[t] = experts[expert[t]] @ x[t].

    x : bfloat16 or float16 [tokens, cols], finite
    expert : int64[tokens] on the device    -1 gives 0; a number that does not exist gives NaN
    Returns [tokens, rows] of x's dtype; sums are float32. No host synchronisation; may be captured in a CUDA graph once
    it has run for these experts and this number of tokens.
    """
    check_x(experts, x)
    y = empty_y(experts, x)
    if len(x) == 1:
        items: Route | torch.Tensor = expert
    else:
        largest, least = choose_sizes((experts, x))
        items = route(expert, n_experts=experts.shape[0], largest=largest, least=least)
    run(experts, items, x, y)
    return y


def moe_mlp(
    x: torch.Tensor,
    expert: torch.Tensor,
    wi: GpuExperts,
    wo: GpuExperts,
    *,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run the two matrices of each token's expert: y[t] = scale[t] * wo[e] @ relu(wi[e] @ x[t]), e = expert[t].

    As `grouped_matvec`; the tokens are routed once, a single token not at all.
    scale : float32[tokens]    the router's probability, or None
    """
    if wi.shape[0] != wo.shape[0] or wi.shape[1] != wo.shape[2]:
        raise ValueError(f"wi {wi.shape} and wo {wo.shape} do not fit")
    if wi.device != wo.device:
        raise ValueError(f"wi is on {wi.device}, wo on {wo.device}")
    check_x(wi, x)
    hidden = empty_y(wi, x)
    if len(x) == 1:
        items: Route | torch.Tensor = expert
    else:
        largest, least = choose_sizes((wi, x), (wo, hidden))
        items = route(expert, n_experts=wi.shape[0], largest=largest, least=least)
    run(wi, items, x, hidden, relu=True)
    y = empty_y(wo, x)
    run(wo, items, hidden, y, scale=scale)
    return y
