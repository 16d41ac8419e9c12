"""Where candidates are made, tried and trained, each as the others: one model, one data set, one recipe, one folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from laurel_rewrite import __version__
from laurel_rewrite.errors import LaurelError
from laurel_rewrite.files.drafts import check_out
from laurel_rewrite.files.written import plain
from laurel_rewrite.graph.capture import quiet, without_caches
from laurel_rewrite.lab import folder
from laurel_rewrite.lab.candidates import UNCHANGED, Candidate, Source
from laurel_rewrite.lab.comparison import Size, slug
from laurel_rewrite.lab.corpora import data_of
from laurel_rewrite.lab.inspecting import looked
from laurel_rewrite.lab.runs import Point, Recipe, Run, Trainer, accelerator_of
from laurel_rewrite.lab.serving import Graphs, Served
from laurel_rewrite.lab.tasks import check, task_of
from laurel_rewrite.report import HTML, JSON
from laurel_rewrite.sources.built import Built
from laurel_rewrite.stages import Listener, Stage


class Bench(AbstractContextManager["Bench"]):
    """Everything that candidates have in common; at its end it removes the graphs that it made, and leaves Accelerate.

    Args:
        source, label: of the unchanged model.
        recipe, data, tokenizer: see `laurel_rewrite.lab.comparing.compare`.
        out: the folder.
        profile_seconds: of each graph in onnxruntime; with 0 none is measured.
        seconds: after them nothing is begun.
        force: see `laurel_rewrite.files.drafts.check_out`.
        listener: is told of the stages.

    Attributes:
        about: what all runs of the folder have in common.

    Raises:
        ConfigError: the model gives no loss, the data does not do, or the folder holds another comparison.
    """

    def __init__(
        self, source: Source, label: str, recipe: Recipe, data: str, tokenizer: str | Path | None, out: Path, *,
        profile_seconds: float, seconds: float | None, force: bool, listener: Listener,
    ) -> None:  # fmt: skip
        self.source, self.out, self.force, self.listener = source, out, force, listener
        self.tokenizer = None if tokenizer is None else Path(tokenizer)
        self.profile_seconds, self.seconds, self.begun = profile_seconds, seconds, time.perf_counter()
        built = source.base(0)
        self.task = task_of(built, recipe.length)
        with ExitStack() as stack:
            self.accelerator = stack.enter_context(accelerator_of(recipe))
            self.main = bool(self.accelerator.is_main_process)
            if self.main:  # alone: to find out whether a folder can be written it is made, and removed
                check_out(out, "compare", (JSON, HTML, folder.PLAN), force=force)
            with self.accelerator.main_process_first():  # the others then find its files
                self.corpus = data_of(self.task, built, data, out, self.tokenizer)
            self.trainer = Trainer(recipe, self.task, self.corpus, out / folder.STATE, self.accelerator)
            self.about = self._about(label, built, recipe)
            folder.check(out, self.about)
            self._stack = stack.pop_all()

    def _about(self, label: str, built: Built, recipe: Recipe) -> dict[str, Any]:
        task = {"objective": self.task.objective, "unit": self.task.unit, "shape": list(self.task.shape)}
        found = {
            "model": label, "settings": built.settings, "start": self.source.digest(), "task": task, "recipe": asdict(recipe),
            "data": {"name": self.corpus.name, "digest": self.corpus.digest},
            "versions": {"laurel_rewrite": __version__, "torch": torch.__version__.partition("+")[0]},
        }  # fmt: skip
        return plain(found)  # type: ignore[no-any-return]

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def begin(self) -> None:
        """Say in the folder what its runs have in common: nothing was wrong with the request."""
        if self.main:
            folder.begin(self.out, self.about, self.tokenizer)
        self.accelerator.wait_for_everyone()

    def late(self) -> bool:
        """Whether the time is over, by the main process's clock."""
        return bool(self._by_main(lambda: self.seconds is not None and time.perf_counter() - self.begun >= self.seconds))

    def _by_main(self, computed: Callable[[], Any]) -> Any:
        """What the main process computes, in all processes."""
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([computed() if self.main else None])[0]

    # One candidate

    def tried(self, candidate: Candidate, seed: int) -> Size:
        """A candidate, made and tried with a batch, and what it is.

        Raises:
            LaurelError: it cannot be made, its operator's start is another model, or it gives no loss or no gradient.
        """
        batch = next(iter(self.trainer.loader("train", 0, 0, 1)))
        try:
            model = self.source.model(candidate, seed, verify=True).to(self.accelerator.device)
        except LaurelError as error:
            raise type(error)(f"{candidate.name}: {error.args[0]}") from error
        with quiet(), without_caches(model):
            check(self.task, model, batch, candidate.name)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                self.task.loss(model, batch)
        units = len(next(iter(batch.values()))) * self.task.size
        return Size(sum(p.numel() for p in model.parameters()), counter.get_total_flops() / units)

    @cached_property
    def _graphs(self) -> Graphs:
        where = self._stack.enter_context(TemporaryDirectory(prefix="laurel_graphs_"))
        return Graphs(self.source, 0, self.profile_seconds, self.task.shape, Path(where))

    def served(self, candidate: Candidate, settle: Callable[[Served], float | None] = lambda found: None) -> Served:
        """What a candidate costs in onnxruntime: of an earlier call with the folder, or measured; see `Graphs.served`.

        Without seconds to measure for, nothing is."""
        if self.profile_seconds == 0 or candidate.name == UNCHANGED:
            return Served()
        return Served(**self._by_main(lambda: self._served(candidate, settle)))

    def _served(self, candidate: Candidate, settle: Callable[[Served], float | None]) -> dict[str, Any]:
        def measured() -> dict[str, Any]:
            with self.listener(f"graph of {candidate.name}") as stage:
                found = self._graphs.served(candidate, settle)
                stage.done(f"{found.figures['latency_ratio']:.3f}x the latency" if found.figures else f"not measured: {found.problem}")
            return found.to_dict()

        asked = {"candidate": candidate.to_dict(), "seconds": self.profile_seconds}
        fits = lambda found: found["precise"] or settle(Served(**found)) is None  # noqa: E731  # beside what it is for
        return folder.remembered(self.out / folder.GRAPHS, candidate.name, asked, measured, fits)

    def trained(
        self, candidate: Candidate, rate: float, seed: int, *,
        where: Path, title: str, left: str = "", keep: bool = False, watch: Callable[[Point], bool] | None = None,
    ) -> Run:  # fmt: skip
        """A candidate's run from a seed, which is kept.

        Args:
            candidate: what to train.
            rate: before the candidate's own factor.
            seed: of weights and batches.
            where: folder of the run.
            title: of the stage.
            left: how long it will still take, in words.
            keep: its weights, too.
            watch: see `Trainer.run`.
        """
        device = f"{self.accelerator.device.type}, {self.accelerator.num_processes} processes, torch {torch.__version__}"
        run = Run(candidate.name, rate * candidate.rate, seed, where=device)
        with self.listener(title) as stage:
            model = self.source.model(candidate, seed)
            run, weights = self.trainer.run(model, run, keep=keep, progress=partial(_told, stage, left), watch=watch)
            if self.main:
                folder.keep(where, candidate, rate, run, weights)
            self.trainer.forget()
            self.accelerator.wait_for_everyone()
            stage.done(_came_to(run))
        return run

    def seen(self, candidate: Candidate, rate: float, seed: int, batches: int) -> dict[str, Any] | None:
        """What is inside a trained candidate, as the report holds it; of an earlier call with the folder, or looked at now.

        None where there is nothing: no operator, a training that failed, or weights that are not there."""
        run = folder.known_run(self.out, candidate, rate, seed)
        if not candidate.rewritten or run is None or run.failed:
            return None
        found: dict[str, Any] | None = self._by_main(lambda: self._seen(candidate, rate, run, batches))
        return found

    def _seen(self, candidate: Candidate, rate: float, run: Run, batches: int) -> dict[str, Any] | None:
        name = slug((candidate.name, rate, run.seed))
        weights = self.out / folder.WEIGHTS / f"{name}.safetensors"

        def looked_at() -> dict[str, Any]:
            found: dict[str, Any] = {
                "name": candidate.name,
                "rate": run.rate,
                "seed": run.seed,
                "inside": None,
                "gaining": [],
                "problem": "",
            }
            with self.listener(f"inside {candidate.name}") as stage:
                try:
                    found |= looked(self.source, self.trainer, candidate, run, weights, batches).to_dict()
                    stage.done(f"{len(found['gaining'])} sites gain")
                except LaurelError as error:  # what is left of a report is worth having
                    found["problem"] = f"{type(error).__name__}: {str(error.args[0])[:300]}"
                    stage.done(f"not looked at: {found['problem']}")
            return found

        file, asked = self.out / folder.INSIDE, {"candidate": candidate.to_dict(), "batches": batches}
        return folder.remembered(file, name, asked, looked_at) if weights.is_file() else folder.recalled(file, name, asked)


def _told(stage: Stage, left: str, fraction: float, text: str) -> None:
    stage.progress(fraction, text + left)


def _came_to(run: Run) -> str:
    if run.failed:
        return f"FAILED: {run.failed}"
    loss = run.curve[-1].choose if run.judge is None else run.judge
    return f"loss {loss:.4f}, {run.speed:,.0f}/s" + (", stopped" if run.stopped else "")
