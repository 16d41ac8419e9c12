"""Additions that no capture ran, and that are written like a residual connection that was found.

A model may write one connection twice, and choose by an option or by its input: `x = x + checkpoint(f, x)` in one branch, `x = x + f(x)` in
the other. Only the one that ran gets LAuReL.
"""

from __future__ import annotations

import ast
import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType

from laurel_rewrite.detection.site import portable
from laurel_rewrite.detection.sites import Sites
from laurel_rewrite.errors import RewriteError
from laurel_rewrite.text.source_file import Definition, SourceFile
from laurel_rewrite.text.text_edits import CallForm

_ADDS = ("add", "add_", "iadd", "__add__", "__iadd__", "__radd__")
_Position = tuple[int, int | None, int, int | None]


@dataclass(frozen=True)
class _Addition:
    """One addition in a function: the operands, and what becomes of the statement that it stands in ("x =", "return")."""

    node: ast.expr | ast.stmt
    operands: tuple[ast.expr, ast.expr]
    statement: str

    @property
    def position(self) -> _Position:
        return self.node.lineno, self.node.end_lineno, self.node.col_offset, self.node.end_col_offset


def unrun(sites: Sites) -> tuple[str, ...]:
    """A sentence for the user about additions that look like sites and were not run, where a model may come to run them: their branch depends
    on the input, or on whether activations are checkpointed. Branches on other options of the model are its configuration."""
    ran: dict[CodeType, set[_Position]] = defaultdict(set)
    for call in sites.calls:
        for span in call.steps:
            ran[span.code].add((span.line, span.end_line, span.column, span.end_column))
    found: dict[str, None] = {}
    for site in sites:
        _, side, last = sites.bindings[site.id].adds[0]
        if last is None:
            continue
        span = last.steps[-1]
        with contextlib.suppress(RewriteError):  # no plain function of a file
            source = SourceFile.of(span.filename)
            function = source.function(span.code)
            additions = [*_additions(function)]
            here = source.find(function, span)
            skips = {(one.statement, ast.unparse(one.operands[side])) for one in additions if one.node is here}
            for one in additions:
                if one.position not in ran[span.code] and _alike(one, skips) and _may_run(source, function, one):
                    found[portable(f"{span.filename}:{one.node.lineno}")] = None
    if not found:
        return ()
    return (
        f"Additions that were not run are written like connections that were, and keep their plain sum where the model comes to run them: "
        f"{', '.join(found)}. Write one addition for both, or rewrite the model as it will be trained.",
    )


def _additions(function: Definition) -> Iterator[_Addition]:
    stack: list[tuple[ast.AST, str]] = [(function, "")]
    while stack:
        node, statement = stack.pop()
        if isinstance(node, ast.Assign):
            statement = " ".join(map(ast.unparse, node.targets)) + " ="
        elif isinstance(node, ast.AugAssign):
            statement = f"{ast.unparse(node.target)} ="
            if isinstance(node.op, ast.Add):
                yield _Addition(node, (node.target, node.value), statement)
        elif isinstance(node, ast.Return):
            statement = "return"
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            yield _Addition(node, (node.left, node.right), statement)
        elif isinstance(node, ast.Call) and (form := CallForm.of(node)) is not None and form.name in _ADDS:
            yield _Addition(node, (form.left, form.right), statement)
        stack += [(child, statement) for child in ast.iter_child_nodes(node)]


def _alike(one: _Addition, skips: set[tuple[str, str]]) -> bool:
    """Whether an addition adds what is called to the same operand, for the same name."""
    return any(
        (one.statement, ast.unparse(skip)) in skips and any(isinstance(node, ast.Call) for node in ast.walk(branch))
        for skip, branch in (one.operands, one.operands[::-1])
    )


def _may_run(source: SourceFile, function: Definition, one: _Addition) -> bool:
    """Whether something else than the model's configuration keeps an addition from being run."""
    branches = [parent for parent in source.parents(function, one.node) if isinstance(parent, ast.If | ast.IfExp)]
    words = [ast.unparse(branch.test) for branch in branches]
    if any("checkpoint" in word for word in (*words, ast.unparse(one.node))):
        return True
    given = [arg.arg for arg in ast.walk(function.args) if isinstance(arg, ast.arg)]
    made = [node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    read = {node.id for branch in branches for node in ast.walk(branch.test) if isinstance(node, ast.Name)}
    return bool(read & {*given[1:], *made})
