"""Rows of one expert: encode, decode, count, multiply (spec §5). Checks the input, then lets a backend work."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from qmoecodec import reference
from qmoecodec.codec.arguments import (
    check_backend,
    check_dictionary,
    check_digits,
    check_integer,
    check_out,
    check_rows,
    to_float32,
)
from qmoecodec.errors import EncodeError, FormatError
from qmoecodec.types import Dictionary, Int8Array, UInt8Array, UInt32Array

RowBackend = Literal["numba", "reference"]

_DIGIT_OF_VALUE = {0: 0, -1: 1, 1: 2}
_VALUE_OF_DIGIT = (0, -1, 1)


def encode_rows(
    digits: Int8Array, *, dictionary: Dictionary, backend: RowBackend = "numba"
) -> tuple[UInt8Array, UInt32Array]:
    """Encode rows, each on its own, back to back (spec §5.1, §5.3).

    digits : int8[rows, cols]    values -1, 0, 1
    Returns codes uint8[n_bytes] and row_lengths uint32[rows], counted in codewords.
    Raises EncodeError where a table has no phrase for a row; ValueError, TypeError for other values.
    """
    check_dictionary(dictionary)
    check_backend(backend)
    digits = check_digits(digits, 2)
    rows, cols = digits.shape
    row_lengths = np.zeros(rows, np.uint32)
    if not digits.size:
        return np.zeros(0, np.uint8), row_lengths
    if backend == "reference":
        data = []
        for r in range(rows):
            codewords = reference.encode_row([_DIGIT_OF_VALUE[int(d)] for d in digits[r]], dictionary)
            row_lengths[r] = len(codewords)
            data.append(reference.pack_row(codewords, code_bits=dictionary.code_bits))
        return np.frombuffer(b"".join(data), np.uint8).copy(), row_lengths
    from qmoecodec._kernels import encode, tables  # loads Numba

    out = np.empty(rows * ((cols * dictionary.code_bits + 7) // 8), np.uint8)
    if dictionary.kind == "aivf":
        automaton = tables.encode_tables(dictionary)
        n = encode.encode_aivf(digits, automaton.steps, automaton.final, dictionary.code_bits, out, row_lengths)
    else:
        trie = tables.trie(dictionary)
        n, bad = encode.encode_table(digits, trie.children, trie.codeword, dictionary.code_bits, out, row_lengths)
        if bad >= 0:
            raise EncodeError(f"the dictionary has no phrase for row {bad}")
    return out[:n].copy(), row_lengths


def starts_of_rows(
    n_bytes: int, row_lengths: npt.NDArray[Any], *, cols: int, dictionary: Dictionary
) -> npt.NDArray[np.int64]:
    """Return the byte where each row of an expert begins, and the end, after the checks that make decoding safe to start.

    row_lengths : uint32[rows] or int64[rows]    of the whole expert: so is the bound of spec §6.4
    Returns int64[rows + 1].
    Raises FormatError: row_lengths (they do not add up to n_bytes), row_underrun (the bound of spec §6.4).
    """
    lengths = row_lengths.astype(np.int64)
    rows = len(lengths)
    # A codeword takes at least one byte: no row can have more of them than there are bytes.
    if rows and int(lengths.max()) > n_bytes:
        raise FormatError("row_lengths", "a row has more codewords than its expert bytes", row=int(np.argmax(lengths)))
    starts = np.zeros(rows + 1, np.int64)
    np.cumsum((lengths * dictionary.code_bits + 7) // 8, out=starts[1:])
    # Lengths are below 2^48 or so: a sum that wraps is below 0 on its way.
    if int(starts[-1]) != n_bytes or int(starts.min()) < 0:
        raise FormatError("row_lengths", f"the rows take {int(starts[-1])} bytes, the expert has {n_bytes}")
    n_codewords = int(lengths.sum())
    if rows * cols > dictionary.max_phrase * n_codewords:
        raise FormatError("row_underrun", f"{n_codewords} codewords cannot give {rows} x {cols} digits")
    return starts


def explain(
    codes: UInt8Array,
    starts: npt.NDArray[np.int64],
    row_lengths: UInt32Array,
    row: int,
    *,
    cols: int,
    dictionary: Dictionary,
) -> FormatError:
    """Find out from the reference codec what is wrong with a row that a kernel refused."""
    data = codes[starts[row] : starts[row + 1]].tobytes()
    try:
        reference.read_row(data, n_codewords=int(row_lengths[row]), cols=cols, dictionary=dictionary)
    except FormatError as error:
        return error.at(row=row)
    raise AssertionError(f"a kernel refused row {row}, which the reference accepts")


def decode_rows(
    codes: UInt8Array,
    row_lengths: UInt32Array,
    *,
    cols: int,
    dictionary: Dictionary,
    backend: RowBackend = "numba",
    out: Int8Array | None = None,
) -> Int8Array:
    """Expand codewords into ternary rows (spec §5.2).

    codes : uint8[n_bytes]    codewords of all rows, each row from a new byte on
    row_lengths : uint32[rows]    counted in codewords, not bytes
    out : int8[rows, cols]    written and returned where given; C-contiguous
    Returns int8[rows, cols], values -1, 0, 1.
    Raises FormatError: row_lengths, row_padding, unused_codeword, row_overrun, row_underrun, overrun_nonzero;
    TypeError, ValueError for a caller's mistakes.
    """
    codes, row_lengths = check_rows(codes, row_lengths, dictionary)
    cols = check_integer(cols, "cols", least=0)
    starts = starts_of_rows(len(codes), row_lengths, cols=cols, dictionary=dictionary)
    return decode_checked(codes, starts, row_lengths, cols=cols, dictionary=dictionary, backend=backend, out=out)


def decode_checked(
    codes: UInt8Array,
    starts: npt.NDArray[np.int64],
    row_lengths: UInt32Array,
    *,
    cols: int,
    dictionary: Dictionary,
    backend: RowBackend = "numba",
    out: Int8Array | None = None,
) -> Int8Array:
    """Expand any rows of an expert that `starts_of_rows` has checked (spec §5.2).

    codes : uint8[n_bytes]    of the expert
    starts : int64[rows + 1]    byte where each of these rows begins, and the end of the last
    row_lengths : uint32[rows]    of these rows
    out : int8[rows, cols]    written and returned where given
    Returns int8[rows, cols]. Raises FormatError: row_padding, unused_codeword, row_overrun, row_underrun, overrun_nonzero.
    """
    check_backend(backend)
    rows = len(row_lengths)
    if out is None:
        out = np.empty((rows, cols), np.int8)
    else:
        check_out(out, (rows, cols))
    if backend == "reference":
        for r in range(rows):
            n = int(row_lengths[r])
            try:
                data = codes[starts[r] : starts[r + 1]].tobytes()
                digits = reference.read_row(data, n_codewords=n, cols=cols, dictionary=dictionary)
            except FormatError as error:
                raise error.at(row=r) from None
            out[r] = [_VALUE_OF_DIGIT[d] for d in digits]
        return out
    from qmoecodec._kernels import decode, tables  # loads Numba

    t = tables.decode_tables(dictionary)
    bad = decode.decode(
        codes, starts, row_lengths, dictionary.code_bits, dictionary.threshold,
        t.lengths, t.scatter, t.three, t.last_nonzero, t.words, out,
    )  # fmt: skip
    if bad >= 0:
        raise explain(codes, starts, row_lengths, bad, cols=cols, dictionary=dictionary)
    return out


def count_digits(
    codes: UInt8Array, row_lengths: UInt32Array, *, rows: int, cols: int, dictionary: Dictionary
) -> npt.NDArray[np.int64]:
    """Count the digits 0, -, + of rows from their codewords, without decoding them.

    rows : len(row_lengths)
    Returns int64[3]. The rows are trusted to be well formed beyond what the counts themselves show.
    Raises FormatError: row_lengths, row_underrun, row_overrun, row_padding, unused_codeword; TypeError, ValueError for a
    caller's mistakes.
    """
    from qmoecodec._kernels import decode, tables  # loads Numba

    codes, row_lengths = check_rows(codes, row_lengths, dictionary)
    cols = check_integer(cols, "cols", least=0)
    if check_integer(rows, "rows") != len(row_lengths):
        raise ValueError(f"rows is {rows}, but there are {len(row_lengths)} row_lengths")
    starts = starts_of_rows(len(codes), row_lengths, cols=cols, dictionary=dictionary)
    t = tables.decode_tables(dictionary)
    histogram = np.zeros(len(t.lengths), np.int64)
    bad = decode.histogram(codes, starts, row_lengths, dictionary.code_bits, dictionary.threshold, cols, histogram)
    if bad >= 0:
        raise explain(codes, starts, row_lengths, bad, cols=cols, dictionary=dictionary)
    if histogram[t.lengths == 0].any():
        raise FormatError("unused_codeword")
    counts = histogram @ t.counts
    overrun = int(counts.sum()) - rows * cols
    if overrun < 0:
        raise FormatError("row_underrun")
    counts[0] -= overrun
    return np.asarray(counts, np.int64)


def matvec_rows(
    codes: UInt8Array,
    row_lengths: UInt32Array,
    levels: npt.NDArray[np.float32],
    x: npt.NDArray[np.float32],
    *,
    dictionary: Dictionary,
) -> npt.NDArray[np.float32]:
    """Multiply compressed rows with a vector without storing the decoded matrix.

    levels : float32[rows, 2]    low and high level of each row
    x : float32[cols]
    Returns float32[rows], accumulated in float32.
    Raises FormatError like `decode_rows`; TypeError, ValueError for a caller's mistakes.
    """
    from qmoecodec._kernels import decode, tables  # loads Numba

    codes, row_lengths = check_rows(codes, row_lengths, dictionary)
    x, levels = to_float32(x, "x"), to_float32(levels, "levels")
    if x.ndim != 1:
        raise ValueError(f"x has one dimension, not the shape {x.shape}")
    if levels.shape != (len(row_lengths), 2):
        raise ValueError(f"levels have the shape {levels.shape}, not {(len(row_lengths), 2)}")
    x, levels = np.ascontiguousarray(x), np.ascontiguousarray(levels)
    cols = len(x)
    starts = starts_of_rows(len(codes), row_lengths, cols=cols, dictionary=dictionary)
    t = tables.decode_tables(dictionary)
    out = np.empty(len(row_lengths), np.float32)
    bits, threshold = dictionary.code_bits, dictionary.threshold
    if len(t.gather):
        spread = decode.spread_x(x)
        bad = decode.matvec_gather(
            codes, starts, row_lengths, bits, threshold, t.gather, t.three, t.last_nonzero, levels, spread, cols, out
        )
    else:
        bad = decode.matvec_copy(
            codes, starts, row_lengths, bits, threshold, t.lengths, t.last_nonzero, t.words, levels, x, out
        )
    if bad >= 0:
        raise explain(codes, starts, row_lengths, bad, cols=cols, dictionary=dictionary)
    return out
