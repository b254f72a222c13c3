"""The c2048 geometry on one GPU: 30 sparse layers of 2,048 experts resident, generating tokens.

The weights are synthetic: a few experts are drawn and encoded, and copied so that every expert of every layer has its own
memory. Routing is real: each layer's router multiplies the hidden states and the best expert wins.

The same model in bfloat16 cannot be held (3.2 TB). As in the QMoE paper, its time is that of an ideal device with enough
memory, measured with matrices that stand for all experts of a layer:
- "ideal, one matrix per layer" is the paper's method. With more than one token, the layer's matrix is read again from the L2
  cache, which real experts could not be.
- "ideal, own memory" gives each token of a step another matrix of a pool, larger than the L2 cache.
Everything but the experts is the same code: for one sequence the kernels of one_token.py, for several torch's. One
sequence is compared with three forms of the ideal experts: torch.mv; torch.compile for the second product, where it is the
faster; and the product kernel of the dense parts, which begins to read its matrix while the kernel before it ends.
A step is one CUDA graph; tokens per second are batch / step time.
"""

from __future__ import annotations

import argparse
import datetime
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as functional

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import one_token

import gpu as bench  # the scripts beside this one
from qmoecodec.dictionary import aivf
from qmoecodec_gpu import backend, encoding, matvec
from qmoecodec_gpu.experts import Bank, GpuExperts

DEVICE = bench.DEVICE
P_ZERO = 0.886


@dataclass(frozen=True)
class Geometry:
    """Switch-c-2048: every block sparse."""

    layers: int = 15  # encoder, and as many in the decoder
    experts: int = 2048
    d_model: int = 2080
    d_ff: int = 6144
    heads: int = 32
    d_head: int = 64
    vocabulary: int = 32128


def spread(some: GpuExperts, n: int) -> GpuExperts:
    """Copy loaded experts until there are n, each with its own memory."""
    distinct, rows, cols = some.shape
    times = n // distinct
    words = int(some.expert_start[-1])
    codes = torch.empty(4 * words * times + bench_tail(some, words), dtype=torch.uint8, device=DEVICE)
    codes[: 4 * words * times].view(times, -1).copy_(some.codes[None, : 4 * words])
    codes[4 * words * times :] = 0
    starts = some.expert_start[:-1][None] + words * torch.arange(times, device=DEVICE)[:, None]
    return GpuExperts(
        shape=(n, rows, cols),
        bank=some.bank,
        dictionary_index=some.dictionary_index.repeat(times),
        codes=codes,
        expert_start=torch.cat([starts.flatten(), starts.new_tensor([words * times])]),
        row_start=some.row_start.repeat(times, 1),
        levels=some.levels.repeat(times, 1, 1),
        level_kind=some.level_kind,
        layout=some.layout,
    )


def bench_tail(some: GpuExperts, words: int) -> int:
    """Bytes behind the last row."""
    return some.codes.numel() - 4 * words


def make_some(rows: int, cols: int, n: int = 4) -> GpuExperts:
    """Draw, encode and load a few experts; levels such that the output keeps the input's size."""
    rest = (1 - P_ZERO) / 2
    dictionary = aivf.build(rest, P_ZERO, rest, code_bits=8)
    staged = encoding.encode(bench.draw_digits(n, rows, cols, P_ZERO), dictionary)
    size = 1 / math.sqrt(cols * (1 - P_ZERO))
    levels = torch.stack([-torch.rand(n, rows) - 0.5, torch.rand(n, rows) + 0.5], -1) * size
    level_bytes = levels.to(DEVICE).bfloat16().view(torch.uint8)
    return GpuExperts.from_staged(staged, Bank.upload((dictionary,), DEVICE), level_bytes, "BF16")


Mlp = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


def matrix(*shape: int) -> torch.Tensor:
    """Draw a dense matrix that keeps the size of what it multiplies."""
    return (torch.randn(*shape, device=DEVICE) / math.sqrt(shape[-1])).bfloat16()


class Block:
    """The dense parts of one block: attention, norms, router."""

    def __init__(self, g: Geometry, number: int, *, decoder: bool) -> None:
        inner = g.heads * g.d_head
        self.number = number
        self.qkv, self.out = matrix(3 * inner, g.d_model), matrix(g.d_model, inner)
        self.router = matrix(g.experts, g.d_model)
        self.norm = torch.ones(g.d_model, dtype=torch.bfloat16, device=DEVICE)
        if decoder:
            self.cross_q, self.cross_kv = matrix(inner, g.d_model), matrix(2 * inner, g.d_model)
            self.cross_out = matrix(g.d_model, inner)


