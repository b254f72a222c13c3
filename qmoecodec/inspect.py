"""`inspect`: what a packed checkpoint holds and what it costs, counted from the codewords without decoding them."""

from __future__ import annotations

import math
import os
import pathlib
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from qmoecodec import codec
from qmoecodec.container.header import DTYPE_SIZES
from qmoecodec.container.naming import ROLES, reason_not_a_candidate, role_name
from qmoecodec.container.packed import PackedFile
from qmoecodec.container.reader import File, Group
from qmoecodec.container.ternary import BITS_TYPE, split_rows, why_not_ternary
from qmoecodec.errors import FormatError, printable

if TYPE_CHECKING:
    from rich.console import RenderableType

SCHEMA: Final = 1
#: Columns of a terminal that hold all columns of the table.
WIDTH: Final = 120
_BLOCK_BYTES: Final = 1 << 20


def entropy_bits(counts: Any) -> float:
    """Return the entropy, in bits, of all digits of one expert taken as independent draws.

    counts : int64[3]    how often 0, -, + occur

    >>> entropy_bits([2, 1, 1])
    6.0
    """
    total = int(sum(counts))
    return sum(-int(n) * math.log2(int(n) / total) for n in counts if n)


def _per(amount: float, n: int) -> float | None:
    return amount / n if n else None


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe a packed file or directory as one JSON-compatible object.

    Its keys: `schema` 1, `path`, `format_version`, `files`, `totals`, `dictionaries`, `groups`, `passthrough`, `metadata`.
    In groups and totals: `payload_bits_per_weight` counts the codewords, `bits_per_weight` every byte of the group's
    tensors (row metadata, offsets, checksums; in the totals the dictionaries too), `entropy_bits_per_weight` is the
    entropy of each expert's digits as independent draws: the limit for a code that adapts to each expert and to nothing
    finer. `ratio` is payload over entropy. `dense_bytes` is the size unpacked. Where there are no weights, ratios are null.
    Raises FormatError; OSError.
    """
    with File(pathlib.Path(path), mapped=True) as source:
        groups = [_describe_group(group) for group in source.groups.values()]
        passthrough = [_describe_tensor(file, name) for file in source.files for name in file.metadata.passthrough]
        dictionaries: list[dict[str, Any]] = [
            {
                "file": file.path.name,
                "index": index,
                "kind": entry.kind,
                "code_bits": entry.code_bits,
                "threshold": entry.threshold,
                "max_phrase": file.dictionary(index).max_phrase,
                "bytes": len(file.dictionary(index).data),
            }
            for file in source.files
            for index, entry in enumerate(file.metadata.dictionaries)
        ]
        metadata, _ = source.merged_metadata()
        n_weights: int = sum(g["n_weights"] for g in groups)
        role_bytes = sum(g["bytes"] for g in groups)
        dictionary_bytes = sum(d["bytes"] for d in dictionaries)
        passthrough_bytes = sum(t["bytes"] for t in passthrough)
        entropy: float = sum(g["entropy_bits"] for g in groups)
        payload = sum(g["payload_bytes"] for g in groups)
        return {
            "schema": SCHEMA,
            "path": str(path),
            "format_version": source.files[0].metadata.format_version if source.files else None,
            "files": [{"name": file.path.name, "bytes": file.n_file} for file in source.files],
            "totals": {
                "n_groups": len(groups),
                "n_experts": sum(g["shape"][0] for g in groups),
                "n_weights": n_weights,
                "zeros": _per(sum(g["counts"][0] for g in groups), n_weights),
                "bits_per_weight": _per(8 * (role_bytes + dictionary_bytes), n_weights),
                "payload_bits_per_weight": _per(8 * payload, n_weights),
                "entropy_bits_per_weight": _per(entropy, n_weights),
                "ratio": 8 * payload / entropy if entropy else None,
                "file_bytes": source.n_file_bytes,
                "dense_bytes": sum(g["dense_bytes"] for g in groups) + passthrough_bytes,
                "group_bytes": role_bytes,
                "dictionary_bytes": dictionary_bytes,
                "passthrough_bytes": passthrough_bytes,
                "header_bytes": sum(file.header.data_begin for file in source.files),
            },
            "dictionaries": dictionaries,
            "groups": groups,
            "passthrough": sorted(passthrough, key=lambda t: t["name"]),
            "metadata": metadata or {},
        }


def _describe_group(group: Group) -> dict[str, Any]:
    info, data = group.info, group.data
    experts, rows, cols = info.shape
    counts = np.zeros(3, np.int64)
    entropy = 0.0
    for e in range(experts):
        parts = data.expert(e)
        try:
            own = codec.count_digits(
                parts.codes, parts.row_lengths, rows=rows, cols=cols, dictionary=parts.dictionary
            )
        except FormatError as error:
            raise error.at(group=info.name, expert=e) from None
        counts += own
        entropy += entropy_bits(own)
    tensors = data.file.header.tensors
    payload = tensors[role_name(info.name, "codes")].n_bytes
    used = Counter(int(i) for i in data.dictionary_index)
    return {
        "name": info.name,
        "layout": info.layout,
        "source": info.source,
        "file": data.file.path.name,
        "shape": list(info.shape),
        "dtype": info.dtype,
        "code_bits": info.code_bits,
        "dictionaries": {str(i): used[i] for i in sorted(used)},
        "n_weights": info.n_weights,
        "counts": [int(n) for n in counts],
        "zeros": _per(int(counts[0]), info.n_weights),
        "entropy_bits": entropy,
        "entropy_bits_per_weight": _per(entropy, info.n_weights),
        "payload_bytes": payload,
        "payload_bits_per_weight": _per(8 * payload, info.n_weights),
        "bytes": data.n_bytes,
        "bits_per_weight": _per(8 * data.n_bytes, info.n_weights),
        "ratio": 8 * payload / entropy if entropy else None,
        "dense_bytes": info.n_weights * DTYPE_SIZES[info.dtype],
        "role_bytes": {role: tensors[role_name(info.name, role)].n_bytes for role in ROLES},
    }


def _describe_tensor(file: PackedFile, name: str) -> dict[str, Any]:
    info = file.header.tensors[name]
    return {
        "name": name,
        "file": file.path.name,
        "dtype": info.dtype,
        "shape": list(info.shape),
        "bytes": info.n_bytes,
        "reason": reason_not_a_candidate(name, info.dtype, info.shape) or _reason_by_value(file, name),
    }


def _reason_by_value(file: PackedFile, name: str) -> str:
    """Say why a float matrix passed through; reads as far as the first row that is not ternary."""
    info = file.header.tensors[name]
    unsigned = np.dtype(BITS_TYPE[info.dtype])
    row_bytes = info.shape[-1] * unsigned.itemsize
    n = max(1, _BLOCK_BYTES // row_bytes) * row_bytes
    for at in range(0, info.n_bytes, n):
        bits = np.frombuffer(file.read(name, at, min(info.n_bytes, at + n)), unsigned).reshape(-1, info.shape[-1])
        bad_row = split_rows(bits, dtype=info.dtype)[2]
        if bad_row >= 0:
            row = at // row_bytes + bad_row
            why = why_not_ternary(bits[bad_row : bad_row + 1], dtype=info.dtype)
            if len(info.shape) == 3:
                return f"{why}: expert {row // info.shape[1]}, row {row % info.shape[1]}"
            return f"{why}: row {row}"
    return "ternary, but not smaller when packed"


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def render(report: dict[str, Any], *, width: int = WIDTH) -> RenderableType:
    """Return a report of `inspect` as tables for a terminal.

    width : of the terminal; below `WIDTH` some columns are left out, for the names would have no room
    """
    from rich.console import Group as Stack
    from rich.table import Table
    from rich.text import Text

    totals = report["totals"]
    # Text: in a plain string, brackets and colons are rich's markup.
    title = Text(f"{printable(report['path'])}  (format {report['format_version']})")
    table = Table(title=title, title_justify="left")
    table.add_column("group", overflow="fold")
    columns = ("shape", "dtype", "zeros", "entropy", "payload", "total", "ratio", "dictionary")
    shown = [c for c in columns if width >= WIDTH or c not in ("dtype", "payload", "dictionary")]
    for column in shown:
        table.add_column(column, justify="right", no_wrap=column != "dictionary")

    def add_row(name: str, *cells: str) -> None:
        table.add_row(Text(name), *(cell for column, cell in zip(columns, cells, strict=True) if column in shown))

    for g in report["groups"]:
        bank = ", ".join(f"{i} ({n})" if len(g["dictionaries"]) > 1 else i for i, n in g["dictionaries"].items())
        add_row(
            printable(g["name"]),
            " x ".join(map(str, g["shape"])),
            g["dtype"],
            _number(g["zeros"]),
            _number(g["entropy_bits_per_weight"]),
            _number(g["payload_bits_per_weight"]),
            _number(g["bits_per_weight"]),
            _number(g["ratio"], 3),
            f"{g['code_bits']} bit: {bank}",
        )
    table.add_section()
    add_row(
        "all groups, with dictionaries", f"{totals['n_weights']:,}", "", _number(totals["zeros"]),
        _number(totals["entropy_bits_per_weight"]), _number(totals["payload_bits_per_weight"]),
        _number(totals["bits_per_weight"]), _number(totals["ratio"], 3), f"{len(report['dictionaries'])} in bank",
    )  # fmt: skip
    reasons: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for t in report["passthrough"]:
        kind = t["reason"].split(":")[0]
        reasons[kind] += 1
        sizes[kind] += t["bytes"]
    kept = Table(title="stored as they are", title_justify="left")
    kept.add_column("why")
    kept.add_column("tensors", justify="right")
    kept.add_column("bytes", justify="right")
    for kind, n in sorted(reasons.items()):
        kept.add_row(kind, f"{n:,}", f"{sizes[kind]:,}")
    dense, file = totals["dense_bytes"], totals["file_bytes"]
    saved = f"{dense:,} bytes dense, {file:,} packed" + (f" ({dense / file:.2f} x smaller)" if dense > file else "")
    note = "entropy, payload and total in bits per weight; ratio is payload over entropy"
    if len(shown) < len(columns):
        note += f"; {WIDTH} columns show more"
    return Stack(table, *([kept] if reasons else []), saved, note)
