"""Detection: from whatever a model comes as to its `Sites`, over both modes where they differ."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx, nn

from laurel_rewrite.detection.residuals import Residual
from laurel_rewrite.detection.site import Binding, Site, portable
from laurel_rewrite.detection.sites import Sites, sites_of_capture, sites_of_graph, sites_of_onnx, sites_of_program, with_shapes
from laurel_rewrite.detection.unrun import unrun
from laurel_rewrite.errors import ConfigError
from laurel_rewrite.graph.capture import capture
from laurel_rewrite.graph.dataflow import Dataflow, Role
from laurel_rewrite.sources.inputs import call_inputs

if TYPE_CHECKING:
    import onnx_ir


def detect(
    model: nn.Module | torch.export.ExportedProgram | onnx_ir.Model | str | PathLike[str],
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> Sites:
    """Find the residual connections of a model. Nothing is changed.

    Args:
        model: a module on any device (meta included), an `fx.GraphModule`, an exported program, an ONNX model, or the path of a .pt2 or
            .onnx file.
        args, kwargs: inputs of its forward: a tuple, one tensor, or a dictionary of keyword arguments. Give a batch of 2 or more where
            possible: a batch of 1 hides broadcasts. A graph that carries shapes already needs none. Of an ONNX model: arrays by the
            names of its inputs, for sizes that cannot be inferred; without them, inputs are drawn where they are needed.
        dynamic_shapes: as `torch.export.export` takes them; the sites are the same, their shapes symbolic.

    Returns:
        The sites in order of execution, and every other addition with the reason why it is none.

    Raises:
        CaptureError: the model cannot be captured with these inputs, or the file cannot be read.
        ConfigError: an ONNX model has other inputs.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = nn.Linear(8, 8)
        ...     def forward(self, x):
        ...         return x + self.linear(x)
        >>> [site.kind for site in detect(Block(), (torch.randn(2, 8),))]
        ['identity']
    """
    args, kwargs = call_inputs(args, kwargs)
    if isinstance(model, fx.GraphModule):
        with_shapes(model, args, kwargs)
        return sites_of_graph(model)
    if isinstance(model, str | PathLike):
        from laurel_rewrite.files.onnx import read_graph

        model = read_graph(Path(model))
    if isinstance(model, torch.export.ExportedProgram):
        return sites_of_program(model)
    if not isinstance(model, nn.Module):
        return sites_of_onnx(model, _feeds(model, args, kwargs))
    captured, notes = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    sites, *others = [sites_of_capture(one) for one in captured]
    for other in others:
        sites = _union(sites, other, ["train" if one.train else "eval" for one in captured])
    return replace(sites, notes=(*sites.notes, *notes, *unrun(sites)))


def _feeds(model: onnx_ir.Model, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, np.ndarray] | None:
    from laurel_rewrite.graph.feeds import check_feeds

    if args:
        raise ConfigError("The inputs of an ONNX model are given by their names, in a dictionary.")
    if not kwargs:
        return None
    feeds = {name: np.asarray(value) for name, value in kwargs.items()}
    check_feeds(model, feeds, "The model")
    return feeds


# Two modes


@dataclass
class _Row:
    site: Site
    binding: Binding
    line: _Line
    base: str


_Line = tuple[str, Any]  # owner, and the steps to the add: what its calls and turns have in common


def _union(one: Sites, other: Sites, modes: Sequence[str]) -> Sites:
    """What two modes of one model run. The mode with more sites gives ids and streams; what only the other runs is added.

    A line that one call of its owner runs several times is taken from the mode that runs it more often.
    """
    if len(other) > len(one):
        one, other, modes = other, one, modes[::-1]
    ours, theirs = _groups(one), _groups(other)
    fewer = [site for key, sites in ours.items() for site in sites[len(theirs.get(key, ())) :]]
    more = [key for key, sites in theirs.items() if len(sites) > len(ours.get(key, ()))]
    twins = _twins(one, other, fewer, [site for key in more for site in theirs[key][len(ours.get(key, ())) :]])
    bindings = {name: replace(one.bindings[name], twins=(other.bindings[twin.id].adds,)) for name, twin in twins.items()}
    one = replace(one, bindings={**one.bindings, **bindings})
    fewer = [site for site in fewer if site.id not in twins]
    more = [key for key in more if not any(site in twins.values() for site in theirs[key])]
    notes = (*([_note(modes, [site.id for site in fewer])] if fewer else []), *_twice(one, twins))
    if not more:
        return replace(one, notes=notes, calls=(*one.calls, *other.calls) if twins else one.calls)
    rows = [_Row(site, one.bindings[site.id], _line(one, site), _base(one, site)) for site in one if _key(one, site) not in more]
    bases = {_line(one, site): _base(one, site) for site in one}
    free: Counter[str] = Counter(owner for owner, _ in bases)
    streams = 1 + max((site.stream for site in one), default=-1)
    at = 0 if any(key in ours for key in theirs) else len(rows)
    for site in other:
        key, line, binding = _key(other, site), _line(other, site), other.bindings[site.id]
        if key not in more:
            twin = ours[key][theirs[key].index(site)]
            at = next(i for i, row in enumerate(rows) if row.site is twin) + 1
            continue
        if line not in bases:
            bases[line] = f"{site.owner}.laurel_{free[site.owner]}".lstrip(".")
            free[site.owner] += 1
        rows.insert(at, _Row(replace(site, stream=site.stream + streams), _moved(binding, len(one.flow.values)), line, bases[line]))
        at += 1
    sites = _joined(one, other, rows)
    added = [site.id for site in sites if site.stream >= streams]
    return replace(sites, notes=(*notes, _note(modes[::-1], added), *_apart(sites, [site.id for site in fewer], added)))


def _joined(one: Sites, other: Sites, rows: list[_Row]) -> Sites:
    """The sites of the rows, numbered, over the values of both; every other sum of both, each once."""
    turns: dict[str, int] = defaultdict(lambda: 1)
    for row in rows:
        turns[row.base] = max(turns[row.base], row.binding.turns)
    sites: list[Site] = []
    bindings: dict[str, Binding] = {}
    tied: Counter[str] = Counter()
    positions: Counter[int] = Counter()
    for row in rows:
        several = turns[row.base] > 1
        turn = (row.binding.turn or 0) if several else None
        path = f"{row.base}.{turn}" if several else row.base
        name = f"{path}@{tied[path]}" if tied[path] else path
        sites.append(replace(row.site, id=name, index=positions[row.site.stream]))
        bindings[name] = replace(row.binding, turn=turn, turns=turns[row.base])
        tied[path] += 1
        positions[row.site.stream] += 1
    n, calls = len(one.flow.values), len(one.calls)
    moved = [
        replace(v, index=v.index + n, inputs=tuple(i + n for i in v.inputs), call=None if v.call is None else v.call + calls)
        for v in other.flow.values
    ]
    flow = Dataflow([*one.flow.values, *moved], one.flow.outputs | {i + n for i in other.flow.outputs}, second=n)
    added = [replace(r, output=r.output + n, operands=tuple(i + n for i in r.operands)) for r in other.refusals]
    places = {(site.where, site.owner) for site in sites}
    known: set[tuple[str, str, str]] = {(r.where, r.owner, r.reason) for r in one.rejected}
    pairs = [pair for pair in zip(one.rejected, one.refusals, strict=True) if (pair[0].where, pair[0].owner) not in places]
    pairs += [
        (rejected, refusal)
        for rejected, refusal in zip(other.rejected, added, strict=True)
        if (rejected.where, rejected.owner) not in places and (rejected.where, rejected.owner, rejected.reason) not in known
    ]
    rejected, refusals = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return Sites(sites, rejected, bindings, refusals, flow, (*one.calls, *other.calls))


def _line(sites: Sites, site: Site) -> _Line:
    call = sites.bindings[site.id].adds[0][2]
    return (call.owner, call.steps) if call is not None else (site.owner, site.where)


def _key(sites: Sites, site: Site) -> tuple[Any, ...]:
    """A line in one call of its owner."""
    call = sites.bindings[site.id].adds[0][2]
    return (*_line(sites, site), call.owner_call if call is not None else None)


def _groups(sites: Sites) -> dict[tuple[Any, ...], list[Site]]:
    groups: dict[tuple[Any, ...], list[Site]] = defaultdict(list)
    for site in sites:
        groups[_key(sites, site)].append(site)
    return groups


def _base(sites: Sites, site: Site) -> str:
    """A site's id without its turn and its call."""
    return site.module if sites.bindings[site.id].turn is None else site.module.rpartition(".")[0]


