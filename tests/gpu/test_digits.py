"""Products by way of two-bit digits on a Hopper device; test_emulated.py runs the same kernels on the host."""

import dataclasses

import numpy as np
import pytest

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


def multiply_and_compare(experts, data, counts, dtype, rng, options, **launch):
    """Route tokens at random, multiply large and small items, and compare with float64."""
    from qmoecodec_gpu import digits, matvec, plan

    n_experts, rows, cols = experts.shape
    dense = torch.from_numpy(data.dense()).cuda()
    for n in counts:
        numbers = torch.from_numpy(rng.integers(n_experts, size=n)).cuda()
        x = torch.randn(n, cols, device="cuda").to(dtype)
        items = matvec.route(numbers, n_experts=n_experts, largest=plan.DIGITS_TOKENS)
        y = torch.full((n, rows), float("nan"), device="cuda", dtype=dtype)
        matvec._launch(experts, items, x, y)
        if items.max_large:
            at_once = min(options.at_once or items.max_large, items.max_large)
            parts = min(2, -(-items.max_large // at_once))
            scratch = torch.full((parts * digits.scratch_bytes(experts, at_once),), 0xFF, dtype=torch.uint8, device="cuda")
            digits.launch(experts, items, x, y, scratch=scratch, options=options, **launch)
        exact = torch.einsum("trc,tc->tr", dense[numbers], x.double())
        bound = 2.0**-8 * exact.abs() + 1e-5 * torch.einsum("trc,tc->tr", dense[numbers].abs(), x.double().abs()) + 1e-6
        assert bool(((y.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["8 bit, .885", "8 bit, 1/3", "8 bit, table"])
def test_shapes(case, bank, guarded, hopper, name, dtype):
    """Every number of octets, row groups and blocks that are not whole."""
    from qmoecodec_gpu import digits

    rng = np.random.default_rng(61)
    for shape, counts in (((2, 140, 1031), (9, 33, 64, 130, 300)), ((1, 5000, 72), (12, 100)), ((1, 130, 9001), (40, 128))):
        data = case(shape, 0.8, bank[name](), rng)
        experts = hopper.experts.load(data.encoded, torch.from_numpy(data.levels).to(dtype))
        multiply_and_compare(experts, data, counts, dtype, rng, digits.Options())
    assert guarded.count("multiply_digits") >= 7


@pytest.mark.parametrize(
    "which", ["groups 2", "groups 3", "share", "plain", "8x2", "rows 4", "rows 1", "at once", "fork", "beside"]
)
def test_forms(case, bank, hopper, which):
    """The forms that measurements choose among."""
    from qmoecodec_gpu import digits

    options = {
        "groups 2": digits.Options(groups=2),
        "groups 3": digits.Options(groups=3),
        "share": digits.Options(share=True),
        "plain": digits.Options(is_guarded=False),
        "8x2": digits.Options(warps=8, blocks=2),
        "rows 4": digits.Options(rows=4, warps=24),
        "rows 1": digits.Options(rows=1, share=True),
        "at once": digits.Options(at_once=2),
        "fork": digits.Options(fork=True),
        "beside": dataclasses.replace(digits.BESIDE, at_once=2),
    }[which]
    rng = np.random.default_rng(62)
    for shape, counts in (((5, 333, 520), (200, 700)), ((2, 2080, 6144), (40, 300))):
        data = case(shape, 0.885, bank["8 bit, .885"](), rng)
        experts = hopper.experts.load(data.encoded, torch.from_numpy(data.levels).bfloat16())
        for _ in range(3):  # a race may need a few
            multiply_and_compare(experts, data, counts, torch.bfloat16, rng, options)


def test_one_expert(case, bank, guarded, hopper):
    """Several items of one expert, which is decoded once."""
    from qmoecodec_gpu import digits

    rng = np.random.default_rng(63)
    data = case((1, 300, 700), 0.885, bank["8 bit, .885"](), rng)
    experts = hopper.experts.load(data.encoded, torch.from_numpy(data.levels).bfloat16())
    options = digits.Options(share=True, rows=1)
    multiply_and_compare(experts, data, (128, 384, 640), torch.bfloat16, rng, options, is_one_expert=True)
