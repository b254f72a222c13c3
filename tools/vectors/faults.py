"""Ways to break a valid file, with the checksums made to fit again."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vectors.codebook import Codebook
from vectors.draft import Draft, Tensor, crc_text
from vectors.parts import (
    Vector,
    bases,
)

Fault = Callable[[Draft], None]
Case = tuple[str, str, str, Fault]  # id, reason, requirements, fault


class Bases:
    """The drafts that are broken."""

    def __init__(self) -> None:
        self.drafts = {vector.id.removeprefix("valid/base-"): vector.draft for vector in bases()}

    def __getitem__(self, name: str) -> Draft:
        draft = self.drafts[name]
        assert draft is not None
        return draft.copy()


BASES = Bases()


def broken(base: str, cases: Sequence[Case]) -> Iterator[Vector]:
    """Yield a vector per case; its note is its id in words."""
    for name, reason, reqs, fault in cases:
        draft = BASES[base]
        fault(draft)
        yield Vector(
            f"invalid/{name}",
            name.replace("-", " "),
            [f"REQ-{req}" for req in reqs.split()],
            {"": draft.render()},
            error=reason,
            base=f"valid/base-{base}",
            before={"": draft.render(refresh=False)},
        )


# ---- Ways to break a file --------------------------------------------------------------------------------------------


def setting(**values: Any) -> Fault:
    """Set attributes of the draft: functions that change the text on its way."""

    def fault(draft: Draft) -> None:
        for key, value in values.items():
            setattr(draft, key, value)

    return fault


def whole(change: Callable[[bytes], bytes]) -> Fault:
    return setting(whole=change)


def cut(at: int) -> Fault:
    return whole(lambda file: file[:at])


def text(old: str, new: str) -> Fault:
    """Replace the first occurrence in the header."""

    def change(header: str) -> str:
        assert old in header, old
        return header.replace(old, new, 1)

    return setting(header_text=change)


def entry(name: str, **values: Any) -> Fault:
    """Change values of a tensor's entry in the header; None removes one."""

    def change(header: dict[str, Any]) -> dict[str, Any]:
        assert name in header
        changed = {key: value for key, value in (header[name] | values).items() if value is not None}
        return {**header, name: changed}

    return setting(header=change)


def keep(kind: str, fault: Fault) -> Fault:
    def both(draft: Draft) -> None:
        draft.keep.add(kind)
        fault(draft)

    return both


def meta(path: str, value: Any) -> Fault:
    """Set a value of the metadata, at a path such as groups.0.name; `...` removes it."""

    def fault(draft: Draft) -> None:
        place: Any = draft.metadata
        *folders, last = [int(part) if part.isdigit() else part for part in path.split("/")]
        for folder in folders:
            place = place[folder]
        if value is ...:
            del place[last]
        else:
            place[last] = value

    return fault


def meta_text(old: str, new: str) -> Fault:
    def change(text: str) -> str:
        assert old in text, old
        return text.replace(old, new, 1)

    return setting(metadata_text=change)


def put(name: str, at: int, data: bytes) -> Fault:
    """Overwrite bytes of a tensor."""

    def fault(draft: Draft) -> None:
        tensor = draft.tensors[name]
        at_end = at if at >= 0 else len(tensor.data) + at
        assert tensor.data[at_end : at_end + len(data)] != data and at_end + len(data) <= len(tensor.data)
        tensor.data = tensor.data[:at_end] + data + tensor.data[at_end + len(data) :]

    return fault


def replaced(name: str, dtype: str, shape: list[int], data: bytes | None = None) -> Fault:
    def fault(draft: Draft) -> None:
        draft.tensors[name] = Tensor(dtype, shape, draft.tensors[name].data if data is None else data)

    return fault


def removed(name: str) -> Fault:
    return lambda draft: draft.tensors.__delitem__(name)


def renamed(old: str, new: str) -> Fault:
    def fault(draft: Draft) -> None:
        draft.tensors = {new if name == old else name: tensor for name, tensor in draft.tensors.items()}

    return fault


def added(name: str, tensor: Tensor, *, passthrough: bool = False) -> Fault:
    def fault(draft: Draft) -> None:
        draft.tensors[name] = tensor
        if passthrough:
            draft.metadata["passthrough"][name] = crc_text(tensor.data)

    return fault


def many(*faults: Fault) -> Fault:
    def all_of_them(draft: Draft) -> None:
        for fault in faults:
            fault(draft)

    return all_of_them


def words_of(draft: Draft, name: str, book: Codebook) -> list[list[int]]:
    """Return the codewords of the rows of a group with one expert."""
    group = next(group for group in draft.metadata["groups"] if group["name"] == name)
    data, rows, at = draft.tensors[f"{name}_codes"].data, [], 0
    for length in draft.tensors[f"{name}_row_lengths"].data:
        m = length + group["row_length_base"]
        n = -(-m * book.bits // 8)
        value = int.from_bytes(data[at : at + n], "little")
        rows.append([value >> book.bits * k & 2**book.bits - 1 for k in range(m)])
        at += n
    return rows


def recode(change: Callable[[list[list[int]]], Any], book: Codebook, name: str = "w") -> Fault:
    """Change the codewords of the rows and write them again."""

    def fault(draft: Draft) -> None:
        rows = words_of(draft, name, book)
        change(rows)
        base = min(map(len, rows))
        codes = b"".join(map(book.pack, rows))
        draft.tensors[f"{name}_codes"] = Tensor("U8", [len(codes)], codes)
        draft.tensors[f"{name}_row_lengths"].data = bytes(len(row) - base for row in rows)
        draft.tensors[f"{name}_code_offsets"].data = struct.pack("<2Q", 0, len(codes))
        next(group for group in draft.metadata["groups"] if group["name"] == name)["row_length_base"] = base

    return fault


def word(row: int, k: int, value: int, book: Codebook) -> Fault:
    def change(rows: list[list[int]]) -> None:
        assert rows[row][k] != value
        rows[row][k] = value

    return recode(change, book)


def bank(index: int, book: Codebook) -> Fault:
    """Put another dictionary into its place, tensor and entry."""

    def fault(draft: Draft) -> None:
        draft.tensors[f"qmoecodec.dictionary.{index}"] = Tensor("U8", [len(book.data)], book.data)
        draft.metadata["dictionaries"][index] |= {"kind": book.kind, "code_bits": book.bits, "threshold": book.threshold}

    return fault


def dictionary(data: bytes, threshold: int | None = None) -> Fault:
    def fault(draft: Draft) -> None:
        draft.tensors["qmoecodec.dictionary.0"] = Tensor("U8", [len(data)], data)
        if threshold is not None:
            draft.metadata["dictionaries"][0]["threshold"] = threshold

    return fault


def header_length(value: int) -> Fault:
    return whole(lambda file: struct.pack("<Q", value) + file[8:])
