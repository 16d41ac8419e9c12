"""One model trained from one seed: a plain loop on Accelerate, which brings processes, FSDP, mixed precision, compilation and accumulation.

What is trained on depends on the seed alone: neither on the candidate nor on the number of processes. A run that was stopped goes on from its
last evaluation and comes to the same numbers.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, Sampler

from laurel_rewrite.errors import ConfigError, missing
from laurel_rewrite.files.checked import read_json
from laurel_rewrite.graph.capture import without_caches
from laurel_rewrite.lab.splits import Corpus
from laurel_rewrite.lab.tasks import MASKED, TOKENS, Task
from laurel_rewrite.operators.annealing import advance_annealing
from laurel_rewrite.operators.connections import learned, param_groups, unwrapped
from laurel_rewrite.private import own_accelerator_state

PRECISIONS = ("no", "bf16", "fp16")
_RUN = "run.json"
_BETAS = (0.9, 0.95)
_SHARE = 0.2
"""Of the time of training, what all evaluations together may take."""


@dataclass(frozen=True)
class Recipe:
    """How every candidate is trained: AdamW with `param_groups`, a linear warm-up and a cosine.

    Attributes:
        tokens: to train on; of images, how many of them.
        batch: examples of a step, over all processes.
        length: tokens of an example; None for the model's own.
        warmup: share of the steps in which the learning rate rises.
        final: share of the learning rate at the end.
        weight_decay: of matrices.
        clip: largest norm of the gradient.
        accumulate: parts that a batch is computed in.
        precision: "no" (float32), "bf16" or "fp16": mixed precision.
        compile: whether the model is compiled.
        evaluations: how often the loss on the second split is measured, the last time at the end.
    """

    tokens: int
    batch: int = 16
    length: int | None = None
    warmup: float = 0.05
    final: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0
    accumulate: int = 1
    precision: str = "no"
    compile: bool = False
    evaluations: int = 16

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "accumulate", "evaluations"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.batch % self.accumulate:
            raise ConfigError(f"A batch of {self.batch} examples cannot be computed in {self.accumulate} equal parts.")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, not {self.precision!r}.")

    def steps(self, task: Task) -> int:
        """Whole batches that come nearest to the tokens."""
        return max(1, round(self.tokens / (self.batch * task.size)))

    def rate(self, step: int, steps: int) -> float:
        """The factor on the learning rate at a step."""
        warm = max(1, round(self.warmup * steps))
        if step < warm:
            return (step + 1) / warm
        done = (step - warm) / max(1, steps - warm)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2

    def stops(self, steps: int) -> list[int]:
        """The steps behind which it is evaluated."""
        count = min(self.evaluations, steps)
        return [round(steps * (n + 1) / count) for n in range(count)]

    def looked_at(self, steps: int) -> int:
        """Batches of an evaluation; a forward pass is a third of a step."""
        return max(1, round(steps * _SHARE * 3 / (2 * len(self.stops(steps)))))


@dataclass(frozen=True)
class Point:
    """Of a curve: mean training loss since the last point, and the loss on the second split."""

    step: int
    tokens: int
    train: float
    choose: float


@dataclass
class Run:
    """What came of training.

    Attributes:
        candidate, rate, seed: what was trained; the learning rate is the candidate's own.
        curve: to its last point.
        judge: loss on the third split at the end; None where it did not come there.
        failed: why not, in words.
        stopped: a search stopped it before its end.
        seconds: of training, evaluations and first steps aside.
        timed: tokens (or examples) that were trained on in them.
        learned: what the connections learned, by site.
        where: device and number of processes.
    """

    candidate: str
    rate: float
    seed: int
    curve: list[Point] = field(default_factory=list)
    judge: float | None = None
    failed: str = ""
    stopped: bool = False
    seconds: float = 0.0
    timed: int = 0
    learned: dict[str, dict[str, float]] = field(default_factory=dict)
    where: str = ""

    @property
    def speed(self) -> float:
        """Tokens (or examples) a second."""
        return self.timed / self.seconds if self.seconds else math.nan

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Run:
        """As a file holds it, where a loss that is no number is null."""
        points = ({**point, **{name: math.nan for name in ("train", "choose") if point[name] is None}} for point in data["curve"])
        return Run(**{**data, "curve": [Point(**point) for point in points]})


class _Order(Sampler[list[int]]):
    """Numbers of examples, batch by batch: each pass over the data in an order that the seed gives. Batches before the first are left out."""

    def __init__(self, size: int, batch: int, seed: int, first: int, last: int) -> None:
        self.size, self.batch_size, self.seed, self.first, self.last = size, batch, seed, first, last
        self.drop_last = True  # Accelerate asks

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[int]]:
        orders: dict[int, list[int]] = {}
        for number in range(self.first, self.last):
            batch = []
            for place in range(number * self.batch_size, (number + 1) * self.batch_size):
                epoch, at = divmod(place, self.size)
                if epoch not in orders:
                    generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                    orders = {epoch: torch.randperm(self.size, generator=generator).tolist()}
                batch.append(epoch * self.size + orders[epoch][at])
            yield batch


class Trainer:
    """Trains candidates' models, each as the others.

    Args:
        recipe: how.
        task: for what.
        corpus: on what.
        folder: where a run that is not at its end keeps its state.
        accelerator: of `accelerator_of`, for the same recipe.

    Raises:
        ConfigError: a split holds less than a batch, or the model knows fewer words than the data.
    """

    def __init__(self, recipe: Recipe, task: Task, corpus: Corpus, folder: Path, accelerator: Any) -> None:
        self.recipe, self.task, self.corpus, self.folder = recipe, task, corpus, folder
        self.accelerator = accelerator
        self.steps = recipe.steps(task)
        self.mask = corpus.classes
        check_words(task, corpus)
        self.splits = {name: task.examples(dataset := corpus.split(name, task.shape), self.mask) for name in ("train", "choose", "judge")}
        for name, dataset in self.splits.items():
            if dataset.size < recipe.batch:
                raise ConfigError(
                    f"{corpus.name}: the split {name!r} has {dataset.size} examples of {'x'.join(map(str, task.shape))}, and a batch "
                    f"{recipe.batch}. Give more data, a smaller --batch or a shorter --length."
                )

    def loader(self, split: str, seed: int, first: int, last: int) -> Any:
        """Batches of a split, in parts, as this process gets them."""
        dataset = self.splits[split]
        order = _Order(dataset.size, self.recipe.batch // self.recipe.accumulate, seed, first, last)
        from accelerate.data_loader import prepare_data_loader

        return prepare_data_loader(  # not the accelerator's method, which would keep, and save, every loader that there was
            DataLoader(dataset, batch_sampler=order, generator=torch.Generator()),  # else each iterator draws from the one of dropout
            self.accelerator.device,
            self.accelerator.num_processes,
            self.accelerator.process_index,
            split_batches=True,
            put_on_device=True,
        )

    def run(
        self,
        model: nn.Module,
        asked: Run,
        *,
        keep: bool = False,
        progress: Callable[[float, str], None] = lambda fraction, text: None,
        watch: Callable[[Point], bool] | None = None,
    ) -> tuple[Run, dict[str, Tensor] | None]:
        """Train a model to the end, from where an earlier run of the same stopped.

        Args:
            model: a candidate's, from the run's seed.
            asked: says what is trained; nothing of it is done yet.
            keep: give back the weights.
            progress: is told the fraction done, and loss and speed in words.
            watch: of a search: it is told each point, those of before a stop too, and says whether that is the end. Such a run never sees the
                third split.

        Returns:
            The run, and its weights on the main process, where they are asked for and it did not fail.
        """
        torch.manual_seed(asked.seed)
        optimizer = torch.optim.AdamW(param_groups(model, lr=asked.rate, weight_decay=self.recipe.weight_decay), betas=_BETAS)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.recipe.rate(step, self.steps))
        engine, optimizer, schedule = self.accelerator.prepare(model.train(), optimizer, schedule)
        try:
            with without_caches(model):
                run = self._resumed(asked)
                self._train(engine, optimizer, schedule, run, progress, watch)
            if run.failed:
                return run, None
            run.learned = learned(engine)
            if not keep:
                return run, None
            return run, {unwrapped(name): value for name, value in self.accelerator.get_state_dict(engine).items()}
        finally:
            self.accelerator.free_memory()

    def _train(
        self, engine: nn.Module, optimizer: Any, schedule: Any, run: Run, progress: Callable[[float, str], None],
        watch: Callable[[Point], bool] | None,
    ) -> None:  # fmt: skip
        parts, stops, size = self.recipe.accumulate, self.recipe.stops(self.steps), self.recipe.batch * self.task.size
        begun = run.curve[-1].step if run.curve else 0
        if watch is not None:
            for point in run.curve:
                watch(point)
        batches = iter(self.loader("train", run.seed, begun * parts, self.steps * parts))
        for first, stop in pairwise([begun, *(stop for stop in stops if stop > begun)]):
            losses: list[Tensor] = []
            timed = first
            start = time.perf_counter()
            for step in range(first, stop):
                losses += [self._part(engine, optimizer, schedule, next(batches)) for _ in range(parts)]
                if step == begun:  # in which things are compiled and allocated
                    self._finished()
                    start, timed = time.perf_counter(), step + 1
                progress((step + 1) / self.steps, _words(run, self.task))
            self._finished()
            run.seconds, run.timed = run.seconds + time.perf_counter() - start, run.timed + (stop - timed) * size
            train = self._mean(torch.stack(losses).mean())
            choose = self._evaluate(engine, "choose", self.recipe.looked_at(self.steps))
            run.curve.append(Point(stop, stop * size, train, choose))
            if not (math.isfinite(train) and math.isfinite(choose)):
                run.failed = f"the loss was {choose if math.isfinite(train) else train} by step {stop} of {self.steps}"
                return
            if watch is not None and watch(run.curve[-1]):
                run.stopped = stop < self.steps
                return
            if stop < self.steps:
                self._save(run)
        if watch is not None:
            return
        run.judge = self._evaluate(engine, "judge", self.recipe.looked_at(self.steps) * len(stops))
        if not math.isfinite(run.judge):
            run.judge, run.failed = None, f"the loss on the third split was {run.judge}"

    def _part(self, engine: nn.Module, optimizer: Any, schedule: Any, batch: Any) -> Tensor:
        with self.accelerator.accumulate(engine):
            loss = self.task.loss(engine, batch)
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(engine.parameters(), self.recipe.clip)
            optimizer.step()
            schedule.step()
            if self.accelerator.sync_gradients:
                advance_annealing(engine)
            optimizer.zero_grad()
        return loss.detach().float()

    def _evaluate(self, engine: nn.Module, split: str, batches: int) -> float:
        """The mean loss over the first batches of a split, as many as it has."""
        parts = self.recipe.accumulate
        most = self.splits[split].size // self.recipe.batch
        engine.eval()
        try:
            with torch.no_grad():
                losses = [self.task.loss(engine, batch).float() for batch in self.loader(split, 0, 0, min(batches, most) * parts)]
        finally:
            engine.train()
        return self._mean(torch.stack(losses).mean())

    def _mean(self, value: Tensor) -> float:
        return float(self.accelerator.reduce(value, "mean"))

    def _finished(self) -> None:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()

    # A run that is stopped

    def _resumed(self, run: Run) -> Run:
        """The run as it was saved last, with the state of the engine loaded; the given one where nothing of it was."""
        for folder in (self.folder, _aside(self.folder)):
            if (folder / _RUN).is_file():
                saved = Run.from_dict(read_json(folder / _RUN, "The state of a run"))
                if (saved.candidate, saved.rate, saved.seed) == (run.candidate, run.rate, run.seed):
                    self.accelerator.load_state(str(folder))
                    return saved
        return run

    def _save(self, run: Run) -> None:
        """Whole or not at all: what stands aside takes the place of the last state when its last file is written."""
        aside = _aside(self.folder)
        if self.accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(aside))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            (aside / _RUN).write_text(json.dumps(run.to_dict()), encoding="utf-8")
            shutil.rmtree(self.folder, ignore_errors=True)
            os.replace(aside, self.folder)
        self.accelerator.wait_for_everyone()

    def forget(self) -> None:
        """Remove the state of the run, which has ended."""
        if self.accelerator.is_main_process:
            for folder in (self.folder, _aside(self.folder)):
                shutil.rmtree(folder, ignore_errors=True)


def _aside(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.new")


def _words(run: Run, task: Task) -> str:
    if not run.curve:
        return ""
    return f"loss {run.curve[-1].choose:.4f}, {run.speed:,.0f} {task.unit}/s"


@contextlib.contextmanager
def accelerator_of(recipe: Recipe) -> Iterator[Any]:
    """The engine, as the recipe and `accelerate launch` say, for a while: Accelerate keeps one state a process, that of the first precision and
    compilation, and it would be the next comparison's, too. A state that was there before is put aside, and comes back.

    Raises:
        ConfigError: Accelerate cannot train so, or not in the processes that were started; or these cannot share the batch.
        MissingPackageError: it is not installed.
    """
    try:
        import accelerate
        from accelerate.utils import DataLoaderConfiguration, TorchDynamoPlugin
    except ModuleNotFoundError as error:
        raise missing("accelerate", "train") from error
    options: dict[str, Any] = {"dynamo_plugin": TorchDynamoPlugin(backend="inductor")} if recipe.compile else {}
    if distributed.is_available():
        import torch.distributed.nn.functional  # before there is a group: its defaults are that of its import, which then never ends
    had_group = _has_group()
    with own_accelerator_state():  # a trainer in this process may have one
        try:
            accelerator = accelerate.Accelerator(
                cpu=not torch.accelerator.is_available(),  # else it would not see the processes of a machine without one
                gradient_accumulation_steps=recipe.accumulate,
                mixed_precision=recipe.precision,
                dataloader_config=DataLoaderConfiguration(split_batches=True),
                **options,
            )
        except (ValueError, ImportError) as error:
            raise ConfigError(f"Accelerate cannot train so: {' '.join(str(error).split())[:300]}") from error
        if _has_group() and not had_group:
            atexit.register(_end_group)
        check_processes(recipe, accelerator)
        yield accelerator


def _has_group() -> bool:
    """Whether this process and others have begun a group."""
    return distributed.is_available() and distributed.is_initialized()


def _end_group() -> None:
    """End the group of the processes that a comparison began, and its threads. Where one still lets go of a tensor while Python ends, it takes the
    process down with it (SIGABRT). Not before: processes that have parted can't meet again under the same launcher."""
    gc.collect()  # what was trained holds the group
    if _has_group():
        distributed.destroy_process_group()


