"""Time of a decoding step of the Switch runtime on GPUs, experts compressed and dense, step by step and as a CUDA graph.

Two models: the example with ternary experts, and one of the size of switch-base-64 (12 + 12 blocks, every second sparse) with
synthetic ternary experts, each with its own memory. A step is what `generate` does from one token to the next: the decoder,
the choice of the token, and asking whether all sequences have ended. Medians of wall-clock times, the first steps left out.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import math
import pathlib
import platform
import runpy
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import gpu as bench  # the script beside this one
import qmoe_switch
from qmoe_switch.backends import Activation, DenseBackend, ExpertBackend, ExpertLayer, make_backend
from qmoe_switch.checkpoint import Compressed, ExpertStack
from qmoe_switch.decoding import Decoder, capture
from qmoe_switch.generation import why_not_captured
from qmoe_switch.model import SparseMLP, SwitchModel, assemble
from qmoe_switch.placement import Split, parse_devices
from qmoe_switch.tokens import TokenSet
from qmoecodec.container import pack
from qmoecodec.dictionary import aivf
from qmoecodec.types import Dictionary, Encoded
from qmoecodec_gpu import encoding

EXAMPLE = bench.ROOT / "examples" / "switch-pycode-4e"
P_ZERO = 0.885
DISTINCT = 4  # synthetic experts that are drawn; the others of a stack are copies
DENSE_CACHE = 32 << 30


@functools.cache
def make_dictionary() -> Dictionary:
    """Build the dictionary of the synthetic experts."""
    rest = (1 - P_ZERO) / 2
    return aivf.build(rest, P_ZERO, rest, code_bits=8)


class Synthetic:
    """A checkpoint of random dense tensors, and of ternary experts encoded on the device."""

    is_packed = True

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory

    def has(self, name: str) -> bool:
        """Say that embeddings are not repeated."""
        return False

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Draw a tensor that keeps the size of what it multiplies."""
        if "layer_norm" in name:
            return torch.ones(shape, device=bench.DEVICE)
        return torch.randn(shape, device=bench.DEVICE) / (1 if len(shape) == 1 or "shared" in name else math.sqrt(shape[-1]))

    def experts(self, prefix: str, projection: str, shape: tuple[int, int, int]) -> ExpertStack:
        """Draw a stack."""
        return SyntheticStack(f"{prefix}.{projection}", shape)

    def unclaimed(self) -> list[str]:
        """Nothing is left over."""
        return []

    def close(self) -> None:
        """There is no file."""


