#!/usr/bin/env python3
"""Change the decoder and the validator, one small change at a time, and see whether the committed tests notice.

Each mutant is put into a copy of the repository, and a forked process imports that copy and runs, until something fails:
  1. the conformance vectors, judged as `conformance/run.py` does, in this process instead of one of their own;
  2. pytest, on the tests that run the changed function and do not take long;
  3. for the files that count what a header holds, the vectors that take long; with --full also the whole test suite.
Kernels are compiled anew for each mutant of a kernel. A mutant is killed by a test that fails, by a crash, or by taking
too much time or memory. What survives must be in survivors.toml, with the reason.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import pickle
import queue
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
from mutants import SCOPE, Mutant, mutants_of

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
OUT = ROOT / "build" / "mutation"
LEAST = 0.95  # of the mutants that are not equivalent

COPIED = ("qmoecodec", "tests", "tools", "gpu", "spec", "conformance", "examples", "docs", "pyproject.toml", "README.md")
KERNELS = "qmoecodec/_kernels/"
#: Vectors that take more than half a second (in step 3), where they are needed, and seconds for one of the others.
HEAVY = ("valid/tensors-65536", "invalid/json-size", "invalid/text-json-size", "limit/values", "limit/empty-tensors",
         "invalid/tensors-70000", "invalid/tensors-65537", "invalid/json-values-2-20", "invalid/text-values-2-20-and-1",
         "valid/text-values-2-20")  # fmt: skip
COUNTING = ("qmoecodec/container/json_text.py", "qmoecodec/container/header.py")
VECTOR_SECONDS = 3.0
HEAVY_SECONDS = 40.0
PYTEST_SECONDS = 60
WALL_SECONDS = 600
MEMORY = 5 << 30

#: Step 2 takes from these the tests that run the changed function, the quickest first. Kernels cannot be traced: a test
#: runs them if it runs one of the functions named here.
TESTS = ("qmoecodec", "tests/unit", "tests/property")
CALLERS = {
    "qmoecodec/_kernels/ternary.py": {("qmoecodec/container/ternary.py", "fill_rows")},
    KERNELS: {("qmoecodec/codec/rows.py", name) for name in ("decode_rows", "count_digits", "matvec_rows")}
    | {("qmoecodec/_kernels/tables.py", name) for name in ("decode_tables", "look_up")},
}
SLOW_SECONDS = 1.5
SLOW = ("tests/unit/test_dictionary_aivf.py", "tests/unit/test_dictionary_qmoe2023.py", "tests/unit/test_determinism.py",
        "tests/unit/test_faults.py::test_killed", "tests/unit/test_faults.py::test_the_command_line",
        "tests/unit/test_container_header.py::test_too_many", "tests/unit/test_container_damage.py::test_every_flipped_bit",
        "tests/unit/test_container_damage.py::test_every_byte", "tests/property/test_container_roundtrip.py::test_round_trip",
        "tests/unit/test_codec.py::test_state_follows", "tests/unit/test_kernels.py::test_kernels_do_without_a_cache",
        "qmoecodec/dictionary/aivf.py", "qmoecodec/dictionary/qmoe2023.py")  # fmt: skip
ALL_TESTS = ("qmoecodec", "tests/unit", "tests/property", "tests/conformance", "tests/fuzz", "tests/cli", "tests/packaging",
             "tests/tools")  # fmt: skip
#: Functions that no vector reaches: their mutants go to pytest at once.
NOT_IN_VECTORS = ("histogram", "spread_x", "matvec_gather", "matvec_copy", "_signed_sums", "add_pair", "low_float",
                  "high_float", "count_digits", "matvec_rows", "matvec")  # fmt: skip


# ---- In the forked process -------------------------------------------------------------------------------------------


def limit(seconds: int) -> None:
    """Let this process end where it takes too much."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))


