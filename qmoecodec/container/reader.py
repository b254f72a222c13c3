"""`open`: a packed checkpoint as Python objects, memory-mapped, one expert or row range at a time."""

from __future__ import annotations

import operator
import os
import pathlib
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import numpy as np

from qmoecodec.codec.rows import decode_checked
from qmoecodec.container.metadata import GroupInfo
from qmoecodec.container.packed import ExpertData, GroupData, PackedFile, add_name
from qmoecodec.container.shards import find_shards
from qmoecodec.container.ternary import BITS_TYPE, NUMPY_TYPE, check_zero_levels, fill_rows, to_float
from qmoecodec.errors import FormatError
from qmoecodec.types import AnyArray, Dictionary, Encoded, Int8Array, UInt8Array, UInt32Array


def open(path: str | os.PathLike[str]) -> File:  # noqa: A001  # qmoecodec.open is the name people look for
    """Open a packed file or directory for reading (spec §2 to §8).

    The header, its checksum and the structure are checked at once; the bytes of an expert or tensor when it is first
    asked for. Close the file, or use it as a context manager.
    Raises FormatError: the reasons of spec §2, §3, §6.1, §6.2, §8, and checksum; OSError.
    """
    return File(pathlib.Path(path), mapped=True)


def decode_expert(group: GroupData, expert: int, parts: ExpertData, begin: int, end: int) -> Int8Array:
    """Decode rows begin..end of an expert and check them against its levels (spec §5.2, §6.3).

    Returns int8[end - begin, cols].
    Raises FormatError: the reasons of spec §5, level_zero; with group, expert and row.
    """
    group.file.check_size()
    try:
        digits = decode_checked(parts.codes, parts.row_starts[begin : end + 1], parts.row_lengths[begin:end],
                                cols=group.info.shape[2], dictionary=parts.dictionary)  # fmt: skip
        check_zero_levels(digits, parts.levels[begin:end])
    except FormatError as error:
        row = error.where["row"]
        assert isinstance(row, int)
        error.where["row"] = begin + row
        raise error.at(group=group.info.name, expert=expert) from None
    return digits


