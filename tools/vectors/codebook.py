"""Dictionaries and the canonical encoding (spec §4, §5), in plain Python."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

LEAF, INCOMPLETE, INTERNAL = 0, 1, 2
Row = bytes  # digits: 0, 1 for -, 2 for +


def pack_pairs(values: Iterable[int]) -> bytes:
    """Pack two-bit values, four to a byte, lowest bits first (§4.2, §4.3)."""
    values = [*values]
    values += [0] * (-len(values) % 4)
    return bytes(sum(value << 2 * k for k, value in enumerate(values[i : i + 4])) for i in range(0, len(values), 4))


def walk(symbols: Iterator[int], roots: Iterable[int]) -> Iterator[tuple[Row, int]]:
    """Yield (phrase, symbol) of the nodes of one tree in preorder."""
    stack = [bytes([digit]) for digit in reversed([*roots])]
    while stack:
        node = stack.pop()
        symbol = next(symbols)
        yield node, symbol
        stack += [node + bytes([child]) for child in reversed(range((0, 1, 3)[symbol]))]


@dataclass(frozen=True)
class Codebook:
    """One dictionary; `phrases[state]` maps a used codeword to its phrase, `data` is its tensor."""

    kind: str
    bits: int
    threshold: int
    data: bytes
    phrases: tuple[dict[int, Row], ...] = field(repr=False)

    @cached_property
    def codes(self) -> list[dict[Row, int]]:
        return [{phrase: code for code, phrase in tree.items()} for tree in self.phrases]

    @cached_property
    def longest(self) -> int:
        return max((len(phrase) for tree in self.phrases for phrase in tree.values()), default=0)

    def encode(self, row: Row) -> list[int]:
        """Return the canonical codewords of a row (§5.1); ValueError where there are none."""
        codes: list[int] = []
        at, ahead = 0, row + bytes(255)
        while at < len(row):
            tree = self.codes[codes[-1] >= self.threshold if codes and self.kind == "aivf" else 0]
            fitting = [n for n in range(1, self.longest + 1) if ahead[at : at + n] in tree]
            reaching = [n for n in fitting if at + n >= len(row)]
            n = min(reaching) if reaching else max(fitting, default=0)
            if n == 0:
                raise ValueError("no phrase matches")
            codes.append(tree[ahead[at : at + n]])
            at += n
        return codes

    def pack(self, codes: Iterable[int]) -> bytes:
        """Return the bytes of a row (§5.3)."""
        codes = [*codes]
        value = sum(code << self.bits * k for k, code in enumerate(codes))
        return value.to_bytes(-(-len(codes) * self.bits // 8), "little")


def aivf(bits: int, threshold: int, tree_0: Iterable[int], tree_1: Iterable[int]) -> Codebook:
    """Make a dictionary of the node symbols of two trees, roots left out."""
    symbols = [[*tree_0], [*tree_1]]
    phrases = []
    for tree, roots in zip(symbols, ((0, 1, 2), (1, 2)), strict=True):
        nodes = [*walk(iter(tree), roots)]
        assert len(nodes) == len(tree)
        leaves = [node for node, symbol in nodes if symbol == LEAF]
        incomplete = [node for node, symbol in nodes if symbol == INCOMPLETE]
        assert len(leaves) <= threshold <= 2**bits - len(incomplete)
        phrases.append(dict(enumerate(leaves)) | dict(enumerate(incomplete, threshold)))
    return Codebook("aivf", bits, threshold, pack_pairs(itertools.chain(*symbols)), tuple(phrases))


def table(bits: int, phrases: dict[int, Row]) -> Codebook:
    """Make a dictionary of an explicit list of phrases."""
    lengths = bytes(len(phrases.get(code, b"")) for code in range(2**bits))
    digits = b"".join(phrases[code] for code in sorted(phrases))
    return Codebook("table", bits, 2**bits, lengths + pack_pairs(digits), (phrases,))


def random_aivf(rng: random.Random, bits: int, threshold: int, steps: int, p_zero: float) -> Codebook:
    """Grow two trees at random until nothing fits or after so many steps."""
    trees = []
    for roots in ((0, 1, 2), (1, 2)):
        nodes: dict[Row, int] = {bytes([digit]): LEAF for digit in roots}
        for _ in range(steps):
            leaves = [node for node, symbol in nodes.items() if symbol == LEAF]
            incomplete = [node for node, symbol in nodes.items() if symbol == INCOMPLETE]
            zeros = [node for node in leaves if node[-1] == 0] if rng.random() < p_zero else leaves
            node = rng.choice([*(zeros or leaves), *incomplete])
            if len(node) > 200:
                break
            if node in incomplete:
                if len(leaves) + 2 > threshold:
                    continue
                nodes[node] = INTERNAL
                nodes |= {node + b"\1": LEAF, node + b"\2": LEAF}
            elif rng.random() < p_zero:
                if len(incomplete) + 1 > 2**bits - threshold:
                    continue
                nodes |= {node: INCOMPLETE, node + b"\0": LEAF}
            else:
                if len(leaves) + 2 > threshold:
                    continue
                nodes |= {node: INTERNAL, node + b"\0": LEAF, node + b"\1": LEAF, node + b"\2": LEAF}
        trees.append([nodes[node] for node in sorted(nodes)])  # sorted strings are in preorder
    return aivf(bits, threshold, *trees)


def random_table(rng: random.Random, bits: int, n_phrases: int, longest: int, p_zero: float) -> Codebook:
    """Draw phrases; the three single digits are always there, so that every row can be encoded."""
    weights = [p_zero, (1 - p_zero) / 2, (1 - p_zero) / 2]
    phrases = {bytes([digit]) for digit in range(3)}
    for _ in range(n_phrases - 3):
        phrases.add(bytes(rng.choices(range(3), weights, k=rng.randint(2, longest))))
    codes = rng.sample(range(2**bits), len(phrases))
    return table(bits, dict(zip(sorted(codes), sorted(phrases), strict=True)))