def _moved(binding: Binding, by: int) -> Binding:
    r = binding.residual
    adds = tuple((node + by, side) for node, side in r.adds)
    branches = tuple(branch + by for branch in r.branches)
    moved = replace(r, output=r.output + by, skip=r.skip + by, branches=branches, adds=adds, source=r.source + by)
    return replace(binding, residual=moved)


def _twins(one: Sites, other: Sites, fewer: Sequence[Site], more: Sequence[Site]) -> dict[str, Site]:
    """Sites that one mode runs at another place of their owner than the other mode, as in `if self.training: ... else: ...`, by the ids of
    the first: the branches read the same parameters."""

    def facts(sites: Sites, site: Site) -> tuple[Any, ...]:
        binding = sites.bindings[site.id]
        call, sides = binding.adds[0][2], tuple(side for _, side, _ in binding.adds)
        where = site.owner, call and call.owner_call, binding.turn
        return *where, site.kind, site.axis, site.dim, sides, _reads(sites.flow, binding.residual)

    twins: dict[str, Site] = {}
    left = [(facts(other, site), site) for site in more]
    for site in fewer:
        known = facts(one, site)
        found = next((pair for pair in left if pair[0] == known), None)
        if found is not None and known[-1] and one.bindings[site.id].turn is None:
            twins[site.id] = found[1]
            left.remove(found)
    return twins


