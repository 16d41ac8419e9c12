"""The module back end: a plan is carried out on a live `nn.Module`, and the result proves itself before anybody gets it.

The module that owns a site changes its class for a subclass of the same name whose `forward` has that one add replaced, and gets the
connection as a child. Parameter names, hooks, keyword arguments, caches and checkpointing stay as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from laurel_rewrite.backends import Applied, Skipped
from laurel_rewrite.backends.module.owners import Owners, rewritten_owners
from laurel_rewrite.backends.module.surgery import change_classes, copied, install, keep_record, remove
from laurel_rewrite.backends.proof import Evidence, Proof, TorchBackEnd, failure, first_wrong
from laurel_rewrite.errors import LaurelError, NoSiteError, RewriteError
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.operators.prepared import prepare
from laurel_rewrite.plan import Plan

_ATTEMPTS = 4  # ways to write a class: adds in place or not, turns counted in one way or the other


class ModuleBackEnd(TorchBackEnd):
    """A live module: owners' classes change, and connections become their children.

    Args:
        skip: let sites that cannot be rewritten keep their plain sum; the others are those of `TorchBackEnd`.
    """

    def __init__(self, *given: Any, skip: bool = False, **named: Any) -> None:
        super().__init__(*given, **named)
        self.skip = skip

    def check(self, plan: Plan) -> None:
        plan.check(self.sites)
        if not self.skip:
            owners = rewritten_owners(self.model, self.sites, plan)
            if owners.problems:
                raise _refusal(owners.problems)

    def apply(self, plan: Plan) -> Applied:
        plan.check(self.sites)
        return _Application(self, plan, self.proof(plan)).run()


class _Application:
    """One plan on its way into one model, with the sites that had to be left out so far."""

    def __init__(self, back_end: ModuleBackEnd, plan: Plan, proof: Proof | None) -> None:
        self.model, self.sites, self.plan, self.proof = back_end.model, back_end.sites, plan, proof
        self.inplace, self.skip = back_end.inplace, back_end.skip
        self.skipped: list[Skipped] = []

    def run(self) -> Applied:
        while True:
            owners = self._owners(self.plan)
            target = self.model if self.inplace else copied(self.model)
            try:
                evidence = self._installed(target, self.plan, owners)
                wrong = (
                    self.proof is not None
                    and evidence.failed
                    and not self.proof.steady(self.model if not self.inplace else _plain(target), evidence)
                )
            except BaseException:
                self._undo(target)
                raise
            if not wrong:
                return Applied(target, self.plan, tuple(evidence.checks), tuple(self.skipped))
            self._undo(target)
            name = self._first_wrong()
            if not self.skip or not name:
                raise failure(evidence, name)
            detail = next(check.detail for check in evidence.checks if check.failed)
            self._leave_out([Skipped(name, self._where(name), f"with it the model does not compute what it did ({detail})")])

    def _installed(self, target: nn.Module, plan: Plan, owners: Owners) -> Evidence:
        """Install, and write the classes in another way where the runs show that one is needed."""
        install(target, plan, _classes(owners))
        prepare(target, plan.factors(self.sites))
        for row in plan.sites:
            connection: Any = target.get_submodule(row.id)
            connection.regrouped = not row.operator.additive and len(self.sites.bindings[row.id].adds) > 1
        keep: set[str] = set()
        by_run: set[str] = set()
        if self.proof is None:  # without runs nobody knows who else sees what is added to in place
            keep = owners.sites_in(plan, "loose")
        evidence = Evidence()
        for _ in range(_ATTEMPTS):
            if keep or by_run:
                owners = rewritten_owners(
                    self.model if target is not self.model else _plain(target), self.sites, plan, keep=keep, by_run=by_run
                )
                if owners.problems:
                    break
                change_classes(target, _classes(owners))
            keep_record(target, replace(owners.record(plan), factors=plan.factors(self.sites)))
            if self.proof is None:
                break
            loose = {name: self.sites.bindings[name].adds[0][1] for name in owners.sites_in(plan, "loose")}
            evidence = self.proof.of(target, plan, loose)
            counting = owners.sites_in(plan, "by_turn") if evidence.failed else set()
            if not evidence.stale - keep and not counting - by_run:
                break
            keep |= evidence.stale
            by_run |= counting
        return evidence

    def _owners(self, plan: Plan) -> Owners:
        """The classes of a plan, without the sites that cannot be rewritten."""
        owners = rewritten_owners(self.model, self.sites, plan)
        while owners.problems:
            if not self.skip:
                raise _refusal(owners.problems)
            self._leave_out(owners.problems)
            owners = rewritten_owners(self.model, self.sites, self.plan)
        return owners

    def _leave_out(self, problems: Sequence[Skipped]) -> None:
        before = self.plan
        self.plan = before.without([problem.id for problem in problems])
        known = {problem.id: problem for problem in problems}
        kept = {row.id for row in self.plan.sites}
        for row in before.sites:
            if row.id not in kept:
                reason = "another site of its stream is skipped, and its variant reads the whole stream"
                self.skipped.append(known.get(row.id) or Skipped(row.id, row.where, reason))
        if not self.plan.sites:
            raise NoSiteError(f"None of the {len(self.skipped)} sites can be rewritten. {_listed(self.skipped)}")

    def _first_wrong(self) -> str:
        """Id of the first site with which the model becomes wrong; "" where it cannot be found."""
        proof, rows = self.proof, self.plan.sites
        assert proof is not None

        def wrong(count: int) -> bool:
            part = replace(self.plan, sites=rows[:count])
            trial = copied(self.model)
            self._installed(trial, part, rewritten_owners(self.model, self.sites, part))
            return proof.differs(trial)

        try:
            return rows[first_wrong(len(rows), wrong) - 1].id
        except (LaurelError, MemoryError):  # the search is a service, and its own failure no news
            return ""

    def _undo(self, target: nn.Module) -> None:
        if self.inplace and sites_of(target):
            remove(target, inplace=True)

    def _where(self, name: str) -> str:
        return next(row.where for row in self.plan.sites if row.id == name)


def _classes(owners: Owners) -> dict[str, type]:
    return {owner: edited.rewritten.cls for owner, edited in owners.classes.items()}


def _plain(model: nn.Module) -> nn.Module:
    """The original again, as a copy of a model that was changed in place."""
    return remove(model)


def _refusal(problems: Sequence[Skipped]) -> RewriteError:
    return RewriteError(
        f"{len(problems)} site(s) cannot be rewritten in the source; leave them out with exclude, or let them keep their plain sum with "
        f'unsupported="skip" (--unsupported skip):{_listed(problems)}'
    )


def _listed(problems: Sequence[Skipped]) -> str:
    return "".join(f"\n  {problem.id} ({problem.where}): {problem.reason}" for problem in problems)
