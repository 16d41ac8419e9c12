"""Every operator is its published definition: in outputs and gradients, in float64, of other shapes than the traced one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import slow
from published import DEFINITIONS
from published_models import ConvNet, D, Gpt, PostNormGpt, by_hand
from torch import Tensor, nn

from laurel_rewrite import rewrite
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.operators.registry import operators
from laurel_rewrite.testing import check_operator, equal, gradients_of, moved, near

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = {ConvNet: ((2, D, 5, 4), (3, D, 4, 6)), Gpt: ((2, 5, D), (3, 7, D)), PostNormGpt: ((2, 5, D), (3, 7, D))}
"""Traced, and compared."""
BLOCKS = 4
PASSED_ON = {"dt", "dilation", "period", "newest", "block_size", "total", "streams", "rounds", "parts", "active", "normalize", "depth"}
"""Options that change the formula, and not its parameters alone."""


def rewritten(kind: type[nn.Module], name: str, *, blocks: int = BLOCKS, **options: Any) -> nn.Module:
    """With all parameters off their start, those of the branches too that the operator set to 0."""
    model = moved(rewrite(kind(blocks), (torch.randn(SHAPES[kind][0]),), variant=name, verify=False, **options))
    with torch.no_grad():
        for connection in sites_of(model).values():
            for scaled in connection.prepared:
                parameter = model.get_parameter(scaled)
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.double().eval()


def compare(kind: type[nn.Module], name: str, options: dict[str, Any], **given: Any) -> None:
    """Outputs and gradients of a rewritten model, and those of the definition."""
    torch.manual_seed(0)
    model = rewritten(kind, name, **options)
    x = torch.randn(SHAPES[kind][1], dtype=torch.float64)
    found = model(x)
    right = by_hand(model, x, DEFINITIONS[name], **{key: value for key, value in options.items() if key in PASSED_ON}, **given)
    near(found, right, 1e-10)
    gradients = gradients_of(model, found)
    assert sum(".laurel_" in key for key in gradients) == sum(".laurel_" in key for key, _ in model.named_parameters())
    equal(gradients, gradients_of(model, right), 1e-10)


LOCAL: list[tuple[str, dict[str, Any]]] = [
    *(("rw-vector", {"normalize": bound}) for bound in ("softmax", "sigmoid", "none", "paper")),
    ("rezero", {}),
    ("skipinit", {"init": 0.2}),
    ("layerscale", {"init": 0.1}),
    ("fixup", {}),
    ("contractive", {"dt": 0.3}),
    ("contractive", {"dt": 0.3, "step_size": "learned"}),
    ("highway", {"gate": "scalar"}),
    ("highway", {"gate": "vector"}),
    ("gated", {"gate": "scalar"}),
    ("gated", {"gate": "vector"}),
    ("gru", {}),
    ("orthogonal", {}),
    ("delta", {"gate_init": 0.5}),
    ("lr-normed", {"rank": 4}),
]
STREAMS: list[tuple[str, dict[str, Any]]] = [
    ("x0", {}),
    ("backout", {}),
    ("backout", {"depth": 0.3}),
    ("denseformer", {}),
    ("denseformer", {"dilation": 2}),
    ("denseformer", {"period": 2}),
    ("denseformer", {"dilation": 3, "period": 2}),
    ("elc-bert", {}),
    *((f"grn-v{version}", {"newest": newest}) for version in (1, 2, 3) for newest in (0, 2)),
    ("attnres", {}),
    ("attnres", {"total": "sum"}),
    ("attnres", {"block_size": 2}),
    ("attnres", {"block_size": 3, "total": "sum"}),
    ("vertical", {"rank": 4}),
    *((name, {"mix": mix}) for name in ("hc", "frac") for mix in ("static", "dynamic")),
    ("hc", {"mix": "dynamic", "streams": 2}),
    ("frac", {"mix": "dynamic", "parts": 2}),
    ("mhc", {}),
    ("mhc", {"streams": 2, "rounds": 3}),
    ("mhc-lite", {}),
    ("mhc-lite", {"streams": 3}),
    ("lanes", {}),
    ("lanes", {"streams": 3}),
    ("altup", {}),
    ("altup", {"streams": 3, "active": "alternating"}),
    ("ladder", {}),
    ("parallel", {}),
]
ATTENTION: list[tuple[str, dict[str, Any]]] = [
    ("gemma3n", {"rank": 4}),
    ("dca", {}),
    ("dca", {"newest": 2}),
    ("muddformer", {}),
    ("muddformer", {"expansion": 3}),
]


def words(value: Any) -> str:
    """Of a case, for the name of its test."""
    return value if isinstance(value, str) else ",".join(f"{key}={option}" for key, option in value.items()) or "default"


@pytest.mark.parametrize(("name", "options"), [*LOCAL, *STREAMS, *ATTENTION], ids=words)
def test_a_gpt_is_the_definition(name, options):
    compare(Gpt, name, options)


OTHERS = ("x0", "backout", "elc-bert", "vertical", "mhc", "mhc-lite", "lanes", "altup", "ladder", "parallel")


@pytest.mark.parametrize(("name", "options"), [*LOCAL, *(slow(*case) if case[0] in OTHERS else case for case in STREAMS)], ids=words)
def test_channels_first_is_the_definition(name, options):
    compare(ConvNet, name, options)


@pytest.mark.parametrize(
    ("name", "options"),
    [("deepnorm", {}), ("x0", {}), ("denseformer", {}), ("denseformer", {"period": 2}), ("denseformer", {"dilation": 2, "period": 2})],
    ids=words,
)
def test_with_norms_between_the_sums_is_the_definition(name, options):
    """What is behind a block's norm is its output."""
    compare(PostNormGpt, name, {**options, "blocks": 3}, **({} if name == "deepnorm" else {"post": True}))


