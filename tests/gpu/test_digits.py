"""Products by way of two-bit digits on a Hopper device; test_emulated.py runs the same kernels on the host."""

import dataclasses

import numpy as np
import pytest

import qmoecodec
from tests.gpu import products

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("cupy", reason="needs CuPy")
pytestmark = pytest.mark.gpu


@pytest.fixture
def hopper():
    from qmoecodec_gpu import backend, modules

    gpu = backend.load()
    if not modules.is_sm_90(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("for Hopper alone")
    return gpu


def multiply_and_compare(experts, data, counts, dtype, rng, *, dropped=False, relu=False, scale=False, **launch):
    """Route tokens at random, multiply large and small items, and compare with float64."""
    from qmoecodec_gpu import digits, matvec, plan

    n_experts, rows, cols = experts.shape
    dense = torch.from_numpy(data.dense()).cuda()
    for n in counts:
        numbers = torch.from_numpy(rng.integers(-1 if dropped else 0, n_experts, size=n)).cuda()
        x = torch.randn(n, cols, device="cuda").to(dtype)
        factors = torch.rand(n, device="cuda") + 0.5 if scale else None
        items = matvec.route(numbers, n_experts=n_experts, largest=plan.DIGITS_TOKENS)
        assert items.max_large and digits.fits(experts, x)
        y = torch.full((n, rows), float("nan"), device="cuda", dtype=dtype)
        matvec._launch(experts, items, x, y, relu=relu, scale=factors)
        digits.launch(experts, items, x, y, relu=relu, scale=factors, **launch)
        products.check(y, dense, x, numbers, relu=relu, scale=factors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["8 bit, .885", "8 bit, 1/3", "8 bit, table"])
def test_shapes(case, bank, guarded, hopper, name, dtype):
    """Every number of octets, row groups and blocks that are not whole, rows of x on no boundary."""
    rng = np.random.default_rng(61)
    few = ((1, 5000, 72), (12, 100)), ((1, 130, 9001), (40, 128)), ((1, 64, 8), (9,))
    for shape, counts in (((2, 140, 1031), (9, 33, 64, 130, 300)), *few):
        data = case(shape, 0.8, bank[name](), rng)
        experts = hopper.experts.load(data.encoded, torch.from_numpy(data.levels).to(dtype))
        multiply_and_compare(experts, data, counts, dtype, rng)
    assert guarded.count("multiply_digits") >= 7


@pytest.mark.parametrize("which", ["groups 2", "groups 3", "short", "rows 1", "12 warps", "16x1"])
def test_forms(case, bank, hopper, which):
    """Every number of row groups, whatever the shape would choose; short rings; the decoder's forms."""
    from qmoecodec_gpu import digits

    options = {
        "groups 2": digits.Options(groups=2),
        "groups 3": digits.Options(groups=3),
        "short": digits.Options(groups=3, slots=3),
        "rows 1": digits.Options(rows=1),
        "12 warps": digits.Options(rows=4, warps=12),
        "16x1": digits.Options(rows=8, warps=16, blocks=1),
    }[which]
    rng = np.random.default_rng(62)
    for shape, counts in (((5, 333, 520), (200, 700)), ((2, 2080, 6144), (40, 300))):
        data = case(shape, 0.885, bank["8 bit, .885"](), rng)
        experts = hopper.experts.load(data.encoded, torch.from_numpy(data.levels).bfloat16())
        for _ in range(3):  # a race may need a few
            multiply_and_compare(experts, data, counts, torch.bfloat16, rng, options=options)


def test_same_every_time(case, bank, hopper):
    """Blocks that have parts of the same rows end in any order; their sums are added in one."""
    from qmoecodec_gpu import digits, matvec, plan

    rng = np.random.default_rng(63)
    data = case((4, 500, 6144), 0.885, bank["8 bit, .885"](), rng)
    experts = hopper.experts.load(data.encoded, torch.from_numpy(data.levels).bfloat16())
    for n in (150, 5000):
        x = torch.randn(n, 6144, device="cuda").bfloat16()
        items = matvec.route(torch.arange(n, device="cuda") % 4, n_experts=4, largest=plan.DIGITS_TOKENS)
        results = torch.full((50, n, 500), float("nan"), device="cuda", dtype=torch.bfloat16)
        for y in results:
            digits.launch(experts, items, x, y)
        assert bool((results == results[0]).all())


@pytest.mark.parametrize("room", [1, 3, 7])
def test_parts(case, bank, guarded, hopper, monkeypatch, room):
    """Room for all experts' digits, or for some: items in parts, an expert's maybe in two. Dropped tokens; relu and scales."""
    from qmoecodec_gpu import digits

    monkeypatch.setattr(digits, "SCRATCH_BYTES", room * 6 * 11 * 1024)
    rng = np.random.default_rng(64)
    data = case((7, 333, 700), 0.885, bank["8 bit, .885"](), rng)
    experts = hopper.experts.load(data.encoded, torch.from_numpy(data.levels).bfloat16())
    multiply_and_compare(experts, data, (300, 1500), torch.bfloat16, rng, dropped=True, relu=True, scale=True)
    n_parts = guarded.count("multiply_digits")
    assert n_parts == 2 if room == 7 else n_parts > 4
    assert guarded.count("list_experts") == (0 if room == 1 else 2)


def test_dictionaries(case, bank, hopper):
    """Experts of several dictionaries."""
    rng = np.random.default_rng(65)
    several = [bank[name]() for name in ("8 bit, .80", "8 bit, .95")]
    parts = [case((1, 200, 520), p, several, rng) for p in (0.8, 0.95, 0.82, 0.96, 0.81)]
    digits, levels = (np.concatenate([getattr(p, name) for p in parts]) for name in ("digits", "levels"))
    data = dataclasses.replace(parts[0], digits=digits, levels=levels, encoded=qmoecodec.encode(digits, dictionary=several))
    assert len(set(data.encoded.dictionary_index.tolist())) == 2
    experts = hopper.experts.load(data.encoded, torch.from_numpy(data.levels).bfloat16())
    multiply_and_compare(experts, data, (100, 400), torch.bfloat16, rng)


def test_wide(case, bank, hopper):
    """Rows too long for eight tokens in the gather kernel: items of five and more are large."""
    from qmoecodec_gpu import matvec, plan

    rng = np.random.default_rng(67)
    data = case((3, 70, 14335), 0.885, bank["8 bit, .885"](), rng)
    experts = hopper.experts.load(data.encoded, torch.from_numpy(data.levels).bfloat16())
    dense = torch.from_numpy(data.dense()).cuda()
    for n in (5, 9, 20, 150):
        x = torch.randn(n, 14335, device="cuda").bfloat16()
        numbers = torch.from_numpy(rng.integers(3, size=n)).cuda()
        assert matvec.choose_sizes((experts, x)) == (plan.DIGITS_TOKENS, 5)
        products.check(matvec.grouped_matvec(experts, x, numbers), dense, x, numbers)


def test_one_expert(case, bank, guarded, hopper):
    """Several items of one expert, which is decoded once."""
    rng = np.random.default_rng(63)
    data = case((1, 300, 700), 0.885, bank["8 bit, .885"](), rng)
    experts = hopper.experts.load(data.encoded, torch.from_numpy(data.levels).bfloat16())
    multiply_and_compare(experts, data, (128, 384, 640), torch.bfloat16, rng)


def test_graph(case, bank, hopper):
    """A launch is captured, scratch, padded x and all, and replayed with other tokens."""
    from qmoecodec_gpu import digits, matvec, plan

    rng = np.random.default_rng(66)
    data = case((3, 140, 1031), 0.885, bank["8 bit, .885"](), rng)
    experts = hopper.experts.load(data.encoded, torch.from_numpy(data.levels).bfloat16())
    dense = torch.from_numpy(data.dense()).cuda()
    numbers = torch.arange(3, device="cuda").repeat_interleave(40)
    x = torch.randn(120, 1031, device="cuda").bfloat16()
    y = torch.empty(120, 140, device="cuda", dtype=torch.bfloat16)
    items = matvec.route(numbers, n_experts=3, largest=plan.DIGITS_TOKENS)
    digits.launch(experts, items, x, y)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        digits.launch(experts, items, x, y)
    for _ in range(2):
        x.copy_(torch.randn(120, 1031, device="cuda"))
        y.fill_(float("nan"))
        graph.replay()
        products.check(y, dense, x, numbers)
