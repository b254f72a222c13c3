"""Walk the network layer by layer, quantizing each sparse layer on the way.

Each layer's inputs come from the already compressed model before it. At any moment the
walk holds one block's dense weights, one group of experts and the activation buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from . import model as net
from .block import refine_group
from .buffer import CHUNK_TOKENS, ListBuffer
from .calibration import Calibration, Int64
from .checkpoint import PROJECTIONS, Checkpoint, SparseLayer
from .errors import QuantizeError
from .experts import quantize_group
from .gptq import dense
from .settings import Settings
from .store import UnitStore
from .units import Unit, load_unit, save_unit, unit_key

Tensor = torch.Tensor
BATCH_TOKENS = 1 << 14


@dataclass(slots=True)
class LayerReport:
    """What happened in one sparse layer.

    tokens : per expert, tokens routed to it (padding aside)
    used : per expert, tokens its Hessian takes
    unmasked : experts calibrated on special tokens too, having too few others
    fallback : (projection, expert) pairs that were rounded to nearest
    """

    layer: str
    tokens: list[int]
    used: list[int]
    unmasked: list[int] = field(default_factory=list)
    fallback: list[tuple[str, int]] = field(default_factory=list)


@dataclass(slots=True)
class Flow:
    """The activations of one model (compressed, or the original) on its way through a stack."""

    x: ListBuffer
    memory: ListBuffer | None = None


class Walk:
    """One pass through the network."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        data: Calibration,
        *,
        settings: Settings,
        tune: str,
        target_bits: float | None,
        store: UnitStore,
        scratch: Path | None,
        max_fallback: float,
        progress: Callable[[str], None],
    ) -> None:
        """Prepare; ``scratch`` puts activations in files there, ``tune`` is resolved."""
        self.checkpoint, self.config, self.data = checkpoint, checkpoint.config, data
        self.settings, self.tune, self.target_bits = settings, tune, target_bits
        self.store, self.scratch = store, scratch
        self.max_fallback, self.progress = max_fallback, progress
        self.device = settings.device
        self.reports: list[LayerReport] = []
        self.encoder_keep = torch.from_numpy(data.encoder_keep())
        padded = not bool(self.encoder_keep.all())
        self.keep = self.encoder_keep if padded else None
        self._buffers = 0

    def run(self) -> list[LayerReport]:
        """Quantize every unit not yet in the store, in order."""
        followed = ["compressed"] + (["original"] if self.tune == "block" else [])
        memories: dict[str, ListBuffer | None] = dict.fromkeys(followed)
        for stack in ("encoder", "decoder"):
            ids = self.data.input_ids if stack == "encoder" else self.data.decoder_input_ids
            name = net.embedding_name(self.checkpoint.files, stack)
            table = self.checkpoint.load([name])[name]
            flows = {name: Flow(self._embed(ids, table), memories[name]) for name in followed}
            del table
            for block in range(self.config.blocks(stack)):
                self._block(stack, block, flows)
            norm = self.checkpoint.load([f"{stack}.final_layer_norm.weight"], device=self.device)
            for name, flow in flows.items():
                if stack == "encoder":
                    for start, stop in self._batches(flow.x):
                        x = net.final_norm(self.config, norm, stack, flow.x.batch(start, stop))
                        flow.x.write(start, x)
                    memories[name] = flow.x
        return self.reports

    def _buffer(self, ids: Int64) -> ListBuffer:
        self._buffers += 1
        scratch = None if self.scratch is None else self.scratch / f"activations-{self._buffers}.f32"
        samples, length = ids.shape
        return ListBuffer(samples, length, self.config.d_model, device=self.device, scratch=scratch)

    def _embed(self, ids: Int64, table: Tensor) -> ListBuffer:
        buffer = self._buffer(ids)
        for start, stop in self._batches(buffer):
            buffer.write(start, F.embedding(torch.from_numpy(ids[start:stop]), table))
        return buffer

    def _batches(self, buffer: ListBuffer) -> Iterator[tuple[int, int]]:
        size = max(1, BATCH_TOKENS // buffer.length)
        for start in range(0, buffer.samples, size):
            yield start, min(start + size, buffer.samples)

    @torch.no_grad()
    def _block(self, stack: str, block: int, flows: Mapping[str, Flow]) -> None:
        config = self.config
        table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias."
        weights = self.checkpoint.load_prefix((f"{stack}.block.{block}.", table), device=self.device)
        prefix = config.ffn_prefix(stack, block)
        sparse = net.is_sparse(weights, prefix)
        for flow in flows.values():
            bias = net.self_bias(config, weights, stack, flow.x.length)
            for start, stop in self._batches(flow.x):
                keep = None if self.keep is None else self.keep[start:stop].to(self.device)
                padding = net.padding_bias(keep)
                own = bias if padding is None or stack == "decoder" else bias + padding
                memory = None if flow.memory is None else flow.memory.batch(start, stop)
                x = net.attention_part(
                    config, weights, stack, block, flow.x.batch(start, stop),
                    bias=own, memory=memory, memory_bias=padding,
                )  # fmt: skip
                flow.x.write(start, x if sparse else net.dense_ffn(config, weights, prefix, x))
        if sparse:
            self._sparse(SparseLayer(stack, block, prefix), weights, flows)

    def _marks(self, layer: SparseLayer) -> tuple[Tensor, Tensor]:
        """Mark the tokens that are not padding, and the special ones: bool[samples * length] each.

        Special is a sentinel in the encoder and what predicts a sentinel in the decoder.
        """
        if layer.stack == "encoder":
            real, ids = self.data.encoder_keep(), self.data.input_ids
        else:
            real, ids = self.data.decoder_keep(), self.data.labels
        special = self.data.is_special(ids) & self.settings.masks_special
        return torch.from_numpy(real).flatten(), torch.from_numpy(special).flatten()

    def _route(self, layer: SparseLayer, weights: net.Weights, x: ListBuffer) -> tuple[Tensor, Tensor]:
        parts = []
        for start, stop in self._batches(x):
            rows = x.batch(start, stop).flatten(0, 1)
            normed = net.rms_norm(rows, weights[f"{layer.prefix}layer_norm.weight"], self.config.epsilon)
            parts.append(tuple(t.cpu() for t in net.route(self.config, weights, layer.prefix, normed)))
        return torch.cat([p for p, _ in parts]), torch.cat([e for _, e in parts])

    def _sparse(self, layer: SparseLayer, weights: net.Weights, flows: Mapping[str, Flow]) -> None:
        config, settings = self.config, self.settings
        x = flows["compressed"].x
        probability, expert = self._route(layer, weights, x)
        targets = None
        if "original" in flows:
            # Overwrites the original's activations with its layer outputs: the targets.
            original = flows["original"].x
            self._apply_original(layer, weights, original)
            targets = original
        real, special = self._marks(layer)
        routed = torch.bincount(expert[real], minlength=config.experts)
        plain = torch.bincount(expert[real & ~special], minlength=config.experts)
        # Some experts serve special tokens only: leaving those out would leave them nothing.
        unmasked = (plain < config.d_model) & (plain < routed)
        counts = torch.where(unmasked, routed, plain)
        cap = max(1, int(np.ceil(settings.token_cap * float(counts.sum()) / config.experts)))
        report = LayerReport(
            layer.prefix.removesuffix("."),
            tokens=routed.tolist(),
            used=counts.clamp_max(cap).tolist(),
            unmasked=unmasked.nonzero().flatten().tolist(),
        )
        self.reports.append(report)
        norm = weights[f"{layer.prefix}layer_norm.weight"]
        for start in range(0, config.experts, settings.group):
            group = range(start, min(start + settings.group, config.experts))
            everyone = [(expert == e).nonzero().flatten() for e in group]
            unit = load_unit(self.store, layer, group, self.checkpoint)
            resumed = unit is not None
            if unit is None:
                chosen, taught = [], []
                for e, tokens in zip(group, everyone, strict=True):
                    usable = real[tokens] if unmasked[e] else real[tokens] & ~special[tokens]
                    chosen.append(self._choose(layer, e, tokens[usable], cap))
                    taught.append(self._choose(layer, e, tokens[real[tokens]], cap))
                unit = self._quantize(layer, group, chosen, probability, norm, x)
                if targets is not None:
                    self._refine(unit, layer, group, taught, probability, norm, x, targets)
                save_unit(self.store, layer, group, unit)
            report.fallback += [(which, group[i]) for which in PROJECTIONS for i in unit.fallback[which]]
            self._check_fallback()
            on_device = {which: unit.matrices[which].to(self.device) for which in PROJECTIONS}
            values = {which: dense(t.digits, t.levels) for which, t in on_device.items()}
            for i, tokens in enumerate(everyone):
                self._apply(x, tokens, probability, norm, values["wi"][i], values["wo"][i])
            self.progress(f"{unit_key(layer, group)}{' (resumed)' if resumed else ''}")

    def _choose(self, layer: SparseLayer, expert: int, tokens: Tensor, cap: int) -> Tensor:
        """Take at most ``cap`` tokens, at random but the same ones in every run."""
        if len(tokens) <= cap:
            return tokens
        rng = np.random.default_rng([self.settings.seed, layer.stack == "decoder", layer.block, expert])
        return tokens[np.sort(rng.permutation(len(tokens))[:cap])]

    def _quantize(
        self,
        layer: SparseLayer,
        group: range,
        chosen: list[Tensor],
        probability: Tensor,
        norm: Tensor,
        x: ListBuffer,
    ) -> Unit:
        """Run the solver on one group, calibrated on the chosen tokens of each expert."""
        wi = self.checkpoint.load_experts(layer, group, "wi", device=self.device)
        wo = self.checkpoint.load_experts(layer, group, "wo", device=self.device)
        normed = [net.rms_norm(x.gather(t), norm, self.config.epsilon) for t in chosen]
        shares = [probability[t].to(self.device) for t in chosen]
        matrices = quantize_group(
            self.config, wi, wo, normed, shares,
            settings=self.settings, dtype=self.checkpoint.level_dtype, target_bits=self.target_bits,
        )  # fmt: skip
        return Unit(
            matrices={which: m.ternary for which, m in matrices.items()},
            fallback={which: m.fallback for which, m in matrices.items()},
            paper_entropy={which: m.paper_entropy for which, m in matrices.items()},
            keep_margins=self.tune == "model",
        )

    def _refine(
        self,
        unit: Unit,
        layer: SparseLayer,
        group: range,
        taught: list[Tensor],
        probability: Tensor,
        norm: Tensor,
        x: ListBuffer,
        targets: ListBuffer,
    ) -> None:
        """Tune one group against the original block's outputs, special tokens included."""
        inputs = [x.gather(t) for t in taught]
        unit.matrices = refine_group(
            self.config,
            unit.matrices,
            [net.rms_norm(rows, norm, self.config.epsilon) for rows in inputs],
            [probability[t].to(self.device) for t in taught],
            [targets.gather(t) - rows for t, rows in zip(taught, inputs, strict=True)],
            settings=self.settings,
            dtype=self.checkpoint.level_dtype,
            seed=(layer.stack == "decoder", layer.block, group[0]),
        )

    def _apply(self, x: ListBuffer, tokens: Tensor, probability: Tensor, norm: Tensor, wi: Tensor, wo: Tensor) -> None:
        """Add one expert's output to its tokens."""
        for part in torch.split(tokens, CHUNK_TOKENS):
            rows = x.gather(part)
            normed = net.rms_norm(rows, norm, self.config.epsilon)
            out = net.expert_ffn(self.config, wi, wo, normed)
            x.scatter(part, rows + out * probability[part, None].to(self.device))

    def _apply_original(self, layer: SparseLayer, weights: net.Weights, x: ListBuffer) -> None:
        """Run the layer with its original experts, group by group."""
        probability, expert = self._route(layer, weights, x)
        norm = weights[f"{layer.prefix}layer_norm.weight"]
        for start in range(0, self.config.experts, self.settings.group):
            group = range(start, min(start + self.settings.group, self.config.experts))
            wi = self.checkpoint.load_experts(layer, group, "wi", device=self.device)
            wo = self.checkpoint.load_experts(layer, group, "wo", device=self.device)
            for i, e in enumerate(group):
                self._apply(x, (expert == e).nonzero().flatten(), probability, norm, wi[i], wo[i])

    def _check_fallback(self) -> None:
        count = sum(len(report.fallback) for report in self.reports)
        share = count / (len(PROJECTIONS) * self.config.experts * len(self.checkpoint.layers))
        if share > self.max_fallback:
            which, expert = self.reports[-1].fallback[-1]
            raise QuantizeError(
                f"{count} expert matrices were rounded to nearest ({share:.1%} of all, last {which} of expert {expert} "
                f"in {self.reports[-1].layer}), --max-fallback allows {self.max_fallback:.1%}"
            )
