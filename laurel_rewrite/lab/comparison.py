"""A comparison: candidates, learning rates and seeds; which runs are done, and what they say together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from laurel_rewrite.lab.candidates import UNCHANGED, Candidate
from laurel_rewrite.lab.judging import Judgement, judged, tokens_for
from laurel_rewrite.lab.runs import Run
from laurel_rewrite.lab.trials import Search

Key = tuple[str, float, int]
"""Candidate, learning rate before the candidate's own factor, seed."""


@dataclass(frozen=True)
class Size:
    """What a candidate's model is.

    Attributes:
        parameters: number of them.
        flops: of the products of a forward pass, per token (or example).
        latency: over the baseline's in onnxruntime, with its interval; None where it was not measured.
    """

    parameters: int
    flops: float
    latency: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Row:
    """A candidate in the table.

    Attributes:
        name: of the candidate.
        rate: the learning rate that it is judged at: of those tried the one with the smallest mean loss on the second split.
        judgement: of its losses on the third split.
        needs: tokens that the baseline needs for the candidate's mean loss on the second split, over those of the run; None where those do not
            do, or the candidate has none.
        size: see there.
        parameters, flops, seconds, latency: ratios to the baseline; seconds are those of a training step, the median over seeds.
        gains: loss gained on the baseline for each per cent that such a ratio is above 1, by its name.
        failures: what went wrong, by seed.
    """

    name: str
    rate: float
    judgement: Judgement
    needs: float | None
    size: Size
    parameters: float
    flops: float
    seconds: float
    latency: float | None
    gains: dict[str, float]
    failures: dict[int, str]

    @property
    def needed(self) -> str:
        """`needs` in words."""
        return "" if self.failures else "> 100 %" if self.needs is None else f"{100 * self.needs:.0f} %"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "failures": {str(seed): text for seed, text in self.failures.items()}}


@dataclass
class Comparison:
    """What is compared, and the runs that are done.

    Attributes:
        about: model, task, data, recipe and versions: what all runs have in common.
        candidates: the unchanged model first.
        rates: learning rates that each is trained with.
        seeds: from which each is trained.
        sizes: by candidate.
        runs: by candidate, learning rate and seed.
        search: what the candidates came from, where they were searched.
        inside: what was seen inside those with an operator, as `laurel_rewrite.lab.inspecting.Looked.to_dict` gives it.
        notes: what was left out, in sentences.
    """

    about: dict[str, Any]
    candidates: Sequence[Candidate]
    rates: Sequence[float]
    seeds: Sequence[int]
    sizes: dict[str, Size]
    runs: dict[Key, Run]
    search: Search | None = None
    inside: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()

    def planned(self) -> list[Key]:
        """All runs, in the order in which they are made: of a seed all candidates, so that one which is stopped has pairs."""
        return [(candidate.name, rate, seed) for seed in self.seeds for candidate in self.candidates for rate in self.rates]

    @property
    def done(self) -> bool:
        return all(key in self.runs for key in self.planned()) and (self.search is None or self.search.done)

    def of(self, name: str, rate: float) -> dict[int, Run]:
        """A candidate's runs by seed."""
        return {seed: self.runs[name, rate, seed] for seed in self.seeds if (name, rate, seed) in self.runs}

    def best(self, name: str) -> float:
        """The learning rate that a candidate is judged at."""
        return min(self.rates, key=lambda rate: self._mean(name, rate))

    @property
    def chosen(self) -> Candidate | None:
        """Of the finalists of a search the one with the smallest mean loss on the second split, when all are trained."""
        if self.search is None or not self.done or not self.search.finalists:
            return None
        return min(self.search.finalists, key=lambda one: self._mean(one.name, self.best(one.name)))

    def _mean(self, name: str, rate: float) -> float:
        runs = self.of(name, rate).values()
        return float(np.mean([math.inf if run.failed else run.curve[-1].choose for run in runs])) if runs else math.inf

    def rows(self) -> list[Row]:
        """The table, as far as there are runs."""
        rates = {candidate.name: self.best(candidate.name) for candidate in self.candidates}
        runs = {name: found for name, rate in rates.items() if (found := self.of(name, rate))}
        if UNCHANGED not in runs:
            return []
        losses: dict[str, dict[int, float | None]] = {
            name: {seed: run.judge for seed, run in found.items()} for name, found in runs.items()
        }
        return [
            self._row(judgement, rates[judgement.name], runs[judgement.name], runs[UNCHANGED]) for judgement in judged(losses, UNCHANGED)
        ]

    def _row(self, judgement: Judgement, rate: float, runs: Mapping[int, Run], baseline: Mapping[int, Run]) -> Row:
        own, other = self.sizes[judgement.name], self.sizes[UNCHANGED]
        speeds = [baseline[seed].speed / run.speed for seed, run in runs.items() if seed in baseline and run.timed and baseline[seed].timed]
        ratios = {
            "parameters": own.parameters / other.parameters,
            "flops": own.flops / other.flops if other.flops else math.nan,
            "seconds": float(np.median(speeds)) if speeds else math.nan,
            "latency": own.latency[0] if own.latency is not None else None,
        }
        gains = {
            name: -judgement.difference / (100 * (ratio - 1))
            for name, ratio in ratios.items()
            if ratio is not None and ratio > 1 and math.isfinite(judgement.difference)
        }
        failures = {seed: run.failed for seed, run in runs.items() if run.failed}
        return Row(judgement.name, rate, judgement, self._needs(runs, baseline), own, gains=gains, failures=failures, **ratios)  # type: ignore[arg-type]

    def _needs(self, runs: Mapping[int, Run], baseline: Mapping[int, Run]) -> float | None:
        seeds = [seed for seed, run in runs.items() if seed in baseline and not run.failed and not baseline[seed].failed]
        if not seeds:
            return None
        curve = mean_curve([baseline[seed] for seed in seeds])
        found = tokens_for(mean_curve([runs[seed] for seed in seeds])[-1][1], curve)
        return None if found is None else found / curve[-1][0]

    def to_dict(self) -> dict[str, Any]:
        """As the report holds it."""
        return {
            **self.about,
            "candidates": {candidate.name: candidate.to_dict() for candidate in self.candidates},
            "rates": list(self.rates),
            "seeds": list(self.seeds),
            "runs": [self.runs[key].to_dict() | {"base_rate": key[1]} for key in self.planned() if key in self.runs],
            "rows": [row.to_dict() for row in self.rows()],
            "inside": list(self.inside),
            "search": self.search and self.search.to_dict(),
            "done": self.done,
        }


def mean_curve(runs: Sequence[Run]) -> list[tuple[float, float]]:
    """Tokens and loss on the second split, the mean over runs, as far as all of them came."""
    length = min(len(run.curve) for run in runs)
    return [(float(runs[0].curve[n].tokens), float(np.mean([run.curve[n].choose for run in runs]))) for n in range(length)]


def slug(key: Key) -> str:
    """The name of a run's files."""
    name, rate, seed = key
    plain = "".join(letter if letter.isalnum() or letter in "+-." else "_" for letter in name)
    return f"{plain}-lr{rate:g}-seed{seed}"
