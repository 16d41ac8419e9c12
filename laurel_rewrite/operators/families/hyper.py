"""Hyper-connections: the stream is wide, n lanes of D features or D features in m parts, and each connection mixes it by small matrices.

H is the wide stream, u what a branch reads of it:      u = A_m H,      H' = A_r H + B f.

A connection holds B and A_r of its own branch and A_m of what follows it: the next branch's, or at the end the sum over the lanes. What the
first branch reads is x_0, of which n equal copies are H.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from laurel_rewrite.operators.config import Option, SiteConfig
from laurel_rewrite.operators.protocol import Connection
from laurel_rewrite.operators.registry import register_operator
from laurel_rewrite.operators.tensors import EPS, dot, mapped, rms_normed, weighted

Lanes = tuple[Tensor, ...]


class Wide(Connection):
    """n lanes, which begin as equal copies; its state is the lanes."""

    start = "scale-free"
    needs = frozenset({"features", "whole stream", "plain links"})
    streams = Option(4, "Lanes n of the stream", minimum=2)

    def lanes(self, x: Tensor, state: Lanes) -> Lanes:
        """The wide stream in front of this connection's branch."""
        return state or (x,) * self.config.streams


def total(lanes: Sequence[Tensor]) -> Tensor:
    """Their sum."""
    found = lanes[0]
    for lane in lanes[1:]:
        found = found + lane
    return found


def entries(matrix: Tensor) -> list[list[Tensor]]:
    """The entries of a matrix, each of shape (1,)."""
    return [list(row.split(1)) for row in matrix.unbind()]


class _Mixed(Connection):
    """Learned matrices, and with `mix=dynamic` what each lane, or part, adds to them at its position: scale * tanh(W rmsnorm(h)).

    `into` is B, [n]; `across` A_r, [n, n]; `out` A_m of what follows, a row for each value that it gives, none at the end. `dynamic` has W.
    """

    needs = frozenset({"maps", "whole stream", "plain links"})
    mix = Option("dynamic", "Whether the matrices depend on the stream", choices=("dynamic", "static"))

    def matrices(self, count: int, width: int, out: Tensor) -> None:
        """Make them: of so many lanes of so many features, and with such a start of A_m."""
        self.into = nn.Parameter(torch.ones(count))
        self.across = nn.Parameter(torch.eye(count))
        self.out = None if self.config.last else nn.Parameter(out.clone())  # not a part of a larger tensor, which no file would hold alone
        reads = 0 if self.config.last else out.numel() // count
        self.dynamic = Dynamic(self, width, count + 1, reads) if self.config.mix == "dynamic" else None

    def mixed(self, lanes: Lanes, added: Sequence[Tensor]) -> Lanes:
        """A_r H + B f, where each lane is given its own f."""
        into, across = list(self.into.split(1)), entries(self.across)
        if self.dynamic is not None:
            for j, lane in enumerate(lanes):
                own, *column = self.dynamic.written(lane)
                into[j] = into[j] + own
                for row, value in zip(across, column, strict=True):
                    row[j] = row[j] + value
        return tuple(weighted([*row, b], [*lanes, f]) for row, b, f in zip(across, into, added, strict=True))

    def read_of(self, lanes: Lanes) -> list[Tensor]:
        """A_m H."""
        assert self.out is not None
        rows = entries(self.out.view(-1, len(lanes)))
        if self.dynamic is not None:
            for j, lane in enumerate(lanes):
                for row, value in zip(rows, self.dynamic.read(lane), strict=True):
                    row[j] = row[j] + value
        return [weighted(row, lanes) for row in rows]


