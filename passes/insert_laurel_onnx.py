"""z = Add(x, f)  ->  z = laurel_rewrite::LAuReL_...(x, f, parameters): function nodes in an ONNX graph.

Where the sum is part of a node that does more, that node stays, and its operands become a f and b (x + ...). What is added has the type of
the sum: a Cast goes in front of an operand, or of an earlier state, that has another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from laurel_rewrite.errors import ExportError
from laurel_rewrite.graph.from_onnx import METADATA
from laurel_rewrite.operators.config import SiteConfig
from laurel_rewrite.operators.onnx_function import DOMAIN, DOMAIN_VERSION, IR_VERSION, FunctionForm, branch_function, parameter_names
from laurel_rewrite.operators.registry import operator
from laurel_rewrite.passes.algebra import Editor
from laurel_rewrite.passes.base import PassResult
from laurel_rewrite.passes.onnx_pass import OnnxPass


@dataclass(frozen=True)
class OnnxSite:
    """One place in an ONNX graph where a LAuReL node goes.

    Attributes:
        id: site id; the prefix of its initializers, and the node's name.
        node: the node that is replaced: its output 0 becomes the LAuReL node's.
        skip: x; None where the node is one further branch, a f, of a sum whose site stands elsewhere.
        branches: f; none where the node is the skip's term, b (x + ...), of a sum that another node computes.
        past: (lag, value) of the earlier states that PA reads.
        config: the operator.
        parameters: the tensors by their names in `parameter_names`.
    """

    id: str
    node: ir.Node
    skip: ir.Value | None
    branches: tuple[ir.Value, ...]
    past: tuple[tuple[int, ir.Value], ...]
    config: SiteConfig
    parameters: Mapping[str, ir.TensorProtocol]

    @property
    def form(self) -> FunctionForm:
        branches = len(self.branches) if self.skip is not None else 1
        types = {tensor.dtype for tensor in self.parameters.values()}
        casts = bool(types) and self.dtype is not None and types != {self.dtype}
        flat = self.config.axis == 1 and self.config.maps > 0 and ir.DataType.DOUBLE in types
        return FunctionForm(self.config, branches, (0, *(lag for lag, _ in self.past)), casts, flat)

    @property
    def dtype(self) -> ir.DataType | None:
        """Of the sum; None where the graph does not say."""
        values = (self.node.outputs[0], self.skip, *self.branches)
        return next((value.dtype for value in values if value is not None and value.dtype is not None), None)


class InsertLaurelOnnx(OnnxPass):
    """Replace nodes by LAuReL function nodes, in place.

    Args:
        sites: where, and with what.
        version: of the tool, for the metadata.
    """

    def __init__(self, sites: list[OnnxSite], version: str) -> None:
        self.sites = sites
        self.version = version

    def requires(self, graph: ir.Model) -> None:
        names = set(graph.graph.initializers)
        for site in self.sites:
            missing = [name for name in parameter_names(site.config) if name not in site.parameters]
            clash = [name for name in site.parameters if f"{site.id}.{name}" in names]
            if missing or clash:
                raise ExportError(
                    f"{site.id}: the parameter {(missing or clash)[0]!r} is {'missing' if missing else 'in the graph already'}"
                )
        opset, needed = graph.opset_imports.get("", 0), required_opset(self.sites)
        if opset < needed or graph.ir_version < IR_VERSION:
            raise ExportError(
                f"These LAuReL nodes need opset {needed} and IR version {IR_VERSION}; the graph has {opset} and {graph.ir_version}."
            )

    def call(self, graph: ir.Model) -> PassResult[ir.Model]:
        opsets = {"": graph.opset_imports[""]}
        initializers: dict[str, ir.Value] = {}
        functions: dict[tuple[bool, FunctionForm], ir.Function] = {}
        replaced: dict[ir.Value, ir.Value] = {}
        used: Counter[str] = Counter()
        editor = Editor(graph)
        for site in self.sites:
            form = site.form
            if (site.skip is None, form) not in functions:
                build = branch_function if site.skip is None else operator(site.config.variant).onnx_function
                function = functions[site.skip is None, form] = build(form, opsets)
                graph.functions.setdefault(function.identifier(), function)
            function = functions[site.skip is None, form]
            wanted = ["mix"] if site.skip is None else parameter_names(site.config)
            parameters = [_initializer(graph, initializers, f"{site.id}.{name}", site.parameters[name]) for name in wanted]
            given = [*([] if site.skip is None else [site.skip]), *site.branches, *(value for _, value in site.past)]
            name = editor.name(site.id if not used[site.id] else f"{site.id}@{used[site.id]}")
            used[site.id] += 1
            operands = [_cast(editor, site, replaced.get(value, value)) for value in given]
            replaced[site.node.outputs[0]] = self._insert(site, function, [*operands, *parameters], name)
        graph.opset_imports[DOMAIN] = DOMAIN_VERSION
        return PassResult(graph, tuple(site.id for site in self.sites))

    def _insert(self, site: OnnxSite, function: ir.Function, inputs: list[ir.Value], name: str) -> ir.Value:
        old = site.node
        node = ir.Node(function.domain, function.name, inputs, num_outputs=1, name=name)
        node.metadata_props.update(old.metadata_props)
        node.metadata_props.update(
            {
                f"{METADATA}site": site.id,
                f"{METADATA}variant": site.config.variant,
                f"{METADATA}rank": str(site.config.rank) if site.config.maps else "",
                f"{METADATA}version": self.version,
            }
        )
        before, after = old.outputs[0], node.outputs[0]
        after.name, after.type, after.shape = before.name, before.type, before.shape
        graph = old.graph
        assert graph is not None
        graph.insert_before(old, node)
        ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
        graph.remove(old, safe=True)
        return after

    def ensures(self, result: PassResult[ir.Model]) -> None:
        super().ensures(result)
        present = [n.metadata_props.get(f"{METADATA}site") for n in result.graph_module.graph if n.domain == DOMAIN]
        if sorted(filter(None, present)) != sorted(result.changed):
            raise ExportError("The ONNX graph does not hold the LAuReL nodes that were inserted.")


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


def required_opset(sites: Iterable[OnnxSite]) -> int:
    """The first opset that has the operators of all these sites."""
    return max((site.form.opset for site in sites), default=1)
