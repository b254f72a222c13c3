"""What callers may hand in, and that everything else is one TypeError or ValueError that names the argument."""

import concurrent.futures
import copy
import dataclasses
import gc
import os
import pathlib
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from dense_files import ternary, write_raw

import qmoecodec as q

RNG = np.random.default_rng(5)
DIGITS: Any = RNG.choice(np.array([-1, 0, 1], np.int8), (3, 20, 70), p=[0.1, 0.8, 0.1]).astype(np.int8)
STACK = q.encode(DIGITS)
MATRIX = q.encode(DIGITS[0])
DICTIONARY = STACK.dictionaries[int(STACK.dictionary_index[0])]
CODES, LENGTHS = q.encode_rows(DIGITS[0], dictionary=DICTIONARY)
LEVELS = np.tile(np.array([-1, 1], np.float32), (3, 20, 1))
X = RNG.standard_normal(70).astype(np.float32)
PRODUCT = np.einsum("erc,c->er", DIGITS.astype(np.float32), X)


class Tensor:
    """An array of another library: it has a dtype and a shape, and is no numpy array."""

    ndim, shape, dtype = 2, (2, 2), "torch.int8"


def read_only(array: Any) -> Any:
    array = array.copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "view",
    [
        np.asfortranarray,
        lambda a: a[..., ::-1],
        lambda a: a[:, ::-2, ::3],
        lambda a: a.transpose(2, 0, 1),
        read_only,
        lambda a: np.broadcast_to(a[0], (5, *a.shape[1:])),
        lambda a: a[0].view(np.matrix),
        lambda a: a[:0],
        lambda a: a[:, :0],
        lambda a: a[:, :, :0],
    ],
)
def test_any_int8_array_is_encoded(view: Callable[[Any], Any]) -> None:
    digits = view(DIGITS)
    assert q.decode(q.encode(digits)).tolist() == digits.tolist()


