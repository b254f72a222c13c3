"""Text to tokens with the tokenizer of a checkpoint (`tokenizer.json`), for those checkpoints that have one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qmoecodec.errors import MissingExtraError

from .errors import SwitchError
from .tokens import TokenSet

if TYPE_CHECKING:
    from .model import SwitchModel

FILE = "tokenizer.json"


def read_tokenizer(directory: Path, *, required: bool) -> Any:
    """Read the checkpoint's tokenizer; None where it has none and none is required."""
    path = directory / FILE
    if not path.is_file():
        if required:
            raise SwitchError(f"{directory}: has no {FILE}, so it takes no text; give token files")
        return None
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingExtraError("tokenizers is not installed: pip install 'qmoecodec[hf]'") from error
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for whatever it cannot read
        raise SwitchError(f"{path}: not a readable tokenizer ({error})") from None


def tokenize(tokenizer: Any, texts: Sequence[str], model: SwitchModel) -> TokenSet:
    """Encode texts, each with the end token behind it, padded to one length.

    Raises SwitchError for a tokenizer with more tokens than the model has.
    """
    vocabulary = model.vocabulary
    if tokenizer.get_vocab_size() > vocabulary.size:
        raise SwitchError(
            f"{model.checkpoint.directory}: {FILE} has {tokenizer.get_vocab_size()} tokens, the model {vocabulary.size}: "
            "it belongs to another model"
        )
    # Settings for batches that a tokenizer.json may hold: they would cut prompts, or put padding before the end token.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    rows = [tokenizer.encode(text).ids for text in texts]
    for row in rows:
        if row and max(row) >= vocabulary.size:
            raise SwitchError(
                f"{model.checkpoint.directory}: {FILE} gives token {max(row)}, the model has {vocabulary.size}: "
                "it belongs to another model"
            )
        if model.end_tokens and row[-1:] != [model.end_tokens[0]]:
            row.append(model.end_tokens[0])
    length = max(len(row) for row in rows)
    if length == 0 or (min(len(row) for row in rows) < length and vocabulary.pad is None):
        raise SwitchError("prompts are empty, or of different lengths for a model without a pad token")
    ids = np.full((len(rows), length), vocabulary.pad or 0, np.int64)
    mask = np.zeros((len(rows), length), np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return TokenSet(ids, mask)
