"""One packed file, open for reading: what it says is checked before it is believed, each part at its first touch."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import pathlib
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qmoecodec import dictionary as dictionaries
from qmoecodec.codec.rows import starts_of_rows
from qmoecodec.container.files import Chunk, read_at
from qmoecodec.container.header import DTYPE_SIZES, Header, TensorInfo, parse_header, read_header_bytes
from qmoecodec.container.metadata import HEADER_CRC32, METADATA_KEY, GroupInfo, Metadata, from_text
from qmoecodec.container.naming import ROLES, role_name
from qmoecodec.container.ternary import BITS_TYPE, check_levels
from qmoecodec.container.writer import dictionary_name
from qmoecodec.errors import FormatError
from qmoecodec.types import AnyArray, Dictionary, UInt8Array, UInt32Array, UInt64Array

# Bytes of a passthrough tensor that are in memory at a time where the file is not mapped.
_CHUNK_BYTES: Final = 16 << 20
_ROW_LENGTH_TYPES: Final[dict[str, Any]] = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32}


def role_dtypes(group: GroupInfo) -> dict[str, tuple[str, ...]]:
    """Return the dtypes that each role tensor may have (spec §6.2)."""
    return {
        "codes": ("U8",),
        "code_offsets": ("U64",),
        "row_lengths": tuple(_ROW_LENGTH_TYPES),
        "levels": (group.dtype,),
        "dictionary_index": ("U8",),
        "checksums": ("U32",),
    }


def role_shapes(group: GroupInfo) -> dict[str, tuple[int, ...]]:
    """Return the shape of each role tensor but `codes` (spec §6.2)."""
    experts, rows, _ = group.shape
    return {
        "code_offsets": (experts + 1,),
        "row_lengths": (experts, rows),
        "levels": (experts, rows, 2),
        "dictionary_index": (experts,),
        "checksums": (experts,),
    }


def _check_tensor(tensors: Mapping[str, TensorInfo], name: str, dtypes: tuple[str, ...], shape: tuple[int, ...] | None,
                  **where: object) -> None:  # fmt: skip
    """Check dtype and shape of a tensor of this format; shape None for one dimension of any size."""
    info = tensors.get(name)
    if info is None:
        raise FormatError("missing_tensor", tensor=name).at(**where)
    if info.dtype not in dtypes:
        raise FormatError("role_dtype", f"dtype {info.dtype}, not {' or '.join(dtypes)}", tensor=name).at(**where)
    if info.shape != shape if shape is not None else len(info.shape) != 1:
        raise FormatError("role_shape", f"shape {list(info.shape)}, not {list(shape or ['n'])}", tensor=name).at(**where)


def check_structure(header: Header, metadata: Metadata) -> None:
    """Check that tensors and metadata agree (spec §3.6, §4.1, §6.1, §6.2), from the header alone.

    Raises FormatError: orphan_tensor, missing_tensor, role_dtype, role_shape, source_conflict.
    """
    tensors = header.tensors
    roles: dict[str, str] = {HEADER_CRC32: "the header checksum"}
    for index in range(len(metadata.dictionaries)):
        roles[dictionary_name(index)] = "a dictionary"
    for group in metadata.groups:
        for role in ROLES:
            roles[role_name(group.name, role)] = f"{role} of group {group.name}"
    for name in tensors:
        if name in roles and name in metadata.passthrough:
            raise FormatError("orphan_tensor", f"it is passthrough and also {roles[name]}", tensor=name)
        if name not in roles and name not in metadata.passthrough:
            raise FormatError("orphan_tensor", tensor=name)
    for name in (*roles, *metadata.passthrough):
        if name not in tensors:
            raise FormatError("missing_tensor", f"it would be {roles.get(name, 'passthrough')}", tensor=name)

    for index in range(len(metadata.dictionaries)):
        _check_tensor(tensors, dictionary_name(index), ("U8",), None)
    for group in metadata.groups:
        dtypes, shapes = role_dtypes(group), role_shapes(group)
        for role in ROLES:
            _check_tensor(tensors, role_name(group.name, role), dtypes[role], shapes.get(role), group=group.name)
    # Only now is the number of experts bounded by the size of the file.
    seen: set[bytes] = set()
    for name in metadata.source_names():
        if not add_name(seen, name):
            raise FormatError("source_conflict", "two groups, or a group and a tensor, stand for it", tensor=name)


def add_name(seen: set[bytes], name: str) -> bool:
    """Add a name to a set that holds digests, for a file need not pay for the names of its experts; False if it is there."""
    digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
    is_new = digest not in seen
    seen.add(digest)
    return is_new


def saturate(lengths: npt.NDArray[np.int64]) -> UInt32Array:
    """Return row lengths as uint32: one that does not fit is the largest, which is still more than there are columns."""
    return np.minimum(lengths, 2**32 - 1).astype(np.uint32)


@dataclass(frozen=True, slots=True, eq=False)
class ExpertData:
    """The checked parts of one expert (spec §6.2).

    codes : uint8[n_bytes];  row_lengths : uint32[rows];  levels : uint[rows, 2], bits
    row_starts : int64[rows + 1]    byte in `codes` where each row begins
    """

    codes: UInt8Array
    row_lengths: UInt32Array
    row_starts: AnyArray
    levels: AnyArray
    dictionary: Dictionary


class PackedFile:
    """One packed file; header, header checksum, metadata and structure are checked when it is opened.

    mapped : read through a memory map, else with pread, which keeps the file out of the process's memory
    Raises FormatError: the reasons of spec §2, §3, §4.1, §6.1, §6.2, and checksum.
    """

    # Of an object that was not initialised, as one that cannot be copied, too: `__del__` meets it.
    fd = -1
    _map: mmap.mmap | None = None

    def __init__(self, path: pathlib.Path, *, mapped: bool) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDONLY)
        try:
            self.n_file = os.fstat(self.fd).st_size
            data = read_header_bytes(self.fd, self.n_file)
            self.header = parse_header(data, self.n_file)
            if self.header.metadata is None or METADATA_KEY not in self.header.metadata:
                raise FormatError("not_packed")
            if mapped:
                self._map = mmap.mmap(self.fd, self.n_file, access=mmap.ACCESS_READ)
            _check_tensor(self.header.tensors, HEADER_CRC32, ("U32",), (1,))
            (crc,) = struct.unpack("<I", self.read(HEADER_CRC32))
            if crc != zlib.crc32(data):
                raise FormatError("checksum", "the header's checksum does not match", tensor=HEADER_CRC32)
            try:
                self.metadata = from_text(self.header.metadata[METADATA_KEY])
            except FormatError as error:
                raise error.at(metadata=METADATA_KEY) from None
            check_structure(self.header, self.metadata)
        except BaseException:
            self.close()
            raise
        self.source_metadata = {k: v for k, v in self.header.metadata.items() if k != METADATA_KEY} or None
        self._infos = {info.name: info for info in self.metadata.groups}
        self._dictionaries: dict[int, Dictionary] = {}
        self._infos = {info.name: info for info in self.metadata.groups}
        self._groups: dict[str, GroupData] = {}
        self._checked: set[str] = set()

    def close(self) -> None:
        """Close the file; arrays that were handed out keep the memory map alive."""
        if self._map is not None:
            with contextlib.suppress(BufferError):  # then it is freed with the last array
                self._map.close()
            self._map = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        self.close()

    def read(self, name: str, begin: int = 0, end: int | None = None) -> Chunk:
        """Return bytes begin..end of a tensor: a view of the memory map, or a copy.

        Raises FormatError: truncated, where the file became shorter since it was opened.
        """
        if self.fd < 0:
            raise ValueError(f"{self.path} is closed")
        info = self.header.tensors[name]
        end = info.n_bytes if end is None else end
        first = self.header.data_begin + info.begin + begin
        if self._map is None:
            return read_at(self.fd, first, end - begin)
        self.check_size()
        return memoryview(self._map)[first : first + end - begin]

    def check_size(self) -> None:
        """Check that the file is as long as it was when opened: reading a map beyond its file's end kills the process.

        Raises FormatError: truncated; ValueError where the file is closed.
        """
        if self.fd < 0:
            raise ValueError(f"{self.path} is closed")
        if os.fstat(self.fd).st_size < self.n_file:
            raise FormatError("truncated", "the file became shorter while it was open", file=self.path.name)

    def dictionary(self, index: int) -> Dictionary:
        """Return a dictionary of the bank (spec §4)."""
        known = self._dictionaries.get(index)
        if known is None:
            entry = self.metadata.dictionaries[index]
            data = bytes(self.read(dictionary_name(index)))
            if zlib.crc32(data) != entry.crc32:
                raise FormatError("checksum", tensor=dictionary_name(index))
            try:
                known = dictionaries.parse(
                    data, kind=entry.kind, code_bits=entry.code_bits, threshold=entry.threshold
                )
            except FormatError as error:
                raise error.at(tensor=dictionary_name(index)) from None
            self._dictionaries[index] = known
        return known

    def group(self, name: str) -> GroupData:
        """Return a group after checking its offsets (spec §6.2)."""
        known = self._groups.get(name)
        if known is None:
            known = self._groups[name] = GroupData(self, self._infos[name])
        return known

    def check_passthrough(self, name: str) -> None:
        """Check a passthrough tensor's checksum, once (spec §7.2)."""
        if name not in self._checked:
            crc = 0
            n_bytes = self.header.tensors[name].n_bytes
            for at in range(0, n_bytes, _CHUNK_BYTES):
                crc = zlib.crc32(self.read(name, at, min(n_bytes, at + _CHUNK_BYTES)), crc)
            if crc != self.metadata.passthrough[name]:
                raise FormatError("checksum", tensor=name)
            self._checked.add(name)


