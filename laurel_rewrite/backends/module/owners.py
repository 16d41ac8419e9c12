"""For each owner of sites in a plan, its class with LAuReL modules in the place of the sums; for each site where that cannot be, the reason."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from laurel_rewrite.backends import Skipped
from laurel_rewrite.backends.module.replay import recorded
from laurel_rewrite.backends.module.source import Change, Edited, rewrite_class
from laurel_rewrite.backends.module.surgery import Rewriting, attribute
from laurel_rewrite.detection.sites import Sites
from laurel_rewrite.errors import RewriteError
from laurel_rewrite.graph.capture import Call
from laurel_rewrite.plan import Plan, PlanSite

_log = logging.getLogger(__name__)
_TORN = "its module is called in several streams in turns, so that PA would read the states of another one; use an operator without history"


@dataclass
class Owners:
    """The new class of each owner.

    Attributes:
        classes: by the owner's path; owners of one class with the same sites share it.
        problems: the sites that cannot be rewritten.
    """

    classes: dict[str, Edited] = field(default_factory=dict)
    problems: list[Skipped] = field(default_factory=list)

    def record(self, plan: Plan) -> Rewriting:
        """What a rewritten model keeps."""
        try:
            edits = recorded(self.classes)
        except RewriteError as error:  # the classes are there, but nobody can make them again without a capture
            _log.info("the edits cannot be kept as data: %s", error)
            edits = None
        return Rewriting(plan, {owner: edited.rewritten for owner, edited in self.classes.items()}, edits)

    def sites_in(self, plan: Plan, kind: str) -> set[str]:
        """Ids of the plan's sites whose change is of a kind: "loose" (an add in place that is none any more) or "by_turn"."""
        return {row.id for row in plan.sites if row.owner in self.classes and row.attribute in getattr(self.classes[row.owner], kind)}


def rewritten_owners(model: nn.Module, sites: Sites, plan: Plan, *, keep: Collection[str] = (), by_run: Collection[str] = ()) -> Owners:
    """Make the classes of a plan's owners.

    Args:
        model: the original; it is only looked at.
        sites: found in it.
        plan: for these sites.
        keep: ids of sites whose add in place must stay one.
        by_run: ids of sites in loops whose modules go by how often the sum runs, not by turns.
    """
    owners = Owners()
    changes: dict[str, list[tuple[Change, list[str]]]] = defaultdict(list)
    rows = {row.id: row for row in plan.sites}
    kept, counted = (
        {(rows[name].owner, rows[name].attribute) for name in names if name in rows} for names in (keep, by_run)
    )  # all turns alike
    sides: dict[str, set[tuple[int, ...]]] = defaultdict(set)  # of a module's calls
    for site in sites:
        sides[site.module].add(tuple(side for _, side, _ in sites.bindings[site.id].adds))
    torn = torn_histories(sites, plan)
    for row in plan.sites:
        place = row.owner, row.attribute
        if len(sides[row.id]) > 1:
            owners.problems.append(Skipped(row.id, row.where, "its module is called with the skip as one operand, and again as another"))
            continue
        if row.id in torn:
            owners.problems.append(Skipped(row.id, row.where, _TORN))
            continue
        change = _change(row, sites, keep=place in kept, by_turn=place not in counted)
        if isinstance(change, str):
            owners.problems.append(Skipped(row.id, row.where, change))
            continue
        same = next((entry for entry in changes[row.owner] if entry[0].name == change.name), None)
        if same is None:
            changes[row.owner].append((change, [row.id]))
        elif same[0].places != change.places:
            owners.problems.append(Skipped(row.id, row.where, "the turns of its loop differ"))
        else:
            same[1].append(row.id)
    calls: dict[str, list[Call]] = defaultdict(list)
    for call in sites.calls:
        calls[call.owner].append(call)
    cache: dict[tuple[Any, ...], Edited | RewriteError] = {}
    for owner, wanted in changes.items():
        problem = _unfit(model, owner, wanted)
        while wanted and problem is None:
            result = _edited(cache, type(model.get_submodule(owner)), [change for change, _ in wanted], calls[owner])
            if isinstance(result, Edited):
                owners.classes[owner] = result
                break
            at, reason = _culprit(cache, type(model.get_submodule(owner)), wanted, calls[owner], result)
            owners.problems += [Skipped(name, rows[name].where, reason) for name in wanted.pop(at)[1]]
        if problem is not None:
            owners.problems += [Skipped(name, rows[name].where, problem) for _, names in wanted for name in names]
    order = {row.id: number for number, row in enumerate(plan.sites)}
    owners.problems.sort(key=lambda skipped: order[skipped.id])
    return owners


