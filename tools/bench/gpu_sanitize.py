"""Run every kernel, and the conformance vectors, under compute-sanitizer: its tools must find nothing.

Two steps, because of initcheck. It must see every write, so it cannot leave out kernels of other libraries (a filter makes all
that torch wrote look uninitialised: a report per byte that ours read); and with them it patches all that torch loads, which
takes longer than anybody waits.
  1. Record, without a tool: the package runs as ever, and each launch is written down with its compiled code, its arguments, and
     every byte of their memory that did not come from one of our kernels. Memory from torch.empty is poisoned, to tell
     what has been written.
  2. Replay (gpu_replay.py) under each tool: the same launches from a process that has nothing else in it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from gpu_cases import CASES, HOPPER, draw, five_digits, run_case, symmetric  # of this folder
from gpu_replay import POISON

TOOLS = ("initcheck", "memcheck", "racecheck", "synccheck")
ROOT = pathlib.Path(__file__).resolve().parents[2]
VECTOR_PARTS = 6
#: Kernels whose items stand in the order in which threads came; decode_digits where it decodes listed experts (OUT_BYTES=0).
IN_ANY_ORDER = ("route_tokens", "make_items", "place_tokens", "list_experts", "decode_digits")
#: In shared memory, more than any kernel has.
BARRIERS_PER_BLOCK = 8192

# ---- recording -------------------------------------------------------------------------------------------------------


class Pointer(int):
    """An address, and the tensor that it came from."""

    tensor: Any


class Recorder:
    """Writes down the launches of the package between `install` and `save`."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.operations: list[Any] = []
        self.blob = bytearray()
        self.buffers: dict[int, tuple[int, Any, Any]] = {}  # address: number, storage, content as it will be in the replay
        self.poisoned: dict[int, Any] = {}
        self.forms: set[tuple[str, ...]] = set()
        self.form: tuple[str, ...] = ()
        self.cubins: dict[str, str] = {}
        self.n_buffers = 0

    def install(self) -> None:
        """Put this recorder between the package, torch and CuPy."""
        import cupy
        import torch

        from qmoecodec_gpu import modules

        self.torch, self.cupy, self.raw_module = torch, cupy, cupy.RawModule
        empty = torch.empty

        def poisoned_empty(*args: Any, **options: Any) -> Any:
            made = empty(*args, **options)
            if made.is_cuda and made.numel():
                self._bytes(made.untyped_storage()).fill_(POISON)
                self.poisoned[made.untyped_storage().data_ptr()] = made
            return made

        def pointer(tensor: Any) -> int:
            if tensor is None or not tensor.numel():
                return 0
            found = Pointer(tensor.data_ptr())
            found.tensor = tensor
            return found

        real_launch = modules.launch

        def launch(*args: Any, early: bool = False, **options: Any) -> None:
            real_launch(*args, **options)  # through CuPy, where it is written down; an early start is for speed alone

        torch.empty = poisoned_empty
        modules.launch = launch
        self.real_function = modules.function
        modules.pointer = pointer
        modules.function = self.function
        cupy.RawModule = self.module

    def _bytes(self, storage: Any) -> Any:
        view = self.torch.tensor([], dtype=self.torch.uint8, device="cuda")
        return view.set_(storage, 0, (storage.nbytes(),))

    def function(self, device: Any, file: str, name: str, macros: Any = None) -> Any:
        """Note what is compiled next."""
        self.form = (file, *(f"{macro}={value}" for macro, value in sorted((macros or {}).items())))
        return self.real_function(device, file, name, macros)

    def module(self, **arguments: Any) -> RecordedModule:
        """Make a module from source, or from a file that the package has compiled itself."""
        if "code" in arguments:
            arguments["options"] = (*arguments["options"], "-lineinfo")
        key, path = repr(sorted(arguments.items())), arguments.get("path")
        return RecordedModule(self, self.raw_module(**arguments), key, path, self.form)

    def keep_code(self, key: str, path: str | None) -> str:
        """Copy what was just compiled into the recording, out of CuPy's cache if need be, which is this process's own."""
        if key not in self.cubins:
            cache = pathlib.Path(os.environ["CUPY_CACHE_DIR"])
            found = {p.name for p in cache.glob("*.cubin")} - set(self.cubins.values())
            if path is not None:
                found &= {pathlib.Path(path).name}
            if len(found) != 1:
                raise RuntimeError(f"CuPy put {len(found)} new files into {cache}")
            self.cubins[key] = found.pop()
            content = (cache / self.cubins[key]).read_bytes()  # perhaps a checksum, and an ELF file
            self.folder.mkdir(exist_ok=True)
            (self.folder / self.cubins[key]).write_bytes(content[content.index(b"\x7fELF") :])
        return self.cubins[key]

    def case(self, name: str) -> None:
        """Begin a case; the memory of the one before is forgotten."""
        print(f"recording {name}", flush=True)
        self.operations.append(["case", name])
        self.buffers.clear()
        self.poisoned.clear()
        self.torch.cuda.empty_cache()

    def store(self, data: bytes) -> tuple[int, int]:
        at = len(self.blob)
        self.blob += data
        return at, len(data)

    def before(self, pointer: Pointer) -> list[int]:
        """Bring the replay's copy of a buffer up to date; return its number and the offset of the pointer."""
        storage = pointer.tensor.untyped_storage()
        address = storage.data_ptr()
        content = self._bytes(storage).cpu().numpy()
        if address not in self.buffers:
            number, known = self.n_buffers, np.full(len(content), POISON, np.uint8)
            self.n_buffers += 1
            self.operations.append(["allocate", number, len(content)])
            changed = content != known if address in self.poisoned else np.ones(len(content), bool)
        else:
            number, _, known = self.buffers[address]
            changed = content != known
        self.buffers[address] = (number, pointer.tensor, content)
        # Gaps of a few bytes are bytes that came to hold what they held.
        for begin, end in runs(changed, 16):
            self.operations.append(["upload", number, begin, *self.store(content[begin:end].tobytes())])
        return [number, int(pointer) - address]

    def launch(self, cubin: str, name: str, form: tuple[str, ...], kernel: Any, grid: tuple[int, ...],
               block: tuple[int, ...], args: tuple[Any, ...], shared_mem: int) -> None:  # fmt: skip
        """Record one launch, and let it happen."""
        self.torch.cuda.synchronize()
        pointers = [a for a in args if isinstance(a, Pointer)]
        arguments: list[Any] = []
        for a in args:
            if isinstance(a, Pointer):
                arguments.append(self.before(a))
            elif isinstance(a, np.generic):
                arguments.append(a.tobytes().hex())
            elif isinstance(a, int) and abs(a) < 1 << 40:
                arguments.append((a & (1 << 64) - 1).to_bytes(8, "little").hex())
            else:
                raise ValueError(f"{name}: argument {a!r} is neither a number nor an address from modules.pointer")
        if len(grid) > 2 or len(block) != 1:
            raise ValueError(f"{name}: the replay takes a grid of two dimensions and blocks of one, not {grid}, {block}")
        self.operations.append(["launch", cubin, name, list(grid), block[0], shared_mem, arguments])
        self.forms.add((name, *form))
        kernel(grid, block, tuple(int(a) if isinstance(a, Pointer) else a for a in args), shared_mem=shared_mem)
        self.torch.cuda.synchronize()
        for address in {p.tensor.untyped_storage().data_ptr(): None for p in pointers}:
            number, tensor, known = self.buffers[address]
            content = self._bytes(tensor.untyped_storage()).cpu().numpy()
            self.buffers[address] = (number, tensor, content)
            if name not in IN_ANY_ORDER or {"OUT_BYTES=1", "OUT_BYTES=2"} & set(form):
                for begin, end in runs(content != known, 1):  # a gap may be what another launch writes
                    self.operations.append(["compare", number, begin, *self.store(content[begin:end].tobytes()), name])

    def save(self) -> None:
        """Write the recording."""
        (self.folder / "operations.json").write_text(json.dumps(self.operations))
        (self.folder / "blob").write_bytes(self.blob)
        (self.folder / "forms.json").write_text(json.dumps(sorted(self.forms)))


