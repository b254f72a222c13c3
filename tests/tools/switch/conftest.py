"""Small Switch checkpoints, made by transformers itself, and the twin of one with ternary experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

try:
    import torch
    import transformers
except ImportError:
    collect_ignore_glob = ["test_*.py"]
else:
    torch.set_num_threads(1)  # small models: more threads only wait for each other

EXAMPLE = Path(__file__).parents[3] / "examples" / "switch-pycode-4e"

SMALL: dict[str, Any] = {
    "vocab_size": 50, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_sparse_encoder_layers": 1,
    "num_decoder_layers": 2, "num_sparse_decoder_layers": 1, "num_heads": 3, "num_experts": 3, "expert_capacity": 64,
    "dropout_rate": 0.0, "decoder_start_token_id": 0,
}  # fmt: skip

MakeCheckpoint = Callable[..., Path]


def ternarize(model: Any, seed: int) -> None:
    """Give every expert matrix rows of 0, a low and a high level, the levels exact in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            rows, cols = parameter.shape
            kind = torch.multinomial(torch.tensor([0.8, 0.1, 0.1]), rows * cols, True, generator=generator)
            levels = (0.1 + torch.rand(rows, 2, generator=generator)).bfloat16().float() * torch.tensor([-1.0, 1.0])
            table = torch.cat([torch.zeros(rows, 1), levels], dim=1)
            parameter.data = table.gather(1, kind.reshape(rows, cols))


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """Return a function that writes a checkpoint directory and returns its path."""

    def make(*, ternary: bool = False, dtype: Any = torch.bfloat16, seed: int = 0, shard: str = "1GB", **changes: Any) -> Path:
        config = transformers.SwitchTransformersConfig(**{**SMALL, **changes})
        torch.manual_seed(seed)
        model = transformers.SwitchTransformersForConditionalGeneration(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Small embeddings, so that what the blocks add decides, and not the token that went in.
                scale = 0.05 if "shared" in name or "embed" in name else 0.3
                parameter.copy_(parameter * scale if "layer_norm" not in name else 1 + 0.1 * torch.randn_like(parameter))
        if ternary:
            ternarize(model, seed)
        path = tmp_path_factory.mktemp("checkpoint")
        model.to(dtype).save_pretrained(path, max_shard_size=shard)
        return path

    return make


@pytest.fixture(scope="session")
def plain(make_checkpoint: MakeCheckpoint) -> Path:
    """A checkpoint with ternary experts as transformers writes it."""
    return make_checkpoint(ternary=True)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def write_tokens(path: Path, rng: np.random.Generator, *, n: int = 3, length: int = 11, vocabulary: int = 50) -> Path:
    """Write a token file with padding in it."""
    inputs = rng.integers(2, vocabulary, (n, length))
    inputs[0, -3:] = 0
    labels = rng.integers(2, vocabulary, (n, 7))
    labels[0, -2:] = -100
    labels[1, -1:] = 0
    np.savez(path, input_ids=inputs.astype(np.int16), labels=labels.astype(np.int16))
    return path


@pytest.fixture
def tokens_file(tmp_path: Path, rng: np.random.Generator) -> Path:
    return write_tokens(tmp_path / "tokens.npz", rng)


def reference_model(path: Path, **changes: Any) -> Any:
    """Load a plain checkpoint with transformers, computed in float32."""
    config = transformers.SwitchTransformersConfig.from_pretrained(path)
    for key, value in changes.items():
        setattr(config, key, value)
    model = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(path, config=config, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="session")
def reference() -> Callable[..., Any]:
    return reference_model


class Uploaded:
    """What the cuda backend would hold: here the decoded matrices."""

    def __init__(self, encoded: Any, levels: Any, *, dtype: str, device: Any) -> None:
        from qmoecodec import decode
        from qmoecodec.container.ternary import to_float

        digits, values = decode(encoded), to_float(levels, dtype=dtype, to=np.float32)
        dense = np.where(digits < 0, values[:, :, :1], np.where(digits > 0, values[:, :, 1:], 0)).astype(np.float32)
        self.matrices = torch.from_numpy(dense).to(device)


def grouped_matvec(x: Any, expert: Any, stack: Uploaded) -> Any:
    assert x.dtype in (torch.bfloat16, torch.float16)
    y = torch.einsum("nrc,nc->nr", stack.matrices[expert.clamp(min=0)], x.float())
    return torch.where(expert[:, None] < 0, 0, y).to(x.dtype)


def moe_mlp(x: Any, expert: Any, wi: Uploaded, wo: Uploaded) -> Any:
    return grouped_matvec(torch.relu(grouped_matvec(x, expert, wi)), expert, wo)


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function after which every backend is `CudaBackend`, with a stand-in for what runs on the device."""
    from qmoe_switch.backends import CudaBackend

    ops = SimpleNamespace(grouped_matvec=grouped_matvec, moe_mlp=moe_mlp)
    offered = SimpleNamespace(experts=SimpleNamespace(load=Uploaded), ops=ops)
    make = lambda *_, device, threads: CudaBackend(offered, device)  # noqa: E731
    return lambda: monkeypatch.setattr("qmoe_switch.model.make_backend", make)
