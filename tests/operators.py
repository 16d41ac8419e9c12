"""One small operator of each class, as anybody would write them: nothing of the package is changed for them.

The formulas that `test_operators.py` holds them to stand there, written out once more.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from laurel_rewrite import Connection, Option, Reads, register_operator
from laurel_rewrite.operators.config import BranchMap, SiteConfig


@register_operator
class Gate(Connection):
    """Local: one learned number on the branch."""

    name = "toy-gate"
    formula = "x + a*f"
    start = "inexact"
    init = Option(0.1, "Start of a", minimum=0.0)

    def build(self) -> None:
        self.a = nn.Parameter(torch.full((1,), self.config.init))

    def step(self, x: Tensor, f: Tensor) -> Tensor:
        return x + self.a.to(f.dtype) * f


@register_operator
class Vector(Connection):
    """Local and additive: one weight a feature on both."""

    name = "toy-vector"
    formula = "(1 + a)*f + (1 + b)*x, a and b in R^D"
    needs = frozenset({"features"})

    def build(self) -> None:
        self.a = nn.Parameter(torch.zeros(self.config.dim))
        self.b = nn.Parameter(torch.zeros(self.config.dim))

    def skip(self, x: Tensor) -> Tensor:
        return self.per_feature(1 + self.b).to(x.dtype) * x

    def branch(self, f: Tensor) -> Tensor:
        return self.per_feature(1 + self.a).to(f.dtype) * f


@register_operator
class Echo(Connection):
    """Window: the skip before this one."""

    name = "toy-echo"
    formula = "x + f + c*x_{i-1}"
    reader = "toy-echo"

    def build(self) -> None:
        if self.config.lags > 1:
            self.c = nn.Parameter(torch.zeros(1))

    @classmethod
    def window(cls, config) -> int:
        return 2

    def step(self, x: Tensor, f: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        out = x + f
        for earlier in state:
            out = out + self.c.to(x.dtype) * earlier
        return out, x


@register_operator
class Dense(Connection):
    """Whole history: a weight on every value that the stream had."""

    name = "toy-dense"
    formula = "sum_j a_j X_j, X_i = x + f"
    reader = "toy-dense"
    grows = True
    needs = frozenset({"whole stream", "plain links"})

    def build(self) -> None:
        self.a = nn.Parameter(torch.zeros(self.config.position + 2))

    def initialise(self) -> None:
        self.a.zero_()
        self.a[-1] = 1

    def step(self, x: Tensor, f: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        return self.mixed(*(state or (x,)), x + f)

    def depth_weights(self, x: Tensor, f: Tensor, *state: Tensor) -> Tensor:
        return self.a.flip(0)

    def mixed(self, *values: Tensor) -> tuple[Tensor, ...]:
        out = self.a[-1:].to(values[-1].dtype) * values[-1]
        for place, value in enumerate(values[:-1]):
            out = out + self.a[place : place + 1].to(value.dtype) * value
        return out, *values


@register_operator
class Lanes(Connection):
    """A wide stream: the value is lane 0 of several, which mix at each connection."""

    name = "toy-lanes"
    formula = "H' = A H + b f, x' = H'_0"
    reader = "toy-lanes"
    lead = 1
    needs = frozenset({"whole stream", "plain links"})
    lanes = Option(2, "Number of lanes", minimum=2)

    def build(self) -> None:
        self.mix = nn.Parameter(torch.eye(self.config.lanes))
        self.b = nn.Parameter(torch.ones(self.config.lanes))

    def step(self, x: Tensor, f: Tensor, *state: Tensor) -> tuple[Tensor, Tensor]:
        wide = state[0] if state else torch.stack([x] * self.config.lanes)
        mixed = torch.tensordot(self.mix.to(x.dtype), wide, dims=1)
        wide = mixed + self.b.to(x.dtype).view(-1, *(1,) * x.ndim) * f
        return wide[0], wide


@register_operator
class Ladder(Connection):
    """Rewired: each branch reads the stream one sum earlier; all is there at the end."""

    name = "toy-ladder"
    formula = "u_{i+1} = x_i, x_{i+1} = x_i + f_i"
    start = "inexact"
    reader = "toy-ladder"
    needs = frozenset({"whole stream", "plain links"})

    def step(self, x: Tensor, f: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        whole = x + state[0] if state else x
        return (whole + f,) if self.config.last else (whole, f)


@register_operator
class Depth(Connection):
    """Random in training: a sample keeps its branch, or loses it."""

    name = "toy-depth"
    formula = "x + f*B/keep"
    start = "inexact"
    keep = Option(0.5, "Share of the branches that are kept", minimum=0.01, maximum=1.0)

    def step(self, x: Tensor, f: Tensor) -> Tensor:
        if not self.training:
            return x + f
        kept = torch.rand(x.shape[0], *(1,) * (x.ndim - 1), dtype=x.dtype, device=x.device) < self.config.keep
        return x + f * kept / self.config.keep


@register_operator
class Scheduled(Connection):
    """Scheduled: a buffer says how far the operator has taken over."""

    name = "toy-scheduled"
    formula = "(1 - t)*(x + f) + t*tanh(x + f)"

    def build(self) -> None:
        self.register_buffer("t", torch.zeros(1))

    def step(self, x: Tensor, f: Tensor) -> Tensor:
        t, total = self.t.to(x.dtype), x + f
        return (1 - t) * total + t * torch.tanh(total)


@register_operator
class Reader(Connection):
    """Branch input: what the branch reads behind its norm, weighted once more."""

    name = "toy-reader"
    formula = "x + f + c*n, n what the branch reads"
    needs = frozenset({"features", "branch input"})

    def build(self) -> None:
        self.c = nn.Parameter(torch.zeros(self.config.dim))

    def step(self, x: Tensor, f: Tensor, *, n: Tensor) -> Tensor:
        return x + f + self.per_feature(self.c).to(x.dtype) * n


@register_operator
class Bounded(Connection):
    """Local: linear as long as nothing is large."""

    name = "toy-bounded"
    formula = "x + clamp(f, -c, c)"
    start = "inexact"
    bound = Option(100.0, "c", minimum=0.0)

    def step(self, x: Tensor, f: Tensor) -> Tensor:
        return x + f.clamp(-self.config.bound, self.config.bound)


@register_operator
class Half(Connection):
    """A start that readers without a scale cannot tell from x + f: the stream at half its size."""

    name = "toy-half"
    formula = "(x + f)/2 at first, then x + f/2"
    start = "scale-free"

    def step(self, x: Tensor, f: Tensor) -> Tensor:
        return (x + f) / 2 if self.config.first else x + f / 2


@register_operator
class Apart(Connection):
    """Separate reads: queries, keys and values of the next attention each get the stream with something else beside it."""

    name = "toy-apart"
    formula = "x' = x + f; q reads x' + a*x_{i-1}, k reads x' + b*f, v reads x' + c*x"
    reader = "toy-apart"
    separate = True
    needs = frozenset({"whole stream", "plain links"})

    def build(self) -> None:
        if self.config.separate:
            self.a, self.b, self.c = (nn.Parameter(torch.zeros(1)) for _ in range(3))

    def step(self, x: Tensor, f: Tensor, *state: Tensor) -> tuple[Tensor | Reads, Tensor]:
        out = x + f
        if not self.config.separate:
            return out, x
        a, b, c = (weight.to(x.dtype) for weight in (self.a, self.b, self.c))
        return Reads(out, out + a * (state[0] if state else x), out + b * f, out + c * x), x


@register_operator
class Behind(Dense):
    """Whole history, also where norms stand between the sums: what is behind them is weighted then."""

    name = "toy-behind"
    formula = "sum_j a_j X_j, X_i = x + f, or the norm of it"
    reader = "toy-behind"

    def step(self, x: Tensor, f: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        return (x + f, *(state or (x,))) if self.config.linked else super().step(x, f, *state)

    def read(self, y: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        return self.mixed(*state, y)


@register_operator
class Shrunk(Connection):
    """Branch-scaled: the weights of what computes the branch are smaller at the start."""

    name = "toy-shrunk"
    formula = "x + f, weights and biases of f times c at its end, d inside, and 1 for queries and keys"
    start = "inexact"
    end = Option(0.5, "c")
    inner = Option(0.25, "d")

    def step(self, x: Tensor, f: Tensor) -> Tensor:
        return x + f

    @classmethod
    def prepare_branch(cls, config: SiteConfig, place: BranchMap) -> float:
        if place.last:
            return config.end
        return 1.0 if "q" in place.projection or "k" in place.projection else config.inner
