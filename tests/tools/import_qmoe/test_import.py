"""Published checkpoints are imported bit for bit, kept or transcoded; what is wrong with one is one clear error."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from qmoe_switch.errors import CheckpointImportError  # noqa: E402
from qmoe_switch.import_qmoe import import_checkpoint, import_qmoe  # noqa: E402
from qmoecodec import container  # noqa: E402
from qmoecodec.cli import main  # noqa: E402
from qmoecodec.dictionary import qmoe2023  # noqa: E402

if TYPE_CHECKING:
    from .conftest import Checkpoint

FIRST = "encoder.block.1.layer.1.mlp.experts.expert_0.wi"
ROUTER = "decoder.block.1.layer.2.mlp.router.classifier.weight"
LAST = "decoder.block.1.layer.2.mlp.experts.expert_2.wo"


def same_bits(a: Any, b: Any) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.mark.parametrize("transcode", [False, True])
def test_values_come_back_bit_for_bit(written: Checkpoint, tmp_path: Path, transcode: bool) -> None:
    report = import_checkpoint(written.path, tmp_path / "out", transcode=transcode)
    assert (report.n_layers, report.n_experts) == (3, 3)
    assert report.n_weights == 3 * 3 * 2 * 24 * 41
    assert container.verify(tmp_path / "out", deep=True).problems == ()
    container.unpack(tmp_path / "out", tmp_path / "dense")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    assert tensors.keys() == written.tensors.keys()
    assert all(same_bits(tensors[name], written.tensors[name]) for name in tensors)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_experts"] == 3
    assert not list((tmp_path / "out").glob("*.pt"))


def test_kept_code_stream_is_the_published_one(written: Checkpoint, tmp_path: Path) -> None:
    report = import_checkpoint(written.path, tmp_path / "out")
    assert report.payload_bits == report.published_payload_bits == 8 * sum(map(len, written.streams.values()))
    with container.open(tmp_path / "out") as file:
        assert sorted(file.groups) == sorted({n.replace(".expert_0", "") for n in written.streams if "expert_0" in n})
        for name, stream in written.streams.items():
            prefix, _, rest = name.partition(".expert_")
            expert = file[f"{prefix}.{rest[2:]}"].expert(int(rest[0]))
            assert expert.codes.tobytes() == stream
            assert expert.dictionary == qmoe2023.table()


def test_transcoding_makes_the_payload_smaller(written: Checkpoint, tmp_path: Path) -> None:
    report = import_checkpoint(written.path, tmp_path / "out", transcode=True, code_bits=8)
    assert report.payload_bits < 0.85 * report.published_payload_bits
    assert report.saving == pytest.approx(1 - report.payload_bits / report.published_payload_bits)
    with container.open(tmp_path / "out") as file:
        assert all(group.info.code_bits == 8 for group in file.groups.values())


def test_several_shards_hold_the_same(written: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qmoe_switch.import_qmoe.SHARD_BYTES", 10_000)
    import_checkpoint(written.path, tmp_path / "out", transcode=True)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert container.verify(tmp_path / "out", deep=True).problems == ()
    container.unpack(tmp_path / "out", tmp_path / "dense.safetensors")
    tensors = load_file(tmp_path / "dense.safetensors")
    assert all(same_bits(tensors[name], tensor) for name, tensor in written.tensors.items())


def test_imported_checkpoint_runs(written: Checkpoint, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    import qmoe_switch
    from qmoe_switch.tokens import TokenSet

    import_checkpoint(written.path, tmp_path / "packed")
    plain = tmp_path / "plain"
    plain.mkdir()
    save_file(written.tensors, plain / "model.safetensors")
    (plain / "config.json").write_bytes((written.path / "config.json").read_bytes())
    ids = np.arange(2, 14)[None]
    with qmoe_switch.load(plain) as dense, qmoe_switch.load(tmp_path / "packed") as packed:
        tokens = TokenSet(ids, np.ones_like(ids), ids, ids)
        torch.testing.assert_close(qmoe_switch.logits(packed, tokens), qmoe_switch.logits(dense, tokens), rtol=1e-5, atol=1e-5)


def test_levels_of_digits_that_do_not_occur_need_not_make_sense(published: Checkpoint, tmp_path: Path) -> None:
    """A row of zeros may have any two levels, a row without `-` any low one."""

    def change(content: dict[str, Any]) -> None:
        levels = content[f"{FIRST}.ter_minmax"]
        levels[0], levels[1] = float("nan"), -1.0
        matrix = published.tensors[f"{FIRST}.weight"]
        row = next(r for r in range(1, len(matrix)) if (matrix[r] < 0).sum() == 0 and (matrix[r] > 0).any())
        levels[2 * row] = 5.0

    published.edit("exp00.pt", change)
    import_checkpoint(published.path, tmp_path / "out")
    assert container.verify(tmp_path / "out", deep=True).problems == ()
    container.unpack(tmp_path / "out", tmp_path / "dense.safetensors")
    tensors = load_file(tmp_path / "dense.safetensors")
    assert same_bits(tensors[f"{FIRST}.weight"], published.tensors[f"{FIRST}.weight"])


def test_two_levels_of_one_sign_are_kept(published: Checkpoint, tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        levels = content[f"{FIRST}.ter_minmax"].reshape(-1, 2)
        levels[1:, 0], levels[1:, 1] = -0.5, -0.25

    published.edit("exp00.pt", change)
    import_checkpoint(published.path, tmp_path / "out")
    container.unpack(tmp_path / "out", tmp_path / "dense.safetensors")
    got = load_file(tmp_path / "dense.safetensors")[f"{FIRST}.weight"]
    was = published.tensors[f"{FIRST}.weight"]
    expected = torch.where(was < 0, -0.5, torch.where(was > 0, -0.25, 0.0)).bfloat16()
    expected[0] = 0
    assert same_bits(got, expected)


def split_a_codeword(content: dict[str, Any]) -> None:
    """Write a row with two shorter phrases where the packer takes one: valid, but not the greedy parse."""
    table = qmoe2023.table()
    phrases = {table.phrase(0, c): c for c in range(1 << 16)}
    words = content[f"{FIRST}.w_comp"].numpy().view(np.uint16)
    at = next(i for i, c in enumerate(words) if len(table.phrase(0, int(c))) >= 4)
    phrase = table.phrase(0, int(words[at]))
    two = [phrases[phrase[:2]], phrases[phrase[2:]]]
    content[f"{FIRST}.w_comp"] = torch.from_numpy(
        np.concatenate([words[:at], two, words[at + 1 :]]).astype(np.uint16).view(np.int16)
    )
    offsets = content[f"{FIRST}.row_off"]
    offsets[offsets > at] += 1


def test_stream_that_is_not_the_greedy_parse_can_only_be_transcoded(published: Checkpoint, tmp_path: Path) -> None:
    published.edit("exp00.pt", split_a_codeword)
    published.edit("sizes.pt", lambda sizes: sizes.update({FIRST: sizes[FIRST] + 1}))
    with pytest.raises(CheckpointImportError, match=r"expert_0\.wi: .* greedy parse .* --transcode"):
        import_checkpoint(published.path, tmp_path / "out")
    import_checkpoint(published.path, tmp_path / "out", transcode=True)
    container.unpack(tmp_path / "out", tmp_path / "dense.safetensors")
    tensors = load_file(tmp_path / "dense.safetensors")
    assert same_bits(tensors[f"{FIRST}.weight"], published.tensors[f"{FIRST}.weight"])


Edit = Callable[["dict[str, Any]"], Any]


def put(key: str, index: int, value: float) -> Edit:
    return lambda content: content[key].__setitem__(index, value)


def first_used_row(content: dict[str, Any]) -> None:
    """Give every row but the first two equal levels."""
    levels = content[f"{FIRST}.ter_minmax"].reshape(-1, 2)
    levels[1:] = 0.25


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        ("exp00.pt", lambda c: c.pop(f"{FIRST}.row_off"), rf"exp00.pt: {FIRST}.row_off is missing \(1 tensors are\)"),
        ("exp02.pt", lambda c: c.pop(f"{LAST}.weight"), rf"exp02.pt: {LAST}.weight is missing"),
        ("exp00.pt", lambda c: c.update({f"{LAST}.weight": torch.empty(0)}), rf"exp00.pt: {LAST}.weight does not belong"),
        ("exp00.pt", lambda c: c.update({f"{FIRST}.w_comp": torch.zeros(3)}), r"w_comp is torch.float32\[3\], not a"),
        ("exp00.pt", lambda c: c.update({f"{FIRST}.w_comp": 3}), r"w_comp is int, not a one-dimensional"),
        ("exp00.pt", lambda c: c.update({f"{FIRST}.w_comp": c[f"{FIRST}.w_comp"][:-1]}), r"codewords, sizes.pt says"),
        ("exp00.pt", lambda c: c.update({f"{FIRST}.row_off": c[f"{FIRST}.row_off"][:-1]}), "row_off has 41 entries"),
        ("exp00.pt", put(f"{FIRST}.row_off", 0, 1), r"row_off\[0\] is 1: offsets begin at 0"),
        ("exp00.pt", put(f"{FIRST}.row_off", 5, 10**6), r"row_off\[6\] is \d+: offsets begin at 0, do not fall"),
        ("exp00.pt", put(f"{FIRST}.row_off", 5, -1), r"row_off\[5\] is -1"),
        ("exp00.pt", put(f"{FIRST}.row_off", 41, 10**6), r"row_off\[41\] is 1000000: .* end at the \d+ codewords"),
        ("exp00.pt", lambda c: c[f"{FIRST}.row_off"][3:4].add_(-1), r"do not give 24 digits: \[row_underrun\].*row 2"),
        ("exp00.pt", lambda c: c[f"{FIRST}.row_off"][3:4].add_(1), r"do not give 24 digits: \[row_overrun\].*row 2"),
        ("exp00.pt", lambda c: c.update({f"{FIRST}.ter_minmax": torch.zeros(82)}), r"ter_minmax is torch.float32\[82\]"),
        ("exp00.pt", put(f"{FIRST}.ter_minmax", 2, float("nan")), r"ter_minmax, row 1: nan and .* are not two finite levels"),
        ("exp00.pt", put(f"{FIRST}.ter_minmax", 3, float("inf")), r"ter_minmax, row 1: .* and inf are not"),
        ("exp00.pt", put(f"{FIRST}.ter_minmax", 2, -0.0), r"ter_minmax, row 1: -0 and"),
        ("exp00.pt", put(f"{FIRST}.ter_minmax", 2, 0.0), r"ter_minmax, row 1: 0 and"),
        ("exp00.pt", first_used_row, r"ter_minmax, row \d+: 0.25 and 0.25 are not"),
        ("exp00.pt", lambda c: c.update({f"{FIRST}.weight": torch.ones(2)}), f"{FIRST}.weight is not an empty tensor"),
        ("sizes.pt", lambda c: c.pop(LAST), rf"sizes.pt: {LAST} is missing"),
        ("sizes.pt", lambda c: c.update({"other": 3}), "sizes.pt: other is no matrix of the model"),
        ("sizes.pt", lambda c: c.update({LAST: 3.5}), rf"sizes.pt: {LAST} is 3.5, not a number of codewords"),
        ("noexp.pt", lambda c: c.pop("shared.weight"), "noexp.pt: shared.weight is missing"),
        ("noexp.pt", lambda c: c.update({"shared.weight": torch.zeros(41, 24)}), r"has shape \[41, 24\], config.json asks"),
        ("noexp.pt", lambda c: c.pop(ROUTER), f"noexp.pt: {ROUTER} is missing"),
        ("noexp.pt", lambda c: c.update({f"{FIRST}.weight": torch.zeros(1)}), "noexp.pt: .* belongs to an expert"),
        ("noexp.pt", lambda c: c.update({"x": 3}), "noexp.pt: x is not a tensor"),
        ("noexp.pt", lambda c: c.update({"x": torch.zeros(1).expand(10**12)}), "noexp.pt: x claims 1000000000000 elements"),
        ("noexp.pt", lambda c: c.update({"x": torch.zeros(2, dtype=torch.complex128)}), "x is torch.complex128, which"),
        ("noexp.pt", lambda c: c.update({"x": torch.eye(2).to_sparse()}), "x is a tensor without plain values"),
        ("noexp.pt", lambda c: c.update({"x": torch.empty(2, device="meta")}), "x is a tensor without plain values"),
        ("noexp.pt", lambda c: c.update({"__metadata__": torch.ones(2)}), "__metadata__ is a name that the format keeps"),
        ("noexp.pt", lambda c: c.update({"qmoecodec.x": torch.ones(2)}), "qmoecodec.x is a name that the format keeps"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("transcode", [False, True])
def test_inconsistent_content_is_one_clear_error(
    published: Checkpoint, tmp_path: Path, file: str, edit: Edit, message: str, transcode: bool
) -> None:
    published.edit(file, edit)
    with pytest.raises(CheckpointImportError, match=message):
        import_checkpoint(published.path, tmp_path / "out", transcode=transcode)
    assert [p.name for p in tmp_path.iterdir()] == ["published"]


@pytest.mark.parametrize("name", ["exp00.pt", "exp01.pt", "exp02.pt", "sizes.pt", "noexp.pt", "config.json"])
def test_a_missing_file_is_one_clear_error(published: Checkpoint, tmp_path: Path, name: str) -> None:
    (published.path / name).unlink()
    with pytest.raises(CheckpointImportError, match=name.replace(".", r"\.")):
        import_checkpoint(published.path, tmp_path / "out")


@pytest.mark.parametrize("name", ["exp03.pt", "other.pt"])
def test_a_file_too_many_is_one_clear_error(published: Checkpoint, tmp_path: Path, name: str) -> None:
    torch.save({}, published.path / name)
    with pytest.raises(CheckpointImportError, match=rf"{name} is left over"):
        import_checkpoint(published.path, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 4}, "expert_3.wi is missing"),
        ({"num_experts": 2}, "is no matrix of the model"),
        ({"d_ff": 40}, "row_off has 42 entries, config.json asks for 41"),
        ({"num_sparse_encoder_layers": 1}, "exp02.pt is left over"),
        ({"num_layers": 2}, "is no matrix|is missing"),
        ({"model_type": "t5"}, "not the configuration of a Switch"),
        ({"num_experts": "3"}, "num_experts is '3'"),
        ({"num_layers": -1}, "num_layers is -1"),
        ({"encoder_sparse_step": "2"}, "encoder_sparse_step is '2'"),
        ({"encoder_sparse_step": 0, "decoder_sparse_step": 0}, "no sparse layer, nothing to import"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"num_experts": 2**31 - 1}, "expert_3.wi is missing"),
        ({"num_layers": 10**9, "encoder_sparse_step": 1}, "exp03.pt is missing"),
    ],
)
def test_config_of_another_model_is_one_clear_error(
    published: Checkpoint, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    config = json.loads((published.path / "config.json").read_text())
    (published.path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointImportError, match=message):
        import_checkpoint(published.path, tmp_path / "out")


class _Command:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch pwned",))


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_no_code_runs_from_a_file(published: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.chdir(tmp_path)
    if how == "torch":
        torch.save({"shared.weight": _Command()}, published.path / "noexp.pt")
    else:
        (published.path / "noexp.pt").write_bytes(pickle.dumps({"shared.weight": _Command()}))
    with pytest.raises(CheckpointImportError, match=r"noexp.pt: cannot be read as a file of tensors"):
        import_checkpoint(published.path, tmp_path / "out")
    assert not (tmp_path / "pwned").exists()


def test_damaged_files_are_one_clear_error(published: Checkpoint, tmp_path: Path) -> None:
    """Cut anywhere, a file gives an error of this kind and leaves nothing behind."""
    for name in ("exp01.pt", "sizes.pt"):
        whole = (published.path / name).read_bytes()
        for share in (0, 0.1, 0.5, 0.9, 0.999):
            (published.path / name).write_bytes(whole[: int(share * len(whole))])
            with pytest.raises(CheckpointImportError, match=name):
                import_checkpoint(published.path, tmp_path / "out")
        (published.path / name).write_bytes(whole)
    torch.save([1, 2], published.path / "sizes.pt")
    with pytest.raises(CheckpointImportError, match="holds no dictionary of names"):
        import_checkpoint(published.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_exists_is_left_alone(written: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    with pytest.raises(FileExistsError):
        import_checkpoint(written.path, tmp_path / "out")
    (tmp_path / "other").mkdir()
    import_checkpoint(written.path, tmp_path / "other")
    with pytest.raises(FileExistsError):
        import_checkpoint(written.path, tmp_path / "other", overwrite=False)
    import_checkpoint(written.path, tmp_path / "other")
    with pytest.raises(ValueError, match="same"):
        import_checkpoint(written.path, written.path)
    assert (tmp_path / "out" / "notes").read_text() == "mine"


def run(*arguments: object) -> Result:
    """Run the command within a group of the kind that `qmoecodec` is, without the entry points of an installation."""
    return CliRunner().invoke(type(main)(commands={"import-qmoe": import_qmoe}), ["import-qmoe", *map(str, arguments)])


def test_command(written: Checkpoint, tmp_path: Path) -> None:
    result = run(str(written.path), "-o", str(tmp_path / "out"), "--transcode", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["schema"] == 1 and report["n_layers"] == 3
    assert report["payload_bits_per_weight"] < report["published_payload_bits_per_weight"]
    result = run(str(written.path), "-o", str(tmp_path / "kept"))
    assert result.exit_code == 0 and "(0.0% smaller)" in result.stdout


def test_command_says_in_one_line_what_is_wrong(published: Checkpoint, tmp_path: Path) -> None:
    (published.path / "exp01.pt").unlink()
    result = run(str(published.path), "-o", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and "exp01.pt is missing" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    result = run(str(published.path), "-o", str(published.path), "--json")
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1
    result = run(str(published.path), "-o", str(tmp_path / "out"), "--code-bits", "8")
    assert result.exit_code == 2 and "--transcode" in result.stderr
