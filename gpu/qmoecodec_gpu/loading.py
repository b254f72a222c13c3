"""Upload, validation and repacking of a group, on the device."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from qmoecodec import reference
from qmoecodec.errors import FormatError
from qmoecodec.types import Dictionary
from qmoecodec_gpu import modules
from qmoecodec_gpu.source import LEVEL_DTYPES, Stack

if TYPE_CHECKING:
    from qmoecodec_gpu import plan
    from qmoecodec_gpu.experts import Bank


@dataclass(frozen=True, slots=True)
class Staged:
    """A group on the device as it is in the file; every row is known to lie inside `codes`, and nothing else is.

    codes : uint8[n]
    expert_start : int64[experts + 1]    in bytes
    row_start : int32[experts, rows + 1]    in bytes, relative to the expert
    row_lengths : int64[experts, rows]    in codewords
    dictionary_index : uint8[experts]
    bits : of a codeword
    """

    shape: tuple[int, int, int]
    codes: torch.Tensor
    expert_start: torch.Tensor
    row_start: torch.Tensor
    row_lengths: torch.Tensor
    dictionary_index: torch.Tensor
    bits: int


@dataclass(frozen=True, slots=True)
class Facts:
    """What validation found about the rows' lengths in words of four codewords."""

    least_words: int
    mean_words: float
    most_words: int


