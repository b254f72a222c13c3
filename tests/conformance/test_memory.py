"""No vector makes a decoder take more than 2 x (file + restored tensors) + 64 MiB.

The package is measured in a fork of a process that has decoded before: what the fork's resident memory grows by, at its
highest, from the moment of the fork. So neither the interpreter nor what is imported and compiled counts. The C decoder is
started for each vector, and all that its process takes counts.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "conformance"
VECTORS: list[dict[str, Any]] = json.loads((FOLDER / "manifest.json").read_bytes())["vectors"]

# Answers each line with a path and a directory by forking a child that decodes, deep; prints what the child took and said.
NURSERY = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import adapter

def resident(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(key))

for i, path in enumerate(sys.argv[3:]):
    adapter.decode(Path(path), Path(sys.argv[2]) / f"warm{i}", deep=True)
print("ready", flush=True)
for line in sys.stdin:
    path, out = line.rstrip("\\n").split("\\t")
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # from here on the highest is counted
            before = resident("VmRSS:")
            answer = adapter.decode(Path(path), Path(out), deep=True)
            print(json.dumps({"taken": resident("VmHWM:") - before, "answer": answer}), flush=True)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    if status:
        print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), flush=True)
"""

# Answers each line with a path and a directory by running the C decoder; prints its status and the most that it took. It is
# a small process: what it takes itself, some 10 MB, is the least that is counted.
LAUNCHER = """
import os, sys
for line in sys.stdin:
    path, out = line.rstrip("\\n").split("\\t")
    null = (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0)
    pid = os.posix_spawn(sys.argv[1], [sys.argv[1], "decode", path, "--out", out, "--deep"], os.environ, file_actions=[null])
    _, status, usage = os.wait4(pid, 0)
    print(os.waitstatus_to_exitcode(status), usage.ru_maxrss << 10, flush=True)
"""


def load_runner() -> Any:
    spec = importlib.util.spec_from_file_location("conformance_run", FOLDER / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


RUN = load_runner()


class Asked:
    """A process that answers a line with a line."""

    def __init__(self, *command: str) -> None:
        self.process = subprocess.Popen([sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def ask(self, path: Path, out: Path) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{path}\t{out}\n")
        self.process.stdin.flush()
        return self.line()

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs /proc")
    warm = [str(FOLDER / "vectors" / "valid" / f"{name}.safetensors") for name in ("base-8", "base-12", "base-16", "base-table")]
    warm.append(str(FOLDER / "vectors" / "invalid" / "found-bound-of-one-row.safetensors"))
    found = Asked("-c", NURSERY, str(FOLDER / "adapters" / "python"), str(tmp_path_factory.mktemp("warm")), *warm)
    assert found.line() == "ready\n"
    yield found
    found.close()


def staged(folder: Path) -> Iterator[tuple[dict[str, Any], Path, Path]]:
    """Yield each vector with its path and a directory to restore to."""
    for vector in VECTORS:
        scratch = folder / "scratch"
        scratch.mkdir()
        yield vector, RUN.stage(vector, FOLDER, scratch), scratch / "out"
        shutil.rmtree(scratch)


def most(path: Path, out: Path) -> int:
    """Return the bytes that a decoder may take for a vector."""
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    restored = sum(file.stat().st_size for file in out.glob("*.bin"))
    return int(2 * (sum(file.stat().st_size for file in files) + restored) + RUN.SPARE_BYTES)


def test_the_package(tmp_path: Path, nursery: Asked) -> None:
    too_much = {}
    for vector, path, out in staged(tmp_path):
        found = json.loads(nursery.ask(path, out))
        assert found["answer"].get("error") == (vector["expect"].get("deep") or vector["expect"].get("error")), vector["id"]
        if found["taken"] > most(path, out):
            too_much[vector["id"]] = found["taken"] >> 20
    assert too_much == {}


def test_what_is_taken_is_measured(tmp_path: Path, nursery: Asked) -> None:
    """A header of 20 MB is in memory as bytes and as a text."""
    vector = next(vector for vector in VECTORS if vector["id"] == "limit/header-20mb")
    taken = json.loads(nursery.ask(RUN.stage(vector, FOLDER, tmp_path), tmp_path / "out"))["taken"]
    assert vector["size"] < taken < 4 * vector["size"]


def test_the_c_decoder(tmp_path: Path) -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    built = tmp_path / "qmoe_decode"
    subprocess.run(["cc", "-std=c11", "-O2", str(FOLDER / "adapters" / "c" / "qmoe_decode.c"), "-o", str(built)], check=True)
    launcher = Asked("-S", "-c", LAUNCHER, str(built))
    too_much = {}
    for vector, path, out in staged(tmp_path):
        status, taken = map(int, launcher.ask(path, out).split())
        assert status == int("error" in vector["expect"] or "deep" in vector["expect"]), vector["id"]
        if taken > most(path, out):
            too_much[vector["id"]] = taken >> 20
    launcher.close()
    assert too_much == {}
