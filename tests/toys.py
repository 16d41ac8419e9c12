"""Small models, one for each way in which people write a residual connection (`CASES` says how many sites each has), and `found`, which
detects in a forward that a test writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laurel_rewrite import detect
from laurel_rewrite.detection.sites import Sites

D = 16


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.linear = nn.Linear(D, D)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(F.gelu(self.linear(self.norm(x))))


class TwoBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = Branch()
        self.g = Branch()


class Plain(TwoBranches):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(x)
        return self.g(x) + x


class InPlace(TwoBranches):
    def forward(self, x: Tensor) -> Tensor:
        out = self.f(x)
        out += x  # the branch is the target
        out = out * 1.0
        out += self.g(out)  # the skip is the target
        return out


class Calls(TwoBranches):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.add(x, self.f(x))
        return self.g(y).add(y)


class AddInPlace(TwoBranches):
    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        y.add_(x)
        return y + self.g(y)


class Parallel(TwoBranches):
    """One site with two branches, the skip first."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) + self.g(x)


class ParallelSkipLast(TwoBranches):
    def forward(self, x: Tensor) -> Tensor:
        return self.f(x) + self.g(x) + x


class ParallelSkipMiddle(TwoBranches):
    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x) + x
        y += self.g(x)
        return y


class BrokenLines(TwoBranches):
    def forward(self, x: Tensor) -> Tensor:
        x = (
            x  # the skip
            + self.f(x)
        )
        return (self.g(x)
                + x)  # fmt: skip


class Loop(nn.Module):
    """Three sites on one line."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Branch() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """One LAuReL module a turn."""
        for layer in self.layers:
            x = x + layer(x)
        return x


def add_dropped(x: Tensor, residual: Tensor, rate: float, training: bool) -> Tensor:
    out = F.dropout(x, rate, training)
    return residual + out


class Helper(TwoBranches):
    """Two sites in one helper function."""

    def forward(self, x: Tensor) -> Tensor:
        x = add_dropped(self.f(x), x, 0.1, self.training)
        return add_dropped(self.g(x), x, rate=0.1, training=self.training)


class Methods(TwoBranches):
    """Sites in a method that is called once, and in one that is called twice."""

    def once(self, x: Tensor) -> Tensor:
        return x + self.f(x)

    def joined(self, x: Tensor, f: Tensor) -> Tensor:
        return f + x

    def forward(self, x: Tensor) -> Tensor:
        x = self.once(x)
        x = self.joined(x, self.g(x))
        return self.joined(x, self.f(x))


class Parent(TwoBranches):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class Child(Parent):
    """The parent's forward, and its own attributes."""


class Super(TwoBranches):
    """Calls its base's method by `super()`."""

    def extra_repr(self) -> str:
        return super().extra_repr()

    def forward(self, x: Tensor) -> Tensor:
        super().extra_repr()
        return x + self.f(x)


class Tied(nn.Module):
    """One block called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Plain()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.block(x)
        return x


class PostNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Branch() for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](x + self.layers[0](x))
        return self.norms[1](x + self.layers[1](x))


class Images(nn.Module):
    """A projection and an identity site, channels first, with in-place ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.Sequential(nn.Conv2d(8, D, 1, 2, bias=False), nn.BatchNorm2d(D))
        self.first = nn.Sequential(nn.Conv2d(8, D, 3, 2, padding=1), nn.ReLU(), nn.Conv2d(D, D, 3, padding=1), nn.BatchNorm2d(D))
        self.second = nn.Sequential(nn.Conv2d(D, D, 3, padding=1), nn.BatchNorm2d(D), nn.ReLU(inplace=True), nn.Conv2d(D, D, 1))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out = self.first(x)
        out += self.down(x)
        x = self.relu(out)
        return self.relu(self.second(x) + x)


class Sequence1d(nn.Module):
    """[B, C, L]: channels first in three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(D, D, 3, padding=1)
        self.norm = nn.BatchNorm1d(D)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.norm(self.conv(x)))


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    sites: int
    shape: tuple[int, ...] = (2, 5, D)
    modules: int | None = None
    """LAuReL modules, where fewer than sites."""


CASES = {
    "plain": Case(Plain, 2),
    "in_place": Case(InPlace, 2),
    "calls": Case(Calls, 2),
    "add_in_place": Case(AddInPlace, 2),
    "parallel": Case(Parallel, 1),
    "parallel_skip_last": Case(ParallelSkipLast, 1),
    "parallel_skip_middle": Case(ParallelSkipMiddle, 1),
    "broken_lines": Case(BrokenLines, 2),
    "loop": Case(Loop, 3),
    "helper": Case(Helper, 2),
    "methods": Case(Methods, 3),
    "child": Case(Child, 1),
    "super": Case(Super, 1),
    "tied": Case(Tied, 6, modules=2),
    "post_norm": Case(PostNorm, 2),
    "images": Case(Images, 2, (2, 3, 8, 8)),
    "sequence_1d": Case(Sequence1d, 1, (2, D, 9)),
    "transformer_layer": Case(lambda: nn.TransformerEncoderLayer(D, 2, 32, batch_first=True), 2),
}


X = torch.randn(2, 5, D)
IMAGE = torch.randn(2, D, 8, 8)


def kinds(sites) -> dict[str, int]:
    return dict(Counter(site.kind for site in sites))


def reasons(sites) -> set[str]:
    return {rejected.reason for rejected in sites.rejected}


class Net(nn.Module):
    """`body(self, x)` as a forward, with some layers at hand."""

    def __init__(self, body) -> None:
        super().__init__()
        self.body = body
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)
        self.norm = nn.LayerNorm(D)
        self.narrow = nn.Linear(D // 2, D // 2)
        self.table = nn.Parameter(torch.randn(5, D))
        self.gate = nn.Parameter(torch.randn(D))

    def forward(self, x):
        return self.body(self, x)


def conv(channels: int = D, out: int | None = None, stride: int = 1, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(channels, out or channels, kernel, stride, kernel // 2)


def found(body, x: Tensor = X, **layers: nn.Module) -> Sites:
    """The sites of `body(self, x)` with these layers at hand."""
    net = Net(body)
    for name, layer in layers.items():
        setattr(net, name, layer)
    return detect(net, (x,))


def axes(sites: Sites) -> list[tuple[int, int | None]]:
    return [(site.axis, site.dim) for site in sites]
