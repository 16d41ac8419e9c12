"""The weights of a branch that an operator changes when it is put in, and as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.operators.plain import adding_plainly
from laurel_rewrite.operators.protocol import Connection


@torch.no_grad()
def prepare(model: nn.Module, factors: Mapping[str, Mapping[str, float]]) -> None:
    """Multiply weights of branches.

    Args:
        model: with its connections.
        factors: by site and by the parameter's name in the model.
    """
    for site, weights in factors.items():
        connection = model.get_submodule(site)
        assert isinstance(connection, Connection)
        for name, factor in weights.items():
            parameter = model.get_parameter(name)
            connection.prepared[name] = factor, parameter.detach().clone()
            parameter.mul_(factor)


@torch.no_grad()
def restore(model: nn.Module, connections: Iterable[Connection]) -> list[tuple[nn.Parameter, float]]:
    """Give the weights that these connections changed their old values back; what was trained since stays as it is.

    Returns:
        What was given back, with its factors.
    """
    restored = []
    for connection in connections:
        for name, (factor, before) in connection.prepared.items():
            parameter = model.get_parameter(name)
            if parameter.is_meta or torch.equal(parameter.to(before), before * factor):
                parameter.copy_(before)
                restored.append((parameter, factor))
    return restored


@contextlib.contextmanager
def plain_start(model: nn.Module) -> Iterator[None]:
    """Connections whose start is declared to be another function add plainly for a while, to branches as they were, which shows what the
    insertion alone does."""
    changed = [module for module in sites_of(model).values() if module.start_of(module.config) != "exact"]
    restored = restore(model, changed)
    try:
        with adding_plainly(changed):
            yield
    finally:
        with torch.no_grad():
            for parameter, factor in restored:
                parameter.mul_(factor)
