"""Containers that own a residual connection, as `class Residual(nn.Sequential)` does: LAuReL modules are their children, but no elements."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from types import FunctionType
from typing import TYPE_CHECKING, Any

from torch import nn

from laurel_rewrite.operators.protocol import Connection
from laurel_rewrite.operators.turns import Turns

if TYPE_CHECKING:
    from collections.abc import ItemsView, KeysView, ValuesView


def own(container: Any) -> dict[str, Any]:
    """The elements of a container by name, without LAuReL."""
    return {name: module for name, module in container._modules.items() if not isinstance(module, Connection | Turns)}


class OwnElements:
    """For nn.Sequential and nn.ModuleList."""

    def __iter__(self) -> Iterator[Any]:
        return iter(own(self).values())

    def __len__(self) -> int:
        return len(own(self))

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return list(own(self).values())[index]
        chosen = dict(list(own(self).items())[index])
        made: Any = type(self)
        return made(OrderedDict(chosen)) if isinstance(self, nn.Sequential) else made(chosen.values())


class OwnEntries:
    """For nn.ModuleDict."""

    def __iter__(self) -> Iterator[str]:
        return iter(own(self))

    def __len__(self) -> int:
        return len(own(self))

    def keys(self) -> KeysView[str]:
        return own(self).keys()

    def values(self) -> ValuesView[Any]:
        return own(self).values()

    def items(self) -> ItemsView[str, Any]:
        return own(self).items()


def view_of(base: type) -> type | None:
    """The class whose methods a rewritten container gets, so that LAuReL is no element of it; None where the base is no container."""
    if issubclass(base, nn.Sequential | nn.ModuleList):
        return OwnElements
    return OwnEntries if issubclass(base, nn.ModuleDict) else None


def methods_of(base: type) -> dict[str, Any]:
    """These methods by name, less those that the base has of its own. They, and not their class, go into the rewritten class: an object can
    only change into a class of the same bases."""
    found = vars(view_of(base) or object)
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, FunctionType) and getattr(base, name).__module__.startswith("torch.")
    }
