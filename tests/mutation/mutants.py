"""The mutants of the decoder and the validator: which functions are changed, by which operators of cosmic-ray."""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cosmic_ray.plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.ast.ast_query import ASTQuery
from cosmic_ray.mutating import mutate_code

#: File -> functions and constants of it that only an encoder or a writer runs, which stay as they are.
SCOPE: dict[str, tuple[str, ...]] = {
    "qmoecodec/container/json_text.py": (),
    "qmoecodec/container/header.py": (),
    "qmoecodec/container/metadata.py": (),
    "qmoecodec/container/naming.py": (),
    "qmoecodec/container/ternary.py": (),
    "qmoecodec/container/shards.py": (),
    "qmoecodec/container/files.py": (),
    "qmoecodec/container/source.py": (),
    "qmoecodec/container/reader.py": (),
    "qmoecodec/container/packed.py": (),
    "qmoecodec/container/verify.py": (),
    "qmoecodec/container/unpack.py": (),
    "qmoecodec/codec/rows.py": ("encode_rows",),
    "qmoecodec/codec/stack.py": ("_bank", "encode"),
    "qmoecodec/dictionary/serial.py": ("pack_two_bits", "table_from_phrases", "aivf_from_symbols"),
    "qmoecodec/_kernels/decode.py": (),
    "qmoecodec/_kernels/memory.py": (),
    "qmoecodec/_kernels/tables.py": ("_build_trie", "trie", "encode_tables", "STEP_COUNT_SHIFT", "STEP_FIRST_SHIFT",
                                     "STEP_SECOND_SHIFT"),
    "qmoecodec/_kernels/ternary.py": ("split_rows",),
    "qmoecodec/errors.py": (),
    "qmoecodec/types.py": (),
    "qmoecodec/reference.py": ("encode_row", "_encode_aivf", "_encode_table", "pack_row"),
}  # fmt: skip

#: Arithmetic: each operator becomes one other. Comparisons: the opposite, and the two others that a test which tells these
#: apart tells from all (Kaminski, Ammann, Offutt 2011). Of the rest all there is.
_BINARY = ("Add_Sub", "Sub_Add", "Mul_FloorDiv", "Div_Mul", "FloorDiv_Mul", "Mod_FloorDiv", "Pow_Mul",
           "RShift_LShift", "LShift_RShift", "BitOr_BitAnd", "BitAnd_BitOr", "BitXor_BitOr")  # fmt: skip
_COMPARISON = ("Eq_NotEq", "Eq_LtE", "Eq_GtE", "NotEq_Eq", "NotEq_Lt", "NotEq_Gt", "Lt_GtE", "Lt_LtE", "Lt_NotEq",
               "LtE_Gt", "LtE_Lt", "LtE_Eq", "Gt_LtE", "Gt_GtE", "Gt_NotEq", "GtE_Lt", "GtE_Gt", "GtE_Eq", "Is_IsNot",
               "IsNot_Is")  # fmt: skip
OPERATORS = re.compile(
    rf"ReplaceBinaryOperator_(?:{'|'.join(_BINARY)})|ReplaceComparisonOperator_(?:{'|'.join(_COMPARISON)})"
    r"|ReplaceUnaryOperator_Delete_(?:Not|USub|Invert)|NumberReplacer|AddNot|ZeroIterationForLoop|RemoveDecorator"
    r"|ExceptionReplacer|ReplaceTrueWithFalse|ReplaceFalseWithTrue|ReplaceAndWithOr|ReplaceOrWithAnd"
    r"|ReplaceBreakWithContinue|ReplaceContinueWithBreak"
)


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change of one file.

    name : "function: lines before -> lines after", by which lists name it; a number follows where that is not unique
    """

    path: str
    name: str
    operator: str
    code: str

    @property
    def key(self) -> str:
        """What names the mutant among all."""
        return f"{self.path}::{self.name}"


class _WithoutAnnotations(ast.NodeTransformer):
    """Take away what is never evaluated: annotations and docstrings."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(0)
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)


def _meaning(code: str) -> str | None:
    """Return what two texts have in common if they do the same word by word, None for what is no Python."""
    try:
        return ast.dump(_WithoutAnnotations().visit(ast.parse(code)))
    except SyntaxError:
        return None


def _skipped_lines(code: str, names: tuple[str, ...]) -> set[int]:
    lines: set[int] = set()
    found = set()
    for node in ast.parse(code).body:
        name = getattr(node, "name", None)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        if name in names:
            found.add(name)
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            lines.update(range(first, (node.end_lineno or node.lineno) + 1))
    if found != set(names):
        raise ValueError(f"SCOPE names {sorted(set(names) - found)}, which are not there")
    return lines


def mutants_of(path: str, root: Path) -> Iterator[Mutant]:
    """Yield the mutants of a file: each other than the original and than all before it."""
    code = (root / path).read_text()
    skipped = _skipped_lines(code, SCOPE[path])
    seen = {_meaning(code), None}
    names: dict[str, int] = {}
    tree = get_ast(code)
    for operator_name in sorted(cosmic_ray.plugins.operator_names()):
        short = operator_name.removeprefix("core/")
        if OPERATORS.fullmatch(short) is None:
            continue
        operator = cosmic_ray.plugins.get_operator(operator_name)()
        positions = [(node, begin) for node in ast_nodes(tree) for begin, _ in operator.mutation_positions(node)]
        for occurrence, (node, begin) in enumerate(positions):
            if begin[0] in skipped:
                continue
            mutated = mutate_code(code, operator, occurrence)
            if mutated is None:
                continue
            meaning = _meaning(mutated)
            if meaning in seen:
                continue
            seen.add(meaning)
            name = f"{ASTQuery(node).get_definition_name() or 'module'}: {_change(code, mutated)}"
            names[name] = names.get(name, 0) + 1
            yield Mutant(path, name if names[name] == 1 else f"{name} ({names[name]})", short, mutated)


def _change(before: str, after: str) -> str:
    """Return the lines that differ, "old -> new"."""
    old, new = before.splitlines(), after.splitlines()
    parts: tuple[list[str], list[str]] = ([], [])
    for tag, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag != "equal":
            parts[0].extend(line.strip() for line in old[a:b])
            parts[1].extend(line.strip() for line in new[c:d])
    return f"{' / '.join(parts[0])} -> {' / '.join(parts[1]) or '(nothing)'}"
