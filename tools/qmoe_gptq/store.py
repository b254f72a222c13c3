"""Finished work on disk: whole or absent, and tied to what it was made from.

A unit is written beside its final name, synced, then renamed, so that a process killed
at any point leaves either no unit or a complete one. The fingerprint inside decides
whether a later run may use it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import QuantizeError

Tensor = torch.Tensor


class UnitStore:
    """Units of one run in one directory."""

    def __init__(self, directory: Path, *, fingerprint: str, resume: bool) -> None:
        """Use ``directory``; with ``resume=False`` units already there are ignored and replaced."""
        self.directory = directory
        self.fingerprint = fingerprint
        self._fresh: set[str] = set()
        self._resume = resume
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob("*.partial"):
            leftover.unlink()

    def load(self, key: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """Return a finished unit's tensors and facts, or None when it must be computed."""
        if not self._resume and key not in self._fresh:
            return None
        path = self.directory / f"{key}.safetensors"
        try:
            with safe_open(path, framework="pt") as handle:
                facts = dict(handle.metadata() or {})
                if facts.pop("fingerprint", None) != self.fingerprint:
                    return None
                return {name: handle.get_tensor(name) for name in handle.keys()}, facts  # noqa: SIM118
        except (FileNotFoundError, OSError, SafetensorError):
            return None

    def save(self, key: str, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
        """Write a unit so that it appears whole or not at all."""
        path = self.directory / f"{key}.safetensors"
        partial = path.with_suffix(".partial")
        data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_tensors(data, partial, {**facts, "fingerprint": self.fingerprint})
        sync(partial)
        os.replace(partial, path)
        sync(self.directory)
        self._fresh.add(key)

    def remove(self, key: str) -> None:
        """Delete a unit that is no longer needed."""
        (self.directory / f"{key}.safetensors").unlink(missing_ok=True)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file; raises QuantizeError where the disk does not take it."""
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # the library makes this of an OSError
        raise QuantizeError(f"{path}: cannot be written ({error})") from None


def sync(path: Path) -> None:
    """Flush a file or directory to the device."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
