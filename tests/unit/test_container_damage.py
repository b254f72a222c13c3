"""Damaged and forged files: always one FormatError with reason and place, never a crash or a silent wrong answer."""

import json
import os
import pathlib
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from qmoecodec.container import VerifyReport, pack, unpack, verify
from qmoecodec.container import open as open_packed
from qmoecodec.errors import FormatError

SHAPE = (3, 5, 24)
Tensors = dict[str, list[Any]]  # name -> [dtype, shape, data]


def numbers() -> Any:
    rng = np.random.default_rng(1)
    digits = rng.choice([-1, 0, 1], size=SHAPE, p=[0.1, 0.8, 0.1])
    digits[:, 0] = 0  # a row of zeros
    digits[:, 1] = np.abs(digits[:, 1])  # a row without the low level
    digits[:, 1, 3] = 1
    levels = np.array([-0.5, 0, 0.75], np.float32)
    return levels[digits + 1]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("damage")
    tensors = {f"experts.{i}.w": numbers()[i] for i in range(3)} | {"t": np.arange(3, dtype=np.uint8)}
    safetensors.numpy.save_file(tensors, folder / "a.safetensors")
    report = pack(folder / "a.safetensors", folder / "p.safetensors", code_bits=8)
    assert [g.name for g in report.groups] == ["experts.w"]
    return (folder / "p.safetensors").read_bytes()


def read_all(path: pathlib.Path) -> list[bytes]:
    """Touch every value through the reader."""
    with open_packed(path) as f:
        values = [f.tensor_bytes(name).tobytes() for name in f.tensors]
        return values + [group.dense().tobytes() for group in f.groups.values()]


def sweep(packed: bytes, folder: pathlib.Path, flips: Iterator[tuple[int, int]]) -> int:
    """Flip bits one at a time; each must be noticed when all is read and by verify. Return how many there were."""
    path = folder / "f.safetensors"
    path.write_bytes(packed)
    good = read_all(path)
    n = 0
    fd = os.open(path, os.O_RDWR)
    try:
        for byte, mask in flips:
            n += 1
            os.pwrite(fd, bytes([packed[byte] ^ mask]), byte)
            with pytest.raises(FormatError):
                read_all(path)
            report = verify(path)
            assert report.problems, (byte, mask)
            os.pwrite(fd, packed[byte : byte + 1], byte)
    finally:
        os.close(fd)
    assert read_all(path) == good
    return n


def test_every_flipped_bit(packed: bytes, tmp_path: pathlib.Path) -> None:
    flips = ((i, 1 << bit) for i in range(len(packed)) for bit in range(8))
    assert sweep(packed, tmp_path, flips) == 8 * len(packed)


