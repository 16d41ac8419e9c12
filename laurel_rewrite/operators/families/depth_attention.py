"""Attention over depth: each position weighs what was added before by a softmax."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from laurel_rewrite.operators.config import Option, SiteConfig
from laurel_rewrite.operators.protocol import Connection
from laurel_rewrite.operators.registry import register_operator
from laurel_rewrite.operators.tensors import dot, inverse_rms, mapped, rms_normed, weighted


def over_depth(logits: Sequence[Tensor], axis: int, *, total: bool) -> list[Tensor]:
    """The softmax over values whose logits have size 1 on an axis; with `total` times the number of values, which at equal logits is 1 exactly."""
    together = torch.cat(list(logits), axis)
    weights = torch.exp(together - together.amax(axis, keepdim=True))
    weights = weights / (weights.mean(axis, keepdim=True) if total else weights.sum(axis, keepdim=True))
    return list(weights.split(1, axis))


@register_operator
class AttentionResiduals(Connection):
    """What is read next is an attention over what was added: the stream's start and all branches, or the sums of `block_size` branches each, the
    running one among them. `query` is the place's own, `scale` that of the norm in front of the keys.

    Its state is these values, oldest first, behind the running sum of the stream where `total` is true. The values are never stacked, only
    their logits are, one number a position each.
    """

    name = "attnres"
    title = "AttentionResiduals"
    formula = "sum_i s_i*v_i, s = softmax_i(<w,rmsnorm(v_i)>) over x_0 and branches, or sums of block_size of them"
    paper = "Attention Residuals, Moonshot AI, 2026"
    start = "scale-free"
    reader = "attnres"
    grows = True
    needs = frozenset({"features", "whole stream", "plain links"})
    block_size = Option(1, "Branches that are one sum; 1 for all apart", minimum=1)
    total = Option(
        "mean",
        "Scale of the read at the start: the mean of the values, as published, or their sum, which is the stream",
        choices=("mean", "sum"),
    )

    def build(self) -> None:
        self.query = nn.Parameter(torch.zeros(self.config.dim))
        self.scale = nn.Parameter(torch.ones(self.config.dim))
        self.begins = self.config.position % self.config.block_size == 0
        self.sums = self.config.total == "sum"

    def step(self, x: Tensor, f: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        stream = (state[0] if state else x) + f if self.sums else None
        values = self._collected(x, f, state)
        out = self._read(values, stream)
        if self.config.last:
            return (out,)
        return (out, *values) if stream is None else (out, stream, *values)

    def _collected(self, x: Tensor, f: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The values that there are, this branch among them."""
        values = (state[1:] if self.sums else state) or (x,)
        return (*values, f) if self.begins else (*values[:-1], values[-1] + f)

    def _read(self, values: Sequence[Tensor], stream: Tensor | None) -> Tensor:
        weights = self._weights(values)
        if stream is None:
            return weighted(weights, values)
        return stream + weighted([weight - 1 for weight in weights], values)  # at the start the stream itself, bit for bit

    def _weights(self, values: Sequence[Tensor]) -> list[Tensor]:
        axis = self.config.axis
        query = self.per_feature(self.query * self.scale)
        return over_depth([dot(query, value, axis) * inverse_rms(value, axis) for value in values], axis, total=self.sums)

    def depth_weights(self, x: Tensor, f: Tensor, *state: Tensor) -> Tensor | None:
        values = self._collected(x, f, state)
        return torch.stack([weight.squeeze(self.config.axis) for weight in reversed(self._weights(values))]).detach()

    @classmethod
    def start_of(cls, config: SiteConfig) -> str:
        return "exact" if config.total == "sum" else "scale-free"

    @classmethod
    def unfit(cls, stream: Sequence[SiteConfig]) -> str:
        size = stream[0].block_size
        return f"block_size {size} is above the number of its connections, {len(stream)}." if size > len(stream) else ""


@register_operator
class VerticalAttention(Connection):
    """An attention of the new value to all that the stream held before, added with one weight a feature that starts at 0. Queries and keys have r
    features and read behind a norm; the values are the stream's own."""

    name = "vertical"
    title = "VerticalAttention"
    formula = "y + g*sum_j softmax_j(<Q*n(y),K*n(x_j)>/sqrt(r))*x_j, y = x + f, g = 0 at first"
    paper = "attention over depth as in: Residual Stream Duality, 2026"
    reader = "vertical"
    grows = True
    needs = frozenset({"maps", "whole stream", "plain links"})
    rank = Option(16, "Features r of queries and keys", minimum=1, within_dim=True)

    def build(self) -> None:
        if not self.config.first:  # whose attention to one value is that value
            self.q = self.linear(self.config.dim, self.config.rank)
            self.k = self.linear(self.config.dim, self.config.rank)
        self.g = nn.Parameter(torch.zeros(self.config.dim))

    def initialise(self) -> None:
        for layer in () if self.config.first else (self.q, self.k):
            nn.init.xavier_uniform_(layer.weight.flatten(1))

    def step(self, x: Tensor, f: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        y, values = x + f, (*state, x)
        read = x if self.config.first else weighted(self._weights(y, values), values)
        out = y + self.per_feature(self.g).to(y.dtype) * read
        return (out,) if self.config.last else (out, *values)

    def _weights(self, y: Tensor, values: Sequence[Tensor]) -> list[Tensor]:
        axis = self.config.axis
        query = mapped(self.q, rms_normed(y, axis)) * self.config.rank**-0.5
        return over_depth([dot(query, mapped(self.k, rms_normed(value, axis)), axis) for value in values], axis, total=False)

    def depth_weights(self, x: Tensor, f: Tensor, *state: Tensor) -> Tensor | None:
        if self.config.first:
            return torch.ones(1, dtype=x.dtype, device=x.device)
        weights = self._weights(x + f, (*state, x))
        return torch.stack([weight.squeeze(self.config.axis) for weight in reversed(weights)]).detach()
