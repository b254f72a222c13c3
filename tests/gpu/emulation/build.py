"""Builds the tile kernels for the host (emulation.h) and calls them with numpy arrays."""

from __future__ import annotations

import ctypes
import pathlib
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

HERE = pathlib.Path(__file__).parent
KERNELS = HERE.parents[2] / "gpu/qmoecodec_gpu/kernels"
SHARED_BASE = 1024


def source(name: str) -> str:
    """Return a kernel file with its own includes put in, and what is written in PTX replaced."""
    lines = []
    for line in (KERNELS / name).read_text(encoding="utf-8").splitlines():
        if line.startswith('#include "'):
            included = line.split('"')[1]
            if included == "scatter.cuh":
                lines.append("SCATTER")
            elif included != "hopper.cuh":
                lines.append(source(included))
        elif line != "#pragma once":
            lines.append(line)
    text = "\n".join(lines) + "\n"
    for asm, plain in (
        ('asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));', "h = emulated_bfloat16(f);"),
        ('asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));', "__trap(), h = 0;"),
        ('asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));', "__trap(), f = 0;"),
    ):
        text = text.replace(asm, plain)
    return text


class Kernel:
    """One kernel, compiled for the host."""

    def __init__(self, folder: pathlib.Path, file: str, name: str, macros: Mapping[str, int]) -> None:
        macros = {"SHARED_BASE": SHARED_BASE, **macros}
        stem = f"{name}-{abs(hash(tuple(sorted(macros.items()))))}"
        code = folder / f"{stem}.cpp"
        code.write_text(
            '#include "emulation.h"\n'
            + source(file)
            + "static void** given;\n"
            + f"static void work() {{ call({name}, given); }}\n"
            + 'extern "C" const char* emulate(u32 x, u32 y, u32 threads, u32 bytes, u32 seed, void** arguments) {\n'
            + "  given = arguments;\n  return launch(x, y, threads, bytes, seed, work);\n}\n"
        )
        library = folder / f"{stem}.so"
        defines = [f"-D{key}={value}" for key, value in macros.items()]
        command = ["g++", "-std=c++17", "-O1", "-g", "-w", "-fpermissive", "-shared", "-fPIC", f"-I{HERE}"]
        done = subprocess.run([*command, *defines, str(code), "-o", str(library)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)
        self._emulate = ctypes.CDLL(str(library)).emulate
        self._emulate.restype = ctypes.c_char_p

    def __call__(self, grid: tuple[int, int], threads: int, shared_bytes: int, seed: int, arguments: Sequence[Any]) -> None:
        """Run it. Arrays are passed as addresses, int as 64 bits, numpy scalars as they are.

        Raises RuntimeError with what the emulation found wrong.
        """
        held: list[Any] = []
        for argument in arguments:
            if argument is None:
                held.append(ctypes.c_void_p(0))
            elif isinstance(argument, np.ndarray):
                held.append(ctypes.c_void_p(argument.ctypes.data))
            else:
                held.append({int: ctypes.c_int64, np.int32: ctypes.c_int32}[type(argument)](int(argument)))
        addresses = (ctypes.c_void_p * len(held))(*(ctypes.addressof(h) for h in held))
        failure = self._emulate(*grid, threads, shared_bytes, seed, addresses)
        if failure:
            raise RuntimeError(failure.decode())
