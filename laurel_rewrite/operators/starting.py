"""How a connection gets its start, wherever its parameters are: on a device, on none yet, or in shards on several processes.

A start follows from (configuration, site, seed) alone. So it is made once more on the CPU, whole, and every process copies its part.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from laurel_rewrite.private import HF_INITIALIZED


@contextlib.contextmanager
def own_draws(site: str, seed: int) -> Iterator[None]:
    """The CPU's generator in a state of the site's own; afterwards it is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(zlib.crc32(f"{seed}:{site}".encode()))
        yield


@contextlib.contextmanager
def built_in_float32(device: str) -> Iterator[None]:
    """New tensors are of float32 on a device, whatever the caller's defaults are."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def put_start(connection: Any, names: Collection[str] | None = None) -> None:
    """Set parameters and buffers of a connection to their start.

    Args:
        connection: none of whose parameters is on the meta device.
        names: of those to set; None for all. What was wrapped or replaced since (by an adapter, a quantisation) is left as it is.
    """
    twin = type(connection)(connection.config, site=connection.site, seed=connection.seed, device="cpu", dtype=torch.float32)
    own = _tensors(connection)
    for name, start in _tensors(twin).items():
        if name in own and (names is None or name in names) and own[name].shape == start.shape:
            own[name].copy_(_like(start, own[name]))
    mark_started(connection)


def mark_started(connection: nn.Module) -> None:
    """transformers' `init_weights` walks over modules and parameters, and would undo the start."""
    for started in (*connection.modules(), *connection.parameters()):
        setattr(started, HF_INITIALIZED, True)


def not_started(connection: nn.Module) -> set[str]:
    """Names of the parameters that were made anew since the connection got its start, and were not read from a checkpoint: those without
    the mark of transformers, which makes and reads them."""
    return {name for name, parameter in connection.named_parameters() if not getattr(parameter, HF_INITIALIZED, False)}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _like(value: Tensor, other: Tensor) -> Tensor:
    """A whole value beside another tensor, of which each process may hold a part."""
    value = value.to(device=other.device, dtype=other.dtype)
    if not torch.distributed.is_available():
        return value
    from torch.distributed.tensor import DTensor, Replicate

    if not isinstance(other, DTensor):
        return value
    mesh = other.device_mesh
    return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False).redistribute(placements=other.placements)
