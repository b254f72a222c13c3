"""`pack`: a dense checkpoint in, a packed one out (spec §3 to §7). Two passes: find and sample, then encode and write."""

from __future__ import annotations

import contextlib
import os
import pathlib
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

import numpy as np

from qmoecodec import codec
from qmoecodec.codec.arguments import check_integer, check_threads
from qmoecodec.container.files import Chunk, atomic_directory, atomic_file, read_chunks, write_at
from qmoecodec.container.metadata import GroupInfo, to_ranges
from qmoecodec.container.naming import Candidate, find_candidates, name_groups, role_name
from qmoecodec.container.packed import role_shapes
from qmoecodec.container.shards import finish_shards
from qmoecodec.container.source import Source, SourceTensor, check_apart, copy_other_files
from qmoecodec.container.ternary import BITS_TYPE, split_rows, why_not_ternary
from qmoecodec.container.writer import Piece, write_packed
from qmoecodec.errors import EncodeError, FormatError
from qmoecodec.types import AnyArray, Dictionary, Encoded, Int8Array

#: What `pack` and `unpack` call now and then: stage, bytes done, bytes in all.
Progress: TypeAlias = Callable[[str, int, int], None]
DictionaryChoice: TypeAlias = Literal["auto", "qmoe-2023"] | Dictionary | Sequence[Dictionary]
CodeBits: TypeAlias = Literal["auto", 8, 12, 16]

MAX_SHARD_SIZE: Final = 5_000_000_000
# Digits encoded in one call; an expert is never split.
_BATCH_BYTES: Final = 64 << 20
# A dense matrix is given up after its first rows, so the first block is small.
_FIRST_BLOCK_BYTES: Final = 64 << 10
_BLOCK_BYTES: Final = 8 << 20
# Tensors of one shard (spec §2.3 allows 65,536): leaves room for the dictionaries and the next group.
_SHARD_TENSORS: Final = 65_000


@dataclass(frozen=True, slots=True)
class PackedGroup:
    """A group that `pack` wrote.

    n_bytes : of all its role tensors;  n_dense_bytes : of its source tensors
    """

    name: str
    layout: str
    source: str
    dtype: str
    shape: tuple[int, int, int]
    n_bytes: int
    n_dense_bytes: int


@dataclass(frozen=True, slots=True)
class PassedTensor:
    """A tensor that `pack` left as it is, and why."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    n_bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class PackReport:
    """What `pack` did.

    files : names of the files written, weights first
    n_source_bytes, n_packed_bytes : of the weight files, headers included
    notes : what could not be kept
    """

    files: tuple[str, ...]
    n_source_bytes: int
    n_packed_bytes: int
    groups: tuple[PackedGroup, ...]
    passthrough: tuple[PassedTensor, ...]
    notes: tuple[str, ...] = ()


class Meter:
    """Adds up bytes for a progress callback."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0
        self.stage = ""

    def advance(self, n_bytes: int) -> None:
        """Report that `n_bytes` more are done."""
        self._done += n_bytes
        if self._progress is not None:
            self._progress(self.stage, min(self._done, self._total), self._total)


