"""`GpuExperts`: a group of experts that stays compressed in GPU memory."""

from __future__ import annotations

import itertools
import operator
import weakref
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import numpy as np
import torch

from qmoecodec.dictionary import aivf
from qmoecodec.errors import FormatError
from qmoecodec.types import Dictionary
from qmoecodec_gpu import digits, modules, plan, tables
from qmoecodec_gpu.loading import Facts, Staged, repack, stage, to_device, validate
from qmoecodec_gpu.source import LEVEL_DTYPES, check_stack, first_experts, raw_levels

_handles = itertools.count(1)
_by_handle: weakref.WeakValueDictionary[int, GpuExperts] = weakref.WeakValueDictionary()

#: Words that the gather kernel may read, without use, behind the last row.
_TAIL_BYTES: Final = 4 * 32 * 8


@dataclass(frozen=True, slots=True)
class Bank:
    """The dictionaries of a group on the device.

    entries, nonzeros : for any kernel (`tables.general_entries`)
    thresholds : int32[dictionaries]
    forms : the tables of the fast kernels by form
    """

    dictionaries: tuple[Dictionary, ...]
    phrases: tuple[tables.Phrases, ...]
    entries: torch.Tensor
    nonzeros: torch.Tensor
    thresholds: torch.Tensor
    forms: dict[tables.EntryForm | tables.ScatterForm, torch.Tensor]

    @classmethod
    def upload(cls, dictionaries: tuple[Dictionary, ...], device: torch.device) -> Bank:
        """Put dictionaries of equal code bits on the device."""
        phrases = tuple(tables.list_phrases(d) for d in dictionaries)
        all_entries, all_nonzeros, n = [], [], 0
        for p in phrases:
            entries, nonzeros = tables.general_entries(p)
            entries[..., 1] += np.uint32(n)
            n += len(nonzeros)
            all_entries.append(entries)
            all_nonzeros.append(nonzeros)
        return cls(
            dictionaries,
            phrases,
            torch.from_numpy(np.stack(all_entries).view(np.int32)).to(device),
            torch.from_numpy(np.concatenate([*all_nonzeros, np.zeros(1, np.uint16)]).view(np.int16)).to(device),
            torch.tensor([d.threshold if d.n_states == 2 else d.n_codewords for d in dictionaries], dtype=torch.int32).to(device),
            {},
        )

    def table(self, form: tables.EntryForm | tables.ScatterForm) -> torch.Tensor:
        """Return the tables of a fast kernel, int32[dictionaries, 256, 2, words]."""
        if form not in self.forms:
            entries = [
                tables.gather_entries(p, form) if isinstance(form, tables.EntryForm) else tables.scatter_entries(p, form)
                for p in self.phrases
            ]
            modules.refuse_capture(self.entries.device)
            made = torch.from_numpy(np.stack(entries).view(np.int32)).to(self.entries.device)
            # A kernel may read what another thread has put there meanwhile: that one stays.
            return self.forms.setdefault(form, made)
        return self.forms[form]


