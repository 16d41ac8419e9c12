"""Functions inside other things: decorators' wrappers, static methods, properties, partial objects; and copies of these around another function."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import CellType, FunctionType
from typing import Any

from laurel_rewrite.errors import RewriteError

_DEPTH = 12  # wrappers around a function


def chains(thing: Any, seen: frozenset[int] = frozenset()) -> Iterator[tuple[Any, ...]]:
    """The ways from a thing to the functions inside it, through decorators' wrappers, static methods, properties and partial objects."""
    if len(seen) > _DEPTH:
        return
    if isinstance(thing, FunctionType):
        yield (thing,)
    for inner in _inside(thing):
        if id(inner) not in seen:
            for chain in chains(inner, seen | {id(thing)}):
                yield (thing, *chain)


def _inside(thing: Any) -> Iterator[Any]:
    """What a thing may hand its call to."""
    if isinstance(thing, FunctionType):
        for cell in thing.__closure__ or ():
            content = _content(cell)
            if isinstance(content, FunctionType | functools.partial | staticmethod | classmethod) and content is not thing:
                yield content
        return
    names = {property: ("fget", "fset", "fdel"), functools.partialmethod: ("func",), functools.partial: ("func",)}
    for kind, attributes in {staticmethod: ("__func__",), classmethod: ("__func__",), **names}.items():
        if isinstance(thing, kind):
            yield from (value for name in attributes if (value := getattr(thing, name)) is not None)
            return
    if not isinstance(thing, type) and hasattr(type(thing), "__get__"):  # a descriptor of the user's or of functools, around a function
        yield from (value for value in getattr(thing, "__dict__", {}).values() if isinstance(value, FunctionType))


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # still empty
        return None


def grafted(thing: Any, original: FunctionType, edited: FunctionType) -> Any:
    """A copy of a thing with another function in the place of one inside it; None where that is not inside it.

    A wrapper that knows itself or one around it (transformers' checkpointing asks whether it is the outermost) knows their copies.

    Raises:
        RewriteError: something around the function cannot be copied.
    """
    chain = next((chain for chain in chains(thing) if chain[-1] is original), None)
    if chain is None:
        return None
    copies: dict[int, Any] = {id(original): edited}
    for outer, inner in zip(chain[-2::-1], chain[:0:-1], strict=True):
        try:
            copies[id(outer)] = _copied_around(outer, inner, copies[id(inner)], chain)
        except Exception as error:  # of a class of the user's
            what = f"{original.__qualname__} stands in a {type(outer).__name__}, which cannot be copied around its edited text"
            raise RewriteError(f"{what}: {type(error).__name__}: {error}") from error
    for outer in chain[:-1]:
        for cell in getattr(copies[id(outer)], "__closure__", None) or ():
            if any(_content(cell) is known for known in chain):
                cell.cell_contents = copies[id(_content(cell))]
    return copies[id(thing)]


def _copied_around(thing: Any, inner: Any, new: Any, chain: tuple[Any, ...]) -> Any:
    """A copy of one thing of a chain with a new one inside it. A function's copy has cells of its own for what is in the chain, and shares
    the others, in which wrappers count."""
    if isinstance(thing, FunctionType):
        cells = thing.__closure__ or ()
        closure = tuple(CellType(_content(cell)) if any(_content(cell) is known for known in chain) else cell for cell in cells)
        copy = FunctionType(thing.__code__, thing.__globals__, thing.__name__, thing.__defaults__, closure)
        copy.__kwdefaults__, copy.__annotations__, copy.__doc__ = thing.__kwdefaults__, thing.__annotations__, thing.__doc__
        copy.__qualname__, copy.__module__ = thing.__qualname__, thing.__module__
        copy.__dict__.update(thing.__dict__)
        if copy.__dict__.get("__wrapped__") is inner:
            copy.__dict__["__wrapped__"] = new
        return copy
    if isinstance(thing, staticmethod | classmethod):
        return type(thing)(new)
    if isinstance(thing, property):
        parts: list[Any] = [new if part is inner else part for part in (thing.fget, thing.fset, thing.fdel)]
        getter, setter, deleter = parts
        return type(thing)(getter, setter, deleter, thing.__doc__)
    if isinstance(thing, functools.partial | functools.partialmethod):
        return type(thing)(new, *thing.args, **thing.keywords)
    twin = object.__new__(type(thing))
    twin.__dict__.update({name: new if value is inner else value for name, value in thing.__dict__.items()})
    return twin


def wrapped_as(held: Any, value: Any) -> Any:
    """A function of a saved class inside what the original has around it and no decorator says: what a base class (`__init_subclass__`) or
    a decorator of the class put there. None where there is no such thing."""
    for new in chains(value):
        inner = new[-1].__code__.co_name
        for old in chains(held):
            if len(old) <= len(new) or old[-1].__code__.co_name != inner:
                continue
            place = old[len(old) - len(new)]
            alike = (
                place is old[-1] if len(new) == 1 else getattr(place, "__code__", type(place)) is getattr(new[0], "__code__", type(new[0]))
            )
            if alike and isinstance(place, FunctionType):
                return grafted(held, place, value)
    return None
