"""What an engine is tried on: a small Llama with one operator class, the same batch for all, and what one plain process makes of it."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from laurel_rewrite import load_operators, rewrite
from laurel_rewrite.sources.built import declare_torchvision_ops
from laurel_rewrite.sources.models import build
from laurel_rewrite.testing import moved

TOYS = Path(__file__).parents[2] / "tests" / "operators.py"
CLASSES = {"local": "rw+lr", "window": "rw+lr+pa", "whole history": "toy-dense", "wide stream": "toy-lanes"}
"""Operator class -> the operator that stands for it."""
SETTINGS = {
    "num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
    "use_cache": False,
}  # fmt: skip
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
SMALL = 0.01
"""A gradient below this share of the model's largest one is measured against that share: what is next to nothing has no digits."""

declare_torchvision_ops()  # PEFT and the Trainer import it


@dataclass
class Result:
    """What an engine made of the batch.

    Attributes:
        loss: of the whole batch; None on a process that does not have it.
        gradients: of it, by the plain model's names of parameters; of a process that has some parameters alone, of these.
    """

    loss: float | None
    gradients: dict[str, Tensor]


@dataclass
class Found:
    """What one process found: the largest relative error, and which parameters it had."""

    error: float
    worst: str
    names: list[str] = field(default_factory=list)


class Case:
    """One operator class.

    Args:
        operator: a key of `CLASSES`.
    """

    def __init__(self, operator: str) -> None:
        self.operator = operator
        self.variant = CLASSES[operator]
        self.options: dict[str, Any] = {"rank": 4} if "lr" in self.variant else {}
        self.ids = torch.randint(0, 90, (4, 8), generator=torch.Generator().manual_seed(3))

    @property
    def base(self) -> nn.Module:
        """The model before the rewrite."""
        return copy.deepcopy(_base())

    @property
    def model(self) -> Any:
        """The rewritten model in train mode, its connections' parameters moved off their start."""
        if self.operator not in _made:
            _made[self.operator] = self.rewrite(_base()).train()
        return copy.deepcopy(_made[self.operator])

    def packed(self) -> bytes:
        """The model for other processes, which then need not trace."""
        return pickle.dumps(self.model)

    def unpack(self, packed: bytes) -> None:
        """Take the model from another process."""
        load_operators(TOYS)
        _made[self.operator] = pickle.loads(packed)

    def rewrite(self, model: nn.Module) -> Any:
        """Any model with the case's operator; traced with another input than it is trained with."""
        if self.variant.startswith("toy-"):
            load_operators(TOYS)
        better = rewrite(model, (), {"input_ids": self.ids[:2, :5]}, variant=self.variant, verify=False, **self.options)
        torch.manual_seed(11)
        with torch.no_grad():
            return moved(better, 0.2)

    @functools.cached_property
    def reference(self) -> Result:
        """One plain process."""
        return trained(self.model, self.ids)

    def found(self, result: Result) -> Found:
        """A result against the plain process's."""
        right = self.reference
        largest = max(float(gradient.norm()) for gradient in right.gradients.values())
        errors = {} if result.loss is None else {"the loss": abs(result.loss - right.loss) / abs(right.loss)}
        for name, gradient in result.gradients.items():
            expected = right.gradients[name]
            scale = max(float(expected.norm()), SMALL * largest)
            errors[name] = float((gradient.double() - expected.double()).norm()) / scale
        worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
        return Found(errors[worst], worst, sorted(result.gradients))


@functools.cache
def _base() -> nn.Module:
    torch.manual_seed(0)
    return build("hf:llama", SETTINGS).model


_made: dict[str, nn.Module] = {}


def loss_of(model: Any, ids: Tensor) -> Tensor:
    """The language model's loss."""
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def trained(model: Any, ids: Tensor, passes: Iterable[Tensor] | None = None) -> Result:
    """Loss and gradients of a batch, forward and backward in one; of several passes, the mean of each part's."""
    parts = [ids] if passes is None else list(passes)
    total = 0.0
    for part in parts:
        loss = loss_of(model, part) / len(parts)
        loss.backward()
        total += loss.item()
    return Result(total, gradients(model))


def gradients(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The gradients by the plain model's names, whole where they are distributed."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        grad = parameter.grad
        found[name.removeprefix(prefix)] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).detach().clone()
    return found
