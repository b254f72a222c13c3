"""Vectors with a fault in a checksum or a shard (spec §7, §8); encodings that are not canonical; limits."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

from vectors.codebook import Codebook
from vectors.draft import HEADER_CRC, Draft, Tensor, make
from vectors.faults import (
    BASES,
    Fault,
    added,
    broken,
    entry,
    header_length,
    keep,
    many,
    meta,
    put,
    recode,
    replaced,
    setting,
    text,
    whole,
)
from vectors.parts import (
    INDEX,
    SHARDS,
    Vector,
    bases,
    group_of,
    hand,
    index_text,
    table,
    two_shards,
    weight_map_of,
)
from vectors.valid import dictionaries, shapes


def checksums() -> Iterator[Vector]:
    def flip(name: str, at: int = 0, bit: int = 0) -> Fault:
        def fault(draft: Draft) -> None:
            data = bytearray(draft.tensors[name].data)
            data[at] ^= 1 << bit
            draft.tensors[name].data = bytes(data)

        return fault

    base = BASES["8"]
    yield from broken(
        "8",
        [
            *[
                (
                    f"checksum-expert-{role.replace('_', '-')}",
                    "checksum",
                    "CRC-001 CRC-006",
                    keep("experts", flip(f"w_{role}", 0, bit)),
                )
                for role, bit in (("codes", 7), ("levels", 3), ("row_lengths", 0), ("checksums", 0))
            ],
            ("checksum-expert-last-code", "checksum", "CRC-001", keep("experts", flip("w_codes", -1, 0))),
            ("checksum-expert-last-level", "checksum", "CRC-001", keep("experts", flip("w_levels", -1, 0))),
            ("checksum-dictionary", "checksum", "CRC-002 CRC-006", keep("dictionaries", flip("qmoecodec.dictionary.0", 0, 0))),
            ("checksum-dictionary-entry", "checksum", "CRC-002", keep("dictionaries", meta("dictionaries/0/crc32", "00000000"))),
            ("checksum-passthrough", "checksum", "CRC-003 CRC-006", keep("passthrough", flip("bias", 2, 6))),
            ("checksum-passthrough-entry", "checksum", "CRC-003", keep("passthrough", meta("passthrough/scale", "ffffffff"))),
            (
                "checksum-passthrough-swapped",
                "checksum",
                "CRC-003",
                keep(
                    "passthrough",
                    many(
                        meta("passthrough/scale", base.metadata["passthrough"]["bias"]),
                        meta("passthrough/bias", base.metadata["passthrough"]["scale"]),
                    ),
                ),
            ),
            ("checksum-header-dtype", "role_dtype", "CRC-004", replaced(HEADER_CRC, "I32", [1])),
            ("checksum-header-shape", "role_shape", "CRC-004", replaced(HEADER_CRC, "U32", [1, 1])),
            ("checksum-header-scalar", "role_shape", "CRC-004", replaced(HEADER_CRC, "U32", [])),
            ("checksum-header-two", "role_shape", "CRC-004", replaced(HEADER_CRC, "U32", [2], bytes(8))),
            ("checksum-header-zero", "checksum", "CRC-005 CRC-006", keep("header", lambda draft: None)),
            ("checksum-header-name", "checksum", "CRC-005", keep("header", text("w.weight", "v.weight"))),
            ("checksum-header-strings", "checksum", "CRC-005", keep("header", lambda draft: draft.strings.update(format="pt"))),
            ("checksum-header-castagnoli", "checksum", "CRC-005", whole(_castagnoli)),
            (
                "checksum-header-big-endian",
                "checksum",
                "CRC-005",
                whole(lambda file: _with_header_crc(file, _header_crc(file)[::-1])),
            ),
        ],
    )
    yield from broken(
        "groups",
        [
            ("checksum-expert-index", "checksum", "CRC-001", keep("experts", put("a_dictionary_index", 0, b"\1"))),
            ("checksum-expert-offsets", "checksum", "CRC-001", keep("experts", _move_offset)),
            ("checksum-experts-swapped", "checksum", "CRC-001", keep("experts", _swap_checksums)),
        ],
    )


def unused() -> Iterator[Vector]:
    """Yield files whose fault is in a part that no tensor needs."""
    name = "qmoecodec.dictionary.1"

    def one(identity: str, reason: str, reqs: str, fault: Fault) -> Vector:
        base = next(vector for vector in dictionaries(random.Random(0)) if vector.id == "valid/dictionary-idle")
        assert base.draft is not None
        draft = base.draft.copy()
        fault(draft)
        return Vector(
            f"invalid/{identity}",
            identity.replace("-", " "),
            [f"REQ-{req}" for req in reqs.split()],
            {"": draft.render()},
            error=reason,
            base=base.id,
            before={"": draft.render(refresh=False)},
        )

    yield one("unused-dictionary-damaged", "checksum", "CRC-002", keep("dictionaries", put(name, 0, b"\x07")))
    yield one("unused-dictionary-symbol", "dictionary_symbol", "DIC-004", put(name, 0, b"\x03"))


def _header_crc_place(file: bytes) -> int:
    n = int.from_bytes(file[:8], "little")
    at: int = json.loads(file[8 : 8 + n])[HEADER_CRC]["data_offsets"][0]
    return 8 + n + at


def _header_crc(file: bytes) -> bytes:
    at = _header_crc_place(file)
    return file[at : at + 4]


def _with_header_crc(file: bytes, value: bytes) -> bytes:
    at = _header_crc_place(file)
    return file[:at] + value + file[at + 4 :]


def _castagnoli(file: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in file[: 8 + int.from_bytes(file[:8], "little")]:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return _with_header_crc(file, struct.pack("<I", crc ^ 0xFFFFFFFF))


def _move_offset(draft: Draft) -> None:
    offsets = [*struct.unpack("<4Q", draft.tensors["a_code_offsets"].data)]
    offsets[1] += 1
    draft.tensors["a_code_offsets"].data = struct.pack("<4Q", *offsets)


def _swap_checksums(draft: Draft) -> None:
    data = draft.tensors["a_checksums"].data
    draft.tensors["a_checksums"].data = data[4:8] + data[:4] + data[8:]


def shards() -> Iterator[Vector]:
    drafts, _ = two_shards()
    files = {name: draft.render() for name, draft in drafts.items()}
    weight_map = weight_map_of(drafts)
    good = index_text(weight_map, {"total_size": 123})

    def one(
        name: str,
        reason: str,
        reqs: str,
        index: bytes = good,
        change: dict[str, bytes | None] | None = None,
        before: dict[str, bytes | None] | None = None,
        **flags: Any,
    ) -> Vector:
        def content(part: dict[str, bytes | None]) -> dict[str, bytes]:
            return {file: data for file, data in ({**files, INDEX: index} | part).items() if data is not None}

        return Vector(
            f"invalid/{name}",
            name.replace("-", " "),
            [f"REQ-{req}" for req in reqs.split()],
            content(change or {}),
            error=reason,
            base="valid/base-shards",
            before=content(before or change or {}),
            **flags,
        )

    def mapped(**changes: Any) -> dict[str, Any]:
        return {name: file for name, file in (weight_map | changes).items() if file is not None}

    first = weight_map["a_codes"]
    yield one("index-empty", "header_json", "SHD-001 JSN-001", b"")
    yield one("index-not-json", "header_json", "SHD-001 JSN-001", good[:-4])
    yield one("index-array", "header_json", "SHD-001 JSN-001", b"[]")
    yield one("index-latin1", "header_encoding", "SHD-001 JSN-006", good.replace(b"bias", b"bi\xe4s"))
    yield one("index-bom", "header_encoding", "SHD-001 CON-004", b"\xef\xbb\xbf" + good)
    yield one("index-surrogate", "header_encoding", "JSN-006", good.replace(b"bias", b"bi\\udc00s"))
    yield one("index-duplicate", "duplicate_key", "JSN-002", good.replace(b'"bias": ', b'"bias": "x", "bias": '))
    yield one(
        "index-duplicate-map", "duplicate_key", "JSN-002", good.replace(b'"weight_map": ', b'"weight_map": {}, "weight_map": ')
    )
    yield one("index-depth", "json_depth", "JSN-003", index_text(weight_map, {"a": json.loads("[" * 15 + "]" * 15)}))
    yield one("index-number", "json_number", "JSN-004", index_text(weight_map, {}, version=1.5))
    yield one("index-number-negative", "json_number", "JSN-004", index_text(weight_map, {}, version=[-1]))
    yield one("index-number-deeper", "json_number", "JSN-004", index_text(weight_map, {}, note={"metadata": 0.5}))
    yield one("index-empty-object", "shard_index", "SHD-001", b"{}")
    yield one("index-no-map", "shard_index", "SHD-001", b'{"metadata": {}}')
    yield one("index-map-array", "shard_index", "SHD-001", b'{"weight_map": ["a"]}')
    yield one("index-map-true", "shard_index", "SHD-001 JSN-005", b'{"weight_map": true}')
    yield one("index-map-null-name", "shard_index", "SHD-001 JSN-005", index_text(weight_map | {"bias": None}))
    yield one("index-map-null", "shard_index", "SHD-001 JSN-005", b'{"weight_map": null}')
    yield one("index-map-number", "shard_index", "SHD-001", index_text(mapped(bias=1)))
    yield one("index-map-list", "shard_index", "SHD-001", index_text(mapped(bias=[first])))
    yield one("index-metadata-array", "shard_index", "SHD-001", index_text(weight_map, []))
    yield one("index-metadata-null", "shard_index", "SHD-001 JSN-005", good.replace(b'{\n    "total_size": 123\n  }', b"null"))
    names = {
        "parent": "..",
        "here": ".",
        "none": "",
        "traversal": f"../{first}",
        "absolute": "/etc/passwd",
        "folder": f"sub/{first}",
        "backslash": f"..\\{first}",
        "nul": f"{first}\0",
        "here-slash": f"./{first}",
        "url": "file:///etc/passwd",
    }
    for name, path in names.items():
        yield one(f"shard-path-{name}", "shard_path", "SHD-003", index_text(mapped(bias=path)))
    yield one("shard-missing", "shard_missing", "SHD-004", change={SHARDS[1]: None})
    yield one("shard-missing-name", "shard_missing", "SHD-004", index_text(mapped(bias="model-00003-of-00003.safetensors")))
    yield one("shard-missing-long-name", "shard_missing", "SHD-004", index_text(mapped(bias="m" * 5000)))
    yield one(
        "shard-directory-empty",
        "shard_missing",
        "SHD-007",
        change={INDEX: None, SHARDS[0]: None, SHARDS[1]: None, "config.json": b"{}"},
    )
    yield one("directory-other-names", "shard_missing", "SHD-007", change={INDEX: None})
    outside = "vectors/valid/base-8.safetensors"
    link = "linked.safetensors"
    linked = index_text({name: link if file == first else file for name, file in weight_map.items()})
    yield one("shard-link-outside", "shard_path", "SHD-005", linked, links={link: outside})
    yield one("shard-link-parent", "shard_path", "SHD-005", linked, links={link: ".."})
    yield one("shard-link-directory", "shard_path", "SHD-005", linked, links={link: "."})
    yield one("shard-link-dangling", "shard_missing", "SHD-004", linked, links={link: "nowhere.safetensors"})
    yield one("directory-link-outside", "shard_path", "SHD-005", change={INDEX: None}, links={"model.safetensors": outside})
    yield one("index-tensor-not-named", "shard_mismatch", "SHD-002", index_text(mapped(bias=None)))
    yield one("index-role-not-named", "shard_mismatch", "SHD-002", index_text(mapped(a_codes=None)))
    yield one("index-tensor-too-many", "shard_mismatch", "SHD-002", index_text(mapped(other=first)))
    yield one("index-tensor-elsewhere", "shard_mismatch", "SHD-002", index_text(mapped(bias=SHARDS[1])))
    yield one("index-reserved-named", "shard_mismatch", "SHD-002", index_text(mapped(**{HEADER_CRC: first})))
    yield one("index-source-named", "shard_mismatch", "SHD-002", index_text(mapped(**{"e.0.wi": first})))
    yield one(
        "index-shards-swapped", "shard_mismatch", "SHD-002", change={SHARDS[0]: files[SHARDS[1]], SHARDS[1]: files[SHARDS[0]]}
    )

    def second(
        fault: Fault, more: dict[str, str] | None = None
    ) -> tuple[dict[str, bytes | None], dict[str, bytes | None], bytes]:
        draft = drafts[SHARDS[1]].copy()
        fault(draft)
        return (
            {SHARDS[1]: draft.render()},
            {SHARDS[1]: draft.render(refresh=False)},
            index_text(weight_map | (more or {}), {"total_size": 123}),
        )

    def in_second(name: str, reason: str, reqs: str, fault: Fault, more: dict[str, str] | None = None) -> Vector:
        change, before, index = second(fault, more)
        return one(name, reason, reqs, index, change, before)

    extra = Tensor("U8", [1], b"\5")
    yield in_second("shard-source-twice", "source_conflict", "SHD-006", meta("groups/0/source", "e.1.wi"))
    yield in_second("shard-source-is-passthrough", "source_conflict", "SHD-006", meta("groups/0/source", "bias"))
    yield in_second(
        "shard-passthrough-is-source",
        "source_conflict",
        "SHD-006",
        added("e.0.wi", extra, passthrough=True),
        {"e.0.wi": SHARDS[1]},
    )
    yield in_second("shard-tensor-twice", "source_conflict", "SHD-006", added("bias", extra, passthrough=True))
    yield in_second("shard-damaged", "checksum", "CRC-006", keep("experts", put("b_codes", 0, b"\0\xff")))
    yield in_second("shard-codeword", "unused_codeword", "ROW-002", recode(_spoil, hand(12), "b"))
    yield in_second("shard-version", "unsupported_version", "MET-005", meta("format_version", "2.0"))
    yield one("shard-empty", "truncated", "CON-001", change={SHARDS[1]: b""})
    yield one("shard-not-packed", "not_packed", "MET-002", change={SHARDS[1]: _plain_safetensors()})


def _spoil(rows: list[list[int]]) -> None:
    rows[0][0] = 7


def _plain_safetensors() -> bytes:
    text = b'{"__metadata__":{"format":"pt"},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"\1"


# ---- Accepted, but not canonical -------------------------------------------------------------------------------------


def noncanonical() -> Iterator[Vector]:
    """Yield files that a reader accepts unless it is asked to check the encoding."""
    tensors = {vector.id: vector.tensors for vector in bases()}

    def one(name: str, reqs: str, base: str, fault: Fault) -> Vector:
        draft = BASES[base]
        fault(draft)
        return Vector(
            f"noncanonical/{name}",
            name.replace("-", " "),
            [f"REQ-{req}" for req in reqs.split()],
            {"": draft.render()},
            tensors[f"valid/base-{base}"],
            deep="not_canonical",
            base=f"valid/base-{base}",
            before={"": draft.render(refresh=False)},
        )

    def rewrite(row: int, parse: Callable[[list[int]], list[int]], book: Codebook) -> Fault:
        def change(rows: list[list[int]]) -> None:
            rows[row] = parse(rows[row])

        return recode(change, book)

    for bits, base in ((8, "8"), (12, "12"), (16, "16")):
        # Row 4 ends in 0, encoded as 00 (incomplete): the leaf 000 gives the same digits and more overrun.
        yield one(f"past-incomplete-{bits}", "ROW-001", base, rewrite(4, lambda words: [*words[:-1], 0], hand(bits)))
        # Row 2 ends in -, encoded as -0 (incomplete), for which the leaf -00 stands as well.
        yield one(f"past-incomplete-minus-{bits}", "ROW-001", base, rewrite(2, lambda words: [*words[:-1], 3], hand(bits)))
    tables = table(8)
    code = tables.codes[0]
    yield one("table-shorter", "ROW-001", "table", rewrite(1, lambda words: [code[b"\0"]] * 12, tables))
    yield one("table-two-for-one", "ROW-001", "table", rewrite(1, lambda words: [code[bytes(4)]] * 3, tables))
    yield one("table-past-end", "ROW-001", "table", rewrite(3, lambda words: [*words[:-1], code[bytes(2)]], tables))
    yield one(
        "table-first-shorter", "ROW-001", "table", rewrite(1, lambda words: [code[bytes(4)], code[bytes(7)], code[b"\0"]], tables)
    )

    def lower(draft: Draft) -> None:
        draft.metadata["groups"][0]["row_length_base"] -= 1
        tensor = draft.tensors["w_row_lengths"]
        tensor.data = bytes(length + 1 for length in tensor.data)

    def wider(dtype: str, size: int) -> Fault:
        def fault(draft: Draft) -> None:
            tensor = draft.tensors["w_row_lengths"]
            draft.tensors["w_row_lengths"] = Tensor(
                dtype, tensor.shape, b"".join(n.to_bytes(size, "little") for n in tensor.data)
            )

        return fault

    yield one("row-length-base-too-low", "GRP-013", "8", lower)
    yield one("row-lengths-u16", "GRP-013", "8", wider("U16", 2))
    yield one("row-lengths-u32", "GRP-013", "8", wider("U32", 4))

    groups = [group_of("w", "fused", "F32", 8, [], (0, 2, 3))]
    draft = make(groups, [hand(8)])
    draft.metadata["groups"][0]["row_length_base"] = 1
    empty = next(vector for vector in shapes() if vector.id == "valid/shape-fused-0-2-3")
    yield Vector(
        "noncanonical/row-length-base-without-rows",
        "a base of 1 in a group without rows",
        ["REQ-GRP-013"],
        {"": draft.render()},
        empty.tensors,
        deep="not_canonical",
        base=empty.id,
        before={"": draft.render(refresh=False)},
    )


# ---- Small files that claim much, and large files --------------------------------------------------------------------


def limits() -> Iterator[Vector]:
    """Yield files for which time and memory count."""
    large = 2**31 - 1

    def claim(name: str, reason: str, reqs: str, fault: Fault, base: str = "8", **flags: Any) -> Iterator[Vector]:
        for vector in broken(base, [(name, reason, reqs, fault)]):
            vector.id = f"limit/{name}"
            for key, value in flags.items():
                setattr(vector, key, value)
            yield vector

    shape = "groups/0/shape"
    yield from claim("columns-2-31", "row_underrun", "GEN-002 GRP-014", meta(shape, [1, 5, large]))
    yield from claim("rows-2-30", "role_shape", "GEN-002 GRP-008", meta(shape, [1, 2**30, 12]))
    yield from claim("rows-and-columns", "role_shape", "GEN-002 GRP-008", meta(shape, [1, 2**30, 2**31 - 1]))
    yield from claim(
        "experts-2-31",
        "role_shape",
        "GEN-002 GRP-008",
        many(meta("groups/0/shape", [large, 3, 20]), meta("groups/0/expert_ranges", [[0, large]])),
        "groups",
    )
    yield from claim(
        "experts-2-31-long-names",
        "role_shape",
        "GEN-002 GRP-008",
        many(
            meta("groups/0/shape", [large, 0, 0]),
            meta("groups/0/source", "x" * 3000 + "{}"),
            meta("groups/0/expert_ranges", [[0, large]]),
        ),
        "groups",
    )
    yield from claim("tensor-2gb", "truncated", "GEN-002 TEN-008", entry("bias", shape=[2**31], data_offsets=[0, 2**31]))
    yield from claim("tensor-2-62", "truncated", "GEN-002 TEN-008", entry("bias", shape=[2**62], data_offsets=[0, 2**62]))
    yield from claim("row-lengths-2-32", "row_lengths", "GEN-002 GRP-010", meta("groups/0/row_length_base", 2**32 - 1))
    yield from claim("header-100mb", "truncated", "GEN-002 CON-001", header_length(100_000_000))
    yield from claim("header-above-limit", "header_size", "CON-002 GEN-002", header_length(100_000_008), size=100_000_016)
    yield from claim("header-1gb", "header_size", "CON-002 GEN-002", header_length(10**9), size=10**9 + 8)
    yield from claim("header-20mb", "header_encoding", "CON-004 GEN-002", many(header_length(20_000_000)), size=20_000_008)
    yield from claim(
        "nested-arrays",
        "json_depth",
        "JSN-003",
        setting(header_text=lambda text: text[:-1] + ',"a":' + "[" * 1_000_000),
        gzip=True,
    )
    yield from claim(
        "values",
        "json_size",
        "JSN-007 GEN-002",
        setting(header_text=lambda text: f'{text[:-1]},"a":[{"0," * 8_000_000}0]}}'),
        gzip=True,
        seconds=30,
    )
    yield from claim("digits", "json_number", "JSN-004", text('"shape":[1,5]', f'"shape":[{"9" * 1_000_000},5]'), gzip=True)
    yield from claim(
        "empty-tensors",
        "tensor_count",
        "TEN-002 GEN-002",
        setting(
            header_text=lambda text: (
                text[:-1]
                + ","
                + ",".join(f'"{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(70_000))
                + "}"
            )
        ),
        gzip=True,
        seconds=30,
    )
