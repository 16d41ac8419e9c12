"""What an operator does beside the sum: it reads behind a norm or activation, and gives queries, keys and values what they read apart."""

from __future__ import annotations

import copy

import pytest
import torch
from test_emit_torch import emitted
from test_operator_registry import PostNorm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from laurel_rewrite import (
    ConfigError,
    Connection,
    LaurelConfig,
    LaurelError,
    Reads,
    detect,
    export_onnx,
    register_operator,
    remove,
    rewrite,
    rewrite_onnx,
    save,
    write_onnx,
)
from laurel_rewrite.operators import registry
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.plan import Plan
from laurel_rewrite.sources.models import build
from laurel_rewrite.testing import _Trial, equal, gradients_of, moved, near
from laurel_rewrite.testing.stacks import Attention, AttentionStack, PostNormAttentionStack, PostNormStack, Stack, stacks_for
from laurel_rewrite.verification.onnx import run_onnx

D = 16
pytestmark = pytest.mark.usefixtures("toys")


def rewritten(base: nn.Module, variant: str, shape=(2, 5, D), **options) -> nn.Module:
    torch.manual_seed(0)
    return moved(rewrite(base, (torch.randn(shape),), variant=variant, **options)).double().eval()


# The formulas once more, with the modules' weights alone: neither hooks nor connections run.


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return x @ layer.weight.T + layer.bias


def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, (D,), layer.weight, layer.bias, layer.eps)


def test_separate_reads_are_the_formula():
    model = rewritten(AttentionStack(), "toy-apart")
    x = value = torch.randn(3, 7, D, dtype=torch.float64)
    past, reads = None, (value,) * 3
    for block in model.blocks:
        q, k, v = (linear(layer, norm(block.f.norm, r)) for layer, r in zip((block.f.q, block.f.k, block.f.v), reads, strict=True))
        f = linear(block.f.linear, torch.softmax(q @ k.transpose(1, 2) / D**0.5, -1) @ v)
        past, value = value, value + f
        f = linear(block.g.linear, torch.tanh(linear(block.g.inner, norm(block.g.norm, value))))
        new = value + f
        c = block.laurel_1
        if block is not model.blocks[-1]:
            reads = (new + c.a * past, new + c.b * f, new + c.c * value)
        else:
            assert not list(c.parameters())
        past, value = value, new
    right = linear(model.head, norm(model.norm, value))
    found = model(x)
    near(found, right, 1e-10)
    equal(gradients_of(model, found), gradients_of(model, right), 1e-10)


def test_reads_behind_a_norm_are_the_formula():
    model = rewritten(PostNormStack(), "toy-behind")
    x = value = torch.randn(3, 7, D, dtype=torch.float64)
    values = [value]
    for block in model.blocks:
        for branch, after, c in ((block.f, block.after_f, block.laurel_0), (block.g, block.after_g, block.laurel_1)):
            value = value + linear(branch.linear, torch.tanh(linear(branch.inner, value)))
            last = c is model.blocks[-1].laurel_1  # behind it there is no other connection: its sum itself is weighted
            values.append(value if last else norm(after, value))
            value = sum(a * old for a, old in zip(c.a, values, strict=True))
            value = norm(after, value) if last else value
    right = linear(model.head, norm(model.norm, value))
    found = model(x)
    near(found, right, 1e-10)
    equal(gradients_of(model, found), gradients_of(model, right), 1e-10)


def test_reads_behind_an_activation_in_resnet():
    """ReLUs of one module, called twice in each block: the block itself gives what is read."""
    torch.manual_seed(0)
    model: nn.Module = build("torchvision:resnet18", {"num_classes": 10}).model
    model = moved(rewrite(model, (torch.randn(2, 3, 64, 64),), variant="toy-behind")).double().eval()
    assert sum(c.config.linked for c in sites_of(model).values()) == 4
    x = torch.randn(3, 3, 32, 48, dtype=torch.float64)
    value = model.maxpool(torch.relu(model.bn1(model.conv1(x))))
    values: list[Tensor] = []
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in layer:
            skip = value if block.downsample is None else block.downsample(value)
            f = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(value)))))
            c = block.laurel_0
            values = [*values, skip + f] if c.config.position else [skip, skip + f]
            if c.config.linked:
                values[-1] = torch.relu(values[-1])
            value = sum(a * old for a, old in zip(c.a, values, strict=True))
            value = value if c.config.linked else torch.relu(value)
    right = model.fc(value.mean((2, 3)))
    found = model(x)
    near(found, right, 1e-10)
    equal(gradients_of(model, found), gradients_of(model, right), 1e-10)