@pytest.mark.parametrize(
    ("digits", "error", "message"),
    [
        ([[0, 1]], TypeError, "digits is a numpy array of int8, not list"),
        (None, TypeError, "digits is a numpy array of int8, not NoneType"),
        (np.int8(1), TypeError, "digits is a numpy array of int8, not int8"),
        (Tensor(), TypeError, "digits is a numpy array of int8, not Tensor"),
        (np.ma.masked_array(DIGITS[0], DIGITS[0] == 0), TypeError, "digits is a numpy array of int8, not MaskedArray"),
        (DIGITS.astype(np.int64), TypeError, "digits is a numpy array of int8, not of int64"),
        (DIGITS == 1, TypeError, "digits is a numpy array of int8, not of bool"),
        (DIGITS.view(np.uint8), TypeError, "digits is a numpy array of int8, not of uint8"),
        (np.array(1, np.int8), ValueError, "digits has the shape [rows, cols] or [experts, rows, cols], not ()"),
        (DIGITS[None], ValueError, "digits has the shape [rows, cols] or [experts, rows, cols], not (1, 3, 20, 70)"),
        (np.full((1, 2), -128, np.int8), ValueError, "digit -128 at (0, 0) is not -1, 0 or 1"),
    ],
)
def test_what_is_no_digits(digits: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        q.encode(digits)


ROWS: dict[str, Any] = {"cols": 70, "dictionary": DICTIONARY}
MISTAKES: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: q.encode(DIGITS, code_bits=8.0), TypeError, "code_bits is an integer, not float"),
    (lambda: q.encode(DIGITS, code_bits=True), TypeError, "code_bits is an integer, not bool"),
    (lambda: q.encode(DIGITS, code_bits="8"), ValueError, "code_bits is 'auto' or one of (8, 12, 16), not '8'"),
    (lambda: q.encode(DIGITS, dictionary=None), TypeError, "dictionary is a string, a Dictionary or a sequence of them"),
    (lambda: q.encode(DIGITS, dictionary=[DICTIONARY, 1]), TypeError, "dictionary is a Dictionary, not int"),
    (lambda: q.encode(DIGITS, dictionary=[]), ValueError, "a bank holds 1 to 256 dictionaries, not 0"),
    (lambda: q.encode(DIGITS, dictionary=DICTIONARY, code_bits=16), ValueError, "8-bit codewords; code_bits is 16"),
    *((lambda f=f: f(threads=0), ValueError, "threads is at least 1, not 0") for f in (
        lambda **k: q.encode(DIGITS, **k), lambda **k: q.decode(STACK, **k), lambda **k: q.matvec(STACK, LEVELS, X, **k))),
    (lambda: q.encode(DIGITS[0], threads=1.5), TypeError, "threads is an integer, not float"),
    (lambda: q.encode_rows(DIGITS, dictionary=DICTIONARY), ValueError, "digits has the shape [rows, cols], not (3, 20, 70)"),
    (lambda: q.encode_rows(DIGITS[0], dictionary="auto"), TypeError, "dictionary is a Dictionary, not str"),
    (lambda: q.encode_rows(DIGITS[0], dictionary=DICTIONARY, backend="cuda"), ValueError, "backend is 'numba' or 'reference'"),
    (lambda: q.decode(DIGITS), TypeError, "encoded is an Encoded, as `encode` returns it, not ndarray"),
    (lambda: q.decode(STACK, expert=1.0), TypeError, "expert is an integer, not float"),
    (lambda: q.decode(STACK, expert=True), TypeError, "expert is an integer, not bool"),
    (lambda: q.decode(STACK, backend="cuda"), ValueError, "backend is 'numba' or 'reference', not 'cuda'"),
    (lambda: q.decode(MATRIX, expert=1), IndexError, "expert 1 of 1"),
    (lambda: q.matvec(MATRIX, LEVELS[0], X, expert=1), IndexError, "expert 1 of 1"),
    (lambda: q.matvec(None, LEVELS, X), TypeError, "encoded is an Encoded"),
    (lambda: q.matvec(STACK, np.full((3, 20, 2), 0x3F80, np.uint16), X), TypeError, "levels cannot be taken as float32: uint16"),
    (lambda: q.matvec(STACK, LEVELS, X.astype(np.complex64)), TypeError, "x cannot be taken as float32: complex64"),
    (lambda: q.matvec(STACK, LEVELS, X > 0), TypeError, "x cannot be taken as float32: bool"),
    (lambda: q.matvec(STACK, None, X), TypeError, "levels cannot be taken as float32: object"),
    (lambda: q.matvec(STACK, [[1], [1, 2]], X), TypeError, "levels cannot be taken as float32: setting an array element"),
    (lambda: q.decode_rows(CODES.tolist(), LENGTHS, **ROWS), TypeError, "codes is a numpy array of uint8, not list"),
    (lambda: q.decode_rows(CODES.view(np.int8), LENGTHS, **ROWS), TypeError, "codes is a numpy array of uint8, not of int8"),
    (lambda: q.decode_rows(CODES[:, None], LENGTHS, **ROWS), ValueError, "codes has one dimension, not the shape"),
    (lambda: q.decode_rows(CODES, LENGTHS.astype(np.int64), **ROWS), TypeError, "row_lengths is a numpy array of uint32"),
    (lambda: q.decode_rows(CODES, LENGTHS[None], **ROWS), ValueError, "row_lengths has one dimension, not the shape (1, 20)"),
    (lambda: q.decode_rows(CODES, LENGTHS, cols=70, dictionary=None), TypeError, "dictionary is a Dictionary, not NoneType"),
    (lambda: q.decode_rows(CODES, LENGTHS, cols=-1, dictionary=DICTIONARY), ValueError, "cols is at least 0, not -1"),
    (lambda: q.decode_rows(CODES, LENGTHS, cols=70.0, dictionary=DICTIONARY), TypeError, "cols is an integer, not float"),
    (lambda: q.decode_rows(CODES, LENGTHS, backend="", **ROWS), ValueError, "backend is 'numba' or 'reference', not ''"),
    (lambda: q.count_digits(CODES, LENGTHS, rows=19, **ROWS), ValueError, "rows is 19, but there are 20 row_lengths"),
    (lambda: q.count_digits(CODES, LENGTHS, rows=21, **ROWS), ValueError, "rows is 21, but there are 20 row_lengths"),
    (lambda: q.count_digits(CODES, LENGTHS, rows=20, cols=-1, dictionary=DICTIONARY), ValueError, "cols is at least 0, not -1"),
    (lambda: q.count_digits(CODES.tolist(), LENGTHS, rows=20, **ROWS), TypeError, "codes is a numpy array of uint8, not list"),
    (lambda: q.matvec_rows(CODES, LENGTHS, LEVELS[0, :19], X, dictionary=DICTIONARY), ValueError,
     "levels have the shape (19, 2), not (20, 2)"),
    (lambda: q.matvec_rows(CODES, LENGTHS, LEVELS[0, :, :1], X, dictionary=DICTIONARY), ValueError,
     "levels have the shape (20, 1), not (20, 2)"),
    (lambda: q.matvec_rows(CODES, LENGTHS, LEVELS[0], X[None], dictionary=DICTIONARY), ValueError, "x has one dimension"),
    (lambda: q.matvec_rows(CODES, LENGTHS, LEVELS[0], X[0], dictionary=DICTIONARY), ValueError, "x has one dimension"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), MISTAKES)
