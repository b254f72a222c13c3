"""Greedy generation: the encoder runs once, the decoder on one token at a time with its keys and values kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from .errors import SwitchError
from .model import SwitchModel
from .tokens import Ids, TokenSet


@dataclass(frozen=True, slots=True, eq=False)
class Generated:
    """What a batch of prompts was continued with.

    tokens : one int64[length] per prompt, without the decoder's start token, up to and with the end token
    steps : forward passes of the decoder
    """

    tokens: tuple[Ids, ...]
    steps: int

    @property
    def n_tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(len(sequence) for sequence in self.tokens)


@torch.inference_mode()
def generate(model: SwitchModel, prompts: TokenSet, *, max_new_tokens: int = 64) -> Generated:
    """Continue prompts greedily, all as one batch, until each has ended or has `max_new_tokens` tokens.

    Under `capacity="per_sequence"` a decoding step is a sequence of one token, so only the encoder can drop.
    """
    if max_new_tokens < 1:
        raise SwitchError(f"max_new_tokens is {max_new_tokens}, not at least 1")
    start = model.vocabulary.start
    if start is None:
        raise SwitchError("config.json has neither decoder_start_token_id nor pad_token_id: nothing to start from")
    module, config = model.module, model.module.decoder.config
    mask = torch.from_numpy(prompts.attention_mask).to(model.device)
    encoded = module.encoder(input_ids=torch.from_numpy(prompts.input_ids).to(model.device), attention_mask=mask)
    cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    last = torch.full((len(prompts), 1), start, device=model.device)
    ends = torch.tensor(model.end_tokens, dtype=torch.int64, device=model.device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)
    said: list[torch.Tensor] = []
    while len(said) < max_new_tokens and not bool(done.all()):
        step = module(encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=last, past_key_values=cache, use_cache=True)
        last = step.logits[:, -1:].argmax(dim=-1)
        said.append(last)
        done |= torch.isin(last[:, 0], ends)
    rows = torch.cat(said, dim=1).cpu().numpy()
    return Generated(tuple(_until_end(row, model.end_tokens) for row in rows), len(said))


def _until_end(row: Ids, ends: tuple[int, ...]) -> Ids:
    places = np.flatnonzero(np.isin(row, ends))
    return row[: int(places[0]) + 1] if len(places) else row
