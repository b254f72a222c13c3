"""A small seeded mutator, for tests that run without atheris."""

from __future__ import annotations

import random
from collections.abc import Sequence

WORDS = (b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\u0000", b"\\ud800", b"-", b"1.0", b"1e9", b"null", b"0", b" ", b"\xff",
         b"9223372036854775808", b"4294967296", b'"x-a":0,', b'"shape":[1]', b"U8", b"\0\0\0\0", b"\xff\xff\xff\xff")  # fmt: skip


def mutated(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Return the data with one to four changes."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out) + 1)
        n = min(rng.choice((1, 1, 2, 4, 16)), len(out) - at)
        kind = rng.randrange(7)
        if kind == 0 and n:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and n:
            out[at] = rng.randrange(256)
        elif kind == 2:
            del out[at : at + n]
        elif kind == 3:
            out[at:at] = out[at : at + n]
        elif kind == 4:
            out[at : at + rng.choice((0, n))] = rng.choice(WORDS)
        elif kind == 5 and n:
            out[at : at + n] = rng.randbytes(n)
        elif kind == 6:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            out[at : at + n] = other[start : start + n]
    return bytes(out)
