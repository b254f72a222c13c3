"""The reader of JSON by itself: what numbers become, which characters begin and end a value, and the places of errors."""

from __future__ import annotations

import json
import math
import re
import sys
from typing import Any

import pytest

from qmoecodec.container.json_text import MAX_VALUES, Reader, canonical, compact, decode_utf8, parse_object
from qmoecodec.errors import FormatError


def error_of(text: str) -> FormatError:
    with pytest.raises(FormatError) as caught:
        parse_object(text)
    return caught.value


def test_any_number_becomes_an_integer_while_it_is_one() -> None:
    text = '{"m":[1,1234567890123456789,12345678901234567890,123456789012345678901,1.5,-1]}'
    numbers = parse_object(text, any_number_below="m")["m"]
    assert numbers == [1, 1234567890123456789, 12345678901234567890, 123456789012345678901, 1.5, -1]
    assert [type(n) for n in numbers] == [int, int, int, int, float, int]


@pytest.mark.parametrize(
    "text",
    ['{"a":}}', '{"a":~}}', '{"a":é}}', "{~", "{}}", '{"a":1~', '{"a":1é', '["a":1}', '}"a":1}', '~"a":1}', '!"a":1}'],
)  # fmt: skip
def test_other_characters_open_and_close_nothing(text: str) -> None:
    assert error_of(text).reason == "header_json"


def test_what_was_expected_is_said() -> None:
    assert error_of('{"a":').message == error_of('{"a":!}').message == "expected a value"
    assert error_of('{"a"').message == "expected ':'"
    assert error_of("[]").message == "the text is not an object"
    assert error_of("{} {").message == "something follows the object"


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ('{"a":-' + "1" * 60 + "}", "-" + "1" * 39 + " is not"),
        ('{"a":' + "9" * 60 + "}", "9" * 40 + " is above"),
        ('{"' + "k" * 90 + '":1,"' + "k" * 90 + '":2}', "'" + "k" * 80 + "' stands"),
    ],
)
def test_a_message_quotes_the_beginning_of_what_is_long(text: str, quoted: str) -> None:
    assert re.search(rf"(^|\s){re.escape(quoted)}", error_of(text).message)


def test_places_are_bytes_of_the_file() -> None:
    for data, byte in ((b"\xef\xbb\xbf{}", 0), (b'{"\xff', 2), (b'{"\xc3\xa9\xff', 4)):
        for base in (0, 8):
            with pytest.raises(FormatError) as caught:
                decode_utf8(data, base=base)
            assert caught.value.where == {"byte": base + byte}
        with pytest.raises(FormatError) as caught:
            decode_utf8(data)
        assert caught.value.where == {"byte": byte}


def test_values_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every value counts, keys do not; the limit itself is allowed."""
    assert MAX_VALUES == 1_048_576
    for text, n in (("{}", 1), ('{"a":1}', 2), ('{"a":[1,"x",null],"b":{"c":{}}}', 7), ('{"a":[[],[]]}', 4)):
        monkeypatch.setitem(Reader.__init__.__kwdefaults__, "max_values", n)
        parse_object(text)
        monkeypatch.setitem(Reader.__init__.__kwdefaults__, "max_values", n - 1)
        with pytest.raises(FormatError, match=f"json_size.*more than {n - 1} values"):
            parse_object(text)


@pytest.mark.parametrize("write", [canonical, compact])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_is_no_json_is_not_written(write: object, number: float) -> None:
    assert callable(write)
    with pytest.raises(ValueError, match="JSON"):
        write({"a": number})


def test_the_place_of_a_byte_order_mark() -> None:
    error = error_of("\ufeff{}")
    assert (error.reason, error.where) == ("header_encoding", {"byte": 0})


def test_levels_that_are_not_kept_are_checked_all_the_same() -> None:
    def cut(value: Any, keep: int) -> Any:
        if isinstance(value, list):
            return [cut(item, keep - 1) for item in value] if keep > 0 else None
        if isinstance(value, dict):
            return {key: cut(item, keep - 1) for key, item in value.items()} if keep > 0 else None
        return value

    for text in ('[1,[2,[3,[],{}]],{"a":{"b":["c"]}}]', '{"a":[1,{"b":[2,{}]},[]],"c":{"d":[]}}', "3", "[]", "{}"):
        for keep in range(-1, 7):
            reader = Reader(text)
            assert reader.value(1, keep) == cut(json.loads(text), keep)
            assert reader.at == len(text)
    for text, reason in (("[[[-1]]]", "json_number"), ('[[{"a":1,"a":2}]]', "duplicate_key"), ("[[{}}]]", "header_json"),
                         ("[" * 17 + "]" * 17, "json_depth")):  # fmt: skip
        for keep in range(4):
            with pytest.raises(FormatError) as caught:
                Reader(text).value(1, keep)
            assert caught.value.reason == reason


def test_an_integer_of_a_thousand_digits_is_kept_exactly() -> None:
    for digits, kept in (("9" * 1000, True), ("-" + "9" * 999, True), ("9" * 1001, False), ("-" + "9" * 1000, False)):
        (number,) = parse_object(f'{{"m":[{digits}]}}', any_number_below="m")["m"]
        assert number == (int(digits) if kept else math.copysign(sys.float_info.max, int(digits[:5])))
        assert type(number) is (int if kept else float)
