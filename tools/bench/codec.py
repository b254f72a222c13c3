"""Time the codec on one core beside its alternatives, all in one run: `make bench`.

Encoding, decoding and the fused product are compared with zstd over five digits a byte and with numpy's float32 product.
Each figure is the best of several runs over distinct inputs, in billions of weights per second.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[_name] = "1"

import numpy as np  # noqa: E402
import zstandard  # noqa: E402

import qmoecodec as q  # noqa: E402
from qmoecodec.dictionary import aivf, qmoe2023  # noqa: E402


def best(run: Callable[[int], object], *, repeats: int) -> float:
    """Return the least seconds of several runs, after one to warm up; run(i) uses the i-th of distinct inputs."""
    run(0)
    times = []
    for i in range(repeats):
        start = time.perf_counter()
        run(i)
        times.append(time.perf_counter() - start)
    return min(times)


def independent(rng: np.random.Generator, p_zero: float, shape: tuple[int, int]) -> np.ndarray:
    """Return independent ternary digits with P(-) = P(+)."""
    u = rng.random(shape, dtype=np.float32)
    return np.where(u < p_zero, 0, np.where(u < (1 + p_zero) / 2, 1, -1)).astype(np.int8)


def five_per_byte(digits: np.ndarray) -> bytes:
    """Pack digits at the fixed rate of 1.6 bits."""
    flat = np.zeros(-(-digits.size // 5) * 5, np.uint8)
    flat[: digits.size] = (digits.reshape(-1) + 1).astype(np.uint8)
    weights = np.array([1, 3, 9, 27, 81], np.uint8)
    return (flat.reshape(-1, 5) * weights).sum(1, dtype=np.uint8).tobytes()


def entropy(digits: np.ndarray) -> float:
    """Return bits per digit of independent digits with the same counts."""
    counts = np.array([(digits == v).sum() for v in (-1, 0, 1)])
    p = counts[counts > 0] / digits.size
    return float(-(p * np.log2(p)).sum())


def compare(rng: np.random.Generator, p_zero: float, shape: tuple[int, int], repeats: int) -> None:
    """Print one line for each code at one sparsity."""
    n = shape[0] * shape[1]
    inputs = [independent(rng, p_zero, shape) for _ in range(4)]
    limit = entropy(inputs[0])
    levels = np.stack([-rng.random(shape[0]), rng.random(shape[0])], 1).astype(np.float32)
    x = rng.standard_normal(shape[1]).astype(np.float32)
    out = np.empty(shape, np.int8)
    p = (1 - p_zero) / 2

    def line(name: str, rate: float | None, *seconds: float | None) -> None:
        size = f"{rate:>12.4f} {rate / limit:>10.4f}" if rate else f"{'':>12} {'':>10}"
        print(f"{p_zero:>6} {name:>10} {size} " + " ".join(f"{n / s / 1e9:>8.2f}" if s else f"{'-':>8}" for s in seconds))
        sys.stdout.flush()

    for name in ("8 bit", "12 bit", "16 bit", "qmoe-2023"):
        d = qmoe2023.table() if name == "qmoe-2023" else aivf.build(p, p_zero, p, code_bits=int(name.split()[0]))
        encoded = [q.encode_rows(i, dictionary=d) for i in inputs]

        def encode(i: int, d: q.Dictionary = d) -> object:
            return q.encode_rows(inputs[i % 4], dictionary=d)

        def decode(i: int, d: q.Dictionary = d, encoded: list[tuple[np.ndarray, np.ndarray]] = encoded) -> object:
            return q.decode_rows(*encoded[i % 4], cols=shape[1], dictionary=d, out=out)

        def matvec(i: int, d: q.Dictionary = d, encoded: list[tuple[np.ndarray, np.ndarray]] = encoded) -> object:
            return q.matvec_rows(*encoded[i % 4], levels, x, dictionary=d)

        line(name, 8 * len(encoded[0][0]) / n, *(best(f, repeats=repeats) for f in (encode, decode, matvec)))

    packed = [five_per_byte(i) for i in inputs]
    for level in (3, 19):
        compressor, decompressor = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()
        files = [compressor.compress(b) for b in packed]

        def compress(i: int, compressor: zstandard.ZstdCompressor = compressor) -> object:
            return compressor.compress(packed[i % 4])

        def decompress(i: int, files: list[bytes] = files, by: zstandard.ZstdDecompressor = decompressor) -> object:
            return by.decompress(files[i % 4])

        seconds = best(compress, repeats=1 if level > 10 else 3), best(decompress, repeats=repeats)
        line(f"zstd -{level}", 8 * len(files[0]) / n, *seconds, None)
    dense = [np.where(i < 0, levels[:, :1], np.where(i > 0, levels[:, 1:], 0)).astype(np.float32) for i in inputs]
    line("float32", None, None, None, best(lambda i: dense[i % 4] @ x, repeats=repeats))


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2080)
    parser.add_argument("--cols", type=int, default=6144)
    parser.add_argument("--zeros", type=float, nargs="+", default=[0.3334, 0.5, 0.8, 0.885, 0.95])
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    rng = np.random.default_rng(2310)
    print(
        f"{options.rows} x {options.cols}, one core, Python {platform.python_version()}, numpy {np.__version__}, "
        f"{platform.machine()}, best of {options.repeats}; billion weights/s. zstd works on 5 digits a byte, and its time "
        "leaves out packing and unpacking those; float32 is numpy's W @ x."
    )
    print(f"{'P(0)':>6} {'code':>10} {'bits/weight':>12} {'x entropy':>10} {'encode':>8} {'decode':>8} {'matvec':>8}")
    for p_zero in options.zeros:
        compare(rng, p_zero, (options.rows, options.cols), options.repeats)


if __name__ == "__main__":
    main()
