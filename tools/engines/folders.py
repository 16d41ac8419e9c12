"""Folders that `laurel_rewrite.save` wrote: from shards, and for processes that build the model without values."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel

from laurel_rewrite import ConfigError, load, rewrite, save
from laurel_rewrite.operators.connections import sites_of
from tools.engines.case import Case, Result, trained
from tools.engines.checkpoints import shared_folder
from tools.engines.data_parallel import on_halves, sharded
from tools.engines.table import engine


def saved_and_loaded(model: nn.Module, case: Case) -> Result:
    """What one plain process makes of the folder that all processes wrote of a model."""
    folder = Path(shared_folder()) / "out"
    (folder.parent / "a file").touch()
    try:
        save(model, folder.parent / "a file")
    except ConfigError:  # in all processes, for one that waited for the others would wait for ever
        save(model, folder)
    distributed.barrier()
    return trained(load(folder), case.ids)


@engine("save of FSDP2", "`laurel_rewrite.save` of shards on two processes, loaded on one", processes=2)
def of_shards(case: Case) -> Result:
    return saved_and_loaded(sharded(case.model, mesh=init_device_mesh("cpu", (2,))), case)


@engine("save of FSDP1", "`laurel_rewrite.save` of flat parameters on two processes, loaded on one", processes=2)
def of_flat_parameters(case: Case) -> Result:
    return saved_and_loaded(FullyShardedDataParallel(case.model, use_orig_params=True, device_id=torch.device("cpu")), case)


@engine("meta device, sharded", "a folder without weights, FSDP2, `to_empty`, start, whole weights into the shards", processes=2)
def from_a_recipe(case: Case) -> Result:
    folder = Path(shared_folder()) / "out"
    if distributed.get_rank() == 0:
        save(case.model, folder, weights="none")
    distributed.barrier()
    model = sharded(load(folder, device="meta"), mesh=init_device_mesh("cpu", (2,)))
    model.to_empty(device="cpu")
    started = rewrite(case.base, (), {"input_ids": case.ids}, variant=case.variant, verify=False, **case.options)
    for site, connection in sites_of(model).items():
        for name, parameter in connection.named_parameters():
            whole = started.get_parameter(f"{site}.{name}")
            assert torch.equal(parameter.full_tensor(), whole), f"{site}.{name} has not its start"
    right = case.model
    set_model_state_dict(model, right.state_dict(), options=StateDictOptions(full_state_dict=True))
    for name, buffer in right.named_buffers():  # those that no checkpoint has
        model.get_buffer(name).copy_(buffer)
    return on_halves(model, case)
