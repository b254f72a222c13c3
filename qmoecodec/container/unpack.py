"""`unpack`: a packed checkpoint in, the dense one out, laid out as the safetensors library writes it."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np

from qmoecodec.codec.arguments import check_integer
from qmoecodec.container.files import Chunk, atomic_directory, atomic_file
from qmoecodec.container.metadata import GroupInfo
from qmoecodec.container.pack import MAX_SHARD_SIZE, Meter, Progress
from qmoecodec.container.packed import PackedFile
from qmoecodec.container.reader import File, decode_expert
from qmoecodec.container.shards import finish_shards
from qmoecodec.container.source import check_apart, copy_other_files
from qmoecodec.container.ternary import fill_rows
from qmoecodec.container.verify import find_errors
from qmoecodec.container.writer import Piece, write_plain
from qmoecodec.errors import FormatError

# Dense bytes made in one step.
_BLOCK_BYTES: Final = 8 << 20


@dataclass(frozen=True, slots=True)
class UnpackReport:
    """What `unpack` did.

    files : names of the files written, weights first
    n_packed_bytes, n_dense_bytes : of the weight files, headers included
    """

    files: tuple[str, ...]
    n_packed_bytes: int
    n_dense_bytes: int
    n_tensors: int
    notes: tuple[str, ...] = ()


def unpack(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    max_shard_size: int = MAX_SHARD_SIZE,
    progress: Progress | None = None,
    overwrite: bool = True,
) -> UnpackReport:
    """Restore the dense checkpoint from a packed one: every tensor's name, dtype, shape and bytes, and `__metadata__`.

    src : a packed file or directory
    dst : a file; or for a source directory a directory too, unless the name ends in `.safetensors`. It appears whole
        when all is done, or not at all. An existing directory is replaced only if it holds a checkpoint.
    max_shard_size : bytes of one file of a directory
    progress : called with stage, bytes done, bytes in all
    Raises FormatError where the source breaks the specification, the first reason in the order of spec §9; OSError.
    """
    source_path, target = pathlib.Path(src), pathlib.Path(dst)
    check_integer(max_shard_size, "max_shard_size", least=1)
    check_apart(source_path, target)
    with File(source_path, mapped=False) as source:
        to_directory = source_path.is_dir() and target.suffix != ".safetensors"
        metadata, notes = source.merged_metadata()
        pieces = sorted(_pieces(source), key=lambda piece: piece.name)
        meter = Meter(progress, sum(piece.n_bytes for piece in pieces))
        meter.stage = "decode"
        with _first_error(source), contextlib.ExitStack() as stack:
            for file in source.files:  # also what no tensor needs
                for index in range(len(file.metadata.dictionaries)):
                    file.dictionary(index)
                for group in file.metadata.groups:
                    file.group(group.name)
            if to_directory:
                folder = stack.enter_context(atomic_directory(target, overwrite=overwrite))
                parts = _split(pieces, max_shard_size)
                paths = [folder / f".part-{i}" for i in range(len(parts))]
                n_bytes = sum(
                    write_plain(path, part, metadata, advance=meter.advance)
                    for path, part in zip(paths, parts, strict=True)
                )
                contents = [[piece.name for piece in part] for part in parts]
                total_size = sum(piece.n_bytes for piece in pieces)
                files = finish_shards(folder, paths, contents, source.shards.metadata, total_size)
                files += copy_other_files(source_path, folder, source.shards.files)
            else:
                path = stack.enter_context(atomic_file(target, overwrite=overwrite))
                n_bytes = write_plain(path, pieces, metadata, advance=meter.advance)
                files = [target.name]
        return UnpackReport(tuple(files), source.n_file_bytes, n_bytes, len(pieces), tuple(notes))


@contextlib.contextmanager
def _first_error(source: File) -> Iterator[None]:
    """Where something is wrong, raise what is first in the order of spec §9: tensors are written in another one."""
    try:
        yield
    except FormatError as error:
        raise next(find_errors(source), error) from None


def _split(pieces: list[Piece], max_bytes: int) -> list[list[Piece]]:
    """Cut the tensors, in order of name, into parts of at most `max_bytes`; a tensor is never split."""
    parts: list[list[Piece]] = [[]]
    n_bytes = 0
    for piece in pieces:
        if parts[-1] and n_bytes + piece.n_bytes > max_bytes:
            parts.append([])
            n_bytes = 0
        parts[-1].append(piece)
        n_bytes += piece.n_bytes
    return parts


def _pieces(source: File) -> Iterator[Piece]:
    for file in source.files:
        for name in file.metadata.passthrough:
            info = file.header.tensors[name]
            yield Piece(name, info.dtype, info.shape, _Passthrough(file, name))
        for group in file.metadata.groups:
            experts = group.shape[0]
            if group.layout == "stacked":
                for expert, name in enumerate(group.source_names()):
                    chunks = partial(_experts, file, group, range(expert, expert + 1))
                    yield Piece(name, group.dtype, group.source_shape, chunks)
            else:
                yield Piece(group.source, group.dtype, group.source_shape, partial(_experts, file, group, range(experts)))


@dataclass(frozen=True, slots=True)
class _Passthrough:
    """The bytes of a passthrough tensor; a file may have 65,536 of these, and a closure takes four times as much."""

    file: PackedFile
    name: str

    def __call__(self) -> Iterator[Chunk]:
        self.file.check_passthrough(self.name)
        n_bytes = self.file.header.tensors[self.name].n_bytes
        for at in range(0, n_bytes, _BLOCK_BYTES):
            yield self.file.read(self.name, at, min(n_bytes, at + _BLOCK_BYTES))


def _experts(file: PackedFile, group: GroupInfo, experts: range) -> Iterator[Chunk]:
    data = file.group(group.name)
    _, rows, cols = group.shape
    n = max(1, _BLOCK_BYTES // max(1, cols * data.bits_type.itemsize))
    for expert in experts:
        parts = data.expert(expert)
        # Blocks of rows: the dense expert is never in memory as a whole.
        for row in range(0, rows, n):
            end = min(rows, row + n)
            digits = decode_expert(data, expert, parts, row, end)
            yield fill_rows(digits, parts.levels[row:end]).ravel().view(np.uint8).data
