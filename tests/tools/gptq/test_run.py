"""Whole runs on a small model: what comes out, what survives a kill, what is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qmoe_gptq import run as module
from qmoe_gptq.checkpoint import Checkpoint
from qmoe_gptq.errors import QuantizeError

Run = Callable[..., dict[str, Any]]


def is_ternary(matrix: torch.Tensor) -> bool:
    """Tell whether each row holds at most one negative and one positive value."""
    return all(len(row[row < 0].unique()) <= 1 and len(row[row > 0].unique()) <= 1 for row in matrix)


def test_only_experts_change(run: Run, model_dir: Path, tmp_path: Path) -> None:
    run()
    checkpoint = Checkpoint(model_dir)
    before, after = load_file(model_dir / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        if name in checkpoint.expert_names:
            assert is_ternary(after[name]) and not is_ternary(tensor)
        else:
            assert torch.equal(after[name], tensor), name
    assert (tmp_path / "out" / "config.json").read_bytes() == (model_dir / "config.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_tuning_the_model_changes_experts_and_norms_only(run: Run, model_dir: Path, tmp_path: Path) -> None:
    report = run(tune="model")
    before, after = load_file(model_dir / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    experts = set(Checkpoint(model_dir).expert_names)
    assert experts <= changed and all(name.endswith("layer_norm.weight") for name in changed - experts)
    assert not any(name.startswith("encoder.block.0.") for name in changed)
    assert all(is_ternary(after[name]) for name in experts)
    assert report["entropy_bits_per_weight"] <= report["paper_entropy_bits_per_weight"]
    assert report["entropy_bits_per_weight"] > 0.97 * report["paper_entropy_bits_per_weight"]


@pytest.mark.parametrize("tune", ["none", "block", "model"])
def test_sharding_grouping_of_files_and_offload_change_nothing(
    run: Run, make_model: Callable[..., Path], tmp_path: Path, tune: str
) -> None:
    run("one", tune=tune)
    run("many", tune=tune, source=make_model("sharded", shards=3), offload=True)
    one = load_file(tmp_path / "one" / "model.safetensors")
    many: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "many").glob("*.safetensors"):
        many |= load_file(file)
    assert one.keys() == many.keys() and all(torch.equal(one[k], many[k]) for k in one)
    assert not (tmp_path / "many.work").exists()


KILLER = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import qmoe_gptq.run as module, qmoe_gptq.store as store, qmoe_gptq.tune as tune
from qmoe_gptq.run import Options, prepare, quantize_checkpoint
from qmoe_gptq.settings import Settings
model, data, out, mode, when, place = sys.argv[1:]
module.check_fit = lambda *arguments: None
tune.SNAPSHOT_STEPS = 3
count = 0
real = os.replace
def replace(a, b):
    global count
    count += 1
    if count == int(when) and place == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    real(a, b)
    if count == int(when):
        os.kill(os.getpid(), signal.SIGKILL)
store.os.replace = replace
settings = Settings(tune=mode, group=1, epochs=2, batch=8)
options = Options(packed=False)
checkpoint, samples, plan = prepare(Path(model), Path(data), samples=None, settings=settings, options=options)
quantize_checkpoint(checkpoint, samples, plan, Path(out), settings=settings, options=options, progress=lambda m: None)
"""


