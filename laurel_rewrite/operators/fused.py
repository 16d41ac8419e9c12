"""x' of LAuReL in as few passes over the stream as the algebra allows: b and g go into the maps, which are small beside a batch.

    a f + b (x + U V x)                      =  a f + b x + (b U) (V x)
    a f + b (x + U V sum_j g_j x_{i-j})      =  a f + b x + (b U) (sum_j (g_j V) x_{i-j})
    a f + b (x + sum_j g_j U_j V_j x_{i-j})  =  a f + b x + b [g_0 U_0, g_1 U_1, ..] [V_0 x_i; V_1 x_{i-1}; ..]
    a f + b (x + sum_j g_j x_{i-j})          =  a f + b (1 + g_0) x + b g_1 x_{i-1} + ..

So what b and g get from the maps are sums over weights, not over the stream, backward keeps nothing of D features but x, f and the earlier
skips, and one product brings back all lags. A compiled graph does the sum in the kernel of the norm that follows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laurel_rewrite.private import has_hooks

_MAPS: dict[type[nn.Module], Any] = {
    nn.Linear: nn.functional.linear,
    nn.Conv1d: nn.functional.conv1d,
    nn.Conv2d: nn.functional.conv2d,
    nn.Conv3d: nn.functional.conv3d,
}


Term = tuple[Tensor, Tensor | None]
"""A tensor of the stream's shape and its weight, of shape (1,); None is 1."""


def fits(window: Sequence[Tensor], f: Tensor, layers: Sequence[nn.Module]) -> bool:
    """Whether these are dense tensors, and layers that are their weights alone.

    What is traced, exported, nested, sharded, quantised, hooked or wrapped is left to the formula, layer by layer, and so is what has no values:
    costs are counted of the formula.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]  # torch's
        return False
    if not all(type(value) is Tensor and not (value.is_nested or value.is_meta) for value in (*window, f)):
        return False
    if not torch.compiler.is_compiling() and not all(_regular(value) for value in (window[0], f)):
        return False
    dtype = window[0].dtype
    return torch.promote_types(dtype, f.dtype) == dtype and all(_bare(layer, dtype) for layer in layers)


def _regular(value: Tensor) -> bool:
    """Whether axes of size 1 have the strides of a new tensor: others a sum corrects, and addcmul does not."""
    shape = value.shape
    return 1 not in shape or value.stride() == tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _bare(layer: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a call of a layer is the product with its weight and nothing else."""
    if type(layer) not in _MAPS or "forward" in layer.__dict__ or has_hooks(layer):
        return False
    weight: Any = layer.weight
    return type(weight) in (Tensor, nn.Parameter) and weight.dtype == dtype and layer.bias is None


def combined(
    window: Sequence[Tensor], f: Tensor, a: Tensor | None, b: Tensor | None, g: Tensor | None, pairs: Sequence[tuple[Any, Any]]
) -> Tensor:
    """a f + b (x + ...), what fits.

    Args:
        window: the skip and the states before it.
        a, b: of shape (1,), None for 1.
        g: one a state; None where there is the skip alone.
        pairs: (down, up) layers: one for all states, one a state, or none where the states are added as they are.
    """
    terms = [(window[0], b), (f, a)]
    if g is not None and not pairs:
        first, *others = (weight if b is None else weight * b for weight in g.chunk(g.numel()))
        terms = [(window[0], first + (1 if b is None else b)), (f, a), *zip(window[1:], others, strict=False)]
    out = _sum(terms)
    if not pairs:
        return out
    low, up = _low(window, pairs, g)
    up = up if b is None else up * b.to(up.dtype)
    layer = pairs[0][1]
    same = low.dtype == up.dtype == out.dtype  # which autocast makes different
    if same and isinstance(layer, nn.Linear) and out.is_contiguous() and not torch.compiler.is_compiling():
        return torch.addmm(out.view(-1, out.shape[-1]), low.reshape(-1, low.shape[-1]), up.t()).view_as(out)
    return out + _product(layer, up, low).to(out.dtype)


def _low(window: Sequence[Tensor], pairs: Sequence[tuple[Any, Any]], g: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the maps make of a window inside, and the weight that brings it back to D features."""
    if g is None:
        ((down, up),) = pairs
        return _product(down, down.weight, window[0]), up.weight
    weights = g.to(pairs[0][1].weight.dtype).chunk(g.numel())
    if len(pairs) == 1:
        ((down, up),) = pairs
        parts = [_product(down, weight * down.weight, state) for weight, state in zip(weights, window, strict=False)]
        return functools.reduce(torch.add, parts), up.weight
    used = list(zip(window, pairs, weights, strict=False))
    axis = -1 if isinstance(pairs[0][0], nn.Linear) else 1
    low = torch.cat([_product(down, down.weight, state) for state, (down, _), _ in used], axis)
    return low, torch.cat([weight * up.weight for _, (_, up), weight in used], 1)


def _product(layer: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """A weight in the place of a layer's own, times x."""
    out: Tensor = _MAPS[type(layer)](x, weight)
    return out


def _sum(terms: Sequence[Term]) -> Tensor:
    """The weighted sum."""
    (x, weight), *rest = terms
    out = x if weight is None else x * weight.to(x.dtype)
    for value, weight in rest:
        out = out + value if weight is None else torch.addcmul(out, value, weight.to(x.dtype))
    return out
