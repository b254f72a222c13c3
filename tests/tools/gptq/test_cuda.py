"""The solver's kernel against the same loop in torch operators: on the host (tests/gpu/emulation) and on the device."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qmoe_gptq
from qmoe_gptq import gptq
from qmoe_gptq.experts import Matrix, code_lengths, hessian, quantize_group, round_levels
from qmoe_gptq.model import SwitchConfig
from qmoe_gptq.settings import Settings

SOURCE = Path(qmoe_gptq.__file__).parent / "solve_block.cu"
CONFIG = {
    "model_type": "switch_transformers", "d_model": 160, "d_ff": 192, "d_kv": 32, "num_heads": 5, "num_layers": 2,
    "num_experts": 3, "vocab_size": 96,
}  # fmt: skip
NVCC = shutil.which("nvcc")
# experts, rows, columns: within and beyond a block of threads, a stretch of columns in registers and a block of the solver.
SHAPES = [(1, 1, 1), (2, 3, 31), (3, 130, 40), (2, 128, 96), (1, 257, 161), (2, 7, 300)]


def problem(shape: tuple[int, int, int], device: str) -> tuple[torch.Tensor, torch.Tensor, gptq.Factors]:
    """Draw weights, levels and factors; one input is dead, one row has no weight below 0 and one none at all."""
    experts, rows, cols = shape
    g = torch.Generator().manual_seed(sum(shape))
    weights = torch.randn(shape, generator=g)
    weights[0, 0] = weights[0, 0].abs()
    weights[-1, rows // 2] *= rows == 1
    inputs = torch.randn(experts, 2 * cols, cols, generator=g) @ torch.randn(cols, cols, generator=g)
    inputs[..., cols // 2] *= cols == 1
    levels = round_levels(gptq.extreme_levels(weights), torch.bfloat16)
    return weights.to(device), levels.to(device), gptq.factorize(hessian(list(inputs.to(device)), None), damping=0.1)


def check_against_operators(
    solve_block: Callable[..., torch.Tensor], shape: tuple[int, int, int], price: float, device: str, block: int
) -> None:
    """Solve blocks with a kernel and with operators: errors and margins are the same bits."""
    weights, levels, factors = problem(shape, device)
    bits = code_lengths(0.9).expand(len(weights), 3).to(device)
    w = weights.transpose(-1, -2).masked_fill(factors.dead[:, :, None], 0.0).contiguous()
    diagonal = factors.upper.diagonal(dim1=-2, dim2=-1)
    edges = gptq.Edges(weights, levels[..., 0], levels[..., 1], diagonal, price=price, bits=bits)
    expected, margin = torch.empty_like(w), torch.full_like(w, torch.nan)
    digits = set()
    for start in range(0, shape[2], block):
        stop = min(start + block, shape[2])
        upper, own = factors.upper[:, start:stop, start:stop], w[:, start:stop]
        given = (own, upper, levels[..., 0], levels[..., 1], *edges.of(start, stop))
        before = own.clone()
        wanted = gptq._solve_block(*given, margin=expected[:, start:stop])
        errors = solve_block(*given, margin=margin[:, start:stop])
        assert torch.equal(errors, wanted) and torch.equal(own, before)
        assert torch.equal(margin[:, start:stop], expected[:, start:stop])
        digits |= set(((expected[:, start:stop] > 1).int() - (expected[:, start:stop] < -1).int()).unique().tolist())
    assert torch.isfinite(margin).all() and (digits == {-1, 0, 1} or w.numel() < 1000)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Compile the kernel for the host."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    sys.path.insert(0, str(Path(__file__).parents[2] / "gpu" / "emulation"))
    import build

    return build.Kernel(tmp_path_factory.mktemp("kernel"), str(SOURCE), "solve_block", {"u32": "unsigned"})


@pytest.fixture
def emulated(built: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., torch.Tensor]:
    """Let the kernel run on the host."""
    if importlib.util.find_spec("cupy") is None:
        monkeypatch.setitem(sys.modules, "cupy", types.ModuleType("cupy"))
    from qmoe_gptq import cuda

    def launch(device: object, kernel: Any, grid: object, threads: int, arguments: object, *, shared_bytes: int) -> None:
        kernel(grid, threads, shared_bytes, 7, arguments)

    # On CUDA the operator rounds the product and then the difference, as the kernel does; on the CPU it rounds once.
    monkeypatch.setattr(torch.Tensor, "addcmul_", lambda self, a, b, *, value: self.add_(a * b, alpha=value))
    monkeypatch.setattr(cuda, "_kernel", lambda device: built)
    monkeypatch.setattr(cuda.modules, "launch", launch)
    return cuda.solve_block


@pytest.mark.parametrize("block", [40, 128])
@pytest.mark.parametrize("price", [0.0, 0.6, -0.4])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_on_the_host_gives_the_same_bits(
    emulated: Callable[..., torch.Tensor], shape: tuple[int, int, int], price: float, block: int
) -> None:
    check_against_operators(emulated, shape, price, "cpu", block)


def test_what_the_kernel_cannot_take_is_an_error(emulated: Callable[..., torch.Tensor]) -> None:
    w, rows = torch.ones(1, 4, 6), torch.ones(1, 6)
    with pytest.raises(ValueError, match="adjacent"):
        emulated(w, torch.eye(4)[None], -rows, rows, w, w, margin=torch.empty(1, 6, 4).transpose(1, 2))
    with pytest.raises(TypeError, match="float32"):
        emulated(w, torch.eye(4).double()[None], -rows, rows, w, w, margin=torch.empty_like(w))


@pytest.mark.gpu
@pytest.mark.parametrize("price", [0.0, 0.6, -0.4])
@pytest.mark.parametrize("shape", [*SHAPES, (5, 768, 700), (2, 3000, 300)])
def test_the_kernel_on_the_device_gives_the_same_bits(shape: tuple[int, int, int], price: float) -> None:
    from qmoe_gptq import cuda

    for block in (1, 40, 128):
        check_against_operators(cuda.solve_block, shape, price, "cuda", block)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["gptq-2023", "gptq"])
def test_a_group_on_the_device_gets_the_digits_of_the_operators(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from qmoe_gptq import cuda

    g = torch.Generator().manual_seed(0)
    wi, wo = torch.randn(3, 192, 160, generator=g).cuda(), torch.randn(3, 160, 192, generator=g).cuda()
    tokens = list((torch.randn(3, 500, 160, generator=g) @ torch.randn(160, 160, generator=g)).cuda())
    shares = list(torch.rand(3, 500, generator=g).cuda())
    settings = Settings(method=method, device="cuda")

    def quantize() -> dict[str, Matrix]:
        return quantize_group(
            SwitchConfig.from_json(CONFIG), wi, wo, tokens, shares, settings=settings, dtype=torch.bfloat16, target_bits=None
        )

    new = quantize()
    monkeypatch.setattr(cuda, "solve_block", gptq._solve_block)
    old = quantize()
    for which in ("wi", "wo"):
        assert torch.equal(new[which].ternary.digits, old[which].ternary.digits)
        assert torch.equal(new[which].ternary.levels, old[which].ternary.levels)


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_the_kernel_compiles_without_spills(architecture: str, tmp_path: Path) -> None:
    command = [str(NVCC), "-std=c++17", "--fmad=false", f"-arch={architecture}", "-cubin", "-Xptxas", "-v", str(SOURCE)]
    done = subprocess.run([*command, "-o", str(tmp_path / "out.cubin")], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    assert " 0 bytes spill stores" in done.stderr, done.stderr
