"""`x + f` becomes `self.laurel_0(x, f)` in a class's own source: text edits at exact positions, nothing else touched.

The capture says which operation of which code object every add is, down to the column. Here that place is found in the syntax tree,
and the class gets a subclass of the same name whose method has that one expression replaced; comments and layout stay. The
same text is what runs and what is saved, so that a person can read and diff it.
"""

from __future__ import annotations
import __future__

import ast
import linecache
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from types import CodeType, FunctionType
from typing import Any

from laurel_rewrite.capture import Call, Span
from laurel_rewrite.errors import RewriteError
from laurel_rewrite.source_file import SourceFile, place

_BRANCH = "branch"

BASE = "_laurel_base"
"""Attribute of a rewritten class: the class it was made from."""


@dataclass(frozen=True)
class Change:
    """One LAuReL module's place in a class: its attribute, and the adds from the skip outwards with the skip's side.

    Attributes:
        name: attribute of the owner, such as "laurel_0".
        adds: (steps, side) of each binary add; the first holds the skip itself.
        loop: the line runs several times in one call, and the attribute is a list with one module a turn.
    """

    name: str
    adds: tuple[tuple[tuple[Span, ...], int], ...]
    loop: bool = False


@dataclass
class Function:
    """The rewritten text of one function, and what it needs to run: the original, and names beyond the original's globals."""

    original: FunctionType
    name: str
    text: str
    needs: dict[str, Any] = field(default_factory=dict)


@dataclass
class Rewritten:
    """A subclass of `base` with some methods replaced, and the helper functions they call."""

    base: type
    cls: type
    methods: list[Function]
    helpers: list[Function]


def rewrite_class(base: type, changes: Iterable[Change], calls: Iterable[Call]) -> Rewritten:
    """Make the subclass of `base` in which the changes are made.

    Args:
        base: class of the owner.
        changes: what to replace.
        calls: all adds recorded for the owner, sites or not; they tell whether a helper is reached by more than one way.

    Raises:
        RewriteError: an add stands where its text cannot be replaced; the message says why.
    """
    return _ClassEditor(base, tuple(changes), tuple(calls)).rewrite()


class _ClassEditor:
    def __init__(self, base: type, changes: tuple[Change, ...], calls: tuple[Call, ...]) -> None:
        self.base = base
        self.changes = changes
        self.ways: dict[Span, set[tuple[Span, ...]]] = {}
        for call in calls:
            self.ways.setdefault(call.steps[-1], set()).add(call.steps)
        self.editors: dict[tuple[CodeType, str, bool], _FunctionEditor] = {}
        self.alias = f"_{base.__name__}"

    def rewrite(self) -> Rewritten:
        for change in self.changes:
            for position, (steps, side) in enumerate(change.adds):
                self._apply(change, steps, side, inner=position == 0)
        methods: list[Function] = []
        helpers: list[Function] = []
        for editor in self.editors.values():
            function = editor.finish(self.base, self.alias)
            (methods if editor.is_method else helpers).append(function)
        live: dict[str, FunctionType] = {}
        for helper in reversed(helpers):  # a helper's helper was found after it
            live[helper.name] = _compile(helper, {**helper.needs, **live})
        for function in methods:
            function.needs |= {name: value for name, value in live.items() if re.search(rf"\b{name}\b", function.text)}
        namespace: dict[str, Any] = {function.name: _compile(function, function.needs) for function in methods}
        namespace |= {"__module__": self.base.__module__, "__qualname__": self.base.__qualname__, "__doc__": self.base.__doc__}
        namespace[BASE] = self.base
        namespace |= without_fast_path(self.base)
        return Rewritten(self.base, type(self.base)(self.base.__name__, (self.base,), namespace), methods, list(reversed(helpers)))

    def _apply(self, change: Change, steps: tuple[Span, ...], side: int, *, inner: bool) -> None:
        last = steps[-1]
        if len(steps) > 1 and len(self.ways.get(last, ())) == 1 and _method_of(self.base, last.code) is not None and not change.loop:
            steps = steps[-1:]  # reached in one way: no need to pass the module down
        if change.loop and (len(steps) > 1 or len(change.adds) > 1):
            raise RewriteError(f"{place(last)}: a sum in a loop must stand in one expression of the looping method itself")
        entry = self._editor(steps[0].code)
        owner = steps[0].code.co_varnames[0]
        laurel = f"{owner}.{change.name}"
        if change.loop:
            entry.iterate(change.name, owner)
            laurel = f"next({change.name})"
        for step, callee in pairwise(steps):
            helper = self._editor(callee.code, helper=True)
            entry.pass_down(step, laurel, helper)
            entry, laurel = helper, "laurel"
        entry.replace(last, laurel, side, inner=inner)

    def _editor(self, code: CodeType, *, helper: bool = False) -> _FunctionEditor:
        key = (code, code.co_filename, helper)
        if key not in self.editors:
            method = _method_of(self.base, code)
            if method is None and not helper:
                raise RewriteError(f"{code.co_filename}:{code.co_firstlineno}: {code.co_name} is no method of {self.base.__qualname__}")
            self.editors[key] = _FunctionEditor(code, method, helper=helper)
        return self.editors[key]


