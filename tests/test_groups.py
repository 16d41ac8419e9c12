"""Optimisers and the weights of connections: groups, and what is said of an optimiser that was built otherwise."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
from conftest import away_from_start, real
from processes import together
from test_learned import shard
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from toys import CASES, D

from laurel_rewrite import ConfigError, check_optimizer, param_groups, rewrite
from laurel_rewrite.operators import registry
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.operators.protocol import Connection

X = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(3))


def rewritten(variant: str = "rw+lr+pa") -> nn.Module:
    return away_from_start(rewrite(CASES["plain"].make(), (X,), variant=variant, rank=4))


def named(model: nn.Module, groups: list[dict]) -> dict[str, set[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}


def test_mixing_weights_have_a_group_of_their_own():
    model = rewritten()
    groups = param_groups(model, lr=1e-3, weight_decay=0.1, scalar_lr=5.0)
    found = named(model, groups)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("matrices", 1e-3, 0.1),
        ("vectors", 1e-3, 0.0),
        ("mixing", 5e-3, 0.0),
    ]
    assert found["mixing"] == {f"laurel_{n}.{w}" for n in (0, 1) for w in ("mix", "g")}
    assert found["vectors"] == {n for n, p in model.named_parameters() if p.ndim == 1 and "laurel" not in n}
    assert found["matrices"] == {n for n, p in model.named_parameters() if p.ndim == 2}
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_the_default_is_one_rate_and_empty_groups_are_left_out():
    assert {g["lr"] for g in param_groups(rewritten(), lr=1e-3, weight_decay=0.1)} == {1e-3}
    assert [g["name"] for g in param_groups(CASES["plain"].make(), lr=1e-3, weight_decay=0.1)] == ["matrices", "vectors"]


@pytest.mark.usefixtures("toys")
def test_small_matrices_mix_and_large_ones_do_not():
    """A matrix over the lanes of a wide stream is the stream's mixing, however many axes it has."""
    model = rewrite(CASES["plain"].make(), (X,), variant="toy-lanes")
    assert named(model, param_groups(model, lr=1e-3, weight_decay=0.1))["mixing"] == {
        f"laurel_{n}.{w}" for n in (0, 1) for w in ("mix", "b")
    }


def test_an_operators_rate_multiplies():
    @registry.register_operator
    class Slow(Connection):
        name = "toy-slow"
        formula = "x + a*f + W x"
        start = "inexact"
        needs = frozenset({"maps"})
        rate = 0.1

        def build(self):
            self.a, self.w = nn.Parameter(torch.ones(1)), self.linear(self.config.dim, self.config.dim)

        def initialise(self):
            self.w.weight.zero_()

        def step(self, x, f):
            return x + self.a * f + self.w(x)

    try:
        model = rewrite(CASES["plain"].make(), (X,), variant="toy-slow")
        groups = param_groups(model, lr=1e-3, weight_decay=0.1, scalar_lr=2.0)
    finally:
        registry.forget(["toy-slow"])
    assert [(g["name"], pytest.approx(g["lr"]), g["weight_decay"]) for g in groups] == [
        ("matrices", 1e-3, 0.1),
        ("matrices*0.1", 1e-4, 0.1),
        ("vectors", 1e-3, 0.0),
        ("mixing*0.1", 2e-4, 0.0),
    ]


def test_tied_and_frozen_parameters():
    example = real("gpt2")  # whose head is the embedding
    model = rewrite(example.model, example.args, example.kwargs, rank=4)
    model.transformer.h[0].requires_grad_(False)
    found = [p for group in param_groups(model, lr=1e-3, weight_decay=0.1) for p in group["params"]]
    assert len({id(p) for p in found}) == len(found)
    assert {id(p) for p in found} == {id(p) for p in model.parameters() if p.requires_grad}


def timms(name: str, groups: list[dict]) -> torch.optim.Optimizer:
    from timm.optim import create_optimizer_v2  # not in the processes that import this module: torchvision is declared once here

    return create_optimizer_v2(groups, opt=name)


OPTIMISERS = {
    "SGD": lambda groups: [torch.optim.SGD(groups, momentum=0.9)],
    "AdamW foreach": lambda groups: [torch.optim.AdamW(groups, foreach=True)],
    "AdamW fused": lambda groups: [torch.optim.AdamW(groups, fused=True)],
    "Adafactor": lambda groups: [torch.optim.Adafactor(groups)],
    "Muon for matrices": lambda groups: [torch.optim.Muon(groups[:1]), torch.optim.AdamW(groups[1:])],
    "timm's Lamb": lambda groups: [timms("lamb", groups)],
    "timm's Lion": lambda groups: [timms("lion", groups)],
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_optimisers_take_the_groups_and_schedulers_keep_their_ratios(name):
    model = rewritten()
    groups = param_groups(model, lr=1e-2, weight_decay=0.1, scalar_lr=0.5)
    optimisers = OPTIMISERS[name](groups)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=10) for optimiser in optimisers]
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        model(X).square().mean().backward()
        for optimiser, schedule in zip(optimisers, schedules, strict=True):
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    rates = {group["name"]: group["lr"] for optimiser in optimisers for group in optimiser.param_groups}
    assert list(rates) == ["matrices", "vectors", "mixing"]
    assert rates["vectors"] < 1e-2
    assert rates["mixing"] == pytest.approx(rates["vectors"] / 2, rel=1e-6)  # a float's multiplications
    assert check_optimizer(model, optimisers) == []


