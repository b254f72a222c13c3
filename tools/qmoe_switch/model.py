"""A Switch Transformer run from a checkpoint directory, its experts compressed in memory.

The model is transformers' own, built without weights, with each sparse feed-forward part replaced by ours. It is built
with one expert per layer whatever the checkpoint has, and experts are looked up when a token comes to one: neither
time nor memory of loading grows with the number of experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration
from transformers.activations import ACT2FN
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from .backends import Activation, ExpertBackend, ExpertLayer, make_backend
from .checkpoint import PROJECTIONS, Checkpoint, ExpertStack, StackRange, open_checkpoint, read_config
from .errors import SwitchError
from .placement import SPLITS, Moves, Split, SplitLayer, parse_devices, place
from .routing import CAPACITIES, Capacity, Top1Router
from .tokens import Vocabulary

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_EMBEDDINGS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_HEAD = "lm_head.weight"
_STACKS = ("encoder", "decoder")


class SparseMLP(torch.nn.Module):
    """The feed-forward part of a sparse block: route, run the experts, scale by the router's probability."""

    def __init__(self, router: Top1Router, experts: ExpertLayer) -> None:
        super().__init__()
        self.router = router
        self._experts = experts

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Compute float[batch, sequence, d_model]; a dropped token gives zeros."""
        routing = self.router(states)
        flat = states.reshape(-1, states.shape[-1])
        out: torch.Tensor = self._experts(flat, routing.expert.reshape(-1)) * routing.weight.reshape(-1, 1)
        return out.reshape(states.shape)


class SwitchModel:
    """A loaded checkpoint. Use `load` to make one, and close it (or use it in a `with` statement).

    config : transformers' configuration of the checkpoint
    module : transformers' model, whose sparse parts are `SparseMLP`
    device : where inputs and logits are, and all dense parts but the blocks'
    devices : all that were asked for, `device` first
    placement : the device of every block, by name
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: Any,
        module: Any,
        backend: ExpertBackend,
        *,
        devices: tuple[torch.device, ...],
        placement: dict[str, torch.device],
        capacity: Capacity,
    ) -> None:
        self.checkpoint, self.config, self.module, self.backend = checkpoint, config, module, backend
        self.device, self.devices, self.placement, self.capacity = devices[0], devices, placement, capacity

    @property
    def vocabulary(self) -> Vocabulary:
        """What the model says about its tokens."""
        pad, start = self.config.pad_token_id, getattr(self.config, "decoder_start_token_id", None)
        return Vocabulary(self.config.vocab_size, pad, pad if start is None else start)

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The tokens that end a generated sequence."""
        end = self.config.eos_token_id
        return () if end is None else tuple(end) if isinstance(end, list) else (int(end),)

    def close(self) -> None:
        """Close the checkpoint's files."""
        self.checkpoint.close()

    def __enter__(self) -> SwitchModel:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def load(
    directory: str | Path,
    *,
    device: str = "cpu",
    split: Split = "layers",
    backend: str = "auto",
    capacity: Capacity = "none",
    dtype: str = "float32",
    threads: int | None = None,
) -> SwitchModel:
    """Load a packed or plain checkpoint directory.

    device : "cpu", a CUDA device, or several with commas between them, such as "cuda:0,cuda:1"
    split : what several devices share: "layers", runs of blocks with about as many bytes of experts each, or "experts",
        ranges of the experts of every layer, with all dense parts on the first device
    backend : "cpu", "cuda", "dense", or "auto": `dense` for a plain checkpoint, that of each device for a packed one
    capacity : "none", or "per_sequence" to drop tokens beyond `expert_capacity` as transformers >= 5.18 does
    dtype : what the dense parts are computed in: "float32", "bfloat16" or "float16"
    threads : experts that the backend `cpu` runs at once, by default the number of cores

    Raises SwitchError for a checkpoint that cannot be run, BackendError for a backend that is not there, FormatError
    for damaged files.
    """
    devices = parse_devices(device)
    checkpoint = open_checkpoint(directory)
    try:
        backends: dict[torch.device, ExpertBackend] = {}
        for each in dict.fromkeys(devices):
            name = backend if backend != "auto" else each.type if checkpoint.is_packed else "dense"
            backends[each] = make_backend(name, device=each, threads=threads)
        return assemble(checkpoint, devices, backends, split=split, capacity=capacity, dtype=dtype)
    except BaseException:
        checkpoint.close()
        raise


