"""Careless and hostile callers: one clear error, or the right result."""

import concurrent.futures
import copy
import gc
import pickle

import numpy as np
import pytest

import qmoecodec
from tests.gpu import products

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("cupy", reason="needs CuPy")
pytestmark = pytest.mark.gpu

COUNTS = (1, 3, 12, 70)  # one token, items of few tokens, large items


@pytest.fixture
def gpu():
    from qmoecodec_gpu import backend

    return backend.load()


@pytest.fixture
def some(gpu, case, bank):
    """Make experts of bfloat16 levels, and the data that they come from."""

    def make(shape=(3, 150, 520), *, seed=1, device="cuda", **options):
        data = case(shape, 0.885, bank["8 bit, .885"](), np.random.default_rng(seed))
        return gpu.experts.load(data.encoded, torch.from_numpy(data.levels).bfloat16(), device=device, **options), data

    return make


def draw(n, n_experts, cols, *, device="cuda", dtype=torch.bfloat16):
    """Draw x and expert numbers."""
    return torch.randn(n, cols, device=device).to(dtype), torch.randint(n_experts, (n,), device=device)


def check(y, data, x, numbers):
    """y is the product, within the rounding of 16 bits."""
    products.check(y, torch.from_numpy(data.dense()).to(x.device), x, numbers)


@pytest.mark.parametrize("shape", [(0, 5, 40), (3, 0, 40), (3, 5, 0), (2, 0, 0), (0, 0, 0)], ids=str)
def test_nothing_to_multiply(gpu, some, shape):
    from qmoecodec_gpu import matvec

    n_experts, rows, cols = shape
    for layout in ("auto", "file"):
        experts, _ = some(shape, layout=layout)
        assert experts.decode().shape == shape
        for n in (0, *COUNTS, 600):
            x = torch.randn(n, cols, device="cuda").bfloat16()
            numbers = torch.randint(-1, max(n_experts, 1), (n,), device="cuda")
            for y in (matvec.grouped_matvec(experts, x, numbers), gpu.ops.grouped_matvec(x, numbers, experts)):
                missing = numbers >= n_experts
                assert y.shape == (n, rows)
                assert bool((y[~missing] == 0).all() and y[missing].isnan().all())
            if n_experts:
                assert bool((matvec.matmul(experts, x, n_experts - 1) == 0).all())
        if n_experts:
            y = matvec.matvec(experts, torch.randn(cols, device="cuda").bfloat16(), 0)
            assert y.shape == (rows,) and bool((y == 0).all())


def test_no_tokens(gpu, some):
    from qmoecodec_gpu import matvec

    wi, _ = some((3, 150, 520))
    wo, _ = some((3, 520, 150))
    x, numbers = draw(0, 3, 520)
    assert matvec.grouped_matvec(wi, x, numbers).shape == (0, 150)
    assert matvec.matmul(wi, x, 1).shape == matvec.matmul(wi, x, 1, dense_from=0).shape == (0, 150)
    assert gpu.ops.moe_mlp(x, numbers, wi, wo, scale=torch.rand(0, device="cuda")).shape == (0, 520)


def test_nothing_to_encode(gpu, bank):
    for name in ("8 bit, .885", "12 bit, .885"):
        for shape in ((0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0)):
            dictionary = bank[name]()
            expected = qmoecodec.encode(np.zeros(shape, np.int8), dictionary=dictionary)
            staged = gpu.encoding.encode(torch.zeros(shape, dtype=torch.int8, device="cuda"), dictionary)
            found = gpu.encoding.to_encoded(staged, dictionary)
            for role in ("codes", "code_offsets", "row_lengths", "dictionary_index"):
                assert np.array_equal(getattr(found, role), getattr(expected, role)), (name, shape, role)


