"""Read a transformers checkpoint tensor by tensor, without ever holding it whole."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .errors import QuantizeError
from .model import SwitchConfig, is_sparse

Tensor = torch.Tensor

EXPERT = re.compile(r"^(?P<layer>.+\.mlp\.experts\.)expert_(?P<expert>\d+)\.(?P<which>wi|wo)\.weight$")
PROJECTIONS = ("wi", "wo")
# What experts may be stored in, the coarsest mantissa first.
TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# Of one weight. Sums of squares of larger ones do not fit into float32.
LARGEST_WEIGHT = 1e15
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "generation_config.json",
)


@dataclass(frozen=True, slots=True)
class SparseLayer:
    """One sparse feed-forward layer: its stack, its block, and its tensors' common prefix."""

    stack: str
    block: int
    prefix: str

    def expert_name(self, expert: int, which: str) -> str:
        """Name one expert's ``wi`` or ``wo`` tensor."""
        return f"{self.prefix}mlp.experts.expert_{expert}.{which}.weight"


class Checkpoint:
    """A checkpoint directory opened for lazy reading.

    Only file headers are read when it is opened, and embeddings that are stored several times; ``load`` reads the
    tensors asked for.
    """

    def __init__(self, directory: Path) -> None:
        """Open ``directory``; raises QuantizeError when it is not the model that ``config.json`` describes."""
        self.directory = Path(directory)
        self.raw_config = _read_json(self.directory / "config.json")
        self.config = SwitchConfig.from_json(self.raw_config, where=str(self.directory / "config.json"))
        self.files = _locate(self.directory)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for file in sorted(set(self.files.values())):
            for name, entry in _header(file).items():
                if self.files.get(name) != file:
                    raise QuantizeError(f"{file}: holds tensor {name}, which the index does not list there")
                self._shapes[name] = tuple(entry["shape"])
                self.dtypes[name] = entry["dtype"]
        missing = sorted(set(self.files) - set(self._shapes))
        if missing:
            raise QuantizeError(f"{self.directory}: the index lists {missing[0]} but its shard does not hold it")
        self.layers = self._sparse_layers()
        self._validate()

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names, sorted."""
        return tuple(sorted(self.files))

    @property
    def expert_names(self) -> tuple[str, ...]:
        """The names of all expert matrices, sorted."""
        return tuple(name for name in self.names if EXPERT.match(name))

    @property
    def dense_names(self) -> tuple[str, ...]:
        """The names of everything that is not an expert matrix, sorted."""
        return tuple(name for name in self.names if not EXPERT.match(name))

    @property
    def level_dtype(self) -> torch.dtype:
        """What levels are rounded to: the experts' dtype, the coarsest of several."""
        found = {self.dtypes[name] for name in self.expert_names}
        return next(dtype for name, dtype in TORCH_DTYPES.items() if name in found)

    def shape(self, name: str) -> tuple[int, ...]:
        """Give a tensor's shape without reading it."""
        return self._shapes[name]

    def load(self, names: Iterable[str], *, device: str = "cpu", dtype: torch.dtype | None = torch.float32) -> dict[str, Tensor]:
        """Read tensors, checked to be finite; ``dtype=None`` keeps the stored one."""
        wanted: dict[Path, list[str]] = {}
        for name in names:
            wanted.setdefault(self.files[name], []).append(name)
        out: dict[str, Tensor] = {}
        for file, group in wanted.items():
            try:
                with safe_open(file, framework="pt", device="cpu") as handle:
                    for name in group:
                        tensor = handle.get_tensor(name)
                        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                            raise QuantizeError(f"{file.name}: {name} holds NaN or infinite weights")
                        out[name] = tensor.to(device=device, dtype=dtype or tensor.dtype)
            except (OSError, SafetensorError) as error:
                raise QuantizeError(f"{file}: cannot be read ({error})") from None
        return out

    def load_prefix(self, prefixes: tuple[str, ...], *, device: str = "cpu") -> dict[str, Tensor]:
        """Read, as float32, every dense tensor whose name starts with one of ``prefixes``."""
        return self.load([n for n in self.dense_names if n.startswith(prefixes)], device=device)

    def load_experts(self, layer: SparseLayer, experts: range, which: str, *, device: str = "cpu") -> Tensor:
        """Stack some experts' matrices, float32[experts, rows, cols]."""
        names = [layer.expert_name(e, which) for e in experts]
        loaded = self.load(names, device=device)
        for name, tensor in loaded.items():
            if float(tensor.abs().amax()) > LARGEST_WEIGHT:
                raise QuantizeError(f"{self.files[name].name}: {name} holds weights beyond {LARGEST_WEIGHT:g}")
        return torch.stack([loaded[name] for name in names])

    def fingerprint(self) -> str:
        """Hash the config and every shard's header, size and sampled content (SHA-256, hex).

        Whole shards are hashed up to 64 MiB; of a larger one, 64 evenly spaced MiB, so
        that a terabyte checkpoint is recognised in seconds.
        """
        digest = hashlib.sha256(json.dumps(self.raw_config, sort_keys=True).encode())
        step = 1 << 20
        for file in sorted(set(self.files.values())):
            size = file.stat().st_size
            digest.update(f"{file.name}:{size}:".encode())
            with file.open("rb") as handle:
                count = min(64, -(-size // step))
                for i in range(count):
                    handle.seek(i * step if size <= 64 * step else (size - step) * i // (count - 1))
                    digest.update(handle.read(step))
        return digest.hexdigest()

    def _sparse_layers(self) -> tuple[SparseLayer, ...]:
        layers = []
        for stack in ("encoder", "decoder"):
            count = self.config.blocks(stack)
            last = f"{stack}.block.{count - 1}.layer.0.layer_norm.weight"
            if last not in self.files:
                raise QuantizeError(f"{self.directory}: tensor {last} is missing, config.json asks for {count} blocks")
            for block in range(count):
                prefix = self.config.ffn_prefix(stack, block)
                if is_sparse(self.files, prefix) != self.config.is_sparse(stack, block):
                    has, wants = ("experts", "none") if is_sparse(self.files, prefix) else ("no experts", "some")
                    raise QuantizeError(f"{self.directory}: {stack} block {block} has {has}, config.json asks for {wants}")
                if is_sparse(self.files, prefix):
                    layers.append(SparseLayer(stack, block, prefix))
        if not layers:
            raise QuantizeError(f"{self.directory}: the checkpoint has no sparse layer, nothing to quantize")
        return tuple(layers)

    def _validate(self) -> None:
        config = self.config
        inner = config.heads * config.d_kv
        expected: dict[str, tuple[int, ...]] = {"shared.weight": (config.vocabulary, config.d_model)}
        for layer in self.layers:
            expected[f"{layer.prefix}mlp.router.classifier.weight"] = (config.experts, config.d_model)
            if config.router_bias:
                expected[f"{layer.prefix}mlp.router.classifier.bias"] = (config.experts,)
            for expert in range(config.experts):
                expected[layer.expert_name(expert, "wi")] = (config.d_ff, config.d_model)
                expected[layer.expert_name(expert, "wo")] = (config.d_model, config.d_ff)
        sparse = {layer.prefix for layer in self.layers}
        for stack in ("encoder", "decoder"):
            expected[f"{stack}.final_layer_norm.weight"] = (config.d_model,)
            table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
            expected[table] = (config.buckets, config.heads)
            for block in range(config.blocks(stack)):
                kinds = ["SelfAttention"] + (["EncDecAttention"] if stack == "decoder" else [])
                for i, kind in enumerate(kinds):
                    base = f"{stack}.block.{block}.layer.{i}."
                    expected[f"{base}layer_norm.weight"] = (config.d_model,)
                    for letter in "qkv":
                        expected[f"{base}{kind}.{letter}.weight"] = (inner, config.d_model)
                    expected[f"{base}{kind}.o.weight"] = (config.d_model, inner)
                prefix = config.ffn_prefix(stack, block)
                expected[f"{prefix}layer_norm.weight"] = (config.d_model,)
                if prefix not in sparse:
                    expected[f"{prefix}mlp.wi.weight"] = (config.d_ff, config.d_model)
                    expected[f"{prefix}mlp.wo.weight"] = (config.d_model, config.d_ff)
        copies = dict.fromkeys(("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), expected["shared.weight"])
        (copies if config.tied else expected)["lm_head.weight"] = expected["shared.weight"]
        expected |= {name: shape for name, shape in copies.items() if name in self._shapes}
        for name, shape in expected.items():
            if name not in self._shapes:
                raise QuantizeError(f"{self.directory}: tensor {name} is missing")
            if self._shapes[name] != shape:
                raise QuantizeError(
                    f"{self.directory}: {name} has shape {list(self._shapes[name])}, config.json says {list(shape)}"
                )
        if left := sorted(self._shapes.keys() - expected.keys()):
            raise QuantizeError(f"{self.directory}: tensor {left[0]} has no place in the model that config.json describes")
        for name, dtype in self.dtypes.items():
            if dtype not in TORCH_DTYPES and (dtype != "F64" or EXPERT.match(name)):
                raise QuantizeError(f"{self.directory}: {name} has dtype {dtype}, which the quantizer does not take")
        if config.tied:
            self._check_copies(tuple(name for name in copies if name in self._shapes))

    def _check_copies(self, names: tuple[str, ...]) -> None:
        """Raise QuantizeError where a tied embedding is stored again with other values."""
        for name in names:
            pair = self.load(["shared.weight", name], dtype=None)
            if not torch.equal(pair["shared.weight"], pair[name]):
                raise QuantizeError(f"{self.directory}: {name} differs from shared.weight, to which config.json ties it")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise QuantizeError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise QuantizeError(f"{path}: cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise QuantizeError(f"{path}: not a JSON object")
    return value


def _locate(directory: Path) -> dict[str, Path]:
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if index.exists():
        if single.exists():
            raise QuantizeError(f"{directory} holds both {single.name} and {index.name}: which of them counts?")
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, Mapping) or not weight_map:
            raise QuantizeError(f"{index}: no weight_map")
        files = {str(name): directory / str(shard) for name, shard in weight_map.items()}
        for file in sorted(set(files.values())):
            if file.parent != directory or not file.is_file():
                raise QuantizeError(f"{directory}: shard {file.name}, listed in the index, is missing")
        return files
    if not single.is_file():
        pickled = sorted(file.name for file in directory.glob("pytorch_model*.bin"))
        hint = f", only {pickled[0]}: save it again with transformers, which writes safetensors" if pickled else ""
        raise QuantizeError(f"{directory}: holds neither model.safetensors nor model.safetensors.index.json{hint}")
    return dict.fromkeys(_header(single), single)


def _header(file: Path) -> dict[str, Any]:
    """Read a safetensors header; the library validates offsets, this only parses names."""
    try:
        with safe_open(file, framework="pt", device="cpu") as handle:
            keys = list(handle.keys())
            is_packed = "qmoecodec" in (handle.metadata() or {})
        with file.open("rb") as raw:
            size = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(size))
    except (OSError, SafetensorError, ValueError) as error:
        raise QuantizeError(f"{file}: not a readable safetensors file ({error})") from None
    if is_packed:
        raise QuantizeError(f"{file}: is packed already; quantizing starts from the original checkpoint")
    return {key: header[key] for key in keys}
