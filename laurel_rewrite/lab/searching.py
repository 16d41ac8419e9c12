"""A search under budgets, over operators and the places where they stand: what costs too much is not trained, what falls behind not to its end.

The sampler is optuna's TPE (Bergstra et al., Algorithms for Hyper-Parameter Optimization, 2011), and the pruner its successive halving (Li et al., A System
for Massively Parallel Hyperparameter Tuning, 2020). Nothing of optuna's is stored: the same requests with the same figures ask for the same
trials, so that a search that was stopped goes on when its runs are read again.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from laurel_rewrite.errors import ConfigError, LaurelError, missing
from laurel_rewrite.lab import folder, trials
from laurel_rewrite.lab.bench import Bench
from laurel_rewrite.lab.budget import PARAMETERS, Budget, excess, precision_for
from laurel_rewrite.lab.candidates import UNCHANGED, Candidate, Source
from laurel_rewrite.lab.runs import Point, Run
from laurel_rewrite.lab.trials import Search, Trial
from laurel_rewrite.plan import LaurelConfig

EVERYWHERE = "everywhere"
SEED = 1_000_003
"""Of all trials: no comparison judges what was chosen by its own seeds."""
KEPT = 3
RANKS = (4, 8, 16, 32)
"""That are searched where none are given."""
_REDUCTION = 3
_TRIED = 3
"""So many for each that is trained, at most: the others are over a budget."""
_ASKED = 20
"""So many suggestions likewise: the others are known, or no site is left of them."""


@dataclass(frozen=True)
class Space:
    """What is searched.

    Attributes:
        operators: with their options, at every site.
        roles, depths: sites by what their branches do, and by how deep they stand.
        sites: all that the operators are for, in order.
    """

    operators: Mapping[str, Candidate]
    roles: Mapping[str, frozenset[str]]
    depths: Mapping[str, frozenset[str]]
    sites: tuple[str, ...]

    @staticmethod
    def of(source: Source, operators: Sequence[Candidate]) -> Space:
        """The space of some operators' sites."""
        plan = source.plan(operators[0])
        assert plan is not None
        sites = tuple(dict.fromkeys(site.id for site in plan.sites))
        spots = source.sites().spots
        roles, blocks = ({site: str(getattr(spots[site], what)) for site in sites} for what in ("role", "block"))
        names = list(dict.fromkeys(blocks.values()))
        half = len(names) // 2
        parts = {"first half": names[:half], "last half": names[half:], "every other block": names[1::2]} if len(names) > 1 else {}
        return Space(
            {one.name: one for one in operators},
            _distinct(sites, {f"{role} only": frozenset(s for s in sites if roles[s] == role) for role in dict.fromkeys(roles.values())}),
            _distinct(sites, {name: frozenset(s for s in sites if blocks[s] in part) for name, part in parts.items()}),
            sites,
        )  # fmt: skip

    def candidate(self, operator: str, role: str, depth: str) -> Candidate | None:
        """A point of it; None where no site is left. Equal sets of sites are one point."""
        chosen, found = self.roles[role] & self.depths[depth], self.operators[operator]
        if not chosen or len(chosen) == len(self.sites):
            return found if chosen else None
        role, depth = next((r, d) for r, d in itertools.product(self.roles, self.depths) if self.roles[r] & self.depths[d] == chosen)
        assert found.config is not None
        config = found.config.but(found.config.variant, include=tuple(site for site in self.sites if site in chosen), exclude=())
        places = [place for place in (role, depth) if place != EVERYWHERE]
        return replace(found, name=", ".join([operator, *places]), config=config)

    def candidates(self) -> list[Candidate]:
        """All points, each set of sites once."""
        found = (self.candidate(*place) for place in itertools.product(self.operators, self.roles, self.depths))
        return list({one.name: one for one in found if one is not None}.values())


def fitting_ranks(source: Source, configs: Sequence[LaurelConfig]) -> list[int]:
    """Those of `RANKS` that some site has room for; the smallest where none has."""
    found = []
    for rank in RANKS:
        try:
            for config in configs:
                source.plan(Candidate("", config.but(config.variant, rank=rank)))
        except ConfigError:
            break
        found.append(rank)
    return found or [RANKS[0]]


def _distinct(sites: Sequence[str], parts: Mapping[str, frozenset[str]]) -> dict[str, frozenset[str]]:
    """All sites, and the parts that are others."""
    found: dict[frozenset[str], str] = {frozenset(sites): EVERYWHERE}
    for name, part in parts.items():
        found.setdefault(part, name)
    return {name: part for part, name in found.items()}


def searched(bench: Bench, space: Space, budgets: tuple[Budget, ...], count: int, rates: Sequence[float], *, keep: int = KEPT) -> Search:
    """Search until so many candidates were trained, or there are no more.

    Args:
        bench: where they are tried and trained.
        space: of candidates.
        budgets: limits.
        count: how many to train.
        rates: learning rates; the best for the unchanged model is everybody's.
        keep: how many are to be compared.

    Raises:
        ConfigError: the unchanged model cannot be trained.
        MissingPackageError: optuna is not installed.
    """
    return _Search(bench, space, budgets, count, keep).run(rates)