def test_digits_of_any_layout(gpu, bank):
    """Views that are not contiguous, or begin anywhere in memory."""
    dictionary = bank["8 bit, .885"]()
    whole = torch.randint(-1, 2, (5, 41, 335), dtype=torch.int8, device="cuda")
    for digits in (
        whole[1:, 3:, 7:],
        whole.transpose(1, 2),
        whole[:1].expand(3, 41, 335),
        whole.flatten()[3 : 3 + 2 * 20 * 320].view(2, 20, 320),
        whole[:, ::2, ::3],
    ):
        expected = qmoecodec.encode(digits.cpu().contiguous().numpy(), dictionary=dictionary)
        found = gpu.encoding.to_encoded(gpu.encoding.encode(digits, dictionary), dictionary)
        assert np.array_equal(found.codes, expected.codes)
        assert np.array_equal(found.row_lengths, expected.row_lengths)
    for wrong in (whole.cpu(), whole.int(), whole[0], whole.bool()):
        with pytest.raises(TypeError, match="int8 CUDA tensor"):
            gpu.encoding.encode(wrong, dictionary)


@pytest.mark.parametrize("layout", ["auto", "file"])
def test_x_anywhere_in_memory(gpu, some, layout):
    """Rows apart, at odd places, or one and the same; y at an odd place."""
    from qmoecodec_gpu import matvec

    experts, data = some(layout=layout)
    for n in COUNTS:
        wide, numbers = draw(n, 3, 1100)
        for x in (wide[:, 1:521], wide[:, 8:528], wide[:1, 3:523].expand(n, 520), wide.view(-1)[5 : 5 + 520 * n].view(n, 520)):
            check(matvec.grouped_matvec(experts, x, numbers), data, x, numbers)
        y = torch.full((n * 150 + 2,), 7.0, dtype=x.dtype, device="cuda")
        largest, least = matvec.choose_sizes((experts, x))
        items = numbers if n == 1 else matvec.route(numbers, n_experts=3, largest=largest, least=least)
        matvec.run(experts, items, x, y[1:-1].view(n, 150))
        check(y[1:-1].view(n, 150), data, x, numbers)
        assert y[[0, -1]].tolist() == [7.0, 7.0]
        with pytest.raises(ValueError, match="contiguous in its last"):
            matvec.grouped_matvec(experts, wide[:, ::2][:, :520], numbers)
        check(matvec.grouped_matvec(experts, x, numbers.repeat_interleave(2)[::2]), data, x, numbers)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_with_its_expert(some, value):
    """Tokens of one expert may be multiplied together; those of others have nothing to do with them."""
    from qmoecodec_gpu import matvec

    for layout in ("auto", "file"):
        experts, _ = some(layout=layout)
        for n in (2, 3, 5, 8, 12, 40, 300):
            x, numbers = draw(n, 3, 520)
            before = matvec.grouped_matvec(experts, x, numbers)
            bad = n // 2
            x[bad] = value
            after = matvec.grouped_matvec(experts, x, numbers)
            assert not bool(after[bad].isfinite().all())
            others = numbers != numbers[bad]
            torch.testing.assert_close(after[others], before[others])


def test_numbers_of_experts(some):
    from qmoecodec_gpu import matvec

    experts, data = some()
    x, _ = draw(4, 3, 520)
    for number in (-1, 3, 1 << 40):
        for call in (lambda e: matvec.matvec(experts, x[0], e), lambda e: matvec.matmul(experts, x, e), experts.decode):
            with pytest.raises(IndexError, match=f"expert {number} of 3"):
                call(number)
    for number in (1.0, 1.5, "1", torch.ones(2, dtype=torch.int64)):
        for call in (lambda e: matvec.matvec(experts, x[0], e), lambda e: matvec.matmul(experts, x, e), experts.decode):
            with pytest.raises(TypeError):
                call(number)
    for number in (np.int64(1), np.uint8(1), torch.tensor(1)):
        check(matvec.matvec(experts, x[0], number)[None], data, x[:1], torch.tensor([1], device="cuda"))
        assert (experts.decode(number).cpu().numpy() == data.digits[1]).all()
    for numbers in (torch.zeros(4, dtype=torch.int32, device="cuda"), torch.zeros(4, dtype=torch.int64), torch.zeros(4, 1)):
        with pytest.raises(TypeError, match="int64 CUDA tensor"):
            matvec.grouped_matvec(experts, x, numbers)
    with pytest.raises(ValueError, match="were routed"):
        matvec.grouped_matvec(experts, x, torch.zeros(3, dtype=torch.int64, device="cuda"))


