#!/usr/bin/env python3
"""Fuzz one target with atheris for some seconds: `run.py TARGET --seconds N [--corpus DIR] [--findings DIR]`.

Prints one line of JSON: target, executions, seconds, findings, versions. Each finding is kept as a file.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

SLOW_SECONDS = 1.0
ROOM_BYTES = 512 << 20
MOST_FINDINGS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--findings", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()

    import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]

    # What Numba compiles cannot be instrumented.
    compiled = [path.relative_to(ROOT).with_suffix("") for path in ROOT.glob("qmoecodec/**/*.py") if "njit" in path.read_text()]
    with atheris.instrument_imports(include=["qmoecodec"], exclude=[".".join(path.parts) for path in compiled]):
        from fuzz import targets

    target = targets.TARGETS[arguments.target]
    seeds = list(target.seeds())
    scratch = Path(tempfile.mkdtemp(prefix=f"fuzz-{target.name}-"))
    corpus = arguments.corpus or scratch / "corpus"
    findings = arguments.findings or scratch / "findings"
    for folder in (corpus, findings):
        folder.mkdir(parents=True, exist_ok=True)
    for data in seeds:
        (corpus / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    for data in seeds:
        with contextlib.suppress(Exception):  # compile everything; what a seed finds, it finds again below
            target.run(data)

    state: dict[str, Any] = {"executions": 0, "findings": {}, "slowest": 0.0}
    began = time.monotonic()

    def note(key: str, data: bytes, text: str) -> None:
        if key not in state["findings"] and len(state["findings"]) < MOST_FINDINGS:
            path = findings / f"{target.name}-{hashlib.sha256(data).hexdigest()[:12]}"
            path.write_bytes(data)
            path.with_suffix(".txt").write_text(text)
            state["findings"][key] = path.name
            print(f"FINDING {key} {path}", flush=True)

    def finish() -> None:
        found = {
            "target": target.name, "executions": state["executions"], "seconds": round(time.monotonic() - began, 1),
            "slowest_s": round(state["slowest"], 3), "findings": state["findings"],
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10, "python": platform.python_version(),
        }  # fmt: skip
        print(json.dumps(found), flush=True)
        shutil.rmtree(targets.shard_folder().parent, ignore_errors=True)
        if not state["findings"]:
            shutil.rmtree(scratch, ignore_errors=True)
        os._exit(0)

    def one(data: bytes) -> None:
        if time.monotonic() - began > arguments.seconds:
            finish()
        state["executions"] += 1
        start = time.thread_time()
        try:
            target.run(data)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            key = str(error)[:120] if isinstance(error, targets.Finding) else f"{type(error).__name__} {frames[-1].name}"
            note(key, data, traceback.format_exc())
        seconds = time.thread_time() - start
        state["slowest"] = max(state["slowest"], seconds)
        if seconds > SLOW_SECONDS:
            note("slow", data, f"{seconds} s")

    # Whatever asks for more than this gets a MemoryError, which is a finding.
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    options = [f"-max_len={target.longest}", f"-seed={arguments.seed}", "-timeout=20", "-rss_limit_mb=4096",
               f"-artifact_prefix={findings}/{target.name}-crash-", "-verbosity=0", "-len_control=0"]  # fmt: skip
    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
