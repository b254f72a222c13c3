"""The C decoder in this process (decoder.c)."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

Restored = dict[str, tuple[str, list[int], bytes]]


@cache
def library() -> Any:
    """Build and load; raises OSError or CalledProcessError where that is not possible."""
    source = Path(__file__).with_name("decoder.c")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        built = Path(folder) / "decoder.so"
        flags = os.environ.get("FUZZ_CFLAGS", "-O2").split()
        subprocess.run(["cc", "-std=gnu11", *flags, "-shared", "-fPIC", str(source), "-o", str(built)], check=True)
        found = ctypes.CDLL(str(built))
    found.qmoe_verdict.restype = ctypes.c_char_p
    found.qmoe_verdict.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int]
    found.qmoe_output.restype = ctypes.c_void_p
    found.qmoe_output.argtypes = [ctypes.c_size_t, ctypes.POINTER(ctypes.c_size_t)]
    found.qmoe_largest.restype = ctypes.c_size_t
    return found


def verdict(content: bytes | Path, *, deep: bool) -> str | None:
    """Return the reason for which a file's bytes, or a directory, are rejected; None where they are accepted."""
    path = os.fsencode(content) if isinstance(content, Path) else None
    data = b"" if isinstance(content, Path) else content
    found = library().qmoe_verdict(path, data, len(data), int(deep))
    return None if found is None else str(found.decode())


def largest() -> int:
    """Bytes of the largest block that the last call asked for."""
    return int(library().qmoe_largest())


def restored() -> Restored:
    """Return what the last accepted call has restored."""
    entries = json.loads(_output(0))
    return {entry["name"]: (entry["dtype"], entry["shape"], _output(i + 1)) for i, entry in enumerate(entries)}


def _output(i: int) -> bytes:
    n = ctypes.c_size_t()
    at = library().qmoe_output(i, ctypes.byref(n))
    return ctypes.string_at(at, n.value) if at else b""
