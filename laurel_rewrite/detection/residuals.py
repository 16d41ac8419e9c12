"""z = x + f(x): find every residual connection of a dataflow, and say of every other sum why it is none.

A sum is a residual connection when one operand, the skip, followed back through transparent ops reaches a value c, and c is an
ancestor of another operand through a path with at least one mixing op. Two operands that descend from a nearest common ancestor,
one by linear ops only and the other through a non-linearity, are a projection shortcut.

Only what is learned counts: a sum that reaches no output is none, nor one that no gradient reaches, and a path on which no gradient passes (detach, rounding, an index)
is none, for a stream is what gradients flow through. So a straight-through estimator, z + (q - z).detach(), is none, and neither is
the embedding of a detached prediction. What runs under no_grad is judged as everything is, and then left alone: a frozen backbone has
residual connections, but LAuReL in it could not learn.

A sum of sums is one sum, and where a module returns a residual connection into the sum of another module, that one stands alone.

Topological order bounds every search: an ancestor of a value comes before it, and nothing before c descends from c. So the walk
back from an operand visits the branch and nothing else (`descent`), and the time is near-linear in the size of the graph.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from laurel_rewrite.detection.descent import CARRIED, CUT, MIXED, PLAIN, Descent, by, every, without
from laurel_rewrite.detection.lookalikes import Lookalikes
from laurel_rewrite.graph.dataflow import Dataflow, Role, Value, one_shape, perhaps_equal

_SHORTCUT = 64  # ops of a shortcut at most: the history of an unrolled linear recurrence is none
_Leaf = tuple[int, tuple[tuple[int, int], ...]]  # an operand of an n-ary sum, and the binary sums from it outwards


REASONS = {
    "identity": "x + f(x): the branch reads the skip's value through at least one mixing op",
    "projection": "the operands part at one value; the skip is computed from it by linear ops only, the branch through a non-linearity",
    "partial": "the skip is a slice of a value that the branch reads whole; listed, and rewritten only when a plan says so",
    "dead": "its result reaches no output, so that LAuReL there would never learn",
    "integer": "only floating-point numbers flow through residual connections; where a quantiser wrote sums of integers (QLinearAdd), give the "
    "file in QDQ format, or the one before",
    "scalar": "adding a number is no residual connection",
    "not data-dependent": "an operand that depends on no model input (a parameter, a buffer, a constant) is no stream",
    "broadcast": "the operands of a residual connection have one shape; a mask, a bias or an embedding is spread",
    "unknown shape": "without shapes a broadcast cannot be told from a residual connection",
    "open sizes": "the operands' sizes could not be shown equal: fix the open sizes of the graph, or give inputs that it runs with",
    "subtraction": "x - f(x): listed, and left as it is; written as x + (-f(x)) it would be a residual connection",
    "gated": "the operands are weighted by tensors, as in a gate",
    "subgraph": "it stands in a subgraph that is left alone: control flow in a model's own code (the graph of its export is rewritten there, too), the "
    "condition of a loop, a loop whose state changes its shape, a subgraph that several ops run, or an op that is no If, Loop, Scan, cond, while_loop or map",
    "existing LAuReL": "in, or with the result of, a LAuReL block that the model has already",
    "no gradient": "a residual connection where no gradient is recorded (torch.no_grad), or from which none reaches an output (detach, argmax), "
    "so that LAuReL there could not learn",
    "detached": "an operand is computed from the other, but no gradient passes (detach, rounding, an index): "
    "a straight-through estimator, an embedding of detached values",
    "attention bias": "one operand is a product of queries and keys, and a softmax reads the sum",
    "pointwise": "one operand is computed from the other, but nothing on the way mixes positions or channels: an activation, a gate",
    "scaled residual": "x * w + f(x): the skip is multiplied by a learned tensor, so that it is no skip",
    "gated residual": "x * g + f(x): the skip is multiplied by a tensor that is computed from data (a gate, as in highways and GRUs)",
    "mixed residual": "the skip is mixed with other streams, by weights that are computed from data (hyper-connections)",
    "no skip": "no operand of the sum is an ancestor of another",
    "no common ancestor": "the operands come from different model inputs",
    "lateral": "one operand was upsampled: a feature pyramid or a U-Net joins different streams",
    "both linear": "the operands part at one value and both are linear in it: a low-rank delta, a re-parametrised convolution",
    "modulated": "the operands part at one value, but the branch is a product of independent tensors: a sample (mean + scale * noise), "
    "a modulation, a gate",
    "no linear path": "no operand is an ancestor of the other, and neither is linear in a value that both descend from: experts, gates",
}
"""Kind of a site, or reason why a sum is none -> the part of the definition that decides, in words."""


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
    """A sum that is no residual connection: the sum and its operands, a reason from `REASONS`, and the particulars."""

    output: int
    operands: tuple[int, ...]
    reason: str
    detail: str


def find_residuals(flow: Dataflow) -> tuple[list[Residual], list[Refusal]]:
    """All residual connections in topological order, and a refusal for every other sum."""
    return _Finder(flow).find()


class _Finder:
    def __init__(self, flow: Dataflow) -> None:
        self.flow = flow
        self.values = flow.values
        self.descent = Descent(flow)
        self.lookalikes = Lookalikes(flow, self.descent)
        self.whole: dict[int, list[int]] = {}  # sliced value -> what reads it whole
        self.embedded: set[int] = set()  # what is computed from detached values and was added to the stream they come from
        self.inputs = self._inputs()
        self.inner: set[int] = set()
        for value in self.values:
            if self._is_sum(value) and self._folds(value):
                self.inner.add(value.index)

    def find(self) -> tuple[list[Residual], list[Refusal]]:
        residuals: list[Residual] = []
        refusals: list[Refusal] = []
        for value in self.values:
            verdict = self._verdict(value)
            if isinstance(verdict, Residual):
                residuals.append(verdict)
            elif verdict is not None:
                refusals.append(verdict)
        return residuals, refusals

    def _verdict(self, value: Value) -> Residual | Refusal | None:
        """On a value that adds, or looks like it; None for the others, and for the inner part of a larger sum."""
        if value.kind.gated and value.data:
            return Refusal(value.index, value.inputs, "gated", f"{value.op} weights its operands by tensors")
        if value.kind.enclosed:
            return Refusal(value.index, (), "subgraph", REASONS["subgraph"])
        if value.kind.subtracts and self._adds_data(value):
            verdict = self._judge(value)
            if isinstance(verdict, Refusal) or verdict.kind != "identity":
                return None
            return Refusal(value.index, value.inputs, "subtraction", f"{_shapes(self.values, value.inputs)}: {REASONS['subtraction']}")
        if value.role is not Role.SUM or value.index in self.inner:
            return None
        return self._judge(value) if self._is_sum(value) else self._not_a_sum(value)

    # Sums

    def _is_sum(self, value: Value) -> bool:
        return value.role is Role.SUM and self._adds_data(value)

    def _adds_data(self, value: Value) -> bool:
        operands = [self.values[i] for i in value.inputs]
        return (
            value.floating
            and value.shape is not None
            and len(operands) >= 2
            and all(o.data and o.floating and one_shape(o.shape, value.shape) for o in operands)
        )

    def _folds(self, value: Value) -> bool:
        """Whether the sum is an inner part of one larger sum."""
        readers = self.flow.readers[value.index]
        if value.index in self.flow.outputs or len(readers) != 1:
            return False
        reader = self.values[readers[0]]
        if not (self._is_sum(reader) and reader.inputs.count(value.index) == 1 and reader.existing == value.existing):
            return False
        return reader.owner == value.owner or not self._stands_alone(value)

    def _stands_alone(self, value: Value) -> bool:
        """Whether a sum that another module adds to is a residual connection without what is added there."""
        verdict = self._judge(value)
        return isinstance(verdict, Residual) and verdict.kind == "identity"

    def _leaves(self, index: int) -> Iterator[_Leaf]:
        """Each operand of the n-ary sum, with the binary sums from it outwards."""
        stack: list[_Leaf] = [(index, ())]
        while stack:
            node, path = stack.pop()
            for side, operand in reversed(list(enumerate(self.values[node].inputs))):
                step = ((node, side), *path)
                if operand in self.inner:
                    stack.append((operand, step))
                else:
                    yield operand, step

    def _not_a_sum(self, value: Value) -> Refusal:
        shapes = _shapes(self.values, value.inputs)
        fixed = [self.values[i] for i in value.inputs if not self.values[i].data]
        if any(self.values[i].shape is None for i in (value.index, *value.inputs)):
            reason, detail = "unknown shape", f"{shapes}: shapes are not known"
        elif not value.floating:
            reason, detail = "integer", f"{shapes}: not floating-point numbers"
        elif len(value.inputs) < 2:
            reason, detail = "scalar", f"{shapes} + a number"
        elif fixed:
            reason = "not data-dependent"
            detail = f"{shapes}: {fixed[0].name} comes from parameters or constants (a bias, a position table)"
        elif perhaps_equal([self.values[i].shape or () for i in (value.index, *value.inputs)]):
            reason, detail = "open sizes", f"{shapes}: {REASONS['open sizes']}"
        else:
            reason, detail = "broadcast", f"{shapes}: the operands have different shapes (a mask, an embedding)"
        return Refusal(value.index, value.inputs, reason, detail)

    def _inputs(self) -> list[int]:
        """For each value the model inputs that it descends from, as bits."""
        inputs: list[int] = []
        count = 0
        for value in self.values:
            mask = 0
            if value.data and not value.inputs:
                mask = 1 << count
                count += 1
            elif value.data:
                for operand in value.inputs:
                    mask |= inputs[operand]
            inputs.append(mask)
        return inputs

    # Verdicts

    def _judge(self, value: Value) -> Residual | Refusal:
        leaves = list(self._leaves(value.index))
        operands = [leaf for leaf, _ in leaves]

        def refuse(reason: str) -> Refusal:
            return Refusal(value.index, tuple(operands), reason, f"{_shapes(self.values, operands)}: {REASONS[reason]}")

        roots = [self.lookalikes.root(operand) for operand in operands]
        if value.existing or any(self.values[root].existing for root in roots):
            return refuse("existing LAuReL")
        if value.index not in self.flow.live:
            return refuse("dead")
        if self.lookalikes.biases_scores(value, operands):
            return refuse("attention bias")
        descent = self.descent.ways(roots, roots)
        others = [without(descent[root], position) for position, root in enumerate(roots)]
        mixed = every(MIXED, len(roots))
        identity = [position for position, ways in enumerate(others) if ways & mixed]
        if identity:
            skip = max(identity, key=lambda position: roots[position])
            if self._is_embedding(roots[skip]):
                return refuse("detached")
            return refuse("no gradient") if not self._learns(value) else self._residual(value, leaves, skip, "identity", roots[skip])
        if any(ways & every(PLAIN, len(roots)) for ways in others):
            return refuse("pointwise")
        verdict = self._of_parts(operands)
        if not isinstance(verdict, str):
            kind, skip, source = verdict
            return refuse("no gradient") if not self._learns(value) else self._residual(value, leaves, skip, kind, source)
        behind = {roots[start] for ways in others for start in by(ways, CUT)}
        if behind:
            self.embedded |= behind
            return refuse("detached")
        return refuse(self.lookalikes.near_miss(operands) or verdict)

    def _learns(self, value: Value) -> bool:
        return value.recorded and value.index in self.flow.learning

    def _of_parts(self, operands: list[int]) -> tuple[str, int, int] | str:
        """Where no operand is an ancestor of another: the kind, the position of the skip and where the operands part, or the reason."""
        partial = self._partial(operands)
        if partial is not None:
            return "partial", *partial
        if len(operands) != 2:
            return "no skip"
        projection = self._projection(*operands)
        return projection if isinstance(projection, str) else ("projection", *projection)

    def _is_embedding(self, index: int) -> bool:
        """Whether a value is made of detached values of a stream, and only ever added: a position embedding of detached boxes."""
        if index not in self.embedded:
            return False
        queue = [index]
        for view in queue:
            for reader in (self.values[i] for i in self.flow.readers[view] if i in self.flow.live):
                if reader.role is Role.TRANSPARENT:
                    queue.append(reader.index)
                elif reader.role is not Role.SUM:
                    return False
        return True

    def _residual(self, value: Value, leaves: list[_Leaf], skip: int, kind: str, source: int) -> Residual:
        branches = tuple(leaf for position, (leaf, _) in enumerate(leaves) if position != skip)
        return Residual(value.index, leaves[skip][0], branches, leaves[skip][1], kind, source)

    def _partial(self, operands: list[int]) -> tuple[int, int] | None:
        """A skip that is a slice of what another operand reads whole: its position, and the whole."""
        for position, operand in enumerate(operands):
            index = self.lookalikes.root(operand, (Role.TRANSPARENT, Role.SLICE))
            if index == self.lookalikes.root(operand):
                continue
            if index not in self.whole:
                self.whole[index] = [reader for reader in self.flow.readers[index] if self.values[reader].role is not Role.SLICE]
            whole = self.whole[index]
            for other in operands:
                if other != operand and whole:
                    descent = self.descent.ways([other], [index, *whole])
                    if descent[index] & MIXED and any(descent[reader] & CARRIED for reader in whole):
                        return position, index
        return None

    def _projection(self, left: int, right: int) -> tuple[int, int] | str:
        """The position of the skip and where skip and branch part, or the reason why there is no projection shortcut."""
        if not self.inputs[left] & self.inputs[right]:
            return "no common ancestor"
        for position, (skip, other) in enumerate(((left, right), (right, left))):
            source = self._shortcut(skip, other)
            if source is None:
                continue
            if source not in self.descent.between(source, other, upsampled=False):
                return "lateral"
            if all(
                self._is_linear(self.values[i]) or not self.values[i].inputs for i in self.descent.between(source, other) if i != source
            ):
                return "both linear"
            return "modulated" if self.lookalikes.modulates(other) else (position, source)
        return "no linear path"

    def _shortcut(self, skip: int, other: int) -> int | None:
        """The nearest value that both descend from, where `skip` is computed from it by linear ops alone, one of them mixing."""
        cuts: list[tuple[int, bool, bool]] = []  # values that `skip` is a function of, whether through a mixing op, through a wide one
        mixed = wide = False
        frontier = [-skip]
        for _ in range(_SHORTCUT):
            if not frontier:
                break
            value = self.values[-heapq.heappop(frontier)]
            if not frontier:
                cuts.append((value.index, mixed, wide))
            if not self._is_linear(value) or value.role is Role.SLICE:  # a slice of c is not c
                break
            mixed, wide = mixed or value.role is Role.MIXING, wide or value.kind.wide
            for operand in {i for i in value.inputs if self.values[i].data and -i not in frontier}:
                heapq.heappush(frontier, -operand)
        descent = self.descent.ways([other], [index for index, _, _ in cuts])
        source, mixed, wide = next((cut for cut in cuts if descent[cut[0]] & CARRIED), (skip, False, False))
        # A 3x3 convolution that keeps the shape adds what is near (a position encoding in attention); between stages it is a shortcut.
        near = wide and self.values[source].shape == self.values[skip].shape
        return source if mixed and not near else None

    def _is_linear(self, value: Value) -> bool:
        return not value.kind.cut and (value.kind.linear or value.role in (Role.TRANSPARENT, Role.SLICE, Role.SUM))


def _shapes(values: list[Value], operands: Iterable[int]) -> str:
    return " + ".join("[" + ", ".join(map(str, shape)) + "]" if (shape := values[i].shape) is not None else "[?]" for i in operands)
