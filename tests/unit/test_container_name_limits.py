"""Names: of shards and what they may point to, of experts and groups at their longest."""

import json
import os
import pathlib

import pytest

from qmoecodec.container import shards
from qmoecodec.container.naming import (
    Candidate,
    find_candidates,
    name_groups,
    reason_not_a_candidate,
    short_name,
    split_expert_name,
)
from qmoecodec.container.packed import add_name
from qmoecodec.container.shards import check_member, find_shards, finish_shards, is_inside
from qmoecodec.errors import FormatError


def error_of(directory: pathlib.Path, name: str) -> FormatError:
    with pytest.raises(FormatError) as caught:
        check_member(directory, name)
    return caught.value


def test_errors_quote_the_beginning_of_a_long_name(tmp_path: pathlib.Path) -> None:
    (tmp_path / "in").mkdir()
    link, folder = "l" * 250, "d" * 250
    (tmp_path / "in" / link).symlink_to("../outside")
    (tmp_path / "outside").write_text("")
    (tmp_path / "in" / folder).mkdir()
    for name, reason, message in (
        ("/" * 300, "shard_path", "not a plain file name"), ("m" * 250, "shard_missing", "a shard is not there"),
        (link, "shard_path", "a symbolic link leaves the directory"), (folder, "shard_path", "not a regular file"),
    ):  # fmt: skip
        error = error_of(tmp_path / "in", name)
        assert (error.reason, error.message, error.where) == (reason, message, {"file": name[:200]})


def test_only_plain_names_are_names(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a").write_text("")
    assert check_member(tmp_path, "a") == tmp_path / "a"
    for name in ("", ".", "..", "a/", "./a", "a\\b", "a\0", "../a"):
        assert error_of(tmp_path, name).reason == "shard_path"
    (tmp_path / "loop").symlink_to("loop")
    assert error_of(tmp_path, "loop").reason == "shard_missing"
    (tmp_path / "x").symlink_to("a")
    assert check_member(tmp_path, "x") == tmp_path / "x"


def test_blobs_of_the_cache_that_a_snapshot_is_part_of(tmp_path: pathlib.Path) -> None:
    snapshot = tmp_path / "model" / "snapshots" / "1"
    blobs = tmp_path / "model" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    assert is_inside(snapshot, blobs / "b") and is_inside(snapshot, snapshot / "a")
    assert not is_inside(snapshot, tmp_path / "blobs" / "b")
    assert not is_inside(snapshot, tmp_path / "model" / "snapshots" / "2" / "a")
    assert not is_inside(blobs, snapshot / "a")
    for name in ("snapshotz", "snapshot", "a"):
        other = tmp_path / "model" / name / "1"
        other.mkdir(parents=True)
        assert not is_inside(other, blobs / "b")


def test_indexes_as_large_as_they_may_be(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"t": "a"}, "metadata": {"n": 1.5}}))
    monkeypatch.setattr(shards, "MAX_HEADER", index.stat().st_size)
    found = find_shards(tmp_path)
    assert (found.files, found.weight_map, found.metadata) == ((tmp_path / "a",), {"t": "a"}, {"n": 1.5})
    monkeypatch.setattr(shards, "MAX_HEADER", index.stat().st_size - 1)
    with pytest.raises(FormatError, match=f"larger than {index.stat().st_size - 1} bytes"):
        find_shards(tmp_path)


