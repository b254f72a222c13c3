"""The runtime with its experts in GPU memory, against the dense model on the same device and on the CPU."""

from __future__ import annotations

import gc
import runpy
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import qmoe_switch  # noqa: E402
from qmoe_switch import BackendError, FormatError  # noqa: E402
from qmoe_switch.tokens import TokenSet  # noqa: E402
from qmoecodec.container import pack  # noqa: E402

pytestmark = pytest.mark.gpu

MakeCheckpoint = Callable[..., Path]
EXAMPLES = Path(__file__).parents[3] / "examples"

#: Changes to the small checkpoint, and how it is packed.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "relu": ({"d_model": 64, "d_ff": 96}, {}),
    "gelu": ({"d_model": 64, "d_ff": 96, "dense_act_fn": "gelu"}, {}),
    "12 bit": ({"d_model": 64, "d_ff": 96, "num_experts": 2}, {"code_bits": 12}),
    "table of 2023, odd": ({"d_model": 31, "d_ff": 33, "dense_act_fn": "silu"}, {"dictionary": "qmoe-2023"}),
    "odd, every block sparse": (
        {"d_model": 45, "d_ff": 83, "num_experts": 7, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2},
        {},
    ),
    "one expert, untied": ({"num_experts": 1, "tie_word_embeddings": False}, {}),
}


#: Between two numbers of what the experts take in a dtype, relative.
ROUNDING = {"float32": 2.0**-7, "bfloat16": 2.0**-7, "float16": 2.0**-10}


