"""The compiled half of `aivf`: how many nodes of which kind the best trees have (numba; imported only when used).

Strings with the same numbers of 0, - and + are equally probable, so the kernel counts nodes by *type* (i, j, k) instead of
building them: a tree of 65,536 codewords has a few thousand types. Naive pseudocode of `_fill`, for one tree:

    while there are nodes left, take the most probable leaf or incomplete node v (first leaf -> incomplete, then -> internal):
        if fewer than `n_extend` nodes were extended:    give v its 0-child          (leaf -> incomplete)
        if fewer than `n_complete` nodes were completed: give v its - and + children (incomplete -> internal)

Trusts its arguments. Nothing but IEEE multiplication, addition, division and comparison, in a fixed order and without
fastmath, so every machine gets the same trees.
"""

from __future__ import annotations

from typing import Any

from qmoecodec._numba import njit

# A type is one number, length << 16 | j << 8 | k, so that shorter strings come first among equally probable ones.
_LENGTH, _MINUS = 16, 8


@njit(cache=True, nogil=True)
def _before(p: float, t: int, q: float, u: int) -> bool:
    return p > q or (p == q and t < u)


@njit(cache=True, nogil=True)
def _push(heap_p: Any, heap_t: Any, heap_n: Any, size: int, p: float, t: int, n: int) -> int:
    at = size
    while at > 0:
        up = (at - 1) >> 1
        if not _before(p, t, heap_p[up], heap_t[up]):
            break
        heap_p[at], heap_t[at], heap_n[at] = heap_p[up], heap_t[up], heap_n[up]
        at = up
    heap_p[at], heap_t[at], heap_n[at] = p, t, n
    return size + 1


@njit(cache=True, nogil=True)
def _pop(heap_p: Any, heap_t: Any, heap_n: Any, size: int) -> int:
    size -= 1
    p, t, n = heap_p[size], heap_t[size], heap_n[size]
    at = 0
    while True:
        down = 2 * at + 1
        if down >= size:
            break
        if down + 1 < size and _before(heap_p[down + 1], heap_t[down + 1], heap_p[down], heap_t[down]):
            down += 1
        if not _before(heap_p[down], heap_t[down], p, t):
            break
        heap_p[at], heap_t[at], heap_n[at] = heap_p[down], heap_t[down], heap_n[down]
        at = down
    heap_p[at], heap_t[at], heap_n[at] = p, t, n
    return size


@njit(cache=True, nogil=True)
def _fill(
    powers: Any,
    state: int,
    n_complete: int,
    n_extend: int,
    max_phrase: int,
    max_nonzeros: int,
    workspace: Any,
) -> tuple[int, int, float, float]:
    """One tree with the given numbers of steps; see the module's pseudocode.

    powers : float64[3, 256]    powers of P(0), P(-), P(+)
    workspace : float64[n], int64[n], int64[n] for the heap, n >= 3 * n_extend + 3 (probability, type, number of nodes);
        int64[n_extend, 3], filled with one (type, nodes extended, nodes completed) for each type that has any
    Returns (number of such types, nodes completed, mean digits per phrase, probability that it ends incomplete).
    """
    heap_p, heap_t, heap_n, out = workspace
    p_zero, p_minus, p_plus = powers[0, 1], powers[1, 1], powers[2, 1]
    p_nonzero = p_minus + p_plus
    symmetric = p_minus == p_plus  # then k stays 0 and j counts both
    scale = 1.0 / p_nonzero if state == 1 else 1.0
    minus, plus = 1 << _LENGTH | 1 << _MINUS, 1 << _LENGTH | 1

    size = 0
    if state == 0:
        size = _push(heap_p, heap_t, heap_n, size, p_zero, 1 << _LENGTH, 1)
    if symmetric:
        size = _push(heap_p, heap_t, heap_n, size, p_minus * scale, minus, 2)
    else:
        size = _push(heap_p, heap_t, heap_n, size, p_minus * scale, minus, 1)
        size = _push(heap_p, heap_t, heap_n, size, p_plus * scale, plus, 1)

    n_types = 0
    extended = completed = 0
    digits, incomplete = 1.0, 0.0
    while size > 0 and extended < n_extend:
        p, t, n = heap_p[0], heap_t[0], heap_n[0]
        size = _pop(heap_p, heap_t, heap_n, size)
        while size > 0 and heap_t[0] == t:  # the same strings, reached from another parent
            n += heap_n[0]
            size = _pop(heap_p, heap_t, heap_n, size)
        length, j, k = t >> _LENGTH, t >> _MINUS & 255, t & 255
        if length == max_phrase:
            continue
        x = min(n, n_extend - extended)
        y = min(x, n_complete - completed) if j + k < max_nonzeros else 0
        extended += x
        completed += y
        digits += x * p * p_zero + y * p * p_nonzero
        incomplete += (x - y) * p * p_nonzero
        out[n_types, 0], out[n_types, 1], out[n_types, 2] = t, x, y
        n_types += 1
        i = length - j - k
        down = powers[0, i + 1] * (powers[1, j] * powers[2, k]) * scale
        size = _push(heap_p, heap_t, heap_n, size, down, t + (1 << _LENGTH), x)
        if y > 0:
            down = powers[0, i] * (powers[1, j + 1] * powers[2, k]) * scale
            if symmetric:
                size = _push(heap_p, heap_t, heap_n, size, down, t + minus, 2 * y)
            else:
                size = _push(heap_p, heap_t, heap_n, size, down, t + minus, y)
                down = powers[0, i] * (powers[1, j] * powers[2, k + 1]) * scale
                size = _push(heap_p, heap_t, heap_n, size, down, t + plus, y)
    return n_types, completed, digits, incomplete


