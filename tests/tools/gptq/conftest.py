"""A small random Switch Transformer and calibration data that fit it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from safetensors.torch import save_file  # noqa: E402

from qmoe_gptq import run as module  # noqa: E402

# The models here are so small that a second thread only waits for the first.
torch.set_num_threads(1)

REAL_CHECK_FIT = module.check_fit
CONFIG: dict[str, Any] = {
    "model_type": "switch_transformers",
    "architectures": ["SwitchTransformersForConditionalGeneration"],
    "d_model": 24,
    "d_kv": 8,
    "d_ff": 40,
    "num_heads": 2,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
    "encoder_sparse_step": 2,
    "decoder_sparse_step": 2,
    "num_experts": 4,
    "expert_capacity": 1024,
    "vocab_size": 96,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 32,
    "layer_norm_epsilon": 1e-6,
    "dense_act_fn": "relu",
    "dropout_rate": 0.0,
    "tie_word_embeddings": True,
    "is_encoder_decoder": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
SENTINELS = np.arange(80, 96)


def random_weights(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Draw bf16 weights of the scale a trained model has."""
    g = torch.Generator().manual_seed(seed)
    d, ff, inner = config["d_model"], config["d_ff"], config["num_heads"] * config["d_kv"]

    def draw(*shape: int, scale: float) -> torch.Tensor:
        return (torch.randn(*shape, generator=g) * scale).bfloat16()

    out = {"shared.weight": draw(config["vocab_size"], d, scale=1.0)}
    for stack, blocks in (("encoder", config["num_layers"]), ("decoder", config["num_decoder_layers"])):
        kinds = ["SelfAttention"] + (["EncDecAttention"] if stack == "decoder" else [])
        for b in range(blocks):
            for i, kind in enumerate(kinds):
                base = f"{stack}.block.{b}.layer.{i}."
                out[f"{base}layer_norm.weight"] = torch.ones(d).bfloat16()
                for letter in "qkv":
                    out[f"{base}{kind}.{letter}.weight"] = draw(inner, d, scale=d**-0.5)
                out[f"{base}{kind}.o.weight"] = draw(d, inner, scale=inner**-0.5)
            table = f"{stack}.block.{b}.layer.0.SelfAttention.relative_attention_bias.weight"
            if b == 0:
                out[table] = draw(config["relative_attention_num_buckets"], config["num_heads"], scale=0.5)
            base = f"{stack}.block.{b}.layer.{len(kinds)}."
            out[f"{base}layer_norm.weight"] = torch.ones(d).bfloat16()
            names = ["mlp."]
            if b % 2 == 1:
                out[f"{base}mlp.router.classifier.weight"] = draw(config["num_experts"], d, scale=1.0).float()
                names = [f"mlp.experts.expert_{e}." for e in range(config["num_experts"])]
            for name in names:
                out[f"{base}{name}wi.weight"] = draw(ff, d, scale=d**-0.5)
                out[f"{base}{name}wo.weight"] = draw(d, ff, scale=ff**-0.5)
        out[f"{stack}.final_layer_norm.weight"] = torch.ones(d).bfloat16()
    return out


def write_checkpoint(directory: Path, weights: dict[str, torch.Tensor], config: dict[str, Any], *, shards: int = 1) -> Path:
    """Write a checkpoint directory, as one file or as shards with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    added = [{"id": int(s), "content": f"<extra_id_{i}>"} for i, s in enumerate(SENTINELS)]
    (directory / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    names = sorted(weights)
    if shards == 1:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in names[i::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def make_samples(count: int, *, source: int = 24, seed: int = 0) -> dict[str, np.ndarray]:
    """Make span-corruption samples of random text (3 spans of 2 tokens)."""
    from qmoe_gptq.calibration import corrupt

    rng = np.random.default_rng(seed)
    inputs, labels = [], []
    for _ in range(count):
        text = rng.integers(3, 80, source - 1 + 6 - 3).tolist()
        a, b = corrupt(text, spans=3, dropped=6, sentinels=SENTINELS, rng=rng)
        inputs.append([*a, 1])
        labels.append(b)
    label_array = np.array(labels)
    decoder = np.zeros_like(label_array)
    decoder[:, 1:] = label_array[:, :-1]
    return {"input_ids": np.array(inputs), "decoder_input_ids": decoder, "labels": label_array}


@pytest.fixture
def check_fit() -> Callable[..., None]:
    """The check that the model knows the data, for the tests that want it."""
    return REAL_CHECK_FIT


@pytest.fixture(autouse=True)
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a random model be quantized although it predicts no better than chance."""
    monkeypatch.setattr(module, "check_fit", lambda *arguments: None)


@pytest.fixture
def samples() -> Callable[..., dict[str, np.ndarray]]:
    """Make calibration arrays."""
    return make_samples


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """Write a checkpoint.

    changes : what its config says, its weights notwithstanding
    sizes : config entries that its weights follow
    edit : called with its weights before they are written
    """

    def call(
        name: str = "model",
        *,
        changes: dict[str, Any] | None = None,
        sizes: dict[str, Any] | None = None,
        shards: int = 1,
        edit: Callable[[dict[str, torch.Tensor]], None] | None = None,
        seed: int = 1,
    ) -> Path:
        config = {**CONFIG, **(sizes or {})}
        weights = random_weights(config, seed)
        if edit:
            edit(weights)
        return write_checkpoint(tmp_path / name, weights, {**config, **(changes or {})}, shards=shards)

    return call


@pytest.fixture
def model_dir(make_model: Callable[..., Path]) -> Path:
    """A checkpoint directory."""
    return make_model()


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """A calibration file of 48 samples."""
    path = tmp_path / "tokens.npz"
    np.savez(path, **make_samples(48))
    return path


@pytest.fixture
def run(model_dir: Path, tokens: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run the quantizer on the small model, dense output; returns the report."""
    from qmoe_gptq.run import Options, prepare, quantize_checkpoint
    from qmoe_gptq.settings import Settings

    def call(name: str = "out", *, source: Path = model_dir, data: Path = tokens, **changes: Any) -> dict[str, Any]:
        options = {k: changes.pop(k) for k in ("resume", "max_fallback", "offload", "keep_work", "packed") if k in changes}
        options = Options(**{"packed": False, **options})
        settings = Settings(**{"tune": "none", "group": 2, "epochs": 2, "batch": 8, **changes})
        checkpoint, calibration, plan = prepare(source, data, samples=None, settings=settings, options=options)
        return quantize_checkpoint(
            checkpoint, calibration, plan, tmp_path / name,
            settings=settings, options=options, progress=lambda message: None,
        )  # fmt: skip

    return call