@register_operator
class HyperConnections(_Mixed, Wide):
    """n lanes of D features; at the end everything reads their sum."""

    name = "hc"
    title = "HyperConnections"
    formula = "u = Am*H, H' = Ar*H + B*f over n lanes; dynamic: + s*tanh(W*rmsnorm(H)) to each"
    paper = "Hyper-Connections, ICLR 2025, arXiv 2409.19606"
    reader = "hc"

    def build(self) -> None:
        n = self.config.streams
        self.matrices(n, self.config.dim, torch.eye(n)[(self.config.position + 1) % n])

    def step(self, x: Tensor, f: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        lanes = self.lanes(x, state)
        lanes = self.mixed(lanes, [f] * len(lanes))
        return (total(lanes),) if self.config.last else (*self.read_of(lanes), *lanes)


class Dynamic(nn.Module):
    """What a lane, or a part, adds to the entries that weigh it: scale * tanh(W rmsnorm(h)), one number a position each."""

    def __init__(self, connection: Connection, dim: int, writes: int, reads: int) -> None:
        super().__init__()
        self.axis, self.ndim = connection.config.axis, connection.config.ndim
        self.norm = nn.Parameter(torch.ones(dim))
        self.of_write = connection.linear(dim, writes)
        nn.init.zeros_(self.of_write.weight)
        self.into_scale, self.across_scale = (nn.Parameter(torch.full((1,), 0.01)) for _ in range(2))
        if reads:
            self.of_read = connection.linear(dim, reads)
            nn.init.zeros_(self.of_read.weight)
            self.out_scale = nn.Parameter(torch.full((1,), 0.01))

    def written(self, h: Tensor) -> list[Tensor]:
        """To its entry of B, and to each of its column of A_r."""
        own, *column = self._bounded(self.of_write, h)
        return [self.into_scale.to(h.dtype) * own, *(self.across_scale.to(h.dtype) * value for value in column)]

    def read(self, h: Tensor) -> list[Tensor]:
        """To its column of A_m."""
        return [self.out_scale.to(h.dtype) * value for value in self._bounded(self.of_read, h)]

    def _bounded(self, layer: nn.Module, h: Tensor) -> tuple[Tensor, ...]:
        norm = self.norm if self.axis == -1 else self.norm.view(-1, *(1,) * (self.ndim - 2))
        normed = rms_normed(h, self.axis) * norm.to(h.dtype)
        found: Lanes = torch.tanh(mapped(layer, normed)).split(1, self.axis)
        return found


class _Constrained(Wide):
    """Matrices on a manifold: A_m is positive, B between 0 and 2, A_r doubly stochastic, all of one map of the whole wide stream behind a norm.

    `of_write` and `of_read` are the map of all n D features in n pieces, one a lane; the biases are what it gives at the start, where it is 0;
    the gates scale what it adds.
    """

    needs = frozenset({"maps", "whole stream", "plain links"})

    def build(self) -> None:
        n = self.config.streams
        self.count = n + self.mixing()
        self.of_write = nn.ModuleList(self.linear(self.config.dim, self.count) for _ in range(n))
        self.write_bias = nn.Parameter(torch.zeros(self.count))
        self.into_gate, self.across_gate = (nn.Parameter(torch.full((1,), 0.01)) for _ in range(2))
        if not self.config.last:
            self.of_read = nn.ModuleList(self.linear(self.config.dim, n) for _ in range(n))
            self.read_bias = nn.Parameter(torch.empty(n))
            self.read_gate = nn.Parameter(torch.full((1,), 0.01))

    def initialise(self) -> None:
        n = self.config.streams
        for layer in [*self.of_write, *([] if self.config.last else self.of_read)]:
            layer.weight.zero_()
        self.write_bias[n:] = self.mixing_start()
        if not self.config.last:
            self.read_bias.fill_(-1.0)  # as published code has it: were all alike, equal lanes would learn alike, and stay equal
            self.read_bias[(self.config.position + 1) % n] = 1.0

    def mixing(self) -> int:
        """How many logits A_r is made of."""
        raise NotImplementedError  # each of the two ways to A_r has its own

    def mixing_start(self) -> Tensor:
        """Where they start."""
        raise NotImplementedError  # each of the two ways to A_r has its own

    def mixed(self, logits: Sequence[Tensor]) -> list[list[Tensor]]:
        """A_r, row by row, of its logits."""
        raise NotImplementedError  # each of the two ways to A_r has its own

    def step(self, x: Tensor, f: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        lanes, n = self.lanes(x, state), self.config.streams
        logits = self._logits(lanes, self.of_write)
        bias = self.write_bias.split(1)
        into = [2 * torch.sigmoid(self.into_gate * value + b) for value, b in zip(logits[:n], bias[:n], strict=True)]
        across = self.mixed([self.across_gate * value + b for value, b in zip(logits[n:], bias[n:], strict=True)])
        lanes = tuple(weighted([*across[i], into[i]], [*lanes, f]) for i in range(n))
        if self.config.last:
            return (total(lanes),)
        read = zip(self._logits(lanes, self.of_read), self.read_bias.split(1), strict=True)
        return weighted([torch.sigmoid(self.read_gate * value + b) for value, b in read], lanes), *lanes

    def _logits(self, lanes: Lanes, maps: nn.ModuleList) -> tuple[Tensor, ...]:
        """Of the wide stream behind a norm over all its n D features, each of size 1 on the feature axis, in float32 at least."""
        axis = self.config.axis
        squares = [dot(lane, lane, axis) for lane in lanes]
        square = total(squares) / (self.config.dim * len(lanes))
        wide = [mapped(layer, lane).to(square.dtype) for layer, lane in zip(maps, lanes, strict=True)]
        found: Lanes = (total(wide) * torch.rsqrt(square + EPS)).split(1, axis)
        return found


@register_operator
class ManifoldHyperConnections(_Constrained):
    """A_r by Sinkhorn: exp of its logits, its columns and its rows divided by their sums in turn, the rows last."""

    name = "mhc"
    title = "ManifoldHyperConnections"
    formula = "u = s(p)*H, H' = Sinkhorn(q)*H + 2*s(r)*f; p, q, r = gate*W*rmsnorm(H) + bias"
    paper = "mHC: Manifold-Constrained Hyper-Connections, arXiv 2512.24880"
    reader = "mhc"
    rounds = Option(20, "Rounds of Sinkhorn", minimum=1)

    def mixing(self) -> int:
        return int(self.config.streams**2)

    def mixing_start(self) -> Tensor:
        return (torch.eye(self.config.streams, device="cpu") * 4 - 4).flatten()

    def mixed(self, logits: Sequence[Tensor]) -> list[list[Tensor]]:
        n, axis = self.config.streams, self.config.axis
        # [..., n, n], small beside the stream: the rounds run in two kernels each.
        matrix = torch.cat(list(logits), axis).movedim(axis, -1)
        matrix = matrix.unflatten(-1, (n, n))
        matrix = torch.exp(matrix - matrix.amax((-2, -1), keepdim=True))
        for _ in range(self.config.rounds):
            matrix = matrix / matrix.sum(-2, keepdim=True)
            matrix = matrix / matrix.sum(-1, keepdim=True)
        flat = matrix.flatten(-2).movedim(-1, axis).split(1, axis)
        return [list(flat[i * n : (i + 1) * n]) for i in range(n)]


@register_operator
class PermutedHyperConnections(_Constrained):
    """A_r without rounds: a convex combination of all n! permutations of the lanes, which is doubly stochastic by itself."""

    name = "mhc-lite"
    title = "PermutedHyperConnections"
    formula = "u = s(p)*H, H' = sum_k softmax(q)_k*P_k*H + 2*s(r)*f; p, q, r = gate*W*rmsnorm(H) + bias"
    paper = "mHC-lite: You Don't Need 20 Sinkhorn-Knopp Iterations, 2026"
    reader = "mhc-lite"
    streams = Option(4, "Lanes n of the stream", minimum=2, maximum=5)

    def build(self) -> None:
        self.permutations = list(itertools.permutations(range(self.config.streams)))
        super().build()

    def mixing(self) -> int:
        return len(self.permutations)

    def mixing_start(self) -> Tensor:
        start = torch.full((len(self.permutations),), -8.0, device="cpu")
        start[0] = 0.0  # that which leaves all in its place
        return start

    def mixed(self, logits: Sequence[Tensor]) -> list[list[Tensor]]:
        n, axis = self.config.streams, self.config.axis
        weights = torch.softmax(torch.cat(list(logits), axis), axis).split(1, axis)
        rows: list[list[Tensor]] = []
        for i in range(n):
            chosen = [[weights[k] for k, order in enumerate(self.permutations) if order[i] == j] for j in range(n)]
            rows.append([total(terms) for terms in chosen])
        return rows


@register_operator
class FracConnections(_Mixed):
    """The features in m parts are the lanes: H is as wide as the stream, and all matrices are [m, m], but B, [m]."""

    name = "frac"
    title = "FracConnections"
    formula = "u = Am*H, H' = Ar*H + B*f over m parts of the features; dynamic: + s*tanh(W*rmsnorm(H)) to each"
    paper = "Frac-Connections: Fractional Extension of Hyper-Connections, arXiv 2503.14125"
    reader = "frac"
    parts = Option(4, "Parts m of the features", minimum=2)

    def build(self) -> None:
        self.width = self.config.dim // self.config.parts
        self.matrices(self.config.parts, self.width, torch.eye(self.config.parts))

    def step(self, x: Tensor, f: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        axis = self.config.axis
        wide = state[0] if state else x
        parts = self.mixed(wide.split(self.width, axis), f.split(self.width, axis))
        whole = torch.cat(parts, axis)
        return (whole,) if self.config.last else (torch.cat(self.read_of(parts), axis), whole)

    @classmethod
    def unfit(cls, stream: Sequence[SiteConfig]) -> str:
        wrong = next((config for config in stream if config.dim % config.parts), None)
        return "" if wrong is None else f"its {wrong.dim} features do not divide into {wrong.parts} parts of one size (parts)."
