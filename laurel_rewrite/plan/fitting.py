"""Which sites an operator fits, and where it acts beside their sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from laurel_rewrite.detection.site import Site, portable
from laurel_rewrite.detection.sites import Sites
from laurel_rewrite.errors import ConfigError
from laurel_rewrite.operators.config import CONVOLUTIONS
from laurel_rewrite.operators.registry import Operator
from laurel_rewrite.plan.sites import PlanSite


def is_unfit(operator: Operator, site: Site) -> bool:
    """Whether an operator needs what a site's feature axis has not."""
    needs = operator.needs
    if "features last" in needs and site.axis != -1:
        return True
    if not needs & {"features", "maps"}:
        return False
    return site.dim is None or ("maps" in needs and site.axis == 1 and len(site.shape) not in CONVOLUTIONS)


def check_stream(rows: Sequence[PlanSite], sites: Sites) -> None:
    """Raise ConfigError where the operators of a stream cannot be beside each other, or need what it has not."""
    stateful = next((row for row in rows if row.operator.uses_history), None)
    if stateful is not None:
        other = next((row for row in rows if row.operator.connection is not stateful.operator.connection), None)
        if other is not None:
            raise ConfigError(
                f"{other.id}: {other.variant} cannot stand in one stream with {stateful.variant} ({stateful.id}), whose state it does not hand "
                "on. Give the whole stream one operator."
            )
    for row in rows:
        needs = row.operator.needs
        if "attention" in needs and not any("attention" in other.role.split("+") for other in rows):
            raise ConfigError(
                f"{row.id} ({row.where}): {row.variant} stands around attention, and no branch of this stream is one. Leave the stream out with "
                "exclude, or use another operator."
            )
        if "whole stream" in needs:
            planned = {other.id for other in rows}
            missing = next((site for site in sites if site.stream == row.stream and site.module not in planned), None)
            if missing is not None:
                raise ConfigError(
                    f"{row.id}: {row.variant} needs every connection of its stream, and {missing.id} ({missing.where}) has none. Include it, or "
                    "leave the whole stream out."
                )
        link = sites.spots[row.id].link
        if "plain links" in needs and link not in ("begin", "plain") and not _is_read_behind(row, rows):
            raise ConfigError(
                f"{row.id} ({row.where}): {row.variant} cannot carry its state there: {_LINKS.get(link, 'something')} stands between this "
                f"connection and the one before it{', and no module that is called once gives it' if row.operator.reads_links else ''}. Leave the "
                "stream out with exclude, or use an operator without history."
            )
        if "norms between" in needs and link not in ("begin", "norm"):
            raise ConfigError(
                f"{row.id} ({row.where}): {row.variant} is for streams with a normalisation behind each sum, and none stands between this connection and "
                "the one before it. Leave the stream out with exclude, or use another operator."
            )
        if "projections" in needs and "attention" in row.role.split("+") and not row.projections:
            raise ConfigError(
                f"{row.id} ({row.where}): {row.variant} gives queries, keys and values inputs of their own, and this attention has no three "
                "linear maps, each a module called once, of one value behind one norm. Leave the stream out with exclude."
            )


def check_borders(planned: Mapping[str, PlanSite], has_history: Callable[[int], bool], sites: Sites) -> None:
    """Raise ConfigError where a state would have to go into a subgraph of control flow, out of it or on to its next turn, or where two subgraphs
    that run one connection bring it different states."""
    rows = {site.id: planned[site.module] for site in sites if site.module in planned}
    streams: dict[int, list[PlanSite]] = {}
    for site in sites:
        if site.id in rows:
            streams.setdefault(site.stream, []).append(rows[site.id])
    way_out = "Leave those sites out with exclude, or use an operator without history."
    for (before, after), (first, second) in sites.crossings.items():
        stateful = [row for stream in (before, after) for row in streams.get(stream, ()) if has_history(row.stream)]
        if stateful and before in streams and after in streams:
            raise ConfigError(
                f"{stateful[0].id}: {stateful[0].variant} reads the states of the connections before it, and its stream goes "
                f"{f'from {first} on to {second}' if before != after else f'on from {first} to the next turn'}, across the border of a subgraph of control flow, "
                f"which no state crosses. {way_out}"
            )
    for site in sites:
        if site.id in rows and site.id != site.module and has_history(rows[site.id].stream):
            here, first_call = ([row.id for row in streams[stream]] for stream in (site.stream, rows[site.id].stream))
            if here != first_call and (sites.room(site) or sites.room(sites[site.module])):
                raise ConfigError(
                    f"{site.module} ({site.where}): {rows[site.id].variant} reads the states of the connections before it, which are not those of the "
                    f"other subgraph of control flow that runs it. {way_out}"
                )


