"""Write safetensors files (spec §2): plain ones, and packed ones with their metadata and checksums (spec §3, §7)."""

from __future__ import annotations

import pathlib
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from qmoecodec.container.files import Chunk, new_file, write_at
from qmoecodec.container.header import DTYPE_SIZES, MAX_TENSORS, TensorInfo, header_bytes, lay_out
from qmoecodec.container.metadata import (
    HEADER_CRC32,
    METADATA_KEY,
    DictionaryEntry,
    GroupInfo,
    Metadata,
    to_text,
)
from qmoecodec.types import Dictionary


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor to write; its bytes are asked for when their turn comes.

    chunks : returns the tensor's bytes in order
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[Chunk]]

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensor."""
        n = DTYPE_SIZES[self.dtype]
        for dim in self.shape:
            n *= dim
        return n


def _write_pieces(fd: int, begin: int, placed: Mapping[str, TensorInfo], pieces: Mapping[str, Piece], *,
                  checked: set[str], advance: Callable[[int], None]) -> dict[str, int]:  # fmt: skip
    """Write the data; return the crc32 of the tensors in `checked`."""
    checksums: dict[str, int] = {}
    for name, info in placed.items():
        at, crc = begin + info.begin, 0
        for chunk in pieces[name].chunks():
            at = write_at(fd, chunk, at)
            if name in checked:
                crc = zlib.crc32(chunk, crc)
        if at != begin + info.end:
            raise RuntimeError(f"{name}: {at - begin - info.begin} bytes written for {info.n_bytes}")
        checksums[name] = crc
        advance(info.n_bytes)
    return {name: checksums[name] for name in checked}


def _place(pieces: Iterable[Piece]) -> tuple[dict[str, TensorInfo], dict[str, Piece]]:
    by_name: dict[str, Piece] = {}
    for piece in pieces:
        if piece.name in by_name:
            raise ValueError(f"two tensors are named {piece.name!r}")
        by_name[piece.name] = piece
    return lay_out((p.name, p.dtype, p.shape) for p in by_name.values()), by_name


def write_plain(path: pathlib.Path, pieces: Iterable[Piece], metadata: Mapping[str, str] | None, *,
                advance: Callable[[int], None] = lambda n: None) -> int:  # fmt: skip
    """Create a dense safetensors file, laid out as the safetensors library does; return its size in bytes."""
    placed, by_name = _place(pieces)
    header = header_bytes(placed, metadata)
    with new_file(path) as fd:
        write_at(fd, header, 0)
        _write_pieces(fd, len(header), placed, by_name, checked=set(), advance=advance)
    return len(header) + sum(info.n_bytes for info in placed.values())


def dictionary_name(index: int) -> str:
    """Return the name of a dictionary's tensor (spec §4.1)."""
    return f"qmoecodec.dictionary.{index}"


def write_packed(path: pathlib.Path, *, groups: Sequence[GroupInfo], roles: Iterable[Piece],
                 dictionaries: Sequence[Dictionary], passthrough: Iterable[Piece], metadata: Mapping[str, str] | None,
                 advance: Callable[[int], None] = lambda n: None) -> int:  # fmt: skip
    """Create a packed file (spec §3); return its size in bytes.

    roles : the role tensors of all groups;  metadata : `__metadata__` of the source
    The data is written first. The header follows when the checksums of the passthrough tensors are known: its length
    does not depend on them.
    """
    passthrough = list(passthrough)
    pieces = [*roles, *passthrough, Piece(HEADER_CRC32, "U32", (1,), lambda: [bytes(4)])]
    entries = []
    for index, d in enumerate(dictionaries):
        pieces.append(Piece(dictionary_name(index), "U8", (len(d.data),), lambda d=d: [d.data]))  # type: ignore[misc]
        entries.append(DictionaryEntry(d.kind, d.code_bits, d.threshold, zlib.crc32(d.data)))
    if len(pieces) > MAX_TENSORS:
        raise ValueError(f"{len(pieces)} tensors in one file, more than {MAX_TENSORS}; a directory may hold several files")
    placed, by_name = _place(pieces)
    meta = Metadata(tuple(entries), tuple(groups), {piece.name: 0 for piece in passthrough})
    size = len(header_bytes(placed, _with_text(metadata, meta)))
    with new_file(path) as fd:
        checksums = _write_pieces(fd, size, placed, by_name, checked=set(meta.passthrough), advance=advance)
        header = header_bytes(placed, _with_text(metadata, replace(meta, passthrough=checksums)))
        write_at(fd, header, 0)
        write_at(fd, struct.pack("<I", zlib.crc32(header)), size + placed[HEADER_CRC32].begin)
    return size + sum(info.n_bytes for info in placed.values())


def _with_text(metadata: Mapping[str, str] | None, meta: Metadata) -> dict[str, str]:
    if metadata is not None and METADATA_KEY in metadata:
        raise ValueError(f"__metadata__ already has the key {METADATA_KEY!r}")
    return {**(metadata or {}), METADATA_KEY: to_text(meta)}
