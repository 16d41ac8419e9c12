"""What becomes of the sums that were found: ids, sites of several modules, ranks, sizes that depend on data."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from toys import D, Net, X, axes, kinds, reasons

from laurel_rewrite import ConfigError, detect, rewrite
from laurel_rewrite.passes import InsertLaurel
from laurel_rewrite.plan import LaurelConfig, Plan


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        x = x + torch.tanh(self.a(x))
        return x + torch.tanh(self.b(x))


# Ids


class SharedAndLooped(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.layers = Block(), nn.ModuleList(nn.Linear(D, D) for _ in range(3))

    def forward(self, x):
        x = self.block(x)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        for _ in range(2):
            x = self.block(x)
        return x


def traced(model: nn.Module) -> fx.GraphModule:
    """A graph that tells from which line each node comes, as `fx.symbolic_trace` does not."""
    tracer = fx.Tracer()
    tracer.record_stack_traces = True
    return fx.GraphModule(model, tracer.trace(model))


def test_a_graph_has_the_ids_of_the_module_it_comes_from():
    model = SharedAndLooped()
    ids = [site.id for site in detect(model, (X,))]
    assert ids[:3] + ids[-1:] == ["block.laurel_0", "block.laurel_1", "laurel_0.0", "block.laurel_1@2"]
    program = torch.export.export(model, (X,))
    for graph in (program, program.module(), traced(model)):
        assert [site.id for site in detect(graph, (X,))] == ids
    # Without lines the graph tells the calls of a module, and not a loop.
    plain = [site.id for site in detect(fx.symbolic_trace(model), (X,))]
    assert plain == [f"laurel_{id[-1]}" if id.startswith("laurel") else id for id in ids]


def test_calls_of_a_shared_module_share_their_laurel_in_a_graph():
    model = SharedAndLooped().eval()
    graph = traced(model)
    plan = Plan.from_sites(detect(graph, (X,)), LaurelConfig(variant="rw+lr+pa", rank=4))
    assert [(row.id, row.calls) for row in plan.sites][:3] == [("block.laurel_0", 3), ("block.laurel_1", 3), ("laurel_0.0", 1)]
    result = InsertLaurel(plan)(graph).graph_module
    torch.testing.assert_close(result(X), model(X), rtol=0, atol=0)  # the start is exact
    better = rewrite(model, (X,), variant="rw+lr+pa", rank=4).eval()
    assert {name for name, _ in better.named_parameters() if "laurel" in name} == {n for n, _ in result.named_parameters() if "laurel" in n}


# Sums of sums


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


class Fusion(nn.Module):
    """RefineNet and DPT: a residual connection of a child is one operand of the parent's sum."""

    def __init__(self):
        super().__init__()
        self.inner, self.other = Inner(), nn.Linear(D, D)

    def forward(self, x, y):
        return self.other(x) + self.inner(y)


class Nested(Fusion):
    """The parent's sum is a residual connection too."""

    def forward(self, x):
        return x + self.inner(self.other(x))


def test_a_residual_connection_in_one_module_stands_alone_in_the_sum_of_another():
    model = Fusion().eval()
    for graph, args in ((model, (X, X + 1)), (torch.export.export(model, (X, X + 1)), ()), (fx.symbolic_trace(model), (X, X + 1))):
        assert [site.id for site in detect(graph, args)] == ["inner.laurel_0"]
    better = rewrite(model, (X, X + 1), rank=4).eval()
    torch.testing.assert_close(better(X, X + 1), model(X, X + 1), rtol=0, atol=0)  # the start is exact
    assert [site.id for site in detect(Nested(), (X,))] == ["inner.laurel_0", "laurel_0"]


def test_within_one_module_it_is_one_sum():
    def body(s, x):
        y = s.norm(x)
        return x + (y + torch.tanh(s.a(y)))

    sites = detect(Net(body), (X,))
    assert len(sites) == 1
    assert len(sites.bindings["laurel_0"].residual.branches) == 2


# Sizes


class Packed(nn.Module):
    """Tokens without padding: their number is known only when the model runs."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x, mask):
        padded = x.new_zeros(*mask.shape, D)
        padded[mask] = torch.tanh(self.linear(x))
        return x + padded[mask]


def test_a_size_that_is_known_only_at_run_time_is_no_other_size():
    mask = torch.arange(24).reshape(4, 6) % 4 > 0
    sites = detect(Packed(), (torch.randn(18, D), mask))
    assert kinds(sites) == {"identity": 1}
    assert axes(sites) == [(-1, D)]


def test_a_size_of_one_may_be_a_broadcast():
    class Broadcast(Packed):
        def forward(self, x, mask):
            return self.linear(x[mask]) + x[:1]

    sites = detect(Broadcast(), (torch.randn(18, D), torch.arange(18) % 2 > 0))
    assert not sites.sites
    assert "broadcast" in reasons(sites)


# Ranks


class Bottle(Net):
    def __init__(self):
        super().__init__(None)
        self.down, self.small, self.up = nn.Linear(D, 3), nn.Linear(3, 3), nn.Linear(3, D)

    def forward(self, x):
        x = x + F.relu(self.a(x))
        y = self.down(x)
        y = y + F.relu(self.small(y))
        return self.up(y)


def test_a_site_that_is_narrower_than_the_rank_gets_its_own_size():
    plan = Plan.from_sites(detect(Bottle(), (X,)), LaurelConfig(rank=8))
    assert [(row.id, row.rank) for row in plan.sites] == [("laurel_0", 8), ("laurel_1", 3)]
    assert plan.narrowed == ("laurel_1: rank 3 instead of 8, for D is 3",)
    text = plan.to_toml()
    assert "# laurel_1: rank 3 instead of 8, for D is 3.\n" in text
    assert Plan.from_toml(text).sites == plan.sites
    model = Bottle().eval()
    torch.testing.assert_close(rewrite(model, (X,), rank=8).eval()(X), model(X), rtol=0, atol=0)  # the start is exact
    assert not Plan.from_sites(detect(model, (X,)), LaurelConfig(variant="rw", rank=8)).narrowed


def test_a_rank_that_fits_nowhere_or_that_a_person_wrote_is_an_error():
    sites = detect(Bottle(), (X,))
    with pytest.raises(ConfigError, match=r"laurel_0: rank 17 is above its feature size 16. No other site has a larger one"):
        Plan.from_sites(sites, LaurelConfig(rank=17))
    text = Plan.from_sites(sites, LaurelConfig(rank=8)).to_toml().replace("rank = 3", "rank = 4")
    with pytest.raises(ConfigError, match="site laurel_1: rank 4 is not between 1 and its feature size 3"):
        Plan.from_toml(text)
