"""Dense files and checkpoints for the tests of the container, and independent readers of what it writes."""

import json
import pathlib
import struct
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from qmoecodec.container.header import header_bytes, lay_out

Raw = dict[str, tuple[str, tuple[int, ...], bytes]]


def ternary(shape: tuple[int, ...], seed: int = 0, zeros: float = 0.8, dtype: Any = np.float32) -> Any:
    """Random ternary rows; every level exact in every float type."""
    rng = np.random.default_rng(seed)
    digits = rng.choice([0, -1, 1], size=shape, p=[zeros, (1 - zeros) / 2, (1 - zeros) / 2])
    low = -rng.integers(1, 64, size=(*shape[:-1], 1)) / 16
    high = rng.integers(1, 64, size=(*shape[:-1], 1)) / 16
    return np.where(digits < 0, low, np.where(digits > 0, high, 0)).astype(dtype)


def dense(shape: tuple[int, ...], seed: int = 0, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def write_raw(path: pathlib.Path, tensors: Raw, metadata: dict[str, str] | None = None) -> None:
    """Write any dtype, as the safetensors library does."""
    placed = lay_out((name, dtype, shape) for name, (dtype, shape, _) in tensors.items())
    path.write_bytes(header_bytes(placed, metadata) + b"".join(tensors[name][2] for name in placed))


def read_raw(path: pathlib.Path) -> Raw:
    """Read a safetensors file without this package."""
    data = path.read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + n])
    header.pop("__metadata__", None)
    body = data[8 + n :]
    return {
        name: (e["dtype"], tuple(e["shape"]), body[e["data_offsets"][0] : e["data_offsets"][1]])
        for name, e in header.items()
    }


def check_official(path: pathlib.Path) -> set[str]:
    """Open with the official library and touch every tensor; return the names."""
    with safetensors.safe_open(path, "np") as f:
        for name in f.keys():  # noqa: SIM118  # not a dict
            assert -1 not in f.get_slice(name).get_shape()
            f.get_tensor(name) if f.get_slice(name).get_dtype() != "BF16" else None
        return set(f.keys())


MODEL = {
    **{f"encoder.mlp.experts.expert_{i}.wi.weight": ternary((24, 40), i) for i in range(3)},
    **{f"encoder.mlp.experts.expert_{i}.wo.weight": ternary((40, 24), i + 9, 0.5) for i in range(3)},
    **{f"layers.0.experts.{i}.w1.weight": ternary((16, 32), i + 20, dtype=np.float16) for i in (0, 1, 3)},
    "layers.0.experts.2.w1.weight": dense((16, 32), dtype=np.float16),
    "fused.experts.gate_up": ternary((2, 20, 30), 5),
    "head.weight": ternary((30, 50), 6, dtype=np.float64),
    "norm.weight": np.ones(40, np.float32),
    "embedding.weight": dense((30, 20), 3),
    "steps": np.arange(5),
    "flag": np.array(True),
    "empty": np.zeros((0, 7), np.float32),
}


def write_checkpoint(folder: pathlib.Path, shards: int) -> pathlib.Path:
    """A Hugging Face directory; experts of one layer are spread over the shards."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "x"}')
    (folder / "sub").mkdir()
    (folder / "sub/tokenizer.model").write_bytes(b"\0\1")
    names = sorted(MODEL)
    if shards == 1:
        safetensors.numpy.save_file(MODEL, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i::shards]
        safetensors.numpy.save_file({n: MODEL[n] for n in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1, "total_parameters": 2.5}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read_checkpoint(folder: pathlib.Path) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= safetensors.numpy.load_file(file)
    return tensors


def check_same(tensors: dict[str, Any]) -> None:
    assert tensors.keys() == MODEL.keys()
    for name, value in MODEL.items():
        assert tensors[name].dtype == value.dtype
        assert tensors[name].shape == value.shape
        assert tensors[name].tobytes() == value.tobytes()
