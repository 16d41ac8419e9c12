"""Which operators fit a model, and what refuses the others."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from laurel_rewrite import ConfigError, detect, rewrite
from laurel_rewrite.operators import registry
from laurel_rewrite.plan.fits import fits, plan_of
from laurel_rewrite.testing import Stack
from laurel_rewrite.testing.stacks import AttentionStack, PostNormStack

D = 16
X = torch.randn(2, 5, D)


class Alone(nn.Module):
    """One sum, in no block."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.head = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + torch.tanh(self.f(x)))


@pytest.mark.parametrize(
    ("stack", "refused"),
    [
        (Stack, {"deepnorm": "a normalisation behind each sum", "gemma3n": "around attention"}),
        (AttentionStack, {"deepnorm": "a normalisation behind each sum"}),
        (
            Alone,
            {
                "denseformer": "repeated blocks end, 1 of them at least, and here are 0",
                "elc-bert": "2 of them at least",
                "muddformer": "repeated blocks end",
                "parallel": "repeated blocks end",
                "x0": "2 of them at least",
                "backout": "one connection",
                "deepnorm": "ends in no linear map",
                "fixup": "ends in no linear map",
                "gemma3n": "around attention",
            },
        ),
    ],
)
def test_what_does_not_fit_says_why(stack, refused):
    found = {fit.operator: fit for fit in fits(detect(stack(), (X,)))}
    assert [*found] == [*registry.operators()]
    assert {name for name, fit in found.items() if not fit.fits} == refused.keys()
    for name, words in refused.items():
        assert words in found[name].reason
    assert all(fit.connections == len(detect(stack(), (X,))) for fit in found.values() if fit.fits)
    assert (found["rw"].start, found["rw"].added) == ("exact", 2 * found["rw"].connections)
    assert found["attnres"].start == "scale-free"
    assert found["stochastic-depth"].start == "evaluation"


def test_norms_between_the_sums():
    """What carries a state is refused there, but for what is read behind the norm."""
    found = {fit.operator: fit for fit in fits(detect(PostNormStack(), (X,)))}
    assert found["deepnorm"].fits
    assert found["denseformer"].fits
    assert found["x0"].fits
    assert "a normalisation stands between" in found["hc"].reason
    assert "a normalisation stands between" in found["attnres"].reason


class Two(nn.Module):
    """Two streams, one of them with norms between its sums."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Stack(), PostNormStack()

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


def test_an_operator_may_fit_some_streams():
    plan, reason = plan_of(detect(Two(), (X,)), "ladder")
    assert plan is not None
    assert {row.id.partition(".")[0] for row in plan.sites} == {"one"}
    assert "a normalisation stands between" in reason


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("attnres", {"block_size": 7}, "block_size 7 is above the number of its connections, 6"),
        ("attnres", {"block_size": 0}, "block_size must be a whole number of at least 1"),
        ("denseformer", {"period": 4}, "period 4 is above the number of its blocks, 3"),
        ("denseformer", {"dilation": 9}, "dilation 9 is above the number of its blocks, 3"),
        ("hc", {"streams": 1}, "streams must be a whole number of at least 2"),
        ("mhc-lite", {"streams": 6}, "streams must be a whole number of at least 2 and at most 5"),
        ("frac", {"parts": 3}, "its 16 features do not divide into 3 parts"),
        ("grn-v1", {"exclude": "blocks.0.laurel_1"}, "grn-v1 needs every connection of its stream"),
        ("stochastic-depth", {"drop_rate": 1.0}, "drop_rate must be a number of at least 0.0 and at most 0.99"),
    ],
)
def test_impossible_options_are_refused_before_anything_is_changed(variant, options, message):
    model = Stack()
    with pytest.raises(ConfigError, match=message):
        rewrite(model, (X,), variant=variant, inplace=True, **options)
    assert not hasattr(model.blocks[0], "laurel_0")


def test_the_command_lists_operators(here):
    done = here("operators")
    assert done.returncode == 0, done.stderr
    for name, operator in registry.operators().items():
        if operator.connection.__module__.startswith("laurel_rewrite."):
            assert f"{name}  {operator.formula}" in done.stdout
    one = json.loads(here("operators", "hc", "--json").stdout)["operators"][0]
    assert one["options"]["streams"]["default"] == 4
    assert one["state"] == 4 * 768
    assert here("operators", "hcc").returncode == 2


def test_the_command_says_what_fits_a_model(here):
    done = here("operators", "hc", "deepnorm", "--model", "timm:vit_tiny_patch16_224", "--set", "depth=2", "--json")
    assert done.returncode == 0, done.stderr
    found = {one["operator"]: one for one in json.loads(done.stdout)["operators"]}
    assert (found["hc"]["connections"], found["hc"]["start"]) == (4, "scale-free")
    assert found["deepnorm"]["streams"] == []
    assert "a normalisation behind each sum" in found["deepnorm"]["reason"]
    shown = here("operators", "deepnorm", "--model", "timm:vit_tiny_patch16_224", "--set", "depth=2")
    assert "deepnorm does not fit: " in shown.stdout


def test_help_shows_the_options_of_the_named_operator(here):
    usual, other = here("--help").stdout, here("--variant", "hc", "--help").stdout
    assert "--init-down" in usual
    assert "--streams" not in usual
    assert "--streams" in other
    assert "--init-down" not in other


@pytest.mark.parametrize("stack", [AttentionStack, PostNormStack])
def test_no_parameter_is_a_part_of_a_larger_tensor(stack):
    """Files of weights refuse such."""
    sites = detect(stack(), (X,))
    for name in registry.operators():
        plan, _ = plan_of(sites, name)
        for row in plan.sites if plan is not None else ():
            for key, value in plan.build(row, None).state_dict().items():
                assert value.untyped_storage().nbytes() == value.numel() * value.element_size(), f"{name}: {key}"


class Windows(nn.Module):
    """A stream whose positions lie in one dimension or in two, by turns, as Swin's do."""

    def __init__(self, *, square: bool) -> None:
        super().__init__()
        self.square = square
        self.blocks = nn.ModuleList(WindowBlock(square=square) for _ in range(2))
        self.head = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class WindowBlock(nn.Module):
    def __init__(self, *, square: bool) -> None:
        super().__init__()
        self.square = square
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(2))
        self.maps = nn.ModuleList(nn.Linear(D, D) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        if self.square:
            x = x.unflatten(1, (2, 2))
        x = x + self.maps[0](self.norms[0](x))
        if self.square:
            x = x.flatten(1, 2)
        return x + self.maps[1](self.norms[1](x))


def test_what_operators_cost_where_a_stream_is_reshaped():
    """As much as where it is not: a history is counted in the shape of the position that reads it."""
    x = torch.randn(2, 4, D)
    straight, reshaped = (detect(Windows(square=square), (x,)) for square in (False, True))
    assert {len(site.shape) for site in reshaped} == {3, 4}
    for name in registry.operators():
        (plan, why), (turned, _) = plan_of(straight, name), plan_of(reshaped, name)
        assert (plan is None) == (turned is None), why
        if plan is not None:
            assert [*plan.counts().values()] == [*turned.counts().values()], name
