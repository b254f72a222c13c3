"""Packed checkpoints against plain ones with the same values: same logits, same tokens, and nothing read too early."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

import qmoe_switch  # noqa: E402
from qmoe_switch import FormatError, SwitchError  # noqa: E402
from qmoe_switch.backends import CpuBackend  # noqa: E402
from qmoe_switch.packed import PackedExpert  # noqa: E402
from qmoecodec.codec import decode_rows  # noqa: E402
from qmoecodec.container import Expert, pack  # noqa: E402
from qmoecodec.container import open as open_packed  # noqa: E402

MakeCheckpoint = Callable[..., Path]
EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture(scope="session")
def packed(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "checkpoint"
    assert len(pack(plain, path).groups) == 4
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_experts": 7, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2, "d_ff": 33, "dense_act_fn": "silu"},
        {"tie_word_embeddings": False, "d_model": 31, "shard": "30KB"},
    ],
)
@pytest.mark.parametrize("setting", [{"code_bits": 8}, {"code_bits": 12}, {"dictionary": "qmoe-2023"}])
def test_logits_and_tokens_are_those_of_the_dense_model(
    make_checkpoint: MakeCheckpoint, tokens_file: Path, tmp_path: Path, changes: dict[str, Any], setting: dict[str, Any]
) -> None:
    dense_path = make_checkpoint(ternary=True, **changes)
    report = pack(dense_path, tmp_path / "packed", max_shard_size=20_000 if "shard" in changes else 1 << 30, **setting)
    assert report.groups
    with qmoe_switch.load(dense_path) as dense, qmoe_switch.load(tmp_path / "packed") as packed:
        assert (dense.backend.name, packed.backend.name) == ("dense", "cpu")
        tokens = qmoe_switch.read_tokens(tokens_file, dense.vocabulary, labels=True)
        torch.testing.assert_close(qmoe_switch.logits(packed, tokens), qmoe_switch.logits(dense, tokens), rtol=1e-5, atol=1e-5)
        ours = qmoe_switch.generate(packed, tokens, max_new_tokens=15)
        theirs = qmoe_switch.generate(dense, tokens, max_new_tokens=15)
    assert [row.tolist() for row in ours.tokens] == [row.tolist() for row in theirs.tokens]


def test_example_twin(tmp_path: Path) -> None:
    """The ternarized example, compressed, gives the dense model's loss, logits and tokens."""
    import runpy
    import sys

    twin = tmp_path / "twin"
    shutil.copytree(EXAMPLES / "switch-pycode-4e", twin)
    arguments, sys.argv = sys.argv, ["make_ternary.py", str(twin / "model.safetensors")]
    try:
        runpy.run_path(str(EXAMPLES / "make_ternary.py"))
    finally:
        sys.argv = arguments
    pack(twin, tmp_path / "packed")
    with qmoe_switch.load(twin) as dense, qmoe_switch.load(tmp_path / "packed") as packed:
        tokens = qmoe_switch.read_tokens(twin / "validation.npz", dense.vocabulary, labels=True).slice(0, 16)
        losses = [qmoe_switch.evaluate(model, tokens).loss for model in (dense, packed)]
        assert losses[0] == pytest.approx(3.5028, abs=1e-3)
        assert losses[1] == pytest.approx(losses[0], abs=1e-5)
        some = tokens.slice(0, 3)
        torch.testing.assert_close(qmoe_switch.logits(packed, some), qmoe_switch.logits(dense, some), rtol=1e-4, atol=1e-4)
        rows = [[row.tolist() for row in qmoe_switch.generate(m, some, max_new_tokens=20).tokens] for m in (dense, packed)]
    assert rows[0] == rows[1]