@pytest.mark.long
@pytest.mark.parametrize("dictionary", ["auto", "qmoe-2023"])
@pytest.mark.parametrize("code_bits", ["auto", 12, 16])
def test_flipped_bits_of_a_larger_file(tmp_path: pathlib.Path, dictionary: Any, code_bits: Any) -> None:
    if dictionary == "qmoe-2023" and code_bits == 12:
        pytest.skip("the table has 16 bits")
    rng = np.random.default_rng(2)
    levels = np.array([-0.5, 0, 0.75])
    tensors = {f"a.experts.{i}.w": levels[rng.integers(0, 3, (30, 50 + i // 4))].astype("f4") for i in range(8)}
    tensors |= {"half": levels[rng.choice(3, (9, 99), p=[0.05, 0.9, 0.05])].astype("f2"), "n": rng.random((9, 9))}
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors")
    pack(tmp_path / "a.safetensors", tmp_path / "p.safetensors", dictionary=dictionary, code_bits=code_bits)
    data = (tmp_path / "p.safetensors").read_bytes()
    step = max(1, len(data) // 4_000)
    flips = ((i, 1 << (i * 5 % 8)) for i in range(0, len(data), step))
    assert sweep(data, tmp_path, flips) >= 4_000


def test_every_prefix_and_every_longer_file(packed: bytes, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(packed)
    for n in range(len(packed) - 1, -1, -1):
        os.truncate(path, n)
        with pytest.raises(FormatError) as caught:
            open_packed(path)
        assert caught.value.reason == "truncated"
    path.write_bytes(packed + b"\0")
    with pytest.raises(FormatError) as caught:
        open_packed(path)
    assert caught.value.reason == "trailing_data"


def test_every_byte_replaced_in_the_header_by_every_structural_one(packed: bytes, tmp_path: pathlib.Path) -> None:
    """The checksum made good: then the parser and the checks of the structure are alone."""
    path = tmp_path / "f.safetensors"
    (n,) = struct.unpack("<Q", packed[:8])
    header = json.loads(packed[8 : 8 + n])
    crc_at = 8 + n + header["qmoecodec.header_crc32"]["data_offsets"][0]
    path.write_bytes(packed)
    good = read_all(path)
    survivors = 0
    for i in range(8, 8 + n):
        for new in b'0"':
            data = bytearray(packed)
            data[i] = new
            data[crc_at : crc_at + 4] = struct.pack("<I", zlib.crc32(bytes(data[: 8 + n])))
            path.write_bytes(data)
            try:
                values = read_all(path)
            except FormatError:
                continue
            # Allowed: what no value depends on, such as the name of a tensor.
            survivors += 1
            assert values == good
    assert 0 < survivors < n


# --- forged: every checksum right, one rule broken


def unwrap(data: bytes) -> tuple[Tensors, dict[str, Any]]:
    (n,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + n])
    text = json.loads(header.pop("__metadata__")["qmoecodec"])
    tensors = {}
    for name, e in header.items():
        begin, end = e["data_offsets"]
        tensors[name] = [e["dtype"], e["shape"], bytearray(data[8 + n + begin : 8 + n + end])]
    return tensors, text


def wrap(tensors: Tensors, text: dict[str, Any], *, sums: bool = True) -> bytes:
    """Put a file together again; `sums` makes all checksums right."""
    if sums:
        for i, d in enumerate(text["dictionaries"]):
            d["crc32"] = f"{zlib.crc32(tensors[f'qmoecodec.dictionary.{i}'][2]):08x}"
        for name in text["passthrough"]:
            if name in tensors:
                text["passthrough"][name] = f"{zlib.crc32(tensors[name][2]):08x}"
        for g in text["groups"]:
            if f"{g['name']}_checksums" in tensors:
                fix_experts(tensors, g["name"], g["shape"][0])
    header: dict[str, Any] = {"__metadata__": {"qmoecodec": json.dumps(text, sort_keys=True, separators=(",", ":"))}}
    at, body = 0, b""
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
        body += data
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    head = struct.pack("<Q", len(head)) + head
    if "qmoecodec.header_crc32" in tensors:
        begin = header["qmoecodec.header_crc32"]["data_offsets"][0]
        body = body[:begin] + struct.pack("<I", zlib.crc32(head)) + body[begin + 4 :]
    return head + body


def fix_experts(tensors: Tensors, group: str, experts: int) -> None:
    codes, lengths, levels = (tensors[f"{group}_{r}"][2] for r in ("codes", "row_lengths", "levels"))
    offsets = tensors[f"{group}_code_offsets"][2]
    index = tensors[f"{group}_dictionary_index"][2]
    sums = b""
    for e in range(experts):
        begin, end = struct.unpack("<QQ", offsets[8 * e : 8 * e + 16])
        n, m = len(lengths) // experts, len(levels) // experts
        parts = (codes[begin:end], lengths[e * n : e * n + n], levels[e * m : e * m + m], index[e : e + 1])
        sums += struct.pack("<I", zlib.crc32(b"".join((*parts, offsets[8 * e : 8 * e + 16]))))
    tensors[f"{group}_checksums"][2][:] = sums


Change = Callable[[Tensors, dict[str, Any]], None]


def examine(packed: bytes, folder: pathlib.Path, change: Change, *, deep: bool = False, sums: bool = True) -> VerifyReport:
    tensors, text = unwrap(packed)
    change(tensors, text)
    path = folder / "f.safetensors"
    path.write_bytes(wrap(tensors, text, sums=sums))
    report = verify(path, deep=deep)
    if not deep and report.problems:
        with pytest.raises(FormatError) as caught:
            read_all(path)
        assert caught.value.reason == report.problems[0].reason
        with pytest.raises(FormatError):
            unpack(path, folder / "u.safetensors")
        assert not (folder / "u.safetensors").exists()
    return report


def test_an_unchanged_forgery_is_fine(packed: bytes, tmp_path: pathlib.Path) -> None:
    assert examine(packed, tmp_path, lambda tensors, text: None, deep=True).problems == ()


def put(name: str, at: int, data: bytes) -> Change:
    def change(tensors: Tensors, text: dict[str, Any]) -> None:
        tensors[name][2][at : at + len(data)] = data

    return change


def f32(value: float) -> bytes:
    return struct.pack("<f", value)


ROW = 8 * (5 + 1)  # levels of expert 1, row 1
LEVELS = "experts.w_levels"


@pytest.mark.parametrize(
    ("change", "reason", "where"),
    [
        (put(LEVELS, ROW, f32(-0.0)), "level_value", {"group": "experts.w", "expert": 1, "row": 1}),
        (put(LEVELS, ROW, f32(float("inf"))), "level_value", {"group": "experts.w", "expert": 1, "row": 1}),
        (put(LEVELS, ROW, f32(float("nan"))), "level_value", {"group": "experts.w", "expert": 1, "row": 1}),
        (put(LEVELS, ROW, f32(0.75)), "level_value", {"group": "experts.w", "expert": 1, "row": 1}),
        (put(LEVELS, ROW, f32(1.0)), "level_value", {"group": "experts.w", "expert": 1, "row": 1}),
        (put(LEVELS, ROW, f32(-1e30)), None, {}),
        (put(LEVELS, ROW, f32(0.25)), None, {}),
        (put(LEVELS, ROW + 4, f32(0)), "level_zero", {"group": "experts.w", "expert": 1, "row": 1}),
        (put("experts.w_dictionary_index", 2, b"\x01"), "dictionary_index", {"group": "experts.w", "expert": 2}),
        (put("experts.w_code_offsets", 0, b"\x01"), "code_offsets", {"group": "experts.w"}),
        (put("experts.w_code_offsets", 24, b"\xff"), "code_offsets", {"group": "experts.w"}),
        (put("experts.w_code_offsets", 8, b"\xff\xff\xff\xff\xff\xff\xff\xff"), "code_offsets", {"group": "experts.w"}),
        (put("experts.w_row_lengths", 6, b"\xff"), "row_lengths", {"group": "experts.w", "expert": 1, "row": 1}),
        (put("experts.w_row_lengths", 6, b"\x00"), "row_lengths", {"group": "experts.w", "expert": 1}),
    ],
)  # fmt: skip
def test_one_broken_rule_in_the_data(
    packed: bytes, tmp_path: pathlib.Path, change: Change, reason: str | None, where: dict[str, Any]
) -> None:
    report = examine(packed, tmp_path, change)
    assert [p.reason for p in report.problems] == ([reason] if reason else [])
    for problem in report.problems:
        assert where.items() <= problem.where.items()
        assert f"[{reason}]" in problem.message


def test_every_code_replaced(packed: bytes, tmp_path: pathlib.Path) -> None:
    """Right checksums, wrong codewords: rejected with the row, or other digits; only deep verification knows better."""
    tensors, text = unwrap(packed)
    codes = tensors["experts.w_codes"][2]
    path = tmp_path / "f.safetensors"
    reasons = set()
    for at in range(len(codes)):
        for new in (0, codes[at] ^ 1, 255):
            old, codes[at] = codes[at], new
            path.write_bytes(wrap(tensors, text))
            codes[at] = old
            problems = verify(path, deep=True).problems
            reasons |= {p.reason for p in problems}
            assert all({"expert", "row"} <= p.where.keys() for p in problems)
            assert len(problems) == (old != new) or {p.reason for p in problems} <= {"not_canonical"}
    assert {"row_underrun", "not_canonical"} <= reasons


def set_metadata(path: str, value: object) -> Change:
    def change(tensors: Tensors, text: dict[str, Any]) -> None:
        *keys, last = path.split("/")
        at: Any = text
        for key in keys:
            at = at[int(key)] if isinstance(at, list) else at[key]
        if value is ...:
            del at[last]
        else:
            at[last] = value

    return change


def rename(old: str, new: str) -> Change:
    def change(tensors: Tensors, text: dict[str, Any]) -> None:
        items = [(new if name == old else name, value) for name, value in tensors.items()]
        tensors.clear()
        tensors.update(items)

    return change


def retype(name: str, dtype: str | None = None, shape: list[int] | None = None) -> Change:
    def change(tensors: Tensors, text: dict[str, Any]) -> None:
        tensors[name][0] = dtype or tensors[name][0]
        tensors[name][1] = shape or tensors[name][1]

    return change


def several(*changes: Change) -> Change:
    def change(tensors: Tensors, text: dict[str, Any]) -> None:
        for one in changes:
            one(tensors, text)

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (rename("qmoecodec.header_crc32", "x"), "missing_tensor"),
        (retype("qmoecodec.header_crc32", "F32"), "role_dtype"),
        (retype("qmoecodec.header_crc32", "U8", [4]), "role_dtype"),
        (retype("qmoecodec.header_crc32", shape=[1, 1]), "role_shape"),
        (rename("t", "u"), "orphan_tensor"),
        (set_metadata("passthrough/t", ...), "orphan_tensor"),
        (set_metadata("passthrough/u", "00000000"), "missing_tensor"),
        (set_metadata("passthrough/experts.w_codes", "00000000"), "orphan_tensor"),
        (set_metadata("passthrough/experts.1.w", "00000000"), "missing_tensor"),
        (several(rename("t", "experts.1.w"), set_metadata("passthrough", {"experts.1.w": "0" * 8})), "source_conflict"),
        (rename("experts.w_checksums", "experts.w_checksum"), "orphan_tensor"),
        (retype("experts.w_codes", "I8"), "role_dtype"),
        (retype("experts.w_levels", "U32"), "role_dtype"),
        (retype("experts.w_row_lengths", "I8"), "role_dtype"),
        (retype("experts.w_row_lengths", shape=[15]), "role_shape"),
        (retype("experts.w_levels", shape=[3, 2, 5]), "role_shape"),
        (retype("experts.w_code_offsets", shape=[2, 2]), "role_shape"),
        (retype("experts.w_checksums", shape=[3, 1]), "role_shape"),
        (retype("experts.w_dictionary_index", "BOOL"), "role_dtype"),
        (retype("qmoecodec.dictionary.0", "I8"), "role_dtype"),
        (set_metadata("groups/0/code_bits", 12), "dictionary_index"),
        (set_metadata("groups/0/row_length_base", 1000), "row_lengths"),
        (set_metadata("groups/0/row_length_base", (1 << 32) - 1), "row_lengths"),
        (set_metadata("groups/0/shape", [3, 5, 1 << 20]), "row_underrun"),
        (set_metadata("groups/0/shape", [3, 5, (1 << 31) - 1]), "row_underrun"),
        (set_metadata("groups/0/shape", [3, 5, 2]), "row_overrun"),
        (set_metadata("groups/0/shape", [3, 5, 0]), "row_overrun"),
        (set_metadata("groups/0/shape", [3, 6, 24]), "role_shape"),
        (set_metadata("groups/0/source", "experts.w"), "metadata_schema"),
        (set_metadata("dictionaries/0/threshold", 0), "dictionary_threshold"),
        (set_metadata("dictionaries/0/kind", "table"), "dictionary_threshold"),
        (put("qmoecodec.dictionary.0", 0, b"\xff"), "dictionary_symbol"),
        (set_metadata("format_version", "9.0"), "unsupported_version"),
        (set_metadata("required_features", ["x"]), "unsupported_feature"),
        (set_metadata("optional_features", ["x"]), None),
        (set_metadata("x-anything", [None]), None),
    ],
)  # fmt: skip
def test_one_broken_rule_in_the_header(packed: bytes, tmp_path: pathlib.Path, change: Change, reason: str | None) -> None:
    report = examine(packed, tmp_path, change)
    assert {p.reason for p in report.problems} == ({reason} if reason else set())


def test_a_missing_checksum_is_noticed(packed: bytes, tmp_path: pathlib.Path) -> None:
    zero = "00000000"
    for change, tensor in (
        (set_metadata("passthrough/t", zero), "t"),
        (set_metadata("dictionaries/0/crc32", zero), "qmoecodec.dictionary.0"),
    ):
        report = examine(packed, tmp_path, change, sums=False)
        assert {p.reason for p in report.problems} == {"checksum"}
        assert report.problems[0].where["tensor"] == tensor


def test_verify_names_all_that_is_wrong(packed: bytes, tmp_path: pathlib.Path) -> None:
    def change(tensors: Tensors, text: dict[str, Any]) -> None:
        tensors["t"][2][0] ^= 1
        tensors["experts.w_checksums"][2][0] ^= 1
        tensors["experts.w_checksums"][2][8] ^= 1

    report = examine(packed, tmp_path, change, sums=False)
    assert [(p.reason, p.where) for p in report.problems] == [
        ("checksum", {"group": "experts.w", "expert": 0}),
        ("checksum", {"group": "experts.w", "expert": 2}),
        ("checksum", {"tensor": "t"}),
    ]
    assert (report.n_groups, report.n_experts, report.n_tensors) == (1, 3, 1)
    assert not report.ok


def test_rows_come_before_levels_that_are_zero(packed: bytes, tmp_path: pathlib.Path) -> None:
    for code in range(256):

        def change(tensors: Tensors, text: dict[str, Any], code: int = code) -> None:
            levels = tensors["experts.w_levels"][2]
            levels[:] = bytes(len(levels))
            (end,) = struct.unpack_from("<Q", tensors["experts.w_code_offsets"][2], 8)
            tensors["experts.w_codes"][2][end - 1] = code

        report = examine(packed, tmp_path, change)
        if report.problems[0].reason != "level_zero":
            break
    found = [(p.reason, p.where) for p in report.problems]
    assert found[0][0] != "level_zero" and found[0][1] == {"group": "experts.w", "expert": 0, "row": 4}
    assert found[1][0] == "level_zero" and found[1][1]["expert"] == 0
    with pytest.raises(FormatError) as caught:
        unpack(tmp_path / "f.safetensors", tmp_path / "out.safetensors")
    assert (caught.value.reason, caught.value.where) == found[0]


def test_deep_verification_checks_the_writers_choices(packed: bytes, tmp_path: pathlib.Path) -> None:
    def widen(tensors: Tensors, text: dict[str, Any]) -> None:
        lengths = tensors["experts.w_row_lengths"]
        lengths[0], lengths[2] = "U16", bytearray(np.frombuffer(lengths[2], np.uint8).astype(np.uint16).tobytes())

    def lower(tensors: Tensors, text: dict[str, Any]) -> None:
        base = text["groups"][0]["row_length_base"]
        assert base > 0
        text["groups"][0]["row_length_base"] = base - 1
        lengths = tensors["experts.w_row_lengths"]
        lengths[2] = bytearray(n + 1 for n in lengths[2])

    for change in (widen, lower):
        assert examine(packed, tmp_path, change).ok
        report = examine(packed, tmp_path, change, deep=True)
        assert [p.reason for p in report.problems] == ["not_canonical"]
        assert report.problems[0].where["group"] == "experts.w"


# --- sizes that lie


def claim(shape: list[int], dtype: str, n_bytes: int) -> bytes:
    header = json.dumps({"__metadata__": {"qmoecodec": "{}"}, "t": {
        "dtype": dtype, "shape": shape, "data_offsets": [0, n_bytes]}}).encode()  # fmt: skip
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (struct.pack("<Q", 99_999_992) + b"{}" + b" " * 190, "truncated"),
        (struct.pack("<Q", 2_000_000_000) + b"{}" + b" " * 190, "header_size"),
        (claim([2_000_000_000], "U8", 2_000_000_000), "truncated"),
        (claim([1 << 31, 1 << 31], "U8", 1 << 62), "truncated"),
        (claim([1 << 62], "U64", 1 << 62), "tensor_size"),
        (claim([1 << 63], "U8", 0), "json_number"),
    ],
)
def test_claims_of_gigabytes_take_no_memory(tmp_path: pathlib.Path, data: bytes, reason: str) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(data)
    assert len(data) <= 200
    tracemalloc.start()
    for work in (open_packed, lambda p: unpack(p, tmp_path / "u"), lambda p: pack(p, tmp_path / "u")):
        with pytest.raises(FormatError) as caught:
            work(path)
        assert caught.value.reason == reason
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1 << 20


def test_a_claim_of_four_billion_experts(packed: bytes, tmp_path: pathlib.Path) -> None:
    """The names of the source tensors are listed only after the number of experts is known to fit the file."""
    n = (1 << 31) - 1

    def change(tensors: Tensors, text: dict[str, Any]) -> None:
        text["groups"][0] |= {"shape": [n, 0, 0], "expert_ranges": [[0, n]]}

    tensors, text = unwrap(packed)
    change(tensors, text)
    path = tmp_path / "f.safetensors"
    path.write_bytes(wrap(tensors, text, sums=False))
    tracemalloc.start()
    with pytest.raises(FormatError) as caught:
        open_packed(path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.reason == "role_shape"
    assert most < 1 << 20


def test_a_file_that_becomes_shorter_while_open(packed: bytes, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(packed)
    with open_packed(path) as f:
        expert = f["experts.w"].expert(0)
        f.tensors["t"]
        os.truncate(path, 100)
        with pytest.raises(FormatError) as caught:
            expert.decode()
        assert caught.value.reason == "truncated"
        for touch in (lambda: f["experts.w"].expert(1), lambda: f.tensors["t"]):
            with pytest.raises(FormatError) as caught:
                touch()
            assert caught.value.reason == "truncated"


@pytest.mark.parametrize(
    ("code_bits", "n"),
    [
        (8, 200),
        (12, 20),
        pytest.param(8, 3000, marks=pytest.mark.long),
        pytest.param(12, 1000, marks=pytest.mark.long),
        pytest.param(16, 300, marks=pytest.mark.long),
    ],
)
def test_random_changes_with_right_checksums(tmp_path: pathlib.Path, code_bits: Any, n: int) -> None:
    """Dictionaries, codes, lengths, offsets and levels changed at will: an error or an answer, and verify says the same."""
    tensors = {f"experts.{i}.w": numbers()[i] for i in range(3)} | {"wide": np.tile(numbers()[0], 4)}
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors")
    pack(tmp_path / "a.safetensors", tmp_path / "p.safetensors", code_bits=code_bits)
    good = (tmp_path / "p.safetensors").read_bytes()
    path = tmp_path / "f.safetensors"
    rng = np.random.default_rng(code_bits)
    outcomes = set()
    for _ in range(n):
        stored, text = unwrap(good)
        names = [n for n in stored if n != "qmoecodec.header_crc32"]
        for _ in range(int(rng.integers(1, 4))):
            data = stored[names[rng.integers(len(names))]][2]
            data[rng.integers(len(data))] = int(rng.choice([0, 1, 255, rng.integers(256)]))
        if rng.random() < 0.2:
            text["dictionaries"][0]["threshold"] = int(rng.integers(0, (1 << code_bits) + 1))
        if rng.random() < 0.2:
            text["groups"][0]["row_length_base"] = int(rng.integers(0, 9))
        path.write_bytes(wrap(stored, text))
        report = verify(path, deep=True)
        try:
            read_all(path)
            outcomes.add("read")
            assert {p.reason for p in report.problems} <= {"not_canonical", "checksum"}
        except FormatError as error:
            outcomes.add(error.reason)
            assert error.reason in {p.reason for p in report.problems}
    assert len(outcomes) > 3
    assert n < 200 or {"read", "code_offsets", "row_lengths", "dictionary_index"} <= outcomes