def _reads(flow: Dataflow, residual: Residual) -> frozenset[str]:
    """Names of the parameters that the branches read, up to the skip."""
    found, seen, stack = set(), {residual.skip, residual.source}, list(residual.branches)
    while stack:
        value = flow.values[stack.pop()]
        if value.index in seen:
            continue
        seen.add(value.index)
        stack += value.inputs
        if value.role is Role.SOURCE and not value.data:
            found.add(value.name)
    return frozenset(found)


def _twice(sites: Sites, twins: Mapping[str, Site]) -> Iterator[str]:
    """A note of the connections that are written at two places."""
    if twins:
        first, twin = next(iter(twins.items()))
        places = f"{portable(sites[first].where)} and {portable(twin.where)}"
        yield (
            f"{len(twins)} residual connection{'s' if len(twins) > 1 else ''} ({_some([*twins])}), the first at {places}, stand at two places, "
            "of which each mode runs one: one LAuReL stands at both."
        )


def _apart(sites: Sites, one: Sequence[str], other: Sequence[str]) -> Iterator[str]:
    """A note where a module has connections that only one mode runs, and others that only the other runs: `if self.training` may choose
    between two additions that are one connection."""
    for owner in dict.fromkeys(sites[name].owner for name in one):
        here, there = ([name for name in names if sites[name].owner == owner] for names in (one, other))
        if there:
            yield (
                f"{owner or 'The model'} adds at other places in train mode than in eval mode ({', '.join((*here[:2], *there[:2]))}): each has a "
                "LAuReL of its own, so that what is trained does not act in eval mode. Where they are one connection, write one addition."
            )


def _note(modes: Sequence[str], ids: Sequence[str]) -> str:
    return (
        f"{len(ids)} residual connection{'s' if len(ids) > 1 else ''} that {modes[0]} mode ran were not run in {modes[1]} mode ({_some(ids)}): "
        "they are dropped at random, or left out there."
    )


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:4]) + (f" and {len(ids) - 4} more" if len(ids) > 4 else "")