def test_shapes_of_x(gpu, some):
    from qmoecodec_gpu import matvec

    experts, _ = some()
    numbers = torch.zeros(2, dtype=torch.int64, device="cuda")
    x = torch.zeros(2, 520, dtype=torch.bfloat16, device="cuda")
    for wrong in (x[0, 0], x[0], x[None], x[:, :519], torch.zeros(520, 2, dtype=x.dtype, device="cuda").T[:, :1]):
        with pytest.raises(ValueError, match="shape"):
            matvec.grouped_matvec(experts, wrong, numbers)
    for wrong in (x[0, 0], x, x[:, :260], x[0, :519]):
        with pytest.raises(ValueError, match="shape"):
            matvec.matvec(experts, wrong, 0)
    for wrong in (x.float(), x.double(), x.int(), x.to(torch.complex64)):
        with pytest.raises(TypeError, match="bfloat16 or float16"):
            matvec.grouped_matvec(experts, wrong, numbers)
    with pytest.raises(ValueError, match="on cpu"):
        matvec.moe_mlp(x.cpu(), numbers, experts, some((3, 520, 150))[0])
    with pytest.raises(ValueError, match="do not fit"):
        matvec.moe_mlp(x, numbers, experts, experts)


def test_out_is_checked(some):
    from qmoecodec_gpu import matvec

    experts, _ = some((3, 520, 520))
    x, numbers = draw(4, 3, 520)
    for wrong in (x.new_empty(519), x.new_empty(1, 520), x.new_empty(1040)[::2], x.new_empty(520).half(), torch.empty(520)):
        with pytest.raises(ValueError, match="out must"):
            matvec.matvec(experts, x[0], 0, out=wrong)
    digits = torch.empty(520, 520, dtype=torch.int8, device="cuda")
    for wrong in (digits[:519], digits[None], digits.T, digits.bfloat16(), digits.cpu(), digits[:, ::2]):
        with pytest.raises(ValueError, match="out must"):
            experts.decode(0, out=wrong)
    assert experts.decode(0, out=digits) is digits
    items = matvec.route(numbers, n_experts=3, largest=8)
    for wrong in (x.new_empty(520, 4).T, x.new_empty(3, 520), x.new_empty(4, 520).half(), x.new_empty(1, 520).expand(4, 520)):
        with pytest.raises(ValueError, match="y must"):
            matvec.run(experts, items, x, wrong)


def test_a_product_over_its_input_is_refused(some):
    from qmoecodec_gpu import matvec

    experts, data = some((3, 520, 520))
    held, numbers = draw(9, 3, 520)
    x = held[:4]
    items = matvec.route(numbers[:4], n_experts=3, largest=8)
    for y in (x, held[3:7]):
        with pytest.raises(ValueError, match="y overlaps x"):
            matvec.run(experts, items, x, y)
    with pytest.raises(ValueError, match="out overlaps x"):
        matvec.matvec(experts, x[0], 0, out=x[0])
    with pytest.raises(ValueError, match="scratch overlaps x"):
        square = torch.zeros(520, 520, dtype=x.dtype, device="cuda")
        matvec.matmul(experts, square[100:200], 0, scratch=square)
    matvec.run(experts, items, x, held[4:8])  # beside it
    check(held[4:8], data, x, numbers[:4])