class SyntheticStack:
    """Ternary experts: a few are drawn and repeated."""

    def __init__(self, name: str, shape: tuple[int, int, int]) -> None:
        self.name, self.shape = name, shape
        n, rows, cols = shape
        dictionary = make_dictionary()
        self._digits = bench.draw_digits(DISTINCT, rows, cols, P_ZERO)
        some = encoding.to_encoded(encoding.encode(self._digits, dictionary), dictionary)
        times = n // DISTINCT
        sizes = np.tile(np.diff(some.code_offsets), times)
        self._encoded = Encoded(
            shape=shape,
            codes=np.tile(some.codes, times),
            code_offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.uint64),
            row_lengths=np.tile(some.row_lengths, (times, 1)),
            dictionary_index=np.zeros(n, np.uint8),
            dictionaries=(dictionary,),
        )
        size = 1 / math.sqrt(cols * (1 - P_ZERO))
        levels = torch.stack([-torch.rand(DISTINCT, rows) - 0.5, torch.rand(DISTINCT, rows) + 0.5], -1) * size
        self._levels = levels.bfloat16()

    @property
    def n_bytes(self) -> int:
        """Bytes of the codewords, the rows' lengths and the levels."""
        return self._encoded.codes.nbytes + self._encoded.row_lengths.nbytes + self.shape[0] * self._levels[0].nbytes

    def compressed(self) -> Compressed:
        """Return all experts, compressed."""
        levels = self._levels.view(torch.int16).numpy().view(np.uint16)
        return Compressed(self._encoded, np.tile(levels, (self.shape[0] // DISTINCT, 1, 1)), "BF16")

    def packed(self, expert: int) -> None:
        """These are for the GPU alone."""

    def dense(self, expert: int) -> torch.Tensor:
        """Return an expert as a matrix."""
        digits, levels = self._digits[expert % DISTINCT], self._levels[expert % DISTINCT].to(bench.DEVICE)
        return torch.where(digits < 0, levels[:, :1], torch.where(digits > 0, levels[:, 1:], levels.new_zeros(())))


class Foreknowing:
    """Dense matrices where the host knows the experts beforehand: token t of a step always goes to expert t.

    What a step in bfloat16 could take at best, as a CUDA graph too. It computes no model.
    """

    name, is_capturable = "foreknowing", True

    def layer(self, wi: ExpertStack, wo: ExpertStack, activation: Activation) -> ExpertLayer:
        """Decode all experts."""
        n = wi.shape[0]
        first, second = (torch.stack([s.dense(e).to(bench.DEVICE, torch.bfloat16) for e in range(n)]) for s in (wi, wo))

        def run(states: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
            x = states.to(torch.bfloat16)
            if len(x) > n:  # the encoder; its output does not matter here
                return states
            hidden = activation(torch.bmm(first[: len(x)], x[:, :, None]))
            return torch.bmm(second[: len(x)], hidden)[..., 0].to(states.dtype)

        return run


def draw_prompts(model: SwitchModel, n: int, length: int) -> TokenSet:
    """Draw prompts of random tokens."""
    ids = torch.randint(2, model.vocabulary.size, (n, length)).numpy()
    return TokenSet(ids, np.ones_like(ids))


@torch.inference_mode()
def time_steps(model: SwitchModel, prompts: TokenSet, steps: int, *, is_captured: bool) -> tuple[float, torch.Tensor]:
    """Return the median seconds of a step and the tokens."""
    start = model.vocabulary.start
    assert start is not None
    model.config.eos_token_id = None
    decoder = Decoder(model, prompts, start=start, length=steps, is_static=is_captured)
    decoder.step()
    step = capture(decoder.step, model.device) if is_captured else decoder.step
    times = []
    for i in range(steps - 1):
        begin = time.perf_counter()
        step()
        bool(decoder.all_done)
        if i >= 4:
            times.append(time.perf_counter() - begin)
    return statistics.median(times), decoder.said


@torch.inference_mode()
def use_all(model: SwitchModel) -> None:
    """Send a token to every expert, so that none is decoded or compiled for while time is taken."""
    n = model.config.num_experts
    for part in model.module.modules():
        if isinstance(part, SparseMLP):
            device = part.router.classifier.weight.device
            states = torch.zeros(n, model.config.d_model, dtype=torch.bfloat16, device=device)
            part._experts(states, torch.arange(n, device=device))


def time_model(report: bench.Report, what: str, model: SwitchModel, batches: list[int], *, length: int, steps: int) -> None:
    """Write one line: a step at each batch, by single launches and as a graph."""
    use_all(model)
    cells = []
    for batch in batches:
        prompts = draw_prompts(model, batch, length)
        alone, said = time_steps(model, prompts, steps, is_captured=False)
        cells.append(f"{1e3 * alone:.2f}")
        if why_not_captured(model) is None:
            graph, again = time_steps(model, prompts, steps, is_captured=True)
            same = int((said == again).all(dim=1).sum())
            cells += [f"{1e3 * graph:.2f}", f"{same}/{batch}"]
        else:
            cells += ["", ""]
        cells.append(str(len(said.unique())))
    report.table(what, *cells)


def header(report: bench.Report, batches: list[int]) -> None:
    """Write the head of the table of steps."""
    names = [name for b in batches for name in (f"batch {b}: single launches, ms", "graph, ms", "same rows", "tokens")]
    report.header("experts", *names)


def gigabytes() -> float:
    """GPU memory in use, all devices."""
    return sum(torch.cuda.memory_allocated(i) for i in range(torch.cuda.device_count())) / 1e9


@contextlib.contextmanager
def example(packed: pathlib.Path | None) -> Iterator[pathlib.Path]:
    """Give a packed checkpoint of the example: the one given, or the twin with ternary experts, made and packed."""
    if packed is not None:
        yield packed
        return
    with tempfile.TemporaryDirectory() as folder:
        twin = pathlib.Path(folder) / "twin"
        shutil.copytree(EXAMPLE, twin)
        arguments, sys.argv = sys.argv, ["make_ternary.py", str(twin / "model.safetensors")]
        try:
            runpy.run_path(str(EXAMPLE.parent / "make_ternary.py"))
        finally:
            sys.argv = arguments
        pack(twin, twin.parent / "packed")
        yield twin.parent / "packed"


def bench_example(report: bench.Report, packed: pathlib.Path | None, steps: int) -> None:
    """The example model: loss and steps."""
    report("\n## The example: d_model 256, d_ff 1024, 2 + 2 blocks, one sparse each, 4 experts\n")
    batches = [1, 32]
    header(report, batches)
    with example(packed) as path:
        for backend in ("cuda", "dense"):
            with qmoe_switch.load(path, device="cuda", backend=backend, dtype="bfloat16") as model:
                time_model(report, "compressed" if backend == "cuda" else "dense", model, batches, length=256, steps=steps)


def write_config(folder: pathlib.Path, arguments: argparse.Namespace) -> pathlib.Path:
    """Write the configuration of the synthetic model."""
    config = transformers.SwitchTransformersConfig(
        vocab_size=32128, d_model=768, d_kv=64, d_ff=3072, num_heads=12, num_experts=arguments.experts,
        num_layers=arguments.layers, num_sparse_encoder_layers=arguments.layers // 2, num_decoder_layers=arguments.layers,
        num_sparse_decoder_layers=arguments.layers // 2, dropout_rate=0.0, decoder_start_token_id=0,
        tie_word_embeddings=False,  # else it would repeat the token that it was given
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


def check_experts(ours: SwitchModel, dense: SwitchModel) -> float:
    """Give one layer of both models the same tokens; return the relative distance of the outputs."""
    name = "decoder.block.1.layer.2.mlp"
    layers = [model.module.get_submodule(name)._experts for model in (ours, dense)]
    n = ours.config.num_experts
    states = torch.randn(n, ours.config.d_model, device=bench.DEVICE).bfloat16()
    numbers = torch.randperm(n, device=bench.DEVICE)
    got, expected = (layer(states, numbers).double() for layer in layers)
    error = float((got - expected).norm() / expected.norm())
    if not error < 0.01:
        raise AssertionError(f"the compressed experts differ from the dense ones by {error}")
    return error


def bench_synthetic(report: bench.Report, arguments: argparse.Namespace) -> None:
    """The larger model: memory and steps, on one device and on all."""
    n, batches = arguments.layers, [1, 8, 64]
    report(f"\n## Synthetic: d_model 768, d_ff 3072, {n} + {n} blocks, every second sparse, {arguments.experts} experts\n")

    def make(seed: int, name: str, backend: Callable[[torch.device], ExpertBackend], split: Split = "layers") -> SwitchModel:
        torch.manual_seed(seed)
        devices = parse_devices(name)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint: Any = Synthetic(write_config(pathlib.Path(folder), arguments))
            backends = {device: backend(device) for device in devices}
            return assemble(checkpoint, devices, backends, split=split, dtype="bfloat16")

    def compressed(device: torch.device) -> ExpertBackend:
        return make_backend("cuda", device=device)

    seed, used, begin = time.time_ns() % 2**31, gigabytes(), time.perf_counter()
    ours = make(seed, "cuda", compressed)
    torch.cuda.synchronize()
    built, held = time.perf_counter() - begin, gigabytes() - used
    dense = make(seed, "cuda", lambda _: DenseBackend(cache_bytes=DENSE_CACHE))
    error = check_experts(ours, dense)
    weights = 2 * 2 * (n // 2) * arguments.experts * 768 * 3072
    report(
        f"{weights / 1e9:.2f} billion expert weights; the model compressed takes {held:.2f} GB of GPU memory, its experts alone "
        f"in bfloat16 {2 * weights / 1e9:.2f} GB. Drawn, encoded and loaded in {built:.1f} s. One layer's outputs differ from "
        f"the dense ones by {error:.4f}.\n"
    )
    header(report, batches)
    length, steps = arguments.length, arguments.steps
    time_model(report, "compressed", ours, batches, length=length, steps=steps)
    del ours
    time_model(report, "dense, routed by the host", dense, batches, length=length, steps=steps)
    del dense
    time_model(report, "dense, experts known beforehand", make(seed, "cuda", lambda _: Foreknowing()), batches, length=length,
               steps=steps)  # fmt: skip
    if torch.cuda.device_count() > 1:
        every = ",".join(f"cuda:{i}" for i in range(torch.cuda.device_count()))
        for split in ("layers", "experts"):
            time_model(report, f"compressed, {every}, {split}", make(seed, every, compressed, split), batches, length=length,
                       steps=steps)  # fmt: skip


def main() -> None:
    """Run both models and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="example,synthetic", help="parts to run")
    parser.add_argument("--out", type=pathlib.Path, help="folder for the report; default tools/bench/results")
    parser.add_argument("--packed", type=pathlib.Path, help="a packed checkpoint to take for the example")
    parser.add_argument("--layers", type=int, default=12, help="blocks of the synthetic encoder, and as many of the decoder")
    parser.add_argument("--experts", type=int, default=64, help=f"per sparse layer, a multiple of {DISTINCT}")
    parser.add_argument("--length", type=int, default=64, help="tokens of a synthetic prompt")
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    if arguments.experts % DISTINCT or arguments.layers % 2 or arguments.steps < 8:
        parser.error(f"experts are a multiple of {DISTINCT}, layers of 2, and steps at least 8")
    report = bench.Report()
    name = torch.cuda.get_device_name()
    skip = [i for i, a in enumerate(sys.argv) if "--out" in (a, sys.argv[i - 1])]
    report(f"# The runtime on the GPU, {datetime.date.today().isoformat()}")
    report()
    report(
        f"{torch.cuda.device_count()} x {name}, torch {torch.__version__}, transformers {transformers.__version__}, Python "
        f"{platform.python_version()}. Command: `python {' '.join(a for i, a in enumerate(sys.argv) if i not in skip)}`. "
        "All in bfloat16; `same rows`: sequences that are the same with and without the graph; `tokens`: different ones said."
    )
    for part in arguments.only.split(","):
        if part == "example":
            bench_example(report, arguments.packed, arguments.steps)
        else:
            bench_synthetic(report, arguments)
    out = arguments.out or pathlib.Path(__file__).parent / "results"
    out.mkdir(parents=True, exist_ok=True)
    count = f"{torch.cuda.device_count()}x-" if torch.cuda.device_count() > 1 else ""
    slug = count + name.lower().replace(" ", "-")
    (out / f"gpu-runtime-{slug}-{datetime.date.today().isoformat()}.md").write_text("\n".join(report.lines) + "\n")


if __name__ == "__main__":
    main()
