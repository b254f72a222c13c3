"""The main job on the example model: make the ternary twin, pack, inspect, verify, unpack, compare. `make demo` runs it."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import tempfile
import time

from rich.console import Console
from rich.table import Table

import qmoecodec
from qmoecodec import inspect

HERE = pathlib.Path(__file__).parent


def main() -> int:
    """Run all steps and print two tables; return the exit code."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    steps = Table(title="the ternary twin of switch-pycode-4e", title_justify="left")
    steps.add_column("step")
    steps.add_column("result")
    steps.add_column("seconds", justify="right")
    clock = time.perf_counter()

    def note(step: str, result: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        steps.add_row(step, result, f"{now - clock:.2f}")
        clock = now

    with tempfile.TemporaryDirectory() as folder:
        dense, packed, again = (pathlib.Path(folder) / f"{name}.safetensors" for name in ("dense", "packed", "again"))
        subprocess.run([sys.executable, HERE / "make_ternary.py", dense], check=True)
        note("make_ternary.py", f"{dense.stat().st_size:,} bytes")

        report = qmoecodec.pack(dense, packed)
        note("pack", f"{packed.stat().st_size:,} bytes, {len(report.groups)} groups of experts; the rest as it is")

        description = inspect.inspect(packed)
        bits = description["totals"]["bits_per_weight"]
        note("inspect", f"{bits:.4f} bits per expert weight, row metadata and dictionaries included")

        verdict = qmoecodec.verify(packed, deep=True)
        note("verify --deep", "fine" if verdict.ok else f"{len(verdict.problems)} problems")

        with qmoecodec.open(packed) as file:
            group = next(iter(file.groups.values()))
            digits = group.expert(3).rows(10, 20)
        note("read 10 rows of one expert", f"{group.name}, expert 3: {(digits != 0).mean():.1%} of them nonzero")

        qmoecodec.unpack(packed, again)
        same = dense.read_bytes() == again.read_bytes()
        note("unpack, compare", "the same file, byte for byte" if same else "NOT the same file")

        console.print(inspect.render({**description, "path": "packed.safetensors"}), highlight=False)
        console.print()
        console.print(steps, highlight=False)
    return 0 if same and verdict.ok and bits < 1 else 1


if __name__ == "__main__":
    sys.exit(main())