def test_both_ways_of_computing_agree_and_both_are_used(packed: Path, tokens_file: Path) -> None:
    calls: dict[str, int] = {"matvec": 0, "matrix": 0}
    spied = {name: getattr(PackedExpert, name) for name in calls}

    def spy(name: str) -> Any:
        def call(self: PackedExpert, *args: Any) -> Any:
            calls[name] += 1
            return spied[name](self, *args)

        return call

    results = []
    with pytest.MonkeyPatch.context() as patch:
        for name in calls:
            patch.setattr(PackedExpert, name, spy(name))
        for limit in (1, 10**9):
            with qmoe_switch.load(packed) as model:
                assert isinstance(model.backend, CpuBackend)
                model.backend._decode_once_tokens = (limit, limit)
                tokens = qmoe_switch.read_tokens(tokens_file, model.vocabulary, labels=True)
                results.append(qmoe_switch.logits(model, tokens))
                assert calls["matrix" if limit == 1 else "matvec"] > 0
                assert calls["matvec" if limit == 1 else "matrix"] == 0
            calls.update(matvec=0, matrix=0)
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_large_experts_have_a_limit_of_their_own(packed: Path, tokens_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: PackedExpert) -> Any:
        raise AssertionError("decoded at once")

    monkeypatch.setattr(PackedExpert, "matrix", refuse)
    with qmoe_switch.load(packed) as model:
        assert isinstance(model.backend, CpuBackend)
        model.backend._decode_once_tokens = (1, 10**9)
        tokens = qmoe_switch.read_tokens(tokens_file, model.vocabulary, labels=True)
        with pytest.raises(AssertionError, match="decoded at once"):
            qmoe_switch.logits(model, tokens)
        monkeypatch.setattr("qmoe_switch.backends.LARGE_EXPERT_WEIGHTS", 40 * 24)
        qmoe_switch.logits(model, tokens)


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_do_not_change_the_result(packed: Path, tokens_file: Path, threads: int) -> None:
    with qmoe_switch.load(packed, threads=threads) as model, qmoe_switch.load(packed, threads=2) as other:
        tokens = qmoe_switch.read_tokens(tokens_file, model.vocabulary, labels=True)
        torch.testing.assert_close(qmoe_switch.logits(model, tokens), qmoe_switch.logits(other, tokens), rtol=1e-6, atol=1e-6)


def test_a_large_expert_alone_is_worked_on_in_pieces(packed: Path, tokens_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges: set[tuple[int, int]] = set()
    matvec = PackedExpert.matvec

    def spy(self: PackedExpert, x: Any, begin: int, end: int) -> Any:
        ranges.add((begin, end))
        return matvec(self, x, begin, end)

    with qmoe_switch.load(packed, threads=7) as model:
        tokens = qmoe_switch.read_tokens(tokens_file, model.vocabulary, labels=True)
        whole = qmoe_switch.generate(model, tokens.slice(0, 1), max_new_tokens=6)
        monkeypatch.setattr("qmoe_switch.backends.LARGE_EXPERT_WEIGHTS", 1)
        monkeypatch.setattr(PackedExpert, "matvec", spy)
        in_pieces = qmoe_switch.generate(model, tokens.slice(0, 1), max_new_tokens=6)
    assert whole.tokens[0].tolist() == in_pieces.tokens[0].tolist()
    assert {(0, 5), (5, 11), (34, 40), (0, 3), (20, 24)} <= ranges


def test_dense_backend_runs_a_packed_checkpoint_when_asked_to(packed: Path, plain: Path, tokens_file: Path) -> None:
    with qmoe_switch.load(packed, backend="dense") as model, qmoe_switch.load(plain) as dense:
        tokens = qmoe_switch.read_tokens(tokens_file, model.vocabulary, labels=True)
        assert torch.equal(qmoe_switch.logits(model, tokens), qmoe_switch.logits(dense, tokens))


def role(path: Path, group: str, name: str) -> tuple[int, int]:
    """Return begin and end of a role tensor in the file."""
    data = (path / "model.safetensors").read_bytes()
    n = int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8 : 8 + n])[f"{group}_{name}"]["data_offsets"]
    return 8 + n + begin, 8 + n + end


ENCODER = "encoder.block.1.layer.1.mlp.experts"


def test_experts_that_no_token_comes_to_are_not_read(make_checkpoint: MakeCheckpoint, tokens_file: Path, tmp_path: Path) -> None:
    """Damage in unused experts goes unnoticed, damage in a used one is an error that names it."""
    path = tmp_path / "packed"
    pack(make_checkpoint(ternary=True, num_experts=12), path)
    used: set[int] = set()
    with qmoe_switch.load(path) as model:
        router = model.module.encoder.block[1].layer[1].mlp.router
        router.register_forward_hook(lambda _, __, routing: used.update(routing.expert.flatten().tolist()))
        tokens = qmoe_switch.read_tokens(tokens_file, model.vocabulary, labels=False)
        before = qmoe_switch.generate(model, tokens, max_new_tokens=5)
    unused = set(range(12)) - used
    assert used and unused
    with open_packed(path) as file:
        offsets = file[f"{ENCODER}.wi"].data.code_offsets.tolist()
    begin, _ = role(path, f"{ENCODER}.wi", "codes")

    def damage(experts: set[int]) -> None:
        data = bytearray((path / "model.safetensors").read_bytes())
        for e in experts:
            data[begin + offsets[e] + 3] ^= 0x55
        (path / "model.safetensors").write_bytes(data)

    damage(unused)
    with qmoe_switch.load(path) as model:
        after = qmoe_switch.generate(model, tokens, max_new_tokens=5)
    assert [row.tolist() for row in after.tokens] == [row.tolist() for row in before.tokens]
    damage({min(used)})
    with qmoe_switch.load(path) as model, pytest.raises(FormatError, match=rf"\[checksum\].*{ENCODER}.wi, expert {min(used)}"):
        qmoe_switch.generate(model, tokens, max_new_tokens=5)


