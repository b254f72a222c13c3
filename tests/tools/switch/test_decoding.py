"""The decoding step that a CUDA graph holds: the same tokens as with growing keys and values, and nothing asked of the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import qmoe_switch  # noqa: E402
from qmoe_switch import BackendError, SwitchModel, TokenSet  # noqa: E402
from qmoe_switch.decoding import Decoder  # noqa: E402
from qmoecodec.container import pack  # noqa: E402

#: What makes the host wait for the device, or brings numbers from the host; none of them may happen in a captured step.
BLOCKING = {"_local_scalar_dense", "nonzero", "lift_fresh", "lift_fresh_copy", "_unique2", "unique_consecutive", "masked_select"}


class Watch(TorchDispatchMode):
    """Notes which blocking operations run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found |= BLOCKING & {func.overloadpacket.__name__}
        return func(*args, **(kwargs or {}))


@pytest.fixture(
    params=[
        {},
        {"num_layers": 3, "num_decoder_layers": 4, "num_sparse_decoder_layers": 2, "tie_word_embeddings": False, "seed": 3},
        {"num_decoder_layers": 1, "num_sparse_decoder_layers": 0, "relative_attention_num_buckets": 8},
    ]
)
def checkpoint(request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(ternary=True, **request.param)


def decoder(model: SwitchModel, prompts: TokenSet, length: int, *, is_static: bool) -> Decoder:
    assert model.vocabulary.start is not None
    return Decoder(model, prompts, start=model.vocabulary.start, length=length, is_static=is_static)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("length", [1, 9, 40])
def test_static_steps_say_what_growing_ones_say(checkpoint: Path, tokens_file: Path, dtype: str, length: int) -> None:
    with qmoe_switch.load(checkpoint, dtype=dtype) as model, torch.inference_mode():
        prompts = qmoe_switch.read_tokens(tokens_file, model.vocabulary, labels=False)
        model.config.eos_token_id = None
        growing, static = (decoder(model, prompts, length, is_static=is_static) for is_static in (False, True))
        for _ in range(length):
            growing.step()
            static.step()
    assert torch.equal(static.said, growing.said)
    assert length == 1 or len(static.said.unique()) > 1
    assert not bool(static.all_done)


def test_sequences_that_have_ended_are_told(plain: Path, tokens_file: Path) -> None:
    with qmoe_switch.load(plain) as model, torch.inference_mode():
        prompts = qmoe_switch.read_tokens(tokens_file, model.vocabulary, labels=False)
        model.config.eos_token_id = None
        free = decoder(model, prompts, 12, is_static=True)
        for _ in range(12):
            free.step()
        model.config.eos_token_id = sorted({int(row[3]) for row in free.said})
        ending = decoder(model, prompts, 12, is_static=True)
        ends = torch.isin(free.said, torch.tensor(model.config.eos_token_id)).int().argmax(dim=1)
        for step in range(5):
            ending.step()
            assert bool(ending.all_done) == (step >= int(ends.max()))


def test_a_static_step_asks_the_device_nothing_and_moves_nothing(
    make_checkpoint: Callable[..., Path], tokens_file: Path, tmp_path: Path, on_device: Callable[[], None]
) -> None:
    """From the second step on, as a CUDA graph needs it; the experts are a stand-in for those on the device."""
    source = make_checkpoint(ternary=True, num_decoder_layers=3, num_sparse_decoder_layers=3, expert_capacity=1)
    pack(source, tmp_path / "packed")
    on_device()
    with qmoe_switch.load(tmp_path / "packed", capacity="per_sequence") as model, torch.inference_mode():
        prompts = qmoe_switch.read_tokens(tokens_file, model.vocabulary, labels=False)
        steps = decoder(model, prompts, 6, is_static=True)
        steps.step()
        layers = [*steps._cache.self_attention_cache.layers, *steps._cache.cross_attention_cache.layers]
        places = [tensor.data_ptr() for layer in layers for tensor in (layer.keys, layer.values)]
        assert len(places) == 12
        with Watch() as watch:
            for _ in range(5):
                steps.step()
        assert not watch.found
        assert [tensor.data_ptr() for layer in layers for tensor in (layer.keys, layer.values)] == places


def test_the_watch_sees_what_the_dense_backend_asks(plain: Path, tokens_file: Path) -> None:
    with qmoe_switch.load(plain) as model, torch.inference_mode():
        prompts = qmoe_switch.read_tokens(tokens_file, model.vocabulary, labels=False)
        steps = decoder(model, prompts, 3, is_static=True)
        with Watch() as watch:
            steps.step()
    assert {"_local_scalar_dense", "unique_consecutive"} & watch.found


def test_what_cannot_be_captured_is_an_error(plain: Path, tokens_file: Path) -> None:
    with qmoe_switch.load(plain) as model:
        prompts = qmoe_switch.read_tokens(tokens_file, model.vocabulary, labels=False)
        with pytest.raises(BackendError, match="cannot be captured in a CUDA graph: the model is on cpu"):
            qmoe_switch.generate(model, prompts, graph=True)
        model.device = torch.device("cuda:0")
        with pytest.raises(BackendError, match="the backend dense asks the device where the tokens go"):
            qmoe_switch.generate(model, prompts, graph=True)