def forget(*, kernels: bool) -> None:
    """Forget the package, so that the next import reads it again; the kernels, unless they are changed, stay compiled."""
    sys.modules.pop("adapter", None)
    for name in list(sys.modules):
        if name.partition(".")[0] == "qmoecodec" and (kernels or not name.startswith("qmoecodec._kernels")):
            del sys.modules[name]


def run_vectors(vectors: list[dict[str, Any]], seconds: float, say: Callable[[str], None]) -> bool:
    """Run vectors through the package; say which one fails."""
    import adapter  # type: ignore[import-not-found]
    import run as suite  # type: ignore[import-not-found]

    root = Path("conformance").resolve()
    for vector in vectors:
        expect = vector["expect"]
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process
        say(f"during {vector['id']}")
        with tempfile.TemporaryDirectory(prefix="vector-") as folder:
            path = suite.stage(vector, root, Path(folder))
            for deep in [False, True] if "deep" in expect else ["error" not in expect]:
                out = Path(folder) / f"out{deep:d}"
                try:
                    answer = adapter.decode(path, out, deep=deep)
                    outcome = suite.Outcome(error=answer["error"]) if "error" in answer else None
                    outcome = outcome or suite.Outcome(tensors=suite.read_tensors(out))
                except Exception as error:
                    say(f"{vector['id']}: {type(error).__name__}")
                    return False
                if suite.difference(expect, outcome, deep=deep) is not None:
                    say(vector["id"])
                    return False
    signal.setitimer(signal.ITIMER_PROF, 0)
    return True


class Tracer:
    """Notes which functions of the package each test runs, and how long it takes."""

    def __init__(self, tree: Path) -> None:
        self.prefix = f"{tree}/"
        self.tests: dict[str, tuple[float, list[tuple[str, str]]]] = {}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        codes: set[Any] = set()
        begin = time.process_time()

        def note(frame: Any, event: str, _: object) -> None:
            if event == "call":
                codes.add(frame.f_code)
                if time.process_time() - begin > SLOW_SECONDS:
                    sys.setprofile(None)  # it is left out anyway

        sys.setprofile(note)
        threading.setprofile(note)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]
        names = {(code.co_filename.removeprefix(self.prefix), code.co_name) for code in codes}
        names = {(path, name) for path, name in names if path.startswith("qmoecodec/")}
        self.tests[item.nodeid] = (time.process_time() - begin, sorted(names))


class Plugin:
    """Runs chosen tests in a given order, and says which one fails."""

    def __init__(self, chosen: list[str] | None, say: Callable[[str], None], leave_out: tuple[str, ...] = ()) -> None:
        self.chosen, self.say, self.leave_out = chosen, say, leave_out

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if not item.nodeid.startswith(self.leave_out)]
        if self.chosen is not None:
            found = {item.nodeid: item for item in items}
            items[:] = [found[name] for name in self.chosen if name in found]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.say(f"during {nodeid}")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.say(report.nodeid)


def run_pytest(tests: Collection[str], say: Callable[[str], None], *plugins: object) -> bool:
    """Run tests until one fails."""
    say("during collection")
    options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", "-o", "timeout=20", "--no-header", "--no-summary",
               "-W", "ignore::pytest.PytestAssertRewriteWarning"]  # fmt: skip  # hypothesis is loaded already
    return pytest.main([*options, *tests], plugins=[*plugins]) == 0


# ---- One worker ------------------------------------------------------------------------------------------------------


