"""Vectors for what the specification left open, and says now."""

from __future__ import annotations

from collections.abc import Iterator

from vectors.draft import ROLES
from vectors.faults import broken, many, meta, renamed
from vectors.parts import PLAIN, Vector, plain


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
