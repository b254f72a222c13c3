"""The codec's contract at its edges: shapes, refusals with reason and place, the worked example of the specification."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import qmoecodec as q
from qmoecodec import reference
from qmoecodec.codec import bank as bank_module
from qmoecodec.codec.rows import starts_of_rows
from qmoecodec.dictionary import aivf, aivf_from_symbols, table_from_phrases

LEAF, INCOMPLETE, INTERNAL = 0, 1, 2


def tiny(threshold: int = 200) -> q.Dictionary:
    """Tree 0: 00 (incomplete), 000 (leaf), - and + leaves. Tree 1: - and + leaves. Everything else is unused."""
    trees = [np.array([INTERNAL, INCOMPLETE, LEAF, LEAF, LEAF, LEAF, LEAF], np.uint8), np.array([LEAF, LEAF], np.uint8)]
    return aivf_from_symbols(trees, code_bits=8, threshold=threshold)


def test_phrases_are_numbered_in_preorder() -> None:
    d = tiny()
    # Preorder of tree 0: 0 (internal), 00 (incomplete), 000, 0-, 0+, -, +
    assert [d.phrase(0, c) for c in range(5)] == [(0, 0, 0), (0, 1), (0, 2), (1,), (2,)]
    assert d.phrase(0, 200) == (0, 0)
    assert [d.phrase(1, c) for c in range(3)] == [(1,), (2,), ()]
    assert d.n_states == 2 and d.max_phrase == 3 and len(d.data) == 3


def test_state_follows_an_incomplete_codeword() -> None:
    d = tiny()
    digits = np.array([[0, 0, 1, -1, 0, 0, 0, 0]], np.int8)  # 00|+|-|000|0 -> the last 0 is padded to 00
    codes, lengths = q.encode_rows(digits, dictionary=d)
    assert codes.tolist() == [200, 1, 3, 0, 200] and lengths.tolist() == [5]
    np.testing.assert_array_equal(q.decode_rows(codes, lengths, cols=8, dictionary=d), digits)


@pytest.mark.parametrize("backend", ["numba", "reference"])
@pytest.mark.parametrize(
    ("codes", "lengths", "cols", "reason", "row"),
    [
        ([3, 7], [1, 1], 1, "unused_codeword", 1),
        ([200, 3], [2], 3, "unused_codeword", 0),  # 3 is a codeword in state 0 only
        ([3, 3], [2], 1, "row_overrun", 0),
        ([3, 0], [2], 1, "row_overrun", 0),
        ([3], [1], 2, "row_underrun", 0),
        ([0, 3], [1, 1], 3, "row_underrun", 1),
        ([1], [1], 1, "overrun_nonzero", 0),
        ([3, 3, 3], [3, 0], 1, "row_overrun", 0),
        ([3, 3], [2, 0], 1, "row_overrun", 0),
        ([3], [1, 0], 1, "row_underrun", 1),
        ([3], [2], 1, "row_lengths", 0),
        ([3, 3], [1], 1, "row_lengths", None),
    ],
)
def test_damaged_rows_name_reason_and_row(
    backend: str, codes: list[int], lengths: list[int], cols: int, reason: str, row: int | None
) -> None:
    with pytest.raises(q.FormatError) as caught:
        q.decode_rows(np.array(codes, np.uint8), np.array(lengths, np.uint32), cols=cols, dictionary=tiny(), backend=backend)
    assert caught.value.reason == reason
    assert caught.value.where.get("row") == row


@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_twelve_bit_padding_must_be_zero(backend: str) -> None:
    d = aivf.build(0.25, 0.5, 0.25, code_bits=12)
    digits = np.zeros((1, 4), np.int8)
    codes, lengths = q.encode_rows(digits, dictionary=d)
    assert lengths.tolist() == [1] and len(codes) == 2
    codes[1] |= 0x10
    with pytest.raises(q.FormatError) as caught:
        q.decode_rows(codes, lengths, cols=4, dictionary=d, backend=backend)
    assert caught.value.reason == "row_padding"


def test_matvec_refuses_what_decode_refuses() -> None:
    for cols, codes in ((1, [7]), (2, [3]), (1, [1]), (1, [3, 3])):
        lengths = np.array([len(codes)], np.uint32)
        data = np.array(codes, np.uint8)
        with pytest.raises(q.FormatError) as by_decode:
            q.decode_rows(data, lengths, cols=cols, dictionary=tiny())
        with pytest.raises(q.FormatError) as by_matvec:
            q.matvec_rows(data, lengths, np.ones((1, 2), np.float32), np.ones(cols, np.float32), dictionary=tiny())
        assert by_matvec.value.reason == by_decode.value.reason


def test_a_claim_of_many_weights_is_refused_before_allocation() -> None:
    with pytest.raises(q.FormatError, match="row_underrun"):
        q.decode_rows(np.zeros(1, np.uint8), np.ones(1, np.uint32), cols=2**60, dictionary=tiny())
    encoded = q.encode(np.zeros((1, 1, 1), np.int8))
    huge = q.Encoded((1, 1, 2**60), encoded.codes, encoded.code_offsets, encoded.row_lengths,
                     encoded.dictionary_index, encoded.dictionaries)  # fmt: skip
    with pytest.raises(q.FormatError, match="row_underrun"):
        q.decode(huge)


@pytest.mark.parametrize("shape", [(0, 0, 0), (0, 3, 4), (3, 0, 4), (3, 4, 0), (1, 1, 1), (2, 1, 300), (0, 5), (5, 0), (1, 1)])
def test_all_shapes(shape: tuple[int, ...]) -> None:
    digits = (np.arange(np.prod(shape, dtype=int)).reshape(shape) % 3 - 1).astype(np.int8)
    encoded = q.encode(digits)
    np.testing.assert_array_equal(q.decode(encoded), digits)
    assert q.decode(encoded).shape == shape


def test_callers_mistakes() -> None:
    digits = np.zeros((2, 2), np.int8)
    with pytest.raises(TypeError, match="int8"):
        q.encode(digits.astype(np.int16))
    with pytest.raises(ValueError, match=r"digit 2 at \(1, 0\)"):
        q.encode(np.array([[0, 0], [2, 0]], np.int8))
    with pytest.raises(ValueError, match="shape"):
        q.encode(np.zeros(3, np.int8))
    with pytest.raises(ValueError, match="no dictionary"):
        q.encode(digits, dictionary="zip")
    with pytest.raises(ValueError, match="code_bits"):
        q.encode(digits, code_bits=9)
    with pytest.raises(ValueError, match="16-bit"):
        q.encode(digits, dictionary="qmoe-2023", code_bits=8)
    with pytest.raises(ValueError, match="code_bits is 12"):
        q.encode(digits, dictionary=tiny(), code_bits=12)
    with pytest.raises(ValueError, match="x has the shape"):
        q.matvec(q.encode(digits), np.zeros((2, 2), np.float32), np.zeros(3, np.float32))
    with pytest.raises(IndexError):
        q.decode(q.encode(digits[None]), expert=1)


def test_a_table_may_lack_phrases() -> None:
    phrases = [b""] * 256
    phrases[7] = b"\0\0"
    phrases[9] = b"\2"
    d = table_from_phrases(phrases, code_bits=8)
    digits = np.array([[0, 0, 1, 0]], np.int8)
    codes, lengths = q.encode_rows(digits, dictionary=d)
    assert codes.tolist() == [7, 9, 7]  # the last phrase overruns the row by a zero
    np.testing.assert_array_equal(q.decode_rows(codes, lengths, cols=4, dictionary=d), digits)
    for backend in ("numba", "reference"):
        with pytest.raises(q.EncodeError):
            q.encode_rows(np.array([[-1]], np.int8), dictionary=d, backend=backend)


def test_long_phrases_take_the_word_path() -> None:
    """Phrases of 255 digits, and phrases with more than three nonzeros, decode like the reference."""
    phrases = [b""] * 256
    phrases[0], phrases[1], phrases[2] = b"\0", b"\1", b"\2"
    phrases[3] = bytes([0] * 200 + [2] * 55)
    phrases[4] = b"\0" * 255
    d = table_from_phrases(phrases, code_bits=8)
    rng = np.random.default_rng(5)
    pieces = [np.array([{0: 0, 1: -1, 2: 1}[b] for b in phrases[k]], np.int8) for k in rng.integers(0, 5, 40)]
    digits = np.concatenate(pieces)[None, :]
    codes, lengths = q.encode_rows(digits, dictionary=d)
    np.testing.assert_array_equal(q.decode_rows(codes, lengths, cols=digits.shape[1], dictionary=d), digits)
    reference_codes, _ = q.encode_rows(digits, dictionary=d, backend="reference")
    np.testing.assert_array_equal(codes, reference_codes)


def test_a_bank_gives_each_expert_its_dictionary() -> None:
    rng = np.random.default_rng(1)
    digits = np.stack([
        rng.choice(np.array([0, -1, 1], np.int8), (200, 400), p=[p, (1 - p) / 2, (1 - p) / 2]) for p in (0.4, 0.95, 0.4)
    ])
    encoded = q.encode(digits)
    index = encoded.dictionary_index
    assert index[0] == index[2] != index[1]
    for e in range(3):
        best = min(range(len(encoded.dictionaries)),
                   key=lambda k: len(q.encode_rows(digits[e], dictionary=encoded.dictionaries[k])[0]))  # fmt: skip
        assert best == index[e]


@pytest.mark.parametrize("zeros", [0.0, 0.3, 1 / 3, 0.45, 0.6])
def test_dense_ternary_stays_below_five_digits_a_byte(zeros: float) -> None:
    rng = np.random.default_rng(2)
    p = (1 - zeros) / 2
    digits = rng.choice(np.array([0, -1, 1], np.int8), (512, 2048), p=[zeros, p, p])
    encoded = q.encode(digits)
    n_bytes = len(encoded.codes) + sum(len(d.data) for d in encoded.dictionaries)
    assert 8 * n_bytes <= 1.6 * digits.size


def test_the_bank_is_bounded_and_does_not_depend_on_what_was_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank_module, "MAX_SAMPLES", 8)
    rng = np.random.default_rng(3)
    planner = bank_module.BankPlanner()
    for _ in range(50):
        planner.add(rng.choice(np.array([0, -1, 1], np.int8), (64, 256), p=[0.8, 0.1, 0.1]))
    assert len(planner._samples) <= 8
    assert len(planner.choose()) == 1


def test_design_is_nearest_on_the_grid() -> None:
    for zeros in (0.05, 1 / 3, 0.5, 0.8, 0.885, 0.99):
        counts = np.array([zeros * 1e6, (1 - zeros) * 3e5, (1 - zeros) * 7e5], np.int64)
        design = bank_module.design_of(counts)
        ratio = zeros / (1 - zeros)
        assert ratio / 1.15**0.5001 <= bank_module.ODDS_STEP**design.odds <= ratio * 1.15**0.5001
        assert design.sign == 5
    assert bank_module.design_of(np.array([10, 0, 0])).odds > 30
    assert bank_module.design_of(np.array([0, 10, 0])).sign == bank_module.SIGN_STEPS


def test_reference_reads_what_it_writes() -> None:
    for bits in (8, 12, 16):
        codewords = [1, (1 << bits) - 1, 0, 5]
        data = reference.pack_row(codewords, code_bits=bits)
        assert len(data) == (4 * bits + 7) // 8
        assert reference.unpack_row(data, n_codewords=4, code_bits=bits) == codewords


def test_the_reference_needs_no_compiler_and_the_kernels_do() -> None:
    program = """
