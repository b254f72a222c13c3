"""The commands `generate` and `evaluate`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import qmoe_switch  # noqa: E402
from qmoe_switch.cli import evaluate, generate  # noqa: E402
from qmoe_switch.text import read_tokenizer, tokenize  # noqa: E402
from qmoecodec.cli import main  # noqa: E402
from qmoecodec.container import pack  # noqa: E402

WORDS = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(3, 50))]


def run(command: Any, *arguments: object) -> Result:
    """Run a command within a group of the kind that `qmoecodec` is, without the entry points of an installation."""
    group = type(main)(commands={command.name: command})
    return CliRunner().invoke(group, [command.name, *(str(a) for a in arguments)])


def write_tokenizer(path: Path, words: list[str]) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))


@pytest.fixture(scope="module")
def directory(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed checkpoint with a tokenizer."""
    path = tmp_path_factory.mktemp("cli") / "packed"
    source = tmp_path_factory.mktemp("cli-source") / "plain"
    shutil.copytree(plain, source)
    write_tokenizer(source, WORDS)
    pack(source, path)
    return path


def test_evaluate_prints_the_loss(directory: Path, plain: Path, tokens_file: Path) -> None:
    result = run(evaluate, directory, "--data", tokens_file, "--json", "--reference", plain, "--batch-size", 2)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    with qmoe_switch.load(plain) as model:
        expected = qmoe_switch.evaluate(model, qmoe_switch.read_tokens(tokens_file, model.vocabulary, labels=True))
    assert report["schema"] == 1 and report["n_tokens"] == expected.n_tokens
    assert report["loss"] == pytest.approx(expected.loss, abs=1e-5)
    assert report["reference"] == {"loss": pytest.approx(expected.loss, abs=1e-6), "n_tokens": expected.n_tokens}
    assert abs(report["difference"]) < 1e-5

    result = run(evaluate, directory, "--data", tokens_file, "--reference", plain, "--limit", 1)
    assert result.exit_code == 0
    assert result.stdout.startswith("loss ") and " over 5 label tokens" in result.stdout
    assert "reference " in result.stdout


def test_generate_from_tokens_needs_no_tokenizer(plain: Path, tokens_file: Path) -> None:
    result = run(generate, plain, "--tokens", tokens_file, "--max-new-tokens", 4, "--json", "--limit", 2)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    with qmoe_switch.load(plain) as model:
        tokens = qmoe_switch.read_tokens(tokens_file, model.vocabulary, labels=False)
        expected = qmoe_switch.generate(model, tokens.slice(0, 2), max_new_tokens=4)
    assert [s["tokens"] for s in report["sequences"]] == [row.tolist() for row in expected.tokens]
    assert [s["text"] for s in report["sequences"]] == [None, None]
    assert report["schema"] == 1 and report["n_tokens"] == expected.n_tokens
    plainly = run(generate, plain, "--tokens", tokens_file, "--max-new-tokens", 4, "--limit", 1)
    assert plainly.stdout.split() == [str(t) for t in expected.tokens[0]]