class _FunctionEditor:
    """Edits of one function's text, each a position and what is put there, sorted at the end."""

    def __init__(self, code: CodeType, method: FunctionType | None, *, helper: bool) -> None:
        self.code = code
        self.is_method = method is not None
        self.original = method
        self.source = SourceFile.of(code.co_filename)
        self.node = self.source.function(code)
        self.helper = helper
        self.holds: Span | None = None
        self.name = f"{code.co_name}_laurel" if helper else code.co_name
        self.edits: list[tuple[int, int, int, int, str]] = []  # start, order, extent, end, text
        self.loops: set[str] = set()
        self.taken: dict[Span, str] = {}
        self.done: set[Span] = set()
        if helper:
            self._take_parameter()

    # What can be done to a function

    def replace(self, span: Span, laurel: str, side: int, *, inner: bool) -> None:
        """Put the LAuReL module in the place of the add (`inner`), or weight the branch that a further add brings."""
        if not self._take(span, laurel):
            return
        if self.helper and inner:
            if self.holds is not None:
                raise RewriteError(f"{place(span)}: the helper {self.code.co_name} holds more than one site")
            self.holds = span
        node = self.source.find(self.node, span)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            self._binary(node, laurel, side, inner)
        elif isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add):
            self._augmented(node, laurel, side, inner)
        elif isinstance(node, ast.Call):
            self._call(node, laurel, side, inner, span)
        else:
            raise RewriteError(f"{place(span)}: no addition was found at this place in the source")

    def iterate(self, name: str, owner: str) -> None:
        """Begin the function with an iterator over the turns' modules: local to the call, so a second run starts anew."""
        if name in self.loops:
            return
        self.loops.add(name)
        body = self.node.body
        first = body[1] if _is_docstring(body[0]) and len(body) > 1 else body[0]
        start = self.source.line_start(first.lineno)
        indent = " " * first.col_offset
        self._insert(start, f"{indent}{name} = iter({owner}.{name})\n")

    def pass_down(self, span: Span, laurel: str, helper: _FunctionEditor) -> None:
        """Call the rewritten helper in the place of the original, with the LAuReL module as its first argument."""
        node = self.source.find(self.node, span)
        func = node.func if isinstance(node, ast.Call) else None
        if isinstance(func, ast.Name) and not helper.is_method:
            helper.original = self._global(func.id, helper.code)
            start, end = self.source.extent(func)
        elif isinstance(func, ast.Attribute) and helper.is_method:
            end = self.source.extent(func)[1]
            start = end - len(func.attr.encode())
        else:
            raise RewriteError(f"{place(span)}: the helper {helper.code.co_name} is called in a way that cannot be rewritten")
        if self._take(span, laurel):
            assert isinstance(node, ast.Call)
            self._put(start, end, helper.name)
            paren = self.source.text.index(b"(", end) + 1
            broken = self.source.text[paren : paren + 1] == b"\n"
            self._insert(paren, laurel + ("," if broken else ", ") if node.args or node.keywords else laurel)

    def finish(self, base: type, alias: str) -> Function:
        """The edited text, dedented, with what it needs."""
        if self.original is None:
            raise RewriteError(f"{self.code.co_filename}:{self.code.co_firstlineno}: {self.code.co_name} cannot be found by name")
        needs: dict[str, Any] = {}
        defining = next((c for c in base.__mro__ if any(_unwrap(v, self.code) for v in vars(c).values())), base)
        for node in ast.walk(self.node):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super" and not node.args:
                this = self.code.co_varnames[0]
                name = alias if defining is base else f"_{defining.__name__}"
                start = self.source.extent(node)[1] - 1
                self._insert(start, f"{name}, {this}")
                needs[name] = defining
            elif isinstance(node, ast.Name) and node.id == "__class__":
                raise RewriteError(f"{self.code.co_filename}:{node.lineno}: uses __class__")
        free = dict(zip(self.code.co_freevars, self.original.__closure__ or (), strict=False))
        needs |= {name: cell.cell_contents for name, cell in free.items() if name != "__class__"}
        lines = [d.lineno for d in self._drop_idle_decorators(defining)] + [self.node.lineno]
        start = self.source.line_start(min(lines))
        end = self.source.extent(self.node)[1]
        text = self._edited(start, end)
        return Function(self.original, self.name, _dedent(text, self.node.col_offset), needs)

    def _take(self, span: Span, laurel: str) -> bool:
        """Whether an expression is still to be edited; one expression cannot serve two sites."""
        if self.taken.setdefault(span, laurel) != laurel:
            raise RewriteError(f"{place(span)}: one expression serves two sites here")
        done = span in self.done
        self.done.add(span)
        return not done

    def _drop_idle_decorators(self, defining: type) -> list[ast.expr]:
        """Leave out decorators that gave the function itself back (documentation, registration), and return the others.

        They have done their work on the original, and some look at the file that the function stands in.
        """
        decorators = self.node.decorator_list
        wrappers: set[str] = set()
        candidate = vars(defining).get(self.code.co_name) if self.is_method else None
        while isinstance(candidate, FunctionType) and candidate.__code__ is not self.code:
            wrappers.add(candidate.__code__.co_qualname.partition(".")[0])
            candidate = getattr(candidate, "__wrapped__", None)
        wrappers -= {c.__name__ for c in defining.__mro__}  # put there by a base class
        names = {id(d): _last_name(d) for d in decorators}
        if not decorators or not self.is_method or wrappers - set(names.values()):
            return decorators
        kept = [d for d in decorators if names[id(d)] in wrappers]
        first = min((d.lineno for d in kept), default=self.node.lineno)
        following = [*[d.lineno for d in decorators[1:]], self.node.lineno]
        for decorator, line in zip(decorators, following, strict=True):
            if decorator not in kept and decorator.lineno > first:
                self._put(self.source.line_start(decorator.lineno), self.source.line_start(line), "")
        return kept

    # The forms an add can have

    def _binary(self, node: ast.BinOp, laurel: str, side: int, inner: bool) -> None:
        source = self.source
        if not inner:
            self._wrap(node.left if side == 1 else node.right, f"{laurel}.{_BRANCH}(", ")")
            return
        start, end = source.extent(node)
        plus = source.find_operator(source.extent(node.left)[1], source.extent(node.right)[0], b"+")
        self._open(start, end, f"{laurel}(" if side == 0 else f"{laurel}(f=")
        self._comma(plus, "" if side == 0 else "x=")
        self._close(start, end, ")")

    def _augmented(self, node: ast.AugAssign, laurel: str, side: int, inner: bool) -> None:
        source = self.source
        target = source.segment(node.target)
        plus = source.find_operator(source.extent(node.target)[1], source.extent(node.value)[0], b"+=")
        if inner:
            self._put(plus, plus + 2, "=")
            self._wrap(node.value, f"{laurel}({target}, " if side == 0 else f"{laurel}(f={target}, x=", ")")
        elif side == 0:
            self._wrap(node.value, f"{laurel}.{_BRANCH}(", ")")
        else:
            self._put(plus, plus + 2, f"= {laurel}.{_BRANCH}({target}) +")
            self._wrap(node.value, "(", ")")

    def _call(self, node: ast.Call, laurel: str, side: int, inner: bool, span: Span) -> None:
        source = self.source
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if function not in ("add", "add_") or node.keywords or not 1 <= len(node.args) <= 2:
            raise RewriteError(
                f"{place(span)}: the addition is written as {source.segment(node.func)}(...), which is not rewritten; write it with +"
            )
        start, end = source.extent(node)
        method = len(node.args) == 1 and isinstance(node.func, ast.Attribute)
        left = node.func.value if method else node.args[0]  # type: ignore[attr-defined]  # an Attribute has a value
        right = node.args[-1]
        if not inner:
            self._wrap(left if side == 1 else right, f"{laurel}.{_BRANCH}(", ")")
            return
        prefix = ""
        if function == "add_" and isinstance(left, ast.Name):
            statement = isinstance(source.parent(self.node, node), ast.Expr)
            prefix = f"{left.id} = " if statement else f"({left.id} := "
            self._close(start, end, "" if statement else ")")
        self._open(start, end, f"{prefix}{laurel}(" + ("f=" if side == 1 else ""))
        if method:
            dot = source.find_operator(source.extent(left)[1], source.extent(node.func)[1], b".")
            paren = source.text.index(b"(", source.extent(node.func)[1])
            self._put(dot, paren + 1, ", " if side == 0 else ", x=")
        else:
            func_start, func_end = source.extent(node.func)
            self._put(func_start, source.text.index(b"(", func_end) + 1, "")
            if side == 1:
                self._open(*source.extent(right), "x=")

    # Edits

    def _wrap(self, node: ast.expr, before: str, after: str) -> None:
        start, end = self.source.extent(node)
        self._open(start, end, before)
        self._close(start, end, after)

    def _open(self, start: int, end: int, text: str) -> None:
        self.edits.append((start, 1, start - end, start, text))  # of two that open at one place the longer is the outer one

    def _close(self, start: int, end: int, text: str) -> None:
        self.edits.append((end, 0, end - start, end, text))  # of two that close at one place the shorter is the inner one

    def _insert(self, at: int, text: str) -> None:
        self.edits.append((at, 0, 0, at, text))

    def _put(self, start: int, end: int, text: str) -> None:
        self.edits.append((start, 2, 0, end, text))

    def _comma(self, plus: int, after: str) -> None:
        """A comma for the plus, at the end of what precedes it, without moving a line break or a comment."""
        text = self.source.text
        start, end = plus, plus + 1
        while start > 0 and text[start - 1 : start].isspace():
            start -= 1
        while text[end : end + 1] == b" ":
            end += 1
        blank = text[start:plus]
        line = text[text.rfind(b"\n", 0, start) + 1 : start]
        if b"\n" in blank and b"#" not in line:
            self._put(start, end, "," + blank.decode() + after)
        elif b"\n" in blank:
            self._put(plus, end, ", " + after)
        else:
            follows = text[end : end + 1] in (b"\n", b"\\")
            self._put(start, end, "," + ("" if follows else " ") + after)

    def _take_parameter(self) -> None:
        """Give the function a first parameter `laurel`, and its own name."""
        text, node = self.source.text, self.node
        start, _ = self.source.extent(node)
        name = text.index(node.name.encode(), text.index(b"def", start) + 3)
        self._put(name, name + len(node.name.encode()), self.name)
        positional = [*node.args.posonlyargs, *node.args.args]
        if "laurel" in self.code.co_varnames:
            raise RewriteError(f"{self.code.co_filename}:{node.lineno}: {node.name} has a variable called laurel")
        if self.is_method:
            if node.decorator_list or not positional:
                raise RewriteError(f"{self.code.co_filename}:{node.lineno}: the method {node.name} is decorated")
            self._insert(self.source.extent(positional[0])[1], ", laurel")
        else:
            paren = text.index(b"(", name) + 1
            self._insert(paren, "laurel, " if self.code.co_argcount or self.code.co_flags & 0x0C else "laurel")

    def _global(self, name: str, code: CodeType) -> FunctionType:
        function = _unwrap(self.original.__globals__.get(name), code) if self.original is not None else None
        if function is None:
            raise RewriteError(f"{code.co_filename}:{code.co_firstlineno}: the helper {code.co_name} is not the module's {name}")
        return function

    def _edited(self, start: int, end: int) -> str:
        pieces: list[bytes] = []
        at = start
        for begin, _, _, stop, text in sorted(self.edits):
            pieces += [self.source.text[at:begin], text.encode()]
            at = max(at, stop)
        return b"".join([*pieces, self.source.text[at:end]]).decode()


