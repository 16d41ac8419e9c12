"""Positions in a source file: from the span that a capture recorded to the node of the syntax tree, and its bytes."""

from __future__ import annotations

import ast
import linecache
import re
from types import CodeType
from typing import ClassVar

from laurel_rewrite.capture import Span
from laurel_rewrite.errors import RewriteError


class SourceFile:
    """A source file: its text as bytes (the positions of syntax trees count bytes) and its functions."""

    _files: ClassVar[dict[str, SourceFile]] = {}

    def __init__(self, filename: str) -> None:
        lines = linecache.getlines(filename)
        if not lines:
            raise RewriteError(f"{filename}: the source is not available, so the class cannot be rewritten")
        self.filename = filename
        self.text = "".join(lines).encode()
        self.tree = ast.parse(self.text)
        self.starts = [0]
        for line in lines:
            self.starts.append(self.starts[-1] + len(line.encode()))

    @classmethod
    def of(cls, filename: str) -> SourceFile:
        linecache.checkcache(filename)
        found = cls._files.get(filename)
        if found is None or found.text != "".join(linecache.getlines(filename)).encode():
            cls._files[filename] = found = cls(filename)
        return found

    def function(self, code: CodeType) -> ast.FunctionDef:
        """The definition that a code object was compiled from."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                if first == code.co_firstlineno:
                    return node
        raise RewriteError(
            f"{self.filename}:{code.co_firstlineno}: {code.co_name} is no plain function, or the file has changed since it was imported"
        )

    def find(self, function: ast.FunctionDef, span: Span) -> ast.AST:
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

    def parent(self, function: ast.FunctionDef, child: ast.AST) -> ast.AST | None:
        return next((n for n in ast.walk(function) if any(c is child for c in ast.iter_child_nodes(n))), None)

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


def place(span: Span) -> str:
    return f"{span.filename}:{span.line}"
