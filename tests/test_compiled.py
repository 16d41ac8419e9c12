"""Connections in the graphs that torch.compile captures, beside the module back end."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import slow
from torch.utils.checkpoint import checkpoint
from toys import CASES

import laurel_rewrite
from laurel_rewrite import ConfigError, LaurelError, RewriteError, compile_backend, detect, prepare, remove, rewrite
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.plan import LaurelConfig, Plan
from laurel_rewrite.sources.models import build
from laurel_rewrite.testing import Stack, moved, near
from laurel_rewrite.testing.stacks import AttentionStack, D, PostNormStack

X, OTHER = torch.randn(2, 5, D), torch.randn(3, 7, D)
_SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 99}


@pytest.fixture(autouse=True)
def afresh():
    torch._dynamo.reset()


def compiled(model, inner="aot_eager"):
    return torch.compile(model, backend=compile_backend(model, inner=inner))


def twins(model, args, kwargs=None, **options):
    """A prepared model off its start, and the same from the module back end."""
    ready = moved(prepare(model, args, kwargs, **options))
    edited = rewrite(model, args, kwargs, **options)
    missing = edited.load_state_dict(ready.state_dict())
    assert not missing.missing_keys
    return ready, edited


@pytest.mark.parametrize("name", [name if name in ("loop", "parallel", "tied", "helper") else slow(name) for name in CASES])
def test_forms_of_sums(name):
    case = CASES[name]
    model = case.make().eval()
    x, other = torch.randn(case.shape), torch.randn(case.shape[0] + 1, *case.shape[1:])
    ready, edited = twins(model, (x,), variant="rw+lr", rank=4)
    fast = compiled(ready)
    for given in (x, other):
        # float32: a sum of several branches is one call here, and several in the source.
        near(fast(given).detach(), edited(given).detach(), 1e-5)
    assert (edited(x) - model(x)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("stack", "variant", "options"),
    [
        (Stack, "rw+lr+pa", {"rank": 4}),
        (Stack, "hc", {"streams": 2}),
        (PostNormStack, "denseformer", {}),
        (AttentionStack, "dca", {}),
        slow(Stack, "attnres", {"block_size": 2}),
        slow(AttentionStack, "gemma3n", {"rank": 4}),
        slow(Stack, "fixup", {}),
        slow(PostNormStack, "deepnorm", {}),
        slow(Stack, "parallel", {}),
    ],
)
def test_operators_with_states_and_inputs(stack, variant, options):
    model = stack().eval()
    ready, edited = twins(model, (X,), variant=variant, **options)
    fast = compiled(ready)
    for given in (X, OTHER):
        near(fast(given).detach(), edited(given).detach(), 1e-5)


@pytest.mark.parametrize(
    ("name", "settings", "variant"),
    [
        ("hf:llama", {**_SMALL, "num_key_value_heads": 2}, "rw+lr"),
        slow("hf:llama", {**_SMALL, "num_key_value_heads": 2}, "muddformer"),
        slow("hf:bert", _SMALL, "denseformer"),
        slow("hf:gpt2", {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 99}, "rw+lr+pa"),
        slow("hf:albert", _SMALL, "rw+lr"),
        slow("hf:t5", {"num_layers": 2, "d_model": 32, "d_ff": 64, "num_heads": 2, "vocab_size": 99}, "hc"),
        slow("torchvision:resnet18", {}, "rw+lr"),
        slow("timm:vit_tiny_patch16_224", {"depth": 2, "embed_dim": 32, "num_heads": 2}, "hc"),
        slow("timm:swin_tiny_patch4_window7_224", {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)}, "rw+lr"),
    ],
)
def test_architectures(name, settings, variant):
    built = build(name, settings)
    built.model.eval()
    ready, edited = twins(built.model, built.args, built.kwargs, variant=variant)
    with torch.no_grad():
        found, expected = compiled(ready)(*built.args, **built.kwargs), edited(*built.args, **built.kwargs)
    first = [out if isinstance(out, torch.Tensor) else out[0] for out in (found, expected)]
    assert torch.isfinite(first[1]).all()
    near(first[0], first[1], 1e-5)


def trained(model, call, steps=20):
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (call(X) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("inner", ["aot_eager", slow("inductor")])
def test_it_trains_as_the_module_back_end_does(inner):
    ready, edited = twins(Stack(), (X,), variant="rw+lr+pa", rank=4)
    before = copy.deepcopy(ready.state_dict())
    fast = trained(ready, compiled(ready, inner))
    plain = trained(edited, edited)
    assert fast[-1] < 0.8 * fast[0]
    torch.testing.assert_close(torch.tensor(fast), torch.tensor(plain), rtol=1e-4, atol=1e-6)
    after = edited.state_dict()
    for name, value in ready.state_dict().items():
        # 20 steps in float32
        torch.testing.assert_close(value, after[name], rtol=1e-3, atol=1e-5)
    assert all(not torch.equal(before[name], ready.state_dict()[name]) for name in before if "laurel" in name)


def test_one_set_of_parameters_for_all_graphs():
    """Another size is another graph, of the same connections."""
    ready, edited = twins(Stack(), (X,), variant="rw")
    fast = compiled(ready)
    for given in (X, OTHER, torch.randn(4, 9, D)):
        near(fast(given).detach(), edited(given).detach(), 1e-5)
    names = [name for name, _ in ready.named_parameters() if "laurel" in name]
    assert names == [name for name, _ in edited.named_parameters() if "laurel" in name]
    with torch.no_grad():
        for model in (ready, edited):
            next(sites_of(model)["blocks.0.laurel_0"].parameters()).fill_(0.7)
    near(fast(OTHER).detach(), edited(OTHER).detach(), 1e-5)


def test_each_mode_has_its_graph():
    """An operator may compute something else in training; the model itself does not here."""
    plain = Stack().eval()
    ready = prepare(plain, (X,), variant="stochastic-depth", drop_rate=0.5)
    fast = compiled(ready)
    ready.eval()
    evaluated = fast(X)
    near(evaluated.detach(), plain(X).detach(), 1e-5)
    ready.train()
    assert (fast(X) - evaluated).abs().max() > 1e-3
    ready.eval()
    assert torch.equal(fast(X), evaluated)


def test_a_local_operator_block_by_block():
    ready, edited = twins(Stack(), (X,), variant="rw+lr", rank=4)
    back_end = compile_backend(ready, inner="aot_eager")
    for block in ready.blocks:
        block.compile(backend=back_end)
    near(ready(OTHER).detach(), edited(OTHER).detach(), 1e-5)


def test_under_autocast_and_checkpoints():
    ready, edited = twins(Stack(), (X,), variant="rw+lr", rank=4)
    for model in (ready, edited):
        model.call = lambda block, x: checkpoint(block, x, use_reentrant=False)
    fast = compiled(ready)
    near(fast(X).detach(), edited(X).detach(), 1e-5)
    fast(X).sum().backward()
    edited(X).sum().backward()
    for (name, one), (_, two) in zip(ready.named_parameters(), edited.named_parameters(), strict=True):
        assert one.grad is not None, name
        near(one.grad, two.grad, 1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near(fast(X).detach().float(), edited(X).detach().float(), 2e-2)


def test_two_operators_of_equal_names_are_two_for_inductor():
    """Compilers keep what they made by what a graph calls."""
    found = []
    for variant in ("rw", "highway", "rw"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        ready, edited = twins(Stack(), (X,), variant=variant)
        near(compiled(ready, "inductor")(X).detach(), edited(X).detach(), 1e-5)
        found.append(edited(X))
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_copies_and_pickles():
    ready, edited = twins(Stack(), (X,), variant="rw+lr", rank=4)
    for other in (copy.deepcopy(ready), pickle.loads(pickle.dumps(ready))):
        near(compiled(other)(X).detach(), edited(X).detach(), 1e-5)
        assert type(other.blocks[0]).__name__ == type(Stack().blocks[0]).__name__


def test_inplace_and_taken_back():
    model = Stack()
    keys, first, cls = list(model.state_dict()), model(X), type(model.blocks[0])
    assert prepare(model, (X,), variant="rw", inplace=True) is model
    with pytest.raises(ConfigError, match="rewritten already"):
        prepare(model, (X,), variant="rw")
    remove(model, inplace=True)
    assert list(model.state_dict()) == keys
    assert type(model.blocks[0]) is cls
    assert torch.equal(model(X), first)


# Never without the connections in silence


def test_outside_of_the_back_end_it_raises():
    ready = prepare(Stack(), (X,), variant="rw")
    with pytest.raises(LaurelError, match=r"prepared for laurel_rewrite.compile_backend, and runs without"):
        ready(X)
    with pytest.raises(Exception, match=r"prepared for laurel_rewrite.compile_backend, and runs without"):
        torch.compile(ready, backend="aot_eager")(X)
    for strict in (False, True):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=r"prepared for laurel_rewrite.compile_backend, and runs without"):
            torch.export.export(ready, (X,), strict=strict)


def broken(place):
    """A stack whose graph breaks."""

    class Block(type(Stack().blocks[0])):
        def forward(self, x):
            h = self.f(x)
            torch._dynamo.graph_break()
            x = x + h
            return x + self.g(x)

    class Broken(Stack):
        block = Block if place == "block" else Stack.block

        def forward(self, x):
            for number, block in enumerate(self.blocks):
                if place == "stream" and number == 1:
                    torch._dynamo.graph_break()
                x = block(x)
            return self.head(self.norm(x))

    return Broken()


def test_a_graph_that_breaks_between_the_blocks():
    model = broken("stream")
    ready, edited = twins(model, (X,), variant="rw+lr", rank=4)
    near(compiled(ready)(OTHER).detach(), edited(OTHER).detach(), 1e-5)
    with pytest.raises(RewriteError, match=r"reads the states of its whole stream, and blocks.1.laurel_0 .* is not in the same graph"):
        prepare(model, (X,), variant="rw+lr+pa", rank=4)


def test_a_graph_that_breaks_inside_a_block():
    with pytest.raises(
        RewriteError, match=r"blocks.0.laurel_0 .* the graph that TorchDynamo made has the beginning of blocks.0, and not this sum"
    ):
        prepare(broken("block"), (X,), variant="rw")


def test_a_site_that_was_not_there():
    class Deeper(Stack):
        more = False

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            if self.more:
                x = x + torch.tanh(self.head(x))
            return self.head(self.norm(x))

    ready = prepare(Deeper(), (X,), variant="rw")
    fast = compiled(ready)
    fast(X)
    ready.more = True
    with pytest.raises(Exception, match=r"laurel_0 .* is a residual connection that was not there when the model was prepared"):
        fast(X)


def test_states_do_not_go_through_checkpoints():
    ready = prepare(Stack(), (X,), variant="rw+lr+pa", rank=4)
    ready.call = lambda block, x: checkpoint(block, x, use_reentrant=False)
    with pytest.raises(Exception, match="its stream goes through regions of the graph"):
        compiled(ready)(X)


def test_a_model_that_was_not_prepared():
    with pytest.raises(ConfigError, match="was not prepared"):
        compile_backend(Stack())
    with pytest.raises(ConfigError, match="was not prepared"):
        compile_backend(rewrite(Stack(), (X,), variant="rw"))


def test_a_plan_says_what_it_says_elsewhere():
    model = Stack()
    plan = Plan.from_sites(detect(model, (X,)), LaurelConfig("rw", include="blocks.1"))
    ready = prepare(model, (X,), plan=plan)
    assert list(sites_of(ready)) == ["blocks.1.laurel_0", "blocks.1.laurel_1"]
    assert compiled(ready)(X).shape == X.shape
    assert laurel_rewrite.learned(ready)
