"""What the code of a module begins with whose connections come into its graph later, so that it never runs without them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from laurel_rewrite.errors import LaurelError
from laurel_rewrite.operators.protocol import Connection


@torch.library.custom_op("laurel_rewrite::unserved", mutates_args=(), schema="(Tensor x, str owner) -> Tensor")
def _unserved(x: Tensor, owner: str) -> Tensor:
    raise LaurelError(_why(owner))


@_unserved.register_fake
def _like(x: Tensor, owner: str) -> Tensor:
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.owner = inputs[1]


def _backward(ctx: Any, gradient: Tensor) -> Any:
    raise LaurelError(_why(ctx.owner))


_unserved.register_autograd(_backward, setup_context=_keep)

OP = torch.ops.laurel_rewrite.unserved.default
"""Gives what it gets, in a graph; it has no value, and is to be taken out."""


def marked(module: nn.Module, owner: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a module's forward, of which the first tensor comes through the op. That it looks at the mode of the module's connections
    makes TorchDynamo look, too, before it takes a graph of another mode.

    Raises:
        LaurelError: the module runs outside of a compiler, or is exported.
    """
    for child in module._modules.values():
        if isinstance(child, Connection) and child.training is not module.training:
            break
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
        raise LaurelError(_why(owner))
    for place, value in enumerate(args):
        if isinstance(value, Tensor):
            return (*args[:place], OP(value, owner), *args[place + 1 :]), kwargs
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            return args, {**kwargs, name: OP(value, owner)}
    return args, kwargs


def _why(owner: str) -> str:
    return (
        f"{owner or 'The model'} has connections that only its graphs get: it was prepared for laurel_rewrite.compile_backend, and runs without. Call what "
        "torch.compile(model, backend=laurel_rewrite.compile_backend(model)) returned; if it was that, TorchDynamo gave up, and "
        "TORCH_LOGS=recompiles,graph_breaks says why."
    )
