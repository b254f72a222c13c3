"""The kernels compile for every architecture that they are meant for, where there is an nvcc."""

import pathlib
import re
import shutil
import subprocess

import pytest

import qmoecodec_gpu
from qmoecodec_gpu import plan

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
}


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_decoder_to_rows_compiles(architecture, tmp_path):
    for size, kind in ((1, 0), (2, 0), (2, 1)):
        options = [f"-DOUT_BYTES={size}", f"-DLEVEL_KIND={kind}", "-DX_F16=1"]
        report = compile_kernel("decode_digits.cu", options, architecture, tmp_path)
        assert set(re.findall(r"(\d+) bytes spill stores", report)) == {"0"}, report


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("file", sorted(FORMS))
@pytest.mark.parametrize(
    "architecture",
    ["sm_80", pytest.param("sm_86", marks=pytest.mark.long), pytest.param("sm_89", marks=pytest.mark.long), "sm_90"],
)
def test_compiles(file, architecture, tmp_path):
    report = compile_kernel(file, FORMS[file], architecture, tmp_path)
    assert "Performance Loss" not in report, report
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", report)]
    assert max(spilled) <= 64, report  # in the prologue of an item; the loop over rows has none


PRODUCTS = [
    plan.plan_multiply(groups, max_shared_bytes=232448).macros(is_f16=is_f16)
    for groups in (2, 3)
    for is_f16 in (False, True)
]


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("macros", PRODUCTS, ids=lambda m: f"{m['GROUPS']}-{m['X_F16']}")
def test_products(macros, tmp_path):
    """No product waits for another (C7510 and on), and nothing is spilled."""
    report = compile_kernel("multiply_digits.cu", [f"-D{k}={v}" for k, v in macros.items()], "sm_90a", tmp_path)
    assert not re.search(r"C75\d\d", report), report
    assert re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", report) == [("0", "0")], report


def compile_kernel(file, options, architecture, folder):
    """Compile for the architecture; return what the compiler says."""
    # Where dynamic shared memory begins differs (modules.shared_base), and a wrong number leaves a kernel that only traps.
    base = "-DSHARED_BASE=1024" if architecture.startswith("sm_90") else "-DSHARED_BASE=0"
    target = f"arch=compute_{architecture.removeprefix('sm_')},code={architecture}"
    command = [NVCC, "-std=c++17", "-gencode", target, "-cubin", "-Xptxas", "-v", base, *options]
    done = subprocess.run(
        [*command, str(KERNELS / file), "-o", str(folder / "out.cubin")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    return done.stderr
