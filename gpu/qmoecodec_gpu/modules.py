"""Compiling and launching: the only module that talks to CuPy."""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Final

import cupy
import numpy as np
import torch

#: Block size of the kernels that do not care.
THREADS: Final = 256

#: Files with instructions of sm_90a.
_SM_90A: Final = ("multiply_digits.cu",)

_lock = threading.Lock()
_functions: dict[tuple[int, str, str, tuple[tuple[str, int], ...]], Any] = {}


@cache
def source(name: str) -> str:
    """Return a kernel file with its own includes put in (NVRTC then needs no include path)."""
    text = resources.files("qmoecodec_gpu").joinpath("kernels", name).read_text(encoding="utf-8")
    lines = []
    for line in text.splitlines():
        if line.startswith('#include "'):
            lines.append(source(line.split('"')[1]))
        elif line != "#pragma once":
            lines.append(line)
    return "\n".join(lines) + "\n"


def function(device: torch.device, file: str, name: str, macros: Mapping[str, int] | None = None) -> Any:
    """Return a compiled kernel; the first call for a device and set of macros compiles it (CuPy keeps it on disk).

    Raises RuntimeError where that would be while a CUDA graph is captured.
    """
    key = (_index(device), file, name, tuple(sorted((macros or {}).items())))
    with _lock:
        if key not in _functions:
            refuse_capture(device)
            options = ("-std=c++17", *(f"-D{macro}={value}" for macro, value in key[3]))
            with cupy.cuda.Device(key[0]):
                if file in _SM_90A:
                    compiled = _sm_90a_module(source(file), options).get_function(name)
                else:
                    compiled = cupy.RawModule(code=source(file), options=options, backend="nvrtc").get_function(name)
                compiled.max_dynamic_shared_size_bytes = max_shared_bytes(device) - int(compiled.shared_size_bytes)
            _functions[key] = compiled
        return _functions[key]


def _sm_90a_module(code: str, options: tuple[str, ...]) -> Any:
    """Compile for sm_90a, which CuPy's own compilation never names, into CuPy's cache of compiled kernels."""
    version = cupy.cuda.nvrtc.getVersion()
    name = hashlib.sha256(repr((code, options, version)).encode()).hexdigest()
    folder = os.environ.get("CUPY_CACHE_DIR") or Path("~/.cupy/kernel_cache").expanduser()
    path = Path(folder) / f"qmoecodec-{name}.cubin"
    if not path.exists():
        program = cupy.cuda.nvrtc.createProgram(code, "kernel.cu", [], [])
        try:
            cupy.cuda.nvrtc.compileProgram(program, [*options, "-arch=sm_90a"])
            compiled = cupy.cuda.nvrtc.getCUBIN(program)
        except cupy.cuda.nvrtc.NVRTCError as error:
            raise RuntimeError(f"{error}: {cupy.cuda.nvrtc.getProgramLog(program)}") from error
        finally:
            cupy.cuda.nvrtc.destroyProgram(program)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:  # whole or not at all
            file.write(compiled)
        os.replace(file.name, path)
    return cupy.RawModule(path=str(path))


def refuse_capture(device: torch.device) -> None:
    """Raise RuntimeError while a CUDA graph is captured: what is needed the first time cannot be loaded then."""
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("the first use of a kernel cannot be captured in a CUDA graph: run the same once before")


@cache
def _attributes(index: int) -> dict[str, int]:
    return dict(cupy.cuda.Device(index).attributes)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def is_sm_90(device: torch.device) -> bool:
    """Whether the device has Hopper's own instructions."""
    return torch.cuda.get_device_capability(device) == (9, 0)


def max_shared_bytes(device: torch.device) -> int:
    """Shared memory that one block may have."""
    return _attributes(_index(device))["MaxSharedMemoryPerBlockOptin"]


def n_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the device."""
    return _attributes(_index(device))["MultiProcessorCount"]


@cache
def _shared_base(index: int) -> int:
    device = torch.device("cuda", index)
    refuse_capture(device)
    found = torch.zeros(1, dtype=torch.int32, device=device)
    launch(device, function(device, "probe.cu", "shared_base"), 1, 1, (pointer(found),), shared_bytes=128)
    return int(found.item())


def shared_base(device: torch.device) -> int:
    """Where dynamic shared memory begins in a kernel without any other."""
    return _shared_base(_index(device))


def u32(value: int) -> np.uint32:
    """A 32-bit kernel argument; plain integers are passed as 64 bits."""
    return np.uint32(value)


def i32(value: int) -> np.int32:
    """A signed 32-bit kernel argument."""
    return np.int32(value)


def pointer(tensor: torch.Tensor | None) -> int:
    """Return the address of a tensor's data, 0 for None. The caller keeps the tensor alive until the launch is queued."""
    return 0 if tensor is None else tensor.data_ptr()


def launch(
    device: torch.device,
    kernel: Any,
    grid: int | tuple[int, int],
    threads: int,
    args: Sequence[Any],
    *,
    shared_bytes: int = 0,
    early: bool = False,
) -> None:
    """Queue a kernel on torch's current stream of the device.

    early : the kernel may start before the one queued before it has ended, where the device can do that (9.0 and later).
        Until it waits (griddepcontrol.wait) it must not read what another kernel writes, nor write at all; and every
        block must wait, so that its end means the end of all before it.
    """
    shape = (grid,) if isinstance(grid, int) else grid
    if min(shape) < 1:
        return
    stream = torch.cuda.current_stream(device)
    if early and torch.cuda.get_device_capability(device) >= (9, 0):
        with cupy.cuda.Device(_index(device)):
            _launch_early(int(kernel.kernel.ptr), shape, threads, args, shared_bytes, stream.cuda_stream)
        return
    with cupy.cuda.Device(_index(device)), _external(stream):
        kernel(shape, (threads,), tuple(args), shared_mem=shared_bytes)


class _Attribute(ctypes.Structure):  # CUlaunchAttribute; its value is a union of 64 bytes
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15))


class _Config(ctypes.Structure):  # CUlaunchConfig
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("n_attributes", ctypes.c_uint),
    )


_C_TYPES: Final = {np.int32: ctypes.c_int32, np.uint32: ctypes.c_uint32, int: ctypes.c_int64}


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _launch_early(
    function: int, shape: tuple[int, ...], threads: int, args: Sequence[Any], shared_bytes: int, stream: int
) -> None:
    """Call cuLaunchKernelEx, as CuPy's launch takes no attributes."""
    values = [_C_TYPES[type(arg)](arg) for arg in args]
    addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    attribute = _Attribute(id=6, value=1)  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    config = _Config((*shape, 1, 1)[:3], (threads, 1, 1), shared_bytes, stream, ctypes.pointer(attribute), 1)
    failed = _driver().cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(function), addresses, None)
    if failed:
        raise RuntimeError(f"cuLaunchKernelEx failed with error {failed}")


def _external(stream: torch.cuda.Stream) -> Any:
    if hasattr(cupy.cuda.Stream, "from_external"):
        return cupy.cuda.Stream.from_external(stream)
    return cupy.cuda.ExternalStream(stream.cuda_stream)


def warp_grid(device: torch.device, n_warps: int, *, blocks_per_multiprocessor: int = 8) -> int:
    """Return a grid of `THREADS` for a loop in which each warp takes items in turn."""
    blocks = (n_warps * 32 + THREADS - 1) // THREADS
    return max(1, min(blocks, blocks_per_multiprocessor * n_multiprocessors(device)))
