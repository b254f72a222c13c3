"""Files that appear whole or not at all: temporary name beside the target, fsync, one rename."""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator
from typing import Final

from qmoecodec.errors import FormatError

CHUNK_BYTES: Final = 4 << 20
Chunk = bytes | bytearray | memoryview


def write_at(fd: int, data: Chunk, offset: int) -> int:
    """Write all of `data` at `offset` and return the offset after it."""
    view = memoryview(data).cast("B")
    while len(view):
        n = os.pwrite(fd, view, offset)
        view, offset = view[n:], offset + n
    return offset


def read_at(fd: int, begin: int, n_bytes: int) -> bytearray:
    """Read exactly `n_bytes`, which the caller has bounded by the file's size.

    Raises FormatError: truncated, where the file became shorter meanwhile.
    """
    data = bytearray(n_bytes)
    view = memoryview(data)
    while len(view):  # one call reads 2 GiB at most
        n = os.preadv(fd, [view], begin)
        if not n:
            raise FormatError("truncated", "the file became shorter while it was read", byte=begin)
        view, begin = view[n:], begin + n
    return data


def read_chunks(fd: int, begin: int, n_bytes: int) -> Iterator[bytearray]:
    """Yield a range of a file in chunks."""
    for at in range(0, n_bytes, CHUNK_BYTES):
        yield read_at(fd, begin + at, min(CHUNK_BYTES, n_bytes - at))


def fsync_directory(path: pathlib.Path) -> None:
    """Make a rename in the directory last."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _temporary_name(path: pathlib.Path) -> pathlib.Path:
    stem = path.name.encode(errors="replace")[:100].decode(errors="ignore")  # with the rest still a legal file name
    return path.with_name(f".{stem}.{secrets.token_hex(6)}.tmp")


def _name_file(error: BaseException, path: pathlib.Path) -> None:
    """Say which file could not be written: a full disk does not."""
    if isinstance(error, OSError) and error.filename is None:
        error.filename = os.fspath(path)


@contextlib.contextmanager
def new_file(path: pathlib.Path) -> Iterator[int]:
    """Create a file and yield its descriptor; flushed to the disk at the end."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        yield fd
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def atomic_file(path: pathlib.Path, *, overwrite: bool) -> Iterator[pathlib.Path]:
    """Yield a temporary name to create; it takes the place of `path` at the end, or leaves no trace on failure.

    A symbolic link is replaced, not what it points to.
    Raises FileExistsError where `path` exists and may not be overwritten, or is no regular file.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a directory")
    if path.is_dir():
        raise FileExistsError(f"{path} is a directory")
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{path} is a device, pipe or socket; it is left alone")
    if not overwrite and path.exists():
        raise FileExistsError(f"{path} exists")
    temporary = _temporary_name(path)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        _name_file(error, path)
        raise
    fsync_directory(path.parent)


def exchange(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Let two names trade places in one step; False where system or file system cannot (Linux can, on most)."""
    import ctypes

    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    here, flags = ctypes.c_int(-100), ctypes.c_uint(2)  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(one), here, os.fsencode(other), flags) == 0)


@contextlib.contextmanager
def atomic_directory(path: pathlib.Path, *, overwrite: bool) -> Iterator[pathlib.Path]:
    """Yield a temporary directory; it takes the place of `path` at the end, or leaves no trace on failure.

    Where the two cannot trade places (see `exchange`) the old directory is renamed first: a process that is killed between
    the two renames leaves nothing at `path`, and the old directory under its temporary name.
    Raises FileExistsError where `path` exists, unless it is an empty directory, or a checkpoint that may be overwritten.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a directory")
    if path.exists() or path.is_symlink():
        if path.is_symlink() or not path.is_dir():
            raise FileExistsError(f"{path} exists and is not a directory")
        names = os.listdir(path)
        is_checkpoint = "model.safetensors" in names or "model.safetensors.index.json" in names
        if names and not is_checkpoint:
            raise FileExistsError(f"{path} is not empty and holds no checkpoint; it is left alone")
        if names and not overwrite:
            raise FileExistsError(f"{path} exists")
    temporary = _temporary_name(path)
    temporary.mkdir()
    try:
        yield temporary
        for directory, _, _ in os.walk(temporary):
            fsync_directory(pathlib.Path(directory))
        if path.exists() and exchange(temporary, path):
            old = temporary
        else:
            old = _temporary_name(path)
            try:
                if path.exists():
                    os.rename(path, old)
                os.rename(temporary, path)
            except BaseException:
                if old.exists() and not path.exists():
                    os.rename(old, path)
                raise
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        _name_file(error, path)
        raise
    fsync_directory(path.parent)
    if old.exists():
        shutil.rmtree(old)


def copy_file(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copy a file's bytes (not its times or owner) and flush them to the disk."""
    fd = os.open(source, os.O_RDONLY)
    try:
        with new_file(target) as out:
            at = 0
            while chunk := os.pread(fd, CHUNK_BYTES, at):
                at = write_at(out, chunk, at)
    finally:
        os.close(fd)
