"""The edits of a rewrite as data, and the rewritten classes from them again: no capture, and no code but what is installed.

What a class was made from is its base, the places of its sums and what is put there. A place is a span inside a function of the base or of a
module, known by its name and by a digest of its text: where the installed text is another, nothing is edited.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Mapping
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

from torch import nn

from laurel_rewrite.backends.module.functions import Place, codes_of, find_in_class, find_in_module, name_of
from laurel_rewrite.backends.module.source import Change, Edited, rewrite_class
from laurel_rewrite.backends.module.wrappers import chains
from laurel_rewrite.detection.site import path_moved
from laurel_rewrite.errors import ConfigError, RewriteError, nearest
from laurel_rewrite.files.checked import anything, checked, list_of, optional, shown, text, whole
from laurel_rewrite.graph.capture import Call, Span
from laurel_rewrite.text.source_file import SourceFile

if TYPE_CHECKING:
    from laurel_rewrite.plan import PlanSite

_NAME = text(r"\w+", "a name")
_PATH = text(r"[\w.<>]*", "a dotted name")
_CLASS = {
    "class": text(),
    "owners": list_of(text(r"[\w.]*", "a module's path")),
    "changes": list_of(anything(dict)),
    "ways": anything(list),
}
_FUNCTION = {
    "module": _PATH,
    "attribute": _PATH,
    "name": text(r"[\w<>]+", "a function's name"),
    "digest": text(r"[0-9a-f]{64}", "a digest"),
}
_FLAGS = {"loop": False, "by_turn": True, "keep": False, "additive": True}
"""Of a change, and what each is where it is not said."""
_CHANGE = {"name": _NAME, "places": anything(list), **{flag: optional(anything(bool), default) for flag, default in _FLAGS.items()}}
_EDITS = {"functions": list_of(anything(dict)), "spans": list_of(list_of(whole())), "classes": list_of(anything(dict))}


def recorded(owners: Mapping[str, Edited]) -> dict[str, Any]:
    """The edits of each owner's class, as JSON holds them."""
    writer = _Writer()
    by_class: dict[Edited, list[str]] = {}
    for owner, edited in owners.items():
        by_class.setdefault(edited, []).append(owner)
    classes = [writer.entry(edited, names) for edited, names in by_class.items()]
    return {"functions": writer.functions, "spans": writer.spans, "classes": classes}


class _Writer:
    def __init__(self) -> None:
        self.functions: list[dict[str, str]] = []
        self.spans: list[list[int]] = []

    def entry(self, edited: Edited, owners: Iterable[str]) -> dict[str, Any]:
        """One class."""
        base = edited.rewritten.base
        changes = [
            {
                "name": change.name,
                "places": [[[self._steps(base, steps), side] for steps, side in adds] for adds in change.places],
                **{flag: value for flag, default in _FLAGS.items() if (value := getattr(change, flag)) != default},
            }
            for change in edited.changes
        ]
        ends = {steps[-1] for change in edited.changes for adds in change.places for steps, _ in adds}
        ways = [self._steps(base, steps) for steps in dict.fromkeys(call.steps for call in edited.calls) if steps[-1] in ends]
        return {"class": name_of(base), "owners": list(owners), "changes": changes, "ways": ways}

    def _steps(self, base: type, steps: tuple[Span, ...]) -> list[int]:
        return [_index(self.spans, self._span(base, span)) for span in steps]

    def _span(self, base: type, span: Span) -> list[int]:
        found = find_in_class(base, span.code)
        where, function = found[:2] if found is not None else find_in_module(span.code) or (None, None)
        if where is None or function is None:
            raise RewriteError(f"{span.filename}:{span.line}: the function here cannot be found by name")
        reference = {
            "module": "" if isinstance(where.holder, type) else where.holder,
            "attribute": where.attribute,
            "name": where.name,
            "digest": _digest(function.__code__),
        }
        first = function.__code__.co_firstlineno
        inner = next(number for number, code in enumerate(codes_of(function.__code__)) if code is span.code)
        lines = [span.line - first, span.end_line - first]
        return [_index(self.functions, reference), inner, *lines, span.column, span.end_column]


def _index(known: list[Any], thing: Any) -> int:
    if thing not in known:
        known.append(thing)
    return known.index(thing)


def check_edits(data: Any, label: str) -> dict[str, Any]:
    """The edits that a file holds, as far as can be said without the classes.

    Raises:
        ConfigError: a value is of another type.
    """
    edits = checked(data, _EDITS, label)
    for number, row in enumerate(edits["functions"], start=1):
        checked(row, _FUNCTION, f"{label}, function {number}")
    for row in edits["classes"]:
        where = f"{label}, {shown(row.get('class'))}"
        for change in checked(row, _CLASS, where)["changes"]:
            checked(change, _CHANGE, where)
    return edits


