"""Laws of the search for residual connections, on random and on grown graphs."""

from __future__ import annotations

from heapq import heappush

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings

from laurel_rewrite.detection.descent import CUT, MIXED, PLAIN, Descent
from laurel_rewrite.detection.residuals import find_residuals
from laurel_rewrite.graph.dataflow import Dataflow, OpKind, Role


def random_flow(choices: list[tuple[int, int, int]], order: list[int] | None = None) -> tuple[Dataflow, list[int]]:
    """A dataflow of values of one shape: unary mixing, pointwise and detaching ops, and sums with operands in either order."""
    flow = Dataflow()
    shape = {"shape": (2, 4), "floating": True, "data": True}
    flow.add("x", "placeholder", OpKind(Role.SOURCE), (), **shape)
    sums = []
    for number, (kind, left, right) in enumerate(choices):
        a, b = left % len(flow.values), right % len(flow.values)
        if kind % 3 == 0:
            flow.add(f"m{number}", "linear", OpKind(Role.MIXING, linear=True, axis=-1, vote=1), (a,), **shape)
        elif kind % 3 == 1:
            flow.add(f"p{number}", "relu", OpKind(Role.POINTWISE, cut=kind == 7), (a,), **shape)
        else:
            swapped = order is not None and order[number % len(order)] % 2
            operands = (b, a) if swapped else (a, b)
            sums.append(flow.add(f"s{number}", "add", OpKind(Role.SUM), operands, **shape).index)
    flow.outputs.update(value.index for value in flow.values if not flow.readers[value.index])
    return flow, sums


choices = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=40)


@settings(max_examples=200)
@given(choices, st.lists(st.integers(0, 1), min_size=1, max_size=8))
def test_the_order_of_operands_does_not_matter(graph, order):
    plain, _ = random_flow(graph)
    swapped, _ = random_flow(graph, order)
    first, second = (find_residuals(flow) for flow in (plain, swapped))
    assert [(r.output, r.kind) for r in first[0]] == [(r.output, r.kind) for r in second[0]]
    assert [(r.output, r.reason) for r in first[1]] == [(r.output, r.reason) for r in second[1]]


@settings(max_examples=200)
@given(choices)
@example([(0, 0, 0), (8, 1, 0), (0, 0, 0), (7, 2, 0)])  # only the detached result reads the sum
@example([(0, 0, 0), (8, 1, 0), (7, 2, 0)])  # and nothing else is an output
@example([(7, 0, 0), (2, 0, 1), (0, 2, 0), (2, 1, 3)])  # the skip is an embedding of detached values
def test_an_identity_site_is_what_the_definition_says(graph):
    """Against a second opinion: all paths, by brute force over networkx."""
    import networkx as nx

    flow, _ = random_flow(graph)
    flow.check()
    digraph = flow.to_networkx()
    graded = digraph.copy()  # with the edges alone by which gradients go back
    graded.remove_edges_from([(i, value.index) for value in flow.values if value.kind.cut for i in value.inputs])
    learning = set(flow.outputs).union(*(nx.ancestors(graded, output) for output in flow.outputs))
    anything = any(graded.in_degree(output) for output in flow.outputs)
    found, refused = find_residuals(flow)
    folded = {node for r in found for node, _ in r.adds}
    for residual in found:
        assert residual.output in learning or not anything
        if residual.kind == "identity":
            branches = [b for b in residual.branches if _mixes_from(flow, graded, nx, residual.skip, b)]
            assert branches
    for refusal in refused:
        if refusal.reason == "no gradient":
            assert refusal.output not in learning and anything
            continue
        operands = flow.values[refusal.output].inputs
        if len(set(operands)) == 2 and not any(flow.values[o].role is Role.SUM for o in operands):
            a, b = operands
            for skip, branch in ((a, b), (b, a)):
                if _mixes_from(flow, graded, nx, skip, branch):  # then it is an embedding of detached values
                    assert refusal.reason == "detached" and all(flow.values[i].role is Role.SUM for i in flow.readers[skip])
                    assert nx.ancestors(digraph, skip) - nx.ancestors(graded, skip)
    assert len(folded) >= len(found)


