"""Builds kernels for the host (emulation.h) and calls them with addresses of its memory."""

from __future__ import annotations

import ctypes
import pathlib
import re
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
        ("extern __shared__ int shared[];", "int* const shared = (int*)::shared;"),
    ):
        text = text.replace(asm, plain)
    return text


#: What is built so far, by file and macros: compiling takes most of the time, and a file may hold several kernels.
_libraries: dict[tuple[str, tuple[tuple[str, Any], ...]], ctypes.CDLL] = {}


def library(folder: pathlib.Path, file: str, macros: Mapping[str, Any]) -> ctypes.CDLL:
    """Compile a file for the host, once; each of its kernels is called by a function emulate_NAME."""
    key = (file, tuple(sorted(macros.items())))
    if key not in _libraries:
        text = source(file)
        code = folder / f"{pathlib.Path(file).stem}-{len(_libraries)}.cpp"
        calls = [
            f"static void work_{name}() {{ call({name}, given); }}\n"
            f'extern "C" const char* emulate_{name}(u32 x, u32 y, u32 threads, u32 bytes, u32 seed, void** arguments) {{\n'
            f"  given = arguments;\n  return launch(x, y, threads, bytes, seed, work_{name});\n}}\n"
            for name in re.findall(r'extern "C" __global__ void\s+(?:__launch_bounds__\(.*?\)\s+)?(\w+)\(', text)
        ]
        code.write_text("".join(['#include "emulation.h"\n', text, "static void** given;\n", *calls]))
        defines = [f"-D{name}={value}" for name, value in macros.items()]
        command = ["g++", "-std=c++17", "-O1", "-w", "-fpermissive", "-shared", "-fPIC", f"-I{HERE}", *defines]
        done = subprocess.run(
            [*command, str(code), "-o", str(code.with_suffix(".so"))], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(done.stderr)
        _libraries[key] = ctypes.CDLL(str(code.with_suffix(".so")))
    return _libraries[key]


class Kernel:
    """One kernel, compiled for the host."""

    def __init__(self, folder: pathlib.Path, file: str, name: str, macros: Mapping[str, Any]) -> None:
        self._emulate = getattr(library(folder, file, {"SHARED_BASE": SHARED_BASE, **macros}), f"emulate_{name}")
        self._emulate.restype = ctypes.c_char_p

    def __call__(self, grid: tuple[int, int], threads: int, shared_bytes: int, seed: int, arguments: Sequence[Any]) -> None:
        """Run it. int are passed as 64 bits, addresses among them, numpy scalars as they are.

        Raises RuntimeError with what the emulation found wrong.
        """
        held = [{int: ctypes.c_int64, np.int32: ctypes.c_int32}[type(argument)](int(argument)) for argument in arguments]
        addresses = (ctypes.c_void_p * len(held))(*(ctypes.addressof(h) for h in held))
        failure = self._emulate(*grid, threads, shared_bytes, seed, addresses)
        if failure:
            raise RuntimeError(failure.decode())
