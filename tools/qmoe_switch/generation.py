"""Greedy generation: the encoder runs once, the decoder on one token at a time with its keys and values kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .decoding import Decoder, capture
from .errors import BackendError, SwitchError
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
def generate(model: SwitchModel, prompts: TokenSet, *, max_new_tokens: int = 64, graph: bool | None = None) -> Generated:
    """Continue prompts greedily, all as one batch, until each has ended or has `max_new_tokens` tokens.

    graph : whether to capture the decoding step in a CUDA graph and replay it for every token but the first, with memory
        for the keys and values of `max_new_tokens`; None for yes where `why_not_captured` has no objection

    Under `capacity="per_sequence"` a decoding step is a sequence of one token, so only the encoder can drop.
    Raises SwitchError for settings that make no sense, BackendError where a graph is asked for and cannot be had.
    """
    if max_new_tokens < 1:
        raise SwitchError(f"max_new_tokens is {max_new_tokens}, not at least 1")
    start = model.vocabulary.start
    if start is None:
        raise SwitchError("config.json has neither decoder_start_token_id nor pad_token_id: nothing to start from")
    obstacle = why_not_captured(model)
    if graph and obstacle:
        raise BackendError(f"the decoding step cannot be captured in a CUDA graph: {obstacle}")
    is_captured = obstacle is None if graph is None else graph
    decoder = Decoder(model, prompts, start=start, length=max_new_tokens, is_static=is_captured)
    decoder.step()
    steps, step = 1, decoder.step
    while steps < max_new_tokens and not bool(decoder.all_done):
        if is_captured and steps == 1:
            step = capture(decoder.step, model.device)
        step()
        steps += 1
    rows = decoder.said[:, :steps].cpu().numpy()
    return Generated(tuple(_until_end(row, model.end_tokens) for row in rows), steps)


def why_not_captured(model: SwitchModel) -> str | None:
    """Say what keeps a decoding step of the model from being captured in a CUDA graph; None if nothing does."""
    if len(model.devices) > 1:
        return "it runs on several devices"
    if model.device.type != "cuda":
        return f"the model is on {model.device}"
    if not model.backend.is_capturable:
        return f"the backend {model.backend.name} asks the device where the tokens go"
    return None


def _until_end(row: Ids, ends: tuple[int, ...]) -> Ids:
    places = np.flatnonzero(np.isin(row, ends))
    return row[: int(places[0]) + 1] if len(places) else row
