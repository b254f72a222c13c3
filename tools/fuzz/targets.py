"""What is fuzzed: each target takes bytes, and raises `Finding` (or anything else) where the package does what it must not.

Two programs must say the same: the package, and the reference decoder of spec/ or the C decoder of conformance/. Only
`FormatError` and `EncodeError` are declared; every other exception is a finding, as is an input that takes over a second.
"""

from __future__ import annotations

import atexit
import json
import os
import random
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT / "tools", ROOT / "spec"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

import reference_decoder  # type: ignore[import-not-found, unused-ignore]  # noqa: E402

import qmoecodec  # noqa: E402
from fuzz import files, native  # noqa: E402
from qmoecodec._kernels import tables  # noqa: E402
from qmoecodec.container import json_text, metadata  # noqa: E402
from qmoecodec.container.header import parse_header  # noqa: E402
from qmoecodec.dictionary import aivf, serial  # noqa: E402
from qmoecodec.errors import EncodeError, FormatError  # noqa: E402
from qmoecodec.types import Dictionary, DictionaryKind  # noqa: E402

VECTORS = ROOT / "conformance" / "vectors"
CORPUS = ROOT / "tools" / "fuzz" / "corpus"
LARGEST_SEED = 24_000
SPARE_BYTES = 1 << 20


class Finding(Exception):  # noqa: N818
    """The package does what it must not."""


@dataclass(frozen=True)
class Target:
    """One function to fuzz.

    run : takes the input;  seeds : yields inputs to begin with;  longest : bytes of an input at most
    """

    name: str
    run: Callable[[bytes], None]
    seeds: Callable[[], Iterator[bytes]]
    longest: int = 1 << 15


def same(what: str, ours: object, theirs: object) -> None:
    if ours != theirs:
        raise Finding(f"{what}: {str(ours)[:300]} here, {str(theirs)[:300]} there")


def outcome(function: Callable[[], Any]) -> tuple[str | None, Any]:
    """Return (reason, None) or (None, result)."""
    try:
        return None, function()
    except FormatError as error:
        return error.reason, None
    except EncodeError:
        return "encode", None
    except reference_decoder.RejectedError as error:
        return str(error.args[0]), None


@cache
def seed_files() -> tuple[bytes, ...]:
    found = (path.read_bytes() for path in sorted(VECTORS.glob("*/*.safetensors")) if path.stat().st_size <= LARGEST_SEED)
    return tuple(found)


@cache
def kept(name: str) -> tuple[bytes, ...]:
    """Return the inputs of the committed corpus of a target (docs/hardening.md)."""
    return tuple(path.read_bytes() for path in sorted((CORPUS / name).iterdir()))


def header_of(file: bytes) -> bytes | None:
    n = int.from_bytes(file[:8], "little")
    return file[8 : 8 + n] if len(file) >= 8 + n else None


# ---- header: the header's text, with the number of bytes of data -----------------------------------------------------


def run_header(data: bytes) -> None:
    n_data, text = int.from_bytes(data[:2], "little"), data[2:]
    text += b" " * (-len(text) % 8)
    if len(text) < 8:
        return
    file = len(text).to_bytes(8, "little") + text
    ours, header = outcome(lambda: parse_header(file, len(file) + n_data))
    theirs, _ = outcome(lambda: reference_decoder.File(file + bytes(n_data)))
    loose, other = outcome(lambda: parse_header(file, len(file) + n_data, strict=False))
    if ours is not None:
        same("header", ours, theirs)
        return
    if theirs is not None and theirs in ("header_json", "duplicate_key", "json_number", "tensor_hole", "tensor_overlap"):
        # these reasons belong to the metadata text too
        value = json.loads(text)
        if "qmoecodec.header_crc32" not in value:
            raise Finding(f"header: accepted here, {theirs} there")
    same("strict and lenient", (loose, other), (None, header))
    value = json.loads(text)
    same("metadata", header.metadata, value.pop("__metadata__", None))
    same("tensors", {name: [*info.shape] for name, info in header.tensors.items()}, {k: v["shape"] for k, v in value.items()})
    same("bytes", sum(info.n_bytes for info in header.tensors.values()), n_data)


