"""The names of experts and groups."""

import pathlib

import pytest
import safetensors
import safetensors.numpy
from dense_files import dense, ternary

from qmoecodec.container import pack, unpack
from qmoecodec.container.naming import find_candidates, name_groups, short_name, split_expert_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("encoder.block.1.layer.1.mlp.experts.expert_3.wi.weight", "encoder.block.1.layer.1.mlp.experts.expert_{}.wi.weight"),
        ("model.layers.0.block_sparse_moe.experts.7.w1.weight", "model.layers.0.block_sparse_moe.experts.{}.w1.weight"),
        ("experts.0", "experts.{}"),
        ("experts.4294967295.w", "experts.{}.w"),
        ("experts.4294967296.w", None),
        ("experts.03.w", None),
        ("experts.expert_00.w", None),
        ("experts.-1.w", None),
        ("experts.1a.w", None),
        ("experts.٣.w", None),
        ("myexperts.1.w", None),
        ("layers.3.weight", None),
        ("experts.{}.1.w", None),
        ("a{}.experts.1.w", None),
        ("experts.1.experts.2.w", "experts.1.experts.{}.w"),
    ],
)
def test_expert_names(name: str, expected: str | None) -> None:
    found = split_expert_name(name)
    assert (found[0] if found else None) == expected
    if found:
        assert found[0].replace("{}", str(found[1])) == name


def test_group_names_do_not_collide() -> None:
    shape = (8, 8)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = dict.fromkeys(
        ["a", "a.weight", "b.weight", "b_codes", "c_levels", "c", "experts.0.w.weight", "experts.w", ".weight"],
        ("F32", shape),
    )
    tensors["experts.1.w.weight"] = ("F32", (8, 9))
    tensors["experts.2.w.weight"] = ("F16", (8, 8))
    candidates, others = find_candidates(tensors)
    assert others == {}
    names = name_groups(candidates, tensors.keys())
    by_source = dict(zip(((c.source, c.dtype, c.shape) for c in candidates), names, strict=True))
    assert len(set(names)) == len(names) == 11
    assert by_source["a", "F32", shape] == "a"
    assert by_source["a.weight", "F32", shape] == "a.weight"
    assert by_source["b.weight", "F32", shape] == "b.weight"  # `b_codes` is a tensor
    assert by_source["c", "F32", shape] == "c_2"  # `c_levels` is one too
    assert by_source[".weight", "F32", shape] == ".weight"
    stacks = [n for (source, _, _), n in by_source.items() if source == "experts.{}.w.weight"]
    assert by_source["experts.w", "F32", shape] == "experts.w"
    assert stacks == ["experts.{}.w.weight", "experts.w_2", "experts.w_3"]
    assert short_name(candidates[0]) == ".weight"


def test_colliding_names_round_trip(tmp_path: pathlib.Path) -> None:
    tensors = {
        "a": ternary((30, 40), 1),
        "a.weight": ternary((30, 40), 2),
        "a_codes": dense((3, 3)),
        "a.weight_levels": dense((3,)),
        "experts.0.w": ternary((30, 40), 3),
        "experts.1.w": ternary((30, 41), 4),
        "experts.w": ternary((30, 40), 5),
        "experts.{}.w": ternary((30, 40), 6),
        "": ternary((30, 40), 7),  # safetensors allows it; the name of a group must not be empty
    }
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors")
    report = pack(tmp_path / "a.safetensors", tmp_path / "p.safetensors")
    assert len(report.groups) == 7
    unpack(tmp_path / "p.safetensors", tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
