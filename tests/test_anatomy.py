"""What is known of a site's place: on real architectures, of which the module and its ONNX export must say the same."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch
from conftest import real, slow
from test_residuals import grown
from torch import nn
from torch.nn import functional as F

from laurel_rewrite import ConfigError, LaurelConfig, detect, export_onnx, rewrite
from laurel_rewrite.detection.anatomy import Spot, _Anatomist
from laurel_rewrite.detection.sites import _sites, sites_of_onnx
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.plan import Plan
from laurel_rewrite.plan.fitting import link_end
from laurel_rewrite.sources.models import build
from laurel_rewrite.testing.stacks import PostNormStack

KNOWN = {
    # link, role, normed, scale-free, block without its number; site by site of one block
    "gpt2": [("plain", "attention", True, True, "transformer.h"), ("plain", "feed-forward", True, True, "transformer.h")],
    "llama": [("plain", "attention", True, True, "model.layers"), ("plain", "feed-forward", True, True, "model.layers")],
    "vit_small": [("plain", "attention", True, True, "blocks"), ("plain", "feed-forward", True, True, "blocks")],
    "bert": [("norm", "attention", False, True, "encoder.layer"), ("norm", "feed-forward", False, True, "encoder.layer")],
    "cohere": [("plain", "attention+feed-forward", True, True, "model.layers")],
    "falcon": [("plain", "attention+feed-forward", True, True, "transformer.h")],
}


def in_short(spot: Spot) -> tuple[str, str, bool, bool, str]:
    role = "+".join(sorted(spot.role.split("+")))
    return spot.link, role, spot.normed, spot.scale_free, spot.block.rstrip("0123456789").rstrip(".")


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", slow("vit_small"), slow("cohere"), slow("falcon")])
def test_what_is_known_of_real_architectures(name, exported):
    example = real(name)
    sites = detect(example.model, example.args, example.kwargs)
    known = KNOWN[name]
    for site in sites:
        expected = known[site.index % len(known)]
        link = "begin" if site.index == 0 else expected[0]
        prefix = in_short(sites.spots[site.id])[4].removesuffix(expected[4])
        assert in_short(sites.spots[site.id]) == (link, *expected[1:4], prefix + expected[4])
        assert sites.spots[site.id].ends_block == (site.index % len(known) == len(known) - 1)
        assert sites.spots[site.id].length == len(sites)
    graph = sites_of_onnx(ir.load(exported(name)))
    assert [in_short(graph.spots[site.id]) for site in graph] == [in_short(sites.spots[site.id]) for site in sites]


_SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 99}


@pytest.mark.parametrize(
    ("model", "settings", "ends"),
    [
        ("hf:bert", _SMALL, ["bert.encoder.layer.1.output.LayerNorm"]),
        ("hf:deberta", _SMALL, ["deberta.encoder.layer.1.output.LayerNorm"]),  # written out, with a bias added behind it
        (
            "hf:olmo2",
            {**_SMALL, "num_key_value_heads": 2},
            [""],
        ),  # a norm behind each branch, and one of the whole model's behind the last sum
        ("torchvision:resnet18", {}, [f"layer{stage}.1" for stage in (1, 2, 3, 4)]),  # an activation that its block computes itself
    ],
)
def test_what_stands_behind_the_last_sum_as_behind_all_others(model, settings, ends):
    built = build(model, settings)
    sites = detect(built.model, built.args, built.kwargs)
    last = [site for site in sites if sites.after(site) is None]
    assert [link_end(sites, site) for site in last] == ends


def test_what_is_read_before_the_norm_is_no_link_behind_the_last_sum():
    class Read(PostNormStack):
        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.head(x) + self.kept.sum()

    stack = Read()
    stack.kept = torch.zeros(1)
    last = stack.blocks[-1]
    norm = [module for module in last.modules() if isinstance(module, nn.LayerNorm)][-1]
    sites = detect(stack, (torch.randn(2, 5, 16),))
    assert link_end(sites, sites[-1])
    norm.register_forward_pre_hook(lambda module, args: setattr(stack, "kept", args[0]))
    sites = detect(stack, (torch.randn(2, 5, 16),))
    assert not link_end(sites, sites[-1])


def test_projections_of_one_normalised_value():
    example = real("llama")
    sites = detect(example.model, example.args, example.kwargs)
    spot = sites.spots["model.layers.1.laurel_0"]
    assert spot.projections == tuple(f"model.layers.1.self_attn.{name}_proj" for name in "qkv")
    assert not sites.spots["model.layers.1.laurel_1"].projections
    fused = real("gpt2")  # q, k and v are one map
    assert not any(spot.projections for spot in detect(fused.model, fused.args, fused.kwargs).spots.values())


def test_cross_attention_has_no_three_maps_of_one_value():
    example = real("t5")
    spots = detect(example.model, example.args, example.kwargs).spots
    roles = {name: spot.role for name, spot in spots.items() if name.startswith("decoder.block.1.")}
    assert list(roles.values()) == ["attention", "attention", "feed-forward"]
    assert spots["decoder.block.1.layer.0.laurel_0"].projections
    assert not spots["decoder.block.1.layer.1.laurel_0"].projections
    assert {spot.block for name, spot in spots.items() if name.startswith("decoder.block.1.")} == {"decoder.block.1"}  # not its layers


def test_convolutions_with_an_activation_between_them():
    example = real("resnet18")
    sites = detect(example.model, example.args)
    spots = [sites.spots[site.id] for site in sites]
    assert {spot.role for spot in spots} == {"convolution"}
    assert [spot.link for spot in spots] == ["begin", "activation"] * 4
    assert not any(spot.scale_free or spot.normed for spot in spots)
    assert spots[1].block == "layer1.1"


class Of(nn.Module):
    """Two connections around a function, the second one read by a head."""

    def __init__(self, branch, *, norm=True, head=None) -> None:
        super().__init__()
        self.branch = branch
        self.norms = nn.ModuleList(nn.LayerNorm(8) if norm else nn.Identity() for _ in range(3))
        self.maps = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.tokens = nn.Linear(6, 6)
        self.head = head or (lambda self, x: self.norms[2](x))

    def forward(self, x):
        for n in (0, 1):
            x = x + self.branch(self, self.norms[n](x), n)
        return self.head(self, x)


def spots_of(branch, **options) -> list[Spot]:
    sites = detect(Of(branch, **options), (torch.randn(2, 6, 8),))
    assert len(sites) == 2
    return [sites.spots[site.id] for site in sites]


def by_hand(self, x, n):
    scores = torch.softmax(self.maps[n](x) @ self.maps[n](x).transpose(1, 2) / 3, -1)
    return F.dropout(scores, 0.1, self.training) @ self.maps[n](x)


def shifted(self, x, n):
    return self.maps[n](torch.cat([x[:, :1] * 0, x[:, :-1]], 1))


BRANCHES = {
    "attention": by_hand,
    "feed-forward": lambda self, x, n: torch.relu(self.maps[n](x)),
    "mixer": lambda self, x, n: self.tokens(x.transpose(1, 2)).transpose(1, 2),
    "mixer: fft": lambda self, x, n: torch.fft.fft(x, dim=1).real,
    "mixer: shift": shifted,
    "mixer: sums": lambda self, x, n: self.maps[n](x).cumsum(1),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_the_role_of_a_branch(name):
    for spot in spots_of(BRANCHES[name]):
        assert spot.role == name.partition(":")[0]
        assert spot.normed
        assert spot.reads.startswith("layer_norm")
        assert spot.evidence


def test_a_branch_without_a_norm_reads_the_skip():
    first, second = spots_of(BRANCHES["feed-forward"], norm=False)
    assert (first.reads, first.normed, second.normed) == ("x", False, False)
    assert not second.scale_free


def written_out(self, x):
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize(
    ("head", "free"),
    [
        (lambda self, x: self.norms[2](x), True),
        (lambda self, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), True),
        (lambda self, x: written_out(self, x), True),
        (lambda self, x: x, False),
        (lambda self, x: torch.relu(x), False),
        (lambda self, x: (self.norms[2](x), x.sum()), False),
        (lambda self, x: x.pow(2).mean(-1), False),
    ],
)
def test_what_is_free_of_scale(head, free):
    first, second = spots_of(BRANCHES["feed-forward"], head=head)
    assert first.scale_free
    assert second.scale_free == free


def test_roles_and_blocks_select():
    example = real("gpt2")
    better = rewrite(example.model, example.args, example.kwargs, variant="rw", include="attention")
    assert list(sites_of(better)) == [f"transformer.h.{n}.laurel_0" for n in range(3)]
    better = rewrite(example.model, example.args, example.kwargs, variant="rw", include=["transformer.h.[01]"], exclude="feed-forward")
    assert list(sites_of(better)) == [f"transformer.h.{n}.laurel_0" for n in range(2)]
    with pytest.raises(ConfigError, match="Nearest: attention"):
        rewrite(example.model, example.args, example.kwargs, variant="rw", include="atention")


def test_the_work_grows_with_the_graph():
    """Branches of long skips hold each other: what is looked at in all of them is bounded by the graph, and the rest is unknown."""
    short, long = (_sites(grown("ladder", blocks), ()) for blocks in (10, 300))
    assert "unknown" not in {spot.role for spot in short.spots.values()}
    assert "unknown" in {spot.role for spot in long.spots.values()}
    anatomist = _Anatomist(long.sites, long.bindings, long.flow, long.owner)
    looked = []
    whole = anatomist._between
    anatomist._between = lambda source, target: looked.append(whole(source, target)) or looked[-1]
    anatomist.spots()
    assert sum(map(len, looked)) < 25 * len(long.flow.values)


def test_selection_by_class_and_range_of_layers(tmp_path):
    """From Python and in a plan's rules, of a module and of its graph."""
    case = real("llama")
    sites = detect(case.model, case.args, case.kwargs)

    def chosen(found, **given) -> list[str]:
        return [row.id for row in Plan.from_sites(found, LaurelConfig("rw", **given)).sites]

    layers = {n: [f"model.layers.{n}.laurel_0", f"model.layers.{n}.laurel_1"] for n in range(3)}
    assert chosen(sites, include="LlamaDecoderLayer") == layers[0] + layers[1] + layers[2]
    assert chosen(sites, include="model.layers.{1..2}") == layers[1] + layers[2]
    assert chosen(sites, exclude="model.layers.{0..1}.laurel_{1..9}") == [layers[0][0], layers[1][0], *layers[2]]
    assert chosen(sites, include="Llama*", exclude="model.layers.{00..01}") == layers[2]
    for wrong, nearest in (("LlamaLayer", "LlamaDecoderLayer"), ("model.layers.{3..9}", "model.layers")):
        with pytest.raises(ConfigError, match=rf"matches no site.*{nearest}"):
            chosen(sites, include=wrong)
    text = Plan.from_sites(sites, LaurelConfig("rw")).to_toml()
    rule = '[[rule]]\nmatch = "model.layers.{1..2}"\nnormalize = "sigmoid"\n\n[[site]]'
    read = Plan.from_toml(text.replace("\n[[site]]", f"\n{rule}", 1))
    assert [row.id for row in read.sites if row.options["normalize"] == "sigmoid"] == layers[1] + layers[2]
    path = export_onnx(case.model, case.args, case.kwargs, tmp_path / "base.onnx")
    assert len(chosen(detect(path), include="LlamaDecoderLayer")) == 6