def _mixes_from(flow, graded, nx, source, target) -> bool:
    """Whether a path of gradients from source to target holds a mixing op other than the source itself."""
    if source == target or source not in nx.ancestors(graded, target):
        return False
    between = (nx.descendants(graded, source) | {source}) & (nx.ancestors(graded, target) | {target})
    return any(flow.values[node].role is Role.MIXING for node in between - {source})


@settings(max_examples=200)
@given(choices, st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=12))
def test_a_walk_that_jumps_finds_what_all_paths_say(graph, questions):
    """Each question leaves jumps behind that the next ones take; the answers are those of a search without any."""
    flow, _ = random_flow(graph)
    descent = Descent(flow)
    for left, right, target in questions:
        left, right, target = (number % len(flow.values) for number in (left, right, target))
        ways = descent.ways([left, right], [target, left])
        for goal in (target, left):
            assert ways[goal] == _ways(flow, left, goal) | _ways(flow, right, goal) << 3


def _ways(flow, start, goal) -> int:
    """How goal is reached from start: plainly, through a mixing op, through a cut."""
    seen, queue = {(start, PLAIN)}, [(start, PLAIN)]
    for index, how in queue:
        kind = flow.values[index].kind
        how = CUT if kind.cut or how == CUT else MIXED if kind.role is Role.MIXING else how
        for operand in flow.values[index].inputs:
            if (operand, how) not in seen:
                seen.add((operand, how))
                queue.append((operand, how))
    return sum(how for how in (PLAIN, MIXED, CUT) if (goal, how) in seen)


def grown(shape: str, blocks: int) -> Dataflow:
    """A graph whose number of values is a multiple of `blocks`."""
    flow = Dataflow()
    like = {"shape": (2, 4), "floating": True, "data": True}

    def put(kind: OpKind, *inputs: int) -> int:
        return flow.add(f"v{len(flow.values)}", kind.role.value, kind, inputs, **like).index

    def f(x: int) -> int:
        return put(OpKind(Role.MIXING, linear=True), put(OpKind(Role.POINTWISE), put(OpKind(Role.MIXING), x)))

    def add(x: int, y: int) -> int:
        return put(OpKind(Role.SUM), x, y)

    x, memory = put(OpKind(Role.SOURCE)), put(OpKind(Role.SOURCE))
    if shape == "stack":
        for _ in range(blocks):
            x = add(x, f(x))
    elif shape == "memory":  # one input is added in every layer
        for _ in range(blocks):
            x = add(f(x), memory)
    elif shape == "ladder":  # a U-Net
        skips = []
        for _ in range(blocks):
            x = f(x)
            skips.append(x)
        while skips:
            x = add(f(x), skips.pop())
    elif shape == "towers":  # two stacks, one after the other, and then the sums of their layers
        towers = []
        for y in (x, memory):
            tower = []
            for _ in range(blocks):
                y = add(y, f(y))
                tower.append(y)
            towers.append(tower)
        for left, right in zip(*towers, strict=True):
            f(add(left, right))
    elif shape == "fork":  # two paths from one value that never meet before the sums
        left = right = f(x)
        for _ in range(blocks):
            left, right = f(left), f(right)
            f(add(left, right))
    elif shape == "recurrence":  # an unrolled linear one, which reads a slice of the input in each step
        h, linear = memory, OpKind(Role.MIXING, linear=True)
        for _ in range(blocks):
            h = add(put(linear, h), put(linear, put(OpKind(Role.SLICE), x)))
    elif shape == "fan":  # one sum of many operands
        total = x
        for _ in range(blocks):
            total = add(total, f(x))
    flow.outputs.update(value.index for value in flow.values if not flow.readers[value.index])
    return flow


@pytest.mark.parametrize("shape", ["stack", "memory", "ladder", "towers", "fork", "recurrence", "fan"])
def test_the_work_grows_with_the_graph(shape, monkeypatch):
    """Steps of the search are counted, not timed: ten times the graph is about ten times the work."""
    steps = 0

    def counting(heap, item):
        nonlocal steps
        steps += 1
        heappush(heap, item)

    monkeypatch.setattr("heapq.heappush", counting)
    counts = []
    for blocks in (50, 500):
        steps = 0
        find_residuals(grown(shape, blocks))
        counts.append(steps)
    assert counts[1] <= 12 * counts[0]
