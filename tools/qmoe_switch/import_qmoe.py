"""`import-qmoe`: checkpoints published with the QMoE paper (2023), made into packed checkpoints of this project's format.

As it is, the code stream is kept byte for byte, under the paper's dictionary, which the file then holds like any
other. Transcoded, the digits are encoded anew under dictionaries that fit them. Both decode to the same values.
"""

from __future__ import annotations

import json
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import click
import numpy as np

from qmoecodec.cli import json_option
from qmoecodec.codec import BankPlanner, encode
from qmoecodec.container.files import atomic_directory
from qmoecodec.container.metadata import GroupInfo, to_ranges
from qmoecodec.container.naming import Candidate, name_groups, role_name
from qmoecodec.container.packed import role_shapes
from qmoecodec.container.shards import finish_shards
from qmoecodec.container.source import check_apart, copy_other_files
from qmoecodec.container.writer import Piece, write_packed
from qmoecodec.errors import MissingExtraError
from qmoecodec.types import AnyArray, Dictionary

from .errors import CheckpointImportError

if TYPE_CHECKING:
    from .published import Layer, Matrix, Published

CodeBits = Literal["auto", 8, 12, 16]

#: Bytes from which on a shard is closed. A group is never split, and is held in memory until it is written.
SHARD_BYTES = 2_000_000_000
#: Digits decoded at a time.
_BATCH_DIGITS = 64 << 20

