"""Groups of more than 2**31 weights on the device."""

import numpy as np
import pytest

import qmoecodec
from qmoecodec.dictionary import aivf

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("cupy", reason="needs CuPy")
pytestmark = pytest.mark.gpu

FREE_BYTES = 16 << 30
#: Many experts; and one expert that passes 2**31 by itself.
SHAPES = [(180, 2080, 6144), (1, 33000, 70000)]


@pytest.fixture(params=SHAPES, ids=str)
def large(request):
    """Digits on the device, their dictionary and levels."""
    from qmoecodec_gpu import backend

    backend.load()
    torch.cuda.empty_cache()
    if (free := torch.cuda.mem_get_info()[0]) < FREE_BYTES:
        pytest.skip(f"needs {FREE_BYTES >> 30} GiB of free GPU memory, and {free >> 30} are")
    n_experts, rows, cols = request.param
    assert n_experts * rows * cols > 2**31
    digits = torch.empty(request.param, dtype=torch.int8, device="cuda")
    flat = digits.view(-1, cols)
    torch.manual_seed(rows)
    for part in flat.split((64 << 20) // cols):
        draws = torch.rand(part.shape, device="cuda")
        part.copy_((draws > 0.9425).to(torch.int8) - (draws < 0.0575).to(torch.int8))
    levels = torch.stack([-torch.rand(n_experts, rows) - 0.125, torch.rand(n_experts, rows) + 0.125], -1).bfloat16()
    yield digits, aivf.build(0.0575, 0.885, 0.0575, code_bits=8), levels
    del digits, flat, part
    torch.cuda.empty_cache()


def equal(a, b):
    return all(bool((x == y).all()) for x, y in zip(a.view(-1).split(1 << 30), b.view(-1).split(1 << 30), strict=True))


def test_more_weights_than_32_bits_count(large):
    """Encode, decode and multiply; all products are exact, since each token is a unit vector."""
    from qmoecodec_gpu import encoding, matvec
    from qmoecodec_gpu.experts import Bank, GpuExperts

    digits, dictionary, levels = large
    n_experts, rows, cols = digits.shape
    staged = encoding.encode(digits, dictionary)

    # The last rows, as the codec on the host encodes them.
    some = digits[-1, -5:].cpu().numpy()
    expected = qmoecodec.encode(some, dictionary=dictionary)
    assert (staged.row_lengths[-1, -5:].cpu().numpy() == expected.row_lengths[0]).all()
    assert (staged.codes[-expected.codes.size :].cpu().numpy() == expected.codes).all()

    raw = levels.contiguous().view(torch.uint8).cuda()
    experts = GpuExperts.from_staged(staged, Bank.upload((dictionary,), staged.codes.device), raw, "BF16")
    assert equal(experts.decode(), digits)
    low, high = (levels[..., k, None].cuda() for k in range(2))
    zero = torch.zeros((), dtype=torch.bfloat16, device="cuda")
    dense = experts.decode(dtype=torch.bfloat16)
    for e in {0, n_experts // 2, n_experts - 1}:
        for begin in range(0, rows, 4096):
            at = (e, slice(begin, begin + 4096))
            exact = torch.where(digits[at] < 0, low[at], torch.where(digits[at] > 0, high[at], zero))
            assert torch.equal(dense[at], exact)
    del dense

    rng = np.random.default_rng(1)
    layouts = [experts]
    if experts.layout is not None:
        file_order = GpuExperts.from_staged(staged, experts.bank, raw, "BF16", layout="file")
        assert equal(file_order.decode(), digits)
        layouts.append(file_order)
    every, last = np.arange(n_experts), n_experts - 1
    for layout in layouts:
        # Each expert once; the last one with every class of tokens; all together.
        for numbers in (every, *(np.full(n, last) for n in (1, 2, 4, 8, 64)), np.concatenate([every, np.full(100, last)])):
            columns = rng.integers(0, cols, size=len(numbers))
            columns[-1] = cols - 1
            x = torch.zeros((len(numbers), cols), dtype=torch.bfloat16, device="cuda")
            x[torch.arange(len(numbers)), torch.from_numpy(columns)] = 1
            y = matvec.grouped_matvec(layout, x, torch.from_numpy(numbers).cuda())
            for t, (e, column) in enumerate(zip(numbers.tolist(), columns.tolist(), strict=True)):
                part = digits[e, :, column, None]
                exact = torch.where(part < 0, low[e], torch.where(part > 0, high[e], zero))[:, 0]
                assert torch.equal(y[t], exact), (layout, len(numbers), t)
