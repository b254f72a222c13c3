"""The example of docs/gpu.md runs, and computes what it says."""

import pathlib
import re

import numpy as np
import pytest

import qmoecodec

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("cupy", reason="needs CuPy")
save_file = pytest.importorskip("safetensors.torch", reason="needs safetensors").save_file
pytestmark = pytest.mark.gpu

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "gpu.md"


def test_example(case, bank, tmp_path, monkeypatch):
    rng = np.random.default_rng(71)
    prefix = "encoder.block.1.layer.1.mlp.experts"
    data = {"wi": case((6, 96, 64), 0.8, bank["8 bit, .80"](), rng), "wo": case((6, 64, 96), 0.8, bank["8 bit, .80"](), rng)}
    tensors = {
        f"{prefix}.expert_{e}.{name}.weight": torch.from_numpy(one.dense()[e]).bfloat16()
        for name, one in data.items()
        for e in range(6)
    }
    save_file(tensors, tmp_path / "model.safetensors")
    qmoecodec.pack(tmp_path / "model.safetensors", tmp_path / "packed.safetensors")
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    made: dict[str, torch.Tensor] = {}
    exec(compile(example, str(PAGE), "exec"), made)
    wi, wo = (torch.from_numpy(data[name].dense()).cuda() for name in ("wi", "wo"))
    x, expert = made["x"].double(), made["expert"]
    hidden = torch.einsum("trc,tc->tr", wi[expert], x)
    exact = torch.einsum("trc,tc->tr", wo[expert], hidden.clamp(min=0)) * made["scale"].double()[:, None]
    for got, want in (
        (made["y"], exact),
        (made["hidden"], hidden),
        (made["one"], wi[3] @ x[0]),
        (made["many"], x @ wi[3].T),
        (made["values"], wi[3]),
    ):
        assert got.shape == want.shape
        assert float((got.double() - want).norm() / want.norm()) < 1e-2
    assert (made["digits"].cpu().numpy() == data["wi"].digits[3]).all()