class Worker:
    """A copy of the repository, and a process that has loaded what does not change."""

    def __init__(self, folder: Path) -> None:
        self.tree = folder / "tree"
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.tree.mkdir()
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, self.tree / name, symlinks=True)
            else:
                shutil.copy2(source, self.tree / name)
        os.chdir(self.tree)
        paths = [str(self.tree / p) for p in (".", "gpu", "tools", "conformance", "conformance/adapters/python")]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths[:3])
        os.environ["TMPDIR"] = tempfile.tempdir = str(self.temporary)
        sys.path[:0] = paths
        import hypothesis  # noqa: F401
        import jsonschema  # type: ignore[import-untyped, unused-ignore]  # noqa: F401
        import numba  # noqa: F401
        import safetensors.numpy  # noqa: F401

        self.originals = {path: (self.tree / path).read_bytes() for path in SCOPE}
        self.clock = int(time.time()) - 10_000_000  # each text gets a time of its own, so that no cache is taken for it
        vectors = {v["id"]: v for v in json.loads((self.tree / "conformance/manifest.json").read_bytes())["vectors"]}
        self.heavy = [vectors.pop(name) for name in HEAVY]
        # One vector for each outcome first: together they find most mutants.
        outcomes = {str(v["expect"].get("error", v["expect"].get("deep"))): name for name, v in reversed(vectors.items())}
        first = list(outcomes.values())
        self.light = {name: vectors[name] for name in [*first, *(name for name in vectors if name not in first)]}
        self.killers: dict[str, list[str]] = collections.defaultdict(list)
        self.by_pytest: set[tuple[str, str]] = set()  # functions whose last mutant to be killed was killed by pytest
        import qmoecodec

        assert Path(qmoecodec.__file__).is_relative_to(self.tree), qmoecodec.__file__
        kept = OUT / f"tests-{digest(self.tree, ('qmoecodec', 'tests'))}.json"
        # In a process that may write caches; what fails without a mutant cannot kill one.
        with (OUT / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for step in (lambda say: self.vectors("", say), lambda say: kept.exists() or self.trace(kept, say)):
                outcome, by = self.fork(step, kernels=False)
                if outcome != "survived":
                    raise SystemExit(f"without a mutant: {outcome} by {by}")
        self.tests: dict[str, tuple[float, set[tuple[str, str]]]] = {
            name: (seconds, {(path, function) for path, function in found})
            for name, (seconds, found) in json.loads(kept.read_bytes()).items()
        }
        self.changed = {name: os.stat(name).st_mtime for name in {test.partition("::")[0] for test in self.tests}}
        sys.dont_write_bytecode = True
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        run_vectors(list(self.light.values())[:60], 600, lambda text: None)  # loads the kernels into this process
        signal.setitimer(signal.ITIMER_PROF, 0)

    def trace(self, kept: Path, say: Callable[[str], None]) -> bool:
        """Find out which tests run which functions."""
        tracer = Tracer(self.tree)
        good = run_pytest(TESTS, say, tracer, Plugin(None, say, SLOW))
        kept.write_text(json.dumps(tracer.tests))
        return good

    def vectors(self, path: str, say: Callable[[str], None]) -> bool:
        first = [name for name in self.killers[path] if name in self.light]
        chosen = [self.light[name] for name in first] + [v for name, v in self.light.items() if name not in first]
        return run_vectors(chosen, VECTOR_SECONDS if path else 600, say)

    def heavy_vectors(self, say: Callable[[str], None]) -> bool:
        return run_vectors(self.heavy, HEAVY_SECONDS, say)

    def pytest(self, path: str, function: str, say: Callable[[str], None], *, newest: bool) -> bool:
        chosen = self.choose_tests(path, function, newest=newest)
        return not chosen or run_pytest(sorted({name.partition("::")[0] for name in chosen}), say, Plugin(chosen, say))

    def choose_tests(self, path: str, function: str, *, newest: bool) -> list[str]:
        """Return the tests that run a function, quickest first; all of them for a class or a constant.

        newest : those in the files that changed last come first
        """
        wanted = CALLERS.get(path) or (CALLERS[KERNELS] if path.startswith(KERNELS) else {(path, function)})
        quick = {name: (seconds, found) for name, (seconds, found) in self.tests.items() if seconds < SLOW_SECONDS}
        chosen = [name for name, (_, found) in quick.items() if found & wanted]
        if function == "module" or not any(wanted & found for _, found in self.tests.values()):
            chosen = list(quick)
        killers = self.killers[path]

        def order(name: str) -> tuple[int, float, float]:
            known = killers.index(name) if name in killers else len(killers)
            return known, -self.changed[name.partition("::")[0]] if newest else 0.0, quick[name][0]

        return sorted(chosen, key=order)

    def all_tests(self, say: Callable[[str], None]) -> bool:
        return run_pytest(ALL_TESTS, say, Plugin(None, say))

    def fork(self, work: Callable[[Callable[[str], None]], bool], *, kernels: bool,
             seconds: int = PYTEST_SECONDS) -> tuple[str, str]:  # fmt: skip
        """Do something in a process of its own; return "killed", "timeout" or "survived", and by what."""
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.setpgid(0, 0)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.close(reader)
                null = os.open(os.devnull, os.O_RDWR)
                for fd in (0, 1, 2):
                    os.dup2(null, fd)
                limit(seconds)
                forget(kernels=kernels)

                def say(text: str) -> None:
                    os.write(writer, text.encode() + b"\n")

                try:
                    code = 0 if work(say) else 1
                except BaseException as error:
                    say(f"{type(error).__name__}: {str(error)[:200]}".replace("\n", " "))
            finally:
                os._exit(code)
        os.close(writer)
        text = bytearray()
        status = None
        deadline = time.monotonic() + WALL_SECONDS
        os.set_blocking(reader, False)
        pause = 0.002
        while status is None:
            with contextlib.suppress(BlockingIOError):
                text += os.read(reader, 1 << 16)
            done, found = os.waitpid(pid, os.WNOHANG)
            if done:
                status = found
            elif time.monotonic() > deadline:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            else:
                time.sleep(pause)
                pause = min(pause * 1.2, 0.05)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)  # what it started
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(reader, 1 << 16):
                text += chunk
        os.close(reader)
        for left in self.temporary.iterdir():
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() and not left.is_symlink() else left.unlink(missing_ok=True)
        by = text.decode(errors="replace").strip().rpartition("\n")[2]
        if status == 0:
            return "survived", ""
        late = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGXCPU, signal.SIGKILL)
        return ("timeout" if late else "killed"), by if not os.WIFSIGNALED(status) or late else f"crash {by}"

    def write(self, path: str, content: bytes) -> None:
        self.clock += 10
        (self.tree / path).write_bytes(content)
        os.utime(self.tree / path, (self.clock, self.clock))
        if path.startswith(KERNELS):
            # Numba looks at the time of the file that a kernel stands in, not of those that it calls.
            for cached in (self.tree / KERNELS / "__pycache__").glob("*.nb[ci]"):
                if cached.name.startswith(("decode.", Path(path).stem + ".")):
                    cached.unlink()

    def test(self, mutant: Mutant, *, full: bool, again: bool) -> dict[str, Any]:
        """Run the steps on one mutant."""
        begin = time.monotonic()
        kernels = mutant.path.startswith(KERNELS)
        self.write(mutant.path, mutant.code.encode())
        function = mutant.name.partition(":")[0]
        steps: list[Callable[[Callable[[str], None]], bool]] = [
            lambda say: self.vectors(mutant.path, say),
            lambda say: self.pytest(mutant.path, function, say, newest=again or mutant.path.startswith(KERNELS)),
        ]
        if again or function in NOT_IN_VECTORS or (mutant.path, function) in self.by_pytest:
            steps.reverse()
        if full or mutant.path in COUNTING:
            steps.append(self.heavy_vectors)
        if full:
            steps.append(self.all_tests)
        try:
            for step in steps:
                seconds = PYTEST_SECONDS * (10 if step == self.all_tests else 1)
                outcome, by = self.fork(step, kernels=kernels, seconds=seconds)
                if outcome != "survived":
                    break
        finally:
            self.write(mutant.path, self.originals[mutant.path])
        known = self.killers[mutant.path]
        if outcome == "killed" and (by in self.light or "::" in by) and not by.startswith("during"):
            if by in known:
                known.remove(by)
            known.insert(0, by)
            del known[24:]
            (self.by_pytest.add if "::" in by else self.by_pytest.discard)((mutant.path, function))
        return {"key": mutant.key, "operator": mutant.operator, "outcome": outcome, "by": by,
                "seconds": round(time.monotonic() - begin, 2)}  # fmt: skip


