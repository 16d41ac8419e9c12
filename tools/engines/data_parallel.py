"""Data parallel and sharded: each of two processes has half of the batch."""

from __future__ import annotations

import functools
import tempfile

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from tools.engines.case import Case, Result, gradients, trained
from tools.engines.table import HALF, engine


def on_halves(model: nn.Module, case: Case, prefix: str = "") -> Result:
    """Each process's half of the batch; the loss is the mean of both."""
    result = trained(model, case.ids.chunk(2)[distributed.get_rank()])
    loss = torch.tensor(result.loss)
    distributed.all_reduce(loss)
    return Result(loss.item() / 2, gradients(model, prefix))


@engine("DDP", "`DistributedDataParallel`, without find_unused_parameters; two steps", processes=2)
def ddp(case: Case) -> Result:
    model = DistributedDataParallel(case.model)
    on_halves(model, case)  # a second pass is where DDP misses gradients
    model.zero_grad()
    return on_halves(model, case, "module.")


def sharded(model: nn.Module, **options: object) -> nn.Module:
    """FSDP2, block by block."""
    for block in model.model.layers:
        fully_shard(block, **options)
    return fully_shard(model, **options)


@engine("FSDP2", "`fully_shard` per block", processes=2)
def fsdp2(case: Case) -> Result:
    return on_halves(sharded(case.model, mesh=init_device_mesh("cpu", (2,))), case)


@engine("FSDP2, mixed precision", "`MixedPrecisionPolicy(torch.bfloat16, torch.float32)`", processes=2, tolerance=HALF)
def fsdp2_mixed(case: Case) -> Result:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return on_halves(sharded(case.model, mesh=init_device_mesh("cpu", (2,)), mp_policy=policy), case)


@engine("FSDP2, checkpointed and compiled blocks", "`fully_shard(block)` of compiled blocks that transformers checkpoints", processes=2)
def fsdp2_checkpointed(case: Case) -> Result:
    model = case.model
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    for block in model.model.layers:
        block.compile(backend="aot_eager")
    return on_halves(sharded(model, mesh=init_device_mesh("cpu", (2,))), case)


@engine("FSDP2, CPU offload", "`CPUOffloadPolicy`, one process", gpu=True)
def fsdp2_offload(case: Case) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group("nccl", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            model = case.model
            for buffer in model.buffers():
                buffer.data = buffer.data.cuda()
            return trained(sharded(model, mesh=init_device_mesh("cuda", (1,)), offload_policy=CPUOffloadPolicy()), case.ids.cuda())
        finally:
            distributed.destroy_process_group()


@engine("FSDP1", "`FullyShardedDataParallel(use_orig_params=True)` per block", processes=2)
def fsdp1(case: Case) -> Result:
    model = case.model
    policy = ModuleWrapPolicy({type(model.model.layers[0])})
    whole = functools.partial(FullyShardedDataParallel, use_orig_params=True, auto_wrap_policy=policy, device_id=torch.device("cpu"))
    model = whole(model, sharding_strategy=ShardingStrategy.FULL_SHARD)
    result = on_halves(model, case)
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        return Result(result.loss, gradients(model))
