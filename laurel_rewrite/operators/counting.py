"""What a connection computes, counted by running it without values: FLOPs for operators that do not declare them."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from laurel_rewrite.operators.protocol import Connection

_MOVES = frozenset(
    "aten::" + name for name in "view _unsafe_view t transpose permute expand slice select unsqueeze squeeze detach alias".split()
)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            self.total += int(flop_registry[packet](*args, **(kwargs or {}), out_val=out))
        elif isinstance(out, torch.Tensor) and func._schema.name not in _MOVES:
            self.total += out.numel()
        return out


def count_flops(connection: Connection) -> int:
    """FLOPs of one position (token, pixel): products as torch counts them, and one for each element that another op computes.

    Args:
        connection: on the meta device.
    """
    config = connection.config
    shape = [1] * config.ndim
    shape[config.axis] = config.dim
    x, f = (torch.empty(shape, device="meta") for _ in range(2))
    state: tuple[torch.Tensor, ...] = ()
    with torch.no_grad():
        for _ in range(max(config.lags - 1, 0)):  # the state that its stream would have brought it
            _, state = connection.connect(x, f, state=state, n=x)
        with _Counter() as counter:
            _, left = connection.connect(x, f, state=state, n=x)
            if config.linked:
                connection.connect_behind(x, left)
    return int(counter.total)
