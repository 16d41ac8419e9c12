"""Activation checkpointing in all its forms."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, apply_activation_checkpointing, checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tools.engines.case import Case, Result, gradients, loss_of, trained
from tools.engines.table import engine

HISTORY = dict.fromkeys(("window", "whole history", "wide stream"), "use_reentrant=False")


def checkpointed(case: Case, **options: object) -> Result:
    """Each block inside `torch.utils.checkpoint.checkpoint`."""
    model = case.model
    for block in model.model.layers:
        block.forward = functools.partial(_again, block.forward, options)
    return trained(model, case.ids)


def _again(forward: Callable[..., object], options: dict[str, object], hidden: object, **kwargs: object) -> object:
    """The older form takes no keywords."""
    return checkpoint(functools.partial(forward, **kwargs), hidden, **options)


@engine("checkpoint, use_reentrant=False", "`torch.utils.checkpoint.checkpoint` of each block")
def non_reentrant(case: Case) -> Result:
    return checkpointed(case, use_reentrant=False)


@engine("checkpoint, use_reentrant=True", "the same in its older form", refuses=HISTORY)
def reentrant(case: Case) -> Result:
    return checkpointed(case, use_reentrant=True)


def _policy(context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    kept = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@engine("selective checkpointing", "`create_selective_checkpoint_contexts` that keeps products")
def selective(case: Case) -> Result:
    contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
    return checkpointed(case, use_reentrant=False, context_fn=contexts)


@engine("transformers' checkpointing", "`activation_checkpointing_enable`")
def of_transformers(case: Case) -> Result:
    model = case.model
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return trained(model, case.ids)


@engine("torch's checkpoint_wrapper", "`apply_activation_checkpointing`, two forward passes before one backward")
def wrapped(case: Case) -> Result:
    model = case.model
    block = type(model.model.layers[0])
    wrapper = functools.partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
    apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrapper, check_fn=lambda module: isinstance(module, block))
    loss = sum(loss_of(model, part) / 2 for part in case.ids.chunk(2))
    loss.backward()
    return Result(loss.item(), gradients(model))


@engine("compiled blocks inside checkpoints", "`checkpoint_wrapper(torch.compile(block))`, aot_eager")
def compiled_inside(case: Case) -> Result:
    torch._dynamo.reset()
    model = case.model
    for place, block in enumerate(model.model.layers):
        model.model.layers[place] = checkpoint_wrapper(torch.compile(block, backend="aot_eager"))
    return trained(model, case.ids)
