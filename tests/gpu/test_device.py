"""Decoding, encoding and products on the device, against the codec and float64."""

import dataclasses
import gc
import itertools

import numpy as np
import pytest

import qmoecodec
from qmoecodec import reference

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("cupy", reason="needs CuPy")
pytestmark = pytest.mark.gpu

SHAPES = [(1, 1, 1), (3, 5, 7), (2, 33, 64), (4, 17, 1031), (2, 40, 3072), (1, 3, 9000), (1, 2, 24001), (2, 64, 768)]


@pytest.fixture
def gpu():
    from qmoecodec_gpu import backend

    return backend.load()


def poisoned(shape, dtype):
    """A tensor of NaN with guards around it, and a function that says whether the guards are whole."""
    n = int(np.prod(shape))
    whole = torch.full((n + 512,), float("nan"), dtype=dtype, device="cuda")
    whole[:256] = whole[-256:] = 7.0
    return whole[256 : 256 + n].view(shape), lambda: bool((whole[:256] == 7).all() and (whole[-256:] == 7).all())


def check_product(y, dense, x, experts):
    """y[t] within the rounding of 16-bit output and float32 sums of the float64 product."""
    y = y.double().cpu().numpy()
    x = x.double().cpu().numpy()
    eps = 2.0**-8
    for t, e in enumerate(experts):
        exact = dense[e] @ x[t]
        bound = eps * np.abs(exact) + 1e-5 * (np.abs(dense[e]) @ np.abs(x[t])) + 1e-6
        assert np.isfinite(y[t]).all()
        assert (np.abs(y[t] - exact) <= bound).all(), (t, e, float(np.abs(y[t] - exact).max()))


def multiply(experts, x, numbers):
    from qmoecodec_gpu import matvec

    y, whole = poisoned((len(numbers), experts.shape[1]), x.dtype)
    routed = torch.tensor(numbers, dtype=torch.int64, device="cuda")
    largest, least = matvec.choose_sizes((experts, x))
    items = matvec.route(routed, n_experts=experts.shape[0], largest=largest, least=least)
    matvec.run(experts, items, x, y)
    torch.cuda.synchronize()
    assert whole()
    return y


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_dictionary_any_shape(gpu, case, dictionary, shape):
    rng = np.random.default_rng(hash((shape, dictionary.threshold, dictionary.code_bits)) % 2**32)
    data = case(shape, 0.885, dictionary, rng)
    dense = data.dense()
    # The kernels for large items take levels of x's type alone; these are exact in all three.
    levels = torch.from_numpy(data.levels)
    for layout, kept in (("auto", levels), ("auto", levels.bfloat16()), ("auto", levels.half()), ("file", levels)):
        experts = gpu.experts.load(data.encoded, kept, layout=layout)
        assert (experts.decode().cpu().numpy() == data.digits).all()
        last = shape[0] - 1
        assert (experts.decode(last, dtype=torch.bfloat16).double().cpu().numpy() == dense[last]).all()
        assert (experts.decode(last, dtype=torch.float16).float().cpu().numpy() == dense[last].astype(np.float16)).all()
        for dtype in (torch.bfloat16, torch.float16):
            for n in (1, 2, 3, 7) if dtype != kept.dtype else (19, 45, 150, 700):
                numbers = rng.integers(shape[0], size=n).tolist()
                x = torch.from_numpy(rng.standard_normal((n, shape[2]))).to("cuda", dtype)
                check_product(multiply(experts, x, numbers), dense, x, numbers)


def test_which_kernel_runs(gpu, case, bank):
    """The fast kernel where it fits, and nowhere else."""
    rng = np.random.default_rng(5)
    for name, shape, fast in (
        ("8 bit, .885", (1, 4, 6144), True),
        ("8 bit, .885", (1, 4, 18000), True),  # natural order
        ("8 bit, .885", (1, 4, 70000), False),
        ("8 bit, 1/3", (1, 4, 512), True),
        ("8 bit, .99", (1, 4, 512), False),
        ("12 bit, .885", (1, 4, 512), False),
    ):
        data = case(shape, 0.885, bank[name](), rng)
        experts = gpu.experts.load(data.encoded, data.levels)
        assert (experts.gather_plan(1) is not None) == fast, name


