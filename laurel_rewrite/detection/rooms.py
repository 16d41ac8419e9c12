"""Sites in the subgraphs of control flow: which of them are one connection, and which streams go on beyond their graph.

Each is a dataflow of its own, in which nothing else is looked at to find them (`graph.rooms`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from laurel_rewrite.detection.descent import Descent
from laurel_rewrite.detection.residuals import Residual
from laurel_rewrite.detection.streams import Place, stream_before
from laurel_rewrite.graph.dataflow import Dataflow


@dataclass
class Calls:
    """Which sites of different graphs are calls of one: those whose branches are the same ops of the same parameters, such as those of a module
    that both sides of a condition call. What one graph runs several times, its own lines tell apart."""

    flow: Dataflow
    descent: Descent = field(init=False)
    known: dict[Hashable, tuple[str, list[Any]]] = field(default_factory=dict)
    seen: Counter[Hashable] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.descent = Descent(self.flow)
        self.rooms = any(value.room for value in self.flow.values)

    def first(self, residual: Residual, place: Place, name: Any) -> Any:
        """The name of the site that this one calls again; else `name`, which is kept for others."""
        what = self._what(residual, place) if self.rooms else None
        if what is None:
            return name
        room = self.flow.values[residual.output].room
        turn = self.seen[what, room]
        self.seen[what, room] += 1
        first, names = self.known.setdefault(what, (room, []))
        if first == room:
            names.append(name)
        return names[turn] if turn < len(names) else name

    def _what(self, residual: Residual, place: Place) -> Hashable | None:
        """What a connection computes, less its inputs; None where its branch reads no parameter."""
        values = self.flow.values
        inside = {i for branch in residual.branches for i in self.descent.between(residual.source, branch)} - {residual.source}
        read = sorted(w for i in inside for o in values[i].inputs for w in self._weights(o))
        ops = Counter(values[i].op for i in inside)
        sides = tuple(side for _, side in residual.adds)
        return (residual.kind, place.axis, place.dim, sides, tuple(read), tuple(sorted(ops.items()))) if read else None

    def _weights(self, index: int) -> Iterable[str]:
        """The parameters that a value is made of, where it is made of no data."""
        stack = [] if self.flow.values[index].data else [index]
        for i in stack:  # grows
            yield from self.flow.values[i].weights
            stack += self.flow.values[i].inputs


def crossings(flow: Dataflow, residuals: Sequence[Residual], places: Sequence[Place]) -> dict[tuple[int, int], tuple[int, int]]:
    """Streams that are one but for the border of a subgraph between them, each pair with the positions of two residual connections, the first of
    which is the state that the second adds to. A loop's own stream may go on in its next turn."""
    found: dict[tuple[int, int], tuple[int, int]] = {}
    by_output = {residual.output: position for position, residual in enumerate(residuals)}
    beyond = _Beyond(flow, by_output)
    for position, residual in enumerate(residuals if flow.borders else ()):
        if places[position].index == 0:
            for before in beyond.of(residual):
                found.setdefault((places[before].stream, places[position].stream), (before, position))
    return found


class _Beyond:
    def __init__(self, flow: Dataflow, by_output: dict[int, int]) -> None:
        self.flow, self.by_output = flow, by_output

    def of(self, residual: Residual) -> list[int]:
        """The connections that a site adds to, beyond the borders of its graph."""
        found: dict[int, None] = {}
        seen: set[int] = set()
        stack = [residual.skip]
        while stack:
            before, stop = stream_before(self.flow, stack.pop(), self.by_output)
            if before is not None:
                found[before] = None
            for other in self._others(stop):
                if other not in seen:
                    seen.add(other)
                    stack.append(other)
        return [*found]

    def _others(self, index: int) -> list[int]:
        shape = self.flow.values[index].shape
        return [other for other in self.flow.borders.get(index, ()) if shape is None or self.flow.values[other].shape in (shape, None)]