def torn_histories(sites: Sites, plan: Plan) -> set[str]:
    """Modules that would not read the state of their own stream in some call: slots know modules, and not which of several streams a shared
    module is called in."""
    rows = {row.id: row for row in plan.sites}
    shared = {row.stream for row in plan.sites if row.repeats > 1}
    first = {stream[0].id: stream[0].stream for stream in plan.streams() if stream[0].repeats == 1}
    own: dict[int, str] = {}  # the last call of each stream of the model
    last: dict[int, str] = {}  # the last call of any module of each stream of the plan
    slots: dict[int, dict[str, str]] = defaultdict(dict)  # the last call of each module of each stream of the plan
    torn: set[str] = set()
    for site in (site for site in sites if site.module in rows):
        row = rows[site.module]
        if site.module in first:
            last.pop(row.stream, None)
            slots[row.stream] = {}
        before = plan.before(row)
        if plan.has_history(row.stream):
            found = last.get(row.stream) if row.stream in shared else slots[row.stream].get(before.id) if before is not None else None
            if found != own.get(site.stream):
                torn.add(site.module)
        own[site.stream] = last[row.stream] = slots[row.stream][site.module] = site.id
    return torn


def _change(row: PlanSite, sites: Sites, *, keep: bool, by_turn: bool) -> Change | str:
    """A site's change, or the reason why there is none."""
    binding = sites.bindings[row.id]
    if row.kind == "partial":
        return "the skip is a slice of what the branch reads"
    if any(call is None or call.owner != row.owner for adds in binding.places for _, _, call in adds):
        return "its sum is spread over several modules, was not made by Python code, or stands in a torch.autograd.Function with its own backward"
    places = tuple(tuple((call.steps, side) for _, side, call in adds if call is not None) for adds in binding.places)
    return Change(row.attribute, places, binding.turn is not None, by_turn, keep, row.operator.additive)


def _unfit(model: nn.Module, owner: str, wanted: list[tuple[Change, list[str]]]) -> str | None:
    """Why nothing in this owner can be rewritten; None where it can."""
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        return f"the model has no module {owner!r}; it seems to run as a copy that its forward makes"
    if "forward" in vars(module):
        return f"the forward of {owner or 'the model'} was replaced on the instance, so its class has no say"
    taken = [change.name for change, _ in wanted if change.name in vars(module) or attribute(module, change.name) is not None]
    return f"{owner or 'the model'} has an attribute {taken[0]!r} already" if taken else None


def _edited(
    cache: dict[tuple[Any, ...], Edited | RewriteError], base: type, wanted: list[Change], calls: list[Call]
) -> Edited | RewriteError:
    key = (base, tuple(wanted))
    if key not in cache:
        try:
            cache[key] = rewrite_class(base, wanted, calls)
        except RewriteError as error:
            cache[key] = error
    return cache[key]


def _culprit(
    cache: dict[tuple[Any, ...], Edited | RewriteError],
    base: type,
    wanted: list[tuple[Change, list[str]]],
    calls: list[Call],
    error: RewriteError,
) -> tuple[int, str]:
    """Which of several changes to one class cannot be made: the first that fails alone, or else the last."""
    for position, (change, _) in enumerate(wanted):
        alone = _edited(cache, base, [change], calls)
        if isinstance(alone, RewriteError):
            return position, str(alone)
    return len(wanted) - 1, str(error)
