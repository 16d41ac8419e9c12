"""A small picture of a graph that knows neither torch nor ONNX: values in topological order, each with its role.

The detector sees this and nothing else, so that one definition of a residual connection serves every source of graphs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import networkx

Shape = tuple[int | str, ...]

_UNBACKED = re.compile(r"\bu\d+\b")


def one_shape(left: Shape | None, right: Shape | None) -> bool:
    """Whether two tensors that are added have one shape.

    A size that torch knows only when the model runs ("u0") is whatever it is added to: a sum with another size would fail there. Beside a
    1 it may be a broadcast.
    """
    if left == right or left is None or right is None:
        return left == right
    return len(left) == len(right) and all(
        a == b or (1 not in (a, b) and any(isinstance(size, str) and _UNBACKED.search(size) for size in (a, b)))
        for a, b in zip(left, right, strict=True)
    )


def perhaps_equal(shapes: Sequence[tuple[int | str, ...]]) -> bool:
    """Whether shapes that differ as written may be one shape in every run: they differ in open sizes only. A 1 is no open size."""
    return len({len(shape) for shape in shapes}) == 1 and all(
        len(sizes := set(pair)) == 1 or (1 not in sizes and sum(isinstance(size, int) for size in sizes) < 2)
        for pair in zip(*shapes, strict=True)
    )


class Role(Enum):
    """What an op does to the elements of its operands."""

    SOURCE = "source"  #: no operands: a model input, a parameter, a constant
    TRANSPARENT = "transparent"  #: changes view, layout, dtype or memory only, or scales by a constant
    SLICE = "slice"  #: takes a part of its operand
    POINTWISE = "pointwise"  #: combines elements at the same position only
    MIXING = "mixing"  #: combines elements across positions or channels
    SUM = "sum"  #: adds tensors


@dataclass(frozen=True, slots=True)
class OpKind:
    """One row of a dialect's table.

    Attributes:
        role: what the op does.
        linear: a linear function of its data operand.
        wide: combines several positions by weights (a 3x3 convolution); a shortcut does that only where it changes the shape.
        norm: a normalisation; a stream passes through it.
        scaleless: a factor on its operand makes no difference, its epsilon aside; not where it divides by what it was trained on.
        gated: a sum whose operands are weighted by tensors (lerp, addcmul).
        enclosed: a sum in a subgraph that is not read, which is listed and left alone.
        upsample: enlarges positions; marks a lateral sum.
        softmax: turns attention scores into weights; a sum that only this reads is a bias on scores.
        attends: is a whole attention, from queries, keys and values on.
        routes: chooses the experts of a position.
        pools: takes the mean or the largest of neighbouring positions.
        cut: no gradient passes from the result to the operands (detach, rounding, an index).
        product: multiplies tensors, one of which may be a parameter.
        noise: draws numbers.
        subtracts: takes the second operand from the first, or the first from the second.
        axis: the feature axis that reading a value through this op implies, counted on that value's dimensions.
        vote: how much that implication weighs.
    """

    role: Role
    linear: bool = False
    wide: bool = False
    norm: bool = False
    scaleless: bool = False
    gated: bool = False
    enclosed: bool = False
    upsample: bool = False
    softmax: bool = False
    attends: bool = False
    routes: bool = False
    pools: bool = False
    cut: bool = False
    product: bool = False
    noise: bool = False
    subtracts: bool = False
    axis: int | None = None
    vote: int = 0


@dataclass(slots=True)
class Value:
    """One value of the graph.

    Attributes:
        index: position in topological order, and its identity.
        name: its name in the source graph.
        op: the op's name in the table of its dialect.
        kind: that table's row, specialised to this use.
        inputs: the tensor operands, in order.
        shape: sizes: an int; the name of a size that the model's inputs leave open, or an expression over such names; or "?" and a number,
            a size that nobody knows, which may equal any other. None where even their number is unknown.
        floating: whether the elements are floating-point numbers.
        data: whether the value depends on a model input, not on parameters, constants and shapes alone.
        axes: for a transparent op, the operand's dimension behind each dimension of the result, None where lost.
        owner: module path of the op.
        owner_class: name of that module's class, where the graph says so.
        where: "file:line" of the op, or "".
        trace: the calls that led to it, in the words of the source graph, or ""; the same for every turn of a loop.
        run: in which call of its owner the op ran, from 0, where the graph says so.
        call: index of the recorded call in the capture, None where there is none.
        existing: the op lies inside a LAuReL module that the model already had.
        recorded: the op runs where gradients are recorded, not under no_grad.
        weights: names of the parameters that it is, or that its op reads without operands, as a module does.
        room: path of the subgraph of control flow that it lies in (`graph.rooms`); "" in the graph itself.
    """

    index: int
    name: str
    op: str
    kind: OpKind
    inputs: tuple[int, ...] = ()
    shape: tuple[int | str, ...] | None = None
    floating: bool = False
    data: bool = False
    axes: tuple[int | None, ...] | None = None
    owner: str = ""
    owner_class: str = ""
    where: str = ""
    trace: str = ""
    run: int = 0
    call: int | None = None
    existing: bool = False
    recorded: bool = True
    weights: tuple[str, ...] = ()
    room: str = ""

    @property
    def role(self) -> Role:
        return self.kind.role


@dataclass
class Dataflow:
    """The values of one graph, in topological order: `values[i].index == i` and operands come first.

    `outputs` are the graph's results, and what its inputs and buffers hold at the end where they were written into. `deployed` is a graph that
    may be the deployed half of a trained model, whose results need not be those that it learned from. Where two graphs lie in it, those of a
    model's two modes, nothing leads from one to the other, and the second begins at `second`. `zeros` are the names of parameters that are 0
    everywhere and stand in several places: exporters share equal constants, as biases are at their start. Rooms lie in it beside the graph;
    `borders` has for an input of one, and for a result of control flow, what it is on the other side, `opened` for the ops that they belong to
    what they give.
    """

    values: list[Value] = field(default_factory=list)
    outputs: set[int] = field(default_factory=set)
    deployed: bool = False
    second: int | None = None
    zeros: set[str] = field(default_factory=set)
    borders: dict[int, list[int]] = field(default_factory=dict)
    opened: dict[int, list[int]] = field(default_factory=dict)

    def graph_of(self, index: int) -> list[Value]:
        """The values of the graph that one of them lies in."""
        if self.second is None:
            return self.values
        return self.values[self.second :] if index >= self.second else self.values[: self.second]

    def add(self, name: str, op: str, kind: OpKind, inputs: Sequence[int] = (), **attributes: object) -> Value:
        """Append a value whose operands are already there."""
        value = Value(len(self.values), name, op, kind, tuple(inputs), **attributes)  # type: ignore[arg-type]  # checked by Value's fields
        self.values.append(value)
        return value

    def join(self, index: int, others: Iterable[int]) -> None:
        """A value is these, on the other side of a room's border."""
        self.borders.setdefault(index, []).extend(others)

    @cached_property
    def readers(self) -> list[list[int]]:
        """For each value, the values that read it, each once."""
        readers: list[list[int]] = [[] for _ in self.values]
        for value in self.values:
            for operand in set(value.inputs):
                readers[operand].append(value.index)
        return readers

    @cached_property
    def live(self) -> frozenset[int]:
        """The values that an output depends on; what inputs and buffers hold at the end is an output too."""
        return self._ancestors(self._last)

    @cached_property
    def learning(self) -> frozenset[int]:
        """The live values that a gradient reaches from an output; all of them in a graph whose outputs have none at all."""
        found = self._ancestors([i for i in self._last if self.values[i].floating], graded=True)
        graded = any(self.values[i].inputs and self.values[i].data and not self.values[i].kind.cut for i in found)
        return found if graded and not self.deployed else self.live

    @property
    def _last(self) -> list[int]:
        """The outputs of the graph itself; what a room gives counts where its op does."""
        return [index for index in self.outputs if not self.values[index].room]

    def _ancestors(self, indices: Iterable[int], *, graded: bool = False) -> frozenset[int]:
        """These values and what they are computed from; `graded`: by ways that gradients go back."""
        found = set(indices)
        stack = list(found)
        while stack:
            value = self.values[stack.pop()]
            inside = self.opened.get(value.index, ())
            for operand in () if graded and value.kind.cut else (*value.inputs, *inside) if inside else value.inputs:
                if operand not in found:
                    found.add(operand)
                    stack.append(operand)
        return frozenset(found)

    def check(self) -> None:
        """Raise ValueError unless operands precede their readers and indices are positions."""
        for position, value in enumerate(self.values):
            if value.index != position or any(not 0 <= operand < position for operand in value.inputs):
                raise ValueError(f"value {value.name} at {position} breaks the topological order")

    def to_networkx(self) -> networkx.DiGraph:
        """The graph with an edge from operand to reader; each node holds its `Value` under "value"."""
        import networkx as nx

        graph = nx.DiGraph()
        graph.add_nodes_from((value.index, {"value": value}) for value in self.values)
        graph.add_edges_from((operand, value.index) for value in self.values for operand in value.inputs)
        return graph