def test_mistakes_are_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (np.full((19, 70), 7, np.int8), r"out has the shape \(20, 70\), not \(19, 70\)"),
        (np.full((21, 70), 7, np.int8), r"out has the shape \(20, 70\), not \(21, 70\)"),
        (np.full((20, 71), 7, np.int8), r"out has the shape \(20, 70\), not \(20, 71\)"),
        (np.full((20, 70), 7, np.int64), "out is a numpy array of int8, not of int64"),
        (np.full((20, 70), 7, np.int8, order="F"), "out is not C-contiguous"),
        (np.full((20, 140), 7, np.int8)[:, ::2], "out is not C-contiguous"),
        (read_only(np.full((20, 70), 7, np.int8)), "out is read-only"),
    ],
)
def test_digits_are_written_only_where_they_fit(out: Any, message: str) -> None:
    for backend in ("numba", "reference"):
        with pytest.raises((TypeError, ValueError), match=message):
            q.decode_rows(CODES, LENGTHS, out=out, backend=backend, **ROWS)
    assert (out == 7).all()


@pytest.mark.parametrize("view", [read_only, lambda a: np.repeat(a, 2)[::2], lambda a: a[::-1].copy()[::-1]])
def test_codes_and_lengths_of_any_layout(view: Callable[[Any], Any]) -> None:
    assert (q.decode_rows(view(CODES), view(LENGTHS), **ROWS) == DIGITS[0]).all()
    assert q.count_digits(view(CODES), view(LENGTHS), rows=20, **ROWS).sum() == 1400


@pytest.mark.parametrize(
    "convert",
    [np.ndarray.tolist, lambda a: a.astype(np.float64), np.asfortranarray, lambda a: a[::-1].copy()[::-1], read_only],
)
def test_levels_and_x_are_converted(convert: Callable[[Any], Any]) -> None:
    for found in (q.matvec(STACK, convert(LEVELS), convert(X)), q.matvec(STACK, convert(LEVELS), convert(np.tile(X, (3, 1))))):
        np.testing.assert_allclose(found, PRODUCT, atol=1e-4)
    ones = np.tile(np.array([-1, 1]), (3, 20, 1))  # integers
    np.testing.assert_allclose(q.matvec(STACK, ones, X, expert=np.int64(1)), PRODUCT[1], atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": STACK.codes.view(np.int8)}, "codes is a numpy array of uint8"),
        ({"codes": STACK.codes[None]}, "codes has one dimension"),
        ({"code_offsets": STACK.code_offsets[1:]}, r"code_offsets has the shape \(4,\), not \(3,\)"),
        ({"row_lengths": STACK.row_lengths[:, 1:]}, r"row_lengths has the shape \(3, 20\), not \(3, 19\)"),
        ({"row_lengths": np.vstack([STACK.row_lengths] * 2)}, r"row_lengths has the shape \(3, 20\), not \(6, 20\)"),
        ({"row_lengths": STACK.row_lengths.astype(np.int64)}, "row_lengths is a numpy array of uint32"),
        ({"dictionary_index": np.zeros(2, np.uint8)}, r"dictionary_index has the shape \(3,\), not \(2,\)"),
        ({"dictionaries": (None,)}, "dictionaries holds Dictionary objects, not NoneType"),
        ({"codes": np.array(1, np.uint8)}, r"codes has one dimension, not the shape \(\)"),
        ({"shape": (3, -20, 70)}, "shape has no negative numbers"),
        ({"shape": (3, 20, -1)}, "shape has no negative numbers"),
        ({"shape": (3, 20.0, 70)}, "integer"),
        ({"is_matrix": True}, "a matrix is one expert, not 3"),
        ({"is_matrix": True, "shape": (0, 20, 70)}, "a matrix is one expert, not 0"),
    ],
)
def test_a_stack_is_checked_when_it_is_built(change: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        dataclasses.replace(STACK, **change)


# --- files


@pytest.fixture
def packed(tmp_path: pathlib.Path) -> pathlib.Path:
    tensors = {f"m.experts.{i}.w": ternary((40, 60), i) for i in range(3)} | {"bias": np.arange(5.0)}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    q.pack(tmp_path / "model.safetensors", tmp_path / "p.safetensors")
    return tmp_path / "p.safetensors"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_shard_size": 0}, "max_shard_size is at least 1, not 0"),
        ({"max_shard_size": "5GB"}, "max_shard_size is an integer, not str"),
        ({"threads": 0}, "threads is at least 1, not 0"),
        ({"dictionary": None}, "dictionary is a string, a Dictionary or a sequence"),
        ({"dictionary": []}, "a bank holds 1 to 256 dictionaries, not 0"),
        ({"dictionary": DICTIONARY, "code_bits": 12}, "8-bit codewords; code_bits is 12"),
        ({"code_bits": "8"}, "code_bits is 'auto' or one of"),
    ],
)
def test_options_of_pack(packed: pathlib.Path, options: dict[str, Any], message: str) -> None:
    target = packed.with_name("other.safetensors")
    with pytest.raises((TypeError, ValueError), match=message):
        q.pack(packed.with_name("model.safetensors"), target, **options)
    if "max_shard_size" in options:
        with pytest.raises((TypeError, ValueError), match=message):
            q.unpack(packed, target, **options)
    assert not target.exists()