def test_generate_from_text(directory: Path) -> None:
    arguments = (directory, "--prompt", "w5 w6 w7", "--prompt", "w9 other", "--max-new-tokens", 5)
    result = run(generate, *arguments, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    with qmoe_switch.load(directory) as model:
        ids = np.array([[5, 6, 7, 1], [9, 2, 1, 0]])
        expected = qmoe_switch.generate(model, qmoe_switch.TokenSet(ids, (ids != 0).astype(np.int64)), max_new_tokens=5)
    for sequence, row in zip(report["sequences"], expected.tokens, strict=True):
        assert sequence["tokens"] == row.tolist()
        assert sequence["text"] == " ".join(WORDS[t] for t in row)
    assert run(generate, *arguments).stdout.splitlines() == [s["text"] for s in report["sequences"]]


@pytest.mark.parametrize("split", ["layers", "experts"])
def test_several_devices_give_what_one_gives(directory: Path, tokens_file: Path, split: str) -> None:
    arguments = (directory, "--tokens", tokens_file, "--max-new-tokens", 5)
    several = run(generate, *arguments, "--device", "cpu,cpu", "--split", split, "--no-graph")
    assert several.exit_code == 0, several.output
    assert several.stdout == run(generate, *arguments).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", "a", "--device", "cuda:99"), "CUDA"),
        (("--prompt", "a", "--device", "cpu,cpu,cpu"), "2 sparse layers cannot be spread over 3 devices"),
        (("--prompt", "a", "--device", "tpu"), "not a device"),
        (("--prompt", "a", "--backend", "cuda"), "the backend cuda does not run on cpu"),
        (("--prompt", "w5", "--graph"), "cannot be captured in a CUDA graph: the model is on cpu"),
    ],
)
def test_what_cannot_be_done_is_one_line(directory: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run(generate, directory, *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and message in result.stderr and len(result.stderr.splitlines()) == 1


def test_text_needs_a_tokenizer(plain: Path) -> None:
    result = run(generate, plain, "--prompt", "a")
    assert result.exit_code == 1 and "has no tokenizer.json, so it takes no text" in result.stderr


def test_tokenizer_of_another_model_is_one_line(plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    shutil.copytree(plain, path)
    write_tokenizer(path, [*WORDS, "more"])
    result = run(generate, path, "--prompt", "w5")
    assert result.exit_code == 1 and "has 51 tokens, the model 50: it belongs to another model" in result.stderr
    (path / "tokenizer.json").write_text("{}")
    result = run(generate, path, "--prompt", "w5")
    assert result.exit_code == 1 and "tokenizer.json: not a readable tokenizer" in result.stderr


def test_prompts_are_whole_whatever_the_tokenizer_says_about_batches(plain: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path / "checkpoint"
    shutil.copytree(plain, path)
    write_tokenizer(path, WORDS)
    prompts = ("--prompt", "w5 w9 w30 w12 w7 w41", "--prompt", "w8", "--json")
    before = json.loads(run(generate, path, *prompts).stdout)["sequences"]
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(path / "tokenizer.json"))
    with qmoe_switch.load(path) as model:
        tokens = tokenize(read_tokenizer(path, required=True), ["w5 w9 w30", "w8"], model)
    assert tokens.input_ids.tolist() == [[5, 9, 30, 1], [8, 1, 0, 0]] and tokens.attention_mask.sum() == 6
    assert json.loads(run(generate, path, *prompts).stdout)["sequences"] == before


def test_a_token_beyond_the_vocabulary_is_one_line(plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    shutil.copytree(plain, path)
    write_tokenizer(path, WORDS[:40])
    text = json.loads((path / "tokenizer.json").read_text())
    text["model"]["vocab"]["w5"] = 5000
    (path / "tokenizer.json").write_text(json.dumps(text))
    result = run(generate, path, "--prompt", "w5")
    assert result.exit_code == 1 and "gives token 5000, the model has 50: it belongs to another model" in result.stderr


def test_tokens_of_another_model_are_one_line(plain: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", input_ids=np.array([[4000]]), labels=np.array([[1]]))
    result = run(evaluate, plain, "--data", tmp_path / "t.npz")
    assert result.exit_code == 1
    assert "outside the model's vocabulary of 50 tokens" in result.stderr and len(result.stderr.splitlines()) == 1
    result = run(evaluate, plain, "--data", tmp_path / "t.npz", "--json")
    assert result.exit_code == 1 and "outside the model's" in json.loads(result.stdout)["error"]["message"]


def test_damaged_checkpoint_is_one_line(directory: Path, tokens_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    shutil.copytree(directory, path)
    data = bytearray((path / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "model.safetensors").write_bytes(data[:-1])
    result = run(evaluate, path, "--data", tokens_file)
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: ")


def test_usage_errors_have_exit_code_2(plain: Path, tokens_file: Path) -> None:
    assert run(generate, plain).exit_code == 2
    assert run(generate, plain, "--prompt", "a", "--tokens", tokens_file).exit_code == 2
    assert run(generate, plain, "--prompt", "a", "--limit", 1).exit_code == 2
    assert run(evaluate, plain).exit_code == 2
    assert run(evaluate, plain / "absent", "--data", tokens_file).exit_code == 2
