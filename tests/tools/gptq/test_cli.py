"""The command line: what it prints, where, and how it fails."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from qmoe_gptq import run as module
from qmoe_gptq.cli import quantize
from qmoecodec.cli import main


def call(*arguments: Any) -> Result:
    """Run the command within a group of the kind that `qmoecodec` is, without the entry points of an installation."""
    group = type(main)(commands={"quantize": quantize})
    return CliRunner().invoke(group, ["quantize", *(str(a) for a in arguments)])


def test_dry_run_estimates_and_writes_nothing(model_dir: Path, tokens: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    result = call(model_dir, "--calibration", tokens, "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["tune"] == "model" and plan["memory_bytes"] > 1e6
    assert plan["seconds"]["total"] == pytest.approx(sum(v for k, v in plan["seconds"].items() if k != "total"))
    assert sorted(tmp_path.rglob("*")) == before
    shown = call(model_dir, "--calibration", tokens, "--dry-run")
    assert "peak memory" in shown.stdout


def test_json_is_all_that_stdout_gets(model_dir: Path, tokens: Path, tmp_path: Path) -> None:
    result = call(model_dir, "--calibration", tokens, "-o", tmp_path / "o", "--tune", "none", "--format", "dense", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["schema"] == 1 and report["estimated"]["memory_bytes"] > 0 and report["peak_memory_bytes"] > 0
    assert (tmp_path / "o" / "model.safetensors").exists()


def test_the_report_shows_coverage(model_dir: Path, tokens: Path, tmp_path: Path) -> None:
    result = call(model_dir, "--calibration", tokens, "-o", tmp_path / "o", "--method", "gptq-2023", "--format", "dense")
    assert result.exit_code == 0, result.output
    assert "tokens per expert" in result.stdout and "encoder.block.1.layer.1: " in result.stdout


def test_packed_output_unpacks_to_the_dense_one(model_dir: Path, tokens: Path, tmp_path: Path) -> None:
    codec = pytest.importorskip("qmoecodec")
    for form in ("packed", "dense"):
        result = call(model_dir, "--calibration", tokens, "-o", tmp_path / form, "--tune", "none", "--format", form)
        assert result.exit_code == 0, result.output
    codec.unpack(tmp_path / "packed", tmp_path / "restored")
    assert (tmp_path / "packed" / "config.json").exists() and (tmp_path / "packed" / "tokenizer.json").exists()
    restored, dense = (tmp_path / name / "model.safetensors" for name in ("restored", "dense"))
    from safetensors.torch import load_file

    a, b = load_file(restored), load_file(dense)
    assert a.keys() == b.keys() and all((a[name] == b[name]).all() and a[name].dtype == b[name].dtype for name in a)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target-bits", "0.2"], "outside 0.3..1.58"),
        (["--method", "rtn", "--target-bits", "1.0"], "needs --method gptq"),
        (["--method", "rtn", "--tune", "block"], "needs --method gptq"),
        (["--token-cap", "0.5"], "token cap"),
        (["--damping", "0"], "damping"),
        (["--damping", "inf"], "damping"),
        (["--token-cap", "inf"], "token cap"),
        (["--epochs", "inf"], "epochs"),
        (["--seed", "-1"], "seed"),
        (["--max-fallback", "nan"], "max fallback"),
        (["--calibration", "nowhere.npz"], "no such file"),
    ],
)
def test_mistakes_are_one_line(model_dir: Path, tokens: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = call(model_dir, "--calibration", tokens, "-o", tmp_path / "o", *arguments)
    assert result.exit_code == 1
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "o").exists() and not (tmp_path / "o.work").exists()


def test_output_is_required(model_dir: Path, tokens: Path) -> None:
    result = call(model_dir, "--calibration", tokens)
    assert result.exit_code == 2 and "--output" in result.stderr


def test_a_missing_device_is_an_error(model_dir: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.planning.torch.cuda, "is_available", lambda: False)
    result = call(model_dir, "--calibration", tokens, "-o", tmp_path / "o", "--device", "cuda")
    assert result.exit_code == 1 and "CUDA" in result.stderr


def test_a_device_without_cupy_is_an_error(
    model_dir: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.planning.torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "cupy", None)
    result = call(model_dir, "--calibration", tokens, "-o", tmp_path / "o", "--device", "cuda")
    assert result.exit_code == 1 and "pip install 'qmoecodec[cuda]'" in result.stderr


def test_errors_are_json_too(model_dir: Path, tokens: Path, tmp_path: Path) -> None:
    result = call(model_dir, "--calibration", tokens, "-o", tmp_path / "o", "--damping", "0", "--json")
    assert result.exit_code == 1 and "damping" in json.loads(result.stdout)["error"]["message"]


def test_a_target_out_of_reach_is_said(make_model: Callable[..., Path], tokens: Path, tmp_path: Path) -> None:
    directory = make_model(sizes={"d_ff": 3, "d_model": 7, "d_kv": 4, "num_heads": 1})
    arguments = (directory, "--calibration", tokens, "-o", tmp_path / "o", "--tune", "none", "--target-bits", "0.3", "--json")
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    payload = json.loads(result.stdout)["payload_bits_per_weight"]
    assert payload > 0.4 and f"note: --target-bits 0.3 was missed: the payload has {payload:.4f}" in result.stderr


def test_a_random_model_needs_an_option(
    model_dir: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check_fit: Any
) -> None:
    monkeypatch.setattr(module, "check_fit", check_fit)
    arguments = (model_dir, "--calibration", tokens, "-o", tmp_path / "o", "--method", "rtn", "--format", "dense")
    result = call(*arguments)
    assert result.exit_code == 1 and "--no-check-fit" in result.stderr
    assert call(*arguments, "--no-check-fit").exit_code == 0


def test_samples_without_labels_are_refused(model_dir: Path, samples: Callable[..., Any], tmp_path: Path) -> None:
    arrays = samples(4)
    arrays["labels"][0] = -100
    np.savez(tmp_path / "t.npz", **arrays)
    result = call(model_dir, "--calibration", tmp_path / "t.npz", "-o", tmp_path / "o", "--samples", 1)
    assert result.exit_code == 1 and "no label counts" in result.stderr
    result = call(model_dir, "--calibration", tmp_path / "t.npz", "-o", tmp_path / "o", "--batch", 1, "--epochs", 1)
    assert result.exit_code == 0, result.output  # a step without labels teaches nothing, and does no harm


def test_a_link_is_not_an_output(model_dir: Path, tokens: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "o").symlink_to("there")
    result = call(model_dir, "--calibration", tokens, "-o", tmp_path / "o", "--method", "rtn")
    assert result.exit_code == 1 and "exists already" in result.stderr and not (tmp_path / "o.work").exists()
