"""The CUDA backend of qmoecodec: experts stay compressed in GPU memory and are decoded inside the matrix product.

Importing loads neither CuPy nor torch; `load()` does.
"""

from __future__ import annotations

from qmoecodec_gpu.backend import Backend, load

__all__ = ["Backend", "load"]
