"""The kernels' tables and parameters: what can be tested without a device."""

import numpy as np
import pytest

import qmoecodec
from qmoecodec import reference
from qmoecodec_gpu import plan, source, tables


def test_general_entries(dictionary):
    phrases = tables.list_phrases(dictionary)
    entries, nonzeros = tables.general_entries(phrases)
    rng = np.random.default_rng(0)
    codewords = range(256) if dictionary.code_bits == 8 else rng.integers(dictionary.n_codewords, size=500)
    for state in range(2):
        for codeword in codewords:
            phrase = dictionary.phrase(state if dictionary.n_states == 2 else 0, int(codeword))
            word, start = (int(v) for v in entries[state, codeword])
            places = [k for k, digit in enumerate(phrase) if digit]
            assert word & 0xFF == len(phrase)
            assert word >> 8 & 0xFF == len(places)
            assert word >> 16 & 0xFF == (places[-1] if places else 0)
            assert word >> 24 == (1 in phrase) | (2 in phrase) << 1
            found = nonzeros[start : start + len(places)].tolist()
            assert found == [k | (phrase[k] - 1) << 8 for k in places]


@pytest.mark.parametrize("tokens", plan.TOKEN_CLASSES)
@pytest.mark.parametrize("segmented", [True, False])
def test_gather_entries(dictionary, tokens, segmented):
    phrases = tables.list_phrases(dictionary)
    form = tables.EntryForm(tokens, segmented, max(2, phrases.max_nonzeros))
    if dictionary.code_bits != 8 or dictionary.max_phrase > form.max_phrase:
        with pytest.raises(ValueError, match=r"gather kernel|do not fit"):
            tables.gather_entries(phrases, form)
        return
    table = tables.gather_entries(phrases, form).view(np.uint8)
    assert table.shape == (256, 2, 4 * form.n_words)
    for codeword in range(256):
        for state in range(2):
            phrase = dictionary.phrase(state if dictionary.n_states == 2 else 0, codeword)
            entry = table[codeword, state].tolist()
            assert entry[0] == form.scale * len(phrase)
            places = [(k, digit) for k, digit in enumerate(phrase) if digit]
            for z, byte in enumerate(entry[1:]):
                if tokens > 1:
                    offset, is_missing, is_plus = byte >> 2, byte >> 1 & 1, not byte & 1
                elif segmented:
                    offset, plane = divmod(byte, 3)
                    is_missing, is_plus = plane == 2, plane == 1
                else:
                    offset, is_missing, is_plus = (byte & 0x7F) >> 1, byte >> 7, byte & 1
                if z < len(places):
                    assert not is_missing
                    assert (offset, 1 + bool(is_plus)) == places[z]
                else:
                    assert is_missing


def walk(nodes, root, phrase):
    node = root
    for digit in phrase:
        node = int(nodes[node][digit])
        assert node >= 0
    return node


def test_encoder_trees(dictionary):
    nodes, roots = tables.encoder_trees(dictionary)
    for state in range(dictionary.n_states):
        for codeword in range(0, dictionary.n_codewords, 1 if dictionary.code_bits == 8 else 97):
            phrase = dictionary.phrase(state, codeword)
            if phrase:
                assert int(nodes[walk(nodes, roots[state], phrase)][3]) == codeword


def test_encoder_transitions(dictionary):
    table = tables.encoder_transitions(dictionary)
    if dictionary.kind == "table" or dictionary.code_bits != 8:
        assert table is None
        return
    assert int((table & 0x3FFF).max()) < len(table)  # the place of no digit included
    rng = np.random.default_rng(3)
    for p_zero in (0.3, 0.885, 0.97, 1.0):
        for n in (1, 2, 7, 300):
            row = rng.choice([0, 1, 2], p=[p_zero, (1 - p_zero) / 2, (1 - p_zero) / 2], size=n).tolist()
            node, codewords = 0, []
            for digit in row:
                word = int(table[node, (0, 3, 1)[digit]])
                codewords += [c - 1 for c in (word >> 14 & 0x1FF, word >> 23) if c]
                node = word & 0x3FFF
            if table[node, 2]:
                codewords.append(int(table[node, 2] >> 14) - 1)
            assert codewords == reference.encode_row(row, dictionary)


