#!/usr/bin/env python3
"""Keep spec/reference_decoder.py running for the conformance suite (`serve` of PROTOCOL.md)."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "spec"))

import reference_decoder  # type: ignore[import-not-found, unused-ignore]


def main() -> int:
    if sys.argv[1:] != ["serve"]:
        return int(reference_decoder.main(sys.argv[1:]))
    print(json.dumps({"protocol": 1, "name": "reference_decoder.py"}), flush=True)
    for line in sys.stdin:
        command, source, out, *mode = line.rstrip("\n").split("\t")
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            status = reference_decoder.main([command, source, "--out", out, *(["--deep"] if mode == ["deep"] else [])])
        print(output.getvalue().strip() if status in (0, 1) else json.dumps({"unsupported": command}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
