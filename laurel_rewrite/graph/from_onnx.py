"""`Dataflow` from an ONNX graph: an exporter's, an optimiser's, a given file's.

Shapes and types come from the graph; weights are never read. Owner and source line come from the metadata that PyTorch's exporter
leaves at each node, or the owner from the node's name in the style of its older exporter; they are empty in the graphs of others.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from laurel_rewrite.graph.dataflow import Dataflow, OpKind, Role, Value
from laurel_rewrite.graph.ops.onnx import LIKE, OPS, PRODUCT_SUMS, PRODUCTS, QUANTISED_SUMS, SHAPE_ONLY, SKIP_NORMS, SUMS
from laurel_rewrite.graph.ops.rules import (
    LINEAR,
    MIXING,
    POINTWISE,
    SLICE,
    SOURCE,
    SUBGRAPH,
    SUM,
    TRANSPARENT,
    cut,
    placed,
    reshaped_axes,
    scaled,
)
from laurel_rewrite.graph.rooms import Entry, Room, enter, leave
from laurel_rewrite.graph.shapes import sizes_of, subgraphs

_SCOPES = "pkg.torch.onnx.name_scopes"
_CLASSES = "pkg.torch.onnx.class_hierarchy"
_TRACE = "pkg.torch.onnx.stack_trace"


METADATA = "laurel_rewrite."
"""Prefix of our keys in `metadata_props`."""


@dataclass(frozen=True)
class OnnxSum:
    """The node behind a sum of the dataflow.

    Attributes:
        node: Add, Sum, or a node that adds among other things.
        terms: for each operand of the sum, the inputs of the node that it is linear in together: itself, or the weights and the bias of
            a product that the node computes.
        rest: further inputs that are added, which depend on no data: a bias.
        inside: the operand that the node computes itself.
    """

    node: ir.Node
    terms: tuple[tuple[int, ...], ...]
    rest: tuple[int, ...] = ()
    inside: int | None = None

    @property
    def plain(self) -> bool:
        """Whether the node's output is the sum and nothing else."""
        return self.node.op_type in SUMS


@dataclass
class OnnxFlow:
    """What was read from a graph.

    Attributes:
        flow: the dataflow. Names of values are the ONNX names, so they are unique; the sum inside a fused node is called after it, and a value
            of a room after that, too.
        index: the value that each ONNX value became where it is computed.
        onnx: the reverse, with what rooms read from outside, which they have values of their own for.
        sums: the node behind each sum, by the index of its value.
    """

    flow: Dataflow = field(default_factory=lambda: Dataflow(deployed=True))
    index: dict[ir.Value, int] = field(default_factory=dict)
    onnx: dict[int, ir.Value] = field(default_factory=dict)
    sums: dict[int, OnnxSum] = field(default_factory=dict)


def dataflow_from_onnx(graph: ir.Graph) -> OnnxFlow:
    """Read a graph whose nodes are in topological order."""
    reader = _Reader()
    for value in graph.inputs:
        reader.source(value, data=value.name not in graph.initializers)
    reader.body(graph)
    reader.flow.outputs.update(reader.read(value) for value in graph.outputs)
    return reader


