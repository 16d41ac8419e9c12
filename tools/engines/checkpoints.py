"""Checkpoints of a run: distributed ones, and one that goes on where it was stopped."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from tools.engines.case import Case, Result, loss_of, trained
from tools.engines.data_parallel import on_halves, sharded
from tools.engines.table import engine


def with_momentum(model: nn.Module) -> torch.optim.Optimizer:
    """An optimiser that keeps the gradient of its first step as its state, and changes nothing."""
    return torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)


def emptied(model: nn.Module) -> nn.Module:
    """The model with other weights and buffers as far as they are saved: what a checkpoint must bring."""
    with torch.no_grad():
        for value in model.state_dict().values():
            value.fill_(0.5)
    return model


def momentum(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    found = {name: optimiser.state[parameter]["momentum_buffer"] for name, parameter in model.named_parameters()}
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in found.items()}


def shared_folder() -> str:
    """A folder that all processes know."""
    names = [tempfile.mkdtemp() if distributed.get_rank() == 0 else ""]
    distributed.broadcast_object_list(names, src=0)
    return names[0]


def loaded(model: nn.Module, folder: str, **options: Any) -> torch.optim.Optimizer:
    """Read model and optimiser."""
    optimiser = with_momentum(model)
    weights, state = get_state_dict(model, optimiser)
    both = {"model": weights, "optimiser": state}
    checkpoint.load(both, checkpoint_id=folder, **options)
    set_state_dict(model, optimiser, model_state_dict=both["model"], optim_state_dict=both["optimiser"])
    return optimiser


def saved(model: nn.Module, optimiser: torch.optim.Optimizer, folder: str, **options: Any) -> None:
    weights, state = get_state_dict(model, optimiser)
    checkpoint.save({"model": weights, "optimiser": state}, checkpoint_id=folder, **options)


@engine("distributed checkpoint, 2 to 1", "saved from FSDP2 on two processes, loaded on one; model and optimiser", processes=2)
def two_to_one(case: Case) -> Result:
    folder = shared_folder()
    model = sharded(case.model, mesh=init_device_mesh("cpu", (2,)))
    optimiser = with_momentum(model)
    on_halves(model, case)
    optimiser.step()
    saved(model, optimiser, folder)
    distributed.barrier()
    alone = emptied(case.model)
    state = loaded(alone, folder, no_dist=True)
    return Result(trained(alone, case.ids).loss, momentum(alone, state))


@engine("distributed checkpoint, 1 to 2", "saved from a plain model on one process, loaded into FSDP2 on two", processes=2)
def one_to_two(case: Case) -> Result:
    folder = shared_folder()
    if distributed.get_rank() == 0:
        alone = case.model
        optimiser = with_momentum(alone)
        trained(alone, case.ids)
        optimiser.step()
        saved(alone, optimiser, folder, no_dist=True)
    distributed.barrier()
    model = sharded(emptied(case.model), mesh=init_device_mesh("cpu", (2,)))
    state = loaded(model, folder)
    found = momentum(model, state)
    return Result(on_halves(model, case).loss, found)


class Run:
    """A run with dropout in its attention, for as many steps as one likes."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.model = case.model
        for block in self.model.model.layers:
            block.self_attn.attention_dropout = 0.1
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def go(self, steps: int) -> None:
        for _ in range(steps):
            self.optimiser.zero_grad()
            loss_of(self.model, self.case.ids).backward()
            self.optimiser.step()

    def save(self, path: Path) -> None:
        state = {"model": self.model.state_dict(), "optimiser": self.optimiser.state_dict(), "random": torch.get_rng_state()}
        torch.save(state, path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        torch.set_rng_state(state["random"])


@engine("stopped and resumed", "model, optimiser and random state saved after 2 of 4 steps: the same weights, bit for bit")
def resumed(case: Case) -> Result:
    torch.manual_seed(1)
    whole = Run(case)
    before = copy.deepcopy(whole.model.state_dict())
    whole.go(4)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(1)
        first = Run(case)
        first.go(2)
        first.save(Path(folder) / "state.pt")
        torch.manual_seed(99)
        second = Run(case)
        second.load(Path(folder) / "state.pt")
        second.go(2)
    for name, value in second.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), f"{name} differs"
    after = case.model
    after.load_state_dict(before)
    return trained(after, case.ids)