class RecordedModule:
    """A module whose kernels write down their launches."""

    def __init__(self, recorder: Recorder, module: Any, key: str, path: str | None, form: tuple[str, ...]) -> None:
        self.recorder, self.module, self.key, self.path, self.form = recorder, module, key, path, form
        self.cubin = ""

    def get_function(self, name: str) -> RecordedKernel:
        kernel = self.module.get_function(name)
        assert kernel.kernel is not None  # now it is compiled
        self.cubin = self.recorder.keep_code(self.key, self.path)
        return RecordedKernel(self, name, kernel)


class RecordedKernel:
    """A kernel that writes down its launches."""

    def __init__(self, module: RecordedModule, name: str, kernel: Any) -> None:
        self.__dict__.update(module=module, name=name, kernel=kernel)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.kernel, name, value)

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], *, shared_mem: int = 0) -> None:
        module = self.module
        module.recorder.launch(module.cubin, self.name, module.form, self.kernel, grid, block, args, shared_mem)


def runs(changed: Any, gap: int) -> Iterator[tuple[int, int]]:
    """Return the stretches that changed, with what lies between two that are at most `gap` bytes apart."""
    places = np.flatnonzero(changed)
    if not len(places):
        return
    cuts = np.flatnonzero(np.diff(places) > gap)
    begins = [places[0], *places[cuts + 1]]
    ends = [*places[cuts], places[-1]]
    for begin, end in zip(begins, ends, strict=True):
        yield int(begin), int(end) + 1


