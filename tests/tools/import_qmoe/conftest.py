"""A small checkpoint in the layout of 2023, written here by plain loops that share no code with the importer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qmoecodec.dictionary import qmoe2023

try:
    import torch
except ImportError:
    collect_ignore_glob = ["test_*.py"]

CONFIG: dict[str, Any] = {
    "model_type": "switch_transformers", "vocab_size": 40, "d_model": 24, "d_kv": 4, "d_ff": 41, "num_heads": 2,
    "num_layers": 4, "num_decoder_layers": 2, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 1,
    "num_experts": 3, "decoder_start_token_id": 0, "tie_word_embeddings": True, "dropout_rate": 0.0,
    "expert_capacity": 64, "architectures": ["SwitchTransformersForConditionalGeneration"],
}  # fmt: skip
PREFIXES = tuple(
    f"{place}.mlp.experts" for place in ("encoder.block.1.layer.1", "encoder.block.3.layer.1", "decoder.block.1.layer.2")
)


@dataclass
class Checkpoint:
    """Where it was written, and the tensors it stands for (experts dense, in bfloat16)."""

    path: Path
    tensors: dict[str, Any]
    streams: dict[str, bytes]

    def edit(self, file: str, change: Callable[[dict[str, Any]], Any]) -> None:
        """Load one file, change it and save it."""
        content = torch.load(self.path / file, weights_only=True)
        change(content)
        torch.save(content, self.path / file)


def greedy(digits: list[int], phrases: dict[bytes, int]) -> list[int]:
    """Parse a row into codewords, the longest phrase first, as the published packer does."""
    data = bytes(digits) + b"\x00" * (len(digits) % 2)
    codewords, at = [], 0
    while at < len(data):
        n = next(n for n in range(min(28, len(data) - at), 0, -1) if data[at : at + n] in phrases)
        codewords.append(phrases[data[at : at + n]])
        at += n
    return codewords


def dense_tensors() -> dict[str, Any]:
    """Return random tensors of everything that is no expert."""
    c, inner = CONFIG, CONFIG["d_kv"] * CONFIG["num_heads"]
    shapes: dict[str, tuple[int, ...]] = {"shared.weight": (c["vocab_size"], c["d_model"])}
    for stack, blocks, kinds in (("encoder", 4, ["SelfAttention"]), ("decoder", 2, ["SelfAttention", "EncDecAttention"])):
        shapes[f"{stack}.final_layer_norm.weight"] = (c["d_model"],)
        shapes[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, c["num_heads"])
        for i in range(blocks):
            for k, kind in enumerate(kinds):
                for letter in "qkv":
                    shapes[f"{stack}.block.{i}.layer.{k}.{kind}.{letter}.weight"] = (inner, c["d_model"])
                shapes[f"{stack}.block.{i}.layer.{k}.{kind}.o.weight"] = (c["d_model"], inner)
                shapes[f"{stack}.block.{i}.layer.{k}.layer_norm.weight"] = (c["d_model"],)
            ff = f"{stack}.block.{i}.layer.{len(kinds)}"
            shapes[f"{ff}.layer_norm.weight"] = (c["d_model"],)
            if i % 2:
                shapes[f"{ff}.mlp.router.classifier.weight"] = (c["num_experts"], c["d_model"])
            else:
                shapes[f"{ff}.mlp.wi.weight"] = (c["d_ff"], c["d_model"])
                shapes[f"{ff}.mlp.wo.weight"] = (c["d_model"], c["d_ff"])
    generator = torch.Generator().manual_seed(5)
    return {name: (0.2 * torch.randn(shape, generator=generator)).bfloat16() for name, shape in shapes.items()}


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Write the checkpoint once; tests that change it take a copy (fixture `published`)."""
    path = tmp_path_factory.mktemp("published")
    table = qmoe2023.table()
    phrases = {bytes(table.phrase(0, c)): c for c in range(1 << 16)}
    (path / "config.json").write_text(json.dumps(CONFIG))
    tensors = dense_tensors()
    torch.save(tensors, path / "noexp.pt")
    rng = np.random.default_rng(11)
    sizes: dict[str, int] = {}
    streams: dict[str, bytes] = {}
    tensors = dict(tensors)
    for layer, prefix in enumerate(PREFIXES):
        content: dict[str, Any] = {}
        for expert in range(CONFIG["num_experts"]):
            for projection, rows, cols in (("wi", CONFIG["d_ff"], CONFIG["d_model"]), ("wo", CONFIG["d_model"], CONFIG["d_ff"])):
                name = f"{prefix}.expert_{expert}.{projection}"
                digits = rng.choice(3, (rows, cols), p=[0.8, 0.1, 0.1])
                digits[0] = 0
                levels = torch.tensor(rng.uniform(0.1, 0.4, (rows, 2)) * [-1, 1]).bfloat16()
                levels[0] = 0
                codewords = [greedy(row.tolist(), phrases) for row in digits]
                flat = np.array([c for row in codewords for c in row], "<u2")
                content[f"{name}.w_comp"] = torch.from_numpy(flat.view(np.int16))
                offsets = np.concatenate([[0], np.cumsum([len(row) for row in codewords])])
                content[f"{name}.row_off"] = torch.from_numpy(offsets.astype(np.int32))
                content[f"{name}.ter_minmax"] = levels.reshape(-1)
                content[f"{name}.weight"] = torch.empty(0, dtype=torch.bfloat16)
                sizes[name], streams[name] = len(flat), flat.tobytes()
                table_of_row = torch.cat([torch.zeros(rows, 1, dtype=torch.bfloat16), levels], dim=1)
                tensors[f"{name}.weight"] = table_of_row.gather(1, torch.from_numpy(digits))
        torch.save(content, path / f"exp{layer:02d}.pt")
    torch.save(sizes, path / "sizes.pt")
    return Checkpoint(path, tensors, streams)


@pytest.fixture
def published(written: Checkpoint, tmp_path: Path) -> Checkpoint:
    import shutil

    path = tmp_path / "published"
    shutil.copytree(written.path, path)
    return Checkpoint(path, written.tensors, written.streams)
