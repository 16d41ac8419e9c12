"""One flat graph from a graph with regions: the subgraphs that an export makes of autocast, no_grad and checkpointed code, and graph modules that
are called as modules, once.

They run once, where they stand, and are read as if their ops stood there. The subgraphs of control flow may run often or never, and stand behind
their op as rooms (`graph.rooms`): nodes that no other node of the graph reads, from placeholders to an `end_of_room`. Of other subgraphs, such as
the condition of a loop, only the sums are listed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from laurel_rewrite.graph.rooms import Entry, Room
from laurel_rewrite.private import SET_GRAD, HigherOrderOperator, rename

_REGIONS = frozenset(
    "wrap_with_autocast wrap_with_set_grad_enabled tag_activation_checkpoint wrap_activation_checkpoint invoke_subgraph wrap".split()
)
ORIGIN = "laurel_origin"
"""In the metadata of a node of a flat graph: the node that it stands for, in the graph itself or in that of a region."""
ENTRY = "laurel_entry"
"""In that of a room's placeholder: the `Entry` that says what it is given."""
ROOM = "laurel_room"
"""In that of any node of a room: its path, which is made of the names of ops and of their subgraphs."""
_ADDS = frozenset({"add", "add_", "iadd"})
_CONDITION = "condition"
_CONTROL: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "cond": (("true", "false"), ("whole",)),
    "while_loop": ((_CONDITION, "body"), ("carried", "whole")),
    "scan": (("body",), ("carried", "sliced", "whole")),
    "map_impl": (("body",), ("sliced", "whole")),
}
"""Of an op of control flow, what its subgraphs are called, and how they are given the groups of operands that come behind them."""


def sum_in_subgraph() -> None:
    """Stands for a sum in the subgraph of a control-flow op."""


def end_of_room(op: Any, results: Any, inputs: Any) -> None:
    """Stands behind the nodes of a room: of which op, what it gives, and its placeholders. In the metadata, under `ROOM`, are the exits."""


def flattened(graph: fx.Graph, *, rooms: bool = True) -> fx.Graph:
    """The graph with its regions in place of their calls and rooms behind their ops, or the graph itself where it has none.

    Nodes outside of regions keep their names; those inside are named by their region too. Whether gradients are on is said by
    `_set_grad_enabled` nodes, as in a graph traced without regions.

    Args:
        graph: stays as it is.
        rooms: False lists the sums of control flow alone.
    """
    if not any(subgraphs_of(node) or nested(node) is not None for node in graph.nodes):
        return graph
    flat = _Flat({node.name for node in graph.nodes}, rooms=rooms)
    output = flat.copy(graph, {}, "")
    flat.graph.output(output)
    return flat.graph