class PreActivation(nn.Module):
    """Every reader of the stream is a norm of one kind."""

    def __init__(self, norm) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norm() for _ in range(3))
        self.convolutions = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))

    def forward(self, x):
        for norm, convolution in zip(self.norms, self.convolutions, strict=False):
            x = x + convolution(torch.relu(norm(x)))
        return self.norms[2](x)


@pytest.mark.parametrize(("norm", "known"), [(lambda: nn.GroupNorm(2, 8), True), (lambda: nn.BatchNorm2d(8), False)])
def test_a_norm_with_statistics_of_its_own_knows_the_scale(norm, known, tmp_path):
    """In eval mode it divides by what it was trained on."""
    torch.manual_seed(0)
    model, x = PreActivation(norm).eval(), torch.randn(2, 8, 6, 6)
    graph = export_onnx(model, (x,), None, tmp_path / "base.onnx")
    for sites in (detect(model, (x,)), detect(graph)):
        assert [spot.scale_free for spot in sites.spots.values()] == [known, known]
    right = model(x).detach()
    with torch.no_grad():
        for module in model.convolutions:  # twice the stream, at every sum
            module.weight *= 2
            module.bias *= 2
    # What a group norm's epsilon of 1e-5 makes of variances near 0.1 to 1; a batch norm is off by the whole factor.
    assert torch.allclose(model(2 * x), right, rtol=1e-3, atol=1e-3) == known
