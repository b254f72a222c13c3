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


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "gelu_new": _gelu_tanh, "gelu_pytorch_tanh": _gelu_tanh, "silu": F.silu, "swish": F.silu,
}  # fmt: skip
_ROUTER_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class SwitchConfig:
    """The facts of ``config.json`` that the forward pass needs.

    sparse_steps : of encoder and decoder, by transformers' rule: blocks 1, 1 + step, ... are sparse; all with 1, none with 0
    """

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
    router_bias: bool
    router_dtype: torch.dtype
    sparse_steps: tuple[int, int]

    @classmethod
    def from_json(cls, config: Mapping[str, Any], *, where: str = "config.json") -> SwitchConfig:
        """Read a transformers ``config.json``; ``where`` is what errors call it.

        Raises QuantizeError: not a Switch Transformer, or a field missing, of a wrong type or unsupported.
        """
        fields = _Fields(config, where)
        if config.get("model_type") != "switch_transformers":
            raise QuantizeError(f"{where}: model_type is {config.get('model_type')!r}, not 'switch_transformers'")
        if config.get("is_gated_act"):
            raise QuantizeError(f"{where}: gated experts (is_gated_act) are not supported")
        vocabulary = fields.integer("vocab_size")
        blocks = fields.integer("num_layers")
        decoder_blocks = blocks if config.get("num_decoder_layers") is None else fields.integer("num_decoder_layers")
        buckets = fields.integer("relative_attention_num_buckets", 32)
        distance = fields.integer("relative_attention_max_distance", 128)
        if buckets < 4 or distance <= buckets // 2:
            raise QuantizeError(
                f"{where}: relative_attention_num_buckets {buckets} and relative_attention_max_distance {distance} do not go "
                "together: at least 4 buckets, and a distance above half of them"
            )
        pad = fields.token("pad_token_id", vocabulary)
        start = fields.token("decoder_start_token_id", vocabulary)
        return cls(
            d_model=fields.integer("d_model"),
            d_kv=fields.integer("d_kv"),
            d_ff=fields.integer("d_ff"),
            heads=fields.integer("num_heads"),
            encoder_blocks=blocks,
            decoder_blocks=decoder_blocks,
            experts=fields.integer("num_experts"),
            vocabulary=vocabulary,
            buckets=buckets,
            max_distance=distance,
            epsilon=fields.number("layer_norm_epsilon", 1e-6),
            activation=fields.one_of("dense_act_fn", "relu", _ACTIVATIONS),
            tied=fields.flag("tie_word_embeddings", default=True),
            pad_id=pad or 0,
            start_id=start if start is not None else pad or 0,
            eos_id=fields.end_token(),
            router_bias=fields.flag("router_bias", default=False),
            router_dtype=_ROUTER_DTYPES[fields.one_of("router_dtype", "float32", _ROUTER_DTYPES)],
            sparse_steps=(fields.sparse_step("encoder", blocks), fields.sparse_step("decoder", decoder_blocks)),
        )

    def is_sparse(self, stack: str, block: int) -> bool:
        """Tell whether a block has experts, by transformers' rule."""
        step = self.sparse_steps[stack == "decoder"]
        return step == 1 or (step > 1 and block % step == 1)

    def blocks(self, stack: str) -> int:
        """Count the blocks of ``"encoder"`` or ``"decoder"``."""
        return self.encoder_blocks if stack == "encoder" else self.decoder_blocks

    def ffn_prefix(self, stack: str, block: int) -> str:
        """Name the feed-forward sub-layer of a block, with a trailing dot."""
        return f"{stack}.block.{block}.layer.{1 if stack == 'encoder' else 2}."


class _Fields:
    """Typed access to a config; whatever is not as it should be is a QuantizeError that names the field."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._config, self._where = config, where

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        if key not in self._config and default is None:
            raise QuantizeError(f"{self._where}: field {key!r} is missing")
        value = self._config.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
            raise QuantizeError(f"{self._where}: {key} is {value!r}, not an integer from {least} on")
        return value

    def number(self, key: str, default: float) -> float:
        value = self._config.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise QuantizeError(f"{self._where}: {key} is {value!r}, not a number from 0 on")
        return float(value)

    def flag(self, key: str, *, default: bool) -> bool:
        value = self._config.get(key, default)
        if not isinstance(value, bool):
            raise QuantizeError(f"{self._where}: {key} is {value!r}, not true or false")
        return value

    def one_of(self, key: str, default: str, known: Iterable[str]) -> str:
        value = self._config.get(key, default)
        if not isinstance(value, str) or value not in known:
            raise QuantizeError(f"{self._where}: {key} {value!r} is not supported, only {', '.join(known)}")
        return value

    def token(self, key: str, vocabulary: int) -> int | None:
        value = self._config.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocabulary:
            raise QuantizeError(f"{self._where}: {key} is {value!r}, not a token of the vocabulary of {vocabulary}")
        return value

    def end_token(self) -> int:
        """Give the token that ends a text; of several, the first."""
        value = self._config.get("eos_token_id")
        if isinstance(value, list) and value:
            value = value[0]
        if value is None:
            return 1
        if not isinstance(value, int) or isinstance(value, bool):
            raise QuantizeError(f"{self._where}: eos_token_id is {value!r}, not a token")
        return value

    def sparse_step(self, stack: str, blocks: int) -> int:
        """Find the step as transformers does: as it is written, else from the number of sparse layers."""
        if f"{stack}_sparse_step" in self._config:
            return self.integer(f"{stack}_sparse_step", least=0)
        sparse = self.integer(f"num_sparse_{stack}_layers", 3, least=0)
        return blocks // sparse if sparse else blocks


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


def embedding_name(weights: Iterable[str], stack: str) -> str:
    """Name the embedding of a stack: its own, which an untied model may have, or the shared one."""
    own = f"{stack}.embed_tokens.weight"
    return own if own in weights else "shared.weight"


def embed(weights: Weights, stack: str, ids: Tensor) -> Tensor:
    """Look up a stack's token embeddings, [..., d]."""
    return F.embedding(ids, weights[embedding_name(weights, stack)])


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


def route(config: SwitchConfig, weights: Weights, ffn_prefix: str, normed: Tensor) -> tuple[Tensor, Tensor]:
    """Pick each token's expert, computed in ``router_dtype``: (probability float32[tokens], expert int64[tokens])."""
    dtype = config.router_dtype
    weight, bias = (weights.get(f"{ffn_prefix}mlp.router.classifier.{name}") for name in ("weight", "bias"))
    assert weight is not None
    logits = F.linear(normed.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return torch.softmax(logits, dim=-1).to(normed.dtype).max(dim=-1)


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
    probability, expert = route(config, weights, ffn_prefix, normed)
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
    memory = run_stack(config, weights, "encoder", embed(weights, "encoder", input_ids), keep=keep)
    hidden = run_stack(
        config,
        weights,
        "decoder",
        embed(weights, "decoder", decoder_input_ids),
        memory=memory,
        memory_keep=keep,
    )
    return logits(config, weights, hidden)