@pytest.mark.parametrize(
    ("text", "reason", "message"),
    [
        ('{"weight_map":[]}', "shard_index", "weight_map is not an object of strings"),
        ('{"weight_map":{"a":1}}', "shard_index", "weight_map is not an object of strings"),
        ("{}", "shard_index", "weight_map is not an object of strings"),
        ('{"weight_map":{},"metadata":1}', "shard_index", "metadata is not an object"),
        ('{"weight_map":{},"metadata":null}', "shard_index", "metadata is not an object"),
        ('{"weight_map":{}', "header_json", "expected ','"),
    ],
)
def test_indexes_that_are_none(tmp_path: pathlib.Path, text: str, reason: str, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(FormatError) as caught:
        find_shards(tmp_path)
    assert (caught.value.reason, caught.value.message) == (reason, message)
    assert caught.value.where["file"] == "model.safetensors.index.json"


def test_what_is_no_checkpoint(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_shards(tmp_path / "a")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="neither a file nor a directory"):
        find_shards(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError, match="holds neither"):
        find_shards(tmp_path, packed=False)
    with pytest.raises(FormatError) as caught:
        find_shards(tmp_path)
    assert (caught.value.reason, caught.value.where) == ("shard_missing", {"file": "model.safetensors"})
    (tmp_path / "model.safetensors").write_text("")
    assert find_shards(tmp_path, packed=False) == find_shards(tmp_path) == shards.Shards((tmp_path / "model.safetensors",))
    for name in ("b", "a"):
        (tmp_path / name).write_text("")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map":{"x":"b","y":"a","z":"b"}}')
    assert find_shards(tmp_path).files == (tmp_path / "b", tmp_path / "a")  # the index counts
    with pytest.raises(ValueError, match="holds both"):
        find_shards(tmp_path, packed=False)
    (tmp_path / "model.safetensors").unlink()
    assert find_shards(tmp_path, packed=False).files == (tmp_path / "a", tmp_path / "b")


def test_names_of_new_shards(tmp_path: pathlib.Path) -> None:
    parts = [tmp_path / f".part-{i}" for i in range(3)]
    for part in parts:
        part.write_text(part.name)
    names = finish_shards(tmp_path, parts, [["b"], ["é", "a"], []], {"k": [1], "total_size": 3}, 77)
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert names == [*files, "model.safetensors.index.json"] and sorted(os.listdir(tmp_path)) == sorted(names)
    assert [(tmp_path / file).read_text() for file in files] == [".part-0", ".part-1", ".part-2"]
    text = (tmp_path / "model.safetensors.index.json").read_text()
    weight_map = {"a": files[1], "b": files[0], "é": files[1]}
    index = {"metadata": {"k": [1], "total_size": 77}, "weight_map": weight_map}
    assert text == json.dumps(index, indent=2, ensure_ascii=False) + "\n"
    assert finish_shards(tmp_path, [tmp_path / files[0]], [["b"]], {}, 5) == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_text() == ".part-0"


# --- experts and groups


def test_the_longest_names() -> None:
    assert reason_not_a_candidate("é" * 2032, "F32", (2, 2)) is None
    assert reason_not_a_candidate("é" * 2032 + "x", "F32", (2, 2)) == "name too long"
    assert name_groups([Candidate("matrix", "x" * 4096, (), "F32", (1, 1))], ()) == ["x" * 4096]
    assert name_groups([Candidate("matrix", "x" * 4090 + ".weight", (), "F32", (1, 1))], ()) == ["x" * 4090]


@pytest.mark.parametrize(
    ("dtype", "shape", "reason"),
    [
        ("I8", (2, 2), "dtype I8"), ("F32", (2,), "rank 1"), ("F32", (2, 2, 2, 2), "rank 4"), ("BF16", (2, 2, 2), None),
        ("F32", (2, 0), "no elements"), ("F64", (1, 2**31 - 1), None), ("F16", (1, 2**31), "dimension out of range"),
    ],
)  # fmt: skip
def test_what_cannot_be_ternary(dtype: str, shape: tuple[int, ...], reason: str | None) -> None:
    assert reason_not_a_candidate("t", dtype, shape) == reason


def test_numbers_of_experts() -> None:
    assert split_expert_name("experts.0") == ("experts.{}", 0)
    assert split_expert_name("a.experts.4294967295.w") == ("a.experts.{}.w", 4294967295)
    for name in ("a.experts.4294967296.w", "a.experts.4294967297.w",
                 "a.experts.00.w", "a.experts.12345678901.w", "experts.1.{}", "{}.experts.1.w",
                 "xexperts.1.w", "a.experts.1w", "a.experts.1."):  # fmt: skip
        assert split_expert_name(name) is None


def test_candidates_and_their_order() -> None:
    tensors = {
        "m.experts.10.w": ("F32", (2, 3)), "m.experts.9.w": ("F32", (2, 3)), "m.experts.1.w": ("F16", (2, 3)),
        "m.experts.2.w": ("F32", (3, 3)), "z": ("F32", (2, 2, 2)), "experts.1": ("F32", (2, 2, 2)), "b": ("F32", (4, 4)),
        "i": ("I64", (4, 4)),
    }  # fmt: skip
    candidates, others = find_candidates(tensors)
    assert others == {"i": "dtype I64"}
    assert [(c.layout, c.source, c.members, c.dtype, c.shape) for c in candidates] == [
        ("matrix", "b", ((0, "b"),), "F32", (4, 4)),
        ("fused", "experts.1", ((0, "experts.1"),), "F32", (2, 2, 2)),
        ("stacked", "m.experts.{}.w", ((1, "m.experts.1.w"),), "F16", (2, 3)),
        ("stacked", "m.experts.{}.w", ((9, "m.experts.9.w"), (10, "m.experts.10.w")), "F32", (2, 3)),
        ("stacked", "m.experts.{}.w", ((2, "m.experts.2.w"),), "F32", (3, 3)),
        ("fused", "z", ((0, "z"),), "F32", (2, 2, 2)),
    ]
    assert name_groups(candidates, set(tensors)) == ["b", "experts.1", "m.experts.w", "m.experts.{}.w", "m.experts.w_2", "z"]
    assert name_groups(candidates[:1], {"b_codes"}) == ["b_2"]
    assert name_groups(candidates[:1], {"b_codes", "b_2_levels", "b_3_checksums"}) == ["b_4"]


def test_short_names() -> None:
    def short(source: str, layout: str = "stacked") -> str:
        return short_name(Candidate(layout, source, (), "F32", (1, 1)))

    assert short("experts.expert_{}.w.weight") == "experts.w"
    assert short("experts.{}") == "experts"
    assert short("a.weight", "matrix") == "a"
    assert short(".weight", "matrix") == ".weight"


def test_an_index_that_would_leave_out_a_file_is_not_written(tmp_path: pathlib.Path) -> None:
    parts = [tmp_path / name for name in "ab"]
    for part in parts:
        part.touch()
    with pytest.raises(ValueError, match="shorter"):
        finish_shards(tmp_path, parts, [["x"]], {}, 1)
    assert not (tmp_path / "model.safetensors.index.json").exists()


def test_a_name_of_any_length_is_remembered_by_128_bits() -> None:
    """Enough that nobody finds two names that are taken for one; a file need not pay for the names of its experts."""
    seen: set[bytes] = set()
    names = ["", "a", "A", "é", "n" * 4096, *(f"e.{i}.w" for i in range(1000))]
    assert [add_name(seen, name) for name in names] == [True] * len(names)
    assert [add_name(seen, name) for name in names] == [False] * len(names)
    assert {len(digest) for digest in seen} == {16}
