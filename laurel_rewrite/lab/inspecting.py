"""Looking inside the models of a comparison: each is built again from the folder, and gets its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from laurel_rewrite.backends.module.surgery import rewriting_of
from laurel_rewrite.backends.module.weights import load_weights
from laurel_rewrite.errors import ConfigError, nearest
from laurel_rewrite.files.checked import read_json
from laurel_rewrite.graph.capture import without_caches
from laurel_rewrite.lab.candidates import Candidate, Source, source_of
from laurel_rewrite.lab.comparison import slug
from laurel_rewrite.lab.corpora import data_of
from laurel_rewrite.lab.folder import ABOUT, RUNS, STATE, WEIGHTS
from laurel_rewrite.lab.inside import Inside, gaining, inside
from laurel_rewrite.lab.runs import Recipe, Run, Trainer, accelerator_of
from laurel_rewrite.lab.tasks import task_of
from laurel_rewrite.plan import LaurelConfig, Plan


@dataclasses.dataclass(frozen=True)
class Looked:
    """A trained candidate.

    Attributes:
        name: of the candidate.
        rate, seed: that it was trained with.
        inside: what was seen.
        plan: of those sites alone whose operator helps; None where there is none, or all do.
        gaining: these sites.
    """

    name: str
    rate: float
    seed: int
    inside: Inside
    plan: Plan | None
    gaining: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "rate": self.rate, "seed": self.seed, "inside": self.inside.to_dict(), "gaining": list(self.gaining)}


def inspect(
    folder: str | Path,
    model: Any = None,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    candidate: str | None = None,
    batches: int = 8,
) -> list[Looked]:
    """Look inside what a comparison trained: see `laurel_rewrite.lab.inside.inside`. The batches are of the third split.

    Args:
        folder: of a comparison.
        model, args, kwargs: what was compared, where it was no named MODEL.
        candidate: one of them; by default all that have an operator.
        batches: how many to look with, at least 2.

    Raises:
        ConfigError: the folder holds no comparison, no weights of such a candidate, or the model is another one now.
    """
    folder = Path(folder)
    if batches < 2:
        raise ConfigError("Looking inside takes two batches or more: one has no standard error.")
    about = read_json(folder / ABOUT, "The comparison")
    source, _ = source_of(about["model"] if model is None else model, args, kwargs, about["settings"] if model is None else None)
    if source.digest() != about["start"]:
        raise ConfigError(f"{about['model']} is not the model that was compared in {folder}: its files or its start are others now.")
    recipe = Recipe(**about["recipe"])
    built = source.base(0)
    task = task_of(built, recipe.length)
    tokenizer = about["tokenizer"]
    corpus = data_of(task, built, about["data"]["name"], folder, None if tokenizer is None else Path(tokenizer))
    if corpus.digest != about["data"]["digest"]:
        raise ConfigError(f"{corpus.name} is not the data that was trained on in {folder}: its digest is another one now.")
    with accelerator_of(recipe) as accelerator:
        trainer = Trainer(recipe, task, corpus, folder / STATE, accelerator)
        return [looked(source, trainer, made, run, path, batches) for made, run, path in _trained(folder, candidate)]


def looked(source: Source, trainer: Trainer, made: Candidate, run: Run, weights: Path, batches: int) -> Looked:
    """Look inside one trained candidate.

    Args:
        source: of the unchanged model.
        trainer: whose third split is used.
        made, run: the candidate, and how it was trained.
        weights: their file.
        batches: how many to look with, at least 2; fewer where the split has no more.
    """
    trained: nn.Module = source.model(made, run.seed)
    load_weights(trained, weights)
    trained.to(trainer.accelerator.device)
    most = trainer.splits["judge"].size // trainer.recipe.batch * trainer.recipe.accumulate
    with without_caches(trained):
        seen = inside(trained, trainer.loader("judge", 0, 0, min(batches, most)), trainer.task.loss)
    sites = gaining(seen)
    plan = rewriting_of(trained).plan
    helps = plan.only(sites) if sites and len(sites) < len(plan.sites) else None
    return Looked(made.name, run.rate, run.seed, seen, helps, tuple(sites))


def _trained(folder: Path, asked: str | None) -> list[tuple[Candidate, Run, Path]]:
    """The candidates with an operator whose weights are there; of several learning rates the best on the second split."""
    best: dict[str, tuple[Candidate, Run, Path]] = {}
    for file in sorted((folder / RUNS).glob("*.json")):
        data = read_json(file, "The run")
        run, made = Run.from_dict(data["run"]), data["candidate"]
        path = folder / WEIGHTS / f"{slug((run.candidate, data['base_rate'], run.seed))}.safetensors"
        if run.failed or not path.is_file() or (made["config"] is None and made["plan"] is None):
            continue
        if run.candidate not in best or run.curve[-1].choose < best[run.candidate][1].curve[-1].choose:
            best[run.candidate] = _candidate(run.candidate, made, str(file)), run, path
    if asked is not None and asked not in best:
        raise ConfigError(f"{folder} has no weights of {asked!r} with an operator. {nearest(asked, best)}")
    if not best:
        raise ConfigError(f"{folder} has no weights of a candidate with an operator yet.")
    return list(best.values()) if asked is None else [best[asked]]


def _candidate(name: str, made: Mapping[str, Any], label: str) -> Candidate:
    import tomllib

    config = None
    if made["config"] is not None:
        given = dict(made["config"])
        options = given.pop("options")
        config = LaurelConfig(given.pop("variant"), **given, **options)
    plan = None if made["plan"] is None else Plan.from_data(tomllib.loads(made["plan"]), label)
    return Candidate(name, config, plan, start=made["start"], rate=made["rate"])