def test_plan_stays_in_bounds():
    rng = np.random.default_rng(1)
    fits = 0
    for _ in range(3000):
        cols = int(np.exp(rng.uniform(0, np.log(80000))))
        max_phrase = int(rng.integers(3, 256))
        most = int(rng.integers(1, cols // 4 + 2))
        least = int(rng.integers(1, most + 1))
        layout = plan.choose_layout(least_words=least, mean_words=(least + most) / 2, most_words=most)
        assert layout.lanes in (4, 8, 16, 32)
        assert 2 <= layout.words <= 7
        assert layout.sure_words * layout.lanes <= least
        assert layout.one_block == (most <= layout.lanes * layout.words)
        for tokens in plan.TOKEN_CLASSES:
            found = plan.plan_gather(
                layout, tokens=tokens, cols=cols, max_phrase=max_phrase, max_nonzeros=3, max_shared_bytes=232448
            )
            if found is None:
                continue
            fits += 1
            # The farthest that a phrase of a valid row, or one of its three padding codewords, can begin.
            start = cols - 1 + 4 * max_phrase
            assert found.shared_bytes <= 232448
            x_bytes = found.shared_bytes - 65536
            if found.form.segmented:
                assert found.overlap == max_phrase < found.segment
                slot, row = divmod(start + 1, found.segment)
                assert found.form.scale * (start + 1) * found.magic >> 32 == slot
                assert slot < layout.lanes
                column_bytes = 384 if tokens == 1 else 64 * tokens
                # one past the last start, where a lane may stand after its last phrase
                assert (slot, row) < (layout.lanes - 1, found.segment - 1)
                planes_end = (found.segment + found.overlap) * column_bytes
                assert planes_end + (2 * cols if tokens == 1 else 80 * tokens) <= x_bytes
            else:
                assert (start + 1 + max_phrase) <= found.natural_columns
                assert found.natural_columns * (8 if tokens == 1 else 2 * tokens) + (80 * tokens if tokens > 1 else 0) <= x_bytes
    assert fits > 1000


def test_plan_refuses_what_does_not_fit():
    layout = plan.choose_layout(least_words=4, mean_words=4, most_words=4)
    options = {"tokens": 1, "cols": 64, "max_phrase": 60, "max_nonzeros": 3, "max_shared_bytes": 232448}
    assert plan.plan_gather(layout, **options)
    assert plan.plan_gather(layout, **{**options, "max_phrase": 200}) is None
    assert plan.plan_gather(layout, **{**options, "max_nonzeros": 8}) is None
    assert plan.plan_gather(layout, **{**options, "cols": 0}) is None
    assert plan.plan_gather(layout, **{**options, "max_shared_bytes": 65536}) is None
    with pytest.raises(ValueError, match="tokens"):
        plan.plan_gather(layout, **{**options, "tokens": 3})


def test_scatter_entries(dictionary):
    """An entry gives back its phrase: length, and nonzeros at their places."""
    phrases = tables.list_phrases(dictionary)
    form = tables.ScatterForm(max(2, min(7, phrases.max_nonzeros)))
    if dictionary.code_bits != 8 or phrases.max_nonzeros > 7 or phrases.lengths.max() > form.max_phrase:
        with pytest.raises(ValueError, match=r"two-bit digits|do not fit"):
            tables.scatter_entries(phrases, form)
        return
    table = tables.scatter_entries(phrases, form)
    assert table.shape == (256, 2, form.n_words)
    for state in range(2):
        for codeword in range(256):
            entry = table[codeword, state].tobytes()
            want = dictionary.phrase(state if dictionary.n_states == 2 else 0, codeword)
            got = bytearray(entry[0] // 2)
            if entry[-1] != 255:
                for byte in entry[1 : 1 + form.n_nonzeros]:
                    got[byte // 2] = 1 + byte % 2
            assert entry[0] % 2 == 0
            assert bytes(got) == bytes(want)


def test_tile_plan():
    layout = plan.choose_layout(least_words=4, mean_words=4, most_words=4)
    options = {"max_phrase": 36, "max_nonzeros": 2, "max_shared_bytes": 232448, "max_rows": 128}
    for cols in (8, 64, 72, 2080, 6144, 6656, 12032, 14336):
        found = plan.plan_tile(layout, cols=cols, **options)
        assert found.pitch * 16 >= cols
        assert found.pitch % 8 == 4
        assert 16 * 1024 + found.tile * found.pitch * 4 <= found.shared_bytes <= 232448
        assert plan.plan_tile(layout, cols=cols, **{**options, "max_rows": 64}).tile == min(64, found.tile)
    assert plan.plan_tile(layout, cols=6144, **options).tile == 128
    assert plan.plan_tile(layout, cols=60, **options) is None
    assert plan.plan_tile(layout, cols=200000, **options) is None
    assert plan.plan_tile(layout, cols=64, **{**options, "max_phrase": 64}) is None


def test_small_tiles_where_there_are_few():
    assert plan.choose_tile_rows(62, 2080, 132) == 128
    assert plan.choose_tile_rows(10, 2080, 132) == 64
    assert plan.choose_tile_rows(1, 2080, 132) == 32


def test_digits_plans():
    """What is planned fits, is a form that the kernels have, and as many stages as fit."""
    rng = np.random.default_rng(9)
    n_fit = 0
    for _ in range(2000):
        cols, max_phrase, max_nonzeros = int(np.exp(rng.uniform(0, 12))), int(rng.integers(1, 140)), int(rng.integers(9))
        most = int(rng.integers(1, cols // 4 + 2))
        layout = plan.choose_layout(least_words=1, mean_words=rng.uniform(1, most), most_words=most)
        options = {"cols": cols, "max_phrase": max_phrase, "max_nonzeros": max_nonzeros, "max_shared_bytes": 232448}
        usual = plan.plan_decode(layout, **options)
        assert usual is not None or cols > 10000 or max_phrase > 127 or max_nonzeros > 7
        for rows, warps, blocks in ((1, 8, 2), (2, 8, 2), (4, 8, 2), (8, 8, 2), (4, 12, 2), (8, 16, 1)):
            found = plan.plan_decode(layout, rows=rows, warps=warps, blocks=blocks, **options)
            assert found is not None or usual is None
            if found is None:
                continue
            n_fit += 1
            assert 4 * -(-cols // 64) <= found.pitch and cols + 4 * max_phrase <= 16 * found.pitch
            assert found.pitch % 8 == 4
            assert found.rows in (1, 2, 4, 8) and found.rows * layout.lanes >= 32
            assert found.copies * found.form.n_words in (4, 8, 16, 32)
            assert 2048 * found.form.n_words * found.copies + 4 * found.tile * found.pitch <= found.shared_bytes
            assert blocks * (found.shared_bytes + 1024) <= 232448 + 1024 < (blocks + 1) * (found.shared_bytes + 1024)
            assert max_nonzeros <= found.form.n_nonzeros and max_phrase <= found.form.max_phrase
    assert n_fit > 5000
    for least in (1, 2, 4, 8):
        for total in np.exp(rng.uniform(0, 20, size=50)).astype(int):
            assert plan.choose_decode_rows(int(total), least, 132) in [rows for rows in (1, 2, 4, 8) if rows >= least]
    for rows in (1, 64, 128, 129, 2080, 6144):
        groups = plan.choose_groups(rows)
        found = plan.plan_multiply(groups, max_shared_bytes=232448)
        assert 232448 - 2 * (128 * 128 + 1024 * groups) - 16 < found.shared_bytes <= 232448
        assert found.slots > groups
        assert found.threads == 128 * (groups + 2)


def test_first_experts():
    rng = np.random.default_rng(8)
    digits = rng.integers(-1, 2, size=(4, 3, 50)).astype(np.int8)
    encoded = qmoecodec.encode(digits)
    for n in (1, 3, 4):
        some = source.first_experts(encoded, n)
        source.check_stack(some)
        assert (qmoecodec.decode(some) == digits[:n]).all()


def test_levels_are_numbers_whatever_their_byte_order():
    levels = np.array([[[-1.5, 2.0]] * 3] * 2, np.float32)
    expected = levels.view(np.uint8)
    for given in (levels, levels.astype(">f4"), np.asfortranarray(levels), levels[:, ::-1]):
        found = source.raw_levels(given, (2, 3, 4), None)
        assert found.dtype == "F32"
        assert np.array_equal(found.data, expected)
    bits = (levels.view(np.uint32) >> 16).astype(np.uint16)
    for given in (bits, bits.astype(">u2")):
        found = source.raw_levels(given, (2, 3, 4), "BF16")
        assert np.array_equal(found.data.view(np.uint16), bits)


@pytest.mark.parametrize(
    ("levels", "dtype"),
    [
        (np.ones((2, 3, 2), np.int32), "F32"),
        (np.ones((2, 3, 2), np.uint32), "F32"),
        (np.ones((2, 3, 2), np.uint16), "F16"),
        (np.ones((2, 3, 2), np.int16), "BF16"),
        (np.ones((2, 3, 2), np.float32), "F64"),
        (np.ones((2, 3, 2), np.uint16), None),
        (np.ones((2, 3, 2), np.complex64), None),
    ],
)
def test_other_bits_are_no_levels(levels, dtype):
    with pytest.raises(qmoecodec.FormatError, match="role_dtype"):
        source.raw_levels(levels, (2, 3, 4), dtype)


def test_what_is_no_array_is_no_levels():
    with pytest.raises(TypeError, match="not a list"):
        source.raw_levels([[[-1.0, 1.0]]], (1, 1, 4), "F32")
