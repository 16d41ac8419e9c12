"""One flat graph from a graph with regions: the subgraphs that an export makes of autocast, no_grad and checkpointed code, and graph modules that
are called as modules, once.

They run once, where they stand, and are read as if their ops stood there. The subgraphs of control flow may run often or never; of them
only the sums are listed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from laurel_rewrite.private import SET_GRAD, HigherOrderOperator, rename

_REGIONS = frozenset(
    "wrap_with_autocast wrap_with_set_grad_enabled tag_activation_checkpoint wrap_activation_checkpoint invoke_subgraph wrap".split()
)
ORIGIN = "laurel_origin"
"""In the metadata of a node of a flat graph: the node that it stands for, in the graph itself or in that of a region."""
_ADDS = frozenset({"add", "add_", "iadd"})


def sum_in_subgraph() -> None:
    """Stands for a sum in the subgraph of a control-flow op."""


def flattened(graph: fx.Graph) -> fx.Graph:
    """The graph with its regions in place of their calls, or the graph itself where it has none.

    Nodes outside of regions keep their names; those inside are named by their region too. Whether gradients are on is said by
    `_set_grad_enabled` nodes, as in a graph traced without regions.
    """
    if not any(_subgraphs(node) or nested(node) is not None for node in graph.nodes):
        return graph
    flat = _Flat({node.name for node in graph.nodes})
    output = flat.copy(graph, {}, "")
    flat.graph.output(output)
    return flat.graph


class _Flat:
    def __init__(self, taken: set[str]) -> None:
        self.graph = fx.Graph()
        self.taken = taken
        self.recording = True

    def copy(self, graph: fx.Graph, known: dict[fx.Node, Any], prefix: str, path: str = "") -> Any:
        """Append a graph's nodes. `known` has what stands for its placeholders in a region, `path` is that of a module that it is the code of;
        returns what stands for its output."""
        for node in graph.nodes:
            if node in known:
                continue
            if node.op == "output":
                return fx.node.map_arg(node.args[0], known.__getitem__)
            inner = _subgraphs(node)
            source = node.args[0] if node.args else None
            if inner and _name(node) in _REGIONS:
                known[node] = self._region(node, inner[0], known)
            elif (module := nested(node)) is not None:
                known[node] = self._called(node, module, known, path)
            elif _name(node) == "getitem" and isinstance(source, fx.Node) and isinstance(known.get(source), list | tuple):
                known[node] = known[source][node.args[1]]
            else:
                known[node] = self._node(node, known, prefix, path)
                for add in [a for subgraph in inner for a in _sums(subgraph)]:
                    self._listed(node, add)
        return None

    def _region(self, node: fx.Node, subgraph: fx.Graph, known: dict[fx.Node, Any]) -> Any:
        inputs = [n for n in subgraph.nodes if n.op == "placeholder"]
        # They come last: the other arguments say what the region is. Some regions hold them in one tuple.
        given = [known[a] if isinstance(a, fx.Node) else a for a in _flat_arguments(node)][-len(inputs) :] if inputs else []
        before = self.recording
        if _name(node) == "wrap_with_set_grad_enabled":
            self._record(bool(node.args[0]))
        output = self.copy(subgraph, dict(zip(inputs, given, strict=True)), f"{node.name}_")
        self._record(before)
        return output

    def _called(self, node: fx.Node, module: fx.GraphModule, known: dict[fx.Node, Any], path: str) -> Any:
        """The nodes of a graph module in the place of its call."""
        given = [fx.node.map_arg(value, known.__getitem__) for value in (*node.args, *node.kwargs.values())]
        names = [None] * len(node.args) + [*node.kwargs]
        inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
        by_name = {name: value for name, value in zip(names, given, strict=True) if name is not None}
        ordered = iter(given[: len(node.args)])
        inner = {n: by_name[str(n.target)] if n.target in by_name else next(ordered, n.args[0] if n.args else None) for n in inputs}
        return self.copy(module.graph, inner, f"{node.name}_", f"{path}.{node.target}".lstrip("."))

    def _record(self, on: bool) -> None:
        if on is not self.recording:
            self.graph.call_function(SET_GRAD, (on,))
        self.recording = on

    def _node(self, node: fx.Node, known: dict[fx.Node, Any], prefix: str, path: str) -> fx.Node:
        made = self.graph.node_copy(node, known.__getitem__)
        made.meta[ORIGIN] = node
        if path:  # of a module inside, whose names are its own
            stack = node.meta.get("nn_module_stack") or {}
            inside = {f"{path}.{key}": (f"{path}.{inner}".rstrip("."), cls) for key, (inner, cls) in stack.items()}
            made.meta["nn_module_stack"] = {path: (path, fx.GraphModule), **inside}
            if node.op in ("call_module", "get_attr"):
                made.target = f"{path}.{node.target}"
        if prefix:
            name = f"{prefix}{node.name}"
            while name in self.taken:
                name += "_"
            self.taken.add(name)
            rename(made, name)
        return made

    def _listed(self, node: fx.Node, add: fx.Node) -> None:
        made = self.graph.call_function(sum_in_subgraph)
        made.meta = dict(add.meta)
        rename(made, f"{add.name}_in_{node.name}")


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _subgraphs(node: fx.Node) -> list[fx.Graph]:
    """The graphs that a higher-order op is called with."""
    if node.op != "call_function" or not isinstance(node.target, HigherOrderOperator):
        return []
    found = []
    for operand in node.all_input_nodes:
        module: Any = node.graph.owning_module
        for name in str(operand.target).split(".") if operand.op == "get_attr" else ():
            module = getattr(module, name, None)
        if operand.op == "get_attr" and isinstance(module, fx.GraphModule):
            found.append(module.graph)
    return found


def nested(node: fx.Node) -> fx.GraphModule | None:
    """The graph module that a node calls, if nobody else calls it."""
    if node.op != "call_module":
        return None
    module: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        module = getattr(module, name, None)
    calls = [other for other in node.graph.nodes if other.op == "call_module" and other.target == node.target]
    return module if isinstance(module, fx.GraphModule) and len(calls) == 1 else None


def _flat_arguments(node: fx.Node) -> list[Any]:
    flat: list[Any] = []
    for argument in node.args:
        flat += argument if isinstance(argument, list | tuple) else [argument]
    return flat


def _sums(graph: fx.Graph) -> Iterator[fx.Node]:
    """Every addition of two values, in nested subgraphs too."""
    for node in graph.nodes:
        if node.op == "call_function" and len(node.all_input_nodes) == 2 and _name(node).split(".")[0] in _ADDS:
            yield node
        for inner in _subgraphs(node):
            yield from _sums(inner)
