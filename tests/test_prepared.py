"""Operators that scale the weights of their branches."""

from __future__ import annotations

import copy

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from laurel_rewrite import (
    ConfigError,
    Connection,
    VerificationError,
    export_onnx,
    load,
    register_operator,
    remove,
    rewrite,
    rewrite_onnx,
    save,
    write_onnx,
)
from laurel_rewrite.operators import registry
from laurel_rewrite.operators.config import BranchMap, SiteConfig
from laurel_rewrite.sources.models import build
from laurel_rewrite.testing import near
from laurel_rewrite.testing.stacks import AttentionStack
from laurel_rewrite.verification.onnx_runs import run_onnx

D = 16
pytestmark = pytest.mark.usefixtures("toys")


@torch.no_grad()
def scaled(model: nn.Module, factors: dict[str, float]) -> nn.Module:
    model = copy.deepcopy(model)
    for name, factor in factors.items():
        for parameter in (model.get_submodule(name).weight, model.get_submodule(name).bias):
            if parameter is not None:
                parameter.mul_(factor)
    return model


def shrunk_resnet() -> tuple[nn.Module, Tensor, dict[str, float]]:
    """Its branches end in batch norms."""
    model = build("torchvision:resnet18", {"num_classes": 10}).model
    factors = {
        f"layer{n}.{b}.{name}": c for n in (1, 2, 3, 4) for b in (0, 1) for name, c in (("conv1", 0.25), ("conv2", 0.25), ("bn2", 0.5))
    }
    return model, torch.randn(3, 3, 32, 32), factors


def shrunk_attention() -> tuple[nn.Module, Tensor, dict[str, float]]:
    factors = {
        f"blocks.{b}.{name}": c for b in range(3) for name, c in (("f.v", 0.25), ("f.linear", 0.5), ("g.inner", 0.25), ("g.linear", 0.5))
    }
    return AttentionStack(), torch.randn(3, 4, D), factors


def shrunk_encoder() -> tuple[nn.Module, Tensor, dict[str, float]]:
    """One matrix makes q, k and v, and parameters of a module that calls a function."""
    return nn.TransformerEncoderLayer(D, 4, 32, batch_first=True, norm_first=True), torch.randn(3, 4, D), {
        "self_attn.out_proj": 0.5,
        "linear1": 0.25,
        "linear2": 0.5,
    }  # fmt: skip


def shrunk_bert() -> tuple[nn.Module, Tensor, dict[str, float]]:
    """All biases are 0 at its start, and one constant in its ONNX graph."""
    layers = {"attention.self.value": 0.25, "attention.output.dense": 0.5, "intermediate.dense": 0.25, "output.dense": 0.5}
    model = build(
        "hf:bert", {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    ).model.bert.encoder
    return First(model), torch.randn(2, 5, 32), {f"model.layer.{n}.{name}": c for n in range(2) for name, c in layers.items()}


class First(nn.Module):
    """The first output of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[0]


@pytest.mark.parametrize("way", ["module", "in place", "graph", "onnx"])
@pytest.mark.parametrize("made", [shrunk_resnet, shrunk_attention, shrunk_encoder, shrunk_bert])
def test_weights_of_the_branch_are_scaled_once(made, way, tmp_path):
    torch.manual_seed(0)
    model, x, factors = made()
    model.eval()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)  # statistics that do something
    right = scaled(model, factors)(x).detach()
    if way == "onnx":
        given = export_onnx(model, (x,), None, tmp_path / "base.onnx")
        path = write_onnx(rewrite_onnx(given, variant="toy-shrunk"), tmp_path / "laurel.onnx")
        near(torch.from_numpy(run_onnx(path, {ir.load(given).graph.inputs[0].name: x.numpy()}, optimised=True)[0]), right, 1e-5)
        return
    before = model(x).detach()
    source = torch.export.export(model, (x,)).module(check_guards=False) if way == "graph" else model
    made_of = rewrite(source, (x,), variant="toy-shrunk", inplace=way == "in place").eval()
    near(made_of(x).detach(), right, 1e-6)
    assert (made_of is model) == (way == "in place")
    if way == "module":
        assert torch.equal(model(x), before)
    if way != "graph":
        assert torch.equal(remove(made_of)(x), before)


def test_a_factor_of_zero_and_the_way_back(tmp_path, caplog):
    torch.manual_seed(0)
    base, x = AttentionStack().eval(), torch.randn(3, 4, D)
    model = rewrite(base, (x,), variant="toy-shrunk", end=0.0)
    assert torch.equal(model(x), base.head(base.norm(x)))
    with torch.no_grad():
        model.blocks[0].f.linear.weight.add_(1.0)  # trained: it stays
    back = remove(model)
    assert torch.equal(back.blocks[0].f.linear.weight, torch.ones(D, D))
    for name, parameter in base.named_parameters():
        assert name == "blocks.0.f.linear.weight" or torch.equal(back.get_parameter(name), parameter), name
    save(model, tmp_path / "saved")
    loaded = load(tmp_path / "saved").eval()
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(remove(loaded).blocks[1].f.linear.weight, torch.zeros(D, D))
    assert "the weights of 6 branches, that of blocks.0.laurel_0 first, stay as their operator left them" in caplog.text


class Tied(nn.Module):
    """Two branches with one map."""

    def __init__(self, *, twice: bool) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(D, D), nn.Linear(D, D)
        if twice:
            self.g.weight = self.f.weight

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(torch.tanh(x))
        return x + self.g(torch.tanh(x))


class Curved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.f(x))


def test_branches_that_cannot_be_scaled_are_refused():
    x = torch.randn(2, 5, D)
    rewrite(Tied(twice=False), (x,), variant="toy-shrunk")
    with pytest.raises(ConfigError, match=r"laurel_0 .* toy-shrunk scales .\.weight, which linear_1 reads, too"):
        rewrite(Tied(twice=True), (x,), variant="toy-shrunk")
    with pytest.raises(ConfigError, match=r"laurel_0 .* toy-shrunk scales its branch, which ends in no linear map and in no norm"):
        rewrite(Curved(), (x,), variant="toy-shrunk")


def test_a_start_that_the_factor_breaks_is_refused_and_undone():
    class Claims(Connection):
        name = "toy-claims"
        formula = "x + f, f at half its size"

        def step(self, x: Tensor, f: Tensor) -> Tensor:
            return x + f

        @classmethod
        def prepare_branch(cls, config: SiteConfig, place: BranchMap) -> float:
            return 0.5 if place.last else 1.0

    class Mends(Claims):
        """A power of two, so that not a bit is lost."""

        name = "toy-mends"

        def step(self, x: Tensor, f: Tensor) -> Tensor:
            return x + 2 * f

    for operator in (Claims, Mends):
        register_operator(operator)
    try:
        torch.manual_seed(0)
        base, x = AttentionStack().eval(), torch.randn(3, 4, D)
        before = {name: parameter.clone() for name, parameter in base.named_parameters()}
        for inplace in (False, True):
            with pytest.raises(VerificationError, match=r"exact start"):
                rewrite(base, (x,), variant="toy-claims", inplace=inplace)
            assert all(torch.equal(parameter, before[name]) for name, parameter in base.named_parameters())
        assert torch.equal(rewrite(base, (x,), variant="toy-mends").eval()(x), base(x))
    finally:
        registry.forget(["toy-claims", "toy-mends"])
