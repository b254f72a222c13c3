"""Vectors that every reader accepts: metadata, headers, random files, directories; and those of later versions."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vectors import codebook
from vectors.draft import SIZES, Draft, Group, Tensor, make
from vectors.parts import (
    FLOATS,
    INDEX,
    PLAIN,
    ROWS,
    SHARDS,
    Vector,
    group_of,
    hand,
    index_text,
    of_rows,
    plain,
    random_matrix,
    two_shards,
    weight_map_of,
)


def metadata(rng: random.Random) -> Iterator[Vector]:
    def groups(name: str = "w", **flags: Any) -> list[Group]:
        layout = flags.pop("layout", "matrix")
        n = flags.pop("experts", 1)
        return [group_of(name, layout, "F32", 8, [random_matrix(rng, 2, 8, "F32") for _ in range(n)], **flags)]

    def nested(depth: int) -> Any:
        return [nested(depth - 1)] if depth > 1 else []

    def extended(draft: Draft) -> None:
        draft.metadata["x-all"] = {"a": [1, "b", None, True, {"c": False}], "": 2**63 - 1}
        draft.metadata["x-"] = None
        draft.metadata["dictionaries"][0]["x-note"] = "kept"
        draft.metadata["groups"][0]["x-rotation"] = [1, 2, 3]

    yield plain("valid/x-keys", "keys that begin with x-, at every level", ["REQ-MET-010"], groups(), [hand(8)], PLAIN, extended)
    yield plain(
        "valid/x-deep",
        "a value 16 deep",
        ["REQ-JSN-003", "REQ-MET-010"],
        groups(),
        [hand(8)],
        PLAIN,
        lambda draft: draft.metadata.update({"x-deep": nested(15)}),
    )
    names = {
        "quote": 'w"\\/',
        "control": "w\0\1\b\t\n\f\r\x1f\x7f",
        "unicode": "wäδ中",
        "astral": "w\U0001d11e\U0010ffff",
        "braces": "w{}{}",
    }
    for key, name in names.items():
        yield plain(
            f"valid/name-{key}",
            f"names: {name!r}",
            ["REQ-MET-003", "REQ-JSN-006"],
            groups(f"g.{name}", source=name),
            [hand(8)],
            {f"p.{name}": PLAIN["bias"]},
        )
    yield plain(
        "valid/name-empty",
        "a source tensor and a passthrough tensor with short names",
        ["REQ-GRP-001"],
        groups(source=""),
        [hand(8)],
        {" ": PLAIN["bias"]},
    )
    yield plain(
        "valid/name-passthrough-empty", "a passthrough tensor without a name", ["REQ-MET-011"], passthrough={"": PLAIN["bias"]}
    )
    yield plain(
        "valid/name-passthrough-x",
        "a passthrough tensor whose name begins with x-",
        ["REQ-MET-010", "REQ-CRC-003"],
        groups(),
        [hand(8)],
        {"x-bias": PLAIN["bias"]},
    )
    yield plain(
        "valid/name-near-reserved",
        "names that are nearly reserved",
        ["REQ-MET-013"],
        groups("qmoecodec", source="w"),
        [hand(8)],
        {"qmoecodec": PLAIN["bias"], "Qmoecodec.a": PLAIN["bias"], " qmoecodec.a": PLAIN["bias"]},
    )
    yield plain(
        "valid/name-4096", "a group name of 4,096 bytes", ["REQ-GRP-001"], groups("é" * 2048, source="s"), [hand(8)], gzip=True
    )
    yield plain(
        "valid/name-roles",
        "names that look like role tensors",
        ["REQ-MET-011"],
        groups("w_codes") + groups("w"),
        [hand(8)],
        {"w_weights": PLAIN["bias"], "codes": PLAIN["bias"]},
    )
    yield plain(
        "valid/names-sorted",
        "sorted by code point, not by UTF-16",
        ["REQ-MET-003", "REQ-GRP-002"],
        groups("g\uff5e") + groups("g\U0001d11e") + groups("gé") + groups("gz"),
        [hand(8)],
        {"\uff5e": PLAIN["bias"], "\U0001d11e": PLAIN["bias"], "é": PLAIN["bias"], "z": PLAIN["bias"]},
    )
    yield plain(
        "valid/source-as-role",
        "a source tensor with the name of a role tensor",
        ["REQ-GRP-005"],
        groups(source="w_codes"),
        [hand(8)],
    )
    cases: dict[str, tuple[str, list[list[int]]]] = {
        "gaps": ("e.{}", [[0, 1], [2, 3], [5, 7]]),
        "large": ("e.{}", [[2**32 - 4, 2**32]]),
        "first": ("{}.w", [[7, 11]]),
        "last": ("w{}", [[0, 4]]),
        "only": ("{}", [[9, 13]]),
        "digits": ("1{}2", [[0, 4]]),
    }
    for key, (source, ranges) in cases.items():
        yield plain(
            f"valid/ranges-{key}",
            f"template {source}, numbers {ranges}",
            ["REQ-GRP-004", "REQ-GRP-005"],
            groups(layout="stacked", experts=4, source=source, ranges=ranges),
            [hand(8)],
        )
    yield plain(
        "valid/ranges-alike",
        "templates whose names differ",
        ["REQ-GRP-005"],
        groups("a", layout="stacked", experts=2, source="w{}", ranges=[[0, 2]])
        + groups("b", layout="stacked", experts=2, source="w1{}", ranges=[[0, 2]])
        + groups("c", source="w2"),
        [hand(8)],
        {"w01": PLAIN["bias"], "w{}": PLAIN["bias"]},
    )
    yield plain(
        "valid/strings",
        "other entries of __metadata__",
        ["REQ-MET-001"],
        groups(),
        [hand(8)],
        PLAIN,
        lambda draft: draft.strings.update({"format": "pt", "": "", "é\U0001d11e": "\u2028\0"}),
    )
    yield plain("valid/nothing", "no tensor but the header checksum", ["REQ-MET-011", "REQ-CRC-004"])
    yield plain("valid/passthrough-only", "passthrough tensors alone", ["REQ-CRC-003"], passthrough=PLAIN, encode=True)
    yield plain("valid/groups-only", "no passthrough tensor", ["REQ-MET-008"], groups(), [hand(8)], encode=True)


def headers(rng: random.Random) -> Iterator[Vector]:
    groups = [group_of("w", "matrix", "F32", 8, [of_rows(ROWS)])]

    def one(name: str, note: str, reqs: Sequence[str], change: Callable[[Draft], None] | None = None, **flags: Any) -> Vector:
        return plain(f"valid/header-{name}", note, reqs, groups, [hand(8)], PLAIN, change, **flags)

    def setter(**values: Any) -> Callable[[Draft], None]:
        def change(draft: Draft) -> None:
            for key, value in values.items():
                setattr(draft, key, value)

        return change

    def spaced(text: str) -> str:
        return json.dumps(json.loads(text), indent="\t\n\r ", ensure_ascii=False)

    def escaped(text: str) -> str:
        return text.replace('"dtype"', '"\\u0064type"').replace('"F32"', '"\\u00463\\u0032"').replace("shape", "s\\u0068ape")

    def pad(n: int) -> Callable[[str], str]:  # make the text need n spaces modulo 8
        return lambda text: text[:-1] + " " * ((-len(text.encode()) - n) % 8) + "}"

    for n in (0, 1, 8, 32, 56, 63):
        yield one(
            f"spaces-{n}", f"{n} spaces after the object", ["REQ-CON-006", "REQ-CON-003"], setter(header_text=pad(n), padding=n)
        )
    yield one("whitespace", "white space of all kinds between the tokens", ["REQ-JSN-001"], setter(header_text=spaced))
    yield one("escapes", "escaped letters in keys and values", ["REQ-JSN-002", "REQ-TEN-001"], setter(header_text=escaped))
    names = [*make(groups, [hand(8)], PLAIN).tensors]

    def mixed(draft: Draft) -> None:  # every element size before and after every other, padded by nothing: sizes must fit
        draft.order = sorted(draft.tensors, key=lambda name: (-SIZES[draft.tensors[name].dtype], rng.random()))

    yield one("order", "tensors of one element size in no order", ["REQ-TEN-010", "REQ-TEN-011"], mixed)
    yield one(
        "metadata-last",
        "__metadata__ after the tensors",
        ["REQ-MET-001"],
        setter(header=lambda header: {name: header[name] for name in [*names, "__metadata__"]}),
    )
    yield one(
        "shuffled",
        "entries in another order than the data",
        ["REQ-TEN-010"],
        setter(header=lambda header: dict(sorted(header.items(), key=lambda item: item[0][::-1]))),
    )
    yield one(
        "keys",
        "the keys of an entry in another order",
        ["REQ-TEN-001"],
        setter(header=lambda header: {name: dict(reversed(entry.items())) for name, entry in header.items()}),
    )
    small_first = {
        "aa": Tensor("U8", [8], bytes(range(8))),
        "ab": Tensor("F64", [1], struct.pack("<d", 1.5)),
        "ac": Tensor("U16", [2], b"\1\2\3\4"),
    }
    yield plain(
        "valid/header-small-first",
        "a byte tensor before one of eight bytes",
        ["REQ-TEN-009"],
        passthrough=small_first,
        change=lambda draft: setattr(draft, "order", ["aa", "ab", "ac", "qmoecodec.header_crc32"]),
    )
    every = {f"t.{dtype}": Tensor(dtype, [2], bytes(range(1, 2 * size + 1))) for dtype, size in SIZES.items()}
    yield plain("valid/dtypes", "passthrough tensors of every dtype", ["REQ-TEN-004"], passthrough=every, encode=True)
    empty = {f"e{i}": Tensor("F32", [0], b"") for i in range(5)} | {
        "f": Tensor("U8", [0, 2**62, 2**62], b""),
        "g": PLAIN["scale"],
    }
    yield plain(
        "valid/tensors-empty",
        "empty tensors, some of a large shape",
        ["REQ-TEN-006", "REQ-TEN-007", "REQ-GEN-001"],
        passthrough=empty,
    )
    ranks = {f"r{n}": Tensor("U16", [1] * n, b"\1\2") for n in range(9)}
    yield plain("valid/ranks", "0 to 8 dimensions", ["REQ-TEN-003"], passthrough=ranks, encode=True)
    floats = {
        "nan": Tensor("F32", [3], bytes.fromhex("0100c07f010080ffffffff7f")),
        "negative-zero": Tensor("F32", [2, 2], struct.pack("<4f", -0.0, 0.0, 1.0, -1.0)),
        "infinite": Tensor("F16", [2], b"\0\x7c\0\xfc"),
    }
    yield plain(
        "valid/passthrough-floats", "NaN payloads, negative zeros, infinities", ["REQ-CRC-003"], passthrough=floats, encode=True
    )
    many = {f"{i:x}": Tensor("U8", [0], b"") for i in range(65_535)}
    yield plain(
        "valid/tensors-65536", "as many tensors as there may be", ["REQ-TEN-002"], passthrough=many, gzip=True, seconds=30
    )


def at_random(rng: random.Random, count: int, prefix: str = "valid/random") -> Iterator[Vector]:
    """Yield files of random groups, dictionaries and passthrough tensors."""
    for k in range(count):
        bits = [rng.choice((8, 8, 8, 12, 16)) for _ in range(rng.randint(1, 3))]
        bank = []
        for b in bits:
            if b == 8 and rng.random() < 0.3:
                bank.append(codebook.random_table(rng, b, rng.randint(3, 60), 12, rng.random()))
            else:
                p = rng.random()
                bank.append(codebook.random_aivf(rng, b, rng.randint(40, 2**b - 1), rng.randint(0, 60), p))
        groups = []
        for name in rng.sample("abcdefg", rng.randint(0, 3)):
            b = rng.choice(bits)
            fitting = [i for i, own in enumerate(bits) if own == b]
            layout, dtype, p_zero = (
                rng.choice(("stacked", "fused", "matrix")),
                rng.choice(FLOATS),
                rng.choice((0, 0.3, 0.6, 0.9, 1)),
            )
            n_rows, cols = rng.randint(0, 4), rng.randint(0, 40)
            n = 1 if layout == "matrix" else rng.randint(0, 4)
            experts = [random_matrix(rng, n_rows, cols, dtype, p_zero, rng.choice(fitting)) for _ in range(n)]
            groups.append(group_of(name, layout, dtype, b, experts, (n, n_rows, cols)))
        passthrough = {}
        for i in range(rng.randint(0, 3)):
            dtype = rng.choice([*SIZES])
            shape = [rng.randint(0, 3) for _ in range(rng.randint(0, 3))]
            n_bytes = SIZES[dtype]
            for n in shape:
                n_bytes *= n
            passthrough[f"p{i}"] = Tensor(dtype, shape, rng.randbytes(n_bytes))
        yield plain(
            f"{prefix}-{k}",
            "groups, dictionaries and tensors drawn at random",
            ["REQ-ROW-001", "REQ-GRP-008"],
            groups,
            bank,
            passthrough,
        )


# ---- Directories -----------------------------------------------------------------------------------------------------


def directories() -> Iterator[Vector]:
    drafts, tensors = two_shards()
    files = {name: draft.render() for name, draft in drafts.items()}
    weight_map = weight_map_of(drafts)
    reqs = ["REQ-SHD-001", "REQ-SHD-002", "REQ-SHD-004"]

    def one(
        name: str, note: str, index: bytes, more: dict[str, bytes] | None = None, reqs: Sequence[str] = reqs, **flags: Any
    ) -> Vector:
        return Vector(f"valid/{name}", note, reqs, files | {INDEX: index} | (more or {}), tensors, drafts=drafts, **flags)

    yield one("base-shards", "two shards and their index", index_text(weight_map, {"total_size": 123}))
    yield one("shards-no-metadata", "an index without metadata", index_text(weight_map))
    yield one(
        "shards-numbers",
        "any number in metadata, and only there",
        index_text(weight_map, {"total_size": 1.5, "a": [-1, {"b": 1e300}], "c": 2**70}, version=1),
    )
    yield one("shards-other-keys", "other keys of the index", index_text(weight_map, {}, note=[1, None, {"deep": True}]))
    yield one(
        "shards-order", "the index in another order", index_text(dict(sorted(weight_map.items(), key=lambda item: item[0][::-1])))
    )
    yield one(
        "shards-other-files",
        "files that the index does not name",
        index_text(weight_map),
        {"config.json": b"{}", "other.safetensors": b"no"},
    )
    yield one(
        "shards-compact", "an index without white space", json.dumps({"weight_map": weight_map}, separators=(",", ":")).encode()
    )
    yield one(
        "shards-escapes",
        "escapes in the index",
        index_text(weight_map).replace(b"bias", b"b\\u0069as").replace(b"00001", b"0000\\u0031"),
    )
    link = "linked.safetensors"
    linked = {name: link if file == SHARDS[0] else file for name, file in weight_map.items()}
    yield one(
        "shards-link-inside",
        "a symbolic link that stays inside",
        index_text(linked),
        links={link: SHARDS[0]},
        reqs=["REQ-SHD-005"],
    )
    odd = {"shard one…": SHARDS[0], "-": SHARDS[1]}
    renamed = {new: files[old] for new, old in odd.items()}
    names = {old: new for new, old in odd.items()}
    yield Vector(
        "valid/shards-names",
        "unusual file names",
        ["REQ-SHD-003"],
        renamed | {INDEX: index_text({name: names[file] for name, file in weight_map.items()})},
        tensors,
    )
    only = {name: tensor for name, tensor in tensors.items() if name in ("e.0.wi", "e.1.wi", "bias")}
    yield Vector(
        "valid/directory-one-file",
        "a directory without an index",
        ["REQ-SHD-007"],
        {"model.safetensors": files[SHARDS[0]]},
        only,
        drafts=drafts,
    )
    yield Vector(
        "valid/shards-one",
        "an index of one file",
        reqs,
        {SHARDS[0]: files[SHARDS[0]], INDEX: index_text({n: f for n, f in weight_map.items() if f == SHARDS[0]})},
        only,
    )
    yield Vector("valid/shards-none", "an index of no file", ["REQ-SHD-001"], {INDEX: index_text({})}, {})
    yield one(
        "shards-and-single",
        "an index beside a model.safetensors that it does not name",
        index_text(weight_map),
        {"model.safetensors": b"no"},
        reqs=["REQ-SHD-001", "REQ-SHD-007"],
    )
    yield plain(
        "valid/source-4096",
        "a source name of 4,096 bytes",
        ["REQ-GRP-001"],
        [group_of("w", "matrix", "F32", 8, [of_rows(ROWS)], source="é" * 2048)],
        [hand(8)],
        gzip=True,
    )


# ---- Later versions, and encodings that are not canonical ------------------------------------------------------------


def future() -> Iterator[Vector]:
    groups = [group_of("w", "matrix", "F32", 8, [of_rows(ROWS)])]

    def accepted(name: str, note: str, reqs: Sequence[str], **values: Any) -> Vector:
        return plain(f"future/{name}", note, reqs, groups, [hand(8)], PLAIN, lambda draft: draft.metadata.update(values))

    def nested(draft: Draft) -> None:
        draft.metadata |= {"format_version": "1.2", "optional_features": ["rotation", "x-hash"], "x-hash": {"kind": "sha256"}}
        draft.metadata["dictionaries"][0]["x-origin"] = "built"
        draft.metadata["groups"][0] |= {"x-rotation": {"seed": 3}, "x-name": None}

    yield accepted("minor-1", "a later minor version", ["REQ-MET-005"], format_version="1.1")
    yield accepted("minor-9999", "the last minor version", ["REQ-MET-004"], format_version="1.9999")
    yield accepted("optional", "an unknown optional feature", ["REQ-MET-007"], optional_features=["rotation"])
    yield accepted("optional-several", "several", ["REQ-MET-007"], optional_features=["", "a", "a b", "z", "\u00e9"])
    yield accepted(
        "optional-minor", "a later minor version with one", ["REQ-MET-007"], format_version="1.7", optional_features=["x-y"]
    )
    yield accepted("key", "an unknown key with x-", ["REQ-MET-010"], **{"x-new": {"a": [0, 1]}})
    yield accepted("key-minor", "the same in a later minor version", ["REQ-MET-010"], format_version="1.1", **{"x-new": "yes"})
    yield plain("future/keys-everywhere", "all of it", ["REQ-MET-007", "REQ-MET-010"], groups, [hand(8)], PLAIN, nested)

    base = make(groups, [hand(8)], PLAIN)

    def refused(name: str, note: str, reqs: Sequence[str], error: str, change: Callable[[Draft], None]) -> Vector:
        draft = base.copy()
        change(draft)
        return Vector(
            f"future/{name}",
            note,
            reqs,
            {"": draft.render()},
            error=error,
            base="valid/base-8",
            before={"": draft.render(refresh=False)},
        )

    def other(**values: Any) -> Callable[[Draft], None]:
        return lambda draft: draft.metadata.update(values)

    def everything(draft: Draft) -> None:
        draft.metadata = {"format_version": "2.0", "layers": [{"a": 1}]}

    def feature_and_kind(draft: Draft) -> None:
        draft.metadata["required_features"] = ["huffman"]
        draft.metadata["dictionaries"][0]["kind"] = "huffman"

    for version in ("2.0", "0.9", "10.0", "9999.9999", "3.1"):
        yield refused(
            f"major-{version.replace('.', '-')}",
            f"version {version}",
            ["REQ-MET-005"],
            "unsupported_version",
            other(format_version=version),
        )
    yield refused("major-all-new", "version 2.0 with other keys", ["REQ-MET-005"], "unsupported_version", everything)
    yield refused(
        "required", "an unknown required feature", ["REQ-MET-006"], "unsupported_feature", other(required_features=["huffman"])
    )
    yield refused(
        "required-x", "its name begins with x-", ["REQ-MET-006"], "unsupported_feature", other(required_features=["x-a"])
    )
    yield refused("required-empty", "its name is empty", ["REQ-MET-006"], "unsupported_feature", other(required_features=[""]))
    yield refused(
        "required-minor",
        "in a later minor version",
        ["REQ-MET-006"],
        "unsupported_feature",
        other(format_version="1.3", required_features=["a", "b"]),
    )
    def spaced(change: Callable[[Draft], None]) -> Callable[[Draft], None]:
        def both(draft: Draft) -> None:
            change(draft)
            draft.metadata_text = lambda text: text.replace(",", ", ")

        return both

    yield refused(
        "major-not-canonical",
        "version 2.0, the text not in canonical form",
        ["REQ-MET-003", "REQ-MET-005"],
        "unsupported_version",
        spaced(other(format_version="2.0")),
    )
    yield refused(
        "required-not-canonical",
        "a required feature, the text not in canonical form",
        ["REQ-MET-003", "REQ-MET-006"],
        "unsupported_feature",
        spaced(other(required_features=["huffman"])),
    )
    yield refused("required-kind", "with a new kind of dictionary", ["REQ-MET-006"], "unsupported_feature", feature_and_kind)
    yield refused(
        "key-not-extensible",
        "a new key without x- in a later minor version",
        ["REQ-MET-009"],
        "metadata_schema",
        other(format_version="1.1", layers=1),
    )