def check_processes(recipe: Recipe, accelerator: Any) -> None:
    """ConfigError where processes would train by themselves, hold all of a model that is to be sharded, or cannot share a batch."""
    from accelerate import DistributedType

    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes < started:
        raise ConfigError(f"{started} processes were started, and Accelerate sees {accelerator.num_processes}: each would train by itself.")
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and accelerator.distributed_type != DistributedType.FSDP:
        raise ConfigError(
            "Accelerate shards models (FSDP) on accelerators alone, and this machine has none: every process would hold all of it."
        )
    part = recipe.batch // recipe.accumulate
    if part % accelerator.num_processes:
        raise ConfigError(f"{accelerator.num_processes} processes cannot share {part} examples equally. Give another --batch.")


def check_words(task: Task, corpus: Corpus) -> None:
    """ConfigError where the data has classes, or words, that the model has no output for."""
    needed = corpus.classes + (task.objective == MASKED)
    if task.logits and needed > task.logits:
        what = f"{corpus.classes} {'words and a mask' if task.objective == MASKED else 'words' if task.kind == TOKENS else 'classes'}"
        raise ConfigError(
            f"{corpus.name} has {what}, and the model knows {task.logits}. Build it for {needed} (--set), or give other --data"
            + (" or a --tokenizer of fewer words." if task.kind == TOKENS else ".")
        )
