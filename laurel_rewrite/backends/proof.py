"""Proof that a rewritten model does at its start what the original does, before anybody gets it.

Compared are runs in eval and in train mode with one random state: outputs, their strides and types, inputs and buffers afterwards; and how
often each connection is called. While the rewritten model runs, reads of tensors that the original would have changed in place are noticed: there
an add in place must stay one.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from laurel_rewrite.backends import BackEnd
from laurel_rewrite.detection.sites import Sites
from laurel_rewrite.errors import TooManyTurnsError, VerificationError
from laurel_rewrite.graph.snapshot import fits_twice, state_bytes
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.operators.prepared import plain_start
from laurel_rewrite.plan import Plan
from laurel_rewrite.private import TorchDispatchMode, memory_id, pytree
from laurel_rewrite.verification.checks import Check
from laurel_rewrite.verification.runs import REGROUPED, SCALE_FREE, Allowed, Run, Watch, allowed, compare_runs, declared, run_once

_MODES = (False, True)
_MODES_OF_CHECKS = (*_MODES, None, False)  # the two starts, the calls, the start of operators for readers without a scale


@dataclass
class Evidence:
    """What runs of a rewritten model showed.

    Attributes:
        checks: one a mode, and one on the calls.
        stale: sites after which somebody read what the original had changed in place.
        turns: whether a loop ran on after its modules were used up.
        counts: how often each connection was called, in each mode that ran.
        errors: what the runs raised.
    """

    checks: list[Check] = field(default_factory=list)
    stale: set[str] = field(default_factory=set)
    turns: bool = False
    counts: dict[bool, Counter[str]] = field(default_factory=dict)
    errors: list[Exception] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return any(check.failed for check in self.checks)


class Proof:
    """The original's runs, made before anything changes, and the comparison of a rewritten model with them.

    Args:
        model: the original.
        args, kwargs: inputs of its forward.
        seed: of all random generators, in every run.
        regrouped: the rewritten model is run in a way that may compute sums in another order.
    """

    def __init__(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], seed: int = 0, *, regrouped: bool = False) -> None:
        self.args, self.kwargs, self.seed, self.regrouped = args, kwargs, seed, regrouped
        # Each run keeps a copy of the model's state beside it.
        self.why_not = "" if fits_twice(model) else f"the model's {state_bytes(model) / 2**30:.1f} GiB do not fit into memory twice"
        self.before: dict[bool, Run] = {}
        self.unsteady: dict[bool, str] = {}
        if not self.why_not:
            with self._memory():
                self.before = {mode: self._run(model, mode) for mode in _MODES}

    def of(self, model: nn.Module, plan: Plan, loose: Mapping[str, int]) -> Evidence:
        """Run a rewritten model and compare.

        Args:
            model: the rewritten one.
            plan: what it should have.
            loose: sites whose add in place became one that is not, each with the operand (0 or 1) that holds the skip.
        """
        found = Evidence()
        if not self.why_not:
            with self._memory(), plain_start(model):
                for mode in _MODES:
                    watch = _Watch(model, loose)
                    after = self._run(model, mode, watch)
                    found.checks.append(
                        compare_runs(self.before[mode], after, train=mode, declared=declared(model), allowed=self._allowed(model))
                    )
                    found.turns |= isinstance(after.error, TooManyTurnsError)
                    found.stale |= watch.found
                    found.errors += [after.error] if after.error is not None else []
                    if self.before[mode].error is None and after.error is None:
                        found.counts[mode] = watch.counts
        if self.why_not:
            return Evidence([Check.not_run("exact start", self.why_not)])
        if found.counts:
            found.checks.append(_calls(plan, found.counts))
            found.checks += self._scale_free(model)
        found.checks = [self.unsteady_or(check, mode) for check, mode in zip(found.checks, _MODES_OF_CHECKS, strict=False)]
        return found

    def steady(self, model: nn.Module, evidence: Evidence) -> bool:
        """Whether the original is the same from run to run, in the modes in which the rewritten one differed. Where it is not, its checks become
        "not run"."""
        for mode, check in zip(_MODES, evidence.checks, strict=False):
            if check.failed and mode not in self.unsteady:
                with self._memory():
                    again = compare_runs(self.before[mode], self._run(model, mode), train=mode)
                    if again.failed:
                        self.unsteady[mode] = f"the model differs from itself from run to run, by {again.difference:.2g} ({again.detail})"
        evidence.checks = [self.unsteady_or(check, mode) for check, mode in zip(evidence.checks, _MODES_OF_CHECKS, strict=False)]
        return not evidence.failed

    def differs(self, model: nn.Module) -> bool:
        """Whether a rewritten model fails the comparison, in any mode in which the original is steady."""
        with plain_start(model):
            other = any(
                compare_runs(self.before[mode], self._run(model, mode), train=mode, allowed=self._allowed(model)).failed
                for mode in _MODES
                if mode not in self.unsteady
            )
        return other or any(check.failed for check in self._scale_free(model))

    def _allowed(self, model: nn.Module) -> Allowed:
        return REGROUPED if self.regrouped else allowed(model)

    def _scale_free(self, model: nn.Module) -> list[Check]:
        """Where operators start as multiples of the stream, which readers behind a norm do not see: a run with their own start. That one does is
        no fault of the insertion, which plain sums prove, and is said: its reader is no norm, or the norm's epsilon is not small there."""
        starts = {module.start_of(module.config) for module in sites_of(model).values()}
        if "scale-free" not in starts or "inexact" in starts or False in self.unsteady:
            return []
        found = self._run(model, train=False)
        check = compare_runs(self.before[False], found, train=False, allowed=SCALE_FREE, name="start for readers without a scale")
        if not check.failed or not math.isfinite(check.difference):
            return [check]
        why = (
            "a reader of the stream is no norm, or its norm's epsilon is not small beside the stream: the model starts as another function"
        )
        return [replace(check, passed=None, detail=f"{check.detail}; {why}")]

    def unsteady_or(self, check: Check, mode: bool | None) -> Check:
        return Check.not_run(check.name, self.unsteady[mode]) if mode in self.unsteady and mode is not None else check

    def _run(self, model: nn.Module, train: bool, watch: Watch | None = None) -> Run:
        return run_once(model, self.args, self.kwargs, train=train, seed=self.seed, watch=watch)

    @contextlib.contextmanager
    def _memory(self) -> Iterator[None]:
        try:
            yield
        except (MemoryError, torch.OutOfMemoryError) as error:
            self.why_not = f"there is not enough memory to run both models ({type(error).__name__})"


