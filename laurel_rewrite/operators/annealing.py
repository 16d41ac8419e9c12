"""Annealing: any operator takes over from the plain sum over training, x' = (1 - t) (x + f) + t operator(x, f), with t from 0 to 1.

So a trained model can be converted to an operator whose start is another function. It is what `anneal` and `anneal_steps`, options of every
operator, say; a connection that has them is of a class of its own, which this module makes of the operator's. How far it is, is a buffer of the
connection, so that a checkpoint brings it back: whatever trains the model says `advance_annealing(model)` behind each step of its optimiser.

Source: annealed residual synapses (Arenas) do it to the skip of ternary networks, Tencent's AngelSlim, 2025.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from laurel_rewrite.operators.affine import Affine
from laurel_rewrite.operators.config import BranchMap, Option, SiteConfig
from laurel_rewrite.operators.reads import parted

OPTIONS = {
    "anneal": Option("none", "How the operator takes over from x + f over training", choices=("none", "linear", "cosine")),
    "anneal_steps": Option(0, "Steps of training until it has, with anneal", minimum=0),
}


def is_annealed(options: Mapping[str, Any]) -> bool:
    """Whether these options ask for it."""
    return bool(options.get("anneal", "none") != "none")


def problem(options: Mapping[str, Any]) -> str:
    """Why these options give no schedule, in a sentence; "" where they do, or ask for none."""
    if is_annealed(options) and not options.get("anneal_steps"):
        return "anneal needs anneal_steps, the number of training steps until the operator has taken over."
    if options.get("anneal_steps") and not is_annealed(options):
        return "anneal_steps needs anneal, linear or cosine."
    return ""


def advance_annealing(model: nn.Module, steps: int = 1) -> int:
    """Say that so many steps of the optimiser were done.

    Args:
        model: with annealed connections, or none; also within an engine's wrapper.
        steps: so many.

    Returns:
        The number of connections that are on their way.
    """
    found = [module for module in model.modules() if isinstance(module, Annealing)]
    with torch.no_grad():
        for module in found:
            module.annealed += steps
    return len(found)


def unfinished(model: nn.Module) -> str:
    """How far annealed connections are that have not taken over yet, in a sentence; "" where there are none."""
    found = [module for module in model.modules() if isinstance(module, Annealing)]
    steps = {(int(module.annealed), module.config.anneal_steps) for module in found if not module.annealed.is_meta}
    least = min(((done, of) for done, of in steps if done < of), default=None)
    if least is None:
        return ""
    return (
        f"annealing is at step {least[0]} of {least[1]}: the model computes something between its plain sums and its operators. It goes on where "
        "advance_annealing(model) is called behind each step of the optimiser."
    )


class Annealing(nn.Module):
    """What annealed connections have beside their operator.

    Attributes:
        annealed: steps of training so far, whole numbers of shape (1,).
    """

    annealed: Tensor
    config: SiteConfig

    def share(self, dtype: torch.dtype) -> Tensor:
        """t, of shape (1,)."""
        done = (self.annealed.to(torch.float64) / self.config.anneal_steps).clamp(max=1.0)
        return ((1 - torch.cos(math.pi * done)) / 2 if self.config.anneal == "cosine" else done).to(dtype)

    def blended(self, plain: Tensor, value: Any) -> Any:
        """(1 - t) plain + t value, of each of several values."""
        if isinstance(value, tuple):
            return type(value)(*(self.blended(plain, part) for part in value))
        t = self.share(torch.promote_types(plain.dtype, torch.float32))
        return ((1 - t) * plain + t * value).to(value.dtype)


@cache
def annealed(cls: Any) -> Any:
    """The class of an operator's connections that are annealed."""

    def with_state(self: Any, plain: Tensor, result: Any) -> Any:
        value, left = parted(result)
        return self.blended(plain, value), *left

    class Annealed(Annealing, cls):  # type: ignore[misc]  # of whatever operator it is
        def build(self) -> None:
            super().build()
            self.register_buffer("annealed", torch.zeros(1, dtype=torch.int64))

        def affine(self, states: int) -> Affine | None:
            """The operator's own, where it has taken over."""
            return super().affine(states) if bool(self.annealed >= self.config.anneal_steps) else None

        def learned(self) -> dict[str, Tensor]:
            return {**super().learned(), "t": self.share(torch.float32).view(())}

        @classmethod
        def start_of(cls, config: SiteConfig) -> str:
            return "exact"

        @classmethod
        def prepare_branch(cls, config: SiteConfig, place: BranchMap) -> float:
            return 1.0

        def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
            return _empty, (cls,), self.__getstate__()  # type: ignore[no-untyped-call]  # object's

    if cls.defines("branch"):
        Annealed.skip = lambda self, x, *state, **given: with_state(self, x, cls.skip(self, x, *state, **given))
        Annealed.branch = lambda self, f: self.blended(f, cls.branch(self, f))
    else:
        Annealed.step = lambda self, x, f, *state, **given: with_state(self, x + f, cls.step(self, x, f, *state, **given))
    if cls.defines("read"):
        Annealed.read = lambda self, y, *state: with_state(self, y, cls.read(self, y, *state))
    Annealed.__name__ = Annealed.__qualname__ = f"Annealed{cls.__name__}"
    return Annealed


def _empty(cls: Any) -> Any:
    made = annealed(cls)
    return made.__new__(made)
