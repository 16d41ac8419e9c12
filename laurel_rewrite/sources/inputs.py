"""Example inputs as people give them: a tensor, a tuple, a dictionary of keyword arguments; and copies for a model to write into."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from laurel_rewrite.errors import ConfigError
from laurel_rewrite.private import pytree


def call_inputs(args: Any = (), kwargs: Mapping[str, Any] | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and keyword arguments of a forward.

    Args:
        args: a tuple or list of arguments; one argument alone, such as a tensor; a dictionary of keyword arguments; None for no inputs.
        kwargs: more keyword arguments. A forward that takes a dictionary gets it as `({...},)`.

    Raises:
        ConfigError: kwargs is no dictionary.
    """
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise ConfigError(
            f"kwargs must be a dictionary of keyword arguments, not {type(kwargs).__name__}; arguments by position come before it."
        )
    named = dict(kwargs or {})
    if args is None:
        return (), named
    if isinstance(args, Mapping):
        return (), {**args, **named}
    return tuple(args) if isinstance(args, tuple | list) else (args,), named


def copied_inputs(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs again, so that what a model writes into them is its own."""
    memo: dict[int, Any] = {}
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and not leaf.is_leaf:
            memo[id(leaf)] = copied_tensor(leaf)
    given: tuple[tuple[Any, ...], dict[str, Any]] = copy.deepcopy((tuple(args), dict(kwargs)), memo)
    return given


def copied_tensor(tensor: Tensor) -> Tensor:
    """A copy with the strides of the original, which later calls cannot change."""
    plain = tensor.detach()
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized or any(stride == 0 for stride in tensor.stride()):
        return plain.clone()
    try:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(plain)
    except RuntimeError:  # its elements share memory
        return plain.clone()
