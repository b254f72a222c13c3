"""Faults that a program cannot catch: SIGKILL at any moment, a full disk, a read-only directory, a file that shrinks.

The old file stays, or the whole new one is there, or nothing; and the next run succeeds.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import qmoecodec
from qmoecodec.container.files import exchange

LEFT_BEHIND = re.compile(r"\.[^/]{1,100}\.[0-9a-f]{12}\.tmp")

# Answers each line `COMMAND TAB SOURCE TAB TARGET TAB STEP TAB MODE` by forking a child that runs the command; the child
# kills itself before its STEP-th system call that changes something, or runs on where STEP is 0. In the mode "renames" two
# directories cannot trade places. What Numba compiles is compiled before.
NURSERY = """
import os, signal, sys
import qmoecodec
from qmoecodec.container import files

def warm(folder):
    qmoecodec.pack(f"{folder}/source.safetensors", f"{folder}/warm.safetensors")
    qmoecodec.unpack(f"{folder}/warm.safetensors", f"{folder}/warm-dense.safetensors")

def deadly(module, name, step, count):
    real = getattr(module, name)
    def wrapped(*args, **kwargs):
        count[0] += 1
        if count[0] == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(module, name, wrapped)

warm(sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:
    command, source, target, step, mode = line.rstrip("\\n").split("\\t")
    pid = os.fork()
    if pid == 0:
        count = [0]
        for name in ("open", "pwrite", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir"):
            deadly(os, name, int(step), count)
        if mode == "renames":
            files.exchange = lambda one, other: False
        else:
            deadly(files, "exchange", int(step), count)
        status = 1
        try:
            getattr(qmoecodec, command)(source, target)
            status = 0
        finally:
            os._exit(status)
    print(pid, flush=True)
    _, status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


def make_source(path: pathlib.Path, n_experts: int = 4) -> None:
    rng = np.random.default_rng(0)
    digits = rng.choice(np.array([0, -1, 1], np.float32), p=[0.8, 0.1, 0.1], size=(n_experts, 64, 700))
    tensors = {f"experts.{i}.w": digits[i] for i in range(n_experts)}
    safetensors.numpy.save_file({**tensors, "t": rng.standard_normal(60_000)}, path)


def contents(path: pathlib.Path) -> dict[str, str] | None:
    """Return the digest of a file, or of the files of a directory; None where there is nothing."""
    if not path.exists():
        return None
    files = [path] if path.is_file() else sorted(file for file in path.iterdir())
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


class Nursery:
    """The process that forks children."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", NURSERY, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.line() == "ready"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def run(self, command: str, source: pathlib.Path, target: pathlib.Path, *, step: int = 0, after: float | None = None,
            mode: str = "exchange") -> int:  # fmt: skip
        """Run a command to its end, to its death at a step, or for some seconds; return its exit status."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\t{source}\t{target}\t{step}\t{mode}\n")
        self.process.stdin.flush()
        pid = int(self.line())
        if after is not None:
            time.sleep(after)
            # The parent reaps a child that has ended only after it has printed the number, so the number may be gone, but
            # is not given to another process that soon.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return int(self.line())

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    folder = tmp_path_factory.mktemp("nursery")
    make_source(folder / "source.safetensors")
    found = Nursery(folder)
    yield found
    found.close()


class Case:
    """One command with its source and target, and what the target is before and after."""

    def __init__(self, nursery: Nursery, folder: pathlib.Path, command: str, *, directory: bool) -> None:
        self.nursery, self.command = nursery, command
        self.source = folder / "in"
        dense = self.source if command == "pack" else folder / "dense"
        if directory:
            dense.mkdir()
            make_source(dense / "model.safetensors")
            (dense / "config.json").write_text("{}")
        else:
            make_source(dense)
        if command == "unpack":
            qmoecodec.pack(dense, self.source)
        self.folder = folder / "targets"
        self.folder.mkdir()
        self.target = self.folder / "out"
        start = time.monotonic()
        assert nursery.run(command, self.source, self.target) == 0
        self.seconds = time.monotonic() - start
        self.whole = contents(self.target)
        self.directory = directory

    def before(self, kind: str) -> dict[str, str] | None:
        """Put what is there before: nothing, or an old checkpoint."""
        for path in sorted(self.folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        if kind == "old" and self.directory:
            self.target.mkdir()
            (self.target / "model.safetensors").write_text("old")
        elif kind == "old":
            self.target.write_text("old")
        return contents(self.target)

    def check(self, old: dict[str, str] | None, *, again: bool = True, gap: bool = False) -> str:
        """Return what is there after a kill: old, whole, or absent; anything else is a failure.

        again : then run it again;  gap : what was there may be gone, if it is there under its temporary name
        """
        found = contents(self.target)
        rest = [path.name for path in self.folder.iterdir() if path != self.target]
        assert all(LEFT_BEHIND.fullmatch(name) for name in rest), rest
        assert len(rest) <= 2
        if found is None and old is not None:  # a directory's old name is gone before the new one has it
            assert gap
            assert any(contents(self.folder / name) == old for name in rest)
            state = "absent"
        else:
            assert found in (old, self.whole)
            state = "absent" if found is None else "old" if found == old else "whole"
        if again:
            assert self.nursery.run(self.command, self.source, self.target) == 0
            assert contents(self.target) == self.whole
        return state


def can_exchange(folder: pathlib.Path) -> bool:
    names = [folder / name for name in "ab"]
    for name in names:
        name.mkdir()
        (name / f"was {name.name}").touch()
    done = exchange(*names)
    assert [path.name for path in names[0].iterdir()] == [f"was {'b' if done else 'a'}"]
    for name in names:
        shutil.rmtree(name)
    return done


@pytest.mark.parametrize("kind", ["file", "directory", "directory by renames"])
@pytest.mark.parametrize("command", ["pack", "unpack"])
def test_killed_at_every_step(tmp_path: pathlib.Path, nursery: Nursery, command: str, kind: str) -> None:
    """SIGKILL before each system call that changes something."""
    directory, mode = kind != "file", "renames" if kind == "directory by renames" else "exchange"
    if kind == "directory" and not can_exchange(tmp_path):
        pytest.skip("names cannot trade places here")
    case = Case(nursery, tmp_path, command, directory=directory)
    states = []
    for step in range(1, 1000):
        old = case.before("old" if step % 2 or directory else "none")
        status = case.nursery.run(command, case.source, case.target, step=step, mode=mode)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        states.append(case.check(old, again=step % 3 == 0, gap=mode == "renames"))
    assert ("absent" in states) == (mode == "renames") or not directory
    assert len(states) >= 7 and states[0] == "old" and states[-1] == "whole", states
    assert command == "unpack" or qmoecodec.verify(case.target, deep=True).ok
    assert contents(case.target) == case.whole


@pytest.mark.parametrize("command", ["pack", "unpack"])
def test_killed_at_random_moments(tmp_path: pathlib.Path, nursery: Nursery, command: str) -> None:
    rng = random.Random(7)
    case = Case(nursery, tmp_path, command, directory=False)
    killed = 0
    for i in range(20):
        old = case.before(("none", "old")[i % 2])
        status = case.nursery.run(command, case.source, case.target, after=rng.uniform(0, case.seconds))
        assert status in (0, -signal.SIGKILL)
        killed += status != 0
        case.check(old)
    assert killed >= 5


def test_the_command_line_is_killed(tmp_path: pathlib.Path) -> None:
    """A whole process, from its start: before, while and after it writes."""
    rng = random.Random(3)
    source, target = tmp_path / "source.safetensors", tmp_path / "p.safetensors"
    make_source(source)
    command = [sys.executable, "-c", "from qmoecodec.cli import main; main()", "pack", str(source), "-o", str(target)]
    start = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    seconds = time.monotonic() - start
    whole = target.read_bytes()
    for _ in range(3):
        target.write_text("old")
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.3, 1.0) * seconds)
        process.kill()
        process.wait()
        assert target.read_bytes() in (b"old", whole)
    subprocess.run(command, check=True, capture_output=True)
    assert target.read_bytes() == whole


