"""Inputs of the GPU tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import qmoecodec
from qmoecodec.dictionary import aivf, qmoe2023, table_from_phrases


@pytest.fixture(autouse=True)
def give_memory_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test on the device, since other processes test on the same one."""
    yield
    if request.node.get_closest_marker("gpu"):
        import torch

        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Case:
    """Digits, their encoding, and levels in float32 that bfloat16 holds exactly."""

    digits: npt.NDArray[np.int8]
    encoded: qmoecodec.Encoded
    levels: npt.NDArray[np.float32]

    def dense(self) -> npt.NDArray[np.float64]:
        """Return the experts as float64 matrices."""
        low, high = self.levels[..., :1].astype(np.float64), self.levels[..., 1:].astype(np.float64)
        return np.where(self.digits < 0, low, np.where(self.digits > 0, high, 0.0))


def bfloat16_exact(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Cut float32 to what bfloat16 holds."""
    return (values.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


def make_case(shape: tuple[int, int, int], p_zero: float, dictionary: Any, rng: np.random.Generator) -> Case:
    """Draw digits and levels and encode them."""
    draws = rng.random(shape)
    digits = np.where(draws < p_zero, 0, np.where(draws < (1 + p_zero) / 2, -1, 1)).astype(np.int8)
    levels = np.stack([-rng.random(shape[:2]) - 0.125, rng.random(shape[:2]) + 0.125], axis=-1).astype(np.float32)
    return Case(digits, qmoecodec.encode(digits, dictionary=dictionary), bfloat16_exact(levels))


def symmetric(p_zero: float, **options: Any) -> qmoecodec.Dictionary:
    """Build a dictionary for P(-) = P(+)."""
    return aivf.build((1 - p_zero) / 2, p_zero, (1 - p_zero) / 2, **options)


def eight_bit_table() -> qmoecodec.Dictionary:
    """A table of 8-bit codewords: all strings of 5 digits, and zeros."""
    phrases = [bytes((n // 3**k) % 3 for k in range(5)) for n in range(243)]
    phrases += [b"\0" * (6 + n) for n in range(7)] + [b""] * 6
    return table_from_phrases(phrases, code_bits=8)


DICTIONARIES: dict[str, Callable[[], qmoecodec.Dictionary]] = {
    "8 bit, .885": lambda: symmetric(0.885, code_bits=8),
    "8 bit, .80": lambda: symmetric(0.80, code_bits=8),
    "8 bit, .95": lambda: symmetric(0.95, code_bits=8),
    "8 bit, .99": lambda: symmetric(0.99, code_bits=8),
    "8 bit, .50": lambda: symmetric(0.5, code_bits=8),
    "8 bit, 1/3": lambda: symmetric(1 / 3, code_bits=8),
    "8 bit, skewed": lambda: aivf.build(0.02, 0.9, 0.08, code_bits=8),
    "8 bit, table": eight_bit_table,
    "12 bit, .885": lambda: symmetric(0.885, code_bits=12),
    "16 bit, .885": lambda: symmetric(0.885, code_bits=16),
    "16 bit, qmoe-2023": qmoe2023.table,
}


@pytest.fixture(params=sorted(DICTIONARIES))
def dictionary(request: pytest.FixtureRequest) -> qmoecodec.Dictionary:
    return DICTIONARIES[request.param]()


@pytest.fixture
def case() -> Callable[..., Case]:
    return make_case


@pytest.fixture
def bank() -> dict[str, Callable[[], qmoecodec.Dictionary]]:
    return DICTIONARIES


GUARD_BYTES = 4096


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every launch gets copies of its buffers with guards round them, and fails when it touches one.

    Returns the names of the kernels' launches so far.
    """
    import torch

    from qmoecodec_gpu import modules

    class Pointer(int):
        tensor: Any

    launches: list[str] = []
    real_launch = modules.launch

    def pointer(tensor: Any) -> int:
        if tensor is None or not tensor.numel():
            return 0
        found = Pointer(tensor.data_ptr())
        found.tensor = tensor
        return found

    def content(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        return torch.tensor([], dtype=torch.uint8, device=tensor.device).set_(storage, 0, (storage.nbytes(),))

    def launch(device: Any, kernel: Any, grid: Any, threads: int, args: Any, **options: Any) -> None:
        if min((grid,) if isinstance(grid, int) else grid) < 1:
            return
        storages = {a.tensor.untyped_storage().data_ptr(): content(a.tensor) for a in args if isinstance(a, Pointer)}
        copies = {}
        for address, held in storages.items():
            copy = torch.full((held.numel() + 2 * GUARD_BYTES,), 0xC3, dtype=torch.uint8, device=device)
            copy[GUARD_BYTES:-GUARD_BYTES] = held
            copies[address] = copy
        moved = []
        for a in args:
            if isinstance(a, Pointer):
                address = a.tensor.untyped_storage().data_ptr()
                moved.append(copies[address].data_ptr() + GUARD_BYTES + (int(a) - address))
            else:
                moved.append(a)
        real_launch(device, kernel, grid, threads, moved, **options)
        whole = [(copy[:GUARD_BYTES] == 0xC3).all() & (copy[-GUARD_BYTES:] == 0xC3).all() for copy in copies.values()]
        name = str(getattr(kernel, "name", kernel))
        assert bool(torch.stack(whole).all()), f"{name} wrote outside its buffers"
        for address, held in storages.items():
            held.copy_(copies[address][GUARD_BYTES:-GUARD_BYTES])
        launches.append(name)

    monkeypatch.setattr(modules, "pointer", pointer)
    monkeypatch.setattr(modules, "launch", launch)
    return launches