@pytest.mark.parametrize(
    ("mode", "kills"),
    [
        ("block", [(3, "before"), (2, "after")]),
        ("model", [(9, "after"), (2, "before")]),
    ],
)
def test_a_killed_run_resumes_bit_identically(
    model_dir: Path, tokens: Path, tmp_path: Path, mode: str, kills: list[tuple[int, str]]
) -> None:
    def go(name: str, when: int, place: str) -> int:
        arguments = [str(model_dir), str(tokens), str(tmp_path / name), mode, str(when), place]
        done = subprocess.run([sys.executable, "-c", KILLER, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        return done.returncode

    assert go("whole", 0, "after") == 0
    for when, place in kills:
        assert go("killed", when, place) == -signal.SIGKILL
        assert (tmp_path / "killed.work").is_dir()
        published = tmp_path / "killed"
        # Only the last rename publishes; a kill right after it leaves a whole output.
        assert not published.exists()
    assert go("killed", 0, "after") == 0
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "killed" / file.name).read_bytes(), file.name
    assert {f.name for f in (tmp_path / "whole").iterdir()} == {f.name for f in (tmp_path / "killed").iterdir()}


def test_finished_units_are_used_and_foreign_ones_are_not(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solved: list[int] = []
    real = module.Walk._quantize
    monkeypatch.setattr(module.Walk, "_quantize", lambda self, *a: solved.append(1) or real(self, *a))

    def again(**changes: Any) -> int:
        solved.clear()
        for file in (tmp_path / "out").glob("*") if (tmp_path / "out").exists() else ():
            file.unlink()
        run(keep_work=True, **changes)
        return len(solved)

    assert again() == 4
    assert again() == 0
    assert again(resume=False) == 4
    assert again(seed=1) == 4
    assert again(seed=1) == 0
    (unit, *_) = sorted((tmp_path / "out.work" / "units").iterdir())
    unit.write_bytes(unit.read_bytes()[:50])
    assert again(seed=1) == 1


def test_an_expert_without_tokens_falls_back_and_is_reported(run: Run, make_model: Callable[..., Path], tmp_path: Path) -> None:
    def starve(weights: dict[str, torch.Tensor]) -> None:
        # Its logit is the lowest for every input: minus what another expert gets, and much more.
        router = weights["encoder.block.1.layer.1.mlp.router.classifier.weight"]
        router[2] = 0
        router[0] = -router[1]
        router *= 50

    source = make_model("starved", edit=starve)
    report = run(source=source)
    assert report["coverage"][0]["tokens"][2] == 0
    starved = {(e["expert"], e["matrix"]) for e in report["fallback"] if e["layer"].startswith("encoder")}
    assert starved == {(2, "wi"), (2, "wo")}
    with pytest.raises(QuantizeError, match="max-fallback"):
        run("strict", source=source, max_fallback=0.1)
    assert not (tmp_path / "strict").exists()


@pytest.mark.parametrize(("tune", "bits"), [("none", 0.4), ("block", 1.2), ("model", 0.8), ("model", 1.58)])
def test_target_bits_are_hit_as_the_codec_spends_them(run: Run, make_model: Callable[..., Path], tune: str, bits: float) -> None:
    pytest.importorskip("qmoecodec")
    wide = make_model("wide", sizes={"d_model": 64, "d_ff": 160})
    report = run(source=wide, tune=tune, target_bits=bits)
    assert report["payload_bits_per_weight"] == pytest.approx(bits, rel=0.02)


def test_methods_differ_as_they_should(run: Run) -> None:
    reports = {m: run(m, method=m) for m in ("rtn", "gptq-2023", "gptq")}
    assert reports["rtn"]["zeros"] != reports["gptq-2023"]["zeros"]
    ours = reports["gptq"]
    assert ours["entropy_bits_per_weight"] == pytest.approx(ours["paper_entropy_bits_per_weight"], rel=0.03)
    assert reports["rtn"]["fallback"] == []


def test_special_tokens_are_left_out_of_the_hessian(run: Run) -> None:
    masked, kept = run("masked", mask_special=True), run("kept", mask_special=False)
    # 3 of 24 encoder tokens are sentinels, and 4 of the 10 tokens that the decoder predicts.
    for layer, (length, special) in enumerate([(24, 3), (10, 4)]):
        a, b = masked["coverage"][layer], kept["coverage"][layer]
        assert sum(a["tokens"]) == sum(b["tokens"]) == sum(b["used"]) == 48 * length
        assert b["used"] == b["tokens"]
        if not a["special_used_by"]:
            assert sum(a["used"]) == 48 * (length - special)
    assert not masked["coverage"][0]["special_used_by"]


def test_an_expert_of_special_tokens_only_keeps_them(run: Run, make_model: Callable[..., Path]) -> None:
    report = run(source=make_model("m", seed=5))
    for layer in report["coverage"]:
        for expert in layer["special_used_by"]:
            assert layer["used"][expert] == layer["tokens"][expert]
        for expert, (used, routed) in enumerate(zip(layer["used"], layer["tokens"], strict=True)):
            if expert not in layer["special_used_by"] and routed > used:
                assert used >= 24


def test_token_cap(run: Run) -> None:
    report = run(token_cap=1.0, mask_special=False)
    for layer in report["coverage"]:
        mean = sum(layer["tokens"]) / 4
        assert max(layer["used"]) == int(np.ceil(mean)) < max(layer["tokens"])


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_calibration_data_the_model_cannot_read_is_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check_fit: Any, method: str
) -> None:
    monkeypatch.setattr(module, "check_fit", check_fit)
    with pytest.raises(QuantizeError, match="another model"):
        run(method=method)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.work").exists()


def test_bad_weights_leave_no_output(run: Run, make_model: Callable[..., Path], tmp_path: Path) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["decoder.block.1.layer.2.mlp.experts.expert_3.wo.weight"][0, 0] = float("nan")

    with pytest.raises(QuantizeError, match=r"expert_3\.wo"):
        run(source=make_model("nan", edit=spoil))
    assert not (tmp_path / "out").exists()


def test_an_existing_output_is_not_touched(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(QuantizeError, match="exists already"):
        run()
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert not (tmp_path / "out.work").exists()


def test_the_stored_report_holds_no_clock(run: Run, tmp_path: Path) -> None:
    report = run()
    stored = json.loads((tmp_path / "out" / "quantize.json").read_text())
    assert stored["entropy_bits_per_weight"] == report["entropy_bits_per_weight"]
    assert "seconds" in report and "seconds" not in stored


@pytest.mark.parametrize("content", ["[]", '{"inputs": 1}', "{"])
def test_a_work_directory_with_an_unknown_record_is_begun_anew(run: Run, tmp_path: Path, content: str) -> None:
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "run.json").write_text(content)
    run()
    assert (tmp_path / "out" / "model.safetensors").exists()


FULL_DISK = """
import pathlib, resource, sys, torch
from qmoe_gptq.errors import QuantizeError
from qmoe_gptq.store import save_tensors
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    save_tensors({"x": torch.zeros(100_000)}, pathlib.Path(sys.argv[1]), {})
except QuantizeError as error:
    print(error)
"""


def test_a_file_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path / "x"], capture_output=True, text=True, check=True)
    assert f"{tmp_path / 'x'}: cannot be written (" in done.stdout
