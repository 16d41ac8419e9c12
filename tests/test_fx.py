"""LAuReL in fx graphs: traced symbolically, and exported."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import away_from_start, real, slow
from torch import fx, nn
from torch.fx.passes.infra.pass_manager import PassManager
from toys import CASES, D

from laurel_rewrite import ConfigError, RewriteError, detect, rewrite
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.passes import InsertLaurel
from laurel_rewrite.plan import LaurelConfig, Plan

VARIANTS = ["rw", "lr", "pa", "rw+lr", "rw+pa", "lr+pa", "rw+lr+pa"]
TRACEABLE = [name for name in CASES if name not in ("transformer_layer",)]


def graph_of(model, args, how):
    if how == "symbolic":
        return fx.symbolic_trace(model)
    return torch.export.export(model, args, dynamic_shapes=[{0: torch.export.Dim.AUTO}], strict=False).module(check_guards=False)


def insert(graph, args, variant="rw+lr"):
    plan = Plan.from_sites(detect(graph, args), LaurelConfig(variant=variant, rank=4))
    return InsertLaurel(plan)(graph).graph_module


@pytest.mark.parametrize(
    ("name", "variant", "how"),
    [
        *[(name, "rw+lr+pa", how) for name in TRACEABLE for how in ("symbolic", "export")],
        *[(name, variant, "symbolic") for name in ("loop", "parallel") for variant in VARIANTS[:-1]],
        *[slow(name, "rw", how) for name in TRACEABLE for how in ("symbolic", "export")],
        *[slow(name, variant, "export") for name in ("loop", "parallel") for variant in VARIANTS[1:-1]],
    ],
)
def test_exact_at_the_start_and_equal_to_the_module_back_end(name, variant, how):
    case = CASES[name]
    model = case.make().eval()
    x, other = torch.randn(case.shape), torch.randn(case.shape[0] + 1, *case.shape[1:])
    graph = insert(graph_of(model, (x,), how), (x,), variant)
    assert sum(n.op == "call_module" and "laurel_" in str(n.target) for n in graph.graph.nodes) == case.sites
    assert torch.equal(graph(other), model(other))
    graph.graph.lint()

    # With one set of random parameters both back ends compute the same.
    better = away_from_start(rewrite(model, (x,), variant=variant, rank=4)).eval()
    ours, theirs = list(sites_of(better).values()), list(sites_of(graph).values())
    if len(ours) == len(theirs):
        for a, b in zip(ours, theirs, strict=True):
            b.load_state_dict(a.state_dict())
        # float32: a sum of several branches is one call here, and several in the source.
        torch.testing.assert_close(graph(other), better(other), rtol=1e-5, atol=1e-5)


def test_a_graph_trains():
    model = real("resnet18").model
    x = torch.randn(2, 3, 64, 64)
    graph = insert(fx.symbolic_trace(model), (x,), "rw+lr+pa").train()
    away_from_start(graph, spread=0.05)
    graph(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for m in sites_of(graph).values() for p in m.parameters())


def test_rewrite_takes_a_graph_too():
    x = torch.randn(2, 5, D)
    graph = fx.symbolic_trace(CASES["plain"].make().eval())
    better = rewrite(graph, (x,), rank=4)
    assert isinstance(better, fx.GraphModule)
    assert list(sites_of(better)) == ["laurel_0", "laurel_1"]
    assert not sites_of(graph)
    with pytest.raises(ConfigError, match="rewritten already"):
        rewrite(better, (x,), rank=4)


def test_detection_finds_nothing_new_in_a_rewritten_graph():
    x = torch.randn(2, 5, D)
    graph = insert(fx.symbolic_trace(CASES["plain"].make().eval()), (x,))
    for node in graph.graph.nodes:
        node.meta.pop("tensor_meta", None)
    assert not detect(graph, (x,)).sites


def test_torchs_own_manager_runs_the_pass():
    x = torch.randn(2, 5, D)
    graph = fx.symbolic_trace(CASES["plain"].make().eval())
    before = graph(x)
    found = InsertLaurel(Plan.from_sites(detect(graph, (x,)), LaurelConfig(rank=4)))
    result = PassManager([found], run_checks_after_each_pass=True)(graph)
    assert result.modified
    assert list(sites_of(result.graph_module)) == ["laurel_0", "laurel_1"]
    assert torch.equal(result.graph_module(x), before)


def test_ids_are_owners_and_ordinals():
    model = real("resnet18").model
    x = torch.randn(2, 3, 64, 64)
    symbolic = [s.id for s in detect(fx.symbolic_trace(model), (x,))]
    assert symbolic == [s.id for s in detect(model, (x,))]


def test_a_foreign_plan_is_refused_and_nothing_changes():
    x = torch.randn(2, 5, D)
    plan = Plan.from_sites(detect(CASES["loop"].make(), (x,)), LaurelConfig(rank=4))
    graph = fx.symbolic_trace(CASES["plain"].make())
    detect(graph, (x,))
    before = str(graph.graph)
    with pytest.raises(ConfigError, match="names the site"):
        InsertLaurel(plan)(graph)
    assert str(graph.graph) == before


class Leaves(fx.Tracer):
    def is_leaf_module(self, m, qualname):
        return isinstance(m, fx.GraphModule) or super().is_leaf_module(m, qualname)


def nested_graph(*order):
    """Graph modules that are called by a graph."""

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleDict({name: fx.symbolic_trace(CASES["plain"].make()) for name in dict.fromkeys(order)})

        def forward(self, x):
            for name in order:
                x = self.inner[name](x)
            return x

    outer = Outer().eval()
    return outer, fx.GraphModule(outer, Leaves().trace(outer))


@pytest.mark.parametrize("variant", ["rw+lr", "gated"])
def test_graph_modules_inside_a_graph(variant):
    x, other = torch.randn(2, 5, D), torch.randn(3, 7, D)
    outer, graph = nested_graph("a", "b")
    assert any(node.op == "call_module" and node.target == "inner.a" for node in graph.graph.nodes)
    better = rewrite(graph, (x,), variant=variant)
    assert list(sites_of(better)) == [f"inner.{name}.laurel_{number}" for name in "ab" for number in (0, 1)]
    assert torch.equal(better(other), outer(other))
    edited = rewrite(fx.symbolic_trace(outer), (x,), variant=variant)  # traced through
    away_from_start(edited)
    better.load_state_dict({key: value for key, value in edited.state_dict().items() if "laurel" in key}, strict=False)
    torch.testing.assert_close(better(other), edited(other), rtol=1e-5, atol=1e-6)
    assert (better(other) - outer(other)).abs().max() > 1e-3
    copy.deepcopy(better)(x).sum().backward()


def test_a_graph_module_that_is_called_twice_is_said_to_be_left_alone():
    x = torch.randn(2, 5, D)
    assert "inner.a is a graph that is called several times" in detect(nested_graph("a", "b", "a")[1], (x,)).notes[0]


def test_a_stream_with_a_history_stays_in_one_graph():
    x = torch.randn(2, 5, D)
    with pytest.raises(RewriteError, match="its stream goes through regions of the graph"):
        rewrite(nested_graph("a", "b")[1], (x,), variant="rw+lr+pa", rank=4)


def test_a_graph_for_each_mode_is_refused():
    real("resnet18")  # torchvision's ops
    from torchvision.models import resnet18
    from torchvision.models.feature_extraction import create_feature_extractor

    with pytest.raises(RewriteError, match="has another graph for each mode"):
        rewrite(create_feature_extractor(resnet18(), ["flatten"]), (torch.randn(2, 3, 64, 64),), variant="rw")


class InPlace(nn.Module):
    """An add in place, which is seen under other names."""

    def __init__(self, body):
        super().__init__()
        self.f = nn.Linear(D, D)
        self.drop = nn.Dropout(0.0)
        self.body = body

    def forward(self, x):
        return self.body(self, x)


def _view_from_before(s, x):
    y = x.clone()
    z = y.view(y.shape)
    y.add_(s.f(x))
    return z


def _part_of_a_base(s, x):
    y = x.clone()
    part = y[:, 1:]
    part.add_(s.f(part))
    return y


def _branch_in_place(s, x):
    f = s.f(x)
    g = f.transpose(0, 1)
    f.add_(x)
    return g


def _nothing_to_copy(s, x):
    y = s.f(x)
    z = s.drop(y).contiguous()
    z.add_(s.f(torch.relu(z)))
    return torch.cat([y, z])


IN_PLACE = {
    "the input": lambda s, x: x.add_(s.f(x)),
    "the input, unseen": lambda s, x: (x.add_(s.f(x)), x * 2)[1],
    "a view from before": _view_from_before,
    "a part of a base": _part_of_a_base,
    "the branch": _branch_in_place,
    "what has nothing to copy": _nothing_to_copy,
}


@pytest.mark.parametrize("how", ["symbolic", "export"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_adds_in_place_stay_where_they_are_seen(name, how):
    model, x = InPlace(IN_PLACE[name]).eval(), torch.randn(2, 5, D)
    graph = insert(graph_of(model, (x.clone(),), how), (x,), "rw+lr+pa")
    other = torch.randn(3, 5, D)
    one, two = other.clone(), other.clone()
    with torch.no_grad():
        assert torch.equal(graph(one), model(two))
        assert torch.equal(one, two)
        away_from_start(graph)
        moved = graph(other.clone())
    # LAuReL is called: what its parameters move is far above float32.
    assert not torch.allclose(moved, graph_of(model, (x.clone(),), how)(other), rtol=1e-3, atol=1e-3)


def test_a_deep_copy_of_the_graph_is_independent():
    x = torch.randn(2, 5, D)
    graph = insert(fx.symbolic_trace(CASES["loop"].make().eval()), (x,), "rw+lr+pa")
    twin = copy.deepcopy(graph)
    expected = graph(x)
    away_from_start(twin)
    assert torch.equal(graph(x), expected)
