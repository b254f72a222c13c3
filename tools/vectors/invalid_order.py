"""Vectors with more than one fault: the reason is that of the first in the order of spec §9. Some are what fuzzing has found."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from vectors import codebook
from vectors.codebook import Codebook
from vectors.draft import HEADER_CRC, Draft, Tensor
from vectors.faults import Fault, added, bank, broken, keep, many, meta, put, recode, removed, setting, words_of
from vectors.parts import INDEX, SHARDS, Vector, hand, index_text, two_shards, weight_map_of

UNUSED = 7  # in state 0 of the dictionaries made by hand
ZEROS = 0  # the codeword of 000


def rewritten(bits: int, change: dict[int, list[int]], name: str = "w") -> Fault:
    """Give rows of a base other codewords."""

    def of(rows: list[list[int]]) -> None:
        for row, words in change.items():
            rows[row] = words

    return recode(of, hand(bits), name)


def padded(row: int, book: Codebook) -> Fault:
    """Set the highest bit of a row's last byte, which belongs to no codeword."""

    def fault(draft: Draft) -> None:
        rows = words_of(draft, "w", book)
        assert len(rows[row]) * book.bits % 8
        at = sum(len(book.pack(words)) for words in rows[: row + 1]) - 1
        data = bytearray(draft.tensors["w_codes"].data)
        data[at] |= 0x80
        draft.tensors["w_codes"].data = bytes(data)

    return fault


def retyped(name: str, dtype: str | None = None, more_dimensions: bool = False) -> Fault:
    """Give a tensor another dtype or a dimension more."""

    def fault(draft: Draft) -> None:
        old = draft.tensors[name]
        draft.tensors[name] = Tensor(dtype or old.dtype, [*old.shape, *([1] if more_dimensions else [])], old.data)

    return fault


def entries(**changed: dict[str, Any]) -> Fault:
    """Change values of the entries of several tensors; None removes one."""

    def change(header: dict[str, Any]) -> dict[str, Any]:
        return header | {
            name: {key: value for key, value in (header[name] | values).items() if value is not None}
            for name, values in changed.items()
        }

    return setting(header=change)


def rows() -> Iterator[Vector]:
    """Yield faults of contents."""
    zeros = [ZEROS] * 4  # a row of twelve zeros
    infinite = put("w_levels", -4, struct.pack("<f", float("inf")))
    last_unused = rewritten(8, {4: [ZEROS, ZEROS, ZEROS, UNUSED]})
    offsets = put("w_code_offsets", 0, b"\1")
    symbol = put("qmoecodec.dictionary.0", 0, b"\3")
    yield from broken(
        "8",
        [
            # Found by fuzzing. Five rows of 12 digits take 20 codewords of at most three digits, which are there; row 0 alone
            # would take four.
            ("found-bound-of-one-row", "unused_codeword", "ROW-002 GRP-014", rewritten(8, {0: [UNUSED]})),
            ("order-bound-codeword", "row_underrun", "GRP-014 ROW-002", rewritten(8, {i: [UNUSED] for i in range(5)})),
            ("order-overrun-unused", "row_overrun", "ROW-004 ROW-002", rewritten(8, {1: [*zeros, UNUSED]})),
            ("order-unused-overrun", "unused_codeword", "ROW-002 ROW-004", rewritten(8, {1: [ZEROS, UNUSED, *zeros]})),
            ("order-unused-underrun", "unused_codeword", "ROW-002 ROW-003", rewritten(8, {1: [ZEROS, UNUSED]})),
            ("order-row-row", "row_underrun", "ROW-003 ROW-002", rewritten(8, {1: [ZEROS] * 3, 2: [UNUSED] * 12})),
            ("order-row-level-zero", "unused_codeword", "ROW-002 LEV-003", many(last_unused, put("w_levels", 0, bytes(4)))),
            ("order-level-row", "level_value", "LEV-001 ROW-002", many(rewritten(8, {0: [UNUSED] * 7}), infinite)),
            ("order-bound-level", "row_underrun", "GRP-014 LEV-001",
             many(rewritten(8, {i: [ZEROS] for i in range(5)}), infinite)),
            ("order-row-lengths-bound", "row_lengths", "GRP-010 GRP-014", meta("groups/0/row_length_base", 0)),
            ("order-checksum-row-lengths", "checksum", "CRC-001 GRP-010", keep("experts", put("w_row_lengths", 0, b"\x7f"))),
            ("order-index-checksum", "dictionary_index", "GRP-011 CRC-001", keep("experts", put("w_dictionary_index", 0, b"\1"))),
            ("order-offsets-index", "code_offsets", "GRP-009 GRP-011", many(put("w_dictionary_index", 0, b"\1"), offsets)),
            ("order-dictionary-group", "dictionary_symbol", "DIC-004 GRP-009", many(symbol, offsets)),
            ("order-row-passthrough", "unused_codeword", "ROW-002 CRC-003",
             many(last_unused, keep("passthrough", put("bias", 0, b"\xff")))),
        ],
    )  # fmt: skip
    yield from broken(
        "12",
        [
            # Found by fuzzing.
            ("found-padding-after-overrun", "row_overrun", "ROW-004 ROW-006",
             many(rewritten(12, {1: [*zeros, ZEROS]}), padded(1, hand(12)))),
            ("order-underrun-padding", "row_underrun", "ROW-003 ROW-006",
             many(rewritten(12, {1: [ZEROS] * 3}), padded(1, hand(12)))),
            # 000, 000, 000, 0-, --: the last - lies beyond the row.
            ("order-overrun-digits-padding", "overrun_nonzero", "ROW-005 ROW-006",
             many(rewritten(12, {0: [ZEROS, ZEROS, ZEROS, 1, 4]}), padded(0, hand(12)))),
        ],
    )  # fmt: skip
    yield from broken(
        "groups",
        [
            ("order-expert-expert", "checksum", "CRC-001 GRP-011",
             keep("experts", many(put("a_codes", 0, b"\xff\xff"), put("a_dictionary_index", 2, b"\3")))),
            ("order-group-group", "dictionary_index", "GRP-011 GRP-009",
             many(put("a_dictionary_index", 2, b"\3"), put("z_code_offsets", 0, b"\1"))),
            ("order-bank", "checksum", "CRC-002 DIC-004",
             many(put("qmoecodec.dictionary.1", 0, b"\3"), keep("dictionaries", put("qmoecodec.dictionary.0", 0, b"\3")))),
        ],
    )  # fmt: skip


