"""Histories that queries, keys and values of an attention each mix for themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from laurel_rewrite.operators.config import Option, SiteConfig, no_blocks
from laurel_rewrite.operators.families.dense import History, with_own
from laurel_rewrite.operators.protocol import Connection
from laurel_rewrite.operators.reads import Reads
from laurel_rewrite.operators.registry import register_operator
from laurel_rewrite.operators.tensors import mapped, rms_normed, weighted


@register_operator
class DeepCrossAttention(History):
    """In front of an attention the GRN-v3 of each of q, k and v, elsewhere one: `b` is [ways, n, D], `w` is [ways, D]."""

    name = "dca"
    title = "DeepCrossAttention"
    formula = "sum_i (b_i + relu(<w,g_i>))*g_i over x_0 and all branches, apart for q, k and v"
    paper = "DeepCrossAttention: Supercharging Transformer Residual Connections, ICML 2025"
    reader = "dca"
    separate = True
    needs = frozenset({"features", "whole stream", "plain links", "projections"})

    def build(self) -> None:
        ways = 3 if self.config.separate else 1
        self.b = nn.Parameter(torch.ones(ways, self.count(), self.config.dim))
        self.w = nn.Parameter(torch.zeros(ways, self.config.dim))

    def step(self, x: Tensor, f: Tensor, *state: Tensor) -> tuple[Tensor | Reads, ...]:
        values = self.collected(x, f, *state)
        mixes = []
        for b, w in zip(self.b.unbind(), self.w.unbind(), strict=True):
            static = [self.per_feature(row) for row in b.unbind()]
            mixes.append(weighted(with_own(static, self.per_feature(w), values, self.config.axis), values))
        out: Tensor | Reads = mixes[0]
        if self.config.separate:  # nothing but the three reads it: the next value is made of the history, too
            out = Reads(mixes[2], *mixes)
        return (out,) if self.config.last else (out, *values)


@register_operator
class MultiwayDense(Connection):
    """Behind a block each position weighs the outputs of all blocks anew, once for each of q, k, v and the residual stream.

    `a` is [ways, n]; `down`, [n ways, D], and `up`, [n ways, n ways], give what is added to it. Where the next branch has no q, k and v of
    its own, and at the end, there is one way, the residual.
    """

    name = "muddformer"
    title = "MUDDFormer"
    formula = "x + f; behind block i sum_j A_ij*X_j, A_i = U*gelu(V*rmsnorm(X_i)) + a_i, apart for q, k, v and the residual"
    paper = "MUDDFormer: Breaking Residual Bottlenecks in Transformers via Multiway Dynamic Dense Connections, ICML 2025"
    reader = "muddformer"
    separate = True
    grows = True
    needs = frozenset({"maps", "whole stream", "plain links", "projections"})
    expansion = Option(1, "Hidden features of the weights' network, in multiples of how many weights there are", minimum=1)

    def build(self) -> None:
        self.mixes = self.config.ends_block
        if not self.mixes:
            return
        count, self.ways = self.config.block + 2, 4 if self.config.separate else 1
        self.a = nn.Parameter(torch.zeros(self.ways, count))
        hidden = count * self.ways * self.config.expansion
        self.down, self.up = self.linear(self.config.dim, hidden), self.linear(hidden, count * self.ways)

    def initialise(self) -> None:
        if self.mixes:
            self.a[:, -1] = 1
            nn.init.xavier_uniform_(self.down.weight.flatten(1))
            self.up.weight.zero_()

    def step(self, x: Tensor, f: Tensor, *state: Tensor) -> tuple[Tensor | Reads, ...]:
        values, out = state or (x,), x + f
        if not self.mixes:
            return (out,) if self.config.last else (out, *values)
        values, axis = (*values, out), self.config.axis
        dynamic = mapped(self.up, nn.functional.gelu(mapped(self.down, rms_normed(out, axis))))
        given = iter(dynamic.split(1, axis))
        mixes = []
        for row in self.a.unbind():
            weights = [a.to(out.dtype) + next(given) for a in row.split(1)]
            mixes.append(weighted(weights, values))
        mixed: Tensor | Reads = mixes[0] if self.ways == 1 else Reads(mixes[3], *mixes[:3])
        return (mixed,) if self.config.last else (mixed, *values)

    @classmethod
    def unfit(cls, stream: Sequence[SiteConfig]) -> str:
        return no_blocks(stream)
