"""The command line: each command parses, calls one library function, and prints. Exit codes: 0, 1, 2, 3 (see `main`)."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import click

from qmoecodec.errors import FormatError, MissingExtraError, QMoEError, printable

SCHEMA: Final = 1
COMMANDS_GROUP: Final = "qmoecodec.commands"
_JSON_KEY: Final = "qmoecodec.json"
#: Extra that brings a module that a command may miss.
_EXTRAS: Final = {
    "torch": "torch",
    "safetensors": "torch",
    "transformers": "hf",
    "tokenizers": "hf",
    "cupy": "cuda",
    "matplotlib": "plot",
}
_F = TypeVar("_F", bound=Callable[..., Any])


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return printable(f"{error.strerror}: {error.filename}" if error.filename is not None else error.strerror)
    return printable(" ".join(str(error).split())) or type(error).__name__


def _say(text: str, *, err: bool = False) -> None:
    click.echo(printable(text), err=err)


def _missing_extra(module: str) -> str:
    return f"{module} is not installed: pip install 'qmoecodec[{_EXTRAS[module]}]'"


class _Commands(click.Group):
    """The group of commands: turns errors into one line, and finds other packages' commands by entry point."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        for entry in importlib.metadata.entry_points(group=COMMANDS_GROUP, name=cmd_name):
            return self._load(entry)
        return None

    def _load(self, entry: importlib.metadata.EntryPoint) -> click.Command:
        try:
            return cast(click.Command, entry.load())
        except MissingExtraError as error:
            raise click.ClickException(_one_line(error)) from None
        except ImportError as error:
            missing = (error.name or "").split(".")[0]
            if missing in _EXTRAS:
                hint = _missing_extra(missing)
            elif missing == entry.module.split(".")[0]:
                hint = f"the package {missing} is not complete in this installation ({_one_line(error)})"
            else:
                hint = _one_line(error)
            raise click.ClickException(f"the command {entry.name!r} cannot be loaded: {hint}") from None
        except AttributeError as error:
            raise click.ClickException(f"the command {entry.name!r} cannot be loaded: {_one_line(error)}") from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_commands(ctx, formatter)
        # Listed by name alone: loading them may take a deep-learning framework.
        entries = sorted(importlib.metadata.entry_points(group=COMMANDS_GROUP), key=lambda e: e.name)
        rows = [(e.name, f"({e.module.split('.')[0]})") for e in entries if e.name not in self.commands]
        if rows:
            with formatter.section("Commands of other packages"):
                formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        for stream in (sys.stdout, sys.stderr):  # the work is done: an encoding that lacks a letter is no error
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (QMoEError, OSError, ValueError, MemoryError, ModuleNotFoundError) as error:
            message = _one_line(error)
            if isinstance(error, ModuleNotFoundError) and not isinstance(error, MissingExtraError):
                missing = (error.name or "").split(".")[0]
                if missing not in _EXTRAS:
                    raise
                message = _missing_extra(missing)  # a command that loads it late
            _say(f"error: {message}", err=True)
            if ctx.meta.get(_JSON_KEY):
                details: dict[str, Any] = {"message": message}
                if isinstance(error, FormatError):
                    details |= {"reason": error.reason, "where": error.where}
                _print_json({"error": details})
            ctx.exit(1)


def _print_json(value: dict[str, Any]) -> None:
    click.echo(json.dumps({"schema": SCHEMA, **value}, indent=2))


def json_option(command: _F) -> _F:
    """Add `--json` to a command."""

    def remember(ctx: click.Context, parameter: click.Parameter, value: bool) -> bool:
        ctx.meta[_JSON_KEY] = value
        return value

    text = "Write one JSON document to standard output."
    return click.option("--json", "as_json", is_flag=True, callback=remember, help=text)(command)


if TYPE_CHECKING:
    _SizeType = click.ParamType[int]
else:
    _SizeType = click.ParamType  # not generic before click 8.4