def structure() -> Iterator[Vector]:
    """Yield faults of header, metadata and tensors."""
    no_metadata = setting(header=lambda header: {name: header[name] for name in header if name != "__metadata__"})
    other_metadata = setting(header=lambda header: header | {"__metadata__": {"a": "b"}})
    spaced = setting(metadata_text=lambda text: f" {text}")
    version = meta("format_version", "2.0")
    signed = retyped("w_checksums", "I32")
    yield from broken(
        "8",
        [
            # The header names `scale` before `bias`.
            ("order-tensor-tensor", "offset_order", "TEN-005 TEN-004",
             entries(bias={"dtype": "U128"}, scale={"data_offsets": [9, 1]})),
            ("order-tensor-schema", "unknown_dtype", "TEN-004 TEN-001", entries(bias={"dtype": None}, scale={"dtype": "U128"})),
            ("order-rank-dtype", "shape_rank", "TEN-003 TEN-004", entries(bias={"dtype": "U128", "shape": [1] * 9})),
            ("order-dtype-offsets", "unknown_dtype", "TEN-004 TEN-005", entries(bias={"dtype": "U128", "data_offsets": [9, 1]})),
            ("order-offsets-overflow", "offset_order", "TEN-005 TEN-007",
             entries(bias={"shape": [2**62, 2], "data_offsets": [9, 1]})),
            ("order-overflow-size", "shape_overflow", "TEN-007 TEN-006", entries(bias={"shape": [2**62, 2]})),
            ("order-size-truncated", "tensor_size", "TEN-006 TEN-008", entries(bias={"data_offsets": [0, 2**40]})),
            ("order-truncated-misaligned", "truncated", "TEN-008 TEN-009",
             entries(scale={"data_offsets": [2**40 + 1, 2**40 + 9]})),
            ("order-trailing-not-packed", "trailing_data", "TEN-012 MET-001",
             many(no_metadata, setting(data=lambda data: data + bytes(8)))),
            ("order-not-packed-missing", "not_packed", "MET-002 MET-012", many(removed(HEADER_CRC), other_metadata)),
            ("order-missing-version", "missing_tensor", "MET-012 MET-005", many(removed(HEADER_CRC), version)),
            ("order-checksum-dtype-value", "role_dtype", "CRC-004 CRC-005", keep("header", retyped(HEADER_CRC, "I32"))),
            ("order-checksum-version", "checksum", "CRC-005 MET-005", keep("header", version)),
            ("order-required-canonical", "metadata_schema", "MET-008 MET-003", many(meta("required_features", "no"), spaced)),
            ("order-canonical-optional", "metadata_canonical", "MET-003 MET-008", many(meta("optional_features", "no"), spaced)),
            ("order-entries", "dictionary_threshold", "DIC-003 GRP-001",
             many(meta("dictionaries/0/threshold", 257), meta("groups/0/name", ""))),
            ("order-group-passthrough", "shape_overflow", "GRP-006 MET-008",
             keep("passthrough", many(meta("groups/0/shape", [1, 2**31, 0]), meta("passthrough/bias", "no")))),
            ("order-passthrough-orphan", "reserved_name", "MET-013 MET-011", meta("passthrough", {"qmoecodec.a": "00000000"})),
            ("order-orphan-missing", "orphan_tensor", "MET-011 MET-012",
             meta("passthrough", {"scale": "00000000", "nowhere": "00000000"})),
            ("order-missing-role", "missing_tensor", "MET-012 GRP-007", many(removed("w_levels"), retyped("w_codes", "I8"))),
            ("order-dictionary-role", "role_shape", "DIC-001 GRP-007",
             many(retyped("qmoecodec.dictionary.0", more_dimensions=True), retyped("w_codes", "I8"))),
            ("order-role-role", "role_shape", "GRP-008 GRP-007", many(retyped("w_code_offsets", more_dimensions=True), signed)),
            ("order-role-dtype-shape", "role_dtype", "GRP-007 GRP-008", retyped("w_checksums", "I32", more_dimensions=True)),
            ("order-role-source", "role_dtype", "GRP-007 GRP-005", many(signed, meta("groups/0/source", "bias"))),
            ("order-source-contents", "source_conflict", "GRP-005 DIC-004",
             many(meta("groups/0/source", "bias"), put("qmoecodec.dictionary.0", 0, b"\3"))),
        ],
    )  # fmt: skip


