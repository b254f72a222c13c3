"""A short run of each fuzz target with a seeded mutator; the long runs are `tools/fuzz/run.py` (docs/hardening.md)."""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from pathlib import Path

import pytest

import qmoecodec

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "tools"
if not (TOOLS / "fuzz").is_dir() or not (ROOT / "conformance" / "vectors").is_dir():
    pytest.skip("the fuzz targets or the vectors are not here", allow_module_level=True)
sys.path.append(str(TOOLS))

from fuzz import files, mutate, targets  # noqa: E402

NEEDS_C = {"file", "shards"}
N_MUTATIONS = 400
FEWER = {"roundtrip": 200}


@pytest.mark.parametrize("name", targets.TARGETS)
def test_mutations(name: str) -> None:
    if name in NEEDS_C and shutil.which("cc") is None:
        pytest.skip("no C compiler")
    target = targets.TARGETS[name]
    rng = random.Random(name)
    seeds = list(target.seeds())
    assert len(seeds) >= 30
    target.run(seeds[0])  # compiles and loads
    for _ in range(FEWER.get(name, N_MUTATIONS)):
        data = mutate.mutated(rng, rng.choice(seeds), seeds)[: target.longest]
        start = time.thread_time()
        target.run(data)
        assert time.thread_time() - start < 1.0


def test_seeds_are_whole_files() -> None:
    """What `split` takes apart `join` puts together, checksums that were right included."""
    again = [file for file in targets.seed_files() if files.join(files.split(file)) == file]
    assert len(again) > 0.6 * len(targets.seed_files())
    valid = sorted((ROOT / "conformance" / "vectors" / "valid").glob("base*.safetensors"))
    assert valid
    for path in valid:
        assert files.split(path.read_bytes())[0] == files.REFRESH
        assert files.join(files.split(path.read_bytes())) == path.read_bytes()


def test_checksums_are_made_to_fit(tmp_path: Path) -> None:
    """A changed level is found by the checksums; in a fuzz input it is another value."""
    path = ROOT / "conformance" / "vectors" / "valid" / "base-8.safetensors"
    outer, text, tensors = files.split(path.read_bytes()).split(b"\0", 2)
    [at] = [entry["data_offsets"][0] for name, entry in json.loads(outer[1:]).items() if name.endswith("_levels")]
    data = outer + b"\0" + text + b"\0" + tensors[:at] + bytes([tensors[at] ^ 1]) + tensors[at + 1 :]
    content = files.join(data)
    assert len(content) == path.stat().st_size and content != path.read_bytes()
    targets.run_file(data)
    (tmp_path / "changed.safetensors").write_bytes(content)
    assert qmoecodec.verify(tmp_path / "changed.safetensors").ok


def test_a_difference_is_a_finding() -> None:
    with pytest.raises(targets.Finding, match="a here, b there"):
        targets.same("x", "a", "b")