class Bare(nn.Module):
    """Attentions without norms: their projections read the stream itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(normed=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize("way", ["module", "graph", "onnx"])
def test_projections_that_read_the_stream_itself(way, tmp_path):
    torch.manual_seed(0)
    base, x = Bare().eval(), torch.randn(2, 5, D)
    model = moved(rewrite(base, (x,), variant="toy-apart")).eval()
    connections = [*sites_of(model).values()]
    assert [c.config.separate for c in connections] == [True, True, False]
    past, value, reads = None, x, (x, x, x)
    for layer, c in zip(base.layers, connections, strict=True):
        f = layer.by_hand(*reads)
        new = value + f
        if c.config.separate:
            reads = (new + c.a * (value if past is None else past), new + c.b * f, new + c.c * value)
        past, value = value, new
    right = value.detach()
    if way == "onnx":
        given = export_onnx(base, (x,), None, tmp_path / "base.onnx")
        save(model, tmp_path / "saved")
        weights = tmp_path / "saved" / "model.safetensors"
        path = write_onnx(rewrite_onnx(given, variant="toy-apart", weights=weights), tmp_path / "laurel.onnx")
        near(torch.from_numpy(run_onnx(path, {"x": x.numpy()}, optimised=True)[0]), right, 1e-5)
    elif way == "graph":
        made = rewrite(torch.export.export(base, (x,)), variant="toy-apart").eval()
        for target, source in zip(sites_of(made).values(), connections, strict=True):
            target.load_state_dict(source.state_dict())
        near(made(x).detach(), right, 1e-6)
    else:
        near(model(x).detach(), right, 1e-6)


def test_an_input_without_a_norm_is_the_stream_itself_in_a_graph():
    """The sum that it was is another node by then."""
    torch.manual_seed(0)
    base, x = Bare().eval(), torch.randn(2, 5, D)
    model = moved(rewrite(base, (x,), variant="toy-reader")).eval()
    made = rewrite(torch.export.export(base, (x,)), variant="toy-reader").eval()
    value = x
    for layer, target, source in zip(base.layers, sites_of(made).values(), sites_of(model).values(), strict=True):
        target.load_state_dict(source.state_dict())
        value = value + layer(value) + source.c * value
    near(made(x).detach(), value.detach(), 1e-6)
    near(model(x).detach(), value.detach(), 1e-6)


# Plans, graphs and files


@pytest.mark.parametrize(
    ("stack", "variant", "key"), [(AttentionStack, "toy-apart", "projections"), (PostNormStack, "toy-behind", "behind")]
)
def test_plans_say_where(stack, variant, key):
    sites = detect(stack(), (torch.randn(2, 5, D),))
    plan = Plan.from_sites(sites, LaurelConfig(variant))
    assert Plan.from_toml(plan.to_toml()).sites == plan.sites
    assert key in plan.to_toml()
    assert key not in Plan.from_sites(sites, LaurelConfig("toy-gate")).to_toml()


@pytest.mark.parametrize(("stack", "variant"), [(AttentionStack, "toy-apart"), (PostNormStack, "toy-behind"), (Stack, "toy-lanes")])
def test_a_trainable_module_of_a_graph(stack, variant, tmp_path):
    """States that are computed are outputs of a module there, too."""
    torch.manual_seed(0)
    given = export_onnx(stack().eval(), (torch.randn(2, 5, D),), None, tmp_path / "base.onnx")
    module, graph = emitted(given, tmp_path, variant=variant)
    x = torch.randn(3, 4, D)
    (right,) = run_onnx(write_onnx(graph, tmp_path / "laurel.onnx"), {"x": x.numpy()}, optimised=False)
    found = module(x)
    near(found.detach(), torch.from_numpy(right), 1e-5)
    found.sum().backward()
    learned = [p.grad for name, c in sites_of(module).items() for p in c.parameters()]
    assert all(gradient is not None for gradient in learned)


def test_a_fused_graph_is_refused(tmp_path):
    """onnxruntime's SkipLayerNormalization adds the bias of the layer before it, too, behind the sum."""
    from onnxruntime.transformers import optimizer

    given = export_onnx(AttentionStack().eval(), (torch.randn(2, 5, D),), None, tmp_path / "base.onnx")
    fused = optimizer.optimize_model(str(given), model_type="bert", num_heads=0, hidden_size=0, opt_level=0)
    assert fused.get_fused_operator_statistics()["SkipLayerNormalization"]
    fused.save_model_to_file(str(tmp_path / "fused.onnx"))
    with pytest.raises(ConfigError, match=r"laurel_1 .* something stands between this connection and the one before it"):
        rewrite_onnx(tmp_path / "fused.onnx", variant="toy-apart")


