"""The tile kernel, as it runs where Hopper's kernels for digits do not."""

import numpy as np
import pytest

from tests.gpu import products

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("cupy", reason="needs CuPy")
pytestmark = pytest.mark.gpu


def multiply_and_compare(experts, data, counts, dtype, rng):
    """Route tokens at random, multiply, and compare with float64."""
    from qmoecodec_gpu import matvec

    n_experts, _, cols = experts.shape
    dense = torch.from_numpy(data.dense()).cuda()
    for n in counts:
        numbers = torch.from_numpy(rng.integers(n_experts, size=n)).cuda()
        x = torch.randn(n, cols, device="cuda").to(dtype)
        y = matvec.grouped_matvec(experts, x, numbers)
        products.check(y, dense, x, numbers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["8 bit, .885", "8 bit, 1/3", "8 bit, table"])
def test_any_architecture(case, bank, guarded, monkeypatch, name, dtype):
    """Items of every number of octets, tiles of both sizes."""
    from qmoecodec_gpu import backend, modules

    gpu = backend.load()
    monkeypatch.setattr(modules, "is_sm_90", lambda device: False)
    rng = np.random.default_rng(31)
    for shape, counts in (((2, 140, 520), (9, 20, 45, 64, 130)), ((1, 34000, 16), (20,))):
        data = case(shape, 0.8, bank[name](), rng)
        experts = gpu.experts.load(data.encoded, torch.from_numpy(data.levels).to(dtype))
        assert experts.tile_plan(128) is not None
        multiply_and_compare(experts, data, counts, dtype, rng)
    assert guarded.count("matmul_tile") >= 4
