"""More vectors for which time and memory count: dictionaries, names, and shard indexes."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

from vectors import codebook
from vectors.draft import Draft, Matrix, Tensor
from vectors.faults import broken
from vectors.parts import INDEX, PLAIN, SHARDS, Vector, group_of, index_text, plain, two_shards, weight_map_of


def dictionaries() -> Iterator[Vector]:
    """Yield dictionaries that are large when they are laid out."""
    tiny = [codebook.aivf(16, 3 + i, (0, 0, 0), (0, 0)) for i in range(256)]
    experts = [Matrix([b"\0"], [(bytes(4), bytes(4))], i) for i in range(32)]
    yield plain(
        "limit/bank-256",
        "256 dictionaries of 16 bits and two bytes, 32 of them in use",
        ["REQ-GEN-002", "REQ-DIC-005"],
        [group_of("w", "fused", "F32", 16, experts)],
        tiny,
        gzip=True,
    )
    deep = codebook.aivf(16, 2**16, [*deep_tree(2**16 - 2), 0, 0], (0, 0))
    yield plain(
        "limit/dictionary-deep",
        "phrases of 9.8 million digits in 24 kB",
        ["REQ-GEN-002", "REQ-DIC-007"],
        [group_of("w", "matrix", "F32", 16, [Matrix([b"\0\1\0"], [(struct.pack("<f", -1), bytes(4))])])],
        [deep],
        gzip=True,
    )


def deep_tree(leaves: int) -> list[int]:
    """Return the symbols of a tree below its 0-child: a comb of 140 levels, and a bush at its end."""
    symbols: list[int] = []

    def grow(depth: int, leaves: int) -> None:
        if leaves < 3 or depth == 255:
            symbols.append(codebook.LEAF)
            return
        symbols.append(codebook.INTERNAL)
        if depth < 140:
            grow(depth + 1, leaves - 2)
            symbols.extend([codebook.LEAF] * 2)
            return
        side = (leaves // 3 - 1) | 1
        for part in (leaves - 2 * side, side, side):
            grow(depth + 1, part)

    grow(1, leaves if leaves % 2 else leaves - 1)
    return symbols


def names() -> Iterator[Vector]:
    """Yield a file whose experts have names of 160 MB in all, and hold nothing."""
    n = 40_000
    source = "x" * 4000 + "{}"

    def fault(draft: Draft) -> None:
        draft.metadata["groups"][0] |= {"shape": [n, 0, 0], "source": source, "expert_ranges": [[0, n]], "row_length_base": 0}
        checksum = struct.pack("<I", zlib.crc32(bytes(17)))  # of an expert's index and offsets
        for role, dtype, shape, data in (
            ("codes", "U8", [0], b""),
            ("code_offsets", "U64", [n + 1], bytes(8 * (n + 1))),
            ("row_lengths", "U8", [n, 0], b""),
            ("levels", "F32", [n, 0, 2], b""),
            ("dictionary_index", "U8", [n], bytes(n)),
            ("checksums", "U32", [n], checksum * n),
        ):
            draft.tensors[f"a_{role}"] = Tensor(dtype, shape, data)
        last = source.replace("{}", str(n - 1))
        draft.tensors[last] = PLAIN["bias"]
        draft.metadata["passthrough"][last] = "00000000"

    for vector in broken("groups", [("source-names", "source_conflict", "GEN-002 GRP-005", fault)]):
        vector.id, vector.gzip = "limit/source-names", True
        yield vector


def indexes() -> Iterator[Vector]:
    """Yield directories whose index is large, or not a file of theirs."""
    drafts, tensors = two_shards()
    files = {name: draft.render() for name, draft in drafts.items()}
    index = index_text(weight_map_of(drafts), {"total_size": 123})
    single = {"model.safetensors": files[SHARDS[0]]}
    of_single = {name: tensor for name, tensor in tensors.items() if name in ("e.0.wi", "e.1.wi", "bias")}

    def broken_one(identity: str, reason: str, reqs: str, content: dict[str, bytes], **flags: Any) -> Vector:
        return Vector(identity, identity.split("/")[1].replace("-", " "), [f"REQ-{req}" for req in reqs.split()], content,
                      error=reason, base="valid/base-shards", before=content, **flags)  # fmt: skip

    # The last byte that may be there is read, and is none of a JSON text; the next makes the index too long.
    for name, size, reason in (("longest", 100_000_000, "header_json"), ("too-long", 100_000_001, "shard_index")):
        content = files | {INDEX: index}
        yield broken_one(f"limit/index-{name}", reason, "SHD-001 GEN-002", content, sizes={INDEX: size}, seconds=30)
    outside = f"vectors/valid/base-shards/{INDEX}"
    yield broken_one("invalid/index-link-outside", "shard_path", "SHD-008", files, links={INDEX: outside})
    yield broken_one("invalid/index-link-directory", "shard_path", "SHD-008", files, links={INDEX: "."})
    yield broken_one("invalid/index-link-parent", "shard_path", "SHD-008", single, links={INDEX: ".."})
    yield broken_one("invalid/index-link-dangling", "shard_missing", "SHD-008 SHD-007", files, links={INDEX: "nowhere.json"})
    yield Vector("valid/index-link-inside", "an index that is a symbolic link inside the directory", ["REQ-SHD-008"],
                 files | {"index.json": index}, tensors, links={INDEX: "index.json"})  # fmt: skip
    yield Vector("valid/index-link-dangling", "an index that is a link to nothing, and one file", ["REQ-SHD-008", "REQ-SHD-007"],
                 single, of_single, links={INDEX: "nowhere.json"})  # fmt: skip
