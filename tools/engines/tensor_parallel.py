"""Tensor parallel: two processes share each matrix; under sequence parallelism the stream, too."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from laurel_rewrite.training.tensor_parallel import check_parallel, parallel_plan
from tools.engines.case import Case, Result, trained
from tools.engines.table import engine


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))


def matrices(model: nn.Module) -> dict[str, ParallelStyle]:
    """The usual plan of a Llama's blocks."""
    plan: dict[str, ParallelStyle] = {}
    for place in range(len(model.model.layers)):
        columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
        plan |= {f"model.layers.{place}.{name}": ColwiseParallel() for name in columns}
        plan |= {f"model.layers.{place}.{name}": RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
    return plan


@engine("tensor parallel", "`parallelize_module`, ColwiseParallel and RowwiseParallel; the connections stay as they are", processes=2)
def by_matrices(case: Case) -> Result:
    model = case.model
    parallelize_module(model, mesh(), matrices(model))
    check_parallel(model)
    return trained(model, case.ids)


@engine("tensor parallel, all DTensors", "the same with `parallel_plan(model, sequence_dim=None)`", processes=2)
def by_matrices_and_connections(case: Case) -> Result:
    model = case.model
    parallelize_module(model, mesh(), {**matrices(model), **parallel_plan(model, sequence_dim=None)})
    return trained(model, case.ids)


def along_the_sequence(model: nn.Module) -> dict[str, ParallelStyle]:
    """The usual plan of a Llama with sequence parallelism: between the blocks' products each process has a part of the sequence."""
    plan = matrices(model)
    for place in range(len(model.model.layers)):
        block = f"model.layers.{place}"
        plan[f"{block}.input_layernorm"] = plan[f"{block}.post_attention_layernorm"] = SequenceParallel()
        plan[f"{block}.self_attn"] = PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": Shard(1)}, desired_input_kwarg_layouts={"hidden_states": Replicate()}
        )
        plan[f"{block}.mlp"] = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
        plan[f"{block}.self_attn.o_proj"] = plan[f"{block}.mlp.down_proj"] = RowwiseParallel(output_layouts=Shard(1))
    plan["model.embed_tokens"] = RowwiseParallel(input_layouts=Replicate())
    plan["model.layers.0"] = PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),), use_local_output=True)
    plan["model.norm"] = SequenceParallel()
    plan["lm_head"] = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
    return plan


@engine("sequence parallel", "the same with SequenceParallel norms and `parallel_plan(model)`", processes=2)
def by_sequence(case: Case) -> Result:
    model = case.model
    parallelize_module(model, mesh(), {**along_the_sequence(model), **parallel_plan(model)})
    check_parallel(model)
    return trained(model, case.ids)


@engine("sequence parallel, checkpointed blocks", "the same with transformers' checkpointing", processes=2)
def by_sequence_checkpointed(case: Case) -> Result:
    model = case.model
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    parallelize_module(model, mesh(), {**along_the_sequence(model), **parallel_plan(model)})
    return trained(model, case.ids)


@engine("sequence parallel and FSDP2", "the same and `fully_shard` on a 1 x 2 mesh; gradients are clipped, an optimiser steps", processes=2)
def by_sequence_and_sharded(case: Case) -> Result:
    model = case.model
    both = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, both["tp"], {**along_the_sequence(model), **parallel_plan(model)})
    for block in model.model.layers:
        fully_shard(block, mesh=both["dp"])
    fully_shard(model, mesh=both["dp"])
    check_parallel(model)
    result = trained(model, case.ids)
    expected = torch.stack([gradient.norm() for gradient in result.gradients.values()]).norm()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.testing.assert_close(norm.full_tensor(), expected, rtol=1e-5, atol=0)  # float32
    torch.optim.AdamW(model.parameters()).step()
    return result


FORGOTTEN = dict.fromkeys(("local", "window", "whole history", "wide stream"), "this connection has plain parameters")


@engine(
    "sequence parallel, connections forgotten", "without `parallel_plan`; `check_parallel(model)` finds it", processes=2, refuses=FORGOTTEN
)
def by_sequence_forgotten(case: Case) -> Result:
    model = case.model
    parallelize_module(model, mesh(), along_the_sequence(model))
    check_parallel(model)
    return trained(model, case.ids)


@engine("transformers' tp_plan", "the model's own plan, applied by transformers to the rewritten model", processes=2)
def by_transformers(case: Case) -> Result:
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    model: Any = case.model
    whole = model.state_dict()
    apply_tensor_parallelism(model, mesh(), model._expand_parallel_plan(model.tp_plan))
    parts = {name: value for name, value in model.state_dict().items() if isinstance(value, DTensor)}
    assert len(parts) >= 7 * len(model.model.layers)
    shared = {name: distribute_tensor(whole[name], value.device_mesh, value.placements) for name, value in parts.items()}
    model.load_state_dict({**whole, **shared}, assign=True)
    return trained(model, case.ids)
