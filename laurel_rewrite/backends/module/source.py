"""From the sites of one class to the class in which LAuReL modules are called: who edits which function, and how a module gets there.

The capture says which operation of which code object every add is, down to the column, and by which calls it was reached. The class gets
a subclass of the same name whose functions have those expressions replaced; comments and layout stay. The same text is what runs and
what is saved, so that a person can read and diff it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import CodeType, FunctionType

from laurel_rewrite.backends.module.edits import FunctionEditor, Term
from laurel_rewrite.backends.module.functions import Function, Place, Rewritten, contains, find_in_class, find_in_module
from laurel_rewrite.errors import RewriteError
from laurel_rewrite.graph.capture import Call, Span
from laurel_rewrite.text.source_file import place

_GENERATOR = 0x20  # flag of a code object


@dataclass(frozen=True)
class Change:
    """One LAuReL module's places in a class: its attribute, and the adds from the skip outwards with the skip's side.

    Attributes:
        name: attribute of the owner, such as "laurel_0".
        places: for each place where the connection is written, (steps, side) of each binary add; the first holds the skip itself.
        loop: the line runs several times in one call, and the attribute holds one module a turn.
        by_turn: where a turn of the loop may pass the sum by, count turns; else count how often the sum runs.
        keep: an add in place stays one, for somebody sees the tensor under another name.
        additive: further branches are added to what the module gives; else it takes the place of the outermost add.
    """

    name: str
    places: tuple[tuple[tuple[tuple[Span, ...], int], ...], ...]
    loop: bool = False
    by_turn: bool = True
    keep: bool = False
    additive: bool = True

    @property
    def several(self) -> bool:
        """Whether a place has further branches, which are weighted where they are added."""
        return any(len(adds) > 1 for adds in self.places)


@dataclass(frozen=True)
class Edited:
    """What became of a class.

    Attributes:
        rewritten: the class.
        changes, calls: what it was made from.
        loose: the changes whose add in place is none any more.
        by_turn: those that count turns.
    """

    rewritten: Rewritten
    changes: tuple[Change, ...]
    calls: tuple[Call, ...]
    loose: frozenset[str]
    by_turn: frozenset[str]


def rewrite_class(base: type, changes: Iterable[Change], calls: Iterable[Call]) -> Edited:
    """Make the subclass of `base` in which the changes are made.

    Args:
        base: class of the owner.
        changes: what to replace.
        calls: all adds recorded for the owner, sites or not; they tell whether a helper is reached by more than one way.

    Raises:
        RewriteError: an add stands where its text cannot be replaced; the message says why.
    """
    return _ClassEditor(base, tuple(changes), tuple(calls)).edited()


def _role(change: Change, position: int, count: int) -> tuple[bool, str]:
    """Whether the module takes the place of one of a site's adds, the innermost first, and by which method."""
    if change.additive or count == 1:
        return (True, "") if position == 0 else (False, "branch")
    if position in (0, count - 1):
        return True, "first_add" if position == 0 else "last_add"
    return False, "next_branch"


