"""Making a comparison: everything is built and tried before anything is trained; each run that is done stays done.

comparison.json     what all runs have in common: a folder with another one is refused
runs/               a file for each run that ended
weights/            those of each candidate from the first seed, for `inspect`
state/              of the run that has not ended
data/               tokens
report.html, report.json
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from laurel_rewrite import __version__
from laurel_rewrite.backends.module.weights import write_weights
from laurel_rewrite.errors import ConfigError, LaurelError
from laurel_rewrite.files.checked import read_json
from laurel_rewrite.files.drafts import check_out, replacing
from laurel_rewrite.graph.capture import quiet, without_caches
from laurel_rewrite.lab.candidates import UNCHANGED, Candidate, Source, control, twin, variants
from laurel_rewrite.lab.comparison import Comparison, Key, Size, plain, slug
from laurel_rewrite.lab.corpora import corpus, own
from laurel_rewrite.lab.runs import Recipe, Run, Trainer, accelerator_of
from laurel_rewrite.lab.splits import Corpus
from laurel_rewrite.lab.tasks import Task, check, task_of
from laurel_rewrite.report import HTML, JSON, write_report
from laurel_rewrite.sources.built import Built
from laurel_rewrite.sources.inputs import call_inputs, copied_inputs
from laurel_rewrite.sources.models import build
from laurel_rewrite.stages import Listener, Stage, silent

ABOUT, RUNS, WEIGHTS, STATE = "comparison.json", "runs", "weights", "state"
_FORMAT = 1


@dataclass(frozen=True)
class Request:
    """What is to be compared; see `compare`."""

    source: Source
    label: str
    candidates: tuple[Candidate, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    recipe: Recipe
    data: str
    tokenizer: Path | None
    out: Path


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
    max_seconds: float | None = None,
    force: bool = False,
    listener: Listener = silent,
    **options: Any,
) -> Comparison:
    """Train the unchanged model, the model with one more layer and the model with each operator, from the same seeds, on the same batches in the
    same order, for the same tokens; and say which differences the seeds allow.

    A call with the folder of an earlier one goes on where that stopped; more variants, rates and seeds may be asked for then.

    Args:
        model: MODEL as the command takes it; or a module, or a function that makes one, with inputs of its forward. Of a module every run
            begins with its weights as they are, so that seeds differ in their batches alone.
        args, kwargs: inputs of forward, where the model is not named.
        variants: operators.
        tokens: to train each on; images, where the model takes those.
        seeds: how many, or which. With one, nothing is judged.
        rates: learning rates. Of several, each candidate is judged at its own best, by the loss on the second split.
        data: "builtin", "builtin:NAME", a file or folder of text, or "datasets:NAME"; see `laurel_rewrite.lab.corpora.corpus`.
        tokenizer: file of `tokenizers`; bytes by default.
        out: folder of runs and report.
        settings: of a named MODEL.
        one_more_layer: whether that is compared, too.
        self_check: whether the unchanged model is compared with itself from other weights: they must not be told apart.
        candidates: more of them, made by hand.
        include, exclude: sites that get the operators, see `LaurelConfig`.
        max_seconds: begin no run after them.
        force: replace a report in `out` that is not ours, or was changed.
        listener: is told of the stages: each run is one.
        options: fields of `Recipe` (batch, length, ...), and options of operators (rank, history, ...); of several values of such an option,
            each makes a candidate.

    Returns:
        The comparison, whose `rows()` are the table. Where `max_seconds` were over, `done` is False.

    Raises:
        ConfigError: the request cannot be meant; the model gives no loss, or no gradient; the data is too short, or has more words than the
            model knows; the folder holds another comparison.
        CaptureError, RewriteError, VerificationError: a candidate cannot be made; nothing has been trained then.
        MissingPackageError: a package of the extra "train" is not installed.
    """
    source, label = source_of(model, args, kwargs, settings)
    known = {field.name for field in fields(Recipe)}
    recipe = Recipe(tokens, **{name: value for name, value in options.items() if name in known})
    listed = {name: _listed(value) for name, value in options.items() if name not in known}
    asked = [Candidate(UNCHANGED), *([twin()] if self_check else []), *([control()] if one_more_layer else [])]
    asked += [*_variants(source, variants, listed, include, exclude), *candidates]
    request = Request(
        source, label, _distinct(asked), _rates(rates), tuple(range(seeds)) if isinstance(seeds, int) else tuple(dict.fromkeys(seeds)),
        recipe, data, None if tokenizer is None else Path(tokenizer), Path(out),
    )  # fmt: skip
    return _Job(request, force=force, listener=listener).run(max_seconds)


def _listed(value: Any) -> Sequence[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _variants(source: Source, names: str | Sequence[str], options: dict[str, Sequence[Any]], include: Any, exclude: Any) -> list[Candidate]:
    return variants(source, [names] if isinstance(names, str) else names, options, include=include, exclude=exclude)


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


def source_of(model: Any, args: Any, kwargs: Mapping[str, Any] | None, settings: Mapping[str, Any] | None) -> tuple[Source, str]:
    """What makes the unchanged model, and its name."""
    if isinstance(model, str):
        if args != () or kwargs:
            raise ConfigError("A MODEL that is named has its own inputs; args and kwargs are for modules.")
        return Source(lambda: build(model, settings)), model
    if settings:
        raise ConfigError("settings are for a MODEL that is named.")
    given, named = call_inputs(args, kwargs)
    if isinstance(model, nn.Module):
        from laurel_rewrite.backends.module.surgery import copied

        return Source(lambda: Built(copied(model).train(), *copied_inputs(given, named), type(model).__name__)), type(model).__name__
    label = getattr(model, "__name__", type(model).__name__)
    return Source(lambda: Built(model().train(), *copied_inputs(given, named), label)), label


def data_of(task: Task, built: Built, data: str, folder: Path, tokenizer: Path | None) -> Corpus:
    """What a model is trained on: that of its file, where it offers some."""
    if task.kind == "own":
        return own(built.offers["dataset"], built.spec)
    return corpus(data, task.kind, folder=folder, tokenizer=tokenizer)


class _Job:
    def __init__(self, request: Request, *, force: bool, listener: Listener) -> None:
        self.request, self.force, self.listener = request, force, listener
        out = request.out
        check_out(out, "compare", (JSON, HTML), force=force)
        built = request.source.base(0)
        self.task = task_of(built, request.recipe.length)
        with accelerator_of(request.recipe).main_process_first():  # the others then find its files
            self.corpus = data_of(self.task, built, request.data, out, request.tokenizer)
        self.trainer = Trainer(request.recipe, self.task, self.corpus, out / STATE)
        self.main = self.trainer.accelerator.is_main_process
        about = self._about(built)
        runs = _known_runs(out, about, request)
        self.comparison = Comparison(about, request.candidates, request.rates, request.seeds, self._tried(), runs)
        if self.main:
            out.mkdir(parents=True, exist_ok=True)
            _write(
                out / ABOUT,
                {"format": _FORMAT, **about, "tokenizer": None if request.tokenizer is None else str(request.tokenizer.absolute())},
            )
        self.trainer.accelerator.wait_for_everyone()

    def _about(self, built: Built) -> dict[str, Any]:
        """What all runs of a folder have in common."""
        task = {"objective": self.task.objective, "unit": self.task.unit, "shape": list(self.task.shape)}
        found = {
            "model": self.request.label, "settings": built.settings, "start": self.request.source.digest(), "task": task,
            "recipe": asdict(self.request.recipe), "data": {"name": self.corpus.name, "digest": self.corpus.digest},
            "versions": {"laurel_rewrite": __version__, "torch": torch.__version__.partition("+")[0]},
        }  # fmt: skip
        return plain(found)  # type: ignore[no-any-return]

    def _tried(self) -> dict[str, Size]:
        """Every candidate, made and tried with a batch before any is trained."""
        sizes = {}
        batch = next(iter(self.trainer.loader("train", 0, 0, 1)))
        for candidate in self.request.candidates:
            try:
                model = self.request.source.model(candidate, self.request.seeds[0], verify=True).to(self.trainer.accelerator.device)
            except LaurelError as error:
                raise type(error)(f"{candidate.name}: {error.args[0]}") from error
            with quiet(), without_caches(model):
                check(self.task, model, batch, candidate.name)
                with FlopCounterMode(display=False) as counter, torch.no_grad():
                    self.task.loss(model, batch)
            units = len(next(iter(batch.values()))) * self.task.size
            sizes[candidate.name] = Size(sum(p.numel() for p in model.parameters()), counter.get_total_flops() / units)
        return sizes

    def run(self, max_seconds: float | None) -> Comparison:
        """All runs that are not done yet, until the time is over."""
        begin = time.perf_counter()
        found = self.comparison
        by_name = {candidate.name: candidate for candidate in found.candidates}
        missing = [key for key in found.planned() if key not in found.runs]
        for place, key in enumerate(missing):
            spent = time.perf_counter() - begin
            if self._all(max_seconds is not None and spent >= max_seconds):
                break
            left = f", {_duration(spent / place * (len(missing) - place))} left" if place else ""
            with self.listener(_named(key, found)) as stage:
                found.runs[key] = self._trained(by_name[key[0]], key, partial(_told, stage, left))
                stage.done(_came_to(found.runs[key]))
            self._report()
        self._report()
        return found

    def _all(self, late: bool) -> bool:
        """What the main process says, for the clocks of several differ."""
        from accelerate.utils import broadcast_object_list

        return bool(broadcast_object_list([late])[0])

    def _trained(self, candidate: Candidate, key: Key, progress: Callable[[float, str], None]) -> Run:
        name, rate, seed = key
        model = self.request.source.model(candidate, seed)
        accelerator = self.trainer.accelerator
        where = f"{accelerator.device.type}, {accelerator.num_processes} processes, torch {torch.__version__}"
        run = Run(name, rate * candidate.rate, seed, where=where)
        run, weights = self.trainer.run(model, run, keep=seed == self.request.seeds[0], progress=progress)
        if self.main:
            out = self.request.out
            if weights is not None:
                (out / WEIGHTS).mkdir(exist_ok=True)
                write_weights(weights, out / WEIGHTS / f"{slug(key)}.safetensors")
            (out / RUNS).mkdir(exist_ok=True)
            _write(out / RUNS / f"{slug(key)}.json", {"candidate": candidate.to_dict(), "base_rate": rate, "run": run.to_dict()})
        self.trainer.forget()
        accelerator.wait_for_everyone()
        return run

    def _report(self) -> None:
        if not self.main:
            return
        with replacing(self.request.out, "compare", force=self.force) as draft:
            write_report(
                {"title": f"{self.request.label}: comparison", "comparison": self.comparison.to_dict(), "out": str(self.request.out)}, draft
            )


def _known_runs(out: Path, about: Mapping[str, Any], request: Request) -> dict[Key, Run]:
    """The runs of an earlier call with this folder.

    Raises:
        ConfigError: it was another comparison, or another candidate of a name.
    """
    if not (out / ABOUT).exists():
        if (out / RUNS).exists():
            raise ConfigError(f"{out} has runs and no {ABOUT}, which says what they are. Choose another folder with --out.")
        return {}
    earlier = read_json(out / ABOUT, "The comparison")
    for name, value in about.items():
        if earlier.get(name) != value:
            raise ConfigError(
                f"{out} holds a comparison with another {_difference(name, earlier.get(name), value)}. Its runs and new ones cannot be "
                "compared: choose another folder with --out."
            )
    runs: dict[Key, Run] = {}
    for candidate in request.candidates:
        for rate in request.rates:
            for seed in request.seeds:
                file = out / RUNS / f"{slug((candidate.name, rate, seed))}.json"
                if not file.is_file():
                    continue
                data = read_json(file, "The run")
                if data["candidate"] != plain(candidate.to_dict()):
                    raise ConfigError(
                        f"{file} is of another {candidate.name!r}: {_difference('candidate', data['candidate'], plain(candidate.to_dict()))}."
                    )
                runs[candidate.name, rate, seed] = Run.from_dict(data["run"])
    return runs


def _told(stage: Stage, left: str, fraction: float, text: str) -> None:
    stage.progress(fraction, text + left)


def _named(key: Key, comparison: Comparison) -> str:
    name, rate, seed = key
    return f"{name}, seed {seed}" + (f", lr {rate:g}" if len(comparison.rates) > 1 else "")


def _came_to(run: Run) -> str:
    return f"FAILED: {run.failed}" if run.failed else f"loss {run.judge:.4f}, {run.speed:,.0f}/s"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _difference(name: str, old: Any, new: Any) -> str:
    """Where two values differ first, in words."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        key = next(key for key in [*new, *old] if old.get(key) != new.get(key))
        return _difference(f"{name}, {key}", old.get(key), new.get(key))
    return f"{name}: {str(old)[:60]}, not {str(new)[:60]}"


def _write(path: Path, data: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    aside = path.with_name(f"{path.name}.new")
    aside.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, path)
