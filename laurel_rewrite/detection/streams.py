"""x_0 -> x_1 -> x_2 ...: link the residual connections that carry one hidden state, and find its feature axis.

A site follows another in a stream when its skip, followed back, reaches the other's output without a change of shape. The way back
may lead through transparent ops, an activation or a normalisation, so that ResNets (ReLU after the sum) and post-norm transformers
have streams too: what a stream carries is the skip that each of its sites reads. A reshape that keeps the order of elements and the
last axis is no change: Swin's blocks go from [B, H, W, D] to [B, H*W, D] and back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from laurel_rewrite.detection.residuals import Residual
from laurel_rewrite.graph.dataflow import Dataflow, Role, Shape, Value

_REACH = 40  # values looked at around a skip: enough for a decomposed normalisation, independent of the graph's size


@dataclass(frozen=True)
class Place:
    """Where a site stands: stream and position in it, feature axis (-1 or 1) and its size, None where unknown."""

    stream: int
    index: int
    axis: int
    dim: int | None


def find_places(flow: Dataflow, residuals: list[Residual], sources: Sequence[Hashable | None] = ()) -> list[Place]:
    """The place of each residual connection, in their order.

    Args:
        flow: the dataflow.
        residuals: from `find_residuals`.
        sources: for each of them the expression in the source that adds, None where it is unknown. What is added by one expression in
            one shape has one feature axis: the last turn of a loop is read otherwise than the turns before it.
    """
    by_output = {residual.output: position for position, residual in enumerate(residuals)}
    streams: list[int] = []
    indices: list[int] = []
    lengths: list[int] = []
    last: dict[int, int] = {}
    for position, residual in enumerate(residuals):
        before, _ = stream_before(flow, residual.skip, by_output)
        # Two sites that follow the same one are a fork, and the second begins a stream of its own.
        if before is not None and last.get(streams[before]) == before:
            stream = streams[before]
        else:
            stream = len(lengths)
            lengths.append(0)
        last[stream] = position
        streams.append(stream)
        indices.append(lengths[stream])
        lengths[stream] += 1
    shapes = [flow.values[residual.skip].shape or () for residual in residuals]
    group = _together(streams, list(zip(sources or [None] * len(residuals), shapes, strict=True)))
    votes: list[Counter[int]] = [Counter() for _ in lengths]
    for residual, stream in zip(residuals, streams, strict=True):
        votes[group[stream]].update(_votes(flow, residual))
    places = []
    for shape, stream, index in zip(shapes, streams, indices, strict=True):
        counts = votes[group[stream]]
        axis = counts.most_common(1)[0][0] if counts else -1
        size = shape[axis] if len(shape) > 1 or (shape and counts) else None  # a lone axis may be the batch
        places.append(Place(stream, index, axis, size if isinstance(size, int) else None))
    return places


def _together(streams: list[int], sources: list[tuple[Hashable | None, Shape]]) -> dict[int, int]:
    """For each stream the first of those that vote with it: streams that one expression writes in one shape."""
    group = {stream: stream for stream in streams}

    def first(stream: int) -> int:
        while group[stream] != stream:
            group[stream] = group[group[stream]]
            stream = group[stream]
        return stream

    seen: dict[tuple[Hashable | None, Shape], int] = {}
    for stream, source in zip(streams, sources, strict=True):
        if source[0] is not None:
            left, right = sorted((first(stream), first(seen.setdefault(source, stream))))
            group[right] = left
    return {stream: first(stream) for stream in group}


def stream_before(flow: Dataflow, index: int, by_output: Mapping[int, int]) -> tuple[int | None, int]:
    """The connection whose output a value carries on, and where the way back to it ends; None where that is elsewhere.

    Args:
        flow: the dataflow.
        index: the value, such as a skip.
        by_output: connections by their outputs.
    """
    while index not in by_output:
        value = flow.values[index]
        carried = [i for i in value.inputs if flow.values[i].data and flow.values[i].floating]
        if value.role is Role.TRANSPARENT:  # what is dequantised is no floating-point number
            carried = [i for i in value.inputs[:1] if flow.values[i].data]
        # A sum with one data operand adds a bias.
        carries = value.role in (Role.TRANSPARENT, Role.POINTWISE, Role.SUM) or value.kind.norm
        if value.kind.cut or index in flow.borders:  # no state of a stream goes around a detach, or out of a graph
            return None, index
        if not carries or len(carried) != 1:
            decomposed = _through_norm(flow, value)
            if decomposed is None:
                return None, index
            carried = [decomposed]
        if flow.values[carried[0]].shape != value.shape and not _reshapes(value):
            return None, index
        index = carried[0]
    return by_output[index], index


def _reshapes(value: Value) -> bool:
    """Whether a transparent op keeps the order of the elements and the last axis."""
    if value.role is not Role.TRANSPARENT or value.axes is None or value.axes[-1] is None:
        return False
    kept = [axis for axis in value.axes if axis is not None]
    return kept == sorted(kept)


def _through_norm(flow: Dataflow, value: Value) -> int | None:
    """The input of a normalisation written out as x * rsqrt(mean(x^2)): the operand that the other one is computed from."""
    if value.role is not Role.POINTWISE or len(value.inputs) != 2:
        return None
    left, right = (flow.values[i] for i in value.inputs)
    if left.shape != value.shape or right.shape == value.shape:
        return None
    return left.index if left.data and right.data else None


def _votes(flow: Dataflow, residual: Residual) -> Counter[int]:
    """Which axis of the stream the ops around the site take for its features."""
    rank = len(flow.values[residual.skip].shape or ())
    votes: Counter[int] = Counter()

    def vote(value: Value, position: int | None, weight: int) -> None:
        if position is not None and weight:
            if position == rank - 1:
                votes[-1] += weight
            elif position == 1:
                votes[1] += weight

    # What reads the stream: forwards from where skip and branch part, and from the sum, up to the first mixing op that is no norm.
    for start in (residual.skip, residual.source, residual.output):
        value = flow.values[start]
        if len(value.shape or ()) != rank or (start == residual.source and value.shape != flow.values[residual.skip].shape):
            continue
        seen = {start}
        queue: list[tuple[int, tuple[int | None, ...]]] = [(start, tuple(range(rank)))]
        for index, axes in queue:
            for reader in flow.readers[index][: max(_REACH - len(seen), 0)]:  # an input may have a reader in every layer
                value = flow.values[reader]
                if reader in seen or not value.data:
                    continue
                seen.add(reader)
                kind = value.kind
                if kind.axis is not None and len(axes) >= (1 if kind.axis == -1 else 2):
                    vote(value, axes[kind.axis], kind.vote)
                if value.role is Role.TRANSPARENT:
                    mapped = value.axes
                    if mapped is not None:
                        queue.append((reader, tuple(axes[m] if m is not None else None for m in mapped)))
                elif kind.norm or (value.role is Role.POINTWISE and value.shape == flow.values[index].shape):
                    queue.append((reader, axes))
    # What writes the operands: backwards from each to the op that made it. The skip of an identity is the stream itself.
    for branch in (*residual.branches, *(() if residual.kind == "identity" else (residual.skip,))):
        index, positions = branch, tuple(range(len(flow.values[branch].shape or ())))
        for _ in range(_REACH):
            value = flow.values[index]
            data = [i for i in value.inputs if flow.values[i].data]
            if value.kind.axis is not None and value.shape is not None and len(value.shape) >= 2:
                feature = value.kind.axis % len(value.shape)
                vote(value, positions.index(feature) if feature in positions else None, value.kind.vote)
            if value.role is Role.TRANSPARENT and value.axes is not None and data:
                positions = tuple(value.axes[p] if p is not None and p < len(value.axes) else None for p in positions)  # type: ignore[misc]  # None: lost
            elif not ((value.role is Role.POINTWISE or value.kind.norm) and len(data) == 1):
                break
            index = data[0]
    return votes
