"""`verify`: all that is wrong with a packed checkpoint, with the place."""

from __future__ import annotations

import os
import pathlib
from dataclasses import dataclass
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
    Damage is in the report, not raised. Raises OSError where the file cannot be read; ValueError for an ambiguous
    directory.
    """
    problems: list[Problem] = []

    def note(error: FormatError, file: PackedFile | None = None) -> None:
        if file is not None and several:
            error = error.at(file=file.path.name)
        problems.append(Problem(error.reason, str(error), dict(error.where)))

    several = False
    n_groups = n_experts = n_tensors = 0
    try:
        opened = File(pathlib.Path(path), mapped=False)
    except FormatError as error:
        note(error)
        return VerifyReport(str(path), deep, tuple(problems))
    with opened as source:
        several = len(source.files) > 1
        for file in source.files:
            broken: set[object] = set()  # dictionaries that are reported already, not again by each of their experts
            for index in range(len(file.metadata.dictionaries)):
                try:
                    file.dictionary(index)
                except FormatError as error:
                    broken.add(dictionary_name(index))
                    note(error, file)
            for info in file.metadata.groups:
                n_groups += 1
                try:
                    group = file.group(info.name)
                except FormatError as error:
                    note(error, file)
                    continue
                for expert in range(info.shape[0]):
                    n_experts += 1
                    for found in _check_expert(group, expert, deep=deep):
                        if found.where.get("tensor") not in broken:
                            note(found, file)
                if deep:
                    for found in _check_row_lengths(group):
                        note(found, file)
            for name in sorted(file.metadata.passthrough):
                n_tensors += 1
                try:
                    file.check_passthrough(name)
                except FormatError as error:
                    note(error, file)
    return VerifyReport(str(path), deep, tuple(problems), n_groups, n_experts, n_tensors)


def _check_expert(group: GroupData, expert: int, *, deep: bool) -> list[FormatError]:
    try:
        parts = group.expert(expert)
    except FormatError as error:
        return [error]
    rows = group.info.shape[1]
    try:
        digits = decode_expert(group, expert, parts, 0, rows)
    except FormatError:
        errors: list[FormatError] = []
        for row in range(rows):
            try:
                decode_expert(group, expert, parts, row, row + 1)
            except FormatError as error:
                errors.append(error)
                if len(errors) == _MAX_ROWS:
                    break
        return errors
    return _check_canonical(group, expert, parts, digits) if deep else []


def _check_canonical(group: GroupData, expert: int, parts: ExpertData, digits: Int8Array) -> list[FormatError]:
    """Encode the expert again; name the rows that differ."""
    place: dict[str, object] = {"group": group.info.name, "expert": expert}
    try:
        codes, row_lengths = codec.encode_rows(digits, dictionary=parts.dictionary)
    except EncodeError as error:
        return [FormatError("not_canonical", f"the dictionary has no encoding: {error}").at(**place)]
    if np.array_equal(codes, parts.codes) and np.array_equal(row_lengths, parts.row_lengths):
        return []
    errors = []
    for row in range(len(digits)):
        own, lengths = codec.encode_rows(digits[row : row + 1], dictionary=parts.dictionary)
        stored = parts.codes[int(parts.row_starts[row]) : int(parts.row_starts[row + 1])]
        if int(lengths[0]) != int(parts.row_lengths[row]) or not np.array_equal(own, stored):
            errors.append(FormatError("not_canonical", row=row).at(**place))
            if len(errors) == _MAX_ROWS:
                break
    return errors


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
