"""Other wires, no parameters: branches that read an earlier value of the stream, so that they can run beside each other."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from laurel_rewrite.operators.config import SiteConfig, no_blocks
from laurel_rewrite.operators.protocol import Connection
from laurel_rewrite.operators.registry import register_operator


@register_operator
class Ladder(Connection):
    """Each branch reads the stream one sum earlier, while the one before it is still being added."""

    name = "ladder"
    formula = "u_{i+1} = x_i, x_{i+1} = x_i + f_i; the last reader has everything"
    paper = "Ladder-Residual, ICML 2025, arXiv 2501.06589"
    start = "inexact"
    reader = "ladder"
    needs = frozenset({"whole stream", "plain links"})

    def step(self, x: Tensor, f: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        whole = x + state[0] if state else x
        return (whole + f,) if self.config.last else (whole, f)


@register_operator
class Parallel(Connection):
    """All branches of a block read what the block begins with: attention and feed-forward part run side by side."""

    name = "parallel"
    title = "ParallelBranches"
    formula = "inside a block every branch reads its x_0; behind it x_0 + f_1 + f_2"
    paper = "GPT-J, 2021; PaLM, 2022"
    start = "inexact"
    reader = "parallel"
    needs = frozenset({"whole stream", "plain links"})

    def step(self, x: Tensor, f: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        if self.config.ends_block or not (self.config.starts_block or state):
            return (x + state[0] + f if state else x + f,)
        return x, state[0] + f if state else f

    @classmethod
    def unfit(cls, stream: Sequence[SiteConfig]) -> str:
        if any(config.starts_block and not config.ends_block for config in stream):
            return ""
        return no_blocks(stream) or "its blocks have one connection each, and nothing to run beside it."
