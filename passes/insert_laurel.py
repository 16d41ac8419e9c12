"""z = x + f  ->  z = laurel(x, f): LAuReL modules as `call_module` nodes in any `fx.GraphModule`.

In the subgraphs of control flow:  cond(p, true, false, (x, ..))  ->  cond(p, true, false, (x, .., laurel.a, laurel.down.weight, ..)), for gradients
go to operands alone, and z = lent((a, down.weight, ..), x, f) inside.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from laurel_rewrite.detection.site import Binding, Site
from laurel_rewrite.detection.sites import Sites, sites_of_graph
from laurel_rewrite.errors import RewriteError
from laurel_rewrite.graph.from_fx import is_seen_elsewhere, mutates
from laurel_rewrite.graph.regions import ORIGIN, flattened
from laurel_rewrite.operators.connections import refuse_second_time
from laurel_rewrite.operators.lent import Lent, draws
from laurel_rewrite.operators.prepared import prepare
from laurel_rewrite.operators.protocol import Connection
from laurel_rewrite.passes.base import Pass, PassResult
from laurel_rewrite.passes.lending import Called, Lending, module_of, ops_of_rooms

if TYPE_CHECKING:
    from laurel_rewrite.plan import Plan
    from laurel_rewrite.plan.sites import PlanSite


class InsertLaurel(Pass[fx.GraphModule]):
    """Insert the LAuReL modules of a plan into a graph, in place.

    The graph may come from `symbolic_trace`, from `ExportedProgram.module()`, from TorchDynamo or from anywhere; its nodes carry shapes. The plan
    names the sites that `laurel_rewrite.detect` finds in this same graph. The result is linted and recompiled, computes what it computed, and
    trains. In a region of the graph (autocast, no_grad, a checkpoint), which is a graph module of its own, the call stands in that; so it does in
    the subgraphs of control flow (`cond`, `scan`, `while_loop`, `map`), whose ops get the parameters as further operands. A stream with a history
    lies in one graph.

    Args:
        plan: what each site gets.
        connections: of each site, where they were made before, by its id; else they are made.
        rooms: False leaves the subgraphs of control flow as they are.

    Raises:
        ConfigError: the plan names a site that the graph does not have, or the graph has LAuReL modules.
        RewriteError: a sum cannot be replaced.
    """

    def __init__(self, plan: Plan, connections: Mapping[str, Connection] | None = None, *, rooms: bool = True) -> None:
        self.plan = plan
        self.connections = connections
        self.rooms = rooms
        self._sites = Sites()
        self._nodes: dict[str, fx.Node] = {}

    def requires(self, graph: fx.GraphModule) -> None:
        refuse_second_time(graph)
        if type(graph).train is not nn.Module.train:
            raise RewriteError(
                f"{type(graph).__name__} has another graph for each mode, of which this is one. Rewrite the model that it was made of"
            )
        self._sites = sites_of_graph(graph, rooms=self.rooms)
        self.plan.check(self._sites)
        self._nodes = {node.name: node.meta.get(ORIGIN, node) for node in flattened(graph.graph, rooms=self.rooms).nodes}
        rows = {row.id: row for row in self.plan.sites}
        graphs: dict[int, fx.Graph] = {}  # of streams with a history
        for site in self._sites:
            if site.module not in rows:
                continue
            row, needed = rows[site.module], [name for name, _, _ in self._sites.bindings[site.id].adds]
            adds = [self._nodes[name] for name in needed]
            if row.operator.needs_input:
                needed.append(self._sites.flow.values[self._sites.read_by(site)].name)
            home = adds[0].graph
            if any(self._nodes[name].graph is not home for name in needed):
                raise RewriteError(
                    f"{site.id}: its sum, or what its branch reads, lies partly in a region of the graph (autocast, no_grad, a checkpoint)"
                )
            if self._sites.room(site):
                _check_in_room(graph, home, row, self.plan.build(row, torch.empty(0)))
            if self.plan.has_history(row.stream) and graphs.setdefault(site.stream, home) is not home:
                raise RewriteError(
                    f"{site.id}: {row.variant} reads the states of the connections before it, and its stream goes through regions of the graph (autocast, "
                    "no_grad, checkpoints). Leave the regions out, or use an operator without history"
                )
            _check_in_place(adds, site.id, module_of(home).get_submodule)

    def call(self, graph: fx.GraphModule) -> PassResult[fx.GraphModule]:
        like = next((p for p in graph.parameters() if p.is_floating_point()), None)
        rows, nodes = {row.id: row for row in self.plan.sites}, self._nodes
        states: dict[int, fx.Node] = {}  # of each stream, as edges of the graph
        made = self.connections or {row.id: self._built(row, like, graph.training) for row in rows.values()}
        for name in rows:
            graph.add_submodule(name, made[name])
        lending = Lending(graph, made)
        for site in self._sites:
            if site.module not in rows:
                continue
            row, connection = rows[site.module], made[site.module]
            called = lending.called(nodes[self._sites.bindings[site.id].adds[0][0]].graph, site.module)
            state = states.get(site.stream)
            if connection.config.fed:
                assert state is not None
                self._feed(site, nodes, state)
            binding, history = self._sites.bindings[site.id], self.plan.has_history(row.stream)
            connection.sides = tuple(side for _, side, _ in binding.adds)
            connection.regrouped = not connection.additive and len(connection.sides) > 1
            read = nodes[self._sites.flow.values[self._sites.read_by(site)].name] if connection.needs_input else None
            out, left = _replace(called, nodes, binding, state, read, history=history)
            nodes[binding.adds[-1][0]] = out  # which is read in its place from here on
            if connection.config.linked:
                assert left is not None
                nodes[row.behind], left = _at_end(called, nodes[row.behind], left)
            if left is not None:
                states[site.stream] = left
        if self.connections is None:
            prepare(graph, self.plan.factors(self._sites))
        for home in lending.touched.values():
            home.graph.lint()
            home.recompile()
        return PassResult(graph, tuple(rows))

    def _built(self, row: PlanSite, like: torch.Tensor | None, training: bool) -> Connection:
        module = self.plan.build(row, like)
        module.train(training)
        return module

    def _feed(self, site: Site, nodes: Mapping[str, fx.Node], state: fx.Node) -> None:
        """Let q, k and v of a branch read what is left for them, behind the branch's norm."""
        sites = self._sites
        values, before = sites.flow.values, sites.after(site, -1)
        assert before is not None
        name = sites.spots[site.id].link_end or values[sites.bindings[before.id].residual.output].name
        norm = [nodes[values[index].name] for index in sites.way_in(site, sites.named(name, site))]
        read = nodes[values[sites.read_by(site)].name]
        old = nodes[name]
        for place, target in enumerate(sites.spots[site.id].projected):
            reader = nodes[target]
            if read not in reader.all_input_nodes:
                raise RewriteError(f"{site.id}: {target} does not read {read.name} in this graph")
            with reader.graph.inserting_before(reader):
                value = reader.graph.call_function(operator.getitem, (state, place))
                made = _copied(norm, {old: value})
            reader.replace_input_with(read, made.get(read, value))

    def ensures(self, result: PassResult[fx.GraphModule]) -> None:
        graphs = [module.graph for module in result.graph_module.modules() if isinstance(module, fx.GraphModule)]
        modules = [module_of(graph).get_submodule(str(n.target)) for graph in graphs for n in graph.nodes if n.op == "call_module"]
        called = {id(module.connection if isinstance(module, Lent) else module) for module in modules}
        missing = [name for name in result.changed if id(result.graph_module.get_submodule(name)) not in called]
        if missing or any(not isinstance(result.graph_module.get_submodule(name), Connection) for name in result.changed):
            raise RewriteError(f"The graph does not call {missing or 'a LAuReL module'} after the insertion.")