@pytest.mark.parametrize("kind", [Gpt, ConvNet])
def test_stochastic_depth_is_the_definition_with_its_own_draws(kind):
    torch.manual_seed(0)
    model = rewritten(kind, "stochastic-depth", drop_rate=0.6)
    x = torch.randn(6, *SHAPES[kind][1][1:], dtype=torch.float64)

    def draw(samples: int) -> Tensor:
        return torch.rand(samples, dtype=torch.float64)

    near(model(x), by_hand(model, x, DEFINITIONS["stochastic-depth"], rate=0.0, draw=draw), 1e-10)
    model.train()
    torch.manual_seed(1)
    found = model(x)
    torch.manual_seed(1)
    right = by_hand(model, x, DEFINITIONS["stochastic-depth"], rate=0.6, draw=draw)
    near(found, right, 1e-10)
    equal(gradients_of(model, found), gradients_of(model, right), 1e-10)
    torch.manual_seed(2)
    assert (model(x) - found).abs().max() > 0.01


def test_every_operator_has_a_definition():
    cases = {name for name, _ in [*LOCAL, *STREAMS, *ATTENTION]} | {"deepnorm", "stochastic-depth"}
    own = {
        name for name, operator in operators().items() if operator.connection.__module__.startswith("laurel_rewrite.operators.families.")
    }
    assert cases == DEFINITIONS.keys() == {name for name in own if not operators()[name].connection.__module__.endswith(".laurel")}


# Starts that are in the weights


def factors(base: nn.Module, model: nn.Module) -> dict[str, float]:
    """What the weights and biases of the first block were multiplied by."""
    after, found = model.blocks[0].state_dict(), {}
    for name, value in base.blocks[0].state_dict().items():
        found[name] = (after[name] / value).mean().item()
        near(after[name], found[name] * value, 1e-6)
    return found


@pytest.mark.parametrize(
    ("kind", "name", "layers"),
    [
        # (8N)^(-1/4), but for queries and keys
        (PostNormGpt, "deepnorm", {"attention.v": 24**-0.25, "attention.out": 24**-0.25, "mlp.up": 24**-0.25, "mlp.down": 24**-0.25}),
        # L^(-1/(2m-2)), m = 4 and m = 2, and the last is 0
        (Gpt, "fixup", {"attention.q": 6 ** (-1 / 6), "attention.k": 6 ** (-1 / 6), "attention.v": 6 ** (-1 / 6), "attention.out": 0.0, "mlp.up": 6**-0.5, "mlp.down": 0.0}),
    ],
)  # fmt: skip
def test_the_branches_start_as_published(kind, name, layers):
    base = kind(3)
    for norm in (base.blocks[0].norm_1, base.blocks[0].norm_2):
        nn.init.uniform_(norm.bias, 0.5, 1.5)  # a share of 0 says nothing
    found = factors(base, rewrite(base, (torch.randn(2, 5, D),), variant=name, verify=False))
    right = {key: layers.get(key.rpartition(".")[0], 1.0) for key in found}
    assert found == pytest.approx(right, rel=1e-5)


# Training, and the laws

SMALL: dict[str, dict[str, Any]] = {"mhc": {"streams": 2, "rounds": 5}, "mhc-lite": {"streams": 3}, "gemma3n": {"rank": 4}}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_it_trains_in_bfloat16(name):
    """From its own start, where some weights are 0 and some lanes are equal: all of it learns."""
    torch.manual_seed(0)
    x, target = torch.randn(4, 6, D), torch.randn(4, 6, D)
    model = rewrite((PostNormGpt if name == "deepnorm" else Gpt)(2), (x,), variant=name, verify=False, **SMALL.get(name, {})).train()
    start = {key: value.detach().clone() for key, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0)
    losses = []
    for _ in range(50):
        with torch.autocast("cpu", torch.bfloat16):
            found = model(x)
        losses.append((found.float() - target).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert all(value.isfinite().all() for value in model.parameters())
    assert sum(losses[-5:]) / 5 < 0.7 * losses[0]
    still = {key for key, value in model.named_parameters() if ".laurel_" in key and torch.equal(value, start[key])}
    assert still <= ({"blocks.0.laurel_0.across_gate"} if name.startswith("mhc") else set())  # which mixes equal copies


QUICK = ("gated",)


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in DEFINITIONS])
def test_every_law(name):
    assert all(outcome.passed for outcome in check_operator(name))
