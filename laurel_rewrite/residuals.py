"""z = x + f(x): find every residual connection of a dataflow, and say of every other sum why it is none.

A sum is a residual connection when one operand, the skip, followed back through transparent ops reaches a value c, and c is an
ancestor of another operand through a path with at least one mixing op. Two operands that descend from a nearest common ancestor,
one by linear ops only and the other through a non-linearity, are a projection shortcut.

Topological order bounds every search: an ancestor of a value comes before it, and nothing before c descends from c. So the walk
back from an operand visits the branch and nothing else, and each walk spares the later ones what it has seen: the time is near-linear
in the size of the graph.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from laurel_rewrite.dataflow import Dataflow, Role, Value, perhaps_equal

_PLAIN, _MIXED, _EITHER = 1, 2, 3  # bits: reached without, with a mixing op on the way
_ENTRIES = 16  # a region with more ways out than this is walked each time
_SHORTCUT = 64  # ops of a shortcut at most: the history of an unrolled linear recurrence is none
_REACH = 16  # values followed from a sum of attention scores to the softmax
_Leaf = tuple[int, tuple[tuple[int, int], ...]]  # an operand of an n-ary sum, and the binary sums from it outwards


REASONS = {
    "identity": "x + f(x): the branch reads the skip's value through at least one mixing op",
    "projection": "the operands part at one value; the skip is computed from it by linear ops only, the branch through a non-linearity",
    "partial": "the skip is a slice of a value that the branch reads whole; listed, and rewritten only when a plan says so",
    "integer": "only floating-point numbers flow through residual connections; where a quantiser wrote sums of integers (QLinearAdd), give the "
    "file in QDQ format, or the one before",
    "scalar": "adding a number is no residual connection",
    "not data-dependent": "an operand that depends on no model input (a parameter, a buffer, a constant) is no stream",
    "broadcast": "the operands of a residual connection have one shape; a mask, a bias or an embedding is spread",
    "unknown shape": "without shapes a broadcast cannot be told from a residual connection",
    "open sizes": "the operands' sizes could not be shown equal: fix the open sizes of the graph, or give inputs that it runs with",
    "gated": "the operands are weighted by tensors, as in a gate",
    "subgraph": "it stands in the subgraph of an If, Loop or Scan, which is left alone",
    "existing LAuReL": "in, or with the result of, a LAuReL block that the model has already",
    "attention bias": "one operand is a product of queries and keys, and a softmax reads the sum",
    "pointwise": "one operand is computed from the other, but nothing on the way mixes positions or channels: an activation, a gate",
    "no skip": "no operand of the sum is an ancestor of another",
    "no common ancestor": "the operands come from different model inputs",
    "lateral": "one operand was upsampled: a feature pyramid or a U-Net joins different streams",
    "both linear": "the operands part at one value and both are linear in it: a low-rank delta, a re-parametrised convolution",
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
        self.inner = {v.index for v in self.values if self._is_sum(v) and self._folds(v)}
        self.jumps: dict[int, tuple[int, list[tuple[int, int]]]] = {}  # start -> lowest value passed, where the region is left and how
        self.whole: dict[int, list[int]] = {}  # sliced value -> what reads it whole
        self.inputs = self._inputs()

    def find(self) -> tuple[list[Residual], list[Refusal]]:
        residuals: list[Residual] = []
        refusals: list[Refusal] = []
        for value in self.values:
            if value.kind.gated and value.data:
                refusals.append(Refusal(value.index, value.inputs, "gated", f"{value.op} weights its operands by tensors"))
            elif value.kind.enclosed:
                refusals.append(Refusal(value.index, (), "subgraph", REASONS["subgraph"]))
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
            and value.shape is not None
            and len(operands) >= 2
            and all(o.data and o.floating and o.shape == value.shape for o in operands)
        )

    def _folds(self, value: Value) -> bool:
        """Whether the sum is an inner part of one larger sum."""
        readers = self.flow.readers[value.index]
        if value.index in self.flow.outputs or len(readers) != 1:
            return False
        reader = self.values[readers[0]]
        return self._is_sum(reader) and reader.inputs.count(value.index) == 1 and reader.existing == value.existing

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
        shapes = " + ".join(_shape(self.values[i]) for i in value.inputs)
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
        where = " + ".join(_shape(self.values[i]) for i in operands)

        def refuse(reason: str) -> Refusal:
            return Refusal(value.index, tuple(operands), reason, f"{where}: {REASONS[reason]}")

        roots = [self._root(operand) for operand in operands]
        if value.existing or any(self.values[root].existing for root in roots):
            return refuse("existing LAuReL")
        if self._biases_scores(value, operands):
            return refuse("attention bias")
        descent = self._descent(roots, roots)
        others = [descent[root] & ~(_EITHER << 2 * position) for position, root in enumerate(roots)]
        identity = [position for position, ways in enumerate(others) if _mixed(ways)]
        if identity:
            skip = max(identity, key=lambda position: roots[position])
            return self._residual(value, leaves, skip, "identity", roots[skip])
        if any(others):
            return refuse("pointwise")
        partial = self._partial(operands)
        if partial is not None:
            return self._residual(value, leaves, partial[0], "partial", partial[1])
        if len(operands) != 2:
            return refuse("no skip")
        projection = self._projection(*operands)
        if isinstance(projection, str):
            return refuse(projection)
        return self._residual(value, leaves, projection[0], "projection", projection[1])

    def _residual(self, value: Value, leaves: list[_Leaf], skip: int, kind: str, source: int) -> Residual:
        branches = tuple(leaf for position, (leaf, _) in enumerate(leaves) if position != skip)
        return Residual(value.index, leaves[skip][0], branches, leaves[skip][1], kind, source)

    def _root(self, index: int, through: tuple[Role, ...] = (Role.TRANSPARENT,)) -> int:
        """The value behind an operand's transparent ops."""
        while self.values[index].role in through and self.values[index].inputs:
            index = self.values[index].inputs[0]
        return index

    def _descent(self, starts: Sequence[int], targets: Iterable[int]) -> dict[int, int]:
        """For each target, how each start descends from it: two bits a start, `_PLAIN` and `_MIXED`, start 0 lowest.

        One walk back in reverse topological order, down to the lowest target. A walk leaves a jump at each start: what lies between
        the start and the floor is passed in one step by every later walk that looks for nothing in between. So nested regions and
        long-range sums (a U-Net, a tower beside a tower) are walked once, not once for each sum.
        """
        wanted = sorted(set(targets))
        floor = wanted[0]
        ways: dict[int, int] = {}
        heap: list[int] = []
        below: dict[int, int] = {}  # reached, but not walked through
        for position, start in enumerate(starts):
            if start not in ways:
                heapq.heappush(heap, -start)
            ways[start] = ways.get(start, 0) | _PLAIN << 2 * position
        plains = sum(_PLAIN << 2 * position for position in range(len(starts)))
        lowest = max(starts)
        while heap:
            node = -heapq.heappop(heap)
            reached = ways[node]
            while wanted and wanted[-1] >= node:
                wanted.pop()
            if node <= floor:
                below[node] = below.get(node, 0) | reached
                continue
            lowest = min(lowest, node)
            through = (reached & plains) << 1 | reached & (plains << 1)  # every way, now mixed
            jump = self.jumps.get(node)
            if jump is not None and (not wanted or wanted[-1] < jump[0]):
                lowest = min(lowest, jump[0])
                steps = [(entry, (reached if how & _PLAIN else 0) | (through if how & _MIXED else 0)) for entry, how in jump[1]]
            else:
                carried = through if self.values[node].role is Role.MIXING else reached
                steps = [(operand, carried) for operand in self.values[node].inputs if self.values[operand].data]
            for operand, carried in steps:
                if operand < floor:
                    below[operand] = below.get(operand, 0) | carried
                elif operand in ways:
                    ways[operand] |= carried
                else:
                    ways[operand] = carried
                    heapq.heappush(heap, -operand)
        for position, start in enumerate(starts):
            entries = [(entry, how) for entry, mask in below.items() if (how := mask >> 2 * position & _EITHER)]
            if start > floor and len(entries) <= _ENTRIES:
                self.jumps[start] = (lowest, entries)
        return {target: ways.get(target, 0) for target in targets}

    def _biases_scores(self, value: Value, operands: list[int]) -> bool:
        """Whether an operand is a product of two data-dependent values, and nothing but a softmax reads the sum."""
        scores = [self.values[self._root(operand, (Role.TRANSPARENT, Role.SLICE))] for operand in operands]
        if not any(v.role is Role.MIXING and len({i for i in v.inputs if self.values[i].data}) > 1 for v in scores):
            return False
        queue = [value.index]
        for index in queue:
            readers = [self.values[reader] for reader in self.flow.readers[index]]
            if not readers or len(queue) > _REACH:
                return False
            for reader in readers:
                if reader.role in (Role.TRANSPARENT, Role.SLICE, Role.POINTWISE) or (reader.role is Role.SUM and not self._is_sum(reader)):
                    queue.append(reader.index)
                elif not reader.kind.softmax:
                    return False
        return True

    def _partial(self, operands: list[int]) -> tuple[int, int] | None:
        """A skip that is a slice of what another operand reads whole: its position, and the whole."""
        for position, operand in enumerate(operands):
            index = self._root(operand, (Role.TRANSPARENT, Role.SLICE))
            if index == self._root(operand):
                continue
            if index not in self.whole:
                self.whole[index] = [reader for reader in self.flow.readers[index] if self.values[reader].role is not Role.SLICE]
            whole = self.whole[index]
            for other in operands:
                if other != operand and whole:
                    descent = self._descent([other], [index, *whole])
                    if _mixed(descent[index]) and any(descent[reader] for reader in whole):
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
            if source not in self._between(source, other, upsampled=False):
                return "lateral"
            if all(self._is_linear(self.values[i]) or not self.values[i].inputs for i in self._between(source, other) if i != source):
                return "both linear"
            return position, source
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
        descent = self._descent([other], [index for index, _, _ in cuts])
        source, mixed, wide = next((cut for cut in cuts if descent[cut[0]]), (skip, False, False))
        # A 3x3 convolution that keeps the shape adds what is near (a position encoding in attention); between stages it is a shortcut.
        near = wide and self.values[source].shape == self.values[skip].shape
        return source if mixed and not near else None

    def _between(self, source: int, index: int, *, upsampled: bool = True) -> Iterator[int]:
        """`index` and its ancestors down to `source`; without `upsampled`, only what is reached without an upsampling op."""
        found, stack = {index}, [index]
        while stack:
            value = self.values[stack.pop()]
            yield value.index
            if value.index == source or (value.kind.upsample and not upsampled):
                continue
            for operand in value.inputs:
                if operand >= source and operand not in found and self.values[operand].data:
                    found.add(operand)
                    stack.append(operand)

    def _is_linear(self, value: Value) -> bool:
        return value.kind.linear or value.role in (Role.TRANSPARENT, Role.SLICE, Role.SUM)


def _mixed(ways: int) -> bool:
    """Whether a start, of any number, descends through a mixing op."""
    return bool(ways) and any(ways >> shift & _MIXED for shift in range(0, ways.bit_length(), 2))


def _shape(value: Value) -> str:
    return "[" + ", ".join(map(str, value.shape)) + "]" if value.shape is not None else "[?]"
