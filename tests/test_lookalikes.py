"""Sums that look like residual connections and are none: nothing reads them, no gradient passes, a sample, a gate, a score."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from toys import D, Net, X, found, kinds, reasons

from laurel_rewrite import RewriteError, detect, rewrite
from laurel_rewrite.graph.recording import _has_own_backward

# Results that nobody reads


class Shown(Net):
    def forward(self, x):
        str((x + self.a(x)).shape)
        return self.b(x)


class Unused(Net):
    """The last block updates a second stream that nothing reads any more, as in two-stream transformers."""

    def forward(self, x):
        y = self.norm(x)
        for layer in (self.a, self.b):
            mixed = layer(torch.cat([x, y], 1))
            x, y = x + mixed[:, :5], y + mixed[:, 5:]
        return x


def test_a_sum_that_reaches_no_output_is_none():
    sites = detect(Shown(None), (X,))
    assert not sites.sites
    assert reasons(sites) == {"dead"}
    sites = detect(Unused(None), (X,))
    assert kinds(sites) == {"identity": 3}
    assert reasons(sites) == {"dead"}


def test_what_is_written_into_a_buffer_or_an_input_is_read():
    class Keeps(Net):
        def __init__(self, body):
            super().__init__(body)
            self.register_buffer("kept", torch.zeros(2, 5, D))

        def forward(self, x):
            self.kept.copy_(x + self.a(x))
            return self.b(x)

    class Writes(Net):
        def forward(self, x):
            y = x * 1.0
            x += self.a(x)
            return self.b(y)

    assert kinds(detect(Keeps(None), (X,))) == {"identity": 1}
    assert kinds(detect(Writes(None), (X.clone(),))) == {"identity": 1}


# Paths without a gradient


def quantised(s, z):
    return s.table[z.argmax(-1)]


CUT = {
    "straight-through": lambda s, x: s.b((z := s.a(x)) + (quantised(s, z) - z).detach()),
    "gumbel softmax": lambda s, x: s.b(F.gumbel_softmax(s.a(x), hard=True)),
    "rounding": lambda s, x: s.b((z := s.a(x)) + s.a(torch.round(z))),
    "nearest entry": lambda s, x: s.b((z := s.a(x)) + quantised(s, z)),
    "no_grad": lambda s, x: s.b((z := s.a(x)) + s.norm(s.a(z).detach())),
    "detached skip": lambda s, x: s.b((z := s.a(x)).detach() + s.norm(z)),
}


@pytest.mark.parametrize("name", CUT)
def test_a_branch_that_no_gradient_reaches_is_none(name):
    sites = found(CUT[name])
    assert not sites.sites
    assert reasons(sites) & {"detached", "pointwise"} == {"detached"}


UNLEARNED = {
    "a detached result": lambda s, x: (s.b(x), (x + s.a(x)).detach() * 2),
    "a choice": lambda s, x: (s.b(x), (x + s.a(x)).argmax(-1)),
    "a view of what was detached": lambda s, x: s.b(x) + (lambda v, y: v)((h := s.norm(x)).detach(), h.add_(s.a(h))),
    "inference mode": lambda s, x: s.b(under(torch.inference_mode(), lambda: x + s.a(x)) * 1),
}


def under(context, call):
    with context:
        return call()


@pytest.mark.parametrize("name", UNLEARNED)
def test_a_sum_that_no_gradient_reaches_is_none(name):
    sites = found(UNLEARNED[name])
    assert not sites.sites
    assert "no gradient" in reasons(sites)


@pytest.mark.parametrize("end", [lambda y: y.argmax(-1), lambda y: y.detach(), lambda y: y > 0])
def test_of_a_model_whose_outputs_have_no_gradient_at_all_every_sum_counts(end):
    """It is trained in another way than it is called here."""
    assert kinds(found(lambda s, x: end(x + s.a(x)))) == {"identity": 1}


def test_a_caller_in_inference_mode_changes_nothing():
    with torch.inference_mode():
        assert kinds(found(lambda s, x: x + s.a(x))) == {"identity": 1}


def test_an_onnx_graph_may_be_the_deployed_half_of_a_model(tmp_path):
    torch.onnx.export(Net(UNLEARNED["a choice"]).eval(), (X,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    assert kinds(detect(tmp_path / "model.onnx")) == {"identity": 1}


class Step(Net):
    def forward(self, x):
        return x + self.a(self.norm(x))


class Frozen(nn.Module):
    """A backbone that is run without gradients, and a head that is trained."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = Step(None), Step(None)

    def forward(self, x):
        with torch.no_grad():
            x = self.backbone(x)
        return self.head(x)


