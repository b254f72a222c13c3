"""Calibration samples: token files, raw text, and new span corruptions of old samples.

Source: Raffel et al. 2020 (T5), section 3.1.4: 15% of the tokens are dropped in spans of
mean length 3; each span leaves one sentinel in the input, and the target is the dropped
spans, each after its sentinel, closed by one more sentinel.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .errors import QuantizeError
from .model import SwitchConfig

Int64 = npt.NDArray[np.int64]

DENSITY = 0.15
MEAN_SPAN = 3.0
TEXT_INPUT_LENGTH = 256
_SENTINEL = re.compile(r"^<extra_id_(\d+)>$")


@dataclass(frozen=True, slots=True)
class Calibration:
    """Calibration samples of equal length.

    input_ids : int64[samples, source]           encoder tokens
    decoder_input_ids : int64[samples, target]   decoder tokens
    labels : int64[samples, target]              what each decoder position predicts, -100 for nothing
    sentinels : int64[n]                         sentinel ids in order of use; empty when unknown
    pad_id : int                                 trailing encoder tokens with this id are padding
    """

    input_ids: Int64
    decoder_input_ids: Int64
    labels: Int64
    sentinels: Int64
    pad_id: int

    @property
    def samples(self) -> int:
        """The number of samples."""
        return len(self.input_ids)

    def encoder_keep(self) -> npt.NDArray[np.bool_]:
        """Mark the encoder tokens that are not trailing padding, bool[samples, source]."""
        real = self.input_ids != self.pad_id
        # A copy: of a matrix with one column numpy calls the reversed view contiguous, and torch takes no negative strides.
        keep: npt.NDArray[np.bool_] = np.flip(np.maximum.accumulate(np.flip(real, 1), 1), 1).copy()
        return keep

    def decoder_keep(self) -> npt.NDArray[np.bool_]:
        """Mark the decoder positions that predict something, bool[samples, target]."""
        return np.asarray(self.labels != -100, np.bool_)

    def is_special(self, ids: Int64) -> npt.NDArray[np.bool_]:
        """Mark the sentinels in ``ids``."""
        return np.asarray(np.isin(ids, self.sentinels), np.bool_)

    def fingerprint(self) -> str:
        """Hash all tokens (SHA-256, hex)."""
        digest = hashlib.sha256()
        for array in (self.input_ids, self.decoder_input_ids, self.labels, self.sentinels):
            digest.update(str(array.shape).encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def head(self, samples: int | None) -> Calibration:
        """Keep the first ``samples`` samples."""
        return self if samples is None or samples >= self.samples else self.take(range(samples))

    def take(self, indices: Sequence[int]) -> Calibration:
        """Pick samples."""
        rows = list(indices)
        return Calibration(self.input_ids[rows], self.decoder_input_ids[rows], self.labels[rows], self.sentinels, self.pad_id)


def load_tokens(path: Path, *, config: SwitchConfig, model_dir: Path) -> Calibration:
    """Read ``input_ids``, ``labels`` and optionally ``decoder_input_ids`` from an npz file.

    Labels that are the pad token count as little as -100.
    Raises QuantizeError: unreadable, wrong shapes, ids outside the vocabulary, sequences
    that are not this model's (another start token, sentinels of another vocabulary), or an
    ``attention_mask`` that masks anything but trailing padding.
    """
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("an array, not an archive of arrays")
            arrays = {name: np.asarray(archive[name]) for name in archive.files}
    except Exception as error:  # there is no end to what damaged archives raise
        raise QuantizeError(f"{path}: not a readable npz file ({' '.join(str(error).split()) or type(error).__name__})") from None
    for name in ("input_ids", "labels"):
        if name not in arrays:
            raise QuantizeError(f"{path}: array {name} is missing")
    labels = _tokens(path, "labels", arrays["labels"], config, ignore=True)
    labels = np.where(labels == config.pad_id, -100, labels)
    inputs = _tokens(path, "input_ids", arrays["input_ids"], config)
    shifted = shift_right(labels, config)
    if "decoder_input_ids" in arrays:
        decoder = _tokens(path, "decoder_input_ids", arrays["decoder_input_ids"], config)
        if decoder.shape == labels.shape and (decoder[:, 0] != config.start_id).any():
            raise QuantizeError(
                f"{path}: decoder_input_ids start with token {int(decoder[0, 0])}, this model starts with "
                f"{config.start_id}: calibration data of another model?"
            )
    else:
        decoder = shifted
    if not len(inputs) == len(decoder) == len(labels) or decoder.shape != labels.shape:
        raise QuantizeError(
            f"{path}: shapes disagree: input_ids {inputs.shape}, decoder_input_ids {decoder.shape}, labels {labels.shape}"
        )
    sentinels = find_sentinels(model_dir, inputs, labels, config.vocabulary)
    if len(sentinels) and not np.isin(labels, sentinels).any():
        raise QuantizeError(
            f"{path}: no label is one of the tokenizer's sentinels {int(sentinels[0])}..{int(sentinels[-1])}: "
            "calibration data of another model?"
        )
    data = Calibration(inputs, decoder, labels, sentinels, config.pad_id)
    mask = arrays.get("attention_mask")
    if mask is not None and not np.array_equal(mask != 0, data.encoder_keep()):
        raise QuantizeError(f"{path}: attention_mask masks other tokens than trailing padding, which calibration cannot do")
    return data


def shift_right(labels: Int64, config: SwitchConfig) -> Int64:
    """Make decoder inputs from labels: start token first, ignored positions become padding."""
    out = np.full_like(labels, config.start_id)
    out[:, 1:] = np.where(labels[:, :-1] == -100, config.pad_id, labels[:, :-1])
    return out


def _tokens(path: Path, name: str, array: npt.NDArray[np.generic], config: SwitchConfig, *, ignore: bool = False) -> Int64:
    if array.ndim != 2 or not array.size or array.dtype.kind not in "iu":
        raise QuantizeError(f"{path}: {name} must be a non-empty integer matrix [samples, length]")
    ids = array.astype(np.int64)
    bad = (ids < 0) | (ids >= config.vocabulary)
    if ignore:
        bad &= ids != -100
    if bad.any():
        row, column = (int(v[0]) for v in np.nonzero(bad))
        raise QuantizeError(
            f"{path}: {name}[{row}, {column}] is {int(ids[row, column])}, outside the model's vocabulary of "
            f"{config.vocabulary}: calibration data of another model?"
        )
    return ids


def find_sentinels(model_dir: Path, inputs: Int64, labels: Int64, vocabulary: int) -> Int64:
    """List sentinel ids in order of use: from tokenizer.json, else from the samples.

    Without a tokenizer a sentinel is recognised by what defines it: the labels' first
    token starts a run of consecutive ids that occur in every sample's input once each,
    in the labels' order.
    """
    path = model_dir / "tokenizer.json"
    if path.is_file():
        try:
            added = json.loads(path.read_text(encoding="utf-8")).get("added_tokens", [])
            found = {int(m[1]): int(t["id"]) for t in added if (m := _SENTINEL.match(t["content"]))}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise QuantizeError(f"{path}: cannot be read ({error})") from None
        if found:
            beyond = sorted(token for token in found.values() if not 0 <= token < vocabulary)
            if beyond:
                raise QuantizeError(f"{path}: sentinel {beyond[0]} is outside the model's vocabulary of {vocabulary}")
            return np.array([found[k] for k in sorted(found)], np.int64)
    first = int(labels[0, 0])
    if not (labels[:, 0] == first).all():
        return np.empty(0, np.int64)
    for step in (1, -1):
        run = []
        token = first
        while token >= 0 and ((inputs == token).sum(1) == 1).all():
            run.append(token)
            token += step
        if len(run) > 1:
            rest = [t for t in range(token, token + step * 1000, step) if t >= 0 and (labels == t).any()]
            return np.array(run + rest[:1], np.int64)
    return np.empty(0, np.int64)


def restore(inputs: Sequence[int], labels: Sequence[int], sentinels: Int64, eos_id: int) -> list[int] | None:
    """Undo a span corruption: put every dropped span back in place of its sentinel.

    Returns the original tokens, or None when the sample is not a span corruption.
    """
    marks = set(sentinels.tolist())
    spans: dict[int, list[int]] = {}
    current: list[int] | None = None
    for token in target_body(labels, eos_id):
        if token in marks:
            current = spans.setdefault(token, [])
        elif current is None:
            return None
        else:
            current.append(token)
    text: list[int] = []
    used = 0
    for token in inputs:
        if token in marks:
            if token not in spans:
                return None
            text += spans[token]
            used += 1
        else:
            text.append(token)
    return text if used else None


def target_body(labels: Sequence[int], eos_id: int) -> list[int]:
    """Drop ignored positions and a closing end-of-sequence token from a target.

    An end-of-sequence token elsewhere is text: it separates documents.
    """
    body = [token for token in labels if token != -100]
    return body[:-1] if body and body[-1] == eos_id else body


def corrupt(
    text: Sequence[int], *, spans: int, dropped: int, sentinels: Int64, rng: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Drop ``dropped`` tokens of ``text`` in ``spans`` random spans, T5 style.

    Returns (input, target), without end-of-sequence tokens.
    """

    def split(total: int) -> list[int]:
        cuts = np.sort(rng.choice(total - 1, spans - 1, replace=False)) + 1
        return [int(v) for v in np.diff(np.concatenate([[0], cuts, [total]]))]

    source: list[int] = []
    target: list[int] = []
    at = 0
    for i, (kept, lost) in enumerate(zip(split(len(text) - dropped), split(dropped), strict=True)):
        source += text[at : at + kept]
        source.append(int(sentinels[i]))
        target.append(int(sentinels[i]))
        target += text[at + kept : at + kept + lost]
        at += kept + lost
    target.append(int(sentinels[spans]))
    return source, target


