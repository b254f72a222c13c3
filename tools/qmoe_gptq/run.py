"""The whole run: checkpoint and calibration data in, packed checkpoint directory out."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from . import model as net
from . import plan as planning
from .calibration import Calibration, load_text, load_tokens
from .checkpoint import Checkpoint
from .errors import QuantizeError
from .gptq import Ternary
from .output import pack_directory, publish, write_dense
from .plan import Plan
from .rate import PAPER_MARGIN, TYPICAL_OVERHEAD, entropies, payload_bits, total_payload
from .results import Results
from .settings import Settings
from .store import UnitStore, sync
from .tune import ModelTuner, Tuned
from .walk import LayerReport, Walk

Tensor = torch.Tensor
PAYLOAD_TOLERANCE = 0.004
PAYLOAD_ROUNDS = 5
CHECK_SAMPLES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to run, none of which changes the result.

    offload : activations in files instead of in memory
    check_fit : refuse calibration data that the original model predicts no better than chance
    """

    resume: bool = True
    max_fallback: float = 1.0
    offload: bool = False
    keep_work: bool = False
    packed: bool = True
    threads: int | None = None
    check_fit: bool = True

    def __post_init__(self) -> None:
        """Raise QuantizeError when an option is out of its range."""
        if not 0 <= self.max_fallback <= 1:
            raise QuantizeError("max fallback must be a share, 0 to 1")


def load_calibration(path: Path, checkpoint: Checkpoint, *, samples: int | None, seed: int) -> Calibration:
    """Read a token file, or make samples from raw text (any suffix but .npz)."""
    if not path.is_file():
        raise QuantizeError(f"{path}: no such file")
    config, directory = checkpoint.config, checkpoint.directory
    if path.suffix != ".npz":
        return load_text(path, config=config, model_dir=directory, samples=samples or 1024, seed=seed)
    data = load_tokens(path, config=config, model_dir=directory).head(samples)
    if not data.decoder_keep().any():
        raise QuantizeError(f"{path}: no label counts, all of the {data.samples} samples' are -100 or the pad token")
    return data


def prepare(
    model_dir: Path, calibration: Path, *, samples: int | None, settings: Settings, options: Options
) -> tuple[Checkpoint, Calibration, Plan]:
    """Open the inputs and plan the run; writes nothing."""
    planning.check_device(settings.device)
    if settings.device != "cpu":
        # Sums in scatter and matrix products may otherwise depend on scheduling; read by cuBLAS at its first call.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    if options.threads:
        torch.set_num_threads(options.threads)
    checkpoint = Checkpoint(model_dir)
    data = load_calibration(calibration, checkpoint, samples=samples, seed=settings.seed)
    if settings.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    return checkpoint, data, planning.make_plan(checkpoint, data, settings, offload=options.offload)