def _check_in_room(graph: fx.GraphModule, home: fx.Graph, row: PlanSite, connection: Connection) -> None:
    """Raise RewriteError where a connection cannot stand in a subgraph of control flow."""
    if home not in ops_of_rooms(graph):
        raise RewriteError(
            f"{row.id} ({row.where}): its sum lies in a region (autocast, no_grad, a checkpoint, a module of its own) of a subgraph of control flow, which "
            "no parameters are handed to. Leave the site out with exclude"
        )
    if row.operator.start == "evaluation" or (not row.operator.uses_history and draws(connection, row.shape)):
        raise RewriteError(
            f"{row.id} ({row.where}): {row.variant} draws random numbers in training, and the gradients of control flow are those of another draw. Leave "
            "the site out with exclude, or use another operator"
        )
    place: object = graph
    for name in row.id.split("."):
        place = getattr(place, name, None) if place is not None else None
        if place is not None and not isinstance(place, nn.Module):
            raise RewriteError(f"{row.id} ({row.where}): the graph has a {type(place).__name__} in its way, at {name!r}")


def _replace(
    called: Called,
    nodes: dict[str, fx.Node],
    binding: Binding,
    state: fx.Node | None,
    read: fx.Node | None,
    *,
    history: bool,
) -> tuple[fx.Node, fx.Node | None]:
    """Put one call in the place of the sum's binary adds, in the order of operands in which they added; returns its value, and the state behind
    it, where its stream has a history."""
    adds = [(nodes[name], side) for name, side, _ in binding.adds]
    root, _ = adds[-1]
    operands: list[Any] = [adds[0][0].args[adds[0][1]], *(add.args[1 - side] for add, side in adds)]
    graph = root.graph
    seen = mutates(root) and is_seen_elsewhere(root, module_of(graph).get_submodule)
    with graph.inserting_before(root):
        if seen:  # the sum goes into the memory that the source added to, and what was there is read before that
            operands = [graph.call_method("clone", (operand,)) if operand is root.args[0] else operand for operand in operands]
        given: dict[str, Any] = {"state": () if state is None else state} if history else {}
        call = called(graph, operands, given if read is None else {**given, "n": read})
        out, left = (graph.call_function(operator.getitem, (call, i)) for i in (0, 1)) if history else (call, None)
        made = graph.call_method("copy_", (root.args[0], out)) if seen else out
    for node in {out, made}:
        node.meta = {key: value for key, value in root.meta.items() if key in ("val", "tensor_meta", "nn_module_stack", "stack_trace")}
    root.replace_all_uses_with(made)
    for add, _ in reversed(adds):
        if mutates(add):  # what was added in place is read under its old name from there on
            written = add.args[0]
            assert isinstance(written, fx.Node)
            written.replace_all_uses_with(made, delete_user_cb=lambda user: user > made)
        graph.erase_node(add)
    return made, left


