"""Pack independent ternary experts and the example model, and print whole-file bits per weight: `make bench`."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import qmoecodec as q
from qmoecodec.inspect import inspect

EXAMPLES = Path(__file__).parents[2] / "examples"


def whole_file(source: Path, target: Path, n_weights: int, **options: object) -> tuple[float, float, float]:
    """Pack one file; return bits/weight of the whole file (dense tensors apart), of the groups, and of their payload."""
    q.pack(source, target, overwrite=True, **options)
    totals = inspect(target)["totals"]
    passthrough = totals.get("passthrough_bytes", 0)
    size = 8 * (target.stat().st_size - passthrough) / n_weights
    return size, totals["bits_per_weight"], totals["payload_bits_per_weight"]


def main() -> None:
    """Print one line per sparsity and choice of dictionary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=2)
    parser.add_argument("--shape", type=int, nargs=2, default=(2080, 6144))
    parser.add_argument("--zeros", type=float, nargs="+", default=[0.95, 0.885, 0.80, 0.50, 0.3334])
    options = parser.parse_args()
    rows, cols = options.shape
    rng = np.random.default_rng(11)
    choices: tuple[dict[str, object], ...] = ({}, {"code_bits": 8}, {"code_bits": 12}, {"dictionary": "qmoe-2023"})
    print(f"{options.experts} experts of {rows} x {cols}, float16 levels; bits/weight")
    print(f"{'P(0)':>8} {'choice':>10} {'file':>8} {'groups':>8} {'payload':>8}")
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "source.safetensors"), Path(folder, "packed.safetensors")
        for p_zero in options.zeros:
            tensors = {}
            for e in range(options.experts):
                u = rng.random((rows, cols), dtype=np.float32)
                low, high = -rng.random((2, rows, 1)).astype(np.float16) - np.float16(0.1)
                tensors[f"mlp.experts.expert_{e}.wi.weight"] = np.where(
                    u < p_zero, np.float16(0), np.where(u < (1 + p_zero) / 2, -high, low)
                ).astype(np.float16)
            save_file(tensors, source)
            for choice in choices:
                figures = whole_file(source, target, options.experts * rows * cols, **choice)
                name = str(next(iter(choice.values()), "auto"))
                print(f"{p_zero:>8} {name:>10} " + " ".join(f"{f:>8.4f}" for f in figures))
                sys.stdout.flush()
        subprocess.run([sys.executable, EXAMPLES / "make_ternary.py", source], check=True)
        for choice in choices:
            figures = whole_file(source, target, 16 * 1024 * 256, **choice)
            name = str(next(iter(choice.values()), "auto"))
            print(f"{'example':>8} {name:>10} " + " ".join(f"{f:>8.4f}" for f in figures))


if __name__ == "__main__":
    main()