def quantize_checkpoint(
    checkpoint: Checkpoint,
    data: Calibration,
    plan: Plan,
    out: Path,
    *,
    settings: Settings,
    options: Options,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Quantize, pack and publish; returns the report.

    Unfinished work lies in ``OUT.work`` beside the output, which appears only when whole.
    Raises QuantizeError: see the message; the output directory does not exist then.
    """
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise QuantizeError(f"{out}: exists already, choose another output directory")
    started = time.monotonic()
    if options.check_fit:
        check_fit(checkpoint, data, settings)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.with_name(out.name + ".work")
    tune, fingerprint = _settle_run(work, checkpoint, data, plan, settings, resume=options.resume)
    store = UnitStore(work / "units", fingerprint=fingerprint, resume=options.resume)
    seconds: dict[str, float] = {}

    mark = time.monotonic()
    walk = Walk(
        checkpoint, data,
        settings=settings, tune=tune, target_bits=settings.target_bits, store=store,
        scratch=work / "scratch" if options.offload else None,
        max_fallback=options.max_fallback, progress=progress,
    )  # fmt: skip
    layers = walk.run()
    dtype = checkpoint.level_dtype
    del walk
    shutil.rmtree(work / "scratch", ignore_errors=True)
    seconds["walk"] = time.monotonic() - mark

    mark = time.monotonic()
    results = Results(checkpoint, store, settings)
    tuned = None
    if tune == "model":
        tuned = tune_model(checkpoint, data, results, settings, store=store, dtype=dtype, progress=progress)
        results.replace(tuned)
        seconds["tune"] = time.monotonic() - mark

    mark = time.monotonic()
    progress("writing")
    facts = _facts(checkpoint, data, settings, tune, layers, results)
    built = write_output(checkpoint, results, tuned, work, packed=options.packed)
    publish(built, out, facts)
    seconds["write"] = time.monotonic() - mark
    if not options.keep_work:
        shutil.rmtree(work)
    return {
        **facts,
        "seconds": {**seconds, "total": time.monotonic() - started},
        "estimated": {**asdict(plan), "total_seconds": plan.total_seconds},
        "peak_memory_bytes": planning.peak_bytes(settings.device),
        "output_bytes": sum(f.stat().st_size for f in out.iterdir()),
    }


def tune_model(
    checkpoint: Checkpoint,
    data: Calibration,
    results: Results,
    settings: Settings,
    *,
    store: UnitStore,
    dtype: torch.dtype,
    progress: Callable[[str], None],
) -> Tuned:
    """Tune the resident model at the paper's rate or at the payload bits asked for."""
    start = results.start()
    if settings.target_bits is None:
        # Per matrix, so that wi and wo of different sizes would count by their weights.
        sums = [(float(paper.sum()) * digits[0].numel(), digits.numel()) for digits, paper in results.parts()]
        target = PAPER_MARGIN * sum(bits for bits, _ in sums) / sum(count for _, count in sums)
    else:
        target = settings.target_bits / _overhead(start)
    tuner = ModelTuner(checkpoint, start, data, settings=settings, target=target)
    del start
    tuner.run(store=store, progress=lambda n, of, loss: progress(f"tune {n}/{of}: divergence {loss:.4f}") if n % 8 == 0 else None)
    tuned = tuner.result(dtype)
    if settings.target_bits is not None:
        for _ in range(PAYLOAD_ROUNDS):
            spent = total_payload(t.digits for t in tuned.matrices.values())
            if abs(spent / settings.target_bits - 1) <= PAYLOAD_TOLERANCE:
                break
            tuner.target *= settings.target_bits / spent
            tuned = tuner.result(dtype)
    return tuned


def _overhead(matrices: dict[str, Ternary]) -> float:
    """Measure payload bits over entropy."""
    entropy = sum(float(entropies(t.digits).sum()) * t.digits[0].numel() for t in matrices.values())
    payload = sum(payload_bits(t.digits) for t in matrices.values())
    return payload / entropy if entropy else TYPICAL_OVERHEAD


@torch.no_grad()
def check_fit(checkpoint: Checkpoint, data: Calibration, settings: Settings) -> None:
    """Raise QuantizeError when the original model knows no more of the data than chance.

    Token ids of another tokenizer can all lie inside the vocabulary; the original model's
    loss on them gives them away. Skipped for a model too large to be held.
    """
    size = 4 * (planning.expert_weights(checkpoint) + planning.dense_weights(checkpoint))
    if size > planning.MEMORY_SHARE * planning.available_memory(settings.device):
        return
    d = data.take(np.flatnonzero(data.decoder_keep().any(1))[:CHECK_SAMPLES].tolist())
    keep = torch.from_numpy(d.encoder_keep())
    given = net.forward(
        checkpoint.config,
        checkpoint.load(checkpoint.names),
        torch.from_numpy(d.input_ids),
        torch.from_numpy(d.decoder_input_ids),
        keep=None if bool(keep.all()) else keep,
    )
    loss = float(F.cross_entropy(given.flatten(0, 1), torch.from_numpy(d.labels).flatten()))
    chance = float(np.log(checkpoint.config.vocabulary))
    if not loss < chance:
        raise QuantizeError(
            f"the original model's loss on the calibration data is {loss:.2f}, guessing gives {chance:.2f}: "
            "calibration data of another model? (--no-check-fit for a model that has not been trained)"
        )


def write_output(checkpoint: Checkpoint, results: Results, tuned: Tuned | None, work: Path, *, packed: bool) -> Path:
    """Write the result into the work directory; returns the directory to publish."""
    plain, built = work / "dense", work / "packed"
    for directory in (plain, built):
        shutil.rmtree(directory, ignore_errors=True)
    write_dense(checkpoint, plain, results, tuned.norms if tuned else {})
    if not packed:
        return plain
    pack_directory(plain, built)
    shutil.rmtree(plain)
    for name in ("config.json", "tokenizer.json"):
        if (checkpoint.directory / name).is_file() and not (built / name).is_file():
            shutil.copyfile(checkpoint.directory / name, built / name)
    return built


def _settle_run(
    work: Path, checkpoint: Checkpoint, data: Calibration, plan: Plan, settings: Settings, *, resume: bool
) -> tuple[str, str]:
    """Fix what a resumed run must not decide anew: how to tune, and the number of threads.

    Free memory may have changed since the first attempt, and sums depend on the number of
    threads; both are part of the result.
    """
    inputs = (checkpoint.fingerprint(), data.fingerprint())
    facts: dict[str, Any] = {
        "inputs": settings.fingerprint(*inputs, tune="unresolved"),
        "tune": plan.tune,
        "threads": torch.get_num_threads(),
    }
    path = work / "run.json"
    try:
        earlier = json.loads(path.read_text(encoding="utf-8")) if resume else None
    except (OSError, ValueError):
        earlier = None
    if isinstance(earlier, dict) and earlier.keys() == facts.keys() and earlier["inputs"] == facts["inputs"]:
        facts = earlier
        torch.set_num_threads(int(facts["threads"]))
    else:
        work.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(facts), encoding="utf-8")
        sync(partial)
        partial.replace(path)
    return facts["tune"], settings.fingerprint(*inputs, str(facts["threads"]), tune=facts["tune"])


def _facts(
    checkpoint: Checkpoint,
    data: Calibration,
    settings: Settings,
    tune: str,
    layers: list[LayerReport],
    results: Results,
) -> dict[str, Any]:
    """Collect what is true of the result, in every run alike."""
    bits = payload = weights = zeros = paper = 0.0
    for digits, paper_entropy in results.parts():
        size = digits[0].numel()
        bits += float(entropies(digits).sum()) * size
        payload += payload_bits(digits)
        zeros += float((digits == 0).sum())
        weights += digits.numel()
        paper += float(paper_entropy.sum()) * size
    return {
        "schema": 1,
        "method": settings.method,
        "tune": tune,
        "samples": data.samples,
        "seed": settings.seed,
        "n_weights": int(weights),
        "zeros": zeros / weights,
        "entropy_bits_per_weight": bits / weights,
        "payload_bits_per_weight": payload / weights,
        "target_bits": settings.target_bits,
        "paper_entropy_bits_per_weight": paper / weights if np.isfinite(paper) else None,
        "fallback": [{"layer": r.layer, "matrix": which, "expert": expert} for r in layers for which, expert in r.fallback],
        "coverage": [{"layer": r.layer, "tokens": r.tokens, "used": r.used, "special_used_by": r.unmasked} for r in layers],
    }
