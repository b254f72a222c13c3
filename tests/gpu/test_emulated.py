"""The kernels of digits.py on the host: their indices, their ring, their barriers (emulation/emulation.h)."""

import pathlib
import shutil
import sys

import numpy as np
import pytest
from qmoecodec_gpu import plan, tables

import qmoecodec

sys.path.insert(0, str(pathlib.Path(__file__).parent / "emulation"))
import build

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


def facts(encoded):
    words = (encoded.row_lengths.astype(np.int64) + 3) >> 2
    return int(words.min()), float(words.mean()), int(words.max())


def expected_digits(digits, padded, blocks):
    """As decode_digits.cu describes them: uint32[blocks, rows, 4]."""
    rows, cols = digits.shape
    two = np.zeros((padded, blocks * 64), np.uint32)
    two[:rows, :cols] = np.where(digits < 0, 1, np.where(digits > 0, 2, 0))
    two = two.reshape(padded, blocks, 4, 16)
    return (two << (2 * np.arange(16, dtype=np.uint32))).sum(-1).astype(np.uint32).transpose(1, 0, 2)


def to_bfloat16(values):
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bfloat16(values):
    return (values.astype(np.uint32) << 16).view(np.float32)


def with_guard(n_bytes, fill=0xAB):
    return np.full(n_bytes + GUARD, fill, np.uint8)


