"""A connection gets its start wherever its parameters are: on the meta device first, wrapped, by engines that ask modules one by one."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from conftest import away_from_start, real
from processes import together
from torch import nn
from torch.distributed.fsdp import fully_shard
from toys import CASES, D

from laurel_rewrite import rewrite
from laurel_rewrite.operators.connections import sites_of


def on_meta(variant: str, **options) -> tuple[nn.Module, nn.Module]:
    """A rewritten model, and the same on the meta device."""
    made = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        with torch.device(device):
            made.append(rewrite(CASES["plain"].make(), (torch.randn(2, 5, D, device=device),), variant=variant, **options))
    return made[0], made[1]


def starts(model: nn.Module) -> dict[str, torch.Tensor]:
    return {f"{site}.{name}": p for site, connection in sites_of(model).items() for name, p in connection.named_parameters()}


OPTIONS = {"rw+lr+pa": {"rank": 4, "init_down": "xavier"}, "toy-gate": {}, "toy-lanes": {}}


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize("variant", OPTIONS)
def test_what_leaves_the_meta_device_is_started(variant):
    model, empty = on_meta(variant, **OPTIONS[variant])
    empty.to_empty(device="cpu")
    for name, parameter in starts(empty).items():
        assert torch.equal(parameter, starts(model)[name]), name


@pytest.mark.parametrize("deep", [False, True])
def test_an_engine_that_resets_modules_one_by_one_gets_the_start(deep):
    """As FSDP1 does: `to_empty(recurse=False)` and `reset_parameters` of each module that has parameters, outermost first."""
    model, empty = on_meta("rw+lr", rank=4)
    if deep:
        empty = pickle.loads(pickle.dumps(copy.deepcopy(empty)))
    for module in empty.modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
            module.reset_parameters()
    for name, parameter in starts(empty).items():
        assert torch.equal(parameter, starts(model)[name]), name


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_transformers_init_weights_keeps_the_start(name):
    example = real(name)
    model = rewrite(example.model, example.args, example.kwargs, variant="rw+lr", rank=4)
    before = {key: value.clone() for key, value in starts(model).items()}
    model.init_weights()
    model.apply(model._init_weights)
    empty = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    empty.init_weights()
    empty.apply(empty._init_weights)
    for key, value in before.items():
        assert torch.equal(starts(model)[key], value), key
        assert torch.equal(starts(empty)[key], value), key


def test_a_start_does_not_depend_on_the_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        low = rewrite(CASES["plain"].make(), (torch.randn(2, 5, D),), variant="rw+lr", rank=4, init_down="xavier")
    finally:
        torch.set_default_dtype(torch.float32)
    high = rewrite(CASES["plain"].make(), (torch.randn(2, 5, D),), variant="rw+lr", rank=4, init_down="xavier")
    for key, value in starts(high).items():
        assert torch.equal(starts(low)[key], value.bfloat16()), key


def started_in_parts(folder: Path, rank: int) -> None:
    model = away_from_start(rewrite(CASES["plain"].make(), (torch.randn(2, 5, D),), variant="rw+lr+pa", rank=4, seed=3))
    for connection in sites_of(fully_shard(model)).values():
        connection.reset_parameters()
    torch.save({name: p.full_tensor() for name, p in model.named_parameters() if "laurel" in name}, folder / str(rank))


def test_sharded_connections_have_the_start_of_whole_ones(tmp_path):
    expected = rewrite(CASES["plain"].make(), (torch.randn(2, 5, D),), variant="rw+lr+pa", rank=4, seed=3).state_dict()
    for found in together(started_in_parts, tmp_path):
        assert len(found) == 10
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