class Model:
    """An encoder-decoder of sparse blocks; `mlp(x, expert, scale, block)` is the expert block."""

    def __init__(self, g: Geometry, batch: int, source: int, target: int) -> None:
        self.g, self.batch, self.target = g, batch, target
        self.embedding = matrix(g.vocabulary, g.d_model)
        self.encoder = [Block(g, i, decoder=False) for i in range(g.layers)]
        self.decoder = [Block(g, g.layers + i, decoder=True) for i in range(g.layers)]
        self.source = source
        self.norm = torch.ones(g.d_model, dtype=torch.bfloat16, device=DEVICE)

    def dense_bytes(self) -> int:
        """Bytes of all dense tensors."""
        blocks = [t for b in self.encoder + self.decoder for t in vars(b).values() if isinstance(t, torch.Tensor)]
        return self.embedding.nbytes + self.norm.nbytes + sum(t.nbytes for t in blocks)

    def sparse(self, x: torch.Tensor, block: Block, mlp: Mlp) -> torch.Tensor:
        """Route each token to its best expert and add what that says."""
        h = functional.rms_norm(x, (self.g.d_model,), block.norm, one_token.EPS)
        probability, expert = torch.softmax((h @ block.router.T).float(), -1).max(-1)
        return x + mlp(h, expert, probability, block.number)

    def heads(self, t: torch.Tensor) -> torch.Tensor:
        """[batch, length, inner] -> [batch, heads, length, d_head]"""
        return t.view(self.batch, -1, self.g.heads, self.g.d_head).transpose(1, 2)

    def encode(self, tokens: torch.Tensor, mlp: Mlp) -> None:
        """Run the encoder, and keep each decoder block's cross keys and values."""
        x = self.embedding[tokens]
        for block in self.encoder:
            h = functional.rms_norm(x, (self.g.d_model,), block.norm, one_token.EPS)
            q, k, v = (self.heads(t) for t in (h @ block.qkv.T).chunk(3, -1))
            a = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(self.batch, self.source, -1)
            x = x + a @ block.out.T
            x = self.sparse(x.view(-1, self.g.d_model), block, mlp).view(self.batch, self.source, -1)
        self.cross = [tuple(self.heads(t).contiguous() for t in (x @ b.cross_kv.T).chunk(2, -1)) for b in self.decoder]
        shape = (self.batch, self.g.heads, self.target, self.g.d_head)
        self.cache = [[torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)] for _ in self.decoder]
        self.tokens = torch.zeros(self.batch, dtype=torch.int64, device=DEVICE)
        self.position = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        self.nothing = torch.zeros(1, self.g.d_model, dtype=torch.bfloat16, device=DEVICE)
        self.seed = torch.randint(1 << 40, (1,), device=DEVICE)
        self.columns = torch.arange(self.target, device=DEVICE)
        self.used = [torch.zeros(self.batch, dtype=torch.int64, device=DEVICE) for _ in self.decoder]

    def step(self, mlp: Mlp) -> None:
        """Generate one token of each sequence: everything stays on the device."""
        if self.batch == 1:
            scores = self.one_token(mlp, self.seed)
            one_token.pick(scores, self.tokens, self.position, self.seed, self.target)
            return
        logits = self.several_tokens(mlp)
        # Sampled (the Gumbel trick), so that the steps of one sequence differ in their routing.
        noise = torch.empty_like(logits).exponential_().log_()
        self.tokens.copy_((logits - noise).argmax(-1))
        self.position.add_(1).remainder_(self.target)

    def one_token(self, mlp: Mlp, seed: torch.Tensor | None) -> torch.Tensor:
        """Return the logits, float32[1, vocabulary], with noise if there is a seed (one_token.py).

        What the expert block says is added where it is used.
        """
        x, said = self.embedding[self.tokens], self.nothing
        matvec = one_token.matvec
        for i, block in enumerate(self.decoder):
            qkv = matvec(block.qkv, x, more=said, norm=block.norm)
            a = one_token.attend(qkv, *self.cache[i], self.position)
            x = matvec(block.out, a, plus=(x, said))
            q = matvec(block.cross_q, x, norm=block.norm)
            a = one_token.attend(q, *self.cross[i])
            x = matvec(block.cross_out, a, plus=(x,))
            logits = matvec(block.router, x, norm=block.norm, dtype=torch.float32)
            expert, probability, h = one_token.choose(logits, x, block.norm)
            said = mlp(h, expert, probability, block.number)
        return matvec(self.embedding, x, more=said, norm=self.norm, seed=seed, dtype=torch.float32)

    def several_tokens(self, mlp: Mlp) -> torch.Tensor:
        """Return the logits, float32[batch, vocabulary]."""
        x = self.embedding[self.tokens]
        mask = (self.columns <= self.position)[None, None, None]
        for i, block in enumerate(self.decoder):
            h = functional.rms_norm(x, (self.g.d_model,), block.norm, one_token.EPS)
            q, k, v = (self.heads(t.unsqueeze(1)) for t in (h @ block.qkv.T).chunk(3, -1))
            for cache, new in zip(self.cache[i], (k, v), strict=True):
                cache.index_copy_(2, self.position, new)
            a = functional.scaled_dot_product_attention(q, *self.cache[i], attn_mask=mask)
            x = torch.addmm(x, a.reshape(self.batch, -1), block.out.T)
            h = functional.rms_norm(x, (self.g.d_model,), block.norm, one_token.EPS)
            q = self.heads((h @ block.cross_q.T).unsqueeze(1))
            a = functional.scaled_dot_product_attention(q, *self.cross[i])
            x = torch.addmm(x, a.reshape(self.batch, -1), block.cross_out.T)
            x = self.sparse(x, block, mlp)
        return (functional.rms_norm(x, (self.g.d_model,), self.norm, one_token.EPS) @ self.embedding.T).float()


