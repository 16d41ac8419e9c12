"""What the branch of a site is: its role, what it reads, the linear maps that it is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from laurel_rewrite.detection.site import Site
from laurel_rewrite.detection.ways import ahead, behind, statistics
from laurel_rewrite.graph.dataflow import Dataflow, Role

PROJECTIONS = ("q", "k", "v")


@dataclass(frozen=True)
class LinearMap:
    """A linear map over the features in a branch.

    Attributes:
        value: name of the value in the graph that it gives.
        weights: names of its parameters: the weight, and the bias that is added to it; empty where they are not known.
        projection: which of "q", "k" and "v" it makes for an attention ("qkv" where it makes all); "" for none.
        last: a factor on it is one on the branch.
    """

    value: str
    weights: tuple[str, ...]
    projection: str
    last: bool


class Branch:
    """One branch.

    Args:
        flow: in which it lies.
        owner: path of the module whose code computed a value of it.
        site: whose branch it is.
        inside: the values between where it leaves the stream and the sum, these included, in topological order.
    """

    def __init__(self, flow: Dataflow, owner: Callable[[int], str], site: Site, inside: list[int]) -> None:
        self.site, self.source, self.inside = site, inside[0], inside
        self.flow, self.values, self.owner = flow, flow.values, owner
        self.members = set(inside)
        self.shape = self.values[self.source].shape or ()
        self.feature = len(self.shape) - 1 if site.axis == -1 else site.axis
        self.axes = self._follow_axes()
        self.statistics = statistics(self.flow, self.inside, site.axis)
        self.attention = self._attention()
        self.role, deciding = self._role()
        self.evidence = self._evidence(deciding)
        self.reads, self.normed = self._entry()
        self.makes = self._made()

    def _evidence(self, deciding: Sequence[int]) -> str:
        words = [f"{self.values[i].op} in {owner}" if (owner := self.owner(i)) else self.values[i].op for i in deciding]
        return ", ".join(dict.fromkeys(words))

    def _follow_axes(self) -> dict[int, tuple[int | None, ...]]:
        """Which dimension of the stream each dimension of a value is, for as long as that is known."""
        axes: dict[int, tuple[int | None, ...]] = {self.source: tuple(range(len(self.shape)))}
        for i in self.inside[1:]:
            value = self.values[i]
            before = next((o for o in value.inputs if o in axes and o in self.members), None)
            if before is None or value.shape is None:
                continue
            known = axes[before]
            if value.role is Role.TRANSPARENT:
                if value.axes is not None:
                    axes[i] = tuple(known[a] if a is not None and a < len(known) else None for a in value.axes)
            elif len(value.shape) == len(known):
                axes[i] = known
        return axes

    def _attention(self) -> tuple[int, ...]:
        """The ops that mix positions by weights computed from data: one, or a softmax between two products."""
        for i in self.inside:
            value = self.values[i]
            if value.kind.attends:
                return (i,)
            if value.kind.softmax:
                read = [j for j in ahead(self.flow, i) if j in self.members and self._is_product(j)]
                scores = next((j for j in behind(self.flow, i) if j in self.members and self._is_product(j)), None)
                if read and scores is not None:
                    return (scores, i, read[0])
        return ()

    def _is_product(self, index: int) -> bool:
        """Whether a value is a product of two tensors that both depend on data."""
        value = self.values[index]
        return value.role is Role.MIXING and not value.kind.softmax and sum(self.values[o].data for o in value.inputs) >= 2

    def _role(self) -> tuple[str, Sequence[int]]:
        """The branch's role, and the values that say so."""
        if self.attention:
            return "attention", self.attention
        mixing = [i for i in self.inside[1:] if self.values[i].role is Role.MIXING and not self.values[i].kind.norm]
        mixing = [i for i in mixing if i not in self.statistics]
        wide = [i for i in mixing if self.values[i].kind.wide and self.values[i].kind.axis is not None]
        products = [i for i in mixing if self._is_product(i) and not self.values[i].kind.linear]
        if wide and not products:
            return "convolution", wide[:1]
        features = [i for i in mixing if self._over_features(i)]
        positions = products + [i for i in mixing if i not in set(features)] + [i for i in self.inside[1:] if self._takes_positions(i)]
        if any(self.values[i].kind.routes for i in mixing):
            return ("feed-forward", features[:2]) if features else ("unknown", ())
        if positions:
            return "mixer", positions[:1]
        return ("feed-forward", features[:2]) if features else ("unknown", ())

    def _takes_positions(self, index: int) -> bool:
        """Whether a value is a part of another along the positions: a recurrence written out, a shift of tokens."""
        value = self.values[index]
        operand = self.values[value.inputs[0]] if value.inputs else value
        if value.role is not Role.SLICE or value.shape is None or operand.shape is None or operand.index not in self.axes:
            return False
        known = self.axes[operand.index]
        if len(value.shape) < len(operand.shape):  # one position, where the features are left whole
            return known[-1] == self.feature and value.shape[-1] == operand.shape[-1]
        return any(a != b and of not in (self.feature, None) for of, a, b in zip(known, value.shape, operand.shape, strict=False))

    def _over_features(self, index: int) -> bool:
        """Whether a linear op combines features alone."""
        value = self.values[index]
        if value.kind.axis is None or not value.kind.linear or value.kind.upsample or value.kind.pools:
            return False
        operand = next((o for o in value.inputs if o in self.members), None)
        known = self.axes.get(operand) if operand is not None else None
        if known is None or len(known) <= max(value.kind.axis, -value.kind.axis - 1):
            return True  # behind a reshape: rows of features, as far as can be seen
        return known[value.kind.axis] in (self.feature, None)

    def _entry(self) -> tuple[int, bool]:
        """The last single value, in the stream's own form, that all of the branch goes through before its first mixing op that is no norm."""
        entry, normed = self.source, False
        passed = False  # a norm since the source
        farthest = self.source
        readers = self.flow.readers
        identity = tuple(range(len(self.shape)))
        for i in self.inside:
            value = self.values[i]
            if i != self.source:
                if value.role is Role.MIXING and not value.kind.norm and i not in self.statistics:
                    break
                if value.role is Role.SLICE or (value.role is Role.SUM and sum(o in self.members for o in value.inputs) > 1):
                    break
                passed = passed or value.kind.norm or i in self.statistics
                if farthest <= i and value.shape == self.shape and self.axes.get(i) == identity:
                    entry, normed = i, passed
            farthest = max([farthest, *(r for r in readers[i] if r in self.members)])
        return entry, normed

    def projections(self) -> tuple[str, ...]:
        """The modules of q, k and v, where three linear maps make them."""
        maps = {made: self.owner(index) for index, made in self.makes.items()}
        return tuple(maps[name] for name in PROJECTIONS) if set(maps) == set(PROJECTIONS) else ()

    def _made(self) -> dict[int, str]:
        """Which of q, k and v linear maps of the branch make."""
        if not self.attention:
            return {}
        if len(self.attention) == 1:
            operands = list(self.values[self.attention[0]].inputs[:3])
        else:
            scores, softmax, read = (self.values[i] for i in self.attention)
            weights = {softmax.index, *ahead(self.flow, softmax.index)}
            operands = [*scores.inputs[:2], *(o for o in read.inputs[:2] if o not in weights)][:3]
        made: dict[int, str] = {}
        for name, operand in zip(PROJECTIONS, operands, strict=False):
            index = self._map_behind(operand)
            if index is not None:
                made[index] = made.get(index, "") + name
        return made

    def _is_map(self, index: int) -> bool:
        """Whether a value is a linear map over the features."""
        value = self.values[index]
        return value.role is Role.MIXING and value.kind.linear and value.kind.axis is not None and not value.kind.norm

    def maps(self) -> list[LinearMap]:
        """The linear maps of the branch."""
        last = self._ends()
        return [
            LinearMap(self.values[index].name, self._weights(index), self.makes.get(index, ""), index in last)
            for index in self.inside[1:]
            if index in last or self._is_map(index)
        ]

    def _weights(self, index: int) -> tuple[str, ...]:
        """Parameters of a map: what it reads beside data, by views alone, and what is added to it alone."""
        found = [*self.values[index].weights, *self._parameters(index)]
        if self.values[index].kind.norm:
            return tuple(found[:2])  # in a graph without modules, its statistics follow
        while len(readers := [r for r in self.flow.readers[index] if r in self.members]) == 1:
            index = readers[0]
            value = self.values[index]
            if value.role is Role.SUM and sum(self.values[o].data for o in value.inputs) == 1:
                found += self._parameters(index)
            elif value.role is not Role.TRANSPARENT:
                break
        return tuple(dict.fromkeys(found))

    def _is_bias(self, index: int, data: Sequence[int]) -> bool:
        """Whether all that a sum adds to data is known as a part of one map."""
        below = data[0] if len(data) == 1 else self.source
        while below in self.members and below != self.source and not self._is_map(below):
            value = self.values[below]
            operands = [o for o in value.inputs if self.values[o].data]
            if value.role not in (Role.TRANSPARENT, Role.SUM) or len(operands) != 1:
                return False
            below = operands[0]
        added = [o for o in self.values[index].inputs if not self.values[o].data]
        found = self._parameters(index)
        return self._is_map(below) and len(found) == len(added) and set(found) <= set(self._weights(below))

    def _parameters(self, index: int) -> list[str]:
        found: list[str] = []
        for operand in self.values[index].inputs:
            value = self.values[operand]
            while value.role is Role.TRANSPARENT and not value.data and len(value.inputs) == 1:
                value = self.values[value.inputs[0]]
            found += value.weights if not value.data else ()
        return found

    def _ends(self) -> set[int]:
        """The maps of which the branch is a sum, each times a factor; for what is no such sum, the weights of a norm at its end."""
        scales: dict[int, bool] = {self.source: False}  # whether a factor on weights is one on the value
        steps: dict[int, list[int]] = {}  # from a value to those that its factor comes from
        for index in self.inside[1:]:
            value = self.values[index]
            data = [o for o in value.inputs if self.values[o].data]
            inner = bool(data) and all(scales.get(o, False) for o in data)
            own = bool(value.weights or self._parameters(index))
            whole = all(o in data or not self.values[o].floating for o in value.inputs)
            passes = value.role in (Role.TRANSPARENT, Role.SLICE)
            passes = passes or (value.kind.linear and not value.kind.norm and not self._is_map(index) and whole)
            passes = passes or (value.role is Role.SUM and (len(data) == len(value.inputs) or self._is_bias(index, data)))
            if value.role is Role.POINTWISE and value.kind.product and len(data) == 1:
                scales[index], steps[index] = inner or own, data if inner else []
            elif passes:
                scales[index], steps[index] = inner, data
            else:
                scales[index], steps[index] = own and (self._is_map(index) or value.kind.norm), []
        found: set[int] = set()
        seen: set[int] = set()
        stack = [self.inside[-1]] if scales.get(self.inside[-1]) else []
        while stack:
            index = stack.pop()
            if index not in seen:
                seen.add(index)
                stack += steps[index]
                found |= set() if steps[index] else {index}
        return found

    def _map_behind(self, operand: int) -> int | None:
        """The linear map of the branch's input that an operand comes from; None where there is none, or more than one."""
        found: set[int] = set()
        stack, seen = [operand], {operand}
        while stack:
            value = self.values[stack.pop()]
            if value.index not in self.members:
                continue
            if self._is_map(value.index):
                found.add(value.index)
                continue
            for o in value.inputs:
                if o not in seen:
                    seen.add(o)
                    stack.append(o)
        return found.pop() if len(found) == 1 else None
