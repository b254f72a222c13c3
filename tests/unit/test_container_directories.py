"""Checkpoint directories: shards, indexes, links, what is there already."""

import json
import os
import pathlib
import shutil

import pytest
import safetensors
import safetensors.numpy
from dense_files import MODEL, check_official, check_same, dense, read_checkpoint, read_raw, ternary, write_checkpoint

from qmoecodec.container import open as open_packed
from qmoecodec.container import pack, unpack, verify
from qmoecodec.errors import FormatError


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("max_shard_size", [5_000_000_000, 2_500])
def test_directories(tmp_path: pathlib.Path, shards: int, max_shard_size: int) -> None:
    source = write_checkpoint(tmp_path / "in", shards)
    report = pack(source, tmp_path / "packed", max_shard_size=max_shard_size)
    packed = tmp_path / "packed"
    files = {p.relative_to(packed).as_posix() for p in packed.rglob("*") if p.is_file()}
    assert set(report.files) == files
    assert {"config.json", "sub/tokenizer.model"} <= files
    weights = sorted(packed.glob("*.safetensors"))
    assert len(weights) == 1 if max_shard_size > 10_000 else len(weights) > 2
    assert sum(w.stat().st_size for w in weights) == report.n_packed_bytes
    for file in weights:
        check_official(file)
        assert len(weights) == 1 or verify(file, deep=True).ok
    assert verify(packed, deep=True).problems == ()
    assert len(report.groups) == 5
    with open_packed(packed) as f:
        assert f["encoder.mlp.experts.wi"].shape == (3, 24, 40)
        assert (f.tensors["norm.weight"] == 1).all()
        assert len(f.groups) == 5
        assert len(f.tensors) == 6
    again = unpack(packed, tmp_path / "out", max_shard_size=max_shard_size)
    check_same(read_checkpoint(tmp_path / "out"))
    assert (tmp_path / "out/sub/tokenizer.model").read_bytes() == b"\0\1"
    if max_shard_size < 10_000:
        index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == MODEL.keys()
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in MODEL.values())
        if shards > 1:
            assert index["metadata"]["total_parameters"] == 2.5
        for file_name in set(index["weight_map"].values()):
            with safetensors.safe_open(tmp_path / "out" / file_name, "np") as g:
                assert g.metadata() == {"format": "pt"}
    assert again.n_tensors == len(MODEL)


def test_a_sharded_directory_into_one_file_and_back(tmp_path: pathlib.Path) -> None:
    source = write_checkpoint(tmp_path / "in", 3)
    report = pack(source, tmp_path / "p.safetensors")
    assert report.files == ("p.safetensors",)
    pack(source, tmp_path / "packed", max_shard_size=2_500)
    unpack(tmp_path / "packed", tmp_path / "u.safetensors")
    unpack(tmp_path / "p.safetensors", tmp_path / "v.safetensors")
    check_same(safetensors.numpy.load_file(tmp_path / "u.safetensors"))
    assert (tmp_path / "u.safetensors").read_bytes() == (tmp_path / "v.safetensors").read_bytes()


def test_existing_outputs(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    target = tmp_path / "p.safetensors"
    target.write_text("old")
    with pytest.raises(FileExistsError):
        pack(model, target, overwrite=False)
    assert target.read_text() == "old"
    pack(model, target)
    assert verify(target).ok
    source = write_checkpoint(tmp_path / "in", 1)
    other = tmp_path / "documents"
    other.mkdir()
    (other / "letter").write_text("dear")
    with pytest.raises(FileExistsError, match="left alone"):
        pack(source, other)
    assert (other / "letter").read_text() == "dear"
    (tmp_path / "new").mkdir()
    pack(source, tmp_path / "new", max_shard_size=2_500)
    with pytest.raises(FileExistsError):
        pack(source, tmp_path / "new", overwrite=False)
    pack(source, tmp_path / "new")  # the shards of before are gone
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"config.json", "model.safetensors", "sub"}
    with pytest.raises(FileExistsError, match="directory"):
        pack(model, tmp_path / "new")
    with pytest.raises(FileNotFoundError):
        pack(model, tmp_path / "nowhere/p.safetensors")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def index_with(folder: pathlib.Path, **changes: object) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].update(changes)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("what", ["source", "packed"])
