"""x' = (1 - T) x + T f and its kin: gates that the values themselves open."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from laurel_rewrite.operators.config import Option
from laurel_rewrite.operators.protocol import Connection
from laurel_rewrite.operators.registry import register_operator
from laurel_rewrite.operators.tensors import mapped


class _Gate(Connection):
    """T = sigmoid(W x + b): one number a position, or one a feature."""

    needs = frozenset({"maps"})
    gate = Option("vector", "One gate a position, or one a feature", choices=("scalar", "vector"))

    def build(self) -> None:
        outputs = 1 if self.config.gate == "scalar" else self.config.dim
        self.weight = self.linear(self.config.dim, outputs)
        self.bias = nn.Parameter(torch.empty(outputs))

    def initialise(self) -> None:
        self.weight.weight.zero_()
        self.bias.zero_()

    def opened(self, x: Tensor) -> Tensor:
        """T, in the dtype of x."""
        return torch.sigmoid(mapped(self.weight, x) + self.per_feature(self.bias).to(x.dtype))


@register_operator
class Highway(_Gate):
    """The gate takes from the skip what it gives to the branch."""

    name = "highway"
    formula = "T*f + (1 - T)*x, T = sigmoid(W*x + b)"
    paper = "Highway Networks, 2015"
    start = "inexact"
    bias_init = Option(-2.0, "Start of b: the lower, the more of the skip is carried")

    def initialise(self) -> None:
        super().initialise()
        self.bias.fill_(self.config.bias_init)

    def step(self, x: Tensor, f: Tensor) -> Tensor:
        opened = self.opened(x)
        return opened * f + (1 - opened) * x


@register_operator
class Gated(_Gate):
    """A gate on the branch alone, that is 1 at its start."""

    name = "gated"
    formula = "x + T*f, T = 2*sigmoid(W*x + b)"
    paper = "Highway Networks, 2015, with an open carry gate"

    def step(self, x: Tensor, f: Tensor) -> Tensor:
        return x + 2 * self.opened(x) * f


@register_operator
class GatedRecurrent(Connection):
    """The stream is the state of a gated recurrent unit over depth, and the branch what it is given."""

    name = "gru"
    title = "GRUGate"
    formula = "(1 - z)*x + z*h; z = s(Wz*f + Uz*x - b), r = s(Wr*f + Ur*x), h = tanh(Wg*f + Ug*(r*x))"
    paper = "Stabilizing Transformers for Reinforcement Learning, ICML 2020"
    start = "inexact"
    needs = frozenset({"maps"})
    bias_init = Option(2.0, "Start of b: the higher, the more of the stream is kept")

    def build(self) -> None:
        dim = self.config.dim
        self.of_branch = self.linear(dim, 3 * dim)  # W of r, z and h
        self.of_skip = self.linear(dim, 2 * dim)  # U of r and z
        self.of_reset = self.linear(dim, dim)  # U of h
        self.bias = nn.Parameter(torch.empty(dim))

    def initialise(self) -> None:
        for layer in (self.of_branch, self.of_skip, self.of_reset):
            for part in layer.weight.flatten(1).split(self.config.dim):
                nn.init.xavier_uniform_(part)
        self.bias.fill_(self.config.bias_init)

    def step(self, x: Tensor, f: Tensor) -> Tensor:
        dim, axis = self.config.dim, self.config.axis
        r_f, z_f, h_f = mapped(self.of_branch, f).split(dim, axis)
        r_x, z_x = mapped(self.of_skip, x).split(dim, axis)
        r = torch.sigmoid(r_f + r_x)
        z = torch.sigmoid(z_f + z_x - self.per_feature(self.bias).to(x.dtype))
        h = torch.tanh(h_f + mapped(self.of_reset, r * x))
        return (1 - z) * x + z * h
