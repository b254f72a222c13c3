"""Speed of the CUDA kernels beside cuBLAS, on one GPU, as tables in Markdown.

Every number is the median of graph replays (launch gaps and Python are not in it), with so many distinct experts that no
buffer is in the L2 cache when its turn comes. Outputs are filled with NaN before and checked after; inputs are drawn anew.
Ours and cuBLAS run in the same process, one after the other.
"""

from __future__ import annotations

import argparse
import datetime
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from qmoecodec.dictionary import aivf
from qmoecodec.types import Dictionary
from qmoecodec_gpu import backend, encoding, matvec, plan
from qmoecodec_gpu.experts import Bank, GpuExperts
from qmoecodec_gpu.loading import Staged, place_rows

ROOT = pathlib.Path(__file__).parents[2]
L2_BYTES = 60e6
DEVICE = torch.device("cuda", 0)


def draw_digits(n: int, rows: int, cols: int, p_zero: float) -> torch.Tensor:
    """Draw int8[n, rows, cols] of independent digits."""
    out = torch.empty((n, rows, cols), dtype=torch.int8, device=DEVICE)
    for e in range(n):
        u = torch.rand((rows, cols), device=DEVICE)
        out[e] = (u > p_zero).to(torch.int8) - 2 * (u > (1 + p_zero) / 2).to(torch.int8)
    return out


