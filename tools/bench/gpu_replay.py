"""Replay recorded kernel launches with the driver alone: no torch, no CuPy, no compiler (written by gpu_sanitize.py).

A sanitizer that watches this process sees our kernels and copies from the host, nothing else. So it is fast; each buffer is an
allocation of its own, so that one byte too far is seen; and what is not initialised here was not initialised by the package.
Standard library only.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import pathlib
import sys
import time
from typing import Any

MAX_DYNAMIC_SHARED_BYTES = 8  # CUfunction_attribute
PLANTED_LAUNCHES = 20  # with faults, of each recording; a report takes long
POISON = 0xA5  # what memory holds before it is written, as it was recorded


class Driver:
    """The CUDA driver, one device."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")
        self.call("cuInit", 0)
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)
        self.modules: dict[pathlib.Path, ctypes.c_void_p] = {}

    def call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.library, name)(*arguments)
        if status:
            raise SystemExit(f"{name}: CUDA error {status}")

    def function(self, path: pathlib.Path, name: str) -> ctypes.c_void_p:
        if path not in self.modules:
            module = ctypes.c_void_p()
            self.call("cuModuleLoadData", ctypes.byref(module), path.read_bytes())
            self.modules[path] = module
        function = ctypes.c_void_p()
        self.call("cuModuleGetFunction", ctypes.byref(function), self.modules[path], name.encode())
        return function

    def allocate(self, n_bytes: int) -> int:
        address = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(n_bytes))
        return address.value

    def free(self, address: int) -> None:
        self.call("cuMemFree_v2", ctypes.c_uint64(address))

    def upload(self, address: int, data: bytes) -> None:
        self.call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), data, ctypes.c_size_t(len(data)))

    def download(self, address: int, n_bytes: int) -> bytes:
        data = ctypes.create_string_buffer(n_bytes)
        self.call("cuMemcpyDtoH_v2", data, ctypes.c_uint64(address), ctypes.c_size_t(n_bytes))
        return data.raw

    def launch(
        self, function: ctypes.c_void_p, grid: list[int], threads: int, shared_bytes: int, arguments: list[bytes]
    ) -> None:
        self.call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED_BYTES, shared_bytes)
        holders = [ctypes.create_string_buffer(a, len(a)) for a in arguments]
        pointers = (ctypes.c_void_p * len(holders))(*(ctypes.addressof(h) for h in holders))
        width, height = [*grid, 1][:2]
        self.call("cuLaunchKernel", function, width, height, 1, threads, 1, 1, shared_bytes, None, pointers, None)
        self.call("cuCtxSynchronize")


def replay(driver: Driver, folder: pathlib.Path, plant: str | None, say: Any) -> tuple[int, int]:
    """Replay one recording and compare what the kernels write; returns the numbers of launches and of differences.

    plant : "short" makes every buffer a byte shorter, "unset" leaves out the last byte of what is copied to the device: a
        sanitizer that does not report these sees nothing
    """
    operations = json.loads((folder / "operations.json").read_text())
    blob = (folder / "blob").read_bytes()
    buffers: dict[int, int] = {}
    case, n_launches, n_different = "", 0, 0
    for operation in operations:
        if plant and n_launches == PLANTED_LAUNCHES:
            break
        kind, *values = operation
        if kind == "case":
            case = f"{folder.name}: {values[0]}"
            say(case)
            for address in buffers.values():
                driver.free(address)
            buffers.clear()
        elif kind == "allocate":
            buffers[values[0]] = driver.allocate(max(1, values[1] - (plant == "short")))
        elif kind == "upload":
            number, offset, at, n_bytes = values
            n_bytes -= plant is not None
            driver.upload(buffers[number] + offset, blob[at : at + n_bytes])
        elif kind == "launch":
            cubin, name, grid, threads, shared_bytes, arguments = values
            packed = [
                (buffers[a[0]] + a[1]).to_bytes(8, "little") if isinstance(a, list) else bytes.fromhex(a) for a in arguments
            ]
            driver.launch(driver.function(folder / cubin, name), grid, threads, shared_bytes, packed)
            n_launches += 1
        elif kind == "compare":
            number, offset, at, n_bytes, name = values
            if plant is None and driver.download(buffers[number] + offset, n_bytes) != blob[at : at + n_bytes]:
                say(f"DIFFERENT {case}: {name} wrote something else than when it was recorded, in {n_bytes} bytes")
                n_different += 1
        else:
            raise SystemExit(f"unknown operation {kind}")
    for address in buffers.values():
        driver.free(address)
    return n_launches, n_different


def main() -> None:
    """Replay the recordings below a folder, with a line per case and the seconds since the start."""
    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - begin:7.1f} s  {text}", flush=True)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="with a folder for each recording")
    parser.add_argument("--only", help="replay this recording alone")
    parser.add_argument("--but", help="leave this recording out")
    parser.add_argument("--plant", choices=["short", "unset"], help="make faults that a sanitizer must find (see `replay`)")
    arguments = parser.parse_args()
    driver = Driver()
    say("the driver is up")
    n_launches = n_different = 0
    for path in sorted(arguments.folder.glob("*/operations.json")):
        if path.parent.name == arguments.but or arguments.only not in (None, path.parent.name):
            continue
        launches, different = replay(driver, path.parent, arguments.plant, say)
        n_launches, n_different = n_launches + launches, n_different + different
    say(f"replayed {n_launches} launches of {len(driver.modules)} modules, {n_different} differences")
    sys.exit(n_different > 0)


if __name__ == "__main__":
    main()
