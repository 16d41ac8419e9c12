"""What stands in front of a connection's own sum for a while: to see it, to leave the branch out, or to add plainly."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from laurel_rewrite.operators.protocol import Connection
from laurel_rewrite.operators.state import FED

Sum = tuple[Tensor, tuple[Tensor, ...]]
"""The new value of the stream, and the state behind it."""


class Around:
    """A connection as it is; a subclass changes what goes in or comes out.

    Both are what `Connection.connect` and `Connection.branch` are: the sum of the skip and what is added with it, and a further branch of a sum
    of several, where the operator lets the source add it.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def connect(self, x: Tensor, f: Tensor, *more: Tensor, state: Sequence[Tensor], n: Tensor | None = None) -> Sum:
        return type(self.connection).connect(self.connection, x, f, *more, state=state, n=n)

    def branch(self, f: Tensor) -> Tensor:
        return type(self.connection).branch(self.connection, f)


@contextlib.contextmanager
def standing(arounds: Iterable[Around]) -> Iterator[None]:
    """Put these in front of their connections for a while."""
    placed = list(arounds)
    try:
        for around in placed:
            around.connection.connect = around.connect  # type: ignore[method-assign]  # on the instance, for a while
            around.connection.branch = around.branch  # type: ignore[method-assign]  # likewise
        yield
    finally:
        for around in placed:
            for name in ("connect", "branch"):
                vars(around.connection).pop(name, None)


class WithoutBranch(Around):
    """Zeros in the place of the branch; the state is what the operator makes of these."""

    def connect(self, x: Tensor, f: Tensor, *more: Tensor, state: Sequence[Tensor], n: Tensor | None = None) -> Sum:
        return super().connect(x, torch.zeros_like(f), *map(torch.zeros_like, more), state=state, n=n)

    def branch(self, f: Tensor) -> Tensor:
        return super().branch(torch.zeros_like(f))


class PlainSum(Around):
    """x + f, and the state that the operator would leave: what those after it read are the states of the stream as it is now."""

    def connect(self, x: Tensor, f: Tensor, *more: Tensor, state: Sequence[Tensor], n: Tensor | None = None) -> Sum:
        _, left = super().connect(x, f, *more, state=state, n=n)
        return self.connection.plain_sum(x, f, *more), left

    def branch(self, f: Tensor) -> Tensor:
        return f


class Log(Protocol):
    """Who is told of sums."""

    def summed(self, site: str, x: Tensor, f: Tensor, out: Tensor, depth: Tensor | None) -> None:
        """A sum as far as the connection makes it, and how it weighs the states of its stream."""

    def added(self, site: str, f: Tensor, term: Tensor) -> None:
        """A further branch of the last sum of a site, and what of it is added."""


class Seen(Around):
    """Tells a log of every sum."""

    def __init__(self, site: str, connection: Connection, log: Log) -> None:
        super().__init__(connection)
        self.site, self.log = site, log
        self.within = False  # the connection itself asks for a branch

    def connect(self, x: Tensor, f: Tensor, *more: Tensor, state: Sequence[Tensor], n: Tensor | None = None) -> Sum:
        self.within = True
        try:
            out, left = super().connect(x, f, *more, state=state, n=n)
        finally:
            self.within = False
        total = f
        for branch in more:
            total = total + branch
        own = state[FED:] if self.connection.config.fed else state
        self.log.summed(self.site, x, total, out, self.connection.depth_weights(x, total, *own))
        return out, left

    def branch(self, f: Tensor) -> Tensor:
        term = super().branch(f)
        if not self.within:
            self.log.added(self.site, f, term)
        return term