def _copied(nodes: Sequence[fx.Node], made: dict[fx.Node, fx.Node]) -> dict[fx.Node, fx.Node]:
    """Copies of nodes that read other values; what is not among these is shared."""
    for node in nodes:
        made[node] = node.graph.node_copy(node, lambda operand: made.get(operand, operand))
    return made


def _at_end(called: Called, end: fx.Node, state: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Put what is read at the end of a link in the place of what the link gives; returns it, and the state behind it."""
    if mutates(end) and is_seen_elsewhere(end, module_of(end.graph).get_submodule):
        raise RewriteError(f"{called.target}: {end.name} works in place behind it, and another tensor of the same memory is read")
    graph = end.graph
    with graph.inserting_before(end.next):
        call = called(graph, (end,), {"state": state})
        out, left = (graph.call_function(operator.getitem, (call, i)) for i in (0, 1))
    out.meta = {key: value for key, value in end.meta.items() if key in ("val", "tensor_meta", "nn_module_stack", "stack_trace")}
    end.replace_all_uses_with(out, delete_user_cb=lambda user: user is not call)
    return out, left


def _check_in_place(adds: Sequence[fx.Node], site: str, modules: Callable[[str], nn.Module]) -> None:
    """Of several adds, which become one call, only the last may be seen under another name: the others' results would be missing there."""
    for add in adds[:-1]:
        if mutates(add) and is_seen_elsewhere(add, modules, besides=adds):
            raise RewriteError(f"{site}: {add.name} adds in place, and another tensor of the same memory is read before the sum is whole")