def assemble(
    checkpoint: Checkpoint,
    devices: tuple[torch.device, ...],
    backends: Mapping[torch.device, ExpertBackend],
    *,
    split: Split = "layers",
    capacity: Capacity = "none",
    dtype: str = "float32",
) -> SwitchModel:
    """Make a model of an opened checkpoint, which stays open; settings and errors as for `load`."""
    for what, value, known in (("capacity", capacity, CAPACITIES), ("dtype", dtype, DTYPES), ("split", split, SPLITS)):
        if value not in known:
            raise SwitchError(f"{what} is {value!r}, not one of {', '.join(known)}")
    config = parse_config(checkpoint.directory)
    module, placement = _build(
        checkpoint, config, backends, devices=devices, split=split, capacity=capacity, dtype=DTYPES[dtype]
    )
    return SwitchModel(
        checkpoint, config, module, backends[devices[0]], devices=devices, placement=placement, capacity=capacity
    )


def parse_config(directory: Path) -> Any:
    """Read config.json into transformers' configuration, and refuse what the runtime does not compute."""
    raw = read_config(directory)
    path = directory / "config.json"
    if raw.get("model_type") != "switch_transformers":
        raise SwitchError(f"{path}: model_type is {raw.get('model_type')!r}, not 'switch_transformers'")
    try:
        config = SwitchTransformersConfig.from_dict(raw)
    except Exception as error:  # transformers raises several kinds, and they differ between its versions
        raise SwitchError(f"{path}: {' '.join(str(error).split())}") from None
    for key in ("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_experts", "num_layers", "num_decoder_layers"):
        value = getattr(config, key)
        if not isinstance(value, int) or not 1 <= value < 2**31:
            raise SwitchError(f"{path}: {key} is {value!r}, not a positive integer")
    for key in ("encoder_sparse_step", "decoder_sparse_step"):
        value = getattr(config, key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise SwitchError(f"{path}: {key} is {value!r}, not an integer from 0 on")
    for key in ("pad_token_id", "decoder_start_token_id"):
        value = getattr(config, key, None)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < config.vocab_size):
            raise SwitchError(f"{path}: {key} is {value!r}, not a token of the vocabulary of {config.vocab_size}")
    buckets, distance = config.relative_attention_num_buckets, config.relative_attention_max_distance
    if buckets < 4 or distance <= buckets // 2:
        raise SwitchError(
            f"{path}: relative_attention_num_buckets {buckets} and relative_attention_max_distance {distance} do not go "
            "together: at least 4 buckets, and a distance above half of them"
        )
    if config.dense_act_fn not in ACT2FN:
        raise SwitchError(f"{path}: dense_act_fn {config.dense_act_fn!r} is not one that transformers' Switch computes")
    return config