class TorchBackEnd(BackEnd):
    """What the back ends of modules and of fx graphs share: the model, and inputs to prove the result with.

    Args:
        model: the module or graph.
        sites: of it.
        args, kwargs: inputs of its forward, for the proof.
        inplace: change the model itself; else a copy.
        verify: whether to prove the result.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sites,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        inplace: bool = False,
        verify: bool = True,
    ) -> None:
        self.model, self.sites, self.args, self.kwargs = model, sites, args, dict(kwargs or {})
        self.inplace, self.verify = inplace, verify

    def proof(self, plan: Plan) -> Proof | None:
        """The original's runs, where the result is to be proved."""
        return Proof(self.model, self.args, self.kwargs, plan.seed) if self.verify else None


def first_wrong(count: int, wrong: Callable[[int], bool]) -> int:
    """The least k such that the first k of `count` sites make the model wrong, given that all of them do; by halving."""
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if wrong(middle) else (middle, high)
    return high


def failure(evidence: Evidence, name: str) -> VerificationError:
    """What is raised where a rewritten model is another one; `name` is the first site that makes it so, "" where that is not known."""
    first = next(check for check in evidence.checks if check.failed)
    place = f"The first site with which it differs is {name}. " if name else ""
    error = VerificationError(
        f"The rewritten model does not compute what the original does: {first.name}: {first.detail}, largest difference {first.difference:.3g}, "
        f"allowed: {first.tolerance}. {place}The model is as it was. Leave that site out with exclude, and please report it."
    )
    error.checks = tuple(evidence.checks)
    return error


def _calls(plan: Plan, counts: Mapping[bool, Counter[str]]) -> Check:
    """Every connection was called as often as the plan says, in one of the modes at least: layer drop may leave some out in the other. Control
    flow calls those in it as often as it likes."""
    name, wrong = "every connection is called", []
    for row in plan.sites:
        seen = {mode: count[row.id] for mode, count in counts.items()}
        if row.calls and row.calls not in seen.values():
            wrong.append(f"{row.id}: {max(seen.values())} times, not {row.calls}")
    detail = "; ".join(wrong[:4]) if wrong else f"{len(plan.sites)} connections"
    return Check(name, not wrong, float(len(wrong)), "as often as the plan says", detail)


class _Watch(Watch):
    """Counts the calls of LAuReL modules, and notices reads of tensors that the original would have changed in place."""

    def __init__(self, model: nn.Module, loose: Mapping[str, int]) -> None:
        self.modules = sites_of(model)
        self.loose = loose
        self.counts: Counter[str] = Counter()
        self.found: set[str] = set()
        self.reads = _StaleReads(self.found) if loose else None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> _Watch:
        for name, module in self.modules.items():
            handles = [
                module.register_forward_pre_hook(self._before, with_kwargs=True),
                module.register_forward_hook(self._after(name), with_kwargs=True, always_call=True),
            ]
            for handle in handles:
                self._stack.callback(handle.remove)
        if self.reads is not None:
            self._stack.enter_context(self.reads)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def done(self, output: Any, inputs: Any) -> None:
        if self.reads is not None:
            self.reads.look((output, inputs))

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.reads is not None:
            self.reads.look((args, kwargs))  # the sum reads its operands, as the original's did
            self.reads.inside += 1

    def _after(self, name: str) -> Callable[[nn.Module, Any, Any, Any], None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            summed = len(args) > 1 or "f" in kwargs  # else it is asked once more, at the end of a link
            self.counts[name] += summed
            if self.reads is not None:
                self.reads.inside -= 1
                if summed and name in self.loose:
                    operands = [args[0] if args else kwargs["x"], args[1] if len(args) > 1 else kwargs["f"]]
                    self.reads.stale(operands[self.loose[name]], name)

        return hook


class _StaleReads(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Notices every op that reads memory which an add in place of the original would have changed by then."""

    def __init__(self, found: set[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.found = found
        self.inside = 0  # LAuReL reads earlier states on purpose
        self._storages: dict[int, tuple[Any, str]] = {}

    def stale(self, tensor: Tensor, site: str) -> None:
        storage = _storage(tensor)
        if storage is not None:
            self._storages[memory_id(storage)] = storage, site

    def look(self, tree: Any) -> None:
        for leaf in pytree.tree_leaves(tree):
            storage = _storage(leaf) if isinstance(leaf, Tensor) else None
            if storage is not None and memory_id(storage) in self._storages:
                self.found.add(self._storages[memory_id(storage)][1])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._storages and not self.inside:
            self.look((args, kwargs))
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> Any:
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse, or a subclass without memory of its own
        return None