class _Reader(OnnxFlow):
    def __init__(self) -> None:
        super().__init__()
        self.paths = [""]  # of the graph, and of each room of those that are read
        self.known: list[dict[ir.Value, int]] = [{}]  # what is computed or read there
        self.rooms: set[str] = set()

    @property
    def room(self) -> str:
        return self.paths[-1]

    def body(self, graph: ir.Graph) -> None:
        for value in graph.initializers.values():
            self.source(value, data=False)
        for node in graph:
            self.node(node)

    def put(self, value: ir.Value, index: int) -> None:
        """An ONNX value is computed here, and became this one."""
        self.index[value] = self.known[-1][value] = index
        self.onnx.setdefault(index, value)

    def named(self, name: str) -> str:
        return f"{name} in {self.room}" if self.room else name

    def source(self, value: ir.Value, *, data: bool) -> None:
        if value not in self.known[-1]:
            made = self.flow.add(
                self.named(value.name or ""), "input" if data else "initializer", SOURCE, shape=sizes_of(value), floating=_floating(value), data=data,
                weights=() if data or self.room else (value.name or "",), room=self.room,
            )  # fmt: skip
            self.put(value, made.index)
            if not data and not self.room and _is_shared_zero(value):
                self.flow.zeros.add(value.name or "")

    def read(self, value: ir.Value, level: int = -1) -> int:
        """The value here of what is computed here or outside."""
        known = self.known[level]
        if value not in known:
            if known is self.known[0]:  # nobody computes it
                self.source(value, data=True)
            else:
                outside = self.read(value, level - 1)
                name, room = f"{value.name} into {self.paths[level]}", self.paths[level]
                known[value] = enter(self.flow, Entry(outside), name, room, sizes_of(value), floating=_floating(value))
                self.onnx.setdefault(known[value], value)
        return known[value]

    def node(self, node: ir.Node) -> None:
        operands = [value for value in node.inputs if value is not None] + list(captured(node))
        if node.op_type in LIKE:
            operands = operands[:1]
        if node.op_type in QUANTISED_SUMS:
            operands = operands[:4:3]
        inputs = [self.read(value) for value in operands]
        if node.op_type in SKIP_NORMS and len(inputs) >= 2:
            self._skip_norm(node, inputs)
        elif node.op_type in PRODUCT_SUMS and self._adds_data(node):
            self._product_sum(node)
        else:
            kind = self._kind(node, inputs)
            for output in node.outputs:
                self._output(node, output, kind, inputs)
            if node.op_type in SUMS:
                positions = (position for position, value in enumerate(node.inputs) if value is not None)
                self.sums[self.known[-1][node.outputs[0]]] = OnnxSum(node, tuple((position,) for position in positions))
        self._inside(node)

    def _adds_data(self, node: ir.Node) -> bool:
        _, added = PRODUCT_SUMS[node.op_type]
        value = node.inputs[added] if len(node.inputs) > added else None
        return value is not None and self.flow.values[self.read(value)].data

    def _inside(self, node: ir.Node) -> None:
        """The subgraphs of an If, Loop or Scan, each as a room. Of those of other nodes the sums are listed."""
        rooms = _rooms(node)
        for room in rooms:
            self._room(node, room)
        for graph in [graph for graph in subgraphs(node) if all(graph is not room.graph for room in rooms)]:
            for inner in graph.all_nodes():
                if inner.op_type in SUMS or inner.op_type in SKIP_NORMS:
                    name = f"{inner.outputs[0].name} in {node.name or node.op_type}"
                    self._add(inner, self.named(name), inner.op_type, SUBGRAPH, [], inner.outputs[0])

    def _room(self, node: ir.Node, room: Room[ir.Graph, ir.Value]) -> None:
        path = self._path(node, room.name)
        entries = [entry.given(None if entry.operand is None else self.read(entry.operand)) for entry in room.entries]
        self.known.append({})
        self.paths.append(path)
        inside = []
        for value, entry in zip(room.graph.inputs, entries, strict=True):
            name, shape = self.named(value.name or ""), sizes_of(value)
            inside.append((entry, enter(self.flow, entry, name, self.room, shape, floating=_floating(value))))
            self.put(value, inside[-1][1])
        self.body(room.graph)
        results = [self.read(value) for value in room.graph.outputs]
        leave(self.flow, [self.known[-2][output] for output in node.outputs], inside, results)
        self.known.pop()
        self.paths.pop()
        for output, place in zip(node.outputs, room.exits, strict=False):
            self.flow.join(self.known[-1][output], [results[place]] if place is not None else [])

    def _path(self, node: ir.Node, name: str) -> str:
        """Of a room: the node's name, and the subgraph's in it."""
        base = re.sub(r"\W+", "_", node.name or node.op_type).strip("_") or node.op_type
        ways = (f"{self.room}.{base}{number}.{name}".lstrip(".") for number in ("", *(f"_{n}" for n in range(2, len(self.rooms) + 3))))
        path = next(way for way in ways if way not in self.rooms)
        self.rooms.add(path)
        return path

    def _output(self, node: ir.Node, output: ir.Value, kind: OpKind, inputs: list[int]) -> None:
        value = self._add(node, self.named(output.name or ""), node.op_type, kind, inputs, output)
        if kind.role is Role.SLICE and inputs and value.shape is not None and value.shape == self.flow.values[inputs[0]].shape:
            value.kind = TRANSPARENT
        if value.role is Role.TRANSPARENT and inputs:
            value.axes = _axes(node, self.flow.values[inputs[0]], value)
        self.put(output, value.index)

    def _add(self, node: ir.Node, name: str, op: str, kind: OpKind, inputs: list[int], like: ir.Value) -> Value:
        owner, existing = _owner(node)
        where, trace = placed(node.metadata_props.get(_TRACE, ""), inside=bool(self.room))
        classes = _list(node.metadata_props, _CLASSES)
        existing = existing or f"{METADATA}site" in node.metadata_props
        data = any(self.flow.values[i].data for i in inputs) and node.op_type not in SHAPE_ONLY
        if like.dtype in (ir.DataType.INT64, ir.DataType.BOOL):  # narrower integers stand for real numbers in quantised graphs
            kind = cut(kind)
        return self.flow.add(
            name, op, kind, inputs, shape=sizes_of(like), floating=_floating(like), data=data, owner=owner or self.room, existing=existing,
            room=self.room,
            owner_class=classes[-2].rpartition(".")[2] if len(classes) > 1 else "",
            where=where, trace=trace,
        )  # fmt: skip

    def _skip_norm(self, node: ir.Node, inputs: list[int]) -> None:
        """y = norm(x + skip), and x + skip itself, in one node."""
        summed = node.outputs[3] if len(node.outputs) > 3 and node.outputs[3].name else None
        like = summed if summed is not None else node.inputs[0]
        assert like is not None
        name = self.named((summed.name if summed is not None else None) or f"{node.name}_sum")
        total = self._add(node, name, "Add", SUM, inputs[:2], like)
        biased = len(node.inputs) > 4 and node.inputs[4] is not None
        self.sums[total.index] = OnnxSum(node, ((0,), (1,)), (4,) if biased else ())
        if biased:
            total = self._add(node, f"{total.name}_bias", "Add", SUM, [total.index, inputs[-1]], like)
        if summed is not None:
            self.put(summed, total.index)
        for output in node.outputs:
            if output not in self.known[-1]:
                self._output(node, output, OPS[node.op_type], [total.index, *inputs[2:]])

    def _product_sum(self, node: ir.Node) -> None:
        """y = activation(product + z)."""
        linear, added = PRODUCT_SUMS[node.op_type]
        output, addend = node.outputs[0], node.inputs[added]
        assert addend is not None
        factors = [self.read(value) for position, value in enumerate(node.inputs) if value is not None and position != added]
        kind = replace(self._kind(node, factors), linear=True)  # the activation comes after the sum
        product = self._add(node, self.named(f"{output.name}_product"), node.op_type, kind, factors, output)
        total = self._add(node, self.named(f"{output.name}_sum"), "Add", SUM, [product.index, self.read(addend)], output)
        present = tuple(position for position in linear if position < len(node.inputs) and node.inputs[position] is not None)
        self.sums[total.index] = OnnxSum(node, (present, (added,)), inside=0)
        kind = POINTWISE if node.attributes.get_string("activation") else TRANSPARENT
        self._output(node, output, kind, [total.index])

    def _kind(self, node: ir.Node, inputs: list[int]) -> OpKind:
        """The table's row, specialised to this use."""
        op, values = node.op_type, self.flow.values
        operands = [values[i] for i in inputs]
        if not operands:
            return SOURCE
        kind = OPS.get(op, MIXING)
        if op in SUMS and len(operands) == 1:
            return TRANSPARENT
        if op in PRODUCTS and (op == "Mul" or operands[0].data):
            return scaled(operands, learned=False) or kind
        if op in ("MatMul", "Einsum", "FusedMatMul", "MatMulNBits") and len({o.index for o in operands if o.data}) == 1:
            return LINEAR
        if op == "Gather" and operands[0].data and len(operands) > 1 and not operands[1].data and operands[1].shape in ((), (1,)):
            return SLICE
        if op == "Expand":
            return TRANSPARENT if operands[0].shape is not None and operands[0].shape == sizes_of(node.outputs[0]) else kind
        if op == "QuantizeLinear" and _rectifies(node):
            return POINTWISE
        if op in ("Conv", "FusedConv"):
            kind = replace(kind, wide=_kernel(node, operands) != {1})
        if op in PRODUCT_SUMS:
            return replace(kind, linear=not node.attributes.get_string("activation"))
        if op == "LayerNormalization" and node.attributes.get_int("axis", -1) not in (-1, len(operands[0].shape or ()) - 1):
            return replace(kind, axis=1, vote=1)
        if op == "ReduceMean" and operands[0].shape is not None and _reduced(node, operands[0]) == (len(operands[0].shape) - 1,):
            return replace(kind, axis=-1, vote=1)
        return kind


