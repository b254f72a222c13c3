"""Token files are checked, spans are dropped as T5 drops them, and can be dropped again."""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qmoe_gptq.calibration import Resampler, corrupt, corruption_shape, find_sentinels, load_text, load_tokens, restore
from qmoe_gptq.checkpoint import Checkpoint
from qmoe_gptq.errors import QuantizeError

Samples = Callable[..., dict[str, Any]]


def load(path: Path, model_dir: Path) -> Any:
    """Load tokens for the small model."""
    return load_tokens(path, config=Checkpoint(model_dir).config, model_dir=model_dir)


def test_corruption_drops_what_it_says_and_can_be_undone() -> None:
    rng = np.random.default_rng(0)
    marks = np.arange(900, 964)
    text = rng.integers(10, 800, 280).tolist()
    for _ in range(20):
        source, target = corrupt(text, spans=14, dropped=42, sentinels=marks, rng=rng)
        assert sum(t >= 900 for t in source) == 14 and len(source) == 280 - 42 + 14
        assert [t for t in target if t >= 900] == marks[:15].tolist() and len(target) == 42 + 15
        assert restore(source, target, marks, 1) == text


def test_corruption_is_uniform_over_the_text() -> None:
    rng = np.random.default_rng(0)
    marks = np.arange(900, 964)
    dropped: Counter[int] = Counter()
    for _ in range(2000):
        dropped.update(t for t in corrupt(list(range(100)), spans=5, dropped=15, sentinels=marks, rng=rng)[1] if t < 900)
    # The first token is never dropped (a kept stretch comes first); the middle is at 15%.
    assert dropped[0] == 0
    assert 0.12 < np.mean([dropped[i] for i in range(30, 70)]) / 2000 < 0.18


@pytest.mark.parametrize("length", [64, 256, 512])
def test_shape_fills_the_input(length: int) -> None:
    stretch, spans, dropped = corruption_shape(length)
    assert stretch - dropped + spans + 1 <= length < stretch + 3 - dropped + spans + 1
    assert dropped / stretch == pytest.approx(0.15, abs=0.02)
    assert dropped / spans == pytest.approx(3, rel=0.15)


def test_restore_refuses_what_is_no_corruption() -> None:
    marks = np.arange(900, 910)
    assert restore([5, 6, 900, 7], [1, 2, 3], marks, 1) is None
    assert restore([5, 900, 901, 7], [900, 8, 902], marks, 1) is None
    assert restore([5, 6, 7], [900, 8], marks, 1) is None


def test_end_of_sequence_inside_a_span_is_text() -> None:
    marks = np.arange(900, 910)
    assert restore([5, 900, 6, 1], [900, 7, 1, 8, 901, 1], marks, 1) == [5, 7, 1, 8, 6, 1]


def test_resampling_keeps_the_text_and_changes_the_spans(model_dir: Path, tokens: Path) -> None:
    data = load(tokens, model_dir)
    config = Checkpoint(model_dir).config
    sampler = Resampler(data, config=config)
    assert sampler.usable == 1.0
    fresh = sampler.draw([3, 7, 11], np.random.default_rng(1))
    assert fresh.input_ids.shape == (3, data.input_ids.shape[1]) and fresh.labels.shape == (3, data.labels.shape[1])
    assert (fresh.input_ids != data.input_ids[[3, 7, 11]]).any(1).all()
    for row, old in enumerate([3, 7, 11]):
        before = restore(data.input_ids[old].tolist(), data.labels[old].tolist(), data.sentinels, 1)
        after = restore(fresh.input_ids[row].tolist(), fresh.labels[row].tolist(), data.sentinels, 1)
        assert before is not None and before == after
    assert (fresh.decoder_input_ids[:, 1:] == fresh.labels[:, :-1]).all() and (fresh.decoder_input_ids[:, 0] == 0).all()


def test_samples_that_are_no_corruption_are_left_alone(model_dir: Path, samples: Samples, tmp_path: Path) -> None:
    arrays = samples(4)
    arrays["labels"][2, 0] = 5
    np.savez(tmp_path / "odd.npz", **arrays)
    data = load(tmp_path / "odd.npz", model_dir)
    sampler = Resampler(data, config=Checkpoint(model_dir).config)
    assert sampler.usable == 0.75
    drawn = sampler.draw([2], np.random.default_rng(0))
    assert (drawn.input_ids == data.input_ids[2]).all() and (drawn.labels == data.labels[2]).all()