class GpuExperts:
    """A stack of ternary experts, compressed, in GPU memory.

    shape : (experts, rows, cols)
    device : torch.device
    layout : how rows lie (`plan.Layout`); None for the file's own order, which only the general kernels read
    handle : the number by which the torch operators find this object, as long as it lives
    """

    def __init__(
        self,
        *,
        shape: tuple[int, int, int],
        bank: Bank,
        dictionary_index: torch.Tensor,
        codes: torch.Tensor,
        expert_start: torch.Tensor,
        row_start: torch.Tensor,
        levels: torch.Tensor,
        level_kind: int,
        layout: plan.Layout | None,
    ) -> None:
        """Trust the arguments; `load` checks and makes them."""
        self.shape = shape
        self.bank = bank
        self.dictionary_index = dictionary_index
        self.codes = codes
        self.expert_start = expert_start
        self.row_start = row_start
        self.levels = levels
        self.level_kind = level_kind
        self.layout = layout
        self.device = codes.device
        self._plans: dict[int, plan.GatherPlan | None] = {}
        self._launches: dict[int, plan.Launch | None] = {}
        self._tiles: dict[int, plan.TilePlan | None] = {}
        self._decoders: dict[tuple[int, int, int], plan.DecodePlan | None] = {}
        self._used_on: set[tuple[int, int]] = set()
        self._fit: dict[torch.dtype, bool] = {}
        self.handle = next(_handles)
        _by_handle[self.handle] = self

    @classmethod
    def load(
        cls,
        stack: Any,
        levels: Any = None,
        *,
        dtype: str | None = None,
        device: torch.device | str = "cuda",
        layout: str = "auto",
        recode: bool = False,
    ) -> GpuExperts:
        """Upload a group, check all of it on the device, and repack it for the kernels (spec §5.2, §6).

        stack : a group of an open file (`qmoecodec.open`), or a `qmoecodec.Encoded` with its levels
        levels : [experts, rows, 2]    low and high level (`source.raw_levels`); those of the group if None
        dtype : "BF16", "F16", "F32" or "F64"; needed only for bfloat16 given as uint16. Float64 is rounded to float32.
        layout : "auto", or "file" to keep the file's order and so the general kernels
        recode : encode experts of 12- or 16-bit codewords anew with 8 bits, for the fast kernel
        Raises FormatError with reason and place for whatever is wrong with the bytes, before any kernel could use them;
        ValueError for an expert of 2 GiB and more, and for a device without CUDA; TypeError for an `Encoded` without levels.
        The result may be used at once on any stream and in any thread, and needs neither the file nor the arrays any more.
        It lives as long as kernels queued on any stream read it; but a CUDA graph does not keep it alive.
        """
        if layout not in ("auto", "file"):
            raise ValueError(f"layout is 'auto' or 'file', not {layout!r}")
        if levels is None:
            if not hasattr(stack, "encoded"):
                raise TypeError("levels are needed with an Encoded, which has none")
            stack, levels, dtype = stack.encoded(), stack.levels, dtype or stack.dtype
        target = torch.device(device)
        if target.type != "cuda":
            raise ValueError(f"experts are loaded to a CUDA device, not to {device}")
        if target.index is None:
            target = torch.device("cuda", torch.cuda.current_device())
        try:
            check_stack(stack)
            raw = raw_levels(levels, stack.shape, dtype)
            with torch.cuda.device(target):
                # A file's bank may hold dictionaries of other groups, with other code bits.
                used, places = np.unique(stack.dictionary_index, return_inverse=True)
                dictionaries = tuple(stack.dictionaries[i] for i in used) or (_trivial_dictionary(),)
                staged = stage(stack, places.astype(np.uint8), dictionaries, target)
        except FormatError as error:
            n = error.where.get("expert")
            if isinstance(n, int) and n:  # what is wrong with the rows of the experts before it comes first (spec §9)
                cls.load(first_experts(stack, n), levels[:n], dtype=dtype, device=target, layout="file")
            raise
        with torch.cuda.device(target):
            bank = Bank.upload(dictionaries, target)
            level_bytes = to_device(raw.data, target)
            return cls.from_staged(staged, bank, level_bytes, raw.dtype, layout=layout, recode=recode)

    @classmethod
    def from_staged(
        cls, staged: Staged, bank: Bank, level_bytes: torch.Tensor, dtype: str, *, layout: str = "auto", recode: bool = False
    ) -> GpuExperts:
        """Check and repack what is already on the device."""
        facts = validate(staged, bank, level_bytes, LEVEL_DTYPES.index(dtype))
        experts, rows, cols = staged.shape
        kept, kind = _keep_levels(level_bytes, dtype)
        if recode and staged.bits != 8 and experts * rows * cols:
            return cls._recode(staged, bank, level_bytes, dtype, layout)
        chosen: plan.Layout | None = None
        if layout == "auto" and staged.bits == 8 and experts and rows and cols:
            chosen = _choose_layout(facts, bank, cols, staged.codes.device)
        if chosen is None:
            codes, expert_start, row_start = staged.codes, staged.expert_start, staged.row_start
        else:
            codes, expert_start, row_start = repack(staged, chosen, tail_bytes=_TAIL_BYTES)
        torch.cuda.current_stream(codes.device).synchronize()  # the first product may be on another stream
        return cls(
            shape=staged.shape,
            bank=bank,
            dictionary_index=staged.dictionary_index,
            codes=codes,
            expert_start=expert_start,
            row_start=row_start,
            levels=kept,
            level_kind=kind,
            layout=chosen,
        )

    @classmethod
    def _recode(cls, staged: Staged, bank: Bank, level_bytes: torch.Tensor, dtype: str, layout: str) -> GpuExperts:
        from qmoecodec_gpu import encoding

        plain = cls.from_staged(staged, bank, level_bytes, dtype, layout="file")
        experts = staged.shape[0]
        counts = np.zeros(3, np.int64)
        for e in range(experts):
            digits = plain.decode(e)
            counts += torch.bincount(digits.flatten().to(torch.int64) + 1, minlength=3).cpu().numpy()
        dictionary = aivf.build(*(float(c) for c in counts), code_bits=8)
        parts = [encoding.encode(plain.decode(e)[None], dictionary) for e in range(experts)]
        again = encoding.concatenate(parts, plain.device)
        return cls.from_staged(again, Bank.upload((dictionary,), plain.device), level_bytes, dtype, layout=layout)

    @property
    def level_dtype(self) -> torch.dtype:
        """The type in which levels are kept: bfloat16, float16 or float32."""
        return (torch.bfloat16, torch.float16, torch.float32)[self.level_kind]

    @property
    def code_bits(self) -> int:
        """Bits per codeword."""
        return self.bank.dictionaries[0].code_bits

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of GPU memory by kind."""
        return {
            "codes": self.codes.nbytes,
            "row_start": self.row_start.nbytes,
            "levels": self.levels.nbytes,
            "other": self.expert_start.nbytes
            + self.dictionary_index.nbytes
            + self.bank.entries.nbytes
            + self.bank.nonzeros.nbytes,
        }

    def gather_plan(self, tokens: int) -> plan.GatherPlan | None:
        """Return the plan of the gather kernel for a token class; None where only the general kernel fits."""
        if self.layout is None:
            return None
        if tokens not in self._plans:
            self._plans[tokens] = _plan(self.layout, self.bank, self.shape[2], tokens, self.device)
        return self._plans[tokens]

    def gather_launch(self, largest: int) -> plan.Launch | None:
        """Return the gather kernel for token classes up to `largest`; None where only the general kernel fits."""
        if largest not in self._launches:
            plans = [self.gather_plan(tokens) for tokens in plan.TOKEN_CLASSES if tokens <= largest]
            found = tuple(p for p in plans if p is not None)
            self._launches[largest] = plan.Launch(found) if found and len(found) == len(plans) else None
        return self._launches[largest]

    def tile_plan(self, max_rows: int) -> plan.TilePlan | None:
        """Return the plan of the tile kernel (`plan.plan_tile`); None where it does not fit."""
        if self.layout is None or self.level_kind == 2:
            return None
        if max_rows not in self._tiles:
            self._tiles[max_rows] = plan.plan_tile(self.layout, **self._limits(), max_rows=max_rows)
        return self._tiles[max_rows]

    def decode_plan(self, rows: int, warps: int, blocks: int) -> plan.DecodePlan | None:
        """Return the plan of the decoder to two-bit digits (`plan.plan_decode`); None where it does not fit."""
        if self.layout is None or self.level_kind == 2:
            return None
        key = rows, warps, blocks
        if key not in self._decoders:
            self._decoders[key] = plan.plan_decode(self.layout, **self._limits(), rows=rows, warps=warps, blocks=blocks)
        return self._decoders[key]

    def _limits(self) -> dict[str, int]:
        return {
            "cols": self.shape[2],
            "max_phrase": max(d.max_phrase for d in self.bank.dictionaries),
            "max_nonzeros": max(p.max_nonzeros for p in self.bank.phrases),
            "max_shared_bytes": modules.max_shared_bytes(self.device),
        }

    def decode(
        self, expert: int | None = None, *, dtype: torch.dtype = torch.int8, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Decode one expert, or all (spec §5.2, §6.3).

        dtype : torch.int8 for the digits -1, 0, 1; torch.bfloat16 or torch.float16 for the levels
        Returns [rows, cols] for one expert, else [experts, rows, cols].
        """
        experts, rows, cols = self.shape
        if dtype not in (torch.int8, torch.bfloat16, torch.float16):
            raise TypeError(f"decode gives int8, bfloat16 or float16, not {dtype}")
        first, n = (0, experts) if expert is None else (self.check_number(expert), 1)
        shape = (n, rows, cols) if expert is None else (rows, cols)
        if out is None:
            out = torch.empty(shape, dtype=dtype, device=self.device)
        elif out.shape != shape or out.dtype != dtype or out.device != self.device or not out.is_contiguous():
            raise ValueError(f"out must be a contiguous {dtype} tensor of shape {shape} on {self.device}")
        if out.numel() == 0:
            return out
        self.use()
        if digits.decode(self, first, n, out):
            return out
        macros = {
            "OUT_BYTES": dtype.itemsize,
            "X_F16": int(dtype == torch.float16),
            "LEVEL_KIND": self.level_kind,
        }
        kernel = modules.function(self.device, "rows.cu", "decode_rows", macros)
        modules.launch(
            self.device,
            kernel,
            modules.warp_grid(self.device, n * rows, blocks_per_multiprocessor=4),
            modules.THREADS,
            (
                *self.rows_arguments(),
                modules.i32(first),
                modules.i32(n),
                modules.pointer(out),
                modules.i32(rows),
                modules.i32(cols),
                *self.layout_arguments(),
            ),
            shared_bytes=4096 * modules.THREADS // 32,
        )
        return out

    def check_number(self, expert: int) -> int:
        """Return an expert's number.

        Raises TypeError for what is no integer, IndexError for one that does not exist.
        """
        expert = operator.index(expert)
        if not 0 <= expert < self.shape[0]:
            raise IndexError(f"expert {expert} of {self.shape[0]}")
        return expert

    def fit(self, dtype: torch.dtype) -> bool:
        """Say whether the levels keep their size when they are rounded to bfloat16 or float16.

        None may be too large, nor, but for 0, so small that bits are lost. Asks the device the first time.
        """
        if dtype == self.level_dtype:
            return True
        if dtype not in self._fit:
            modules.refuse_capture(self.device)
            kept = self.levels.view(self.level_dtype)
            sizes, info = kept.float().abs(), torch.finfo(dtype)
            is_good = (sizes == 0) | ((sizes >= info.tiny) & (sizes <= info.max))
            self._fit[dtype] = bool(is_good.all())
        return self._fit[dtype]

    def use(self) -> None:
        """Let the memory outlive what is queued next on the current stream, however soon this object goes."""
        stream = torch.cuda.current_stream(self.device)
        key = (stream.cuda_stream, len(self.bank.forms))  # tables are made when they are needed
        if key not in self._used_on:
            bank = self.bank
            held = (self.codes, self.expert_start, self.row_start, self.levels, self.dictionary_index)
            for tensor in (*held, bank.entries, bank.nonzeros, bank.thresholds, *tuple(bank.forms.values())):
                tensor.record_stream(stream)
            self._used_on.add(key)

    def __reduce__(self) -> NoReturn:
        raise TypeError("GpuExperts cannot be copied or pickled, as operators know them by their handle: load the group again")

    def rows_arguments(self) -> tuple[int, ...]:
        """The first arguments of the kernels in rows.cu that read any layout."""
        p = modules.pointer
        return (
            p(self.codes),
            p(self.expert_start),
            p(self.row_start),
            p(self.levels),
            p(self.dictionary_index),
            p(self.bank.entries),
            p(self.bank.nonzeros),
            p(self.bank.thresholds),
        )

    def layout_arguments(self) -> tuple[Any, ...]:
        """The last arguments of those kernels."""
        lanes, words = (self.layout.lanes, self.layout.words) if self.layout else (0, 0)
        return (modules.i32(self.code_bits), modules.i32(lanes), modules.i32(words))

    def __repr__(self) -> str:
        form = f"words of {self.layout.lanes} lanes" if self.layout else "file order"
        return f"<GpuExperts {self.shape} {self.code_bits} bit, {form}, {sum(self.nbytes.values())} bytes on {self.device}>"