def work(number: int, tasks: Any, results: Any, full: bool, again: bool) -> None:
    """Be one worker: take mutants from a queue until there is none, then say the own number.

    again : they survived, so a new test may kill them
    """
    with worker_log(number).open("wb") as log:
        for fd in (1, 2):
            os.dup2(log.fileno(), fd)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))  # so that the copy below goes, too
    os.nice(5)
    with tempfile.TemporaryDirectory(prefix="mutation-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        worker = Worker(Path(folder))
        while (mutant := tasks.get()) is not None:
            results.put(worker.test(mutant, full=full, again=again))
        os.chdir("/")
    results.put(number)


def worker_log(number: int) -> Path:
    """Return where a worker's output goes."""
    return OUT / f"worker-{number}.log"


def digest(root: Path, names: Collection[str]) -> str:
    """Return a name for the Python files in some folders."""
    found = hashlib.sha256()
    for name in names:
        for path in sorted((root / name).rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


# ---- All mutants -----------------------------------------------------------------------------------------------------


def load_mutants(path: str) -> list[Mutant]:
    """Return the mutants of a file, kept between runs: to make them takes a while."""
    made_from = hashlib.sha256((ROOT / path).read_bytes() + (HERE / "mutants.py").read_bytes()).hexdigest()[:16]
    kept = OUT / f"{path.replace('/', '-')}-{made_from}.pickle"
    if not kept.exists():
        found = list(mutants_of(path, ROOT))
        kept.write_bytes(pickle.dumps(found))
    loaded: list[Mutant] = pickle.loads(kept.read_bytes())
    return loaded


def explained() -> dict[str, str]:
    """Return the survivors that are accounted for: key -> "equivalent" or "not tested"."""
    reasons: dict[str, str] = {}
    for entry in tomllib.loads((HERE / "survivors.toml").read_text())["class"]:
        for key in entry["mutants"]:
            if key in reasons:
                raise SystemExit(f"survivors.toml names twice: {key}")
            reasons[key] = entry["kind"]
    return reasons


def report(mutants: dict[str, Mutant], results: dict[str, dict[str, Any]]) -> bool:
    """Print a line per file; say whether all is as it should be."""
    reasons = explained()
    total: collections.Counter[str] = collections.Counter()
    print(f"{'file':<40}{'mutants':>8}{'killed':>8}{'timeout':>8}{'survived':>9}{'equivalent':>11}{'not run':>8}{'killed %':>9}")
    for path in [*SCOPE, "in all"]:
        count: collections.Counter[str] = collections.Counter()
        for key, mutant in mutants.items():
            if mutant.path == path:
                outcome = results[key]["outcome"] if key in results else "not run"
                count[outcome] += 1
                count["equivalent"] += outcome == "survived" and reasons.get(key) == "equivalent"
        if path == "in all":
            count = total
        total = total + count if path != "in all" else total
        killed, n = count["killed"] + count["timeout"], count["killed"] + count["timeout"] + count["survived"]
        if n or count["not run"]:
            print(f"{path:<40}{n + count['not run']:>8}{killed:>8}{count['timeout']:>8}{count['survived']:>9}"
                  f"{count['equivalent']:>11}{count['not run']:>8}{100 * killed / max(n, 1):>9.1f}")  # fmt: skip
    survivors = [key for key, result in results.items() if key in mutants and result["outcome"] == "survived"]
    missing = [key for key in survivors if key not in reasons]
    stale = [key for key in reasons if key in mutants and key in results and results[key]["outcome"] != "survived"]
    stale += [key for key in reasons if key.partition("::")[0] in {m.path for m in mutants.values()} and key not in mutants]
    for key in missing:
        print(f"survived, not in survivors.toml: {key}")
    for key in stale:
        print(f"in survivors.toml, but did not survive: {key}")
    killed, n = total["killed"] + total["timeout"], total["killed"] + total["timeout"] + total["survived"]
    return not missing and not stale and not total["not run"] and killed >= LEAST * (n - total["equivalent"])


def main() -> int:
    parser = argparse.ArgumentParser(description="Mutation testing of the decoder and the validator.")
    parser.add_argument("--only", default="", metavar="REGEX", help="only mutants whose key matches this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--again", choices=["nothing", "survivors", "all"], default="all", help="of what ran before")
    parser.add_argument("--known", action="store_true", help="nothing that never ran")
    parser.add_argument("--full", action="store_true", help="run the whole test suite on what survives")
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ProcessPoolExecutor(options.jobs) as pool:
        made = pool.map(load_mutants, SCOPE)
        mutants = {mutant.key: mutant for found in made for mutant in found}
    kept = OUT / "results.jsonl"
    before: dict[str, dict[str, Any]] = {}
    if kept.exists():
        before = {result["key"]: result for result in map(json.loads, kept.read_text().splitlines())}
    mutants = {key: mutant for key, mutant in mutants.items() if re.search(options.only, key)}
    done = {"nothing": ("killed", "timeout", "survived"), "survivors": ("killed", "timeout"), "all": ()}[options.again]
    wanted = [m for key, m in mutants.items() if key not in before or before[key]["outcome"] not in done]
    wanted = [mutant for mutant in wanted if mutant.key in before or not options.known]
    if not options.report:
        for result in run(wanted, options.jobs, options.full, options.again == "survivors"):
            before[result["key"]] = result
            with kept.open("a") as lines:
                lines.write(json.dumps(result) + "\n")
    return 0 if report(mutants, before) else 1


def run(wanted: list[Mutant], jobs: int, full: bool, again: bool) -> Iterator[dict[str, Any]]:
    """Yield the result of each mutant.

    Raises SystemExit with the last of a worker's output where one ends before its time; the others end with it.
    """
    context = multiprocessing.get_context("spawn")
    tasks, results = context.Queue(), context.Queue()
    # In an order that has nothing to do with the code: what ran of a run that is ended early is a fair sample.
    for mutant in [*sorted(wanted, key=lambda m: hashlib.sha256(m.key.encode()).digest()), *[None] * jobs]:
        tasks.put(mutant)
    processes = [context.Process(target=work, args=(number, tasks, results, full, again)) for number in range(jobs)]
    running = set(range(jobs))
    try:
        for number, process in enumerate(processes):
            worker_log(number).unlink(missing_ok=True)
            process.start()
        while running:
            silent = [number for number in running if processes[number].exitcode == 0]  # what they said is in the queue
            try:
                result = results.get(timeout=1)
            except queue.Empty:
                result = None
            if isinstance(result, int):
                running.discard(result)
            elif result is not None:
                yield result
            failed = [number for number in running if processes[number].exitcode]
            for number in [*failed, *([] if result is not None else silent)]:
                log = worker_log(number)
                lines = log.read_text(errors="replace").splitlines() if log.exists() else []
                raise SystemExit("\n".join([f"worker {number} ended with status {processes[number].exitcode}:", *lines[-40:]]))
    finally:
        tasks.cancel_join_thread()  # nobody takes what is left
        for number in running:
            if processes[number].is_alive():
                processes[number].terminate()
        for process in processes:
            if process.pid is not None:
                process.join()


if __name__ == "__main__":
    sys.exit(main())
