"""What people really write, each small enough to read: residual connections that are easy to miss, and sums that only look like one."""

from __future__ import annotations

import operator
from collections import Counter
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import IMAGE, D, Net, X, axes, conv, found, kinds, reasons

from laurel_rewrite import detect

# Sums


@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("order", list(permutations("xfg")))
def test_a_sum_of_three_in_every_order_is_one_site(order, right):
    def body(s, x):
        a, b, c = ({"x": x, "f": s.a(s.norm(x)), "g": s.b(s.norm(x))}[name] for name in order)
        return a + (b + c) if right else (a + b) + c

    sites = found(body)
    assert kinds(sites) == {"identity": 1}
    residual = sites.bindings["laurel_0"].residual
    assert sites.flow.values[residual.skip].name == "x"
    assert len(residual.branches) == 2


FORMS = {
    "plus": lambda x, f: x + f,
    "reflected": lambda x, f: f + x,
    "augmented": lambda x, f: f.__iadd__(x),
    "add": lambda x, f: torch.add(x, f),
    "add with alpha": lambda x, f: torch.add(x, f, alpha=0.7),
    "add with out of order names": lambda x, f: torch.add(input=x, other=f),
    "method": lambda x, f: x.add(f),
    "in place": lambda x, f: f.add_(x),
    "in place with alpha": lambda x, f: f.add_(x, alpha=2.0),
    "sum of a list": lambda x, f: sum([f, x]),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_way_to_write_a_sum(name):
    assert kinds(found(lambda s, x: FORMS[name](x, s.a(s.norm(x))))) == {"identity": 1}


GATES = {
    "addcmul": lambda s, x: torch.addcmul(x, torch.sigmoid(s.a(x)), s.b(x)),
    "addcdiv": lambda s, x: torch.addcdiv(x, s.a(x), 1 + s.b(x).exp()),
    "lerp": lambda s, x: torch.lerp(x, s.a(x), torch.sigmoid(s.b(x))),
    "lerp by a number": lambda s, x: torch.lerp(x, s.a(x), 0.3),
}


@pytest.mark.parametrize("name", GATES)
def test_fused_gates_are_listed_and_no_sites(name):
    sites = found(GATES[name])
    assert not sites.sites
    assert "gated" in reasons(sites)


def test_a_sum_that_is_nested_across_modules_is_one():
    class Two(Net):
        def forward(self, x):
            return self.a(x) + self.b(F.relu(x))

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.two = nn.LayerNorm(D), Two(None)

        def forward(self, x):
            return x + self.two(self.norm(x))

    model = Outer()
    program = torch.export.export(model, (X,))
    for sites in (detect(model, (X,)), detect(program), detect(torch.fx.symbolic_trace(model), (X,))):
        assert kinds(sites) == {"identity": 1}
        assert len(sites.bindings[sites.sites[0].id].residual.branches) == 2
        assert [site.id for site in sites] == ["laurel_0"]  # in the module that adds the skip


def test_an_inner_sum_that_is_read_elsewhere_is_a_sum_of_its_own():
    def body(s, x):
        y = x + s.a(x)
        return (y + s.b(F.relu(x))) * torch.sigmoid(y)

    assert kinds(found(body)) == {"identity": 1, "projection": 1}  # (1 + a) x is linear in x


def test_a_skip_that_is_read_three_times():
    def body(s, x):
        y = s.a(x)
        return (y + s.b(y)) @ (y + s.c(y)).transpose(1, 2) @ (y + s.d(y))

    sites = found(body, c=nn.Linear(D, D), d=nn.Linear(D, D))
    assert kinds(sites) == {"identity": 3}
    assert len({site.stream for site in sites}) == 3  # forks, not a chain


def test_residual_in_residual_dense_blocks():
    """RRDB: three levels, with constant scales, as ESRGAN has them."""

    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(conv(D * (k + 1), D) for k in range(3))

        def forward(self, x):
            parts = [x]
            for layer in self.convs:
                parts.append(F.leaky_relu(layer(torch.cat(parts, 1)), 0.2))
            return parts[-1] * 0.2 + x

    class Rrdb(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(Dense(), Dense(), Dense())

        def forward(self, x):
            return self.blocks(x) * 0.2 + x

    class Trunk(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.body, self.last = conv(), nn.Sequential(Rrdb(), Rrdb()), conv()

        def forward(self, x):
            x = self.first(x)
            return x + self.last(self.body(x))

    sites = detect(Trunk(), (IMAGE,))
    assert kinds(sites) == {"identity": 2 * 3 + 2 + 1}
    assert set(axes(sites)) == {(1, D)}


# Parts of channels


def test_a_partial_channel_residual_is_a_site():
    """ReXNet: the skip is whole, the branch has more channels."""

    def body(s, x):
        y = s.wide(F.relu(x))
        return torch.cat([y[:, :D] + x, y[:, D:]], 1)

    assert kinds(found(body, IMAGE, wide=conv(D, 2 * D))) == {"identity": 1}


def test_a_skip_that_is_a_slice_of_what_the_branch_reads_is_partial():
    """DPN."""

    def body(s, x):
        y = F.relu(s.first(x))
        return torch.cat([x[:, :8] + s.second(y)[:, :8], x[:, 8:]], 1)

    assert kinds(found(body, IMAGE, first=conv(), second=conv())) == {"partial": 1}


@pytest.mark.parametrize(
    "split", [lambda x: x.chunk(2, 1), lambda x: torch.split(x, D // 2, 1), lambda x: (x[:, : D // 2], x[:, D // 2 :])]
)
def test_skip_and_branch_from_different_slices_are_no_site(split):
    """Res2Net."""

    def body(s, x):
        left, right = split(x)
        left = s.first(left)
        return torch.cat([left, s.second(left + right)], 1)

    sites = found(body, IMAGE, first=conv(D // 2), second=conv(D // 2))
    assert not sites.sites


def test_skip_and_branch_from_one_slice_are_a_site():
    def body(s, x):
        left, right = x.chunk(2, 1)
        return torch.cat([left + s.first(left), right], 1)

    assert kinds(found(body, IMAGE, first=conv(D // 2))) == {"identity": 1}


def test_an_in_place_add_on_a_view():
    """GhostNet: the result of the branch is a slice, and the skip is added into it."""

    def body(s, x):
        y = torch.cat([s.first(x), s.second(F.relu(x))], 1)[:, :D]
        y += x
        return s.third(y) + y

    sites = found(body, IMAGE, first=conv(D, 12), second=conv(D, 12), third=conv())
    assert kinds(sites) == {"identity": 2}
    assert [site.stream for site in sites] == [0, 0]


def test_an_item_assignment_in_a_graph():
    """y[:, 0] = 2 * x[:, 0] writes into y, and the skip is added to what y holds then."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_module("a", (x,))
    part = graph.call_function(operator.mul, (graph.call_function(operator.getitem, (x, (slice(None), 0))), 2))
    graph.call_function(operator.setitem, (y, (slice(None), 0), part))
    graph.output(graph.call_function(operator.add, (x, y)))
    module = torch.fx.GraphModule(nn.ModuleDict({"a": nn.Linear(D, D)}), graph)
    sites = detect(module, (X,))
    assert kinds(sites) == {"identity": 1}
    residual = sites.bindings["laurel_0"].residual
    assert sites.flow.values[residual.branches[0]].op == "setitem"


# Between models' parts


def test_cross_attention_reads_a_stream_of_another_length():
    class CrossAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode = nn.TransformerEncoderLayer(D, 2, 32, batch_first=True)
            self.decode = nn.TransformerDecoderLayer(D, 2, 32, batch_first=True)

        def forward(self, source, target):
            return self.decode(target, self.encode(source))

    sites = detect(CrossAttention(), (torch.randn(2, 7, D), X))
    assert kinds(sites) == {"identity": 2 + 3}
    assert Counter(site.stream for site in sites) == {0: 2, 1: 3}


def test_a_sum_of_two_inputs_is_no_site():
    class Pair(Net):
        def forward(self, x, y):
            return self.a(x) + self.b(F.relu(y))

    sites = detect(Pair(None), (X, X.clone()))
    assert not sites.sites
    assert reasons(sites) == {"no common ancestor"}


def test_a_feature_pyramid_has_no_sites():
    def body(s, x):
        low = F.relu(s.down(x))
        return s.lateral(x) + F.interpolate(s.top(low), scale_factor=2)

    sites = found(body, IMAGE, down=conv(stride=2), lateral=conv(kernel=1), top=conv(kernel=1))
    assert not sites.sites
    assert reasons(sites) == {"lateral"}


def test_a_u_net_with_a_lateral_convolution_has_no_sites():
    def body(s, x):
        x = F.relu(s.first(x))
        up = s.up(F.relu(s.middle(F.relu(s.down(x)))))
        return s.last(s.lateral(x) + up)

    layers = {"first": conv(), "down": conv(stride=2), "middle": conv(), "lateral": conv(kernel=1), "last": conv()}
    sites = found(body, IMAGE, up=nn.ConvTranspose2d(D, D, 2, 2), **layers)
    assert not sites.sites
    assert reasons(sites) == {"lateral"}


def test_a_gate_that_is_upsampled_does_not_make_a_shortcut_lateral():
    """GhostNetV2: the gate inside the branch is computed at half the size."""

    def body(s, x):
        gate = torch.sigmoid(F.interpolate(s.small(F.avg_pool2d(x, 2)), scale_factor=2))
        return s.short(x) + s.second(F.relu(s.first(x)) * gate)

    sites = found(body, IMAGE, small=conv(), first=conv(), second=conv(D, 24), short=conv(D, 24, kernel=1))
    assert kinds(sites) == {"projection": 1}


def test_high_resolution_nets_exchange_without_sites():
    """HRNet: blocks within each resolution are sites, the sums that exchange between resolutions are none."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(), conv()

        def forward(self, x):
            return F.relu(x + self.b(F.relu(self.a(x))))

    def body(s, x):
        high, low = F.relu(s.one(x)), F.relu(s.two(x))
        high, low = s.block_high(high), s.block_low(low)
        up, down = F.interpolate(s.up(low), scale_factor=2), s.down(high)
        return s.last(F.relu(high + up)) * F.interpolate(F.relu(down + low), scale_factor=2)

    layers = {"one": conv(), "two": conv(stride=2), "up": conv(kernel=1), "down": conv(stride=2), "last": conv()}
    sites = found(body, IMAGE, block_high=Block(), block_low=Block(), **layers)
    assert kinds(sites) == {"identity": 2}
    assert {site.owner for site in sites} == {"block_high", "block_low"}
