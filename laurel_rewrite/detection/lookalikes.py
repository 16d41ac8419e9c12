"""What only looks like a residual connection: biases on attention scores, samples and modulations beside a shortcut, and the near misses
that people know by name, x * w + f(x)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

from laurel_rewrite.detection.descent import MIXED, Descent, by, without
from laurel_rewrite.graph.dataflow import Dataflow, Role, Value

_PASSING = (Role.TRANSPARENT, Role.SLICE, Role.POINTWISE)


class Lookalikes:
    """Questions about sums of one dataflow; what they need is computed once for all values, in linear time."""

    def __init__(self, flow: Dataflow, descent: Descent) -> None:
        self.flow = flow
        self.values = flow.values
        self.descent = descent

    def root(self, index: int, through: tuple[Role, ...] = (Role.TRANSPARENT,)) -> int:
        """The value behind an operand's transparent ops, as far as a gradient passes."""
        while (value := self.values[index]).role in through and value.inputs and not value.kind.cut:
            index = value.inputs[0]
        return index

    # Attention scores

    def biases_scores(self, value: Value, operands: Sequence[int]) -> bool:
        """Whether an operand is a product of two data-dependent values, and all that is read of the sum goes into a softmax."""
        return any(self._scores[operand] for operand in operands) and self._weighs[value.index]

    @cached_property
    def _scores(self) -> list[bool]:
        """For each value, whether it is a product of two data-dependent values, masked, scaled or biased."""
        scores: list[bool] = []
        for value in self.values:
            data = {i for i in value.inputs if self.values[i].data}
            if value.role is Role.MIXING:
                scores.append(len(data) > 1)
            else:
                passes = value.role in _PASSING or (value.role is Role.SUM and len(data) == 1)
                scores.append(passes and any(scores[i] for i in data))
        return scores

    @cached_property
    def _weighs(self) -> list[bool]:
        """For each value, whether a softmax reads it and, but for what reaches no output, nothing else does that mixes its elements."""
        weighs = [False] * len(self.values)
        for value in reversed(self.values):
            readers = [self.values[reader] for reader in self.flow.readers[value.index] if reader in self.flow.live]
            weighs[value.index] = bool(readers) and all(
                reader.kind.softmax or ((reader.role in _PASSING or reader.role is Role.SUM) and weighs[reader.index]) for reader in readers
            )
        return weighs

    # Samples and modulations

    def modulates(self, branch: int) -> bool:
        """Whether a branch is a product of two tensors, neither of which is computed from the other, or of data and noise."""
        value = self.values[self.root(branch)]
        if not value.kind.product:
            return False
        data = list(dict.fromkeys(i for i in value.inputs if self.values[i].data))
        if len(data) == 2:
            ways = self.descent.ways(data, data)
            return not any(without(ways[factor], position) for position, factor in enumerate(data))
        return any(self._noise[i] and self.values[i].shape == value.shape for i in value.inputs)

    @cached_property
    def _noise(self) -> list[bool]:
        """For each value, whether it is drawn and not computed from data. A mask of random bits is no noise: dropout, stochastic depth."""
        noise: list[bool] = []
        for value in self.values:
            passes = value.role in _PASSING and value.floating and not value.data
            noise.append(not value.data and (value.kind.noise or (passes and any(noise[i] for i in value.inputs))))
        return noise

    # Near misses

    def near_miss(self, operands: Sequence[int]) -> str | None:
        """The reason of a sum that would be a residual connection, were its skip not multiplied on the way."""
        for position, operand in enumerate(operands):
            others = [self.root(other) for place, other in enumerate(operands) if place != position]
            for reason, carrier in self._carriers(operand):
                if by(self.descent.ways(others, [carrier])[carrier], MIXED):
                    return reason
        return None

    def _carriers(self, operand: int) -> Iterator[tuple[str, int]]:
        """What an operand is a weighted form of, and how such a residual connection is called."""
        value = self.values[self.root(operand)]
        data = list(dict.fromkeys(i for i in value.inputs if self.values[i].data))
        if value.kind.cut:
            for origin in data:
                yield "detached", self.root(origin)
        if value.kind.product:
            for factor in data:
                yield "scaled residual" if len(data) == 1 else "gated residual", self.root(factor)
            return
        mixed = self.root(operand, (Role.TRANSPARENT, Role.SLICE))
        factors = [i for i in self.values[mixed].inputs if self.values[i].data]
        if self.values[mixed].role is not Role.MIXING or len(set(factors)) < 2:
            return
        if any(self.values[self.root(i)].kind.softmax for i in factors):  # attention
            return
        if mixed != value.index:
            yield "mixed residual", mixed
        for factor in factors:
            if self.values[factor].shape == value.shape:
                yield "mixed residual", self.root(factor)
