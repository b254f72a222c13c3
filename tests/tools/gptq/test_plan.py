"""Estimates move the way the need does, and decide how to tune."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qmoe_gptq import plan as planning
from qmoe_gptq.calibration import load_tokens
from qmoe_gptq.checkpoint import Checkpoint
from qmoe_gptq.run import _settle_run
from qmoe_gptq.settings import Settings


@pytest.fixture
def inputs(model_dir: Path, tokens: Path) -> tuple[Checkpoint, object]:
    """Open the small model and its data."""
    checkpoint = Checkpoint(model_dir)
    return checkpoint, load_tokens(tokens, config=checkpoint.config, model_dir=model_dir)


def test_auto_tunes_block_by_block_when_the_model_does_not_fit(inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, data = inputs
    need = planning.tune_memory(checkpoint, data, Settings())
    monkeypatch.setattr(planning, "available_memory", lambda device: int(need / planning.MEMORY_SHARE * 1.1))
    assert planning.resolve_tune(checkpoint, data, Settings()) == "model"
    monkeypatch.setattr(planning, "available_memory", lambda device: int(need / planning.MEMORY_SHARE * 0.9))
    assert planning.resolve_tune(checkpoint, data, Settings()) == "block"
    assert planning.resolve_tune(checkpoint, data, Settings(tune="model")) == "model"
    assert planning.resolve_tune(checkpoint, data, Settings(method="gptq-2023")) == "none"


def test_memory_follows_what_is_held(inputs: Any) -> None:
    checkpoint, data = inputs

    def need(*, block: bool = False, offload: bool = False, **changes: int) -> float:
        return planning.walk_memory(checkpoint, data, Settings(**changes), block=block, offload=offload)

    base = planning.process_bytes()
    assert need(group=1) < need(group=4)
    assert need(group=4) == pytest.approx(need(group=400), rel=0.01)
    held = planning.activation_bytes(checkpoint, data, block=False)
    assert held == (48 * 24 + 48 * 10) * 24 * 4
    assert need() - need(offload=True) == pytest.approx(held, abs=0.05 * base)
    assert need(block=True) > need()


def test_time_follows_the_work(inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, data = inputs
    monkeypatch.setattr(planning, "product_speed", lambda device: 1e11)

    def total(tune: str, **changes: object) -> float:
        return sum(planning.estimate_seconds(checkpoint, data, Settings(**changes), tune).values())

    assert total("none", method="rtn") < total("none", method="gptq-2023") < total("none") < total("block")
    assert total("model", epochs=2) < total("model", epochs=8)


def test_a_resumed_run_keeps_the_first_choice(inputs: Any, tmp_path: Path) -> None:
    checkpoint, data = inputs
    work = tmp_path / "w"
    first = planning.Plan("model", 0, 0, {})
    second = planning.Plan("block", 0, 0, {})
    settings = Settings()
    chosen = _settle_run(work, checkpoint, data, first, settings, resume=True)
    assert chosen[0] == "model"
    assert _settle_run(work, checkpoint, data, second, settings, resume=True) == chosen
    other = _settle_run(work, checkpoint, data, second, Settings(seed=1), resume=True)
    assert other[0] == "block" and other[1] != chosen[1]
