"""The writer: whole files or nothing, whatever fails, and no memory of what was there before."""

import errno
import os
import pathlib
import stat
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from qmoecodec.container import files, pack, unpack, verify, writer
from qmoecodec.container.writer import Piece


def make_source(path: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {f"experts.{i}.w": np.sign(rng.standard_normal((20, 50))).astype(np.float32) for i in range(3)}
    safetensors.numpy.save_file({**tensors, "t": np.arange(10.0)}, path)


def fail_at(n: int, error: BaseException, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that raises on its n-th call."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == n:
            raise error
        return function(*args, **kwargs)

    return wrapped


ERRORS = [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), MemoryError()]
POINTS = [("pwrite", n) for n in range(1, 16)] + [("fsync", 1), ("replace", 1), ("preadv", 2), ("preadv", 6)]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize(("call", "n"), POINTS)
@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_leaves_no_trace(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, call: str, n: int, error: BaseException, existing: bool
) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "p.safetensors"
    make_source(source)
    if existing:
        target.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail_at(n, error, getattr(os, call)))
        with pytest.raises(type(error)):
            pack(source, target)
    assert {p.name for p in tmp_path.iterdir()} == {"a.safetensors"} | ({"p.safetensors"} if existing else set())
    assert not existing or target.read_text() == "old"
    pack(source, target)
    assert verify(target, deep=True).ok


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize(("call", "n"), [("pwrite", 3), ("pwrite", 12), ("fsync", 1), ("fsync", 3), ("rename", 1),
                                         ("rename", 2), ("rename", 3)])  # fmt: skip
def test_a_failure_leaves_an_old_directory(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, call: str, n: int, error: BaseException
) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    make_source(source / "model.safetensors")
    (source / "config.json").write_text("{}")
    target.mkdir()
    (target / "model.safetensors").write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail_at(n, error, getattr(os, call)))
        if call == "rename":  # where two directories cannot trade places
            patch.setattr(files, "exchange", lambda one, other: False)
        with pytest.raises(type(error)):
            pack(source, target)
    assert {p.name for p in tmp_path.iterdir()} == {"in", "out"}
    assert [p.name for p in target.iterdir()] == ["model.safetensors"]
    assert (target / "model.safetensors").read_text() == "old"
    pack(source, target)
    assert verify(target, deep=True).ok
    assert {p.name for p in tmp_path.iterdir()} == {"in", "out"}


def test_unpack_leaves_no_trace_either(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, packed = tmp_path / "a.safetensors", tmp_path / "p.safetensors"
    make_source(source)
    pack(source, packed)
    for n in range(1, 6):
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", fail_at(n, OSError(errno.ENOSPC, "full"), os.pwrite))
            with pytest.raises(OSError, match="full"):
                unpack(packed, tmp_path / "u.safetensors")
        assert {p.name for p in tmp_path.iterdir()} == {"a.safetensors", "p.safetensors"}


def test_short_writes_and_reads_are_continued(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may write or read less than it was asked to."""
    source = tmp_path / "a.safetensors"
    make_source(source)
    pack(source, tmp_path / "p.safetensors")
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, bytes(data[:100]), at))
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:100]], at))
    pack(source, tmp_path / "q.safetensors")
    unpack(tmp_path / "q.safetensors", tmp_path / "u.safetensors")
    assert (tmp_path / "q.safetensors").read_bytes() == (tmp_path / "p.safetensors").read_bytes()
    assert (tmp_path / "u.safetensors").read_bytes() == source.read_bytes()


def test_a_source_that_changes_while_it_is_packed(tmp_path: pathlib.Path) -> None:
    source = tmp_path / "a.safetensors"
    make_source(source)
    size = source.stat().st_size

    def shrink(stage: str, done: int, total: int) -> None:
        if done == total // 2:  # the first pass is over
            os.truncate(source, size - 4_000)

    with pytest.raises(ValueError, match="shorter"):
        pack(source, tmp_path / "p.safetensors", progress=shrink)
    make_source(source)

    def change(stage: str, done: int, total: int) -> None:
        if done == total // 2:
            with open(source, "r+b") as f:
                f.seek(-100, os.SEEK_END)
                f.write(np.float32([2, 3, 4, 5]).tobytes())

    with pytest.raises(ValueError, match="changed"):
        pack(source, tmp_path / "p.safetensors", progress=change)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_mode_of_new_files_follows_the_umask(tmp_path: pathlib.Path) -> None:
    source = tmp_path / "a.safetensors"
    make_source(source)
    old = os.umask(0o027)
    try:
        pack(source, tmp_path / "p.safetensors")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "p.safetensors").stat().st_mode) == 0o640


def test_long_names(tmp_path: pathlib.Path) -> None:
    source = tmp_path / "a.safetensors"
    make_source(source)
    for stem in ("x" * 243, "é" * 121):
        target = tmp_path / f"{stem}.safetensors"
        pack(source, target)
        assert verify(target).ok


def test_pieces_must_be_as_long_as_they_say(tmp_path: pathlib.Path) -> None:
    for chunks in ([b"abc"], [b"ab", b"abc"]):
        with pytest.raises(RuntimeError, match="bytes written"):
            writer.write_plain(tmp_path / "f", [Piece("t", "U8", (4,), lambda c=chunks: c)], None)  # type: ignore[misc]
        (tmp_path / "f").unlink()
    piece = Piece("t", "U8", (1,), lambda: [b"a"])
    with pytest.raises(ValueError, match="named 't'"):
        writer.write_plain(tmp_path / "f", [piece, piece], None)
    with pytest.raises(ValueError, match="already has the key"):
        writer.write_packed(
            tmp_path / "f", groups=[], roles=[], dictionaries=[], passthrough=[], metadata={"qmoecodec": ""}
        )
    assert not (tmp_path / "f").exists()


def test_files_are_flushed_before_they_are_renamed(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "a.safetensors"
    make_source(source)
    calls: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (calls.append(name), real(*a))[1])
    pack(source, tmp_path / "p.safetensors")
    assert calls == ["fsync", "replace", "fsync"]
