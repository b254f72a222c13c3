"""Checkpoint directories: the shard index, the files it may name, and the names of new shards (spec §8)."""

from __future__ import annotations

import json
import os
import pathlib
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from qmoecodec.container.files import new_file, write_at
from qmoecodec.container.header import MAX_HEADER
from qmoecodec.container.json_text import decode_utf8, parse_object
from qmoecodec.errors import FormatError

SINGLE_NAME: Final = "model.safetensors"
INDEX_NAME: Final = "model.safetensors.index.json"
OUTPUT_NAME: Final = re.compile(r"model(-[0-9]{5,}-of-[0-9]{5,})?\.safetensors|model\.safetensors\.index\.json")


@dataclass(frozen=True, slots=True)
class Shards:
    """The weight files of a checkpoint.

    files : in the order in which the index names them
    weight_map : tensor -> file name, None without an index
    metadata : of the index
    """

    files: tuple[pathlib.Path, ...]
    weight_map: Mapping[str, str] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


def find_shards(path: pathlib.Path, *, packed: bool = True) -> Shards:
    """List the weight files of a file or a checkpoint directory (spec §8).

    packed : False for a directory that is to be packed, which must not be ambiguous; its files are in order of name
    Raises FileNotFoundError where there is nothing; FormatError: shard_index, shard_path, shard_missing, and the reasons
    of spec §2.2; for a source, ValueError where the directory holds an index and a single file, and FileNotFoundError
    where it holds neither.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not path.is_dir():
        if not path.is_file():
            raise ValueError(f"{path} is neither a file nor a directory")
        return Shards((path,))
    single, index = path / SINGLE_NAME, path / INDEX_NAME
    if index.exists():
        if not packed and os.path.lexists(single):
            raise ValueError(f"{path} holds both {SINGLE_NAME} and {INDEX_NAME}: which of them counts?")
        shards = _read_index(path, index)
        return shards if packed else Shards(tuple(sorted(shards.files)), shards.weight_map, shards.metadata)
    if not packed and not os.path.lexists(single):
        raise FileNotFoundError(f"{path} holds neither {SINGLE_NAME} nor {INDEX_NAME}")
    return Shards((check_member(path, SINGLE_NAME),))


def _read_index(directory: pathlib.Path, index: pathlib.Path) -> Shards:
    check_member(directory, INDEX_NAME)
    if index.stat().st_size > MAX_HEADER:
        raise FormatError("shard_index", f"the index is larger than {MAX_HEADER} bytes")
    try:
        value = parse_object(decode_utf8(index.read_bytes()), any_number_below="metadata")
    except FormatError as error:
        raise error.at(file=INDEX_NAME) from None
    weight_map, metadata = value.get("weight_map"), value.get("metadata", {})
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise FormatError("shard_index", "weight_map is not an object of strings", file=INDEX_NAME)
    if not isinstance(metadata, dict):
        raise FormatError("shard_index", "metadata is not an object", file=INDEX_NAME)
    files = tuple(check_member(directory, name) for name in dict.fromkeys(weight_map.values()))
    return Shards(files, weight_map, metadata)


def check_member(directory: pathlib.Path, name: str) -> pathlib.Path:
    """Return the path of a weight file after checking that it lies in the directory (spec §8.2).

    A Hugging Face cache links `snapshots/REVISION/NAME` to its own `blobs/`, which counts as inside.
    Raises FormatError: shard_path, shard_missing.
    """
    if name in ("", ".", "..") or any(c in name for c in "/\\\0"):
        raise FormatError("shard_path", "not a plain file name", file=name[:200])
    path = directory / name
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: a loop of links, before Python 3.13
        raise FormatError("shard_missing", file=name[:200]) from None
    if not is_inside(directory, real):
        raise FormatError("shard_path", "a symbolic link leaves the directory", file=name[:200])
    if not stat.S_ISREG(real.stat().st_mode):
        raise FormatError("shard_path", "not a regular file", file=name[:200])
    return path


def is_inside(directory: pathlib.Path, real: pathlib.Path) -> bool:
    """Say whether a resolved path lies in the directory or in the blobs of the Hugging Face cache it is part of."""
    home = directory.resolve()
    if real.is_relative_to(home):
        return True
    return home.parent.name == "snapshots" and real.is_relative_to(home.parent.parent / "blobs")


def finish_shards(directory: pathlib.Path, parts: list[pathlib.Path], contents: list[list[str]],
                  metadata: Mapping[str, Any], total_size: int) -> list[str]:  # fmt: skip
    """Give the new files of a directory their names, and write the index where there are several.

    contents : names of the tensors of each part
    Returns the file names.
    """
    if len(parts) == 1:
        os.rename(parts[0], directory / SINGLE_NAME)
        return [SINGLE_NAME]
    names = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    for part, name in zip(parts, names, strict=True):
        os.rename(part, directory / name)
    weight_map = {tensor: name for name, tensors in zip(names, contents, strict=True) for tensor in tensors}
    index = {"metadata": {**metadata, "total_size": total_size}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    with new_file(directory / INDEX_NAME) as fd:
        write_at(fd, text.encode("utf-8"), 0)
    return [*names, INDEX_NAME]
