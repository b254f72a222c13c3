"""A Switch Transformer run from a checkpoint directory, its experts compressed in memory.

The model is transformers' own, built without weights, with each sparse feed-forward part replaced by ours. It is built
with one expert per layer whatever the checkpoint has, and experts are looked up when a token comes to one: neither
time nor memory of loading grows with the number of experts.
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration
from transformers.activations import ACT2FN
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from .backends import Activation, ExpertBackend, ExpertLayer, make_backend
from .checkpoint import PROJECTIONS, Checkpoint, open_checkpoint, read_config
from .errors import BackendError, SwitchError
from .routing import CAPACITIES, Capacity, Top1Router
from .tokens import Vocabulary

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_EMBEDDINGS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_HEAD = "lm_head.weight"


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
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: Any,
        module: Any,
        backend: ExpertBackend,
        *,
        device: torch.device,
        capacity: Capacity,
    ) -> None:
        self.checkpoint, self.config, self.module, self.backend = checkpoint, config, module, backend
        self.device, self.capacity = device, capacity

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
    backend: str = "auto",
    capacity: Capacity = "none",
    dtype: str = "float32",
    threads: int | None = None,
) -> SwitchModel:
    """Load a packed or plain checkpoint directory.

    device : "cpu" or a CUDA device
    backend : "cpu", "cuda", "dense", or "auto": `dense` for a plain checkpoint, that of the device for a packed one
    capacity : "none", or "per_sequence" to drop tokens beyond `expert_capacity` as transformers >= 5.18 does
    dtype : what the dense parts are computed in: "float32", "bfloat16" or "float16"
    threads : experts that the backend `cpu` runs at once, by default the number of cores

    Raises SwitchError for a checkpoint that cannot be run, BackendError for a backend that is not there, FormatError
    for damaged files.
    """
    if capacity not in CAPACITIES:
        raise SwitchError(f"capacity is {capacity!r}, not one of {', '.join(CAPACITIES)}")
    if dtype not in DTYPES:
        raise SwitchError(f"dtype is {dtype!r}, not one of {', '.join(DTYPES)}")
    place = _device(device)
    checkpoint = open_checkpoint(directory)
    try:
        if backend == "auto":
            backend = place.type if checkpoint.is_packed else "dense"
        made = make_backend(backend, device=place, threads=threads)
        config = parse_config(checkpoint.directory)
        module = _build(checkpoint, config, made, capacity=capacity, dtype=DTYPES[dtype], device=place)
    except BaseException:
        checkpoint.close()
        raise
    return SwitchModel(checkpoint, config, module, made, device=place, capacity=capacity)


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
        if not isinstance(value, int) or value < 1:
            raise SwitchError(f"{path}: {key} is {value!r}, not a positive integer")
    if config.dense_act_fn not in ACT2FN:
        raise SwitchError(f"{path}: dense_act_fn {config.dense_act_fn!r} is not one that transformers' Switch computes")
    return config


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BackendError(f"{name!r} is not a device: cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendError(f"the device {name} was asked for, and torch finds no CUDA device (the CPU is not used instead)")
    if device.type not in ("cpu", "cuda"):
        raise BackendError(f"the runtime knows the devices cpu and cuda, not {name}")
    return device


def _build(
    checkpoint: Checkpoint,
    config: Any,
    backend: ExpertBackend,
    *,
    capacity: Capacity,
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    small = copy.deepcopy(config)
    small.num_experts = 1
    with torch.device("meta"):
        module: Any = SwitchTransformersForConditionalGeneration(small)
    for each in module.modules():
        if hasattr(each, "config"):
            each.config.num_experts = config.num_experts
    for name, part in list(module.named_modules()):
        if isinstance(part, SwitchTransformersSparseMLP):
            with torch.device("meta"):
                router = Top1Router(config, capacity=capacity)
            layer = _expert_layer(checkpoint, f"{name}.experts", config, backend)
            module.set_submodule(name, SparseMLP(router, layer))
    _fill(module, checkpoint, config, dtype=dtype, device=device)
    left = checkpoint.unclaimed()
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise SwitchError(f"{checkpoint.directory}: tensor {left[0]}{more} has no place in the model that config.json describes")
    return module.eval().requires_grad_(False)


def _expert_layer(checkpoint: Checkpoint, prefix: str, config: Any, backend: ExpertBackend) -> ExpertLayer:
    shapes = {"wi": (config.d_ff, config.d_model), "wo": (config.d_model, config.d_ff)}
    stacks = {p: checkpoint.experts(prefix, p, (config.num_experts, *shapes[p])) for p in PROJECTIONS}
    activation: Activation = ACT2FN[config.dense_act_fn]
    return backend.layer(stacks["wi"], stacks["wo"], activation)


def _fill(module: Any, checkpoint: Checkpoint, config: Any, *, dtype: torch.dtype, device: torch.device) -> None:
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
        value = value.to(device=device, dtype=parameter.dtype if keep else dtype).contiguous()
        setattr(part, leaf, torch.nn.Parameter(value, requires_grad=False))
    for name in copies:
        module.get_submodule(name.rpartition(".")[0]).weight = module.shared.weight
