"""Making a comparison: everything is built and tried before anything is trained; each run that is done stays done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from laurel_rewrite.errors import ConfigError
from laurel_rewrite.files.drafts import replacing
from laurel_rewrite.lab import folder
from laurel_rewrite.lab.bench import Bench
from laurel_rewrite.lab.budget import Budget, parsed
from laurel_rewrite.lab.candidates import UNCHANGED, Candidate, NoLayerError, Source, control, source_of, twin, variants
from laurel_rewrite.lab.comparison import Comparison, Key, Size
from laurel_rewrite.lab.runs import Recipe
from laurel_rewrite.lab.searching import Space, fitting_ranks, searched
from laurel_rewrite.lab.trials import Search
from laurel_rewrite.operators import registry
from laurel_rewrite.plan import LaurelConfig
from laurel_rewrite.report import write_report
from laurel_rewrite.stages import Listener, silent


def compare(
    model: str | nn.Module | Callable[[], nn.Module],
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    variants: str | Sequence[str] = ("rw+lr",),
    tokens: int,
    seeds: int | Sequence[int] = 3,
    rates: float | Sequence[float] = 1e-3,
    data: str = "builtin",
    tokenizer: str | Path | None = None,
    out: str | Path = "laurel_comparison",
    settings: Mapping[str, Any] | None = None,
    one_more_layer: bool = True,
    self_check: bool = False,
    candidates: Sequence[Candidate] = (),
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    profile_seconds: float = 2.0,
    inspect: int = 4,
    search: int | None = None,
    budget: str | Sequence[str] = (),
    max_seconds: float | None = None,
    force: bool = False,
    listener: Listener = silent,
    **options: Any,
) -> Comparison:
    """Train the unchanged model, the model with one more layer and the model with each operator, from the same seeds, on the same batches in the
    same order, for the same tokens; and say which differences the seeds allow.

    The result's `rows()` are the table; it is not `done` where `max_seconds` were over. A call with the folder of an earlier one goes on where that stopped;
    more variants, rates and seeds may be asked for then.

    Args:
        model: MODEL as the command takes it; or a module, or a function that makes one, with inputs of its forward. Of a module every run
            begins with its weights as they are, so that seeds differ in their batches alone.
        args, kwargs, settings: inputs of forward, where the model is not named; settings of one that is.
        variants, include, exclude: operators, and the sites that get them, see `LaurelConfig`.
        tokens, seeds: to train each on (images, where the model takes those); how many seeds, or which. With one, nothing is judged.
        rates: learning rates. Of several, each candidate is judged at its own best, by the loss on the second split.
        data, tokenizer: see `laurel_rewrite.lab.corpora.corpus`.
        out, force: folder of runs and report; whether a report there that is not ours, or was changed, is replaced.
        one_more_layer, self_check: whether that is compared, and the unchanged model from other weights, which must be not told apart.
        candidates: more of them, made by hand.
        profile_seconds: time to measure each graph's latency in onnxruntime, from the start; with 0 none is.
        inspect: batches of the third split to look inside the trained models with, see `laurel_rewrite.lab.inspecting`; with 0 nobody looks.
        search, budget: instead of all variants, train so many of them, at all sites or some, until they fall behind, within limits such as
            "latency_ratio <= 1.02" or "parameters <= 1%", and compare the best: see `laurel_rewrite.lab.searching` and `.budget`.
        max_seconds: begin no run after them.
        listener: is told of the stages: each run is one.
        options: fields of `Recipe` (batch, length, ...), and options of operators (rank, ...), of whose values each makes a candidate.

    Raises:
        ConfigError: the request cannot be meant; the model gives no loss, or no gradient; the data is too short, or has more words than the
            model knows; the folder holds another comparison.
        CaptureError, RewriteError, VerificationError, MissingPackageError: a candidate cannot be made; nothing has been trained then.
    """
    recipe, listed = _recipe(tokens, options)
    source, label = source_of(model, args, kwargs, settings)
    operators = _variants(source, variants, listed, include, exclude, search=search is not None)
    asked = [Candidate(UNCHANGED), *([twin()] if self_check else []), *([control()] if one_more_layer else []), *candidates]
    rates, budgets = _rates(rates), parsed(_listed(budget), profile_seconds)
    where = Bench(
        source,
        label,
        recipe,
        data,
        tokenizer,
        Path(out),
        profile_seconds=profile_seconds,
        seconds=max_seconds,
        force=force,
        listener=listener,
    )
    with where as bench:
        job = _Job(bench, rates, seeds, inspect=inspect)
        if search is None:
            return job.compared(_distinct([*asked, *operators]))
        return job.searched(_distinct(asked), Space.of(source, operators), budgets, search)


def _recipe(tokens: int, options: Mapping[str, Any]) -> tuple[Recipe, dict[str, Sequence[Any]]]:
    """The recipe, and the values of operators' options."""
    known = {field.name for field in fields(Recipe)}
    recipe = Recipe(tokens, **{name: value for name, value in options.items() if name in known})
    return recipe, {name: _listed(value) for name, value in options.items() if name not in known}


