"""The runtime on plain checkpoints: the same logits as transformers, and one clear error for what cannot be run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

import qmoe_switch  # noqa: E402
from qmoe_switch import SwitchError  # noqa: E402
from qmoe_switch.tokens import TokenSet  # noqa: E402

MakeCheckpoint = Callable[..., Path]
EXAMPLE = Path(__file__).parents[3] / "examples" / "switch-pycode-4e"


def their_logits(model: Any, tokens: TokenSet) -> Any:
    with torch.no_grad():
        return model(
            input_ids=torch.tensor(tokens.input_ids),
            attention_mask=torch.tensor(tokens.attention_mask),
            decoder_input_ids=torch.tensor(tokens.decoder_input_ids),
        ).logits


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2},
        {"num_layers": 4, "num_sparse_encoder_layers": 2, "num_decoder_layers": 3, "num_sparse_decoder_layers": 1},
        {"tie_word_embeddings": False, "d_model": 20, "d_ff": 17, "num_experts": 5},
        {"dense_act_fn": "gelu_new", "router_bias": True, "num_experts": 1},
        {"num_sparse_decoder_layers": 0, "d_kv": 5, "num_heads": 2, "relative_attention_num_buckets": 8},
    ],
)
def test_logits_equal_those_of_transformers(
    make_checkpoint: MakeCheckpoint, reference: Callable[..., Any], tokens_file: Path, changes: dict[str, Any]
) -> None:
    path = make_checkpoint(**changes)
    with qmoe_switch.load(path) as model:
        tokens = qmoe_switch.read_tokens(tokens_file, model.vocabulary, labels=True)
        ours = qmoe_switch.logits(model, tokens)
    theirs = their_logits(reference(path), tokens)
    assert float(theirs.std()) > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_several_shards_are_one_checkpoint(
    make_checkpoint: MakeCheckpoint, reference: Callable[..., Any], tokens_file: Path
) -> None:
    path = make_checkpoint(shard="20KB")
    assert len(list(path.glob("model-*.safetensors"))) > 1
    with qmoe_switch.load(path) as model:
        tokens = qmoe_switch.read_tokens(tokens_file, model.vocabulary, labels=True)
        torch.testing.assert_close(qmoe_switch.logits(model, tokens), their_logits(reference(path), tokens))


def test_dropping_beyond_capacity_is_that_of_transformers(
    make_checkpoint: MakeCheckpoint, reference: Callable[..., Any], tokens_file: Path
) -> None:
    import transformers
    from packaging.version import Version

    path = make_checkpoint(num_sparse_encoder_layers=2, num_sparse_decoder_layers=2)
    edit = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**edit, "expert_capacity": 2}))
    theirs = reference(path)
    with qmoe_switch.load(path, capacity="per_sequence") as dropping, qmoe_switch.load(path) as keeping:
        tokens = qmoe_switch.read_tokens(tokens_file, dropping.vocabulary, labels=True)
        dropped, kept = qmoe_switch.logits(dropping, tokens), qmoe_switch.logits(keeping, tokens)
    assert not torch.allclose(dropped, kept, atol=1e-3)
    drops = Version(transformers.__version__) >= Version("5.18")
    torch.testing.assert_close(dropped if drops else kept, their_logits(theirs, tokens), rtol=1e-5, atol=1e-5)


def test_bfloat16_computes_in_bfloat16(make_checkpoint: MakeCheckpoint, tokens_file: Path) -> None:
    path = make_checkpoint()
    with qmoe_switch.load(path, dtype="bfloat16") as model:
        tokens = qmoe_switch.read_tokens(tokens_file, model.vocabulary, labels=True)
        ours = qmoe_switch.logits(model, tokens)
        assert ours.dtype == torch.bfloat16
        assert model.module.encoder.block[1].layer[1].mlp.router.classifier.weight.dtype == torch.float32
    with qmoe_switch.load(path) as model:
        exact = qmoe_switch.logits(model, tokens)
    assert float((ours.float() - exact).norm() / exact.norm()) < 0.03


def test_example_loss() -> None:
    """The measured loss of the example: 3.357 over all of its validation split."""
    with qmoe_switch.load(EXAMPLE) as model:
        tokens = qmoe_switch.read_tokens(EXAMPLE / "validation.npz", model.vocabulary, labels=True)
        result = qmoe_switch.evaluate(model, tokens, batch_size=32)
    assert result.n_tokens == 128 * 58
    assert result.loss == pytest.approx(3.357, abs=0.002)


@pytest.fixture
def damaged(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    path = tmp_path / "damaged"
    shutil.copytree(make_checkpoint(), path)
    return path


def edit_tensors(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors")


WI = "encoder.block.1.layer.1.mlp.experts.expert_1.wi.weight"
NORM = "decoder.final_layer_norm.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(WI), f"tensor {WI} is missing"),
        (lambda t: t.pop(NORM), f"tensor {NORM} is missing"),
        (lambda t: t.pop("shared.weight"), "tensor shared.weight is missing"),
        (lambda t: t.update({NORM: torch.full((24,), float("nan"))}), f"{NORM} holds NaN"),
        (lambda t: t.update({NORM: torch.ones(23)}), rf"{NORM} has shape \[23\], config.json asks for \[24\]"),
        (lambda t: t.update({NORM: torch.ones(24, dtype=torch.int32)}), f"{NORM} is torch.int32"),
        (lambda t: t.update({NORM: torch.ones(24).to(torch.float8_e4m3fn)}), f"{NORM} is torch.float8_e4m3fn"),
        (lambda t: t.update({"extra.weight": torch.ones(2)}), "tensor extra.weight has no place in the model"),
        (lambda t: t.update({"lm_head.weight": torch.ones(50, 24)}), "lm_head.weight differs from shared.weight"),
    ],
)
def test_tensors_that_do_not_fit_give_one_clear_error(damaged: Path, edit: Callable[..., Any], message: str) -> None:
    edit_tensors(damaged, edit)
    with pytest.raises(SwitchError, match=message):
        qmoe_switch.load(damaged)


def test_an_expert_too_many_gives_one_clear_error(damaged: Path) -> None:
    edit_tensors(damaged, lambda t: t.update({WI.replace("expert_1", "expert_3"): t[WI].clone()}))
    with pytest.raises(SwitchError, match=r"expert_3.wi.weight has no place in the model"):
        qmoe_switch.load(damaged)


def test_embeddings_that_are_not_repeated_are_those_shared(make_checkpoint: MakeCheckpoint, tokens_file: Path) -> None:
    path = make_checkpoint(tie_word_embeddings=False)
    names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    edit_tensors(path, lambda t: t.update({name: t["shared.weight"].clone() for name in names}))
    with qmoe_switch.load(path) as model:
        tokens = qmoe_switch.read_tokens(tokens_file, model.vocabulary, labels=True)
        repeated = qmoe_switch.logits(model, tokens)
    edit_tensors(path, lambda t: [t.pop(name) for name in names])
    with qmoe_switch.load(path) as model:
        assert torch.equal(qmoe_switch.logits(model, tokens), repeated)


def test_tied_copies_of_the_embedding_are_accepted(damaged: Path) -> None:
    edit_tensors(damaged, lambda t: t.update({"lm_head.weight": t["shared.weight"].clone()}))
    qmoe_switch.load(damaged).close()


def test_nan_in_an_expert_shows_when_the_expert_is_used(damaged: Path, tokens_file: Path) -> None:
    edit_tensors(damaged, lambda t: t[WI].fill_(float("nan")))
    with qmoe_switch.load(damaged) as model:
        tokens = qmoe_switch.read_tokens(tokens_file, model.vocabulary, labels=True)
        with pytest.raises(SwitchError, match=r"expert_1.wi.weight holds NaN or infinite weights"):
            qmoe_switch.evaluate(model, tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 51}, r"shared.weight has shape \[50, 24\], config.json asks for \[51, 24\]"),
        ({"num_experts": 4}, "expert_3.wi.weight is missing"),
        ({"num_experts": 2}, r"router.classifier.weight has shape \[3, 24\], config.json asks for \[2, 24\]"),
        ({"d_ff": 41}, r"asks for \[41, 24\]"),
        ({"num_layers": 4, "encoder_sparse_step": 2}, "is missing"),
        ({"model_type": "t5"}, "model_type is 't5'"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"d_model": "24"}, "config.json"),
        ({"dense_act_fn": "gated-gelu"}, "'gated-gelu'"),
        ({"vocab_size": 2**40}, "vocab_size is 1099511627776"),
        ({"num_layers": 10**9}, "encoder.block.999999999.*is missing"),
        ({"num_decoder_layers": 10**9}, "decoder.block.999999999.*is missing"),
        ({"num_experts": 2**31 - 1}, "expert_3.wi.weight is missing"),
        ({"encoder_sparse_step": "2"}, "encoder_sparse_step is '2'"),
        ({"decoder_sparse_step": -1}, "decoder_sparse_step is -1"),
        ({"pad_token_id": -1}, "pad_token_id is -1, not a token of the vocabulary of 50"),
        ({"decoder_start_token_id": 50}, "decoder_start_token_id is 50, not a token"),
        ({"relative_attention_num_buckets": 2}, "do not go together"),
        ({"relative_attention_max_distance": 8}, "do not go together"),
    ],
)
def test_config_that_does_not_fit_gives_one_clear_error(damaged: Path, changes: dict[str, Any], message: str) -> None:
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(SwitchError, match=message), qmoe_switch.load(damaged) as model:
        ids = torch.ones((1, 4), dtype=torch.int64)
        model.module(input_ids=ids, decoder_input_ids=ids)


def test_directories_that_hold_no_checkpoint_give_one_clear_error(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(SwitchError, match="not a directory"):
        qmoe_switch.load(tmp_path / "absent")
    (damaged / "config.json").write_text("{")
    with pytest.raises(SwitchError, match=r"config.json: not readable JSON"):
        qmoe_switch.load(damaged)
    (damaged / "config.json").unlink()
    with pytest.raises(SwitchError, match=r"config.json: no such file"):
        qmoe_switch.load(damaged)
    (damaged / "model.safetensors").write_bytes(b"\x00" * 5)
    with pytest.raises(SwitchError, match="not a readable safetensors file"):
        qmoe_switch.load(damaged)
    (damaged / "model.safetensors").rename(damaged / "pytorch_model.bin")
    with pytest.raises(SwitchError, match=r"holds neither .*, only pytorch_model\.bin: save it again"):
        qmoe_switch.load(damaged)
    (damaged / "pytorch_model.bin").unlink()
    with pytest.raises(SwitchError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json$"):
        qmoe_switch.load(damaged)


def test_a_single_file_beside_shards_is_not_chosen_between(make_checkpoint: MakeCheckpoint) -> None:
    path, other = make_checkpoint(shard="20KB"), make_checkpoint(seed=1)
    shutil.copy(other / "model.safetensors", path)
    with pytest.raises(SwitchError, match="which of them counts"):
        qmoe_switch.load(path)


def test_a_missing_shard_gives_one_clear_error(make_checkpoint: MakeCheckpoint) -> None:
    path = make_checkpoint(shard="20KB")
    victim = sorted(path.glob("model-*.safetensors"))[1]
    content = victim.read_bytes()
    victim.unlink()
    with pytest.raises(SwitchError, match=f"shard {victim.name}, which .* lists, is missing"):
        qmoe_switch.load(path)
    victim.write_bytes(content)
    index = path / "model.safetensors.index.json"
    text = json.loads(index.read_text())
    taken = next(name for name, shard in text["weight_map"].items() if shard == victim.name)
    index.write_text(json.dumps({"weight_map": {k: v for k, v in text["weight_map"].items() if k != taken}}))
    with pytest.raises(SwitchError, match=f"{victim.name}: holds tensor {taken}, which .* does not list there"):
        qmoe_switch.load(path)
    text["weight_map"]["stray"] = victim.name
    index.write_text(json.dumps(text))
    with pytest.raises(SwitchError, match="tensor stray is not in"):
        qmoe_switch.load(path)


def test_settings_that_do_not_exist_are_refused(plain: Path) -> None:
    with pytest.raises(SwitchError, match="capacity is 'some'"):
        qmoe_switch.load(plain, capacity="some")  # type: ignore[arg-type]
    with pytest.raises(SwitchError, match="dtype is 'int8'"):
        qmoe_switch.load(plain, dtype="int8")


def test_nothing_is_built_for_experts_that_no_token_comes_to(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer of 40 experts has as many modules as one of 3, and as many were made on the way."""
    from transformers.models.switch_transformers import modeling_switch_transformers as theirs

    path = make_checkpoint(num_experts=40)
    made: list[int] = []
    build = theirs.SwitchTransformersDenseActDense.__init__
    monkeypatch.setattr(theirs.SwitchTransformersDenseActDense, "__init__", lambda *a: made.append(1) or build(*a))
    with qmoe_switch.load(path):
        assert len(made) == 4
    with qmoe_switch.load(make_checkpoint()) as few, qmoe_switch.load(path) as many:
        assert len(list(few.module.modules())) == len(list(many.module.modules()))
        assert many.module.config.num_experts == many.module.encoder.config.num_experts == 40
        assert many.module.encoder.block[1].layer[1].mlp.router.classifier.weight.shape == (40, 24)
