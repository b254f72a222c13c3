"""Token files: what they may hold, which labels count, and one clear error for each that cannot be used."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qmoe_switch.errors import SwitchError
from qmoe_switch.tokens import IGNORED, Vocabulary, read_tokens, shift_right

VOCABULARY = Vocabulary(size=50, pad=0, start=0)


def write(path: Path, **arrays: Any) -> Path:
    np.savez(path, **{name: np.asarray(value) for name, value in arrays.items()})
    return path


def test_pad_and_ignored_labels_do_not_count(tmp_path: Path) -> None:
    path = write(tmp_path / "t.npz", input_ids=[[5, 6, 0]], labels=[[7, -100, 8, 0]])
    tokens = read_tokens(path, VOCABULARY, labels=True)
    assert tokens.labels is not None and tokens.decoder_input_ids is not None
    assert tokens.labels.tolist() == [[7, IGNORED, 8, IGNORED]]
    assert tokens.n_labels == 2
    assert tokens.attention_mask.tolist() == [[1, 1, 0]]
    assert tokens.decoder_input_ids.tolist() == [[0, 7, 0, 8]]


def test_a_given_mask_and_decoder_input_are_taken(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.npz", input_ids=[[5, 0, 6]], attention_mask=[[1, 1, 0]], labels=[[7, 8]], decoder_input_ids=[[3, 7]]
    )
    tokens = read_tokens(path, VOCABULARY, labels=True)
    assert tokens.decoder_input_ids is not None
    assert tokens.attention_mask.tolist() == [[1, 1, 0]]
    assert tokens.decoder_input_ids.tolist() == [[3, 7]]


def test_labels_are_not_needed_for_generation(tmp_path: Path) -> None:
    tokens = read_tokens(write(tmp_path / "t.npz", input_ids=[[5, 6]], labels=[[999]]), VOCABULARY, labels=False)
    assert tokens.labels is None and tokens.n_labels == 0


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": [[1]]}, "holds no array input_ids"),
        ({"input_ids": [[5, 50]], "labels": [[1]]}, r"input_ids\[0, 1\] is 50, outside the model's vocabulary of 50"),
        ({"input_ids": [[5, -1]], "labels": [[1]]}, r"input_ids\[0, 1\] is -1"),
        ({"input_ids": [[5, 6]], "labels": [[1, 77]]}, r"labels\[0, 1\] is 77"),
        ({"input_ids": [[5, 6]], "labels": [[1, -7]]}, r"labels\[0, 1\] is -7"),
        ({"input_ids": [[5, 6]], "labels": [[1]], "decoder_input_ids": [[70]]}, r"decoder_input_ids\[0, 0\] is 70"),
        ({"input_ids": [[5, 6]], "labels": [[1]], "decoder_input_ids": [[1, 2]]}, "decoder_input_ids has shape"),
        ({"input_ids": [[5, 6]]}, "holds no array labels"),
        ({"input_ids": [[5, 6]], "labels": [[1], [2]]}, "labels has 2 samples, input_ids 1"),
        ({"input_ids": [[5, 6]], "labels": [[-100, 0]]}, "no label counts"),
        ({"input_ids": [[5.0, 6.0]], "labels": [[1]]}, "not integers of shape"),
        ({"input_ids": [5, 6], "labels": [[1]]}, "not integers of shape"),
        ({"input_ids": np.zeros((0, 4), np.int16), "labels": [[1]]}, "input_ids is empty"),
        ({"input_ids": [[5, 6]], "attention_mask": [[1, 2]], "labels": [[1]]}, "attention_mask is not 0 and 1"),
    ],
)
def test_unusable_file_gives_one_clear_error(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(SwitchError, match=message):
        read_tokens(write(tmp_path / "t.npz", **arrays), VOCABULARY, labels=True)


def test_what_is_no_archive_gives_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("not an archive")
    np.save(tmp_path / "one.npy", np.zeros((2, 2), np.int16))
    whole = write(tmp_path / "whole.npz", input_ids=[[5, 6]], labels=[[1, 2]]).read_bytes()
    (tmp_path / "half.npz").write_bytes(whole[: len(whole) // 2])
    np.savez(tmp_path / "object.npz", input_ids=np.array([[{}]], dtype=object))
    np.savez_compressed(tmp_path / "stream.npz", input_ids=np.arange(4000).reshape(100, 40) % 50, labels=[[1, 2]] * 100)
    damaged = bytearray((tmp_path / "stream.npz").read_bytes())
    damaged[len(damaged) // 4 : len(damaged) // 4 + 6] = b"\xff\x00\xff\x00\xaa\x55"
    (tmp_path / "stream.npz").write_bytes(damaged)
    (tmp_path / "empty.npz").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "member.npz", "w") as archive:
        archive.writestr("input_ids.npy", b"abc")
    for name in (
        "text.npz", "one.npy", "half.npz", "object.npz", "absent.npz", "stream.npz", "empty.npz", "member.npz",
    ):  # fmt: skip
        with pytest.raises(SwitchError, match=name):
            read_tokens(tmp_path / name, VOCABULARY, labels=True)


def test_shifting_needs_a_start_token() -> None:
    with pytest.raises(SwitchError, match="decoder_start_token_id"):
        shift_right(np.array([[1, 2]]), Vocabulary(50, None, None))
