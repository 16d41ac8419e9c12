"""laurel(x, f)  ->  lent((laurel.a, ..), x, f): how the graph of a site comes to its connection.

The connection is a child of the graph module that is given. In a region, which is a graph module of its own, it is called as a child of that, too.
In a subgraph of control flow it is called with what its op is given: its parameters are operands of that op, of each op around it, and inputs of
all their subgraphs, once for all sites of the connection there.
"""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from torch import fx

from laurel_rewrite.graph.regions import rooms_of, subgraphs_of
from laurel_rewrite.operators.lent import Lent, tensors_of
from laurel_rewrite.operators.protocol import Connection


@dataclass(frozen=True)
class Called:
    """How a connection is called in a graph: the module, and, where they are lent to it, its tensors."""

    target: str
    own: tuple[fx.Node, ...] | None = None

    def __call__(self, graph: fx.Graph, operands: Sequence[Any], given: dict[str, Any]) -> fx.Node:
        """A call where the graph inserts."""
        return graph.call_module(self.target, tuple(operands) if self.own is None else (self.own, *operands), given)


class Lending:
    """What a graph module's graphs need to call connections.

    Args:
        root: the graph module; the connections are its children, by site.
        connections: by site.

    Attributes:
        touched: the graphs that were changed, or are to be, and their modules.
    """

    def __init__(self, root: fx.GraphModule, connections: Mapping[str, Connection]) -> None:
        self.root, self.connections = root, connections
        self.touched = {root.graph: root}
        self._ops = ops_of_rooms(root)
        self._known: dict[tuple[fx.Graph, str], tuple[fx.Node, ...]] = {}

    def called(self, graph: fx.Graph, site: str) -> Called:
        """The call of a site's connection in a graph."""
        home = module_of(graph)
        self.touched[graph] = home
        if graph not in self._ops:
            return Called(self._child(home, site))
        own = self._own(graph, site)
        target = f"{site.replace('.', '_')}_lent"
        if not hasattr(home, target):
            home.add_submodule(target, Lent(self.connections[site]))
        return Called(target, own)

    def _child(self, home: fx.GraphModule, site: str) -> str:
        """What a site's connection is called in a graph module: its path below that."""
        if home is self.root:
            return site
        path = next((name for name, module in self.root.named_modules() if module is home), "")
        target = site.removeprefix(f"{path}.") if path else site
        home.add_submodule(target, self.connections[site])
        return target

    def _own(self, graph: fx.Graph, site: str) -> tuple[fx.Node, ...]:
        """The tensors of a connection as nodes of a graph."""
        if (graph, site) not in self._known:
            made = self._inputs(graph, site) if graph in self._ops else self._attributes(graph, site)
            self._known[graph, site] = made
        return self._known[graph, site]

    def _attributes(self, graph: fx.Graph, site: str) -> tuple[fx.Node, ...]:
        """They are read from the connection, at the beginning; a copy of the graph module has it then, and not its parameters alone."""
        home = module_of(graph)
        self.touched[graph] = home
        target = self._child(home, site)
        first = next(node for node in graph.nodes if node.op != "placeholder")
        with graph.inserting_before(first):
            connection = graph.get_attr(target)

            def read(name: str) -> fx.Node:
                return reduce(lambda node, part: graph.call_function(builtins.getattr, (node, part)), name.split("."), connection)

            return tuple(read(name) for name, _ in tensors_of(self.connections[site]))

    def _inputs(self, graph: fx.Graph, site: str) -> tuple[fx.Node, ...]:
        """They are operands of the op whose subgraph the graph is."""
        op = self._ops[graph]
        outside = self._own(op.graph, site)
        *others, last = op.args
        assert isinstance(last, list | tuple)
        op.args = (*others, type(last)((*last, *outside)))
        names = [f"{site}.{name}".replace(".", "_") for name, _ in tensors_of(self.connections[site])]
        for inner in subgraphs_of(op):
            self.touched[inner] = module_of(inner)
            inputs = inner.find_nodes(op="placeholder")
            with inner.inserting_before(inputs[-1].next if inputs else next(iter(inner.nodes))):
                self._known[inner, site] = tuple(inner.placeholder(name) for name in names)
        return self._known[graph, site]


def ops_of_rooms(root: fx.GraphModule) -> dict[fx.Graph, fx.Node]:
    """The op of each room in a graph module."""
    graphs = [module.graph for module in root.modules() if isinstance(module, fx.GraphModule)]
    return {room.graph: node for graph in graphs for node in graph.nodes for room in rooms_of(node)}


def module_of(graph: fx.Graph) -> fx.GraphModule:
    """The module whose code a graph is."""
    module = graph.owning_module
    assert isinstance(module, fx.GraphModule)
    return module
