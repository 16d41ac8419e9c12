"""z = Add(x, f)  ->  z = laurel_rewrite::...(x, f, states, parameters): function nodes in an ONNX graph.

Where the sum is part of a node that does more, that node stays, and its operands become what a branch and what the skip bring to the sum. What
is added has the type of the sum: a Cast goes in front of an operand, or of a state, that has another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir
from onnx_ir import tensor_adapters

from laurel_rewrite.errors import ExportError
from laurel_rewrite.graph.from_onnx import METADATA
from laurel_rewrite.operators.onnx_function import CALL, DOMAIN, DOMAIN_VERSION, ENDS, IR_VERSION, Call, StepFunction, step_function
from laurel_rewrite.operators.protocol import Connection
from laurel_rewrite.passes.algebra import Editor
from laurel_rewrite.passes.base import PassResult
from laurel_rewrite.passes.onnx_pass import OnnxPass


@dataclass(frozen=True)
class Feed:
    """One of q, k and v, which reads what is left for it instead of what the branch reads.

    Attributes:
        reader: the linear map.
        read: what it reads.
        norm: the nodes by which that comes from the stream.
        start: the value of the stream that they read.
    """

    reader: ir.Node
    read: ir.Value
    norm: tuple[ir.Node, ...]
    start: ir.Value


@dataclass(frozen=True)
class OnnxSite:
    """One place in an ONNX graph where a function node goes.

    Attributes:
        id: site id; the prefix of its initializers, and the node's name.
        node: the node that is replaced: its output 0 becomes the new node's, and the state behind it its other ones.
        skip: x; None where the node is one further branch of a sum whose site stands elsewhere.
        branches: f; none where the node is the skip's term of a sum that another node computes, or the end of a link.
        connection: the module, with its parameters.
        states: the state before it, as values of the graph.
        reads: what the branch reads, where the operator needs it.
        before: id of the site whose state that is, where it is not given as values.
        link: the node is the end of the link behind the site, and `skip` what that gives.
        feeds: q, k and v of its branch, where they read what the connection before it left for them.
    """

    id: str
    node: ir.Node
    skip: ir.Value | None
    branches: tuple[ir.Value, ...]
    connection: Connection
    states: tuple[ir.Value, ...] = ()
    before: str = ""
    reads: ir.Value | None = None
    link: bool = False
    feeds: tuple[Feed, ...] = ()

    @property
    def part(self) -> str:
        if self.link:
            return "read"
        return "branch" if self.skip is None else "whole" if self.branches else "skip"

    @property
    def dtype(self) -> ir.DataType | None:
        """Of the sum; None where the graph does not say."""
        values = (self.node.outputs[0], self.skip, *self.branches)
        return next((value.dtype for value in values if value is not None and value.dtype is not None), None)

    def call(self, states: int) -> Call:
        """What its node computes, given so many states."""
        return Call(self.connection.config, self.part, len(self.branches), states, self.reads is not None and self.part != "branch")

    def function(self, states: int) -> StepFunction:
        """The function that computes it."""
        dtype = tensor_adapters.to_torch_dtype(self.dtype or ir.DataType.FLOAT)
        return step_function(self.connection, self.call(states), dtype)

    @cached_property
    def parameters(self) -> dict[str, ir.TensorProtocol]:
        """The tensors of its connection by name."""
        return parameters_of(self.connection)


def parameters_of(connection: Connection) -> dict[str, ir.TensorProtocol]:
    """The tensors of a connection by their names in it."""
    return {name: tensor_adapters.TorchTensor(value.detach().contiguous()) for name, value in connection.state_dict(keep_vars=True).items()}


class InsertLaurelOnnx(OnnxPass):
    """Replace nodes by function nodes, in place.

    Args:
        sites: where, and with what, in the order of execution.
        version: of the tool, for the metadata.
    """

    def __init__(self, sites: list[OnnxSite], version: str) -> None:
        self.sites = sites
        self.version = version

    def requires(self, graph: ir.Model) -> None:
        names = set(graph.graph.initializers)
        for site in self.sites:
            clash = [name for name in site.parameters if f"{site.id}.{name}" in names]
            if clash:
                raise ExportError(f"{site.id}: the parameter {clash[0]!r} is in the graph already")
        opset, needed = graph.opset_imports.get("", 0), max((step.opset for step in steps_of(self.sites)), default=1)
        if opset < needed or graph.ir_version < IR_VERSION:
            raise ExportError(
                f"These LAuReL nodes need opset {needed} and IR version {IR_VERSION}; the graph has {opset} and {graph.ir_version}."
            )

    def call(self, graph: ir.Model) -> PassResult[ir.Model]:
        functions = _Functions(graph)
        initializers: dict[str, ir.Value] = {}
        replaced: dict[ir.Value, ir.Value] = {}
        used: Counter[str] = Counter()
        editor = Editor(graph)
        left: dict[str, list[ir.Value]] = {}  # the state behind each site
        for site, step in zip(self.sites, steps_of(self.sites), strict=True):
            skip = site.skip if site.skip is None else replaced.get(site.skip, site.skip)
            states = [*site.states, *(_shaped(editor, site, skip, *value) for value in enumerate(left.get(site.before, [])))]
            for feed, value in zip(site.feeds, left.get(site.before, []), strict=False):
                _feed(feed, replaced.get(feed.start, feed.start), value)
            parameters = [_initializer(graph, initializers, f"{site.id}.{name}", site.parameters[name]) for name in step.parameters]
            given = [*([] if site.skip is None else [site.skip]), *site.branches, *states]
            given += [site.reads] if site.reads is not None and site.part != "branch" else []
            name = editor.name(site.id if not used[site.id] else f"{site.id}@{used[site.id]}")
            used[site.id] += 1
            operands = [_cast(editor, site, replaced.get(value, value)) for value in given]
            node = self._insert(site, functions.of(site, step), step, [*operands, *parameters], name)
            replaced |= dict(zip(site.node.outputs, node.outputs, strict=False))
            if site.part != "branch":
                computed = iter(node.outputs[1:])
                left[site.id] = [next(computed) if source is None else operands[source] for source in step.handed_on]
        graph.opset_imports[DOMAIN] = DOMAIN_VERSION
        return PassResult(graph, tuple(site.id for site in self.sites))

    def _insert(self, site: OnnxSite, function: ir.Function, step: StepFunction, inputs: list[ir.Value], name: str) -> ir.Node:
        old = site.node
        computed = sum(source is None for source in step.handed_on)
        node = ir.Node(function.domain, function.name, inputs, num_outputs=1 + computed, name=name)
        node.metadata_props.update(old.metadata_props)
        config = site.connection.config
        states = len(inputs) - len(step.parameters) - site.call(0).operand_count
        node.metadata_props.update(
            {
                f"{METADATA}site": site.id,
                f"{METADATA}variant": config.variant,
                f"{METADATA}rank": str(config.options["rank"]) if site.connection.has_maps else "",
                f"{METADATA}version": self.version,
                CALL: site.call(states).to_json(),
            }
        )
        graph = old.graph
        assert graph is not None
        graph.insert_before(old, node)
        left = [place for place, source in enumerate(step.handed_on) if source is None]
        outputs = [(old.outputs[0], node.outputs[0]), *zip(old.outputs[1:], node.outputs[1:], strict=False)]
        for before, after in outputs:
            after.name, after.type, after.shape = before.name, before.type, before.shape
            ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
        for number, after in enumerate(node.outputs[len(outputs) :], start=len(outputs)):
            after.name = f"{name}.state_{number}"
            after.dtype = site.dtype or ir.DataType.FLOAT
            if site.skip is not None and site.skip.shape is not None:
                lead = type(site.connection).lead if left[number - len(outputs)] >= site.call(0).leaves else 0
                after.shape = ir.Shape([*[None] * lead, *site.skip.shape])
        graph.remove(old, safe=True)
        return node

    def ensures(self, result: PassResult[ir.Model]) -> None:
        super().ensures(result)
        present = [n.metadata_props.get(f"{METADATA}site") for n in result.graph_module.graph.all_nodes() if n.domain == DOMAIN]
        if sorted(filter(None, present)) != sorted(result.changed):
            raise ExportError("The ONNX graph does not hold the LAuReL nodes that were inserted.")


class _Functions:
    """The functions of a model, one a body."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.known: dict[bytes, ir.Function] = {}

    def of(self, site: OnnxSite, step: StepFunction) -> ir.Function:
        body = step.body.SerializeToString(deterministic=True) + site.part.encode()
        if body not in self.known:
            base = f"{site.connection.title or type(site.connection).__name__}_{site.connection.config.variant}".replace("+", "_").replace(
                "-", "_"
            )
            end = ENDS[site.part]
            names = {function.name for function in self.known.values()}
            wanted = (f"{base}{'' if not number else f'_{number + 1}'}{end}" for number in range(len(names) + 1))
            function = step.named(next(name for name in wanted if name not in names), self.model.opset_imports[""])
            self.known[body] = function
            self.model.functions[function.identifier()] = function
        return self.known[body]


