"""The same input gives the same file: in every process, with every hash seed, with any number of threads."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PACK = """
import hashlib, pathlib, sys
import qmoecodec
for threads in map(int, sys.argv[3:]):
    qmoecodec.pack(sys.argv[1], sys.argv[2], threads=threads)
    print(hashlib.sha256(pathlib.Path(sys.argv[2]).read_bytes()).hexdigest())
"""
#: SHA-256 of the packed twin: what another version of Python, numpy or Numba must give too.
TWIN_SHA256 = "555da595b8a6c05628c8cacd3f44d760f5d6e6519181965324de418db49d9e19"


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The ternary twin of the example model."""
    path = tmp_path_factory.mktemp("twin") / "twin.safetensors"
    if not (ROOT / "examples" / "ternary-gptq-2023.npz").exists():
        pytest.skip("the examples are not here")
    subprocess.run([sys.executable, str(ROOT / "examples" / "make_ternary.py"), str(path)], check=True)
    return path


@pytest.mark.parametrize(("seed", "threads"), [("0", (1, 7)), ("12345", (2,)), ("random", (3,))])
def test_the_same_file(twin: pathlib.Path, tmp_path: pathlib.Path, seed: str, threads: tuple[int, ...]) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    command = [sys.executable, "-c", PACK, str(twin), str(tmp_path / "p.safetensors"), *map(str, threads)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.split() == [TWIN_SHA256] * len(threads)