class _Flat:
    def __init__(self, taken: set[str], *, rooms: bool) -> None:
        self.graph = fx.Graph()
        self.taken = taken
        self.rooms = rooms
        self.room = ""  # path of the one whose nodes are appended
        self.recording = True

    def copy(self, graph: fx.Graph, known: dict[fx.Node, Any], prefix: str, path: str = "") -> Any:
        """Append a graph's nodes. `known` has what stands for its placeholders in a region, `path` is that of a module that it is the code of;
        returns what stands for its output."""
        for node in graph.nodes:
            if node in known:
                continue
            if node.op == "output":
                return fx.node.map_arg(node.args[0], known.__getitem__)
            inner = subgraphs_of(node)
            source = node.args[0] if node.args else None
            if inner and _name(node) in _REGIONS:
                known[node] = self._region(node, inner[0], known)
            elif (module := nested(node)) is not None:
                known[node] = self._called(node, module, known, path)
            elif _name(node) == "getitem" and isinstance(source, fx.Node) and isinstance(known.get(source), list | tuple):
                known[node] = known[source][node.args[1]]
            else:
                known[node] = self._node(node, known, prefix, path)
                rooms = rooms_of(node) if self.rooms else []
                for room in rooms:
                    self._room(node, room, known, path)
                closed = [subgraph for subgraph in inner if all(subgraph is not room.graph for room in rooms)]
                for add in [a for subgraph in closed for a in _sums(subgraph)]:
                    self._listed(node, add)
        return None

    def _room(self, node: fx.Node, room: Room[fx.Graph, Any], known: dict[fx.Node, Any], path: str) -> None:
        """The nodes of a room behind those of its op."""
        op, outside = known[node], self.room
        self.room = f"{outside}.{node.name}.{room.name}" if outside else f"{op.name}.{room.name}"
        prefix = f"{op.name}_{room.name}_"
        inside: dict[fx.Node, Any] = {}
        for placeholder, entry in zip(_inputs(room.graph), room.entries, strict=True):
            made = inside[placeholder] = self._node(placeholder, inside, prefix, path)
            operand = known[entry.operand] if isinstance(entry.operand, fx.Node) else None
            made.meta[ENTRY] = entry.given(operand if isinstance(operand, fx.Node) else None)
        results = self.copy(room.graph, dict(inside), prefix, path)
        end = self.graph.call_function(end_of_room, (op, results, [*inside.values()]))
        end.meta[ROOM] = room.exits
        self.room = outside

    def _region(self, node: fx.Node, subgraph: fx.Graph, known: dict[fx.Node, Any]) -> Any:
        inputs = _inputs(subgraph)
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
        inputs = _inputs(module.graph)
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
        if self.room:
            made.meta[ROOM] = self.room
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


def rooms_of(node: fx.Node) -> list[Room[fx.Graph, Any]]:
    """The rooms of a control-flow op, where nothing else runs them; none of any other node. Operands can be added to its last group: each of its
    subgraphs has them as its last inputs."""
    graphs, (names, groups) = subgraphs_of(node), _CONTROL.get(_name(node), ((), ()))
    if not names or node.kwargs or len(graphs) != len(names) or _run_elsewhere(node, graphs):
        return []
    entries: list[Entry[Any]] = []
    for group, operands in zip(groups, node.args[-len(groups) :], strict=True):
        given = enumerate(operands if isinstance(operands, list | tuple) else ())
        entries += [Entry(operand, sliced=group == "sliced", back=place if group == "carried" else None) for place, operand in given]
    carried = tuple(range(sum(entry.back is not None for entry in entries)))
    rooms = []
    for name, graph in zip(names, graphs, strict=True):
        results = _results(graph)
        exits = tuple(range(len(results))) if groups == ("whole",) else carried
        if name != _CONDITION and len(_inputs(graph)) == len(entries):
            rooms.append(Room(name, graph, tuple(entries), exits))
    return rooms


def _run_elsewhere(node: fx.Node, graphs: list[fx.Graph]) -> bool:
    """Whether something else runs a subgraph of a node."""
    owners = [graph.owning_module for graph in graphs]
    held = [n for n in node.graph.nodes if n.op == "get_attr" and any(_attribute(n) is owner for owner in owners)]
    return len(held) > len(graphs) or any(len(n.users) > 1 for n in held)


def _inputs(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def _results(graph: fx.Graph) -> list[Any]:
    (end,) = graph.find_nodes(op="output")
    return list(end.args[0]) if isinstance(end.args[0], list | tuple) else [end.args[0]]


def _attribute(node: fx.Node) -> Any:
    """What a get_attr node, or the target of a call, names in the module whose code its graph is."""
    found: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        found = getattr(found, name, None)
    return found


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def subgraphs_of(node: fx.Node) -> list[fx.Graph]:
    """The graphs that a higher-order op is called with."""
    if node.op != "call_function" or not isinstance(node.target, HigherOrderOperator):
        return []
    held = [_attribute(operand) for operand in node.all_input_nodes if operand.op == "get_attr"]
    return [module.graph for module in held if isinstance(module, fx.GraphModule)]


def nested(node: fx.Node) -> fx.GraphModule | None:
    """The graph module that a node calls, if nobody else calls it."""
    if node.op != "call_module":
        return None
    module = _attribute(node)
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
        for inner in subgraphs_of(node):
            yield from _sums(inner)