@pytest.mark.parametrize(
    ("inputs", "labels"),
    [
        ([80, 80, 80, 80, 80], [80, 7, 8, 9, 82]),
        ([80, 5, 80, 6, 1], [80, 7, 8, 9, 82]),
        ([80, 81, 5, 1, 0], [80, 7, 81, 8, 82]),
        ([5, 80, 6, 81, 7], [80, 81, 8, -100, -100]),
        ([5, 80, 6, 7, 1], [80, 9, 88, 8, 81]),
    ],
)
def test_texts_too_odd_for_a_new_corruption_are_left_alone(
    model_dir: Path, tmp_path: Path, inputs: list[int], labels: list[int]
) -> None:
    np.savez(tmp_path / "odd.npz", input_ids=np.array([inputs] * 2), labels=np.array([labels] * 2))
    data = load(tmp_path / "odd.npz", model_dir)
    resampler = Resampler(data, config=Checkpoint(model_dir).config)
    drawn = resampler.draw([1, 0], np.random.default_rng(0))
    assert resampler.usable == 0
    assert drawn.input_ids.tolist() == [inputs] * 2 and drawn.labels.tolist() == [labels] * 2


def test_sentinels_are_found_without_a_tokenizer(tmp_path: Path, samples: Samples) -> None:
    arrays = samples(8)
    found = find_sentinels(tmp_path, arrays["input_ids"], arrays["labels"], 96)
    assert found.tolist() == [80, 81, 82, 83]
    # Counting down, as the original T5 vocabulary does.
    flipped = {k: np.where(v >= 80, 175 - v, v) for k, v in arrays.items()}
    assert find_sentinels(tmp_path, flipped["input_ids"], flipped["labels"], 96).tolist() == [95, 94, 93, 92]


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("input_ids", lambda a: np.where(a == a[0, 0], 96, a), r"vocabulary of 96"),
        ("labels", lambda a: np.where(a == a[0, 1], -7, a), r"labels\[0, 1\] is -7"),
        ("input_ids", lambda a: a[:-1], "shapes disagree"),
        ("input_ids", lambda a: a.astype(np.float32), "integer"),
        ("labels", lambda a: a.reshape(-1), "integer matrix"),
        ("labels", lambda a: np.where(a >= 80, a - 60, a), "another model"),
        ("decoder_input_ids", lambda a: np.where(a == 0, 9, a), "another model"),
        ("labels", None, "labels is missing"),
    ],
)
def test_data_that_does_not_fit_is_refused(
    model_dir: Path, samples: Samples, tmp_path: Path, name: str, spoil: Any, message: str
) -> None:
    arrays = samples(6)
    if spoil is None:
        del arrays[name]
    else:
        arrays[name] = spoil(arrays[name])
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(QuantizeError, match=message):
        load(tmp_path / "bad.npz", model_dir)