def test_what_has_no_separate_projections_is_refused():
    class Strict(Connection):
        name = "toy-strict"
        formula = "x + f"
        reader = "toy-strict"
        separate = True
        needs = frozenset({"whole stream", "projections"})

        def step(self, x: Tensor, f: Tensor, *state: Tensor) -> Tensor:
            return x + f

    register_operator(Strict)
    try:
        fused = build("hf:gpt2", {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 99})
        with pytest.raises(ConfigError, match=r"this attention has no three linear maps, each a module called once"):
            rewrite(fused.model, fused.args, fused.kwargs, variant="toy-strict")
        rewrite(AttentionStack(), (torch.randn(2, 5, D),), variant="toy-strict")
    finally:
        registry.forget(["toy-strict"])


def test_a_norm_that_is_called_again_and_again_is_refused_as_a_module_and_works_as_a_graph():
    x = torch.randn(2, 5, D)
    with pytest.raises(ConfigError, match="and no module that is called once gives it"):
        rewrite(PostNorm(), (x,), variant="toy-behind")
    base = PostNorm().eval()
    graph = torch.export.export(base, (x,)).module(check_guards=False)
    model = moved(rewrite(graph, (x,), variant="toy-behind")).eval()
    value, values = x, [x]
    for number, (layer, c) in enumerate(zip(base.layers, sites_of(model).values(), strict=True)):
        value = value + torch.tanh(layer(value))
        values.append(value if number == 2 else base.norm(value))
        value = sum(a * old for a, old in zip(c.a, values, strict=True))
    near(model(x).detach(), base.norm(value).detach(), 1e-6)


# What happens to modules afterwards