def test_no_gradient(gpu, some):
    from qmoecodec_gpu import matvec

    experts, data = some()
    x, numbers = draw(4, 3, 520)
    x.requires_grad_()
    for call in (
        lambda: matvec.grouped_matvec(experts, x, numbers),
        lambda: matvec.matvec(experts, x[0], 1),
        lambda: matvec.matmul(experts, x, 1),
        lambda: matvec.matmul(experts, x, 1, dense_from=1),
    ):
        with pytest.raises(ValueError, match="no gradient"):
            call()
    with torch.no_grad():
        check(matvec.grouped_matvec(experts, x, numbers), data, x, numbers)
    y = gpu.ops.grouped_matvec(x, numbers, experts)
    check(y.detach(), data, x.detach(), numbers)
    with pytest.raises(RuntimeError, match="autograd"):
        y.sum().backward()


def test_routes_are_checked(some):
    from qmoecodec_gpu import matvec

    experts, _ = some()
    x, numbers = draw(300, 3, 520)
    for largest in (-1, 0, 3, 7, 9):
        with pytest.raises(ValueError, match=f"not {largest}"):
            matvec.route(numbers, n_experts=3, largest=largest)
    with pytest.raises(ValueError, match="cannot be routed"):
        matvec.route(numbers, n_experts=-1, largest=8)
    for least in (0, 4, 10):
        with pytest.raises(ValueError, match=f"not {least}"):
            matvec.route(numbers, n_experts=3, largest=128, least=least)
    y = matvec.empty_y(experts, x)
    general, _ = some(layout="file")
    with pytest.raises(ValueError, match="items of 128 tokens"):
        matvec.run(general, matvec.route(numbers, n_experts=3, largest=128), x, y)
    with pytest.raises(ValueError, match="were routed"):
        matvec.run(experts, matvec.route(numbers, n_experts=4, largest=8), x, y)


def test_more_products_than_one_launch_counts(some):
    from qmoecodec_gpu import matvec

    experts, _ = some((1, 40000, 16))
    x = torch.ones(1, 16, dtype=torch.bfloat16, device="cuda").expand((1 << 31) // 40000 + 1, 16)
    with pytest.raises(ValueError, match="too many for one launch"):
        matvec.grouped_matvec(experts, x, torch.zeros(len(x), dtype=torch.int64, device="cuda"))
    torch.cuda.empty_cache()


@pytest.mark.parametrize("size", [1e5, 1e-9])
def test_levels_beyond_the_type_of_x(gpu, case, bank, size):
    """bfloat16 levels that float16 does not hold: decoding for a dense product would lose them."""
    from qmoecodec_gpu import matvec

    data = case((2, 40, 520), 0.885, bank["8 bit, .885"](), np.random.default_rng(3))
    levels = torch.tensor([-size, size]).bfloat16().expand(2, 40, 2)
    experts = gpu.experts.load(data.encoded, levels)
    assert experts.fit(torch.bfloat16) and not experts.fit(torch.float16)
    x = (torch.randn(100, 520, device="cuda") / size).clamp(-1e4, 1e4).half()
    exact = x.double() @ (torch.from_numpy(data.digits[1]).cuda().double() * float(levels[0, 0, 1])).T
    for n in (3, 60, 100):
        y = matvec.matmul(experts, x[:n], 1).double()
        assert float((y - exact[:n]).norm() / exact[:n].norm()) < 4e-3


def test_dropped_while_a_stream_reads_them(some):
    from qmoecodec_gpu import matvec

    x, numbers = draw(12, 3, 1100)
    side = torch.cuda.Stream()
    for wait in (0, 200_000_000):  # the first time, kernels are compiled
        experts, data = some((3, 400, 1100))
        sizes = [t.nbytes for t in (experts.codes, experts.row_start, experts.levels, experts.bank.entries)]
        matvec.grouped_matvec(experts, x, numbers)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(wait + 1)
            y = matvec.grouped_matvec(experts, x, numbers)
            one = experts.decode(1)
        del experts
        gc.collect()
        others = [torch.full((n,), 0xFF, dtype=torch.uint8, device="cuda") for n in sizes for _ in range(4)]
        torch.cuda.synchronize()
        check(y, data, x, numbers)
        assert (one.cpu().numpy() == data.digits[1]).all()
        del others


def test_loaded_on_another_stream(some):
    """What `load` returns is ready for every stream."""
    from qmoecodec_gpu import matvec

    x, numbers = draw(12, 3, 1100)
    side = torch.cuda.Stream()
    for _ in range(5):
        with torch.cuda.stream(side):
            experts, data = some((3, 400, 1100))
        check(matvec.grouped_matvec(experts, x, numbers), data, x, numbers)


def test_threads(some):
    """First and later products of the same experts in several threads, each with a stream."""
    from qmoecodec_gpu import matvec

    def work(experts, data, n):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(5):
                x, numbers = draw(n, 3, 520)
                check(matvec.grouped_matvec(experts, x, numbers), data, x, numbers)
                assert (experts.decode(1).cpu().numpy() == data.digits[1]).all()

    for layout in ("auto", "file"):
        experts, data = some(layout=layout)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(work, experts, data, n) for n in (1, 2, 5, 12, 40, 70, 1, 600)]:
                done.result()


