"""Detection on small cases and on real architectures."""

from __future__ import annotations

import gc
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from conftest import real, slow
from torch import fx, nn
from toys import CASES, D, Net, X, kinds, reasons

from laurel_rewrite import CaptureError, detect, rewrite
from laurel_rewrite.sources.models import build

IDENTITY = {
    "norm inside": lambda s, x: x + s.a(s.norm(x)),
    "cast": lambda s, x: x.double().float() + s.a(x),
    "views": lambda s, x: x.reshape(-1, D).view(2, 5, D) + s.a(x),
    "permuted": lambda s, x: x.transpose(1, 2) + s.a(x).transpose(1, 2),
    "constant scale": lambda s, x: 0.5 * x + s.a(x),
    "skip through dropout": lambda s, x: F.dropout(x, 0.1) + s.a(x),
    "pooling branch": lambda s, x: x + F.avg_pool1d(x, 3, 1, 1),
    "fft branch": lambda s, x: x + torch.fft.fft(x).real,
    "softmax branch": lambda s, x: x + torch.softmax(x, -1),
    "roll branch": lambda s, x: x + x.roll(1, 1),
    "branch read elsewhere": lambda s, x: (f := s.a(x), x + f, s.b(f))[1:],
    "builtin sum": lambda s, x: sum([x, s.a(x)]),
    "alpha": lambda s, x: torch.add(x, s.a(x), alpha=0.5),
}


@pytest.mark.parametrize("name", IDENTITY)
def test_identity_sites(name):
    assert kinds(detect(Net(IDENTITY[name]), (X,))) == {"identity": 1}


