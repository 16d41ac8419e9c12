"""Sums in regions of a graph (autocast, no_grad, checkpoints), under decorators and control flow, and in scripted parts."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import D, Net, X, kinds, reasons

from laurel_rewrite import detect


@pytest.fixture
def only_runs(monkeypatch):
    """No export works."""

    def fail(*args, **kwargs):
        raise RuntimeError("not today")

    monkeypatch.setattr(torch.export, "export", fail)


def under(region):
    def wrapped(s, x):
        with region():
            y = x + s.a(x)
        return y

    return wrapped


autocast = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16)


class Decorated(Net):
    @torch.autocast("cpu", enabled=False)
    def forward(self, x):
        return x + self.a(x)


def branch_under_autocast(s, x):
    with autocast():
        f = s.a(x)
    return x + f.float()


def nested(s, x):
    with autocast(), torch.no_grad():
        x = x + s.a(x)
        with torch.enable_grad():
            x = x + s.b(x)
    return x


REGIONS = {
    "autocast": (under(autocast), 1),
    "no_grad": (under(torch.no_grad), 1),
    "a branch under autocast": (branch_under_autocast, 1),
    "nested": (nested, 2),
}


@pytest.mark.parametrize("way", ["export", "run"])
@pytest.mark.parametrize("name", REGIONS)
def test_sums_in_regions_are_seen(name, way, request):
    body, count = REGIONS[name]
    if way == "run":
        request.getfixturevalue("only_runs")
    sites = detect(Net(body), (X,))
    assert len(sites) + sum(r.reason != "scalar" for r in sites.rejected) == count
    if "no_grad" not in name and name != "nested":
        assert kinds(sites) == {"identity": count}
        assert all(":" in site.where and site.shape == X.shape for site in sites)


def test_sums_under_a_decorator_are_seen():
    (site,) = detect(Decorated(None), (X,))
    assert site.kind == "identity"


def test_a_program_with_regions_has_the_same_sites():
    program = torch.export.export(Net(branch_under_autocast), (X,))
    assert kinds(detect(program)) == {"identity": 1}


def test_sums_under_control_flow_are_listed():
    sites = detect(Net(lambda s, x: torch.cond(x.sum() > 0, lambda x: x + s.a(x), lambda x: s.a(x), (x,))), (X,))
    assert not sites.sites
    assert "subgraph" in reasons(sites)


def scripted_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D), nn.GELU())


@torch.jit.script
def scripted_gelu(x: torch.Tensor):
    return F.gelu(x) * 1.5


SCRIPTED = {
    "module": lambda: torch.jit.script(scripted_layers()),
    "traced module": lambda: torch.jit.trace(scripted_layers(), X),
    "function": lambda: nn.Sequential(nn.Linear(D, D), Calls(scripted_gelu)),
    "traced function": lambda: nn.Sequential(nn.Linear(D, D), Calls(torch.jit.trace(lambda x: F.gelu(x) * 1.5, (X,)))),
}


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("part", SCRIPTED)
def test_scripted_parts_are_the_same_however_often_they_ran(part):
    """TorchScript optimises what it has run, and differentiates it then by itself."""

    class Scripted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = SCRIPTED[part](), nn.Linear(D, D)

        def forward(self, x):
            if x.sum().item() > 1e9:  # no export follows it
                return x
            for _ in range(3):
                x = x + self.a(x)
            return x + torch.tanh(self.b(x))

    model = Scripted()
    for _ in range(3):
        assert kinds(detect(model, (X,))) == {"identity": 4}
        for _ in range(3):
            model(X).sum().backward()
