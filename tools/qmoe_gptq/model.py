"""A minimal Switch Transformer forward pass over a plain ``{name: tensor}`` mapping.

The quantizer walks the network block by block and may hold one block's weights at a
time, so it works on functions of (weights, activations) rather than on a module that
owns everything. Names are those of a transformers checkpoint. No token is dropped:
every token reaches the expert its router picks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .errors import QuantizeError

Tensor = torch.Tensor
Weights = Mapping[str, Tensor]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


@dataclass(frozen=True, slots=True)
class SwitchConfig:
    """The facts of ``config.json`` that the forward pass needs."""

    d_model: int
    d_kv: int
    d_ff: int
    heads: int
    encoder_blocks: int
    decoder_blocks: int
    experts: int
    vocabulary: int
    buckets: int
    max_distance: int
    epsilon: float
    activation: str
    tied: bool
    pad_id: int
    start_id: int
    eos_id: int

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> SwitchConfig:
        """Read a transformers ``config.json``.

        Raises QuantizeError: not a Switch Transformer, or a field missing or unsupported.
        """
        if config.get("model_type") != "switch_transformers":
            raise QuantizeError(f"config.json: model_type is {config.get('model_type')!r}, not 'switch_transformers'")
        if config.get("is_gated_act"):
            raise QuantizeError("config.json: gated experts (is_gated_act) are not supported")
        activation = config.get("dense_act_fn", "relu")
        if activation not in _ACTIVATIONS:
            raise QuantizeError(f"config.json: dense_act_fn {activation!r} is not supported")
        try:
            start = config.get("decoder_start_token_id")
            return cls(
                d_model=int(config["d_model"]),
                d_kv=int(config["d_kv"]),
                d_ff=int(config["d_ff"]),
                heads=int(config["num_heads"]),
                encoder_blocks=int(config["num_layers"]),
                decoder_blocks=int(config.get("num_decoder_layers") or config["num_layers"]),
                experts=int(config["num_experts"]),
                vocabulary=int(config["vocab_size"]),
                buckets=int(config.get("relative_attention_num_buckets", 32)),
                max_distance=int(config.get("relative_attention_max_distance", 128)),
                epsilon=float(config.get("layer_norm_epsilon", 1e-6)),
                activation=activation,
                tied=bool(config.get("tie_word_embeddings", True)),
                pad_id=int(config.get("pad_token_id") or 0),
                start_id=int(start if start is not None else config.get("pad_token_id") or 0),
                eos_id=int(config["eos_token_id"]) if config.get("eos_token_id") is not None else 1,
            )
        except KeyError as missing:
            raise QuantizeError(f"config.json: field {missing} is missing") from None

    def blocks(self, stack: str) -> int:
        """Count the blocks of ``"encoder"`` or ``"decoder"``."""
        return self.encoder_blocks if stack == "encoder" else self.decoder_blocks

    def ffn_prefix(self, stack: str, block: int) -> str:
        """Name the feed-forward sub-layer of a block, with a trailing dot."""
        return f"{stack}.block.{block}.layer.{1 if stack == 'encoder' else 2}."


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Scale ``x`` [..., d] to unit root mean square, then by ``weight`` [d]."""
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon))


def relative_bias(table: Tensor, queries: int, keys: int, *, bidirectional: bool, buckets: int, max_distance: int) -> Tensor:
    """Build the T5 position bias, float32[1, heads, queries, keys].

    Source: Raffel et al. 2020, section 2.1: small distances have a bucket each, larger
    ones share logarithmically spaced buckets.
    """
    distance = torch.arange(keys)[None, :] - torch.arange(queries)[:, None]
    bucket = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        bucket += (distance > 0).long() * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp_min(0)
    exact = buckets // 2
    far = exact + (
        torch.log(distance.clamp_min(1).float() / exact) / math.log(max_distance / exact) * (buckets - exact)
    ).long().clamp_max(buckets - exact - 1)
    bucket += torch.where(distance < exact, distance, far)
    return table[bucket.to(table.device)].permute(2, 0, 1)[None]


