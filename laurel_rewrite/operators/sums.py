"""Sums and states in the shapes, types and memory layouts that the source's own sums had."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from laurel_rewrite.errors import LaurelError


@fx.wrap
def state_like(state: Tensor, x: Tensor, lead: int, reader: str) -> Tensor:
    """A state in the shape and dtype of the skip, behind leading dimensions of its own; LaurelError where it has another size."""
    front = state.shape[:lead] if lead else torch.Size()  # a nested tensor may have neither a shape nor strides
    if not torch.compiler.is_compiling() and front.numel() * x.numel() != state.numel():
        shapes = f"a state of shape {list(state.shape)} beside a skip of shape {list(x.shape)}"
        raise LaurelError(f"{reader} reads {shapes}: with these inputs the stream changes its size. Use an operator without history there.")
    if state.is_nested and x.is_nested:
        return state.to(x.dtype)
    return state.reshape(*front, *x.shape).to(x.dtype)


def scaled(x: Tensor, weight: Tensor) -> Tensor:
    """A weight of shape (1,) times x. A nested tensor, which torch.nn.TransformerEncoder makes of a padded batch, takes only a number."""
    if isinstance(x, Tensor) and x.is_nested:  # which a value that fx traces is not
        weight = weight.squeeze(0)
    return weight.to(x.dtype) * x


def add(x: Tensor, f: Tensor, side: int) -> Tensor:
    """x + f, or f + x where side is 1: the same numbers, in the memory layout of the first."""
    return f + x if side else x + f


@fx.wrap
def laid_out(out: Tensor, x: Tensor, f: Tensor, side: int) -> Tensor:
    """`out` with the strides that `add(x, f, side)` has, whatever operator computed it from them.

    Mostly it has them: this mends what torch's rules make of expanded, strided and broadcast operands. A compiled graph has its own layouts.
    """
    if torch.compiler.is_compiling() or out.is_nested or x.stride() == f.stride() == out.stride():
        return out
    strides = _strides_of_sum(x, f, side)
    return out if out.stride() == strides else out.new_empty_strided(out.shape, strides).copy_(out)


@fx.wrap
def laid_out_like(out: Tensor, y: Tensor) -> Tensor:
    """`out` in the memory layout of y, in whose place it is."""
    if torch.compiler.is_compiling() or out.is_nested or out.stride() == y.stride():
        return out
    return torch.empty_like(y).copy_(out)


def _strides_of_sum(x: Tensor, f: Tensor, side: int) -> tuple[int, ...]:
    """By torch's rules: a memory format that both operands have, else what its general rule says, which the meta device knows alone."""
    formats = [torch.contiguous_format, *{4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(x.ndim, [])]
    for layout in formats:
        if x.shape == f.shape and x.is_contiguous(memory_format=layout) and f.is_contiguous(memory_format=layout):
            return torch.empty(x.shape, device="meta", memory_format=layout).stride()
    left, right = (torch.empty_strided(t.shape, t.stride(), device="meta") for t in (x, f))
    return add(left, right, side).stride()