import sys
import numpy as np
import qmoecodec as q
from qmoecodec.dictionary import table_from_phrases
d = table_from_phrases([b"\\0", b"\\2", *[b""] * 254], code_bits=8)
for backend in ("reference", "numba"):
    assert q.decode_rows(np.uint8([1, 0]), np.uint32([2]), cols=2, dictionary=d, backend=backend).tolist() == [[1, 0]]
    print("numba" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.stderr) == (["False", "True"], "")


@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_memory_that_does_not_fit_is_refused(backend: str) -> None:
    codes, lengths = np.uint8([3, 3, 4, 4]), np.uint32([2, 2])
    good = np.zeros((2, 2), np.int8)
    assert q.decode_rows(codes, lengths, cols=2, dictionary=tiny(), backend=backend, out=good).tolist() == [[-1, -1], [1, 1]]
    for bad in (np.zeros((3, 2), np.int8), np.zeros((1, 2), np.int8), np.zeros((2, 3), np.int8), np.zeros(4, np.int8),
                np.zeros((2, 2), np.int16), np.zeros((2, 2), np.uint8), np.zeros((2, 2), np.int8, "F")):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=r"^out "):
            q.decode_rows(codes, lengths, cols=2, dictionary=tiny(), backend=backend, out=bad)


def test_lengths_whose_sum_wraps_are_refused() -> None:
    """The bytes of the rows are 2**64 more than the expert has, so as a 64-bit number the sum fits."""
    lengths = np.full(33, 1 << 59, np.int64)
    with pytest.raises(q.FormatError, match=f"the rows take {1 << 59} bytes, the expert has {1 << 59}"):
        starts_of_rows(1 << 59, lengths, cols=1, dictionary=tiny())
