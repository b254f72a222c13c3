"""Token files: `.npz` archives of integer arrays, and what may stand in them.

| array | shape | |
|---|---|---|
| `input_ids` | [n, length] | the encoder's input |
| `labels` | [n, length] | what the decoder should say; only for evaluation |
| `decoder_input_ids` | [n, length] | optional; else `labels` shifted right behind the decoder's start token |
| `attention_mask` | [n, length] | optional, 0 or 1 for `input_ids`; else 1 wherever `input_ids` is not the pad token |

A label of -100, and a label that is the pad token, does not count. Tokens are looked at before the model sees them:
an id that the model has no embedding for is an error, not an exception from inside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .errors import SwitchError

IGNORED = -100

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What the model says about its tokens (config.json)."""

    size: int
    pad: int | None
    start: int | None


@dataclass(frozen=True, slots=True, eq=False)
class TokenSet:
    """Checked samples, all int64[n, length].

    `labels` holds -100 wherever a position does not count. `labels` and `decoder_input_ids` are None together.
    """

    input_ids: Ids
    attention_mask: Ids
    labels: Ids | None = None
    decoder_input_ids: Ids | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def n_labels(self) -> int:
        """Label tokens that count."""
        return 0 if self.labels is None else int((self.labels != IGNORED).sum())

    def slice(self, begin: int, end: int) -> TokenSet:
        """Return the samples begin..end-1."""
        part = slice(begin, end)
        return TokenSet(
            self.input_ids[part],
            self.attention_mask[part],
            None if self.labels is None else self.labels[part],
            None if self.decoder_input_ids is None else self.decoder_input_ids[part],
        )


def read_tokens(path: str | Path, vocabulary: Vocabulary, *, labels: bool) -> TokenSet:
    """Read and check a token file; with `labels=False` only the encoder's side of it.

    Raises SwitchError with the file, the array and the sample at fault.
    """
    path = Path(path)
    encoder, decoder_side = ("input_ids", "attention_mask"), ("labels", "decoder_input_ids")
    arrays = _arrays(path, encoder + decoder_side if labels else encoder)
    if "input_ids" not in arrays:
        raise SwitchError(f"{path}: holds no array input_ids")
    ids = arrays["input_ids"]
    if ids.shape[0] == 0 or ids.shape[1] == 0:
        raise SwitchError(f"{path}: input_ids is empty (shape {list(ids.shape)})")
    _check_ids(path, "input_ids", ids, vocabulary)
    mask = arrays.get("attention_mask")
    if mask is None:
        mask = np.ones_like(ids) if vocabulary.pad is None else (ids != vocabulary.pad).astype(np.int64)
    elif mask.shape != ids.shape or ((mask != 0) & (mask != 1)).any():
        raise SwitchError(f"{path}: attention_mask is not 0 and 1 in the shape of input_ids, {list(ids.shape)}")
    if not labels:
        return TokenSet(ids, mask)
    if "labels" not in arrays:
        raise SwitchError(f"{path}: holds no array labels, which evaluation needs")
    target = arrays["labels"]
    if len(target) != len(ids):
        raise SwitchError(f"{path}: labels has {len(target)} samples, input_ids {len(ids)}")
    target = np.where(target == vocabulary.pad, IGNORED, target) if vocabulary.pad is not None else target
    _check_ids(path, "labels", target, vocabulary, ignored=True)
    if not (target != IGNORED).any():
        raise SwitchError(f"{path}: no label counts, all are {IGNORED} or the pad token")
    decoder = arrays.get("decoder_input_ids")
    if decoder is None:
        decoder = shift_right(target, vocabulary)
    elif decoder.shape != target.shape:
        raise SwitchError(f"{path}: decoder_input_ids has shape {list(decoder.shape)}, labels {list(target.shape)}")
    _check_ids(path, "decoder_input_ids", decoder, vocabulary)
    return TokenSet(ids, mask, target, decoder)


def shift_right(labels: Ids, vocabulary: Vocabulary) -> Ids:
    """Put the decoder's start token before the labels and drop the last; -100 becomes the pad token."""
    if vocabulary.start is None or vocabulary.pad is None:
        raise SwitchError("config.json has no decoder_start_token_id or pad_token_id: token files need decoder_input_ids")
    shifted = np.full_like(labels, vocabulary.start)
    shifted[:, 1:] = np.where(labels[:, :-1] == IGNORED, vocabulary.pad, labels[:, :-1])
    return shifted


def _arrays(path: Path, wanted: tuple[str, ...]) -> dict[str, Ids]:
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise SwitchError(f"{path}: not an .npz archive")
            found = {name: np.asarray(archive[name]) for name in wanted if name in archive}
    except FileNotFoundError:
        raise SwitchError(f"{path}: no such file") from None
    except SwitchError:
        raise
    except Exception as error:  # there is no end to what damaged archives raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SwitchError(f"{path}: not a readable .npz archive ({reason})") from None
    for name, array in found.items():
        if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
            raise SwitchError(f"{path}: {name} is {array.dtype}{list(array.shape)}, not integers of shape [n, length]")
    return {name: array.astype(np.int64) for name, array in found.items()}


def _check_ids(path: Path, name: str, ids: Ids, vocabulary: Vocabulary, *, ignored: bool = False) -> None:
    bad = (ids < 0) | (ids >= vocabulary.size)
    if ignored:
        bad &= ids != IGNORED
    if bad.any():
        sample, place = (int(i) for i in np.argwhere(bad)[0])
        raise SwitchError(
            f"{path}: {name}[{sample}, {place}] is {int(ids[sample, place])}, outside the model's vocabulary of "
            f"{vocabulary.size} tokens: the file was made for another model"
        )
