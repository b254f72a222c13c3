"""Vectors that every reader rejects: a valid file and one fault, with the checksums made to fit again."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vectors import codebook, valid
from vectors.codebook import Codebook
from vectors.draft import HEADER_CRC, Draft, Tensor, crc_text
from vectors.valid import INDEX, SHARDS, Vector, hand, index_text, level, negative, table

Fault = Callable[[Draft], None]
Case = tuple[str, str, str, Fault]  # id, reason, requirements, fault


class Bases:
    """The drafts that are broken."""

    def __init__(self) -> None:
        self.drafts = {vector.id.removeprefix("valid/base-"): vector.draft for vector in valid.bases()}

    def __getitem__(self, name: str) -> Draft:
        draft = self.drafts[name]
        assert draft is not None
        return draft.copy()


BASES = Bases()


def broken(base: str, cases: Sequence[Case]) -> Iterator[Vector]:
    """Yield a vector per case; its note is its id in words."""
    for name, reason, reqs, fault in cases:
        draft = BASES[base]
        fault(draft)
        yield Vector(
            f"invalid/{name}",
            name.replace("-", " "),
            [f"REQ-{req}" for req in reqs.split()],
            {"": draft.render()},
            error=reason,
            base=f"valid/base-{base}",
            before={"": draft.render(refresh=False)},
        )


# ---- Ways to break a file --------------------------------------------------------------------------------------------


def setting(**values: Any) -> Fault:
    """Set attributes of the draft: functions that change the text on its way."""

    def fault(draft: Draft) -> None:
        for key, value in values.items():
            setattr(draft, key, value)

    return fault


def whole(change: Callable[[bytes], bytes]) -> Fault:
    return setting(whole=change)


def text(old: str, new: str) -> Fault:
    """Replace the first occurrence in the header."""

    def change(header: str) -> str:
        assert old in header, old
        return header.replace(old, new, 1)

    return setting(header_text=change)


def entry(name: str, **values: Any) -> Fault:
    """Change values of a tensor's entry in the header; None removes one."""

    def change(header: dict[str, Any]) -> dict[str, Any]:
        assert name in header
        changed = {key: value for key, value in (header[name] | values).items() if value is not None}
        return {**header, name: changed}

    return setting(header=change)


def keep(kind: str, fault: Fault) -> Fault:
    def both(draft: Draft) -> None:
        draft.keep.add(kind)
        fault(draft)

    return both


def meta(path: str, value: Any) -> Fault:
    """Set a value of the metadata, at a path such as groups.0.name; `...` removes it."""

    def fault(draft: Draft) -> None:
        place: Any = draft.metadata
        *folders, last = [int(part) if part.isdigit() else part for part in path.split("/")]
        for folder in folders:
            place = place[folder]
        if value is ...:
            del place[last]
        else:
            place[last] = value

    return fault


def meta_text(old: str, new: str) -> Fault:
    def change(text: str) -> str:
        assert old in text, old
        return text.replace(old, new, 1)

    return setting(metadata_text=change)


def put(name: str, at: int, data: bytes) -> Fault:
    """Overwrite bytes of a tensor."""

    def fault(draft: Draft) -> None:
        tensor = draft.tensors[name]
        at_end = at if at >= 0 else len(tensor.data) + at
        assert tensor.data[at_end : at_end + len(data)] != data and at_end + len(data) <= len(tensor.data)
        tensor.data = tensor.data[:at_end] + data + tensor.data[at_end + len(data) :]

    return fault


def replaced(name: str, dtype: str, shape: list[int], data: bytes | None = None) -> Fault:
    def fault(draft: Draft) -> None:
        draft.tensors[name] = Tensor(dtype, shape, draft.tensors[name].data if data is None else data)

    return fault


def removed(name: str) -> Fault:
    return lambda draft: draft.tensors.__delitem__(name)


def renamed(old: str, new: str) -> Fault:
    def fault(draft: Draft) -> None:
        draft.tensors = {new if name == old else name: tensor for name, tensor in draft.tensors.items()}

    return fault


def added(name: str, tensor: Tensor, *, passthrough: bool = False) -> Fault:
    def fault(draft: Draft) -> None:
        draft.tensors[name] = tensor
        if passthrough:
            draft.metadata["passthrough"][name] = crc_text(tensor.data)

    return fault


def many(*faults: Fault) -> Fault:
    def all_of_them(draft: Draft) -> None:
        for fault in faults:
            fault(draft)

    return all_of_them