def test_recode(gpu, case, bank):
    rng = np.random.default_rng(6)
    data = case((3, 20, 600), 0.885, bank["16 bit, qmoe-2023"](), rng)
    experts = gpu.experts.load(data.encoded, data.levels, recode=True)
    assert experts.code_bits == 8
    assert experts.gather_plan(1) is not None
    assert (experts.decode().cpu().numpy() == data.digits).all()


def test_several_dictionaries(gpu, case, bank):
    rng = np.random.default_rng(7)
    several = [bank[name]() for name in ("8 bit, .80", "8 bit, .95", "8 bit, .50")]
    parts = [case((1, 24, 1500), p, several, rng) for p in (0.8, 0.95, 0.5, 0.82)]
    digits = np.concatenate([p.digits for p in parts])
    levels = np.concatenate([p.levels for p in parts])
    encoded = qmoecodec.encode(digits, dictionary=several)
    assert len(set(encoded.dictionary_index.tolist())) == 3
    experts = gpu.experts.load(encoded, levels)
    dense = dataclasses.replace(parts[0], digits=digits, levels=levels).dense()
    for numbers in ([0, 1, 2, 3], [2, 2, 2, 1, 0, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1]):
        x = torch.from_numpy(rng.standard_normal((len(numbers), 1500))).to("cuda", torch.bfloat16)
        check_product(multiply(experts, x, numbers), dense, x, numbers)


def test_mixed_bank(gpu, case, bank):
    """A bank with dictionaries of other groups, and a file from end to end."""
    rng = np.random.default_rng(18)
    data = case((3, 20, 300), 0.885, bank["8 bit, .885"](), rng)
    others = (bank["12 bit, .885"](), *data.encoded.dictionaries, bank["16 bit, qmoe-2023"]())
    mixed = dataclasses.replace(data.encoded, dictionaries=others, dictionary_index=np.ones(3, np.uint8))
    experts = gpu.experts.load(mixed, data.levels)
    assert (experts.decode().cpu().numpy() == data.digits).all()


def test_file(gpu, case, bank, tmp_path):
    """Pack, open, load: the group alone says all."""
    safetensors = pytest.importorskip("safetensors.numpy", reason="needs safetensors")
    data = case((2, 24, 160), 0.885, bank["8 bit, .885"](), np.random.default_rng(19))
    dense = data.dense().astype(np.float32)
    safetensors.save_file({f"experts.{e}.w": dense[e] for e in range(2)}, tmp_path / "model.safetensors")
    qmoecodec.pack(tmp_path / "model.safetensors", tmp_path / "packed.safetensors")
    with qmoecodec.open(tmp_path / "packed.safetensors") as file:
        for name in file:
            experts = gpu.experts.load(file[name])
            assert (experts.decode().cpu().numpy() == file[name].decode().reshape(experts.shape)).all()


