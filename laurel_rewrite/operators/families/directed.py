"""Updates by direction: what of the branch is added depends on where it points, and where the stream points."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from laurel_rewrite.operators.config import Option
from laurel_rewrite.operators.protocol import Connection
from laurel_rewrite.operators.registry import register_operator
from laurel_rewrite.operators.tensors import EPS, dot, mapped


@register_operator
class Orthogonal(Connection):
    """Only what of the branch is orthogonal to the stream is added."""

    name = "orthogonal"
    formula = "x + f - (<f,x>/(<x,x> + eps))*x"
    paper = "Revisiting Residual Connections: Orthogonal Updates for Stable and Efficient Deep Networks, 2025"
    start = "inexact"
    needs = frozenset({"features"})

    def step(self, x: Tensor, f: Tensor) -> Tensor:
        axis = self.config.axis
        along = dot(f, x, axis) / (dot(x, x, axis) + EPS)
        return x + (f - along.to(x.dtype) * x)


@register_operator
class DeepDelta(Connection):
    """The delta rule over depth: what the stream holds along the branch's direction is replaced by a new value, for one value a feature (d_v = 1).

    The gate reads what the branch reads: at the start b = 2 sigmoid(c).
    """

    name = "delta"
    title = "DeepDelta"
    formula = "x + b*(v - <k,x>)*k; k = f/|f|, v = 4*sigmoid(w*x + d), b = 2*sigmoid(u*n + c)"
    paper = "Deep Delta Learning, arXiv 2601.00417, with d_v = 1"
    start = "inexact"
    needs = frozenset({"maps", "branch input"})
    gate_init = Option(1.0, "Start of b", minimum=0.001, maximum=1.999)

    def build(self) -> None:
        self.value = self.linear(self.config.dim, 1)
        self.gate = self.linear(self.config.dim, 1)
        self.value_bias = nn.Parameter(torch.zeros(1))
        self.gate_bias = nn.Parameter(torch.empty(1))

    def initialise(self) -> None:
        self.value.weight.zero_()
        self.gate.weight.zero_()
        self.gate_bias.fill_(math.log(self.config.gate_init / (2 - self.config.gate_init)))

    def step(self, x: Tensor, f: Tensor, *, n: Tensor) -> Tensor:
        axis = self.config.axis
        k = f * torch.rsqrt(dot(f, f, axis) + EPS).to(f.dtype)
        v = 4 * torch.sigmoid(mapped(self.value, x) + self.value_bias.to(x.dtype))
        b = 2 * torch.sigmoid(mapped(self.gate, n) + self.gate_bias.to(n.dtype))
        return x + b * (v - dot(k, x, axis).to(x.dtype)) * k