def pack(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    dictionary: DictionaryChoice = "auto",
    code_bits: CodeBits = "auto",
    max_shard_size: int = MAX_SHARD_SIZE,
    threads: int | None = None,
    progress: Progress | None = None,
    overwrite: bool = True,
) -> PackReport:
    """Pack a dense checkpoint (spec §3): ternary matrices are found by value, everything else is kept byte for byte.

    src : a safetensors file, or a Hugging Face checkpoint directory, sharded or not
    dst : a file; or for a source directory a directory too, unless the name ends in `.safetensors`. It appears whole
        when all is done, or not at all. An existing directory is replaced only if it holds a checkpoint.
    dictionary, code_bits : as for `encode`; a sequence of dictionaries is used as the bank
    max_shard_size : bytes of one file of a directory; a group is never split
    progress : called with stage, bytes done, bytes in all
    Raises FormatError for a source that is not valid safetensors; ValueError for a source that is packed already, and,
    like TypeError, for a caller's mistakes; OSError.
    """
    source_path, target = pathlib.Path(src), pathlib.Path(dst)
    check_integer(max_shard_size, "max_shard_size", least=1)
    check_threads(threads)
    check_apart(source_path, target)
    with Source(source_path) as source:
        to_directory = source_path.is_dir() and target.suffix != ".safetensors"
        n_bytes = sum(t.n_bytes for t in source.tensors.values())
        meter = Meter(progress, 2 * n_bytes)
        found = _scan(source, dictionary, code_bits, meter)
        meter.stage = "encode"
        with contextlib.ExitStack() as stack:
            if to_directory:
                folder = stack.enter_context(atomic_directory(target, overwrite=overwrite))
                writer = _Writer(source, found, folder, max_shard_size, threads, meter)
                writer.run(lambda index: folder / f".part-{index}")
                files = finish_shards(folder, writer.parts, writer.contents, source.shards.metadata, writer.n_tensor_bytes)
                files += copy_other_files(source_path, folder, source.shards.files)
            else:
                temporary = stack.enter_context(atomic_file(target, overwrite=overwrite))
                writer = _Writer(source, found, target.parent, None, threads, meter)
                writer.run(lambda index: temporary)
                files = [target.name]
    return PackReport(
        tuple(files),
        source.n_file_bytes,
        writer.n_file_bytes,
        tuple(writer.packed),
        tuple(sorted(writer.passed, key=lambda t: t.name)),
        tuple(source.notes + _notes(source, writer.passed)),
    )


def _notes(source: Source, passed: Sequence[PassedTensor]) -> list[str]:
    """Say what a caller may have expected to be packed, or to come back, and is not."""
    notes = []
    n_minus_zero = sum(t.reason.startswith("ternary but for -0") for t in passed)
    if n_minus_zero:
        what = "tensor is" if n_minus_zero == 1 else "tensors are"
        notes.append(f"{n_minus_zero} {what} ternary but for -0, which no digit stands for; adding 0.0 makes it +0")
    n_files, n_bytes = len(source.shards.files), sum(t.n_bytes for t in source.tensors.values())
    if n_files > 1 or (source.path.is_dir() and n_bytes > MAX_SHARD_SIZE):
        files = f"{n_files} files" if n_files > 1 else "one file"
        notes.append(f"the weights are in {files}; unpack restores every tensor, but divides them by its own shard size")
    elif not source.is_usual:
        notes.append("the file is not laid out as the safetensors library does; unpack restores every tensor in that layout")
    return notes


@dataclass(slots=True)
class _Found:
    """What the first pass found."""

    groups: list[tuple[str, Candidate]] = field(default_factory=list)
    passthrough: dict[str, str] = field(default_factory=dict)
    bank: tuple[Dictionary, ...] = ()