@pytest.mark.parametrize("part", range(20))
def test_random_tensors(gpu, bank, part):
    """1,000 tensors: encode on the device = the codec; decode = the digits; every fifth multiplied."""
    rng = np.random.default_rng(800 + part)
    dictionaries = [build() for build in bank.values()]
    for number in range(50 * part, 50 * part + 50):
        dictionary = dictionaries[number % len(dictionaries)]
        shape = (int(rng.integers(1, 4)), int(rng.integers(1, 40)), int(np.exp(rng.uniform(0, np.log(3000)))))
        # Rows of one tensor differ in density, so their lengths differ.
        p_zero = rng.choice([0.3, 0.6, 0.85, 0.885, 0.97, 1.0], size=(shape[0], shape[1], 1))
        draws = rng.random(shape)
        digits = np.where(draws < p_zero, 0, np.where(draws < (1 + p_zero) / 2, -1, 1)).astype(np.int8)
        on_device = torch.from_numpy(digits).cuda()
        staged = gpu.encoding.encode(on_device, dictionary)
        encoded = gpu.encoding.to_encoded(staged, dictionary)
        expected = qmoecodec.encode(digits, dictionary=dictionary)
        assert (encoded.codes == expected.codes).all()
        assert (encoded.row_lengths == expected.row_lengths).all()
        assert (encoded.code_offsets == expected.code_offsets).all()
        if part == 0 and number < len(dictionaries):
            row = [{0: 0, 1: 2, -1: 1}[d] for d in digits[0, 0].tolist()]
            packed = reference.pack_row(reference.encode_row(row, dictionary), code_bits=dictionary.code_bits)
            assert encoded.codes[: len(packed)].tobytes() == packed
        levels = torch.stack([-torch.rand(shape[:2]) - 0.125, torch.rand(shape[:2]) + 0.125], -1).bfloat16()
        experts = gpu.experts.load(expected, levels, layout="auto" if number % 4 else "file")
        assert (experts.decode() == on_device).all()
        if number % 5:
            continue
        n = int(rng.integers(1, 12))
        numbers = rng.integers(shape[0], size=n).tolist()
        x = torch.randn(n, shape[2], device="cuda").bfloat16()
        low, high = levels[..., :1].double().numpy(), levels[..., 1:].double().numpy()
        dense = np.where(digits < 0, low, np.where(digits > 0, high, 0.0))
        check_product(multiply(experts, x, numbers), dense, x, numbers)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_level_dtypes(gpu, case, bank, dtype):
    rng = np.random.default_rng(9)
    data = case((2, 30, 700), 0.885, bank["8 bit, .885"](), rng)
    types = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
    levels = torch.from_numpy(data.levels).to(types[dtype])
    dense = data.dense()
    x = torch.randn(3, 700, device="cuda").bfloat16()
    for layout in ("auto", "file"):
        experts = gpu.experts.load(data.encoded, levels, layout=layout)
        check_product(multiply(experts, x, [0, 1, 0]), dense, x, [0, 1, 0])


def damage(encoded, levels, rng):
    """Break one thing somewhere."""
    parts = {
        name: getattr(encoded, name).copy() for name in ("codes", "code_offsets", "row_lengths", "dictionary_index")
    }
    levels = levels.copy()
    kind = rng.integers(7)
    flat = parts["codes"]
    if kind <= 1:
        flat[rng.integers(flat.size)] ^= np.uint8(1 << rng.integers(8))
    elif kind == 2:
        at = rng.integers(flat.size)
        flat[at : at + 8] = rng.integers(256, size=flat[at : at + 8].size)
    elif kind == 3:
        parts["row_lengths"].reshape(-1)[rng.integers(parts["row_lengths"].size)] = rng.choice([0, 1, 2**31, 2**32 - 1])
    elif kind == 4:
        lengths = parts["row_lengths"].reshape(-1)
        i, j = rng.integers(lengths.size, size=2)
        if lengths[i]:
            lengths[i] -= 1
            lengths[j] += 1
    elif kind == 5:
        parts["code_offsets"][rng.integers(parts["code_offsets"].size)] = (0, 1, 2**63, 2**64 - 1)[rng.integers(4)]
    else:
        levels.reshape(-1)[rng.integers(levels.size)] = rng.choice([np.nan, np.inf, -0.0, 0.0, 3.0])
    return dataclasses.replace(encoded, **parts), levels


