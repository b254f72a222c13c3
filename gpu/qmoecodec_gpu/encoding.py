"""Encoding on the device (spec §5.1), bit-identical to the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qmoecodec.errors import EncodeError
from qmoecodec.types import Dictionary, Encoded
from qmoecodec_gpu import modules, tables
from qmoecodec_gpu.loading import Staged, place_rows

_cache: dict[tuple[torch.device, int], _Walk] = {}


@dataclass(frozen=True, slots=True)
class _Walk:
    """A dictionary's parse trees on the device (kernels/encode.cu); it keeps the dictionary, so that its id stays its own."""

    dictionary: Dictionary
    transitions: torch.Tensor | None
    nodes: torch.Tensor
    roots: tuple[int, int]


def _walk(dictionary: Dictionary, device: torch.device) -> _Walk:
    key = (device, id(dictionary))
    if key not in _cache:
        if len(_cache) >= 16:
            _cache.pop(next(iter(_cache)))
        nodes, roots = tables.encoder_trees(dictionary)
        small = tables.encoder_transitions(dictionary)
        transitions = None if small is None else torch.from_numpy(small.view(np.int32)).to(device)
        _cache[key] = _Walk(dictionary, transitions, torch.from_numpy(nodes).to(device), roots)
    return _cache[key]


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
    counts = torch.zeros(n, dtype=torch.int32, device=device)
    bad = torch.full((1,), -1, dtype=torch.int64, device=device)
    p, i32 = modules.pointer, modules.i32
    shared_bytes = 0
    if walk.transitions is not None:
        kernel = modules.function(device, "encode.cu", "encode_rows_small")
        fixed: tuple[Any, ...] = (p(digits), p(walk.transitions), i32(len(walk.transitions)), p(counts))
        shared_bytes = walk.transitions.nbytes
    else:
        kernel = modules.function(device, "encode.cu", "encode_rows")
        is_table = i32(int(dictionary.kind == "table"))
        fixed = (p(digits), p(walk.nodes), i32(walk.roots[0]), i32(walk.roots[1]), is_table, i32(dictionary.code_bits), p(counts))
    threads = 64 if n > 64 * modules.n_multiprocessors(device) else 32  # rows are few and long: spread them over the device
    grid = -(-n // threads)
    modules.launch(device, kernel, grid, threads, (*fixed, 0, 0, p(bad), n, i32(cols)), shared_bytes=shared_bytes)
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
        arguments = (*fixed, p(codes), p(row_byte), p(bad), n, i32(cols))
        modules.launch(device, kernel, grid, threads, arguments, shared_bytes=shared_bytes)
    sizes = torch.diff(row_byte[::rows]).cpu().numpy() if rows else np.zeros(experts, np.int64)
    return place_rows(
        shape=(experts, rows, cols),
        codes=codes,
        sizes=sizes,
        row_lengths=lengths.view(experts, rows),
        dictionary_index=torch.zeros(experts, dtype=torch.uint8, device=device),
        bits=dictionary.code_bits,
    )


def concatenate(parts: Sequence[Staged], device: torch.device) -> Staged:
    """Put stacks of experts of one shape and one dictionary behind each other."""
    sizes = torch.cat([torch.diff(part.expert_start) for part in parts]).cpu().numpy()
    return place_rows(
        shape=(sum(part.shape[0] for part in parts), *parts[0].shape[1:]),
        codes=torch.cat([part.codes for part in parts]),
        sizes=sizes,
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
