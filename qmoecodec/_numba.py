"""`njit` for all kernels: with Numba's cache on disk, and without it where no directory can hold one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar, cast

import numba

_F = TypeVar("_F", bound=Callable[..., Any])


def njit(**options: Any) -> Callable[[_F], _F]:
    """Compile as `numba.njit` does; where no directory for its cache can be written, in each process anew.

    So it is in containers that run as a user who owns neither the installation nor a home directory. A RuntimeWarning
    says so once.
    """

    def decorate(function: _F) -> _F:
        try:
            return cast(_F, numba.njit(**options)(function))
        except RuntimeError as error:
            if "no locator available" not in str(error):
                raise
            _warn()
        return cast(_F, numba.njit(**{**options, "cache": False})(function))

    return decorate


@cache
def _warn() -> None:
    message = "Numba finds no directory for its cache, kernels are compiled in each process; NUMBA_CACHE_DIR can name one"
    warnings.warn(message, RuntimeWarning, stacklevel=4)
