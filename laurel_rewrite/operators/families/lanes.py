"""Wide streams whose lanes take turns: each branch reads one lane, and all are written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from laurel_rewrite.operators.config import Option
from laurel_rewrite.operators.families.hyper import Wide, entries, total
from laurel_rewrite.operators.registry import register_operator
from laurel_rewrite.operators.tensors import weighted


@register_operator
class ParallelLanes(Wide):
    """One lane a kind of branch: with two lanes, attention reads the first and the feed-forward part the second, and both write to both. At the
    end everything reads their mean. `keep` is r, [n], `into` w, [n]."""

    name = "lanes"
    title = "ParallelLanes"
    formula = "u = H_{i mod n}, H'_j = r_j*H_j + w_j*f, the mean of the lanes at the end"
    paper = "modded-nanogpt, parallel residuals, 2026"
    start = "exact"
    reader = "lanes"
    rate = 5.0
    streams = Option(2, "Lanes n of the stream", minimum=2)

    def build(self) -> None:
        self.keep = nn.Parameter(torch.ones(self.config.streams))
        self.into = nn.Parameter(torch.ones(self.config.streams))
        self.next = (self.config.position + 1) % self.config.streams

    def step(self, x: Tensor, f: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        weights = zip(self.keep.split(1), self.into.split(1), strict=True)
        lanes = [weighted(pair, (lane, f)) for pair, lane in zip(weights, self.lanes(x, state), strict=True)]
        if self.config.last:
            return (mean_of(lanes),)
        return lanes[self.next], *lanes


@register_operator
class AltUp(Wide):
    """The stream is n copies wide, and a branch runs on one of them: the others are predicted before, and corrected by how far that one was off.

    `across` is C, [n, n], of what is read next; `correct` is c, [n]. At the end everything reads the mean of the copies.
    """

    name = "altup"
    title = "AltUp"
    formula = "P = H + C*H, u = P_a, H' = P + (1 + c)*(u + f - P_a), the mean of the copies at the end"
    paper = "Alternating Updates for Efficient Transformers, NeurIPS 2023; Gemma 3n"
    start = "exact"
    reader = "altup"
    streams = Option(2, "Copies n of the stream", minimum=2)
    active = Option("first", "Copy a that the branches run on: always the first, or each in turn", choices=("first", "alternating"))

    def build(self) -> None:
        n = self.config.streams
        self.across = None if self.config.last else nn.Parameter(torch.zeros(n, n))
        self.correct = nn.Parameter(torch.zeros(n))
        self.next = (self.config.position + 1) % n if self.config.active == "alternating" else 0

    def step(self, x: Tensor, f: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        lanes = [lane + (1 + c).to(f.dtype) * f for lane, c in zip(self.lanes(x, state), self.correct.split(1), strict=True)]
        if self.across is None:
            return (mean_of(lanes),)
        predicted = [lane + weighted(row, lanes) for lane, row in zip(lanes, entries(self.across), strict=True)]
        return predicted[self.next], *predicted


def mean_of(lanes: Sequence[Tensor]) -> Tensor:
    """Their mean; of equal lanes it is any of them, bit for bit."""
    first, *others = lanes
    return first + total([lane - first for lane in others]) / len(lanes)