def test_without_gradients_decay_moves_matrices_alone():
    """Decoupled decay, by hand: p (1 - lr decay) for each matrix, and nothing else."""
    model = rewritten()
    optimiser = torch.optim.AdamW(param_groups(model, lr=0.1, weight_decay=0.5, scalar_lr=3.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimiser.step()
    for name, p in model.named_parameters():
        expected = before[name] * (1 - 0.1 * 0.5) if p.ndim == 2 else before[name]
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0)  # one multiplication in float32


@pytest.mark.parametrize("flat", [False, True])
def test_groups_come_back_from_a_distributed_checkpoint(flat):
    """Names and all, also in the flattened form that torchtitan writes."""
    model = rewritten()
    optimiser, fresh = (torch.optim.AdamW(param_groups(model, lr=lr, weight_decay=0.1, scalar_lr=0.5)) for lr in (1e-2, 1.0))
    model(X).square().mean().backward()
    optimiser.step()
    model.zero_grad()  # torch makes the states to read into where there are no gradients alone
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    get_optimizer_state_dict(model, fresh, options=options)
    set_optimizer_state_dict(model, fresh, get_optimizer_state_dict(model, optimiser, options=options), options=options)
    assert [(g["name"], g["lr"]) for g in fresh.param_groups] == [(g["name"], g["lr"]) for g in optimiser.param_groups]
    for p in model.parameters():
        assert torch.equal(fresh.state[p]["exp_avg"], optimiser.state[p]["exp_avg"])


# What is said of an optimiser


def test_decaying_mixing_weights_are_said(caplog):
    model = rewritten()
    with caplog.at_level(logging.WARNING, logger="laurel_rewrite"):
        (sentence,) = check_optimizer(model, torch.optim.AdamW(model.parameters(), weight_decay=0.1))
    assert sentence.startswith("4 mixing weights decay, laurel_0.mix by 0.1 first")
    assert "param_groups(model" in sentence
    assert sentence in caplog.messages
    assert check_optimizer(model, torch.optim.AdamW(model.parameters(), weight_decay=0.0)) == []
    assert check_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1)) == []


def test_parameters_that_nobody_trains_are_said():
    model = CASES["plain"].make()
    early = torch.optim.AdamW(param_groups(model, lr=1e-3, weight_decay=0.1))
    better = rewrite(model, (X,), variant="rw", inplace=True)
    (sentence,) = check_optimizer(better, early)
    assert sentence.startswith("The optimiser trains 2 parameters of connections not at all, laurel_0.mix first: build it")
    copied = rewrite(CASES["plain"].make(), (X,), variant="rw")
    (sentence,) = check_optimizer(copied, early)
    assert f"it has {len(list(CASES['plain'].make().parameters()))} parameters that the model has not" in sentence
    for module in sites_of(copied).values():
        module.requires_grad_(False)
    assert check_optimizer(copied, early) == []  # frozen on purpose


def test_an_optimiser_of_several_models_is_right():
    one, other = rewritten(), rewritten("rw")
    groups = [*param_groups(one, lr=1e-3, weight_decay=0.1), *param_groups(other, lr=1e-3, weight_decay=0.1)]
    assert check_optimizer(one, torch.optim.AdamW(groups)) == check_optimizer(other, torch.optim.AdamW(groups)) == []


def test_parameters_without_values_are_said():
    model = rewritten().to("meta")
    (sentence,) = check_optimizer(model, torch.optim.AdamW(param_groups(model, lr=1e-3, weight_decay=0.1)))
    assert "are on the meta device" in sentence


# In two processes


def grouped_in_parts(folder: Path, rank: int) -> None:
    found = {}
    blocks = nn.Sequential(rewritten(), rewritten("rw+lr"))
    early = torch.optim.AdamW(blocks.parameters(), weight_decay=0.1)
    whole = param_groups(blocks, lr=1e-2, weight_decay=0.1)
    for engine in ("fsdp2", "fsdp1", "ddp"):
        copied = copy.deepcopy(blocks)
        model = shard(copied, engine)
        groups = param_groups(model, lr=1e-2, weight_decay=0.1)
        optimiser = torch.optim.AdamW(groups)
        before = [g["params"][0].detach().clone() for g in groups]
        model(X).square().mean().backward()
        optimiser.step()
        moved = [old.numel() == 0 or not torch.equal(g["params"][0], old) for g, old in zip(groups, before, strict=True)]
        counts = [(g["name"], len(g["params"])) for g in groups]
        decays = check_optimizer(model, torch.optim.AdamW(model.parameters(), weight_decay=0.1))
        found[engine] = counts, moved, check_optimizer(model, optimiser), check_optimizer(model, early), decays
    flat = shard(copy.deepcopy(blocks), "fsdp1 flat")
    with pytest.raises(ConfigError, match="use_orig_params=True"):
        param_groups(flat, lr=1e-2, weight_decay=0.1)
    torch.save(([(g["name"], len(g["params"])) for g in whole], found), folder / str(rank))


def test_sharded_models_have_the_same_groups(tmp_path):
    """FSDP1 makes vectors of all parameters, which are matrices all the same."""
    for whole, found in together(grouped_in_parts, tmp_path):
        for counts, moved, right, stale, decays in found.values():
            assert counts == whole
            assert all(moved)
            assert right == []
            assert "parameters that the model has not, from before it was rewritten, sharded or moved" in stale[0]
            assert decays[0].startswith("6 mixing weights decay")