def run(folder, case, rng, shape, counts, *, options, dictionaries, scale=False, relu=False, first_item=0, blocks_of_threads=3):
    """Decode and multiply some items, and compare with float64."""
    n_experts, rows, cols = shape
    data = case(shape, 0.8, dictionaries[0], rng)
    encoded = data.encoded
    least, mean, most = facts(encoded)
    layout = plan.choose_layout(least_words=least, mean_words=mean, most_words=most)
    codes, expert_start, row_start = lay_out(encoded, layout)
    phrases = tables.list_phrases(dictionaries[0])
    decode = plan.plan_decode(
        layout, cols=cols, max_phrase=dictionaries[0].max_phrase, max_nonzeros=phrases.max_nonzeros, max_shared_bytes=MOST_SHARED,
        most_warps=options.get("most_warps", 16), is_guarded=options.get("is_guarded", True),
    )  # fmt: skip
    multiply = plan.plan_multiply(options.get("groups", 4), max_shared_bytes=MOST_SHARED)
    if "slots" in options:
        slot = multiply.shared_bytes // multiply.slots
        multiply = plan.MultiplyPlan(multiply.groups, options["slots"], options["slots"] * slot)
    table = tables.scatter_entries(phrases, decode.form)
    blocks, padded = -(-cols // 64), -(-rows // 64) * 64

    # Work lists: item i is expert i % n_experts with counts[i] tokens, which are scattered over x.
    n_tokens = sum(counts)
    order = rng.permutation(n_tokens)
    n_items = np.array([len(counts)], np.int32)
    item_expert = np.arange(len(counts), dtype=np.int32) % n_experts
    item_first = np.cumsum([0, *(-(-c // 8) * 8 for c in counts[:-1])]).astype(np.int32)
    item_count = np.array(counts, np.int32)
    slots = int(item_first[-1]) + -(-counts[-1] // 8) * 8
    slot_token = np.full(slots, -1, np.int32)
    expert_of = np.zeros(n_tokens, np.int64)
    done = 0
    for i, c in enumerate(counts):
        slot_token[item_first[i] : item_first[i] + c] = order[done : done + c]
        expert_of[order[done : done + c]] = item_expert[i]
        done += c
    x = to_bfloat16(rng.standard_normal((n_tokens, cols)))
    levels = to_bfloat16(data.levels)
    dictionary = np.zeros(n_experts, np.uint8)
    i32 = np.int32
    max_items = len(counts) - first_item + 2  # more than there are

    arranged = with_guard(slots * blocks * 128)
    build.Kernel(folder, "arrange.cu", "arrange_x", {})(
        (len(counts), 2), 256, 0, 1, (x, cols, i32(cols), n_items, item_first, item_count, slot_token, arranged)
    )
    digits = with_guard((len(counts) - first_item) * blocks * padded * 16, 0xFF)
    threshold = np.array([dictionaries[0].threshold if dictionaries[0].n_states == 2 else 256], np.uint32)
    build.Kernel(folder, "decode_digits.cu", "decode_digits", decode.macros())(
        (blocks_of_threads, 1), 32 * decode.warps, decode.shared_bytes, 2,
        (codes, expert_start, row_start, dictionary, threshold, table, n_items, item_expert, digits, i32(rows), i32(cols),
         i32(decode.pitch), i32(first_item), i32(max_items)),
    )  # fmt: skip
    assert (digits[-GUARD:] == 0xFF).all()
    found = digits[:-GUARD].view(np.uint32).reshape(-1, blocks, padded, 4)
    for i in range(len(counts) - first_item):
        want = expected_digits(data.digits[item_expert[first_item + i]], padded, blocks)
        inside = expected_digits(np.ones((rows, cols), np.int8), padded, blocks)
        inside |= inside >> 1
        np.testing.assert_array_equal((found[i] & inside)[:, :rows], want[:, :rows])
        assert not (found[i] & found[i] >> 1 & 0x55555555)[:, :rows].any()  # no 3, also beyond the row

    y = np.full(n_tokens * rows + GUARD, 0x7FFF, np.uint16)  # NaN
    factors = rng.random(n_tokens).astype(np.float32) + 0.5 if scale else None
    build.Kernel(folder, "multiply_digits.cu", "multiply_digits", multiply.macros(is_f16=False))(
        (blocks_of_threads, 1), multiply.threads, multiply.shared_bytes, 3,
        (digits, levels, arranged, y, rows, factors, i32(int(relu)), i32(rows), i32(cols), n_items, item_expert, item_first,
         item_count, slot_token, i32(first_item), i32(max_items)),
    )  # fmt: skip
    assert (y[-GUARD:] == 0x7FFF).all()
    got = from_bfloat16(y[:-GUARD].reshape(n_tokens, rows)).astype(np.float64)
    skipped = np.zeros(n_tokens, bool)
    for i in range(first_item):
        skipped[slot_token[item_first[i] : item_first[i] + counts[i]]] = True
    assert np.isnan(got[skipped]).all()
    dense, wide = data.dense(), from_bfloat16(x).astype(np.float64)
    exact = np.einsum("trc,tc->tr", dense[expert_of], wide)
    bound = 2.0**-8 * np.abs(exact) + 1e-5 * np.einsum("trc,tc->tr", np.abs(dense[expert_of]), np.abs(wide)) + 1e-6
    if relu:
        exact = np.maximum(exact, 0)
    if factors is not None:
        exact, bound = exact * factors[:, None], bound * factors[:, None]
    assert (np.abs(got - exact)[~skipped] <= bound[~skipped]).all()


@pytest.mark.parametrize("name", ["8 bit, .885", "8 bit, 1/3", "8 bit, table"])
def test_small(tmp_path, case, bank, name):
    """Items of every size class, a row group that is not whole, columns that are not whole blocks."""
    rng = np.random.default_rng(51)
    run(tmp_path, case, rng, (2, 140, 1031), (9, 20, 33, 128, 65), options={}, dictionaries=[bank[name]()])


@pytest.mark.parametrize("groups", [2, 3, 4])
@pytest.mark.parametrize("slots", [2, 5])
def test_ring(tmp_path, case, bank, groups, slots):
    """Short rings, which go round often, and every number of row groups per block; chunks across items."""
    rng = np.random.default_rng(52)
    options = {"groups": groups, "slots": slots}
    run(tmp_path, case, rng, (3, 333, 300), (16, 64, 30, 100), options=options, dictionaries=[bank["8 bit, .885"]()])


def test_options(tmp_path, case, bank):
    """Scales and relu; not all items; blocks of eight warps; second nonzeros or'ed unguarded."""
    rng = np.random.default_rng(53)
    options = {"most_warps": 8, "is_guarded": False}
    run(
        tmp_path, case, rng, (2, 100, 2080), (12, 40, 64), options=options, dictionaries=[bank["8 bit, .885"]()],
        scale=True, relu=True, first_item=1, blocks_of_threads=2,
    )  # fmt: skip