def test_a_file_that_is_no_npz_is_refused(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_bytes(b"not a zip")
    with pytest.raises(QuantizeError, match=r"bad\.npz"):
        load(tmp_path / "bad.npz", model_dir)


def test_decoder_inputs_are_made_from_labels(model_dir: Path, samples: Samples, tmp_path: Path) -> None:
    arrays = samples(6)
    expected = arrays.pop("decoder_input_ids")
    np.savez(tmp_path / "short.npz", **arrays)
    assert (load(tmp_path / "short.npz", model_dir).decoder_input_ids == expected).all()


def test_only_trailing_padding_is_padding(model_dir: Path, samples: Samples, tmp_path: Path) -> None:
    arrays = samples(3)
    arrays["input_ids"][1, 5] = 0
    arrays["input_ids"][2, -4:] = 0
    np.savez(tmp_path / "padded.npz", **arrays)
    keep = load(tmp_path / "padded.npz", model_dir).encoder_keep()
    assert keep[:2].all() and keep[2, :-4].all() and not keep[2, -4:].any()


def test_raw_text_becomes_samples(model_dir: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, 80)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([f"<extra_id_{i}>" for i in range(16)])
    tokenizer.save(str(model_dir / "tokenizer.json"))
    assert json.loads((model_dir / "tokenizer.json").read_text())["added_tokens"][0]["id"] == 80
    words = np.random.default_rng(0).integers(3, 80, 1000)
    (tmp_path / "text.txt").write_text(" ".join(f"w{i}" for i in words))
    config = Checkpoint(model_dir).config
    data = load_text(tmp_path / "text.txt", config=config, model_dir=model_dir, samples=5, seed=0, length=64)
    assert data.samples == 5 and data.input_ids.shape[1] <= 64 and (data.input_ids[:, -1] == 1).all()
    restored = restore(data.input_ids[0].tolist(), data.labels[0].tolist(), data.sentinels, 1)
    assert restored is not None and restored[-1] == 1
    assert "".join(f",{t}" for t in restored[:-1]) in "".join(f",{t}" for t in words)
    with pytest.raises(QuantizeError, match="one sample needs"):
        (tmp_path / "short.txt").write_text("w5 w6")
        load_text(tmp_path / "short.txt", config=config, model_dir=model_dir, samples=5, seed=0)
    # What the file says about batches of prompts does not cut the text, and does not pad it.
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=5000)
    tokenizer.save(str(model_dir / "tokenizer.json"))
    again = load_text(tmp_path / "text.txt", config=config, model_dir=model_dir, samples=5, seed=0, length=64)
    assert np.array_equal(again.input_ids, data.input_ids)
    tokenizer.add_special_tokens(["<extra_id_16>"])
    tokenizer.save(str(model_dir / "tokenizer.json"))
    with pytest.raises(QuantizeError, match="sentinel 96 is outside the model's vocabulary of 96"):
        load_text(tmp_path / "text.txt", config=config, model_dir=model_dir, samples=5, seed=0, length=64)
    (model_dir / "tokenizer.json").write_text("{}")
    with pytest.raises(QuantizeError, match=r"tokenizer\.json: not a readable tokenizer"):
        load_text(tmp_path / "text.txt", config=config, model_dir=model_dir, samples=5, seed=0, length=64)


def test_pad_labels_do_not_count(model_dir: Path, samples: Samples, tmp_path: Path) -> None:
    arrays = samples(3)
    del arrays["decoder_input_ids"]
    arrays["labels"][1, -2:] = 0
    np.savez(tmp_path / "t.npz", **arrays)
    data = load(tmp_path / "t.npz", model_dir)
    assert data.decoder_keep()[0].all() and not data.decoder_keep()[1, -2:].any()


def test_a_mask_is_taken_only_where_it_says_what_padding_says(model_dir: Path, samples: Samples, tmp_path: Path) -> None:
    arrays = samples(3)
    arrays["input_ids"][2, -4:] = 0
    np.savez(tmp_path / "t.npz", **arrays, attention_mask=arrays["input_ids"] != 0)
    load(tmp_path / "t.npz", model_dir)
    np.savez(tmp_path / "t.npz", **arrays, attention_mask=np.arange(arrays["input_ids"].shape[1])[None] > 2)
    with pytest.raises(QuantizeError, match="attention_mask masks other tokens than trailing padding"):
        load(tmp_path / "t.npz", model_dir)


def test_inputs_of_one_token_can_be_handed_to_torch(model_dir: Path, samples: Samples, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    arrays = samples(4)
    arrays["input_ids"] = arrays["input_ids"][:, :1]
    arrays["labels"][:, 0] = 80
    np.savez(tmp_path / "t.npz", **arrays)
    assert torch.from_numpy(load(tmp_path / "t.npz", model_dir).encoder_keep()).all()


def test_damaged_archives_are_one_clear_error(model_dir: Path, samples: Samples, tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "whole.npz", **samples(400))
    whole = (tmp_path / "whole.npz").read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 4 : len(whole) // 4 + 6] = b"\xff\x00\xff\x00\xaa\x55"
    (tmp_path / "stream.npz").write_bytes(damaged)
    (tmp_path / "empty.npz").write_bytes(b"")
    np.save(tmp_path / "array.npy", np.zeros((2, 2), np.int16))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    with zipfile.ZipFile(tmp_path / "member.npz", "w") as archive:
        archive.writestr("input_ids.npy", b"abc")
        archive.writestr("labels.npy", b"")
    for name in ("stream.npz", "empty.npz", "array.npz", "member.npz"):
        with pytest.raises(QuantizeError, match=name):
            load(tmp_path / name, model_dir)
