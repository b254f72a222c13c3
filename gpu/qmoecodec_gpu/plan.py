"""Choosing the kernels' parameters for a group and its products. Plain arithmetic: no device is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from qmoecodec_gpu.tables import MAX_GATHER_NONZEROS, EntryForm, ScatterForm

#: Tokens that share one pass over an expert's codewords.
TOKEN_CLASSES: Final = (1, 2, 4, 8)

#: Tokens of the largest item of kernels/tile.cu, and its threads per block.
TILE_TOKENS: Final = 64
TILE_THREADS: Final = 512

#: Tokens of the largest item of kernels/multiply_digits.cu.
DIGITS_TOKENS: Final = 128

_TABLE_BYTES: Final = 64 * 1024
_MAX_WORDS: Final = 7
#: Places for nonzeros that the kernel is compiled with.
_NONZEROS: Final = (2, 3, 5, MAX_GATHER_NONZEROS)


@dataclass(frozen=True, slots=True)
class Layout:
    """How rows of 8-bit codewords lie in GPU memory, and what the loader found about them (kernels/common.cuh).

    lanes : lanes per row, 4, 8, 16 or 32
    words : words per lane and block
    one_block : no row is longer than lanes * words words
    sure_words : words that every lane has in every row
    usual_words : words that most rows have per lane
    """

    lanes: int
    words: int
    one_block: bool
    sure_words: int
    usual_words: int


def choose_layout(*, least_words: int, mean_words: float, most_words: int, least_lanes: int = 4) -> Layout:
    """Choose the layout from the rows' lengths in words.

    least_lanes : more lanes per row need less shared memory for x, of which rows in one warp have a copy each

    About four words per lane are the best use of a warp: fewer, and the work per row outweighs that per codeword; more,
    and the registers of a lane run out. The numbers are coarse, since each combination is compiled once.
    """
    lanes = 32
    while lanes > least_lanes and mean_words < 3.9 * lanes:
        lanes //= 2
    per_lane = -(-most_words // lanes)
    blocks = max(1, -(-per_lane // _MAX_WORDS))
    words = max(2, -(-per_lane // blocks))
    one_block = most_words <= lanes * words
    sure_words = words - 2
    return Layout(
        lanes=lanes,
        words=words,
        one_block=one_block,
        sure_words=sure_words if one_block and least_words >= sure_words * lanes else 0,
        usual_words=words - 1,
    )


@dataclass(frozen=True, slots=True)
class GatherPlan:
    """One compiled form of the gather kernel, with the geometry of x in shared memory.

    segment : columns per lane in segmented order
    overlap : columns kept beyond a segment, the longest phrase
    natural_columns : columns in natural order, those behind the row included
    """

    form: EntryForm
    layout: Layout
    segment: int
    overlap: int
    natural_columns: int
    shared_bytes: int

    @property
    def magic(self) -> int:
        """ceil(2**32 / (scale * segment)): the high word of scale * column * magic is column // segment."""
        return -(-(1 << 32) // (self.form.scale * self.segment))


@dataclass(frozen=True, slots=True)
class Launch:
    """One compiled form of the gather kernel: the token classes up to the largest, in one launch.

    plans : by class, 1 token first
    """

    plans: tuple[GatherPlan, ...]

    @property
    def threads(self) -> int:
        """Threads per block: enough to hide latency, and registers for the largest class (docs/performance-gpu.md)."""
        return 512

    @property
    def shared_bytes(self) -> int:
        """Shared memory per block."""
        return max(plan.shared_bytes for plan in self.plans)

    def macros(self, *, is_f16: bool, level_kind: int) -> dict[str, int]:
        """Return the macros that kernels/gather.cu is compiled with."""
        layout = self.plans[0].layout
        return {
            "MAX_TOK": self.plans[-1].form.tokens,
            "NZ": self.plans[0].form.n_nonzeros,
            "LANES": layout.lanes,
            "WORDS": layout.words,
            "SURE": layout.sure_words,
            "USUAL": layout.usual_words,
            "ONE": int(layout.one_block),
            "SEGMENTED_CLASSES": sum(int(plan.form.segmented) << number for number, plan in enumerate(self.plans)),
            "THREADS": self.threads,
            "X_F16": int(is_f16),
            "LEVEL_KIND": level_kind,
        }

    def geometry(self) -> list[tuple[int, int, int, int]]:
        """Return segment, overlap, natural_columns and magic of four classes, zeros where there are fewer."""
        found = [(p.segment, p.overlap, p.natural_columns, p.magic) for p in self.plans]
        return found + [(0, 0, 0, 0)] * (4 - len(found))


def plan_gather(
    layout: Layout, *, tokens: int, cols: int, max_phrase: int, max_nonzeros: int, max_shared_bytes: int
) -> GatherPlan | None:
    """Plan the gather kernel for one number of tokens; None where the group does not fit it.

    max_phrase, max_nonzeros : over the dictionaries that the group's experts use
    """
    if tokens not in TOKEN_CLASSES:
        raise ValueError(f"the gather kernel takes {TOKEN_CLASSES} tokens, not {tokens}")
    if max_nonzeros > MAX_GATHER_NONZEROS or cols < 1:
        return None
    n_nonzeros = next(n for n in _NONZEROS if n >= max_nonzeros)
    reach = cols + 4 * max_phrase  # the last phrase and three padding codewords begin before this column
    slot = 4 if tokens == 1 else 2 * tokens
    # 2: the last row of the last slot is never a phrase's start, where its address would wrap to 0.
    segment = max(-(-(reach + 2) // layout.lanes), max_phrase + 1) | 1
    natural = reach + max_phrase + 1
    for segmented in (True, False):
        form = EntryForm(tokens, segmented, n_nonzeros)
        if tokens == 1:
            x_bytes = (segment + max_phrase) * 384 + 2 * cols if segmented else natural * 8
        else:
            # and zeros for the missing nonzeros, and where the outputs go
            x_bytes = ((segment + max_phrase) * 32 if segmented else natural) * slot + 32 * slot + 16 * tokens
        shared = _TABLE_BYTES + -(-x_bytes // 16) * 16
        # scale * column * magic is exact up to 2**32 / (scale * segment) columns
        exact = form.scale**2 * reach * segment < 1 << 32
        if max_phrase <= form.max_phrase and shared <= max_shared_bytes and exact:
            return GatherPlan(form, layout, segment, max_phrase, natural, shared)
    return None


@dataclass(frozen=True, slots=True)
class TilePlan:
    """One compiled form of kernels/tile.cu.

    tile : rows
    pitch : words of two-bit digits per row
    """

    layout: Layout
    form: EntryForm
    tile: int
    pitch: int
    shared_bytes: int

    def macros(self, *, is_f16: bool) -> dict[str, int]:
        """Return the macros that the kernel is compiled with."""
        return {
            "NZ": self.form.n_nonzeros,
            "LANES": self.layout.lanes,
            "WORDS": self.layout.words,
            "X_F16": int(is_f16),
            "LEVEL_KIND": int(is_f16),
            "GROUPS": self.tile // 32,
        }


def choose_tile_rows(n_items: int, rows: int, n_multiprocessors: int) -> int:
    """Return how many rows a tile may have, 128, 64 or 32, so that the tiles of so many items keep a device busy."""
    if n_items * -(-rows // 128) >= 2 * n_multiprocessors:
        return 128
    return 64 if n_items * -(-rows // 64) >= n_multiprocessors else 32


def plan_tile(
    layout: Layout, *, cols: int, max_phrase: int, max_nonzeros: int, max_shared_bytes: int, max_rows: int
) -> TilePlan | None:
    """Plan the tile kernel with at most `max_rows` rows per tile; None where the group does not fit it."""
    if max_nonzeros > MAX_GATHER_NONZEROS or cols < 1 or cols % 8 or max_phrase > EntryForm(8, True, 2).max_phrase:
        return None
    form = EntryForm(8, True, next(n for n in _NONZEROS if n >= max_nonzeros))
    words = 4 * -(-cols // 64)
    pitch = words + (4 - words) % 8  # an odd multiple of 4, so that the rows of a fragment lie in different banks
    for tile in (128, 64, 32):
        shared = 512 * 8 * 4 * form.n_words + max(4 * tile * pitch, 128 * 1024)
        if tile <= max_rows and shared <= max_shared_bytes:
            return TilePlan(layout, form, tile, pitch, shared)
    return None


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """One compiled form of kernels/decode_digits.cu.

    rows : of a warp at a time
    warps : per block
    blocks : that a multiprocessor has at a time
    copies : of the table
    pitch : words of digits per row in shared memory
    """

    layout: Layout
    form: ScatterForm
    rows: int
    warps: int
    blocks: int
    copies: int
    pitch: int
    shared_bytes: int

    @property
    def tile(self) -> int:
        """Rows of a block."""
        return self.rows * self.warps

    def macros(self) -> dict[str, int]:
        """Return the macros that the kernel is compiled with."""
        return {
            "NZ": self.form.n_nonzeros,
            "LANES": self.layout.lanes,
            "WORDS": self.layout.words,
            "SURE": self.layout.sure_words,
            "USUAL": self.layout.usual_words,
            "ONE": int(self.layout.one_block),
            "ROWS": self.rows,
            "WARPS": self.warps,
            "RESIDENT": self.blocks,
            "COPIES": self.copies,
        }


def plan_decode(
    layout: Layout,
    *,
    cols: int,
    max_phrase: int,
    max_nonzeros: int,
    max_shared_bytes: int,
    rows: int = 8,
    warps: int = 8,
    blocks: int = 2,
) -> DecodePlan | None:
    """Plan the decoder to two-bit digits; None where a group does not fit it.

    rows, warps : per warp and per block, fewer where they do not fit: rows rather than warps
    """
    if max_nonzeros > MAX_GATHER_NONZEROS or cols < 1 or max_phrase > ScatterForm.max_phrase:
        return None
    form = ScatterForm(next(n for n in _NONZEROS if n >= max_nonzeros))
    words = max(4 * -(-cols // 64), -(-(cols + 4 * max_phrase) // 16))
    pitch = words + (4 - words) % 8
    limit = (max_shared_bytes + 1024) // blocks - 1024  # each block takes 1024 bytes for itself
    least = 32 // layout.lanes
    while warps:
        here = max(rows, least)
        while here >= least:
            for copies in (16, 8, 4):
                if copies > 4 * here:  # to fill them takes as long as a row or two
                    continue
                shared = 2048 * form.n_words * copies + 4 * here * warps * pitch
                if shared <= limit:
                    # No more than `blocks` fit: started early, they would crowd where the kernel before has ended.
                    shared = max(shared, (max_shared_bytes + 1024) // (blocks + 1) - 1023)
                    return DecodePlan(layout, form, here, warps, blocks, copies, pitch, shared)
            here //= 2
        warps //= 2
    return None


def choose_decode_rows(total_rows: int, least: int, n_multiprocessors: int) -> int:
    """Return how many rows a warp decodes at a time, 1 to 8, so that so many rows keep 16 warps per multiprocessor busy."""
    return next((rows for rows in (8, 4, 2) if rows > least and total_rows >= 16 * rows * n_multiprocessors), least)


@dataclass(frozen=True, slots=True)
class MultiplyPlan:
    """One compiled form of kernels/multiply_digits.cu.

    groups : of 64 rows, one for each warpgroup
    slots : stages that the ring holds
    """

    groups: int
    slots: int
    shared_bytes: int

    @property
    def threads(self) -> int:
        """Threads per block."""
        return 128 * (self.groups + 2)

    def macros(self, *, is_f16: bool) -> dict[str, int]:
        """Return the macros that the kernel is compiled with."""
        types = {"X_F16": int(is_f16), "LEVEL_KIND": int(is_f16)}
        return types | {"GROUPS": self.groups, "SLOTS": self.slots}


def plan_multiply(groups: int, *, max_shared_bytes: int, slots: int = 0) -> MultiplyPlan:
    """Plan the product with two-bit digits.

    slots : 0 for as many as fit
    """
    slot = 2 * (128 * DIGITS_TOKENS + 1024 * groups) + 16  # and two barriers
    # The kernel's CHUNKS: places for four chunks with two barriers each, and what follows them.
    other = 4 * (256 * groups + 8 * DIGITS_TOKENS + 48 + 16) + 32
    slots = slots or (max_shared_bytes - other) // slot
    return MultiplyPlan(groups, slots, slots * slot + other)


def choose_groups(rows: int) -> int:
    """Return how many groups of 64 rows a block multiplies at a time: three, which read x seldom, or two where one would idle."""
    return 2 if -(-rows // 64) in (1, 2, 4) else 3


def choose_dense_from(rows: int, cols: int) -> int:
    """Return the tokens of one expert from which a dense product with the decoded matrix is faster (docs/performance-gpu.md).

    A matrix that keeps the device busy by itself takes longer to be written than to be multiplied as digits.
    """
    return 9 if rows * cols < 1 << 24 else 64
