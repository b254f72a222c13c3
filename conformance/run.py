#!/usr/bin/env python3
"""Run the conformance vectors against decoders of the qmoecodec format: `run.py --adapter "CMD"` (see PROTOCOL.md).

Standard library only; imports nothing of this project.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import gzip
import hashlib
import json
import os
import queue
import select
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ADAPTERS = {
    "python": [sys.executable, str(HERE / "adapters" / "python" / "adapter.py")],
    "c": [str(HERE / "adapters" / "c" / "qmoe_decode")],
    "reference": [sys.executable, str(HERE / "adapters" / "reference" / "adapter.py")],
}
START_SECONDS = 120.0
SPARE_BYTES = 64 << 20
#: What a program takes for this file is not counted: one small matrix.
IDLE = "vectors/valid/base-8.safetensors"
Vector = dict[str, Any]


class CrashError(Exception):
    """The program did something that the protocol does not know."""


@dataclasses.dataclass
class Outcome:
    """What a program made of one vector: an error, or its tensors."""

    error: str | None = None
    tensors: dict[str, dict[str, Any]] | None = None
    peak_bytes: int = 0


# ---- Vectors ---------------------------------------------------------------------------------------------------------


def stored_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, or of the list of a directory's files."""
    if path.is_dir():
        files = sorted(path.iterdir())
        lines = "".join(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n" for file in files)
        return hashlib.sha256(lines.encode()).hexdigest()
    return hashlib.sha256(path.read_bytes()).hexdigest()


def stage(vector: Vector, root: Path, scratch: Path) -> Path:
    """Return the path to hand to the program; a copy where the stored file is not the whole story."""
    stored: Path = root / vector["file"]
    if "links" in vector or "sizes" in vector:
        staged = scratch / "in"
        shutil.copytree(stored, staged)
        for name, target in vector.get("links", {}).items():
            (staged / name).symlink_to(root / target if target.startswith("vectors/") else target)
        for name, size in vector.get("sizes", {}).items():
            os.truncate(staged / name, size)
        return staged
    if vector.get("encoding") == "gzip" or "size" in vector:
        staged = scratch / "in.safetensors"
        content = stored.read_bytes()
        staged.write_bytes(gzip.decompress(content) if vector.get("encoding") == "gzip" else content)
        if "size" in vector:
            os.truncate(staged, vector["size"])
        return staged
    return stored


def read_tensors(directory: Path) -> dict[str, dict[str, Any]]:
    """Describe what a program wrote."""
    try:
        listing = json.loads((directory / "tensors.json").read_bytes())
        tensors = {}
        for entry in listing:
            digest = hashlib.sha256((directory / entry["file"]).read_bytes()).hexdigest()
            if entry["name"] in tensors:
                raise CrashError(f"wrote tensor {entry['name']!r} twice")
            tensors[entry["name"]] = {"dtype": entry["dtype"], "shape": entry["shape"], "sha256": digest}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CrashError(f"tensors.json: {error!r}") from error
    return tensors


# ---- Programs --------------------------------------------------------------------------------------------------------


class Server:
    """One process that answers requests (`serve`)."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen([*command, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL)  # fmt: skip
        self.buffer = b""
        self.greeting = self.answer(START_SECONDS)
        if self.greeting.get("protocol") != 1:
            raise CrashError(f"greeted with {self.greeting}")

    def answer(self, seconds: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self.buffer:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self.close()
                raise CrashError(f"no answer in {seconds:g} s")
            chunk = os.read(self.process.stdout.fileno(), 1 << 16)
            if not chunk:
                status = self.process.wait()
                raise CrashError(f"ended with status {status}")
            self.buffer += chunk
        line, self.buffer = self.buffer.split(b"\n", 1)
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            self.close()
            raise CrashError(f"answered {line[:200]!r}")
        return value

    def request(self, fields: list[str], seconds: float) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("\t".join(fields).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            raise CrashError(f"ended with status {self.process.wait()}") from None
        return self.answer(seconds)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


class Program:
    """A decoder under test: a pool of servers, or one process per vector."""

    def __init__(self, name: str, seconds: float) -> None:
        self.name, self.seconds = name, seconds
        self.command = ADAPTERS.get(name) or shlex.split(name)
        self.idle: queue.SimpleQueue[Server] = queue.SimpleQueue()
        self.serves = True
        try:
            self.idle.put(Server(self.command))
        except CrashError:
            self.serves = False

    def close(self) -> None:
        while not self.idle.empty():
            self.idle.get().close()

    def decode(self, path: Path, out: Path, *, deep: bool, alone: bool = False, seconds: float = 0.0) -> Outcome:
        """Run `decode`; alone: in a process of its own, whose memory is measured."""
        seconds = max(seconds, self.seconds)
        if self.serves and not alone:
            answer, peak = self.serve(["decode", str(path), str(out), *(["deep"] if deep else [])], seconds), 0
        else:
            answer, peak = self.start(["decode", str(path), "--out", str(out), *(["--deep"] if deep else [])], seconds)
        if isinstance(answer.get("error"), str):
            return Outcome(error=answer["error"], peak_bytes=peak)
        if "accepted" not in answer:
            raise CrashError(f"answered {answer}")
        return Outcome(tensors=read_tensors(out), peak_bytes=peak)

    def encode(self, path: Path, out: Path) -> None:
        if self.serves:
            answer = self.serve(["encode", str(path), str(out)], self.seconds)
        else:
            answer, _ = self.start(["encode", str(path), "--out", str(out)], self.seconds)
        if "accepted" not in answer or not out.exists():
            raise CrashError(f"encode answered {answer}")

    def serve(self, fields: list[str], seconds: float) -> dict[str, Any]:
        try:
            server = self.idle.get_nowait()
        except queue.Empty:
            server = Server(self.command)
        answer = server.request(fields, seconds)  # a crash leaves the server behind
        self.idle.put(server)
        return answer

    def start(self, arguments: list[str], seconds: float) -> tuple[dict[str, Any], int]:
        status, late, peak, lines = launch([*self.command, *arguments], seconds)
        if status == 0:
            return {"accepted": None}, peak
        if status == 1 and lines:
            try:
                return {"error": json.loads(lines[-1])["error"]}, peak
            except (ValueError, KeyError, TypeError):
                pass
        raise CrashError(f"took more than {seconds:g} s" if late else f"ended with status {status}: {lines[-1:]}")


def launch(command: list[str], seconds: float) -> tuple[int, bool, int, list[str]]:
    """Run a program; return its status, whether it was late, its peak memory and its lines.

    It is started by a small process, because what this one takes would count as the program's.
    """
    request = json.dumps([command, seconds])
    done = subprocess.run([sys.executable, "-S", __file__, "--launch", request], capture_output=True, check=True, text=True)
    status, late, peak, lines = json.loads(done.stdout)
    return status, late, peak, lines


def launch_here(request: str) -> None:
    """Do what `launch` asks for, in the small process."""
    command, seconds = json.loads(request)
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.DEVNULL)
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        _, status, usage = os.wait4(process.pid, 0)
        late = not timer.is_alive()
        timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        lines = output.read().decode(errors="replace").strip().splitlines()
    print(json.dumps([process.returncode, late, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), lines[-1:]]))


# ---- Checks ----------------------------------------------------------------------------------------------------------


def difference(expect: dict[str, Any], outcome: Outcome, *, deep: bool) -> str | None:
    """Say how an outcome is not the one expected; None if it is."""
    error = expect.get("deep") if deep and "deep" in expect else expect.get("error")
    if error is not None or outcome.error is not None:
        got = f"error {outcome.error}" if outcome.error is not None else "accepted"
        return None if outcome.error == error else f"{got}, expected {f'error {error}' if error else 'to be accepted'}"
    tensors = outcome.tensors or {}
    if "digest" in expect:
        text = json.dumps(tensors, sort_keys=True, separators=(",", ":"))
        return (
            None
            if hashlib.sha256(text.encode()).hexdigest() == expect["digest"]
            else f"{len(tensors)} tensors, not the expected ones"
        )
    wanted = expect["tensors"]
    if tensors.keys() != wanted.keys():
        return f"tensors {sorted(tensors)}, expected {sorted(wanted)}"
    for name, tensor in wanted.items():
        for key in ("dtype", "shape", "sha256"):
            if tensors[name][key] != tensor[key]:
                return f"tensor {name!r}: {key} {tensors[name][key]}, expected {tensor[key]}"
    return None


def check(vector: Vector, root: Path, program: Program, *, deep: bool, idle_bytes: int | None) -> str | None:
    """Run one vector and say what is wrong, if anything."""
    expect = vector["expect"]
    modes = [False, True] if "deep" in expect else [deep and "error" not in expect]
    with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
        path = stage(vector, root, Path(folder))
        for mode in modes if deep else [False]:
            try:
                outcome = program.decode(path, Path(folder) / f"out{mode:d}", deep=mode, alone=idle_bytes is not None,
                                         seconds=vector.get("seconds", 0.0))  # fmt: skip
                wrong = difference(expect, outcome, deep=mode)
            except CrashError as error:
                return f"crash: {error}"
            if wrong is None and idle_bytes is not None:
                files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
                written = sum(file.stat().st_size for file in (Path(folder) / f"out{mode:d}").glob("*.bin"))
                most = idle_bytes + 2 * (sum(file.stat().st_size for file in files) + written) + SPARE_BYTES
                if outcome.peak_bytes > most:
                    wrong = f"took {outcome.peak_bytes >> 20} MiB of memory, allowed are {most >> 20}"
            if wrong is not None:
                return f"with --deep: {wrong}" if mode and "deep" in expect else wrong
    return None


def run_suite(program: Program, vectors: list[Vector], root: Path, *, deep: bool, jobs: int) -> bool:
    """Run vectors against one program and print a line per class."""
    begin = time.monotonic()
    failures: dict[str, list[str]] = collections.defaultdict(list)
    idle_bytes = None
    if any(vector["class"] == "limit" for vector in vectors):
        with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
            try:
                idle_bytes = program.decode(root / IDLE, Path(folder) / "out", deep=deep, alone=True).peak_bytes
            except CrashError as error:
                failures["limit"].append(f"  {IDLE}: crash: {error}")

    def one(vector: Vector) -> None:
        if stored_sha256(root / vector["file"]) != vector["sha256"]:
            wrong: str | None = "the stored file is not the one in the manifest"
        else:
            wrong = check(vector, root, program, deep=deep, idle_bytes=idle_bytes if vector["class"] == "limit" else None)
        if wrong is not None:
            failures[vector["class"]].append(f"  {vector['id']}: {wrong}")

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, sorted(vectors, key=lambda vector: vector["class"] != "limit")))
    program.close()
    print(f"{program.name}{' (serve)' if program.serves else ''}: {len(vectors)} vectors in {time.monotonic() - begin:.1f} s")
    for name in dict.fromkeys(vector["class"] for vector in vectors):
        total = sum(vector["class"] == name for vector in vectors)
        print(f"  {name:<13}{total - len(failures[name]):>5} of {total} {'ok' if not failures[name] else 'FAILED'}")
    for line in [line for lines in failures.values() for line in sorted(lines)]:
        print(line)
    return not any(failures.values())


# ---- Encoder x decoder -----------------------------------------------------------------------------------------------


def write_dense(directory: Path, path: Path) -> None:
    """Write what a decoder restored as a safetensors file."""
    header: dict[str, Any] = {}
    content = b""
    for entry in sorted(json.loads((directory / "tensors.json").read_bytes()), key=lambda entry: str(entry["name"])):
        data = (directory / entry["file"]).read_bytes()
        offsets = [len(content), len(content) + len(data)]
        header[entry["name"]] = {"dtype": entry["dtype"], "shape": entry["shape"], "data_offsets": offsets}
        content += data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)


def run_matrix(names: list[str], vectors: list[Vector], root: Path, seconds: float) -> bool:
    """Decode with each decoder what each encoder makes of the tensors of the valid vectors."""
    good = True
    chosen = [vector for vector in vectors if vector.get("encode")]
    programs = [Program(name, seconds) for name in names]
    with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
        for k, vector in enumerate(chosen):
            scratch = Path(folder) / str(k)
            scratch.mkdir()
            programs[0].decode(stage(vector, root, scratch), scratch / "source", deep=False)
            write_dense(scratch / "source", scratch / "dense.safetensors")
        for encoder in programs:
            cells: dict[str, int] = dict.fromkeys(names, 0)
            try:
                for k, vector in enumerate(chosen):
                    scratch = Path(folder) / str(k)
                    packed = scratch / "packed.safetensors"
                    packed.unlink(missing_ok=True)
                    encoder.encode(scratch / "dense.safetensors", packed)
                    for decoder in programs:
                        out = Path(tempfile.mkdtemp(dir=scratch)) / "out"
                        wrong = difference(vector["expect"], decoder.decode(packed, out, deep=True), deep=True)
                        cells[decoder.name] += wrong is None
                        if wrong is not None:
                            print(f"  {vector['id']}: {encoder.name} -> {decoder.name}: {wrong}")
            except CrashError as error:
                if any(cells.values()):
                    print(f"  {encoder.name}: {error}")
                    good = False
                else:
                    print(f"{encoder.name}: does not encode")
                continue
            good = good and all(count == len(chosen) for count in cells.values())
            restored = ", ".join(f"{name} restores {count}" for name, count in cells.items())
            print(f"{encoder.name} encodes {len(chosen)}: {restored}")
    for program in programs:
        program.close()
    return good and bool(chosen)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the conformance vectors (see PROTOCOL.md).")
    parser.add_argument(
        "--adapter", action="append", metavar="CMD", help="python, reference (default: both), c or a command; repeatable"
    )
    parser.add_argument("--manifest", type=Path, default=HERE / "manifest.json")
    parser.add_argument("--only", metavar="TEXT", default="", help="only vectors whose id contains this")
    parser.add_argument("--no-deep", action="store_true", help="the program cannot check that an encoding is canonical")
    parser.add_argument("--matrix", action="store_true", help="decode with each adapter what each adapter encodes")
    parser.add_argument("--timeout", type=float, default=5.0, metavar="SECONDS", help="for one vector (5)")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1))
    options = parser.parse_args()
    root = options.manifest.resolve().parent
    vectors = [v for v in json.loads(options.manifest.read_bytes())["vectors"] if options.only in v["id"]]
    if not vectors:
        print("no vectors", file=sys.stderr)
        return 2
    names = options.adapter or ["python", "reference"]
    good = True
    for name in names:
        program = Program(name, options.timeout)
        good = run_suite(program, vectors, root, deep=not options.no_deep, jobs=options.jobs) and good
    if options.matrix:
        good = run_matrix(names, vectors, root, options.timeout) and good
    return 0 if good else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--launch"]:
        launch_here(sys.argv[2])
    else:
        sys.exit(main())
