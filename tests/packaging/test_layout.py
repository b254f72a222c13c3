"""What the wheel and the editable install put into site-packages: the four packages and nothing else."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import editables
import pytest

import qmoecodec

ROOT = pathlib.Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PATHS = [pathlib.Path(path) for path in PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]]
PACKAGES = {path.name: ROOT / path for path in PATHS if (ROOT / path).is_dir()}
# Directories of the repository that a careless build turns into top-level modules.
STRAY = ["gpu", "tools", "tests", "spec", "conformance", "docs", "examples"]


def build(target: str, into: pathlib.Path) -> pathlib.Path:
    """Build `target` with the installed hatchling: needs no network."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(into)],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    (wheel,) = into.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return build("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def editable(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return build("wheel:editable", tmp_path_factory.mktemp("editable"))


def install(wheel: pathlib.Path, into: pathlib.Path) -> pathlib.Path:
    """Unpack `wheel` as an installer would (it is pure Python without scripts of its own)."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(into)
    return into


def find_modules(site: pathlib.Path, names: list[str]) -> dict[str, str | None]:
    """Say where a bare interpreter, in another directory, with `site` as site-packages finds each of `names`."""
    program = (
        "import importlib.util, json, site, sys\n"
        "site.addsitedir(sys.argv[1])\n"
        "specs = {name: importlib.util.find_spec(name) for name in sys.argv[2:]}\n"
        "print(json.dumps({n: s and (s.origin or str(list(s.submodule_search_locations))) for n, s in specs.items()}))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, str(site), *names],
        cwd=site.parent, check=True, capture_output=True, text=True,
    )  # fmt: skip
    found: dict[str, str | None] = json.loads(done.stdout)
    return found


def test_the_core_is_among_the_packages() -> None:
    assert "qmoecodec" in PACKAGES


def test_wheel_holds_exactly_the_files_of_the_packages(wheel: pathlib.Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        f"{package}/{file.relative_to(path).as_posix()}"
        for package, path in PACKAGES.items()
        for file in path.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert names == expected
    assert "qmoecodec/py.typed" in names


def test_wheel_metadata(wheel: pathlib.Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = {name.split("/", 1)[1]: name for name in archive.namelist() if ".dist-info/" in name}
        metadata = archive.read(info["METADATA"]).decode()
        assert info.keys() == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
        assert archive.read(info["licenses/LICENSE"]) == (ROOT / "LICENSE").read_bytes()
    assert re.search(r"^License-Expression: Apache-2\.0$", metadata, re.MULTILINE)
    assert re.search(r"^Requires-Python: >=3\.11$", metadata, re.MULTILINE)


def test_fresh_wheel_install_exposes_only_the_packages(wheel: pathlib.Path, tmp_path: pathlib.Path) -> None:
    site = install(wheel, tmp_path / "site")
    found = find_modules(site, [*PACKAGES, *STRAY])
    assert {name for name, origin in found.items() if origin} == PACKAGES.keys()
    assert all(pathlib.Path(found[name] or "").is_relative_to(site) for name in PACKAGES)


def test_fresh_editable_install_exposes_only_the_packages(editable: pathlib.Path, tmp_path: pathlib.Path) -> None:
    site = install(editable, tmp_path / "site")
    assert editables.__file__ is not None
    shutil.copytree(pathlib.Path(editables.__file__).parent, site / "editables")
    found = find_modules(site, [*PACKAGES, *STRAY])
    assert {name for name, origin in found.items() if origin} == PACKAGES.keys()
    assert all(pathlib.Path(found[name] or "").is_relative_to(path) for name, path in PACKAGES.items())


def test_these_tests_run_against_the_install_they_were_asked_to_test() -> None:
    expected = pathlib.Path(os.environ.get("QMOECODEC_TEST_INSTALL", ROOT))
    assert pathlib.Path(qmoecodec.__file__).parents[1] == expected
