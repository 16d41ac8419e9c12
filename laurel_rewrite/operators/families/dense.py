"""The next value as a weighted sum over the whole history: of blocks' outputs (DenseFormer, ELC-BERT), or of all that was ever added (GRN)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from laurel_rewrite.operators.config import Option, SiteConfig, no_blocks
from laurel_rewrite.operators.protocol import Connection
from laurel_rewrite.operators.registry import register_operator
from laurel_rewrite.operators.tensors import dot, weighted


@register_operator
class DenseFormer(Connection):
    """Depth-weighted average: behind a block stands a weighted sum of its output and of those before it, X_0 the start of the stream.

    `a` has one weight for each value that is read: X_i, X_{i-d}, X_{i-2d}, .., the newest last, where a block's number is a multiple of the
    period. Where a norm follows the sums of a block, what is behind it is the block's output.
    """

    name = "denseformer"
    title = "DenseFormer"
    formula = "x + f; behind block i sum_j a_ij*X_j over j = i, i-d, i-2d, .."
    paper = "DenseFormer: Enhancing Information Flow in Transformers via Depth Weighted Averaging, NeurIPS 2024"
    reader = "denseformer"
    grows = reads_last = True
    needs = frozenset({"whole stream", "plain links"})
    dilation = Option(1, "Distance d between the blocks that are read", minimum=1)
    period = Option(1, "Blocks from one weighted sum to the next", minimum=1)

    def build(self) -> None:
        number = self.config.block + 1  # of this block's output, X_0 being the start
        self.mixes = self.config.ends_block and number % self.config.period == 0
        if self.mixes:
            self.a = nn.Parameter(torch.empty(number // self.config.dilation + 1))

    def initialise(self) -> None:
        if self.mixes:
            self.a.zero_()
            self.a[-1] = 1

    def step(self, x: Tensor, f: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        out, values = x + f, state or (x,)
        return (out, *values) if self.config.linked else self._behind(out, values)

    def read(self, y: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        return self._behind(y, values)

    def _behind(self, out: Tensor, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.config.ends_block:
            values = (*values, out)
        if self.mixes:
            out = weighted(self.a.split(1), values[:: -self.config.dilation][::-1])
        return (out,) if self.config.last else (out, *values)

    def depth_weights(self, x: Tensor, f: Tensor, *state: Tensor) -> Tensor | None:
        return self.a.detach().flip(0) if self.mixes else None

    @classmethod
    def unfit(cls, stream: Sequence[SiteConfig]) -> str:
        blocks = sum(config.ends_block for config in stream)
        for name in ("dilation", "period"):
            if blocks and getattr(stream[0], name) > blocks:
                return f"{name} {getattr(stream[0], name)} is above the number of its blocks, {blocks}."
        return no_blocks(stream)


@register_operator
class EveryLayerCounts(Connection):
    """A block reads a convex sum of the outputs of all blocks before it, and nothing else crosses it: inside a block the first branch is not added
    to what it read."""

    name = "elc-bert"
    title = "ElcBert"
    formula = "x + f inside a block; block n reads sum_{i<n} softmax(w_n)_i*out_i, out_0 = x_0"
    paper = "Not all layers are equally as important: Every Layer Counts BERT, BabyLM 2023"
    start = "inexact"
    reader = "elc-bert"
    grows = True
    needs = frozenset({"whole stream", "plain links"})
    last_init = Option(1.0, "Start of the last entry of w, the others being 0")

    def build(self) -> None:
        self.mixes = self.config.ends_block and not self.config.last
        if self.mixes:
            self.w = nn.Parameter(torch.zeros(self.config.block + 2))

    def initialise(self) -> None:
        if self.mixes:
            self.w[-1] = self.config.last_init

    def step(self, x: Tensor, f: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        outputs = state or (x,)
        out = f if self.config.starts_block else x + f
        if self.config.last:
            return (out,)
        if self.config.ends_block:
            outputs = (*outputs, out)
            out = weighted(torch.softmax(self.w, 0).split(1), outputs)
        return out, *outputs

    def depth_weights(self, x: Tensor, f: Tensor, *state: Tensor) -> Tensor | None:
        return torch.softmax(self.w.detach(), 0).flip(0) if self.mixes else None

    @classmethod
    def unfit(cls, stream: Sequence[SiteConfig]) -> str:
        return no_blocks(stream, least=2)


class History(Connection):
    """The stream as a sum of all that was ever added to it: what it began with, and the branches. Its state is these, oldest first; with `newest`,
    those between the first and the newest are one sum."""

    grows = True
    needs = frozenset({"features", "whole stream", "plain links"})
    newest = Option(0, "Branches that are kept apart, those before them as one sum; 0 for all", minimum=0)

    def count(self) -> int:
        """How many values there are behind this connection."""
        everything = self.config.position + 2
        return min(everything, self.config.newest + 2) if self.config.newest else everything

    def collected(self, x: Tensor, f: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """The values, this branch among them."""
        values = (*(state or (x,)), f)
        if len(values) > self.count():
            values = (values[0], values[1] + values[2], *values[3:])
        return values


class _Retrieval(History):
    """A generalised residual network: `b` has one weight a value ([n]), or one a value and feature ([n, D])."""

    paper = "DeepCrossAttention: Supercharging Transformer Residual Connections, ICML 2025"
    reader = "grn"
    per_value = False

    def build(self) -> None:
        count = self.count()
        self.b = nn.Parameter(torch.ones(count) if self.per_value else torch.ones(count, self.config.dim))

    def weights(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Of each value, in shapes that multiply it."""
        return [row if self.per_value else self.per_feature(row.squeeze(0)) for row in self.b.split(1)]

    def step(self, x: Tensor, f: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        values = self.collected(x, f, *state)
        out = weighted(self.weights(values), values)
        return (out,) if self.config.last else (out, *values)

    def depth_weights(self, x: Tensor, f: Tensor, *state: Tensor) -> Tensor | None:
        return self.b.detach().flatten(1).mean(1).flip(0) if self.b.ndim > 1 else self.b.detach().flip(0)


@register_operator
class RetrievalByValue(_Retrieval):
    """One weight a value."""

    name = "grn-v1"
    title = "GRNv1"
    formula = "sum_i b_i*g_i over x_0 and all branches, b = 1 at first"
    per_value = True


@register_operator
class RetrievalByFeature(_Retrieval):
    """One weight a value and feature."""

    name = "grn-v2"
    title = "GRNv2"
    formula = "sum_i b_i*g_i over x_0 and all branches, b_i in R^D = 1 at first"


@register_operator
class RetrievalByInput(_Retrieval):
    """The same, and a weight that each value gives itself."""

    name = "grn-v3"
    title = "GRNv3"
    formula = "sum_i (b_i + relu(<w,g_i>))*g_i over x_0 and all branches, b_i in R^D = 1 and w = 0 at first"

    def build(self) -> None:
        super().build()
        self.w = nn.Parameter(torch.zeros(self.config.dim))

    def weights(self, values: Sequence[Tensor]) -> list[Tensor]:
        return with_own(super().weights(values), self.per_feature(self.w), values, self.config.axis)


def with_own(static: Sequence[Tensor], w: Tensor, values: Sequence[Tensor], axis: int) -> list[Tensor]:
    """Weights, and to each relu(<w, value>) added; by clamp, whose slope at 0 is 1: w starts there, and with relu's slope of 0 would stay."""
    return [b.to(value.dtype) + dot(w, value, axis).clamp(min=0).to(value.dtype) for b, value in zip(static, values, strict=True)]
