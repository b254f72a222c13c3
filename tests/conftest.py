"""Settings of the whole suite."""

import os

import pytest
from hypothesis import settings

# The first call of a kernel compiles it: no deadline per example. The failing example is printed ready to paste. CI takes the
# same examples each time, so that it says the same of the same code; a developer's run looks for new ones.
settings.register_profile("qmoecodec", deadline=None, print_blob=True, derandomize="CI" in os.environ)
settings.load_profile("qmoecodec")


def _find_cuda_device() -> bool:
    try:
        import cupy
    except ImportError:
        return False
    try:
        return bool(cupy.cuda.runtime.getDeviceCount() > 0)
    except cupy.cuda.runtime.CUDARuntimeError:
        return False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _find_cuda_device():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
