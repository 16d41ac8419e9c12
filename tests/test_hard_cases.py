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
from laurel_rewrite.sources.models import build

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


# What only looks like one


def test_rotary_embeddings_are_no_sites():
    def body(s, x):
        cos, sin = torch.cos(s.table), torch.sin(s.table)
        q = s.a(x)
        turned = torch.cat([-q[..., D // 2 :], q[..., : D // 2]], -1)
        q = q * cos + turned * sin
        return x + (q @ q.transpose(1, 2)).softmax(-1) @ s.b(x)

    sites = found(body)
    assert kinds(sites) == {"identity": 1}


def test_a_low_rank_delta_is_no_site():
    """LoRA: W x + B A x, here inside a residual branch."""

    def body(s, x):
        n = s.norm(x)
        return x + F.gelu(s.a(n) + s.up(s.down(F.dropout(n, 0.1))) * 2.0)

    sites = found(body, down=nn.Linear(D, 4, bias=False), up=nn.Linear(4, D, bias=False))
    assert kinds(sites) == {"identity": 1}
    assert "both linear" in reasons(sites)


def test_experts_and_a_shared_expert_are_branches():
    def body(s, x):
        n = s.norm(x)
        weights = s.router(n).softmax(-1)
        routed = sum(weights[..., k : k + 1] * s.experts[k](n) for k in range(2))
        return x + (routed + s.shared(n))

    def expert():
        return nn.Sequential(nn.Linear(D, 32), nn.GELU(), nn.Linear(32, D))

    sites = found(body, router=nn.Linear(D, 2), experts=nn.ModuleList([expert(), expert()]), shared=expert())
    assert kinds(sites) == {"identity": 1}
    assert len(sites.bindings["laurel_0"].residual.branches) == 3
    alone = found(lambda s, x: s.one(x) + s.two(x), one=expert(), two=expert())
    assert not alone.sites


def test_recurrent_gates_are_no_sites():
    def highway(s, x):
        gate = torch.sigmoid(s.a(x))
        return gate * F.relu(s.b(x)) + (1 - gate) * x

    def lstm(s, x):
        cell = torch.zeros_like(x[:, 0])
        for step in range(3):
            i, f, g = torch.sigmoid(s.a(x[:, step])), torch.sigmoid(s.b(x[:, step])), torch.tanh(s.c(x[:, step]))
            cell = f * cell + i * g
        return cell

    def rwkv(s, x):
        shifted = F.pad(x, (0, 0, 1, -1))
        mixed = x * s.gate + shifted * (1 - s.gate)
        return torch.sigmoid(s.a(mixed)) * s.b(mixed)

    def scan(s, x):
        """Mamba: h_t = A h_{t-1} + B x_t, with a skip that is scaled by a vector."""
        h = torch.zeros_like(x[:, 0])
        out = []
        for step in range(3):
            h = torch.exp(s.gate) * h + F.softplus(s.a(x[:, step])) * x[:, step]
            out.append(h)
        return torch.stack(out, 1) + x[:, :3] * s.gate

    def elman(s, x):
        h = torch.zeros_like(x[:, 0])
        for step in range(3):
            h = torch.tanh(s.a(h) + s.b(x[:, step]))
        return h

    for body in (highway, lstm, rwkv, scan, elman):
        sites = found(body, c=nn.Linear(D, D))
        assert not sites.sites, body.__name__
        assert ("gated residual" if body is highway else "no linear path") in reasons(sites), body.__name__


def test_a_scaled_skip_is_no_site():
    """MetaFormer's res_scale: a skip multiplied by a learned vector."""
    scaled = found(lambda s, x: x * s.gate + s.a(s.norm(x)))
    assert not scaled.sites
    assert reasons(scaled) == {"scaled residual"}
    strided = found(lambda s, x: (y := s.down(x)) * s.scale + s.first(F.relu(y)), IMAGE, down=conv(stride=2), first=conv(), scale=Scale())
    assert not strided.sites
    assert reasons(strided) == {"scaled residual"}


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D, 1, 1))

    def __rmul__(self, x):
        return x * self.weight


def test_a_local_position_encoding_beside_attention_is_no_shortcut():
    """LePE: attention(v) + conv3x3(v) have one ancestor and one shape, but a 3x3 convolution is no skip."""

    def body(s, x):
        tokens = x.flatten(2).transpose(1, 2)
        mixed = (tokens @ tokens.transpose(1, 2)).softmax(-1) @ tokens
        return mixed.transpose(1, 2).reshape(x.shape) + s.local(x)

    assert not found(body, IMAGE, local=conv()).sites


def test_a_shortcut_between_stages_may_be_any_linear_map():
    """SENet-154 and GhostNet: 3x3 convolutions with a stride, or depthwise and 1x1."""
    strided = found(
        lambda s, x: s.short(x) + s.second(F.relu(s.first(x))), IMAGE, short=conv(D, 24, 2), first=conv(stride=2), second=conv(D, 24)
    )
    assert kinds(strided) == {"projection": 1}


def test_a_position_bias_that_depends_on_data_is_no_skip():
    """CPM-Ant: a bias computed from the inputs is added to the scores of every layer, so it is an ancestor of the later scores."""

    def body(s, x):
        bias = (s.a(x) @ x.transpose(1, 2)).tanh()
        for layer in (s.a, s.b):
            q = layer(x)
            x = x + (q @ q.transpose(1, 2) * 0.25 + bias).softmax(-1) @ q
        return x

    sites = found(body)
    assert kinds(sites) == {"identity": 2}
    assert "attention bias" in reasons(sites)


def test_a_position_bias_computed_from_the_queries_is_no_shortcut():
    """MViT: scores[1:] += E q, in place; linear in the queries, beside a product of queries and keys."""

    def body(s, x):
        q, k = s.a(x), s.b(x)
        scores = q @ k.transpose(1, 2)
        scores[:, 1:] += s.positions(q)[:, 1:]
        return x + scores.softmax(-1) @ x

    sites = found(body, positions=nn.Linear(D, 5))
    assert kinds(sites) == {"identity": 1}
    assert "attention bias" in reasons(sites)


def test_a_type_taken_from_data_does_not_make_a_table_data():
    sites = found(lambda s, x: s.a(x + s.table.expand(2, 5, D).type_as(x)))
    assert not sites.sites
    assert reasons(sites) == {"not data-dependent"}


def test_a_division_by_the_skip_is_no_scale():
    class Divides(Net):
        def forward(self, x):
            return 1.0 / x + self.a(F.relu(self.b(x)))

    assert not detect(Divides(None), (X,)).sites
    assert not detect(torch.fx.symbolic_trace(Divides(None)), (X,)).sites


def test_gemma_3n_has_laurel_already():
    settings = {
        "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "vocab_size": 99, "vocab_size_per_layer_input": 99, "hidden_size_per_layer_input": 8, "laurel_rank": 4, "num_kv_shared_layers": 0,
        "layer_types": ["full_attention", "full_attention"], "activation_sparsity_pattern": [0.0, 0.0],
    }  # fmt: skip
    built = build("hf:gemma3n_text", settings)
    sites = detect(built.model, built.args, built.kwargs)
    existing = Counter(rejected.owner for rejected in sites.rejected if rejected.reason == "existing LAuReL")
    # Its own sum, x + norm(U V x), and the sum of that with the attention.
    assert existing == {f"model.layers.{layer}{part}": 1 for layer in (0, 1) for part in ("", ".laurel")}
    assert not any(site.owner.endswith(".laurel") for site in sites)
    assert sum(site.owner.startswith("model.layers") and "altup" not in site.owner for site in sites) == 2  # the MLP's