class ByteSize(_SizeType):
    """A number of bytes: `5GB`, `500MB`, `4GiB`, `1000000`."""

    name = "size"
    _FACTORS: Final = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
                       "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}  # fmt: skip

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([0-9]{1,15})\s*([KMGT]I?|)B?", str(value).strip().upper())
        if match is None or not int(match[1]):
            self.fail(f"{value!r} is not a size such as 5GB, 500MB or 4GiB", param, ctx)
        return int(match[1]) * self._FACTORS[match[2]]


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None] | None]:
    """Yield a progress callback that draws a bar on standard error, None where that is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda stage, done, total: bar.update(task, description=stage, completed=done, total=total)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="qmoecodec")
def main() -> None:
    """Store ternary weights below one bit per weight, bit for bit restorable.

    Exit codes: 0 fine, 1 error, 2 usage, 3 verification failed.
    """


def _check_output(ctx: click.Context, parameter: click.Parameter, value: str) -> str:
    if value in ("", "-"):
        raise click.BadParameter("name a file or directory; standard output will not do, for the header is written last")
    return value


_source = click.argument("source", metavar="IN", type=click.Path(exists=True))
_output = click.option("-o", "--output", required=True, type=click.Path(), callback=_check_output,
                       help="File or directory to write.")  # fmt: skip
_shard_size = click.option("--max-shard-size", type=ByteSize(), default="5GB", show_default=True,
                           help="Size of one file of a directory.")  # fmt: skip
_overwrite = click.option("--overwrite/--no-overwrite", default=True, show_default=True,
                          help="Replace an existing file or checkpoint directory.")  # fmt: skip


@main.command()
@_source
@_output
@click.option("--code-bits", type=click.Choice(["auto", "8", "12", "16"]), default="auto", show_default=True,
              help="Bits of a codeword.")  # fmt: skip
@click.option("--dictionary", type=click.Choice(["auto", "qmoe-2023"]), default="auto", show_default=True,
              help="Build dictionaries for the data, or take the table of the QMoE paper.")  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), help="Threads; all processors by default.")
@_shard_size
@_overwrite
@json_option
def pack(source: str, output: str, code_bits: str, dictionary: str, threads: int | None, max_shard_size: int,
         overwrite: bool, as_json: bool) -> None:  # fmt: skip
    """Pack IN, a safetensors file or a Hugging Face checkpoint directory.

    Ternary matrices are found by their values and stacked by their names; all else is kept byte for byte.
    """
    from qmoecodec import container

    if dictionary == "qmoe-2023" and code_bits not in ("auto", "16"):
        raise click.UsageError("the table of qmoe-2023 has 16-bit codewords")
    bits: Any = "auto" if code_bits == "auto" else int(code_bits)
    choice: Any = dictionary
    with _progress() as progress:
        report = container.pack(source, output, dictionary=choice, code_bits=bits, max_shard_size=max_shard_size,
                                threads=threads, progress=progress, overwrite=overwrite)  # fmt: skip
    for note in report.notes:
        _say(f"note: {note}", err=True)
    if not report.groups:
        _say("note: no ternary matrix was found", err=True)
    if as_json:
        _print_json({"output": output, **dataclasses.asdict(report)})
        return
    n_weights = sum(g.shape[0] * g.shape[1] * g.shape[2] for g in report.groups)
    n_bytes = sum(g.n_bytes for g in report.groups)
    bits_text = f", {8 * n_bytes / n_weights:.4f} bits per weight with row metadata" if n_weights else ""
    _say(f"{output}: {report.n_source_bytes:,} -> {report.n_packed_bytes:,} bytes")
    n_experts = sum(g.shape[0] for g in report.groups)
    _say(f"{len(report.groups)} groups of {n_experts} experts, {n_weights:,} weights{bits_text}")
    for kind, n in sorted(Counter(t.reason.split(":")[0] for t in report.passthrough).items()):
        _say(f"{n} tensors stored as they are: {kind}")


@main.command()
@_source
@_output
@_shard_size
@_overwrite
@json_option
def unpack(source: str, output: str, max_shard_size: int, overwrite: bool, as_json: bool) -> None:
    """Restore the dense checkpoint from IN, a packed file or directory."""
    from qmoecodec import container

    with _progress() as progress:
        report = container.unpack(source, output, max_shard_size=max_shard_size, progress=progress, overwrite=overwrite)
    for note in report.notes:
        _say(f"note: {note}", err=True)
    if as_json:
        _print_json({"output": output, **dataclasses.asdict(report)})
        return
    _say(f"{output}: {report.n_packed_bytes:,} -> {report.n_dense_bytes:,} bytes, {report.n_tensors} tensors")


@main.command()
@_source
@json_option
def inspect(source: str, as_json: bool) -> None:
    """Show what IN, a packed file or directory, holds and what it costs."""
    from qmoecodec import inspect as library

    report = library.inspect(source)
    if as_json:
        _print_json(report)
        return
    from rich.console import Console

    console = Console(file=sys.stdout) if sys.stdout.isatty() else Console(file=sys.stdout, width=160)
    console.print(library.render(report, width=console.width), highlight=False, markup=False)


@main.command()
@_source
@click.option("--deep", is_flag=True, help="Also encode every row again and compare.")
@json_option
@click.pass_context
def verify(ctx: click.Context, source: str, deep: bool, as_json: bool) -> None:
    """Check IN, a packed file or directory: structure, checksums, every row; exit code 3 names what is damaged."""
    from qmoecodec import container

    report = container.verify(source, deep=deep)
    if as_json:
        _print_json({"ok": report.ok, **dataclasses.asdict(report)})
    else:
        for problem in report.problems:
            _say(problem.message)
        checked = f"{report.n_groups} groups, {report.n_experts} experts, {report.n_tensors} other tensors"
        n = len(report.problems)
        result = "fine" if report.ok else "1 problem" if n == 1 else f"{n} problems"
        _say(f"{source}: {result} ({checked} checked)")
    if not report.ok:
        ctx.exit(3)
