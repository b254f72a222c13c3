"""The kernels compile for every architecture that they are meant for, where there is an nvcc."""

import pathlib
import re
import shutil
import subprocess

import pytest

import qmoecodec_gpu

KERNELS = pathlib.Path(qmoecodec_gpu.__file__).parent / "kernels"
NVCC = shutil.which("nvcc")
FORMS = {
    "rows.cu": ["-DTOK=8"],
    "encode.cu": [],
    "route.cu": [],
    "probe.cu": [],
    "gather.cu": ["-DMAX_TOK=8", "-DTHREADS=512"],
    "tile.cu": [],
    "decode_digits.cu": [],
    "multiply_digits.cu": [],
}
HOPPER = ("multiply_digits.cu",)


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("file", sorted(FORMS))
@pytest.mark.parametrize(
    "architecture",
    ["sm_80", pytest.param("sm_86", marks=pytest.mark.long), pytest.param("sm_89", marks=pytest.mark.long), "sm_90"],
)
def test_compiles(file, architecture, tmp_path):
    if file in HOPPER:
        if architecture != "sm_90":
            pytest.skip("for Hopper alone")
        architecture = "sm_90a"
    # Where dynamic shared memory begins differs (modules.shared_base), and a wrong number leaves a kernel that only traps.
    base = "-DSHARED_BASE=1024" if architecture.startswith("sm_90") else "-DSHARED_BASE=0"
    target = f"arch=compute_{architecture.removeprefix('sm_')},code={architecture}"
    command = [NVCC, "-std=c++17", "-gencode", target, "-cubin", "-Xptxas", "-v", base, *FORMS[file]]
    done = subprocess.run(
        [*command, str(KERNELS / file), "-o", str(tmp_path / "out.cubin")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr and "Performance Loss" not in done.stderr, done.stderr
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", done.stderr)]
    assert max(spilled) <= 64, done.stderr  # in the prologue of an item; the loop over rows has none