def test_numbers_of_a_group_are_floats(tmp_path: pathlib.Path) -> None:
    """To integers most levels are 0, and the bits of BF16 are no numbers."""
    bits = (ternary((30, 40), 1).view(np.uint32) >> 16).astype(np.uint16)
    write_raw(tmp_path / "s.safetensors", {"w": ("BF16", (30, 40), bits.tobytes())})
    q.pack(tmp_path / "s.safetensors", tmp_path / "p.safetensors")
    with q.open(tmp_path / "p.safetensors") as f:
        group, expert = f["w"], f["w"].expert(0)
        for to in (np.int8, np.uint16, bool, complex, object, "S4", None):
            for call in (group.levels_as, expert.levels_as) + ((group.dense, expert.dense) if to is not None else ()):
                with pytest.raises(TypeError, match="dtype is a numpy float type"):
                    call(to)
        dense = (bits.astype(np.uint32) << 16).view(np.float32)
        assert (group.dense(np.float64) == dense).all()
        x = np.ones(40, np.float32)
        with pytest.raises(TypeError, match="BF16 as bits"):
            q.matvec(group.encoded(), group.levels, x)
        assert group.levels_as(np.float32).tolist() == [expert.levels_as(np.float32).tolist()]
        np.testing.assert_allclose(q.matvec(group.encoded(), group.levels_as(np.float32), x), dense @ x, atol=1e-5)


# --- other processes, other owners


def test_errors_survive_pickling() -> None:
    for error in (q.FormatError("checksum", expert=3, row=5), q.FormatError("truncated", "in words").at(file="a")):
        for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
            assert type(again) is q.FormatError and str(again) == str(error)
            assert (again.reason, again.message, again.where) == (error.reason, error.message, error.where)


def test_encoded_stacks_survive_pickling() -> None:
    again = pickle.loads(pickle.dumps(STACK))
    assert (q.decode(again) == DIGITS).all()
    assert again.dictionaries == STACK.dictionaries


def test_a_file_that_nobody_closed_is_closed(packed: pathlib.Path) -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    f = q.open(packed)
    with pytest.raises(TypeError, match="pickle"):
        copy.deepcopy(f)
    bias = f.tensors["bias"]
    group = f["m.experts.w"]
    assert len(os.listdir("/proc/self/fd")) > before
    del f
    assert group.decode().shape == (3, 40, 60)  # what is in use stays open
    del group
    gc.collect()
    assert bias.tolist() == [0, 1, 2, 3, 4]
    del bias
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_one_file_in_many_threads_and_after_a_fork(packed: pathlib.Path) -> None:
    with q.open(packed) as f:
        expected = [expert.decode() for expert in f["m.experts.w"]]
    with q.open(packed) as f:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda k: f["m.experts.w"].expert(k % 3).decode(), range(96)))
        assert all((digits == expected[k % 3]).all() for k, digits in enumerate(found))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, since Python 3.12
            child = os.fork()
        if child == 0:
            os._exit(int(any((f["m.experts.w"].expert(k).decode() != expected[k]).any() for k in range(3))))
        assert os.waitpid(child, 0)[1] == 0
