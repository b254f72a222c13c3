"""Which source tensors form a group, by their names, and what the groups are called (spec §6.1, §6.2)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from qmoecodec.container.metadata import FLOAT_DTYPES, MAX_NAME, is_reserved
from qmoecodec.types import MAX_DIM

#: Roles of a group's tensors (spec §6.2).
ROLES: Final = ("codes", "code_offsets", "row_lengths", "levels", "dictionary_index", "checksums")

# `...experts.expert_3.wi.weight` and `...experts.3.w1.weight`; a number with leading zeros would not come back.
_EXPERT = re.compile(r"((?:.*\.)?experts\.(?:expert_)?)(0|[1-9][0-9]{0,9})((?:\..+)?)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Candidate:
    """Source tensors that form a group if they are ternary.

    source : template for "stacked", else the tensor's name
    members : (number, tensor name), ascending by number; one member with number 0 unless stacked
    shape : of each member
    """

    layout: str
    source: str
    members: tuple[tuple[int, str], ...]
    dtype: str
    shape: tuple[int, ...]


def role_name(group: str, role: str) -> str:
    """Return the name of a role tensor."""
    return f"{group}_{role}"


def split_expert_name(name: str) -> tuple[str, int] | None:
    """Return template and number of an expert's tensor, None for any other.

    >>> split_expert_name("mlp.experts.expert_3.wi.weight")
    ('mlp.experts.expert_{}.wi.weight', 3)
    >>> split_expert_name("mlp.experts.03.w1.weight") is None
    True
    """
    match = _EXPERT.fullmatch(name)
    if match is None or int(match[2]) >= 1 << 32 or "{}" in name:
        return None
    return f"{match[1]}{{}}{match[3]}", int(match[2])


def reason_not_a_candidate(name: str, dtype: str, shape: tuple[int, ...]) -> str | None:
    """Say why a tensor cannot be ternary whatever it holds, None where it can."""
    if dtype not in FLOAT_DTYPES:
        return f"dtype {dtype}"
    if len(shape) not in (2, 3):
        return f"rank {len(shape)}"
    if 0 in shape:
        return "no elements"
    if max(shape) > MAX_DIM:
        return "dimension out of range"
    if len(name.encode()) > MAX_NAME - 32:  # leaves room for a number that makes it unique
        return "name too long"
    return None


def find_candidates(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[list[Candidate], dict[str, str]]:
    """Sort tensors (name -> dtype, shape) into candidates, by source, and the others with the reason."""
    stacks: dict[tuple[str, str, tuple[int, ...]], list[tuple[int, str]]] = {}
    candidates: list[Candidate] = []
    others: dict[str, str] = {}
    for name, (dtype, shape) in tensors.items():
        reason = reason_not_a_candidate(name, dtype, shape)
        if reason is not None:
            others[name] = reason
            continue
        expert = split_expert_name(name) if len(shape) == 2 else None
        if expert is not None:
            stacks.setdefault((expert[0], dtype, shape), []).append((expert[1], name))
        else:
            layout = "fused" if len(shape) == 3 else "matrix"
            candidates.append(Candidate(layout, name, ((0, name),), dtype, shape))
    for (template, dtype, shape), members in stacks.items():
        candidates.append(Candidate("stacked", template, tuple(sorted(members)), dtype, shape))
    return sorted(candidates, key=lambda c: (c.source, c.layout, c.dtype, c.shape)), others


def short_name(candidate: Candidate) -> str:
    """Return the name a group gets unless it is taken.

    >>> short_name(Candidate("stacked", "mlp.experts.expert_{}.wi.weight", (), "BF16", (4, 4)))
    'mlp.experts.wi'
    >>> short_name(Candidate("matrix", "lm_head.weight", (), "BF16", (4, 4)))
    'lm_head'
    """
    name = candidate.source
    if candidate.layout == "stacked":
        head, tail = name.split("{}")
        name = head.removesuffix("expert_").removesuffix(".") + tail
    return name.removesuffix(".weight") or candidate.source


def name_groups(candidates: Iterable[Candidate], taken: Collection[str]) -> list[str]:
    """Name each group, in the order given: short name, else source, else short name and a number.

    taken : names of all source tensors; no role tensor may have one of them, whether or not it passes through
    """
    names: list[str] = []
    used: set[str] = set()
    for candidate in candidates:
        short = short_name(candidate)
        choices = [short, candidate.source]
        number = 1
        while True:
            if not choices:
                number += 1
                choices = [f"{short}_{number}"]
            name = choices.pop(0)
            if (
                name
                and name not in used
                and len(name.encode()) <= MAX_NAME
                and not is_reserved(name)
                and not any(role_name(name, role) in taken for role in ROLES)
            ):
                break
        used.add(name)
        names.append(name)
    return names
