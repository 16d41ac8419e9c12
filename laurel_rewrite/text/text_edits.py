"""Edits of one function's text, each a position and what is put there, made all at once at the end; and what calls that add look like."""

from __future__ import annotations

import ast
import math
from dataclasses import dataclass

from laurel_rewrite.text.source_file import Definition, SourceFile

_TORCH_NAMES = ("input", "other")  # of torch.add's operands
_FOLDS = ("sum", "reduce", "accumulate", "map")  # add what is in a collection


class TextEdits:
    """Edits of the text of a definition; positions are those of the file."""

    def __init__(self, source: SourceFile, node: Definition) -> None:
        self.source = source
        self.node = node
        self._edits: list[tuple[int, int, int, int, str]] = []  # start, order, extent, end, text

    def wrap(self, node: ast.expr, before: str, after: str) -> None:
        """Text on both sides of an expression."""
        start, end = self.source.extent(node)
        self.open(start, end, before)
        self.close(start, end, after)

    def open(self, start: int, end: int, text: str) -> None:
        """Text in front of what begins at a place and ends at another."""
        self._edits.append((start, 1, start - end, start, text))  # of two that open at one place the longer is the outer one

    def close(self, start: int, end: int, text: str) -> None:
        """Text behind what begins at a place and ends at another."""
        self._edits.append((end, 0, end - start, end, text))  # of two that close at one place the shorter is the inner one

    def insert(self, at: int, text: str) -> None:
        """Text at a place."""
        self._edits.append((at, 0, 0, at, text))

    def put(self, start: int, end: int, text: str) -> None:
        """Text in the place of another."""
        self._edits.append((start, 2, 0, end, text))

    def before(self, statement: ast.stmt, text: str, *, compound: bool = False) -> None:
        """A statement in front of another: on a line of its own, or on the same line where the block stands on its head's line."""
        start = self.source.line_start(statement.lineno)
        at = start + statement.col_offset
        decorators = getattr(statement, "decorator_list", [])
        if decorators:
            start = self.source.line_start(decorators[0].lineno)
            at = start + decorators[0].col_offset - 1
        indent = self.source.text[start:at]
        if indent.strip():
            lead = indent[: len(indent) - len(indent.lstrip())].decode()
            self.insert(at, f"\n{lead}    {text}\n{lead}    " if compound else f"{text}; ")
        else:
            self.insert(start, f"{indent.decode()}{text}\n")

    def comma(self, plus: int, after: str) -> None:
        """A comma for the plus, at the end of what precedes it, without moving a line break or a comment."""
        text = self.source.text
        start, end = plus, plus + 1
        while start > 0 and text[start - 1 : start].isspace():
            start -= 1
        while text[end : end + 1] == b" ":
            end += 1
        blank = text[start:plus]
        line = text[text.rfind(b"\n", 0, start) + 1 : start]
        if text[start - 1 : start] == b"\\" or (b"\n" in blank and b"#" in line):  # nothing may follow there
            self.put(plus, end, ", " + after)
        elif b"\n" in blank:
            self.put(start, end, "," + blank.decode() + after)
        else:
            follows = text[end : end + 1] in (b"\n", b"\\")
            self.put(start, end, "," + ("" if follows else " ") + after)

    def edited(self, start: int, end: int) -> str:
        """The text between two places with all edits made."""
        pieces: list[bytes] = []
        at = start
        for begin, _, _, stop, text in sorted(self._edits):
            pieces += [self.source.text[at:begin], text.encode()]
            at = max(at, stop)
        return b"".join([*pieces, self.source.text[at:end]]).decode()


@dataclass(frozen=True)
class CallForm:
    """A call that adds: the operands in their order, those that are given by keyword, and the factor of the second."""

    name: str
    left: ast.expr
    right: ast.expr
    method: bool
    named: tuple[ast.keyword, ...] = ()
    alpha: ast.keyword | None = None

    @staticmethod
    def of(node: ast.Call) -> CallForm | None:
        """None where the operands cannot be told from the text."""
        keywords = {keyword.arg: keyword for keyword in node.keywords}
        alpha = keywords.pop("alpha", None)
        named = tuple(keywords.values())
        if (
            last_name(node.func) in _FOLDS
            or any(isinstance(argument, ast.Starred) for argument in node.args)
            or [k.arg for k in named] not in ([], ["other"], [*_TORCH_NAMES])
        ):
            return None
        given = [*node.args, *(keyword.value for keyword in named)]
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if len(given) == 2:
            return CallForm(name, given[0], given[1], False, named, alpha)
        if len(given) == 1 and isinstance(node.func, ast.Attribute):
            return CallForm(name, node.func.value, given[0], True, named, alpha)
        return None


def last_name(node: ast.expr) -> str:
    """`c` of the decorators a.b.c and a.b.c(...)."""
    if isinstance(node, ast.Call):
        return last_name(node.func)
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def is_exact(node: ast.expr) -> bool:
    """A constant factor whose product is not rounded: a power of two."""
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError):
        return False
    return isinstance(value, int | float) and math.frexp(abs(value))[0] == 0.5