def _read_expert(source: Source, tensor: SourceTensor, expert: int, rows: int, cols: int,
                 digits: Int8Array | None = None) -> tuple[Int8Array, AnyArray, int]:  # fmt: skip
    """Read one matrix block by block and split it (see `split_rows`); stops at the block with the first other row."""
    unsigned = np.dtype(BITS_TYPE[tensor.dtype])
    digits = np.empty((rows, cols), np.int8) if digits is None else digits
    levels = np.empty((rows, 2), unsigned)
    row_bytes = cols * unsigned.itemsize
    row, block_bytes = 0, _FIRST_BLOCK_BYTES
    while row < rows:
        n = min(rows - row, max(1, block_bytes // row_bytes))
        bits = source.read_bits(tensor, (expert * rows + row) * cols, (n, cols))
        digits[row : row + n], levels[row : row + n], bad_row = split_rows(bits, dtype=tensor.dtype)
        if bad_row >= 0:
            return digits, levels, row + bad_row
        row, block_bytes = row + n, _BLOCK_BYTES
    return digits, levels, -1


def _scan(source: Source, dictionary: DictionaryChoice, code_bits: CodeBits, meter: Meter) -> _Found:
    """First pass: find what is ternary, sample it for the bank, and name the groups."""
    meter.stage = "scan"
    found = _Found()
    planner: codec.BankPlanner | None = None
    if isinstance(dictionary, str):
        planner = codec.BankPlanner(dictionary=dictionary, code_bits=code_bits)
    else:
        found.bank = codec.given_bank(dictionary, code_bits)
    candidates, found.passthrough = find_candidates({n: (t.dtype, t.shape) for n, t in source.tensors.items()})
    for name in found.passthrough:
        meter.advance(source.tensors[name].n_bytes)
    ternary: list[Candidate] = []
    for candidate in candidates:
        members = []
        experts, rows, cols = (candidate.shape if len(candidate.shape) == 3 else (1, *candidate.shape))
        for number, name in candidate.members:
            tensor = source.tensors[name]
            for expert in range(experts):
                digits, _, bad_row = _read_expert(source, tensor, expert, rows, cols)
                if bad_row >= 0:
                    place = f"expert {expert}, row {bad_row}" if candidate.layout == "fused" else f"row {bad_row}"
                    row = source.read_bits(tensor, (expert * rows + bad_row) * cols, (1, cols))
                    found.passthrough[name] = f"{why_not_ternary(row, dtype=tensor.dtype)}: {place}"
                    break
                if planner is not None:
                    planner.add(digits)
            else:
                members.append((number, name))
            meter.advance(tensor.n_bytes)
        if members:
            ternary.append(
                Candidate(candidate.layout, candidate.source, tuple(members), candidate.dtype, candidate.shape)
            )
    found.groups = list(zip(name_groups(ternary, source.tensors.keys()), ternary, strict=True))
    if planner is not None and ternary:
        found.bank = planner.choose()
    return found


@dataclass(slots=True)
class _EncodedGroup:
    """A group in the spool: three role tensors back to back, and the small ones here.

    start : byte of the spool;  n_codes, n_row_lengths, n_levels : bytes of `codes`, `row_lengths` and `levels`
    crcs : per expert, over codes, row lengths and levels; the rest follows when the file's bank is known
    """

    info: GroupInfo
    start: int
    n_codes: int
    n_row_lengths: int
    n_levels: int
    row_length_dtype: str
    code_offsets: AnyArray
    dictionary_index: list[int]
    crcs: list[int]

    @property
    def n_bytes(self) -> int:
        experts = self.info.shape[0]
        return self.n_spooled + 8 * (experts + 1) + 5 * experts

    @property
    def n_spooled(self) -> int:
        return self.n_codes + self.n_row_lengths + self.n_levels


class _Writer:
    """Second pass: encodes group after group into a spool, and writes a file when enough has come together."""

    def __init__(self, source: Source, found: _Found, folder: pathlib.Path, max_bytes: int | None, threads: int | None,
                 meter: Meter) -> None:  # fmt: skip
        self.source = source
        self.found = found
        self.folder = folder
        self.max_bytes = max_bytes
        self.threads = threads
        self.meter = meter
        self.bank = list(found.bank)
        self.bank_index = {d: i for i, d in enumerate(self.bank)}
        self.packed: list[PackedGroup] = []
        self.passed: list[PassedTensor] = []
        self.parts: list[pathlib.Path] = []
        self.contents: list[list[str]] = []
        self.n_file_bytes = 0
        self.n_tensor_bytes = 0
        self._groups: list[_EncodedGroup] = []
        self._tensors: list[str] = []
        self._n_bytes = 0
        self._spool = -1
        self._spool_end = 0

    def run(self, part_path: Callable[[int], pathlib.Path]) -> None:
        """Write all; part_path(i) is the i-th file to create."""
        items: list[tuple[str, Candidate | str]] = [*self.found.groups, *((n, r) for n, r in self.found.passthrough.items())]
        items.sort(key=lambda item: (item[0], isinstance(item[1], str)))
        # Without a name from the start: nothing is left of it whatever happens.
        with tempfile.TemporaryFile(dir=self.folder) as spool:
            self._spool = spool.fileno()
            for name, item in items:
                if isinstance(item, str):
                    self._add_tensor(name, item, part_path)
                    continue
                group, reason = self._encode(name, item)
                if group is not None:
                    self._add_group(group, item, part_path)
                for _, member in item.members if group is None else ():
                    self._add_tensor(member, reason, part_path)
            if self._groups or self._tensors or not self.parts:
                self._write(part_path(len(self.parts)))

    def _make_room(self, n_bytes: int, part_path: Callable[[int], pathlib.Path]) -> bool:
        """Write a file where another `n_bytes` are too many for it; return whether it was."""
        n_tensors = 6 * len(self._groups) + len(self._tensors)
        full = self.max_bytes is not None and (self._n_bytes + n_bytes > self.max_bytes or n_tensors > _SHARD_TENSORS)
        if full and n_tensors:
            self._write(part_path(len(self.parts)))
        return full and n_tensors > 0

    def _add_tensor(self, name: str, reason: str, part_path: Callable[[int], pathlib.Path]) -> None:
        tensor = self.source.tensors[name]
        if self._make_room(tensor.n_bytes, part_path):
            self._spool_end = 0
            os.ftruncate(self._spool, 0)
        self.passed.append(PassedTensor(name, tensor.dtype, tensor.shape, tensor.n_bytes, reason))
        self._tensors.append(name)
        self._n_bytes += tensor.n_bytes

    def _add_group(self, group: _EncodedGroup, candidate: Candidate, part_path: Callable[[int], pathlib.Path]) -> None:
        info = group.info
        n_dense = sum(self.source.tensors[name].n_bytes for _, name in candidate.members)
        self.packed.append(
            PackedGroup(info.name, info.layout, info.source, info.dtype, info.shape, group.n_bytes, n_dense)
        )
        if self._make_room(group.n_bytes, part_path):
            # The groups before it are written: it moves to the front of the spool.
            at = 0
            for chunk in read_chunks(self._spool, group.start, group.n_spooled):
                at = write_at(self._spool, chunk, at)
            group.start, self._spool_end = 0, at
            os.ftruncate(self._spool, at)
        self._groups.append(group)
        self._n_bytes += group.n_bytes

    def _spool_write(self, data: Chunk) -> None:
        self._spool_end = write_at(self._spool, data, self._spool_end)

    def _encode(self, name: str, candidate: Candidate) -> tuple[_EncodedGroup | None, str]:
        """Encode one group into the spool; or return None and the reason why it passes through."""
        shape = candidate.shape if len(candidate.shape) == 3 else (len(candidate.members), *candidate.shape)
        experts, rows, cols = shape
        row_lengths = np.empty((experts, rows), np.uint32)
        levels = np.empty((experts, rows, 2), BITS_TYPE[candidate.dtype])
        code_offsets = np.zeros(experts + 1, np.uint64)
        index: list[int] = []
        crcs: list[int] = []
        start = self._spool_end
        n_dense = sum(self.source.tensors[member].n_bytes for _, member in candidate.members)
        batch = max(1, _BATCH_BYTES // (rows * cols))
        code_bits = 0
        try:
            for first in range(0, experts, batch):
                encoded = self._encode_batch(candidate, shape, first, min(batch, experts - first), levels)
                code_bits = encoded.code_bits
                row_lengths[first : first + encoded.shape[0]] = encoded.row_lengths
                for e in range(encoded.shape[0]):
                    codes = encoded.codes[int(encoded.code_offsets[e]) : int(encoded.code_offsets[e + 1])].data
                    crcs.append(zlib.crc32(codes))
                    self._spool_write(codes)
                    code_offsets[first + e + 1] = self._spool_end - start
                    index.append(self.bank_index[encoded.dictionaries[int(encoded.dictionary_index[e])]])
        except EncodeError as error:
            self._spool_end = start
            return None, f"the dictionary cannot express it: {error}"

        base = int(row_lengths.min())
        row_lengths -= np.uint32(base)
        widest = int(row_lengths.max())
        dtype, narrow = ("U8", np.uint8) if widest < 1 << 8 else ("U16", np.uint16) if widest < 1 << 16 else ("U32", np.uint32)
        stored = row_lengths.astype(narrow)
        for e in range(experts):
            crcs[e] = zlib.crc32(levels[e].data, zlib.crc32(stored[e].data, crcs[e]))
        info = GroupInfo(
            name,
            candidate.layout,
            candidate.source,
            to_ranges([number for number, _ in candidate.members]) if candidate.layout == "stacked" else (),
            (experts, rows, cols),
            candidate.dtype,
            code_bits,
            base,
        )
        group = _EncodedGroup(
            info,
            start,
            self._spool_end - start,
            stored.nbytes,
            levels.nbytes,
            dtype,
            code_offsets,
            index,
            crcs,
        )
        if group.n_bytes >= n_dense:
            self._spool_end = start
            return None, f"not smaller: {group.n_bytes} bytes packed, {n_dense} dense"
        self._spool_write(stored.reshape(-1).view(np.uint8).data)
        self._spool_write(levels.reshape(-1).view(np.uint8).data)
        self.meter.advance(n_dense)
        return group, ""

    def _encode_batch(self, candidate: Candidate, shape: tuple[int, ...], first: int, n: int,
                      levels: AnyArray) -> Encoded:  # fmt: skip
        _, rows, cols = shape
        digits = np.empty((n, rows, cols), np.int8)
        for e in range(n):
            fused = candidate.layout == "fused"
            name = candidate.members[0 if fused else first + e][1]
            tensor = self.source.tensors[name]
            _, levels[first + e], bad_row = _read_expert(self.source, tensor, first + e if fused else 0, rows, cols, digits[e])
            if bad_row >= 0:
                raise FormatError("truncated", "the source changed while it was packed", tensor=name)
        return codec.encode(digits, dictionary=self.found.bank, threads=self.threads)

    def _write(self, path: pathlib.Path) -> None:
        """Write what has come together as one file, with the part of the bank that it uses."""
        used = sorted({i for group in self._groups for i in group.dictionary_index})
        place = {i: k for k, i in enumerate(used)}
        roles = [piece for group in self._groups for piece in self._role_pieces(group, place)]
        passthrough = [self._tensor_piece(name) for name in self._tensors]
        self.n_file_bytes += write_packed(
            path,
            groups=[group.info for group in self._groups],
            roles=roles,
            dictionaries=[self.bank[i] for i in used],
            passthrough=passthrough,
            metadata=self.source.metadata,
        )
        self.parts.append(path)
        self.contents.append([piece.name for piece in (*roles, *passthrough)])
        self.n_tensor_bytes += sum(piece.n_bytes for piece in (*roles, *passthrough))
        self._groups, self._tensors, self._n_bytes = [], [], 0

    def _tensor_piece(self, name: str) -> Piece:
        tensor = self.source.tensors[name]

        def chunks() -> Iterator[Chunk]:
            for chunk in self.source.read_chunks(tensor):
                yield chunk
                self.meter.advance(len(chunk))

        return Piece(name, tensor.dtype, tensor.shape, chunks)

    def _role_pieces(self, group: _EncodedGroup, place: dict[int, int]) -> list[Piece]:
        info = group.info
        index = np.array([place[i] for i in group.dictionary_index], np.uint8)
        checksums = np.empty(len(index), np.uint32)
        for e, crc in enumerate(group.crcs):
            crc = zlib.crc32(index[e : e + 1].data, crc)
            checksums[e] = zlib.crc32(group.code_offsets[e : e + 2].data, crc)

        def spooled(begin: int, n_bytes: int) -> Callable[[], Iterator[Chunk]]:
            return lambda: read_chunks(self._spool, begin, n_bytes)

        def array(values: AnyArray) -> Callable[[], list[Chunk]]:
            return lambda: [values.view(np.uint8).data]

        shapes = {"codes": (group.n_codes,), **role_shapes(info)}
        row_lengths = group.start + group.n_codes
        levels = row_lengths + group.n_row_lengths
        return [
            Piece(role_name(info.name, role), dtype, shapes[role], chunks)
            for role, dtype, chunks in (
                ("codes", "U8", spooled(group.start, group.n_codes)),
                ("code_offsets", "U64", array(group.code_offsets)),
                ("row_lengths", group.row_length_dtype, spooled(row_lengths, group.n_row_lengths)),
                ("levels", info.dtype, spooled(levels, group.n_levels)),
                ("dictionary_index", "U8", array(index)),
                ("checksums", "U32", array(checksums)),
            )
        ]
