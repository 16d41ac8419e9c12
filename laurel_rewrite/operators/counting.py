"""What a connection costs, counted by running it without values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from laurel_rewrite.operators.protocol import Connection
from laurel_rewrite.operators.state import FED
from laurel_rewrite.private import TorchDispatchMode, memory_id, pytree

_MOVES = frozenset(
    "aten::" + name for name in "view _unsafe_view t transpose permute expand slice select unsqueeze squeeze detach alias".split()
)


@dataclass(frozen=True)
class Counts:
    """For one position (token, pixel) of one site.

    Attributes:
        flops: what the operator declares, or products as torch counts them (a multiply and an add are two), and one for each element that another
            op computes.
        moved: elements of activations that its ops read and write, each for itself; those of the plain sum are 3 D.
        state: elements that it leaves for the next connection.
    """

    flops: int
    moved: int
    state: int


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    def __init__(self, parameters: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.parameters = parameters  # by their memory: they are read once for all positions
        self.flops = 0
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.name().partition(".")[0] in _MOVES:
            return out
        packet = func.overloadpacket
        if packet in flop_registry:
            self.flops += int(flop_registry[packet](*args, **(kwargs or {}), out_val=out))
        elif isinstance(out, torch.Tensor):
            self.flops += out.numel()
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        self.moved += sum(tensor.numel() for tensor in tensors if memory_id(tensor.untyped_storage()) not in self.parameters)
        return out


def counted(connection: Connection) -> Counts:
    """What a connection costs whose stream brings it what it leaves itself.

    Args:
        connection: on the meta device.
    """
    config = connection.config
    x = _position(connection)
    state: tuple[torch.Tensor, ...] = (x,) * (FED if config.fed else 0)
    with torch.no_grad():
        for _ in range(max(config.lags - 1, 0)):
            _, state = connection.connect(x, torch.empty_like(x), state=state, n=x)
    return _counted(connection, state)[0]


def counted_stream(connections: Iterable[Connection]) -> list[Counts]:
    """What the connections of a stream cost, each behind those before it.

    Args:
        connections: on the meta device, in order.
    """
    found: list[Counts] = []
    state: tuple[torch.Tensor, ...] = ()
    for connection in connections:
        counts, state = _counted(connection, state)
        found.append(counts)
    return found


def _counted(connection: Connection, state: tuple[torch.Tensor, ...]) -> tuple[Counts, tuple[torch.Tensor, ...]]:
    x = _position(connection)
    f = torch.empty_like(x)
    own = {memory_id(value.untyped_storage()) for value in connection.state_dict(keep_vars=True).values()}
    with torch.no_grad(), _Counter(own) as counter:  # what it runs on is there already, and costs nothing
        left = _left(connection, x, f, state)
    declared = connection.flops(connection.config)
    flops = counter.flops if declared is None else declared
    return Counts(flops, counter.moved, sum(value.numel() for value in left)), left


def state_behind(connection: Connection, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The state that a connection on the meta device leaves, for one position, of the state before it."""
    x = _position(connection)
    with torch.no_grad():
        return _left(connection, x, torch.empty_like(x), state)


def _left(connection: Connection, x: torch.Tensor, f: torch.Tensor, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    state = connection.shaped(state, x)  # a stream may go on with its positions in other dimensions, as Swin's does
    _, left = connection.connect(x, f, state=state, n=x)
    return connection.connect_behind(x, left)[1] if connection.config.linked else left


def _position(connection: Connection) -> torch.Tensor:
    """A stream of one position."""
    shape = [1] * connection.config.ndim
    shape[connection.config.axis] = connection.config.dim
    return torch.empty(shape, device="meta")
