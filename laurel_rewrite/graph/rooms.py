"""Rooms: the subgraphs of control flow, each of which is read as a dataflow of its own.

A room may run often, once or never. Its inputs are inputs of a graph: what is a residual connection of it is one in the room alone. What is told
of an op here, in the words of PyTorch's and of ONNX's graphs alike, is where each of them comes from, and what becomes of the results: what
depends on no data does not inside either, and whether a stream goes on beyond a room can be asked.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from laurel_rewrite.graph.dataflow import Dataflow, OpKind, Role, Shape

Graph = TypeVar("Graph")
Operand = TypeVar("Operand")
Other = TypeVar("Other")


@dataclass(frozen=True)
class Entry(Generic[Operand]):
    """What an input of a room is given.

    Attributes:
        operand: the value outside; None for what the op itself counts.
        sliced: a part of it, another one each turn.
        back: which result of the room it is given in the next turn, None where it is the same in each.
    """

    operand: Operand | None
    sliced: bool = False
    back: int | None = None

    def given(self, operand: Other | None) -> Entry[Other]:
        """The same in other words for the operand."""
        return Entry(operand, self.sliced, self.back)


@dataclass(frozen=True)
class Room(Generic[Graph, Operand]):
    """One subgraph of an op.

    Attributes:
        name: in the op: "true", "body".
        graph: what runs there.
        entries: for each of its inputs.
        exits: which of its results each result of the op is; None where it is none, or those of all turns together.
    """

    name: str
    graph: Graph
    entries: tuple[Entry[Operand], ...]
    exits: tuple[int | None, ...] = ()


def enter(flow: Dataflow, entry: Entry[int], name: str, room: str, shape: Shape | None, *, floating: bool) -> int:
    """The value that an input of a room is inside: that from outside where it depends on no data, else an input of its own."""
    outside = None if entry.operand is None else flow.values[entry.operand]
    fixed = outside is not None and not outside.data and entry.back is None
    if outside is not None and fixed and not entry.sliced:
        return outside.index
    made = flow.add(
        name, "input", OpKind(Role.SOURCE), shape=shape, floating=floating, data=not fixed, room=room, owner=room,
        weights=outside.weights if outside is not None and fixed else (),
    )  # fmt: skip
    if outside is not None and not entry.sliced:
        flow.join(made.index, [outside.index])
    return made.index


def leave(flow: Dataflow, ops: Iterable[int], entries: Iterable[tuple[Entry[int], int]], results: Iterable[int | None]) -> None:
    """What a room gives is read outside, as what its op gives, or in its next turn by the inputs (with their values) that are given it."""
    given = list(results)
    known = [index for index in given if index is not None]
    flow.outputs.update(known)
    for op in ops:
        flow.opened.setdefault(op, []).extend(known)
    for entry, inside in entries:
        back = given[entry.back] if entry.back is not None and entry.back < len(given) else None
        if back is not None:
            flow.join(inside, [back])
