"""The loss is the mean cross-entropy over the labels that count, whatever the batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import qmoe_switch  # noqa: E402
from qmoe_switch import SwitchError  # noqa: E402


def test_loss_is_that_of_transformers(plain: Path, reference: Callable[..., Any], tokens_file: Path) -> None:
    with qmoe_switch.load(plain) as model:
        tokens = qmoe_switch.read_tokens(tokens_file, model.vocabulary, labels=True)
        ours = qmoe_switch.evaluate(model, tokens)
    with torch.no_grad():
        theirs = reference(plain)(
            input_ids=torch.tensor(tokens.input_ids),
            attention_mask=torch.tensor(tokens.attention_mask),
            labels=torch.tensor(tokens.labels),
        ).loss
    assert ours.loss == pytest.approx(float(theirs), abs=1e-5)
    assert ours.n_tokens == 3 * 7 - 3


def test_loss_does_not_depend_on_the_batches(plain: Path, tokens_file: Path) -> None:
    told: list[int] = []
    with qmoe_switch.load(plain) as model:
        tokens = qmoe_switch.read_tokens(tokens_file, model.vocabulary, labels=True)
        whole = qmoe_switch.evaluate(model, tokens, batch_size=16)
        single = qmoe_switch.evaluate(model, tokens, batch_size=2, progress=told.append)
    assert single.loss == pytest.approx(whole.loss, abs=1e-6)
    assert single.n_tokens == whole.n_tokens
    assert told == [2, 3]


def test_a_loss_that_is_no_number_is_an_error(plain: Path, tokens_file: Path) -> None:
    with qmoe_switch.load(plain) as model:
        tokens = qmoe_switch.read_tokens(tokens_file, model.vocabulary, labels=True)
        model.module.shared.weight.data[5] = float("inf")
        with pytest.raises(SwitchError, match="the loss is"):
            qmoe_switch.evaluate(model, tokens)


def test_labels_are_needed(plain: Path, tokens_file: Path) -> None:
    with qmoe_switch.load(plain) as model:
        tokens = qmoe_switch.read_tokens(tokens_file, model.vocabulary, labels=False)
        with pytest.raises(SwitchError, match="no labels"):
            qmoe_switch.evaluate(model, tokens)
        with pytest.raises(SwitchError, match="no decoder input"):
            qmoe_switch.logits(model, tokens)


def test_samples_without_labels_are_an_error(plain: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", input_ids=np.full((2, 4), 5), labels=np.array([[-100, 0], [7, 8]]))
    with qmoe_switch.load(plain) as model:
        tokens = qmoe_switch.read_tokens(tmp_path / "t.npz", model.vocabulary, labels=True)
        with pytest.raises(SwitchError, match="no label counts: all of the 1 samples'"):
            qmoe_switch.evaluate(model, tokens.slice(0, 1))
        assert qmoe_switch.evaluate(model, tokens, batch_size=1).n_tokens == 2
