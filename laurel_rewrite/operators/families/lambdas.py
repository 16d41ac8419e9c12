"""One earlier value of the stream, added or taken away with a learned number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from laurel_rewrite.operators.config import Option, SiteConfig, no_blocks
from laurel_rewrite.operators.protocol import Connection
from laurel_rewrite.operators.registry import register_operator
from laurel_rewrite.operators.sums import scaled
from laurel_rewrite.operators.tensors import weighted


@register_operator
class FirstValue(Connection):
    """What each block but the first reads is the stream and, again, what it began with. (A first block that reads behind a norm could not tell.)"""

    name = "x0"
    title = "X0Lambdas"
    formula = "x + f; behind each block but the last a*x + c*x_0, a = 1 and c = 0 at first"
    paper = "nanochat and modded-nanogpt, 2025: resid_lambdas and x0_lambdas"
    reader = "x0"
    rate = 5.0
    needs = frozenset({"whole stream", "plain links"})
    stream_init = Option(1.0, "Start of a")
    first_init = Option(0.0, "Start of c")

    def build(self) -> None:
        self.mixes = self.config.ends_block and not self.config.last
        if self.mixes:
            self.lambdas = nn.Parameter(torch.tensor([float(self.config.stream_init), float(self.config.first_init)]))

    def step(self, x: Tensor, f: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        first, out = state[0] if state else x, x + f
        if self.mixes and not self.config.linked:
            out = weighted(self.lambdas.split(1), [out, first])
        return (out,) if self.config.last and not self.config.linked else (out, first)

    def read(self, y: Tensor, first: Tensor) -> tuple[Tensor, ...]:
        out = weighted(self.lambdas.split(1), [y, first]) if self.mixes else y
        return (out,) if self.config.last else (out, first)

    @classmethod
    def start_of(cls, config: SiteConfig) -> str:
        return "exact" if (config.stream_init, config.first_init) == (1.0, 0.0) else "inexact"

    @classmethod
    def unfit(cls, stream: Sequence[SiteConfig]) -> str:
        return no_blocks(stream, least=2)


@register_operator
class Backout(Connection):
    """What the stream held at two thirds of its depth is taken out of what everything reads behind its end."""

    name = "backout"
    formula = "x + f; at the stream's end x + f - l*x_m, x_m what it held at a share of its depth"
    paper = "modded-nanogpt, record 140, 2025"
    reader = "backout"
    rate = 5.0
    needs = frozenset({"whole stream", "plain links"})
    depth = Option(2 / 3, "Share of the stream's connections that are before x_m", minimum=0.0, maximum=1.0)
    amount_init = Option(0.0, "Start of l")

    def build(self) -> None:
        # Up to x_m the stream itself is handed on, which costs nothing, so that all connections leave one state.
        self.before = self.config.position < min(max(round(self.config.depth * self.config.length), 1), self.config.length - 1)
        if self.config.last:
            self.amount = nn.Parameter(torch.full((1,), float(self.config.amount_init)))

    def step(self, x: Tensor, f: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        out = x + f
        if self.config.last:
            return (out - scaled(state[0], self.amount),)
        return out, out if self.before else state[0]

    @classmethod
    def start_of(cls, config: SiteConfig) -> str:
        return "inexact" if config.amount_init else "exact"

    @classmethod
    def unfit(cls, stream: Sequence[SiteConfig]) -> str:
        return "" if len(stream) > 1 else "it has one connection, and so nothing before its end."