def seeds_header() -> Iterator[bytes]:
    for file in seed_files():
        text = header_of(file)
        if text is not None and len(file) - len(text) - 8 < 1 << 16:
            yield (len(file) - len(text) - 8).to_bytes(2, "little") + text


# ---- metadata: the metadata text -------------------------------------------------------------------------------------


def run_metadata(data: bytes) -> None:
    text = data.decode(errors="replace")
    ours, found = outcome(lambda: metadata.from_text(text))
    theirs, _ = outcome(lambda: reference_decoder.check_metadata(text))
    same("metadata", ours, theirs)
    if found is None:
        return
    value = json.loads(text)
    same("canonical", json_text.canonical(value), text)
    if '"x-' not in text:
        same("written again", metadata.to_text(found), text)


def seeds_metadata() -> Iterator[bytes]:
    for file in seed_files():
        text = header_of(file)
        try:
            yield json.loads(text or b"")["__metadata__"]["qmoecodec"].encode()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue


# ---- dictionary: a description and bytes -----------------------------------------------------------------------------


def run_dictionary(data: bytes) -> None:
    theirs: str | None
    if len(data) < 4:
        return
    kind: DictionaryKind = "table" if data[0] & 1 else "aivf"
    code_bits = (8, 12, 16)[(data[0] >> 1) % 3]
    threshold, content = int.from_bytes(data[1:4], "little"), data[4:]
    if kind == "table" and data[0] & 128:
        content += bytes(max((1 << code_bits) - len(content), 0))  # so that small inputs have all the lengths
    if threshold > 1 << code_bits or (kind == "table" and threshold != 1 << code_bits):
        theirs, there = "dictionary_threshold", None  # the reference decoder checks these with the metadata
    else:
        entry = {"kind": kind, "code_bits": code_bits, "threshold": threshold, "crc32": f"{zlib.crc32(content):08x}"}
        part = reference_decoder.Tensor("U8", [len(content)], memoryview(content))
        theirs, there = outcome(lambda: reference_decoder.Dictionary(entry, part))
    ours, here = outcome(lambda: serial.parse(content, kind=kind, code_bits=code_bits, threshold=threshold))
    same("dictionary", ours, theirs)
    if here is None or there is None:
        return
    for state, tree in enumerate(there.phrases):
        used = np.flatnonzero(here.lengths[state])
        same("phrases", {int(c): bytes(here.phrase(state, int(c))) for c in used}, tree)
    tables.decode_tables(here)
    if kind == "aivf":
        tables.encode_tables(here)
    else:
        tables.trie(here)


def describe(dictionary: Dictionary) -> bytes:
    bits = {8: 0, 12: 1, 16: 2}[dictionary.code_bits]
    return bytes([bits << 1 | (dictionary.kind == "table")]) + dictionary.threshold.to_bytes(3, "little") + dictionary.data


def seeds_dictionary() -> Iterator[bytes]:
    for dictionary in pool():
        yield describe(dictionary)
    yield b"\x81\0\1\0" + bytes([1, 1, 1]) + bytes(253) + b"\x24"


# ---- rows: codewords of one of a pool of dictionaries ----------------------------------------------------------------