@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("/etc/hostname", "shard_path"),
        ("../in/model-00001-of-00003.safetensors", "shard_path"),
        ("..", "shard_path"),
        ("", "shard_path"),
        ("a\\b", "shard_path"),
        ("a\0b", "shard_path"),
        ("gone.safetensors", "shard_missing"),
        ("link.safetensors", "shard_path"),
        ("loop.safetensors", "shard_missing"),
        ("sub", "shard_path"),
        (3, "shard_index"),
    ],
)
def test_bad_names_in_an_index(tmp_path: pathlib.Path, file: object, reason: str, what: str) -> None:
    folder = write_checkpoint(tmp_path / "in", 3)
    if what == "packed":
        pack(folder, tmp_path / "packed", max_shard_size=2_500)
        folder = tmp_path / "packed"
    shutil.copy(next(folder.glob("*.safetensors")), tmp_path / "outside.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    index_with(folder, steps=file)
    with pytest.raises(FormatError) as caught:
        if what == "packed":
            open_packed(folder)
        else:
            pack(folder, tmp_path / "out")
    assert caught.value.reason == reason
    assert not (tmp_path / "out").exists()


def test_a_packed_directory_with_and_without_an_index(tmp_path: pathlib.Path) -> None:
    pack(write_checkpoint(tmp_path / "in", 3), tmp_path / "packed", max_shard_size=2_500)
    folder = tmp_path / "packed"
    (folder / "model.safetensors").write_bytes(b"not named by the index, so ignored")
    with open_packed(folder) as f:
        assert [file.path.name for file in f.files] == list(dict.fromkeys((f.shards.weight_map or {}).values()))
    unpack(folder, tmp_path / "out.safetensors")
    index = folder / "model.safetensors.index.json"
    kept = index.read_bytes()
    os.truncate(index, 100_000_001)

    def reason() -> str:
        with pytest.raises(FormatError) as caught:
            open_packed(folder)
        return caught.value.reason

    assert reason() == "shard_index"
    index.write_bytes(kept)
    assert verify(folder).ok
    index.unlink()
    assert reason() == "header_size"
    (folder / "model.safetensors").unlink()
    assert reason() == "shard_missing"
    assert [p.reason for p in verify(folder).problems] == ["shard_missing"]


@pytest.mark.parametrize("what", ["source", "packed"])
def test_index_and_shards_must_agree(tmp_path: pathlib.Path, what: str) -> None:
    folder = write_checkpoint(tmp_path / "in", 3)
    if what == "packed":
        pack(folder, tmp_path / "packed", max_shard_size=2_500)
        folder = tmp_path / "packed"
    index = folder / "model.safetensors.index.json"
    good = index.read_text()

    def reason() -> str:
        with pytest.raises(FormatError) as caught:
            open_packed(folder) if what == "packed" else pack(folder, tmp_path / "out")
        return caught.value.reason

    index_with(folder, unknown=json.loads(good)["weight_map"]["steps"])
    assert reason() == "shard_mismatch"
    value = json.loads(good)
    del value["weight_map"]["steps"]
    index.write_text(json.dumps(value))
    assert reason() == "shard_mismatch"
    index.write_text("[]")
    assert reason() == "header_json"
    index.write_text("{}")
    assert reason() == "shard_index"
    index.write_text('{"weight_map":{},"metadata":1}')
    assert reason() == "shard_index"
    index.write_text('{"weight_map":{"a":"b","a":"b"}}')
    assert reason() == "duplicate_key"
    index.write_text('{"weight_map":{"a":1.5}}')
    assert reason() == "json_number"


def test_an_index_that_is_a_pipe(tmp_path: pathlib.Path) -> None:
    """It is neither read, which would wait for a writer, nor taken for an index that is not there."""
    pack(write_checkpoint(tmp_path / "in", 1), tmp_path / "packed")
    os.mkfifo(tmp_path / "packed" / "model.safetensors.index.json")
    assert [problem.reason for problem in verify(tmp_path / "packed").problems] == ["shard_path"]


def test_numbers_of_an_index_are_written_again(tmp_path: pathlib.Path) -> None:
    """Whatever they are, the index is JSON: integers as they were, others as the nearest number that a double holds."""
    folder = write_checkpoint(tmp_path / "in", 3)
    index = folder / "model.safetensors.index.json"
    numbers = '"a": 123456789012345678901234567890, "b": [1e999, -1E+999, 0.5], "c": -7, "d": -0.0, "e": ' + "9" * 1001
    index.write_text(index.read_text().replace('"total_parameters": 2.5', numbers))
    pack(folder, tmp_path / "packed", max_shard_size=2_500)
    unpack(tmp_path / "packed", tmp_path / "out", max_shard_size=2_500)
    for written in (tmp_path / "packed", tmp_path / "out"):
        assert verify(tmp_path / "packed").ok
        metadata = json.loads((written / index.name).read_text(), parse_constant=pytest.fail)["metadata"]
        largest = 1.7976931348623157e308
        assert metadata["a"] == 123456789012345678901234567890
        assert (metadata["b"], metadata["c"], metadata["e"]) == ([largest, -largest, 0.5], -7, largest)
        assert str(metadata["d"]) == "-0.0"


def test_two_shards_with_the_same_tensor(tmp_path: pathlib.Path) -> None:
    folder = write_checkpoint(tmp_path / "in", 3)
    safetensors.numpy.save_file({"steps": MODEL["steps"]}, folder / "more.safetensors")
    index_with(folder, more="more.safetensors")
    with pytest.raises(FormatError) as caught:
        pack(folder, tmp_path / "out")
    assert caught.value.reason == "source_conflict"


def test_two_packed_shards_that_stand_for_the_same_source(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "packed"
    folder.mkdir()
    safetensors.numpy.save_file({"x.weight": ternary((30, 40))}, tmp_path / "a.safetensors")
    safetensors.numpy.save_file({"x.weight": dense((30, 40))}, tmp_path / "b.safetensors")
    weight_map = {}
    for name in "ab":
        pack(tmp_path / f"{name}.safetensors", folder / f"{name}.safetensors")
        names = [n for n in read_raw(folder / f"{name}.safetensors") if not n.startswith("qmoecodec.")]
        weight_map |= dict.fromkeys(names, f"{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(FormatError) as caught:
        open_packed(folder)
    assert caught.value.reason == "source_conflict"


def test_a_hugging_face_cache(tmp_path: pathlib.Path) -> None:
    """Its snapshots are links into `blobs` beside them."""
    home = tmp_path / "models--x"
    (home / "blobs").mkdir(parents=True)
    (home / "snapshots").mkdir()
    plain = write_checkpoint(tmp_path / "in", 1)
    snapshot = home / "snapshots/0123"
    snapshot.mkdir()
    for i, name in enumerate(["config.json", "model.safetensors"]):
        shutil.move(plain / name, home / f"blobs/{i}")
        (snapshot / name).symlink_to(f"../../blobs/{i}")
    pack(snapshot, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "out")
    check_same(read_checkpoint(tmp_path / "out"))
    assert not (tmp_path / "packed/config.json").is_symlink()
    (snapshot / "vocab").symlink_to(tmp_path / "in/sub/tokenizer.model")
    with pytest.raises(ValueError, match="leaves the directory"):
        pack(snapshot, tmp_path / "packed2")
    assert not (tmp_path / "packed2").exists()


def test_metadata_that_differs_between_shards_is_reported(tmp_path: pathlib.Path) -> None:
    folder = write_checkpoint(tmp_path / "in", 3)
    file = folder / "model-00002-of-00003.safetensors"
    tensors = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file(tensors, file, metadata={"format": "np", "more": "1"})
    report = pack(folder, tmp_path / "p.safetensors")
    assert len(report.notes) == 2
    assert "'format'" in report.notes[0] and "in 3 files" in report.notes[1]
    with open_packed(tmp_path / "p.safetensors") as f:
        assert f.merged_metadata() == ({"format": "pt", "more": "1"}, [])