def words_of(draft: Draft, name: str, book: Codebook) -> list[list[int]]:
    """Return the codewords of the rows of a group with one expert."""
    group = next(group for group in draft.metadata["groups"] if group["name"] == name)
    data, rows, at = draft.tensors[f"{name}_codes"].data, [], 0
    for length in draft.tensors[f"{name}_row_lengths"].data:
        m = length + group["row_length_base"]
        n = -(-m * book.bits // 8)
        value = int.from_bytes(data[at : at + n], "little")
        rows.append([value >> book.bits * k & 2**book.bits - 1 for k in range(m)])
        at += n
    return rows


def recode(change: Callable[[list[list[int]]], Any], book: Codebook, name: str = "w") -> Fault:
    """Change the codewords of the rows and write them again."""

    def fault(draft: Draft) -> None:
        rows = words_of(draft, name, book)
        change(rows)
        base = min(map(len, rows))
        codes = b"".join(map(book.pack, rows))
        draft.tensors[f"{name}_codes"] = Tensor("U8", [len(codes)], codes)
        draft.tensors[f"{name}_row_lengths"].data = bytes(len(row) - base for row in rows)
        draft.tensors[f"{name}_code_offsets"].data = struct.pack("<2Q", 0, len(codes))
        next(group for group in draft.metadata["groups"] if group["name"] == name)["row_length_base"] = base

    return fault


def word(row: int, k: int, value: int, book: Codebook) -> Fault:
    def change(rows: list[list[int]]) -> None:
        assert rows[row][k] != value
        rows[row][k] = value

    return recode(change, book)


def bank(index: int, book: Codebook) -> Fault:
    """Put another dictionary into its place, tensor and entry."""

    def fault(draft: Draft) -> None:
        draft.tensors[f"qmoecodec.dictionary.{index}"] = Tensor("U8", [len(book.data)], book.data)
        draft.metadata["dictionaries"][index] |= {"kind": book.kind, "code_bits": book.bits, "threshold": book.threshold}

    return fault


def dictionary(data: bytes, threshold: int | None = None) -> Fault:
    def fault(draft: Draft) -> None:
        draft.tensors["qmoecodec.dictionary.0"] = Tensor("U8", [len(data)], data)
        if threshold is not None:
            draft.metadata["dictionaries"][0]["threshold"] = threshold

    return fault


def header_length(value: int) -> Fault:
    return whole(lambda file: struct.pack("<Q", value) + file[8:])


# ---- §2 --------------------------------------------------------------------------------------------------------------


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
    yield from broken(
        "8", [(f"cut-{name}", "truncated", "CON-001", whole(lambda file, at=at: file[:at])) for name, at in cuts.items()]
    )  # type: ignore[misc]
    header = json.loads(file[8 : 8 + n])
    ends = sorted({entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"} | {0})
    yield from broken(
        "8", [(f"cut-data-{at}", "truncated", "TEN-008", whole(lambda file, at=at: file[: 8 + n + at])) for at in ends[:-1]]
    )  # type: ignore[misc]
    yield from broken(
        "8",
        [
            ("cut-last-byte", "truncated", "TEN-008", whole(lambda file: file[:-1])),
            ("length-beyond-file", "truncated", "CON-001", header_length(len(file))),
            ("length-one-too-many", "truncated", "CON-001", header_length((len(file) - 8) // 8 * 8 + 8)),
            ("length-2-63", "truncated", "CON-001 GEN-001", header_length(2**63)),
            ("length-2-64-less-8", "truncated", "CON-001 GEN-001", header_length(2**64 - 8)),
            ("length-2-64-less-1", "truncated", "CON-001 GEN-001", header_length(2**64 - 1)),
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
    ]
    yield from broken("8", cases)


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


# ---- §3 --------------------------------------------------------------------------------------------------------------


def metadata() -> Iterator[Vector]:
    bias = Tensor("U8", [3], b"\1\2\3")
    no_strings = setting(header=lambda header: {key: value for key, value in header.items() if key != "__metadata__"})

    def strings(value: Any) -> Fault:
        return setting(header=lambda header: {**header, "__metadata__": value})

    def no_text(header: dict[str, Any]) -> dict[str, Any]:
        return {**header, "__metadata__": {"format": "pt"}}

    def features(key: str, value: Any) -> Fault:
        return meta(f"{key}_features", value)

    def meta_all(change: Callable[[str], str]) -> Fault:
        return setting(metadata_text=change)

    cases: list[Case] = [
        ("metadata-none", "header_schema", "MET-001", no_strings),
        ("metadata-array", "header_schema", "MET-001", strings([])),
        ("metadata-string", "header_schema", "MET-001", strings("qmoecodec")),
        ("metadata-number-value", "header_schema", "MET-001", text('"__metadata__":{', '"__metadata__":{"a":1,')),
        ("metadata-object-value", "header_schema", "MET-001", text('"__metadata__":{', '"__metadata__":{"a":{},')),
        ("metadata-without-qmoecodec", "not_packed", "MET-002", setting(header=no_text)),
        ("metadata-empty", "not_packed", "MET-002", strings({})),
        ("metadata-other-case", "not_packed", "MET-002", text('"qmoecodec":', '"QMoECodec":')),
        ("text-empty", "header_json", "JSN-001", meta_all(lambda text: "")),
        ("text-not-json", "header_json", "JSN-001", meta_all(lambda text: text[:-1])),
        ("text-array", "header_json", "JSN-001", meta_all(lambda text: f"[{text}]")),
        ("text-null", "header_json", "JSN-005", meta_all(lambda text: "null")),
        ("text-bom", "header_json", "JSN-001", meta_all(lambda text: "\ufeff" + text)),
        (
            "text-duplicate",
            "duplicate_key",
            "JSN-002",
            meta_text('"format_version":"1.0",', '"format_version":"1.0","format_version":"1.0",'),
        ),
        ("text-duplicate-in-group", "duplicate_key", "JSN-002", meta_text('"code_bits":8,', '"code_bits":8,"code_bits":8,')),
        ("text-depth", "json_depth", "JSN-003", meta("x-deep", json.loads("[" * 16 + "]" * 16))),
        ("text-float", "json_number", "JSN-004", meta_text('"code_bits":8,', '"code_bits":8.0,')),
        ("text-exponent", "json_number", "JSN-004", meta_text('"code_bits":8,', '"code_bits":8e0,')),
        ("text-negative", "json_number", "JSN-004", meta_text('"row_length_base":', '"row_length_base":-')),
        ("text-2-64", "json_number", "JSN-004", meta("groups/0/row_length_base", 2**64)),
        ("text-float-in-x", "json_number", "JSN-004", meta("x-scale", 0.5)),
        ("text-surrogate", "header_encoding", "JSN-006", meta_text('"source":"w', '"source":"\\ud800w')),
        ("text-space", "metadata_canonical", "MET-003", meta_text(":", ": ")),
        ("text-space-in-front", "metadata_canonical", "MET-003", meta_all(lambda text: " " + text)),
        ("text-newline-at-end", "metadata_canonical", "MET-003", meta_all(lambda text: text + "\n")),
        (
            "text-unsorted",
            "metadata_canonical",
            "MET-003",
            meta_all(lambda text: re.sub(r'("code_bits":8),("crc32":"[0-9a-f]{8}")', r"\2,\1", text)),
        ),
        (
            "text-unsorted-root",
            "metadata_canonical",
            "MET-003",
            meta_all(lambda text: json.dumps(dict(reversed(json.loads(text).items())), separators=(",", ":"))),
        ),
        ("text-escaped-letter", "metadata_canonical", "MET-003", meta_text('"layout"', '"\\u006cayout"')),
        ("text-escaped-slash", "metadata_canonical", "MET-003", many(meta("x-a", "/"), meta_text('"x-a":"/"', '"x-a":"\\/"'))),
        ("text-raw-unicode", "metadata_canonical", "MET-003", many(meta("x-a", "é"), meta_text("\\u00e9", "é"))),
        ("text-raw-delete", "metadata_canonical", "MET-003", many(meta("x-a", "\x7f"), meta_text("\\u007f", "\x7f"))),
        ("text-upper-case-escape", "metadata_canonical", "MET-003", many(meta("x-a", "é"), meta_text("\\u00e9", "\\u00E9"))),
        ("text-long-escape", "metadata_canonical", "MET-003", many(meta("x-a", "\n"), meta_text("\\n", "\\u000a"))),
        (
            "text-upper-case-surrogate",
            "metadata_canonical",
            "MET-003",
            many(meta("x-a", "\U0001d11e"), meta_text("\\ud834\\udd1e", "\\uD834\\udd1e")),
        ),
        (
            "text-sorted-by-utf16",
            "metadata_canonical",
            "MET-003",
            many(
                meta("x-\U0001d11e", 0),
                meta("x-\uff5e", 0),
                meta_text('"x-\\uff5e":0,"x-\\ud834\\udd1e":0', '"x-\\ud834\\udd1e":0,"x-\\uff5e":0'),
            ),
        ),
        *[
            (f"version-{name}", "metadata_schema", "MET-004", meta("format_version", value))
            for name, value in (
                ("number", 1),
                ("empty", ""),
                ("one-part", "1"),
                ("three-parts", "1.0.0"),
                ("leading-zero", "01.0"),
                ("minor-leading-zero", "1.00"),
                ("five-digits", "1.10000"),
                ("space", "1.0 "),
                ("newline", "1.0\n"),
                ("letter", "1.0a"),
                ("minus", "-1.0"),
                ("null", None),
                ("unicode-digit", "1.\u0660"),
                ("missing", ...),
            )
        ],
        *[
            (f"features-{key}-{name}", "metadata_schema", "MET-008", features(key, value))
            for key in ("required", "optional")
            for name, value in (
                ("string", "a"),
                ("numbers", [1]),
                ("unsorted", ["b", "a"]),
                ("twice", ["a", "a"]),
                ("missing", ...),
            )
        ],
        *[
            (f"key-missing-{key}", "metadata_schema", "MET-008", meta(key, ...))
            for key in ("dictionaries", "groups", "passthrough")
        ],
        ("dictionaries-object", "metadata_schema", "MET-008", meta("dictionaries", {})),
        ("dictionaries-null-entry", "metadata_schema", "MET-008 JSN-005", meta("dictionaries/0", None)),
        ("groups-string", "metadata_schema", "MET-008", meta("groups", "w")),
        ("groups-array-entry", "metadata_schema", "MET-008", meta("groups/0", [])),
        ("passthrough-array", "metadata_schema", "MET-008", meta("passthrough", ["bias"])),
        ("passthrough-number", "metadata_schema", "MET-008", keep("passthrough", meta("passthrough/bias", 0))),
        ("passthrough-upper-case", "metadata_schema", "MET-008", keep("passthrough", meta("passthrough/bias", "ABCDEF01"))),
        ("passthrough-seven-digits", "metadata_schema", "MET-008", keep("passthrough", meta("passthrough/bias", "abcdef0"))),
        ("passthrough-not-hexadecimal", "metadata_schema", "MET-008", keep("passthrough", meta("passthrough/bias", "abcdefg0"))),
        ("key-unknown", "metadata_schema", "MET-009", meta("note", "")),
        ("key-unknown-x", "metadata_schema", "MET-009", meta("x", 1)),
        ("key-unknown-capital-x", "metadata_schema", "MET-009", meta("X-a", 1)),
        ("key-unknown-in-dictionary", "metadata_schema", "MET-009", meta("dictionaries/0/states", 2)),
        ("key-unknown-in-group", "metadata_schema", "MET-009", meta("groups/0/bits", 8)),
        ("tensor-orphan", "orphan_tensor", "MET-011", added("stray", bias)),
        ("tensor-orphan-reserved", "orphan_tensor", "MET-011", added("qmoecodec.dictionary.1", bias)),
        ("tensor-orphan-name", "orphan_tensor", "MET-011", added("qmoecodec.dictionary.00", bias)),
        ("tensor-orphan-role", "orphan_tensor", "MET-011", added("v_codes", bias)),
        ("tensor-renamed", "orphan_tensor", "MET-011", renamed("w_codes", "w_code")),
        (
            "tensor-role-and-passthrough",
            "orphan_tensor",
            "MET-011",
            many(
                meta("passthrough/w_codes", ""),
                lambda draft: draft.metadata["passthrough"].update(w_codes=crc_text(draft.tensors["w_codes"].data)),
            ),
        ),
        ("tensor-group-gone", "orphan_tensor", "MET-011", meta("groups", [])),
        ("tensor-passthrough-entry-gone", "orphan_tensor", "MET-011", meta("passthrough/bias", ...)),
        ("tensor-dictionary-entry-gone", "orphan_tensor", "MET-011", meta("dictionaries", [])),
        *[
            (f"missing-{role.replace('_', '-')}", "missing_tensor", "MET-012", removed(f"w_{role}"))
            for role in ("codes", "code_offsets", "row_lengths", "levels", "dictionary_index", "checksums")
        ],
        ("missing-dictionary", "missing_tensor", "MET-012", removed("qmoecodec.dictionary.0")),
        ("missing-passthrough", "missing_tensor", "MET-012", removed("bias")),
        ("missing-header-checksum", "missing_tensor", "CRC-004 MET-012", removed(HEADER_CRC)),
        ("missing-named-passthrough", "missing_tensor", "MET-012", meta("passthrough/other", "00000000")),
        ("reserved-passthrough", "reserved_name", "MET-013", added("qmoecodec.note", bias, passthrough=True)),
        ("reserved-source", "reserved_name", "MET-013", meta("groups/0/source", "qmoecodec.w")),
        (
            "reserved-group",
            "reserved_name",
            "MET-013",
            many(
                meta("groups/0/name", "qmoecodec.w"),
                *[
                    renamed(f"w_{role}", f"qmoecodec.w_{role}")
                    for role in ("codes", "code_offsets", "row_lengths", "levels", "dictionary_index", "checksums")
                ],
            ),
        ),
    ]
    yield from broken("8", cases)


# ---- §4 --------------------------------------------------------------------------------------------------------------


def dictionaries() -> Iterator[Vector]:
    book = hand(8)
    name = "qmoecodec.dictionary.0"
    chain = codebook.pack_pairs([*[1] * 255, 0, 0, 0, 0, 0])  # 256 digits deep
    comb = codebook.pack_pairs([*[2] * 255, 0, *[0] * (2 * 255), 0, 0, 0, 0])
    longer = codebook.pack_pairs([*[1] * 300, 0, 0, 0, 0, 0])
    entry = "dictionaries/0/"
    yield from broken(
        "8",
        [
            ("dictionary-dtype", "role_dtype", "DIC-001", replaced(name, "I8", [len(book.data)])),
            ("dictionary-two-dimensions", "role_shape", "DIC-001", replaced(name, "U8", [1, len(book.data)])),
            ("dictionary-wide-dtype", "role_dtype", "DIC-001", replaced(name, "U32", [1])),
            *[
                (f"dictionary-kind-{key}", "metadata_schema", "DIC-002", meta(entry + "kind", value))
                for key, value in (("unknown", "huffman"), ("empty", ""), ("number", 1), ("missing", ...), ("upper-case", "AIVF"))
            ],
            *[
                (f"dictionary-bits-{key}", "metadata_schema", "DIC-002", meta(entry + "code_bits", value))
                for key, value in (("10", 10), ("0", 0), ("string", "8"), ("true", True), ("missing", ...), ("large", 2**40))
            ],
            ("dictionary-threshold-257", "dictionary_threshold", "DIC-003", meta(entry + "threshold", 257)),
            ("dictionary-threshold-large", "dictionary_threshold", "DIC-003", meta(entry + "threshold", 2**63 - 1)),
            ("dictionary-threshold-string", "metadata_schema", "DIC-003", meta(entry + "threshold", "128")),
            ("dictionary-threshold-missing", "metadata_schema", "DIC-003", meta(entry + "threshold", ...)),
            ("dictionary-crc-missing", "metadata_schema", "MET-008", keep("dictionaries", meta(entry + "crc32", ...))),
            ("dictionary-crc-number", "metadata_schema", "MET-008", keep("dictionaries", meta(entry + "crc32", 5))),
            ("dictionary-symbol-3", "dictionary_symbol", "DIC-004", put(name, 1, b"\x3c")),
            ("dictionary-symbol-3-first", "dictionary_symbol", "DIC-004", put(name, 0, b"\x07")),
            ("dictionary-symbol-3-last", "dictionary_symbol", "DIC-004", put(name, 3, b"\x0d")),
            ("dictionary-empty", "dictionary_size", "DIC-005", dictionary(b"")),
            ("dictionary-short", "dictionary_size", "DIC-005", dictionary(book.data[:-1])),
            ("dictionary-long", "dictionary_size", "DIC-005", dictionary(book.data + b"\0")),
            ("dictionary-endless", "dictionary_size", "DIC-005", dictionary(b"\xaa" * 4)),
            ("dictionary-one-tree", "dictionary_size", "DIC-005", dictionary(codebook.pack_pairs(valid.TREE_0))),
            ("dictionary-padding-bit", "dictionary_padding", "DIC-006", put(name, 3, b"\x11")),
            ("dictionary-padding-high-bit", "dictionary_padding", "DIC-006", put(name, 3, b"\x81")),
            ("dictionary-padding-3", "dictionary_padding", "DIC-006", put(name, 3, b"\xf1")),
            ("dictionary-leaves-above-threshold", "dictionary_threshold", "DIC-008", meta(entry + "threshold", 6)),
            ("dictionary-threshold-0", "dictionary_threshold", "DIC-008", meta(entry + "threshold", 0)),
            ("dictionary-incomplete-above", "dictionary_threshold", "DIC-008", meta(entry + "threshold", 255)),
            ("dictionary-threshold-256", "dictionary_threshold", "DIC-008", meta(entry + "threshold", 256)),
            (
                "dictionary-tree-1-leaves",
                "dictionary_threshold",
                "DIC-008",
                dictionary(codebook.pack_pairs([0, 0, 0, 2, 0, 0, 0, 0]), 3),
            ),
        ],
    )
    yield from broken(
        "12",
        [
            ("dictionary-depth-256", "dictionary_phrase_length", "DIC-007", dictionary(chain, 2048)),
            ("dictionary-depth-256-internal", "dictionary_phrase_length", "DIC-007", dictionary(comb, 2048)),
            ("dictionary-depth-301", "dictionary_phrase_length", "DIC-007", dictionary(longer, 2048)),
        ],
    )
    tables = table(8)
    used = sum(tables.data[:256])
    yield from broken(
        "table",
        [
            ("table-threshold-255", "dictionary_threshold", "DIC-009", meta(entry + "threshold", 255)),
            ("table-threshold-0", "dictionary_threshold", "DIC-009", meta(entry + "threshold", 0)),
            ("table-threshold-large", "dictionary_threshold", "DIC-003", meta(entry + "threshold", 512)),
            ("table-digit-3", "dictionary_symbol", "DIC-010", put(name, 256, b"\x27")),
            (
                "table-digit-3-last",
                "dictionary_symbol",
                "DIC-010",
                put(name, -1, bytes([tables.data[-1] | 3 << 2 * ((used - 1) % 4)])),
            ),
            ("table-short", "dictionary_size", "DIC-011", dictionary(tables.data[:-1])),
            ("table-long", "dictionary_size", "DIC-011", dictionary(tables.data + b"\0")),
            ("table-lengths-only", "dictionary_size", "DIC-011", dictionary(tables.data[:256])),
            ("table-255-lengths", "dictionary_size", "DIC-011", dictionary(tables.data[:255])),
            ("table-no-bytes", "dictionary_size", "DIC-011", dictionary(b"")),
            ("table-length-too-large", "dictionary_size", "DIC-011", put(name, 2, b"\5")),
            ("table-length-255", "dictionary_size", "DIC-011", put(name, 0, b"\xff")),
            ("table-padding", "dictionary_padding", "DIC-012", put(name, -1, bytes([tables.data[-1] | 0x40]))),
            ("table-padding-high-bit", "dictionary_padding", "DIC-012", put(name, -1, bytes([tables.data[-1] | 0x80]))),
            ("table-duplicate", "dictionary_duplicate", "DIC-013", bank(0, codebook.table(8, {**tables.phrases[0], 255: b"\0"}))),
            (
                "table-duplicate-long",
                "dictionary_duplicate",
                "DIC-013",
                bank(0, codebook.table(8, {**tables.phrases[0], 0: bytes(7)})),
            ),
            ("table-as-aivf", "dictionary_size", "DIC-005", meta(entry + "kind", "aivf")),
            (
                "table-bits-12",
                "dictionary_size",
                "DIC-011",
                many(meta(entry + "code_bits", 12), meta(entry + "threshold", 4096), meta("groups/0/code_bits", 12)),
            ),
        ],
    )


# ---- §5 and §6 -------------------------------------------------------------------------------------------------------


def rows() -> Iterator[Vector]:
    for bits, base in ((8, "8"), (12, "12"), (16, "16")):
        book, top = hand(bits), 2 ** (bits - 1)
        last = words_of(BASES[base], "w", book)

        def append(rows: list[list[int]], value: int = top) -> None:
            rows[1].append(value)

        yield from broken(
            base,
            [
                (f"codeword-unused-{bits}", "unused_codeword", "ROW-002", word(0, 0, 7, book)),
                (f"codeword-unused-top-{bits}", "unused_codeword", "ROW-002", word(1, 1, 2 * top - 1, book)),
                (f"codeword-unused-incomplete-{bits}", "unused_codeword", "ROW-002", word(2, 1, top + 2, book)),
                (f"codeword-unused-in-state-1-{bits}", "unused_codeword", "ROW-002", word(0, 1, 2, book)),
                (f"codeword-unused-first-of-state-1-{bits}", "unused_codeword", "ROW-002", word(0, 1, top + 1, book)),
                (f"row-underrun-{bits}", "row_underrun", "ROW-003", recode(lambda rows: rows[0].pop(), book)),
                (f"row-underrun-last-{bits}", "row_underrun", "ROW-003", recode(lambda rows: rows[-1].pop(), book)),
                (f"row-without-codewords-{bits}", "row_underrun", "ROW-003", recode(lambda rows: rows[3].clear(), book)),
                (f"row-overrun-{bits}", "row_overrun", "ROW-004", recode(append, book)),
                (f"row-overrun-leaf-{bits}", "row_overrun", "ROW-004", recode(lambda rows: rows[2].append(0), book)),
                (f"row-overrun-two-{bits}", "row_overrun", "ROW-004", recode(lambda rows: rows[4].extend([0, 0]), book)),
                (f"overrun-plus-{bits}", "overrun_nonzero", "ROW-005", word(2, len(last[2]) - 1, 5, book)),
                (f"overrun-minus-{bits}", "overrun_nonzero", "ROW-005", word(2, len(last[2]) - 1, 4, book)),
            ],
        )
    for index in (0, 1):
        book = hand(12)
        rows = words_of(BASES["12"], "w", book)
        odd = [i for i, row in enumerate(rows) if len(row) % 2][index]
        at = sum(-(-len(row) * 12 // 8) for row in rows[: odd + 1]) - 1
        data = BASES["12"].tensors["w_codes"].data
        for name, mask in (("low", 0x10), ("high", 0x80), ("all", 0xF0)):
            yield from broken(
                "12", [(f"row-padding-{name}-{index}", "row_padding", "ROW-006", put("w_codes", at, bytes([data[at] | mask])))]
            )
    tables = table(8)
    words = words_of(BASES["table"], "w", tables)
    yield from broken(
        "table",
        [
            ("table-codeword-unused", "unused_codeword", "ROW-002", word(0, 0, 3, tables)),
            ("table-codeword-unused-255", "unused_codeword", "ROW-002", word(1, 0, 255, tables)),
            ("table-row-underrun", "row_underrun", "ROW-003", recode(lambda rows: rows[1].pop(), tables)),
            ("table-row-overrun", "row_overrun", "ROW-004", recode(lambda rows: rows[1].append(2), tables)),
            ("table-overrun-nonzero", "overrun_nonzero", "ROW-005", word(3, len(words[3]) - 1, 5 * 8 + 2, tables)),
        ],
    )


def groups() -> Iterator[Vector]:
    entry = "groups/0/"
    simple: dict[str, tuple[str, Any]] = {
        "name-empty": ("name", ""),
        "name-number": ("name", 1),
        "name-4097": ("name", "w" * 4097),
        "name-4098-bytes": ("name", "é" * 2049),
        "name-missing": ("name", ...),
        "layout-unknown": ("layout", "tiled"),
        "layout-null": ("layout", None),
        "layout-missing": ("layout", ...),
        "source-number": ("source", 0),
        "source-missing": ("source", ...),
        "shape-two": ("shape", [5, 12]),
        "shape-four": ("shape", [1, 5, 12, 1]),
        "shape-string": ("shape", ["1", "5", "12"]),
        "shape-missing": ("shape", ...),
        "dtype-integer": ("dtype", "I8"),
        "dtype-f8": ("dtype", "F8_E4M3"),
        "dtype-unknown": ("dtype", "F128"),
        "dtype-missing": ("dtype", ...),
        "bits-9": ("code_bits", 9),
        "bits-string": ("code_bits", "8"),
        "bits-missing": ("code_bits", ...),
        "base-2-32": ("row_length_base", 2**32),
        "base-missing": ("row_length_base", ...),
        "base-string": ("row_length_base", "0"),
        "ranges-of-matrix": ("expert_ranges", [[0, 1]]),
        "ranges-null": ("expert_ranges", None),
    }
    yield from broken(
        "8", [(f"group-{name}", "metadata_schema", "GRP-001", meta(entry + key, value)) for name, (key, value) in simple.items()]
    )

    def swap(draft: Draft) -> None:
        draft.metadata["groups"].reverse()

    def twice(draft: Draft) -> None:
        draft.metadata["groups"].append(draft.metadata["groups"][1])

    def fuse(draft: Draft) -> None:
        draft.metadata["groups"][1]["layout"] = "matrix"

    ranges = "groups/0/expert_ranges"
    large = 2**31
    yield from broken(
        "groups",
        [
            ("groups-unsorted", "metadata_schema", "GRP-002", swap),
            ("groups-twice", "metadata_schema", "GRP-002", twice),
            ("matrix-of-two-experts", "metadata_schema", "GRP-003", fuse),
            ("ranges-missing", "metadata_schema", "GRP-001", meta(ranges, ...)),
            ("template-without-braces", "metadata_schema", "GRP-001", meta("groups/0/source", "a.weight")),
            ("template-two-braces", "metadata_schema", "GRP-001", meta("groups/0/source", "a.{}.{}")),
            ("template-braces-with-number", "metadata_schema", "GRP-001", meta("groups/0/source", "a.{0}")),
            *[
                (f"ranges-{name}", "metadata_schema", "GRP-004", meta(ranges, value))
                for name, value in {
                    "empty-range": [[0, 0], [1, 4]],
                    "backward": [[4, 1]],
                    "descending": [[4, 5], [0, 2]],
                    "overlap": [[0, 2], [1, 2]],
                    "adjacent": [[0, 2], [2, 3]],
                    "too-few": [[0, 2]],
                    "too-many": [[0, 4]],
                    "none": [],
                    "beyond-2-32": [[2**32 - 2, 2**32 + 1]],
                    "far": [[2**40, 2**40 + 3]],
                    "numbers": [0, 1, 4],
                    "triples": [[0, 1, 2]],
                    "single": [[3]],
                    "strings": [["0", "3"]],
                    "object": {"0": 3},
                }.items()
            ],
            ("source-twice", "source_conflict", "GRP-005", meta("groups/1/source", "a.4.weight")),
            ("source-is-passthrough", "source_conflict", "GRP-005", meta("groups/1/source", "bias")),
            (
                "source-templates-meet",
                "source_conflict",
                "GRP-005",
                many(
                    meta("groups/0/source", "w{}"),
                    meta("groups/1/layout", "stacked"),
                    meta("groups/1/source", "{}0"),
                    meta("groups/1/expert_ranges", [[2, 4]]),
                    meta("groups/0/expert_ranges", [[0, 3]]),
                    meta("groups/1/source", "w{}"),
                ),
            ),
            (
                "source-templates-meet-digits",
                "source_conflict",
                "GRP-005",
                many(
                    meta("groups/0/source", "w{}"),
                    meta("groups/0/expert_ranges", [[10, 13]]),
                    meta("groups/1/layout", "stacked"),
                    meta("groups/1/source", "w1{}"),
                    meta("groups/1/expert_ranges", [[1, 3]]),
                ),
            ),
            (
                "source-stacked-is-passthrough",
                "source_conflict",
                "GRP-005",
                many(
                    meta("groups/0/source", "bia{}"),
                    added("bia5", Tensor("U8", [1], b"\1"), passthrough=True),
                    meta(ranges, [[3, 6]]),
                ),
            ),
        ],
    )

    def index(e: int, value: int) -> Fault:
        return put("a_dictionary_index", e, bytes([value]))

    offsets = struct.unpack("<4Q", BASES["groups"].tensors["a_code_offsets"].data)
    n = offsets[-1]

    def shift(*values: int) -> Fault:
        return put("a_code_offsets", 0, struct.pack("<4Q", *values))

    yield from broken(
        "groups",
        [
            ("group-dimension-2-31", "shape_overflow", "GRP-006", meta("groups/1/shape", [2, 2, large])),
            ("group-rows-2-31", "shape_overflow", "GRP-006", meta("groups/1/shape", [2, large, 9])),
            ("group-experts-2-31", "shape_overflow", "GRP-006", meta("groups/1/shape", [large, 2, 9])),
            ("group-product-2-62", "shape_overflow", "GRP-006 GEN-001", meta("groups/1/shape", [2, large - 1, large - 1])),
            ("group-product-wraps", "shape_overflow", "GRP-006 GEN-001", meta("groups/1/shape", [2**22, 2**22, 2**22])),
            *[
                (
                    f"role-dtype-{role.replace('_', '-')}-{dtype.lower()}",
                    "role_dtype",
                    "GRP-007",
                    replaced(f"a_{role}", dtype, shape),
                )
                for role, dtype, shape in (
                    ("codes", "I8", [n]),
                    ("code_offsets", "I64", [4]),
                    ("code_offsets", "F64", [4]),
                    ("row_lengths", "I8", [3, 3]),
                    ("levels", "I32", [3, 3, 2]),
                    ("levels", "U32", [3, 3, 2]),
                    ("dictionary_index", "BOOL", [3]),
                    ("checksums", "I32", [3]),
                    ("checksums", "F32", [3]),
                )
            ],
            ("role-dtype-levels-of-group", "role_dtype", "GRP-007", replaced("a_levels", "F64", [3, 3, 1])),
            *[
                (
                    f"role-shape-{role.replace('_', '-')}-{name}",
                    "role_shape",
                    "GRP-008",
                    replaced(f"a_{role}", dtype, shape, data),
                )
                for role, name, dtype, shape, data in (
                    ("codes", "two-dimensions", "U8", [1, n], None),
                    ("code_offsets", "short", "U64", [3], bytes(24)),
                    ("code_offsets", "long", "U64", [5], bytes(40)),
                    ("row_lengths", "flat", "U8", [9], None),
                    ("row_lengths", "transposed", "U8", [1, 9], None),
                    ("levels", "flat", "F32", [3, 6], None),
                    ("levels", "swapped", "F32", [3, 2, 3], None),
                    ("dictionary_index", "short", "U8", [2], b"\0\1"),
                    ("dictionary_index", "two-dimensions", "U8", [3, 1], None),
                    ("checksums", "short", "U32", [2], bytes(8)),
                    ("checksums", "scalar", "U32", [], bytes(4)),
                )
            ],
            (
                "group-more-experts",
                "role_shape",
                "GRP-008",
                many(meta("groups/0/shape", [4, 3, 20]), meta(ranges, [[0, 2], [4, 6]])),
            ),
            ("group-more-rows", "role_shape", "GRP-008", meta("groups/0/shape", [3, 4, 20])),
            ("offsets-begin-at-1", "code_offsets", "GRP-009", shift(1, *offsets[1:])),
            ("offsets-fall", "code_offsets", "GRP-009", shift(0, offsets[2], offsets[1], n)),
            ("offsets-end-early", "code_offsets", "GRP-009", shift(*offsets[:3], n - 1)),
            ("offsets-end-late", "code_offsets", "GRP-009", shift(*offsets[:3], n + 1)),
            ("offsets-beyond", "code_offsets", "GRP-009", shift(0, n + 5, n + 6, n)),
            ("offsets-2-63", "code_offsets", "GRP-009 GEN-001", shift(0, 2**63, 2**63, n)),
            ("offsets-2-64", "code_offsets", "GRP-009 GEN-001", shift(0, 2**64 - 1, 2**64 - 1, n)),
            ("offsets-shifted", "row_lengths", "GRP-010", shift(0, offsets[1] + 1, *offsets[2:])),
            ("offsets-shifted-back", "row_lengths", "GRP-010", shift(0, offsets[1] - 1, *offsets[2:])),
            ("dictionary-index-3", "dictionary_index", "GRP-011", index(0, 3)),
            ("dictionary-index-255", "dictionary_index", "GRP-011", index(2, 255)),
            ("dictionary-index-other-bits", "dictionary_index", "GRP-012", index(1, 2)),
            ("group-other-bits", "dictionary_index", "GRP-012", meta("groups/0/code_bits", 12)),
        ],
    )
    lengths = BASES["8"].tensors["w_row_lengths"].data
    yield from broken(
        "8",
        [
            ("row-length-one-more", "row_lengths", "GRP-010", put("w_row_lengths", 0, bytes([lengths[0] + 1]))),
            ("row-length-255", "row_lengths", "GRP-010", put("w_row_lengths", 4, b"\xff")),
            ("row-length-base-more", "row_lengths", "GRP-010", meta(entry + "row_length_base", 9)),
            ("row-length-base-2-32-less-1", "row_lengths", "GRP-010 GEN-001", meta(entry + "row_length_base", 2**32 - 1)),
            ("codes-longer", "row_lengths", "GRP-010", _longer),
            ("columns-more", "row_underrun", "ROW-003", meta(entry + "shape", [1, 5, 13 + 1])),
            ("columns-fewer", "row_overrun", "ROW-004", meta(entry + "shape", [1, 5, 8])),
            ("columns-beyond-bound", "row_underrun", "GRP-014", meta(entry + "shape", [1, 5, 1000])),
            (
                "columns-beyond-bound-by-one",
                "row_underrun",
                "GRP-014",
                meta(entry + "shape", [1, 5, 3 * len(BASES["8"].tensors["w_codes"].data) // 5 + 1]),
            ),
        ],
    )


def _longer(draft: Draft) -> None:
    codes = draft.tensors["w_codes"].data + b"\0"
    draft.tensors["w_codes"] = Tensor("U8", [len(codes)], codes)
    draft.tensors["w_code_offsets"].data = struct.pack("<2Q", 0, len(codes))


def levels() -> Iterator[Vector]:
    for dtype in ("F16", "BF16", "F32", "F64"):
        base, size = (dtype.lower() if dtype != "F32" else "8"), len(level(dtype, 1.0))
        one = level(dtype, 1.0)
        infinite = {"F16": b"\0\x7c", "BF16": b"\x80\x7f", "F32": b"\0\0\x80\x7f", "F64": bytes(6) + b"\xf0\x7f"}[dtype]
        nan, tail = b"\1" + infinite[1:], dtype.lower()
        yield from broken(
            base,
            [
                (f"level-infinite-{tail}", "level_value", "LEV-001", put("w_levels", size, infinite)),
                (f"level-minus-infinite-{tail}", "level_value", "LEV-001", put("w_levels", 0, negative(infinite))),
                (f"level-nan-{tail}", "level_value", "LEV-001", put("w_levels", 2 * 2 * size, nan)),
                (f"level-minus-zero-{tail}", "level_value", "LEV-001", put("w_levels", 2 * size, negative(bytes(size)))),
                (
                    f"level-high-minus-zero-{tail}",
                    "level_value",
                    "LEV-001",
                    put("w_levels", 3 * 2 * size + size, negative(bytes(size))),
                ),
                (f"level-equal-{tail}", "level_value", "LEV-002", put("w_levels", 0, one)),
                (f"level-swapped-{tail}", "level_value", "LEV-002", put("w_levels", 0, one + negative(one))),
                (
                    f"level-both-negative-swapped-{tail}",
                    "level_value",
                    "LEV-002",
                    put("w_levels", size, negative(level(dtype, 2.0))),
                ),
                (f"level-high-zero-low-positive-{tail}", "level_value", "LEV-002", put("w_levels", 0, one + bytes(size))),
                (f"level-zero-used-{tail}", "level_zero", "LEV-003", put("w_levels", 0, bytes(size))),
                (f"level-high-zero-used-{tail}", "level_zero", "LEV-003", put("w_levels", 2 * 2 * size + size, bytes(size))),
            ],
        )


# ---- §7 and §8 -------------------------------------------------------------------------------------------------------


def checksums() -> Iterator[Vector]:
    def flip(name: str, at: int = 0, bit: int = 0) -> Fault:
        def fault(draft: Draft) -> None:
            data = bytearray(draft.tensors[name].data)
            data[at] ^= 1 << bit
            draft.tensors[name].data = bytes(data)

        return fault

    base = BASES["8"]
    yield from broken(
        "8",
        [
            *[
                (
                    f"checksum-expert-{role.replace('_', '-')}",
                    "checksum",
                    "CRC-001 CRC-006",
                    keep("experts", flip(f"w_{role}", 0, bit)),
                )
                for role, bit in (("codes", 7), ("levels", 3), ("row_lengths", 0), ("checksums", 0))
            ],
            ("checksum-expert-last-code", "checksum", "CRC-001", keep("experts", flip("w_codes", -1, 0))),
            ("checksum-expert-last-level", "checksum", "CRC-001", keep("experts", flip("w_levels", -1, 0))),
            ("checksum-dictionary", "checksum", "CRC-002 CRC-006", keep("dictionaries", flip("qmoecodec.dictionary.0", 0, 0))),
            ("checksum-dictionary-entry", "checksum", "CRC-002", keep("dictionaries", meta("dictionaries/0/crc32", "00000000"))),
            ("checksum-passthrough", "checksum", "CRC-003 CRC-006", keep("passthrough", flip("bias", 2, 6))),
            ("checksum-passthrough-entry", "checksum", "CRC-003", keep("passthrough", meta("passthrough/scale", "ffffffff"))),
            (
                "checksum-passthrough-swapped",
                "checksum",
                "CRC-003",
                keep(
                    "passthrough",
                    many(
                        meta("passthrough/scale", base.metadata["passthrough"]["bias"]),
                        meta("passthrough/bias", base.metadata["passthrough"]["scale"]),
                    ),
                ),
            ),
            ("checksum-header-dtype", "role_dtype", "CRC-004", replaced(HEADER_CRC, "I32", [1])),
            ("checksum-header-shape", "role_shape", "CRC-004", replaced(HEADER_CRC, "U32", [1, 1])),
            ("checksum-header-scalar", "role_shape", "CRC-004", replaced(HEADER_CRC, "U32", [])),
            ("checksum-header-two", "role_shape", "CRC-004", replaced(HEADER_CRC, "U32", [2], bytes(8))),
            ("checksum-header-zero", "checksum", "CRC-005 CRC-006", keep("header", lambda draft: None)),
            ("checksum-header-name", "checksum", "CRC-005", keep("header", text("w.weight", "v.weight"))),
            ("checksum-header-strings", "checksum", "CRC-005", keep("header", lambda draft: draft.strings.update(format="pt"))),
            ("checksum-header-castagnoli", "checksum", "CRC-005", whole(_castagnoli)),
            (
                "checksum-header-big-endian",
                "checksum",
                "CRC-005",
                whole(lambda file: _with_header_crc(file, _header_crc(file)[::-1])),
            ),
        ],
    )
    yield from broken(
        "groups",
        [
            ("checksum-expert-index", "checksum", "CRC-001", keep("experts", put("a_dictionary_index", 0, b"\1"))),
            ("checksum-expert-offsets", "checksum", "CRC-001", keep("experts", _move_offset)),
            ("checksum-experts-swapped", "checksum", "CRC-001", keep("experts", _swap_checksums)),
        ],
    )


def _header_crc_place(file: bytes) -> int:
    n = int.from_bytes(file[:8], "little")
    at: int = json.loads(file[8 : 8 + n])[HEADER_CRC]["data_offsets"][0]
    return 8 + n + at


def _header_crc(file: bytes) -> bytes:
    at = _header_crc_place(file)
    return file[at : at + 4]


def _with_header_crc(file: bytes, value: bytes) -> bytes:
    at = _header_crc_place(file)
    return file[:at] + value + file[at + 4 :]


def _castagnoli(file: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in file[: 8 + int.from_bytes(file[:8], "little")]:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return _with_header_crc(file, struct.pack("<I", crc ^ 0xFFFFFFFF))


def _move_offset(draft: Draft) -> None:
    offsets = [*struct.unpack("<4Q", draft.tensors["a_code_offsets"].data)]
    offsets[1] += 1
    draft.tensors["a_code_offsets"].data = struct.pack("<4Q", *offsets)


def _swap_checksums(draft: Draft) -> None:
    data = draft.tensors["a_checksums"].data
    draft.tensors["a_checksums"].data = data[4:8] + data[:4] + data[8:]


def shards() -> Iterator[Vector]:
    drafts, _ = valid.two_shards()
    files = {name: draft.render() for name, draft in drafts.items()}
    weight_map = valid.weight_map_of(drafts)
    good = index_text(weight_map, {"total_size": 123})

    def one(
        name: str,
        reason: str,
        reqs: str,
        index: bytes = good,
        change: dict[str, bytes | None] | None = None,
        before: dict[str, bytes | None] | None = None,
        **flags: Any,
    ) -> Vector:
        def content(part: dict[str, bytes | None]) -> dict[str, bytes]:
            return {file: data for file, data in ({**files, INDEX: index} | part).items() if data is not None}

        return Vector(
            f"invalid/{name}",
            name.replace("-", " "),
            [f"REQ-{req}" for req in reqs.split()],
            content(change or {}),
            error=reason,
            base="valid/base-shards",
            before=content(before or change or {}),
            **flags,
        )

    def mapped(**changes: Any) -> dict[str, Any]:
        return {name: file for name, file in (weight_map | changes).items() if file is not None}

    first = weight_map["a_codes"]
    yield one("index-empty", "header_json", "SHD-001 JSN-001", b"")
    yield one("index-not-json", "header_json", "SHD-001 JSN-001", good[:-4])
    yield one("index-array", "header_json", "SHD-001 JSN-001", b"[]")
    yield one("index-latin1", "header_encoding", "SHD-001 JSN-006", good.replace(b"bias", b"bi\xe4s"))
    yield one("index-bom", "header_encoding", "SHD-001 CON-004", b"\xef\xbb\xbf" + good)
    yield one("index-surrogate", "header_encoding", "JSN-006", good.replace(b"bias", b"bi\\udc00s"))
    yield one("index-duplicate", "duplicate_key", "JSN-002", good.replace(b'"bias": ', b'"bias": "x", "bias": '))
    yield one(
        "index-duplicate-map", "duplicate_key", "JSN-002", good.replace(b'"weight_map": ', b'"weight_map": {}, "weight_map": ')
    )
    yield one("index-depth", "json_depth", "JSN-003", index_text(weight_map, {"a": json.loads("[" * 15 + "]" * 15)}))
    yield one("index-number", "json_number", "JSN-004", index_text(weight_map, {}, version=1.5))
    yield one("index-number-negative", "json_number", "JSN-004", index_text(weight_map, {}, version=[-1]))
    yield one("index-number-deeper", "json_number", "JSN-004", index_text(weight_map, {}, note={"metadata": 0.5}))
    yield one("index-empty-object", "shard_index", "SHD-001", b"{}")
    yield one("index-no-map", "shard_index", "SHD-001", b'{"metadata": {}}')
    yield one("index-map-array", "shard_index", "SHD-001", b'{"weight_map": ["a"]}')
    yield one("index-map-null", "shard_index", "SHD-001 JSN-005", b'{"weight_map": null}')
    yield one("index-map-number", "shard_index", "SHD-001", index_text(mapped(bias=1)))
    yield one("index-map-list", "shard_index", "SHD-001", index_text(mapped(bias=[first])))
    yield one("index-metadata-array", "shard_index", "SHD-001", index_text(weight_map, []))
    yield one("index-metadata-null", "shard_index", "SHD-001 JSN-005", good.replace(b'{\n    "total_size": 123\n  }', b"null"))
    names = {
        "parent": "..",
        "here": ".",
        "none": "",
        "traversal": f"../{first}",
        "absolute": "/etc/passwd",
        "folder": f"sub/{first}",
        "backslash": f"..\\{first}",
        "nul": f"{first}\0",
        "here-slash": f"./{first}",
        "url": "file:///etc/passwd",
    }
    for name, path in names.items():
        yield one(f"shard-path-{name}", "shard_path", "SHD-003", index_text(mapped(bias=path)))
    yield one("shard-missing", "shard_missing", "SHD-004", change={SHARDS[1]: None})
    yield one("shard-missing-name", "shard_missing", "SHD-004", index_text(mapped(bias="model-00003-of-00003.safetensors")))
    yield one("shard-missing-long-name", "shard_missing", "SHD-004", index_text(mapped(bias="m" * 5000)))
    yield one(
        "shard-directory-empty",
        "shard_missing",
        "SHD-004",
        change={INDEX: None, SHARDS[0]: None, SHARDS[1]: None, "config.json": b"{}"},
    )
    outside = "vectors/valid/base-8.safetensors"
    link = "linked.safetensors"
    linked = index_text({name: link if file == first else file for name, file in weight_map.items()})
    yield one("shard-link-outside", "shard_path", "SHD-005", linked, links={link: outside})
    yield one("shard-link-parent", "shard_path", "SHD-005", linked, links={link: ".."})
    yield one("shard-link-directory", "shard_path", "SHD-005", linked, links={link: "."})
    yield one("shard-link-dangling", "shard_missing", "SHD-004", linked, links={link: "nowhere.safetensors"})
    yield one("directory-link-outside", "shard_path", "SHD-005", change={INDEX: None}, links={"model.safetensors": outside})
    yield one("index-tensor-not-named", "shard_mismatch", "SHD-002", index_text(mapped(bias=None)))
    yield one("index-role-not-named", "shard_mismatch", "SHD-002", index_text(mapped(a_codes=None)))
    yield one("index-tensor-too-many", "shard_mismatch", "SHD-002", index_text(mapped(other=first)))
    yield one("index-tensor-elsewhere", "shard_mismatch", "SHD-002", index_text(mapped(bias=SHARDS[1])))
    yield one("index-reserved-named", "shard_mismatch", "SHD-002", index_text(mapped(**{HEADER_CRC: first})))
    yield one("index-source-named", "shard_mismatch", "SHD-002", index_text(mapped(**{"e.0.wi": first})))
    yield one(
        "index-shards-swapped", "shard_mismatch", "SHD-002", change={SHARDS[0]: files[SHARDS[1]], SHARDS[1]: files[SHARDS[0]]}
    )

    def second(
        fault: Fault, more: dict[str, str] | None = None
    ) -> tuple[dict[str, bytes | None], dict[str, bytes | None], bytes]:
        draft = drafts[SHARDS[1]].copy()
        fault(draft)
        return (
            {SHARDS[1]: draft.render()},
            {SHARDS[1]: draft.render(refresh=False)},
            index_text(weight_map | (more or {}), {"total_size": 123}),
        )

    def in_second(name: str, reason: str, reqs: str, fault: Fault, more: dict[str, str] | None = None) -> Vector:
        change, before, index = second(fault, more)
        return one(name, reason, reqs, index, change, before)

    extra = Tensor("U8", [1], b"\5")
    yield in_second("shard-source-twice", "source_conflict", "SHD-006", meta("groups/0/source", "e.1.wi"))
    yield in_second("shard-source-is-passthrough", "source_conflict", "SHD-006", meta("groups/0/source", "bias"))
    yield in_second(
        "shard-passthrough-is-source",
        "source_conflict",
        "SHD-006",
        added("e.0.wi", extra, passthrough=True),
        {"e.0.wi": SHARDS[1]},
    )
    yield in_second("shard-tensor-twice", "source_conflict", "SHD-006", added("bias", extra, passthrough=True))
    yield in_second("shard-damaged", "checksum", "CRC-006", keep("experts", put("b_codes", 0, b"\0\xff")))
    yield in_second("shard-codeword", "unused_codeword", "ROW-002", recode(_spoil, hand(12), "b"))
    yield in_second("shard-version", "unsupported_version", "MET-005", meta("format_version", "2.0"))
    yield one("shard-empty", "truncated", "CON-001", change={SHARDS[1]: b""})
    yield one("shard-not-packed", "not_packed", "MET-002", change={SHARDS[1]: _plain_safetensors()})


def _spoil(rows: list[list[int]]) -> None:
    rows[0][0] = 7


def _plain_safetensors() -> bytes:
    text = b'{"__metadata__":{"format":"pt"},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"\1"


# ---- Accepted, but not canonical -------------------------------------------------------------------------------------


def noncanonical() -> Iterator[Vector]:
    """Yield files that a reader accepts unless it is asked to check the encoding."""
    tensors = {vector.id: vector.tensors for vector in valid.bases()}

    def one(name: str, reqs: str, base: str, fault: Fault) -> Vector:
        draft = BASES[base]
        fault(draft)
        return Vector(
            f"noncanonical/{name}",
            name.replace("-", " "),
            [f"REQ-{req}" for req in reqs.split()],
            {"": draft.render()},
            tensors[f"valid/base-{base}"],
            deep="not_canonical",
            base=f"valid/base-{base}",
            before={"": draft.render(refresh=False)},
        )

    def rewrite(row: int, parse: Callable[[list[int]], list[int]], book: Codebook) -> Fault:
        def change(rows: list[list[int]]) -> None:
            rows[row] = parse(rows[row])

        return recode(change, book)

    for bits, base in ((8, "8"), (12, "12"), (16, "16")):
        # Row 4 ends in 0, encoded as 00 (incomplete): the leaf 000 gives the same digits and more overrun.
        yield one(f"past-incomplete-{bits}", "ROW-001", base, rewrite(4, lambda words: [*words[:-1], 0], hand(bits)))
        # Row 2 ends in -, encoded as -0 (incomplete), for which the leaf -00 stands as well.
        yield one(f"past-incomplete-minus-{bits}", "ROW-001", base, rewrite(2, lambda words: [*words[:-1], 3], hand(bits)))
    tables = table(8)
    code = tables.codes[0]
    yield one("table-shorter", "ROW-001", "table", rewrite(1, lambda words: [code[b"\0"]] * 12, tables))
    yield one("table-two-for-one", "ROW-001", "table", rewrite(1, lambda words: [code[bytes(4)]] * 3, tables))
    yield one("table-past-end", "ROW-001", "table", rewrite(3, lambda words: [*words[:-1], code[bytes(2)]], tables))
    yield one(
        "table-first-shorter", "ROW-001", "table", rewrite(1, lambda words: [code[bytes(4)], code[bytes(7)], code[b"\0"]], tables)
    )

    def lower(draft: Draft) -> None:
        draft.metadata["groups"][0]["row_length_base"] -= 1
        tensor = draft.tensors["w_row_lengths"]
        tensor.data = bytes(length + 1 for length in tensor.data)

    def wider(dtype: str, size: int) -> Fault:
        def fault(draft: Draft) -> None:
            tensor = draft.tensors["w_row_lengths"]
            draft.tensors["w_row_lengths"] = Tensor(
                dtype, tensor.shape, b"".join(n.to_bytes(size, "little") for n in tensor.data)
            )

        return fault

    yield one("row-length-base-too-low", "GRP-013", "8", lower)
    yield one("row-lengths-u16", "GRP-013", "8", wider("U16", 2))
    yield one("row-lengths-u32", "GRP-013", "8", wider("U32", 4))

    groups = [valid.group_of("w", "fused", "F32", 8, [], (0, 2, 3))]
    draft = valid.make(groups, [hand(8)])
    draft.metadata["groups"][0]["row_length_base"] = 1
    base = next(vector for vector in valid.shapes() if vector.id == "valid/shape-fused-0-2-3")
    yield Vector(
        "noncanonical/row-length-base-without-rows",
        "a base of 1 in a group without rows",
        ["REQ-GRP-013"],
        {"": draft.render()},
        base.tensors,
        deep="not_canonical",
        base=base.id,
        before={"": draft.render(refresh=False)},
    )


# ---- Small files that claim much, and large files --------------------------------------------------------------------


def limits() -> Iterator[Vector]:
    """Yield files for which time and memory count."""
    large = 2**31 - 1

    def claim(name: str, reason: str, reqs: str, fault: Fault, base: str = "8", **flags: Any) -> Iterator[Vector]:
        for vector in broken(base, [(name, reason, reqs, fault)]):
            vector.id = f"limit/{name}"
            for key, value in flags.items():
                setattr(vector, key, value)
            yield vector

    shape = "groups/0/shape"
    yield from claim("columns-2-31", "row_underrun", "GEN-002 GRP-014", meta(shape, [1, 5, large]))
    yield from claim("rows-2-30", "role_shape", "GEN-002 GRP-008", meta(shape, [1, 2**30, 12]))
    yield from claim("rows-and-columns", "role_shape", "GEN-002 GRP-008", meta(shape, [1, 2**30, 2**31 - 1]))
    yield from claim(
        "experts-2-31",
        "role_shape",
        "GEN-002 GRP-008",
        many(meta("groups/0/shape", [large, 3, 20]), meta("groups/0/expert_ranges", [[0, large]])),
        "groups",
    )
    yield from claim(
        "experts-2-31-long-names",
        "role_shape",
        "GEN-002 GRP-008",
        many(
            meta("groups/0/shape", [large, 0, 0]),
            meta("groups/0/source", "x" * 3000 + "{}"),
            meta("groups/0/expert_ranges", [[0, large]]),
        ),
        "groups",
    )
    yield from claim("tensor-2gb", "truncated", "GEN-002 TEN-008", entry("bias", shape=[2**31], data_offsets=[0, 2**31]))
    yield from claim("tensor-2-62", "truncated", "GEN-002 TEN-008", entry("bias", shape=[2**62], data_offsets=[0, 2**62]))
    yield from claim("row-lengths-2-32", "row_lengths", "GEN-002 GRP-010", meta("groups/0/row_length_base", 2**32 - 1))
    yield from claim("header-100mb", "truncated", "GEN-002 CON-001", header_length(100_000_000))
    yield from claim("header-above-limit", "header_size", "CON-002 GEN-002", header_length(100_000_008), size=100_000_016)
    yield from claim("header-1gb", "header_size", "CON-002 GEN-002", header_length(10**9), size=10**9 + 8)
    yield from claim("header-20mb", "header_encoding", "CON-004 GEN-002", many(header_length(20_000_000)), size=20_000_008)
    yield from claim(
        "nested-arrays",
        "json_depth",
        "JSN-003",
        setting(header_text=lambda text: text[:-1] + ',"a":' + "[" * 1_000_000),
        gzip=True,
    )
    yield from claim("digits", "json_number", "JSN-004", text('"shape":[1,5]', f'"shape":[{"9" * 1_000_000},5]'), gzip=True)
    yield from claim(
        "empty-tensors",
        "tensor_count",
        "TEN-002 GEN-002",
        setting(
            header_text=lambda text: (
                text[:-1]
                + ","
                + ",".join(f'"{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(70_000))
                + "}"
            )
        ),
        gzip=True,
    )


def everything() -> Iterator[Vector]:
    """Yield all of these vectors."""
    for part in (
        container,
        json_text,
        tensors,
        metadata,
        dictionaries,
        rows,
        groups,
        levels,
        checksums,
        shards,
        noncanonical,
        limits,
    ):
        yield from part()
