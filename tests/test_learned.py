"""What is logged of the weights that were learned, by site."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from conftest import away_from_start
from processes import together
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from toys import CASES, Branch, D

from laurel_rewrite import ConfigError, learned, rewrite
from laurel_rewrite.operators.config import SiteConfig
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.operators.families.laurel import Laurel
from laurel_rewrite.operators.registry import operator

CLOSE = {"rel": 1e-5}  # float32 in another order of sums


def rewritten(variant: str = "rw+lr+pa", case: str = "plain") -> nn.Module:
    return away_from_start(rewrite(CASES[case].make(), (torch.randn(2, 5, D),), variant=variant, rank=4))


@pytest.mark.parametrize("normalize", ["softmax", "sigmoid", "none", "paper"])
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("variant", ["rw", "lr", "pa", "rw+lr", "rw+pa", "lr+pa", "rw+lr+pa"])
def test_laurel_says_a_b_g_and_the_norm_of_each_map(variant, axis, normalize):
    """Against U V itself, D x D."""
    lags = 2 if "pa" in variant else 0
    module = Laurel(
        SiteConfig(variant, dim=D, axis=axis, ndim=4 if axis == 1 else 3, lags=lags, options={"rank": 4, "normalize": normalize})
    )
    away_from_start(nn.Sequential(module))
    expected = {}
    if "rw" in variant:
        w = module.mix.detach()
        a = {"softmax": 2 * w.softmax(0)[:1], "sigmoid": 2 * w.sigmoid(), "none": 1 + w[:1], "paper": w.softmax(0)[:1]}[normalize].item()
        b = {"softmax": 2 - a, "sigmoid": 2 - a, "paper": 1 - a}.get(normalize, 1 + w[-1].item())
        expected |= {"a": a, "b": b}
    expected |= {f"g.{lag}": module.g[lag].item() for lag in range(lags)}
    own = "lr" in variant and lags
    pairs = list(zip(module.down, module.up, strict=True)) if own else [(module.down, module.up)] if variant != "rw" else []
    for lag, (down, up) in enumerate(pairs):
        product = up.weight.detach().flatten(1).double() @ down.weight.detach().flatten(1).double()
        name = f"uv.{lag}" if own else "uv"
        expected[name] = product.norm().item()
        torch.testing.assert_close(
            module.singular_values()[name], torch.linalg.svdvals(product)[:4], rtol=1e-9, atol=1e-12
        )  # float64 in another order
    assert len(module.singular_values()) == len(pairs)
    assert {key: value.item() for key, value in module.learned().items()} == pytest.approx(expected, **CLOSE)
    assert not any(value.requires_grad or value.ndim for value in module.learned().values())


def test_at_the_start_it_is_the_plain_residual():
    model = rewrite(CASES["plain"].make(), (torch.randn(2, 5, D),), variant="rw+lr", rank=4)
    assert learned(model) == {site: {"a": 1.0, "b": 1.0, "uv": 0.0} for site in ("laurel_0", "laurel_1")}


@pytest.mark.usefixtures("toys")
def test_other_operators_say_small_parameters_by_value_and_others_by_size():
    small, vector, lanes = (operator(name).connection(SiteConfig(name, dim=D)) for name in ("toy-gate", "toy-vector", "toy-lanes"))
    away_from_start(nn.Sequential(small, vector, lanes))
    assert {key: value.item() for key, value in small.learned().items()} == {"a": small.a.item()}
    sizes = {name: (math.sqrt(sum(x * x for x in getattr(vector, name).tolist()) / D)) for name in "ab"}
    assert {key: value.item() for key, value in vector.learned().items()} == pytest.approx(sizes, **CLOSE)
    values = {f"mix.{place}": value for place, value in enumerate(lanes.mix.flatten().tolist())}
    assert {key: value.item() for key, value in lanes.learned().items()} == {**values, "b.0": lanes.b[0].item(), "b.1": lanes.b[1].item()}


def test_a_model_without_connections_says_nothing():
    assert learned(CASES["plain"].make()) == {}


def test_half_precision_and_float64():
    model = rewritten()
    expected = learned(model.double())
    assert learned(model.to(torch.bfloat16))["laurel_1"] == pytest.approx(expected["laurel_1"], rel=2e-2)  # 8 bits


def test_parameters_without_values_are_refused():
    with pytest.raises(ConfigError, match="laurel_0: its parameters are on the meta device"):
        learned(rewritten().to("meta"))


def test_paths_are_without_the_names_of_wrappers():
    model = nn.Sequential(rewritten())
    expected = learned(model)
    assert list(expected) == ["0.laurel_0", "0.laurel_1"]
    assert learned(torch.compile(model)) == learned(torch.compile(nn.DataParallel(model))) == expected
    model[0] = checkpoint_wrapper(model[0])
    assert learned(model) == expected


# In two processes

ENGINES = ("fsdp2", "fsdp1", "fsdp1 flat", "fsdp1 inner", "ddp")


def shard(model: nn.Module, engine: str) -> nn.Module:
    """A sequence of rewritten blocks, spread over the processes."""
    if engine == "fsdp2":
        for block in model:
            fully_shard(block)
        return fully_shard(model)
    if engine == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    policy = ModuleWrapPolicy({nn.Linear, Branch} if engine.endswith("inner") else {Branch, type(model[0])})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params="flat" not in engine, device_id=torch.device("cpu"))


def learned_in_parts(folder: Path, rank: int) -> None:
    blocks = nn.Sequential(rewritten(), rewritten("rw+lr"))
    before, found = learned(blocks), {}
    for engine in ENGINES:
        model = shard(copy.deepcopy(blocks), engine)
        first = learned(model)
        kinds = {type(p) for c in sites_of(model).values() for p in c.parameters()}
        model(torch.randn(2, 5, D)).square().mean().backward()
        found[engine] = first, learned(model), DTensor in kinds and len(kinds) == 1
    torch.save((before, found), folder / str(rank))


@pytest.mark.engines
def test_parts_in_several_processes_are_one(tmp_path):
    for before, found in together(learned_in_parts, tmp_path):
        assert list(found) == list(ENGINES)
        for engine, (first, after, still_spread) in found.items():
            assert still_spread == (engine == "fsdp2")
            for again in (first, after):
                assert list(again) == list(before)
                for site, numbers in before.items():
                    assert again[site] == pytest.approx(numbers, **CLOSE), (engine, site)