@cache
def pool() -> tuple[Dictionary, ...]:
    """Dictionaries of the vectors (8 and 12 bits), and built ones."""
    found: dict[bytes, Dictionary] = {}
    for path in sorted(VECTORS.glob("valid/*.safetensors")):
        if path.stat().st_size > LARGEST_SEED:
            continue
        with qmoecodec.open(path) as opened:
            for file in opened.files:
                for i, entry in enumerate(file.metadata.dictionaries):
                    if entry.code_bits < 16:
                        dictionary = file.dictionary(i)
                        found.setdefault(describe(dictionary), dictionary)
    built = [aivf.build(0.1, 0.8, 0.1, code_bits=8), aivf.build(0.4, 0.2, 0.4, code_bits=8)]
    small = sorted(found.values(), key=lambda d: (len(d.data), d.data))
    return (*small[:: max(len(small) // 24, 1)], *built)


@cache
def of_spec(dictionary: Dictionary) -> Any:
    """Return the dictionary as the reference decoder of the specification reads it."""
    content = dictionary.data
    entry = {"kind": dictionary.kind, "code_bits": dictionary.code_bits, "threshold": dictionary.threshold,
             "crc32": f"{zlib.crc32(content):08x}"}  # fmt: skip
    return reference_decoder.Dictionary(entry, reference_decoder.Tensor("U8", [len(content)], memoryview(content)))


def rows_of_spec(codes: bytes, lengths: list[int], cols: int, dictionary: Dictionary) -> str | None:
    """Return the reason for which the reference decoder of the specification rejects the rows."""
    spec, bits, at = of_spec(dictionary), dictionary.code_bits, 0
    if sum((n * bits + 7) // 8 for n in lengths) != len(codes):
        return "row_lengths"
    if len(lengths) * cols > spec.longest * sum(lengths):
        return "row_underrun"
    for n in lengths:
        data = memoryview(codes)[at : at + (n * bits + 7) // 8]
        at += len(data)
        words = reference_decoder.unpack_codes(data, bits, n)
        reason, _ = outcome(lambda words=words: spec.decode_row(words, cols))  # type: ignore[misc]
        if reason is not None:
            return reason
        if int.from_bytes(data, "little") >> n * bits:
            return "row_padding"
    return None


def run_rows(data: bytes) -> None:
    if len(data) < 6:
        return
    dictionary = pool()[data[0] % len(pool())]
    cols, rows = int.from_bytes(data[1:3], "little") % 3000, data[3] % 8
    lengths = np.frombuffer(data[4 : 4 + 2 * rows].ljust(2 * rows, b"\0"), "<u2").astype(np.uint32)
    codes = np.frombuffer(data[4 + 2 * rows :], np.uint8)
    if data[3] & 8 and rows:  # the bytes are shared out, so that the lengths add up
        each = len(codes) // rows
        codes, lengths = codes[: each * rows], np.full(rows, each * 8 // dictionary.code_bits, np.uint32)
        codes = codes[: rows * ((int(lengths[0]) * dictionary.code_bits + 7) // 8)]
    if rows * cols > 255 * len(data) + 255:
        return
    canary = np.full(rows * cols + 512, 77, np.int8)
    out = canary[256 : 256 + rows * cols].reshape(rows, cols)
    ours, here = outcome(lambda: qmoecodec.decode_rows(codes, lengths, cols=cols, dictionary=dictionary, out=out))
    theirs, there = outcome(lambda: qmoecodec.decode_rows(codes, lengths, cols=cols, dictionary=dictionary, backend="reference"))
    same("rows", ours, theirs)
    same("reason", ours, rows_of_spec(codes.tobytes(), lengths.tolist(), cols, dictionary))
    if (canary[:256] != 77).any() or (canary[256 + rows * cols :] != 77).any():
        raise Finding("rows: the kernel wrote outside its buffer")
    if here is None:
        return
    same("digits", here.tobytes(), there.tobytes())
    levels = np.tile(np.array([-1, 2], np.float32), (rows, 1))
    x = (np.arange(cols) % 7).astype(np.float32)
    product = qmoecodec.matvec_rows(codes, lengths, levels, x, dictionary=dictionary)
    same("matvec", product.tolist(), (np.where(here > 0, 2, here).astype(np.float32) @ x).tolist())
    again, _ = qmoecodec.encode_rows(here, dictionary=dictionary)
    if len(again) > len(codes) and dictionary.kind == "aivf":
        raise Finding("rows: the canonical encoding is longer")


def seeds_rows() -> Iterator[bytes]:
    rng = np.random.default_rng(1)
    for i, dictionary in enumerate(pool()):
        for rows, cols in ((1, 7), (3, 200), (2, 1000)):
            digits = rng.choice(np.array([0, -1, 1], np.int8), p=[0.8, 0.1, 0.1], size=(rows, cols))
            reason, found = outcome(lambda digits=digits, d=dictionary: qmoecodec.encode_rows(digits, dictionary=d))  # type: ignore[misc]
            if reason is None:
                codes, lengths = found
                yield bytes([i]) + cols.to_bytes(2, "little") + bytes([rows]) + lengths.astype("<u2").tobytes() + codes.tobytes()
        yield bytes([i, 9, 0, 9]) + rng.bytes(12)


# ---- shards: the index of a directory --------------------------------------------------------------------------------


@cache
def shard_folder() -> Path:
    """Return a directory with the shards of a vector, a link that leaves it, and room for the index."""
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=shared if os.access(shared, os.W_OK) else None))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    inside = folder / "in"
    inside.mkdir()
    base = min(path for path in (VECTORS / "valid").iterdir() if path.is_dir() and len(list(path.glob("*.safetensors"))) > 1)
    for path in base.glob("*.safetensors"):
        shutil.copy(path, inside)
    (inside / "folder").mkdir()
    (inside / "gone").symlink_to("nothing")
    shutil.copy(next(base.glob("*.safetensors")), folder / "outside.safetensors")
    (inside / "leaves").symlink_to("../outside.safetensors")
    return inside


def run_shards(data: bytes) -> None:
    folder = shard_folder()
    (folder / "model.safetensors.index.json").write_bytes(data)
    report = qmoecodec.verify(folder, deep=True)
    same("shards", report.problems[0].reason if report.problems else None, native.verdict(folder, deep=True))


def seeds_shards() -> Iterator[bytes]:
    for path in sorted(VECTORS.glob("*/*/model.safetensors.index.json")):
        yield path.read_bytes()
    names = [path.name for path in sorted(shard_folder().glob("*.safetensors"))]
    for name in (*names, "gone", "leaves", "folder", "../outside.safetensors", ".", "\0"):
        yield json.dumps({"weight_map": {"a": name}, "metadata": {"total_size": 1e3}}).encode()


# ---- roundtrip: digits and a dictionary, both arbitrary --------------------------------------------------------------


def tree_of(rng: random.Random, threshold: int, room: int, roots: tuple[int, ...], steps: int) -> list[int]:
    """Grow a parse tree at random and return its node symbols in preorder."""
    nodes = {bytes([digit]): 0 for digit in roots}
    for _ in range(steps):
        node = rng.choice(list(nodes))
        symbols = list(nodes.values())
        if len(node) == 255 or nodes[node] == 2:
            continue
        if nodes[node] == 0 and rng.random() < 0.5 and symbols.count(1) < room:
            nodes |= {node: 1, node + b"\0": 0}
        elif symbols.count(0) + 2 <= threshold:
            children = (b"\0", b"\1", b"\2") if nodes[node] == 0 else (b"\1", b"\2")
            nodes |= {node: 2} | {node + child: 0 for child in children}
    return [nodes[node] for node in sorted(nodes)]


@lru_cache(maxsize=512)
def arbitrary(seed: int) -> Dictionary:
    rng = random.Random(seed)
    bits = 12 if seed % 16 == 5 else 8
    if seed % 3 == 0:
        phrases = {bytes(rng.choices(range(3), k=rng.choice((1, 1, 2, 3, 9, 40)))) for _ in range(rng.randint(1, 60))}
        listed = sorted(phrases)
        return serial.table_from_phrases([*listed, *([b""] * ((1 << bits) - len(listed)))], code_bits=bits)
    threshold = rng.randint(3, (1 << bits) - 1)
    steps = rng.choice((0, 3, 30, 80))
    trees = [tree_of(rng, threshold, (1 << bits) - threshold, roots, steps) for roots in ((0, 1, 2), (1, 2))]
    return serial.aivf_from_symbols([np.array(tree, np.uint8) for tree in trees], code_bits=bits, threshold=threshold)


def run_roundtrip(data: bytes) -> None:
    if len(data) < 4:
        return
    dictionary = arbitrary(int.from_bytes(data[:2], "little"))
    rows = data[2] % 5 + 1
    digits = np.frombuffer(bytes(b // 3**k % 3 for b in data[3:] for k in range(4)), np.uint8)
    if data[2] & 128:
        digits = digits * (np.arange(len(digits)) % 11 == 0)
    cols = len(digits) // rows
    values = np.array([0, -1, 1], np.int8)[digits[: rows * cols]].reshape(rows, cols)
    ours, found = outcome(lambda: qmoecodec.encode_rows(values, dictionary=dictionary))
    theirs, there = outcome(lambda: qmoecodec.encode_rows(values, dictionary=dictionary, backend="reference"))
    same("encode", ours, theirs)
    if found is None:
        return
    codes, lengths = found
    same("codes", (codes.tobytes(), lengths.tolist()), (there[0].tobytes(), there[1].tolist()))
    back = qmoecodec.decode_rows(codes, lengths, cols=cols, dictionary=dictionary)
    same("round trip", back.tobytes(), values.tobytes())


def seeds_roundtrip() -> Iterator[bytes]:
    rng = random.Random(2)
    for seed in range(60):
        yield seed.to_bytes(2, "little") + bytes([rng.randrange(256)]) + rng.randbytes(rng.choice((3, 40, 200)))


# ---- file: the package against the C decoder -------------------------------------------------------------------------


def run_file(data: bytes) -> None:
    content = files.join(data)
    theirs = native.verdict(content, deep=True)
    largest, restored = native.largest(), native.restored() if theirs is None else {}
    n_restored = sum(len(part) for _, _, part in restored.values())
    fd = os.memfd_create("file")
    try:
        os.write(fd, content)
        path = Path(f"/proc/self/fd/{fd}")
        report = qmoecodec.verify(path, deep=True)
        ours = report.problems[0].reason if report.problems else None
        same("verdict", ours, theirs)
        if zlib.crc32(data) % 4 == 0:
            shallow = qmoecodec.verify(path).problems
            same("not deep", shallow[0].reason if shallow else None, None if ours == "not_canonical" else ours)
        if theirs is None:
            compare(path, restored)
            # a node of the C decoder's JSON tree, or of a set, takes up to 90 bytes; a value of it is two characters at least
            if largest > 100 * len(content) + 2 * n_restored + SPARE_BYTES:
                raise Finding(f"C takes a block of {largest} bytes for a file of {len(content)}")
    finally:
        os.close(fd)


def unpacked(path: Path) -> native.Restored:
    """Return what the package restores."""
    target = shard_folder().parent / "restored.safetensors"
    qmoecodec.unpack(path, target, overwrite=True)
    content = target.read_bytes()
    n = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + n])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        found[name] = (entry["dtype"], entry["shape"], content[8 + n + begin : 8 + n + end])
    return found


def compare(path: Path, restored: native.Restored) -> None:
    here = unpacked(path)
    same("names", sorted(here), sorted(restored))
    for name in here:
        if here[name] != restored[name]:
            raise Finding(f"tensor {name!r} differs: {here[name][:2]} here, {restored[name][:2]} there")


def seeds_file() -> Iterator[bytes]:
    for file in (*seed_files(), *kept("qmoe_fuzz")):
        yield files.split(file)
    yield from kept("file")


TARGETS = {
    target.name: target
    for target in (
        Target("header", run_header, seeds_header),
        Target("metadata", run_metadata, seeds_metadata),
        Target("dictionary", run_dictionary, seeds_dictionary),
        Target("rows", run_rows, seeds_rows, 1 << 12),
        Target("shards", run_shards, seeds_shards, 1 << 12),
        Target("roundtrip", run_roundtrip, seeds_roundtrip, 1 << 10),
        Target("file", run_file, seeds_file),
    )
}