def to_device(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """Copy an array to the device; it may be read-only, such as a mapped file."""
    contiguous = np.ascontiguousarray(array)
    if contiguous.flags.writeable:
        return torch.from_numpy(contiguous).to(device)
    with warnings.catch_warnings():  # torch warns of read-only memory, such as a mapped file; it is only read here
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(contiguous).to(device)


def stage(
    stack: Stack, dictionary_index: npt.NDArray[np.uint8], dictionaries: tuple[Dictionary, ...], device: torch.device
) -> Staged:
    """Upload a stack that `check_stack` passed, and place its rows (spec §6.2, §6.4).

    dictionary_index : uint8[experts]    into `dictionaries`, the bank that goes with it on the device

    Raises FormatError: row_lengths, row_underrun, for the first expert that has either; ValueError for an expert of 2 GiB
    and more.
    """
    lengths = to_device(stack.row_lengths.view(np.int32), device).to(torch.int64) & 0xFFFFFFFF
    sizes = np.diff(stack.code_offsets).astype(np.int64)
    return place_rows(
        shape=stack.shape,
        codes=to_device(stack.codes, device),
        sizes=sizes,
        row_lengths=lengths,
        dictionary_index=to_device(dictionary_index, device),
        bits=dictionaries[0].code_bits,
        max_phrase=np.array([d.max_phrase for d in dictionaries], np.int64)[dictionary_index],
    )


def place_rows(
    *,
    shape: tuple[int, int, int],
    codes: torch.Tensor,
    row_lengths: torch.Tensor,
    dictionary_index: torch.Tensor,
    bits: int,
    sizes: npt.NDArray[np.int64] | None = None,
    max_phrase: npt.NDArray[np.int64] | None = None,
) -> Staged:
    """Find where rows begin from their lengths, and check that they fill their experts.

    sizes : int64[experts]    bytes of each expert, adding up to the size of `codes`; None where the lengths are trusted
    max_phrase : int64[experts]    of each expert's dictionary, for the bound of spec §6.4; None where it holds
    Raises FormatError: row_lengths, row_underrun; ValueError for an expert of 2 GiB and more.
    """
    experts, rows, cols = shape
    device = codes.device
    # A row is cut to 2^31 bytes, and no expert has 2^31 rows: the sums are exact, and wrong ones differ from `sizes`.
    n_bytes = ((row_lengths * bits + 7) >> 3).clamp_(max=1 << 31)
    ends = torch.cumsum(n_bytes, dim=1)
    totals = ends[:, -1] if rows else torch.zeros(experts, dtype=torch.int64, device=device)
    largest = codes.numel() if sizes is None else int(sizes.max(initial=0))
    if largest >= 1 << 31 and (sizes is not None or int(totals.max()) >= 1 << 31):
        raise ValueError("an expert of 2 GiB and more is not supported on the GPU")
    if sizes is not None:
        differ = totals != torch.from_numpy(sizes).to(device)
        wrong = differ
        if max_phrase is not None:
            most_digits = row_lengths.sum(dim=1) * torch.from_numpy(max_phrase).to(device)
            wrong = differ | (most_digits < rows * cols)
        first = torch.nonzero(wrong).flatten()
        if len(first):
            expert = int(first[0])
            raise FormatError("row_lengths" if bool(differ[expert]) else "row_underrun", expert=expert)
    row_start = torch.zeros((experts, rows + 1), dtype=torch.int32, device=device)
    row_start[:, 1:] = ends
    expert_start = torch.zeros(experts + 1, dtype=torch.int64, device=device)
    expert_start[1:] = torch.cumsum(totals, dim=0)
    return Staged(shape, codes, expert_start, row_start, row_lengths, dictionary_index, bits)


def validate(staged: Staged, bank: Bank, level_bytes: torch.Tensor, level_dtype: int) -> Facts:
    """Check every row on the device (spec §5.2, §6.3).

    Raises FormatError: unused_codeword, row_underrun, row_overrun, overrun_nonzero, row_padding, level_value, level_zero,
    with the expert and row: the first in the order of spec §9.
    """
    experts, rows, cols = staged.shape
    if experts * rows == 0:
        return Facts(0, 0.0, 0)
    device = staged.codes.device
    bad = torch.full((1,), -1, dtype=torch.int64, device=device)  # the greatest number, unsigned
    words = torch.tensor([-1, 0], dtype=torch.int32, device=device)
    p = modules.pointer
    modules.launch(
        device,
        modules.function(device, "rows.cu", "validate_rows"),
        modules.warp_grid(device, experts * rows),
        modules.THREADS,
        (
            p(staged.codes),
            p(staged.expert_start),
            p(staged.row_start),
            p(staged.dictionary_index),
            p(bank.entries),
            p(bank.thresholds),
            p(level_bytes),
            modules.i32(level_dtype),
            p(bad),
            p(words),
            modules.i32(experts),
            modules.i32(rows),
            modules.i32(cols),
            modules.i32(staged.bits),
        ),
    )
    number = int(bad.item())
    if number != -1:
        raise _find_fault(staged, bank, level_bytes, LEVEL_DTYPES[level_dtype], number)
    least, most = words.tolist()
    total = int(((staged.row_lengths + 3) >> 2).sum().item())
    return Facts(least, total / (experts * rows), most)


def _find_fault(staged: Staged, bank: Bank, level_bytes: torch.Tensor, dtype: str, number: int) -> FormatError:
    """Run the reference on the row that the device found wrong, for the reason; number as in kernels/rows.cu."""
    rows = staged.shape[1]
    expert, row = number // (3 * rows), number % rows
    dictionary = bank.dictionaries[int(staged.dictionary_index[expert])]
    begin, end = (int(staged.expert_start[expert]) + int(v) for v in staged.row_start[expert, row : row + 2].tolist())
    data = staged.codes[begin:end].cpu().numpy().tobytes()
    n_codewords = int(staged.row_lengths[expert, row])
    try:
        check_row(data, n_codewords, _level_values(level_bytes[expert, row], dtype), staged.shape[2], dictionary)
    except FormatError as error:
        return error.at(expert=expert, row=row)
    raise RuntimeError(f"the device rejects expert {expert}, row {row}, which the reference accepts")


def _level_values(level_bytes: torch.Tensor, dtype: str) -> tuple[float, float]:
    types = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
    low, high = level_bytes.cpu().view(types[dtype]).to(torch.float64).tolist()
    return low, high


def check_row(data: bytes, n_codewords: int, levels: tuple[float, float], cols: int, dictionary: Dictionary) -> None:
    """Check one row as the reference does (spec §5.2, §6.3).

    Raises FormatError: level_value, row_padding, unused_codeword, row_underrun, row_overrun, overrun_nonzero, level_zero.
    """
    low, high = levels
    if not all(np.isfinite(levels)) or any(v == 0 and np.signbit(v) for v in levels) or not (low < high or low == high == 0):
        raise FormatError("level_value")
    digits = reference.read_row(data, n_codewords=n_codewords, cols=cols, dictionary=dictionary)
    if (low == 0 and 1 in digits) or (high == 0 and 2 in digits):
        raise FormatError("level_zero")


def repack(staged: Staged, layout: plan.Layout, *, tail_bytes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lay validated rows of 8-bit codewords out in words (kernels/common.cuh).

    Returns codes, uint8[n]; expert_start, int64[experts + 1], in words; row_start, int32[experts, rows + 1], in words.
    """
    experts, rows, _ = staged.shape
    device = staged.codes.device
    ends = torch.cumsum((staged.row_lengths + 3) >> 2, dim=1)
    row_start = torch.zeros((experts, rows + 1), dtype=torch.int32, device=device)
    row_start[:, 1:] = ends
    expert_start = torch.zeros(experts + 1, dtype=torch.int64, device=device)
    expert_start[1:] = torch.cumsum(ends[:, -1], dim=0)
    del ends
    n_bytes = 4 * int(expert_start[-1].item())
    codes = torch.empty(n_bytes + tail_bytes, dtype=torch.uint8, device=device)
    codes[n_bytes:] = 0
    p = modules.pointer
    modules.launch(
        device,
        modules.function(device, "rows.cu", "repack_rows"),
        modules.warp_grid(device, experts * rows),
        modules.THREADS,
        (
            p(staged.codes),
            p(staged.expert_start),
            p(staged.row_start),
            p(codes),
            p(expert_start),
            p(row_start),
            modules.i32(experts),
            modules.i32(rows),
            modules.i32(layout.lanes),
            modules.i32(layout.words),
        ),
    )
    return codes, expert_start, row_start
