"""Vectors with a fault in the metadata or a dictionary (spec §3, §4)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from vectors import codebook
from vectors.draft import HEADER_CRC, Tensor, crc_text
from vectors.faults import (
    Case,
    Fault,
    added,
    bank,
    broken,
    dictionary,
    keep,
    many,
    meta,
    meta_text,
    put,
    removed,
    renamed,
    replaced,
    setting,
    text,
)
from vectors.parts import (
    TREE_0,
    Vector,
    hand,
    table,
)


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
        ("metadata-none", "not_packed", "MET-001", no_strings),
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
        ("text-bom", "header_encoding", "CON-004", meta_all(lambda text: "\ufeff" + text)),
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
        (
            "missing-role-and-passthrough",
            "missing_tensor",
            "MET-012",
            many(removed("w_codes"), meta("passthrough/w_codes", "00000000")),
        ),
    ]
    yield from broken("8", cases)
    for vector in broken("8", [("text-json-size", "json_size", "JSN-007", meta("x-many", [0] * 2**20))]):
        vector.gzip, vector.seconds = True, 30
        yield vector


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
            ("dictionary-one-tree", "dictionary_size", "DIC-005", dictionary(codebook.pack_pairs(TREE_0))),
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
            (
                "table-digit-3-and-padding",
                "dictionary_symbol",
                "DIC-010",
                put(name, -1, bytes([tables.data[-1] | 0x40 | 3 << 2 * ((used - 1) % 4)])),
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
