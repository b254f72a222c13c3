"""The committed vectors are what the manifest says, cover the specification, and each has the one fault it claims."""

from __future__ import annotations

import collections
import gzip
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped, unused-ignore]
import pytest

import qmoecodec

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "conformance"
MANIFEST = json.loads((FOLDER / "manifest.json").read_bytes())
VECTORS: list[dict[str, Any]] = MANIFEST["vectors"]
BY_ID = {vector["id"]: vector for vector in VECTORS}
SPEC = (ROOT / "spec" / "SPEC.md").read_text()
REQUIREMENTS = set(re.findall(r"\[(REQ-[A-Z]{3}-[0-9]{3})\]", SPEC))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def stored(vector: dict[str, Any]) -> dict[str, bytes]:
    """Return the content of a vector: of a single file under the name ''."""
    path = FOLDER / vector["file"]
    if path.is_dir():
        return {file.name: file.read_bytes() for file in path.iterdir()}
    data = path.read_bytes()
    return {"": gzip.decompress(data) if vector.get("encoding") == "gzip" else data}


def undo(data: bytes, edits: list[Any]) -> bytes:
    """Take edits back; their offsets count in the file before them."""
    shift = sum(size_of(new) - len(old) // 2 for _, old, new in edits)
    for offset, old, new in reversed(edits):
        shift -= size_of(new) - len(old) // 2
        begin = offset + shift
        part = data[begin : begin + size_of(new)]
        if isinstance(new, dict):
            assert sha256(part) == new["sha256"]
        else:
            assert part.hex() == new
        data = data[:begin] + bytes.fromhex(old) + data[begin + size_of(new) :]
    return data


def size_of(new: Any) -> int:
    return int(new["size"]) if isinstance(new, dict) else len(new) // 2


def undo_all(content: dict[str, bytes], patch: Any, base: dict[str, bytes]) -> dict[str, bytes]:
    if isinstance(patch, list):
        return {"": undo(content[""], patch)}
    restored = dict(content)
    for name, edits in patch.items():
        if isinstance(edits, list):
            restored[name] = undo(content[name], edits)
            continue
        assert (sha256(content[name]) if name in content else None) == edits["new"]
        restored.pop(name, None)
        if edits["old"] is not None:
            assert sha256(base[name]) == edits["old"]
            restored[name] = base[name]
    return restored


def test_there_are_enough_vectors() -> None:
    counts = collections.Counter(vector["class"] for vector in VECTORS)
    assert len(VECTORS) == len(BY_ID) >= 400
    assert counts["valid"] >= 150 and counts["invalid"] >= 220 and counts["future"] >= 15
    assert counts["noncanonical"] and counts["limit"]


def test_the_manifest_follows_its_schema() -> None:
    jsonschema.validate(MANIFEST, json.loads((FOLDER / "manifest.schema.json").read_bytes()))


def test_the_files_are_those_of_the_manifest() -> None:
    named = set()
    n_bytes = (FOLDER / "manifest.json").stat().st_size
    for vector in VECTORS:
        assert vector["id"].startswith(f"{vector['class']}/")
        path = FOLDER / vector["file"]
        if path.is_dir():
            files = sorted(path.iterdir())
            digest = sha256("".join(f"{file.name} {sha256(file.read_bytes())}\n" for file in files).encode())
            named |= set(files)
        else:
            digest = sha256(path.read_bytes())
            named.add(path)
        assert digest == vector["sha256"], vector["id"]
    assert named == {path for path in (FOLDER / "vectors").rglob("*") if path.is_file()}
    assert n_bytes + sum(path.stat().st_size for path in named) < 8 << 20


def test_every_requirement_has_a_vector_and_every_vector_a_requirement() -> None:
    assert len(REQUIREMENTS) > 80
    covered = {requirement for vector in VECTORS for requirement in vector["reqs"]}
    assert covered - REQUIREMENTS == set()
    assert REQUIREMENTS - covered == set()


def test_every_reason_has_two_vectors() -> None:
    found = collections.Counter(vector["expect"].get("error") or vector["expect"].get("deep") for vector in VECTORS)
    del found[None]
    assert found.keys() - qmoecodec.REASONS.keys() == set()
    assert [reason for reason in qmoecodec.REASONS if found[reason] < 2] == []


def test_the_reasons_are_those_of_the_specification() -> None:
    text = (ROOT / "spec" / "ERRORS.md").read_text()
    rows = dict(re.findall(r"^\| `([a-z0-9_]+)` \| (.*?) \|", text, flags=re.MULTILINE))
    assert rows == qmoecodec.REASONS
    in_spec = set(re.findall(r"`\{([a-z0-9_]+)\}`", SPEC))
    assert in_spec == qmoecodec.REASONS.keys()
    assert set(re.findall(r"REQ-[A-Z]{3}-[0-9]{3}", text)) <= REQUIREMENTS


def test_the_limits_have_vectors_on_both_sides() -> None:
    """What BOUNDARIES.md names is there, tests what it is said to test, and is told apart from what stands beyond."""
    requirement, n_rows = "", 0
    for line in (FOLDER / "BOUNDARIES.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) != 6 or not (cells[1].startswith("REQ-") or (requirement and not cells[1])):
            continue
        requirement, n_rows = cells[1] or requirement, n_rows + 1
        at, beyond = ([BY_ID[name] for name in re.findall(r"`([a-z]+/[^`]+)`", cell)] for cell in cells[3:5])
        assert requirement in {found for vector in at + beyond for found in vector["reqs"]}, line
        assert all(requirement in vector["reqs"] for vector in beyond), line
        outcomes = [{json.dumps(vector["expect"].get("error", vector["expect"].get("deep"))) for vector in side}
                    for side in (at, beyond)]  # fmt: skip
        assert outcomes[0].isdisjoint(outcomes[1]), line
    assert n_rows > 60


@pytest.mark.parametrize("kind", ["invalid", "future", "noncanonical", "limit"])
def test_undoing_the_patch_makes_it_valid(kind: str) -> None:
    """Undo refresh and patch: what is left is the base, a vector that is accepted."""
    chosen = [vector for vector in VECTORS if vector["class"] == kind and "base" in vector]
    assert chosen
    for vector in chosen:
        base = BY_ID[vector["base"]]
        assert base["class"] == "valid" and "tensors" in base["expect"], vector["id"]
        staged = vector.keys() & {"size", "sizes", "links"}
        assert vector["patch"] or staged or "CRC" in "".join(vector["reqs"]), vector["id"]
        before = undo_all(stored(vector), vector["refresh"], stored(base))
        assert undo_all(before, vector["patch"], stored(base)) == stored(base), vector["id"]


def test_what_is_rejected_has_a_base() -> None:
    for vector in VECTORS:
        rejected = "error" in vector["expect"] or "deep" in vector["expect"]
        assert rejected == ("base" in vector), vector["id"]


def test_the_runner_imports_nothing_of_this_project() -> None:
    source = (FOLDER / "run.py").read_text()
    modules = re.findall(r"^(?:import|from) ([a-z_]+)", source, flags=re.MULTILINE)
    assert modules and set(modules) <= sys.stdlib_module_names


def test_the_generator_writes_what_is_committed(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "tools" / "vectors" / "generate.py", "--out", tmp_path], check=True)
    made = json.loads((tmp_path / "manifest.json").read_bytes())["vectors"]
    assert [vector["id"] for vector in made] == [vector["id"] for vector in VECTORS]
    for new, old in zip(made, VECTORS, strict=True):
        if new.get("encoding") != "gzip":  # other versions of zlib compress otherwise
            assert new == old, new["id"]
        path = tmp_path / new["file"]
        if path.is_file() and new.get("encoding") == "gzip":
            assert gzip.decompress(path.read_bytes()) == stored(old)[""], new["id"]
