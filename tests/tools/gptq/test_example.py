"""The bars on the trained example model: minutes each, so run with `-m long`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qmoe_gptq import model as net
from qmoe_gptq.checkpoint import Checkpoint
from qmoe_gptq.run import Options, prepare, quantize_checkpoint
from qmoe_gptq.settings import Settings

EXAMPLE = Path(__file__).parents[3] / "examples" / "switch-pycode-4e"
pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]

REFERENCE_ENTROPY = 0.844


@torch.no_grad()
def validation_loss(directory: Path) -> float:
    """Compute the mean cross-entropy per label token over the whole validation set."""
    checkpoint = Checkpoint(directory)
    weights = checkpoint.load(checkpoint.names)
    with np.load(EXAMPLE / "validation.npz") as data:
        arrays = [torch.from_numpy(data[n].astype(np.int64)) for n in ("input_ids", "decoder_input_ids", "labels")]
    total = 0.0
    for ids, decoder_ids, labels in zip(*(a.split(32) for a in arrays), strict=True):
        given = net.forward(checkpoint.config, weights, ids, decoder_ids)
        total += float(F.cross_entropy(given.flatten(0, 1), labels.flatten(), reduction="sum"))
    return total / arrays[2].numel()


def quantize(out: Path, **changes: Any) -> dict[str, Any]:
    """Run on all calibration samples."""
    settings, options = Settings(**changes), Options(packed=False)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        checkpoint, data, plan = prepare(EXAMPLE, EXAMPLE / "calibration.npz", samples=None, settings=settings, options=options)
        return quantize_checkpoint(checkpoint, data, plan, out, settings=settings, options=options, progress=lambda m: None)
    finally:
        torch.set_num_threads(threads)


def test_original() -> None:
    assert validation_loss(EXAMPLE) == pytest.approx(3.357, abs=0.002)


@pytest.mark.parametrize(("method", "loss"), [("rtn", 4.142), ("gptq-2023", 3.538)])
def test_references(tmp_path: Path, method: str, loss: float) -> None:
    quantize(tmp_path / "out", method=method)
    assert validation_loss(tmp_path / "out") == pytest.approx(loss, abs=0.01)


def test_default_closes_half_the_gap_at_no_more_bits(tmp_path: Path) -> None:
    report = quantize(tmp_path / "out")
    assert report["tune"] == "model"
    assert report["entropy_bits_per_weight"] <= REFERENCE_ENTROPY
    assert validation_loss(tmp_path / "out") <= 3.447


@pytest.mark.parametrize("bits", [0.3, 1.58])
def test_ends_of_the_rate_range(tmp_path: Path, bits: float) -> None:
    report = quantize(tmp_path / "out", target_bits=bits, epochs=1)
    assert report["payload_bits_per_weight"] == pytest.approx(bits, rel=0.02)