def attention(config: SwitchConfig, weights: Weights, prefix: str, x: Tensor, memory: Tensor, bias: Tensor | None) -> Tensor:
    """Attend from ``x`` [n, q, d] to ``memory`` [n, k, d]; T5 leaves the scores unscaled."""

    def project(source: Tensor, which: str) -> Tensor:
        flat = F.linear(source, weights[f"{prefix}{which}.weight"])
        return flat.view(*flat.shape[:2], config.heads, config.d_kv).transpose(1, 2)

    out = F.scaled_dot_product_attention(project(x, "q"), project(memory, "k"), project(memory, "v"), attn_mask=bias, scale=1.0)
    out = out.transpose(1, 2).reshape(*x.shape[:2], config.heads * config.d_kv)
    return F.linear(out, weights[f"{prefix}o.weight"])


def attention_part(
    config: SwitchConfig,
    weights: Weights,
    stack: str,
    block: int,
    x: Tensor,
    *,
    bias: Tensor,
    memory: Tensor | None = None,
    memory_bias: Tensor | None = None,
) -> Tensor:
    """Run a block up to (not including) its feed-forward sub-layer; x is [n, length, d]."""
    prefix = f"{stack}.block.{block}."
    normed = rms_norm(x, weights[f"{prefix}layer.0.layer_norm.weight"], config.epsilon)
    x = x + attention(config, weights, f"{prefix}layer.0.SelfAttention.", normed, normed, bias)
    if memory is not None:
        normed = rms_norm(x, weights[f"{prefix}layer.1.layer_norm.weight"], config.epsilon)
        x = x + attention(config, weights, f"{prefix}layer.1.EncDecAttention.", normed, memory, memory_bias)
    return x