# ---- Disks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A disk of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a small disk is not permitted")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("command", ["pack", "unpack"])
@pytest.mark.parametrize("directory", [False, True], ids=["file", "directory"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk(tmp_path: pathlib.Path, disk: pathlib.Path, command: str, directory: bool, existing: bool) -> None:
    source = tmp_path / "in"
    dense = source if command == "pack" else tmp_path / "dense"
    if directory:
        dense.mkdir()
        make_source(dense / "model.safetensors")
    else:
        make_source(dense)
    if command == "unpack":
        qmoecodec.pack(dense, source)
    target = disk / "out"
    if existing and directory:
        target.mkdir()
        (target / "model.safetensors").write_text("old")
    elif existing:
        target.write_text("old")
    before, free = contents(target), os.statvfs(disk).f_bavail
    with pytest.raises(OSError, match="No space left"):
        getattr(qmoecodec, command)(source, target)
    assert contents(target) == before
    assert [path.name for path in disk.iterdir()] == (["out"] if existing else [])
    assert os.statvfs(disk).f_bavail == free


def test_a_limit_on_file_sizes(tmp_path: pathlib.Path) -> None:
    """What takes the place of a full disk where nothing can be mounted."""
    source, target = tmp_path / "in", tmp_path / "out"
    make_source(source)
    target.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    qmoecodec.pack(source, tmp_path / "first")  # what is compiled is stored before the limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            qmoecodec.pack(source, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert target.read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out", "first"}


@pytest.mark.parametrize("command", ["pack", "unpack"])
def test_a_read_only_disk(tmp_path: pathlib.Path, disk: pathlib.Path, command: str) -> None:
    source = tmp_path / "in"
    make_source(tmp_path / "dense")
    if command == "unpack":
        qmoecodec.pack(tmp_path / "dense", source)
    else:
        make_source(source)
    (disk / "out").write_text("old")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for name in ("out", "new"):
        with pytest.raises(OSError, match="Read-only file system"):
            getattr(qmoecodec, command)(source, disk / name)
    assert [path.name for path in disk.iterdir()] == ["out"]
    assert (disk / "out").read_text() == "old"


def test_a_directory_without_permission() -> None:
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as name:  # pytest's own is closed to other users
        folder = pathlib.Path(name)
        folder.chmod(0o755)
        make_source(folder / "in")
        (folder / "in").chmod(0o644)
        qmoecodec.pack(folder / "in", folder / "first")  # root loads what is loaded late
        closed = folder / "closed"
        closed.mkdir(mode=0o555)
        try:
            if user == 0:
                os.seteuid(65534)  # root may write everywhere
            with pytest.raises(PermissionError, match="closed"):
                qmoecodec.pack(folder / "in", closed / "out")
        finally:
            os.seteuid(user)
        assert list(closed.iterdir()) == []


def test_a_directory_that_is_a_file(tmp_path: pathlib.Path) -> None:
    make_source(tmp_path / "in")
    (tmp_path / "file").write_text("old")
    with pytest.raises(OSError, match="not a directory"):
        qmoecodec.pack(tmp_path / "in", tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "old"


# ---- Files that shrink -----------------------------------------------------------------------------------------------

TOUCHES: dict[str, Any] = {
    "decode": lambda file: [expert.decode() for name in file for expert in file[name]],
    "dense": lambda file: [expert.dense() for name in file for expert in file[name]],
    "levels": lambda file: [file[name].levels for name in file],
    "encoded": lambda file: [file[name].encoded() for name in file],
    "tensor": lambda file: [file.tensors[name] for name in file.tensors],
}


@pytest.mark.parametrize("touch", TOUCHES)
def test_a_file_shrinks_while_it_is_open(tmp_path: pathlib.Path, touch: str) -> None:
    """Each is an error, and none ends the process, wherever the new end is."""
    make_source(tmp_path / "in")
    path = tmp_path / "p.safetensors"
    qmoecodec.pack(tmp_path / "in", path)
    whole = path.read_bytes()
    for size in (0, 1, 8, 4096, 4097, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole)
        with qmoecodec.open(path) as file:
            os.truncate(path, size)
            with pytest.raises(qmoecodec.FormatError) as caught:
                TOUCHES[touch](file)
            assert caught.value.reason == "truncated"


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9])
def test_a_packed_file_shrinks_while_it_is_unpacked(tmp_path: pathlib.Path, part: float) -> None:
    make_source(tmp_path / "in")
    path, target = tmp_path / "p.safetensors", tmp_path / "out"
    qmoecodec.pack(tmp_path / "in", path)
    size = path.stat().st_size
    target.write_text("old")

    def shrink(stage: str, done: int, total: int) -> None:
        os.truncate(path, int(size * part))

    with pytest.raises(qmoecodec.FormatError) as caught:
        qmoecodec.unpack(path, target, progress=shrink)
    assert caught.value.reason in ("truncated", "tensor_size")
    assert target.read_text() == "old"
    assert {entry.name for entry in tmp_path.iterdir()} == {"in", "p.safetensors", "out"}
