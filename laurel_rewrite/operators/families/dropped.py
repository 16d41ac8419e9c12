"""x' = x + f B / keep: branches that are left out at random in training."""

from __future__ import annotations

import torch
from torch import Tensor

from laurel_rewrite.operators.config import Option
from laurel_rewrite.operators.protocol import Connection
from laurel_rewrite.operators.registry import register_operator


@register_operator
class StochasticDepth(Connection):
    """A sample keeps its branch with the probability 1 - rate i/L at the i-th of L sums, and weighs it by its inverse; in evaluation it is x + f."""

    name = "stochastic-depth"
    title = "StochasticDepth"
    formula = "x + f*B/keep in training, keep = 1 - rate*i/L"
    paper = "Deep Networks with Stochastic Depth, ECCV 2016"
    start = "evaluation"
    keep: Tensor
    drop_rate = Option(0.1, "Share of the samples that lose the last branch", minimum=0.0, maximum=0.99)

    def build(self) -> None:
        depth = (self.config.position + 1) / self.config.length if self.config.length else 1.0
        # A tensor, so that blocks that are compiled alone are one graph.
        self.register_buffer("keep", torch.full((1,), 1 - self.config.drop_rate * depth))

    def step(self, x: Tensor, f: Tensor) -> Tensor:
        if not self.training:
            return x + f
        keep: Tensor = self.keep.to(torch.promote_types(f.dtype, torch.float32))
        kept = torch.rand(f.shape[0], *(1,) * (f.ndim - 1), dtype=keep.dtype, device=f.device) < keep
        return x + f * (kept / keep).to(f.dtype)
