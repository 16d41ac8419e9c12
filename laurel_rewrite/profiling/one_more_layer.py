"""The same model with one more layer: what one would do instead of LAuReL, and the paper's own control (LAuReL, arXiv:2411.07501).

A block is what lies between two states of a stream; where the blocks of a stream repeat with a period (attention, feed-forward), a layer is
one period. The last layer whose input and output have one shape is copied with its weights, behind itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import pairwise

import onnx_ir as ir

from laurel_rewrite.detection.site import Site
from laurel_rewrite.detection.sites import Sites, read_onnx_sites
from laurel_rewrite.graph.from_onnx import OnnxFlow, captured
from laurel_rewrite.graph.shapes import subgraphs


def one_more_layer(model: ir.Model) -> tuple[ir.Model, list[str]] | None:
    """A copy of a model with one layer more, and the sites whose blocks were copied; None where no stream has two states of one shape.

    Args:
        model: an ONNX model with residual connections and without LAuReL; it stays as it is.

    Raises:
        CaptureError: the graph cannot be read.
    """
    sites, read, model = read_onnx_sites(model.clone())
    streams: dict[int, list[Site]] = {}
    for site in sites:
        streams.setdefault(site.stream, []).append(site)
    fixed = _fixed(model)
    for stream in reversed(list(streams.values())):
        states = _states(stream, sites, read)
        blocks = [_Block(model, fixed, states[a], states[b], a) for a, b in pairwise(states)]
        layer = _last_layer([block for block in blocks if block.whole])
        if layer:
            _copy(model, layer)
            return model, [block.site for block in layer]
    return None


def _states(stream: list[Site], sites: Sites, read: OnnxFlow) -> dict[str, ir.Value]:
    """The value at which skip and branch part, for each site of a stream, as far as they are of the last one's shape."""
    values = {index: value for value, index in read.index.items()}
    found = {site.id: values.get(sites.bindings[site.id].residual.source) for site in stream if site.kind == "identity"}
    states = {name: value for name, value in found.items() if value is not None and not value.is_graph_output()}
    last = next(reversed(states.values()), None)
    distinct = {value: name for name, value in states.items() if last is not None and value.shape is not None and value.shape == last.shape}
    return {name: value for value, name in distinct.items()}


class _Block:
    """What is computed from one state up to the next.

    Attributes:
        nodes: in order, with those that only prepare its weights.
        signature: ops that depend on the first state, by type.
        whole: whether it is closed: the next state depends on this one through them, and none of them is control flow.
    """

    def __init__(self, model: ir.Model, fixed: set[ir.Node], entry: ir.Value, end: ir.Value, site: str) -> None:
        self.entry, self.end, self.site = entry, end, site
        behind = _behind([end], lambda node: node is not entry.producer())
        dependent, inside = {entry}, set()
        for node in model.graph:
            if node in behind and any(value in dependent for value in (*node.inputs, *captured(node))):
                dependent.update(node.outputs)
                inside.add(node)
        self.signature = Counter(node.op_type for node in inside)
        # What only prepares weights is copied too; a mask or rotary angles the layers share.
        operands = [value for node in inside for value in node.inputs if value is not None and value not in dependent]
        inside |= _behind(operands, fixed.__contains__)
        self.nodes = [node for node in model.graph if node in inside]
        self.whole = end in dependent and not any(subgraph for node in inside for subgraph in subgraphs(node))


def _fixed(model: ir.Model) -> set[ir.Node]:
    """The nodes that depend on weights alone."""
    known: set[ir.Value | None] = {None, *model.graph.initializers.values()} - set(model.graph.inputs)
    nodes = set()
    for node in model.graph:
        if all(value in known for value in node.inputs):
            known.update(node.outputs)
            if node.inputs:
                nodes.add(node)
    return nodes


def _behind(values: Iterable[ir.Value], accepted: Callable[[ir.Node], bool]) -> set[ir.Node]:
    """The nodes that values are computed by, as far as they are accepted."""
    found: set[ir.Node] = set()
    stack = list(values)
    while stack:
        node = stack.pop().producer()
        if node is not None and node not in found and accepted(node):
            found.add(node)
            stack += [value for value in node.inputs if value is not None]
    return found


def _last_layer(blocks: list[_Block]) -> list[_Block]:
    """As many of the last blocks as a period has; one, where none is found."""
    for period in range(1, len(blocks)):
        if all(one.signature == other.signature for one, other in zip(blocks, blocks[period:], strict=False)):
            return blocks[-period:]
    return blocks[-1:]


def _copy(model: ir.Model, layer: list[_Block]) -> None:
    graph, end = model.graph, layer[-1].end
    readers = list(end.uses())
    copies: dict[ir.Value, ir.Value] = {layer[0].entry: end}
    new: list[ir.Node] = []
    for node in dict.fromkeys(node for block in layer for node in block.nodes):
        inputs = [None if value is None else copies.get(value) or _weights(model, value, copies) for value in node.inputs]
        copy = ir.Node(node.domain, node.op_type, inputs, node.attributes.values(), num_outputs=len(node.outputs), name=f"{node.name}/copy")
        copy.metadata_props.update(node.metadata_props)
        for old, output in zip(node.outputs, copy.outputs, strict=True):
            output.name, output.type, output.shape = f"{old.name}/copy", old.type, old.shape
            copies[old] = output
        new.append(copy)
    producer = end.producer()
    assert producer is not None
    graph.insert_after(producer, new)
    for use in readers:
        use.node.replace_input_with(use.idx, copies[end])


def _weights(model: ir.Model, value: ir.Value, copies: dict[ir.Value, ir.Value]) -> ir.Value:
    """Weights of its own for the copy; anything else is shared."""
    tensor = value.const_value
    if not value.is_initializer() or tensor is None or not tensor.dtype.is_floating_point() or tensor.size == 1:
        return value
    copy = ir.Value(name=f"{value.name}/copy", type=value.type, shape=value.shape, const_value=tensor)
    model.graph.register_initializer(copy)
    copies[value] = copy
    return copy
