"""Backends: the one asked for runs, or there is an error; and what they do with tokens."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import qmoe_switch  # noqa: E402
from qmoe_switch import BackendError  # noqa: E402
from qmoe_switch import backends as module  # noqa: E402
from qmoe_switch.backends import CpuBackend, CudaBackend, DenseBackend, by_expert, make_backend  # noqa: E402


class Stack:
    """Plain matrices, which note what was asked for."""

    def __init__(self, experts: int, rows: int, cols: int, seed: int) -> None:
        self.name, self.shape = "stack", (experts, rows, cols)
        self.matrices = torch.randn(experts, rows, cols, generator=torch.Generator().manual_seed(seed))
        self.read: list[int] = []

    @property
    def n_bytes(self) -> int:
        return self.matrices.nbytes

    def compressed(self) -> None:
        return None

    def packed(self, expert: int) -> None:
        return None

    def dense(self, expert: int) -> Any:
        self.read.append(expert)
        return self.matrices[expert]


def entry_point(target: str) -> importlib.metadata.EntryPoint:
    return importlib.metadata.EntryPoint(name="cuda", value=target, group=module.ENTRY_POINTS)


def install(monkeypatch: pytest.MonkeyPatch, *points: importlib.metadata.EntryPoint) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points if group == module.ENTRY_POINTS else ())


def test_tokens_are_grouped_by_expert_in_order() -> None:
    groups = [(e, places.tolist()) for e, places in by_expert(torch.tensor([3, -1, 0, 3, 0, -1, 3]))]
    assert groups == [(0, [2, 4]), (3, [0, 3, 6])]
    assert list(by_expert(torch.empty(0, dtype=torch.int64))) == []


@pytest.mark.parametrize("backend", [DenseBackend(), CpuBackend(threads=1), CpuBackend(threads=3)])
def test_layer_computes_what_it_says(backend: Any) -> None:
    wi, wo = Stack(4, 9, 5, 1), Stack(4, 5, 9, 2)
    states, expert = torch.randn(8, 5), torch.tensor([2, 0, -1, 2, 2, 2, 0, 2])
    out = backend.layer(wi, wo, torch.relu)(states, expert)
    for x, e, y in zip(states, expert.tolist(), out, strict=True):
        expected = torch.zeros(5) if e < 0 else wo.matrices[e] @ torch.relu(wi.matrices[e] @ x)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert set(wi.read) == set(wo.read) == {0, 2}
    assert backend.layer(wi, wo, torch.relu)(states[:0], expert[:0]).shape == (0, 5)


def test_dense_backend_keeps_no_more_than_its_cache() -> None:
    wi, wo = Stack(4, 9, 5, 1), Stack(4, 5, 9, 2)
    backend = DenseBackend(cache_bytes=4 * 45 * 4)
    layer = backend.layer(wi, wo, torch.relu)
    states = torch.randn(1, 5)
    for expert in (0, 0, 1, 0, 2):
        layer(states, torch.tensor([expert]))
    assert wi.read == [0, 1, 2]  # expert 1 was the least recently used when 2 came
    layer(states, torch.tensor([1]))
    assert wi.read == [0, 1, 2, 1]
    for expert in (1, 2, 1, 2, 2, 1):
        layer(states, torch.tensor([expert]))
    assert wi.read == [0, 1, 2, 1]
    assert sum(matrix.nbytes for matrix in backend._cache.values()) <= 4 * 45 * 4


def test_cuda_backend_that_is_not_installed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    with pytest.raises(BackendError, match="cuda is not installed: pip install"):
        make_backend("cuda", device=torch.device("cuda"))


def test_backend_that_cannot_be_loaded_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, entry_point("no_such_module:load"))
    with pytest.raises(BackendError, match="cuda cannot be loaded: No module named 'no_such_module'"):
        make_backend("cuda", device=torch.device("cuda"))
    install(monkeypatch, entry_point("builtins:no_such_function"))
    with pytest.raises(BackendError, match=r"cannot be loaded: .*no_such_function"):
        make_backend("cuda", device=torch.device("cuda"))


def test_backend_of_the_entry_point_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, entry_point("builtins:dict"))
    assert isinstance(make_backend("cuda", device=torch.device("cuda")), CudaBackend)


@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cuda_backend_is_asked_for_what_it_offers(
    make_checkpoint: Callable[..., Path], tokens_file: Path, tmp_path: Path, on_device: Callable[[], None], act: str, dtype: str
) -> None:
    """With a stand-in for the GPU's part: the same logits to bfloat16 rounding, drops included."""
    from qmoecodec.container import pack

    source = make_checkpoint(ternary=True, dense_act_fn=act, expert_capacity=2)
    pack(source, tmp_path / "packed")
    with qmoe_switch.load(source, capacity="per_sequence", dtype=dtype) as model:
        tokens = qmoe_switch.read_tokens(tokens_file, model.vocabulary, labels=True)
        expected = qmoe_switch.logits(model, tokens).float()
    on_device()
    with qmoe_switch.load(tmp_path / "packed", capacity="per_sequence", dtype=dtype) as model:
        got = qmoe_switch.logits(model, tokens).float()
    assert float((got - expected).norm() / expected.norm()) < 0.02
    if dtype == "float32":
        assert not torch.equal(got, expected)
    with pytest.raises(BackendError, match="are not all compressed in one group"):
        qmoe_switch.load(source)


