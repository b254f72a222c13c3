"""The kernels of digits.py on the host: their indices, their ring, their barriers (emulation/emulation.h)."""

import importlib
import importlib.util
import itertools
import math
import pathlib
import shutil
import sys
import types

import numpy as np
import pytest

from qmoecodec_gpu import plan
from tests.gpu import products

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
    s, h, _, bit = np.meshgrid(*(np.arange(n, dtype=np.uint32) for n in (4, 2, 4, 2)), indexing="ij")
    two = two.reshape(padded, blocks, 4, 2, 4, 2) << (8 * (2 * h + bit) + 2 * s)
    return two.sum((2, 3, 5)).astype(np.uint32).transpose(1, 0, 2)


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

    def launch(self, device, kernel, grid, threads, args, *, shared_bytes=0, early=False):
        self.seed += 1
        kernel((grid, 1) if isinstance(grid, int) else grid, threads, shared_bytes, self.seed, args)

    def patch(self, monkeypatch, modules):
        for name in ("function", "launch"):
            monkeypatch.setattr(modules, name, getattr(self, name))
        facts = {
            "is_sm_90": True, "max_shared_bytes": MOST_SHARED, "n_multiprocessors": self.n, "shared_base": build.SHARED_BASE,
            "refuse_capture": None,
        }  # fmt: skip
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


@pytest.fixture
def guarded_empty(monkeypatch):
    """Buffers from torch.empty: filled, a guard behind each; gives those of bytes."""
    real, given, others = torch.empty, [], []
    fills = {torch.uint8: 0xFF, torch.int32: -77, torch.float32: math.inf}

    def empty(size, *, dtype, device):
        if dtype not in fills:
            return real(size, dtype=dtype, device=device)
        n = math.prod(size) if isinstance(size, tuple) else size
        buffer = torch.full((n + GUARD,), fills[dtype], dtype=dtype)
        (given if dtype == torch.uint8 else others).append(buffer)
        return buffer[:n].view(size)

    monkeypatch.setattr(torch, "empty", empty)
    yield given
    assert given
    for buffer in given + others:
        assert bool((buffer[-GUARD:] == fills[buffer.dtype]).all())


@pytest.fixture
def run(emulated, guarded_empty, case):
    """Decode and multiply some items, and compare with float64."""

    def run_and_compare(*arguments, **options):
        guarded_empty.clear()
        check_product(case, guarded_empty, *arguments, **options)

    return run_and_compare


def make_experts(data, dictionary):
    """Put experts into the host's memory as `GpuExperts.load` puts them into the device's."""
    from qmoecodec_gpu.experts import Bank, GpuExperts

    words = (data.encoded.row_lengths.astype(np.int64) + 3) >> 2
    layout, arrays = None, [np.zeros(0, t) for t in (np.uint32, np.uint64, np.uint32)]
    if data.digits.size:
        layout = plan.choose_layout(least_words=int(words.min()), mean_words=float(words.mean()), most_words=int(words.max()))
        arrays = lay_out(data.encoded, layout)
    signed = [a.view(a.dtype.str.replace("u", "i")) for a in arrays]
    codes, expert_start, row_start = (torch.from_numpy(a) for a in signed)
    levels = torch.from_numpy(data.levels).bfloat16().flatten()
    bank = Bank.upload((dictionary,), torch.device("cpu"))
    return GpuExperts(
        shape=data.encoded.shape, bank=bank, dictionary_index=torch.zeros(data.encoded.shape[0], dtype=torch.uint8), codes=codes,
        expert_start=expert_start, row_start=row_start, levels=levels.view(torch.uint8), level_kind=0, layout=layout,
    )  # fmt: skip


