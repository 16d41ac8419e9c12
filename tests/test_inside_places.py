"""Inside models of every form: sums of several branches, loops, shared modules, operators of each class, parts in several processes; and the
plans that come of it."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import away_from_start
from processes import together
from test_inside import (
    CLOSE,
    FIGURES,
    batches_of,
    cosine,
    difference,
    example,
    looked,
    loss,
    losses,
    mean,
    rms,
    share,
    stack_loss,
    told,
    trained,
)
from test_operators import TOYS
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from toys import CASES, D

import laurel_rewrite.operators.registry as registry
from laurel_rewrite import ConfigError, LaurelConfig, detect, rewrite
from laurel_rewrite.backends.module.surgery import rewriting_of
from laurel_rewrite.backends.rewriting import apply_plan
from laurel_rewrite.lab.inside import SiteInside, gaining, inside
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.plan import Plan
from laurel_rewrite.testing import Stack, moved, stacks_for

# Forms of sums, and other operators


@pytest.mark.parametrize("variant", ["rw+lr", "toy-gate"])
@pytest.mark.parametrize(
    "case", ["parallel", "parallel_skip_last", "parallel_skip_middle", "in_place", "add_in_place", "loop", "tied", "post_norm"]
)
@pytest.mark.usefixtures("toys")
def test_forms_of_sums(case, variant):
    """A sum of several branches, adds in place, turns of a loop and shared modules: leaving the branch out is multiplying it by zero."""
    x = torch.randn(2, 5, D)
    base = CASES[case].make().eval()
    model = away_from_start(rewrite(base, (x,), variant=variant, **({"rank": 4} if variant == "rw+lr" else {}))).eval()
    found = inside(model, [x, 2 * x], stack_loss)
    assert len(found.sites) == (CASES[case].modules or CASES[case].sites)
    whole = losses(model, [x, 2 * x], stack_loss)
    assert found.plain.loss == pytest.approx(difference(losses(base, [x, 2 * x], stack_loss), whole)[0], **CLOSE)  # branches added first
    if case.startswith("parallel"):
        (site,), branches = found.sites, (base.f, base.g)
        with torch.no_grad():
            out, f = model(x), sum(branch(x) for branch in branches)
            twice = model(2 * x), sum(branch(2 * x) for branch in branches)
        axes = [(x, f, out), (2 * x, twice[1], twice[0])]
        right = [mean(rms(values[place], -1) for values in axes) for place in range(3)]
        right += [mean(cosine(values[place], values[0], -1) for values in axes) for place in (1, 2)]
        assert [getattr(site, figure) for figure in FIGURES] == pytest.approx(right, **CLOSE)
        assert site.share == pytest.approx(mean(share(o - a, o, -1) for a, _, o in axes), **CLOSE)
        changed = copy.deepcopy(model)
        for branch in (changed.f, changed.g):
            branch.register_forward_hook(lambda module, args, output: output * 0)
        assert told(site.without_branch) == pytest.approx(difference(losses(changed, [x, 2 * x], stack_loss), whole), rel=1e-9, abs=1e-12)
        assert site.plain.loss == pytest.approx(found.plain.loss, **CLOSE)
    if case == "tied":
        assert [site.calls for site in found.sites] == [3.0, 3.0]
        assert sum(site.share for site in found.sites) + found.streams[0].start == pytest.approx(1.0, abs=1e-5)  # of float32 sums


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.usefixtures("toys")
def test_operators_of_every_class(name):
    operator = registry.operator(name)
    torch.manual_seed(0)
    for stack in stacks_for(operator).values():
        base, x = stack().eval(), torch.randn(2, 5, D)
        model = moved(rewrite(base, (x,), variant=name)).eval()
        batches = [x, torch.randn(3, 4, D)]
        found = inside(model, batches, stack_loss)
        whole = losses(model, batches, stack_loss)
        if name != "toy-shrunk":  # which keeps the branches' weights as it made them
            assert told(found.plain) == pytest.approx(difference(losses(base, batches, stack_loss), whole), rel=1e-9, abs=1e-12)
        for site, branch in zip(found.sites, [branch for block in model.blocks for branch in ("f", "g") if block], strict=True):
            assert math.isfinite(site.without_branch.loss)
            assert (site.plain is None) == ("whole stream" in operator.needs)
            owner = site.site.rpartition(".")[0]
            changed = copy.deepcopy(model)
            changed.get_submodule(f"{owner}.{branch}").register_forward_hook(lambda module, args, output: output * 0)
            right = difference(losses(changed, batches, stack_loss), whole)
            assert told(site.without_branch) == pytest.approx(right, rel=1e-9, abs=1e-12)  # of float64 means
            assert site.singular_values == {}
        if name in ("toy-dense", "toy-behind"):
            connections = sites_of(model)
            assert all(site.depth == pytest.approx(connections[site.site].a.flip(0).tolist(), rel=1e-6) for site in found.sites)
        else:
            assert all(site.depth == () for site in found.sites)
        json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.usefixtures("toys")
def test_attention_over_depth_that_differs_by_position_is_averaged(monkeypatch):
    x = torch.randn(2, 5, D)
    model = moved(rewrite(CASES["plain"].make(), (x,), variant="toy-dense")).eval()

    def by_position(self: Any, x: Tensor, f: Tensor, *state: Tensor) -> Tensor:
        return self.a.flip(0).view(-1, 1, 1) * torch.linspace(0, 2, 5)  # whose mean is 1

    monkeypatch.setattr(type(model.laurel_0), "depth_weights", by_position)
    for site in inside(model, [x], stack_loss).sites:
        assert site.depth == pytest.approx(model.get_submodule(site.site).a.flip(0).tolist(), rel=1e-6)  # float32


def test_two_passes_of_one_stream_have_each_their_final_state():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enc = CASES["plain"].make()

        def forward(self, a: Tensor) -> Tensor:
            return self.enc(a) + 0 * self.enc(2 * a)

    x = torch.randn(2, 5, D)
    model = away_from_start(rewrite(Twice(), (x,), variant="rw+lr+pa", rank=4)).eval()
    found = inside(model, [x], stack_loss)
    assert [site.calls for site in found.sites] == [2.0, 2.0]
    assert sum(site.share for site in found.sites) + found.streams[0].start == pytest.approx(1.0, abs=1e-5)  # of float32 sums


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padded_batches():
    layer = nn.TransformerEncoderLayer(D, 2, 32, batch_first=True)
    x, mask = torch.randn(2, 5, D), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    model = rewrite(nn.TransformerEncoder(layer, 2), (x,), {"src_key_padding_mask": mask}, variant="rw")
    found = inside(away_from_start(model), [x], lambda model, x: model(x, src_key_padding_mask=mask).square().mean())
    assert all(math.isfinite(site.skip) and math.isfinite(site.share) for site in found.sites)


# In several processes


def spread(model: nn.Module, engine: str) -> nn.Module:
    if engine == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if engine == "fsdp1":
        policy = ModuleWrapPolicy({type(model.blocks[0])})
        return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def looked_in_parts(folder: Path, rank: int) -> None:
    x = torch.randn(2, 5, D)
    model = away_from_start(rewrite(Stack(), (x,), variant="rw+lr+pa", rank=4))
    found = {}
    for engine in ("", "ddp", "fsdp1", "fsdp2"):
        held = spread(copy.deepcopy(model), engine) if engine else model
        found[engine] = [inside(held, [x, 2 * x], stack_loss) for _ in range(2)]
        held(x).sum().backward()
    torch.save(found, folder / str(rank))


@pytest.mark.engines
def test_models_in_parts_are_looked_at_as_one(tmp_path):
    for found in together(looked_in_parts, tmp_path):
        for engine, (first, again) in found.items():
            assert again == first, engine
            for site, right in zip(first.sites, found[""][0].sites, strict=True):
                assert (site.site, site.learned, site.depth) == (right.site, pytest.approx(right.learned, **CLOSE), right.depth)
                assert (site.share, *told(site.without_branch), *told(site.plain)) == pytest.approx(
                    (right.share, *told(right.without_branch), *told(right.plain)), **CLOSE
                )


# A plan with the sites that gain


def test_sites_that_gain_are_those_whose_plain_sum_costs():
    found = looked("llama")
    right = [site.site for site in found.sites if site.plain.loss > 2 * site.plain.error]
    assert gaining(found) == right
    assert 0 < len(right) < 6
    assert gaining(found, errors=1e9) == []


def chosen(sites: tuple[SiteInside, ...]) -> list[str]:
    """The second and the last: lags and the beginnings of streams change."""
    return [sites[1].site, sites[-1].site]


@pytest.mark.parametrize("name", ["llama", "albert", "resnet18"])
def test_a_plan_with_some_sites_alone_is_carried_out(name, tmp_path):
    base, model = trained(name)
    case = example(name)
    plan = rewriting_of(model).plan.only(chosen(looked(name).sites))
    plan.write(tmp_path / "plan.toml")
    again = Plan.read(tmp_path / "plan.toml")
    assert again.sites == plan.sites
    applied = apply_plan(base, detect(base, case.args, case.kwargs), again, case.args, case.kwargs)
    assert all(check.passed for check in applied.checks)
    connections = sites_of(applied.model)
    assert list(connections) == [row.id for row in plan.sites]
    lags = {"llama": [1, 2], "albert": [3], "resnet18": [1, 1]}[name]  # of 3, as many as there are
    assert [module.config.lags for module in connections.values()] == lags
    if name == "llama":
        found = inside(away_from_start(applied.model), batches_of(name), loss)
        assert [len(site.depth) for site in found.sites] == lags


@pytest.mark.usefixtures("toys")
def test_turns_of_a_loop_and_whole_streams_in_a_plan_of_fewer_sites():
    x = torch.randn(2, 5, D)
    base = CASES["loop"].make()
    plan = rewriting_of(rewrite(base, (x,), variant="rw")).plan
    one = plan.only([plan.sites[1].id])
    assert list(sites_of(rewrite(base, (x,), plan=one))) == [one.sites[0].id]
    sites = detect(CASES["plain"].make(), (x,))
    whole = Plan.from_sites(sites, LaurelConfig("toy-dense"))
    assert whole.only(["laurel_0", "laurel_1"]).sites == whole.sites
    with pytest.raises(ConfigError, match="laurel_1: toy-dense needs every connection of its stream, and laurel_0 is not chosen"):
        whole.only(["laurel_1"])
    with pytest.raises(ConfigError, match="The plan has no site 'laurel_7'"):
        whole.only(["laurel_7"])
    with pytest.raises(ConfigError, match="one site at least"):
        whole.only([])


@pytest.mark.usefixtures("toys")
def test_of_an_operator_that_needs_its_whole_stream_all_sites_gain_or_none():
    x = torch.randn(2, 5, D)
    model = moved(rewrite(CASES["plain"].make(), (x,), variant="toy-lanes")).eval()
    found = inside(model, [x, 2 * x], stack_loss)
    flipped = inside(model, [x, 2 * x], lambda model, batch: -stack_loss(model, batch))
    assert sorted([gaining(found, errors=0.5), gaining(flipped, errors=0.5)]) == [[], ["laurel_0", "laurel_1"]]
