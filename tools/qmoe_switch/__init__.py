"""Run a Switch Transformer whose experts stay compressed in memory (a consumer of `qmoecodec`; needs torch, transformers).

>>> from qmoe_switch import load, read_tokens, evaluate         # doctest: +SKIP
>>> with load("checkpoint", capacity="none") as model:          # doctest: +SKIP
...     tokens = read_tokens("validation.npz", model.vocabulary, labels=True)
...     print(evaluate(model, tokens).loss)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qmoecodec.errors import FormatError

from .errors import BackendError, CheckpointImportError, SwitchError

if TYPE_CHECKING:
    from .backends import ExpertBackend, ExpertLayer
    from .evaluation import Evaluation, evaluate, logits
    from .generation import Generated, generate
    from .model import SwitchModel, load
    from .tokens import TokenSet, Vocabulary, read_tokens

_HOMES = {
    "backends": ("ExpertBackend", "ExpertLayer"),
    "evaluation": ("Evaluation", "evaluate", "logits"),
    "generation": ("Generated", "generate"),
    "model": ("SwitchModel", "load"),
    "tokens": ("TokenSet", "Vocabulary", "read_tokens"),
}

__all__ = [
    "BackendError",
    "CheckpointImportError",
    "Evaluation",
    "ExpertBackend",
    "ExpertLayer",
    "FormatError",
    "Generated",
    "SwitchError",
    "SwitchModel",
    "TokenSet",
    "Vocabulary",
    "evaluate",
    "generate",
    "load",
    "logits",
    "read_tokens",
]


def __getattr__(name: str) -> Any:
    """Import torch and transformers only when something that needs them is asked for."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
