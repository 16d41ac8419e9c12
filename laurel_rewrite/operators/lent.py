"""Connections in the subgraphs of control flow, whose gradients go to operands alone: their tensors are lent to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laurel_rewrite.operators.protocol import Connection
from laurel_rewrite.private import FakeTensorMode, TorchDispatchMode


class Lent(nn.Module):
    """Calls a connection that lies elsewhere in the model with tensors in the place of its own.

    Args:
        connection: no child of this module, which has no parameters.
    """

    connection: Connection

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self.__dict__["connection"] = connection

    def forward(self, own: Sequence[Tensor], *operands: Tensor, **given: Any) -> Any:
        """What the connection gives for operands, with `own` as its parameters and buffers, in the order of `tensors_of`."""
        names = [name for name, _ in tensors_of(self.connection)]
        return torch.func.functional_call(self.connection, dict(zip(names, own, strict=True)), operands, given)


def tensors_of(connection: Connection) -> Iterator[tuple[str, Tensor]]:
    """What a connection computes with, by name."""
    yield from connection.named_parameters()
    yield from connection.named_buffers()


def draws(connection: Connection, shape: Sequence[int | str]) -> bool:
    """Whether a connection without history draws random numbers in training. Where control flow computes its gradients, it runs once more, and
    draws others."""
    mode, seen, training = FakeTensorMode(allow_non_fake_inputs=True), _Draws(), connection.training  # type: ignore[no-untyped-call]  # torch's
    like = next((p for p in connection.parameters()), torch.empty(0))
    sizes = [size if isinstance(size, int) else 2 for size in shape]
    try:
        connection.train()
        with mode, torch.no_grad():
            x, f = (torch.empty(sizes, dtype=like.dtype, device=like.device) for _ in range(2))
            with seen:
                connection.connect(x, f, state=(), **({"n": f} if connection.needs_input else {}))
    finally:
        connection.train(training)
    return seen.found


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found = self.found or torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
        return func(*args, **(kwargs or {}))