def _listed(value: Any) -> Sequence[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _variants(
    source: Source, names: str | Sequence[str], options: dict[str, Sequence[Any]], include: Any, exclude: Any, *, search: bool
) -> list[Candidate]:
    names = [names] if isinstance(names, str) else names
    ranked = [name for name in names if "rank" in registry.operator(registry.canonical(name)).options]
    if search and ranked and "rank" not in options:
        configs = [LaurelConfig(name, include=include, exclude=exclude) for name in ranked]
        options = {**options, "rank": fitting_ranks(source, configs)}
    return variants(source, names, options, include=include, exclude=exclude)


def _rates(rates: float | Sequence[float]) -> tuple[float, ...]:
    found = tuple(dict.fromkeys(float(rate) for rate in _listed(rates)))
    if not found or not all(0 < rate < float("inf") for rate in found):
        raise ConfigError(f"Learning rates must be above 0, not {', '.join(f'{rate:g}' for rate in found) or 'none'}.")
    return found


def _distinct(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    names = [candidate.name for candidate in candidates]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"Two candidates have the name {twice!r}.")
    return tuple(candidates)


_PAUSE = 10
"""Between two reports, in times of what one takes: hundreds of small runs would else wait for their reports."""


class _Job:
    """What is trained, in which order; the report is written behind each run, but not all the time."""

    def __init__(self, bench: Bench, rates: tuple[float, ...], seeds: int | Sequence[int], *, inspect: int) -> None:
        if inspect < 0 or inspect == 1:
            raise ConfigError("Looking inside takes two batches or more, for one has no standard error; 0 for none.")
        self.bench, self.rates, self.inspect = bench, rates, inspect
        self.notes: list[str] = []
        self._due = 0.0
        self.seeds = tuple(range(seeds)) if isinstance(seeds, int) else tuple(dict.fromkeys(seeds))

    def searched(self, others: Sequence[Candidate], space: Space, budgets: tuple[Budget, ...], count: int) -> Comparison:
        """A search, and the comparison of its best with the others; of nothing, where it found none."""
        possible = self._tried(others)
        self.bench.begin()
        search = searched(self.bench, space, budgets, count, self.rates)
        chosen = [*(one for one in others if one.name in possible), *search.finalists] if search.finalists else []
        return self.compared(_distinct(chosen), search)

    def compared(self, candidates: Sequence[Candidate], search: Search | None = None) -> Comparison:
        """All runs that are not done yet, until the time is over."""
        bench = self.bench
        runs = folder.known_runs(bench.out, candidates, self.rates, self.seeds)
        sizes = self._tried(candidates)
        candidates = [one for one in candidates if one.name in sizes]
        bench.begin()
        latencies = {one.name: bench.served(one).latency for one in candidates}
        if any(latencies.values()):
            latencies[UNCHANGED] = (1.0, 1.0, 1.0)
        sizes = {name: replace(sizes[name], latency=latency) for name, latency in latencies.items()}
        found = Comparison(bench.about, candidates, self.rates, self.seeds, sizes, runs, search, notes=self.notes)
        self._train(found)
        if found.done and self.inspect:
            seen = (bench.seen(one, found.best(one.name), self.seeds[0], self.inspect) for one in candidates)
            found.inside = [one for one in seen if one is not None]
        self._report(found)
        return found

    def _tried(self, candidates: Sequence[Candidate]) -> dict[str, Size]:
        """What each is, before any is trained. One more layer is left out, with a note, where the model has none to repeat."""
        sizes = {}
        for one in candidates:
            try:
                sizes[one.name] = self.bench.tried(one, self.seeds[0])
            except NoLayerError as error:
                self.notes.append(f"{error.args[0]} It is left out.")
        return sizes

    def _train(self, found: Comparison) -> None:
        by_name = {candidate.name: candidate for candidate in found.candidates}
        missing = [key for key in found.planned() if key not in found.runs]
        begun = time.perf_counter()
        for place, key in enumerate(missing):
            if self.bench.late():
                return
            left = f", {_duration((time.perf_counter() - begun) / place * (len(missing) - place))} left" if place else ""
            name, rate, seed = key
            found.runs[key] = self.bench.trained(
                by_name[name], rate, seed, where=self.bench.out, title=_named(key, found), left=left, keep=seed == self.seeds[0]
            )
            if time.perf_counter() >= self._due:
                self._report(found)

    def _report(self, found: Comparison) -> None:
        if not self.bench.main:
            return
        begun = time.perf_counter()
        with replacing(self.bench.out, "compare", force=self.bench.force) as draft:
            if found.chosen is not None and (plan := self.bench.source.plan(found.chosen)) is not None:
                plan.with_model(found.about["model"]).write(draft / folder.PLAN)
            write_report(
                {
                    "title": f"{found.about['model']}: comparison",
                    "comparison": found.to_dict(),
                    "notes": found.notes,
                    "out": str(self.bench.out),
                },
                draft,
            )
        self._due = time.perf_counter() + _PAUSE * (time.perf_counter() - begun)


def _named(key: Key, comparison: Comparison) -> str:
    name, rate, seed = key
    return f"{name}, seed {seed}" + (f", lr {rate:g}" if len(comparison.rates) > 1 else "")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
