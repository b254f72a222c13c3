"""Groups of the conformance vectors as a device gets them: whole tensors that nobody has looked into yet."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

import qmoecodec
from qmoecodec import codec
from qmoecodec.container.naming import role_name
from qmoecodec.container.packed import PackedFile
from qmoecodec.container.ternary import NUMPY_TYPE, check_levels, check_zero_levels

CONFORMANCE = Path(__file__).resolve().parents[2] / "conformance"
VECTORS: list[dict[str, Any]] = json.loads((CONFORMANCE / "manifest.json").read_bytes())["vectors"]


def _runner() -> Any:
    spec = importlib.util.spec_from_file_location("conformance_run", CONFORMANCE / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # its dataclasses look for it there
    spec.loader.exec_module(module)
    return module


RUNNER = _runner()


@dataclass(frozen=True)
class RawGroup:
    """One group as it is in its file.

    levels : [experts, rows, 2] in a numpy type; bfloat16 as uint16
    error : what the manifest says of the vector, or None
    """

    encoded: qmoecodec.Encoded
    levels: npt.NDArray[Any]
    dtype: str
    error: str | None


def read_group(file: PackedFile, info: Any, error: str | None) -> RawGroup | None:
    """Read a group and check nothing but its dictionaries; None where these are wrong or of other code bits."""

    def role(name: str, dtype: Any) -> npt.NDArray[Any]:
        return np.frombuffer(file.read(role_name(info.name, name)), dtype)

    try:
        bank = tuple(file.dictionary(i) for i in range(len(file.metadata.dictionaries)))
    except qmoecodec.FormatError:
        return None
    index = role("dictionary_index", np.uint8)
    if any(bank[i].code_bits != info.code_bits for i in np.unique(index) if i < len(bank)):
        return None
    stored = file.header.tensors[role_name(info.name, "row_lengths")].dtype
    lengths = role("row_lengths", NUMPY_TYPE[stored]).astype(np.int64) + info.row_length_base
    encoded = qmoecodec.Encoded(
        shape=info.shape,
        codes=role("codes", np.uint8),
        code_offsets=role("code_offsets", np.uint64),
        row_lengths=np.minimum(lengths, 2**32 - 1).astype(np.uint32).reshape(info.shape[:2]),
        dictionary_index=index,
        dictionaries=bank,
    )
    levels = role("levels", NUMPY_TYPE[info.dtype]).reshape(*info.shape[:2], 2)
    return RawGroup(encoded, levels, info.dtype, error)


def groups(part: int = 0, n_parts: int = 1) -> Iterator[tuple[str, RawGroup]]:
    """Read all groups of every n_parts-th vector that opens, from vector `part` on."""
    for vector in VECTORS[part::n_parts]:
        expect = vector["expect"]
        with tempfile.TemporaryDirectory(prefix="vectors-") as scratch:
            path = RUNNER.stage(vector, CONFORMANCE, Path(scratch))
            try:
                opened = qmoecodec.open(path)
            except qmoecodec.FormatError:
                continue
            with opened:
                for file in opened.files:
                    for info in file.metadata.groups:
                        group = read_group(file, info, expect.get("error"))
                        if group is not None:
                            yield f"{vector['id']} {info.name}", group


def host_verdict(
    group: RawGroup, backend: Literal["numba", "reference"] = "numba"
) -> qmoecodec.FormatError | npt.NDArray[np.int8]:
    """Decode a group with the codec on the host, in the order of checks of spec §9; return the digits or the first error."""
    encoded, (experts, rows, cols) = group.encoded, group.encoded.shape
    bits = group.levels.view(f"u{group.levels.itemsize}")
    offsets = encoded.code_offsets
    if offsets[0] != 0 or offsets[-1] != encoded.codes.size or (offsets[1:] < offsets[:-1]).any():
        return qmoecodec.FormatError("code_offsets")
    out = []
    for e in range(experts):
        try:
            if encoded.dictionary_index[e] >= len(encoded.dictionaries):
                raise qmoecodec.FormatError("dictionary_index")
            dictionary = encoded.dictionaries[encoded.dictionary_index[e]]
            codes = encoded.codes[int(offsets[e]) : int(offsets[e + 1])]
            lengths = encoded.row_lengths[e]
            codec.rows.starts_of_rows(len(codes), lengths, cols=cols, dictionary=dictionary)
            check_levels(bits[e], dtype=group.dtype)
            digits = codec.decode_rows(codes, lengths, cols=cols, dictionary=dictionary, backend=backend)
            check_zero_levels(digits, bits[e])
        except qmoecodec.FormatError as error:
            return error.at(expert=e)
        out.append(digits)
    return np.array(out, np.int8).reshape(experts, rows, cols)
