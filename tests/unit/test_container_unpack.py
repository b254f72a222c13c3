"""Unpacking: in blocks of any size, into parts of any size, and what its report says."""

import importlib
import json
import pathlib
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from qmoecodec.container import pack, unpack
from qmoecodec.container.writer import Piece

module: Any = importlib.import_module("qmoecodec.container.unpack")  # the name in the package is the function
RNG = np.random.default_rng(4)
TERNARY = np.where(RNG.random((3, 7, 30)) < 0.7, 0, np.where(RNG.random((3, 7, 30)) < 0.5, -0.5, 0.75)).astype(np.float32)
MODEL: dict[str, Any] = {
    **{f"l.experts.{i}.w": TERNARY[i] for i in range(3)}, "fused": TERNARY.astype(np.float16),
    "one": TERNARY[0].astype(np.float64),
    "bias": RNG.random(37), "none": np.zeros((0, 3), np.float32), "scalar": np.array(3, np.uint8),
}  # fmt: skip


@pytest.fixture
def packed(tmp_path: pathlib.Path) -> pathlib.Path:
    folder = tmp_path / "in"
    folder.mkdir()
    safetensors.numpy.save_file(MODEL, folder / "model.safetensors", metadata={"k": "v"})
    (folder / "config.json").write_text("{}")
    assert len(pack(folder, tmp_path / "packed").groups) == 3
    return tmp_path / "packed"


@pytest.mark.parametrize("block", [1, 8, 60, 61, 240, 241, 840, 1 << 20])
def test_blocks_of_any_size(packed: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", block)
    unpack(packed, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "in/model.safetensors").read_bytes()


def test_the_dense_expert_is_never_in_memory_as_a_whole(packed: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: Any) -> None:
    sizes = []
    decode = module.decode_expert

    def note(group: Any, expert: int, parts: Any, begin: int, end: int) -> Any:
        sizes.append((group.info.name, end - begin))
        return decode(group, expert, parts, begin, end)

    monkeypatch.setattr(module, "decode_expert", note)
    monkeypatch.setattr(module, "_BLOCK_BYTES", 30 * 4 * 2 + 1)
    unpack(packed, tmp_path / "out")
    rows = {name: [n for group, n in sizes if group == name] for name, _ in sizes}
    assert rows == {"l.experts.w": [2, 2, 2, 1] * 3, "fused": [4, 3] * 3, "one": [1] * 7}


def test_parts_are_as_large_as_they_may_be() -> None:
    def sizes(most: int, *pieces: int) -> list[list[int]]:
        made = [Piece(str(i), "U8", (n,), list) for i, n in enumerate(pieces)]
        return [[piece.n_bytes for piece in part] for part in module._split(made, most)]

    assert sizes(6, 3, 3, 4, 2, 1) == [[3, 3], [4, 2], [1]]
    assert sizes(5, 3, 3, 4, 1, 1) == [[3], [3], [4, 1], [1]]
    assert sizes(2, 3, 1, 1, 5) == [[3], [1, 1], [5]]
    assert sizes(9, 9, 0, 9) == [[9, 0], [9]]
    assert sizes(1) == [[]]


def test_what_the_report_says(packed: pathlib.Path, tmp_path: pathlib.Path) -> None:
    calls: list[tuple[str, int, int]] = []
    report = unpack(packed, tmp_path / "out", max_shard_size=1000, progress=lambda *call: calls.append(call))
    out = tmp_path / "out"
    weights = sorted(file.name for file in out.glob("*.safetensors"))
    assert report.files == (*weights, "model.safetensors.index.json", "config.json")
    assert len(weights) > 3
    assert report.n_packed_bytes == (packed / "model.safetensors").stat().st_size
    assert report.n_dense_bytes == sum((out / name).stat().st_size for name in weights)
    assert (report.n_tensors, report.notes) == (len(MODEL), ())
    total = sum(tensor.nbytes for tensor in MODEL.values())
    assert calls[-1] == ("decode", total, total)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": total}
    assert sorted(index["weight_map"]) == list(index["weight_map"]) == sorted(MODEL)
    single = unpack(packed, tmp_path / "u.safetensors")
    assert (single.files, single.n_tensors) == (("u.safetensors",), len(MODEL))
    assert single.n_dense_bytes == (tmp_path / "u.safetensors").stat().st_size
    for name in ("a.safetensorr", "a.txt", "a"):
        assert "config.json" in unpack(packed, tmp_path / name).files
    again = unpack(packed / "model.safetensors", tmp_path / "v")
    assert (tmp_path / "v").is_file() and again.files == ("v",)


def test_existing_targets(packed: pathlib.Path, tmp_path: pathlib.Path) -> None:
    target = tmp_path / "t.safetensors"
    target.write_bytes(b"old")
    with pytest.raises(FileExistsError):
        unpack(packed, target, overwrite=False)
    assert target.read_bytes() == b"old"
    unpack(packed, target)
    assert target.read_bytes() != b"old"
    unpack(packed, tmp_path / "out", overwrite=False)
    with pytest.raises(FileExistsError):
        unpack(packed, tmp_path / "out", overwrite=False)
    unpack(packed, tmp_path / "out")
