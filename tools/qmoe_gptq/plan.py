"""Estimate a run's peak memory and time before it starts, and choose how to tune."""

from __future__ import annotations

import importlib
import math
import os
import resource
import sys
import time
from dataclasses import dataclass

import torch

from .calibration import Calibration
from .checkpoint import Checkpoint
from .errors import QuantizeError
from .experts import REFITS, SEARCH_SHARE
from .settings import Settings
from .walk import BATCH_TOKENS

MEMORY_SHARE = 0.6
TYPICAL_SEARCH = 4
# What the solver reaches of the matrix-product speed, within a factor of two: on the CPU its inner loop streams whole
# columns through memory instead of multiplying tiles; on a GPU a kernel keeps them in registers.
SOLVER_EFFICIENCY = {"cpu": 0.04, "cuda": 0.5}
TUNE_EFFICIENCY = 0.45
WALK_EFFICIENCY = 0.5


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is expected to need.

    tune : the resolved --tune
    memory_bytes : peak resident memory of the compute device (on the CPU: of the process)
    scratch_bytes : disk needed beside the output
    seconds : wall time, by phase
    """

    tune: str
    memory_bytes: int
    scratch_bytes: int
    seconds: dict[str, float]

    @property
    def total_seconds(self) -> float:
        """All phases together."""
        return sum(self.seconds.values())


def make_plan(checkpoint: Checkpoint, data: Calibration, settings: Settings, *, offload: bool) -> Plan:
    """Estimate from shapes and from the speed of a few matrix products on this machine.

    ``--tune auto`` is ``model`` when tuning the resident model fits into 60% of the memory
    available now, else ``block``; methods other than gptq are never tuned.
    """
    tune = resolve_tune(checkpoint, data, settings)
    memory = walk_memory(checkpoint, data, settings, block=tune == "block", offload=offload)
    if tune == "model":
        memory = max(memory, tune_memory(checkpoint, data, settings))
    weights = expert_weights(checkpoint)
    scratch = weights * (4.2 if tune == "model" else 0.2) + sum(f.stat().st_size for f in set(checkpoint.files.values()))
    if tune == "model":
        scratch += 12 * weights
    if offload:
        scratch += activation_bytes(checkpoint, data, block=tune == "block")
    return Plan(tune, int(memory), int(scratch), estimate_seconds(checkpoint, data, settings, tune))


def resolve_tune(checkpoint: Checkpoint, data: Calibration, settings: Settings) -> str:
    """Turn ``auto`` into what it means here."""
    if settings.tune != "auto":
        return settings.tune
    if settings.method != "gptq":
        return "none"
    fits = tune_memory(checkpoint, data, settings) <= MEMORY_SHARE * available_memory(settings.device)
    return "model" if fits else "block"


def expert_weights(checkpoint: Checkpoint) -> int:
    """Count the weights in experts."""
    return sum(math.prod(checkpoint.shape(name)) for name in checkpoint.expert_names)


def dense_weights(checkpoint: Checkpoint) -> int:
    """Count all other weights."""
    return sum(math.prod(checkpoint.shape(name)) for name in checkpoint.dense_names)


def activation_bytes(checkpoint: Checkpoint, data: Calibration, *, block: bool) -> int:
    """Count the bytes of the list buffers: encoder and decoder, twice when the original is followed too."""
    tokens = data.input_ids.size + data.decoder_input_ids.size
    return int(tokens * checkpoint.config.d_model * 4 * (2 if block else 1))


def walk_memory(checkpoint: Checkpoint, data: Calibration, settings: Settings, *, block: bool, offload: bool) -> float:
    """Estimate the peak bytes of the layer-by-layer pass."""
    c = checkpoint.config
    group = min(settings.group, c.experts)
    per_matrix = c.d_ff * c.d_model
    # Source, both projections; then per weight of one projection: working copy, margins, digits, temporaries.
    experts = group * per_matrix * (2 * 4 + 30)
    # Hessians, their factors, a damped copy; float64 for one expert at a time.
    hessians = c.d_ff**2 * (group * (4 + 4 + 4) + 6 * 8)
    tokens = max(data.input_ids.size, data.decoder_input_ids.size)
    share = min(1.0, settings.token_cap * group / c.experts)
    # The busiest expert of a trained router sees about twice the mean, rarely the whole cap.
    widest = min(tokens, min(settings.token_cap, 2.0) * tokens / c.experts)
    gathered = tokens * share * c.d_model * (5 if block else 2) * 4 + widest * c.d_ff * 8
    batch = BATCH_TOKENS * (8 * c.d_model + c.heads * max(data.input_ids.shape[1], 1) + c.d_ff) * 4
    table = c.vocabulary * c.d_model * 4
    resident = 0 if offload else activation_bytes(checkpoint, data, block=block)
    return float(process_bytes() + experts + hessians + gathered + max(batch, table) + resident)


def tune_memory(checkpoint: Checkpoint, data: Calibration, settings: Settings) -> float:
    """Estimate the peak bytes of tuning the resident model."""
    c = checkpoint.config
    weights = expert_weights(checkpoint)
    # Original, margin, two moments, gradient, values and their gradient, masks, temporaries.
    matrices = weights * (4 + 4 + 8 + 4 + 4 + 4 + 2 + 8)
    source, target = data.input_ids.shape[1], data.decoder_input_ids.shape[1]
    blocks = c.encoder_blocks + c.decoder_blocks
    tokens = settings.batch * (source + target)
    states = tokens * blocks * (14 * c.d_model + 2 * c.d_ff) * 4
    attention = settings.batch * blocks * c.heads * (source * source + target * (source + target)) * 4
    vocabulary = settings.batch * target * c.vocabulary * 4 * 6
    return float(process_bytes() + matrices + dense_weights(checkpoint) * 4 + states + attention + vocabulary)


def estimate_seconds(checkpoint: Checkpoint, data: Calibration, settings: Settings, tune: str) -> dict[str, float]:
    """Estimate wall time by phase."""
    c = checkpoint.config
    speed = product_speed(settings.device)
    layers = len(checkpoint.layers)
    weights = expert_weights(checkpoint)
    tokens = data.input_ids.size + data.decoder_input_ids.size
    blocks = c.encoder_blocks + c.decoder_blocks
    inner = c.heads * c.d_kv
    per_token_block = 2 * (4 * c.d_model * inner + 2 * c.d_model * c.d_ff)
    passes = 2 if tune == "block" else 1
    forward = tokens * per_token_block * blocks / 2 * passes / (speed * WALK_EFFICIENCY)
    seconds = {"forward": forward}
    if settings.method != "rtn":
        # Every token meets one expert per layer: outer products of d_model and d_ff wide inputs.
        hessian = 2 * tokens / 2 * layers * (c.d_model**2 + c.d_ff**2 + c.d_model * c.d_ff)
        factor = layers * c.experts * (c.d_model**3 + c.d_ff**3) * 2
        solves = 1.0
        if settings.method == "gptq":
            rounds = REFITS + 1
            solves = (1 if settings.target_bits is None else 0) + rounds * (2 + TYPICAL_SEARCH / SEARCH_SHARE)
        solver = solves * weights * (c.d_model + c.d_ff) / 2
        efficiency = SOLVER_EFFICIENCY[settings.device.partition(":")[0]]
        seconds["gptq"] = (hessian + factor) / (speed * WALK_EFFICIENCY) + solver * 2 / (speed * efficiency)
    if tune == "model":
        label = data.decoder_input_ids.size * 2 * c.d_model * c.vocabulary
        once = tokens * per_token_block * blocks / 2 + label
        overhead = 2 * weights * 30 * data.samples / settings.batch
        seconds["tune"] = settings.epochs * (4 * once + overhead) / (speed * TUNE_EFFICIENCY)
    elif tune == "block":
        once = tokens / 2 * layers * 4 * c.d_model * c.d_ff
        seconds["tune"] = settings.epochs * 3 * once * 2 / (speed * TUNE_EFFICIENCY)
    return seconds


def product_speed(device: str) -> float:
    """Measure float32 matrix products, in operations per second."""
    size = 1024 if device == "cpu" else 4096
    a = torch.ones(size, size, device=device)
    a @ a
    best = math.inf
    for _ in range(12):
        _wait(device)
        start = time.perf_counter()
        a @ a
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def available_memory(device: str) -> int:
    """Bytes that can be taken now."""
    if device != "cpu":
        return int(torch.cuda.mem_get_info()[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            facts = dict(line.split(":", 1) for line in lines)
        return int(facts["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def process_bytes() -> int:
    """Resident bytes of this process now."""
    try:
        with open("/proc/self/statm", encoding="ascii") as line:
            return int(line.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return peak_bytes("cpu")


def peak_bytes(device: str) -> int:
    """Peak bytes so far: of the process, or of the device's allocations."""
    if device != "cpu":
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def check_device(device: str) -> None:
    """Raise QuantizeError when the device is not there, or not what it needs; there is no silent fallback to the CPU."""
    if device == "cpu":
        return
    if not torch.cuda.is_available():
        raise QuantizeError(f"device {device!r}: this torch has no usable CUDA device")
    try:
        importlib.import_module("cupy")
    except ImportError as error:
        raise QuantizeError(f"device {device!r} needs cupy: pip install 'qmoecodec[cuda]'") from error


__all__ = ["Plan", "available_memory", "check_device", "make_plan", "peak_bytes", "resolve_tune"]