def reference_verdict(encoded, levels):
    """Raise what the reference finds first, in the order of spec §9."""
    from qmoecodec_gpu import loading, source

    unknown = None
    try:
        source.check_stack(encoded)
    except qmoecodec.FormatError as error:
        if error.reason != "dictionary_index" or "expert" not in error.where:
            raise
        unknown = error
    experts, rows, cols = encoded.shape
    for e in range(experts):
        if unknown and unknown.where["expert"] == e:
            raise unknown
        dictionary = encoded.dictionaries[encoded.dictionary_index[e]]
        lengths = [int(n) for n in encoded.row_lengths[e]]
        ends = np.cumsum([(n * dictionary.code_bits + 7) // 8 for n in lengths]).tolist()
        at, end = int(encoded.code_offsets[e]), int(encoded.code_offsets[e + 1])
        if ends[-1] != end - at:
            raise qmoecodec.FormatError("row_lengths", expert=e)
        if rows * cols > dictionary.max_phrase * sum(lengths):
            raise qmoecodec.FormatError("row_underrun", expert=e)
        found = {}
        for r in range(rows):
            pair = (float(levels[e, r, 0]), float(levels[e, r, 1]))
            data = encoded.codes[at + (ends[r - 1] if r else 0) : at + ends[r]].tobytes()
            try:
                loading.check_row(data, lengths[r], pair, cols, dictionary)
            except qmoecodec.FormatError as error:
                stage = {"level_value": 0, "level_zero": 2}.get(error.reason, 1)
                found.setdefault(stage, error.at(expert=e, row=r))
        if found:
            raise found[min(found)]


def test_damage_is_found(gpu, case, bank, guarded):
    """Whatever is broken: the same verdict, reason and place as the reference, and no kernel leaves its buffers."""
    rng = np.random.default_rng(10)
    verdicts = {}
    for name in ("8 bit, .885", "8 bit, .80", "8 bit, table", "12 bit, .885", "16 bit, .885"):
        data = case((3, 6, 200), 0.885, bank[name](), rng)
        for _ in range(60):
            encoded, levels = data.encoded, data.levels
            for _ in range(rng.integers(1, 4)):
                encoded, levels = damage(encoded, levels, rng)
            expected = found = None
            try:
                reference_verdict(encoded, levels)
            except qmoecodec.FormatError as error:
                expected = error
            try:
                experts = gpu.experts.load(encoded, levels)
            except qmoecodec.FormatError as error:
                found = error
            else:
                y = multiply(experts, torch.randn(2, 200, device="cuda").bfloat16(), [0, 1])
                assert bool(y.isfinite().all())
            assert (found and (found.reason, found.where)) == (expected and (expected.reason, expected.where))
            verdicts[expected and expected.reason] = verdicts.get(expected and expected.reason, 0) + 1
    assert len(guarded) > 200
    assert len(verdicts) >= 7, verdicts


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_levels_of_every_kind(gpu, case, bank, dtype):
    """What is a level and what is not, subnormal numbers and the largest ones included: as on the host."""
    data = case((1, 6, 100), 0.885, bank["8 bit, .885"](), np.random.default_rng(21))
    digits = data.digits.copy()
    digits[0, :2] = np.minimum(digits[0, :2], 0)  # no high level is needed there
    encoded = qmoecodec.encode(digits, dictionary=bank["8 bit, .885"]())
    info = torch.finfo(getattr(torch, dtype))
    least = {"bfloat16": 2.0**-133, "float16": 2.0**-24, "float32": 2.0**-149, "float64": 2.0**-1074}[dtype]
    values = [0.0, -0.0, least, -least, info.tiny, -info.tiny, 1.0, -1.0, info.max, info.min, np.inf, -np.inf, np.nan]
    seen = set()
    for row in (0, 2):
        for low in values:
            for high in values:
                levels = torch.tensor([[[-1.0, 1.0]] * 6], dtype=torch.float64)
                levels[0, row] = torch.tensor([low, high], dtype=torch.float64)
                levels = levels.to(getattr(torch, dtype))
                expected = found = None
                try:
                    reference_verdict(encoded, levels.double().numpy())
                except qmoecodec.FormatError as error:
                    expected = (error.reason, error.where)
                try:
                    experts = gpu.experts.load(encoded, levels)
                except qmoecodec.FormatError as error:
                    found = (error.reason, error.where)
                else:
                    pair = levels[0, row].float().bfloat16()
                    exact = torch.where(torch.from_numpy(digits[0, row]) < 0, pair[0], pair[1])
                    exact = torch.where(torch.from_numpy(digits[0, row]) == 0, torch.zeros_like(pair[0]), exact)
                    assert torch.equal(experts.decode(0, dtype=torch.bfloat16)[row].cpu(), exact)
                assert found == expected, (row, low, high)
                seen.add(expected and expected[0])
    assert seen == {None, "level_value", "level_zero"}


def test_dropped_and_missing_experts(gpu, case, bank):
    data = case((3, 50, 400), 0.885, bank["8 bit, .885"](), np.random.default_rng(11))
    for layout in ("auto", "file"):
        experts = gpu.experts.load(data.encoded, data.levels, layout=layout)
        x = torch.randn(6, 400, device="cuda").bfloat16()
        y = multiply(experts, x, [-1, 0, 3, 2, -7, 1])
        assert bool((y[0] == 0).all())
        assert bool(y[2].isnan().all())
        assert bool(y[4].isnan().all())
        check_product(y[[1, 3, 5]], data.dense(), x[[1, 3, 5]], [0, 2, 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["auto", "file"])
def test_one_token_in_a_graph(gpu, case, bank, dtype, layout):
    """A single token is not routed: the kernels read its expert's number, which another replay changes."""
    from qmoecodec_gpu import matvec

    rng = np.random.default_rng(21)
    one, two = case((4, 150, 70), 0.885, bank["8 bit, .885"](), rng), case((4, 70, 150), 0.885, bank["8 bit, .885"](), rng)
    wi = gpu.experts.load(one.encoded, one.levels, layout=layout)
    wo = gpu.experts.load(two.encoded, two.levels, layout=layout)
    x = torch.randn(1, 70, device="cuda").to(dtype)
    number = torch.zeros(1, dtype=torch.int64, device="cuda")
    scale = torch.rand(1, device="cuda")

    def work():
        return matvec.grouped_matvec(wi, x, number), matvec.moe_mlp(x, number, wi, wo, scale=scale)

    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hidden, y = work()
    for e in (2, -1, 0, 4, 3, -2, 1 << 40, -(1 << 33), (1 << 32) + 1, 1):
        x.copy_(torch.randn(1, 70))
        number.fill_(e)
        hidden.fill_(7.0)
        y.fill_(7.0)
        graph.replay()
        torch.cuda.synchronize()
        if e == -1:
            assert bool((hidden == 0).all() and (y == 0).all())
        elif not 0 <= e < 4:
            assert bool(hidden.isnan().all() and y.isnan().all())
        else:
            check_product(hidden, one.dense(), x, [e])
            inner = hidden.relu()
            exact = two.dense()[e] @ inner[0].double().cpu().numpy() * float(scale)
            assert np.abs(y[0].double().cpu().numpy() - exact).max() <= 1e-2 * np.abs(exact).max()


@pytest.mark.parametrize("captured", [False, True])
def test_early_start_waits(gpu, case, bank, captured):
    """A product begins while what was queued before it runs, but sees all that it writes: kernels, copies, other streams."""
    from qmoecodec_gpu import matvec

    data = case((3, 500, 1500), 0.885, bank["8 bit, .885"](), np.random.default_rng(22))
    back = case((3, 1500, 500), 0.885, bank["8 bit, .885"](), np.random.default_rng(23))
    wi, wo = gpu.experts.load(data.encoded, data.levels), gpu.experts.load(back.encoded, back.levels)
    source = torch.zeros(1, 1500, device="cuda").bfloat16()
    number = torch.zeros(1, dtype=torch.int64, device="cuda")
    side = torch.cuda.Stream()

    def work():
        x = source.clone()
        found = []
        for _ in range(20):
            e = (number + 0) % 3
            x = matvec.moe_mlp(x, e, wi, wo)  # after kernels that write x and e
            x = x / x.abs().max()
            number.add_(1)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                late = x.float().cos().sin().mul(1).to(x.dtype)
            torch.cuda.current_stream().wait_stream(side)
            h = matvec.grouped_matvec(wi, late, e)  # after another stream
            copy = torch.empty_like(h)
            copy.copy_(h)
            found.append((late, e, h, copy, matvec.grouped_matvec(wo, copy, e)))  # after a copy
        return found

    if captured:
        work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = work()
        for first in (1, 2):
            source.copy_(torch.randn(1, 1500))
            number.fill_(first)
            graph.replay()
    else:
        source.copy_(torch.randn(1, 1500))
        found = work()
    torch.cuda.synchronize()
    for late, e, h, copy, y in found:
        assert bool((copy == h).all())
        check_product(h, data.dense(), late, e.tolist())
        check_product(y, back.dense(), copy, e.tolist())


@pytest.mark.parametrize("n_tokens", [1, 2, 5, 64, 511, 513, 3000])
def test_routing(gpu, n_tokens):
    from qmoecodec_gpu import matvec

    rng = np.random.default_rng(n_tokens)
    expert = rng.integers(-1, 9, size=n_tokens)
    for largest, least in ((1, 2), (2, 3), (4, 5), (8, 9), (64, 9), (128, 9), (128, 5)):
        found = matvec.route(torch.from_numpy(expert).cuda(), n_experts=8, largest=largest, least=least)
        assert int(found.n_items[4]) <= found.max_large
        slots, firsts, counts = found.item_tokens[4].split([6 * n_tokens, n_tokens, n_tokens])
        seen, taken = [], []
        for number in range(5):
            size = 1 << number if number < 4 else largest
            for i in range(int(found.n_items[number])):
                e = int(found.item_expert[number, i])
                if number < 4:
                    tokens = [t for t in found.item_tokens[number, size * i : size * (i + 1)].tolist() if t >= 0]
                else:
                    first, count = int(firsts[i]), int(counts[i])
                    assert first % 8 == 0
                    taken += range(first, first + -(-count // 8) * 8)
                    tokens = slots[first : first + count].tolist()
                assert (size // 2 if number < 4 else least - 1) < len(tokens) <= size <= (largest if number == 4 else least - 1)
                want = -1 if e == -1 else 8 if e == -2 else e
                assert (expert[tokens] == want).all()
                seen += tokens
            if n_tokens > 600 and number == 0:
                break
        if n_tokens <= 600:
            assert sorted(seen) == list(range(n_tokens))
            assert len(taken) == len(set(taken)) == int(found.n_items[5]) <= n_tokens + 7 * found.max_large
            assert int(found.n_items[4]) <= found.max_large


def test_mlp_in_a_graph(gpu, case, bank):
    """The whole expert block captured once, replayed with other tokens and another routing."""
    rng = np.random.default_rng(12)
    one, two = case((5, 96, 64), 0.85, bank["8 bit, .80"](), rng), case((5, 64, 96), 0.85, bank["8 bit, .80"](), rng)
    wi, wo = gpu.experts.load(one.encoded, one.levels), gpu.experts.load(two.encoded, two.levels)
    x = torch.randn(9, 64, device="cuda").bfloat16()
    expert = torch.zeros(9, dtype=torch.int64, device="cuda")
    scale = torch.rand(9, device="cuda")
    gpu.ops.moe_mlp(x, expert, wi, wo, scale=scale)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = gpu.ops.moe_mlp(x, expert, wi, wo, scale=scale)
    for _ in range(5):
        numbers = rng.integers(5, size=9)
        x.copy_(torch.randn(9, 64))
        expert.copy_(torch.from_numpy(numbers))
        y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        hidden = np.maximum(np.einsum("trc,tc->tr", one.dense()[numbers], x.double().cpu().numpy()), 0)
        exact = np.einsum("trc,tc->tr", two.dense()[numbers], hidden) * scale.double().cpu().numpy()[:, None]
        assert np.linalg.norm(y.double().cpu().numpy() - exact) <= 1e-2 * np.linalg.norm(exact)
        assert bool(y.isfinite().all())


def test_operators(gpu, case, bank):
    data = case((3, 32, 48), 0.85, bank["8 bit, .80"](), np.random.default_rng(13))
    back = case((3, 48, 32), 0.85, bank["8 bit, .80"](), np.random.default_rng(14))
    wi, wo = gpu.experts.load(data.encoded, data.levels), gpu.experts.load(back.encoded, back.levels)
    x = torch.randn(4, 48, device="cuda").bfloat16()
    expert = torch.tensor([0, 2, 2, 1], device="cuda")
    scale = torch.rand(4, device="cuda")
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.qmoecodec.grouped_matvec, (x, expert, wi.handle), test_utils=tests)
    torch.library.opcheck(torch.ops.qmoecodec.moe_mlp, (x, expert, scale, wi.handle, wo.handle), test_utils=tests)
    handle = wi.handle
    del wi
    gc.collect()
    with pytest.raises(KeyError):
        torch.ops.qmoecodec.grouped_matvec(x, expert, handle)


def test_streams(gpu, case, bank):
    """Work goes to torch's current stream."""
    data = case((2, 64, 512), 0.885, bank["8 bit, .885"](), np.random.default_rng(15))
    experts = gpu.experts.load(data.encoded, data.levels)
    stream = torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000)
            x = torch.randn(2, 512, device="cuda").bfloat16()
            y = gpu.ops.grouped_matvec(x, torch.tensor([0, 1], device="cuda"), experts)
        stream.synchronize()
        check_product(y, data.dense(), x, [0, 1])


def test_one_expert_many_tokens(gpu, case, bank):
    from qmoecodec_gpu import matvec

    data = case((2, 130, 1000), 0.885, bank["8 bit, .885"](), np.random.default_rng(16))
    experts = gpu.experts.load(data.encoded, torch.from_numpy(data.levels).bfloat16())
    for n, dense_from in itertools.product((1, 5, 16, 40, 127, 128, 200, 300), (1, 1000)):
        x = torch.randn(n, 1000, device="cuda").bfloat16()
        y = matvec.matmul(experts, x, 1, dense_from=dense_from)
        exact = x.double() @ torch.from_numpy(data.dense()[1]).cuda().T
        assert float((y.double() - exact).norm() / exact.norm()) < 4e-3
    x = torch.randn(1000, device="cuda").bfloat16()
    check_product(matvec.matvec(experts, x, 0)[None], data.dense(), x[None], [0])


def test_wrong_arguments(gpu, case, bank):
    from qmoecodec_gpu import matvec

    data = case((2, 8, 40), 0.885, bank["8 bit, .885"](), np.random.default_rng(17))
    experts = gpu.experts.load(data.encoded, data.levels)
    good = torch.zeros(1, 40, dtype=torch.bfloat16, device="cuda")
    expert = torch.zeros(1, dtype=torch.int64, device="cuda")
    with pytest.raises(TypeError, match="bfloat16"):
        matvec.grouped_matvec(experts, good.float(), expert)
    with pytest.raises(ValueError, match="shape"):
        matvec.grouped_matvec(experts, good[:, :39], expert)
    with pytest.raises(ValueError, match="on cpu"):
        matvec.grouped_matvec(experts, good.cpu(), expert)
    with pytest.raises(TypeError, match="int64"):
        matvec.grouped_matvec(experts, good, expert.int())
    with pytest.raises(ValueError, match="routed"):
        matvec.grouped_matvec(experts, good, expert.repeat(2))
    with pytest.raises(ValueError, match="routed"):
        matvec.run(experts, expert.repeat(2), good.repeat(2, 1), good.repeat(2, 1))
    with pytest.raises(TypeError, match="int64"):
        matvec.run(experts, expert.cpu(), good, good)
    with pytest.raises(ValueError, match="y must"):
        matvec.run(experts, matvec.route(expert, n_experts=2, largest=8), good, good)
    with pytest.raises(IndexError):
        matvec.matvec(experts, good[0], 2)
    with pytest.raises(IndexError):
        experts.decode(2)
    with pytest.raises(TypeError, match="decode"):
        experts.decode(0, dtype=torch.float32)
    with pytest.raises(qmoecodec.FormatError, match="role_shape"):
        gpu.experts.load(data.encoded, data.levels[:, :7])
    with pytest.raises(qmoecodec.FormatError, match="role_dtype"):
        gpu.experts.load(data.encoded, data.levels.astype(np.uint16))


def test_encode_rejects(gpu, bank):
    digits = torch.zeros(2, 3, 50, dtype=torch.int8, device="cuda")
    digits[1, 2, 49] = 2
    with pytest.raises(ValueError, match="row 2 of expert 1"):
        gpu.encoding.encode(digits, bank["8 bit, .885"]())
    from qmoecodec.dictionary import table_from_phrases

    poor = table_from_phrases([b"\0", b"\1"] + [b""] * 254, code_bits=8)
    digits[1, 2, 49] = 1
    with pytest.raises(qmoecodec.EncodeError, match="row 2 of expert 1"):
        gpu.encoding.encode(digits, poor)
