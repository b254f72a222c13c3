"""Vectors with a fault in the container, its JSON or its tensors (spec §2)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from vectors.draft import Draft
from vectors.faults import (
    BASES,
    Case,
    Fault,
    broken,
    cut,
    entry,
    header_length,
    many,
    removed,
    setting,
    text,
    whole,
)
from vectors.parts import (
    Vector,
)


def container() -> Iterator[Vector]:
    file = BASES["8"].render()
    n = int.from_bytes(file[:8], "little")
    cuts = {
        "empty": 0,
        "one-byte": 1,
        "seven-bytes": 7,
        "length-only": 8,
        "first-brace": 9,
        "header-half": 8 + n // 2,
        "header-less-one": 7 + n,
    }
    yield from broken("8", [(f"cut-{name}", "truncated", "CON-001", cut(at)) for name, at in cuts.items()])
    header = json.loads(file[8 : 8 + n])
    ends = sorted({entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"} | {0})
    yield from broken("8", [(f"cut-data-{at}", "truncated", "TEN-008", cut(8 + n + at)) for at in ends[:-1]])
    yield from broken(
        "8",
        [
            ("cut-last-byte", "truncated", "TEN-008", whole(lambda file: file[:-1])),
            ("length-beyond-file", "truncated", "CON-001", header_length(len(file) // 8 * 8 + 80)),
            ("length-one-too-many", "truncated", "CON-001", header_length((len(file) - 8) // 8 * 8 + 8)),
            ("length-2-63", "header_size", "CON-002 GEN-001", header_length(2**63)),
            ("length-2-64-less-8", "header_size", "CON-002 GEN-001", header_length(2**64 - 8)),
            ("length-2-64-less-1", "header_size", "CON-002 GEN-001", header_length(2**64 - 1)),
            ("length-zero", "header_size", "CON-002", header_length(0)),
            ("length-one", "header_size", "CON-002", header_length(1)),
            ("length-not-multiple-of-8", "header_size", "CON-003", header_length(n - 1)),
            ("length-multiple-of-4", "header_size", "CON-003", header_length(n - 4)),
            ("length-8-short", "header_json", "CON-005", header_length(n - 64)),
            (
                "header-spaces-missing",
                "header_size",
                "CON-003",
                setting(header_text=lambda text: text + " " * (-len(text) % 8), padding=1),
            ),
            (
                "header-spaces-64",
                "header_json",
                "CON-006",
                setting(header_text=lambda text: text[:-1] + " " * (-len(text) % 8) + "}", padding=64),
            ),
            (
                "header-spaces-80",
                "header_json",
                "CON-006",
                setting(header_text=lambda text: text[:-1] + " " * (-len(text) % 8) + "}", padding=80),
            ),
            ("header-ends-with-newline", "header_json", "CON-006", setting(header_text=lambda text: text + "\n")),
            ("header-ends-with-nul", "header_json", "CON-006", setting(header_text=lambda text: text + "\0")),
            ("header-ends-with-tab", "header_json", "CON-006", setting(header_text=lambda text: text + " \t ")),
            ("header-second-object", "header_json", "CON-006", setting(header_text=lambda text: text + "{}")),
            ("header-begins-with-space", "header_json", "CON-005", setting(header_text=lambda text: " " + text)),
            ("header-array", "header_json", "CON-005", setting(header_text=lambda text: "[" + text + "]")),
            ("header-string", "header_json", "CON-005", setting(header_text=lambda text: json.dumps(text))),
            ("header-number", "header_json", "CON-005", setting(header_text=lambda text: "12345678")),
            ("header-spaces-only", "header_json", "CON-005", setting(header_text=lambda text: " " * 8)),
            ("header-bom", "header_encoding", "CON-004", setting(header_text=lambda text: "\ufeff" + text)),
            (
                "header-utf16",
                "header_encoding",
                "CON-004",
                setting(header_bytes=lambda text: text.decode().encode("utf-16") + b" " * 6),
            ),
            (
                "header-latin1",
                "header_encoding",
                "CON-004",
                setting(header_bytes=lambda text: text.replace(b"w_codes", b"w_c\xf6des", 1)),
            ),
            (
                "header-overlong",
                "header_encoding",
                "CON-004",
                setting(header_bytes=lambda text: text.replace(b"w_codes", b"w_\xc1\xafdes", 1)),
            ),
            (
                "header-surrogate-bytes",
                "header_encoding",
                "CON-004 JSN-006",
                setting(header_bytes=lambda text: text.replace(b"w_codes", b"w_\xed\xa0\x80es", 1)),
            ),
            (
                "header-beyond-unicode",
                "header_encoding",
                "CON-004",
                setting(header_bytes=lambda text: text.replace(b"w_codes", b"w_\xf4\x90\x80\x80s", 1)),
            ),
            ("header-cut-character", "header_encoding", "CON-004", setting(header_bytes=lambda text: text[:-1] + b"\xc3")),
            ("data-one-byte-more", "trailing_data", "TEN-012", whole(lambda file: file + b"\0")),
            ("data-block-more", "trailing_data", "TEN-012", whole(lambda file: file + bytes(512))),
            ("data-second-file", "trailing_data", "TEN-012", whole(lambda file: file + file)),
        ],
    )


def json_text() -> Iterator[Vector]:
    shape = '"shape":[1,5]'
    cases: list[Case] = [
        ("json-comment", "header_json", "JSN-001", text(",", ",/* */")),
        ("json-trailing-comma", "header_json", "JSN-001", text(shape, '"shape":[1,5,]')),
        ("json-trailing-comma-object", "header_json", "JSN-001", setting(header_text=lambda text: text[:-1] + ",}")),
        ("json-leading-comma", "header_json", "JSN-001", setting(header_text=lambda text: "{," + text[1:])),
        ("json-two-commas", "header_json", "JSN-001", text('","shape"', '",,"shape"')),
        ("json-no-comma", "header_json", "JSN-001", text(',"shape"', ' "shape"')),
        ("json-no-colon", "header_json", "JSN-001", text('"shape":', '"shape" ')),
        ("json-single-quotes", "header_json", "JSN-001", text('"shape"', "'shape'")),
        ("json-bare-key", "header_json", "JSN-001", text('"shape"', "shape")),
        ("json-number-key", "header_json", "JSN-001", text('"shape"', "1")),
        ("json-nan", "header_json", "JSN-001", text(shape, '"shape":[NaN,5]')),
        ("json-infinity", "header_json", "JSN-001", text(shape, '"shape":[Infinity,5]')),
        ("json-minus-infinity", "header_json", "JSN-001", text(shape, '"shape":[-Infinity,5]')),
        ("json-leading-zero", "header_json", "JSN-001", text(shape, '"shape":[01,5]')),
        ("json-plus", "header_json", "JSN-001", text(shape, '"shape":[+1,5]')),
        ("json-hexadecimal", "header_json", "JSN-001", text(shape, '"shape":[0x1,5]')),
        ("json-half-number", "header_json", "JSN-001", text(shape, '"shape":[1.,5]')),
        ("json-half-exponent", "header_json", "JSN-001", text(shape, '"shape":[1e,5]')),
        ("json-lone-minus", "header_json", "JSN-001", text(shape, '"shape":[-,5]')),
        ("json-capital-literal", "header_json", "JSN-001", text(shape, '"shape":[True,5]')),
        ("json-half-literal", "header_json", "JSN-001", text(shape, '"shape":[tru,5]')),
        ("json-unclosed", "header_json", "JSN-001", setting(header_text=lambda text: text[:-1])),
        ("json-wrong-bracket", "header_json", "JSN-001", text(shape, '"shape":[1,5}')),
        ("json-unclosed-string", "header_json", "JSN-001", setting(header_text=lambda text: text[:-1] + ',"')),
        ("json-control-in-string", "header_json", "JSN-001", text("w_codes", "w_\tcodes")),
        ("json-newline-in-string", "header_json", "JSN-001", text("w_codes", "w_\ncodes")),
        ("json-bad-escape", "header_json", "JSN-001", text("w_codes", "w_\\codes")),
        ("json-short-escape", "header_json", "JSN-001", text("w_codes", "w_\\u00zz")),
        ("json-vertical-tab", "header_json", "JSN-001", text(",", ",\v")),
        ("json-no-break-space", "header_json", "JSN-001", text(",", ",\u00a0")),
        ("json-nul", "header_json", "JSN-001", text(",", ",\0")),
        ("json-inner-bom", "header_json", "JSN-001", text(",", ",\ufeff")),
        (
            "json-duplicate-tensor",
            "duplicate_key",
            "JSN-002",
            setting(header_text=lambda text: text[:-1] + ',"bias":' + _value(text, "bias") + "}"),
        ),
        (
            "json-duplicate-escaped",
            "duplicate_key",
            "JSN-002",
            setting(header_text=lambda text: text[:-1] + ',"b\\u0069as":' + _value(text, "bias") + "}"),
        ),
        (
            "json-duplicate-metadata",
            "duplicate_key",
            "JSN-002",
            setting(header_text=lambda text: text[:-1] + ',"__metadata__":{}}'),
        ),
        ("json-duplicate-shape", "duplicate_key", "JSN-002", text(shape, f"{shape},{shape}")),
        ("json-duplicate-empty", "duplicate_key", "JSN-002", setting(header_text=lambda text: text[:-1] + ',"":1,"":1}')),
        ("json-duplicate-string", "duplicate_key", "JSN-002", text('"__metadata__":{', '"__metadata__":{"a":"","\\u0061":"",')),
        (
            "json-duplicate-surrogates",
            "duplicate_key",
            "JSN-002",
            text('"__metadata__":{', '"__metadata__":{"\U0001d11e":"","\\ud834\\udd1e":"",'),
        ),
        (
            "json-depth-17",
            "json_depth",
            "JSN-003",
            setting(header_text=lambda text: text[:-1] + ',"a":' + "[" * 16 + "]" * 16 + "}"),
        ),
        (
            "json-depth-17-objects",
            "json_depth",
            "JSN-003",
            setting(header_text=lambda text: text[:-1] + ',"a":' + '{"a":' * 15 + "{}" + "}" * 15 + "}"),
        ),
        (
            "json-depth-5000",
            "json_depth",
            "JSN-003",
            setting(header_text=lambda text: text[:-1] + ',"a":' + "[" * 5000 + "]" * 5000 + "}"),
        ),
        ("json-depth-unclosed", "json_depth", "JSN-003", setting(header_text=lambda text: text[:-1] + ',"a":' + "[" * 5000)),
        ("json-float", "json_number", "JSN-004", text(shape, '"shape":[1.0,5]')),
        ("json-exponent", "json_number", "JSN-004", text(shape, '"shape":[1e0,5]')),
        ("json-capital-exponent", "json_number", "JSN-004", text(shape, '"shape":[1,5E+0]')),
        ("json-minus", "json_number", "JSN-004", text(shape, '"shape":[-1,5]')),
        ("json-minus-zero", "json_number", "JSN-004", text(shape, '"shape":[-0,5]')),
        ("json-2-63", "json_number", "JSN-004", text(shape, f'"shape":[{2**63},5]')),
        ("json-2-64", "json_number", "JSN-004 GEN-001", text(shape, f'"shape":[{2**64},5]')),
        ("json-2-64-and-1", "json_number", "JSN-004 GEN-001", text(shape, f'"shape":[{2**64 + 1},5]')),
        ("json-5000-digits", "json_number", "JSN-004", text(shape, f'"shape":[{"9" * 5000},5]')),
        ("json-1e999", "json_number", "JSN-004", text(shape, '"shape":[1e999,5]')),
        ("json-true", "header_schema", "JSN-005", text(shape, '"shape":[true,5]')),
        ("json-null", "header_schema", "JSN-005", text(shape, '"shape":null')),
        ("json-false-entry", "header_schema", "JSN-005", setting(header_text=lambda text: text[:-1] + ',"a":false}')),
        ("json-null-metadata", "header_schema", "JSN-005 MET-001", text('"__metadata__":{', '"__metadata__":{"a":null,')),
        ("json-lone-high-surrogate", "header_encoding", "JSN-006", text("w_codes", "w_\\ud834")),
        ("json-lone-low-surrogate", "header_encoding", "JSN-006", text("w_codes", "w_\\udd1e")),
        ("json-surrogates-reversed", "header_encoding", "JSN-006", text("w_codes", "w_\\udd1e\\ud834")),
        ("json-surrogates-apart", "header_encoding", "JSN-006", text("w_codes", "w_\\ud834 \\udd1e")),
        ("json-two-high-surrogates", "header_encoding", "JSN-006", text("w_codes", "w_\\ud834\\ud834")),
        ("json-surrogate-then-bad-escape", "header_encoding", "JSN-006", text("w_codes", "w_\\ud834\\codes")),
        ("json-bad-escape-then-surrogate", "header_json", "JSN-001", text("w_codes", "w_\\codes\\ud834")),
        ("json-duplicate-then-comma", "header_json", "JSN-001", text(shape, f"{shape},{shape[:-1]},]")),
    ]
    yield from broken("8", cases)
    many_values = ",".join(['{"a":""}'] * 2**19)  # with the arrays and what else there is more than 2^20 values
    for vector in broken(
        "8", [("json-size", "json_size", "JSN-007", setting(header_text=lambda text: f'{text[:-1]},"a":[{many_values}]}}'))]
    ):
        vector.gzip, vector.seconds = True, 30
        yield vector


def _value(header: str, key: str) -> str:
    found = re.search(rf'"{key}":(\{{[^}}]*\}})', header)
    assert found
    return found[1]


def tensors() -> Iterator[Vector]:
    def moved(draft: Draft) -> None:  # a hole of eight bytes before the last tensor
        last = [*sorted(draft.tensors)][-1]
        del last
        draft.data = lambda data: data[:8] + bytes(8) + data[8:]
        draft.header = lambda header: {
            name: value
            if name == "__metadata__" or value["data_offsets"][0] < 8
            else value | {"data_offsets": [at + 8 for at in value["data_offsets"]]}
            for name, value in header.items()
        }

    file = BASES["8"].render()
    header = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])
    bias, scale, codes = (header[name]["data_offsets"] for name in ("bias", "scale", "w_codes"))
    end = max(value["data_offsets"][1] for name, value in header.items() if name != "__metadata__")

    def with_entry(value: str) -> Fault:
        return setting(header_text=lambda text: text[:-1] + f',"a":{value}}}')

    cases: list[Case] = [
        ("tensor-no-dtype", "header_schema", "TEN-001", entry("bias", dtype=None)),
        ("tensor-no-shape", "header_schema", "TEN-001", entry("bias", shape=None)),
        ("tensor-no-offsets", "header_schema", "TEN-001", entry("bias", data_offsets=None)),
        ("tensor-another-key", "header_schema", "TEN-001", entry("bias", strides=[1])),
        ("tensor-x-key", "header_schema", "TEN-001", entry("bias", **{"x-note": 1})),
        ("tensor-array", "header_schema", "TEN-001", with_entry("[]")),
        ("tensor-string", "header_schema", "TEN-001", with_entry('"U8"')),
        ("tensor-dtype-number", "header_schema", "TEN-001", entry("bias", dtype=8)),
        ("tensor-shape-number", "header_schema", "TEN-001", entry("bias", shape=3)),
        ("tensor-shape-strings", "header_schema", "TEN-001", entry("bias", shape=["3"])),
        ("tensor-shape-nested", "header_schema", "TEN-001", entry("bias", shape=[[3]])),
        ("tensor-offsets-one", "header_schema", "TEN-001", entry("bias", data_offsets=bias[:1])),
        ("tensor-offsets-three", "header_schema", "TEN-001", entry("bias", data_offsets=[*bias, bias[1]])),
        ("tensor-offsets-string", "header_schema", "TEN-001", entry("bias", data_offsets="0,3")),
        ("tensor-offsets-object", "header_schema", "TEN-001", entry("bias", data_offsets={"begin": 0})),
        ("tensor-rank-9", "shape_rank", "TEN-003", entry("bias", shape=[3, *[1] * 8])),
        ("tensor-rank-1000", "shape_rank", "TEN-003", entry("bias", shape=[1] * 1000)),
        ("tensor-dtype-unknown", "unknown_dtype", "TEN-004", entry("bias", dtype="U4")),
        ("tensor-dtype-lower-case", "unknown_dtype", "TEN-004", entry("bias", dtype="u8")),
        ("tensor-dtype-empty", "unknown_dtype", "TEN-004", entry("bias", dtype="")),
        ("tensor-dtype-f8", "unknown_dtype", "TEN-004", entry("bias", dtype="F8_E5M2FNUZ")),
        ("tensor-dtype-nul", "unknown_dtype", "TEN-004", entry("bias", dtype="U8\0")),
        ("tensor-begin-after-end", "offset_order", "TEN-005", entry("bias", data_offsets=bias[::-1])),
        ("tensor-begin-large", "offset_order", "TEN-005", entry("bias", data_offsets=[2**63 - 1, bias[1]])),
        ("tensor-shape-too-small", "tensor_size", "TEN-006", entry("bias", shape=[2])),
        ("tensor-shape-too-large", "tensor_size", "TEN-006", entry("bias", shape=[4])),
        ("tensor-shape-zero", "tensor_size", "TEN-006", entry("bias", shape=[3, 0])),
        ("tensor-dtype-too-large", "tensor_size", "TEN-006", entry("bias", dtype="U16")),
        ("tensor-scalar", "tensor_size", "TEN-006", entry("bias", shape=[])),
        ("tensor-product-2-63", "shape_overflow", "TEN-007 GEN-001", entry("bias", shape=[2**32, 2**31])),
        ("tensor-product-2-64", "shape_overflow", "TEN-007 GEN-001", entry("bias", shape=[2**32, 2**32])),
        ("tensor-product-wraps", "shape_overflow", "TEN-007 GEN-001", entry("bias", shape=[2**62 + 1, 12])),
        (
            "tensor-product-wraps-to-size",
            "shape_overflow",
            "TEN-007 GEN-001",
            entry("bias", shape=[3, 2**32 + 1, 2**32 + 1, 2**60]),
        ),
        ("tensor-bytes-2-63", "tensor_size", "TEN-006 GEN-001", entry("scale", shape=[2**61])),
        ("tensor-bytes-wrap", "tensor_size", "TEN-006 GEN-001", entry("scale", shape=[2**62 + 2])),
        (
            "tensor-end-beyond-data",
            "truncated",
            "TEN-008",
            entry("bias", shape=[end - bias[0] + 1], data_offsets=[bias[0], end + 1]),
        ),
        ("tensor-all-beyond-data", "truncated", "TEN-008", entry("bias", data_offsets=[end + 100, end + 103])),
        (
            "tensor-end-2-63",
            "truncated",
            "TEN-008",
            entry("bias", shape=[2**63 - 1 - bias[0]], data_offsets=[bias[0], 2**63 - 1]),
        ),
        ("tensor-misaligned-4", "misaligned", "TEN-009", entry("scale", data_offsets=[at + 2 for at in scale])),
        ("tensor-misaligned-1", "misaligned", "TEN-009", entry("scale", data_offsets=[at + 1 for at in scale])),
        ("tensor-misaligned-8", "misaligned", "TEN-009", entry("w_code_offsets", data_offsets=[4, 20])),
        ("tensor-overlap-by-one", "tensor_overlap", "TEN-010", entry("w_codes", data_offsets=[at - 1 for at in codes])),
        ("tensor-overlap-whole", "tensor_overlap", "TEN-010", entry("bias", data_offsets=[at - 3 for at in bias])),
        (
            "tensor-overlap-same",
            "tensor_overlap",
            "TEN-010",
            with_entry(json.dumps({"dtype": "U8", "shape": [3], "data_offsets": bias})),
        ),
        ("tensor-overlap-first", "tensor_overlap", "TEN-010", entry("bias", data_offsets=[0, 3])),
        (
            "tensor-overlap-empty-inside",
            "tensor_overlap",
            "TEN-010",
            with_entry(json.dumps({"dtype": "U8", "shape": [0], "data_offsets": [bias[0] + 1, bias[0] + 1]})),
        ),
        ("tensor-hole", "tensor_hole", "TEN-011", moved),
        (
            "tensor-hole-at-start",
            "tensor_hole",
            "TEN-011",
            many(
                removed("w_code_offsets"),
                setting(
                    header=lambda header: {
                        name: value
                        if name == "__metadata__"
                        else value | {"data_offsets": [at + 16 for at in value["data_offsets"]]}
                        for name, value in header.items()
                    },
                    data=lambda data: bytes(16) + data,
                ),
            ),
        ),
        (
            "tensor-hole-entry-gone",
            "tensor_hole",
            "TEN-011",
            setting(header=lambda header: {k: v for k, v in header.items() if k != "bias"}),
        ),
        (
            "tensor-last-gone",
            "trailing_data",
            "TEN-012",
            setting(header=lambda header: {k: v for k, v in header.items() if k != "w_row_lengths"}),
        ),
        ("tensor-none", "trailing_data", "TEN-012", setting(header=lambda header: {"__metadata__": header["__metadata__"]})),
    ]
    yield from broken("8", cases)

    def crowd(count: int) -> Fault:
        more = ",".join(f'"{i:x}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(count))
        return setting(header_text=lambda text: text[:-1] + "," + more + "}")

    for count in (65_537, 70_000):
        for vector in broken("8", [(f"tensors-{count}", "tensor_count", "TEN-002", crowd(count - len(BASES["8"].tensors)))]):
            vector.gzip, vector.seconds = True, 30
            yield vector