class Recomputed(Frozen):
    """Reentrant activation checkpoints run their blocks under no_grad, and again in backward."""

    def forward(self, x):
        return self.head(checkpoint(self.backbone, x, use_reentrant=True))


def test_a_frozen_backbone_is_left_alone():
    sites = detect(Frozen(), (X,))
    assert [site.id for site in sites] == ["head.laurel_0"]
    assert [(r.owner, r.reason) for r in sites.rejected] == [("backbone", "no gradient")]


def test_a_checkpointed_block_is_trained():
    assert [site.id for site in detect(Recomputed(), (X.clone().requires_grad_(),))] == ["backbone.laurel_0", "head.laurel_0"]


def test_positions_of_detached_boxes_are_embeddings():
    """DETR with boxes that are refined from layer to layer: the same embedding is added to the queries of two attentions."""

    def body(s, x):
        boxes = s.boxes(x)
        for _ in range(2):
            position = F.relu(s.positions(boxes.detach()))
            query = x + position
            x = x + (query @ query.transpose(1, 2)).softmax(-1) @ s.a(x)
            query = x + position
            x = x + (query @ query.transpose(1, 2)).softmax(-1) @ s.b(x)
            boxes = s.boxes(s.norm(x))
        return x, boxes

    sites = found(body, boxes=nn.Linear(D, 4), positions=nn.Linear(4, D))
    assert kinds(sites) == {"identity": 4}
    assert [r.reason for r in sites.rejected].count("detached") == 4


def test_a_stream_of_its_own_may_start_at_a_detached_value():
    def body(s, x):
        y = s.norm(x.detach())
        z = x + y
        return z, y + s.a(y)

    assert kinds(found(body)) == {"identity": 1}


def test_what_follows_a_straight_through_estimator_is_a_new_stream():
    def body(s, x):
        x = x + s.a(x)
        z = x.detach()
        return z + s.b(z), x

    sites = found(body)
    assert [(site.stream, site.index) for site in sites] == [(0, 0), (1, 0)]


def test_gradients_pass_gathers_masks_and_casts():
    def body(s, x):
        x = x + s.a(x.masked_fill(x > 0, 0.0).double().float())
        return x + s.b(x[:, x[0, :, 0].argsort()])

    assert kinds(found(body)) == {"identity": 2}


# Samples, modulations, deltas


def gaussian(s, x):
    h = F.relu(x)
    return s.a(h), s.b(h)


SAMPLES = {
    "noise times scale": lambda s, x: (p := gaussian(s, x), p[0] + torch.randn_like(p[0]) * torch.exp(0.5 * p[1]))[1],
    "in place": lambda s, x: (p := gaussian(s, x), torch.randn_like(p[0]).mul(p[1].exp()).add_(p[0]))[1],
    "drawn in place": lambda s, x: (p := gaussian(s, x), torch.empty_like(p[0]).normal_() * p[1].exp() + p[0])[1],
    "another tensor": lambda s, x: (p := gaussian(s, x), p[0] + torch.sigmoid(p[1]) * F.relu(s.c(x)))[1],
    "film": lambda s, x: (p := gaussian(s, x), p[0] * F.silu(s.c(x)) + p[1])[1],
}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_product_of_independent_tensors_is_no_branch_beside_a_shortcut(name):
    sites = found(lambda s, x: s.d(SAMPLES[name](s, x)), c=nn.Linear(D, D), d=nn.Linear(D, D))
    assert not sites.sites
    assert reasons(sites) == {"modulated"}


