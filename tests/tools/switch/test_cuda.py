"""The runtime with its experts in GPU memory, against the dense model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import qmoe_switch  # noqa: E402
from qmoecodec.container import pack  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_logits_are_those_of_the_dense_model(
    make_checkpoint: Callable[..., Path], tokens_file: Path, tmp_path: Path, act: str
) -> None:
    source = make_checkpoint(ternary=True, d_model=64, d_ff=96, dense_act_fn=act)
    pack(source, tmp_path / "packed")
    with qmoe_switch.load(source) as dense, qmoe_switch.load(tmp_path / "packed", device="cuda") as packed:
        assert packed.backend.name == "cuda"
        tokens = qmoe_switch.read_tokens(tokens_file, dense.vocabulary, labels=True)
        expected, got = qmoe_switch.logits(dense, tokens), qmoe_switch.logits(packed, tokens).cpu()
        assert float((got - expected).norm() / expected.norm()) < 0.02
        loss = qmoe_switch.evaluate(dense, tokens).loss
        assert qmoe_switch.evaluate(packed, tokens).loss == pytest.approx(loss, abs=0.01)
        assert qmoe_switch.generate(packed, tokens, max_new_tokens=8).n_tokens >= 3


def test_dense_checkpoints_run_on_the_device(make_checkpoint: Callable[..., Path], tokens_file: Path) -> None:
    source = make_checkpoint()
    with qmoe_switch.load(source) as cpu, qmoe_switch.load(source, device="cuda") as cuda:
        assert cuda.backend.name == "dense"
        tokens = qmoe_switch.read_tokens(tokens_file, cpu.vocabulary, labels=True)
        torch.testing.assert_close(qmoe_switch.logits(cuda, tokens).cpu(), qmoe_switch.logits(cpu, tokens), rtol=1e-3, atol=1e-3)
