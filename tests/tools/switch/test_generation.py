"""Greedy generation: transformers' own tokens, one encoder pass, one decoder token a step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import qmoe_switch  # noqa: E402
from qmoe_switch import SwitchError  # noqa: E402
from qmoe_switch.tokens import TokenSet  # noqa: E402


@pytest.fixture(params=[{}, {"tie_word_embeddings": False, "num_sparse_decoder_layers": 2, "seed": 3}])
def checkpoint(request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(ternary=True, **request.param)


def test_tokens_are_those_of_transformers(checkpoint: Path, reference: Callable[..., Any], tokens_file: Path) -> None:
    with qmoe_switch.load(checkpoint) as model:
        prompts = qmoe_switch.read_tokens(tokens_file, model.vocabulary, labels=False)
        ours = qmoe_switch.generate(model, prompts, max_new_tokens=12)
    with torch.no_grad():
        rows = reference(checkpoint).generate(
            torch.tensor(prompts.input_ids),
            attention_mask=torch.tensor(prompts.attention_mask),
            max_new_tokens=12,
            do_sample=False,
        )
    for mine, row in zip(ours.tokens, rows[:, 1:].numpy(), strict=True):
        assert np.array_equal(mine, row[: len(mine)])
        assert (row[len(mine) :] == 0).all()
    assert len({tuple(sequence) for sequence in map(np.ndarray.tolist, ours.tokens)}) > 1


def test_a_decoder_deeper_than_the_encoder_says_what_whole_passes_say(
    make_checkpoint: Callable[..., Path], reference: Callable[..., Any], tokens_file: Path
) -> None:
    """transformers 5.17 itself cannot generate with such a model: its cache has as many layers as the encoder."""
    path = make_checkpoint(ternary=True, num_layers=1, num_decoder_layers=4, num_sparse_decoder_layers=2)
    with qmoe_switch.load(path) as model:
        prompts = qmoe_switch.read_tokens(tokens_file, model.vocabulary, labels=False)
        ours = qmoe_switch.generate(model, prompts, max_new_tokens=8)
    ids, mask = torch.tensor(prompts.input_ids), torch.tensor(prompts.attention_mask)
    said, whole = torch.zeros((len(ids), 1), dtype=torch.int64), reference(path)
    with torch.no_grad():
        for _ in range(8):
            scores = whole(input_ids=ids, attention_mask=mask, decoder_input_ids=said, use_cache=False).logits
            said = torch.cat([said, scores[:, -1:].argmax(dim=-1)], dim=1)
    for mine, row in zip(ours.tokens, said[:, 1:].numpy(), strict=True):
        assert np.array_equal(mine, row[: len(mine)])


def test_encoder_runs_once_and_decoder_on_one_token_a_step(plain: Path, tokens_file: Path) -> None:
    with qmoe_switch.load(plain) as model:
        prompts = qmoe_switch.read_tokens(tokens_file, model.vocabulary, labels=False)
        encoder_calls: list[int] = []
        lengths: list[int] = []
        model.module.encoder.register_forward_hook(lambda *_: encoder_calls.append(1))
        model.module.decoder.block[0].register_forward_hook(lambda _, args, __: lengths.append(args[0].shape[1]))
        result = qmoe_switch.generate(model, prompts, max_new_tokens=6)
    assert len(encoder_calls) == 1
    assert lengths == [1] * result.steps


def test_a_sequence_ends_with_the_end_token(plain: Path, tokens_file: Path) -> None:
    with qmoe_switch.load(plain) as model:
        prompts = qmoe_switch.read_tokens(tokens_file, model.vocabulary, labels=False)
        free = qmoe_switch.generate(model, prompts, max_new_tokens=10)
        ending = int(free.tokens[0][2])
        model.config.eos_token_id = [49, ending]
        result = qmoe_switch.generate(model, prompts, max_new_tokens=10)
        one = qmoe_switch.generate(model, prompts.slice(0, 1), max_new_tokens=10)
    for before, after in zip(free.tokens, result.tokens, strict=True):
        ends = np.flatnonzero(np.isin(before, [49, ending]))
        assert np.array_equal(after, before[: ends[0] + 1] if len(ends) else before)
    assert one.steps == len(one.tokens[0]) <= 3
    assert one.n_tokens == one.steps


def test_generation_stops_when_the_last_sequence_has_ended(plain: Path) -> None:
    """A sequence that has ended stays so, whatever the model goes on to say in its row."""
    script = torch.tensor([[5, 1, 7, 7, 7, 7], [5, 6, 7, 1, 8, 8]])
    steps = iter(range(6))

    class Scripted(torch.nn.Module):
        def __init__(self, decoder: Any) -> None:
            super().__init__()
            self.decoder = decoder
            self.encoder = lambda **_: None

        def forward(self, **_: Any) -> Any:
            return SimpleNamespace(logits=torch.nn.functional.one_hot(script[:, next(steps)], 50)[:, None].float())

    with qmoe_switch.load(plain) as model:
        model.module = Scripted(model.module.decoder)
        ids = np.ones((2, 3), np.int64)
        result = qmoe_switch.generate(model, TokenSet(ids, ids), max_new_tokens=6)
    assert [row.tolist() for row in result.tokens] == [[5, 1], [5, 6, 7, 1]]
    assert result.steps == 4


def test_padding_does_not_change_what_is_generated(plain: Path) -> None:
    ids = np.arange(5, 13)[None]
    padded = np.concatenate([ids, np.zeros((1, 4), np.int64)], axis=1)
    with qmoe_switch.load(plain) as model:
        alone = qmoe_switch.generate(model, TokenSet(ids, np.ones_like(ids)), max_new_tokens=8)
        with_pads = qmoe_switch.generate(model, TokenSet(padded, (padded != 0).astype(np.int64)), max_new_tokens=8)
    assert np.array_equal(alone.tokens[0], with_pads.tokens[0])


def test_settings_that_make_no_sense_are_refused(plain: Path, tokens_file: Path) -> None:
    with qmoe_switch.load(plain) as model:
        prompts = qmoe_switch.read_tokens(tokens_file, model.vocabulary, labels=False)
        with pytest.raises(SwitchError, match="max_new_tokens is 0"):
            qmoe_switch.generate(model, prompts, max_new_tokens=0)
        model.config.pad_token_id = model.config.decoder_start_token_id = None
        with pytest.raises(SwitchError, match="nothing to start from"):
            qmoe_switch.generate(model, prompts)
