"""Connections that are left out of the graphs of blocks that are compiled alone: those whose state grows.

Such a block would be compiled anew for each number of states, up to a limit, and then run eager in silence.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from laurel_rewrite.operators.state import Link
from laurel_rewrite.private import graphs_see_hooks


class BetweenGraphs(nn.Module):
    """What a connection does about it; see `laurel_rewrite.operators.protocol.Connection` for the attributes."""

    grows: ClassVar[bool]
    separate: ClassVar[bool]
    link: Link | None

    @classmethod
    def defines(cls, name: str) -> bool:
        """Whether it has its own of what an operator may define."""
        raise NotImplementedError  # a connection has it

    @classmethod
    def leave_graphs(cls) -> None:
        """Let the compiler leave it out; when the first is made or unpickled, for it imports the compiler."""
        if not cls.grows or "between_graphs" in vars(cls):
            return
        for name in ("between_graphs", "fed_between_graphs"):
            setattr(cls, name, torch.compiler.disable(getattr(BetweenGraphs, name)))  # type: ignore[no-untyped-call]
        if cls.separate or cls.defines("read"):  # hooks on other modules bring its values to where they are read
            # The compiler takes the graph of a block without hooks for one with them, unless it is told to look.
            graphs_see_hooks()

    def splits_graphs(self) -> bool:
        """Whether it is such a block's graph that is being compiled."""
        return self.grows and torch.compiler.is_dynamo_compiling() and self.link is not None and not self.link.stream.traced

    def between_graphs(self, *operands: Tensor, n: Tensor | None = None) -> Any:
        """The call, between two graphs."""
        return self.forward(*operands, n=n)

    def fed(self, place: int) -> Tensor:
        """What one of q, k and v of its branch reads."""
        return self.fed_between_graphs(place) if self.splits_graphs() else BetweenGraphs.fed_between_graphs(self, place)

    def fed_between_graphs(self, place: int) -> Tensor:
        """The same, between two graphs."""
        assert self.link is not None
        return self.link.take(place)
