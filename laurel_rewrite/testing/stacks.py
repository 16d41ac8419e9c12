"""Small models with residual connections, and the same by hand: a loop that knows neither slots, hooks nor graphs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from laurel_rewrite.operators.registry import Operator
from laurel_rewrite.operators.state import FED

D = 16
Place = tuple[Any, "Branch", nn.Module | None]
"""A connection, its branch, and the norm that follows the sum."""


class Branch(nn.Module):
    """What is added at a site: it ends in a linear map, and begins with a norm or without one."""

    def __init__(self, *, normed: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D) if normed else None
        self.linear = nn.Linear(D, D)

    def normed(self, x: Tensor) -> Tensor:
        """What its first map reads."""
        out: Tensor = x if self.norm is None else self.norm(x)
        return out

    def by_hand(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The branch, where queries, keys and values read the stream apart; equal where it has none."""
        raise NotImplementedError  # each kind of branch has its own


class FeedForward(Branch):
    """Two maps with an activation between them."""

    def __init__(self, *, normed: bool = True) -> None:
        super().__init__(normed=normed)
        self.inner = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.by_hand(x, x, x)

    def by_hand(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = self.linear(torch.tanh(self.inner(self.normed(q))))
        return out


class Attention(Branch):
    """An attention with maps of their own for queries, keys and values."""

    def __init__(self, *, normed: bool = True) -> None:
        super().__init__(normed=normed)
        self.q, self.k, self.v = (nn.Linear(D, D) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        n = self.normed(x)
        return self._attended(self.q(n), self.k(n), self.v(n))

    def by_hand(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._attended(*(project.forward(self.normed(x)) for project, x in ((self.q, q), (self.k, k), (self.v, v))))

    def _attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unsqueeze(1) for x in (q, k, v))
        out: Tensor = self.linear(nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1))
        return out


class Block(nn.Module):
    """Two residual connections, behind the norms of their branches."""

    f: Branch
    g: Branch

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = FeedForward(), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(x)
        out: Tensor = x + self.g(x)
        return out

    def places(self) -> Iterator[Place]:
        """Its connections in order, of a rewritten block."""
        yield self.laurel_0, self.f, None
        yield self.laurel_1, self.g, None


class AttentionBlock(Block):
    """The first branch is an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.f = Attention()


class PostNormBlock(Block):
    """A norm behind each sum: the next connection's skip comes through it."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = FeedForward(normed=False), FeedForward(normed=False)
        self.after_f, self.after_g = nn.LayerNorm(D), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        x = self.after_f(x + self.f(x))
        out: Tensor = self.after_g(x + self.g(x))
        return out

    def places(self) -> Iterator[Place]:
        yield self.laurel_0, self.f, self.after_f
        yield self.laurel_1, self.g, self.after_g


class PostNormAttentionBlock(PostNormBlock):
    """The same with an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.f = Attention(normed=False)


class Stack(nn.Module):
    """Blocks, a norm and a head: every reader of the stream is a normalisation."""

    block: type[Block] = Block

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.block() for _ in range(blocks))
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, D)
        self.call: Any = None  # how a block is called, where not plainly

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.call is None else self.call(block, x)
        out: Tensor = self.head(self.norm(x))
        return out


class AttentionStack(Stack):
    """Blocks with an attention."""

    block = AttentionBlock


class PostNormStack(Stack):
    """Blocks with norms between the sums."""

    block = PostNormBlock


class PostNormAttentionStack(Stack):
    """Blocks with an attention, and norms between the sums."""

    block = PostNormAttentionBlock


def stacks_for(operator: Operator) -> dict[str, type[Stack]]:
    """What an operator is tried in, in words."""
    found: dict[str, type[Stack]] = {} if operator.needs & {"projections", "attention", "norms between"} else {"": Stack}
    if operator.separate or "attention" in operator.needs:
        found["with attention"] = AttentionStack
    if operator.reads_links or "norms between" in operator.needs:
        found["with norms between the sums"] = PostNormStack
    if operator.separate and operator.reads_links:
        found["with attention, and norms between the sums"] = PostNormAttentionStack
    return found


def by_hand(stack: Any, x: Tensor) -> Tensor:
    """A rewritten `Stack`, with its state in a variable."""
    state: tuple[Tensor, ...] = ()
    for block in stack.blocks:
        for connection, branch, after in block.places():
            q, k, v = state[:FED] if connection.config.fed else (x, x, x)
            x, state = connection.connect(x, branch.by_hand(q, k, v), state=state, n=branch.normed(x))
            if after is not None:
                x = after.forward(x)
                x, state = connection.connect_behind(x, state) if connection.config.linked else (x, state)
    out: Tensor = stack.head(stack.norm(x))
    return out
