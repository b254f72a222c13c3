"""Time the quantizer's unit of work on a GPU: seconds per expert against experts at once.

    python tools/bench/gptq_gpu.py [--tokens 8192] [--budget 150] [--json FILE]

Shapes: 128 experts of 768 x 3072 (switch-base-128) with 1, 4, 16 and 128 at once, and
2080 x 6144 (switch-c-2048) with 16 at once, from which the time for that model's 61,440
experts follows by multiplication. Timed is all a unit does on the device: Hessians from
the tokens, factorization, and solving both matrices; ``gptq-2023`` is the paper's method,
``gptq`` ours at the paper's rate, ``gptq+block`` ours with block tuning. Not timed: reading
the checkpoint, the forward passes, writing. Needs torch with CUDA; nothing is installed.

Fewer than 128 experts are timed when a configuration would take longer than its share of
the budget; the table says how many.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qmoe_gptq.block import refine_group
from qmoe_gptq.experts import quantize_group
from qmoe_gptq.gptq import dense
from qmoe_gptq.model import SwitchConfig, expert_ffn
from qmoe_gptq.rate import entropies
from qmoe_gptq.settings import Settings

EXPERTS_OF_C2048 = 2048 * 30
SHAPES = {"base-128": (768, 3072, (1, 4, 16, 128)), "c-2048": (2080, 6144, (16,))}
METHODS = ("gptq-2023", "gptq", "gptq+block")


def config_of(d_model: int, d_ff: int) -> SwitchConfig:
    """Describe a model with such experts; only what an expert needs is meaningful."""
    return SwitchConfig.from_json(
        {
            "model_type": "switch_transformers",
            "d_model": d_model,
            "d_kv": 64,
            "d_ff": d_ff,
            "num_heads": 12,
            "num_layers": 12,
            "num_experts": 128,
            "vocab_size": 32128,
        }
    )


def make_unit(experts: int, d_model: int, d_ff: int, tokens: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Draw a unit's weights and normed inputs (correlated, as layer-norm outputs are)."""
    g = torch.Generator("cuda").manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device="cuda")

    wi, wo = draw(experts, d_ff, d_model) * d_model**-0.5, draw(experts, d_model, d_ff) * d_ff**-0.5
    mix = draw(d_model, d_model) * (0.5 * d_model**-0.5) + torch.eye(d_model, device="cuda") * 0.5
    inputs = draw(experts, tokens, d_model) @ mix
    return wi, wo, inputs, torch.rand(experts, tokens, generator=g, device="cuda") * 0.5 + 0.5


def time_unit(method: str, config: SwitchConfig, unit: tuple[torch.Tensor, ...]) -> tuple[float, float]:
    """Quantize one unit; returns (seconds, entropy bits per digit)."""
    wi, wo, inputs, shares = unit
    settings = Settings(method=method.partition("+")[0], device="cuda", group=len(wi))
    tokens, probabilities = list(inputs), list(shares)
    wanted = []
    if method.endswith("+block"):
        wanted = [expert_ffn(config, a, b, x) * p[:, None] for a, b, x, p in zip(wi, wo, tokens, probabilities, strict=True)]
    torch.cuda.synchronize()
    start = time.perf_counter()
    matrices = quantize_group(config, wi, wo, tokens, probabilities, settings=settings, dtype=torch.bfloat16, target_bits=None)
    result = {which: m.ternary for which, m in matrices.items()}
    if wanted:
        result = refine_group(config, result, tokens, probabilities, wanted, settings=settings, dtype=torch.bfloat16, seed=(0,))
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    rate = float(torch.stack([entropies(t.digits).mean() for t in result.values()]).mean())
    if not all(torch.isfinite(dense(t.digits[:1], t.levels[:1])).all() for t in result.values()):
        raise RuntimeError("a level is not finite")
    return seconds, rate


def measure(name: str, method: str, at_once: int, *, tokens: int, share: float) -> dict[str, object]:
    """Time whole groups until 128 experts are done or the configuration's share of time is spent."""
    d_model, d_ff, _ = SHAPES[name]
    config = config_of(d_model, d_ff)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    total, done, rate = 0.0, 0, 0.0
    while done < 128 and (not done or total * (1 + at_once / done) <= share):
        unit = make_unit(at_once, d_model, d_ff, tokens, seed=done)
        seconds, rate = time_unit(method, config, unit)
        del unit
        total, done = total + seconds, done + at_once
    return {
        "shape": name,
        "method": method,
        "at_once": at_once,
        "experts_timed": done,
        "seconds_per_expert": total / done,
        "seconds_128_experts": 128 * total / done,
        "entropy": rate,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def main() -> None:
    """Parse the options, warm up, print one line per configuration."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192, help="calibration tokens per expert")
    parser.add_argument("--budget", type=float, default=150.0, help="seconds to spend in all, about")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--json", type=Path, help="write the rows there")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this torch has no usable CUDA device")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.tokens} tokens per expert", flush=True)
    # The first calls load the linear-algebra libraries.
    for method in options.methods:
        time_unit(method, config_of(128, 256), make_unit(2, 128, 256, 512, seed=0))
    runs = [(shape, method, n) for method in options.methods for shape, (_, _, sizes) in SHAPES.items() for n in sizes]
    # One expert at a time is the slowest per expert and needs the fewest to be timed well.
    share = options.budget / len(runs)
    rows = []
    print(f"{'shape':10}{'method':12}{'at once':>8}{'timed':>7}{'s/expert':>10}{'s/128':>9}{'entropy':>9}{'GiB':>7}")
    for shape, method, n in runs:
        try:
            row = measure(shape, method, n, tokens=options.tokens, share=share)
        except torch.cuda.OutOfMemoryError:
            print(f"{shape:10}{method:12}{n:8}  out of memory", flush=True)
            continue
        rows.append(row)
        print(
            f"{shape:10}{method:12}{n:8}{row['experts_timed']:7}{row['seconds_per_expert']:10.3f}"
            f"{row['seconds_128_experts']:9.1f}{row['entropy']:9.3f}{row['peak_gib']:7.1f}",
            flush=True,
        )
    for row in rows:
        if row["shape"] == "c-2048":
            hours = float(str(row["seconds_per_expert"])) * EXPERTS_OF_C2048 / 3600
            print(f"{EXPERTS_OF_C2048} experts of c-2048, {row['method']}: {hours:.2f} h of solving on one such GPU")
    if options.json:
        options.json.write_text(json.dumps({"schema": 1, "device": torch.cuda.get_device_name(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
