"""What a model is trained for: the loss of a batch, found out from the model and its example inputs.

A model that takes token ids is trained for the next token if no output depends on a later one, else for tokens that are masked; one that takes
images, for their classes. Its own loss is taken where its forward has `labels` and gives one, else the cross-entropy of its logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from laurel_rewrite.errors import FOREIGN, CaptureError, ConfigError
from laurel_rewrite.graph.capture import quiet, without_caches
from laurel_rewrite.private import pytree
from laurel_rewrite.sources.built import Built

TOKENS, IMAGES = "tokens", "images"
NEXT, MASKED, CLASSES, OWN = "next token", "masked tokens", "classes", "own loss"
LENGTH = 128
"""Tokens of a sequence, for architectures whose example is short."""
MASKED_SHARE = 0.15
"""Of the tokens of a sequence, as for BERT (Devlin et al., 2019); each is replaced by the mask."""
_IGNORED = -100
Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Task:
    """What a model is trained for.

    Attributes:
        objective: one of the words above.
        kind: of the data: "tokens" or "images"; "own" where the model's file has a dataset.
        shape: of an example: (T,), or (C, H, W).
        place: the argument of forward that takes the examples, by name or number.
        logits: the last dimension of its logits: the largest number of classes; 0 with a loss of its own file.
        labels: whether forward takes `labels`, and gives the loss.
        own: `loss` of the model's file.
    """

    objective: str
    kind: str
    shape: tuple[int, ...]
    place: str | int = 0
    logits: int = 0
    labels: bool = False
    own: Callable[..., Any] | None = None

    @property
    def unit(self) -> str:
        """What is counted as trained on."""
        return TOKENS if self.kind == TOKENS else "examples"

    @property
    def size(self) -> int:
        """Units of an example."""
        return self.shape[0] if self.kind == TOKENS else 1

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """A scalar, the mean over the batch; examples count alike, so that the mean over parts of equal size is that of the whole."""
        if self.own is not None:
            return self.own(model, batch)  # type: ignore[no-any-return]  # checked once by `check`
        given = batch["input_ids" if self.kind == TOKENS else "pixel_values"]
        targets = batch.get("labels", given)
        if self.labels:
            return _called(model, self.place, given, labels=targets).loss  # type: ignore[no-any-return]
        logits = logits_of(_called(model, self.place, given), given)
        if self.objective == NEXT:
            logits, targets = logits[:, :-1], targets[:, 1:]
        return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=_IGNORED)

    def examples(self, dataset: Dataset[dict[str, Tensor]], mask: int) -> Endless:
        """A dataset without an end, which begins again where the given one ends; with masks where they are what is trained on.

        Args:
            dataset: of a split.
            mask: the id that stands for a masked token.
        """
        return Endless(dataset, mask if self.objective == MASKED else None)


class Endless(Dataset[dict[str, Tensor]]):
    """Examples by any number, those of the given dataset over and over.

    Masks are drawn from the number of the example, so that every candidate and every number of processes has the same.

    Attributes:
        size: how many there are.
    """

    def __init__(self, dataset: Dataset[dict[str, Tensor]], mask: int | None) -> None:
        self.dataset, self.mask = dataset, mask
        self.size = len(dataset)  # type: ignore[arg-type]  # it is map-style

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        item = self.dataset[number % self.size]
        if self.mask is None:
            return item
        ids = item["input_ids"]
        chosen = torch.randperm(len(ids), generator=torch.Generator().manual_seed(number))[: max(1, round(MASKED_SHARE * len(ids)))]
        masked, labels = ids.clone(), torch.full_like(ids, _IGNORED)
        masked[chosen], labels[chosen] = self.mask, ids[chosen]
        return {**item, "input_ids": masked, "labels": labels}


def task_of(built: Built, length: int | None = None) -> Task:
    """What a model is trained for.

    Args:
        built: the model with example inputs, on any device but meta.
        length: tokens of a sequence; by default that of the example, and at least `LENGTH` where that is a library's.

    Raises:
        ConfigError: it takes neither tokens nor images alone, or gives no logits for them.
    """
    if "loss" in built.offers:
        kind, shape, place = _inputs(built) if "dataset" not in built.offers else ("own", (), 0)
        return Task(OWN, kind, _length(kind, shape, built, length), place, own=built.offers["loss"])
    kind, shape, place = _inputs(built)
    shape = _length(kind, shape, built, length)
    trial = torch.zeros(2, *shape, dtype=torch.int64 if kind == TOKENS else torch.float32)
    result = _tried(built, place, trial)
    logits = logits_of(result, trial)
    objective = CLASSES if kind == IMAGES else NEXT if _is_causal(built, place, trial, logits) else MASKED
    task = Task(objective, kind, shape, place, logits.shape[-1])
    return replace(task, labels=_gives_loss(built, task, trial))


def _inputs(built: Built) -> tuple[str, tuple[int, ...], str | int]:
    """Kind and shape of the one input that the model needs, and its place."""
    given: list[tuple[str | int, Any]] = [*enumerate(built.args), *built.kwargs.items()]
    for place, value in given:
        if isinstance(value, Tensor) and value.ndim == 2 and not value.is_floating_point() and value.dtype != torch.bool:
            return TOKENS, tuple(value.shape[1:]), place
        if isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point():
            return IMAGES, tuple(value.shape[1:]), place
    shown = ", ".join(
        f"{place}: {tuple(v.shape)} {v.dtype}" if isinstance(v, Tensor) else f"{place}: {type(v).__name__}" for place, v in given
    )
    raise ConfigError(
        f"{built.spec}: neither token ids [B, T] nor images [B, C, H, W] are among its inputs ({shown}). Give its file a function "
        "loss(model, batch) that returns a scalar, and dataset(split) that returns a map-style dataset."
    )


def _length(kind: str, shape: tuple[int, ...], built: Built, length: int | None) -> tuple[int, ...]:
    if kind != TOKENS:
        if length is not None:
            raise ConfigError(f"--length is for models that take tokens, and {built.spec} does not.")
        return shape
    example = shape[0] if built.files else max(shape[0], LENGTH)
    return (example if length is None else length,)


def _called(model: nn.Module, place: str | int, given: Tensor, **more: Any) -> Any:
    return model(given, **more) if isinstance(place, int) else model(**{place: given}, **more)


def _tried(built: Built, place: str | int, given: Tensor, **more: Any) -> Any:
    model = built.model
    modes = [(module, module.training) for module in model.modules()]
    if isinstance(place, int) and place > 0:
        raise ConfigError(f"{built.spec}: its examples are argument {place} of forward, behind others. Give its file loss(model, batch).")
    try:
        with torch.no_grad(), quiet(), without_caches(model):
            return _called(model.eval(), place, given, **more)
    except FOREIGN as error:  # whatever the model says to inputs that do not fit
        raise ConfigError(
            f"{built.spec} does not run with {place if isinstance(place, str) else 'its first argument'} {tuple(given.shape)} alone: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}. Another --length may do, or a function loss(model, batch) in its file."
        ) from error
    finally:
        for module, mode in modes:
            module.training = mode


def logits_of(result: Any, given: Tensor) -> Tensor:
    """Of what a model gave for examples: [B, T, classes], or [B, classes] for images.

    Raises:
        ConfigError: there is no such output.
    """
    found = getattr(result, "logits", None)
    leaves = [found] if isinstance(found, Tensor) else pytree.tree_leaves(dict(result) if isinstance(result, Mapping) else result)
    leading = given.shape[:2] if given.ndim == 2 else given.shape[:1]
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim == len(leading) + 1 and leaf.shape[:-1] == leading:
            return leaf
    shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves if isinstance(leaf, Tensor))
    raise ConfigError(
        f"The model gives no logits for examples {tuple(given.shape)}: its outputs are {shapes or type(result).__name__}. Give its file a function "
        "loss(model, batch) that returns a scalar."
    )


def _is_causal(built: Built, place: str | int, trial: Tensor, logits: Tensor) -> bool:
    """Whether the last token changes nothing but its own output."""
    if trial.shape[1] < 2:
        raise ConfigError(f"{built.spec}: sequences of one token have no next one. Give --length.")
    other = trial.clone()
    other[:, -1] = 1
    return torch.equal(logits_of(_tried(built, place, other), other)[:, :-1], logits[:, :-1])


def _gives_loss(built: Built, task: Task, trial: Tensor) -> bool:
    if "labels" not in inspect.signature(built.model.forward).parameters:
        return False
    labels = trial if task.kind == TOKENS else torch.zeros(len(trial), dtype=torch.int64)
    try:
        loss = getattr(_tried(built, task.place, trial, labels=labels), "loss", None)
    except ConfigError:
        return False
    return isinstance(loss, Tensor) and loss.ndim == 0


def check(task: Task, model: nn.Module, batch: Batch, name: str) -> float:
    """Try a step before training begins: the loss of a batch.

    Args:
        name: of the model, for messages.

    Raises:
        CaptureError: the loss raises.
        ConfigError: it is no scalar, is not finite, or no parameter gets a gradient of it.
    """
    try:
        loss = task.loss(model, batch)
    except ConfigError:
        raise
    except FOREIGN as error:  # whatever the model's code raises
        raise CaptureError(f"{name}: its loss raised {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(loss, Tensor) or loss.ndim:
        kind = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ConfigError(f"{name}: its loss is {kind}, and must be a scalar tensor.")
    if not torch.isfinite(loss):
        raise ConfigError(f"{name}: its loss is {loss.item()} before the first step.")
    if not loss.requires_grad:
        raise ConfigError(f"{name}: no gradient flows from its loss (a detach, or no_grad in its forward, or no parameter requires one).")
    torch.autograd.backward(loss)
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad(set_to_none=True)
    if not trained:
        raise ConfigError(f"{name}: its loss depends on none of its parameters.")
    return float(loss.detach())