def load_text(
    path: Path, *, config: SwitchConfig, model_dir: Path, samples: int, seed: int, length: int = TEXT_INPUT_LENGTH
) -> Calibration:
    """Tokenize raw text with the checkpoint's tokenizer.json and span-corrupt it.

    The text is cut into stretches that leave ``length`` encoder tokens each.
    Raises QuantizeError: no tokenizer, no sentinels, or too little text.
    """
    tokenizer_file = model_dir / "tokenizer.json"
    if not tokenizer_file.is_file():
        raise QuantizeError(f"{path} is no .npz file, so it is raw text, which needs a tokenizer.json in {model_dir}")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise QuantizeError("raw text needs the 'tokenizers' package: pip install qmoecodec[hf]") from None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise QuantizeError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    except Exception as error:  # the library raises plain Exception for whatever it cannot read
        raise QuantizeError(f"{tokenizer_file}: not a readable tokenizer ({error})") from None
    # Settings for batches of prompts that a tokenizer.json may hold.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
    if not ids.size:
        raise QuantizeError(f"{path}: holds no text")
    sentinels = find_sentinels(model_dir, ids.reshape(1, -1), ids.reshape(1, -1), config.vocabulary)
    if ids.size and ids.max() >= config.vocabulary:
        raise QuantizeError(f"{tokenizer_file}: gives token {int(ids.max())}, outside the model's vocabulary")
    stretch, spans, dropped = corruption_shape(length)
    if len(sentinels) <= spans:
        raise QuantizeError(f"{tokenizer_file}: {len(sentinels)} sentinels, {spans + 1} are needed")
    available = len(ids) // stretch
    if not available:
        raise QuantizeError(f"{path}: {len(ids)} tokens of text, one sample needs {stretch}")
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(available)[: min(samples, available)])
    inputs, labels = [], []
    for i in chosen:
        source, target = corrupt(
            ids[i * stretch : (i + 1) * stretch].tolist(),
            spans=spans, dropped=dropped, sentinels=sentinels, rng=rng,
        )  # fmt: skip
        inputs.append([*source, config.eos_id])
        labels.append(target)
    label_array = np.array(labels, np.int64)
    return Calibration(np.array(inputs, np.int64), shift_right(label_array, config), label_array, sentinels, config.pad_id)