@njit(cache=True, nogil=True)
def count_nodes(
    powers: Any,
    state: int,
    n_codewords: int,
    threshold: int,
    max_phrase: int,
    max_nonzeros: int,
    workspace: Any,
) -> tuple[int, float, float]:
    """Best tree of one state with at most `threshold` leaves and `n_codewords` - `threshold` incomplete nodes.

    Returns (types in the workspace, mean digits per phrase, probability that it ends incomplete).
    """
    # Each completion adds two leaves to those of the root; each extension that is not completed is one incomplete node.
    n_complete = (threshold - 3 + state) // 2
    while True:
        n_extend = n_complete + n_codewords - threshold
        n_types, completed, digits, incomplete = _fill(powers, state, n_complete, n_extend, max_phrase, max_nonzeros, workspace)
        if completed == n_complete:
            return n_types, digits, incomplete
        n_complete = completed  # the limits leave fewer nodes to complete, and so room for fewer extended ones


@njit(cache=True, nogil=True)
def mean_digits(
    powers: Any,
    n_codewords: int,
    threshold: int,
    max_phrase: int,
    max_nonzeros: int,
    workspace: Any,
) -> float:
    """Digits per codeword of the best pair of trees with this threshold, for long rows."""
    _, digits_0, to_1 = count_nodes(powers, 0, n_codewords, threshold, max_phrase, max_nonzeros, workspace)
    _, digits_1, stay_1 = count_nodes(powers, 1, n_codewords, threshold, max_phrase, max_nonzeros, workspace)
    in_1 = to_1 / (1.0 - stay_1 + to_1)
    return (1.0 - in_1) * digits_0 + in_1 * digits_1


@njit(cache=True, nogil=True)
def best_threshold(
    powers: Any,
    n_codewords: int,
    first: int,
    last: int,
    max_phrase: int,
    max_nonzeros: int,
    workspace: Any,
) -> tuple[int, float]:
    """The threshold in first..last that gives most digits per codeword, the least one of several.

    Tries 256 thresholds and then all those near the best one: the trees' digits rise and fall slowly. Against all
    thresholds this lost nothing on 60 random sets of probabilities with 12 bits, and on 9 with 16 bits.
    Returns (threshold, digits per codeword).
    """
    best, best_digits = first, -1.0
    step = n_codewords >> 8
    for threshold in range(first, last + 1, step):
        digits = mean_digits(powers, n_codewords, threshold, max_phrase, max_nonzeros, workspace)
        if digits > best_digits:
            best, best_digits = threshold, digits
    if step == 1:
        return best, best_digits
    near = best
    for threshold in range(max(first, near - 2 * step), min(last, near + 2 * step) + 1):
        digits = mean_digits(powers, n_codewords, threshold, max_phrase, max_nonzeros, workspace)
        if digits > best_digits or (digits == best_digits and threshold < best):
            best, best_digits = threshold, digits
    return best, best_digits
