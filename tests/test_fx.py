"""LAuReL in fx graphs: traced symbolically, and exported."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import away_from_start, real
from torch import fx
from toys import CASES, D

from laurel_rewrite import ConfigError, RewriteError, detect, rewrite
from laurel_rewrite.operator import sites_of
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


@pytest.mark.parametrize("how", ["symbolic", "export"])
@pytest.mark.parametrize(
    ("name", "variant"),
    [(name, variant) for name in TRACEABLE for variant in ("rw", "rw+lr+pa")]
    + [(name, variant) for name in ("loop", "parallel") for variant in VARIANTS if variant not in ("rw", "rw+lr+pa")],
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
    model = real("resnet50").model
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


def test_ids_are_owners_and_ordinals():
    model = real("resnet50").model
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


def test_an_add_into_an_input_is_refused():
    class Input(CASES["plain"].make().__class__):
        def forward(self, x):
            return x.add_(self.f(x))

    x = torch.randn(2, 5, D)
    with pytest.raises(RewriteError, match="adds into an input"):
        insert(fx.symbolic_trace(Input().eval()), (x,))


def test_a_deep_copy_of_the_graph_is_independent():
    x = torch.randn(2, 5, D)
    graph = insert(fx.symbolic_trace(CASES["loop"].make().eval()), (x,), "rw+lr+pa")
    twin = copy.deepcopy(graph)
    expected = graph(x)
    away_from_start(twin)
    assert torch.equal(graph(x), expected)
