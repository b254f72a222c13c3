#!/usr/bin/env python3
"""Every prefix and every single-bit flip of small files, on all three decoders: `flips.py [--sample N --seed S]`.

A prefix and a flip must be rejected, or restore what the file itself restores; with the checksums made to fit again a flip
may mean something else. In each case the package, the C decoder and the reference decoder must say the same: verdict,
reason, and every restored tensor. Prints one line of JSON per file; exits with 1 where there was an exception to this.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import qmoecodec  # noqa: E402
from fuzz import files, native, targets  # noqa: E402

#: Vectors: codewords of each size, tables, layouts, dtypes, keys that are ignored, an encoding that is not canonical.
FILES = (
    "valid/base-8", "valid/base-12", "valid/base-16", "valid/base-f64", "valid/base-table", "valid/base-groups", "valid/x-keys",
    "valid/dictionary-idle", "valid/passthrough-only", "noncanonical/past-incomplete-8",
)  # fmt: skip
Verdict = tuple[str | None, native.Restored]


def cases(file: bytes) -> Iterator[tuple[str, int, bytes]]:
    """Yield (kind, place, content) of every case of a file."""
    for n in range(len(file)):
        yield "prefix", n, file[:n]
    for bit in range(8 * len(file)):
        yield "flip", bit, flipped(file, bit)
    parts = files.split(file)
    if parts[0] != files.REFRESH or files.join(parts) != file:
        raise ValueError("the file cannot be taken apart")
    for bit in range(8, 8 * len(parts)):
        yield "refitted", bit, files.join(flipped(parts, bit))


def flipped(data: bytes, bit: int) -> bytes:
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


def by_package(content: bytes) -> Verdict:
    fd = os.memfd_create("flips")
    try:
        os.write(fd, content)
        path = Path(f"/proc/self/fd/{fd}")
        problems = qmoecodec.verify(path, deep=True).problems
        found = problems[0].reason if problems else None
        reason, restored = targets.outcome(lambda: targets.unpacked(path))
        if reason != (None if found == "not_canonical" else found):
            return f"unpack {reason}, verify {found}", {}
        return found, restored if found is None else {}
    finally:
        os.close(fd)


def by_c(content: bytes) -> Verdict:
    reason = native.verdict(content, deep=True)
    return reason, native.restored() if reason is None else {}


def by_reference(content: bytes) -> Verdict:
    decoder = targets.reference_decoder
    reason, found = targets.outcome(lambda: decoder.decode_files([decoder.File(content)], deep=True))
    return reason, found or {}


def check(kind: str, content: bytes, whole: Verdict) -> tuple[str | None, str]:
    """Return the verdict of the package, and what is wrong with the three: "" where nothing is."""
    ours, c, spec = by_package(content), by_c(content), by_reference(content)
    if not ours == c == spec:
        return ours[0], f"package {ours[0]}, C {c[0]}, reference {spec[0]}" + ("" if ours[0] else ": other tensors")
    if kind != "refitted" and ours[0] is None and ours != whole:
        return ours[0], "accepted with other tensors"
    return ours[0], ""


def run(name: str, sample: int | None, seed: int) -> dict[str, Any]:
    """Run the cases of a vector, or a sample of them, and count the verdicts."""
    file = (ROOT / "conformance" / "vectors" / f"{name}.safetensors").read_bytes()
    whole = by_package(file)
    chosen = list(cases(file))
    if sample is not None:
        chosen = random.Random(f"{name} {seed}").sample(chosen, min(sample, len(chosen)))
    counts: collections.Counter[str] = collections.Counter()
    reasons: collections.Counter[str] = collections.Counter()
    exceptions = []
    start = time.monotonic()
    for kind, place, content in chosen:
        reason, wrong = check(kind, content, whole)
        counts[kind] += 1
        counts[f"{kind} accepted"] += reason is None
        reasons[reason or "accepted"] += 1
        if wrong:
            exceptions.append(f"{kind} {place}: {wrong}")
    return {"file": name, "bytes": len(file), "cases": len(chosen), **counts, "seconds": round(time.monotonic() - start, 1),
            "reasons": dict(reasons.most_common()), "exceptions": exceptions}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, metavar="N", help="this many cases of each file, drawn at random")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", metavar="TEXT", help="files whose name contains this")
    options = parser.parse_args()
    good = True
    for name in FILES:
        if options.only in name:
            found = run(name, options.sample, options.seed)
            print(json.dumps(found), flush=True)
            good = good and not found["exceptions"]
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
