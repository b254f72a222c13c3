"""A small program of a user, which `test_types.py` checks with mypy --strict; it is not run.

What it ignores are a caller's mistakes: --strict complains of an `ignore` that nothing is to be ignored under.
"""

from __future__ import annotations

import pathlib
from typing import Literal

import numpy as np
import numpy.typing as npt

import qmoecodec as q


def show(stage: str, done: int, total: int) -> None:
    print(stage, done, total)


def files(source: pathlib.Path, target: str) -> dict[str, npt.NDArray[np.int8]]:
    report: q.PackReport = q.pack(source, target, code_bits=8, threads=2, max_shard_size=10**9, progress=show)
    first: q.PackedGroup = report.groups[0]
    kept: list[q.PassedTensor] = [t for t in report.passthrough if t.reason.startswith("not ternary")]
    restored: q.UnpackReport = q.unpack(target, source.with_suffix(".again"), overwrite=False)
    checked: q.VerifyReport = q.verify(target, deep=True)
    problems: tuple[q.Problem, ...] = checked.problems
    print(first.shape[0] + 1, kept, restored.files, [p.where for p in problems], q.__version__.upper())
    with q.open(target) as f:
        tensors: q.Tensors = f.tensors
        print({name: array.dtype for name, array in tensors.items()})
        return {name: f[name].expert(0).rows(0, 10) for name in f}


def product(group: q.Group, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    experts: list[q.Expert] = list(group)
    print(len(experts))
    return q.matvec(group.encoded(), group.levels_as(np.float32), x, expert=0)


def codec(digits: npt.NDArray[np.int8], code_bits: Literal["auto", 8, 12, 16] = "auto") -> npt.NDArray[np.int8]:
    encoded: q.Encoded = q.encode(digits, code_bits=code_bits)
    dictionary: q.Dictionary = encoded.dictionaries[0]
    codes, lengths = q.encode_rows(q.decode(encoded, expert=0), dictionary=dictionary)
    print(q.count_digits(codes, lengths, rows=len(lengths), cols=digits.shape[-1], dictionary=dictionary))
    try:
        return q.decode_rows(codes, lengths, cols=digits.shape[-1], dictionary=dictionary, backend="reference")
    except q.FormatError as error:
        print(q.REASONS[error.reason], error.where.get("row"))
        raise


def mistakes(digits: npt.NDArray[np.int8], floats: npt.NDArray[np.float32]) -> None:
    q.encode(floats)  # type: ignore[arg-type]
    q.encode(digits, code_bits=9)  # type: ignore[arg-type]
    q.encode(digits, "auto")  # type: ignore[call-arg]
    q.decode(digits)  # type: ignore[arg-type]
    q.matvec(q.encode(digits), digits, floats)  # type: ignore[arg-type]
    q.pack("source")  # type: ignore[call-arg]
    q.open(5)  # type: ignore[arg-type]