def check_product(case, buffers, rng, shape, counts, *, dictionary, options=None, parts=1, relu=False, scale=False):
    """counts : tokens of each item; item i is of expert i % experts
    parts : of the items, each with its scratch
    """
    from qmoecodec_gpu import digits
    from qmoecodec_gpu.matvec import Route

    n_experts, rows, cols = shape
    data = case(shape, 0.8, dictionary, rng)
    experts = make_experts(data, dictionary)
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
    items = Route(*lists, n_tokens=n_tokens, n_experts=n_experts, largest=plan.DIGITS_TOKENS, least=9, max_large=most)

    x = torch.from_numpy(rng.standard_normal((n_tokens, cols))).bfloat16()
    factors = torch.from_numpy(rng.random(n_tokens).astype(np.float32) + 0.5) if scale else None
    y = torch.full((n_tokens * rows + GUARD,), float("nan"), dtype=torch.bfloat16)
    target = y[: n_tokens * rows].view(n_tokens, rows)
    options = options or digits.Options()
    digits.launch(experts, items, x, target, relu=relu, scale=factors, options=options)
    assert bool(y[n_tokens * rows :].isnan().all())
    (scratch,) = buffers

    blocks, padded = -(-cols // 64), -(-rows // 64) * 64
    item_bytes = blocks * padded * 16
    assert len(scratch) - GUARD == min(n_experts, -(-most // parts)) * item_bytes
    if n_experts == 1 or n_tokens <= plan.DIGITS_TOKENS:  # else experts stand in any order
        found = scratch[:-GUARD].numpy().view(np.uint32).reshape(-1, blocks, padded, 4)
        inside = expected_digits(np.ones((rows, cols), np.int8), padded, blocks)
        inside |= inside >> 1
        for i in range(min(n, n_experts)):
            want = expected_digits(data.digits[i % n_experts], padded, blocks)
            np.testing.assert_array_equal((found[i] & inside)[:, :rows], want[:, :rows])
            assert not (found[i] & found[i] >> 1 & 0x55555555)[:, :rows].any()  # no 3, also beyond the row
    products.check(target, torch.from_numpy(data.dense()), x, torch.from_numpy(expert_of), relu=relu, scale=factors)


@pytest.mark.parametrize("name", ["8 bit, .885", "8 bit, 1/3", "8 bit, table"])
def test_small(emulated, run, bank, name):
    """Items of every size class, a row group that is not whole, columns that are not whole blocks."""
    run(np.random.default_rng(51), (2, 140, 1031), (9, 20, 33, 128, 65), dictionary=bank[name]())
    assert emulated.launched == ["list_experts", "decode_digits", "multiply_digits"]


LONG = pytest.mark.long


@pytest.mark.parametrize("groups", [pytest.param(2, marks=LONG), 3])
@pytest.mark.parametrize("slots", [3, pytest.param(5, marks=LONG)])
def test_ring(run, bank, groups, slots):
    """Short rings, which go round often, and every number of row groups per block; chunks across items."""
    from qmoecodec_gpu import digits

    options = digits.Options(groups=groups, slots=slots)
    run(np.random.default_rng(52), (3, 333, 296), (16, 64, 30, 100), dictionary=bank["8 bit, .885"](), options=options)


@pytest.mark.parametrize("groups", [pytest.param(2, marks=LONG), 3])
@pytest.mark.parametrize(
    ("n_blocks", "shape"), [(5, (1, 170, 1320)), (8, (1, 64, 1000)), pytest.param(13, (2, 220, 3090), marks=LONG)]
)
def test_parts_of_chunks(emulated, run, bank, monkeypatch, groups, n_blocks, shape):
    """Several blocks have stages of a chunk, and some have stages of two; whole turns before those, and none."""
    from qmoecodec_gpu import digits, modules

    monkeypatch.setattr(modules, "n_multiprocessors", lambda device: n_blocks)
    rng = np.random.default_rng(54)
    for counts in ((40,), (128, 9), (20, 64, 128, 17, 100, 40, 9)):
        run(rng, shape, counts, dictionary=bank["8 bit, .885"](), options=digits.Options(groups=groups, slots=3, rows=2))


@LONG
def test_wide(run, bank):
    """Rows that leave room for few of them at a time."""
    run(np.random.default_rng(56), (3, 70, 14335), (5, 6, 40), dictionary=bank["8 bit, .885"]())


def test_few(emulated, run, bank):
    """No expert can have two items: nothing is listed, and each item has digits of its own."""
    run(np.random.default_rng(55), (4, 70, 136), (12, 64, 9), dictionary=bank["8 bit, .885"]())
    assert emulated.launched == ["decode_digits", "multiply_digits"]


@pytest.mark.parametrize(("slots", "parts"), [(5, 1), (3, 3), pytest.param(2, 4, marks=LONG), pytest.param(1, 8, marks=LONG)])
def test_parts(run, bank, monkeypatch, slots, parts):
    """Room for all experts' digits, whatever their items, or for some, with items in parts, of which the last has none."""
    from qmoecodec_gpu import digits

    monkeypatch.setattr(digits, "SCRATCH_BYTES", slots * 128 * 9 * 16 + 1)
    options = digits.Options(rows=4, warps=4, blocks=3)
    run(
        np.random.default_rng(53), (5, 100, 520), (12, 40, 64, 20, 9, 33), dictionary=bank["8 bit, .885"](), options=options,
        parts=parts, scale=True, relu=True,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["8 bit, .885", "8 bit, table"])
def test_dense(emulated, case, bank, name):
    """Weights of one expert and of several, rows that are whole eights of columns and others, to every boundary."""
    from qmoecodec_gpu import digits

    rng = np.random.default_rng(60)
    dictionary = bank[name]()
    for shape in ((3, 70, 136), (2, 33, 1031), (1, 1, 1), (2, 130, 64)):
        data = case(shape, 0.8, dictionary, rng)
        experts = make_experts(data, dictionary)
        weights = torch.from_numpy(data.dense()).bfloat16()
        for expected, before in ((weights, float("nan")), (torch.from_numpy(data.digits), 77)):
            for first, n, offset in ((0, shape[0], 0), (0, shape[0], 4), (shape[0] - 1, 1, 3)):
                buffer = torch.full((n * shape[1] * shape[2] + offset + GUARD,), before, dtype=expected.dtype)
                out = buffer[offset : len(buffer) - GUARD].view(n, *shape[1:])
                assert digits.decode(experts, first, n, out)
                assert torch.equal(out, expected[first : first + n])
                untouched = torch.cat([buffer[:offset], buffer[-GUARD:]])
                assert bool((untouched.isnan() if before != 77 else untouched == 77).all())


def lists_of(route):
    """The items of a route's lists: their experts and tokens; and where large ones begin."""
    n, n_items = route.n_tokens, route.n_items.tolist()
    item_tokens = route.item_tokens.numpy()
    slots, firsts, counts = np.split(item_tokens[4], [6 * n, 7 * n])
    tokens = [item_tokens[c, : n_items[c] << c].reshape(n_items[c], 1 << c) for c in range(4)]
    tokens = [[item[item >= 0] for item in items] for items in tokens]
    tokens.append([slots[first : first + count] for first, count in zip(firsts[: n_items[4]], counts, strict=False)])
    experts = [route.item_expert[c, : n_items[c]].tolist() for c in range(5)]
    return [list(zip(*one, strict=True)) for one in zip(experts, tokens, strict=True)], firsts[: n_items[4]].tolist()


def test_routes(emulated, monkeypatch):
    """Every token is in one item, of its expert, in order; no list is longer, and no item larger, than the host counts on."""
    from qmoecodec_gpu import matvec

    monkeypatch.setattr(matvec, "check_expert", lambda expert: None)  # is it on the device?
    monkeypatch.setattr(matvec, "_ONE_BLOCK", 200)
    rng = np.random.default_rng(58)
    n_as_many = 0
    for _ in range(200):
        n_experts = int(rng.integers(0, 5))
        largest, least = [(1, 9), (2, 9), (4, 5), (8, 9), (8, 5), (64, 9), (64, 5), (128, 9), (128, 5)][rng.integers(9)]
        choices = [0, 1, least - 1, least, largest, largest + least, rng.integers(300)]
        counts = rng.choice(choices, size=n_experts + 2) if rng.integers(2) else np.full(n_experts + 2, rng.choice(choices[-4:]))
        counts[[0, -1]] *= rng.integers(2)  # dropped, and of experts that do not exist
        expert = rng.permutation(np.repeat(np.arange(-1, n_experts + 1), counts))
        n = len(expert)
        route = matvec.route(torch.from_numpy(expert), n_experts=n_experts, largest=largest, least=least)
        lists, firsts = lists_of(route)
        n_as_many += 0 < len(lists[4]) == route.max_large
        assert len(lists[4]) <= route.max_large
        for c, items in enumerate(lists):
            for e, tokens in items:
                assert (expert[tokens] == (n_experts if e == -2 else e)).all()
                if c < 4:
                    assert (1 << c) // 2 < len(tokens) and 1 << c <= matvec._largest_used(n, route)
                else:
                    assert least <= len(tokens) <= largest
        seen = [token for items in lists for _, tokens in items for token in tokens]
        assert sorted(seen) == list(range(n))
        for e in range(n_experts):  # the same tokens always have the same kernel
            mine = sorted((list(tokens) for items in lists for of, tokens in items if of == e), key=lambda tokens: tokens[0])
            assert [t for tokens in mine for t in tokens] == np.flatnonzero(expert == e).tolist()
            assert [len(tokens) for tokens in mine] == sorted(map(len, mine), reverse=True)
        slots = sorted((first, first + -(-len(tokens) // 8) * 8) for first, (_, tokens) in zip(firsts, lists[4], strict=True))
        assert all(first % 8 == 0 and end <= 6 * n for first, end in slots)
        assert all(end <= first for (_, end), (first, _) in itertools.pairwise(slots))
        # One expert alone, as `matmul` bounds its items.
        alone = matvec.route(torch.zeros(n, dtype=torch.int64), n_experts=1, largest=largest, least=least)
        assert int(alone.n_items[4]) <= (-(-n // largest) if alone.max_large else 0)
    assert n_as_many > 5  # the bound is no greater than it must be


def test_sizes(case, bank, emulated, monkeypatch):
    """What is chosen has a kernel, for x of every alignment, type and size."""
    from qmoecodec_gpu import digits, matvec, modules, tiles

    chosen = set()
    dictionary = bank["8 bit, .80"]()
    for shape in ((2, 70, 136), (0, 4, 8), (2, 0, 8), (2, 4, 0), (1, 70, 135), (64, 3, 16)):
        experts = make_experts(case(shape, 0.8, dictionary, np.random.default_rng(59)), dictionary)
        views = [(k, dtype) for k in (0, 1, 8) for dtype in (torch.bfloat16, torch.float16)]
        for n in (0, 1, 8, 9, 40, 10000, 1 << 27):
            for is_sm_90 in (False, True):
                monkeypatch.setattr(modules, "is_sm_90", lambda device, value=is_sm_90: value)
                for k, dtype in views:
                    x = torch.empty(n, shape[2] + k, dtype=dtype, device="meta")[:, : shape[2]]
                    largest, least = matvec.choose_sizes((experts, x))
                    kernel = "digits" if largest == plan.DIGITS_TOKENS else "tile" if largest == plan.TILE_TOKENS else "small"
                    chosen.add(kernel)
                    assert largest < least if kernel == "small" else 4 <= least - 1 <= matvec.largest_class(experts)
                    assert kernel != "digits" or (is_sm_90 and digits.fits(experts, x))
                    assert kernel != "tile" or tiles.plan_for(experts, x) is not None
                    assert kernel == "small" or matvec._takes(experts, x, largest)
    assert chosen == {"digits", "tile", "small"}
    far = torch.empty(1 << 26, 1024, dtype=torch.bfloat16, device="meta")[:, :136]
    experts = make_experts(case((1, 70, 136), 0.8, dictionary, np.random.default_rng(59)), dictionary)
    assert digits.fits(experts, far[: 1 << 25]) and not digits.fits(experts, far)
