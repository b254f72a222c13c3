"""Several devices: who holds what, that states follow, and that results do not depend on it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import qmoe_switch  # noqa: E402
from qmoe_switch import BackendError, SwitchError  # noqa: E402
from qmoe_switch.placement import Moves, SplitLayer, parse_devices, place, share  # noqa: E402
from qmoecodec.container import pack  # noqa: E402

A, B, C = (torch.device("cuda", i) for i in range(3))
DEEP: dict[str, Any] = {
    "num_layers": 4, "num_sparse_encoder_layers": 2, "num_decoder_layers": 3, "num_sparse_decoder_layers": 3,
    "num_experts": 5,
}  # fmt: skip


def test_runs_are_as_light_as_can_be(rng: np.random.Generator) -> None:
    for _ in range(200):
        weights = rng.integers(0, 20, rng.integers(1, 9)).tolist()
        n = int(rng.integers(1, len(weights) + 1))
        runs = share(weights, n)
        assert sorted(set(runs)) == list(range(n)) and runs == sorted(runs)
        heaviest = max(sum(w for w, run in zip(weights, runs, strict=True) if run == r) for r in range(n))
        cuts = ([0, *cut, len(weights)] for cut in itertools.combinations(range(1, len(weights)), n - 1))
        assert heaviest == min(max(sum(weights[a:b]) for a, b in itertools.pairwise(cut)) for cut in cuts)


def test_light_runs_are_balanced_beside_a_heavy_one() -> None:
    assert share([10, 1, 1, 1, 1], 3) == [0, 1, 1, 2, 2]


def test_dense_blocks_go_with_the_sparse_block_behind_them() -> None:
    blocks = [f"encoder.block.{i}" for i in range(4)] + [f"decoder.block.{i}" for i in range(4)]
    n_bytes = {"encoder.block.1": 5, "encoder.block.3": 5, "decoder.block.1": 4, "decoder.block.2": 7}
    assert list(place(blocks, n_bytes, (A, B)).values()) == [A, A, A, A, B, B, B, B]
    assert list(place(blocks, n_bytes, (A, B, C)).values()) == [A, A, B, B, B, B, C, C]
    assert list(place(blocks, {}, (B,)).values()) == [B] * 8
    with pytest.raises(SwitchError, match="4 sparse layers cannot be spread over 5 devices"):
        place(blocks, n_bytes, (A, B, C, A, B))


def test_devices_are_read() -> None:
    cpu = torch.device("cpu")
    assert parse_devices("cpu") == (cpu,)
    assert parse_devices("cpu, cpu") == (cpu, cpu)
    with pytest.raises(BackendError, match="'' is not a device"):
        parse_devices("cpu,")
    with pytest.raises(BackendError, match="knows the devices cpu and cuda, not meta"):
        parse_devices("cpu,meta")


@pytest.mark.parametrize("split", ["layers", "experts"])
@pytest.mark.parametrize("is_packed", [False, True])
def test_results_do_not_depend_on_the_devices(
    make_checkpoint: Callable[..., Path], tokens_file: Path, tmp_path: Path, split: Any, is_packed: bool
) -> None:
    path = make_checkpoint(ternary=True, expert_capacity=3, **DEEP)
    if is_packed:
        pack(path, tmp_path / "packed")
        path = tmp_path / "packed"
    with (
        qmoe_switch.load(path, capacity="per_sequence") as one,
        qmoe_switch.load(path, capacity="per_sequence", device="cpu,cpu,cpu", split=split) as three,
    ):
        assert len(three.devices) == 3 and len(three.placement) == 7
        tokens = qmoe_switch.read_tokens(tokens_file, one.vocabulary, labels=True)
        # The CPU backend chooses how to multiply from the tokens of an expert, which are the same however it is split.
        torch.testing.assert_close(qmoe_switch.logits(three, tokens), qmoe_switch.logits(one, tokens), rtol=0, atol=0)
        ours, theirs = (qmoe_switch.generate(model, tokens, max_new_tokens=9).tokens for model in (three, one))
        assert [row.tolist() for row in ours] == [row.tolist() for row in theirs]
        with pytest.raises(BackendError, match="cannot be captured in a CUDA graph: it runs on several devices"):
            qmoe_switch.generate(three, tokens, graph=True)


def test_uploaded_ranges_of_experts_give_what_all_give(
    make_checkpoint: Callable[..., Path], tokens_file: Path, tmp_path: Path, on_device: Callable[[], None]
) -> None:
    pack(make_checkpoint(ternary=True, **DEEP), tmp_path / "packed")
    on_device()
    path = tmp_path / "packed"
    with qmoe_switch.load(path) as one, qmoe_switch.load(path, device="cpu,cpu", split="experts") as two:
        tokens = qmoe_switch.read_tokens(tokens_file, one.vocabulary, labels=True)
        torch.testing.assert_close(qmoe_switch.logits(two, tokens), qmoe_switch.logits(one, tokens), rtol=0, atol=0)


def test_every_range_gets_its_own_experts() -> None:
    asked: list[tuple[str, list[int]]] = []

    def layer(name: str, factor: float) -> Any:
        def run(states: Any, expert: Any) -> Any:
            asked.append((name, expert.tolist()))
            return torch.where(expert[:, None] < 0, 0.0, factor * (1 + expert[:, None]) * states)

        return run

    cpu = torch.device("cpu")
    both = SplitLayer([(0, 2, cpu, layer("low", 1.0)), (2, 5, cpu, layer("high", 10.0))])
    out = both(torch.ones(5, 2), torch.tensor([4, 0, -1, 1, 2]))
    assert asked == [("low", [-1, 0, -1, 1, -1]), ("high", [2, -1, -1, -1, 0])]
    assert out[:, 0].tolist() == [30.0, 1.0, 0.0, 2.0, 10.0]


def test_what_cannot_be_spread_is_an_error(plain: Path) -> None:
    with pytest.raises(SwitchError, match="2 sparse layers cannot be spread over 3 devices; split the experts instead"):
        qmoe_switch.load(plain, device="cpu,cpu,cpu")
    with pytest.raises(SwitchError, match="3 experts cannot be spread over 4 devices"):
        qmoe_switch.load(plain, device="cpu,cpu,cpu,cpu", split="experts")
    with pytest.raises(SwitchError, match="split is 'rows', not one of layers, experts"):
        qmoe_switch.load(plain, split="rows")  # type: ignore[arg-type]


def test_states_follow_the_blocks_and_are_moved_once() -> None:
    """Between the CPU and the device `meta`, which holds no values, but notices what is not on it."""
    meta = torch.device("meta")

    class Block(torch.nn.Module):
        def forward(self, states: Any, mask: Any, *, bias: Any = None, name: str = "") -> Any:
            assert name == "same"
            return states + mask if bias is None else states + mask + bias

    class Stack(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = torch.nn.ModuleList(Block() for _ in range(4))

        def forward(self, states: Any, mask: Any) -> Any:
            for i, block in enumerate(self.block):
                states = block(states, mask, bias=mask if i % 2 else None, name="same")
                places.append(states.device.type)
            return states

    places: list[str] = []
    stack, moves = Stack(), Moves()
    moves.attach(stack, dict(zip(stack.block, [torch.device("cpu")] * 2 + [meta] * 2, strict=True)))
    moved: list[int] = []
    move = torch.Tensor.to
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", lambda tensor, device: moved.append(tensor.ndim) or move(tensor, device))
        out = stack(torch.ones(2, 3), torch.ones(3))
    assert places == ["cpu", "cpu", "meta", "meta"] and out.device == meta
    assert moved == [2, 1]  # the states and the mask, both at the one boundary
    assert not moves._moved