def self_bias(config: SwitchConfig, weights: Weights, stack: str, length: int) -> Tensor:
    """Build a stack's self-attention bias (position, and causality in the decoder)."""
    table = weights[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    bias = relative_bias(
        table,
        length,
        length,
        bidirectional=stack == "encoder",
        buckets=config.buckets,
        max_distance=config.max_distance,
    )
    if stack == "decoder":
        future = torch.ones(length, length, dtype=torch.bool, device=bias.device).triu(1)
        bias = bias.masked_fill(future, torch.finfo(bias.dtype).min)
    return bias


def padding_bias(keep: Tensor | None) -> Tensor | None:
    """Turn ``keep`` bool[n, keys] into an additive mask [n, 1, 1, keys]."""
    if keep is None:
        return None
    floor = torch.finfo(torch.float32).min
    return torch.zeros(keep.shape, device=keep.device).masked_fill(~keep, floor)[:, None, None, :]


def expert_ffn(config: SwitchConfig, wi: Tensor, wo: Tensor, x: Tensor) -> Tensor:
    """Run one expert: wi [d_ff, d], wo [d, d_ff], x [tokens, d]."""
    return F.linear(_ACTIVATIONS[config.activation](F.linear(x, wi)), wo)


def activate(config: SwitchConfig, x: Tensor) -> Tensor:
    """Apply the experts' activation function."""
    return _ACTIVATIONS[config.activation](x)


def route(weights: Weights, ffn_prefix: str, normed: Tensor) -> tuple[Tensor, Tensor]:
    """Pick each token's expert: (probability float32[tokens], expert int64[tokens])."""
    bias = weights.get(f"{ffn_prefix}mlp.router.classifier.bias")
    logits = F.linear(normed, weights[f"{ffn_prefix}mlp.router.classifier.weight"], bias)
    return torch.softmax(logits, dim=-1).max(dim=-1)


def is_sparse(names: Iterable[str], ffn_prefix: str) -> bool:
    """Tell whether a feed-forward sub-layer holds experts, by its tensor names."""
    return f"{ffn_prefix}mlp.router.classifier.weight" in names


def dense_ffn(config: SwitchConfig, weights: Weights, ffn_prefix: str, x: Tensor) -> Tensor:
    """Run a dense feed-forward sub-layer with its residual; x is [..., d]."""
    normed = rms_norm(x, weights[f"{ffn_prefix}layer_norm.weight"], config.epsilon)
    return x + expert_ffn(config, weights[f"{ffn_prefix}mlp.wi.weight"], weights[f"{ffn_prefix}mlp.wo.weight"], normed)


def sparse_ffn(config: SwitchConfig, weights: Weights, ffn_prefix: str, x: Tensor) -> Tensor:
    """Run a sparse feed-forward sub-layer with its residual; all its experts are resident."""
    flat = x.reshape(-1, x.shape[-1])
    normed = rms_norm(flat, weights[f"{ffn_prefix}layer_norm.weight"], config.epsilon)
    probability, expert = route(weights, ffn_prefix, normed)
    order = torch.argsort(expert, stable=True)
    counts = torch.bincount(expert, minlength=config.experts).tolist()
    parts = []
    for index, rows in enumerate(torch.split(order, counts)):
        if len(rows):
            name = f"{ffn_prefix}mlp.experts.expert_{index}."
            parts.append(expert_ffn(config, weights[f"{name}wi.weight"], weights[f"{name}wo.weight"], normed[rows]))
    mixed = torch.cat(parts) * probability[order, None]
    return (flat + torch.zeros_like(flat).index_copy(0, order, mixed)).view_as(x)


def ffn(config: SwitchConfig, weights: Weights, ffn_prefix: str, x: Tensor) -> Tensor:
    """Run a feed-forward sub-layer, dense or sparse, with its residual."""
    run = sparse_ffn if is_sparse(weights, ffn_prefix) else dense_ffn
    return run(config, weights, ffn_prefix, x)


def final_norm(config: SwitchConfig, weights: Weights, stack: str, x: Tensor) -> Tensor:
    """Apply a stack's last layer norm."""
    return rms_norm(x, weights[f"{stack}.final_layer_norm.weight"], config.epsilon)


def logits(config: SwitchConfig, weights: Weights, hidden: Tensor) -> Tensor:
    """Project normed decoder states [..., d] to the vocabulary."""
    if config.tied:
        return F.linear(hidden * config.d_model**-0.5, weights["shared.weight"])
    return F.linear(hidden, weights["lm_head.weight"])


def run_stack(
    config: SwitchConfig,
    weights: Weights,
    stack: str,
    x: Tensor,
    *,
    keep: Tensor | None = None,
    memory: Tensor | None = None,
    memory_keep: Tensor | None = None,
) -> Tensor:
    """Run a whole resident stack from embeddings x [n, length, d], final norm included."""
    bias = self_bias(config, weights, stack, x.shape[1])
    pad = padding_bias(keep)
    bias = bias if pad is None else bias + pad
    memory_bias = padding_bias(memory_keep)
    for block in range(config.blocks(stack)):
        x = attention_part(config, weights, stack, block, x, bias=bias, memory=memory, memory_bias=memory_bias)
        x = ffn(config, weights, config.ffn_prefix(stack, block), x)
    return final_norm(config, weights, stack, x)


def forward(
    config: SwitchConfig,
    weights: Weights,
    input_ids: Tensor,
    decoder_input_ids: Tensor,
    *,
    keep: Tensor | None = None,
) -> Tensor:
    """Run a resident model: int64[n, s], int64[n, t] -> logits float32[n, t, vocabulary]."""
    table = weights["shared.weight"]
    memory = run_stack(config, weights, "encoder", F.embedding(input_ids, table), keep=keep)
    hidden = run_stack(
        config,
        weights,
        "decoder",
        F.embedding(decoder_input_ids, table),
        memory=memory,
        memory_keep=keep,
    )
    return logits(config, weights, hidden)
