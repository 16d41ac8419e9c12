"""The module back end: a plan is carried out on a live `nn.Module`, and the result proves itself before anybody gets it.

The module that owns a site changes its class for a subclass of the same name whose `forward` has that one add replaced, and gets the
LAuReL module as a child. Parameter names, hooks, keyword arguments, caches and checkpointing stay as they were.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from laurel_rewrite.backends.module.owners import UNSUPPORTED, Owners, Skipped, rewritten_owners
from laurel_rewrite.backends.module.proof import Evidence, Proof, first_wrong
from laurel_rewrite.backends.module.surgery import Rewriting, change_classes, copied, install, keep_record, remove
from laurel_rewrite.detection.detecting import detect
from laurel_rewrite.detection.sites import Sites
from laurel_rewrite.errors import ConfigError, LaurelError, NoSiteError, RewriteError, VerificationError
from laurel_rewrite.operators.connections import refuse_second_time, sites_of
from laurel_rewrite.operators.prepared import prepare
from laurel_rewrite.plan import LaurelConfig, Plan
from laurel_rewrite.sources.inputs import call_inputs
from laurel_rewrite.verification.checks import Check

_ENGINES = {"torch.DistributedDataParallel", "torch.FullyShardedDataParallel", "torch.FSDPModule", "deepspeed.DeepSpeedEngine"}
"""Packages and classes in them that send gradients around for the parameters that they found when they were made."""
_log = logging.getLogger(__name__)
_ATTEMPTS = 4  # ways to write a class: adds in place or not, turns counted in one way or the other


@dataclass(frozen=True)
class Applied:
    """A plan carried out.

    Attributes:
        model: the rewritten model.
        plan: what was done; the plan that was given, less the sites that were skipped.
        checks: what was verified, and what could not be.
        skipped: sites that kept their plain sum, with reasons.
    """

    model: nn.Module
    plan: Plan
    checks: tuple[Check, ...] = ()
    skipped: tuple[Skipped, ...] = ()


def rewrite(
    model: nn.Module,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    variant: str = "rw+lr",
    extra_turns: str = "refuse",
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    plan: Plan | str | None = None,
    inplace: bool = False,
    seed: int = 0,
    unsupported: str = "refuse",
    verify: bool = True,
    **options: Any,
) -> nn.Module:
    """Replace the residual connections of a model by LAuReL, or by another operator. At the start it computes what it computed, bit for bit,
    where the operator does not declare another start.

    That is verified before anything is returned, by two runs of the original and two of the result, in eval and in train mode with one random
    state; both models are left as they were. What cannot be verified (the model differs from itself, or does not fit into memory twice) is
    logged as a warning with the reason; on the meta device shapes, strides and types are compared.

    Args:
        model: a module on any device (meta included) whose classes have their source at hand, or an `fx.GraphModule`.
        args, kwargs: inputs of its forward, for the capture and the verification; a batch of 2 or more.
        variant, extra_turns, include, exclude, seed: see `LaurelConfig`.
        options: of the operator: rank, history, normalize, ...; see there, too.
        plan: an edited plan, or the path of one, instead of the above.
        inplace: change `model` itself; else a copy. Where the verification fails, the change is undone.
        unsupported: "refuse" the whole rewrite where a site cannot be rewritten, or "skip" such sites, which then keep their plain sum
            (with a warning for each; where an operator reads the history of its stream, the whole stream keeps its sums).
        verify: False leaves the verification out.

    Returns:
        The model with LAuReL modules as children of the sites' owners; they are on the owner's device and of its dtype. An old
        state dict loads with `strict=False`, and only LAuReL keys are missing.

    Raises:
        ConfigError: the request cannot be meant (`LaurelConfig`), the model was rewritten already, or it is wrapped for distributed
            training (DDP, FSDP, DeepSpeed), which takes note of the parameters: rewrite first.
        NoSiteError: no residual connection, or none that can be rewritten.
        CaptureError: the model cannot be captured with these inputs.
        RewriteError: sites stand where they cannot be rewritten; all of them are named. The model is as it was.
        VerificationError: the result would not compute what the original does; the first site that changes it is named.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> layer = nn.TransformerEncoderLayer(32, 4, batch_first=True)
        >>> better = rewrite(layer, (torch.randn(2, 5, 32),), variant="rw+lr", rank=4)
        >>> [name for name, _ in better.named_children() if name.startswith("laurel")]
        ['laurel_0', 'laurel_1']
    """
    if plan is None:
        config = LaurelConfig(variant, extra_turns=extra_turns, include=include, exclude=exclude, seed=seed, **options)
    elif not isinstance(plan, Plan):
        plan = Plan.read(plan)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"rewrite takes a torch.nn.Module, not {type(model).__name__}; rewrite_onnx takes ONNX files, and the command model files."
        )
    refuse_second_time(model)
    _refuse_distributed(model)
    args, kwargs = call_inputs(args, kwargs)
    sites = detect(model, args, kwargs)
    if plan is None:
        plan = Plan.from_sites(sites, config)
    applied = apply_plan(model, sites, plan, args, kwargs, inplace=inplace, unsupported=unsupported, verify=verify)
    for note in sites.notes:
        _log.warning("%s", note)
    for check in applied.checks:
        if check.passed is None:
            _log.warning("not verified: %s: %s", check.name, check.detail)
    for site in applied.skipped:
        _log.warning("skipped: %s (%s): %s", site.id, site.where, site.reason)
    return applied.model


def _refuse_distributed(model: nn.Module) -> None:
    """Raise ConfigError where a module's parameters are known to an engine already: it would not send the gradients of new ones around."""
    for name, module in model.named_modules():
        known = (f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in type(module).__mro__)
        engine = next((name.partition(".")[2] for name in known if name in _ENGINES), None)
        if engine is not None:
            raise ConfigError(
                f"{name or 'The model'} is a {engine}, which took note of its parameters before LAuReL's were there: each process would train its "
                "own. Rewrite the model first, and wrap or shard the result."
            )


