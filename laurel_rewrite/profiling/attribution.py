"""Where the time goes: from the nodes that onnxruntime runs back to the nodes of the file, their modules and their LAuReL sites.

onnxruntime drops names and metadata when it fuses. But the output of a fused node is the output of the last node that went into it, and
what it computes are the nodes between that value and the values that other nodes give: these it has absorbed.

The cost of a site is the time of the nodes that compute nothing else, and of nodes that absorbed a part of it the difference to the
baseline's node of the same output. What is left of the difference between the graphs belongs to no site: caches, layouts, noise.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from laurel_rewrite.graph.from_onnx import METADATA, module_of
from laurel_rewrite.profiling.flops import PRODUCTS
from laurel_rewrite.profiling.fusions import ADDEND
from laurel_rewrite.profiling.traces import Trace

_SITE = f"{METADATA}site"
_LAYOUT = frozenset({"ReorderInput", "ReorderOutput"})
_BLOCKED = "_nchwc"
"""Suffix of the names of nodes in onnxruntime's blocked layout, before it the name of the value."""


@dataclass(frozen=True)
class NodeTime:
    """A node that onnxruntime runs.

    Attributes:
        name, op: in the optimised graph.
        ms: time in one run, scaled so that all nodes sum to the latency of an unprofiled run.
        module: path of the module of what it computes.
        site: the LAuReL site that it computes a part of, or "".
        own: whether it computes nothing but that site.
        value: the value of the file that it gives, or "" where the file has none such, as for a change of layout.
        absorbed: ops of the file that it computes, by type.
        arena_bytes: that all ops hold when it ends.
    """

    name: str
    op: str
    ms: float
    module: str = ""
    site: str = ""
    own: bool = False
    value: str = ""
    absorbed: Counter[str] = field(default_factory=Counter)
    arena_bytes: int = 0


@dataclass(frozen=True)
class SiteCost:
    """What a LAuReL site takes.

    Attributes:
        site: its id.
        ms: milliseconds more than in the baseline.
        nodes: ops that compute nothing else.
        into: the node that absorbed its sum, or "" where none did.
    """

    site: str
    ms: float
    nodes: int
    into: str


@dataclass(frozen=True)
class Attribution:
    """Where one model's time goes.

    Attributes:
        nodes: in the order of execution.
        overhead: latency of a profiled run over that of an unprofiled one; times are divided by it.
        sites: the cost of each LAuReL site.
        left_over_ms: of the difference to the baseline, what belongs to no site.
    """

    nodes: tuple[NodeTime, ...]
    overhead: float
    sites: tuple[SiteCost, ...] = ()
    left_over_ms: float = 0.0

    def by(self, key: str) -> dict[str, float]:
        """Milliseconds by "op", "module" or "site", the most first."""
        sums: dict[str, float] = defaultdict(float)
        for node in self.nodes:
            sums[str(getattr(node, key))] += node.ms
        return dict(sorted(sums.items(), key=lambda item: -item[1]))


def attribute(model: ir.Model, optimised: ir.Model, trace: Trace, latency_ms: float) -> Attribution:
    """Times of the nodes of a file.

    Args:
        model: the file.
        optimised: what onnxruntime makes of it.
        trace: of the same session settings.
        latency_ms: of an unprofiled run.
    """
    scale = latency_ms / max(sum(node.ms for node in trace.nodes.values()), 1e-9)
    given = {str(output.name): node for node in model.graph for output in node.outputs if output.name}
    values = {node: _value(node, given) for node in optimised.graph}
    ends = frozenset(value for value in values.values() if value)
    nodes = []
    for node in optimised.graph:
        name, value = node.name or "", values[node]
        if name not in trace.nodes:  # what it computes is a constant
            continue
        place = value or _downstream(node, values)
        covered = _between(given[place], ends) if place else []
        sites = [n.metadata_props.get(_SITE, "") for n in covered]
        site = next(filter(None, sites), "")
        nodes.append(
            NodeTime(
                name, trace.nodes[name].op, trace.nodes[name].ms * scale, _module(covered, site), site if value else "",
                bool(value and site) and all(sites), value, Counter(n.op_type for n in covered) if value else Counter(), trace.nodes[name].requested_bytes,
            )
        )  # fmt: skip
    listed = {node.name for node in nodes}
    nodes += [NodeTime(name, node.op, node.ms * scale) for name, node in trace.nodes.items() if name not in listed]
    return Attribution(tuple(nodes), trace.total_ms / latency_ms)


def against(attribution: Attribution, baseline: Attribution) -> Attribution:
    """The same with the cost of each site, for a rewritten model beside its baseline."""
    before = {node.value: node.ms for node in baseline.nodes if node.value}
    costs: dict[str, float] = defaultdict(float)
    own: Counter[str] = Counter()
    into: dict[str, str] = {}
    for node in attribution.nodes:
        if not node.site:
            continue
        costs[node.site] += node.ms - before.get(node.value, 0.0)
        if not node.own:
            into[node.site] = f"{node.name} ({node.op})"
        elif node.value not in before:
            own[node.site] += 1
    difference = sum(node.ms for node in attribution.nodes) - sum(node.ms for node in baseline.nodes)
    sites = tuple(SiteCost(site, ms, own[site], into.get(site, "")) for site, ms in costs.items())
    return replace(attribution, sites=sites, left_over_ms=difference - sum(costs.values()))


def _value(node: ir.Node, given: Mapping[str, ir.Node]) -> str:
    """The value of the file that an optimised node gives, or "".

    A convolution in the blocked layout is named by its own result; what it adds to that, and the activation behind, come after it.
    """
    if node.op_type in _LAYOUT:  # it gives again, in another layout, what another node computes
        return ""
    for output in node.outputs:
        if output.name in given:
            return str(output.name)
    value = (node.name or "").removesuffix(_BLOCKED)
    if value == node.name or value not in given:
        return ""
    if len(node.inputs) > ADDEND and node.inputs[ADDEND] is not None:
        value = _next(given[value], ("Add", "Sum"))
        activation = node.attributes.get_string("activation")
        value = _next(given[value], (activation,)) if value and activation else value
    return value


def _next(node: ir.Node, ops: tuple[str, ...]) -> str:
    """What the reader of a node's first output gives that is one of these ops, or ""."""
    return next((str(user.outputs[0].name) for user in node.outputs[0].consumers() if user.op_type in ops), "")


def _between(last: ir.Node, ends: frozenset[str]) -> list[ir.Node]:
    """A node of the file and those before it whose outputs no optimised node gives; constants count for nothing."""
    found, stack = [last], [last]
    while stack:
        for value in stack.pop().inputs:
            node = value.producer() if value is not None else None
            if node is not None and node not in found and not any(output.name in ends for output in node.outputs):
                found.append(node)
                stack.append(node)
    return [node for node in found if node.op_type != "Constant"]


def _downstream(node: ir.Node, values: Mapping[ir.Node, str]) -> str:
    """The value of the file that a change of layout or the like is for."""
    seen, queue = {node}, [node]
    for current in queue:
        for reader in (user for output in current.outputs for user in output.consumers()):
            if values.get(reader):
                return values[reader]
            if reader not in seen:
                seen.add(reader)
                queue.append(reader)
    return ""


def _module(covered: Sequence[ir.Node], site: str) -> str:
    """Of the product among the nodes that were fused, which is what takes the time; else of the last."""
    products = [node for node in covered if node.op_type in PRODUCTS]
    return next(filter(None, map(module_of, products + list(covered))), site.rpartition(".")[0])