def _build(
    checkpoint: Checkpoint,
    config: Any,
    backends: Mapping[torch.device, ExpertBackend],
    *,
    devices: tuple[torch.device, ...],
    split: Split,
    capacity: Capacity,
    dtype: torch.dtype,
) -> tuple[Any, dict[str, torch.device]]:
    for stack, count in zip(_STACKS, (config.num_layers, config.num_decoder_layers), strict=True):
        # Before anything is built as often as config.json says.
        last = f"{stack}.block.{count - 1}.layer.0.layer_norm.weight"
        if not checkpoint.has(last):
            raise SwitchError(f"{checkpoint.directory}: tensor {last} is missing, config.json asks for {count} blocks")
    small = copy.deepcopy(config)
    small.num_experts = 1
    with torch.device("meta"):
        module: Any = SwitchTransformersForConditionalGeneration(small)
    for each in module.modules():
        if hasattr(each, "config"):
            each.config.num_experts = config.num_experts
    sparse = [name for name, part in module.named_modules() if isinstance(part, SwitchTransformersSparseMLP)]
    stacks = {name: _stacks(checkpoint, f"{name}.experts", config) for name in sparse}
    blocks = [f"{stack}.block.{i}" for stack in _STACKS for i in range(len(module.get_submodule(stack).block))]
    by_layer = devices if split == "layers" else devices[:1]
    n_bytes = {_block_of(name): sum(s.n_bytes for s in stacks[name]) for name in sparse} if len(by_layer) > 1 else {}
    placement = place(blocks, n_bytes, by_layer)
    for name in sparse:
        with torch.device("meta"):
            router = Top1Router(config, capacity=capacity)
        own = (placement[_block_of(name)],) if split == "layers" else devices
        layer = _expert_layer(*stacks[name], ACT2FN[config.dense_act_fn], [(device, backends[device]) for device in own])
        module.set_submodule(name, SparseMLP(router, layer))
    _fill(module, checkpoint, config, dtype=dtype, device=lambda name: placement.get(_block_of(name), devices[0]))
    left = checkpoint.unclaimed()
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise SwitchError(f"{checkpoint.directory}: tensor {left[0]}{more} has no place in the model that config.json describes")
    if len(by_layer) > 1:
        moves = Moves()
        for name in _STACKS:
            stack = module.get_submodule(name)
            parts = {stack.block[i]: placement[f"{name}.block.{i}"] for i in range(len(stack.block))}
            moves.attach(stack, {**parts, stack.final_layer_norm: devices[0]})
    return module.eval().requires_grad_(False), placement


def _block_of(name: str) -> str:
    """Name the block that a part of the model belongs to."""
    return ".".join(name.split(".")[:3])


def _stacks(checkpoint: Checkpoint, prefix: str, config: Any) -> tuple[ExpertStack, ExpertStack]:
    shapes = ((config.d_ff, config.d_model), (config.d_model, config.d_ff))
    wi, wo = (checkpoint.experts(prefix, p, (config.num_experts, *shape)) for p, shape in zip(PROJECTIONS, shapes, strict=True))
    return wi, wo


def _expert_layer(
    wi: ExpertStack, wo: ExpertStack, activation: Activation, backends: Sequence[tuple[torch.device, ExpertBackend]]
) -> ExpertLayer:
    """Give the experts to one backend, or a range of them to each of several."""
    if len(backends) == 1:
        return backends[0][1].layer(wi, wo, activation)
    n, experts = len(backends), wi.shape[0]
    if experts < n:
        raise SwitchError(f"{experts} experts cannot be spread over {n} devices")
    parts = []
    for i, (device, backend) in enumerate(backends):
        first, end = experts * i // n, experts * (i + 1) // n
        layer = backend.layer(StackRange(wi, first, end), StackRange(wo, first, end), activation)
        parts.append((first, end, device, layer))
    return SplitLayer(parts)


def _fill(
    module: Any, checkpoint: Checkpoint, config: Any, *, dtype: torch.dtype, device: Callable[[str], torch.device]
) -> None:
    """Give every parameter of the model its value, in `dtype` but for the router, which has its own."""
    shared = checkpoint.tensor("shared.weight", (config.vocab_size, config.d_model))
    tied = (*_EMBEDDINGS, _HEAD) if config.tie_word_embeddings else ()
    for name in tied:
        if checkpoint.has(name) and not torch.equal(checkpoint.tensor(name, tuple(shared.shape)), shared):
            raise SwitchError(f"{checkpoint.directory}: {name} differs from shared.weight, to which config.json ties it")
    # transformers writes the embeddings of an untied model one by one from version 5 on, and once before.
    copies = (*tied, *(name for name in _EMBEDDINGS if not checkpoint.has(name)))
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        if name in copies:
            continue
        owner, _, leaf = name.rpartition(".")
        part = module.get_submodule(owner)
        keep = isinstance(module.get_submodule(owner.rpartition(".")[0]), Top1Router)
        value = shared if name == "shared.weight" else checkpoint.tensor(name, tuple(parameter.shape))
        value = value.to(device=device(name), dtype=parameter.dtype if keep else dtype).contiguous()
        setattr(part, leaf, torch.nn.Parameter(value, requires_grad=False))
    for name in copies:
        module.get_submodule(name.rpartition(".")[0]).weight = module.shared.weight