class _ClassEditor:
    def __init__(self, base: type, changes: tuple[Change, ...], calls: tuple[Call, ...]) -> None:
        self.base = base
        self.changes = changes
        self.calls = calls
        self.ways: dict[Span, set[tuple[Span, ...]]] = {}
        for call in calls:
            self.ways.setdefault(call.steps[-1], set()).add(call.steps)
        self.editors: dict[tuple[Place, bool], FunctionEditor] = {}
        self.found: dict[CodeType, tuple[Place, FunctionType, tuple[str, ...]] | None] = {}
        self.by_turn: set[str] = set()

    def edited(self) -> Edited:
        for change in self.changes:
            for adds in change.places:
                for position, (steps, side) in enumerate(adds):
                    self._apply(change, steps, side, *_role(change, position, len(adds)))
        functions = {editor: editor.finish() for editor in self.editors.values()}
        methods = tuple(function for function in functions.values() if function.method)
        helpers = [function for function in functions.values() if not function.method]
        ordered: list[Function] = []
        while helpers:  # a helper stands behind those that it calls
            ready = [h for h in helpers if all(name in {o.name for o in ordered} or name == h.name for name in h.helpers)] or helpers
            ordered += ready
            helpers = [h for h in helpers if h not in ready]
        rewritten = Rewritten(self.base, methods, tuple(ordered))
        _ = rewritten.cls  # compiled now, where a mistake can still be told
        loose = frozenset().union(*(editor.loose for editor in functions))
        return Edited(rewritten, self.changes, self.calls, loose, frozenset(self.by_turn))

    def _apply(self, change: Change, steps: tuple[Span, ...], side: int, inner: bool, method: str) -> None:
        last = steps[-1]
        steps = self._shortened(steps, loop=change.loop)
        editors = [self._editor(steps[0].code), *(self._editor(span.code, helper=True) for span in steps[1:])]
        laurel = editors[0].reach(steps[0], change.name)
        if change.loop:
            laurel = self._in_turn(change, steps, editors)
        else:
            for editor, step, helper in zip(editors, steps, editors[1:], strict=False):
                editor.pass_down(step, laurel, helper)
                laurel = "laurel"
        editors[-1].replace(last, Term(laurel, side, inner, method, change.keep), change.name)

    def _in_turn(self, change: Change, steps: tuple[Span, ...], editors: list[FunctionEditor]) -> str:
        """Hand the iterator over the turns' modules down to the loop, and one turn's module from there on; the expression for it at the add."""
        loops = [editor.in_loop(step) for editor, step in zip(editors, steps, strict=True)]
        at = next((n for n in reversed(range(len(steps))) if loops[n][0]), len(steps) - 1)
        skipped = (
            loops[at][0]
            and change.by_turn
            and any(skipped or editors[n].may_skip(steps[n]) for n, (_, skipped) in enumerate(loops) if n >= at)
        )
        iterator = editors[0].iterate(change.name)
        for position in range(at):
            editors[position].pass_down(steps[position], iterator, editors[position + 1])
            iterator = "laurel"
        if skipped:
            self.by_turn.add(change.name)
        if skipped or (change.several and at == len(steps) - 1):
            laurel = editors[at].turn(steps[at], iterator, head=skipped)
        elif change.several:
            raise RewriteError(f"{place(steps[-1])}: several additions of one turn stand in a helper of the loop")
        else:
            laurel = editors[at].next_of(iterator)
        for position in range(at, len(steps) - 1):
            editors[position].pass_down(steps[position], laurel, editors[position + 1])
            laurel = "laurel"
        return laurel

    def _shortened(self, steps: tuple[Span, ...], *, loop: bool) -> tuple[Span, ...]:
        """The calls through which the module must be handed down: not those inside one function, nor those that lead to a method of the owner
        which nothing else reaches, for there the owner is at hand."""
        kept: list[Span] = []
        for step in steps:
            if kept and self._holder(kept[-1].code) is not None and self._holder(kept[-1].code) == self._holder(step.code):
                kept.pop()  # a nested function, a lambda, a comprehension
            kept.append(step)
        for position in reversed(range(1, len(kept))):
            code = kept[position].code
            if self._has_self(code) and (bool(code.co_flags & _GENERATOR) if loop else len(self._reached(steps)) == 1):
                return tuple(kept[position:])
        return tuple(kept)

    def _reached(self, steps: tuple[Span, ...]) -> set[tuple[Span, ...]]:
        return self.ways.get(steps[-1], {steps})

    def _lookup(self, code: CodeType) -> tuple[Place, FunctionType, tuple[str, ...]] | None:
        if code not in self.found:
            self.found[code] = find_in_class(self.base, code)
        return self.found[code]

    def _holder(self, code: CodeType) -> CodeType | None:
        """The code of the owner's method that this is, or stands in."""
        found = self._lookup(code)
        return found[1].__code__ if found is not None else None

    def _has_self(self, code: CodeType) -> bool:
        """Whether the owner is the first parameter of the method that this code is, or stands in."""
        found = self._lookup(code)
        return found is not None and not isinstance(found[0].value(), staticmethod | classmethod)

    def _editor(self, code: CodeType, *, helper: bool = False) -> FunctionEditor:
        found = self._lookup(code)
        if found is None:
            if not helper:
                raise RewriteError(f"{code.co_filename}:{code.co_firstlineno}: {code.co_name} is no method of {self.base.__qualname__}")
            beside = find_in_module(code)
            if beside is None or not contains(beside[1].__code__, code):
                raise RewriteError(
                    f"{code.co_filename}:{code.co_firstlineno}: the helper {code.co_qualname} cannot be found by name, "
                    "so no copy of it can be made"
                )
            found = (*beside, ())
        where, function, names = found
        key = (where, helper)
        if key not in self.editors:
            name = ""
            if helper:
                name = "_".join(part.strip("_") if n else part for n, part in enumerate(where.attribute.split(".")))
                name = f"{name if not isinstance(where.holder, type) else function.__name__}_laurel"
                while any(editor.name == name for editor in self.editors.values()):
                    name += "_"
            method = isinstance(where.holder, type)
            self.editors[key] = FunctionEditor(function, where, method=method, aliases=() if helper else names, helper=name)
        return self.editors[key]
