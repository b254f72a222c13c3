"""The command line: exit codes, what goes to which stream, one line per error."""

import importlib.metadata
import io
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import click
import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner, Result
from rich.console import Console

from qmoecodec import cli, inspect
from qmoecodec.cli import ByteSize, main


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture
def model(tmp_path: pathlib.Path) -> pathlib.Path:
    rng = np.random.default_rng(0)
    tensors: dict[str, Any] = {
        f"m.experts.{i}.w": rng.choice([-0.5, 0, 0.5], (40, 60), p=[0.1, 0.8, 0.1]).astype(np.float32) for i in range(3)
    }
    tensors |= {"bias": rng.standard_normal(5), "dense": rng.standard_normal((5, 5)), "ids": np.arange(3)}
    tensors["narrow"] = np.ones((50, 1), np.float32)
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(tensors, path)
    return path


@pytest.fixture
def packed(model: pathlib.Path) -> pathlib.Path:
    path = model.parent / "packed.safetensors"
    assert call("pack", model, "-o", path).exit_code == 0
    return path


def test_pack_and_unpack(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    result = call("pack", model, "-o", tmp_path / "p.safetensors")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert "1 groups of 3 experts, 7,200 weights" in result.stdout
    assert "1 tensors stored as they are: not smaller" in result.stdout
    result = call("unpack", tmp_path / "p.safetensors", "-o", tmp_path / "u.safetensors")
    assert (result.exit_code, result.stderr) == (0, "")
    assert (tmp_path / "u.safetensors").read_bytes() == model.read_bytes()


def test_json_of_pack_and_unpack(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "p.safetensors"
    report = json.loads(call("pack", model, "-o", out, "--json").stdout)
    assert report["schema"] == 1
    assert report["n_packed_bytes"] == out.stat().st_size
    assert [g["shape"] for g in report["groups"]] == [[3, 40, 60]]
    assert {t["name"]: t["reason"].split(":")[0] for t in report["passthrough"]} == {
        "bias": "rank 1",
        "dense": "not ternary",
        "ids": "dtype I64",
        "narrow": "not smaller",
    }
    report = json.loads(call("unpack", out, "-o", tmp_path / "u.safetensors", "--json").stdout)
    assert (report["schema"], report["n_dense_bytes"]) == (1, model.stat().st_size)


def test_options_reach_the_library(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for options, bits in ((("--code-bits", 12), 12), (("--dictionary", "qmoe-2023"), 16), (("--threads", 1), 8)):
        call("pack", model, "-o", tmp_path / "p.safetensors", *options)
        report = json.loads(call("inspect", tmp_path / "p.safetensors", "--json").stdout)
        assert {g["code_bits"] for g in report["groups"]} == {bits}
    folder = tmp_path / "in"
    folder.mkdir()
    model.rename(folder / "model.safetensors")
    result = call("pack", folder, "-o", tmp_path / "out", "--max-shard-size", "1KB")
    assert result.exit_code == 0
    assert (tmp_path / "out/model.safetensors.index.json").exists()
    result = call("pack", folder, "-o", tmp_path / "out", "--no-overwrite")
    assert result.exit_code == 1
    assert result.stderr == f"error: {tmp_path / 'out'} exists\n"


def test_inspect(packed: pathlib.Path, model: pathlib.Path) -> None:
    report = json.loads(call("inspect", packed, "--json").stdout)
    assert report["schema"] == 1
    assert report["format_version"] == "1.0"
    totals = report["totals"]
    assert {"n_weights", "bits_per_weight", "payload_bits_per_weight", "entropy_bits_per_weight", "file_bytes",
            "dense_bytes"} <= totals.keys()  # fmt: skip
    assert totals["n_weights"] == 7200
    assert totals["file_bytes"] == packed.stat().st_size
    (group,) = report["groups"]
    weights = [safetensors.numpy.load_file(model)[f"m.experts.{i}.w"] for i in range(3)]
    counts = [int(sum(f(w).sum() for w in weights)) for f in (lambda w: w == 0, lambda w: w < 0, lambda w: w > 0)]
    assert group["counts"] == counts
    assert group["zeros"] == counts[0] / 7200
    entropy = 0.0
    for w in weights:
        p = np.array([(w == 0).mean(), (w < 0).mean(), (w > 0).mean()])
        entropy -= float((p * np.log2(p)).sum()) / 3
    assert group["entropy_bits_per_weight"] == pytest.approx(entropy)
    assert group["ratio"] == pytest.approx(group["payload_bits_per_weight"] / entropy)
    assert 1 < group["ratio"] < 1.2
    stored = safetensors.numpy.load_file(packed)
    parts = {n.removeprefix("m.experts.w_"): v.nbytes for n, v in stored.items() if n.startswith("m.experts.w_")}
    assert group["role_bytes"] == parts
    assert group["bytes"] == sum(parts.values())
    assert group["bits_per_weight"] == 8 * sum(parts.values()) / 7200
    dictionaries = sum(v.nbytes for n, v in stored.items() if n.startswith("qmoecodec.dictionary"))
    assert totals["bits_per_weight"] == 8 * (sum(parts.values()) + dictionaries) / 7200
    pieces = ("group_bytes", "dictionary_bytes", "passthrough_bytes", "header_bytes")
    assert sum(totals[p] for p in pieces) + 4 == packed.stat().st_size  # 4: the header's checksum
    assert {t["name"]: t["reason"] for t in report["passthrough"]} == {
        "bias": "rank 1",
        "dense": "not ternary: row 0",
        "ids": "dtype I64",
        "narrow": "ternary, but not smaller when packed",
    }


def test_inspect_for_people(packed: pathlib.Path, tmp_path: pathlib.Path) -> None:
    result = call("inspect", packed)
    assert result.exit_code == 0
    assert "m.experts.w" in result.stdout
    assert "3 x 40 x 60" in result.stdout
    assert "not ternary" in result.stdout
    safetensors.numpy.save_file({}, tmp_path / "nothing.safetensors")
    result = call("pack", tmp_path / "nothing.safetensors", "-o", tmp_path / "p")
    assert result.stderr == "note: no ternary matrix was found\n"
    assert call("inspect", tmp_path / "p").exit_code == 0
    assert json.loads(call("inspect", tmp_path / "p", "--json").stdout)["totals"]["bits_per_weight"] is None


def test_inspect_of_a_directory(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    model.rename(folder / "model.safetensors")
    call("pack", folder, "-o", tmp_path / "out", "--max-shard-size", "1KB")
    report = json.loads(call("inspect", tmp_path / "out", "--json").stdout)
    assert len(report["files"]) > 1
    assert report["totals"]["file_bytes"] == sum(f["bytes"] for f in report["files"])
    assert call("verify", tmp_path / "out", "--deep").exit_code == 0


def test_verify(packed: pathlib.Path) -> None:
    result = call("verify", packed, "--deep")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.endswith("fine (1 groups, 3 experts, 4 other tensors checked)\n")
    data = bytearray(packed.read_bytes())
    data[-1] ^= 1
    packed.write_bytes(data)
    result = call("verify", packed)
    assert result.exit_code == 3
    assert "[checksum]" in result.stdout
    assert "1 problem (" in result.stdout
    result = call("verify", packed, "--json")
    assert result.exit_code == 3
    report = json.loads(result.stdout)
    assert report["schema"] == 1
    assert report["ok"] is False
    assert report["problems"][0]["reason"] == "checksum"


def test_errors_are_one_line(model: pathlib.Path, packed: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "void").mkdir()
    for arguments, text in (
        (("unpack", model, "-o", tmp_path / "u"), "["),
        (("inspect", model), "["),
        (("pack", packed, "-o", tmp_path / "u"), "is already packed"),
        (("pack", model, "-o", model), "are the same"),
        (("pack", model, "-o", tmp_path / "no/where"), "is not a directory"),
        (("pack", tmp_path / "void", "-o", tmp_path / "u"), "holds neither"),
    ):
        result = call(*arguments)
        assert result.exit_code == 1, arguments
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert text in result.stderr
    result = call("inspect", model, "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert document["schema"] == 1
    assert document["error"]["reason"] in ("header_schema", "not_packed")


def test_a_full_disk_is_named(model: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    result = call("pack", model, "-o", tmp_path / "p.safetensors")
    assert result.exit_code == 1
    assert result.stderr == f"error: No space left on device: {tmp_path / 'p.safetensors'}\n"


def test_usage_errors(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for arguments in (
        ("pack", model),
        ("pack", tmp_path / "gone", "-o", "x"),
        ("pack", model, "-o", tmp_path / "x", "--code-bits", "9"),
        ("pack", model, "-o", tmp_path / "x", "--dictionary", "qmoe-2023", "--code-bits", "8"),
        ("pack", model, "-o", tmp_path / "x", "--max-shard-size", "0"),
        ("pack", model, "-o", tmp_path / "x", "--max-shard-size", "5 apples"),
        ("pack", model, "-o", tmp_path / "x", "--threads", "0"),
        ("pack", model, "-o", "-"),
        ("unpack", model, "-o", ""),
        ("frobnicate",),
    ):
        assert call(*arguments).exit_code == 2, arguments
    assert not (tmp_path / "x").exists()


def test_devices_and_pipes_are_left_alone(model: pathlib.Path, packed: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Renaming over /dev/null, which root may, would make a plain file of it."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to("/dev/null")
    for target in (tmp_path / "pipe", tmp_path / "null"):
        for arguments in (("pack", model), ("unpack", packed)):
            result = call(*arguments, "-o", target)
            assert result.exit_code == 1
            assert result.stderr == f"error: {target} is a device, pipe or socket; it is left alone\n"
            assert target.exists() and not target.is_file()


def test_names_that_a_terminal_would_obey(tmp_path: pathlib.Path) -> None:
    name = "a\x1b[31m\n\u202e.experts.0.w"
    safetensors.numpy.save_file({name: np.eye(40, 60, dtype=np.float32)}, tmp_path / "s")
    assert call("pack", tmp_path / "s", "-o", tmp_path / "p").exit_code == 0
    shown = call("inspect", tmp_path / "p").stdout
    assert r"a\x1b[31m\n\u202e.experts.w" in shown and "\x1b" not in shown
    data = bytearray((tmp_path / "p").read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    codes = next(entry for key, entry in header.items() if key.endswith("_codes"))
    data[8 + int.from_bytes(data[:8], "little") + codes["data_offsets"][0]] ^= 1
    (tmp_path / "p").write_bytes(data)
    for command in ("verify", "inspect"):
        result = call(command, tmp_path / "p")
        assert result.exit_code == {"verify": 3, "inspect": 1}[command]
        assert r"a\x1b[31m" in result.output and "\x1b" not in result.output
    document = json.loads(call("verify", tmp_path / "p", "--json").stdout)
    assert document["problems"][0]["where"]["group"] == name.replace(".0.", ".")


def test_names_that_rich_would_read_as_markup(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "no[/][bold]"
    folder.mkdir(parents=True)
    name = "[/red]x:smile:"
    safetensors.numpy.save_file({name: np.eye(40, 60, dtype=np.float32)}, folder / "s")
    assert call("pack", folder / "s", "-o", folder / "p").exit_code == 0
    shown = call("inspect", folder / "p").stdout
    assert name in shown and "no[/][bold]" in shown


def test_names_have_room_on_a_narrow_terminal(packed: pathlib.Path) -> None:
    report = inspect.inspect(packed)
    shown = {}
    for width in (80, 120):
        file = io.StringIO()
        Console(file=file, width=width).print(inspect.render(report, width=width), markup=False, highlight=False)
        shown[width] = file.getvalue()
        assert all(len(line) <= width for line in shown[width].splitlines())
        assert "m.experts.w " in shown[width] and "3 x 40 x 60" in shown[width]
    assert "dictionary" in shown[120] and "dictionary " not in shown[80] and "120 columns show more" in shown[80]


def test_minus_zero_is_pointed_out(tmp_path: pathlib.Path) -> None:
    """Pruned negative weights become -0 in `mask * sign * scale`, which is not what anybody meant to keep."""
    weights = np.random.default_rng(0).choice([-0.5, 0, 0.5], (40, 60)).astype(np.float32)
    minus = weights.copy()
    minus[3, np.flatnonzero(weights[3] == 0)[0]] = -0.0
    tensors = {"a": minus, "b": np.stack([weights, minus]), "c": weights, "d": np.full((9, 9), np.nan, np.float32)}
    safetensors.numpy.save_file(tensors, tmp_path / "s")
    result = call("pack", tmp_path / "s", "-o", tmp_path / "p")
    assert result.exit_code == 0
    assert result.stderr == "note: 2 tensors are ternary but for -0, which no digit stands for; adding 0.0 makes it +0\n"
    assert "2 tensors stored as they are: ternary but for -0" in result.stdout
    report = json.loads(call("inspect", tmp_path / "p", "--json").stdout)
    assert {t["name"]: t["reason"] for t in report["passthrough"]} == {
        "a": "ternary but for -0: row 3",
        "b": "ternary but for -0: expert 1, row 3",
        "d": "not ternary: row 0",
    }
    safetensors.numpy.save_file({k: v + 0.0 for k, v in tensors.items()}, tmp_path / "s")
    result = call("pack", tmp_path / "s", "-o", tmp_path / "p")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "3 groups of 4 experts" in result.stdout


def test_what_does_not_come_back_byte_for_byte_is_said(tmp_path: pathlib.Path) -> None:
    """Without a note, `unpack` restores the very files."""
    weights = np.eye(40, 60, dtype=np.float32)
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, files in ((one, ["model"]), (two, ["model-1", "model-2"])):
        folder.mkdir()
        for i, name in enumerate(files):
            safetensors.numpy.save_file({f"w{i}": weights, f"x{i}": weights[0]}, folder / f"{name}.safetensors")
    index = {"weight_map": {f"{c}{i}": f"model-{i + 1}.safetensors" for c in "wx" for i in range(2)}}
    (two / "model.safetensors.index.json").write_text(json.dumps(index))
    source = one / "model.safetensors"
    assert call("pack", source, "-o", tmp_path / "p").stderr == call("pack", one, "-o", tmp_path / "d").stderr == ""
    result = call("pack", two, "-o", tmp_path / "d")
    assert result.stderr.startswith("note: the weights are in 2 files; unpack restores every tensor, but divides them")
    usual = source.read_bytes()
    n = int.from_bytes(usual[:8], "little")
    spaced = json.dumps(json.loads(usual[8 : 8 + n])).encode()
    spaced += b" " * (-len(spaced) % 8)
    source.write_bytes(len(spaced).to_bytes(8, "little") + spaced + usual[8 + n :])
    for result in (call("pack", source, "-o", tmp_path / "p"), call("pack", one, "-o", tmp_path / "d")):
        assert result.stderr.startswith("note: the file is not laid out as the safetensors library does;")
    assert call("unpack", tmp_path / "p", "-o", tmp_path / "u").exit_code == 0
    assert (tmp_path / "u").read_bytes() == usual


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("4GiB", 4 * 2**30), ("7", 7), ("1k", 1000), ("12B", 12)],
)
def test_sizes(text: str, n_bytes: int) -> None:
    assert ByteSize().convert(text, None, None) == n_bytes


# --- commands of other packages


class FakeEntry:
    """An entry point that loads, or fails to."""

    def __init__(self, name: str, result: object, module: str = "other.cli") -> None:
        self.name, self.module, self._result = name, module, result

    def load(self) -> object:
        if isinstance(self._result, BaseException):
            raise self._result
        return self._result


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def greet() -> None:
        """Say hello."""
        click.echo("hello")

    @click.command()
    def late() -> None:
        raise ModuleNotFoundError("No module named 'transformers.models'", name="transformers.models")

    known = [
        FakeEntry("greet", greet),
        FakeEntry("late", late),
        FakeEntry("train", ModuleNotFoundError("No module named 'torch'", name="torch")),
        FakeEntry("gone", ModuleNotFoundError("No module named 'other.cli'", name="other.cli")),
        FakeEntry("broken", ImportError("cannot import name 'x'\nfrom 'y'")),
        FakeEntry("empty", AttributeError("no attribute 'main'")),
        FakeEntry("pack", RuntimeError("must not be loaded")),
    ]

    def entry_points(*, group: str, name: str | None = None) -> list[FakeEntry]:
        assert group == "qmoecodec.commands"
        return [e for e in known if name in (None, e.name)]

    monkeypatch.setattr(cli.importlib.metadata, "entry_points", entry_points)


@pytest.mark.usefixtures("entries")
def test_commands_of_other_packages() -> None:
    assert call("greet").stdout == "hello\n"
    result = call("--help")
    assert result.exit_code == 0
    assert "train" in result.stdout
    assert "Commands of other packages" in result.stdout
    for name, text in (("train", "pip install 'qmoecodec[torch]'"), ("late", "pip install 'qmoecodec[hf]'"),
                       ("gone", "not complete"), ("broken", "cannot import"), ("empty", "no attribute")):  # fmt: skip
        result = call(name)
        assert result.exit_code == 1
        assert text in result.stderr
        assert result.stderr.count("\n") == 1
        assert "Traceback" not in result.output


def test_the_installed_entry_points_are_of_the_expected_group() -> None:
    names = {e.name for e in importlib.metadata.entry_points(group=cli.COMMANDS_GROUP)}
    assert names.isdisjoint(main.commands)


# --- as a program


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", "from qmoecodec.cli import main; main(prog_name='qmoecodec')", *map(str, arguments)]
    return subprocess.run(program, capture_output=True, text=True, check=False, **options)


def test_as_a_program(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    packed = tmp_path / "p.safetensors"
    done = run("pack", model, "-o", packed, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["schema"] == 1
    os.truncate(packed, 1000)
    done = run("verify", packed)
    assert done.returncode == 3
    assert "[truncated]" in done.stdout
    done = run("unpack", packed, "-o", tmp_path / "u.safetensors")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: [truncated]")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "u.safetensors").exists()
    assert run("pack").returncode == 2
    assert "qmoecodec" in run("--version").stdout


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "qmoecodec", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("python -m qmoecodec, version 0.")


def test_letters_that_the_output_cannot_show(packed: pathlib.Path) -> None:
    """The path is no reason to fail after the work is done."""
    for name, shown, encoding in (("é.p", r"\xe9.p", "ascii"), (os.fsdecode(b"\xff.p"), r"\udcff.p", "utf-8:strict")):
        path = packed.with_name(name)
        path.write_bytes(packed.read_bytes())
        for command in ("verify", "inspect"):
            done = run(command, path, env={**os.environ, "PYTHONIOENCODING": encoding})
            assert (done.returncode, done.stderr) == (0, "")
            assert shown in done.stdout or name in done.stdout


def test_help_loads_neither_numba_nor_rich() -> None:
    program = (
        "import sys; from qmoecodec.cli import main; main(['--help'], standalone_mode=False); "
        "sys.exit(bool({'numba', 'rich', 'torch'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0