def directories() -> Iterator[Vector]:
    """Yield faults of shards and their index."""
    drafts, _ = two_shards()
    weight_map = weight_map_of(drafts)
    second = {name: SHARDS[1] for name in weight_map if weight_map[name] == SHARDS[1]}

    def one(name: str, reason: str, reqs: str, faults: dict[int, Fault] | None = None, index: Any = None,
            without: str = "") -> Vector:  # fmt: skip
        contents: list[dict[str, bytes]] = []
        for refresh in (False, True):
            changed = {file: draft.copy() for file, draft in drafts.items()}
            for shard, fault in (faults or {}).items():
                fault(changed[SHARDS[shard]])
            files = {file: draft.render(refresh=refresh) if k in (faults or {}) else drafts[file].render()
                     for k, (file, draft) in enumerate(changed.items())}  # fmt: skip
            files[INDEX] = index_text(index or weight_map, {"total_size": 123})
            contents.append({file: data for file, data in files.items() if file != without})
        return Vector(
            f"invalid/order-{name}",
            f"order {name.replace('-', ' ')}",
            [f"REQ-{req}" for req in reqs.split()],
            contents[1],
            error=reason,
            base="valid/base-shards",
            before=contents[0],
        )

    extra = Tensor("U8", [1], b"\5")
    version = meta("format_version", "2.0")
    damaged = keep("passthrough", put("bias", 0, b"\xff"))
    symbol = put("qmoecodec.dictionary.0", 0, b"\3")
    swapped, too_many = second | weight_map, weight_map | {"x": SHARDS[0]}

    def wider(draft: Draft) -> None:
        old = draft.tensors["a_row_lengths"]
        draft.tensors["a_row_lengths"] = Tensor("U16", old.shape, b"".join(bytes([n, 0]) for n in old.data))

    yield one("index-path", "shard_index", "SHD-001 SHD-003", index=weight_map | {"a_codes": "..", "bias": 1})
    yield one("path-missing", "shard_path", "SHD-003 SHD-004", index={"x": ".."} | weight_map, without=SHARDS[0])
    yield one("missing-path", "shard_missing", "SHD-004 SHD-003", index={**weight_map, "x": ".."}, without=SHARDS[0])
    yield one("missing-shard", "shard_missing", "SHD-004 MET-005", {0: version}, without=SHARDS[1])
    yield one("shard-shard", "not_packed", "MET-002 MET-005",
              {0: version, 1: setting(header=lambda header: header | {"__metadata__": {"a": "b"}})}, swapped)  # fmt: skip
    yield one("shard-conflict", "unsupported_version", "MET-005 SHD-006",
              {1: many(version, added("bias", extra, passthrough=True))})  # fmt: skip
    yield one("conflict-mismatch", "source_conflict", "SHD-006 SHD-002", {1: meta("groups/0/source", "bias")}, too_many)
    yield one("mismatch-contents", "shard_mismatch", "SHD-002 CRC-003", {0: damaged}, too_many)
    yield one("contents-contents", "checksum", "CRC-003 DIC-004", {0: damaged, 1: symbol})
    yield one("contents-in-index-order", "dictionary_symbol", "DIC-004 CRC-003", {0: damaged, 1: symbol}, swapped)
    # What is not canonical in the first shard comes after what is wrong in the second.
    yield one("contents-canonical", "dictionary_symbol", "DIC-004 GRP-013", {0: wider, 1: symbol})


def dictionaries() -> Iterator[Vector]:
    """Yield a tree whose tensor ends where it becomes too deep."""
    chain = codebook.pack_pairs([0, *[1] * 255])
    yield from broken(
        "12",
        [("order-depth-size", "dictionary_phrase_length", "DIC-007 DIC-005",
          bank(0, codebook.Codebook("aivf", 12, 2048, chain, ({}, {}))))],
    )  # fmt: skip
