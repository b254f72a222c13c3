"""Vectors for what the specification left open, and says now."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vectors.draft import ROLES
from vectors.faults import Fault, broken, many, meta, put, renamed, setting
from vectors.parts import INDEX, PLAIN, SHARDS, Vector, index_text, plain, two_shards, weight_map_of


def reserved() -> Iterator[Vector]:
    """Yield names that would take the place of `__metadata__` in the header of the dense file."""
    name = "__metadata__"
    yield from broken(
        "8",
        [
            ("reserved-source-metadata", "reserved_name", "MET-013", meta("groups/0/source", name)),
            ("reserved-passthrough-metadata", "reserved_name", "MET-013", meta(f"passthrough/{name}", "00000000")),
            ("reserved-group-metadata", "reserved_name", "MET-013",
             many(meta("groups/0/name", name), *[renamed(f"w_{role}", f"{name}_{role}") for role in ROLES])),
        ],
    )  # fmt: skip


def features() -> Iterator[Vector]:
    """Yield names of features that UTF-16 orders otherwise than code points."""
    names = ["\uff5e", "\U0001d11e"]
    yield plain("future/optional-sorted", "optional features sorted by code point, not by UTF-16", ["REQ-MET-007", "REQ-MET-008"],
                passthrough=PLAIN, change=lambda draft: draft.metadata.update(optional_features=names))  # fmt: skip
    yield from broken("8", [("features-sorted-by-utf16", "metadata_schema", "MET-008", meta("optional_features", names[::-1]))])


def order() -> Iterator[Vector]:
    """Yield faults whose order the text did not say."""

    def many_tensors(header: dict[str, Any]) -> dict[str, Any]:
        wrong = {"dtype": 1, "shape": [0], "data_offsets": [0, 0]}
        empty = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
        return {"": wrong} | header | {f"{i:x}": empty for i in range(65_537 - len(header))}

    for vector in broken(
        "8",
        [
            ("order-count-schema", "tensor_count", "TEN-002 TEN-001", setting(header=many_tensors)),
            ("order-overflow-reserved", "shape_overflow", "GRP-006 MET-013",
             many(meta("groups/0/shape", [1, 2**31, 0]), meta("groups/0/source", "qmoecodec.w"))),
        ],
    ):  # fmt: skip
        if vector.id.endswith("schema"):
            vector.gzip, vector.seconds = True, 30
        yield vector


def directories() -> Iterator[Vector]:
    """Yield directories of which the text did not say what holds."""
    drafts, _ = two_shards()
    files = {name: draft.render() for name, draft in drafts.items()}
    weight_map = weight_map_of(drafts)

    def second(fault: Fault, *, refresh: bool = True) -> bytes:
        draft = drafts[SHARDS[1]].copy()
        fault(draft)
        return draft.render(refresh=refresh)

    renamed_source = meta("groups/0/source", "a_codes")
    tensors = {name.replace("wo", "a_codes"): tensor for name, tensor in two_shards()[1].items()}
    yield Vector(
        "valid/shards-source-as-role",
        "a source tensor with the name of a role tensor of another shard",
        ["REQ-SHD-006"],
        {SHARDS[0]: files[SHARDS[0]], SHARDS[1]: second(renamed_source), INDEX: index_text(weight_map)},
        tensors,
    )
    symbol = put("qmoecodec.dictionary.0", 0, b"\3")
    too_many = index_text(weight_map | {"x": SHARDS[0]}, {"total_size": 123})
    yield Vector(
        "invalid/order-mismatch-dictionary",
        "order mismatch dictionary",
        ["REQ-SHD-002", "REQ-DIC-004"],
        {SHARDS[0]: files[SHARDS[0]], SHARDS[1]: second(symbol), INDEX: too_many},
        error="shard_mismatch",
        base="valid/base-shards",
        before={SHARDS[0]: files[SHARDS[0]], SHARDS[1]: second(symbol, refresh=False), INDEX: too_many},
    )
    yield Vector(
        "invalid/directory-link-directory",
        "directory link directory",
        ["REQ-SHD-005", "REQ-SHD-007"],
        files,
        error="shard_path",
        base="valid/base-shards",
        before=files,
        links={"model.safetensors": "."},
    )