class _Search:
    def __init__(self, bench: Bench, space: Space, budgets: tuple[Budget, ...], count: int, keep: int) -> None:
        self.bench, self.space, self.budgets, self.count, self.keep = bench, space, budgets, count, keep
        self.where = bench.out / folder.SEARCH
        self.parameters = bench.source.base(0).parameters
        self.known: dict[str, Trial] = {}

    def run(self, rates: Sequence[float]) -> Search:
        optuna = _optuna()
        said = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            return self._searched(optuna, rates)
        finally:
            optuna.logging.set_verbosity(said)

    def _searched(self, optuna: Any, rates: Sequence[float]) -> Search:
        study = self._study(optuna)
        baseline = self._baseline(rates)
        choices = len(self.space.candidates())
        budgets = [budget.text for budget in self.budgets]
        if baseline is None:
            return Search(budgets, SEED, math.nan, math.nan, choices, self.keep)
        found = Search(budgets, SEED, baseline.rate, baseline.curve[-1].choose, choices, self.keep)
        for _ in range(_ASKED * self.count):
            enough = len(found.of(trials.TRAINED, trials.STOPPED, trials.FAILED)) >= self.count
            if enough or len(found.trials) >= min(_TRIED * self.count, choices):
                break
            if self.bench.late():
                return found
            asked = study.ask()
            candidate = self.space.candidate(
                *(asked.suggest_categorical(name, list(values)) for name, values in (
                    ("operator", self.space.operators), ("role", self.space.roles), ("depth", self.space.depths),
                ))
            )  # fmt: skip
            trial = None if candidate is None else self.known.get(candidate.name)
            if candidate is not None and trial is None:
                trial = self.known[candidate.name] = self._trial(asked, candidate, baseline)
                found.trials.append(trial)
            self._tell(study, asked, trial, found.baseline)
        found.done = True
        return found

    def _study(self, optuna: Any) -> Any:
        points = len(self.bench.trainer.recipe.stops(self.bench.trainer.steps))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.create_study(
                sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=max(4, self.count // 2)),
                pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=max(1, points // _REDUCTION**2), reduction_factor=_REDUCTION),
            )

    def _tell(self, study: Any, asked: Any, trial: Trial | None, baseline: float) -> None:
        """What became of a suggestion; what costs too much, or cannot be, is one that keeps no constraint."""
        from optuna.trial import TrialState

        asked.set_constraint("budget", 1.0 if trial is None else min(max(trial.excess, -1.0), 1.0))
        if trial is not None and trial.state in (trials.STOPPED, trials.FAILED):
            study.tell(asked, state=TrialState.PRUNED)
        else:
            study.tell(asked, baseline if trial is None or trial.loss is None else trial.loss)

    def _baseline(self, rates: Sequence[float]) -> Run | None:
        """The unchanged model at its best rate, trained as the trials are; None where the time was over."""
        found = []
        for rate in rates:
            run = folder.known_run(self.where, Candidate(UNCHANGED), rate, SEED)
            if run is None and self.bench.late():
                return None
            title = "search: the unchanged model" + (f", lr {rate:g}" if len(rates) > 1 else "")
            found.append(
                run or self.bench.trained(Candidate(UNCHANGED), rate, SEED, where=self.where, title=title, watch=lambda point: False)
            )
        reached = [run for run in found if not run.failed]
        if not reached:
            raise ConfigError(f"The unchanged model cannot be trained: {found[0].failed}. Give another --lr.")
        return min(reached, key=lambda run: run.curve[-1].choose)

    def _trial(self, asked: Any, candidate: Candidate, baseline: Run) -> Trial:
        try:
            figures, over, problem = self._priced(candidate)
            if problem or over > 0:
                return Trial(candidate, trials.UNMEASURED if problem else trials.OVER, figures, over, problem=problem)
            self.bench.tried(candidate, SEED)
        except LaurelError as error:  # an operator need not fit a part of a stream
            return Trial(candidate, trials.UNFIT, {}, math.inf, problem=str(error.args[0])[:300])
        run = self._run(asked, candidate, baseline.rate)
        state = trials.FAILED if run.failed else trials.STOPPED if run.stopped else trials.TRAINED
        last, other = run.curve[-1], baseline.curve[len(run.curve) - 1]  # the first point is there whatever happens
        return Trial(candidate, state, figures, over, last.choose, last.choose - other.choose, last.tokens, run.failed)

    def _priced(self, candidate: Candidate) -> tuple[dict[str, float], float, str]:
        """What a candidate costs, how far that is above a budget, and why it could not be measured; what needs no graph is asked first."""
        plan = self.bench.source.plan(candidate)
        assert plan is not None
        figures: dict[str, float] = {PARAMETERS: plan.parameters() / self.parameters}
        cheap, graphs = (tuple(budget for budget in self.budgets if budget.of_graph is of) for of in (False, True))
        over = excess(cheap, figures)
        if over > 0 or not graphs:
            return figures, over, ""
        served = self.bench.served(candidate, partial(precision_for, graphs))
        if served.problem:
            return figures, math.inf, served.problem
        figures |= {budget.name: budget.value(served.figures) for budget in graphs}
        return figures, max(over, excess(graphs, served.figures)), ""

    def _run(self, asked: Any, candidate: Candidate, rate: float) -> Run:
        counted = itertools.count(1)

        def behind(point: Point) -> bool:
            asked.report(point.choose, next(counted))
            return bool(asked.should_prune())

        run = folder.known_run(self.where, candidate, rate, SEED)
        if run is None:
            return self.bench.trained(candidate, rate, SEED, where=self.where, title=f"search: {candidate.name}", watch=behind)
        for point in run.curve:
            behind(point)
        return run


def _optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise missing("optuna", "train") from error
    return optuna
