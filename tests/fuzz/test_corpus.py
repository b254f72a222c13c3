"""The kept inputs of the long fuzz runs, through every decoder that takes files (docs/hardening.md)."""

from __future__ import annotations

import collections
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
if not (ROOT / "tools" / "fuzz").is_dir() or not (ROOT / "conformance" / "vectors").is_dir():
    pytest.skip("the fuzz targets or the vectors are not here", allow_module_level=True)
if shutil.which("cc") is None:
    pytest.skip("no C compiler", allow_module_level=True)
sys.path.append(str(ROOT / "tools"))

from fuzz import files, flips, targets  # noqa: E402


def contents(name: str) -> Iterator[bytes]:
    """Yield the files of a corpus: as they are, and with the checksums made to fit, which `qmoe_fuzz` does not look at."""
    for data in targets.kept(name):
        if name == "file":
            yield files.join(data)
        else:
            yield data
            yield files.join(files.split(data))


@pytest.mark.parametrize("name", ["file", "qmoe_fuzz"])
def test_the_decoders_say_the_same(name: str) -> None:
    reasons: collections.Counter[str | None] = collections.Counter()
    wrong = []
    for content in set(contents(name)):
        reason, found = flips.check("refitted", content, (None, {}))
        reasons[reason] += 1
        if found:
            wrong.append(found)
    assert wrong == []
    assert reasons.total() > 100 and len(reasons) > 20 and reasons[None] > 0, reasons