def test_threads_encode(gpu, case, bank):
    data = [case((2, 30, 700), 0.885, build(), np.random.default_rng(n)) for n, build in enumerate(bank.values())]

    def work(one):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(4):
                dictionary = copy.copy(one.encoded.dictionaries[0])  # another object, and more of them than are kept
                staged = gpu.encoding.encode(torch.from_numpy(one.digits).cuda(), dictionary)
                assert np.array_equal(gpu.encoding.to_encoded(staged, dictionary).codes, one.encoded.codes)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work, one) for one in data]:
            done.result()


@pytest.mark.parametrize("n", COUNTS)
def test_first_use_in_a_graph_is_refused(some, n):
    from qmoecodec_gpu import matvec

    experts, data = some()
    x, numbers = draw(n, 3, 520)
    with pytest.raises(RuntimeError, match="run the same once before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        x = x + 0
        matvec.grouped_matvec(experts, x, numbers)
    x, numbers = draw(n, 3, 520)
    check(matvec.grouped_matvec(experts, x, numbers), data, x, numbers)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = matvec.grouped_matvec(experts, x, numbers)
    x.copy_(torch.randn(n, 520))
    graph.replay()
    check(y, data, x, numbers)


def test_no_copies(some):
    experts, _ = some()
    for make in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            make(experts)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled(gpu, some):
    """Layers with other experts and other numbers of tokens, through the same compiled function."""
    torch._dynamo.reset()

    def work(x, numbers, experts):
        return gpu.ops.grouped_matvec(x * 2, numbers, experts) + 1

    compiled = torch.compile(work, backend="aot_eager", fullgraph=True)
    layers = [some(seed=seed)[0] for seed in range(3)]
    for n in (5, 9, 70):
        for experts in layers:
            x, numbers = draw(n, 3, 520)
            torch.testing.assert_close(compiled(x, numbers, experts), work(x, numbers, experts))


def test_operators_say_what_is_wrong(gpu, some):
    experts, _ = some()
    x, numbers = draw(4, 3, 520)
    with pytest.raises(TypeError, match="int64 CUDA tensor"):
        gpu.ops.grouped_matvec(x, numbers.cpu(), experts)
    with pytest.raises(NotImplementedError, match="CPU"):
        gpu.ops.grouped_matvec(x.cpu(), numbers.cpu(), experts)
    handle = experts.handle
    del experts
    gc.collect()
    for wrong in (handle, -1, 1 << 50):
        with pytest.raises(KeyError, match=f"handle {wrong} are gone"):
            torch.ops.qmoecodec.grouped_matvec(x, numbers, wrong)


def test_what_cannot_be_loaded(gpu, case, bank):
    data = case((2, 8, 40), 0.885, bank["8 bit, .885"](), np.random.default_rng(17))
    for device in ("cpu", "meta"):
        with pytest.raises(ValueError, match="to a CUDA device"):
            gpu.experts.load(data.encoded, data.levels, device=device)
    with pytest.raises(TypeError, match="levels are needed"):
        gpu.experts.load(data.encoded)
    with pytest.raises(TypeError, match="not a list"):
        gpu.experts.load(data.encoded, data.levels.tolist())
    with pytest.raises(ValueError, match="layout"):
        gpu.experts.load(data.encoded, data.levels, layout="fast")
    dense = torch.from_numpy(data.dense()[1]).cuda()
    levels = torch.from_numpy(data.levels)
    for given in (data.levels.astype(">f4"), levels.cuda(), levels.clone().requires_grad_()):
        found = gpu.experts.load(data.encoded, given).decode(1, dtype=torch.bfloat16)
        assert bool((found.double() == dense).all())


def test_the_file_may_be_gone(gpu, case, bank, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy", reason="needs safetensors")
    from qmoecodec_gpu import matvec

    data = case((2, 24, 160), 0.885, bank["8 bit, .885"](), np.random.default_rng(19))
    dense = data.dense().astype(np.float32)
    safetensors.save_file({f"experts.{e}.w": dense[e] for e in range(2)}, tmp_path / "model.safetensors")
    for options in ({}, {"code_bits": 12}):
        path = tmp_path / "packed.safetensors"
        qmoecodec.pack(tmp_path / "model.safetensors", path, **options)
        with qmoecodec.open(path) as file:
            (name,) = list(file)
            loaded = [gpu.experts.load(file[name], recode=recode) for recode in (False, True)]
            with pytest.raises(qmoecodec.FormatError, match="role_dtype"):
                gpu.experts.load(file[name], dtype="BF16")
        path.unlink()
        for experts in loaded:
            for n in COUNTS:
                x, numbers = draw(n, 2, 160)
                check(matvec.grouped_matvec(experts, x, numbers), data, x, numbers)
            assert bool((experts.decode(dtype=torch.bfloat16).cpu().double().numpy() == data.dense()).all())


def test_another_device_is_current(gpu, some):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    from qmoecodec_gpu import matvec

    assert torch.cuda.current_device() == 0
    wi, data = some((3, 150, 520), device="cuda:1")
    wo, _ = some((3, 520, 150), device="cuda:1")
    assert wi.device == torch.device("cuda", 1)
    for n in (*COUNTS, 600):
        x, numbers = draw(n, 3, 520, device="cuda:1")
        check(matvec.grouped_matvec(wi, x, numbers), data, x, numbers)
        check(matvec.matmul(wi, x, 2), data, x, torch.full((n,), 2, device="cuda:1"))
        assert gpu.ops.moe_mlp(x, numbers, wi, wo).device == wi.device
        with pytest.raises(ValueError, match="cuda:0"):
            matvec.grouped_matvec(wi, x.to("cuda:0"), numbers)
        with pytest.raises(ValueError, match="routed"):
            matvec.grouped_matvec(wi, x, numbers.to("cuda:0"))
    with pytest.raises(ValueError, match="wi is on"):
        matvec.moe_mlp(x, numbers, wi, some((3, 520, 150))[0])
    digits = torch.from_numpy(data.digits).to("cuda:1")
    staged = gpu.encoding.encode(digits, data.encoded.dictionaries[0])
    assert np.array_equal(staged.codes.cpu().numpy(), data.encoded.codes)
    assert torch.equal(wi.decode(), digits)
    assert torch.cuda.current_device() == 0
