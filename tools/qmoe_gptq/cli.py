"""The command ``qmoecodec quantize``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qmoecodec.cli import json_option

if TYPE_CHECKING:
    from .plan import Plan

# From this relative difference on a target counts as missed. Small matrices leave steps in what can be reached.
MISSED_TARGET = 0.02
_DEFAULT_SAMPLES = "all of a token file, 1024 of a text"


@click.command()
@click.argument("model_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--calibration", required=True, type=click.Path(path_type=Path),
              help="Token file (.npz with input_ids, labels, decoder_input_ids) or UTF-8 text.")  # fmt: skip
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), help="Directory to create.")
@click.option("--method", type=click.Choice(["gptq", "gptq-2023", "rtn"]), default="gptq", show_default=True,
              help="Ours, the QMoE paper's, or rounding to nearest.")  # fmt: skip
@click.option("--target-bits", type=float, help="Payload bits per weight, 0.3 to 1.58. [default: the paper's rate]")
@click.option("--tune", type=click.Choice(["auto", "model", "block", "none"]), default="auto", show_default=True,
              help="Tune against the original model: whole if it fits into memory, else block by block.")  # fmt: skip
@click.option("--epochs", type=float, default=None, help="Passes over the calibration data when tuning.")
@click.option("--samples", type=click.IntRange(min=1), help=f"Calibration samples to use. [default: {_DEFAULT_SAMPLES}]")
@click.option("--damping", type=float, default=0.1, show_default=True, help="Share of the Hessian's mean diagonal.")
@click.option("--mask-special/--keep-special", default=None,
              help="Leave sentinels out of the Hessian. [default: mask for gptq, keep for gptq-2023]")  # fmt: skip
@click.option("--token-cap", type=float, default=4.0, show_default=True,
              help="Most tokens per expert, as a multiple of the mean.")  # fmt: skip
@click.option("--min-tokens", type=int, default=1, show_default=True,
              help="Experts with fewer tokens are rounded to nearest.")  # fmt: skip
@click.option("--max-fallback", type=click.FloatRange(0, 1), default=1.0, show_default=True,
              help="Fail when a larger share of the expert matrices is rounded to nearest.")  # fmt: skip
@click.option("--check-fit/--no-check-fit", default=True, show_default=True,
              help="Refuse calibration data that the model predicts no better than chance.")  # fmt: skip
@click.option("--group", type=int, default=16, show_default=True, help="Experts quantized at once.")
@click.option("--batch", type=int, default=32, show_default=True, help="Samples per tuning step.")
@click.option("--resample/--no-resample", default=True, show_default=True,
              help="Tune on new span corruptions of the calibration texts.")  # fmt: skip
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--offload/--no-offload", default=False, show_default=True, help="Keep activations in files.")
@click.option("--resume/--no-resume", default=True, show_default=True, help="Use finished units of an earlier run.")
@click.option("--keep-work", is_flag=True, help="Keep OUTPUT.work with the finished units.")
@click.option("--format", "form", type=click.Choice(["packed", "dense"]), default="packed", show_default=True,
              help="Pack with the codec, or write ternary values in the source's dtype.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.")
@click.option("--dry-run", is_flag=True, help="Estimate memory and time, write nothing.")
@json_option
def quantize(
    model_dir: Path,
    calibration: Path,
    out: Path | None,
    samples: int | None,
    epochs: float | None,
    resume: bool,
    max_fallback: float,
    check_fit: bool,
    offload: bool,
    keep_work: bool,
    form: str,
    threads: int | None,
    dry_run: bool,
    as_json: bool,
    **rest: Any,
) -> None:
    """Compress the experts of a Switch Transformer to ternary, with calibration data.

    MODEL_DIR is a transformers checkpoint directory (safetensors, sharded or not). The
    output is a packed checkpoint directory. A run that was stopped continues where it was
    when the same command is given again.
    """
    try:
        from .run import Options, prepare, quantize_checkpoint
        from .settings import Settings
    except ImportError as error:
        raise click.ClickException(f"quantize needs torch: pip install 'qmoecodec[torch]' ({error})") from None
    if out is None and not dry_run:
        raise click.UsageError("Missing option '-o' / '--output'.")
    if epochs is not None:
        rest["epochs"] = epochs
    settings = Settings(**rest)
    options = Options(
        resume=resume, max_fallback=max_fallback, check_fit=check_fit, offload=offload, keep_work=keep_work,
        packed=form == "packed", threads=threads,
    )  # fmt: skip
    checkpoint, data, plan = prepare(model_dir, calibration, samples=samples, settings=settings, options=options)
    if dry_run:
        print_plan(plan, as_json=as_json)
        return
    assert out is not None
    report = quantize_checkpoint(checkpoint, data, plan, out, settings=settings, options=options, progress=_progress())
    bits, target = report["payload_bits_per_weight"], report["target_bits"]
    if target is not None and abs(bits / target - 1) > MISSED_TARGET:
        click.echo(f"note: --target-bits {target} was missed: the payload has {bits:.4f} bits/weight", err=True)
    if as_json:
        click.echo(json.dumps(report))
    else:
        print_report(report, out)


def _progress() -> Callable[[str], None]:
    """Show progress on stderr when somebody is looking."""
    if not sys.stderr.isatty():
        return lambda message: None
    return lambda message: click.echo(message, err=True)


def print_plan(plan: Plan, *, as_json: bool) -> None:
    """Print what a run would need."""
    if as_json:
        facts = {
            "schema": 1,
            "tune": plan.tune,
            "memory_bytes": plan.memory_bytes,
            "scratch_bytes": plan.scratch_bytes,
            "seconds": {**plan.seconds, "total": plan.total_seconds},
        }
        click.echo(json.dumps(facts))
        return
    click.echo(f"tune         {plan.tune}")
    click.echo(f"peak memory  {plan.memory_bytes / 2**30:.2f} GiB")
    click.echo(f"scratch disk {plan.scratch_bytes / 2**30:.2f} GiB")
    phases = ", ".join(f"{name} {value:.0f} s" for name, value in plan.seconds.items())
    click.echo(f"time         {plan.total_seconds:.0f} s ({phases})")


def print_report(report: dict[str, Any], out: Path) -> None:
    """Print the report for people: rate, coverage, fallbacks, cost."""
    click.echo(f"method        {report['method']}, tune {report['tune']}, {report['samples']} samples")
    click.echo(f"zeros         {report['zeros']:.1%}")
    click.echo(f"entropy       {report['entropy_bits_per_weight']:.4f} bits/weight")
    click.echo(f"payload       {report['payload_bits_per_weight']:.4f} bits/weight")
    click.echo("tokens per expert (calibrated on / routed to)")
    for layer in report["coverage"]:
        pairs = list(zip(layer["used"], layer["tokens"], strict=True))
        click.echo(f"  {layer['layer']}: {summarize(pairs)}")
        if layer["special_used_by"]:
            click.echo(f"    calibrated on special tokens too, having few others: {layer['special_used_by']}")
    if report["fallback"]:
        click.echo(f"rounded to nearest, no usable calibration ({len(report['fallback'])} matrices):")
        for entry in report["fallback"]:
            click.echo(f"  {entry['layer']} expert {entry['expert']} {entry['matrix']}")
    took, expected = report["seconds"]["total"], report["estimated"]
    click.echo(f"time          {took:.0f} s (estimated {expected['total_seconds']:.0f} s)")
    memory = report["peak_memory_bytes"] / 2**30
    click.echo(f"peak memory   {memory:.2f} GiB (estimated {expected['memory_bytes'] / 2**30:.2f} GiB)")
    click.echo(f"wrote         {out} ({report['output_bytes'] / 2**20:.1f} MiB)")


def summarize(pairs: list[tuple[int, int]]) -> str:
    """Show every expert of a small layer, and the extremes of a large one."""
    if len(pairs) <= 16:
        return "  ".join(f"{used}/{routed}" for used, routed in pairs)
    used = sorted(u for u, _ in pairs)
    empty = sum(u == 0 for u in used)
    return f"{len(used)} experts, least {used[0]}, median {used[len(used) // 2]}, most {used[-1]}, {empty} without any"