def captured(node: ir.Node) -> Iterator[ir.Value]:
    """What the subgraphs of an If, Loop or Scan read from outside."""
    for graph in subgraphs(node):
        nodes = list(graph.all_nodes())
        inside = {*graph.inputs, *graph.initializers.values(), *(output for inner in nodes for output in inner.outputs)}
        yield from {value: None for inner in nodes for value in inner.inputs if value is not None and value not in inside}


def _rooms(node: ir.Node) -> list[Room[ir.Graph, ir.Value]]:
    """The subgraphs of control flow whose inputs and outputs are known by their places. A loop's state keeps its shape from turn to turn."""
    graphs = {name: a.as_graph() for name, a in node.attributes.items() if a.type == ir.AttributeType.GRAPH}
    body = graphs.get("body")
    if node.domain not in ("", "ai.onnx") or node.op_type not in ("If", "Loop", "Scan"):
        return []
    if body is None:
        return [Room(name, graph, (), tuple(range(len(graph.outputs)))) for name, graph in graphs.items() if not graph.inputs]
    if node.op_type == "Loop":  # turns and condition; turn and condition; condition
        first, carried, after = 2, len(node.inputs) - 2, 1
    else:  # the slices come last
        first, carried, after = 0, len(node.inputs) - node.attributes.get_int("num_scan_inputs", 0), 0
    operands = [None] * first + list(node.inputs[first:])
    entries = [
        Entry(operand, sliced=place >= first + carried, back=place - first + after if first <= place < first + carried else None)
        for place, operand in enumerate(operands)
    ]
    if len(entries) != len(body.inputs) or any(
        entry.back is not None and (_floating(value) and sizes_of(value) != sizes_of(body.outputs[entry.back]))
        for entry, value in zip(entries, body.inputs, strict=True)
    ):
        return []
    return [Room("body", body, tuple(entries), tuple(range(after, after + carried)))]


