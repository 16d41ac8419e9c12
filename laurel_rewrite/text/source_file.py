"""Positions in a source file: from the span that a capture recorded to the node of the syntax tree, and its bytes."""

from __future__ import annotations

import ast
import linecache
import re
from types import CodeType
from typing import ClassVar

from laurel_rewrite.errors import RewriteError
from laurel_rewrite.graph.capture import Span

Definition = ast.FunctionDef | ast.AsyncFunctionDef
_BLOCKS = (ast.For, ast.AsyncFor, ast.While)


class SourceFile:
    """A source file: its text as UTF-8 bytes (the positions of syntax trees count these) and its functions."""

    _files: ClassVar[dict[str, SourceFile]] = {}

    def __init__(self, filename: str) -> None:
        lines = linecache.getlines(filename)
        if not lines:
            raise RewriteError(f"{filename}: the source is not available, so the class cannot be rewritten")
        self.filename = filename
        text = "".join(lines)
        self.text = text.encode()
        try:
            self.tree = ast.parse(text)  # decoded already, so that a line that names the encoding has no say
        except (SyntaxError, ValueError) as error:
            raise RewriteError(f"{filename}: the source cannot be parsed ({error})") from error
        self.starts = [0]
        for line in lines:  # as the compiler counts them: other line breaks of Unicode end no line
            self.starts.append(self.starts[-1] + len(line.encode()))

    @classmethod
    def of(cls, filename: str) -> SourceFile:
        linecache.checkcache(filename)
        found = cls._files.get(filename)
        if found is None or found.text != "".join(linecache.getlines(filename)).encode():
            cls._files[filename] = found = cls(filename)
        return found

    def function(self, code: CodeType) -> Definition:
        """The definition that a code object was compiled from."""
        for node in ast.walk(self.tree):
            if isinstance(node, Definition) and node.name == code.co_name:
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                if first == code.co_firstlineno:
                    return node
        raise RewriteError(
            f"{self.filename}:{code.co_firstlineno}: {code.co_name} is no plain function, or the file has changed since it was imported"
        )

    def class_of(self, function: Definition) -> str | None:
        """Name of the class whose body a function stands in, which private names in it are mangled with; None outside of classes."""
        holders = [node for node in ast.walk(self.tree) if isinstance(node, ast.ClassDef) and any(n is function for n in ast.walk(node))]
        return max(holders, key=lambda node: node.lineno).name if holders else None

    def find(self, function: Definition, span: Span) -> ast.AST:
        """The expression or statement at a span."""
        for node in ast.walk(function):
            if isinstance(node, ast.BinOp | ast.AugAssign | ast.Call):
                found = (node.lineno, node.end_lineno, node.col_offset, node.end_col_offset)
                if found == (span.line, span.end_line, span.column, span.end_column):
                    return node
        for node in ast.walk(function):  # a method call broken over lines is recorded from its attribute on
            if isinstance(node, ast.Call) and (node.end_lineno, node.end_col_offset) == (span.end_line, span.end_column):
                return node
        raise RewriteError(f"{place(span)}: no addition was found at this place in the source")

    def parents(self, function: Definition, node: ast.AST) -> list[ast.AST]:
        """What stands around a node inside a function, innermost first."""
        above = {id(child): parent for parent in ast.walk(function) for child in ast.iter_child_nodes(parent)}
        found: list[ast.AST] = []
        while node is not function and id(node) in above:
            node = above[id(node)]
            found.append(node)
        return [parent for parent in found if parent is not function]

    def loop(self, function: Definition, node: ast.AST) -> tuple[ast.For | ast.AsyncFor | ast.While | None, bool]:
        """The innermost loop around a node, and whether a turn of it may pass the node by."""
        between: list[ast.AST] = [node]
        for parent in self.parents(function, node):
            if isinstance(parent, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                return None, False
            if isinstance(parent, _BLOCKS):
                return parent, _may_be_skipped(parent, between)
            between.append(parent)
        return None, False

    def line_start(self, line: int) -> int:
        return self.starts[line - 1]

    def extent(self, node: ast.expr | ast.stmt | ast.arg) -> tuple[int, int]:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset

    def segment(self, node: ast.expr) -> str:
        start, end = self.extent(node)
        return self.text[start:end].decode()

    def find_operator(self, start: int, end: int, operator: bytes) -> int:
        """Position of an operator between two operands; comments are skipped."""
        blanked = re.sub(rb"#[^\n]*", lambda m: b" " * len(m.group()), self.text[start:end])
        return start + blanked.index(operator)


def _may_be_skipped(loop: ast.For | ast.AsyncFor | ast.While, between: list[ast.AST]) -> bool:
    """Whether a branch, or a way out of the turn that stands before, decides if the last of `between` is reached."""
    if any(isinstance(node, ast.If | ast.Try | ast.TryStar | ast.Match | ast.IfExp | ast.BoolOp) for node in between):
        return True
    statement = next((node for node in reversed(between) if node in loop.body), None)
    before = loop.body[: loop.body.index(statement)] if isinstance(statement, ast.stmt) else []
    return any(isinstance(node, ast.Continue | ast.Break) for earlier in before for node in ast.walk(earlier))


def place(span: Span) -> str:
    return f"{span.filename}:{span.line}"