@pytest.mark.parametrize(("name", "device"), [("cpu", "cuda"), ("cuda", "cpu"), ("other", "cpu")])
def test_backends_run_where_they_belong(name: str, device: str) -> None:
    with pytest.raises(BackendError, match=name):
        make_backend(name, device=torch.device(device))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_an_error(plain: Path) -> None:
    with pytest.raises(BackendError, match="the CPU is not used instead"):
        qmoe_switch.load(plain, device="cuda")
    with pytest.raises(BackendError, match="not a device"):
        qmoe_switch.load(plain, device="gpu0")
    with pytest.raises(BackendError, match="knows the devices cpu and cuda, not meta"):
        qmoe_switch.load(plain, device="meta")


def test_an_error_in_one_expert_ends_the_others() -> None:
    class Slow(Stack):
        running = 0

        def dense(self, expert: int) -> Any:
            if expert == 1:
                raise ValueError("expert 1 is damaged")
            Slow.running += 1
            time.sleep(0.02)
            Slow.running -= 1
            return super().dense(expert)

    layer = CpuBackend(threads=3).layer(Slow(6, 9, 5, 1), Stack(6, 5, 9, 2), torch.relu)
    with pytest.raises(ValueError, match="expert 1 is damaged"):
        layer(torch.randn(6, 5), torch.arange(6))
    assert Slow.running == 0


def test_a_stack_gives_what_is_uploaded(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Backends that upload whole stacks take the group of the file, or a part of it; a plain checkpoint has none."""
    from qmoe_switch.checkpoint import StackRange, open_checkpoint
    from qmoecodec import decode
    from qmoecodec.container import pack

    source = make_checkpoint(ternary=True, num_experts=5)
    pack(source, tmp_path / "packed")
    prefix = "encoder.block.1.layer.1.mlp.experts"
    plain, packed = open_checkpoint(source), open_checkpoint(tmp_path / "packed")
    dense = plain.experts(prefix, "wi", (5, 40, 24))
    assert dense.compressed() is None and dense.n_bytes == 5 * 40 * 24 * 2
    assert StackRange(dense, 1, 3).compressed() is None and StackRange(dense, 1, 3).n_bytes == 2 * 40 * 24 * 2
    assert torch.equal(StackRange(dense, 1, 3).dense(1), dense.dense(2))
    stack = packed.experts(prefix, "wi", (5, 40, 24))
    whole = stack.compressed()
    assert whole is not None and (whole.encoded.shape, whole.dtype) == ((5, 40, 24), "BF16")
    assert whole.encoded.codes.nbytes < stack.n_bytes < dense.n_bytes
    for first, end in ((0, 5), (0, 2), (2, 3), (3, 5)):
        some = StackRange(stack, first, end)
        part = some.compressed()
        assert part is not None and part.encoded.shape == some.shape == (end - first, 40, 24)
        assert (decode(part.encoded) == decode(whole.encoded)[first:end]).all()
        assert (part.levels == whole.levels[first:end]).all()
        one = some.packed(0)
        assert one is not None and torch.equal(torch.from_numpy(one.matrix()), some.dense(0).float())
    assert packed.experts(prefix, "wi", (4, 40, 24)).compressed() is None
    plain.close()
    packed.close()


def test_loading_touches_no_expert(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Groups and tensors are looked up, not read: no expert is touched by loading."""
    from qmoecodec.container import pack
    from qmoecodec.container.packed import GroupData

    pack(make_checkpoint(ternary=True, num_experts=30), tmp_path / "packed")
    asked: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        expert = GroupData.expert
        patch.setattr(GroupData, "expert", lambda self, e: asked.append(e) or expert(self, e))
        with qmoe_switch.load(tmp_path / "packed") as model:
            assert asked == []
            ids = torch.arange(2, 6)[None]
            model.module(input_ids=ids, decoder_input_ids=ids[:, :1])
            assert 0 < len(asked) <= 2 * (4 + 1)
