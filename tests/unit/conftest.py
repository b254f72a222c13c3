"""What the tests of the container share."""

import pathlib
import sys

import pytest
import safetensors.numpy

sys.path.append(str(pathlib.Path(__file__).parent))

from dense_files import MODEL


@pytest.fixture
def model(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(MODEL, path, metadata={"format": "pt", "é": 'x"\n'})
    return path
