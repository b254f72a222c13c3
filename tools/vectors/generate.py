#!/usr/bin/env python3
"""Write the conformance vectors and their manifest, or a set of random ones.

    generate.py                                   conformance/vectors and conformance/manifest.json
    generate.py --random 10000 --seed 1 --out DIR a manifest of random files, half of them damaged

What is expected of the committed vectors follows from how they are made. Of random damaged files the reference decoder
says what is expected, so that other programs can be compared with it.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "spec")]

import reference_decoder  # type: ignore[import-not-found, unused-ignore]  # noqa: E402

from vectors import (  # noqa: E402
    boundaries,
    gaps,
    invalid_files,
    invalid_groups,
    invalid_metadata,
    invalid_order,
    invalid_text,
    limits,
    parts,
    valid,
    valid_files,
)
from vectors.draft import Tensor, edits  # noqa: E402
from vectors.parts import Vector  # noqa: E402

SEED = 1
LONGEST_EDIT = 4096


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def short(found: list[list[Any]]) -> list[list[Any]]:
    """Replace long new bytes by their size and checksum: undoing needs no more."""
    for edit in found:
        if len(edit[2]) > 2 * LONGEST_EDIT:
            data = bytes.fromhex(edit[2])
            edit[2] = {"size": len(data), "sha256": sha256(data)}
    return found


def difference(old: dict[str, bytes], new: dict[str, bytes]) -> Any:
    """Return the edits that make one content of another."""
    if "" in old:
        return short(edits(old[""], new[""]))
    found: dict[str, Any] = {}
    for name in sorted({*old, *new}):
        if name not in old or name not in new:
            found[name] = {"old": sha256(old[name]) if name in old else None, "new": sha256(new[name]) if name in new else None}
        elif old[name] != new[name]:
            found[name] = short(edits(old[name], new[name]))
    return found


def describe(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: {"dtype": part.dtype, "shape": part.shape, "sha256": sha256(part.data)} for name, part in tensors.items()}


def write(vector: Vector, out: Path, known: dict[str, Vector]) -> dict[str, Any]:
    """Write the files of a vector and return its entry in the manifest."""
    kind, name = vector.id.split("/")
    entry: dict[str, Any] = {"id": vector.id, "class": kind}
    if "" in vector.content:
        data = gzip.compress(vector.content[""], 9, mtime=0) if vector.gzip else vector.content[""]
        path = out / "vectors" / kind / f"{name}.safetensors{'.gz' if vector.gzip else ''}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        digest = sha256(data)
    else:
        path = out / "vectors" / kind / name
        path.mkdir(parents=True)
        for file, data in vector.content.items():
            (path / file).write_bytes(data)
        digest = sha256("".join(f"{file} {sha256(data)}\n" for file, data in sorted(vector.content.items())).encode())
    entry |= {"file": str(path.relative_to(out)), "sha256": digest, "reqs": sorted(set(vector.reqs)), "note": vector.note}
    if vector.error is not None:
        entry["expect"] = {"error": vector.error}
    else:
        assert vector.tensors is not None
        described = describe(vector.tensors)
        text = json.dumps(described, sort_keys=True, separators=(",", ":"))
        entry["expect"] = {"tensors": described} if len(described) < 1000 else {"digest": sha256(text.encode())}
        if vector.deep is not None:
            entry["expect"]["deep"] = vector.deep
    if vector.base is not None:
        assert vector.before is not None
        entry["base"] = vector.base
        entry["patch"] = difference(known[vector.base].content, vector.before)
        entry["refresh"] = difference(vector.before, vector.content)
    if vector.encode:
        entry["encode"] = True
    if vector.gzip:
        entry["encoding"] = "gzip"
    if vector.seconds is not None:
        entry["seconds"] = vector.seconds
    if vector.size is not None:
        entry["size"] = vector.size
    if vector.sizes is not None:
        entry["sizes"] = vector.sizes
    if vector.links is not None:
        entry["links"] = vector.links
    return entry


def write_all(vectors: Iterator[Vector], out: Path) -> int:
    """Write vectors and manifest; return how many there are."""
    vectors = iter([*vectors])  # all of them are made before any is removed
    shutil.rmtree(out / "vectors", ignore_errors=True)
    known: dict[str, Vector] = {}
    entries = []
    for vector in vectors:
        assert vector.id not in known, vector.id
        known[vector.id] = vector
        entries.append(write(vector, out, known))
    lines = ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in entries)
    (out / "manifest.json").write_text(f'{{"schema":1,"format_version":"1.0","vectors":[\n{lines}\n]}}\n')
    return len(entries)


def committed() -> Iterator[Vector]:
    """Yield the vectors of the suite; new ones go to the end of their function, random numbers being drawn in order."""
    rng = random.Random(SEED)
    yield from parts.bases()
    yield from valid.systematic(rng)
    for fixed in (valid.shapes, valid.rows, valid.lengths, valid.levels):
        yield from fixed()
    for draw in (valid.dictionaries, valid_files.metadata, valid_files.headers):
        yield from draw(rng)
    yield from valid_files.at_random(rng, 30)
    for fixed in (
        valid_files.directories,
        valid_files.future,
        invalid_text.container,
        invalid_text.json_text,
        invalid_text.tensors,
        invalid_metadata.metadata,
        invalid_metadata.dictionaries,
        invalid_groups.rows,
        invalid_groups.groups,
        invalid_groups.levels,
        invalid_files.checksums,
        invalid_files.shards,
        invalid_files.noncanonical,
        invalid_files.limits,
        invalid_files.unused,
        invalid_order.rows,
        invalid_order.structure,
        invalid_order.directories,
        invalid_order.dictionaries,
        limits.dictionaries,
        limits.names,
        limits.indexes,
        gaps.reserved,
        gaps.features,
        gaps.order,
        gaps.directories,
        boundaries.json_text,
        boundaries.tensors,
        boundaries.metadata,
        boundaries.dictionaries,
        boundaries.lengths,
        boundaries.rows,
        boundaries.groups,
        boundaries.levels,
        boundaries.directories,
    ):
        yield from fixed()


# ---- Random files ----------------------------------------------------------------------------------------------------


def damage(rng: random.Random, vector: Vector) -> tuple[bytes, bytes]:
    """Change a random thing of a valid file; without and with the checksums made to fit."""
    assert vector.draft is not None
    draft = vector.draft.copy()
    kind = rng.choice(("tensor", "tensor", "tensor", "header", "metadata", "dictionary", "whole"))
    names = [name for name, tensor in draft.tensors.items() if tensor.data and name != "qmoecodec.header_crc32"]
    dictionaries = [name for name in names if name.startswith("qmoecodec.dictionary.")]
    if kind == "dictionary" and dictionaries:
        names, kind = dictionaries, "tensor"
    if kind == "tensor" and names:
        tensor = draft.tensors[rng.choice(names)]
        data = bytearray(tensor.data)
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        tensor.data = bytes(data)
    elif kind in ("header", "metadata"):
        at, new, how = rng.random(), rng.choice('{}[]",:\\0123456789-.eabcdefutnx \x00\x7f'), rng.random()

        def change(text: str) -> str:
            i = int(at * len(text))
            return text[:i] + ("" if how < 0.3 else new) + text[i + (how < 0.7) :]

        setattr(draft, "header_text" if kind == "header" else "metadata_text", change)
    else:
        at, bit = rng.random(), rng.randrange(8)

        def whole(file: bytes) -> bytes:
            i = int(at * len(file))
            if bit < 2:
                return file[:i]
            return file[:i] + bytes([file[i] ^ 1 << bit]) + file[i + 1 :]

        draft.whole = whole
    return draft.render(refresh=False), draft.render()


def at_random(count: int, seed: int) -> Iterator[Vector]:
    """Yield as many files, half of them damaged; the reference decoder says what is expected."""
    rng = random.Random(seed)
    for k, good in enumerate(valid_files.at_random(rng, -(-count // 2))):
        good.id = f"valid/random-{k}"
        yield good
        before, after = damage(rng, good)
        vector = Vector(
            f"invalid/random-{k}", "a random file, damaged", ["REQ-GEN-001"], {"": after}, base=good.id, before={"": before}
        )
        try:
            restored = reference_decoder.decode_files([reference_decoder.File(after)], deep=True)
            vector.tensors = {name: Tensor(*tensor) for name, tensor in restored.items()}
        except reference_decoder.RejectedError as error:
            vector.error = str(error)
            if vector.error == "not_canonical":
                restored = reference_decoder.decode_files([reference_decoder.File(after)], deep=False)
                vector.tensors = {name: Tensor(*tensor) for name, tensor in restored.items()}
                vector.error, vector.deep = None, "not_canonical"
        yield vector


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, metavar="N", help="write about N random files instead")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, default=ROOT / "conformance")
    options = parser.parse_args()
    if options.random is not None and options.out == ROOT / "conformance":
        parser.error("--random needs --out")
    options.out.mkdir(parents=True, exist_ok=True)
    vectors = committed() if options.random is None else at_random(options.random, options.seed)
    print(f"{write_all(vectors, options.out)} vectors")


if __name__ == "__main__":
    main()
