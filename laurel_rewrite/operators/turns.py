"""The LAuReL modules of a loop: one a turn, each turn's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from laurel_rewrite.errors import LaurelError, TooManyTurnsError
from laurel_rewrite.operators.state import running_backward

EXTRA_TURNS = ("refuse", "share")
"""What becomes of turns beyond those that were seen: an error, or the last turn's module again."""


class Turns(nn.ModuleList):
    """One module a turn of a loop, in order.

    Args:
        modules: LAuReL modules, and `PlainResidual` for turns that keep their sum.
        site: of the loop, for the error.
        share: turns beyond the last use the last module again; else they are an error.
    """

    def __init__(self, modules: Iterable[nn.Module], *, site: str = "", share: bool = False) -> None:
        super().__init__(modules)
        self.site = site
        self.share = share

    def turns(self) -> Iterator[Any]:
        """The modules, one call of the looping function after another begins anew."""
        return self._turns(running_backward())

    def _turns(self, began: int) -> Iterator[Any]:
        for module in self:
            self._check(began)
            yield module
        beyond = self[-1] if self.share else _Beyond(self.site, len(self))
        while True:
            self._check(began)
            yield beyond

    def _check(self, began: int) -> None:
        """Refuse a turn that backward runs again by itself: the next module is not the one that it had.

        Raises:
            LaurelError: the loop ran in another pass.
        """
        if running_backward() != began:
            raise LaurelError(
                f"{self.site}: activation checkpointing runs a turn of this loop again, in a function that stands inside the loop, and its LAuReL "
                "module cannot be known there. Checkpoint a module or the whole loop, or leave the loop out with exclude."
            )


class _Beyond:
    """Stands for the module of a turn that there is none for: an error where it is used, not where a loop only passes it by."""

    def __init__(self, site: str, turns: int) -> None:
        self.site = site
        self.turns = turns

    def __call__(self, *operands: Any, **named: Any) -> Any:
        raise TooManyTurnsError(
            f"{self.site}: the loop has more turns than the {self.turns} that it had when the model was captured, one LAuReL module each. Capture "
            'it with as many as it can have, or let further turns share the last one: extra_turns="share".'
        )

    branch = add_ = __call__
