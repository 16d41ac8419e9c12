"""What people really write that only looks like a residual connection, each small enough to read."""

from __future__ import annotations

from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn
from toys import IMAGE, D, Net, X, conv, found, kinds, reasons

from laurel_rewrite import detect
from laurel_rewrite.sources.models import build


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
    assert sites.existing() == "The model has LAuReL of its own, which is left as it is: model.layers.0.laurel, model.layers.1.laurel."
    assert not any(site.owner.endswith(".laurel") for site in sites)
    assert sum(site.owner.startswith("model.layers") and "altup" not in site.owner for site in sites) == 2  # the MLP's
