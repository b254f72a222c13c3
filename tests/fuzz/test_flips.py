"""Prefixes and single-bit flips of small files, on all three decoders; the whole is `make check-long` (docs/hardening.md)."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
if not (ROOT / "tools" / "fuzz").is_dir() or not (ROOT / "conformance" / "vectors").is_dir():
    pytest.skip("the fuzz targets or the vectors are not here", allow_module_level=True)
if shutil.which("cc") is None:
    pytest.skip("no C compiler", allow_module_level=True)
sys.path.append(str(ROOT / "tools"))

from fuzz import flips  # noqa: E402


@pytest.mark.parametrize("name", flips.FILES)
def test_a_sample(name: str) -> None:
    found = flips.run(name, 100, 1)
    assert found["exceptions"] == []
    assert found["cases"] == 100 and len(found["reasons"]) > 4
    assert found["prefix accepted"] == found["flip accepted"] == 0


@pytest.mark.long
@pytest.mark.parametrize("name", flips.FILES)
def test_all(name: str) -> None:
    found = flips.run(name, None, 1)
    assert found["exceptions"] == []
    assert found["prefix"] == found["bytes"] and found["flip"] == 8 * found["bytes"]
    assert found["prefix accepted"] == found["flip accepted"] == 0


def test_a_difference_is_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flips, "by_c", lambda content: ("truncated", {}))
    assert flips.run(flips.FILES[0], 20, 1)["exceptions"]
