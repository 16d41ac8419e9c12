"""LAuReL's low-rank term behind a normalisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from laurel_rewrite.operators.config import Option
from laurel_rewrite.operators.protocol import Connection
from laurel_rewrite.operators.registry import register_operator
from laurel_rewrite.operators.tensors import mapped, rms_normed


class _LowRank(Connection):
    """V, [r, D], and U, [D, r], as `down` and `up`."""

    needs = frozenset({"maps"})
    rank = Option(16, "Rank r of the low-rank maps", minimum=1, within_dim=True)

    def build(self) -> None:
        self.down = self.linear(self.config.dim, self.config.rank)
        self.up = self.linear(self.config.rank, self.config.dim)

    def initialise(self) -> None:
        nn.init.xavier_uniform_(self.down.weight.flatten(1))
        self.up.weight.zero_()


@register_operator
class NormedLowRank(_LowRank):
    """The low-rank term reads the stream behind a norm without weights: it does not grow with the stream."""

    name = "lr-normed"
    title = "NormedLR"
    formula = "x + f + U*V*rmsnorm(x)"
    paper = "LAuReL: Learned Augmented Residual Layer, ICML 2025, behind a norm as public code of MUDDFormer's authors has it"

    def step(self, x: Tensor, f: Tensor) -> Tensor:
        return x + f + mapped(self.up, mapped(self.down, rms_normed(x, self.config.axis)))


@register_operator
class Gemma3n(_LowRank):
    """LAuReL as Gemma 3n has it around its attention: `norm` is the scale of the norm behind the low-rank maps. Other branches are added as they are."""

    name = "gemma3n"
    title = "Gemma3nLaurel"
    formula = "(x + f + n + rmsnorm(U*V*n))/sqrt(2) around attention, n what the branch reads"
    paper = "Gemma 3n, 2025, as transformers' Gemma3nTextLaurelBlock"
    start = "inexact"
    needs = frozenset({"maps", "branch input", "attention"})
    rank = Option(64, "Rank r of the low-rank maps", minimum=1, within_dim=True)
    norm_eps = Option(1e-6, "Added to the mean square in the norm", minimum=0.0)

    def build(self) -> None:
        self.around = "attention" in self.config.role.split("+")
        if self.around:
            super().build()
            self.norm = nn.Parameter(torch.ones(self.config.dim))

    def initialise(self) -> None:
        if self.around:
            for layer in (self.down, self.up):  # a norm behind a map of nothing has no slope
                nn.init.xavier_uniform_(layer.weight.flatten(1))

    def step(self, x: Tensor, f: Tensor, *, n: Tensor) -> Tensor:
        if not self.around:
            return x + f
        low = mapped(self.up, mapped(self.down, n))
        laurel = n + rms_normed(low, self.config.axis, self.config.norm_eps) * self.per_feature(self.norm).to(x.dtype)
        return (x + f + laurel) / math.sqrt(2)