def repeat(staged: Staged, n: int) -> Staged:
    """Give n experts their own memory by repeating those there are."""
    distinct = staged.shape[0]
    times = -(-n // distinct)
    sizes = torch.diff(staged.expert_start).cpu().numpy()
    part = [int(sizes[: n % distinct].sum())] if n % distinct else []
    codes = torch.cat([staged.codes] * (n // distinct) + [staged.codes[:k] for k in part])
    return place_rows(
        shape=(n, *staged.shape[1:]),
        codes=codes,
        sizes=np.tile(sizes, times)[:n],
        row_lengths=staged.row_lengths.repeat(times, 1)[:n],
        dictionary_index=staged.dictionary_index.repeat(times)[:n],
        bits=staged.bits,
    )


def make_levels(n: int, rows: int) -> torch.Tensor:
    """Draw bfloat16 levels."""
    return torch.stack([-torch.rand(n, rows) - 0.1, torch.rand(n, rows) + 0.1], -1).to(DEVICE).bfloat16()


class Subject:
    """Experts compressed, and the same experts as bfloat16 matrices."""

    def __init__(
        self, rows: int, cols: int, p_zero: float, *, dictionary: Dictionary | None = None, digits: torch.Tensor | None = None,
        n: int | None = None,
    ) -> None:
        self.digits = draw_digits(2, rows, cols, p_zero) if digits is None else digits
        rest = (1 - p_zero) / 2
        self.dictionary = dictionary or aivf.build(rest, p_zero, rest, code_bits=8)
        staged = encoding.encode(self.digits, self.dictionary)
        per_expert = staged.codes.numel() / len(self.digits)
        self.bits_per_weight = 8 * per_expert / (rows * cols)
        self.n = n or max(62, int(1.4 * L2_BYTES / per_expert) + 1)
        distinct = len(self.digits)
        levels = make_levels(distinct, rows)
        self.levels = levels.repeat(-(-self.n // distinct), 1, 1)[: self.n].contiguous()
        self.staged = repeat(staged, self.n)
        self.bank = Bank.upload((self.dictionary,), DEVICE)
        self.level_bytes = self.levels.view(torch.uint8)
        self.experts = GpuExperts.from_staged(self.staged, self.bank, self.level_bytes, "BF16")
        low, high = self.levels[:distinct, :, :1].float(), self.levels[:distinct, :, 1:].float()
        zero = torch.zeros((), device=DEVICE)
        some = torch.where(self.digits < 0, low, torch.where(self.digits > 0, high, zero)).bfloat16()
        self.dense = torch.empty((self.n, rows, cols), dtype=torch.bfloat16, device=DEVICE)
        for e in range(self.n):
            self.dense[e] = some[e % distinct]

    def reference(self, e: int, x: torch.Tensor) -> torch.Tensor:
        """Multiply in float64: x[tokens, cols] -> [tokens, rows]."""
        return x.double() @ self.dense[e].double().T


def capture(work: Callable[[], object]) -> Callable[[], None]:
    """Capture work in a CUDA graph and return its replay."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def median_us(work: Callable[[], object], *, repeats: int = 15) -> float:
    """Median time of one call, in microseconds, by events."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


def check(subject: Subject, y: torch.Tensor, x: torch.Tensor, tokens: int) -> float:
    """Relative error of a few experts; a NaN anywhere fails."""
    if not bool(y.isfinite().all()):
        raise AssertionError("an output was not written")
    worst = 0.0
    for e in (0, 1, subject.n // 2, subject.n - 1):
        exact = subject.reference(e, x[e * tokens : (e + 1) * tokens])
        got = y[e * tokens : (e + 1) * tokens].double()
        worst = max(worst, float((got - exact).norm() / exact.norm()))
    if worst > 4e-3:
        raise AssertionError(f"relative error {worst}")
    return worst


def grouped(subject: Subject, tokens: int) -> tuple[float, float, float, float]:
    """Times per expert of all experts with `tokens` tokens each: kernel, kernel with routing, bmm; and the error."""
    rows, cols = subject.experts.shape[1:]
    n = subject.n
    x = torch.randn(n * tokens, cols, device=DEVICE).bfloat16()
    numbers = torch.arange(n, device=DEVICE).repeat_interleave(tokens)
    one = (matvec.largest_class(subject.experts), 9)  # no large items
    largest, least = one if tokens == 1 else matvec.choose_sizes((subject.experts, x))
    items = matvec.route(numbers, n_experts=n, largest=largest, least=least)
    y = torch.full((n * tokens, rows), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    replay = capture(lambda: matvec.run(subject.experts, items, x, y))
    y.fill_(float("nan"))
    replay()
    error = check(subject, y, x, tokens)
    kernel = median_us(replay) / n
    whole = median_us(capture(lambda: matvec.grouped_matvec(subject.experts, x, numbers))) / n
    transposed = x.view(n, tokens, cols).transpose(1, 2)
    product = torch.empty((n, rows, tokens), dtype=torch.bfloat16, device=DEVICE)
    bmm = median_us(capture(lambda: torch.bmm(subject.dense, transposed, out=product))) / n
    return kernel, whole, bmm, error


def one_by_one(subject: Subject) -> tuple[float, float]:
    """Times per launch with one expert per launch: ours and torch.mv."""
    n = min(subject.n, 200)
    rows, cols = subject.experts.shape[1:]
    x = torch.randn(n, cols, device=DEVICE).bfloat16()
    y = torch.full((n, rows), float("nan"), dtype=torch.bfloat16, device=DEVICE)

    def ours() -> None:
        for e in range(n):
            matvec.matvec(subject.experts, x[e], e, out=y[e])

    def dense() -> None:
        for e in range(n):
            torch.mv(subject.dense[e], x[e], out=y[e])

    replay = capture(ours)
    y.fill_(float("nan"))
    replay()
    exact = subject.reference(0, x[:1])[0]
    if float((y[0].double() - exact).norm() / exact.norm()) > 4e-3 or not bool(y.isfinite().all()):
        raise AssertionError("wrong result")
    return median_us(replay, repeats=9) / n, median_us(capture(dense), repeats=9) / n


class Report:
    """Lines to the terminal as they come, and to a file at the end."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, line: str = "") -> None:
        self.lines.append(line)
        print(line, flush=True)

    def table(self, *cells: str) -> None:
        self("| " + " | ".join(cells) + " |")

    def header(self, *cells: str) -> None:
        self.table(*cells)
        self("|" + "---|" * len(cells))


def describe(report: Report, *, times: bool = True) -> None:
    """Say on what this was measured."""
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, check=False
    ).stdout.split("\n")[0]  # one line per GPU
    import cupy

    # Where the report goes is nobody's business.
    command = [a for i, a in enumerate(sys.argv) if a != "--out" and (i == 0 or sys.argv[i - 1] != "--out")]
    report(f"# GPU kernels, {datetime.date.today().isoformat()}")
    report()
    report(
        f"{torch.cuda.get_device_name()}, driver {driver}, torch {torch.__version__}, CuPy {cupy.__version__}, "
        f"Python {platform.python_version()}. Command: `python {' '.join(command)}`."
    )
    if times:
        report("Times in microseconds per expert, medians of CUDA graph replays; x and y bfloat16, sums float32.")


LARGE = ((2080, 6144), (6144, 2080))
SMALL = ((768, 3072), (3072, 768), (1024, 4096), (4096, 1024))


def bench_grouped(report: Report, shapes: Sequence[tuple[int, int]] = LARGE + SMALL) -> None:
    """Grouped product, one token per expert."""
    report("\n## Grouped, one token per expert, P(0) = .885\n")
    report.header("rows x cols", "experts", "bits/weight", "ours", "with routing", "bmm", "ratio", "rel. error")
    for rows, cols in shapes:
        subject = Subject(rows, cols, 0.885)
        kernel, whole, bmm, error = grouped(subject, 1)
        report.table(
            f"{rows} x {cols}", str(subject.n), f"{subject.bits_per_weight:.4f}", f"{kernel:.3f}", f"{whole:.3f}",
            f"{bmm:.2f}", f"{bmm / kernel:.2f}", f"{error:.1e}",
        )  # fmt: skip
        del subject
        torch.cuda.empty_cache()


def bench_shapes(report: Report) -> None:
    """Odd shapes."""
    report("\n## Grouped, one token, other shapes, P(0) = .885\n")
    report.header("rows x cols", "kernel", "ours", "bmm", "ratio", "rel. error")
    for rows, cols, n in ((517, 1031, 0), (1, 1, 100), (33, 70000, 62), (14336, 4096, 62), (4096, 14336, 62)):
        subject = Subject(rows, cols, 0.885, n=n or None)
        kernel, _, bmm, error = grouped(subject, 1)
        name = "general" if subject.experts.gather_plan(1) is None else "gather"
        report.table(f"{rows} x {cols}", name, f"{kernel:.3f}", f"{bmm:.2f}", f"{bmm / kernel:.2f}", f"{error:.1e}")
        del subject
        torch.cuda.empty_cache()


def bench_densities(report: Report, example: pathlib.Path) -> None:
    """Other densities, other dictionaries, and real ternary experts."""
    report("\n## Grouped, one token, other densities and dictionaries, 2080 x 6144\n")
    report.header("P(0)", "dictionary", "bits/weight", "ours", "bmm", "ratio", "rel. error")

    def line(name: str, kind: str, subject: Subject) -> None:
        kernel, _, bmm, error = grouped(subject, 1)
        report.table(
            name, kind, f"{subject.bits_per_weight:.4f}", f"{kernel:.3f}", f"{bmm:.2f}", f"{bmm / kernel:.2f}", f"{error:.1e}"
        )

    for p_zero in (0.80, 0.95, 0.5):
        line(f"{p_zero}", "8 bit", Subject(2080, 6144, p_zero))
        torch.cuda.empty_cache()
    rest = (1 - 0.885) / 2
    line("0.885", "12 bit (general kernel)", Subject(2080, 6144, 0.885, dictionary=aivf.build(rest, 0.885, rest, code_bits=12)))
    torch.cuda.empty_cache()
    if example.exists():
        stored = np.load(example)  # examples/make_ternary.py says how: five digits per byte, matrices one after the other
        digits = (stored["digits"][:, None] // np.array([1, 3, 9, 27, 81], np.uint8) % 3).reshape(-1)
        signed = np.array([0, -1, 1], np.int8)[digits]
        for name, shape, matrices in (("wi", (1024, 256), slice(0, None, 2)), ("wo", (256, 1024), slice(1, None, 2))):
            every = signed[: 16 * 1024 * 256].reshape(16, -1)[matrices].reshape(-1, *shape)
            p_zero = float((every == 0).mean())
            subject = Subject(*shape, p_zero, digits=torch.from_numpy(every).to(DEVICE))
            line(f"{p_zero:.3f}", f"8 bit, the example's {name}, {shape[0]} x {shape[1]}", subject)


def bench_single(report: Report, shapes: Sequence[tuple[int, int]] = LARGE + SMALL) -> None:
    """One expert per launch."""
    report("\n## One expert per launch\n")
    report.header("rows x cols", "ours", "torch.mv", "ratio")
    for rows, cols in shapes:
        ours, dense = one_by_one(Subject(rows, cols, 0.885))
        report.table(f"{rows} x {cols}", f"{ours:.2f}", f"{dense:.2f}", f"{dense / ours:.2f}")
        torch.cuda.empty_cache()


TOKEN_COUNTS = (2, 4, 8, 16, 32, 64, 128, 256, 512)


def bench_tokens(report: Report, shapes: Sequence[tuple[int, int]] = LARGE, counts: Sequence[int] = TOKEN_COUNTS) -> None:
    """Several tokens per expert."""
    report("\n## Several tokens per expert\n")
    report.header("rows x cols", "tokens", "ours", "with routing", "bmm", "ratio", "rel. error")
    for rows, cols in shapes:
        subject = Subject(rows, cols, 0.885)
        for tokens in counts:
            kernel, whole, bmm, error = grouped(subject, tokens)
            report.table(
                f"{rows} x {cols}", str(tokens), f"{kernel:.2f}", f"{whole:.2f}", f"{bmm:.2f}", f"{bmm / kernel:.2f}",
                f"{error:.1e}",
            )  # fmt: skip
        del subject
        torch.cuda.empty_cache()


def few(subject: Subject, n: int, tokens: int) -> tuple[str, float, float]:
    """The kernel of n experts with so many tokens each, and the times of a launch: ours with routing, and bmm."""
    _, rows, cols = subject.experts.shape
    x = torch.randn(n * tokens, cols, device=DEVICE).bfloat16()
    launches = max(1, min(subject.n // n, 24 // n))  # each with experts of its own
    numbers = [torch.arange(i * n, (i + 1) * n, device=DEVICE).repeat_interleave(tokens) for i in range(launches)]
    y = torch.empty((n, rows, tokens), dtype=torch.bfloat16, device=DEVICE)

    def ours() -> None:
        for some in numbers:
            matvec.grouped_matvec(subject.experts, x, some)

    def dense() -> None:
        for i in range(launches):
            torch.bmm(subject.dense[i * n : (i + 1) * n], x.view(n, tokens, cols).transpose(1, 2), out=y)

    us, bmm = (median_us(capture(work), repeats=7) / launches for work in (ours, dense))
    largest, _ = matvec.choose_sizes((subject.experts, x))
    return {plan.DIGITS_TOKENS: "digits", plan.TILE_TOKENS: "tile"}.get(largest, "gather"), us, bmm


def bench_few(report: Report, shapes: Sequence[tuple[int, int]] = LARGE + SMALL[:1]) -> None:
    """Few experts at a time, which leave most of the device idle."""
    report("\n## Few experts with several tokens, us per launch\n")
    report.header("rows x cols", "experts", "tokens of each", "kernel", "ours, with routing", "bmm", "ratio")
    for rows, cols in shapes:
        subject = Subject(rows, cols, 0.885)
        for n in (1, 4, 16):
            for tokens in (16, 64):
                name, us, bmm = few(subject, n, tokens)
                report.table(f"{rows} x {cols}", str(n), str(tokens), name, f"{us:.1f}", f"{bmm:.1f}", f"{bmm / us:.2f}")
        del subject
        torch.cuda.empty_cache()


def bench_dense(report: Report) -> None:
    """Decoding, and the dense product behind it."""
    report("\n## Decode, encode, load, 2080 x 6144\n")
    subject = Subject(2080, 6144, 0.885)
    experts, n = subject.experts, subject.n
    rows, cols = experts.shape[1:]
    out = torch.empty_like(subject.dense)
    us = median_us(capture(lambda: experts.decode(dtype=torch.bfloat16, out=out)))
    if not torch.equal(out, subject.dense):
        raise AssertionError("decode is wrong")
    report.header("what", "time", "rate")
    report.table("decode to bfloat16", f"{us / n:.2f} us per expert", f"{out.nbytes / us / 1e6:.2f} TB/s written")
    copy_us = median_us(capture(lambda: out.copy_(subject.dense)))
    report.table("copy of the same", f"{copy_us / n:.2f} us per expert", f"{out.nbytes / copy_us / 1e6:.2f} TB/s written")
    digits = torch.empty((n, rows, cols), dtype=torch.int8, device=DEVICE)
    us = median_us(capture(lambda: experts.decode(out=digits)))
    report.table("decode to int8", f"{us / n:.2f} us per expert", f"{digits.nbytes / us / 1e6:.2f} TB/s written")
    for count in (1, 16):
        us = median_us(lambda: encoding.encode(digits[:count], subject.dictionary), repeats=7)  # noqa: B023
        report.table(
            f"encode {count} experts", f"{us / count:.1f} us per expert", f"{digits[:count].numel() / us / 1e3:.1f} G weights/s"
        )
    scratch = torch.empty((rows, cols), dtype=torch.bfloat16, device=DEVICE)
    report("\nOne expert and many tokens, one product per launch: fused, decoded to scratch first, and cuBLAS on bfloat16:\n")
    report.header("tokens", "fused", "decoded first", "cuBLAS", "cuBLAS / best of ours")
    for tokens in (16, 32, 64, 128, 256, 512, 1024, 2048, 4096):
        x = torch.randn(tokens, cols, device=DEVICE).bfloat16()
        some = min(n, 32)

        def ours(dense_from: int, x: torch.Tensor = x, some: int = some) -> None:
            for e in range(some):
                matvec.matmul(experts, x, e, scratch=scratch, dense_from=dense_from)

        def dense(x: torch.Tensor = x, some: int = some) -> None:
            for e in range(some):
                torch.mm(x, subject.dense[e].T)

        times = [
            median_us(capture(work), repeats=7) / some
            for work in (lambda: ours(1 << 30), lambda: ours(0), dense)
        ]
        report.table(str(tokens), *(f"{us:.1f}" for us in times), f"{times[2] / min(times[:2]):.2f}")


def bench_load(report: Report, directory: pathlib.Path) -> None:
    """Load from the page cache: mapped bytes to ready experts."""
    subject = Subject(2080, 6144, 0.885, n=1024)
    encoded = encoding.to_encoded(subject.staged, subject.dictionary)
    levels = subject.levels.cpu().view(torch.int16).numpy().view(np.uint16)
    del subject
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        path = pathlib.Path(folder) / "codes"
        encoded.codes.tofile(path)
        mapped = np.memmap(path, np.uint8, "r")
        int(mapped[::4096].sum())
        object.__setattr__(encoded, "codes", mapped.view(np.ndarray))
        times = []
        for _ in range(4):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            experts = GpuExperts.load(encoded, levels, dtype="BF16")
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
            del experts
        seconds = statistics.median(times[1:])
        size = encoded.codes.nbytes + encoded.row_lengths.nbytes + levels.nbytes
        rate = size / seconds / 1e9
        report(f"\nLoad, check and repack {size / 1e9:.2f} GB from the page cache: {seconds:.3f} s, {rate:.1f} GB/s")


SECTIONS = ("grouped", "shapes", "densities", "single", "tokens", "few", "dense", "load")


def main() -> None:
    """Run the sections asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, help="folder for the report; default tools/bench/results")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, comma-separated")
    parser.add_argument(
        "--example", type=pathlib.Path, default=ROOT / "examples/ternary-gptq-2023.npz", help="real ternary experts"
    )
    arguments = parser.parse_args()
    backend.load()
    torch.manual_seed(time.time_ns() % 2**31)
    report = Report()
    describe(report)
    sections: dict[str, Callable[[], None]] = {
        "grouped": lambda: bench_grouped(report),
        "shapes": lambda: bench_shapes(report),
        "densities": lambda: bench_densities(report, arguments.example),
        "single": lambda: bench_single(report),
        "tokens": lambda: bench_tokens(report),
        "few": lambda: bench_few(report),
        "dense": lambda: bench_dense(report),
        "load": lambda: bench_load(report, pathlib.Path(tempfile.gettempdir())),
    }
    failed = False
    for name in arguments.only.split(","):
        try:
            sections[name]()
        except Exception as error:
            failed = True
            report(f"\n**{name} failed: {error!r}**")
            if "illegal" in str(error) or "CUDA" in str(error):
                break
        torch.cuda.empty_cache()
    out = arguments.out or pathlib.Path(__file__).parent / "results"
    out.mkdir(parents=True, exist_ok=True)
    slug = torch.cuda.get_device_name().lower().replace(" ", "-")
    (out / f"gpu-{slug}-{datetime.date.today().isoformat()}.md").write_text("\n".join(report.lines) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
