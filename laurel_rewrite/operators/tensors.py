"""What residual operators are written in: maps, norms and weighted sums over the stream's feature axis, wherever that is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

EPS = 1e-6
"""Added to mean squares before their root is taken."""


def mapped(layer: Any, x: Tensor) -> Tensor:
    """A map over the features in the layer's own dtype, returned in that of x: a skip may be kept in float32 beside a bfloat16 branch."""
    weight = layer.weight  # of a quantised layer it is packed, or a method
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        out: Tensor = layer(x)
        return out.to(x.dtype)
    value = x.to(weight.dtype)
    if weight.dtype == torch.float64 and torch.compiler.is_exporting() and weight.ndim > 2:
        # onnxruntime has no convolution of float64: the same as products with [B, C, positions].
        out = (weight.flatten(1) @ value.flatten(2)).unflatten(2, value.shape[2:])  # type: ignore[no-untyped-call]  # torch's
    else:
        out = layer(value)
    return out.to(x.dtype)


def rms_normed(x: Tensor, axis: int, eps: float = EPS) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over an axis, in float32 at least."""
    return x * inverse_rms(x, axis, eps).to(x.dtype)


def inverse_rms(x: Tensor, axis: int, eps: float = EPS) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over an axis, which stays, in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.rsqrt(wide.square().mean(axis, keepdim=True) + eps)


def dot(x: Tensor, y: Tensor, axis: int) -> Tensor:
    """The product of two values over an axis, which stays, in float32 at least."""
    wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return (x.to(wide) * y.to(wide)).sum(axis, keepdim=True)


def weighted(weights: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """sum_i w_i v_i in the order of the values, which are not stacked: with all weights 1 it is their sum, bit for bit.

    Args:
        weights: of shapes that multiply the values.
        values: of one shape.
    """
    total: Tensor | None = None
    for weight, value in zip(weights, values, strict=True):
        term = weight.to(value.dtype) * value
        total = term if total is None else total + term
    assert total is not None
    return total
