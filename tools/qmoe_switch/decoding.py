"""One step of greedy decoding, with keys and values that grow, or of a fixed size so that a CUDA graph can hold the step."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache

from .errors import BackendError
from .model import SwitchModel
from .tokens import TokenSet


class Decoder:
    """The decoding of one batch of prompts: making it runs the encoder, each `step` adds a token to every sequence.

    said : int64[batch, length]    what the steps so far have said; columns beyond them hold nothing yet
    all_done : bool[]    whether every sequence has had an end token

    A step reads and writes device memory alone. With `is_static` it also does so at the same addresses and in the same
    shapes every time from the second step on: attention then looks at all `length` places of the self-attention's keys
    and a mask hides those not filled yet. The first step is not like the others, since it also computes the
    cross-attention's keys and values.
    """

    def __init__(self, model: SwitchModel, prompts: TokenSet, *, start: int, length: int, is_static: bool) -> None:
        module, device = model.module, model.device
        config = module.decoder.config
        mask = torch.from_numpy(prompts.attention_mask).to(device)
        self._module = module
        self._encoded = module.encoder(input_ids=torch.from_numpy(prompts.input_ids).to(device), attention_mask=mask)
        own: Any = StaticCache(config=config, max_cache_len=length) if is_static else DynamicCache(config=config)
        self._cache = EncoderDecoderCache(own, DynamicCache(config=config))
        self._columns: torch.Tensor | None = None
        if is_static:
            # transformers takes masks of four dimensions as they are. Those that it makes itself come from the host.
            dtype = module.shared.weight.dtype
            self._columns = torch.arange(length, device=device)[None, None, None]
            self._hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=device)
            self._seen = torch.zeros((), dtype=dtype, device=device)
            mask = torch.where(mask[:, None, None] != 0, self._seen, self._hidden)
        self._mask = mask
        self._ends = torch.tensor(model.end_tokens, dtype=torch.int64, device=device)
        self._last = torch.full((len(prompts), 1), start, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        self.said = torch.zeros((len(prompts), length), dtype=torch.int64, device=device)
        self.all_done = torch.zeros((), dtype=torch.bool, device=device)

    def step(self) -> None:
        """Add the most probable token to every sequence; at most `length` times."""
        masks = {}
        if self._columns is not None:
            masks["decoder_attention_mask"] = torch.where(self._columns <= self._position, self._seen, self._hidden)
        logits = self._module(
            encoder_outputs=self._encoded,
            attention_mask=self._mask,
            decoder_input_ids=self._last,
            past_key_values=self._cache,
            use_cache=True,
            **masks,
        ).logits
        self._last.copy_(logits[:, -1:].argmax(dim=-1))
        self.said.index_copy_(1, self._position, self._last)
        self._done |= (self._last == self._ends).any(dim=-1)
        self.all_done.copy_(self._done.all())
        self._position += 1


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream per device: torch's own for captures belongs to the device of the first capture of all, and cuBLAS keeps a
    workspace, 32 MiB on Hopper, for every stream that it was used on."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def capture(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Capture a step on a device in a CUDA graph and return what replays it.

    The step must have run before, for what is made at first use; it does not run now.
    Raises BackendError where something in the step cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=_capture_stream(device)):
            step()
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise BackendError(f"the decoding step cannot be captured in a CUDA graph: {reason}") from error
    replay: Callable[[], None] = graph.replay
    return replay
