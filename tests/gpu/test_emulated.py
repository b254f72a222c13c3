"""The kernels of digits.py on the host: their indices, their ring, their barriers (emulation/emulation.h)."""

import importlib
import importlib.util
import pathlib
import shutil
import sys
import types

import numpy as np
import pytest

from qmoecodec_gpu import plan

sys.path.insert(0, str(pathlib.Path(__file__).parent / "emulation"))
import build

torch = pytest.importorskip("torch", reason="needs torch")
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
GUARD = 4096  # bytes behind each output that must stay as they are
MOST_SHARED = 232448


def lay_out(encoded, layout):
    """Words of four codewords in the layout of kernels/common.cuh: codes, expert_start, row_start."""
    lanes, block = layout.lanes, layout.lanes * layout.words
    experts, rows, _ = encoded.shape
    starts, expert_start, row_start = 0, [0], np.zeros((experts, rows + 1), np.uint32)
    words = []
    for e in range(experts):
        data = encoded.codes[int(encoded.code_offsets[e]) : int(encoded.code_offsets[e + 1])]
        at = 0
        for r in range(rows):
            n = int(encoded.row_lengths[e, r])
            row = np.zeros(-(-n // 4) * 4, np.uint8)
            row[:n] = data[at : at + n]
            at += n
            row = row.view("<u4")
            for first in range(0, len(row), block):
                part = row[first : first + block]
                q, more = divmod(len(part), lanes)
                to = np.empty_like(part)
                place = 0
                for lane in range(lanes):
                    for i in range(q + (lane < more)):
                        to[i * lanes + lane] = part[place]
                        place += 1
                words.append(to)
            row_start[e, r + 1] = row_start[e, r] + len(row)
        starts += int(row_start[e, -1])
        expert_start.append(starts)
    tail = np.zeros(32 * 8, np.uint32)
    return np.concatenate([*words, tail]), np.array(expert_start, np.uint64), row_start


def expected_digits(digits, padded, blocks):
    """As decode_digits.cu describes them: uint32[blocks, rows, 4]."""
    rows, cols = digits.shape
    two = np.zeros((padded, blocks * 64), np.uint32)
    two[:rows, :cols] = np.where(digits < 0, 1, np.where(digits > 0, 2, 0))
    two = two.reshape(padded, blocks, 4, 16)
    return (two << (2 * np.arange(16, dtype=np.uint32))).sum(-1).astype(np.uint32).transpose(1, 0, 2)


class Emulated:
    """Stands in for qmoecodec_gpu.modules: kernels run on the host, and buffers of theirs are torch's on the host."""

    def __init__(self, folder, n_multiprocessors):
        self.folder, self.n, self.kernels, self.seed, self.launched = folder, n_multiprocessors, {}, 0, []

    def function(self, device, file, name, macros=None):
        key = (name, tuple(sorted((macros or {}).items())))
        if key not in self.kernels:
            self.kernels[key] = build.Kernel(self.folder, file, name, macros or {})
        self.launched.append(name)
        return self.kernels[key]

    def launch(self, device, kernel, grid, threads, args, *, shared_bytes=0):
        self.seed += 1
        kernel((grid, 1) if isinstance(grid, int) else grid, threads, shared_bytes, self.seed, args)

    def patch(self, monkeypatch, modules):
        for name in ("function", "launch"):
            monkeypatch.setattr(modules, name, getattr(self, name))
        facts = {"is_sm_90": True, "max_shared_bytes": MOST_SHARED, "n_multiprocessors": self.n, "shared_base": build.SHARED_BASE}
        for name, value in facts.items():
            monkeypatch.setattr(modules, name, lambda device, value=value: value)


@pytest.fixture
def emulated(tmp_path, monkeypatch):
    if importlib.util.find_spec("cupy") is None:
        monkeypatch.setitem(sys.modules, "cupy", types.ModuleType("cupy"))
    from qmoecodec_gpu import modules

    stand_in = Emulated(tmp_path, 3)
    stand_in.patch(monkeypatch, modules)
    return stand_in


def run(emulated, case, rng, shape, counts, *, dictionary, options=None, slots=None, one=False, monkeypatch=None, **epilogue):
    """Decode and multiply some items, and compare with float64."""
    from qmoecodec_gpu import digits
    from qmoecodec_gpu.experts import Bank, GpuExperts
    from qmoecodec_gpu.matvec import Route

    options = options or digits.Options()
    n_experts, rows, cols = shape
    data = case(shape, 0.8, dictionary, rng)
    words = (data.encoded.row_lengths.astype(np.int64) + 3) >> 2
    layout = plan.choose_layout(least_words=int(words.min()), mean_words=float(words.mean()), most_words=int(words.max()))
    signed = [a.view(a.dtype.str.replace("u", "i")) for a in lay_out(data.encoded, layout)]
    codes, expert_start, row_start = (torch.from_numpy(a) for a in signed)
    levels = torch.from_numpy(data.levels).bfloat16()
    bank = Bank.upload((dictionary,), torch.device("cpu"))
    experts = GpuExperts(
        shape=shape, bank=bank, dictionary_index=torch.zeros(n_experts, dtype=torch.uint8), codes=codes,
        expert_start=expert_start, row_start=row_start, levels=levels.view(torch.uint8), level_kind=0, layout=layout,
    )  # fmt: skip
    if slots:
        real = plan.plan_multiply

        def short(groups, *, max_shared_bytes, **form):
            long = real(groups, max_shared_bytes=max_shared_bytes, **form)
            return real(groups, max_shared_bytes=long.shared_bytes - (long.slots - slots) * long.slot_bytes, **form)

        monkeypatch.setattr(plan, "plan_multiply", short)

    # Work lists as kernels/route.cu makes them: item i is expert i % n_experts, with counts[i] tokens scattered over x.
    n_tokens, n = sum(counts), len(counts)
    order = rng.permutation(n_tokens)
    n_items, item_expert = np.zeros(6, np.int32), np.full((5, n_tokens), -1, np.int32)
    n_items[4] = n
    item_expert[4, :n] = np.arange(n) % n_experts
    firsts = np.cumsum([0, *(-(-c // 8) * 8 for c in counts)])
    item_tokens = np.full((5, 8 * n_tokens), -1, np.int32)
    expert_of = np.zeros(n_tokens, np.int64)
    ends = np.cumsum([0, *counts])
    for i, c in enumerate(counts):
        mine = order[ends[i] : ends[i + 1]]
        item_tokens[4, firsts[i] : firsts[i] + c] = mine
        item_tokens[4, 6 * n_tokens + i], item_tokens[4, 7 * n_tokens + i] = firsts[i], c
        expert_of[mine] = i % n_experts
    lists = (torch.from_numpy(a) for a in (n_items, item_expert, item_tokens))
    most = n + 2  # more than there are
    items = Route(*lists, n_tokens=n_tokens, n_experts=n_experts, largest=plan.DIGITS_TOKENS, max_large=most)

    x = torch.from_numpy(rng.standard_normal((n_tokens, cols))).bfloat16()
    factors = torch.from_numpy(rng.random(n_tokens).astype(np.float32) + 0.5) if epilogue.get("scale") else None
    relu = epilogue.get("relu", False)
    at_once = options.at_once or items.max_large
    size = digits.scratch_bytes(experts, 1 if one else at_once) * min(2, -(-items.max_large // at_once))
    scratch = torch.full((size + GUARD,), 0xFF, dtype=torch.uint8)
    y = torch.full((n_tokens * rows + GUARD,), float("nan"), dtype=torch.bfloat16)
    target = y[: n_tokens * rows].view(n_tokens, rows)
    digits.launch(experts, items, x, target, scratch=scratch[:size], options=options, relu=relu, scale=factors, is_one_expert=one)
    assert bool((scratch[size:] == 0xFF).all())
    assert bool(y[n_tokens * rows :].isnan().all())

    if not options.at_once:
        blocks, padded = -(-cols // 64), -(-rows // 64) * 64
        found = scratch[:size].numpy().view(np.uint32).reshape(-1, blocks, padded, 4)
        inside = expected_digits(np.ones((rows, cols), np.int8), padded, blocks)
        inside |= inside >> 1
        for i in range(min(n, n_experts)):  # the leaders
            want = expected_digits(data.digits[i % n_experts], padded, blocks)
            np.testing.assert_array_equal((found[i] & inside)[:, :rows], want[:, :rows])
            assert not (found[i] & found[i] >> 1 & 0x55555555)[:, :rows].any()  # no 3, also beyond the row
    dense, wide = data.dense(), x.double().numpy()
    exact = np.einsum("trc,tc->tr", dense[expert_of], wide)
    bound = 2.0**-8 * np.abs(exact) + 1e-5 * np.einsum("trc,tc->tr", np.abs(dense[expert_of]), np.abs(wide)) + 1e-6
    if relu:
        exact = np.maximum(exact, 0)
    if factors is not None:
        exact, bound = exact * factors.numpy()[:, None], bound * factors.numpy()[:, None]
    assert (np.abs(target.double().numpy() - exact) <= bound).all()


@pytest.mark.parametrize("name", ["8 bit, .885", "8 bit, 1/3", "8 bit, table"])
def test_small(emulated, case, bank, name):
    """Items of every size class, a row group that is not whole, columns that are not whole blocks."""
    run(emulated, case, np.random.default_rng(51), (2, 140, 1031), (9, 20, 33, 128, 65), dictionary=bank[name]())
    assert emulated.launched == ["decode_digits", "multiply_digits", "find_leaders", "arrange_x"]


LONG = pytest.mark.long


@pytest.mark.parametrize("groups", [pytest.param(2, marks=LONG), pytest.param(3, marks=LONG), 4])
@pytest.mark.parametrize("slots", [2, pytest.param(5, marks=LONG)])
def test_ring(emulated, case, bank, monkeypatch, groups, slots):
    """Short rings, which go round often, and every number of row groups per block; chunks across items."""
    from qmoecodec_gpu import digits

    options, dictionary = digits.Options(groups=groups), bank["8 bit, .885"]()
    rng = np.random.default_rng(52)
    run(
        emulated, case, rng, (3, 333, 300), (16, 64, 30, 100), dictionary=dictionary, options=options, slots=slots,
        monkeypatch=monkeypatch,
    )  # fmt: skip


@pytest.mark.parametrize("groups", [pytest.param(2, marks=LONG), pytest.param(3, marks=LONG), 4])
@pytest.mark.parametrize("cols", [100, pytest.param(700, marks=LONG)])
def test_shared_columns(emulated, case, bank, monkeypatch, groups, cols):
    """Warpgroups share columns where a chunk has few rows; fewer blocks than warpgroups; one expert, decoded once."""
    from qmoecodec_gpu import digits

    options, dictionary = digits.Options(groups=groups, share=True, rows=2, warps=8), bank["8 bit, .885"]()
    rng = np.random.default_rng(54)
    for counts in ((40,), (30, 9), (128, 20, 64)):
        run(
            emulated, case, rng, (1, 170, cols), counts, dictionary=dictionary, options=options, slots=groups + 2, one=True,
            monkeypatch=monkeypatch,
        )  # fmt: skip
        monkeypatch.undo()
        emulated.patch(monkeypatch, importlib.import_module("qmoecodec_gpu.modules"))


def test_options(emulated, case, bank):
    """Scales and relu; two items at once; four rows per warp; second nonzeros or'ed unguarded."""
    from qmoecodec_gpu import digits

    options, dictionary = digits.Options(rows=4, warps=8, blocks=3, is_guarded=False, at_once=2), bank["8 bit, .885"]()
    rng = np.random.default_rng(53)
    run(emulated, case, rng, (2, 100, 2080), (12, 40, 64), dictionary=dictionary, options=options, scale=True, relu=True)
