"""The forward pass gives what transformers gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qmoe_gptq import model as net
from qmoe_gptq.checkpoint import Checkpoint
from qmoe_gptq.errors import QuantizeError


def test_logits_equal_transformers(model_dir: Path, samples: Callable[..., Any]) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(model_dir, dtype=torch.float32).eval()
    data = samples(5)
    ids, decoder_ids = torch.from_numpy(data["input_ids"]), torch.from_numpy(data["decoder_input_ids"])
    with torch.no_grad():
        expected = reference(input_ids=ids, decoder_input_ids=decoder_ids).logits
        checkpoint = Checkpoint(model_dir)
        got = net.forward(checkpoint.config, checkpoint.load(checkpoint.names), ids, decoder_ids)
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_padding_does_not_change_a_sample(model_dir: Path, samples: Callable[..., Any]) -> None:
    checkpoint = Checkpoint(model_dir)
    weights = checkpoint.load(checkpoint.names)
    data = samples(2)
    ids, decoder_ids = torch.from_numpy(data["input_ids"]), torch.from_numpy(data["decoder_input_ids"])
    padded = torch.nn.functional.pad(ids, (0, 7))
    keep = torch.ones_like(padded, dtype=torch.bool)
    keep[:, ids.shape[1] :] = False
    with torch.no_grad():
        alone = net.forward(checkpoint.config, weights, ids, decoder_ids)
        masked = net.forward(checkpoint.config, weights, padded, decoder_ids, keep=keep)
        ignored = net.forward(checkpoint.config, weights, padded, decoder_ids)
    torch.testing.assert_close(masked, alone, rtol=1e-4, atol=1e-4)
    assert (ignored - alone).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "t5"}, "model_type"),
        ({"dense_act_fn": "tanh"}, "dense_act_fn"),
        ({"is_gated_act": True}, "gated"),
        ({"d_ff": 41}, "d_ff|shape"),
        ({"num_experts": 5}, "missing|shape"),
    ],
)
def test_config_that_does_not_fit_is_refused(make_model: Callable[..., Path], change: dict[str, Any], message: str) -> None:
    directory = make_model(changes=change)
    with pytest.raises(QuantizeError, match=message):
        Checkpoint(directory)


def test_shards_and_single_file_hold_the_same(make_model: Callable[..., Path]) -> None:
    one = Checkpoint(make_model("one"))
    many = Checkpoint(make_model("many", shards=3))
    assert one.names == many.names
    a, b = one.load(one.names), many.load(many.names)
    assert all(torch.equal(a[name], b[name]) for name in one.names)
    assert len(set(many.files.values())) == 3


def test_missing_shard_is_named(make_model: Callable[..., Path]) -> None:
    directory = make_model(shards=3)
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(QuantizeError, match="model-00002-of-00003"):
        Checkpoint(directory)


def test_truncated_shard_is_named(make_model: Callable[..., Path]) -> None:
    directory = make_model()
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(QuantizeError, match=r"model\.safetensors"):
        Checkpoint(directory)


def test_nan_weight_is_named(make_model: Callable[..., Path]) -> None:
    name = "decoder.block.1.layer.2.mlp.experts.expert_2.wo.weight"

    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights[name][3, 5] = float("nan")

    checkpoint = Checkpoint(make_model(edit=spoil))
    with pytest.raises(QuantizeError, match=r"expert_2\.wo"):
        checkpoint.load([name])


def test_fingerprint_sees_one_changed_weight(make_model: Callable[..., Path]) -> None:
    def nudge(weights: dict[str, torch.Tensor]) -> None:
        weights["shared.weight"][7, 7] += 1

    before = Checkpoint(make_model("a")).fingerprint()
    assert before == Checkpoint(make_model("b")).fingerprint()
    assert before != Checkpoint(make_model("c", edit=nudge)).fingerprint()


def test_relative_bias_reaches_as_far_as_it_should() -> None:
    table = torch.arange(8.0)[:, None]
    bias = net.relative_bias(table, 40, 40, bidirectional=True, buckets=8, max_distance=32)[0, 0]
    assert torch.equal(bias.diagonal(), torch.zeros(40))
    # Ahead and behind use different halves of the table, and distance is monotone in each.
    assert bool((bias[0, 1:].diff() >= 0).all()) and bias[0, 1:].min() >= 4
    assert bool((bias[-1].flip(0).diff() >= 0).all()) and bias[-1].max() < 4
    assert np.isclose(float(bias[0, -1]), 7.0)
