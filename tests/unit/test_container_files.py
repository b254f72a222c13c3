"""Files in chunks, and files and directories that appear whole, each by itself."""

import ctypes
import errno
import os
import pathlib
import re
import tracemalloc

import pytest

from qmoecodec.container import files
from qmoecodec.container.files import (
    atomic_directory,
    atomic_file,
    copy_file,
    exchange,
    fsync_directory,
    new_file,
    read_at,
    read_chunks,
)
from qmoecodec.errors import FormatError

DATA = bytes(range(1, 24))


@pytest.fixture
def source(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "source").write_bytes(DATA)
    return tmp_path / "source"


def test_chunks_follow_each_other(source: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", 4)
    fd = os.open(source, os.O_RDONLY)
    try:
        for begin, n in ((0, 23), (3, 12), (5, 9), (7, 4), (2, 0)):
            chunks = [bytes(chunk) for chunk in read_chunks(fd, begin, n)]
            assert b"".join(chunks) == DATA[begin : begin + n]
            assert [len(chunk) for chunk in chunks] == [4] * (n // 4) + [n % 4] * (n % 4 > 0)
        with pytest.raises(FormatError) as caught:
            read_at(fd, 3, 21)
        assert (caught.value.reason, caught.value.where) == ("truncated", {"byte": 23})
    finally:
        os.close(fd)
    copy_file(source, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == DATA


def test_new_files_are_new_and_readable_by_all(tmp_path: pathlib.Path) -> None:
    mask = os.umask(0)
    try:
        with new_file(tmp_path / "a") as fd:
            os.write(fd, b"x")
    finally:
        os.umask(mask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666
    with pytest.raises(FileExistsError), new_file(tmp_path / "a"):
        pass
    assert (tmp_path / "a").read_bytes() == b"x"


def test_an_error_names_the_file_unless_it_names_one(tmp_path: pathlib.Path) -> None:
    for names in ((), (str(tmp_path / "other"),)):
        for make in (atomic_file, atomic_directory):
            with pytest.raises(OSError, match="full") as caught, make(tmp_path / "target", overwrite=False):
                raise OSError(errno.ENOSPC, "full", *names)
            assert caught.value.filename == (names[0] if names else str(tmp_path / "target"))
    assert os.listdir(tmp_path) == []


def test_the_first_error_is_the_one_that_is_seen(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    with pytest.raises(KeyError), atomic_directory(target, overwrite=False) as temporary:
        temporary.rmdir()
        raise KeyError("own")

    rename, calls = os.rename, []

    def fail_once(*names: str) -> None:
        calls.append(names)
        if len(calls) == 1:
            raise OSError(errno.EIO, "broken")
        rename(*names)

    monkeypatch.setattr(os, "rename", fail_once)
    with pytest.raises(OSError, match="broken"), atomic_directory(target, overwrite=False):
        pass
    assert os.listdir(tmp_path) == []


def test_a_link_to_a_directory_is_left_alone(tmp_path: pathlib.Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(FileExistsError, match="not a directory"), atomic_directory(tmp_path / "link", overwrite=True):
        pass
    assert (tmp_path / "link").is_symlink()


def test_a_temporary_name_shows_whose_it_is_however_long_that_is(tmp_path: pathlib.Path) -> None:
    cut = (("n" * 255, "n" * 100), ("n" * 100, "n" * 100), ("a.b", "a.b"), ("é" * 127, "é" * 50), ("né" * 85, "né" * 33 + "n"))
    for name, begin in cut:
        for make in (atomic_file, atomic_directory):
            with make(tmp_path / name, overwrite=False) as temporary:
                assert re.fullmatch(rf"\.{re.escape(begin)}\.[0-9a-f]{{12}}\.tmp", temporary.name)
                if make is atomic_file:
                    temporary.write_bytes(b"")
            assert os.listdir(tmp_path) == [name]
            (tmp_path / name).unlink() if make is atomic_file else (tmp_path / name).rmdir()


def test_only_a_directory_is_flushed_as_one(source: pathlib.Path) -> None:
    fsync_directory(source.parent)
    with pytest.raises(NotADirectoryError):
        fsync_directory(source)


def test_a_file_is_never_in_memory_as_a_whole(tmp_path: pathlib.Path) -> None:
    (tmp_path / "source").touch()
    os.truncate(tmp_path / "source", 40 << 20)
    tracemalloc.start()
    try:
        copy_file(tmp_path / "source", tmp_path / "copy")
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "copy").stat().st_size == 40 << 20
    assert most < 12 << 20


def can_exchange(folder: pathlib.Path) -> bool:
    """Say whether two directories can trade places here, by the system call itself."""
    names = [folder / f"trial {i}" for i in range(2)]
    for name in names:
        name.mkdir()
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    done = renameat2 is not None and renameat2(-100, bytes(names[0]), -100, bytes(names[1]), 2) == 0
    for name in names:
        name.rmdir()
    return done


def test_names_trade_places_where_the_system_can(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    can = can_exchange(tmp_path)
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / f"was {name}").touch()
    assert exchange(tmp_path / "a", tmp_path / "b") is can
    assert os.listdir(tmp_path / "a") == (["was b"] if can else ["was a"])
    assert os.listdir(tmp_path / "b") == (["was a"] if can else ["was b"])
    monkeypatch.chdir(tmp_path)
    assert exchange(pathlib.Path("a"), pathlib.Path("b")) is can
    assert os.listdir(tmp_path / "a") == ["was a"]
    assert exchange(tmp_path / "a", tmp_path / "gone") is False
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("system", ["this", "one without renameat2"])
def test_a_directory_is_replaced_in_one_step_where_names_trade_places(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    can = can_exchange(tmp_path) and system == "this"
    if system != "this":
        monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    target = tmp_path / "target"
    target.mkdir()
    (target / "model.safetensors").write_text("old")
    rename, gaps = os.rename, []

    def note(one: pathlib.Path, other: pathlib.Path) -> None:
        rename(one, other)
        gaps.append(not target.exists())

    monkeypatch.setattr(os, "rename", note)
    with atomic_directory(target, overwrite=True) as temporary:
        (temporary / "model.safetensors").write_text("new")
    assert gaps == ([] if can else [True, False])
    assert os.listdir(tmp_path) == ["target"]
    assert (target / "model.safetensors").read_text() == "new"