def corruption_shape(length: int) -> tuple[int, int, int]:
    """Find (text tokens, spans, dropped tokens) that leave ``length`` encoder tokens."""
    stretch = length
    while True:
        dropped = max(1, round((stretch + 1) * DENSITY))
        spans = max(1, round(dropped / MEAN_SPAN))
        if stretch + 1 - dropped + spans + 1 > length:
            return stretch, *_shape(stretch)
        stretch += 1


def _shape(stretch: int) -> tuple[int, int]:
    dropped = max(1, round(stretch * DENSITY))
    return max(1, round(dropped / MEAN_SPAN)), dropped


class Resampler:
    """Give a sample's text a new span corruption of the same shape.

    One text holds far more predictions than the one corruption it came with: tuning on
    new corruptions of the same calibration texts generalises better than on repeats.
    """

    def __init__(self, data: Calibration, *, config: SwitchConfig) -> None:
        """Restore the samples' texts; ``usable`` is the share that are span corruptions."""
        self._data = data
        self._config = config
        self._marks = set(data.sentinels.tolist())
        keep = data.encoder_keep()
        self._texts: list[list[int] | None] = []
        for i in range(data.samples):
            row, labels = data.input_ids[i][keep[i]].tolist(), data.labels[i].tolist()
            text = restore(row, labels, data.sentinels, config.eos_id) if self._marks else None
            self._texts.append(text if text is not None and self._fits(i, text, len(row)) else None)
        self.usable = sum(text is not None for text in self._texts) / data.samples

    def _fits(self, sample: int, text: Sequence[int], length: int) -> bool:
        """Tell whether a text can be corrupted in the sample's shape: a token or more in and before every span."""
        spans, dropped = self._shape(sample)
        kept = len(text) - dropped
        ended = bool(text) and text[-1] == self._config.eos_id
        return spans < len(self._data.sentinels) and spans <= min(dropped, kept - ended) and kept + spans == length

    def _shape(self, sample: int) -> tuple[int, int]:
        spans = sum(t in self._marks for t in self._data.input_ids[sample].tolist())
        body = target_body(self._data.labels[sample].tolist(), self._config.eos_id)
        return spans, sum(t not in self._marks for t in body)

    def draw(self, indices: Sequence[int], rng: np.random.Generator) -> Calibration:
        """Corrupt some samples anew, in the originals' shapes; others come back as they are."""
        inputs = self._data.input_ids[list(indices)].copy()
        labels = self._data.labels[list(indices)].copy()
        for row, sample in enumerate(indices):
            text = self._texts[sample]
            if text is None:
                continue
            spans, dropped = self._shape(sample)
            ended = bool(text) and text[-1] == self._config.eos_id
            source, target = corrupt(
                text[:-1] if ended else text,
                spans=spans, dropped=dropped, sentinels=self._data.sentinels, rng=rng,
            )  # fmt: skip
            source += [self._config.eos_id] * ended
            # The original may lack the closing sentinel, or end with eos: keep its tail.
            written = min(len(target), int((labels[row] != -100).sum()))
            inputs[row, : len(source)] = source
            labels[row, :written] = target[:written]
        decoder = shift_right(labels, self._config)
        return Calibration(inputs, decoder, labels, self._data.sentinels, self._data.pad_id)