def reseal(path: Path, group: str, expert: int) -> None:
    """Make an expert's checksum right again, so that only what is inside is wrong."""
    data = bytearray((path / "model.safetensors").read_bytes())

    def part(name: str, size: int, first: int, last: int) -> bytes:
        begin, _ = role(path, group, name)
        return bytes(data[begin + size * first : begin + size * last])

    rows = (role(path, group, "levels")[1] - role(path, group, "levels")[0]) // 12
    offsets = part("code_offsets", 8, expert, expert + 2)
    codes = part("codes", 1, int.from_bytes(offsets[:8], "little"), int.from_bytes(offsets[8:], "little"))
    lengths, levels = part("row_lengths", rows, expert, expert + 1), part("levels", 4 * rows, expert, expert + 1)
    crc = zlib.crc32(codes + lengths + levels + part("dictionary_index", 1, expert, expert + 1) + offsets)
    at = role(path, group, "checksums")[0] + 4 * expert
    data[at : at + 4] = crc.to_bytes(4, "little")
    (path / "model.safetensors").write_bytes(data)


def test_a_row_that_is_wrong_inside_is_named(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, group, row = tmp_path / "copy", f"{ENCODER}.wi", 33
    shutil.copytree(packed, path)
    with open_packed(path) as file:
        expert = file[group].expert(1)
        start = int(((expert.row_lengths[:row].astype(np.int64) * expert.dictionary.code_bits + 7) // 8).sum())
        end = start + (int(expert.row_lengths[row]) * expert.dictionary.code_bits + 7) // 8
        codes, lengths, dictionary = expert.codes.copy(), expert.row_lengths[row : row + 1], expert.dictionary
        offset = int(file[group].data.code_offsets[1])
    for value in range(256):  # find a byte that makes the row wrong
        codes[start] = value
        try:
            decode_rows(codes[start:end], lengths, cols=24, dictionary=dictionary)
        except FormatError as error:
            reason = error.reason
            break
    data = bytearray((path / "model.safetensors").read_bytes())
    data[role(path, group, "codes")[0] + offset + start] = value
    (path / "model.safetensors").write_bytes(data)
    reseal(path, group, 1)
    monkeypatch.setattr("qmoe_switch.backends.LARGE_EXPERT_WEIGHTS", 1)
    for limit in (1, 10**9):
        with qmoe_switch.load(path, threads=4) as model:
            assert isinstance(model.backend, CpuBackend)
            model.backend._decode_once_tokens = (limit, limit)
            if limit > 1:  # so that the product itself finds it, in one of its pieces
                monkeypatch.setattr(Expert, "decode", lambda self: None)
            layer = model.module.encoder.block[1].layer[1].mlp._experts
            with pytest.raises(FormatError) as caught:
                layer(torch.ones(1, 24), torch.tensor([1]))
        assert caught.value.reason == reason
        assert {"group": group, "expert": 1, "row": row}.items() <= caught.value.where.items()


def test_a_digit_whose_level_is_zero_is_an_error(packed: Path, tmp_path: Path) -> None:
    path, group = tmp_path / "copy", f"{ENCODER}.wi"
    shutil.copytree(packed, path)
    data = bytearray((path / "model.safetensors").read_bytes())
    begin, _ = role(path, group, "levels")
    at = begin + 4 * (40 * 1 + 7)  # expert 1, row 7, low level
    data[at : at + 2] = bytes(2)
    (path / "model.safetensors").write_bytes(data)
    reseal(path, group, 1)
    with qmoe_switch.load(path) as model:
        layer = model.module.encoder.block[1].layer[1].mlp._experts
        layer(torch.ones(1, 24), torch.tensor([0]))
        with pytest.raises(FormatError, match=r"\[level_zero\].*expert 1, row 7"):
            layer(torch.ones(1, 24), torch.tensor([1]))


def test_experts_that_are_not_ternary_pass_through_and_still_run(
    make_checkpoint: MakeCheckpoint, tokens_file: Path, tmp_path: Path
) -> None:
    """Of one stack some experts are compressed and one is a plain tensor."""
    path = tmp_path / "mixed"
    shutil.copytree(make_checkpoint(ternary=True, num_experts=4, seed=5), path)
    tensors = load_file(path / "model.safetensors")
    tensors[f"{ENCODER}.expert_2.wi.weight"] = torch.randn(40, 24, generator=torch.Generator().manual_seed(3)).bfloat16()
    save_file(tensors, path / "model.safetensors")
    pack(path, tmp_path / "packed")
    with open_packed(tmp_path / "packed") as file:
        assert [list(r) for r in file[f"{ENCODER}.wi"].info.expert_ranges] == [[0, 2], [3, 4]]
    used: set[int] = set()
    with qmoe_switch.load(path) as dense, qmoe_switch.load(tmp_path / "packed") as packed:
        router = packed.module.encoder.block[1].layer[1].mlp.router
        router.register_forward_hook(lambda _, __, routing: used.update(routing.expert.flatten().tolist()))
        tokens = qmoe_switch.read_tokens(tokens_file, dense.vocabulary, labels=True)
        torch.testing.assert_close(qmoe_switch.logits(packed, tokens), qmoe_switch.logits(dense, tokens), rtol=1e-5, atol=1e-5)
    assert 2 in used and 3 in used


def test_dense_matrices_that_happen_to_be_ternary_are_restored(
    make_checkpoint: MakeCheckpoint, tokens_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "dense-ternary"
    shutil.copytree(make_checkpoint(ternary=True), path)
    tensors = load_file(path / "model.safetensors")
    name = "encoder.block.0.layer.1.mlp.wi.weight"
    tensors[name] = tensors[f"{ENCODER}.expert_0.wi.weight"].clone()
    save_file(tensors, path / "model.safetensors")
    report = pack(path, tmp_path / "packed")
    assert name.removesuffix(".weight") in {group.name for group in report.groups}
    with qmoe_switch.load(path) as dense, qmoe_switch.load(tmp_path / "packed") as packed:
        tokens = qmoe_switch.read_tokens(tokens_file, dense.vocabulary, labels=True)
        torch.testing.assert_close(qmoe_switch.logits(packed, tokens), qmoe_switch.logits(dense, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 4}, "expert_3.wi.weight is missing"),
        ({"num_experts": 2}, r"router.classifier.weight has shape \[3, 24\]"),
        ({"d_ff": 41}, r"group .* has experts of \[40, 24\], config.json asks for \[41, 24\]"),
        ({"vocab_size": 60}, r"shared.weight has shape \[50, 24\]"),
    ],
)
def test_config_that_does_not_fit_gives_one_clear_error(
    packed: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "copy"
    shutil.copytree(packed, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(SwitchError, match=message):
        qmoe_switch.load(path)


def test_damaged_header_is_a_format_error(packed: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(packed, path)
    data = bytearray((path / "model.safetensors").read_bytes())
    at = data.index(b'"format_version') - 2
    data[at + 2 + data[at + 2 :].index(b"1.0")] = ord("7")
    (path / "model.safetensors").write_bytes(data)
    with pytest.raises(FormatError):
        qmoe_switch.load(path)


def test_closing_lets_go_of_the_files(packed: Path) -> None:
    model = qmoe_switch.load(packed)
    model.close()
    with pytest.raises(ValueError, match="closed"):
        model.module(input_ids=torch.from_numpy(np.arange(2, 12)[None]), decoder_input_ids=torch.zeros((1, 1), dtype=torch.int64))


def test_experts_without_number_are_not_counted_out(packed: Path, tmp_path: Path) -> None:
    path = tmp_path / "packed"
    shutil.copytree(packed, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_experts": 2**31 - 1}))
    with pytest.raises(SwitchError, match=r"expert_\d+\.wi\.weight is missing"):
        qmoe_switch.load(path)


def test_an_expert_too_many_gives_one_clear_error(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    path = tmp_path / "many"
    shutil.copytree(make_checkpoint(ternary=True), path)
    tensors = load_file(path / "model.safetensors")
    tensors[f"{ENCODER}.expert_3.wi.weight"] = tensors[f"{ENCODER}.expert_0.wi.weight"].clone()
    save_file(tensors, path / "model.safetensors")
    pack(path, tmp_path / "packed")
    with pytest.raises(SwitchError, match=r"expert_\{\}.wi.weight has no place in the model"):
        qmoe_switch.load(tmp_path / "packed")


def test_row_tables_of_a_few_experts_are_kept(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qmoe_switch.checkpoint import open_checkpoint

    monkeypatch.setattr("qmoe_switch.packed.PREPARED_EXPERTS", 2)
    pack(make_checkpoint(ternary=True), tmp_path / "packed")
    stack = open_checkpoint(tmp_path / "packed").experts(ENCODER, "wi", (3, 40, 24))
    first, second = stack.packed(0), stack.packed(1)
    assert stack.packed(0) is first
    assert stack.packed(2) is not None  # the least recently used, 1, goes
    assert stack.packed(0) is first
    assert stack.packed(1) is not second