@pytest.mark.parametrize("noise", [lambda y: y.new_empty(2, 1, 1).bernoulli_(0.9), lambda y: (torch.rand_like(y) > 0.1).float()])
def test_a_branch_may_gate_itself_and_be_dropped(noise):
    """SE-ResNet: the gate is computed from what it weighs; stochastic depth and dropout by hand multiply by random bits."""

    def body(s, x):
        y = s.b(F.relu(s.b(x)))
        y = y * torch.sigmoid(s.c(y.mean(1, keepdim=True)))
        return s.d(s.a(x) + y * noise(y))

    assert kinds(found(body, c=nn.Linear(D, D), d=nn.Linear(D, D))) == {"projection": 1}


def fused(x):
    return torch.arange(0, 2 * D, 2, device=x.device)


DELTAS = {
    "index_copy": lambda d, z: z.index_copy(-1, fused(d), d),
    "index_add": lambda d, z: z.index_add(-1, fused(d), d),
    "scatter": lambda d, z: z.scatter(-1, fused(d).expand(2, 5, D), d),
    "items": lambda d, z: (z.__setitem__((..., fused(d)), d), z)[1],
    "a slice": lambda d, z: (z.__setitem__((..., slice(0, D)), d), z)[1],
}


@pytest.mark.parametrize("name", DELTAS)
def test_a_low_rank_delta_that_is_scattered_is_none(name):
    """LoRA on a fused query-key-value layer."""

    def body(s, x):
        d = s.up(s.down(x))
        return s.last(s.wide(x) + DELTAS[name](d, d.new_zeros(2, 5, 2 * D)))

    layers = {"wide": nn.Linear(D, 2 * D), "down": nn.Linear(D, 4), "up": nn.Linear(4, D), "last": nn.Linear(2 * D, D)}
    sites = found(body, **layers)
    assert not sites.sites
    assert "both linear" in reasons(sites)


# Scores


