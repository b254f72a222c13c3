"""Strict JSON (spec §2.2): what `json.loads` lets through, this reader rejects, and nesting cannot exhaust the stack."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from json.decoder import scanstring  # type: ignore[attr-defined]  # typeshed leaves it out; the C scanner of strings
from typing import Any, Final

from qmoecodec.errors import FormatError

MAX_DEPTH: Final = 16
MAX_NUMBER: Final = 2**63 - 1
MAX_VALUES: Final = 1 << 20
#: Of an integer that is kept exactly where any number may stand.
MAX_DIGITS: Final = 1000

_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_SURROGATE = re.compile("[\ud800-\udfff]")
_HALF = r"\\u[dD][89abAB][0-9a-fA-F]{2}"
_GOOD = re.compile(
    r'(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u(?![dD][89a-fA-F])[0-9a-fA-F]{4}|' + _HALF + r"\\u[dD][c-fC-F][0-9a-fA-F]{2})*+"
)
_LONE = re.compile(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
_LITERALS: Final = (("true", True), ("false", False), ("null", None))


class Reader:
    """A recursive descent over one text; the recursion is as deep as `MAX_DEPTH` at most.

    text : valid Unicode (decoded from UTF-8, so without surrogates)
    base : byte at which the text begins, for the places in errors
    max_values : how many values the text may hold
    any_number_below : key of the outermost object below which numbers may be any JSON number (spec §8)
    """

    __slots__ = ("any_number", "any_number_below", "at", "base", "max_values", "n_values", "text")

    def __init__(
        self, text: str, *, base: int = 0, any_number_below: str | None = None, max_values: int = MAX_VALUES
    ) -> None:
        self.text = text
        self.base = base
        self.max_values = max_values
        self.n_values = 0
        self.at = 0
        self.any_number = False
        self.any_number_below = any_number_below

    def fail(self, reason: str, message: str, at: int | None = None) -> FormatError:
        """Return the error for the place where the reader stands, or for character `at`."""
        return FormatError(reason, message, byte=self.base + len(self.text[: self.at if at is None else at].encode()))

    def peek(self) -> str:
        """Skip white space and return the next character, "" at the end."""
        match = _SPACE.match(self.text, self.at)
        assert match is not None
        self.at = match.end()
        return self.text[self.at : self.at + 1]

    def expect(self, character: str) -> None:
        """Skip white space and step over `character`."""
        if self.peek() != character:
            raise self.fail("header_json", f"expected {character!r}")
        self.at += 1

    def count(self, n: int) -> None:
        """Count `n` values that begin here."""
        self.n_values += n
        if self.n_values > self.max_values:
            raise self.fail("json_size", f"more than {self.max_values} values")

    def string(self) -> str:
        """Read a string; the reader stands before its opening quote or white space."""
        self.expect('"')
        start = self.at
        try:
            value, self.at = scanstring(self.text, start, True)
        except json.JSONDecodeError as error:
            self._check_surrogates(start)
            raise self.fail("header_json", error.msg, error.pos) from None
        if _SURROGATE.search(value):
            self._check_surrogates(start)
            raise self.fail("header_encoding", "a surrogate stands alone", start)
        return str(value)

    def _check_surrogates(self, start: int) -> None:
        """Raise the error for a surrogate that stands alone, if that is the first fault of the string at `start`."""
        good = _GOOD.match(self.text, start)
        if good is not None and _LONE.match(self.text, good.end()):
            raise self.fail("header_encoding", "a surrogate stands alone", good.end())

    def number(self) -> int | float:
        """Read a number; only integers in 0..2^63-1 unless any may stand here."""
        match = _NUMBER.match(self.text, self.at)
        if match is None:
            raise self.fail("header_json", "expected a value")
        literal = match[0]
        if self.any_number:
            self.at = match.end()
            if literal.lstrip("-").isdigit() and len(literal) <= MAX_DIGITS:
                return int(literal)
            # Beyond the largest double there is only infinity, which JSON cannot write.
            return max(-sys.float_info.max, min(sys.float_info.max, float(literal)))
        if not literal.isdigit():
            raise self.fail("json_number", f"{literal[:40]} is not an integer in 0..2^63-1")
        if len(literal) > 19 or int(literal) > MAX_NUMBER:
            raise self.fail("json_number", f"{literal[:40]} is above 2^63-1")
        self.at = match.end()
        return int(literal)

    def value(self, depth: int, keep: int = MAX_DEPTH) -> Any:
        """Read any value; an array or object that begins here is `depth` deep.

        keep : how many levels of arrays and objects to build; those below are checked, and None stands for them
        """
        character = self.peek()
        self.count(1)
        if character == '"':
            return self.string()
        if character == "{":
            found: Any = self.object(depth, keep)
            return found if keep > 0 else None
        if character == "[":
            found = self.array(depth, keep)
            return found if keep > 0 else None
        for literal, value in _LITERALS:
            if self.text.startswith(literal, self.at):
                self.at += len(literal)
                return value
        return self.number()

    def open_nested(self, depth: int) -> None:
        """Step over the opening bracket of a value `depth` deep."""
        if depth > MAX_DEPTH:
            raise self.fail("json_depth", f"values nested more than {MAX_DEPTH} deep")
        self.at += 1

    def array(self, depth: int, keep: int = MAX_DEPTH) -> list[Any]:
        """Read an array; `keep` as in `value`."""
        self.open_nested(depth)
        items: list[Any] = []
        if self.peek() == "]":
            self.at += 1
            return items
        while True:
            item = self.value(depth + 1, keep - 1)
            if keep > 0:
                items.append(item)
            if self.peek() == "]":
                self.at += 1
                return items
            self.expect(",")

    def keys(self, depth: int) -> Iterator[str]:
        """Step through an object: yield each key with the reader before its value, which the caller reads.

        A key that stands twice is an error at the end of the object (spec §2.2).
        """
        self.peek()
        self.open_nested(depth)
        seen: set[str] = set()
        twice: FormatError | None = None
        if self.peek() == "}":
            self.at += 1
            return
        while True:
            self.peek()
            start = self.at
            key = self.string()
            if key in seen and twice is None:
                twice = self.fail("duplicate_key", f"key {key[:80]!r} stands twice", start)
            seen.add(key)
            self.expect(":")
            yield key
            if self.peek() == "}":
                self.at += 1
                if twice is not None:
                    raise twice
                return
            self.expect(",")

    def object(self, depth: int, keep: int = MAX_DEPTH) -> dict[str, Any]:
        """Read an object; `keep` as in `value`."""
        result: dict[str, Any] = {}
        for key in self.keys(depth):
            freed = depth == 1 and key == self.any_number_below
            self.any_number |= freed
            value = self.value(depth + 1, keep - 1)
            if keep > 0:
                result[key] = value
            if freed:
                self.any_number = False
        return result


def decode_utf8(data: bytes | memoryview, *, base: int = 0) -> str:
    """Decode UTF-8 without a byte-order mark; `base` is the byte at which the data begins.

    Raises FormatError: header_encoding.
    """
    if data[:3] == b"\xef\xbb\xbf":
        raise FormatError("header_encoding", "a byte-order mark", byte=base)
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise FormatError("header_encoding", error.reason, byte=base + error.start) from None


def parse_object(text: str, *, any_number_below: str | None = None) -> dict[str, Any]:
    """Parse a text that is one JSON object and white space (spec §2.2).

    Raises FormatError: header_json, duplicate_key, json_depth, json_number, json_size, header_encoding.

    >>> parse_object('{"a": [1, true]}')
    {'a': [1, True]}
    >>> parse_object('{"a": 1, "\\\\u0061": 2}')
    Traceback (most recent call last):
    qmoecodec.errors.FormatError: [duplicate_key] key 'a' stands twice (byte 9)
    """
    reader = Reader(text, any_number_below=any_number_below)
    if text.startswith("\ufeff"):
        raise reader.fail("header_encoding", "a byte-order mark")
    if reader.peek() != "{":
        raise reader.fail("header_json", "the text is not an object")
    reader.count(1)
    result = reader.object(1)
    if reader.peek():
        raise reader.fail("header_json", "something follows the object")
    return result


def canonical(value: Any) -> str:
    """Write a value in the canonical form of spec §3.2.

    >>> canonical({"b": [1, "\\u00e9\\x7f"], "a": {}})
    '{"a":{},"b":[1,"\\\\u00e9\\\\u007f"]}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


_COMPACT: Final = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def compact(value: Any) -> str:
    """Write a value as safetensors does: no spaces, keys in their order, characters as they are."""
    return _COMPACT.encode(value)
