"""The specification's worked example is what its script writes, says what the codec reads, and breaks when touched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import qmoecodec as q

EXAMPLES = Path(__file__).parents[2] / "spec" / "examples"
MINIMAL = EXAMPLES / "minimal.safetensors"


def test_the_script_writes_what_is_committed(tmp_path: Path) -> None:
    subprocess.run([sys.executable, EXAMPLES / "make_minimal.py", tmp_path], check=True)
    for name in ("minimal.safetensors", "minimal.md"):
        assert (tmp_path / name).read_bytes() == (EXAMPLES / name).read_bytes(), f"run make_minimal.py: {name} differs"
    assert f"{MINIMAL.stat().st_size:,} bytes" in (EXAMPLES.parent / "SPEC.md").read_text()


def test_the_codec_reads_the_example() -> None:
    assert not q.verify(MINIMAL, deep=True).problems
    with q.open(MINIMAL) as f:
        np.testing.assert_array_equal(f["w"].dense(), [[0, 0, 0.25, -0.5, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1]])
        assert f.tensors["b"].tolist() == [7, 9]


def test_every_flipped_bit_and_every_prefix_is_refused(tmp_path: Path) -> None:
    original = MINIMAL.read_bytes()
    path = tmp_path / "damaged.safetensors"

    def refused() -> bool:
        try:
            with q.open(path) as f:
                for group in f:
                    f[group].dense()
                for tensor in f.tensors:
                    f.tensor_bytes(tensor)
        except q.FormatError:
            return True
        return False

    path.write_bytes(original)
    assert not refused()
    with path.open("r+b", buffering=0) as file:  # changed in place: much faster than writing it anew
        for bit in range(8 * len(original)):
            at = bit // 8
            os.pwrite(file.fileno(), bytes([original[at] ^ 1 << bit % 8]), at)
            assert refused(), f"bit {bit % 8} of byte {at}"
            os.pwrite(file.fileno(), original[at : at + 1], at)
        assert not refused()
        for length in reversed(range(len(original))):
            file.truncate(length)
            assert refused(), f"{length} bytes"


@pytest.mark.parametrize("deep", [False, True])
def test_verify_names_the_expert(tmp_path: Path, deep: bool) -> None:
    damaged = bytearray(MINIMAL.read_bytes())
    damaged[1046] ^= 1  # in the codes
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(damaged)
    problems = q.verify(path, deep=deep).problems
    assert [p.reason for p in problems] == ["checksum"]
    assert problems[0].where["expert"] == 0