def _is_shared_zero(value: ir.Value) -> bool:
    """Whether a vector is 0 everywhere, and read by several nodes; larger weights are left unread."""
    tensor = value.const_value
    return tensor is not None and len(tensor.shape) == 1 and len(value.uses()) > 1 and not tensor.numpy().any()


def _floating(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()


def module_of(node: ir.Node) -> str:
    """Path of the module that ran a node, where the exporter says so; else ""."""
    return _owner(node)[0]


def _owner(node: ir.Node) -> tuple[str, bool]:
    """Path of the module that ran the node, and whether one around it is a LAuReL block of the model's own."""
    scopes, classes = _list(node.metadata_props, _SCOPES), _list(node.metadata_props, _CLASSES)
    existing = any("laurel" in name.rsplit(".", 1)[-1].lower() for name in classes[:-1])
    if scopes:
        return (scopes[-2] if len(scopes) > 1 else ""), existing
    path = _named_scope(node.name or "")
    return path, any(part.startswith("laurel") for part in path.lower().split("."))


def _named_scope(name: str) -> str:
    """ "/layer1/layer1.0/Add" -> "layer1.0": module paths in the node names of PyTorch's older exporter, where a part repeats the name
    of the Sequential that holds it."""
    parts: list[str] = []
    for part in name.split("/")[1:-1] if name.startswith("/") else ():
        if parts and part.startswith(f"{parts[-1]}."):
            parts.pop()
        parts.append(part)
    return ".".join(parts)


def _list(metadata: Mapping[str, str], key: str) -> list[str]:
    try:
        found = ast.literal_eval(metadata[key]) if key in metadata else []
    except (ValueError, SyntaxError):  # another tool's text under this key
        return []
    return [str(item) for item in found] if isinstance(found, list) else []


def _axes(node: ir.Node, operand: Value, result: Value) -> tuple[int | None, ...] | None:
    """Which dimension of the operand each dimension of the result is."""
    if operand.shape is None or result.shape is None:
        return None
    if node.op_type == "Transpose":
        order = node.attributes.get_ints("perm")
        return tuple(order) if order is not None else tuple(reversed(range(len(operand.shape))))
    return reshaped_axes(operand.shape, result.shape)


def _kernel(node: ir.Node, operands: list[Value]) -> set[int | str]:
    given = node.attributes.get_ints("kernel_shape")
    if given is not None:
        return set(given)
    return set((operands[1].shape or ())[2:]) if len(operands) > 1 else set()


def _rectifies(node: ir.Node) -> bool:
    """Whether a quantisation cuts off what is negative, as quantisers write the ReLU before it: its zero point is the lowest number."""
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    lowest = {ir.DataType.UINT8: 0, ir.DataType.UINT16: 0, ir.DataType.INT8: -128, ir.DataType.INT16: -32768}
    if zero is None or zero.const_value is None or zero.const_value.size != 1 or zero.dtype not in lowest:
        return False
    return int(zero.const_value.numpy().item()) == lowest[zero.dtype]


def _reduced(node: ir.Node, operand: Value) -> tuple[int, ...]:
    """The axes of a reduction, from 0."""
    axes = node.attributes.get_ints("axes")
    if axes is None and len(node.inputs) > 1 and node.inputs[1] is not None and node.inputs[1].const_value is not None:
        axes = node.inputs[1].const_value.numpy().tolist()
    return tuple(axis % len(operand.shape or ()) for axis in axes or ())
