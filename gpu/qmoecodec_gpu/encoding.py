"""Encoding on the device (spec §5.1), bit-identical to the reference."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from qmoecodec.errors import EncodeError
from qmoecodec.types import Dictionary, Encoded
from qmoecodec_gpu import modules, tables
from qmoecodec_gpu.loading import Staged, place_rows

_cache: dict[tuple[torch.device, int], _Walk] = {}
_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class _Walk:
    """A dictionary's parse trees on the device (kernels/encode.cu); it keeps the dictionary, so that its id stays its own."""

    dictionary: Dictionary
    transitions: torch.Tensor | None
    nodes: torch.Tensor
    roots: tuple[int, int]


def _walk(dictionary: Dictionary, device: torch.device) -> _Walk:
    key = (device, id(dictionary))
    with _lock:
        if key not in _cache:
            if len(_cache) >= 16:
                _cache.pop(next(iter(_cache)))
            nodes, roots = tables.encoder_trees(dictionary)
            small = tables.encoder_transitions(dictionary)
            transitions = None if small is None else torch.from_numpy(small.view(np.int32)).to(device)
            _cache[key] = _Walk(dictionary, transitions, torch.from_numpy(nodes).to(device), roots)
        walk = _cache[key]
    # What another thread drops from the cache may still be read on this one's stream.
    for tensor in (walk.nodes, walk.transitions):
        if tensor is not None:
            tensor.record_stream(torch.cuda.current_stream(device))
    return walk


def encode(digits: torch.Tensor, dictionary: Dictionary) -> Staged:
    """Encode experts with one dictionary.

    digits : int8[experts, rows, cols] on the device, values -1, 0, 1
    Returns the codewords on the device, in the file's layout; `to_encoded` brings them to the host.
    Raises EncodeError where the dictionary has no phrase for a row; ValueError for other values.
    """
    if digits.dtype != torch.int8 or digits.ndim != 3 or not digits.is_cuda:
        raise TypeError("digits is an int8 CUDA tensor [experts, rows, cols]")
    digits = digits.contiguous()
    experts, rows, cols = digits.shape
    device = digits.device
    walk = _walk(dictionary, device)
    n = experts * rows
    counts = torch.empty(n, dtype=torch.int32, device=device)
    bad = torch.full((1,), -1, dtype=torch.int64, device=device)
    count, write = _passes(digits, dictionary, walk, counts, bad)
    count()
    lengths = counts.to(torch.int64)
    ends = torch.cumsum((lengths * dictionary.code_bits + 7) >> 3, dim=0)
    row_byte = torch.zeros(n + 1, dtype=torch.int64, device=device)
    row_byte[1:] = ends
    fault, total = torch.stack([bad[0], row_byte[-1]]).tolist()
    if fault != -1:
        expert, row = divmod(fault >> 2, max(1, rows))
        if fault & 3 == 1:
            raise EncodeError(f"no phrase of the dictionary matches in row {row} of expert {expert}")
        raise ValueError(f"digits are -1, 0 and 1; row {row} of expert {expert} has another value")
    codes = torch.empty(total, dtype=torch.uint8, device=device)
    if total:
        write(codes, row_byte)
    return place_rows(
        shape=(experts, rows, cols),
        codes=codes,
        row_lengths=lengths.view(experts, rows),
        dictionary_index=torch.zeros(experts, dtype=torch.uint8, device=device),
        bits=dictionary.code_bits,
    )


def choose_segments(n_rows: int, cols: int, n_multiprocessors: int) -> tuple[int, int]:
    """Return how many threads share a row, a power of two up to 128, and the columns of each (kernels/encode.cu).

    Enough threads to fill the device, and not so short segments that the parses do not meet within one.
    """
    segments = 1
    while 2 * segments <= min(128, cols // 128) and 2 * segments * n_rows <= 256 * n_multiprocessors:
        segments *= 2
    return segments, -(-cols // (16 * segments)) * 16


def _passes(
    digits: torch.Tensor, dictionary: Dictionary, walk: _Walk, counts: torch.Tensor, bad: torch.Tensor
) -> tuple[Callable[[], None], Callable[[torch.Tensor, torch.Tensor], None]]:
    """Return the two launches: one that counts codewords, and one that writes them to `codes` from `row_byte` on."""
    experts, rows, cols = digits.shape
    n, device = experts * rows, digits.device
    p, i32 = modules.pointer, modules.i32
    n_multiprocessors = modules.n_multiprocessors(device)
    threads = 64 if n > 64 * n_multiprocessors else 32  # rows are few and long: spread them over the device
    if walk.transitions is None:
        kernel = modules.function(device, "encode.cu", "encode_rows")
        is_table = i32(int(dictionary.kind == "table"))
        trees = (p(walk.nodes), i32(walk.roots[0]), i32(walk.roots[1]), is_table, i32(dictionary.code_bits))

        def run(codes: torch.Tensor | None, row_byte: torch.Tensor | None) -> None:
            arguments = (p(digits), *trees, p(counts), p(codes), p(row_byte), p(bad), n, i32(cols))
            modules.launch(device, kernel, -(-n // threads), threads, arguments)

        return lambda: run(None, None), run

    segments, segment = choose_segments(n, cols, n_multiprocessors)
    if segments > 1:
        threads = 128
    places = torch.empty((n * segments, 2), dtype=torch.int32, device=device)
    table = (p(digits), p(walk.transitions), i32(len(walk.transitions)))
    shape = (n, i32(cols), i32(segments), i32(segment))
    grid, shared_bytes = -(-n * segments // threads), walk.transitions.nbytes
    count_rows = modules.function(device, "encode.cu", "count_rows_small")
    write_rows = modules.function(device, "encode.cu", "write_rows_small")

    def count() -> None:
        arguments = (*table, p(counts), p(places), p(bad), *shape)
        modules.launch(device, count_rows, grid, threads, arguments, shared_bytes=shared_bytes + 4 * threads)

    def write(codes: torch.Tensor, row_byte: torch.Tensor) -> None:
        arguments = (*table, p(places), p(codes), p(row_byte), *shape)
        modules.launch(device, write_rows, grid, threads, arguments, shared_bytes=shared_bytes)

    return count, write


def concatenate(parts: Sequence[Staged], device: torch.device) -> Staged:
    """Put stacks of experts of one shape and one dictionary behind each other."""
    return place_rows(
        shape=(sum(part.shape[0] for part in parts), *parts[0].shape[1:]),
        codes=torch.cat([part.codes for part in parts]),
        row_lengths=torch.cat([part.row_lengths for part in parts]),
        dictionary_index=torch.cat([part.dictionary_index for part in parts]).to(device),
        bits=parts[0].bits,
    )


def to_encoded(staged: Staged, dictionary: Dictionary) -> Encoded:
    """Bring encoded experts to the host."""
    return Encoded(
        shape=staged.shape,
        codes=staged.codes.cpu().numpy(),
        code_offsets=staged.expert_start.cpu().numpy().astype(np.uint64),
        row_lengths=staged.row_lengths.cpu().numpy().astype(np.uint32),
        dictionary_index=staged.dictionary_index.cpu().numpy(),
        dictionaries=(dictionary,),
    )