def find(handle: int) -> GpuExperts:
    """Return the experts with this handle.

    Raises KeyError where they no longer live.
    """
    # torch.compile may pass the number as a symbol.
    found = _by_handle.get(int(handle))
    if found is None:
        raise KeyError(f"the experts with the handle {int(handle)} are gone: something must refer to them besides the operator")
    return found


def _plan(layout: plan.Layout, bank: Bank, cols: int, tokens: int, device: torch.device) -> plan.GatherPlan | None:
    return plan.plan_gather(
        layout,
        tokens=tokens,
        cols=cols,
        max_phrase=max(d.max_phrase for d in bank.dictionaries),
        max_nonzeros=max(p.max_nonzeros for p in bank.phrases),
        max_shared_bytes=modules.max_shared_bytes(device),
    )


def _choose_layout(facts: Facts, bank: Bank, cols: int, device: torch.device) -> plan.Layout | None:
    """Return the layout for the gather kernel: in segmented order where it fits at all; None where nothing fits."""
    fallback = None
    for least_lanes in (4, 8, 16, 32):
        layout = plan.choose_layout(
            least_words=facts.least_words, mean_words=facts.mean_words, most_words=facts.most_words, least_lanes=least_lanes
        )
        found = _plan(layout, bank, cols, 1, device)
        if found is not None and found.form.segmented:
            return layout
        if found is not None:
            fallback = layout
    return fallback


def _trivial_dictionary() -> Dictionary:
    """A dictionary for a group without experts and without a bank."""
    return aivf.build(1, 1, 1, code_bits=8)


def _keep_levels(level_bytes: torch.Tensor, dtype: str) -> tuple[torch.Tensor, int]:
    """Return levels as the kernels read them and the number of their form (kernels/common.cuh)."""
    if dtype in ("BF16", "F16"):
        return level_bytes, LEVEL_DTYPES.index(dtype)
    if dtype == "F32":
        return level_bytes, 2
    return level_bytes.view(torch.float64).to(torch.float32), 2