NONE = {
    "position table": (lambda s, x: x + s.table, "not data-dependent"),
    "bias": (lambda s, x: s.a(x) + s.gate, "not data-dependent"),
    "broadcast": (lambda s, x: x + s.a(x).mean(1, keepdim=True), "broadcast"),
    "gelu by tanh": (lambda s, x: s.a(0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x**3)))), "pointwise"),
    "gated skip": (lambda s, x: torch.sigmoid(s.a(x)) * x + (1 - torch.sigmoid(s.a(x))) * s.b(x), "gated residual"),
    "lerp": (lambda s, x: torch.lerp(x, s.a(x), torch.sigmoid(s.b(x))), "gated"),
    "same value twice": (lambda s, x: s.a(x + x), "pointwise"),
    "low-rank delta": (lambda s, x: s.a(x) + s.b(s.norm(s.b(x))), "both linear"),
    "experts": (lambda s, x: s.a(F.relu(s.a(x))) + s.b(F.relu(s.b(x))), "no linear path"),
    "integers": (lambda s, x: x[:, : (x.argmax(-1) + x.argmin(-1)).shape[1]], "integer"),
    "scalar": (lambda s, x: s.a(x + 1), "scalar"),
    "different slices": (lambda s, x: torch.cat([x[..., : D // 2], s.narrow(x[..., : D // 2]) + x[..., D // 2 :]], -1), None),
}


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_site_and_why(name):
    body, reason = NONE[name]
    sites = detect(Net(body), (X,))
    assert not sites.sites
    assert reason is None or reason in reasons(sites)


def test_a_subtraction_is_no_site():
    sites = detect(Net(lambda s, x: x - s.a(x)), (X,))
    assert not sites.sites


def test_a_projection_shortcut():
    sites = detect(Net(lambda s, x: s.a(x) + s.b(F.relu(s.b(x)))), (X,))
    assert kinds(sites) == {"projection": 1}


def test_a_partial_skip_is_listed_and_not_rewritten_by_default():
    def body(s, x):
        return x[..., : D // 2] + s.a(x)[..., : D // 2]

    sites = detect(Net(body), (X,))
    assert kinds(sites) == {"partial": 1}
    with pytest.raises(ValueError, match="no site to rewrite"):
        rewrite(Net(body), (X,), rank=4)


def test_a_table_shared_by_layers_is_no_site():
    class Shared(Net):
        def forward(self, x):
            bias = self.table @ self.table.T
            for layer in (self.a, self.b):
                q = layer(x)
                scores = q @ q.transpose(1, 2) + bias
                x = x + scores.softmax(-1) @ q
            return x

    sites = detect(Shared(None), (X,))
    assert kinds(sites) == {"identity": 2}


def test_residual_in_residual():
    class Inner(Net):
        def forward(self, x):
            return x + 0.2 * self.b(F.relu(self.a(x + self.a(x))))

    sites = detect(Inner(None), (X,))
    assert kinds(sites) == {"identity": 2}


def test_in_place_adds_on_views_and_their_bases():
    def body(s, x):
        y = s.a(x)
        flat = y.view(-1, D)
        flat += x.view(-1, D)  # y has the sum too
        return y + s.b(y)

    assert kinds(detect(Net(body), (X,))) == {"identity": 2}


def test_a_laurel_of_the_models_own_is_recognised():
    class LaurelBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(D, 4), nn.Linear(4, D)

        def forward(self, x):
            return x + self.right(self.left(x))

    class Holder(Net):
        def __init__(self):
            super().__init__(None)
            self.augmented = LaurelBlock()

        def forward(self, x):
            return self.a(self.augmented(x))

    sites = detect(Holder(), (X,))
    assert not sites.sites
    assert "existing LAuReL" in reasons(sites)


@pytest.mark.parametrize("name", CASES)
def test_toys(name):
    case = CASES[name]
    sites = detect(case.make(), (torch.randn(case.shape),))
    assert len(sites) == case.sites
    assert len({site.id for site in sites}) == len(sites)


def test_the_fields_of_a_site():
    sites = detect(CASES["images"].make(), (torch.randn(2, 3, 8, 8),)).sites
    assert [(s.id, s.kind, s.owner, s.shape, s.axis, s.dim, s.stream, s.index) for s in sites] == [
        ("laurel_0", "projection", "", (2, D, 4, 4), 1, D, 0, 0),
        ("laurel_1", "identity", "", (2, D, 4, 4), 1, D, 0, 1),
    ]
    file, line = sites[0].where.rsplit(":", 1)
    with open(file) as source:
        assert "out += self.down(x)" in source.read().splitlines()[int(line) - 1]
    tied = detect(CASES["tied"].make(), (X,)).sites
    assert [s.id for s in tied] == [f"block.laurel_{k}{call}" for call in ("", "@1", "@2") for k in (0, 1)]
    assert [s.index for s in tied] == list(range(6))
    loop = detect(CASES["loop"].make(), (X,)).sites
    assert [s.id for s in loop] == ["laurel_0.0", "laurel_0.1", "laurel_0.2"]


REAL = {
    "torchvision:resnet18": {"identity": 5, "projection": 3},
    "torchvision:resnet50": {"identity": 12, "projection": 4},
    "torchvision:vgg11": {},
    "timm:vit_small_patch16_224": {"identity": 24},
    "timm:convnext_tiny": {"identity": 18},
    "timm:swin_tiny_patch4_window7_224": {"identity": 24},
    "timm:mixer_s32_224": {"identity": 16},
    "timm:repvgg_a0": {},
    "timm:caformer_s18": {"identity": 12},
    "hf:gpt2": {"identity": 24},
    "hf:bert": {"identity": 24},
    "hf:t5": {"identity": 30},
    "hf:llama": {"identity": 64},
    "hf:falcon": {"identity": 32},
    "hf:albert": {"identity": 24},
}


LARGE = {"hf:llama", "hf:falcon", "timm:caformer_s18", "timm:swin_tiny_patch4_window7_224"}


@pytest.mark.parametrize("spec", [slow(spec) if spec in LARGE else spec for spec in REAL])
def test_real_architectures_on_the_meta_device(spec):
    built = build(spec, device="meta")
    sites = detect(built.model, built.args, built.kwargs)
    assert kinds(sites) == REAL[spec]
    axes = {(site.axis, site.dim is not None) for site in sites}
    first = spec.startswith("torchvision") or spec.endswith(("convnext_tiny", "caformer_s18"))
    assert axes <= {(1 if first else -1, True)}


def test_streams_of_real_architectures():
    def lengths(spec):
        built = build(spec, {}, device="meta")
        return list(Counter(site.stream for site in detect(built.model, built.args, built.kwargs)).values())

    assert lengths("torchvision:resnet50") == [3, 4, 6, 3]
    assert lengths("timm:swin_tiny_patch4_window7_224") == [4, 4, 12, 4]
    assert lengths("hf:t5") == [12, 18]
    assert lengths("hf:bert") == [24]


@pytest.mark.parametrize("name", ["gpt2", "vit_small", "resnet18", "cohere"])
def test_the_same_sites_with_dynamic_shapes_and_from_a_program(name):
    example = real(name)
    plain = detect(example.model, example.args, example.kwargs)
    batch = {0: torch.export.Dim.AUTO}
    shapes = [batch] if example.args else dict.fromkeys(example.kwargs, batch)
    dynamic = detect(example.model, example.args, example.kwargs, dynamic_shapes=shapes)
    assert [(s.id, s.kind, s.axis, s.dim, s.stream) for s in plain] == [(s.id, s.kind, s.axis, s.dim, s.stream) for s in dynamic]
    assert all(isinstance(s.shape[0], str) for s in dynamic)
    with torch.no_grad():
        if hasattr(example.model, "config"):
            example.model.config.use_cache = False
        program = torch.export.export(example.model, example.args, example.kwargs, strict=False)
    assert [(s.kind, s.axis, s.dim) for s in detect(program)] == [(s.kind, s.axis, s.dim) for s in plain]


def test_sites_are_a_sequence():
    sites = detect(CASES["plain"].make(), (X,))
    assert sites[0] is sites["laurel_0"] is sites[:1][0]
    assert sites[1:] == [sites["laurel_1"]]


def test_detection_changes_nothing():
    model = real("resnet18").model.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    detect(model, (torch.randn(2, 3, 64, 64),))
    assert not model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collection_is_left_as_it_was(enabled):
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        detect(CASES["plain"].make(), (X,))
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_wrong_inputs_are_explained():
    with pytest.raises(CaptureError, match=r"Plain could not be captured with the inputs \(float32\[2, 5, 7\]\)"):
        detect(CASES["plain"].make(), (torch.randn(2, 5, 7),))
    with pytest.raises(CaptureError, match="pass example inputs"):
        detect(fx.symbolic_trace(CASES["plain"].make()))
