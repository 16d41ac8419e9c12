"""What a step returns: a value, or one apart for queries, keys and values; and a state."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Reads(NamedTuple):
    """A new value of the stream that the next branch, an attention, does not read as one: its queries, keys and values get their own, which go
    through the branch's norm as the value itself would. Each is of the stream's shape."""

    value: Tensor
    q: Tensor
    k: Tensor
    v: Tensor


def parted(result: Any) -> tuple[Any, tuple[Tensor, ...]]:
    """A value and a state, of what a step returned."""
    if isinstance(result, tuple) and not isinstance(result, Reads):
        return result[0], tuple(result[1:])
    return result, ()