def measure(model: Model, mlp: Mlp, *, steps: int) -> tuple[float, int]:
    """Capture a step and replay it; return the median seconds of a step and the number of different tokens it made."""
    model.step(mlp)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model.step(mlp)
    model.tokens.copy_(torch.randint(model.g.vocabulary, (model.batch,)))
    model.position.zero_()
    times, made = [], []
    for _ in range(steps):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
        made.append(model.tokens.clone())
    return statistics.median(times), len(torch.stack(made).unique())


def time_encoder(model: Model, source: torch.Tensor, mlp: Mlp) -> float:
    """Milliseconds of the encoder, launches included."""
    model.encode(source, mlp)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    model.encode(source, mlp)
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin)


@torch.compile(dynamic=False)
def _compiled(matrix: torch.Tensor, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return ((matrix.float() * x.float()).sum(-1) * scale).bfloat16()


def one_sequence(
    report: bench.Report,
    model: Model,
    source: torch.Tensor,
    compressed: Mlp,
    ideal_mv: Mlp,
    pool: tuple[torch.Tensor, torch.Tensor],
    steps: int,
) -> None:
    """Report one sequence: ours, the ideal model with three forms of its experts, and the dense parts alone."""

    def ideal_compiled(x: torch.Tensor, expert: torch.Tensor, scale: torch.Tensor, number: int) -> torch.Tensor:
        return _compiled(pool[1][number], torch.mv(pool[0][number], x[0]).relu_(), scale)[None]

    def ideal_early(x: torch.Tensor, expert: torch.Tensor, scale: torch.Tensor, number: int) -> torch.Tensor:
        return one_token.matvec(pool[1][number], one_token.matvec(pool[0][number], x, relu=True), scale=scale)

    def nothing(x: torch.Tensor, expert: torch.Tensor, scale: torch.Tensor, number: int) -> torch.Tensor:
        return x

    encoder = time_encoder(model, source, compressed)

    def unrouted(x: torch.Tensor, expert: torch.Tensor, scale: torch.Tensor, number: int) -> torch.Tensor:
        return compressed(x, torch.full_like(expert, number % model.g.experts), scale, number)

    # The same step in torch's own operations; not routed, as the two may round to different experts.
    expected, found = model.several_tokens(unrouted), model.one_token(unrouted, None)
    error = float((found - expected).norm() / expected.norm())
    if not error < 3e-2:
        raise AssertionError(f"logits differ by {error}")
    report(f"\n### One sequence\n\nEncoder and prompt of 64 tokens ({encoder:.1f} ms); a step generates one token.\n")
    report.header("experts", "ms per step", "tokens/s", "ours is faster by", "tokens made")
    forms = {
        "ours, compressed": compressed,
        "ideal, torch.mv": ideal_mv,
        "ideal, torch.mv and torch.compile": ideal_compiled,
        "ideal, product kernel of the dense parts": ideal_early,
        "none: dense parts alone": nothing,
    }
    ours = 0.0
    for name, mlp in forms.items():
        seconds, made = measure(model, mlp, steps=steps)
        ours = ours or seconds
        report.table(name, f"{1e3 * seconds:.3f}", f"{1 / seconds:.0f}", f"{seconds / ours:.2f}", f"{made} different")


def main() -> None:
    """Build the model, report its bytes and its speed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, help="folder for the report; default tools/bench/results")
    parser.add_argument("--layers", type=int, default=15, help="of the encoder, and as many of the decoder")
    parser.add_argument("--experts", type=int, default=2048)
    parser.add_argument("--batches", default="1,4,16,64")
    parser.add_argument("--steps", type=int, default=48)
    arguments = parser.parse_args()
    backend.load()
    torch.manual_seed(time.time_ns() % 2**31)
    g = Geometry(layers=arguments.layers, experts=arguments.experts)
    report = bench.Report()
    bench.describe(report, times=False)
    report(f"\n## c2048 geometry: {2 * g.layers} sparse layers of {g.experts} experts, {g.d_model} x {g.d_ff}, P(0) = {P_ZERO}\n")

    begin = time.perf_counter()
    some_wi, some_wo = make_some(g.d_ff, g.d_model), make_some(g.d_model, g.d_ff)
    layers = [(spread(some_wi, g.experts), spread(some_wo, g.experts)) for _ in range(2 * g.layers)]
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    kinds: dict[str, int] = {}
    for pair in layers:
        for experts in pair:
            for kind, size in experts.nbytes.items():
                kinds[kind] = kinds.get(kind, 0) + size
    model = Model(g, 1, 64, 64)
    n_weights = 2 * 2 * g.layers * g.experts * g.d_model * g.d_ff
    kinds["dense parts"] = model.dense_bytes()
    report.header("bytes by kind", "GB", "bits per expert weight")
    for kind, size in kinds.items():
        report.table(kind, f"{size / 1e9:.2f}", f"{8 * size / n_weights:.4f}")
    total, free = sum(kinds.values()), torch.cuda.mem_get_info()[0]
    report.table("all", f"{total / 1e9:.2f}", f"{8 * total / n_weights:.4f}")
    report(f"\n{n_weights / 1e12:.3f} trillion expert weights, built in {seconds:.1f} s; {free / 1e9:.1f} GB left free.")
    del model

    # One matrix per layer; all of them together are the pool of the second baseline.
    pool_wi = some_wi.decode(0, dtype=torch.bfloat16).repeat(2 * g.layers, 1, 1)
    pool_wo = some_wo.decode(0, dtype=torch.bfloat16).repeat(2 * g.layers, 1, 1)

    def compressed(x: torch.Tensor, expert: torch.Tensor, scale: torch.Tensor, number: int) -> torch.Tensor:
        return matvec.moe_mlp(x, expert, *layers[number], scale=scale)

    def ideal_shared(x: torch.Tensor, expert: torch.Tensor, scale: torch.Tensor, number: int) -> torch.Tensor:
        out = torch.empty_like(x)
        for t in range(len(x)):
            torch.mv(pool_wo[number], torch.relu(torch.mv(pool_wi[number], x[t])), out=out[t])
        return out * scale[:, None].to(x.dtype)

    def ideal_own(x: torch.Tensor, expert: torch.Tensor, scale: torch.Tensor, number: int) -> torch.Tensor:
        parts, n = [], len(pool_wi)
        for first in range(0, len(x), n):
            some = x[first : first + n, :, None]
            at = (number * 7) % (n - len(some) + 1)
            h = torch.relu(torch.bmm(pool_wi[at : at + len(some)], some))
            parts.append(torch.bmm(pool_wo[at : at + len(some)], h)[..., 0])
        return torch.cat(parts) * scale[:, None].to(x.dtype)

    batches = [int(b) for b in arguments.batches.split(",")]
    source = torch.randint(g.vocabulary, (max(batches), 64), device=DEVICE)
    if 1 in batches:
        one_sequence(report, Model(g, 1, 64, 64), source[:1], compressed, ideal_shared, (pool_wi, pool_wo), arguments.steps)
    if max(batches) > 1:
        report("\n### Several sequences\n\nEncoder and prompt of 64 tokens; a step generates one token of each sequence.\n")
        report.header(
            "batch", "ours, ms per step", "tokens/s", "ideal, one matrix per layer", "ratio", "ideal, own memory", "ratio",
            "encoder, ms", "tokens made",
        )  # fmt: skip
    for batch in (b for b in batches if b > 1):
        torch.cuda.empty_cache()
        model = Model(g, batch, 64, 64)
        encoder = time_encoder(model, source[:batch], compressed)
        ours, made = measure(model, compressed, steps=arguments.steps)
        shared, _ = measure(model, ideal_shared, steps=arguments.steps)
        own, _ = measure(model, ideal_own, steps=arguments.steps)
        report.table(
            str(batch), f"{1e3 * ours:.2f}", f"{batch / ours:.0f}", f"{1e3 * shared:.2f} ms", f"{shared / ours:.2f}",
            f"{1e3 * own:.2f} ms", f"{own / ours:.2f}", f"{encoder:.1f}", f"{made} different",
        )  # fmt: skip
        del model
    out = arguments.out or pathlib.Path(__file__).parent / "results"
    out.mkdir(parents=True, exist_ok=True)
    slug = torch.cuda.get_device_name().lower().replace(" ", "-")
    (out / f"gpu-headline-{slug}-{datetime.date.today().isoformat()}.md").write_text("\n".join(report.lines) + "\n")


if __name__ == "__main__":
    main()
