"""The commands `generate` and `evaluate`. They parse, call the library and print; results on stdout, progress on stderr.

Errors are left to the group of commands of `qmoecodec.cli`, which prints them in one line.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from qmoecodec.cli import json_option
from qmoecodec.errors import MissingExtraError

if TYPE_CHECKING:
    from .evaluation import Evaluation
    from .model import SwitchModel
    from .tokens import TokenSet

F = TypeVar("F", bound=Callable[..., Any])

_DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def _model_options(command: F) -> F:
    for option in reversed(
        (
            click.option(
                "--device", default="cpu", show_default=True, help="cpu, cuda, or several with commas: cuda:0,cuda:1."
            ),
            click.option(
                "--split",
                type=click.Choice(["layers", "experts"]),
                default="layers",
                show_default=True,
                help="What several devices share: runs of layers, or the experts of every layer.",
            ),
            click.option(
                "--backend",
                type=click.Choice(["auto", "cpu", "cuda", "dense"]),
                default="auto",
                show_default=True,
                help="What computes the experts; auto: dense for a plain checkpoint, the device's for a packed one.",
            ),
            click.option(
                "--capacity",
                type=click.Choice(["none", "per_sequence"]),
                default="none",
                show_default=True,
                help="Drop tokens beyond expert_capacity, per sequence, or drop none.",
            ),
            click.option(
                "--dtype",
                type=click.Choice(["float32", "bfloat16", "float16"]),
                default="float32",
                show_default=True,
                help="What the dense parts are computed in.",
            ),
            click.option("--threads", type=click.IntRange(min=1), help="Experts that run at once on the CPU."),
            json_option,
        )
    ):
        command = option(command)
    return command


@click.command()
@click.argument("directory", type=_DIRECTORY)
@click.option("--prompt", "prompts", multiple=True, help="Text to continue; may be given several times.")
@click.option("--tokens", type=_FILE, help="A .npz file with input_ids (and attention_mask), instead of text.")
@click.option("--limit", type=click.IntRange(min=1), help="Take only the first samples of --tokens.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option(
    "--graph/--no-graph",
    default=None,
    help="Replay the decoding step as a CUDA graph; by default where the backend cuda runs on one device.",
)
@_model_options
def generate(
    directory: Path,
    prompts: tuple[str, ...],
    tokens: Path | None,
    limit: int | None,
    max_new_tokens: int,
    graph: bool | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Generate greedily with the packed or plain checkpoint in DIRECTORY."""
    if bool(prompts) == (tokens is not None):
        raise click.UsageError("give either --prompt or --tokens")
    if prompts and limit is not None:
        raise click.UsageError("--limit goes with --tokens")
    from .generation import generate as run
    from .text import read_tokenizer, tokenize
    from .tokens import read_tokens

    tokenizer = read_tokenizer(directory, required=bool(prompts))
    begun = time.perf_counter()
    with _load(directory, settings) as model:
        loaded = time.perf_counter()
        if tokens is None:
            samples = tokenize(tokenizer, prompts, model)
        else:
            samples = read_tokens(tokens, model.vocabulary, labels=False)
            samples = samples.slice(0, limit or len(samples))
        result = run(model, samples, max_new_tokens=max_new_tokens, graph=graph)
        ended = time.perf_counter()
    texts = [None if tokenizer is None else tokenizer.decode(row.tolist(), skip_special_tokens=False) for row in result.tokens]
    if as_json:
        sequences = [{"tokens": row.tolist(), "text": text} for row, text in zip(result.tokens, texts, strict=True)]
        _print_json(
            sequences=sequences,
            n_tokens=result.n_tokens,
            load_seconds=round(loaded - begun, 4),
            seconds=round(ended - loaded, 4),
        )
        return
    for row, text in zip(result.tokens, texts, strict=True):
        click.echo(" ".join(map(str, row.tolist())) if text is None else text)


@click.command()
@click.argument("directory", type=_DIRECTORY)
@click.option("--data", type=_FILE, required=True, help="A .npz file with input_ids and labels.")
@click.option("--reference", type=_DIRECTORY, help="A checkpoint to evaluate on the same data, to compare with.")
@click.option("--limit", type=click.IntRange(min=1), help="Take only the first samples.")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True)
@_model_options
def evaluate(
    directory: Path,
    data: Path,
    reference: Path | None,
    limit: int | None,
    batch_size: int,
    as_json: bool,
    **settings: Any,
) -> None:
    """Print the loss of the checkpoint in DIRECTORY: mean cross-entropy per label token, in nats.

    Labels of -100 and labels that are the pad token do not count.
    """
    from .tokens import read_tokens

    def one(place: Path, **changed: Any) -> Evaluation:
        with _load(place, {**settings, **changed}) as model:
            samples = read_tokens(data, model.vocabulary, labels=True)
            return _evaluate(model, samples.slice(0, limit or len(samples)), batch_size, place.name)

    result = one(directory)
    other = None if reference is None else one(reference, backend="auto")
    if as_json:
        extra: dict[str, Any] = {}
        if other is not None:
            extra = {
                "reference": {"loss": other.loss, "n_tokens": other.n_tokens},
                "difference": result.loss - other.loss,
            }
        _print_json(loss=result.loss, n_tokens=result.n_tokens, **extra)
        return
    click.echo(f"loss {result.loss:.4f} over {result.n_tokens} label tokens")
    if other is not None:
        click.echo(f"reference {other.loss:.4f}, difference {result.loss - other.loss:+.4f}")


def _load(directory: Path, settings: dict[str, Any]) -> SwitchModel:
    try:
        from .model import load
    except ImportError as error:
        raise MissingExtraError(f"{error.name} is not installed: pip install 'qmoecodec[torch,hf]'") from error
    return load(directory, **settings)


def _evaluate(model: SwitchModel, samples: TokenSet, batch_size: int, title: str) -> Evaluation:
    from rich.console import Console
    from rich.progress import Progress

    from .evaluation import evaluate as run

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(title, total=len(samples))
        return run(model, samples, batch_size=batch_size, progress=lambda done: bar.update(task, completed=done))


def _print_json(**values: Any) -> None:
    click.echo(json.dumps({"schema": 1, **values}))
