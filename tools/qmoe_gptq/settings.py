"""The settings of a run, validated, and the fingerprint that ties finished units to them."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass

from .errors import QuantizeError

METHODS = ("gptq", "gptq-2023", "rtn")
TUNES = ("auto", "model", "block", "none")
LOWEST_BITS, HIGHEST_BITS = 0.3, 1.58
# Part of every fingerprint: raise it when the same settings begin to give other digits.
ALGORITHM = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that decides which digits and levels come out.

    target_bits : payload bits per weight as the codec spends them; None is the rate that
        the paper's method would spend on this model
    damping : share of the Hessian's mean diagonal added to its diagonal
    mask_special : leave sentinels out of the Hessian; None means "for gptq, not for gptq-2023"
    token_cap : most tokens an expert's Hessian takes, as a multiple of the mean per expert
    min_tokens : fewest tokens an expert needs; below, it is rounded to nearest
    group : experts quantized at once
    epochs : passes over the calibration set when tuning
    """

    method: str = "gptq"
    target_bits: float | None = None
    tune: str = "auto"
    damping: float = 0.1
    mask_special: bool | None = None
    token_cap: float = 4.0
    min_tokens: int = 1
    group: int = 16
    epochs: float = 8.0
    batch: int = 32
    resample: bool = True
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Raise QuantizeError when a setting is out of its range."""
        if self.method not in METHODS:
            raise QuantizeError(f"method {self.method!r} is not one of {', '.join(METHODS)}")
        if self.tune not in TUNES:
            raise QuantizeError(f"tune {self.tune!r} is not one of {', '.join(TUNES)}")
        if self.target_bits is not None:
            if self.method != "gptq":
                raise QuantizeError("--target-bits needs --method gptq: the other methods have no rate to choose")
            if not LOWEST_BITS <= self.target_bits <= HIGHEST_BITS:
                raise QuantizeError(f"target bits {self.target_bits} is outside {LOWEST_BITS}..{HIGHEST_BITS}")
        if self.method != "gptq" and self.tune not in ("auto", "none"):
            raise QuantizeError(f"--tune {self.tune} needs --method gptq")
        if not 0 < self.damping < math.inf:
            raise QuantizeError("damping must be a number above 0")
        if not 1 <= self.token_cap < math.inf:
            raise QuantizeError("token cap must be a number from 1 on (times the mean)")
        if self.group < 1 or self.batch < 1 or self.min_tokens < 1 or not 0 < self.epochs < math.inf:
            raise QuantizeError("group, batch, min tokens and epochs must be positive numbers")
        if self.seed < 0:
            raise QuantizeError("seed must be 0 or more")

    @property
    def masks_special(self) -> bool:
        """Whether sentinels are left out of the Hessian, the default resolved."""
        return self.method == "gptq" if self.mask_special is None else self.mask_special

    def fingerprint(self, *parts: str, tune: str) -> str:
        """Hash the settings, the resolved tuning and the inputs' own fingerprints."""
        facts = {**asdict(self), "mask_special": self.masks_special, "tune": tune, "algorithm": ALGORITHM}
        return hashlib.sha256(json.dumps([facts, *parts], sort_keys=True).encode()).hexdigest()