class Wrapper(nn.Module):
    """As a LoRA: the layer inside, and something beside it that reads the same."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x


def test_a_projection_that_is_wrapped_or_replaced_is_an_error():
    x = torch.randn(2, 5, D, dtype=torch.float64)
    model = rewritten(AttentionStack(), "toy-apart")
    wrapped = copy.deepcopy(model)
    wrapped.blocks[1].f.k = Wrapper(wrapped.blocks[1].f.k)
    with pytest.raises(LaurelError, match=r"blocks.1.laurel_0: k was wrapped or replaced after the rewrite"):
        wrapped(x)
    model.blocks[1].f.k = nn.Linear(D, D).double()
    with pytest.raises(LaurelError, match=r"blocks.1.laurel_0: .* 2 of 3 were taken"):
        model(x)


def test_a_norm_that_is_replaced_is_an_error():
    model = rewritten(PostNormStack(), "toy-behind")
    model.blocks[1].after_f = nn.LayerNorm(D).double()
    with pytest.raises(LaurelError, match=r"blocks.1.laurel_1: .* was not asked for"):
        model(torch.randn(2, 5, D, dtype=torch.float64))


@pytest.mark.parametrize(("stack", "variant", "part"), [(AttentionStack, "toy-apart", "f"), (PostNormStack, "toy-behind", "after_f")])
def test_only_a_part_is_checkpointed(stack, variant, part):
    """Projections that run again in backward read what they read; what a norm gives is read outside of its checkpoint."""
    model = rewritten(stack(), variant)
    x = torch.randn(2, 5, D, dtype=torch.float64)
    right = gradients_of(model, model(x))
    twin = copy.deepcopy(model)
    for block in twin.blocks:
        module = block.get_submodule(part)
        module.forward = lambda x, inner=module.forward: checkpoint(inner, x, use_reentrant=False)
    equal(gradients_of(twin, twin(x)), right, 1e-12)


@pytest.mark.parametrize(("stack", "variant"), [(AttentionStack, "toy-apart"), (PostNormStack, "toy-behind")])
def test_hooks_go_with_the_operator(stack, variant):
    model = remove(rewritten(stack(), variant))
    assert not any(
        module._forward_hooks or module._forward_pre_hooks or module._forward_pre_hooks_with_kwargs for module in model.modules()
    )


# All of it together


class WideApart(Connection):
    """Two lanes, which queries, keys and values read in shares of their own, also behind norms between the sums."""

    name = "toy-wide-apart"
    formula = "H' = H + b f; x' = mean of H', q, k, v read c_j H'_0 + (1 - c_j) H'_1"
    reader = "toy-wide-apart"
    lead = 1
    separate = True
    start = "inexact"
    needs = frozenset({"whole stream", "plain links"})

    def build(self) -> None:
        self.b = nn.Parameter(torch.ones(2))
        if self.config.separate:
            self.c = nn.Parameter(torch.full((3,), 0.5))

    def step(self, x: Tensor, f: Tensor, *state: Tensor):
        wide = state[0] if state else torch.stack([x, x])
        wide = wide + self.b.to(x.dtype).view(2, *(1,) * x.ndim) * f
        return (wide.mean(0), wide) if self.config.linked else self.apart(wide.mean(0), wide)

    def read(self, y: Tensor, *state: Tensor):
        return self.apart(y, state[0] + (y - state[0].mean(0)))

    def apart(self, value: Tensor, wide: Tensor):
        if not self.config.separate:
            return value, wide
        shares = [c.to(value.dtype) * wide[0] + (1 - c.to(value.dtype)) * wide[1] for c in self.c]
        return Reads(value, *shares), wide


def test_a_wide_stream_that_is_read_apart_behind_norms():
    """Only where all of that is at once: `check_operator` would try each alone, too."""
    register_operator(WideApart)
    try:
        assert [*stacks_for(registry.operator(WideApart.name)).values()][-1] is PostNormAttentionStack
        laws = _Trial(WideApart.name, {}, PostNormAttentionStack, "").outcomes()
        assert len(laws) == 16
        assert not [str(law) for law in laws if not law.passed]
    finally:
        registry.forget(["toy-wide-apart"])


# What an operator may not do


def test_what_cannot_be_declared_or_returned():
    def refused(match: str, **members) -> None:
        cls = type("Wrong", (Connection,), {"name": "toy-wrong", "step": lambda self, x, f: x + f, "__module__": __name__, **members})
        with pytest.raises(ConfigError, match=match):
            register_operator(cls)

    refused("with separate it must see its whole stream", separate=True)
    halves = {"skip": lambda self, x: x, "branch": lambda self, f: f, "step": Connection.step}
    refused("it gives no Reads", separate=True, reader="it", needs={"whole stream"}, **halves)
    refused("with read it must see its whole stream", read=lambda self, y: y, reader="it")

    class Unasked(Connection):
        name = "toy-unasked"

        def step(self, x: Tensor, f: Tensor) -> Reads:
            return Reads(x + f, x, x, x)

    register_operator(Unasked)
    try:
        with pytest.raises(LaurelError, match=r"toy-unasked returned Reads, and the next branch has no separate"):
            rewrite(Stack(), (torch.randn(2, 5, D),), variant="toy-unasked")(torch.randn(2, 5, D))
    finally:
        registry.forget(["toy-unasked"])