class Tensors(Mapping[str, AnyArray]):
    """The passthrough tensors by name, as numpy arrays over the file.

    A dtype that numpy lacks is given as its bits: BF16 as uint16, F8_* as uint8; `dtype_name` tells.
    """

    def __init__(self, files: dict[str, PackedFile]) -> None:
        self._files = files

    def __getitem__(self, name: str) -> AnyArray:
        info = self._files[name].header.tensors[name]
        return np.frombuffer(self.bytes(name), NUMPY_TYPE[info.dtype]).reshape(info.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def dtype_name(self, name: str) -> str:
        """Return the dtype as the header names it, such as "BF16"."""
        return self._files[name].header.tensors[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape without touching the data."""
        return self._files[name].header.tensors[name].shape

    def bytes(self, name: str) -> memoryview:
        """Return the bytes of a tensor after checking them, once (spec §7.2).

        Raises FormatError: checksum, truncated.
        """
        file = self._files[name]
        file.check_passthrough(name)
        return memoryview(file.read(name))


class File:
    """An open packed checkpoint: `f[name]` is a group, `f.tensors[name]` a passthrough tensor.

    groups : name -> Group, by name;  tensors : name -> array
    """

    def __init__(self, path: pathlib.Path, *, mapped: bool) -> None:
        self.path = path
        self.shards = find_shards(path)
        self.files: list[PackedFile] = []
        try:
            for file in self.shards.files:
                try:
                    self.files.append(PackedFile(file, mapped=mapped))
                except FormatError as error:
                    raise error.at(file=file.name) if len(self.shards.files) > 1 else error from None
            self._check_directory()
        except BaseException:
            self.close()
            raise
        groups = {info.name: Group(file, info) for file in self.files for info in file.metadata.groups}
        self.groups: Mapping[str, Group] = {name: groups[name] for name in sorted(groups)}
        passthrough = sorted((name, i) for i, file in enumerate(self.files) for name in file.metadata.passthrough)
        self.tensors = Tensors({name: self.files[i] for name, i in passthrough})

    def _check_directory(self) -> None:
        """Check the index against the shards, and names across shards (spec §8).

        Two shards with a group of one name have its role tensors twice, and are found by these.
        """
        if self.shards.weight_map is None:
            return  # one file, which has been checked
        stored: dict[str, str] = {}
        names: set[bytes] = set()
        for file in self.files:
            for name in file.header.tensors:
                if name.startswith("qmoecodec."):
                    continue
                if name in stored:
                    raise FormatError("source_conflict", f"{stored[name]} has it too", tensor=name, file=file.path.name)
                stored[name] = file.path.name
            for name in file.metadata.source_names():
                if not add_name(names, name):
                    raise FormatError("source_conflict", "two files stand for it", tensor=name, file=file.path.name)
        if stored != self.shards.weight_map:
            name = min(k for k in stored.keys() | self.shards.weight_map.keys()
                       if stored.get(k) != self.shards.weight_map.get(k))  # fmt: skip
            raise FormatError("shard_mismatch", tensor=name)

    def merged_metadata(self) -> tuple[dict[str, str] | None, list[str]]:
        """Return `__metadata__` of the source, and notes where shards differ (the first counts)."""
        merged: dict[str, str] = {}
        notes: list[str] = []
        for file in self.files:
            for key, value in (file.source_metadata or {}).items():
                if merged.setdefault(key, value) != value:
                    notes.append(f"__metadata__ entry {key!r} differs between files; the first is kept")
        return merged or None, notes

    @property
    def n_file_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(file.n_file for file in self.files)

    def tensor_bytes(self, name: str) -> memoryview:
        """Return the bytes of a passthrough tensor (see `Tensors.bytes`)."""
        return self.tensors.bytes(name)

    def __getitem__(self, name: str) -> Group:
        return self.groups[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __contains__(self, name: object) -> bool:
        return name in self.groups

    def close(self) -> None:
        """Close the files. Arrays that were handed out stay valid."""
        for file in self.files:
            file.close()

    def __enter__(self) -> File:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<File {str(self.path)!r}: {len(self.groups)} groups, {len(self.tensors)} tensors>"


class Group:
    """One logical tensor [experts, rows, cols]; made by `File`."""

    def __init__(self, file: PackedFile, info: GroupInfo) -> None:
        self._file = file
        self.info = info

    @property
    def name(self) -> str:
        """Name of the group."""
        return self.info.name

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts, rows, cols)."""
        return self.info.shape

    @property
    def dtype(self) -> str:
        """dtype of the source tensors and the levels: "F16", "BF16", "F32" or "F64"."""
        return self.info.dtype

    def __len__(self) -> int:
        return self.info.shape[0]

    def __repr__(self) -> str:
        return f"<Group {self.name!r} {self.info.layout} {list(self.shape)} {self.dtype}>"

    @property
    def data(self) -> GroupData:
        """The role tensors, read and checked (spec §6.2)."""
        return self._file.group(self.info.name)

    def expert(self, expert: int) -> Expert:
        """Return one expert, checked but not decoded (spec §6.2, §7.1).

        Raises IndexError; FormatError: code_offsets, dictionary_index, checksum, row_lengths, row_underrun, level_value.
        """
        index = operator.index(expert)
        if not 0 <= index < len(self):
            raise IndexError(f"expert {index} of {len(self)}")
        data = self.data
        return Expert(data, index, data.expert(index))

    def __iter__(self) -> Iterator[Expert]:
        return (self.expert(e) for e in range(len(self)))

    @property
    def levels(self) -> AnyArray:
        """Levels of all experts, [experts, rows, 2], in the group's dtype (BF16 as uint16 bits)."""
        out = np.empty((*self.shape[:2], 2), NUMPY_TYPE[self.dtype])
        for e in range(len(self)):
            out[e] = self.expert(e).levels
        return out

    def levels_as(self, dtype: Any) -> AnyArray:
        """Return the levels as numbers of a numpy float type: dtype[experts, rows, 2], as `matvec` takes them."""
        return to_float(self.levels.view(BITS_TYPE[self.dtype]), dtype=self.dtype, to=dtype)

    def encoded(self) -> Encoded:
        """Return the group as `encode` made it; each expert is checked, none is decoded."""
        data = self.data
        experts = [self.expert(e) for e in range(len(self))]
        row_lengths = np.empty(self.shape[:2], np.uint32)
        for e, expert in enumerate(experts):
            row_lengths[e] = expert.row_lengths
        codes = np.frombuffer(self._file.read(f"{self.name}_codes"), np.uint8)
        bank = tuple(self._file.dictionary(i) for i in range(len(self._file.metadata.dictionaries)))
        return Encoded(
            self.shape,
            codes,
            data.code_offsets,
            row_lengths,
            data.dictionary_index,
            bank,
            self.info.layout == "matrix",
        )

    def decode(self) -> Int8Array:
        """Decode all experts: int8[experts, rows, cols], for a matrix int8[rows, cols].

        Raises FormatError: see `Expert.decode`.
        """
        experts = [self.expert(e) for e in range(len(self))]  # checked against the file before memory is taken
        out = np.empty(self.shape, np.int8)
        for e, expert in enumerate(experts):
            out[e] = expert.decode()
        return out[0] if self.info.layout == "matrix" else out

    def dense(self, dtype: Any = None) -> AnyArray:
        """Restore all experts as numbers: [experts, rows, cols], for a matrix [rows, cols]; dtype as in `Expert.dense`."""
        experts = [self.expert(e) for e in range(len(self))]
        out = np.empty(self.shape, NUMPY_TYPE[self.dtype] if dtype is None else dtype)
        for e, expert in enumerate(experts):
            out[e] = expert.dense(dtype)
        return out[0] if self.info.layout == "matrix" else out


class Expert:
    """One ternary matrix of rows x cols digits; made by `Group.expert`."""

    def __init__(self, group: GroupData, index: int, parts: ExpertData) -> None:
        self._group = group
        self._parts = parts
        self.index = index

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols)."""
        return self._group.info.shape[1:]

    @property
    def codes(self) -> UInt8Array:
        """The bytes of all rows: uint8[n_bytes] (spec §5.3)."""
        return self._parts.codes

    @property
    def row_lengths(self) -> UInt32Array:
        """Codewords per row: uint32[rows]."""
        return self._parts.row_lengths

    @property
    def dictionary(self) -> Dictionary:
        """The dictionary of the codewords."""
        return self._parts.dictionary

    @property
    def levels(self) -> AnyArray:
        """Low and high level per row, [rows, 2], in the group's dtype (BF16 as uint16 bits)."""
        return self._parts.levels.view(NUMPY_TYPE[self._group.info.dtype])

    def levels_as(self, dtype: Any) -> AnyArray:
        """Return the levels as numbers of a numpy float type: dtype[rows, 2]."""
        return to_float(self._parts.levels, dtype=self._group.info.dtype, to=dtype)

    def decode(self) -> Int8Array:
        """Decode all rows: int8[rows, cols], values in {-1, 0, +1} (spec §5.2).

        Raises FormatError: unused_codeword, row_underrun, row_overrun, overrun_nonzero, row_padding, level_zero.
        """
        return decode_expert(self._group, self.index, self._parts, 0, self.shape[0])

    def rows(self, begin: int, end: int) -> Int8Array:
        """Decode rows begin..end alone: int8[end - begin, cols]; raises as `decode`."""
        if not 0 <= begin <= end <= self.shape[0]:
            raise IndexError(f"rows {begin}..{end} of {self.shape[0]}")
        return decode_expert(self._group, self.index, self._parts, begin, end)

    def dense(self, dtype: Any = None) -> AnyArray:
        """Restore the numbers, [rows, cols] (spec §6.3); raises as `decode`.

        dtype : a numpy float type to convert to; None for the group's own, bit for bit (BF16 as uint16 bits)
        """
        name = self._group.info.dtype
        bits = fill_rows(self.decode(), self._parts.levels)
        return bits.view(NUMPY_TYPE[name]) if dtype is None else to_float(bits, dtype=name, to=dtype)
