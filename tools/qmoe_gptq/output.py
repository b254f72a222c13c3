"""Write the result: a checkpoint whose experts hold ternary values, packed by the codec."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .checkpoint import EXPERT, TOKENIZER_FILES, TORCH_DTYPES, Checkpoint
from .errors import QuantizeError
from .results import Results
from .store import save_tensors, sync

Tensor = torch.Tensor
REPORT = "quantize.json"


def write_dense(checkpoint: Checkpoint, directory: Path, results: Results, changed: Mapping[str, Tensor]) -> None:
    """Write the checkpoint with ternary experts, shard by shard, dtypes and names as in the source.

    changed : tuned layer norms, by name
    """
    directory.mkdir(parents=True)
    layers = {f"{layer.prefix}mlp.experts.": layer for layer in checkpoint.layers}
    for file in sorted(set(checkpoint.files.values())):
        names = sorted((n for n in checkpoint.names if checkpoint.files[n] == file), key=_unit_order)
        tensors = {}
        for name in names:
            dtype = TORCH_DTYPES.get(checkpoint.dtypes[name])
            if match := EXPERT.match(name):
                value = results.values(layers[match["layer"]], match["which"], int(match["expert"]))
                tensors[name] = value.to(dtype).contiguous()
            elif name in changed:
                tensors[name] = changed[name].to("cpu", dtype).contiguous()
            else:
                tensors[name] = checkpoint.load([name], dtype=None)[name]
        save_tensors(tensors, directory / file.name, {"format": "pt"})
        del tensors
    index = checkpoint.directory / "model.safetensors.index.json"
    if index.exists():
        shutil.copyfile(index, directory / index.name)
    for name in ("config.json", *TOKENIZER_FILES):
        source = checkpoint.directory / name
        if source.is_file():
            shutil.copyfile(source, directory / name)


def _unit_order(name: str) -> tuple[str, int, str]:
    """Sort a shard's tensors so that a unit's matrices are neighbours: units are read one at a time."""
    match = EXPERT.match(name)
    return (match["layer"], int(match["expert"]), match["which"]) if match else ("", 0, name)


def pack_directory(source: Path, target: Path) -> None:
    """Pack a dense ternary checkpoint directory with the codec."""
    try:
        import qmoecodec
    except ImportError as error:
        raise QuantizeError(f"the codec (qmoecodec) cannot be imported: {error}") from None
    qmoecodec.pack(source, target)


def publish(built: Path, out: Path, report: Mapping[str, Any]) -> None:
    """Move the finished directory to its final name in one rename, everything synced before."""
    (built / REPORT).write_text(json.dumps(report, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    for file in built.iterdir():
        sync(file)
    sync(built)
    if out.exists():
        out.rmdir()  # only ever an empty directory: checked before the run
    os.replace(built, out)
    sync(out.parent)
