"""Example inputs as people give them: a tensor, a tuple, a dictionary of keyword arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from laurel_rewrite.errors import ConfigError


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
