# ruff: noqa: N803 (what a kernel is compiled with is in capitals)
"""The dense parts of a decoder step for one token, in Triton: few launches, each begun while the one before it ends.

A matrix product of one vector is bound by reading the matrix. A kernel therefore asks for its part of the matrix first and
only then waits for the kernel before it (griddepcontrol.wait), whose output is the vector. What a kernel reads before it
waits does not change during a step: weights, position, keys and values of the encoder and of earlier tokens. A step must
begin with an ordinary launch, which starts when the step before has ended. Needs compute capability 9.0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

EPS = 1e-6
ROWS_PER_PROGRAM = 8


@triton.jit
def _load_x(x, more, at, HAS_MORE: tl.constexpr):
    # .cg: read once, so it need not stay in the first-level cache.
    v = tl.load(x + at, cache_modifier=".cg").to(tl.float32)
    if HAS_MORE:
        v += tl.load(more + at, cache_modifier=".cg").to(tl.float32)
    return v


@triton.jit
def _matvec(
    matrix, x, more, norm, plus, plus_more, scale, seed, y,
    EPSILON: tl.constexpr, COLS: tl.constexpr, CHUNKS: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr,
    HAS_MORE: tl.constexpr, HAS_NORM: tl.constexpr, PLUS: tl.constexpr, HAS_SCALE: tl.constexpr, RELU: tl.constexpr,
    NOISE: tl.constexpr,
):  # fmt: skip
    gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, 2048)
    start = matrix + row[:, None] * COLS
    w0 = tl.load(start + c[None, :])
    if CHUNKS > 1:
        w1 = tl.load(start + 2048 + c[None, :])
    if CHUNKS > 2:
        w2 = tl.load(start + 4096 + c[None, :])
    if REST > 0:
        r = tl.arange(0, REST)
        w_rest = tl.load(start + CHUNKS * 2048 + r[None, :])
    if HAS_NORM:
        g0 = tl.load(norm + c).to(tl.float32)
        if REST > 0:
            g_rest = tl.load(norm + 2048 + r).to(tl.float32)
    gdc_wait()
    # All loads before the first sum.
    v = _load_x(x, more, c, HAS_MORE)
    if REST > 0:
        v_rest = _load_x(x, more, CHUNKS * 2048 + r, HAS_MORE)
    if HAS_SCALE:
        factor = tl.load(scale, cache_modifier=".cg")
    if PLUS > 0:
        add = tl.load(plus + row, cache_modifier=".cg").to(tl.float32)
    if PLUS > 1:
        add += tl.load(plus_more + row, cache_modifier=".cg").to(tl.float32)
    if HAS_NORM:
        square = tl.sum(v * v, 0)
        v *= g0
    product = w0.to(tl.float32) * v[None, :]
    if CHUNKS > 1:
        product += w1.to(tl.float32) * _load_x(x, more, 2048 + c, HAS_MORE)[None, :]
    if CHUNKS > 2:
        product += w2.to(tl.float32) * _load_x(x, more, 4096 + c, HAS_MORE)[None, :]
    total = tl.sum(product, 1)
    if REST > 0:
        if HAS_NORM:
            square += tl.sum(v_rest * v_rest, 0)
            v_rest *= g_rest
        total += tl.sum(w_rest.to(tl.float32) * v_rest[None, :], 1)
    if HAS_NORM:
        total *= tl.rsqrt(square / COLS + EPSILON)
    if RELU:
        total = tl.maximum(total, 0.0)
    if HAS_SCALE:
        total *= factor
    if PLUS > 0:
        total += add
    if NOISE:
        total -= tl.log(-tl.log(tl.maximum(tl.rand(tl.load(seed), row), 1e-9)))
    tl.store(y + row, total.to(y.dtype.element_ty))


def matvec(
    matrix: torch.Tensor,
    x: torch.Tensor,
    *,
    more: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    plus: tuple[torch.Tensor, ...] = (),
    scale: torch.Tensor | None = None,
    relu: bool = False,
    seed: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """matrix @ rms_norm(x + more), then relu, times scale, plus the sum of `plus`; vectors of one token, [1, n].

    seed : int64[1]    with it Gumbel noise is added, so that the largest y is a sample
    """
    n_rows, cols = matrix.shape
    chunks, rest = divmod(cols, 2048)
    if n_rows % ROWS_PER_PROGRAM or not 1 <= chunks <= 3 or rest & (rest - 1) or (norm is not None and chunks > 1):
        raise ValueError(f"no kernel for a matrix of {n_rows} x {cols}")
    y = torch.empty((1, n_rows), dtype=dtype, device=matrix.device)
    first, second = (*plus, None, None)[:2]
    _matvec[(n_rows // ROWS_PER_PROGRAM,)](
        matrix, x, more, norm, first, second, scale, seed, y,
        EPS, cols, chunks, rest, ROWS_PER_PROGRAM, more is not None, norm is not None, len(plus), scale is not None, relu,
        seed is not None,
        num_warps=8 if chunks > 1 else 4, launch_pdl=True,
    )  # fmt: skip
    return y


@triton.jit
def _attend(
    qkv, keys, values, position, out,
    INNER: tl.constexpr, LENGTH: tl.constexpr, D: tl.constexpr, SELF: tl.constexpr,
):  # fmt: skip
    gdc_launch_dependents()
    head = tl.program_id(0)
    d, t = tl.arange(0, D), tl.arange(0, LENGTH)
    at = head * LENGTH * D + t[:, None] * D + d[None, :]
    mine = qkv + head * D + d
    k, v = tl.load(keys + at), tl.load(values + at)
    if SELF:
        now = tl.load(position)
    gdc_wait()
    q = tl.load(mine, cache_modifier=".cg").to(tl.float32)
    if SELF:
        new_k = tl.load(mine + INNER, cache_modifier=".cg")
        new_v = tl.load(mine + 2 * INNER, cache_modifier=".cg")
        is_now = (t == now)[:, None]
        k, v = tl.where(is_now, new_k[None, :], k), tl.where(is_now, new_v[None, :], v)
        tl.store(keys + head * LENGTH * D + now * D + d, new_k)
        tl.store(values + head * LENGTH * D + now * D + d, new_v)
    score = tl.sum(q[None, :] * k.to(tl.float32), 1) * (D**-0.5)
    if SELF:
        score = tl.where(t <= now, score, float("-inf"))
    weight = tl.exp(score - tl.max(score, 0))
    a = tl.sum(weight[:, None] * v.to(tl.float32), 0) / tl.sum(weight, 0)
    tl.store(out + head * D + d, a.to(tl.bfloat16))


def attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor | None = None) -> torch.Tensor:
    """Attention of one token to keys and values [1, heads, length, d_head].

    q : [1, heads * d_head]    with `position`: followed by the token's own key and value, which are put there first
    """
    _, heads, length, d_head = keys.shape
    out = torch.empty((1, heads * d_head), dtype=q.dtype, device=q.device)
    _attend[(heads,)](
        q, keys, values, position, out, heads * d_head, length, d_head, position is not None,
        num_warps=4, launch_pdl=True,
    )  # fmt: skip
    return out


@triton.jit
def _choose(
    logits, x, norm, expert, probability, h,
    EPSILON: tl.constexpr, N: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    gdc_launch_dependents()
    c = tl.arange(0, BLOCK)
    g = tl.load(norm + c, mask=c < COLS, other=0.0).to(tl.float32)
    gdc_wait()
    e = tl.arange(0, N)
    logit = tl.load(logits + e, cache_modifier=".cg")
    v = tl.load(x + c, mask=c < COLS, other=0.0, cache_modifier=".cg").to(tl.float32)
    best, which = tl.max(logit, 0, return_indices=True)
    tl.store(expert, which.to(tl.int64))
    tl.store(probability, 1 / tl.sum(tl.exp(logit - best), 0))
    v *= tl.rsqrt(tl.sum(v * v, 0) / COLS + EPSILON) * g
    tl.store(h + c, v.to(tl.bfloat16), mask=c < COLS)


def choose(logits: torch.Tensor, x: torch.Tensor, norm: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best expert int64[1], its probability float32[1], and rms_norm(x) for it."""
    expert = torch.empty(1, dtype=torch.int64, device=x.device)
    probability = torch.empty(1, dtype=torch.float32, device=x.device)
    h = torch.empty_like(x)
    cols = x.shape[-1]
    _choose[(1,)](
        logits, x, norm, expert, probability, h, EPS, logits.shape[-1], cols, triton.next_power_of_2(cols),
        num_warps=8, launch_pdl=True,
    )  # fmt: skip
    return expert, probability, h


@triton.jit
def _pick(
    scores, token, position, seed,
    N: tl.constexpr, LENGTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    gdc_wait()
    i = tl.arange(0, BLOCK)
    best = tl.load(scores + i, cache_modifier=".cg")
    which = i
    for first in tl.static_range(BLOCK, N, BLOCK):
        score = tl.load(scores + first + i, mask=first + i < N, other=float("-inf"), cache_modifier=".cg")
        which = tl.where(score > best, first + i, which)
        best = tl.maximum(score, best)
    _, place = tl.max(best, 0, return_indices=True)
    tl.store(token, tl.sum(tl.where(i == place, which, 0), 0).to(tl.int64))
    tl.store(position, (tl.load(position) + 1) % LENGTH)
    tl.store(seed, tl.load(seed) + 1)


def pick(scores: torch.Tensor, token: torch.Tensor, position: torch.Tensor, seed: torch.Tensor, length: int) -> None:
    """Set token, int64[1], to the place of the largest score, and count position (modulo length) and seed."""
    n = scores.shape[-1]
    if n < 4096:
        raise ValueError(f"{n} scores are fewer than one block")
    _pick[(1,)](scores, token, position, seed, n, length, 4096, num_warps=16, launch_pdl=True)