_DTYPE_NAMES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "float16": "F16", "bfloat16": "BF16",
    "int32": "I32", "uint32": "U32", "float32": "F32", "int64": "I64", "uint64": "U64", "float64": "F64",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What an import did.

    published_payload_bits, payload_bits : of all codewords, in the source and as written
    """

    files: tuple[str, ...]
    n_layers: int
    n_experts: int
    n_weights: int
    published_payload_bits: int
    payload_bits: int
    n_bytes: int

    @property
    def saving(self) -> float:
        """Share by which the payload became smaller."""
        return 1 - self.payload_bits / self.published_payload_bits if self.published_payload_bits else 0.0


def import_checkpoint(
    directory: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    transcode: bool = False,
    code_bits: CodeBits = "auto",
    threads: int | None = None,
    overwrite: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> ImportReport:
    """Write a published checkpoint directory as a packed one.

    out : a directory; it appears whole when all is done, or not at all. An existing one is replaced only if it holds
        a checkpoint
    transcode : encode anew, under dictionaries made for the digits, with `code_bits` as for `pack`
    progress : called with matrices done and matrices in all

    Raises CheckpointImportError for a source that is not as published; FileExistsError; OSError.
    """
    try:
        from .published import PROJECTIONS, Published
    except ImportError as error:
        raise MissingExtraError(f"{error.name} is not installed: pip install 'qmoecodec[torch]'") from error

    source, target = pathlib.Path(directory), pathlib.Path(out)
    published = Published(source)
    check_apart(source, target)
    dense = published.dense()
    taken = {f"{layer.matrix(e, p)}.weight" for layer in published.layers for e in range(published.experts) for p in PROJECTIONS}
    candidates = [_candidate(published, layer, p) for layer in published.layers for p in PROJECTIONS]
    names = dict(zip(candidates, name_groups(candidates, {*taken, *dense}), strict=True))
    passes = 2 if transcode else 1
    n_all, n_done = passes * len(taken), 0

    def advance(n: int) -> None:
        nonlocal n_done
        n_done += n
        if progress is not None:
            progress(n_done, n_all)

    with ThreadPoolExecutor(threads) as pool, atomic_directory(target, overwrite=overwrite) as folder:
        bank: Sequence[Dictionary]
        if transcode:
            planner = BankPlanner("auto", code_bits)
            for layer in published.layers:
                for projection in PROJECTIONS:
                    for matrix in _matrices(published, layer, projection, pool, advance):
                        planner.add(matrix.digits)
            bank = planner.choose()
        else:
            from qmoecodec.dictionary import qmoe2023

            bank = (qmoe2023.table(),)
        writer = _Writer(folder, bank)
        for name, tensor in sorted(dense.items()):
            writer.add_tensor(_tensor_piece(name, tensor))
        for layer in published.layers:
            for projection in PROJECTIONS:
                candidate = _candidate(published, layer, projection)
                group = _Group(names[candidate], candidate)
                for matrix in _matrices(published, layer, projection, pool, advance):
                    group.add(matrix, bank, transcode=transcode, threads=threads)
                writer.add_group(group)
        files = writer.finish()
        files += copy_other_files(source, folder, tuple(source.glob("*.pt")))
    _, rows, cols = published.shape("wi")
    return ImportReport(
        files=tuple(files),
        n_layers=len(published.layers),
        n_experts=published.experts,
        n_weights=len(taken) * rows * cols,
        published_payload_bits=16 * sum(published.sizes.values()),
        payload_bits=8 * writer.n_code_bytes,
        n_bytes=writer.n_bytes,
    )


def _candidate(published: Published, layer: Layer, projection: str) -> Candidate:
    """Describe one stack of experts as `pack` would find it, so that it gets the same name."""
    template = f"{layer.prefix}.expert_{{}}.{projection}.weight"
    members = tuple((e, template.replace("{}", str(e))) for e in range(published.experts))
    return Candidate("stacked", template, members, "BF16", published.shape(projection)[1:])


def _matrices(
    published: Published, layer: Layer, projection: str, pool: ThreadPoolExecutor, advance: Callable[[int], None]
) -> Iterator[Matrix]:
    """Decode the experts of one stack in order, some at a time."""
    tensors = published.read_layer(layer)
    experts, rows, cols = published.shape(projection)
    batch = max(1, _BATCH_DIGITS // max(1, rows * cols))
    for begin in range(0, experts, batch):
        numbers = range(begin, min(begin + batch, experts))
        yield from pool.map(lambda e: published.matrix(layer, tensors, e, projection), numbers)
        advance(len(numbers))


@dataclass(slots=True)
class _Group:
    """One stack of experts, growing until it is written."""

    name: str
    candidate: Candidate
    codes: list[AnyArray] = field(default_factory=list)
    row_lengths: list[AnyArray] = field(default_factory=list)
    levels: list[AnyArray] = field(default_factory=list)
    index: list[int] = field(default_factory=list)

    @property
    def n_bytes(self) -> int:
        return sum(array.nbytes for array in (*self.codes, *self.row_lengths, *self.levels))

    def add(self, matrix: Matrix, bank: Sequence[Dictionary], *, transcode: bool, threads: int | None) -> None:
        """Take the next expert."""
        self.levels.append(matrix.levels)
        if transcode:
            encoded = encode(matrix.digits[None], dictionary=bank, threads=threads)
            self.codes.append(encoded.codes)
            self.row_lengths.append(encoded.row_lengths[0])
            self.index.append(int(encoded.dictionary_index[0]))
            return
        if not matrix.is_canonical:
            raise CheckpointImportError(
                f"{matrix.name}: its codewords are not the greedy parse of its digits, which a kept stream has to be "
                "(spec §5.1): import it with --transcode"
            )
        self.codes.append(matrix.codes)
        self.row_lengths.append(matrix.row_lengths)
        self.index.append(0)

    def pieces(self, bank: Sequence[Dictionary], place: dict[int, int]) -> tuple[GroupInfo, list[Piece]]:
        """Return metadata and role tensors (spec §6, §7.1); place : index in `bank` -> index in the file's bank."""
        lengths = np.stack(self.row_lengths)
        base = int(lengths.min(initial=np.iinfo(np.uint32).max)) if lengths.size else 0
        lengths -= np.uint32(base)
        widest = int(lengths.max(initial=0))
        dtype, kind = ("U8", np.uint8) if widest < 1 << 8 else ("U16", np.uint16) if widest < 1 << 16 else ("U32", np.uint32)
        stored = lengths.astype(kind)
        offsets = np.zeros(len(self.codes) + 1, np.uint64)
        np.cumsum([codes.nbytes for codes in self.codes], out=offsets[1:])
        index = np.array([place[i] for i in self.index], np.uint8)
        checksums = np.zeros(len(self.codes), np.uint32)
        for e, codes in enumerate(self.codes):
            parts = (codes, stored[e], self.levels[e], index[e : e + 1], offsets[e : e + 2])
            crc = 0
            for part in parts:
                crc = zlib.crc32(_view(part), crc)
            checksums[e] = crc
        _, rows, cols = len(self.codes), *self.candidate.shape
        info = GroupInfo(
            name=self.name,
            layout="stacked",
            source=self.candidate.source,
            expert_ranges=to_ranges([number for number, _ in self.candidate.members]),
            shape=(len(self.codes), rows, cols),
            dtype="BF16",
            code_bits=bank[self.index[0]].code_bits if self.index else bank[0].code_bits,
            row_length_base=base,
        )
        shapes = {"codes": (int(offsets[-1]),), **role_shapes(info)}
        content: tuple[tuple[str, str, Iterable[AnyArray]], ...] = (
            ("codes", "U8", self.codes),
            ("code_offsets", "U64", (offsets,)),
            ("row_lengths", dtype, (stored,)),
            ("levels", "BF16", self.levels),
            ("dictionary_index", "U8", (index,)),
            ("checksums", "U32", (checksums,)),
        )
        return info, [
            Piece(role_name(self.name, role), type_name, shapes[role], lambda arrays=arrays: map(_view, arrays))  # type: ignore[misc]
            for role, type_name, arrays in content
        ]


