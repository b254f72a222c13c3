"""Top-1 routing and the rule for tokens beyond capacity, against transformers' own router."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from packaging.version import Version  # noqa: E402
from transformers.models.switch_transformers import modeling_switch_transformers as theirs  # noqa: E402

from qmoe_switch.errors import SwitchError  # noqa: E402
from qmoe_switch.routing import Top1Router, assign  # noqa: E402

DROPS = Version(transformers.__version__) >= Version("5.18")


def test_the_most_probable_expert_takes_the_token() -> None:
    routing = assign(torch.tensor([[[0.1, 0.7, 0.2], [0.5, 0.25, 0.25]]]), capacity=None)
    assert routing.expert.tolist() == [[1, 0]]
    assert routing.weight.tolist() == [[pytest.approx(0.7), 0.5]]


def test_of_equally_probable_experts_the_first_takes_the_token() -> None:
    assert assign(torch.tensor([[[0.2, 0.4, 0.4]]]), capacity=None).expert.tolist() == [[1]]


def test_tokens_beyond_capacity_are_dropped_per_sequence_in_order_of_position() -> None:
    to_first, to_second = [0.9, 0.1], [0.1, 0.9]
    batch = torch.tensor([[to_first, to_first, to_second, to_first], [to_first, to_second, to_second, to_second]])
    assert assign(batch, capacity=2).expert.tolist() == [[0, 0, 1, -1], [0, 1, 1, -1]]
    assert assign(batch, capacity=None).expert.tolist() == [[0, 0, 1, 0], [0, 1, 1, 1]]


@pytest.mark.parametrize("capacity", [1, 2, 5, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_agrees_with_the_router_of_transformers(capacity: int, bias: bool) -> None:
    config = transformers.SwitchTransformersConfig(d_model=16, num_experts=4, expert_capacity=capacity, router_bias=bias)
    torch.manual_seed(1)
    router: Any = theirs.SwitchTransformersTop1Router(config).eval()
    ours = Top1Router(config, capacity="per_sequence")
    ours.load_state_dict(router.state_dict())
    states = torch.randn(3, 20, 16)
    if DROPS:
        one_hot, weight, _ = router(states)
        expert = torch.where(one_hot.sum(-1) > 0, one_hot.argmax(-1), -1)
    else:  # 5.17 takes flat tokens and drops none
        ours.capacity = None
        _, one_hot, weight = router(states.reshape(-1, 16))
        expert, weight = one_hot.argmax(-1).reshape(3, 20), weight.reshape(3, 20, 1)
    routing = ours(states)
    assert torch.equal(routing.expert, expert)
    assert torch.equal(routing.weight, weight.squeeze(-1))
    if capacity == 1 and DROPS:
        assert (routing.expert == -1).any()


def test_router_works_in_its_own_dtype() -> None:
    config = transformers.SwitchTransformersConfig(d_model=16, num_experts=4, router_dtype="float32")
    router = Top1Router(config, capacity="none")
    assert router.classifier.weight.dtype == torch.float32
    assert router(torch.randn(1, 3, 16, dtype=torch.bfloat16)).weight.dtype == torch.bfloat16


def test_unknown_capacity_is_refused() -> None:
    with pytest.raises(SwitchError, match="capacity is 'some'"):
        Top1Router(transformers.SwitchTransformersConfig(), capacity="some")  # type: ignore[arg-type]


def test_a_capacity_that_drops_everything_is_refused() -> None:
    config = transformers.SwitchTransformersConfig(expert_capacity=0)
    with pytest.raises(SwitchError, match="expert_capacity is 0, which drops every token"):
        Top1Router(config, capacity="per_sequence")
    Top1Router(config, capacity="none")
