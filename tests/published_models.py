"""Small models, and the same as functions of their weights: what the definitions in `published.py` run over.

A convolutional model is turned around at the door of its branches, so that the definitions have the features last, as the papers do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

D = 16
HEADS = 2


# Models


class Attention(nn.Module):
    """Causal, with a map each for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(D, D) for _ in range(4))

    def forward(self, n: Tensor) -> Tensor:
        q, k, v = (layer(n).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, n: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(n)))


class PreNorm(nn.Module):
    """A block of a GPT."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attention, self.mlp = Attention(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class PostNorm(PreNorm):
    """A block of the first transformer."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_1(x + self.attention(x))
        return self.norm_2(x + self.mlp(x))


class Gpt(nn.Module):
    """Blocks, and a head behind a norm."""

    block: type[PreNorm] = PreNorm

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.block() for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class PostNormGpt(Gpt):
    block = PostNorm


class ConvBlock(nn.Module):
    """Two branches of convolutions, channels first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.GroupNorm(1, D), nn.GroupNorm(1, D)
        self.in_1, self.in_2 = nn.Conv2d(D, D, 3, padding=1), nn.Conv2d(D, D, 1)
        self.out_1, self.out_2 = nn.Conv2d(D, D, 1), nn.Conv2d(D, D, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out_1(torch.tanh(self.in_1(self.norm_1(x))))
        return x + self.out_2(torch.tanh(self.in_2(self.norm_2(x))))


class ConvNet(nn.Module):
    """Blocks, and a head behind a norm."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ConvBlock() for _ in range(blocks))
        self.norm, self.head = nn.GroupNorm(1, D), nn.Conv2d(D, D, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


# The same models as functions of their weights. No module is called: what hangs on modules is not part of the formulas.


@dataclass
class Branch:
    """What is added at one place.

    Attributes:
        p: the parameters and buffers of the operator there, maps as [out, in].
        norm: the norm in front of the branch, or behind its sum.
        inner: the branch without its norm, of what its queries, keys and values read, where it is an attention.
    """

    p: dict[str, Tensor]
    norm: Callable[[Tensor], Tensor]
    inner: Callable[..., Tensor]
    attends: bool

    def __call__(self, u: Tensor) -> Tensor:
        return self.inner(self.norm(u))


Net = list[Branch]


def layer_norm(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias

    return run


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    return x @ layer.weight.T + layer.bias


def attention(a: Attention) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        k, v = (q, q) if k is None else (k, v)
        q, k, v = linear(a.q, q), linear(a.k, k), linear(a.v, v)
        size, heads = D // HEADS, []
        later = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
        for h in range(HEADS):
            part = slice(h * size, (h + 1) * size)
            logits = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size)
            heads.append(logits.masked_fill(later, -math.inf).softmax(-1) @ v[..., part])
        return linear(a.out, torch.cat(heads, -1))

    return run


def mlp(m: Mlp) -> Callable[[Tensor], Tensor]:
    return lambda n: linear(m.down, F.gelu(linear(m.up, n)))


def last(x: Tensor) -> Tensor:
    return x.movedim(1, -1)


def first(x: Tensor) -> Tensor:
    return x.movedim(-1, 1).contiguous()


def conv_norm(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: last(F.group_norm(first(x), 1, norm.weight, norm.bias, norm.eps))


def convolutions(one: nn.Module, two: nn.Module) -> Callable[[Tensor], Tensor]:
    def run(n: Tensor) -> Tensor:
        inner = torch.tanh(F.conv2d(first(n), one.weight, one.bias, padding=one.padding))
        return last(F.conv2d(inner, two.weight, two.bias, padding=two.padding))

    return run


def values_of(connection: nn.Module) -> dict[str, Tensor]:
    """By name, 1x1 convolutions as matrices."""
    named = itertools.chain(connection.named_parameters(), connection.named_buffers())
    return {name: value.flatten(1) if value.ndim > 3 else value for name, value in named}


def net_of(model: nn.Module) -> Net:
    """The branches of a rewritten model, in order."""
    found = []
    for block in model.blocks:
        p, q = values_of(block.laurel_0), values_of(block.laurel_1)
        if isinstance(block, ConvBlock):
            found.append(Branch(p, conv_norm(block.norm_1), convolutions(block.in_1, block.out_1), attends=False))
            found.append(Branch(q, conv_norm(block.norm_2), convolutions(block.in_2, block.out_2), attends=False))
        else:
            found.append(Branch(p, layer_norm(block.norm_1), attention(block.attention), attends=True))
            found.append(Branch(q, layer_norm(block.norm_2), mlp(block.mlp), attends=False))
    return found


def by_hand(model: nn.Module, x: Tensor, definition: Callable[..., Tensor], **options: Any) -> Tensor:
    """What a rewritten model must compute."""
    if isinstance(model, ConvNet):
        x = definition(net_of(model), last(x), **options)
        return F.conv2d(first(conv_norm(model.norm)(x)), model.head.weight, model.head.bias)
    return linear(model.head, layer_norm(model.norm)(definition(net_of(model), x, **options)))


def rms(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def blocks_of(net: Net) -> Iterator[tuple[Branch, Branch]]:
    return zip(net[::2], net[1::2], strict=True)