class _Writer:
    """Collects tensors and groups and writes a shard whenever enough has come together."""

    def __init__(self, folder: pathlib.Path, bank: Sequence[Dictionary]) -> None:
        self._folder, self._bank = folder, bank
        self._groups: list[_Group] = []
        self._tensors: list[Piece] = []
        self._parts: list[pathlib.Path] = []
        self._contents: list[list[str]] = []
        self._waiting = self._n_tensor_bytes = 0
        self.n_code_bytes = self.n_bytes = 0

    def add_tensor(self, piece: Piece) -> None:
        self._tensors.append(piece)
        self._wait(piece.n_bytes)

    def add_group(self, group: _Group) -> None:
        self._groups.append(group)
        self.n_code_bytes += sum(codes.nbytes for codes in group.codes)
        self._wait(group.n_bytes)

    def finish(self) -> list[str]:
        """Write what is left, name the shards and write their index; returns the names of the files."""
        if self._groups or self._tensors or not self._parts:
            self._write()
        return finish_shards(self._folder, self._parts, self._contents, {}, self._n_tensor_bytes)

    def _wait(self, n_bytes: int) -> None:
        self._waiting += n_bytes
        if self._waiting >= SHARD_BYTES:
            self._write()

    def _write(self) -> None:
        used = sorted({i for group in self._groups for i in group.index})
        place = {i: k for k, i in enumerate(used)}
        made = [group.pieces(self._bank, place) for group in self._groups]
        roles = [piece for _, pieces in made for piece in pieces]
        part = self._folder / f".part-{len(self._parts)}"
        self.n_bytes += write_packed(
            part,
            groups=[info for info, _ in made],
            roles=roles,
            dictionaries=[self._bank[i] for i in used],
            passthrough=self._tensors,
            metadata={"format": "pt"},
        )
        pieces = [*roles, *self._tensors]
        self._parts.append(part)
        self._contents.append([piece.name for piece in pieces])
        self._n_tensor_bytes += sum(piece.n_bytes for piece in pieces)
        self._groups, self._tensors, self._waiting = [], [], 0


def _tensor_piece(name: str, tensor: Any) -> Piece:
    dtype = _DTYPE_NAMES.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None:
        raise CheckpointImportError(f"{name} is {tensor.dtype}, which this importer does not store")

    def chunks() -> list[memoryview]:
        import torch

        return [_view(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())]

    return Piece(name, dtype, tuple(tensor.shape), chunks)


def _view(array: AnyArray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


@click.command("import-qmoe")
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=pathlib.Path))
@click.option("-o", "--output", "out", type=click.Path(path_type=pathlib.Path), required=True, help="A new directory.")
@click.option("--transcode", is_flag=True, help="Encode anew, smaller, instead of keeping the published code stream.")
@click.option(
    "--code-bits",
    type=click.Choice(["auto", "8", "12", "16"]),
    default="auto",
    show_default=True,
    help="Bits per codeword when transcoding.",
)
@click.option("--overwrite/--no-overwrite", default=True, show_default=True, help="Replace an existing checkpoint directory.")
@json_option
def import_qmoe(
    directory: pathlib.Path, out: pathlib.Path, transcode: bool, code_bits: str, overwrite: bool, as_json: bool
) -> None:
    """Make a packed checkpoint from one published with the QMoE paper (2023)."""
    if code_bits != "auto" and not transcode:
        raise click.UsageError("--code-bits goes with --transcode: a kept stream has 16 bits")
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("matrices", total=None)
        report = import_checkpoint(
            directory,
            out,
            transcode=transcode,
            code_bits="auto" if code_bits == "auto" else int(code_bits),  # type: ignore[arg-type]
            overwrite=overwrite,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    rates = [bits / report.n_weights for bits in (report.published_payload_bits, report.payload_bits)]
    if as_json:
        click.echo(
            json.dumps(
                {
                    "schema": 1,
                    "files": list(report.files),
                    "n_layers": report.n_layers,
                    "n_experts": report.n_experts,
                    "n_weights": report.n_weights,
                    "published_payload_bits_per_weight": rates[0],
                    "payload_bits_per_weight": rates[1],
                    "n_bytes": report.n_bytes,
                }
            )
        )
        return
    click.echo(
        f"{report.n_layers} layers of {report.n_experts} experts, {report.n_weights:,} weights: payload "
        f"{rates[0]:.4f} bits/weight as published, {rates[1]:.4f} as written ({report.saving:.1%} smaller)"
    )
