"""`x + f` becomes `self.laurel_0(x, f)` in a function's own source: text edits at exact positions, nothing else touched.

The forms an addition can have, the ways to hand a LAuReL module to where the addition stands, and the turns of loops.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from types import FunctionType

from laurel_rewrite.backends.module.functions import Function, Place
from laurel_rewrite.backends.module.wrappers import chains
from laurel_rewrite.errors import RewriteError
from laurel_rewrite.graph.capture import Span
from laurel_rewrite.text.source_file import SourceFile, place
from laurel_rewrite.text.text_edits import CallForm, TextEdits, is_docstring, is_exact, last_name

_CHILDREN = {"children", "named_children", "modules", "named_modules", "_modules"}


@dataclass(frozen=True)
class Term:
    """One binary add of a site, as it is to be written.

    Attributes:
        laurel: the expression that gives the LAuReL module there.
        side: the operand, 0 or 1, that holds the skip.
        inner: whether the module takes the place of the add; else a further branch is only handed to `method` of it.
        method: what takes the add's place, or the branch.
        keep: whether an add in place must stay one, for somebody sees the tensor under another name.
    """

    laurel: str
    side: int
    inner: bool
    method: str = ""
    keep: bool = False

    @property
    def call(self) -> str:
        """What is called."""
        return f"{self.laurel}.{self.method}" if self.method else self.laurel


class FunctionEditor(TextEdits):
    """Edits of one function's text, each a position and what is put there, sorted at the end.

    Attributes:
        name: of the edited function.
        loose: sites whose add in place became one that is not.
    """

    def __init__(self, original: FunctionType, place: Place, *, method: bool, aliases: tuple[str, ...] = (), helper: str = "") -> None:
        source = SourceFile.of(original.__code__.co_filename)
        super().__init__(source, source.function(original.__code__))
        self.original = original
        self.place = place
        self.method = method
        self.aliases = aliases
        self.name = helper or original.__code__.co_name
        self.helper = bool(helper)
        self.helpers: dict[str, FunctionEditor] = {}
        self.loose: set[str] = set()
        self._holds: str | None = None
        self._taken: dict[Span, str] = {}
        self._done: set[Span] = set()
        self._locals: dict[str, str] = {}
        if helper:
            self._take_parameter()

    @property
    def owner(self) -> str | None:
        return self.source.class_of(self.node)

    # What can be done to a function

    def reach(self, span: Span, attribute: str) -> str:
        """The expression for an attribute of the module whose method this is, where the span stands."""
        this = self._first_parameter()
        self._visible(this, self.source.find(self.node, span), span)
        self._refuse_calls_of_children(this)
        return f"{this}.{attribute}"

    def replace(self, span: Span, term: Term, site: str) -> None:
        """Put the LAuReL module in the place of the add (`inner`), or weight the branch that a further add brings."""
        if not self._take(span, f"{term.laurel} {term.side}"):  # another way to it may bring the skip as the other operand
            return
        if self.helper and term.inner:
            if self._holds not in (None, site):
                raise RewriteError(f"{place(span)}: the helper {self.original.__name__} holds more than one site")
            self._holds = site
        node = self.source.find(self.node, span)
        if term.keep and term.inner and term.method:
            raise RewriteError(
                f"{place(span)}: one of several adds that become one call is an add in place that is seen under another name"
            )
        self._visible(term.laurel.split(".")[0].split("(")[-1].rstrip(")"), node, span)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            self._binary(node, term)
        elif isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add):
            self._augmented(node, term, site, span)
        elif isinstance(node, ast.Call):
            self._call(node, term, site, span)
        else:
            raise RewriteError(f"{place(span)}: no addition was found at this place in the source")

    def iterate(self, attribute: str, source: str = "") -> str:
        """Begin the function with an iterator over the modules of a loop's turns; returns its name. It is local to the call, so that a
        second run of the function starts anew."""
        if attribute in self._locals:
            return self._locals[attribute]
        name = self._locals[attribute] = self._free(attribute)
        body = self.node.body
        first = body[1] if is_docstring(body[0]) and len(body) > 1 else body[0]
        self.before(first, f"{name} = {source or f'{self._first_parameter()}.{attribute}'}.turns()")
        return name

    def turn(self, span: Span, iterator: str, *, head: bool) -> str:
        """Take the module of a turn before the statement at the span, or at the head of the loop around it; returns its name."""
        node = self.source.find(self.node, span)
        loop, _ = self.source.loop(self.node, node)
        above = [node, *self.source.parents(self.node, node)]
        statement = next(n for n in above if isinstance(n, ast.stmt))
        key = f"{iterator}@{statement.lineno}:{statement.col_offset}" if not head else iterator + "@"
        if key in self._locals:
            return self._locals[key]
        if any(isinstance(n, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp) for n in above):
            raise RewriteError(f"{place(span)}: several additions of one turn stand inside one expression")
        if not head and isinstance(statement, ast.While | ast.For | ast.If):
            raise RewriteError(f"{place(span)}: the sum stands in the condition of a loop or a branch")
        name = self._locals[key] = self._free(f"{iterator}_turn")
        self.before(loop.body[0] if head and loop is not None else statement, f"{name} = {self.next_of(iterator)}")
        return name

    def next_of(self, iterator: str) -> str:
        """The next module of an iterator; without the builtin where the function has a variable of that name."""
        return f"{iterator}.__next__()" if "next" in self._names() else f"next({iterator})"

    def in_loop(self, span: Span) -> tuple[bool, bool]:
        """Whether the span stands in a loop of this function, and whether a turn may pass it by."""
        loop, skipped = self.source.loop(self.node, self.source.find(self.node, span))
        return loop is not None, skipped

    def may_skip(self, span: Span) -> bool:
        """Whether a call of this function may end without running what stands at the span."""
        node = self.source.find(self.node, span)
        branches = (ast.If, ast.Try, ast.TryStar, ast.Match, ast.IfExp, ast.BoolOp)
        returns = [n for n in ast.walk(self.node) if isinstance(n, ast.Return) and n.lineno < span.line]
        return bool(returns) or any(isinstance(parent, branches) for parent in self.source.parents(self.node, node))

    def pass_down(self, span: Span, laurel: str, helper: FunctionEditor) -> None:
        """Call the rewritten helper in the place of the original, with the LAuReL module as its first argument."""
        node = self.source.find(self.node, span)
        if not isinstance(node, ast.Call):
            raise RewriteError(f"{place(span)}: {helper.original.__qualname__} is not called by an expression that can be rewritten")
        if not self._take(span, laurel):
            return
        self._visible(laurel.split(".")[0].split("(")[-1].rstrip(")"), node, span)
        func = node.func
        start, end = self.source.extent(func)
        paren = self.source.text.index(b"(", end) + 1
        broken = self.source.text[paren : paren + 1] == b"\n"
        before_more = ("," if broken else ", ") if node.args or node.keywords else ""
        if helper.method:  # of the owner itself, under a name beside the original's
            if not (isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name) and func.value.id == self._first_parameter()):
                raise RewriteError(f"{place(span)}: the method {helper.original.__name__} is called in a way that cannot be rewritten")
            self.put(end - len(func.attr.encode()), end, helper.name)
            self.insert(paren, laurel + before_more)
            return
        self.helpers[helper.name] = helper
        if not isinstance(helper.place.holder, type) and helper.receiver is None:
            if not self._names_only(func):
                raise RewriteError(f"{place(span)}: the helper {helper.original.__name__} is called in a way that cannot be rewritten")
            self.put(start, end, helper.name)
            self.insert(paren, laurel + before_more)
            return
        # A method of another object: the object, then the module, then what the method was given.
        bound = isinstance(func, ast.Attribute) and func.attr == helper.original.__name__
        if bound:
            assert isinstance(func, ast.Attribute)
            self.put(self.source.extent(func.value)[1], end, "")
        self.open(start, end, f"{helper.name}(")
        self.put(end, paren, f", {laurel}{before_more}")

    @property
    def receiver(self) -> str | None:
        """For a method of a class other than the owner's: that class's name in its module."""
        return self.place.attribute.rpartition(".")[0] or None

    def finish(self) -> Function:
        """The edited text, and what it needs."""
        if self.helper and self.receiver is not None and not self.method:
            self._check_receiver()
        start = self.source.line_start(self.node.lineno)
        end = self.source.extent(self.node)[1]
        return Function(
            self.name,
            self.place,
            self.edited(start, end) + "\n",
            self._kept_decorators(),
            self.owner,
            tuple(self.helpers),
            self.method,
            self.aliases,
        )

    def _kept_decorators(self) -> tuple[str, ...]:
        """The decorators that put a wrapper around the function. Others gave the function itself back (documentation, registration): they have
        done their work, and some look at the file that the function stands in."""
        decorators = self.node.decorator_list
        chain = next((c for c in chains(self.place.value()) if c[-1] is self.original), ())
        held = self.place.value()
        if self.helper:
            return (f"@{type(held).__name__}",) if self.method and isinstance(held, staticmethod | classmethod) else ()
        if not decorators or len(chain) < 2:
            return ()
        wrappers = {w.__code__.co_qualname.partition(".")[0] if isinstance(w, FunctionType) else type(w).__name__ for w in chain[:-1]}
        names = {id(d): last_name(d) for d in decorators}
        known = [d for d in decorators if names[id(d)] in wrappers]
        inherited = (
            {c.__name__ for c in self.place.holder.__mro__} if isinstance(self.place.holder, type) else set()
        )  # put there by a base class
        kept = decorators if wrappers - inherited - set(names.values()) else known
        return tuple("@" + self.source.segment(d) for d in kept)

    def _check_receiver(self) -> None:
        """An object put in the place of the one that was seen must not run another class's method in silence."""
        body = self.node.body
        first = body[1] if is_docstring(body[0]) and len(body) > 1 else body[0]
        this, cls = self._first_parameter(), str(self.receiver).rpartition(".")[2]
        text = f"this is the {self.original.__name__} of {cls} with LAuReL; rewrite the model anew with the other object in its place"
        self.before(first, f'if type({this}).__name__ != "{cls}": raise TypeError("{text}")', compound=True)

    # Names

    def _first_parameter(self) -> str:
        code = self.original.__code__
        if not code.co_argcount:
            raise RewriteError(f"{code.co_filename}:{code.co_firstlineno}: {code.co_qualname} takes no self")
        return code.co_varnames[0]

    def _names(self) -> set[str]:
        bound = {node.id for node in ast.walk(self.node) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        return bound | {node.arg for node in ast.walk(self.node) if isinstance(node, ast.arg)}

    def _free(self, name: str) -> str:
        """A name for a new local variable that the function does not use."""
        used = {node.id for node in ast.walk(self.node) if isinstance(node, ast.Name)} | self._names() | set(self._locals.values())
        while name in used:
            name += "_"
        return name

    def _visible(self, name: str, node: ast.AST, span: Span) -> None:
        """A nested function, or a lambda, must not have a parameter that hides the name."""
        for parent in self.source.parents(self.node, node):
            parameters = parent.args if isinstance(parent, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) else None
            if parameters is not None and any(arg.arg == name for arg in ast.walk(parameters) if isinstance(arg, ast.arg)):
                raise RewriteError(f"{place(span)}: {name!r} is another thing inside the nested function")
        stored = [n for n in ast.walk(self.node) if isinstance(n, ast.Name) and n.id == name and not isinstance(n.ctx, ast.Load)]
        if stored and name not in self._locals.values():
            raise RewriteError(f"{self.source.filename}:{stored[0].lineno}: {name!r} is given another value in the function")

    def _refuse_calls_of_children(self, this: str) -> None:
        """A function that calls every child of its module would call the LAuReL modules too."""
        for loop in ast.walk(self.node):
            parts = loop.generators if isinstance(loop, ast.ListComp | ast.GeneratorExp) else [loop] if isinstance(loop, ast.For) else []
            for part in parts:
                read = [n for n in ast.walk(part.iter) if isinstance(n, ast.Attribute) and n.attr in _CHILDREN]
                if not any(isinstance(n.value, ast.Name) and n.value.id == this for n in read):
                    continue
                names = {n.id for n in ast.walk(part.target) if isinstance(n, ast.Name)}
                if any(isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in names for n in ast.walk(loop)):
                    raise RewriteError(
                        f"{self.source.filename}:{part.iter.lineno}: {self.original.__qualname__} calls every child of its module, and LAuReL "
                        "modules would be among them; hold those that it calls in a ModuleList"
                    )

    def _names_only(self, node: ast.expr) -> bool:
        while isinstance(node, ast.Attribute):
            node = node.value
        return isinstance(node, ast.Name)

    def _take(self, span: Span, laurel: str) -> bool:
        """Whether an expression is still to be edited; one expression cannot serve two sites."""
        if self._taken.setdefault(span, laurel) != laurel:
            raise RewriteError(f"{place(span)}: one expression serves two sites here")
        done = span in self._done
        self._done.add(span)
        return not done

    def _take_parameter(self) -> None:
        """Give the function a further parameter `laurel`, the first but for self, and its own name."""
        text, node, code = self.source.text, self.node, self.original.__code__
        start, _ = self.source.extent(node)
        name = text.index(node.name.encode(), text.index(b"def", start) + 3)
        self.put(name, name + len(node.name.encode()), self.name)
        positional = [*node.args.posonlyargs, *node.args.args]
        if "laurel" in self._names() or any(isinstance(n, ast.Name) and n.id == "laurel" for n in ast.walk(node)):
            raise RewriteError(f"{code.co_filename}:{node.lineno}: {node.name} has a variable called laurel")
        static = isinstance(self.place.value(), staticmethod)
        if self.receiver is not None or (self.method and not static):
            if not positional:
                raise RewriteError(f"{code.co_filename}:{node.lineno}: {node.name} takes no self by name")
            self.insert(
                self.source.extent(positional[0])[1] if positional[0].annotation is None else self._end_of(positional[0]), ", laurel"
            )
        else:
            paren = text.index(b"(", name) + 1
            self.insert(paren, "laurel, " if code.co_argcount or code.co_kwonlyargcount or code.co_flags & 0x0C else "laurel")

    def _end_of(self, argument: ast.arg) -> int:
        return self.source.extent(argument)[1]

    # The forms an add can have

    def _binary(self, node: ast.BinOp, term: Term) -> None:
        source, laurel, side = self.source, term.call, term.side
        if not term.inner:
            self.wrap(node.left if side == 1 else node.right, f"{term.call}(", ")")
            return
        start, end = source.extent(node)
        plus = source.find_operator(source.extent(node.left)[1], source.extent(node.right)[0], b"+")
        self.open(start, end, f"{laurel}(" if side == 0 else f"{laurel}(f=")
        self.comma(plus, "" if side == 0 else "x=")
        self.close(start, end, ")")

    def _augmented(self, node: ast.AugAssign, term: Term, site: str, span: Span) -> None:
        source, laurel, side = self.source, term.call, term.side
        target = source.segment(node.target)
        plus = source.find_operator(source.extent(node.target)[1], source.extent(node.value)[0], b"+=")
        named = isinstance(node.target, ast.Name)
        if not term.inner and side == 0:
            self.wrap(node.value, f"{term.call}(", ")")
        elif not term.inner:
            if term.keep or not named:
                raise RewriteError(f"{place(span)}: a branch that is seen under another name is added to in place")
            self.loose.add(site)
            self.put(plus, plus + 2, f"= {term.call}({target}) +")
            self.wrap(node.value, "(", ")")
        elif named:
            method = ".add_" if term.keep else ""
            if not term.keep:
                self.loose.add(site)
            self.put(plus, plus + 2, "=")
            self.wrap(node.value, f"{laurel}{method}({target}, " if side == 0 else f"{laurel}{method}(f={target}, x=", ")")
        else:  # the target is written in place, which no assignment need repeat; it is evaluated once, as before
            start, end = source.extent(node)
            self.open(start, end, f"{laurel}.add_(" if side == 0 else f"{laurel}.add_(f=")
            blank = source.extent(node.target)[1]
            after = plus + 2
            while source.text[after : after + 1] == b" ":
                after += 1
            self.put(blank, after, ", " if side == 0 else ", x=")
            self.close(start, end, ")")

    def _call(self, node: ast.Call, term: Term, site: str, span: Span) -> None:
        """torch.add(x, f), x.add_(f), or any callable that turned out to add."""
        source, laurel, side = self.source, term.call, term.side
        form = CallForm.of(node)
        if form is None or (form.alpha is not None and (side == 1 or not is_exact(form.alpha.value))):
            raise RewriteError(
                f"{place(span)}: the addition is written as {source.segment(node)[:60]}, which is not rewritten; write it with +"
            )
        if not term.inner:
            if form.alpha is not None:
                raise RewriteError(f"{place(span)}: a further branch is added with alpha, which is not rewritten; write it with +")
            self.wrap(form.left if side == 1 else form.right, f"{term.call}(", ")")
            return
        start, end = source.extent(node)
        prefix = suffix = into = ""
        if form.name in ("add_", "iadd", "__iadd__"):
            target = form.left.id if isinstance(form.left, ast.Name) and form.name == "add_" else ""
            if target and not term.keep:
                self.loose.add(site)
                above = source.parents(self.node, node)
                prefix, suffix = (f"{target} = ", "") if above and isinstance(above[0], ast.Expr) else (f"({target} := ", ")")
            else:
                into = ".add_"
        self.open(start, end, f"{prefix}{laurel}{into}(" + ("f=" if side == 1 else ""))
        self.close(start, end, suffix)
        paren = source.text.index(b"(", source.extent(node.func)[1]) + 1
        between = "" if side == 0 else "x="
        if form.method:
            dot = source.find_operator(source.extent(form.left)[1], source.extent(node.func)[1], b".")
            self.put(dot, paren, f", {between}")
        else:
            self.put(start, paren, "")
            if between and not form.named:
                comma = source.find_operator(source.extent(form.left)[1], source.extent(form.right)[0], b",")
                after = comma + 2 if source.text[comma + 1 : comma + 2] == b" " else comma + 1
                self.put(comma, after, f", {between}")
        for keyword in form.named:
            first = source.starts[keyword.lineno - 1] + keyword.col_offset
            after = source.text.index(b"=", first) + 1  # the value may stand in parentheses, which stay
            self.put(first, after, between if keyword.value is form.right and not form.method else "")
        if form.alpha is not None:
            factor = source.segment(form.alpha.value)
            comma = source.text.rindex(b",", 0, source.starts[form.alpha.lineno - 1] + form.alpha.col_offset)
            self.put(comma, source.extent(form.alpha.value)[1], "")
            self.wrap(form.right, f"{factor} * (", ")")
