"""Several processes of one test, as an engine starts them."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.nn.functional  # before there is a group, which it would keep
from torch.multiprocessing import spawn


def together(function: Callable[..., None], folder: Path, *args: Any, world: int = 2) -> list[Any]:
    """Call a function of a module in several processes of one gloo group; what each leaves by `torch.save` in `folder / RANK` is given back.

    Args:
        function: called with the folder, its rank and `args`.
        folder: empty.
        world: number of processes.
    """
    spawn(_one, (function, folder, world, args), nprocs=world)
    return [torch.load(path, weights_only=False) if (path := folder / str(rank)).exists() else None for rank in range(world)]


def _one(rank: int, function: Callable[..., None], folder: Path, world: int, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="localhost")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    torch.manual_seed(0)
    function(folder, rank, *args)
    end_group()


def end_group() -> None:
    """End the group, and its threads: one that lives on can end a process that is ending."""
    gc.collect()  # models hold the group
    torch.distributed.destroy_process_group()