def _feed(feed: Feed, old: ir.Value, value: ir.Value) -> None:
    """Let one of q, k and v read a value, behind the branch's norm."""
    made = {old: value}
    graph = feed.reader.graph
    assert graph is not None
    for node in feed.norm:
        inputs = [made.get(operand, operand) if operand is not None else None for operand in node.inputs]
        copy = ir.Node(node.domain, node.op_type, inputs, node.attributes.values(), num_outputs=len(node.outputs), version=node.version)
        for output, source in zip(copy.outputs, node.outputs, strict=True):
            output.type, output.shape = source.type, source.shape
            made[source] = output
        graph.insert_before(feed.reader, copy)
    places = [place for place, operand in enumerate(feed.reader.inputs) if operand is not None and operand in (feed.read, old)]
    if not places:
        raise ExportError(f"{feed.reader.name} does not read {feed.read.name} in this graph")
    for place in places:
        feed.reader.replace_input_with(place, made.get(feed.read, value))


def _shaped(editor: Editor, site: OnnxSite, skip: ir.Value | None, place: int, state: ir.Value) -> ir.Value:
    """A state in the shape of the skip, behind its own leading dimensions: a stream keeps the order of its elements, not its shape."""
    lead = type(site.connection).lead if place >= site.call(0).fed else 0
    if skip is None:
        return state
    shapes = state.shape, skip.shape
    if shapes[0] is not None and shapes[1] is not None and tuple(shapes[0])[lead:] == tuple(shapes[1]):
        return state
    size = editor.insert(site.node, "Shape", [skip], f"{site.id}/Shape")
    size.dtype = ir.DataType.INT64
    if lead:
        own = editor.insert(site.node, "Shape", [state], f"{site.id}/Shape")
        ends = [editor.constant(f"{site.id}.lead", _int64([end])) for end in (0, lead)]
        front = editor.insert(site.node, "Slice", [own, *ends], f"{site.id}/Slice")
        size = editor.insert(site.node, "Concat", [front, size], f"{site.id}/Concat", attributes={"axis": 0})
    shaped = editor.insert(site.node, "Reshape", [state, size], f"{site.id}/Reshape", like=skip if not lead else None)
    shaped.dtype = state.dtype or ir.DataType.FLOAT
    return shaped


def _cast(editor: Editor, site: OnnxSite, value: ir.Value) -> ir.Value:
    """An operand in the type of the sum."""
    if value.dtype is None or site.dtype is None or value.dtype == site.dtype:
        return value
    result = editor.insert(site.node, "Cast", [value], f"{site.id}/Cast", like=value, attributes={"to": int(site.dtype)})
    result.dtype = site.dtype
    return result


def _initializer(model: ir.Model, known: dict[str, ir.Value], name: str, tensor: ir.TensorProtocol) -> ir.Value:
    if name not in known:
        value = ir.Value(name=name, shape=ir.Shape(tensor.numpy().shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        model.graph.register_initializer(value)
        known[name] = value
    return known[name]


def steps_of(sites: Iterable[OnnxSite]) -> list[StepFunction]:
    """The function of each site, in order: how many states one is given depends on how many the one before it leaves."""
    steps, left = [], Counter[str]()
    for site in sites:
        step = site.function(len(site.states) or left[site.before])
        steps.append(step)
        if site.part != "branch":
            left[site.id] = len(step.handed_on)
    return steps


def _int64(values: Sequence[int]) -> np.ndarray:
    return np.array(values, np.int64)
