"""What every pass over an ONNX model leaves behind: names that stand once, and values that are computed before they are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir

from laurel_rewrite.errors import ExportError
from laurel_rewrite.passes.base import Pass, PassResult


class OnnxPass(Pass[ir.Model]):
    """A pass over ONNX models, which are well formed after it."""

    def ensures(self, result: PassResult[ir.Model]) -> None:
        check_graph(result.graph_module)


def check_graph(model: ir.Model) -> None:
    """What a runtime relies on before it looks at any operator. onnx's own checker knows nothing of the names of nodes.

    Raises:
        ExportError: two nodes of one graph have one name, a value is computed twice under one name (a subgraph's may not hide an outer
            one either), or is read where it does not exist yet.
    """
    _check(model.graph, {})


def names_of(model: ir.Model) -> set[str]:
    """Every name of a node or a value in a model and its subgraphs."""
    names: set[str | None] = set()
    for graph in _graphs(model.graph):
        names.update(value.name for value in (*graph.inputs, *graph.initializers.values()))
        for node in graph:
            names.add(node.name)
            names.update(value.name for value in node.outputs)
    return {name for name in names if name}


def subgraphs(node: ir.Node) -> list[ir.Graph]:
    """The bodies of a loop, the sides of a condition."""
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            found += attribute.as_graphs()
    return found


def _graphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    stack = [graph]
    while stack:
        graph = stack.pop()
        yield graph
        stack += [inner for node in graph for inner in subgraphs(node)]


def _check(graph: ir.Graph, known: dict[str, ir.Value]) -> None:
    """One graph, with the values that it can see outside by name; it leaves those as they were."""
    nodes: set[str] = set()
    own: list[str] = []

    def define(values: Iterable[ir.Value], what: str) -> None:
        for value in values:
            if not value.name or known.get(value.name) is value:  # an initializer may be an input too
                continue
            if value.name in known:
                raise ExportError(f"The name {value.name!r} of {what} stands for another value already.")
            known[value.name] = value
            own.append(value.name)

    define(graph.inputs, "an input")
    define(graph.initializers.values(), "an initializer")
    for node in graph:
        if node.name and node.name in nodes:
            raise ExportError(f"Two nodes have the name {node.name!r}; the second is a {node.op_type}.")
        nodes.add(node.name or "")
        _read(node.inputs, known, f"the {node.op_type} {node.name!r}")
        for inner in subgraphs(node):
            _check(inner, known)
        define(node.outputs, f"an output of the {node.op_type} {node.name!r}")
    _read(graph.outputs, known, "the graph's outputs")
    for name in own:
        del known[name]


def _read(values: Iterable[ir.Value | None], known: dict[str, ir.Value], reader: str) -> None:
    for value in values:
        if value is not None and value.name and known.get(value.name) is not value:
            raise ExportError(f"{value.name!r} is read by {reader}, where it is not computed yet.")