def _method_of(cls: type, code: CodeType) -> FunctionType | None:
    """The method of a class, its own or inherited, that a code object belongs to; a method that another overrides is refused."""
    overridden = None
    for base in cls.__mro__:
        function = _unwrap(vars(base).get(code.co_name), code)
        if function is not None and overridden is not None:
            raise RewriteError(
                f"{code.co_filename}:{code.co_firstlineno}: the sum stands in {base.__qualname__}.{code.co_name}, which {cls.__qualname__} "
                "overrides and calls through super()"
            )
        if function is not None:
            return function
        overridden = overridden or vars(base).get(code.co_name)
    return None


def _unwrap(candidate: Any, code: CodeType) -> FunctionType | None:
    """The function with this code behind decorators."""
    seen = 0
    while candidate is not None and seen < 20:
        if isinstance(candidate, FunctionType) and candidate.__code__ is code:
            return candidate
        candidate = getattr(candidate, "__wrapped__", None)
        seen += 1
    return None


def _compile(function: Function, needs: dict[str, Any]) -> FunctionType:
    """Run the text as a definition in the original's globals, with the further names as its closure."""
    body = "".join(f"    {line}" if line.strip() else line for line in function.text.splitlines(keepends=True))
    text = f"def _define({', '.join(needs)}):\n{body}\n    return {function.name}\n"
    filename = f"<laurel {function.original.__qualname__} {abs(hash(text)):x}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    scope: dict[str, Any] = {}
    code = compile(text, filename, "exec", flags=__future__.annotations.compiler_flag, dont_inherit=True)
    exec(code, function.original.__globals__, scope)
    made: FunctionType = scope["_define"](**needs)
    made.__qualname__ = function.original.__qualname__
    return made


def without_fast_path(base: type) -> dict[str, Any]:
    """torch.nn.TransformerEncoderLayer computes its sums in a fused kernel in eval mode, unless its activation is unknown."""
    from torch import nn

    return {"activation_relu_or_gelu": property(lambda self: 0)} if issubclass(base, nn.TransformerEncoderLayer) else {}


def _last_name(node: ast.expr) -> str:
    """`c` of the decorators a.b.c and a.b.c(...)."""
    if isinstance(node, ast.Call):
        return _last_name(node.func)
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _dedent(text: str, columns: int) -> str:
    blank = " " * columns
    return "".join(line.removeprefix(blank) for line in text.splitlines(keepends=True)).rstrip() + "\n"
