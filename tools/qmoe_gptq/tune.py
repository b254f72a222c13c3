"""Tune a whole resident model's digits, levels and layer norms against the original.

The target is the original model's output distribution on the calibration texts
(Kullback-Leibler divergence at every decoder position), so labels are not needed and
every position teaches as many numbers as the vocabulary has entries. Digits move by the
straight-through estimator (``ste``), at a constant rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from . import model as net
from .calibration import Calibration, Resampler
from .checkpoint import PROJECTIONS, Checkpoint, SparseLayer
from .errors import QuantizeError
from .gptq import Ternary
from .settings import Settings
from .ste import Trainable, mean_entropy, settle, steer
from .store import UnitStore

Tensor = torch.Tensor
Result = dict[str, Ternary]

# Step sizes are relative (margins are in thresholds, levels in logarithms, norms near 1),
# so they carry over between models of different scale.
MARGIN_RATE, LEVEL_RATE, NORM_RATE = 2e-2, 3e-3, 1e-3
WARMUP = 0.05
BETAS = (0.9, 0.95)
EPSILON = 1e-12
SNAPSHOT_STEPS = 32
SNAPSHOT = "tune-snapshot"


@dataclass(frozen=True, slots=True)
class Tuned:
    """What tuning gives: matrices by tensor prefix, layer norms by name, the mean entropy reached."""

    matrices: Result
    norms: dict[str, Tensor]
    entropy: float


class ModelTuner:
    """The original model and its trainable ternary twin, both resident."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        start: Mapping[str, Ternary],
        data: Calibration,
        *,
        settings: Settings,
        target: float,
    ) -> None:
        """Set up from the solver's result; ``target`` is the mean entropy in bits per digit."""
        self.config = checkpoint.config
        self.settings = settings
        self.target = target
        self.data = data
        device = settings.device
        self.teacher = checkpoint.load(checkpoint.names, device=device)
        self.matrices = {key: Trainable(ternary.to(device)) for key, ternary in start.items()}
        self.layers = checkpoint.layers
        encoder = [layer.block for layer in self.layers if layer.stack == "encoder"]
        self.first = min(encoder, default=self.config.encoder_blocks)
        self.norms = {name: self.teacher[name].clone().requires_grad_() for name in self._tunable_norms(checkpoint)}
        self.threshold = 1.0
        self.resampler = Resampler(data, config=self.config) if settings.resample else None
        self.optimizer = torch.optim.Adam(
            [
                {"params": [m.margin for m in self.matrices.values()], "lr": MARGIN_RATE},
                {"params": [m.log_levels for m in self.matrices.values()], "lr": LEVEL_RATE},
                {"params": list(self.norms.values()), "lr": NORM_RATE},
            ],
            betas=BETAS,
            eps=EPSILON,
            foreach=False,
            fused=True,
        )
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self.per_epoch = max(1, data.samples // settings.batch)
        self.steps = max(1, round(settings.epochs * self.per_epoch))

    def _tunable_norms(self, checkpoint: Checkpoint) -> list[str]:
        """List the layer norms behind the first ternary matrix; nothing before it needs correcting."""
        frozen = tuple(f"encoder.block.{b}." for b in range(self.first))
        frozen += (f"encoder.block.{self.first}.layer.0.",)
        if self.first == self.config.encoder_blocks:
            frozen += ("encoder.",)
        return [n for n in checkpoint.dense_names if n.endswith("layer_norm.weight") and not n.startswith(frozen)]

    def student(self) -> dict[str, Tensor]:
        """Assemble the ternary twin's weights, differentiable where tuned."""
        weights = {**self.teacher, **self.norms}
        for layer in self.layers:
            for which in PROJECTIONS:
                values = self.matrices[matrix_key(layer, which)].values(self.threshold)
                for expert, value in enumerate(values.unbind(0)):
                    weights[layer.expert_name(expert, which)] = value
        return weights

    def batch(self, step: int) -> Calibration:
        """Draw a step's samples; depends on the seed and the step only, so a run can resume anywhere."""
        epoch, at = divmod(step, self.per_epoch)
        order = np.random.default_rng([self.settings.seed, 1, epoch]).permutation(self.data.samples)
        chosen = order[at * self.settings.batch : (at + 1) * self.settings.batch].tolist()
        # The first epoch sees the samples as they came.
        if self.resampler is not None and epoch:
            return self.resampler.draw(chosen, np.random.default_rng([self.settings.seed, 2, step]))
        return self.data.take(chosen)

    def loss(self, batch: Calibration) -> Tensor:
        """Compute the divergence of the twin's predictions from the original's on one batch."""
        device = self.settings.device
        keep = torch.from_numpy(batch.encoder_keep()).to(device)
        ids = torch.from_numpy(batch.input_ids).to(device)
        decoder_ids = torch.from_numpy(batch.decoder_input_ids).to(device)
        counted = torch.from_numpy(batch.decoder_keep()).to(device)
        padded = None if bool(keep.all()) else keep
        with torch.no_grad():
            common = self._common(ids, padded)
            wanted = self._finish(self.teacher, common, decoder_ids, padded)
            wanted = F.log_softmax(wanted[counted], dim=-1)
        given = self._finish(self.student(), common, decoder_ids, padded)
        # Not "batchmean": a batch may hold no position that counts.
        total = F.kl_div(F.log_softmax(given[counted], dim=-1), wanted, reduction="sum", log_target=True)
        return total / max(1, len(wanted))

    def _common(self, ids: Tensor, keep: Tensor | None) -> Tensor:
        """Run the encoder up to its first ternary matrix: the same in both models."""
        w, config = self.teacher, self.config
        x = net.embed(w, "encoder", ids)
        bias = self._bias("encoder", x.shape[1], keep)
        for block in range(min(self.first + 1, config.encoder_blocks)):
            x = net.attention_part(config, w, "encoder", block, x, bias=bias)
            if block < self.first:
                x = net.ffn(config, w, config.ffn_prefix("encoder", block), x)
        return x

    def _bias(self, stack: str, length: int, keep: Tensor | None) -> Tensor:
        bias = net.self_bias(self.config, self.teacher, stack, length)
        padding = net.padding_bias(keep)
        return bias if padding is None else bias + padding

    def _finish(self, weights: Mapping[str, Tensor], x: Tensor, decoder_ids: Tensor, keep: Tensor | None) -> Tensor:
        """Run the rest of the model, up to the logits."""
        config = self.config
        bias = self._bias("encoder", x.shape[1], keep)
        for block in range(self.first, config.encoder_blocks):
            if block > self.first:
                x = net.attention_part(config, weights, "encoder", block, x, bias=bias)
            x = net.ffn(config, weights, config.ffn_prefix("encoder", block), x)
        memory = net.final_norm(config, weights, "encoder", x)
        hidden = net.run_stack(
            config,
            weights,
            "decoder",
            net.embed(weights, "decoder", decoder_ids),
            memory=memory,
            memory_keep=keep,
        )
        return net.logits(config, weights, hidden)

    def step(self, number: int) -> float:
        """Do one optimizer step; returns the batch's divergence."""
        share = number / self.steps
        factor = min(1.0, (number + 1) / max(1.0, WARMUP * self.steps)) * (1 - share)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.batch(number))
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.threshold = steer(self.threshold, mean_entropy(self.matrices.values(), self.threshold), self.target)
        return float(loss.detach())

    def run(self, *, store: UnitStore | None, progress: Callable[[int, int, float], None]) -> None:
        """Tune to the end, from the last snapshot if the store holds one."""
        number = self._restore(store) if store else 0
        while number < self.steps:
            loss = self.step(number)
            if not math.isfinite(loss):
                raise QuantizeError(f"tuning diverged at step {number} of {self.steps}: use --tune block or none")
            number += 1
            progress(number, self.steps, loss)
            if store and number % SNAPSHOT_STEPS == 0:
                self._snapshot(store, number)

    def result(self, dtype: torch.dtype) -> Tuned:
        """Settle the threshold so that the rate is at most the target, and freeze."""
        matrices = list(self.matrices.values())
        threshold = settle(matrices, self.target)
        return Tuned(
            matrices={key: m.result(threshold, dtype) for key, m in self.matrices.items()},
            norms={name: value.detach() for name, value in self.norms.items()},
            entropy=mean_entropy(matrices, threshold),
        )

    def _parameters(self) -> dict[str, Tensor]:
        named = {f"norm/{name}": p for name, p in self.norms.items()}
        for key, m in self.matrices.items():
            named[f"margin/{key}"], named[f"levels/{key}"] = m.margin, m.log_levels
        return named

    def _snapshot(self, store: UnitStore, number: int) -> None:
        tensors: dict[str, Tensor] = {}
        for name, p in self._parameters().items():
            state = self.optimizer.state[p]
            tensors[name] = p
            tensors[f"{name}/first"], tensors[f"{name}/second"] = state["exp_avg"], state["exp_avg_sq"]
        store.save(SNAPSHOT, tensors, {"step": str(number), "threshold": self.threshold.hex()})

    def _restore(self, store: UnitStore) -> int:
        found = store.load(SNAPSHOT)
        if found is None:
            return 0
        tensors, facts = found
        number = int(facts["step"])
        with torch.no_grad():
            for name, p in self._parameters().items():
                p.copy_(tensors[name])
                self.optimizer.state[p] = {
                    "step": torch.tensor(float(number), device=p.device),
                    "exp_avg": tensors[f"{name}/first"].to(p.device),
                    "exp_avg_sq": tensors[f"{name}/second"].to(p.device),
                }
        self.threshold = float.fromhex(facts["threshold"])
        return number


def matrix_key(layer: SparseLayer, which: str) -> str:
    """Name a layer's stack of ``wi`` or ``wo`` matrices."""
    return f"{layer.prefix}mlp.experts.{which}"
