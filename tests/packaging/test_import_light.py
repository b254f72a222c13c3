"""Importing the core does no work and pulls in nothing heavy."""

import json
import subprocess
import sys

HEAVY = {"torch", "cupy", "numba", "llvmlite", "click", "rich", "hypothesis", "transformers"}


def test_import_of_the_core_loads_nothing_heavy() -> None:
    program = "import json, sys, qmoecodec; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-P", "-c", program], check=True, capture_output=True, text=True)
    loaded = set(json.loads(done.stdout))
    assert "qmoecodec" in loaded
    assert loaded & HEAVY == set()
    assert done.stderr == ""