@pytest.mark.parametrize("spare", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_scores_that_are_added_to_the_scores_of_the_next_layer(spare, masked):
    """RealFormer: whatever else is made of the scores and reaches no output, and whatever is returned of them."""

    def body(s, x):
        kept, before = [], None
        for layer in (s.a, s.b, s.c):
            q = layer(x)
            scores = q @ q.transpose(1, 2)
            if masked:
                scores = scores.masked_fill(scores > 9, -1e9)
            if before is not None:
                scores = scores + before
            if spare:
                scores.clone()
            before = scores
            kept.append(scores)
            x = x + scores.softmax(-1) @ q
        return x, kept

    sites = found(body, c=nn.Linear(D, D))
    assert kinds(sites) == {"identity": 3}
    assert [r.reason for r in sites.rejected].count("attention bias") == 2


# Near misses are named


class Streams(nn.Module):
    """Hyper-connections: several streams, mixed by weights that depend on them, and a branch that is written to all."""

    def __init__(self):
        super().__init__()
        self.norm, self.weights, self.f = nn.LayerNorm(D), nn.Linear(D, 3), nn.Linear(D, D)

    def forward(self, x):
        streams = torch.stack([x, x], 1)  # [B, n, S, D]
        weights = torch.tanh(self.weights(self.norm(streams)))  # [B, n, S, n + 1]
        mixed = torch.einsum("bnsm,bnsd->bmsd", weights, streams)
        out = F.gelu(self.f(mixed[:, 0]))
        return (mixed[:, 1:] + out[:, None].expand(-1, 2, -1, -1)).sum(1)


NEAR = {
    "scaled residual": lambda s, x: x * s.gate + s.b(F.relu(s.a(x))),
    "gated residual": lambda s, x: x * torch.sigmoid(s.b(x)) + s.b(F.relu(s.a(x))),
    "subtraction": lambda s, x: x - s.b(F.relu(s.a(x))),
}


@pytest.mark.parametrize("reason", NEAR)
def test_near_misses_have_their_name(reason):
    sites = found(NEAR[reason])
    assert not sites.sites
    assert reasons(sites) == {reason}


def test_mixed_streams_have_their_name():
    sites = detect(Streams(), (X,))
    assert not sites.sites
    assert reasons(sites) == {"mixed residual"}


def test_differences_that_are_no_residual_connections_are_not_listed():
    sites = found(lambda s, x: s.a(x) - s.b(F.relu(x)) * torch.relu(x - 1))
    assert not sites.rejected


# Equal values


SLICES = {
    "slices": lambda s, x: x[..., :8] + s.narrow(x[..., :8]),
    "chunks": lambda s, x: x.chunk(2, -1)[0] + s.narrow(x.chunk(2, -1)[0]),
    "views": lambda s, x: x.view(10, D)[:, :8] + s.narrow(x.view(10, D)[:, :8]),
    "picked": lambda s, x: (i := x[0, :, 0].argsort(), x[:, i][..., :8] + s.narrow(x[:, i][..., :8]))[1],
    "written back": lambda s, x: (y := s.a(x), y[..., :8].copy_(y[..., :8] + s.narrow(y[..., :8])), y)[2],
    "an item": lambda s, x: (y := s.a(x), y.__setitem__((..., slice(0, 8)), y[..., :8] + s.narrow(y[..., :8])), y)[2],
}


@pytest.mark.parametrize("name", SLICES)
def test_two_equal_slices_are_one_value(name):
    assert kinds(found(SLICES[name], narrow=nn.Linear(8, 8))) == {"identity": 1}


def test_a_slice_after_a_write_is_another_value():
    def body(s, x):
        y = s.a(x)
        before = y[..., :8] * 1.0
        part = y[..., :8]
        y.mul_(torch.sigmoid(s.b(x)))
        return before + s.narrow(y[..., :8]), part

    assert kinds(found(body, narrow=nn.Linear(8, 8))) == {"partial": 1}  # y before the write is read whole by the write


def test_two_dropouts_of_one_value_differ():
    def body(s, x):
        y = s.a(x)
        return F.dropout(y, 0.5) + s.b(F.dropout(y, 0.5))

    sites = found(body)
    assert kinds(sites) == {"identity": 1}
    assert sites.flow.values[sites.bindings["laurel_0"].residual.source].op == "linear"


# Functions with a backward of their own


class Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, f):
        return x + f

    @staticmethod
    def backward(ctx, gradient):
        return gradient, gradient


class SumsWithoutContext(torch.autograd.Function):
    @staticmethod
    def forward(x, f):
        return x + f

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient, gradient


class SumsDecorated(Sums):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x, *values):
        return x + values[0]


class Applies(Net):
    def forward(self, x):
        return self.body.apply(x, self.a(x))


@pytest.mark.parametrize("function", [Sums, SumsWithoutContext, SumsDecorated])
def test_a_sum_with_a_backward_of_its_own_is_not_rewritten(function):
    with pytest.raises(RewriteError, match="with its own backward"):
        rewrite(Applies(function), (X,))


def test_a_decorator_of_such_a_forward_is_no_forward():
    """One that says not what it wraps: its code is that of all that it decorates."""

    def passing(function):
        return lambda *args: function(*args)

    @passing
    def own_backward(*_):
        return _has_own_backward(sys._getframe())

    class Doubles(Sums):
        seen = None

        @staticmethod
        @passing
        def forward(ctx, x):
            Doubles.seen = own_backward()
            return x * 2

    assert not own_backward(X)
    Doubles.apply(X)
    assert Doubles.seen
    assert not own_backward(X)