class GroupData:
    """The tensors of one group; what all experts share is read and checked here.

    Raises FormatError: code_offsets.
    """

    def __init__(self, file: PackedFile, info: GroupInfo) -> None:
        self.file = file
        self.info = info
        tensors = file.header.tensors
        self.bits_type = np.dtype(BITS_TYPE[info.dtype])
        self.row_length_dtype = tensors[role_name(info.name, "row_lengths")].dtype
        self.code_offsets: UInt64Array = np.frombuffer(file.read(role_name(info.name, "code_offsets")), np.uint64)
        self.dictionary_index: UInt8Array = np.frombuffer(file.read(role_name(info.name, "dictionary_index")), np.uint8)
        self.checksums: UInt32Array = np.frombuffer(file.read(role_name(info.name, "checksums")), np.uint32)
        self._checked: set[int] = set()
        n_codes = tensors[role_name(info.name, "codes")].n_bytes
        offsets = self.code_offsets
        if offsets[0] != 0 or offsets[-1] != n_codes or (offsets[1:] < offsets[:-1]).any():
            raise FormatError("code_offsets", group=info.name, tensor=role_name(info.name, "code_offsets"))

    @property
    def n_bytes(self) -> int:
        """Bytes of all role tensors."""
        return sum(self.file.header.tensors[role_name(self.info.name, role)].n_bytes for role in ROLES)

    def _part(self, role: str, begin: int, end: int) -> Chunk:
        return self.file.read(role_name(self.info.name, role), begin, end)

    def dictionary_of(self, expert: int) -> Dictionary:
        """Return an expert's dictionary (spec §6.2).

        Raises FormatError: dictionary_index, and what the dictionary itself raises.
        """
        index = int(self.dictionary_index[expert])
        bank = self.file.metadata.dictionaries
        if index >= len(bank):
            raise FormatError("dictionary_index", f"dictionary {index} of {len(bank)}")
        if bank[index].code_bits != self.info.code_bits:
            message = f"dictionary {index} has {bank[index].code_bits} code bits, the group {self.info.code_bits}"
            raise FormatError("dictionary_index", message)
        return self.file.dictionary(index)

    def expert(self, expert: int) -> ExpertData:
        """Read one expert and check all but its codewords (spec §6.2 to §6.4, §7.1).

        Raises FormatError: dictionary_index, checksum, row_lengths, row_underrun, level_value.
        """
        try:
            return self._expert(expert)
        except FormatError as error:
            raise error.at(group=self.info.name, expert=expert) from None

    def _expert(self, expert: int) -> ExpertData:
        _, rows, cols = self.info.shape
        dictionary = self.dictionary_of(expert)
        offsets = self.code_offsets[expert : expert + 2]
        begin, end = int(offsets[0]), int(offsets[1])
        codes = self._part("codes", begin, end)
        size = DTYPE_SIZES[self.row_length_dtype]
        lengths_bytes = self._part("row_lengths", expert * rows * size, (expert + 1) * rows * size)
        size = 2 * self.bits_type.itemsize
        levels_bytes = self._part("levels", expert * rows * size, (expert + 1) * rows * size)
        if expert not in self._checked:
            crc = 0
            index = self.dictionary_index[expert : expert + 1].tobytes()
            for part in (codes, lengths_bytes, levels_bytes, index, offsets.tobytes()):
                crc = zlib.crc32(part, crc)
            if crc != int(self.checksums[expert]):
                raise FormatError("checksum")
        stored = np.frombuffer(lengths_bytes, _ROW_LENGTH_TYPES[self.row_length_dtype])
        lengths = stored.astype(np.int64) + self.info.row_length_base
        row_starts = starts_of_rows(end - begin, lengths, cols=cols, dictionary=dictionary)
        levels = np.frombuffer(levels_bytes, self.bits_type).reshape(rows, 2)
        if expert not in self._checked:
            check_levels(levels, dtype=self.info.dtype)
            self._checked.add(expert)
        return ExpertData(
            np.frombuffer(codes, np.uint8), saturate(lengths), row_starts, levels, dictionary
        )