# ---- what is recorded ------------------------------------------------------------------------------------------------


def record_cases(recorder: Recorder, name: str) -> None:
    """Record one list of cases."""
    rng = np.random.default_rng(sorted(CASES).index(name))
    for title, case in CASES[name].items():
        recorder.case(title)
        run_case(case, rng)


def record_rest(recorder: Recorder) -> None:
    """Record what is not about one group: several dictionaries, two matrices, many tokens, encoding."""
    import torch

    import qmoecodec
    from qmoecodec_gpu import encoding, matvec
    from qmoecodec_gpu.experts import GpuExperts

    rng = np.random.default_rng(99)

    def load(digits: Any, bank: Any) -> GpuExperts:
        levels = torch.stack([-torch.rand(digits.shape[:2]) - 0.1, torch.rand(digits.shape[:2]) + 0.1], -1)
        return GpuExperts.load(qmoecodec.encode(digits, dictionary=bank), levels.bfloat16())

    recorder.case("several dictionaries")
    digits = np.concatenate([draw((1, 24, 1504), p, rng) for p in (0.8, 0.95, 0.5, 0.82)])
    experts = load(digits, [symmetric(p) for p in (0.8, 0.95, 0.5)])
    for numbers in ([0, 1, 2, 3], [3] * 20 + [2] * 20 + [1, 0, 0]):
        x = torch.randn(len(numbers), 1504).bfloat16().cuda()
        matvec.grouped_matvec(experts, x, torch.tensor(numbers, device="cuda"))
    matvec.matmul(experts, x[:40], 2)
    matvec.matmul(experts, torch.randn(60, 1504).bfloat16().cuda(), 1)

    recorder.case("two matrices")
    wi, wo = load(draw((5, 96, 64), 0.85, rng), symmetric(0.8)), load(draw((5, 64, 96), 0.85, rng), symmetric(0.8))
    for tokens in (9, 90):
        x = torch.randn(tokens, 64).bfloat16().cuda()
        numbers = torch.from_numpy(rng.integers(0, 5, size=tokens)).cuda()
        matvec.moe_mlp(x, numbers, wi, wo, scale=torch.rand(tokens).cuda())

    recorder.case("the quantizer's solver")
    from qmoe_gptq import cuda

    for n, columns, rows in ((1, 1, 1), (2, 40, 130), (3, 128, 70)):
        w = torch.randn(n, columns, rows, device="cuda")
        upper = torch.linalg.cholesky(torch.eye(columns, device="cuda").expand(n, -1, -1) * 2 + 0.1, upper=True)
        lo, hi = -torch.rand(n, rows, device="cuda") - 0.1, torch.rand(n, rows, device="cuda") + 0.1
        cuda.solve_block(w, upper, lo, hi, lo[:, None].expand_as(w), hi[:, None].expand_as(w), margin=torch.empty_like(w))

    recorder.case("many tokens")
    for largest in (1, 8, 64):
        numbers = torch.from_numpy(rng.integers(-2, 10, size=700)).cuda()
        matvec.route(numbers, n_experts=8, largest=largest)

    for shape in ((1, 3, 6144), (1, 3, 6145), (1, 1, 70000), (2, 130, 600), (1, 2, 200)):
        recorder.case(f"encode {shape}")
        for make in (lambda: symmetric(0.885), lambda: symmetric(0.5), lambda: symmetric(0.885, 12), five_digits):
            digits = draw(shape, 0.885, rng)
            digits[:, -1] = 0
            encoding.encode(torch.from_numpy(digits).cuda(), make())


