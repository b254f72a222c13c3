"""`verify`: all that is wrong with a packed checkpoint, with the place."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final

import numpy as np

from qmoecodec import codec
from qmoecodec.container.naming import role_name
from qmoecodec.container.packed import ExpertData, GroupData, PackedFile
from qmoecodec.container.reader import File, decode_expert
from qmoecodec.container.writer import dictionary_name
from qmoecodec.errors import EncodeError, FormatError
from qmoecodec.types import Int8Array

# Rows of one damaged expert that are named.
_MAX_ROWS: Final = 16
# Digits decoded in one step.
BLOCK_BYTES: Final = 8 << 20


@dataclass(frozen=True, slots=True)
class Problem:
    """One violation of the specification.

    reason : from the closed list (spec/ERRORS.md);  where : place -> value
    """

    reason: str
    message: str
    where: dict[str, object]


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify` found.

    n_experts, n_tensors : checked (passthrough tensors)
    """

    path: str
    deep: bool
    problems: tuple[Problem, ...]
    n_groups: int = 0
    n_experts: int = 0
    n_tensors: int = 0

    @property
    def ok(self) -> bool:
        """True where nothing is wrong."""
        return not self.problems


def verify(path: str | os.PathLike[str], *, deep: bool = False) -> VerifyReport:
    """Check a packed file or directory as a whole: structure, checksums, every row (spec §2 to §8).

    deep : also encode every row again and compare (spec §5.1), and check the writer's choices (spec §6.2)
    Damage is in the report, not raised, in the order of spec §9. Raises OSError where the file cannot be read.
    """
    problems: list[Problem] = []
    try:
        opened = File(pathlib.Path(path), mapped=False)
    except FormatError as error:
        problems.append(Problem(error.reason, str(error), dict(error.where)))
        return VerifyReport(str(path), deep, tuple(problems))
    with opened as source:
        for found in find_errors(source, deep=deep):
            problems.append(Problem(found.reason, str(found), dict(found.where)))
        groups = [group.shape[0] for file in source.files for group in file.metadata.groups]
        n_tensors = sum(len(file.metadata.passthrough) for file in source.files)
    return VerifyReport(str(path), deep, tuple(problems), len(groups), sum(groups), n_tensors)


def find_errors(source: File, *, deep: bool = False) -> Iterator[FormatError]:
    """Yield what is wrong with the contents of an open checkpoint, in the order of spec §9; `deep` as in `verify`."""
    not_canonical: list[FormatError] = []
    for file in source.files:
        at: dict[str, object] = {"file": file.path.name} if len(source.files) > 1 else {}
        own: list[FormatError] | None = [] if deep else None
        for error in _file_errors(file, own):
            yield error.at(**at)
        not_canonical += [error.at(**at) for error in own or []]
    yield from not_canonical


def _file_errors(file: PackedFile, not_canonical: list[FormatError] | None) -> Iterator[FormatError]:
    """Yield what is wrong with the contents of a file; what is not canonical is added to the list, if there is one."""
    broken: set[object] = set()  # dictionaries that are reported already, not again by each of their experts
    for index in range(len(file.metadata.dictionaries)):
        try:
            file.dictionary(index)
        except FormatError as error:
            broken.add(dictionary_name(index))
            yield error
    for info in file.metadata.groups:
        try:
            group = file.group(info.name)
        except FormatError as error:
            yield error
            continue
        for expert in range(info.shape[0]):
            for found in _check_expert(group, expert, not_canonical):
                if found.where.get("tensor") not in broken:
                    yield found
        if not_canonical is not None:
            not_canonical += _check_row_lengths(group)
    for name in sorted(file.metadata.passthrough):
        try:
            file.check_passthrough(name)
        except FormatError as error:
            yield error


def _check_expert(group: GroupData, expert: int, not_canonical: list[FormatError] | None) -> list[FormatError]:
    """Return what is wrong with an expert: first its rows, then the levels that are 0."""
    try:
        parts = group.expert(expert)
    except FormatError as error:
        return [error]
    _, rows, cols = group.info.shape
    n = max(1, BLOCK_BYTES // max(1, cols))
    blocks = [(begin, min(rows, begin + n)) for begin in range(0, rows, n)]
    errors: list[FormatError] = []
    zeros: list[FormatError] = []
    other: list[FormatError] = []
    for begin, end in blocks:
        try:
            digits = decode_expert(group, expert, parts, begin, end)
        except FormatError as first:
            # The first error of the block is a level that is 0 only where no row has another one.
            for row in range(begin, end):
                if len(errors) == _MAX_ROWS or (first.reason == "level_zero" and len(zeros) == _MAX_ROWS):
                    break
                try:
                    decode_expert(group, expert, parts, row, row + 1)
                except FormatError as error:
                    found = zeros if error.reason == "level_zero" else errors
                    if len(found) < _MAX_ROWS:
                        found.append(error)
        else:
            if not_canonical is not None:
                other += islice(_check_canonical(group, expert, parts, digits, begin), _MAX_ROWS - len(other))
        if len(errors) == _MAX_ROWS:
            break
    if errors or zeros:
        return (errors + zeros)[:_MAX_ROWS]
    if not_canonical is not None:
        not_canonical += other
    return []


def _check_canonical(
    group: GroupData, expert: int, parts: ExpertData, digits: Int8Array, begin: int
) -> Iterator[FormatError]:
    """Encode rows from `begin` on again; name those that differ, or that the dictionary cannot encode."""
    starts = parts.row_starts
    end = begin + len(digits)
    with contextlib.suppress(EncodeError):
        codes, row_lengths = codec.encode_rows(digits, dictionary=parts.dictionary)
        stored = parts.codes[int(starts[begin]) : int(starts[end])]
        if np.array_equal(codes, stored) and np.array_equal(row_lengths, parts.row_lengths[begin:end]):
            return
    for row in range(begin, end):
        message = ""
        try:
            # Equal bytes hold equally many codewords: none is shorter than a byte.
            codes, _ = codec.encode_rows(digits[row - begin : row - begin + 1], dictionary=parts.dictionary)
            if np.array_equal(codes, parts.codes[int(starts[row]) : int(starts[row + 1])]):
                continue
        except EncodeError:
            message = "the dictionary has no encoding of the row"
        yield FormatError("not_canonical", message, row=row).at(group=group.info.name, expert=expert)


def _check_row_lengths(group: GroupData) -> list[FormatError]:
    """Check that the base is the least row length, and the dtype the narrowest (spec §6.2)."""
    name = role_name(group.info.name, "row_lengths")
    types = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32}
    stored = np.frombuffer(group.file.read(name), types[group.row_length_dtype])
    widest = int(stored.max(initial=0))
    narrowest = "U8" if widest < 1 << 8 else "U16" if widest < 1 << 16 else "U32"
    place: dict[str, object] = {"group": group.info.name, "tensor": name}
    errors = []
    if int(stored.min()) != 0 if stored.size else group.info.row_length_base != 0:
        errors.append(FormatError("not_canonical", "row_length_base is not the least row length").at(**place))
    if narrowest != group.row_length_dtype:
        errors.append(FormatError("not_canonical", f"the row lengths fit {narrowest}").at(**place))
    return errors