@pytest.fixture(params=CASES)
def pair(request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> tuple[Path, Path]:
    """A plain checkpoint with ternary experts, and the same packed."""
    changes, setting = CASES[request.param]
    source = make_checkpoint(ternary=True, **changes)
    assert pack(source, tmp_path / "packed", **setting).groups
    return source, tmp_path / "packed"


def distance(a: Any, b: Any) -> float:
    """Relative distance of logits."""
    return float((a.double().cpu() - b.double().cpu()).norm() / b.double().cpu().norm())


def last_logits(model: Any, prompt: TokenSet, said: Any) -> Any:
    """Logits of the token that follows `said`, computed without a cache."""
    decoder = np.concatenate([[model.vocabulary.start], said])[None]
    return qmoe_switch.logits(model, TokenSet(prompt.input_ids, prompt.attention_mask, decoder, decoder))[0, -1].float().cpu()


def check_same_tokens(models: Any, generations: Any, prompts: TokenSet, *, slack: float = 0.0) -> int:
    """Where two models part, their logits differ by as much as the tokens are apart. Returns the rows that do not part.

    slack : how far apart the tokens may be however little the logits differ, relative to the largest
    """
    same = 0
    for row, (mine, other) in enumerate(zip(*(g.tokens for g in generations), strict=True)):
        n = min(len(mine), len(other))
        places = np.flatnonzero(mine[:n] != other[:n])
        if len(places) == 0:
            assert len(mine) == len(other)
            same += 1
            continue
        place = int(places[0])
        first, second = (last_logits(model, prompts.slice(row, row + 1), mine[:place]) for model in models)
        gap = float((second[int(mine[place])] - second[int(other[place])]).abs())
        error = float((first - second).abs().max()) + slack * float(second.abs().max())
        assert gap <= 3 * error, f"row {row} says {mine[place]} and {other[place]} at {place}: {gap} apart, error {error}"
    return same


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_results_are_those_of_the_dense_model(pair: tuple[Path, Path], tokens_file: Path, dtype: str) -> None:
    source, packed = pair
    with (
        qmoe_switch.load(source) as exact,
        qmoe_switch.load(source, device="cuda", dtype=dtype) as dense,
        qmoe_switch.load(packed, device="cuda", dtype=dtype) as ours,
    ):
        assert (exact.backend.name, dense.backend.name, ours.backend.name) == ("dense", "dense", "cuda")
        tokens = qmoe_switch.read_tokens(tokens_file, exact.vocabulary, labels=True)
        expected = qmoe_switch.logits(exact, tokens)
        got, rounded = qmoe_switch.logits(ours, tokens), qmoe_switch.logits(dense, tokens)
        assert got.is_cuda and got.dtype == rounded.dtype
        # Experts take 16-bit inputs: no further off than 16-bit rounding, or than twice what the dense model is.
        assert distance(got, expected) < max(0.02, 2 * distance(rounded, expected))
        assert qmoe_switch.evaluate(ours, tokens).loss == pytest.approx(qmoe_switch.evaluate(exact, tokens).loss, abs=0.02)
        generated = [qmoe_switch.generate(model, tokens, max_new_tokens=12) for model in (ours, dense, exact)]
        assert generated[0].n_tokens >= 3
        check_same_tokens((ours, dense), generated[:2], tokens)
        check_same_tokens((ours, exact), generated[::2], tokens)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_graph_says_what_single_launches_say(pair: tuple[Path, Path], tokens_file: Path, dtype: str) -> None:
    with qmoe_switch.load(pair[1], device="cuda", dtype=dtype, capacity="per_sequence") as model:
        prompts = qmoe_switch.read_tokens(tokens_file, model.vocabulary, labels=False)
        model.config.eos_token_id = None
        for n, length in ((3, 20), (1, 2), (2, 7), (3, 1)):
            some = prompts.slice(0, n)
            generated = [qmoe_switch.generate(model, some, max_new_tokens=length, graph=graph) for graph in (True, False)]
            # Keys and values lie otherwise in memory, so that the attention's sums may be rounded otherwise.
            check_same_tokens((model, model), generated, some, slack=ROUNDING[dtype])
            assert [g.steps for g in generated] == [length, length]


def test_graph_stops_at_the_end_token(plain: Path, tokens_file: Path, tmp_path: Path) -> None:
    pack(plain, tmp_path / "packed")
    with qmoe_switch.load(tmp_path / "packed", device="cuda") as model:
        prompts = qmoe_switch.read_tokens(tokens_file, model.vocabulary, labels=False)
        model.config.eos_token_id = None
        free = qmoe_switch.generate(model, prompts, max_new_tokens=10)
        model.config.eos_token_id = sorted({int(row[3]) for row in free.tokens})
        result = qmoe_switch.generate(model, prompts, max_new_tokens=10)
        assert result.steps == max(map(len, result.tokens)) <= 4
        assert all(np.array_equal(row, whole[: len(row)]) for row, whole in zip(result.tokens, free.tokens, strict=True))


def test_what_cannot_be_captured_is_an_error_and_does_no_harm(plain: Path, tokens_file: Path, tmp_path: Path) -> None:
    pack(plain, tmp_path / "packed")
    with qmoe_switch.load(plain, device="cuda") as dense:
        prompts = qmoe_switch.read_tokens(tokens_file, dense.vocabulary, labels=False)
        with pytest.raises(BackendError, match="the backend dense asks the device where the tokens go"):
            qmoe_switch.generate(dense, prompts, graph=True)
    with qmoe_switch.load(tmp_path / "packed", device="cuda") as model:
        before = qmoe_switch.generate(model, prompts, max_new_tokens=5)
        hook = model.module.decoder.final_layer_norm.register_forward_hook(lambda _, __, out: print(float(out.sum())))
        with pytest.raises(BackendError, match=r"the decoding step cannot be captured in a CUDA graph: .+"):
            qmoe_switch.generate(model, prompts, max_new_tokens=5)
        hook.remove()
        again = qmoe_switch.generate(model, prompts, max_new_tokens=5)
        assert [row.tolist() for row in again.tokens] == [row.tolist() for row in before.tokens]


def test_decoded_experts_are_those_of_the_plain_checkpoint(pair: tuple[Path, Path], tokens_file: Path) -> None:
    source, packed = pair
    with qmoe_switch.load(source, device="cuda") as plain, qmoe_switch.load(packed, device="cuda", backend="dense") as decoded:
        tokens = qmoe_switch.read_tokens(tokens_file, plain.vocabulary, labels=True)
        torch.testing.assert_close(qmoe_switch.logits(decoded, tokens), qmoe_switch.logits(plain, tokens))


def check_spread(path: Path, tokens_file: Path, device: str, split: Any, dtype: str, *, same_rounding: bool = True) -> None:
    """Results do not depend on the devices, but for rounding.

    same_rounding : experts on all devices take tokens in the same dtype; else rounding may route a token near a tie elsewhere,
        which changes the tokens behind it, so that the usual token alone is compared
    """
    capacity = "per_sequence"
    with (
        qmoe_switch.load(path, device="cuda", dtype=dtype, capacity=capacity) as one,
        qmoe_switch.load(path, device=device, split=split, dtype=dtype, capacity=capacity) as several,
    ):
        asked = [torch.device(name) for name in device.split(",")]
        assert several.devices == tuple(asked)
        if split == "layers":
            assert set(several.placement.values()) == set(asked)
        for name, place in several.placement.items():
            held = {parameter.device for parameter in several.module.get_submodule(name).parameters()}
            assert held == {place if split == "layers" else asked[0]}
        tokens = qmoe_switch.read_tokens(tokens_file, one.vocabulary, labels=True)
        got, expected = qmoe_switch.logits(several, tokens), qmoe_switch.logits(one, tokens)
        assert got.device == asked[0]
        usual = statistics.median(distance(a, b) for a, b in zip(got.flatten(0, 1), expected.flatten(0, 1), strict=True))
        assert (distance(got, expected) if same_rounding else usual) < 0.02
        losses = [qmoe_switch.evaluate(model, tokens).loss for model in (several, one)]
        assert losses[0] == pytest.approx(losses[1], abs=0.02 if same_rounding else 0.1)
        models = (several, one)
        generated = [qmoe_switch.generate(model, tokens, max_new_tokens=12, graph=False) for model in models]
        if same_rounding:
            check_same_tokens(models, generated, tokens, slack=ROUNDING[dtype])
        with pytest.raises(BackendError, match="cannot be captured in a CUDA graph: it runs on several devices"):
            qmoe_switch.generate(several, tokens, graph=True)


@pytest.fixture
def deep(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A packed checkpoint with five sparse layers."""
    source = make_checkpoint(
        ternary=True, num_layers=4, num_decoder_layers=3, num_sparse_decoder_layers=3, num_sparse_encoder_layers=2,
        num_experts=5, d_ff=48, expert_capacity=3, seed=1,
    )  # fmt: skip
    pack(source, tmp_path / "packed")
    return tmp_path / "packed"


@pytest.mark.parametrize("split", ["layers", "experts"])
@pytest.mark.parametrize("device", ["cuda:0,cpu", "cpu,cuda:0"])
def test_cpu_and_gpu_together(deep: Path, tokens_file: Path, device: str, split: str) -> None:
    check_spread(deep, tokens_file, device, split, "float32", same_rounding=False)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("split", ["layers", "experts"])
@pytest.mark.parametrize("device", ["cuda:0,cuda:1", "cuda:1,cuda:0,cuda:1"])
def test_several_gpus(deep: Path, tokens_file: Path, device: str, split: str, dtype: str) -> None:
    check_spread(deep, tokens_file, device, split, dtype)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_compressed_experts_are_where_they_belong(deep: Path) -> None:
    before = [torch.cuda.memory_allocated(i) for i in range(2)]
    with qmoe_switch.load(deep, device="cuda:0,cuda:1", split="experts") as model:
        layers = [part._experts for part in model.module.modules() if hasattr(part, "_experts")]
        assert [[(first, end, device.index) for first, end, device, _ in layer._parts] for layer in layers] == [
            [(0, 2, 0), (2, 5, 1)]
        ] * 5
        grown = [torch.cuda.memory_allocated(i) - before[i] for i in range(2)]
        assert grown[0] > 0 and grown[1] > 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_graph_on_a_device_that_is_not_the_current_one(deep: Path, tokens_file: Path) -> None:
    with qmoe_switch.load(deep, device="cuda:0") as first, qmoe_switch.load(deep, device="cuda:1") as second:
        assert torch.cuda.current_device() == 0
        prompts = qmoe_switch.read_tokens(tokens_file, first.vocabulary, labels=False)
        for graph in (True, False):
            rows = [
                [row.tolist() for row in qmoe_switch.generate(model, prompts, max_new_tokens=9, graph=graph).tokens]
                for model in (first, second, first)
            ]
            assert rows[0] == rows[1] == rows[2]
        assert torch.cuda.current_device() == 0


def test_experts_stay_compressed(make_checkpoint: MakeCheckpoint, tokens_file: Path, tmp_path: Path) -> None:
    """Neither loading nor running leaves decoded experts in GPU memory."""
    source = make_checkpoint(ternary=True, d_model=256, d_ff=512, num_experts=16)
    pack(source, tmp_path / "packed")
    held = 0
    # The first time torch takes memory from the same allocator that it keeps for good: cuBLAS's workspace, 32 MiB on Hopper,
    # where a process has multiplied nothing before. The second time all that is held is the model's.
    for _ in range(2):
        gc.collect()
        before = torch.cuda.memory_allocated()
        with qmoe_switch.load(tmp_path / "packed", device="cuda", dtype="bfloat16") as model:
            tokens = qmoe_switch.read_tokens(tokens_file, model.vocabulary, labels=True)
            qmoe_switch.evaluate(model, tokens)
            qmoe_switch.generate(model, tokens, max_new_tokens=5)
            gc.collect()
            parameters = sum(p.nbytes for p in {id(p): p for p in model.module.parameters()}.values())
            held = torch.cuda.memory_allocated() - before - parameters
        del model
    as_matrices = 2 * 2 * 16 * 256 * 512 * 2
    assert 0.03 * as_matrices < held < 0.25 * as_matrices


def test_dropped_tokens_are_those_of_the_cpu(make_checkpoint: MakeCheckpoint, tokens_file: Path, tmp_path: Path) -> None:
    source = make_checkpoint(ternary=True, expert_capacity=2, num_sparse_encoder_layers=2)
    pack(source, tmp_path / "packed")
    with (
        qmoe_switch.load(source, capacity="per_sequence") as dropping,
        qmoe_switch.load(source) as keeping,
        qmoe_switch.load(tmp_path / "packed", capacity="per_sequence", device="cuda") as ours,
    ):
        tokens = qmoe_switch.read_tokens(tokens_file, dropping.vocabulary, labels=True)
        got = qmoe_switch.logits(ours, tokens)
        assert distance(got, qmoe_switch.logits(dropping, tokens)) < 0.02 < distance(got, qmoe_switch.logits(keeping, tokens))


def test_dense_checkpoints_run_on_the_device(make_checkpoint: MakeCheckpoint, tokens_file: Path) -> None:
    source = make_checkpoint()
    with qmoe_switch.load(source) as cpu, qmoe_switch.load(source, device="cuda") as cuda:
        assert cuda.backend.name == "dense"
        tokens = qmoe_switch.read_tokens(tokens_file, cpu.vocabulary, labels=True)
        torch.testing.assert_close(qmoe_switch.logits(cuda, tokens).cpu(), qmoe_switch.logits(cpu, tokens), rtol=1e-3, atol=1e-3)


def test_experts_that_are_not_all_compressed_are_refused(plain: Path) -> None:
    with pytest.raises(BackendError, match="are not all compressed in one group"):
        qmoe_switch.load(plain, device="cuda", backend="cuda")
    with pytest.raises(BackendError, match="the backend cpu does not run on cuda"):
        qmoe_switch.load(plain, device="cuda", backend="cpu")


def test_damaged_experts_are_refused_by_loading(plain: Path, tmp_path: Path) -> None:
    """On the device every expert is checked before one runs, not when a token comes to it."""
    from qmoecodec.container import open as open_packed

    pack(plain, tmp_path / "packed")
    with open_packed(tmp_path / "packed") as file:
        codes = file.groups["encoder.block.1.layer.1.mlp.experts.wi"].encoded().codes.tobytes()
    path = tmp_path / "packed" / "model.safetensors"
    data = bytearray(path.read_bytes())
    assert data.count(codes) == 1
    data[data.index(codes) + len(codes) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match="checksum"):
        qmoe_switch.load(tmp_path / "packed", device="cuda")


def test_example_twin(tmp_path: Path) -> None:
    """The example with ternary experts: the loss of its dense twin, and the tokens."""
    twin = tmp_path / "twin"
    shutil.copytree(EXAMPLES / "switch-pycode-4e", twin)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_ternary.py", str(twin / "model.safetensors")])
        runpy.run_path(str(EXAMPLES / "make_ternary.py"))
    pack(twin, tmp_path / "packed")
    with (
        qmoe_switch.load(twin, device="cuda") as dense,
        qmoe_switch.load(tmp_path / "packed", device="cuda") as ours,
    ):
        tokens = qmoe_switch.read_tokens(twin / "validation.npz", dense.vocabulary, labels=True)
        assert qmoe_switch.evaluate(dense, tokens, batch_size=64).loss == pytest.approx(3.5375, abs=1e-3)
        assert qmoe_switch.evaluate(ours, tokens, batch_size=64).loss == pytest.approx(3.5375, abs=3e-3)
        some = tokens.slice(0, 16)
        got, expected = qmoe_switch.logits(ours, some), qmoe_switch.logits(dense, some)
        assert distance(got, expected) < 0.01
        generated = [qmoe_switch.generate(model, some, max_new_tokens=20) for model in (ours, dense)]
        assert check_same_tokens((ours, dense), generated, some) >= 12