def replayed(data: Any, model: nn.Module, sites: Iterable[PlanSite], label: str) -> dict[str, Edited]:
    """The class of each owner again.

    Args:
        data: what `recorded` gave.
        model: of the same architecture, as it was before.
        sites: of the plan that is carried out with them.
        label: where the data came from, for messages.

    Raises:
        ConfigError: the data are damaged, they lack a site, the model has no such module, or an installed function is not the one that was
            edited.
    """
    edits = check_edits(data, label)
    owners: dict[str, Edited] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for entry in edits["classes"]:
        made: dict[type, Edited] = {}
        for owner in entry["owners"]:
            if owner not in modules:
                raise ConfigError(f"{label} names the module {shown(owner)}, which the model does not have. {nearest(owner, modules)}")
            base = type(modules[owner])
            if base not in made:
                made[base] = _class_again(_Reader(base, edits["functions"], edits["spans"], label), entry)
            owners[owner] = made[base]
    for site in sites:
        if site.owner not in owners or all(change.name != site.attribute for change in owners[site.owner].changes):
            raise ConfigError(f"{label}: nothing is edited for the site {site.id}, so that its connection would not be called.")
    return owners


def moved(data: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    """The same with another beginning of the owners' paths."""
    return {**data, "classes": [{**row, "owners": [path_moved(owner, old, new) for owner in row["owners"]]} for row in data["classes"]]}


def only(data: Mapping[str, Any], inside: Callable[[Mapping[str, None]], Mapping[str, None]]) -> dict[str, Any]:
    """The same of those owners that a function of tables by path keeps."""
    classes = [{**row, "owners": list(inside(dict.fromkeys(row["owners"])))} for row in data["classes"]]
    return {**data, "classes": [row for row in classes if row["owners"]]}


def joined(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The edits of several rewrites in one model, of no owner in common."""
    functions: list[Any] = []
    spans: list[list[int]] = []
    classes = []
    for data in parts:
        first_function, first_span = len(functions), len(spans)

        def steps(numbers: list[int], first: int = first_span) -> list[int]:
            return [first + number for number in numbers]

        functions += data["functions"]
        spans += [[first_function + number, *place] for number, *place in data["spans"]]
        for row in data["classes"]:
            changes = [
                {**change, "places": [[[steps(numbers), side] for numbers, side in adds] for adds in change["places"]]}
                for change in row["changes"]
            ]
            classes.append({**row, "changes": changes, "ways": [steps(numbers) for numbers in row["ways"]]})
    return {"functions": functions, "spans": spans, "classes": classes}


def _class_again(reader: _Reader, entry: Mapping[str, Any]) -> Edited:
    try:
        again = [
            Change(
                change["name"],
                tuple(tuple((reader.steps(steps), int(bool(side))) for steps, side in adds) for adds in change["places"]),
                **{flag: change[flag] for flag in _FLAGS if flag in change},
            )
            for change in entry["changes"]
        ]
        calls = [Call("", 0, reader.steps(steps)) for steps in entry["ways"]]
    except (TypeError, ValueError, IndexError) as error:
        raise ConfigError(f"{reader.label}, {entry['class']}: damaged edits ({error}).") from error
    try:
        return rewrite_class(reader.base, again, calls)
    except RewriteError as error:
        raise ConfigError(f"{reader.label}: {entry['class']} cannot be edited as it was: {error}") from error


class _Reader:
    """Spans of one class's functions again.

    Attributes:
        base: the class, which is asked for those that are not a module's.
    """

    def __init__(self, base: type, functions: list[dict[str, Any]], spans: list[list[int]], label: str) -> None:
        self.base, self.functions, self.spans, self.label = base, functions, spans, label
        self.found: dict[int, FunctionType] = {}

    def steps(self, numbers: Any) -> tuple[Span, ...]:
        """The spans of these numbers."""
        if not isinstance(numbers, list) or not numbers:
            raise ValueError("a sum has no place")
        return tuple(self._span(*self.spans[number]) for number in numbers)

    def _span(self, number: int, inner: int, line: int, end_line: int, column: int, end_column: int) -> Span:
        code = self._function(number).__code__
        first = code.co_firstlineno
        return Span(list(codes_of(code))[inner], code.co_filename, line + first, end_line + first, column, end_column)

    def _function(self, number: int) -> FunctionType:
        if number not in self.found:
            self.found[number] = self._looked_up(self.functions[number])
        return self.found[number]

    def _looked_up(self, row: Mapping[str, Any]) -> FunctionType:
        if row["module"]:  # of what the model was built from, and so imported: a file's word imports nothing
            held = Place(row["module"], row["attribute"], "", 0).value() if row["module"] in sys.modules else None
        else:
            held = next((vars(cls)[row["attribute"]] for cls in self.base.__mro__ if row["attribute"] in vars(cls)), None)
        for chain in chains(held):
            function: FunctionType = chain[-1]
            if function.__code__.co_name == row["name"] and _digest(function.__code__) == row["digest"]:
                return function
        place = f"{row['module'] or name_of(self.base)}.{row['attribute']}"
        raise ConfigError(
            f"{self.label}: the installed {place} is not the one that was edited; it belongs to another version of its package. Install that "
            "version, or rewrite the model anew and load the weights into it."
        )


def _digest(code: CodeType) -> str:
    """Of a function's text, wherever in its file it stands."""
    source = SourceFile.of(code.co_filename)
    node = source.function(code)
    start = source.line_start(code.co_firstlineno)
    return hashlib.sha256(source.text[start : source.extent(node)[1]]).hexdigest()
