"""The dense checkpoint that `pack` reads: one file, or a directory with one or many."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from qmoecodec.container.files import copy_file, read_at, read_chunks
from qmoecodec.container.header import header_bytes, lay_out, read_header
from qmoecodec.container.metadata import METADATA_KEY, RESERVED_PREFIX
from qmoecodec.container.shards import INDEX_NAME, OUTPUT_NAME, find_shards, is_inside
from qmoecodec.container.ternary import BITS_TYPE
from qmoecodec.errors import FormatError
from qmoecodec.types import AnyArray


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor of the source.

    fd : descriptor of its file;  begin : byte of the file
    """

    dtype: str
    shape: tuple[int, ...]
    fd: int
    begin: int
    n_bytes: int


class Source:
    """An open dense checkpoint; a context manager.

    tensors : name -> tensor
    metadata : `__metadata__` of all files; None where no file has one
    notes : what could not be kept
    is_usual : whether it is one file, laid out as the safetensors library does; such a file comes back byte for byte
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.shards = find_shards(path, packed=False)
        self.tensors: dict[str, SourceTensor] = {}
        self.metadata: dict[str, str] | None = None
        self.notes: list[str] = []
        self.n_file_bytes = 0
        self.is_usual = False
        self._fds: list[int] = []
        try:
            for file in self.shards.files:
                self._open_file(file)
            self._check_weight_map(self.shards.weight_map)
        except BaseException:
            self.close()
            raise

    def _open_file(self, file: pathlib.Path) -> None:
        fd = os.open(file, os.O_RDONLY)
        self._fds.append(fd)
        self.n_file_bytes += os.fstat(fd).st_size
        try:
            header = read_header(fd, strict=False)
        except FormatError as error:
            raise error.at(file=file.name) from None
        metadata = header.metadata
        if metadata is not None:
            if METADATA_KEY in metadata:
                raise ValueError(f"{file} is already packed")
            kept = self.metadata = self.metadata if self.metadata is not None else {}
            for key, value in metadata.items():
                if kept.setdefault(key, value) != value:
                    self.notes.append(f"__metadata__ entry {key!r} differs between files; the first is kept")
        if len(self.shards.files) == 1:
            with contextlib.suppress(ValueError):  # it would be too long
                usual = header_bytes(lay_out((n, t.dtype, t.shape) for n, t in header.tensors.items()), metadata)
                self.is_usual = usual == os.pread(fd, len(usual), 0)
        for name, info in header.tensors.items():
            if name in self.tensors:
                raise FormatError("source_conflict", "two files hold the tensor", tensor=name)
            if name.startswith(RESERVED_PREFIX):
                raise FormatError("reserved_name", tensor=name)
            self.tensors[name] = SourceTensor(info.dtype, info.shape, fd, header.data_begin + info.begin, info.n_bytes)

    def _check_weight_map(self, weight_map: Mapping[str, str] | None) -> None:
        if weight_map is not None and weight_map.keys() != self.tensors.keys():
            name = min(weight_map.keys() ^ self.tensors.keys())
            what = "is in no file" if name in weight_map else "is not in the index"
            raise FormatError("shard_mismatch", f"a tensor {what}", tensor=name)
        names = dict(zip(self._fds, (file.name for file in self.shards.files), strict=True))
        n_elsewhere = sum(names[self.tensors[name].fd] != file for name, file in (weight_map or {}).items())
        if n_elsewhere:
            self.notes.append(f"the index is wrong about the file of {n_elsewhere} tensors; each is taken from where it is")

    def read_bits(self, tensor: SourceTensor, begin: int, shape: tuple[int, ...]) -> AnyArray:
        """Read part of a float tensor from element `begin` on: uint[shape], the numbers' bits."""
        dtype = np.dtype(BITS_TYPE[tensor.dtype])
        n_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        data = read_at(tensor.fd, tensor.begin + begin * dtype.itemsize, n_bytes)
        return np.frombuffer(data, dtype).reshape(shape)

    def read_chunks(self, tensor: SourceTensor) -> Iterator[bytearray]:
        """Yield a tensor's bytes in chunks."""
        return read_chunks(tensor.fd, tensor.begin, tensor.n_bytes)

    def close(self) -> None:
        """Close the files."""
        while self._fds:
            os.close(self._fds.pop())

    def __enter__(self) -> Source:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def copy_other_files(source: pathlib.Path, target: pathlib.Path, weights: tuple[pathlib.Path, ...]) -> list[str]:
    """Copy what a checkpoint directory holds beside its weights (config, tokenizer, ...); return the relative names.

    Raises ValueError for a file that would take the name of a weight file, or a link that leaves the directory.
    """
    skip = {file.name for file in weights} | {INDEX_NAME}
    copied: list[str] = []
    for folder, folders, names in os.walk(source):
        here = pathlib.Path(folder)
        relative = here.relative_to(source)
        beside_weights = not relative.parts
        folders.sort()
        for name in list(folders):
            if (here / name).is_symlink():
                raise ValueError(f"{here / name} is a link to a directory; copy the checkpoint first")
            (target / relative / name).mkdir()
        for name in sorted(names):
            if beside_weights and name in skip:
                continue
            if beside_weights and OUTPUT_NAME.fullmatch(name):
                raise ValueError(f"{here / name} is no part of the checkpoint but has the name of a weight file")
            path = here / name
            if not is_inside(source, _resolve(path)):
                raise ValueError(f"{path} is a link that leaves the directory")
            if not path.is_file():
                raise ValueError(f"{path} is not a regular file")
            copy_file(path, target / relative / name)
            copied.append((relative / name).as_posix())
    return copied


def _resolve(path: pathlib.Path) -> pathlib.Path:
    try:
        return path.resolve()
    except RuntimeError:  # before Python 3.13, which takes the link itself
        raise ValueError(f"{path} is a loop of links") from None


def check_apart(source: pathlib.Path, target: pathlib.Path) -> None:
    """Check that source and target are not the same, nor one inside the other.

    Raises ValueError.
    """
    a, b = _resolve(source), _resolve(target)
    same = a == b or (target.exists() and os.path.samefile(source, target))
    if same:
        raise ValueError(f"source and target are the same: {source}")
    if source.is_dir() and b.is_relative_to(a):
        raise ValueError(f"the target {target} lies inside the source {source}")
    if a.is_relative_to(b):
        raise ValueError(f"the source {source} lies inside the target {target}")