def apply_plan(
    model: nn.Module,
    sites: Sites,
    plan: Plan,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    inplace: bool = False,
    unsupported: str = "refuse",
    verify: bool = True,
) -> Applied:
    """Carry out a plan on the model that `sites` were found in; see `rewrite`. Everything is checked before anything changes."""
    if unsupported not in UNSUPPORTED:
        raise ConfigError(f"unsupported must be one of {', '.join(UNSUPPORTED)}, not {unsupported!r}.")
    plan.check(sites)
    proof = Proof(model, args, kwargs or {}, plan.seed) if verify else None
    if isinstance(model, fx.GraphModule):
        return _apply_to_graph(model, plan, proof, inplace=inplace)
    return _Application(model, sites, plan, proof, inplace=inplace, skip=unsupported == "skip").run()


def _apply_to_graph(model: fx.GraphModule, plan: Plan, proof: Proof | None, *, inplace: bool) -> Applied:
    from laurel_rewrite.passes.insert_laurel import InsertLaurel

    target = copied(model)
    assert isinstance(target, fx.GraphModule)
    InsertLaurel(plan)(target)
    evidence = proof.of(target, plan, {}) if proof is not None else Evidence()
    if proof is not None and evidence.failed and not proof.steady(model, evidence):
        raise _failure(evidence, "")
    return Applied(InsertLaurel(plan)(model).graph_module if inplace else target, plan, tuple(evidence.checks))


class _Application:
    """One plan on its way into one model, with the sites that had to be left out so far."""

    def __init__(self, model: nn.Module, sites: Sites, plan: Plan, proof: Proof | None, *, inplace: bool, skip: bool) -> None:
        self.model, self.sites, self.plan, self.proof = model, sites, plan, proof
        self.inplace, self.skip = inplace, skip
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
                raise _failure(evidence, name)
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
            keep_record(target, Rewriting(plan, {owner: edited.rewritten for owner, edited in owners.classes.items()}))
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


def _failure(evidence: Evidence, name: str) -> VerificationError:
    first = next(check for check in evidence.checks if check.failed)
    place = f"The first site with which it differs is {name}. " if name else ""
    error = VerificationError(
        f"The rewritten model does not compute what the original does: {first.name}: {first.detail}, largest difference {first.difference:.3g}, "
        f"allowed: {first.tolerance}. {place}The model is as it was. Leave that site out with exclude, and please report it."
    )
    error.checks = tuple(evidence.checks)
    return error


__all__ = ["Applied", "Skipped", "apply_plan", "rewrite"]
