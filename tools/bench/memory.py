"""Peak memory and speed of `pack` and `unpack` on a file of gigabytes: `python tools/bench/memory.py [--gigabytes 2.2]`.

Writes an i.i.d. ternary model (2080 x 6144 experts in bf16, P(0) = .885, a few layers, and one dense tensor) to a temporary
directory, packs and unpacks it in processes of their own, and compares their peak resident memory with the bar: the dense
bytes of the largest group x 3 + 300 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

from qmoecodec.container.header import header_bytes, lay_out

ROWS, COLS, EXPERTS = 2080, 6144, 8
PROGRAM = """
import json, time
from qmoecodec.container import pack, unpack
start = time.perf_counter()
{call}
seconds = time.perf_counter() - start
# Not ru_maxrss: across exec that keeps the peak of the process that started this one.
(peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(json.dumps({{"kib": int(peak), "seconds": seconds}}))
"""


def write_model(path: pathlib.Path, n_bytes: int) -> int:
    """Write the model; return the dense bytes of its largest group."""
    group_bytes = EXPERTS * ROWS * COLS * 2
    layers = max(1, round(n_bytes / group_bytes))
    shapes = {
        f"layers.{layer}.mlp.experts.expert_{e}.wi.weight": (ROWS, COLS) for layer in range(layers) for e in range(EXPERTS)
    }
    shapes["embedding.weight"] = (32_000, 1024)
    placed = lay_out((name, "BF16", shape) for name, shape in shapes.items())
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(header_bytes(placed, {"format": "pt"}))
        for name, info in placed.items():
            if "experts" not in name:
                file.write(rng.integers(0, 1 << 16, info.shape, np.uint16).tobytes())
                continue
            draws = rng.random(info.shape, np.float32)
            bits = np.where(draws < 0.885, 0, np.where(draws < 0.9425, 0xBC23, 0x3C23)).astype(np.uint16)
            file.write(bits.tobytes())
    return group_bytes


def measure(call: str) -> dict[str, float]:
    """Run one call in a process of its own."""
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(call=call)], check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def same(a: pathlib.Path, b: pathlib.Path) -> bool:
    """Compare two files."""
    with a.open("rb") as x, b.open("rb") as y:
        while chunk := x.read(1 << 24):
            if chunk != y.read(1 << 24):
                return False
        return not y.read(1)


def main() -> int:
    """Measure, print, and return 1 where the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.2)
    parser.add_argument("--folder", type=pathlib.Path, default=None, help="where the files go for a while")
    options = parser.parse_args()
    good = True
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        dense, packed, again = (pathlib.Path(folder) / f"{name}.safetensors" for name in ("dense", "packed", "again"))
        start = time.perf_counter()
        group_bytes = write_model(dense, int(options.gigabytes * 1e9))
        bar = 3 * group_bytes + 300e6
        size = dense.stat().st_size
        print(f"{size:,} bytes dense, largest group {group_bytes:,}; written in {time.perf_counter() - start:.1f} s")
        print(f"{os.cpu_count()} processors; bar {bar / 1e6:,.0f} MB")
        for name, call in (
            ("pack", f"pack({str(dense)!r}, {str(packed)!r})"),
            ("unpack", f"unpack({str(packed)!r}, {str(again)!r})"),
        ):
            result = measure(call)
            peak = result["kib"] * 1024
            good &= peak <= bar
            print(f"{name:>7}: peak {peak / 1e6:,.0f} MB, {result['seconds']:.1f} s, {size / result['seconds'] / 1e9:.2f} GB/s")
        n_weights = (size - 32_000 * 1024 * 2) // 2
        packed_bits = 8 * (packed.stat().st_size - 32_000 * 1024 * 2) / n_weights
        identical = same(dense, again)
        good &= identical
        print(f"{packed.stat().st_size:,} bytes packed: {packed_bits:.4f} bits per expert weight, header included")
        print(f"unpacked file identical: {identical}; {'within the bar' if good else 'MISSED THE BAR'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
