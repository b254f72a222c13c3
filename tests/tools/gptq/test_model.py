"""The forward pass gives what transformers gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

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


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": False},
        {"d_model": 13, "d_ff": 29, "d_kv": 5, "num_heads": 3, "num_experts": 5},
        {"num_layers": 1, "num_decoder_layers": 4, "num_sparse_decoder_layers": 2, "encoder_sparse_step": 0},
        {"num_layers": 3, "num_sparse_encoder_layers": 3, "decoder_sparse_step": 0, "router_bias": True},
        {"dense_act_fn": "gelu_new", "router_dtype": "bfloat16", "layer_norm_epsilon": 1e-2},
        {"dense_act_fn": "swish", "relative_attention_num_buckets": 7, "relative_attention_max_distance": 5},
    ],
)
def test_other_models_of_transformers_give_their_logits(tmp_path: Path, changes: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_sparse_encoder_layers": 1,
             "num_decoder_layers": 2, "num_sparse_decoder_layers": 1, "num_heads": 3, "num_experts": 3,
             "dropout_rate": 0.0, "decoder_start_token_id": 0}  # fmt: skip
    torch.manual_seed(0)
    model = transformers.SwitchTransformersForConditionalGeneration(transformers.SwitchTransformersConfig(**{**sizes, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" not in name:
                parameter.copy_(torch.randn_like(parameter) * (1.0 if "router" in name else 0.3))
    model.eval().save_pretrained(tmp_path)
    ids, decoder_ids = torch.randint(2, 50, (3, 11)), torch.randint(2, 50, (3, 7))
    checkpoint = Checkpoint(tmp_path)
    with torch.no_grad():
        expected = model(input_ids=ids, decoder_input_ids=decoder_ids).logits
        got = net.forward(checkpoint.config, checkpoint.load(checkpoint.names), ids, decoder_ids)
    assert expected.std() > 0.05
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
        ({"d_model": "24"}, r"config\.json: d_model is '24'"),
        ({"num_heads": 2.0}, r"num_heads is 2\.0"),
        ({"num_experts": None}, "num_experts is None"),
        ({"num_decoder_layers": 0}, "num_decoder_layers is 0"),
        ({"num_layers": 10**9}, "is missing, config.json asks for 1000000000 blocks"),
        ({"layer_norm_epsilon": "x"}, "layer_norm_epsilon is 'x'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
        ({"pad_token_id": 96}, "pad_token_id is 96, not a token"),
        ({"decoder_start_token_id": [0]}, r"decoder_start_token_id is \[0\]"),
        ({"eos_token_id": "end"}, "eos_token_id is 'end'"),
        ({"router_dtype": "float8"}, "router_dtype 'float8'"),
        ({"relative_attention_num_buckets": 3}, "do not go together"),
        ({"relative_attention_max_distance": 4}, "do not go together"),
        ({"encoder_sparse_step": 1}, "encoder block 0 has no experts"),
        ({"decoder_sparse_step": 0}, "decoder block 1 has experts"),
        ({"num_layers": 1, "encoder_sparse_step": 2}, "has no place in the model|no sparse"),
        ({"router_bias": True}, r"router\.classifier\.bias is missing"),
        ({"tie_word_embeddings": False}, r"lm_head\.weight is missing"),
        ({"d_ff": 41}, "d_ff|shape"),
        ({"num_experts": 5}, "missing|shape"),
    ],
)
def test_config_that_does_not_fit_is_refused(make_model: Callable[..., Path], change: dict[str, Any], message: str) -> None:
    directory = make_model(changes=change)
    with pytest.raises(QuantizeError, match=message):
        Checkpoint(directory)


EXPERT = "encoder.block.1.layer.1.mlp.experts.expert_0.wi.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.update({"extra.weight": torch.ones(2)}), r"tensor extra\.weight has no place"),
        (lambda w: w.update({EXPERT.replace("_0", "_9"): w[EXPERT].clone()}), r"expert_9\.wi\.weight has no place"),
        (lambda w: w.update({"lm_head.weight": 2 * w["shared.weight"]}), r"lm_head\.weight differs from shared"),
        (lambda w: w.update({"encoder.embed_tokens.weight": 2 * w["shared.weight"]}), r"embed_tokens\.weight differs"),
        (lambda w: w.update({EXPERT: w[EXPERT].to(torch.float8_e4m3fn)}), "dtype F8_E4M3"),
        (lambda w: w.update({"shared.weight": w["shared.weight"].int()}), "dtype I32"),
    ],
)
def test_tensors_of_another_model_are_refused(make_model: Callable[..., Path], edit: Any, message: str) -> None:
    with pytest.raises(QuantizeError, match=message):
        Checkpoint(make_model(edit=edit))


def test_copies_of_the_embedding_are_accepted(make_model: Callable[..., Path]) -> None:
    Checkpoint(make_model(edit=lambda w: w.update({"lm_head.weight": w["shared.weight"].clone()})))


def test_several_end_tokens_are_accepted(make_model: Callable[..., Path]) -> None:
    assert Checkpoint(make_model(changes={"eos_token_id": [1, 7]})).config.eos_id == 1


def test_directories_that_hold_something_else_say_what(make_model: Callable[..., Path]) -> None:
    directory = make_model(shards=2)
    weights = {name: tensor for file in sorted(directory.glob("model-*")) for name, tensor in load_file(file).items()}
    save_file(weights, directory / "model.safetensors", metadata={"qmoecodec": "1.0"})
    with pytest.raises(QuantizeError, match=r"holds both model\.safetensors and .*which of them counts"):
        Checkpoint(directory)
    (directory / "model.safetensors.index.json").unlink()
    with pytest.raises(QuantizeError, match="packed already"):
        Checkpoint(directory)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(QuantizeError, match=r"only pytorch_model\.bin: save it again"):
        Checkpoint(directory)


def test_levels_have_the_coarsest_dtype_of_the_experts(make_model: Callable[..., Path]) -> None:
    def mix(weights: dict[str, torch.Tensor]) -> None:
        for name in weights:
            if ".experts." in name:
                weights[name] = weights[name].to(torch.float32 if ".wi." in name else torch.float16)

    assert Checkpoint(make_model()).level_dtype == torch.bfloat16
    assert Checkpoint(make_model(edit=mix)).level_dtype == torch.float16


def test_weights_too_large_to_compute_with_are_named(make_model: Callable[..., Path]) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights[EXPERT][3, 5] = 1e20

    checkpoint = Checkpoint(make_model(edit=spoil))
    with pytest.raises(QuantizeError, match=r"expert_0\.wi\.weight holds weights beyond 1e\+15"):
        checkpoint.load_experts(checkpoint.layers[0], range(4), "wi")


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


def test_a_shard_with_more_than_the_index_says_is_refused(make_model: Callable[..., Path]) -> None:
    directory = make_model(shards=3)
    file = directory / "model-00002-of-00003.safetensors"
    save_file({**load_file(file), "stray": torch.ones(1)}, file)
    with pytest.raises(QuantizeError, match="holds tensor stray, which the index does not list there"):
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
