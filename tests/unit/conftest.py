"""What the tests of the container share."""

import os
import pathlib
import sys
from collections.abc import Callable

import pytest
import safetensors.numpy

sys.path.append(str(pathlib.Path(__file__).parent))

from dense_files import MODEL


@pytest.fixture
def model(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(MODEL, path, metadata={"format": "pt", "é": 'x"\n'})
    return path


@pytest.fixture
def still_open(tmp_path: pathlib.Path) -> Callable[[], list[str]]:
    """What lists the files of the test that this process has open; others, which earlier tests left to the collector, may go
    at any moment."""  # fmt: skip

    def found() -> list[str]:
        places = [pathlib.Path("/proc/self/fd", number) for number in os.listdir("/proc/self/fd")]
        return [str(p.readlink()) for p in places if p.is_symlink() and str(p.readlink()).startswith(str(tmp_path))]

    return found
