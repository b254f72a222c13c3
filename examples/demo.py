"""The main job on the example model, in two parts; `make demo` runs both.

1. A ternary checkpoint: pack, inspect, verify, read a few rows, unpack, compare byte for byte.
2. A bf16 checkpoint: quantize it to ternary below one bit per weight, evaluate it beside the original, generate text.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from rich.console import Console
from rich.table import Table

import qmoecodec
from qmoecodec import inspect

HERE = pathlib.Path(__file__).parent
MODEL = HERE / "switch-pycode-4e"
#: A quarter of the calibration samples and half of the tuning, so that the demo takes under two minutes on two cores.
SAMPLES, EPOCHS = 256, 4
PROMPT = "def read_config(path):\n    with open(path) as f:\n        <extra_id_0>\n    return config"


class Steps:
    """A table of steps with their results and times."""

    def __init__(self, title: str) -> None:
        self.table = Table(title=title, title_justify="left")
        self.table.add_column("step")
        self.table.add_column("result")
        self.table.add_column("seconds", justify="right")
        self._clock = time.perf_counter()

    def note(self, step: str, result: str) -> None:
        """Add a step that ends now."""
        now = time.perf_counter()
        self.table.add_row(step, result, f"{now - self._clock:.2f}")
        self._clock = now


def codec(console: Console, folder: pathlib.Path) -> bool:
    """Store a ternary checkpoint and get it back."""
    steps = Steps("the ternary twin of switch-pycode-4e")
    dense, packed, again = (folder / f"{name}.safetensors" for name in ("dense", "packed", "again"))
    subprocess.run([sys.executable, HERE / "make_ternary.py", dense], check=True)
    steps.note("make_ternary.py", f"{dense.stat().st_size:,} bytes")

    report = qmoecodec.pack(dense, packed)
    steps.note("pack", f"{packed.stat().st_size:,} bytes, {len(report.groups)} groups of experts; the rest as it is")

    description = inspect.inspect(packed)
    bits = description["totals"]["bits_per_weight"]
    steps.note("inspect", f"{bits:.4f} bits per expert weight, row metadata and dictionaries included")

    verdict = qmoecodec.verify(packed, deep=True)
    steps.note("verify --deep", "fine" if verdict.ok else f"{len(verdict.problems)} problems")

    with qmoecodec.open(packed) as file:
        group = next(iter(file.groups.values()))
        digits = group.expert(3).rows(10, 20)
    steps.note("read 10 rows of one expert", f"{group.name}, expert 3: {(digits != 0).mean():.1%} of them nonzero")

    qmoecodec.unpack(packed, again)
    same = dense.read_bytes() == again.read_bytes()
    steps.note("unpack, compare", "the same file, byte for byte" if same else "NOT the same file")

    console.print(inspect.render({**description, "path": "packed.safetensors"}), highlight=False)
    console.print()
    console.print(steps.table, highlight=False)
    return same and bool(verdict.ok) and bits < 1


def command(*words: object) -> dict[str, Any]:
    """Run a command of `qmoecodec` as a user would, and return what it prints as JSON."""
    program = pathlib.Path(sys.executable).with_name("qmoecodec")
    run = subprocess.run([program, *map(str, words), "--json"], check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(run.stdout)
    return result


def end_to_end(console: Console, folder: pathlib.Path) -> bool:
    """Compress a bf16 model and run it from the compressed form."""
    steps = Steps("from bf16 to text generated from sub-1-bit weights")
    compressed = folder / "compressed"
    command("quantize", MODEL, "--calibration", MODEL / "calibration.npz", "-o", compressed,
            "--samples", SAMPLES, "--epochs", EPOCHS)  # fmt: skip
    steps.note("quantize", f"{SAMPLES} of 1024 calibration samples, {EPOCHS} epochs of tuning")

    totals = command("inspect", compressed)["totals"]
    payload = totals["payload_bits_per_weight"]
    steps.note("inspect", f"{totals['zeros']:.1%} zeros, {payload:.4f} bits per weight without row metadata")

    losses = command("evaluate", compressed, "--data", MODEL / "validation.npz", "--reference", MODEL)
    steps.note("evaluate", f"{losses['n_tokens']:,} label tokens, from the compressed experts and from bf16")

    text = command("generate", compressed, "--prompt", PROMPT, "--max-new-tokens", 24)
    steps.note("generate", "from the compressed experts")

    outcome = Table(title="switch-pycode-4e", title_justify="left")
    for column in ("experts", "bits per weight, all included", "expert bytes", "validation loss"):
        outcome.add_column(column, justify="left" if column == "experts" else "right")
    dense_bytes = 2 * totals["n_weights"]
    packed_bytes = round(totals["bits_per_weight"] * totals["n_weights"] / 8)
    outcome.add_row("bf16", "16", f"{dense_bytes:,}", f"{losses['reference']['loss']:.3f}")
    outcome.add_row("compressed", f"{totals['bits_per_weight']:.4f}", f"{packed_bytes:,}", f"{losses['loss']:.3f}")
    console.print(steps.table, highlight=False)
    console.print()
    console.print(outcome, highlight=False)
    console.print(f"\nprompt:\n{PROMPT}\n\ngenerated:\n{text['sequences'][0]['text']}", highlight=False, markup=False)
    return totals["bits_per_weight"] < 1 and losses["loss"] < losses["reference"]["loss"] + 0.18


def main() -> int:
    """Run both parts and return the exit code."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    with tempfile.TemporaryDirectory() as folder:
        fine = codec(console, pathlib.Path(folder))
        console.print()
        fine &= end_to_end(console, pathlib.Path(folder))
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
