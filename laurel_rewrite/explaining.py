"""Why an addition is, or is not, a residual connection: the operands, where each comes from, and the rule that decided."""

from __future__ import annotations

import linecache
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from laurel_rewrite.dataflow import Dataflow, Role, Value
from laurel_rewrite.errors import ConfigError, nearest
from laurel_rewrite.residuals import REASONS, Refusal, Residual
from laurel_rewrite.sites import Sites

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
        >>> from torch import nn
        >>> from laurel_rewrite.sites import detect
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = nn.Linear(8, 8)
        ...     def forward(self, x):
        ...         return x + self.linear(x)
        >>> why = explain(detect(Block(), (torch.randn(2, 8),)), "laurel_0")[0]
        >>> why.verdict, dict(why.facts)["path"]
        ('identity', 'skip -> linear -> branch')
    """
    found = {name: binding.residual for name, binding in sites.bindings.items()}
    verdicts: list[Residual | Refusal] = sorted([*found.values(), *sites.refusals], key=lambda verdict: verdict.output)
    ids = {residual.output: name for name, residual in found.items()}
    chosen = [verdict for verdict in verdicts if _matches(sites, verdict, ids.get(verdict.output, ""), selector)]
    if not chosen:
        raise ConfigError(_not_found(sites, verdicts, selector))
    return [_explain(sites, verdict, ids.get(verdict.output, "")) for verdict in chosen]


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
    file, _, line = selector.rpartition(":")
    path, _, number = where.rpartition(":")
    return line.isdigit() and line == number and (not file or path == file or path.endswith("/" + file.lstrip("./")))


def _not_found(sites: Sites, verdicts: list[Residual | Refusal], selector: str) -> str:
    file, _, line = selector.rpartition(":")
    places = [where for verdict in verdicts for index in _adds(sites.flow, verdict) for where in sites.lines(index)]
    if line.isdigit():
        close = sorted(
            {where for where in places if not file or where.rpartition(":")[0].endswith(file)},
            key=lambda where: abs(int(where.rpartition(":")[2]) - int(line)),
        )[:3]
        return f"No addition was run at {selector}." + (f" The nearest: {', '.join(close)}." if close else "")
    known = [site.id for site in sites] + [site.owner for site in sites if site.owner]
    return f"{selector!r} is no site, module, line or node with an addition. {nearest(selector, known)}"


def _explain(sites: Sites, verdict: Residual | Refusal, name: str) -> Explanation:
    flow = sites.flow
    where = sites.where(verdict.output)
    facts = [("sum", _describe(sites, flow.values[verdict.output]))]
    if isinstance(verdict, Residual):
        site = next(site for site in sites if site.id == name)
        kind = verdict.kind
        where = site.where
        facts.append(("skip", _describe(sites, flow.values[verdict.skip])))
        facts.extend(("branch", _describe(sites, flow.values[branch])) for branch in verdict.branches)
        root = flow.values[verdict.source]
        if verdict.source != verdict.skip:
            facts.append(("they part at", _describe(sites, root)))
        for start, label in ((verdict.skip, "skip path"), *((branch, "path") for branch in verdict.branches)):
            path = _path(flow, verdict.source, start)
            if path is not None and (label == "path" or kind == "projection"):
                facts.append(
                    (label, _words("skip" if kind == "identity" else root.name, path, flow, "branch" if label == "path" else "skip"))
                )
        axis = f"feature axis {site.axis}, D {site.dim if site.dim is not None else 'unknown'}"
        facts.append(("stream", f"number {site.stream}, position {site.index}, {axis}"))
        owner = site.owner
    else:
        kind, owner = verdict.reason, sites.owner(verdict.output)
        facts.extend(("operand", _describe(sites, flow.values[operand])) for operand in verdict.operands)
        facts.append(("because", verdict.detail))
    return Explanation(name, kind, REASONS[kind], where, _code(where), owner, tuple(facts))


def _describe(sites: Sites, value: Value) -> str:
    shape = "x".join(map(str, value.shape)) if value.shape is not None else "shape unknown"
    depends = "" if value.data else ", depends on no input"
    owner = sites.owner(value.index)
    where = sites.where(value.index)
    place = f" in {owner}" if owner else ""
    # A line inside torch.nn tells less than the module's path.
    shown = f", {where}" if ":" in where and "/torch/nn/" not in where else ""
    return f"{value.op} [{shape}]{place}{depends}{shown}"


def _path(flow: Dataflow, source: int, end: int) -> list[Value] | None:
    """A shortest path from `source` to `end` with a mixing op on it; None where there is none."""
    start = (end, False)
    came: dict[tuple[int, bool], tuple[int, bool] | None] = {start: None}
    queue = [start]
    for state in queue:
        index, mixed = state
        if index == source:
            if not mixed:
                continue
            path = []
            step: tuple[int, bool] | None = came[state]
            while step is not None:
                path.append(flow.values[step[0]])
                step = came[step]
            return path
        after = mixed or flow.values[index].role is Role.MIXING
        for operand in flow.values[index].inputs:
            if operand >= source and flow.values[operand].data and (operand, after) not in came:
                came[operand, after] = state
                queue.append((operand, after))
    return None


def _words(first: str, path: list[Value], flow: Dataflow, last: str) -> str:
    ops = [value.op for value in path if value.role not in (Role.TRANSPARENT, Role.SLICE)]
    if len(ops) > _SHOWN:
        ops = [*ops[: _SHOWN - 2], f"{len(ops) - _SHOWN + 1} more", ops[-1]]
    return " -> ".join([first, *ops, last])


def _code(where: str) -> str:
    path, _, line = where.rpartition(":")
    return linecache.getline(path, int(line)).strip() if path and line.isdigit() else ""