def record_vectors(recorder: Recorder, part: int) -> None:
    """Record what the device does with the groups of every vector that opens: loading them as they are, decoding, a product."""
    import torch

    import qmoecodec
    from qmoecodec_gpu import matvec
    from qmoecodec_gpu.experts import GpuExperts

    sys.path.insert(0, str(ROOT))
    from tests.gpu import vector_groups

    counts = {"valid": 0, "rejected": 0}
    for name, group in vector_groups.groups(part, VECTOR_PARTS):
        recorder.case(name)
        for layout in ("auto", "file"):
            try:
                experts = GpuExperts.load(group.encoded, group.levels, dtype=group.dtype, layout=layout)
            except qmoecodec.FormatError:
                counts["rejected"] += 1
                continue
            counts["valid"] += 1
            experts.decode()
            experts.decode(dtype=torch.bfloat16)
            if experts.shape[0] and experts.shape[2]:
                x = torch.ones(2, experts.shape[2]).bfloat16().cuda()
                matvec.grouped_matvec(experts, x, torch.zeros(2, dtype=torch.int64).cuda())
    print(f"vectors, part {part}: {counts}", flush=True)


def record(name: str, folder: pathlib.Path) -> None:
    """Record one part of the work."""
    recorder = Recorder(folder / name)
    recorder.install()
    if name != HOPPER:
        from qmoecodec_gpu import modules

        modules.is_sm_90 = lambda device: False
    if name in CASES:
        record_cases(recorder, name)
    elif name == "rest":
        record_rest(recorder)
    else:
        record_vectors(recorder, int(name.removeprefix("vectors-")))
    recorder.save()


# ---- both steps ------------------------------------------------------------------------------------------------------


def uncovered(forms: set[tuple[str, ...]]) -> list[str]:
    """Say which kernels and forms no recording reaches; a form is a kernel, its file, and the macros."""
    kernels = set()
    for file in (ROOT / "gpu" / "qmoecodec_gpu" / "kernels").glob("*.cu"):
        # extern "C" __global__ void [__launch_bounds__(..)] name(
        text = re.sub(r"__launch_bounds__\([^)]*\)", "", file.read_text())
        kernels |= {(name, file.name) for name in re.findall(r'extern "C" __global__ void\s+(\w+)\(', text)}
    missing = [f"{name} of {file}" for name, file in sorted(kernels - {form[:2] for form in forms})]
    wanted = {
        "gather.cu": {"NZ": "2357", "LANES": ("4", "8", "16", "32"), "ONE": "01", "MAX_TOK": "148", "X_F16": "01",
                      "LEVEL_KIND": "012"},
        "tile.cu": {"GROUPS": "124", "NZ": "257", "X_F16": "01"},
        "decode_digits.cu": {"NZ": "237", "LANES": ("4", "8", "16", "32"), "ONE": "01", "OUT_BYTES": "012"},
        "multiply_digits.cu": {"GROUPS": "23", "X_F16": "01"},
        "rows.cu": {"OUT_BYTES": "12", "TOK": "1248", "X_F16": "01", "LEVEL_KIND": "012"},
    }  # fmt: skip
    for file, macros in wanted.items():
        found = [dict(macro.split("=") for macro in form[2:]) for form in forms if form[1] == file]
        for macro, values in macros.items():
            missing += [f"{file} {macro}={value}" for value in sorted(set(values) - {form.get(macro) for form in found})]
        if file == "gather.cu":
            orders = {(tokens, int(form["SEGMENTED_CLASSES"]) >> number & 1) for form in found
                      for number, tokens in enumerate((1, 2, 4, 8)) if tokens <= int(form["MAX_TOK"])}  # fmt: skip
            # Two tokens have natural order only in rows that are too long for one token.
            for tokens, order in sorted({(1, 0), (1, 1), (2, 1), (4, 0), (4, 1), (8, 0), (8, 1)} - orders):
                missing.append(f"{tokens} tokens in {('natural', 'segmented')[order]} order")
    return missing


