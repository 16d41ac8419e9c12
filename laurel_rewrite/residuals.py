"""z = x + f(x): find every residual connection of a dataflow, and say of every other sum why it is none.

A sum is a residual connection when one operand, the skip, followed back through transparent ops reaches a value c, and c is an
ancestor of another operand through a path with at least one mixing op. Two operands that descend from a nearest common ancestor,
one by linear ops only and the other through a non-linearity, are a projection shortcut.

Topological order bounds every search: an ancestor of a value comes before it, and nothing before c descends from c. So the walk
back from an operand visits the branch and nothing else, and the time is near-linear in the size of the graph.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from laurel_rewrite.dataflow import Dataflow, Role, Value

_PLAIN, _MIXED = 1, 2  # bits: reached without, with a mixing op on the way


@dataclass(frozen=True)
class Residual:
    """One residual connection.

    Attributes:
        output: the sum's result.
        skip: the operand that carries the stream.
        branches: the other operands.
        adds: the binary sums on the way from the skip to the output, each with the operand (0 or 1) that holds the skip.
        kind: "identity", "projection" or "partial".
        source: c, where skip and branch part.
    """

    output: int
    skip: int
    branches: tuple[int, ...]
    adds: tuple[tuple[int, int], ...]
    kind: str
    source: int


@dataclass(frozen=True)
class Refusal:
    """A sum that is no residual connection: a reason from a fixed list, and the particulars."""

    output: int
    reason: str
    detail: str


def find_residuals(flow: Dataflow) -> tuple[list[Residual], list[Refusal]]:
    """All residual connections in topological order, and a refusal for every other sum."""
    return _Finder(flow).find()


class _Finder:
    def __init__(self, flow: Dataflow) -> None:
        self.flow = flow
        self.values = flow.values
        self.inner = {v.index for v in self.values if self._is_sum(v) and self._folds(v)}

    def find(self) -> tuple[list[Residual], list[Refusal]]:
        residuals: list[Residual] = []
        refusals: list[Refusal] = []
        for value in self.values:
            if value.kind.gated and value.data:
                refusals.append(Refusal(value.index, "gated", f"{value.op} weights its operands by tensors"))
            elif value.role is Role.SUM and value.index not in self.inner:
                verdict = self._judge(value) if self._is_sum(value) else self._not_a_sum(value)
                (residuals if isinstance(verdict, Residual) else refusals).append(verdict)  # type: ignore[arg-type]  # by its class
        return residuals, refusals

    # Sums

    def _is_sum(self, value: Value) -> bool:
        operands = [self.values[i] for i in value.inputs]
        return (
            value.role is Role.SUM
            and value.floating
            and len(operands) >= 2
            and all(o.data and o.floating and o.shape == value.shape for o in operands)
        )

    def _folds(self, value: Value) -> bool:
        """Whether the sum is an inner part of one larger sum."""
        readers = self.flow.readers[value.index]
        if value.index in self.flow.outputs or len(readers) != 1:
            return False
        reader = self.values[readers[0]]
        return self._is_sum(reader) and reader.inputs.count(value.index) == 1

    def _leaves(self, index: int) -> Iterator[tuple[int, tuple[tuple[int, int], ...]]]:
        """Each operand of the n-ary sum, with the binary sums from it outwards."""
        stack: list[tuple[int, tuple[tuple[int, int], ...]]] = [(index, ())]
        while stack:
            node, path = stack.pop()
            for side, operand in reversed(list(enumerate(self.values[node].inputs))):
                step = ((node, side), *path)
                if operand in self.inner:
                    stack.append((operand, step))
                else:
                    yield operand, step

    def _not_a_sum(self, value: Value) -> Refusal:
        shapes = " + ".join(_shape(self.values[i]) for i in value.inputs)
        if not value.floating:
            return Refusal(value.index, "integer", f"{shapes}: not floating-point numbers")
        if len(value.inputs) < 2:
            return Refusal(value.index, "scalar", f"{shapes} + a number")
        fixed = [self.values[i] for i in value.inputs if not self.values[i].data]
        if fixed:
            return Refusal(
                value.index,
                "not data-dependent",
                f"{shapes}: {fixed[0].name} comes from parameters or constants (a bias, a position table)",
            )
        if any(self.values[i].shape != value.shape for i in value.inputs):
            return Refusal(value.index, "broadcast", f"{shapes}: the operands have different shapes (a mask, an embedding)")
        return Refusal(value.index, "unknown shape", f"{shapes}: shapes are not known")

    # Verdicts

    def _judge(self, value: Value) -> Residual | Refusal:
        leaves = list(self._leaves(value.index))
        operands = [leaf for leaf, _ in leaves]
        where = " + ".join(_shape(self.values[i]) for i in operands)
        if value.existing:
            return Refusal(value.index, "existing LAuReL", f"{where}: inside a LAuReL block that the model has already")
        roots = [self._root(operand) for operand in operands]
        floor = min(roots)
        cones = [self._cone(operand, floor) for operand in operands]

        def descends(position: int, ancestor: int) -> int:
            return max((cones[p].get(ancestor, 0) for p in range(len(operands)) if p != position), default=0)

        identity = [p for p in range(len(operands)) if descends(p, roots[p]) & _MIXED]
        if identity:
            skip = max(identity, key=lambda p: roots[p])
            return self._residual(value, leaves, skip, "identity", roots[skip])
        if any(descends(p, roots[p]) for p in range(len(operands))):
            return Refusal(value.index, "pointwise", f"{where}: no mixing op between the operands (a gate, an activation)")
        partial = self._partial(operands)
        if partial is not None:
            return self._residual(value, leaves, partial[0], "partial", partial[1])
        return self._projection(value, leaves, operands, where)

    def _residual(self, value: Value, leaves: list[tuple[int, tuple[tuple[int, int], ...]]], skip: int, kind: str, source: int) -> Residual:
        branches = tuple(leaf for p, (leaf, _) in enumerate(leaves) if p != skip)
        return Residual(value.index, leaves[skip][0], branches, leaves[skip][1], kind, source)

    def _root(self, index: int) -> int:
        """The value behind an operand's transparent ops."""
        while self.values[index].role is Role.TRANSPARENT and self.values[index].inputs:
            index = self.values[index].inputs[0]
        return index

    def _cone(self, index: int, floor: int) -> dict[int, int]:
        """The data-dependent ancestors of a value down to position `floor`, with how each is reached."""
        reached = {index: _PLAIN}
        heap = [-index]
        while heap:
            node = -heapq.heappop(heap)
            bits = _MIXED if self.values[node].role is Role.MIXING else reached[node]
            for operand in self.values[node].inputs:
                if operand >= floor and self.values[operand].data:
                    if operand not in reached:
                        heapq.heappush(heap, -operand)
                        reached[operand] = 0
                    reached[operand] |= bits
        return reached

    def _partial(self, operands: list[int]) -> tuple[int, int] | None:
        """A skip that is a slice of what another operand reads whole: its position, and the whole."""
        for position, operand in enumerate(operands):
            index = operand
            sliced = False
            while self.values[index].role in (Role.TRANSPARENT, Role.SLICE) and self.values[index].inputs:
                sliced = sliced or self.values[index].role is Role.SLICE
                index = self.values[index].inputs[0]
            if not sliced:
                continue
            for other in operands:
                cone = self._cone(other, index) if other != operand else {}
                whole = [r for r in self.flow.readers[index] if r in cone and self.values[r].role is not Role.SLICE]
                if cone.get(index, 0) & _MIXED and whole:
                    return position, index
        return None

    def _projection(
        self, value: Value, leaves: list[tuple[int, tuple[tuple[int, int], ...]]], operands: list[int], where: str
    ) -> Residual | Refusal:
        if len(operands) != 2 or operands[0] == operands[1]:
            return Refusal(value.index, "no skip", f"{where}: no operand is an ancestor of another")
        ancestor = self._common_ancestor(*operands)
        if ancestor is None:
            return Refusal(value.index, "no common ancestor", f"{where}: the operands come from different inputs")
        cones = [self._cone(operand, ancestor) for operand in operands]
        if any(self.values[i].kind.upsample for cone in cones for i in cone):
            return Refusal(value.index, "lateral", f"{where}: one operand was upsampled (a feature pyramid or U-Net)")
        linear = [all(self._is_linear(self.values[i]) for i in cone if i != ancestor) for cone in cones]
        narrow = [not any(self.values[i].kind.wide for i in cone if i != ancestor) for cone in cones]
        # A second entry below the ancestor means that the operand is no function of the ancestor alone.
        closed = [self._closed(cone, ancestor) for cone in cones]
        for skip in (0, 1):
            if linear[skip] and narrow[skip] and not linear[1 - skip] and closed[skip] and cones[skip].get(ancestor, 0) & _MIXED:
                return self._residual(value, leaves, skip, "projection", ancestor)
        if all(linear):
            return Refusal(value.index, "both linear", f"{where}: both paths are linear (a low-rank delta, a re-parametrised convolution)")
        return Refusal(value.index, "no linear path", f"{where}: neither path is linear (experts, gates, sums of different streams)")

    def _common_ancestor(self, left: int, right: int) -> int | None:
        """The nearest: the latest value that both operands descend from."""
        colours = {left: 1, right: 2}
        heap = [-left, -right]
        while heap:
            node = -heapq.heappop(heap)
            if colours[node] == 3:
                return node
            for operand in self.values[node].inputs:
                if self.values[operand].data:
                    if operand not in colours:
                        heapq.heappush(heap, -operand)
                        colours[operand] = 0
                    colours[operand] |= colours[node]
        return None

    def _is_linear(self, value: Value) -> bool:
        return value.kind.linear or value.role in (Role.TRANSPARENT, Role.SLICE, Role.SUM)

    def _closed(self, cone: Iterable[int], ancestor: int) -> bool:
        return all(operand >= ancestor for i in cone if i != ancestor for operand in self.values[i].inputs if self.values[operand].data)


def _shape(value: Value) -> str:
    return "[" + ", ".join(map(str, value.shape)) + "]" if value.shape is not None else "[?]"
