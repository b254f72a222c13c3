#!/usr/bin/env python3
"""Drive the qmoecodec package by the protocol of the conformance suite (PROTOCOL.md), through its public API alone."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import qmoecodec as q


def restore(path: Path, out: Path) -> int:
    """Unpack, and write each tensor of the dense file into a file of its own."""
    with tempfile.TemporaryDirectory(prefix="adapter-") as folder:
        dense = Path(folder) / "dense.safetensors"
        q.unpack(path, dense)
        content = dense.read_bytes()
    n = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + n])
    header.pop("__metadata__", None)
    n_tensors = len(header)
    out.mkdir()
    with open(out / "tensors.json", "w") as listing:
        for i in range(n_tensors):  # what is written is forgotten: this counts as the package's memory
            name, entry = header.popitem()
            begin, end = entry["data_offsets"]
            (out / f"{i}.bin").write_bytes(content[8 + n + begin : 8 + n + end])
            listed = {"name": name, "dtype": entry["dtype"], "shape": entry["shape"], "file": f"{i}.bin"}
            listing.write(("," if i else "[") + json.dumps(listed))
        listing.write("]" if n_tensors else "[]")
    return n_tensors


def decode(path: Path, out: Path, *, deep: bool) -> dict[str, Any]:
    """Answer a request: what `unpack` says, which is what `verify` finds, or what that finds beyond the values."""
    report = q.verify(path, deep=deep)
    found = report.problems[0].reason if report.problems else None
    try:
        n_tensors = restore(path, out)
    except q.FormatError as error:
        if found != error.reason:
            raise AssertionError(f"unpack says {error.reason}, verify {found}") from error
        return {"error": error.reason}
    if found not in (None, "not_canonical"):
        raise AssertionError(f"unpack accepts, verify says {found}")
    return {"accepted": n_tensors} if found is None else {"error": found}


def answer(fields: list[str]) -> dict[str, Any]:
    if fields[0] == "decode":
        return decode(Path(fields[1]), Path(fields[2]), deep=fields[3:] == ["deep"])
    q.pack(Path(fields[1]), Path(fields[2]))
    return {"accepted": 1}


def warm_up() -> None:
    """Compile, or load, what the first request would otherwise wait for."""
    q.decode(q.encode(np.array([[0, 1, -1, 0]], dtype=np.int8)))


def main(arguments: list[str]) -> int:
    if arguments == ["serve"]:
        warm_up()
        print(json.dumps({"protocol": 1, "name": f"qmoecodec {q.__version__}"}), flush=True)
        for line in sys.stdin:
            print(json.dumps(answer(line.rstrip("\n").split("\t"))), flush=True)
        return 0
    if len(arguments) not in (4, 5) or arguments[0] not in ("decode", "encode") or arguments[2] != "--out":
        print(__doc__, file=sys.stderr)
        return 2
    result = answer([arguments[0], arguments[1], arguments[3], *(["deep"] if arguments[4:] == ["--deep"] else [])])
    print(json.dumps(result))
    return 0 if "accepted" in result else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
