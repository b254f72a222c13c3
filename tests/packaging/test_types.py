"""The package is typed for those who use it: a small program of theirs passes mypy --strict, its mistakes do not."""

import os
import pathlib
import subprocess
import sys

import qmoecodec


def test_a_program_of_a_user(tmp_path: pathlib.Path) -> None:
    package = pathlib.Path(qmoecodec.__file__).parent
    assert (package / "py.typed").exists()
    program = pathlib.Path(__file__).with_name("consumer.py")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--follow-imports=silent", str(program)]
    environment = {**os.environ, "MYPYPATH": str(package.parent), "MYPY_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "Success: no issues found in 1 source file")