def main() -> int:
    """Record, then run the tools, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--jobs", type=int, default=8, help="recordings, and processes under a tool, at a time (8)")
    parser.add_argument("--lists", default="", help="record and replay these lists alone, such as hopper,types")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one process (600)")
    parser.add_argument("--no-vectors", action="store_true", help="leave the conformance vectors out")
    parser.add_argument("--logs", type=pathlib.Path, help="a folder for the tools' whole output")
    parser.add_argument("--record", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.record:
        record(arguments.record[0], pathlib.Path(arguments.record[1]))
        return 0
    logs = arguments.logs or pathlib.Path(tempfile.mkdtemp(prefix="sanitize-logs-"))
    with tempfile.TemporaryDirectory(prefix="sanitize-") as folder:
        return run(pathlib.Path(folder), logs, arguments)


def run(folder: pathlib.Path, logs: pathlib.Path, arguments: argparse.Namespace) -> int:
    """Do both steps; returns the exit status."""
    begin = time.monotonic()
    failed = False
    names = [*CASES, "rest", *([] if arguments.no_vectors else [f"vectors-{k}" for k in range(VECTOR_PARTS)])]
    if arguments.lists:
        unknown = set(arguments.lists.split(",")) - set(names)
        if unknown:
            raise SystemExit(f"no lists: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
        names = arguments.lists.split(",")

    def record_one(name: str) -> tuple[str, subprocess.CompletedProcess[str]]:
        command = [sys.executable, __file__, "--record", name, str(folder)]
        environment = os.environ | {"CUPY_CACHE_DIR": str(folder / f"cache-{name}")}
        return name, subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=environment
        )

    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        for name, done in pool.map(record_one, names):
            (logs / f"record-{name}.log").write_text(done.stdout)
            last = done.stdout.strip().splitlines()[-1:]
            print(f"{time.monotonic() - begin:6.1f} s  recorded {name}: {last[0] if last else ''}", flush=True)
            if done.returncode:
                failed = True
                print("\n".join(done.stdout.splitlines()[-25:]), flush=True)
    forms = {tuple(form) for path in folder.glob("*/forms.json") for form in json.loads(path.read_text())}
    missing = [] if arguments.lists else uncovered(forms)
    what = "not asked, with --lists" if arguments.lists else ", ".join(missing) or "none"
    print(f"{len(forms)} kernels and forms; not reached: {what}", flush=True)

    def check(tool: str, title: str, *options: str) -> tuple[str, int | None, float, list[str]]:
        # Left to itself, synccheck's table of barriers overflows.
        barriers = ["--num-cuda-barriers", str(BARRIERS_PER_BLOCK)] if tool == "synccheck" else []
        command = ["compute-sanitizer", "--tool", tool, *barriers, "--error-exitcode", "1", sys.executable,
                   str(ROOT / "tools" / "bench" / "gpu_replay.py"), str(folder), *options]  # fmt: skip
        log = logs / (re.sub(r"\W+", "-", f"{tool} {title}".rstrip()) + ".log")
        start = time.monotonic()
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                status: int | None = process.wait(arguments.timeout)
            except subprocess.TimeoutExpired:
                status = None
                os.killpg(process.pid, signal.SIGKILL)  # the tool and what runs under it
                process.wait()
        return f"{tool} {title}".rstrip(), status, time.monotonic() - start, log.read_text().splitlines()

    # What only Hopper has runs apart: a tool may not know its asynchronous copies.
    tools = arguments.tools.split(",")
    work = [functools.partial(check, tool, "", "--but", HOPPER) for tool in tools if set(names) != {HOPPER}]
    if HOPPER in names:
        work += [functools.partial(check, tool, HOPPER, "--only", HOPPER) for tool in tools]
    with concurrent.futures.ThreadPoolExecutor(max(1, arguments.jobs)) as pool:
        for name, status, seconds, lines in pool.map(lambda one: one(), work):
            summary = [line.lstrip("= ") for line in lines if "SUMMARY" in line or "replayed" in line or "DIFFERENT" in line][:20]
            ended = "ended by the time limit" if status is None else f"exit status {status}"
            print(f"{name}: {' | '.join(summary) or 'no summary'}; {seconds:.1f} s, {ended}", flush=True)
            if status != 0:
                failed = True
                print("\n".join([*lines[:40], "...", *lines[-5:]]), flush=True)
    # Would the tools say so?
    for tool, plant in (("initcheck", "unset"), ("memcheck", "short")):
        if tool in tools and "types" in names:
            name, _, seconds, lines = check(tool, "planted", "--only", "types", "--plant", plant)
            n_found = sum(int(n) for n in re.findall(r"ERROR SUMMARY: (\d+) error", "\n".join(lines)))
            print(f"{name}: {n_found} found; {seconds:.1f} s", flush=True)
            failed |= n_found == 0
    return int(failed or bool(missing))


if __name__ == "__main__":
    sys.exit(main())
