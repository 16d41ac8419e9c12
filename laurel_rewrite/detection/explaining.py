"""Why an addition is, or is not, a residual connection: the operands, where each comes from, and the rule that decided."""

from __future__ import annotations

import linecache
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from laurel_rewrite.detection.residuals import REASONS, Refusal, Residual
from laurel_rewrite.detection.site import Site, short
from laurel_rewrite.detection.sites import Sites
from laurel_rewrite.errors import ConfigError, nearest
from laurel_rewrite.graph.dataflow import Dataflow, Role

_SHOWN = 8  # ops of a path that are spelled out


@dataclass(frozen=True)
class Explanation:
    """The verdict on one addition.

    Attributes:
        id: the site's id; "" where it is none.
        verdict: "identity", "projection", "partial", or the reason why it is no site.
        rule: the part of the definition that decided, in words.
        where: "file:line", or the node's name in a graph without source lines.
        code: the text of that line, "" where it cannot be read.
        owner: path of the module whose code adds.
        facts: (label, text) about the operands, the path between them and the stream.
    """

    id: str
    verdict: str
    rule: str
    where: str
    code: str
    owner: str
    facts: tuple[tuple[str, str], ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def explain(sites: Sites, selector: str) -> list[Explanation]:
    """Explain the additions that a selector names.

    Args:
        sites: from `detect`.
        selector: a site's id; the path of a module, for all in its own code; "FILE:LINE" (any end of the file's path) or "LINE";
            or the name of a node of the graph.

    Returns:
        One explanation each, in order of execution. A sum inside a larger sum is explained as part of it.

    Raises:
        ConfigError: nothing has this name; the message lists the nearest.

    Example:
        >>> import torch
        >>> from laurel_rewrite.detection.detecting import detect
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> why = explain(detect(layer, (torch.randn(2, 5, 8),)), "laurel_1")[0]
        >>> why.verdict, dict(why.facts)["path"]
        ('identity', 'skip -> linear -> relu -> linear -> branch')
    """
    found = {name: binding.residual for name, binding in sites.bindings.items()}
    verdicts: list[Residual | Refusal] = sorted([*found.values(), *sites.refusals], key=lambda verdict: verdict.output)
    ids = {residual.output: name for name, residual in found.items()}
    chosen = [verdict for verdict in verdicts if _matches(sites, verdict, ids.get(verdict.output, ""), selector)]
    if not chosen:
        raise ConfigError(_not_found(sites, verdicts, selector))
    by_id = {site.id: site for site in sites}
    return [_explain(sites, verdict, by_id.get(ids.get(verdict.output, ""))) for verdict in chosen]


def _matches(sites: Sites, verdict: Residual | Refusal, name: str, selector: str) -> bool:
    return selector in (name, name.split("@")[0]) or any(
        selector in (sites.flow.values[index].name, sites.owner(index)) or any(_is_line(where, selector) for where in sites.lines(index))
        for index in _adds(sites.flow, verdict)
    )


def _adds(flow: Dataflow, verdict: Residual | Refusal) -> Iterable[int]:
    """The binary sums that one verdict is about."""
    adds, stack = [verdict.output], [verdict.output]
    leaves = set(verdict.branches) | {verdict.skip} if isinstance(verdict, Residual) else set(verdict.operands)
    while stack:
        for operand in flow.values[stack.pop()].inputs:
            if operand not in leaves and flow.values[operand].role is Role.SUM:
                adds.append(operand)
                stack.append(operand)
    return adds


def _is_line(where: str, selector: str) -> bool:
    """Whether "LINE", ":LINE" or the end of "FILE:LINE" is this place."""
    return where.rpartition(":")[2] == selector.rpartition(":")[2] and _in_file(where, selector)


def _in_file(where: str, selector: str) -> bool:
    """Whether a place has a line and lies in the file that the selector names, if any."""
    file, path = selector.rpartition(":")[0].removeprefix("./"), where.rpartition(":")[0]
    return bool(path) and (not file or path == file or path.endswith(f"/{file}"))


def _not_found(sites: Sites, verdicts: list[Residual | Refusal], selector: str) -> str:
    line = selector.rpartition(":")[2]
    if line.isdecimal() and len(line) < 10:
        places = {where for verdict in verdicts for index in _adds(sites.flow, verdict) for where in sites.lines(index)}
        close = sorted(
            (where for where in places if _in_file(where, selector)), key=lambda where: abs(int(where.rpartition(":")[2]) - int(line))
        )
        return f"No addition was run at {selector}." + (f" The nearest: {', '.join(close[:3])}." if close else "")
    known = [site.id for site in sites] + [site.owner for site in sites if site.owner]
    return f"{selector!r} is no site, module, line or node with an addition. {nearest(selector, known)}"


def _explain(sites: Sites, verdict: Residual | Refusal, site: Site | None) -> Explanation:
    facts = [("sum", _describe(sites, verdict.output))]
    if isinstance(verdict, Residual):
        assert site is not None
        facts.append(("skip", _describe(sites, verdict.skip)))
        facts.extend(("branch", _describe(sites, branch)) for branch in verdict.branches)
        if verdict.source != verdict.skip:
            facts.append(("they part at", _describe(sites, verdict.source)))
        start = "skip" if verdict.kind == "identity" else sites.flow.values[verdict.source].name
        if verdict.kind == "projection":
            facts.append(("skip path", _path(sites.flow, verdict.source, verdict.skip, start, "skip")))
        facts.extend(("path", _path(sites.flow, verdict.source, branch, start, "branch")) for branch in verdict.branches)
        spot = sites.spots[site.id]
        facts.append(("role", f"{spot.role}: {spot.evidence}" if spot.evidence else spot.role))
        axis = f"feature axis {site.axis}, D {site.dim if site.dim is not None else 'unknown'}"
        facts.append(("stream", f"number {site.stream}, position {site.index} of {spot.length}, {axis}"))
        kind, owner, where = verdict.kind, site.owner, site.where
    else:
        facts.extend(("operand", _describe(sites, operand)) for operand in verdict.operands)
        facts.append(("because", verdict.detail))
        kind, owner, where = verdict.reason, sites.owner(verdict.output), sites.where(verdict.output)
    shown = tuple((label, text) for label, text in facts if text)
    return Explanation(site.id if site is not None else "", kind, REASONS[kind], where, _code(where), owner, shown)


def _describe(sites: Sites, index: int) -> str:
    value, owner, where = sites.flow.values[index], sites.owner(index), sites.where(index)
    shape = "x".join(map(str, value.shape)) if value.shape is not None else "shape unknown"
    depends = "" if value.data else ", depends on no input"
    place = f" in {owner}" if owner else ""
    # A line inside torch.nn tells less than the module's path.
    shown = f", {short(where)}" if ":" in where and "/torch/nn/" not in where else ""
    return f"{value.op} [{shape}]{place}{depends}{shown}"


def _path(flow: Dataflow, source: int, end: int, first: str, last: str) -> str:
    """A shortest path from `source` to `end` with a mixing op on it, in words; "" where there is none."""
    start = (end, False)
    came: dict[tuple[int, bool], tuple[int, bool] | None] = {start: None}
    queue = [start]
    for state in queue:
        index, mixed = state
        if index == source:
            if not mixed:
                continue
            ops, step = [], came[state]
            while step is not None:
                value = flow.values[step[0]]
                ops += [value.op] if value.role not in (Role.TRANSPARENT, Role.SLICE) else []
                step = came[step]
            if len(ops) > _SHOWN:
                ops = [*ops[: _SHOWN - 2], f"{len(ops) - _SHOWN + 1} more", ops[-1]]
            return " -> ".join([first, *ops, last])
        after = mixed or flow.values[index].role is Role.MIXING
        for operand in flow.values[index].inputs:
            if operand >= source and flow.values[operand].data and (operand, after) not in came:
                came[operand, after] = state
                queue.append((operand, after))
    return ""


def _code(where: str) -> str:
    path, _, line = where.rpartition(":")
    return linecache.getline(path, int(line)).strip() if path and line.isdecimal() else ""
