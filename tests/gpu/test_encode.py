"""Encoding on the device where several threads share a row: bit-identical to the codec, whatever the digits."""

import numpy as np
import pytest

import qmoecodec
from qmoecodec.dictionary import aivf

torch = pytest.importorskip("torch", reason="needs torch")


@pytest.fixture
def encoding(guarded):
    """The device's encoder; its launches are watched (conftest.py)."""
    pytest.importorskip("cupy", reason="needs CuPy")
    from qmoecodec_gpu import backend

    return backend.load().encoding


def rows_of_every_kind(cols, rng):
    """Random rows of every density; and rows whose parses from different columns never meet, or meet late."""
    rows = []
    for p_zero in (0.3, 0.5, 0.885, 0.99):
        draws = rng.random(cols)
        rows.append(np.where(draws < p_zero, 0, np.where(draws < (1 + p_zero) / 2, -1, 1)))
    rows += [np.full(cols, value) for value in (0, 1, -1)]
    for period in (2, 3, 5, 7, 11, 36, 37, 100):
        rows.append((np.arange(cols) % period == 0) * 1)
        rows.append(np.where(np.arange(cols) % period == 0, np.arange(cols) // period % 2 * 2 - 1, 0))
    late = np.zeros(cols, int)
    late[cols // 2 :] = rng.integers(-1, 2, size=cols - cols // 2)
    rows.append(late)
    return np.stack(rows).astype(np.int8)


def check(encoding, digits, dictionary):
    expected = qmoecodec.encode(digits, dictionary=dictionary)
    staged = encoding.encode(torch.from_numpy(digits).cuda(), dictionary)
    found = encoding.to_encoded(staged, dictionary)
    assert (found.row_lengths == expected.row_lengths).all()
    assert (found.code_offsets == expected.code_offsets).all()
    assert (found.codes == expected.codes).all()


def symmetric(p_zero, code_bits=8):
    return aivf.build((1 - p_zero) / 2, p_zero, (1 - p_zero) / 2, code_bits=code_bits)


def test_segments_cover_the_row():
    pytest.importorskip("cupy", reason="needs CuPy")
    from qmoecodec_gpu.encoding import choose_segments

    rng = np.random.default_rng(0)
    for _ in range(2000):
        n_rows, cols = (int(np.exp(rng.uniform(0, np.log(n)))) for n in (1e6, 2e9))
        segments, segment = choose_segments(n_rows, cols, 132)
        assert segments in (1, 2, 4, 8, 16, 32, 64, 128)
        assert segments * segment >= cols
        assert segment % 16 == 0 and segment < 2**31
        assert segments == 1 or (segment >= 128 and n_rows * segments <= 256 * 132)
    assert choose_segments(2080, 6144, 132)[0] == 16
    assert choose_segments(10**6, 6144, 132)[0] == 1


@pytest.mark.gpu
@pytest.mark.parametrize("cols", [1, 15, 128, 256, 2047, 6144, 6145, 40000])
def test_few_rows(encoding, cols):
    rng = np.random.default_rng(cols)
    digits = rows_of_every_kind(cols, rng)
    for p_zero in (1 / 3, 0.5, 0.885, 0.99):
        check(encoding, digits[None], symmetric(p_zero))
    check(encoding, digits[:1, None], symmetric(0.885))  # one row
    check(encoding, digits[None], symmetric(0.885, 12))


@pytest.mark.gpu
@pytest.mark.parametrize("segments", [1, 2, 8, 128])
def test_segments_of_any_length(encoding, segments, monkeypatch):
    """Segments shorter than a phrase, not on 16 columns, and empty ones."""
    rng = np.random.default_rng(segments)
    for cols in (1, 40, 333, 1600):
        digits = rows_of_every_kind(cols, rng)
        for segment in {-(-cols // segments), -(-cols // segments) + 5, -(-cols // (16 * segments)) * 16, cols}:
            monkeypatch.setattr(encoding, "choose_segments", lambda *_, pair=(segments, segment): pair)
            for p_zero in (0.5, 0.885, 0.99):
                check(encoding, digits[None], symmetric(p_zero))


@pytest.mark.gpu
def test_experts_and_rows_are_kept_apart(encoding):
    """Several experts, also where the rows fill the device without help."""
    rng = np.random.default_rng(4)
    for shape in ((3, 50, 2000), (2, 4001, 300), (4, 20000, 33)):
        draws = rng.random(shape)
        digits = np.where(draws < 0.885, 0, np.where(draws < 0.94, -1, 1)).astype(np.int8)
        check(encoding, digits, symmetric(0.885))


@pytest.mark.gpu
@pytest.mark.parametrize("value", [2, -2, 3, -128, 127])
def test_what_is_no_digit_is_found_wherever_it_is(encoding, value):
    rng = np.random.default_rng(5)
    for cols in (2048, 2049):
        for p_zero in (1 / 3, 0.885):
            for column in (0, 1, cols // 2 + 3, cols - 1):
                digits = torch.from_numpy(rng.integers(-1, 2, size=(2, 5, cols), dtype=np.int8))
                digits[1, 3, column] = value
                with pytest.raises(ValueError, match="row 3 of expert 1"):
                    encoding.encode(digits.cuda(), symmetric(p_zero))