def _is_read_behind(row: PlanSite, rows: Sequence[PlanSite]) -> bool:
    """Whether the operator is asked again at the end of the link in front of a site."""
    at = rows.index(row)
    return at > 0 and bool(rows[at - 1].behind)


def places_beside(sites: Sites, site: Site, operator: Operator, calls: int) -> dict[str, Any]:
    """Where an operator acts beside the sum of a site, as a plan says it.

    Raises:
        ConfigError: it needs the branch's input, and no module of its own gives that.
    """
    once = calls == 1 or not sites.calls
    asked = operator.reads_links and once and (operator.connection.reads_last or sites.after(site) is not None)
    behind = link_end(sites, site) if asked else ""
    projections = projections_of(sites, site) if operator.separate and once else ()
    reads = read_by_branch(sites, site, calls) if operator.needs_input or projections else ""
    return {"reads": reads, "behind": behind, "projections": projections}


def link_end(sites: Sites, site: Site) -> str:
    """Where the norm or activation behind a site ends: the innermost module, called once, whose result that is; the value's name in a
    graph. "" where there is none."""
    after = sites.after(site)
    name = sites.spots[after.id].link_end if after is not None else sites.spots[site.id].last_end
    if not name or not sites.calls:
        return name
    path, holder = _ends_in(sites, sites.named(name, after or site)), sites.bindings[site.id].holder
    # The states of a stream end with the call of its holder.
    return path if after is not None or path.startswith(f"{holder}." if holder else "") else ""


def projections_of(sites: Sites, site: Site) -> tuple[str, ...]:
    """The modules, or in a graph the values, of q, k and v that all read what a site's branch reads; none where it has no such."""
    spot, read = sites.spots[site.id], sites.read_by(site)
    maps = [sites.named(name, site) for name in spot.projected]
    if any(read not in sites.flow.values[index].inputs for index in maps):
        return ()
    if not sites.calls:
        return spot.projected
    if any(_ends_in(sites, index) != path for index, path in zip(maps, spot.projections, strict=True)):
        return ()
    try:
        read_by_branch(sites, site, calls=1)
    except ConfigError:  # their norm cannot be asked again
        return ()
    return spot.projections


def _ends_in(sites: Sites, index: int) -> str:
    """The innermost module, called once, that computes a value as its last; "" where there is none."""
    path = sites.owner(index)
    while path:
        inside = [
            value for value in sites.flow.graph_of(index) if (owner := sites.owner(value.index)) == path or owner.startswith(f"{path}.")
        ]
        own = [value for value in inside if sites.owner(value.index) == path]
        if inside[-1].index == index and len({value.run for value in own or inside}) == 1:
            return path
        path = path.rpartition(".")[0]
    return ""


def read_by_branch(sites: Sites, site: Site, calls: int) -> str:
    """Path of the module that gives what a site's branch reads; "" where that is the skip, or where the sites are of a graph.

    Raises:
        ConfigError: no module of its own gives it.
    """
    index = sites.read_by(site)
    values = sites.flow.values
    skip = sites.bindings[site.id].residual.skip
    if index == skip or not sites.calls:
        return ""
    owner, why = sites.owner(index), ""
    inside = [value for value in sites.flow.graph_of(index) if (path := sites.owner(value.index)) == owner or path.startswith(f"{owner}.")]
    if values[index].shape != values[skip].shape:
        why = "it is of another shape than the stream"
    elif not owner or owner == site.owner or any(value.index > index and value.run == values[index].run for value in inside):
        why = f"it is computed in the midst of {owner or 'the model'}"
    elif len({value.run for value in inside if sites.owner(value.index) == owner}) != calls:
        why = f"{owner} is called more often than the connection"
    if why:
        raise ConfigError(
            f"{site.id} ({portable(site.where)}): what the branch reads ({values[index].name}) cannot be taken from a module of its own: {why}. Leave the site "
            "out with exclude."
        )
    return owner


_LINKS = {"norm": "a normalisation", "activation": "an activation"}
