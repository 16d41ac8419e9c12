"""Costs that do not depend on the machine: parameters, FLOPs, bytes moved and written.

FLOPs are those of products (two a multiply-add), as torch's FlopCounterMode counts them; they are read from the shapes of a run without
optimisation. Bytes moved are what the optimised graph's ops read and write, caches aside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from laurel_rewrite.files.onnx_weights import parameters_of
from laurel_rewrite.graph.from_onnx import METADATA
from laurel_rewrite.profiling.attribution import Attribution
from laurel_rewrite.profiling.traces import Trace


@dataclass(frozen=True)
class Costs:
    """Static costs of a model for one shape of inputs.

    Attributes:
        parameters: numbers in initializers, see `parameters_of`.
        flops: of one run; at least so many where some are `uncounted`.
        moved_bytes: that the ops onnxruntime runs read and write.
        uncounted: ops with products whose FLOPs are not known, by type.
        sites: the same of each LAuReL site.
    """

    parameters: int
    flops: int
    moved_bytes: int
    uncounted: Counter[str] = field(default_factory=Counter)
    sites: dict[str, SiteCosts] = field(default_factory=dict)


@dataclass
class SiteCosts:
    """Static costs of a LAuReL site.

    Attributes:
        parameters, flops: of all that it computes.
        moved_bytes: that the ops read and write which compute nothing else.
        activation_bytes: that these write.
    """

    parameters: int = 0
    flops: int = 0
    moved_bytes: int = 0
    activation_bytes: int = 0


def costs_of(model: ir.Model, flops: Mapping[str, int | None], plain: Trace, optimised: Trace, attribution: Attribution) -> Costs:
    """Static costs of a file.

    Args:
        model: the file.
        flops: of its ops, see `count_flops`.
        plain: a trace without optimisation, which names these ops.
        optimised: a trace with it, for the bytes.
        attribution: of the same.
    """
    owners = {str(node.name): node.metadata_props.get(f"{METADATA}site", "") for node in model.graph}
    sites = {site: SiteCosts() for site in sorted(set(owners.values()) - {""})}
    nothing = SiteCosts()  # takes what belongs to no site
    uncounted: Counter[str] = Counter()
    parameters = 0
    for value in model.graph.initializers.values():
        numbers = parameters_of(value)
        readers = {owners.get(str(node.name), "") for node in value.consumers()}
        parameters += numbers
        sites.get(min(readers, default="") if len(readers) == 1 else "", nothing).parameters += numbers
    for name, count in flops.items():
        if count is None:
            uncounted[plain.nodes[name].op] += 1
        else:
            sites.get(owners.get(name, ""), nothing).flops += count
    for timed in attribution.nodes:
        if timed.own:
            traced = optimised.nodes[timed.name]
            sites[timed.site].moved_bytes += traced.moved_bytes
            sites[timed.site].activation_bytes += traced.output_bytes
    total = sum(count or 0 for count in flops.values())
    return Costs(parameters, total, sum(node.moved_bytes for node in optimised.nodes.values()), uncounted, sites)
