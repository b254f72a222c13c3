"""A dense checkpoint by itself: what is read from it, what is copied beside it, and what is refused."""

import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from qmoecodec.container.source import Source, check_apart, copy_other_files
from qmoecodec.errors import FormatError


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Two shards with the tensors a, b and c, d, and their index."""
    folder = tmp_path / "in"
    folder.mkdir()
    weight_map: dict[str, str] = {}
    for file, names, metadata in (("x.safetensors", "ab", {"k": "5", "m": "5"}), ("y.safetensors", "cd", {"k": "4", "m": "6"})):
        tensors = {name: np.arange(6, dtype=np.float32).reshape(2, 3) + ord(name) for name in names}
        safetensors.numpy.save_file(tensors, folder / file, metadata=metadata)
        weight_map |= dict.fromkeys(names, file)
    write_index(folder, weight_map)
    return folder


def write_index(folder: pathlib.Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_parts_of_tensors(folder: pathlib.Path) -> None:
    with Source(folder) as source:
        assert sorted(source.tensors) == ["a", "b", "c", "d"]
        assert source.n_file_bytes == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        tensor = source.tensors["d"]
        assert (tensor.dtype, tensor.shape, tensor.n_bytes) == ("F32", (2, 3), 24)
        assert source.read_bits(tensor, 3, (1, 3)).view(np.float32).tolist() == [[103, 104, 105]]
        assert b"".join(source.read_chunks(tensor)) == (np.arange(6, dtype=np.float32) + 100).tobytes()
        fds = {tensor.fd for tensor in source.tensors.values()}
        assert len(fds) == 2
    for fd in fds:
        with pytest.raises(OSError, match="descriptor"):
            os.fstat(fd)


def test_whether_a_file_comes_back_byte_for_byte(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    usual = (folder / "x.safetensors").read_bytes()
    n = int.from_bytes(usual[:8], "little")
    assert usual[8 : 8 + n].endswith(b" ")
    for change, expected in ((lambda h: h, True), (lambda h: h.replace(b'"k"', b'"K"'), True),
                             (lambda h: h.replace(b":", b" :"), False), (lambda h: b"{ " + h[1:].rstrip(), False),
                             (lambda h: h.rstrip() + 16 * b" ", False)):  # fmt: skip
        header = change(usual[8 : 8 + n])
        header += b" " * (-len(header) % 8)
        (tmp_path / "one.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + usual[8 + n :])
        with Source(tmp_path / "one.safetensors") as source:
            assert source.is_usual == expected
    with Source(folder) as source:  # two files, each of them usual
        assert not source.is_usual


def test_metadata_that_differs_is_noted_in_either_order(folder: pathlib.Path) -> None:
    with Source(folder) as source:
        assert source.metadata == {"k": "5", "m": "5"}
        assert sorted(note.split("'")[1] for note in source.notes) == ["k", "m"]


def test_an_index_that_names_the_wrong_files_is_noted(folder: pathlib.Path) -> None:
    write_index(folder, {"a": "y.safetensors", "b": "x.safetensors", "c": "x.safetensors", "d": "y.safetensors"})
    with Source(folder) as source:
        assert source.notes[-1] == "the index is wrong about the file of 2 tensors; each is taken from where it is"


def test_links_that_lead_in_a_circle(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (folder / "loop").symlink_to("loop")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"loop is (a loop of links|not a regular file)"):
        copy_other_files(folder, tmp_path / "out", ())
    if sys.version_info < (3, 13):
        with pytest.raises(ValueError, match="loop is a loop of links"):
            check_apart(folder, folder / "loop")


def test_the_first_tensor_on_which_index_and_shards_differ(folder: pathlib.Path, still_open: Callable[[], list[str]]) -> None:
    known = {"a": "x.safetensors", "b": "x.safetensors", "c": "y.safetensors", "d": "y.safetensors"}
    for change, name, what in ((lambda m: m.pop("c"), "c", "is not in the index"), (lambda m: m.update(bb="x.safetensors"), "bb",
                                "is in no file")):  # fmt: skip
        weight_map = dict(known)
        change(weight_map)
        write_index(folder, weight_map)
        with pytest.raises(FormatError) as caught:
            Source(folder)
        assert (caught.value.reason, caught.value.where) == ("shard_mismatch", {"tensor": name})
        assert caught.value.message == f"a tensor {what}"
        assert still_open() == []


def test_only_weight_files_of_the_directory_itself_are_left_out(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (folder / "sub" / "deep").mkdir(parents=True)
    (folder / "!sub").mkdir()  # a name before "."
    below = ["!sub/model.safetensors", "!sub/x.safetensors", "sub/model.safetensors", "sub/x.safetensors",
             "sub/deep/model.safetensors.index.json"]  # fmt: skip
    for name in (*below, "z.txt", "a.txt"):
        (folder / name).write_text(name)
    target = tmp_path / "out"
    target.mkdir()
    copied = copy_other_files(folder, target, (folder / "x.safetensors", folder / "y.safetensors"))
    assert copied == ["a.txt", "z.txt", *below]
    assert sorted(p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()) == sorted(copied)
    for name in copied:
        assert (target / name).read_text() == name


def test_what_is_not_copied(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def copy(match: str) -> None:
        target = tmp_path / match.replace(" ", "-")
        target.mkdir()
        with pytest.raises(ValueError, match=match):
            copy_other_files(folder, target, (folder / "x.safetensors", folder / "y.safetensors"))

    (folder / "model.safetensors").write_text("")
    copy("name of a weight file")
    (folder / "model.safetensors").unlink()
    (folder / "linked").symlink_to(tmp_path)
    copy("link to a directory")
    (folder / "linked").unlink()
    (tmp_path / "secret").write_text("s")
    (folder / "linked").symlink_to(tmp_path / "secret")
    copy("leaves the directory")
    (folder / "linked").unlink()
    os.mkfifo(folder / "pipe")
    copy("not a regular file")


def test_source_and_target_are_apart(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    file = folder / "x.safetensors"
    check_apart(folder, tmp_path / "out")
    check_apart(file, folder / "new.safetensors")
    check_apart(file, folder / "y.safetensors")
    (tmp_path / "link").symlink_to(folder)
    os.link(file, tmp_path / "hard")
    for source, target, match in (
        (folder, folder, "same"), (folder, tmp_path / "link", "same"), (file, tmp_path / "hard", "same"),
        (folder, folder / "sub" / "out", "target .* inside"), (folder, tmp_path / "link" / "out", "target .* inside"),
        (folder, tmp_path, "source .* inside"), (file, folder, "source .* inside"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            check_apart(source, target)
