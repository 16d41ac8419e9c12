"""Ways through a dataflow, and what is met on them."""

from __future__ import annotations

from collections.abc import Sequence

from laurel_rewrite.detection.descent import Descent
from laurel_rewrite.graph.dataflow import Dataflow, Role

_REACH = 12  # pointwise ops between a softmax and the product that its weights go into


def between(flow: Dataflow, start: int, end: int) -> list[int]:
    """What lies on ways from one value to another, these included, in topological order."""
    return descending(flow, start, sorted(Descent(flow).between(start, end)))


def descending(flow: Dataflow, source: int, among: Sequence[int]) -> list[int]:
    """A value and those that are computed from it among others, which are in topological order."""
    found = {source: None}
    for index in among:
        if any(o in found for o in flow.values[index].inputs):
            found[index] = None
    return list(found)


def statistics(flow: Dataflow, inside: Sequence[int], axis: int) -> set[int]:
    """Those of these values that are statistics; see `is_statistic`."""
    return {index for index in inside if is_statistic(flow, index, axis)}


def is_statistic(flow: Dataflow, index: int, axis: int) -> bool:
    """Whether a value is one number for each position, such as the mean square that a normalisation written out divides by."""
    value = flow.values[index]
    if value.role is not Role.MIXING or value.kind.norm or value.kind.softmax or value.shape is None:
        return False
    if sum(flow.values[o].data for o in value.inputs) != 1:
        return False
    operand = flow.values[value.inputs[0]].shape
    if operand is None or len(operand) != len(value.shape) or not -len(operand) <= axis < len(operand):
        return False
    rest = (n for n in range(len(operand)) if n != axis % len(operand))
    return value.shape[axis] == 1 != operand[axis] and all(operand[n] == value.shape[n] for n in rest)


def is_scaled_by_position(flow: Dataflow, index: int, axis: int) -> bool:
    """Whether a value combines a tensor with one number for each of its positions: the end of a normalisation written out."""
    value = flow.values[index]
    if value.role is not Role.POINTWISE or value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return False
    shapes = [flow.values[o].shape for o in value.inputs if flow.values[o].data]
    smaller = [s for s in shapes if s is not None and len(s) == len(value.shape) and s[axis] == 1 != value.shape[axis]]
    return len(shapes) == 2 and len(smaller) == 1


def ahead(flow: Dataflow, start: int) -> list[int]:
    """What reads a value, through pointwise ops and views, up to the next mixing ops, these included."""
    found: dict[int, None] = {}
    level = [start]
    for _ in range(_REACH):
        level = [r for r in dict.fromkeys(r for name in level for r in flow.readers[name]) if r not in found]
        found |= dict.fromkeys(level)
        level = [r for r in level if flow.values[r].role in (Role.TRANSPARENT, Role.POINTWISE)]
    return list(found)


def behind(flow: Dataflow, start: int) -> list[int]:
    """What a value is computed from, down to the next mixing ops, these included."""
    found: dict[int, None] = {}
    level = [start]
    for _ in range(_REACH):
        level = [o for o in dict.fromkeys(o for name in level for o in flow.values[name].inputs) if o not in found and flow.values[o].data]
        found |= dict.fromkeys(level)
        level = [o for o in level if flow.values[o].role is not Role.MIXING]
    return list(found)
