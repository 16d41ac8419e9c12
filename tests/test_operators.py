"""Any operator through every back end: `check_operator` on one of each class, and their formulas written out once more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import slow
from torch import Tensor, nn

import laurel_rewrite.operators.registry as registry
from laurel_rewrite import (
    Connection,
    LaurelConfig,
    detect,
    register_operator,
    rewrite,
)
from laurel_rewrite.operators.config import SiteConfig
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.plan import Plan
from laurel_rewrite.testing import Stack, check_operator, equal, gradients_of, moved, near

TOYS = [
    "toy-gate",
    "toy-vector",
    "toy-echo",
    "toy-dense",
    "toy-lanes",
    "toy-ladder",
    "toy-depth",
    "toy-scheduled",
    "toy-reader",
    "toy-bounded",
    "toy-half",
    "toy-apart",
    "toy-behind",
    "toy-shrunk",
]
D = 16
TOY_FILE = Path(__file__).with_name("operators.py")
pytestmark = pytest.mark.usefixtures("toys")


@pytest.mark.parametrize("name", ["rw+lr", "rw+lr+pa", *(slow(name) for name in ("rw", "lr", "pa", "rw+pa", "lr+pa")), *TOYS])
def test_every_law(name):
    laws = check_operator(name)
    assert len(laws) == (32 if name in ("toy-apart", "toy-behind") else 16)


# The formulas, by hand: a model that knows no connections. Its parameters are those of the rewritten one, by site.


def gate(p, xs, fs, last):
    return xs[-1] + p["a"] * fs[-1]


def vector(p, xs, fs, last):
    return (1 + p["a"]) * fs[-1] + (1 + p["b"]) * xs[-1]


def echo(p, xs, fs, last):
    return xs[-1] + fs[-1] + (p["c"] * xs[-2] if len(xs) > 1 else 0)


def dense(p, xs, fs, last):
    values = [xs[0], *(x + f for x, f in zip(xs, fs, strict=True))]
    return sum(a * value for a, value in zip(p["a"], values, strict=True))


def scheduled(p, xs, fs, last):
    return (1 - p["t"]) * (xs[-1] + fs[-1]) + p["t"] * torch.tanh(xs[-1] + fs[-1])


def ladder(p, xs, fs, last):
    """xs are what the branches read: each the stream one sum earlier."""
    return xs[0] + sum(fs if last else fs[:-1])


FORMULAS = {"toy-gate": gate, "toy-vector": vector, "toy-echo": echo, "toy-dense": dense, "toy-scheduled": scheduled, "toy-ladder": ladder}


def by_hand(model: nn.Module, x: Tensor, formula: Callable) -> Tensor:
    xs, fs = [x], []
    sites = [(block, name, branch) for block in model.blocks for name, branch in (("laurel_0", block.f), ("laurel_1", block.g))]
    for number, (block, name, branch) in enumerate(sites):
        values = dict(getattr(block, name).state_dict(keep_vars=True))
        fs.append(branch(xs[-1]))
        xs.append(formula(values, xs[: number + 1], fs, number == len(sites) - 1))
    return model.head(model.norm(xs[-1]))


def lanes_by_hand(model: nn.Module, x: Tensor) -> Tensor:
    wide = [x, x]
    for block in model.blocks:
        for connection, branch in ((block.laurel_0, block.f), (block.laurel_1, block.g)):
            f = branch(wide[0])
            wide = [sum(connection.mix[i, j] * wide[j] for j in range(2)) + connection.b[i] * f for i in range(2)]
    return model.head(model.norm(wide[0]))


@pytest.mark.parametrize("name", [*FORMULAS, "toy-lanes"])
def test_outputs_and_gradients_are_the_formulas(name):
    """In float64, at another shape than the traced one."""
    torch.manual_seed(0)
    model = moved(rewrite(Stack(), (torch.randn(2, 5, D),), variant=name)).double().eval()
    for module in sites_of(model).values():
        for buffer in module.buffers():
            buffer.fill_(0.3)
    x = torch.randn(3, 7, D, dtype=torch.float64)
    found = model(x)
    right = lanes_by_hand(model, x) if name == "toy-lanes" else by_hand(model, x, FORMULAS[name])
    near(found, right, 1e-10)
    equal(gradients_of(model, found), gradients_of(model, right), 1e-10)


def test_what_the_branch_reads_is_in_the_formula():
    torch.manual_seed(0)
    model = moved(rewrite(Stack(), (torch.randn(2, 5, D),), variant="toy-reader")).double().eval()
    x = torch.randn(3, 7, D, dtype=torch.float64)
    value = x
    for block in model.blocks:
        for branch, connection in ((block.f, block.laurel_0), (block.g, block.laurel_1)):
            n = nn.functional.layer_norm(value, (D,), branch.norm.weight, branch.norm.bias, branch.norm.eps)
            f = branch.linear.forward(torch.tanh(branch.inner.forward(n)))
            value = value + f + connection.c * n
    right = model.head(nn.functional.layer_norm(value, (D,), model.norm.weight, model.norm.bias, model.norm.eps))
    found = model(x)
    near(found, right, 1e-10)
    equal(gradients_of(model, found), gradients_of(model, right), 1e-10)


def test_a_random_operator_is_the_source_with_its_own_draws():
    torch.manual_seed(0)
    model = rewrite(Stack(), (torch.randn(2, 5, D),), variant="toy-depth", keep=0.5).double().train()
    x = torch.randn(3, 7, D, dtype=torch.float64)
    torch.manual_seed(1)
    found = model(x)
    torch.manual_seed(1)
    value = x
    for block in model.blocks:
        for branch in (block.f, block.g):
            f = branch(value)
            value = value + f * (torch.rand(3, 1, 1, dtype=torch.float64) < 0.5) / 0.5
    right = model.head(model.norm(value))
    near(found, right, 1e-12)
    equal(gradients_of(model, found), gradients_of(model, right), 1e-10)


def test_what_a_position_costs_is_counted():
    """In multiples of D: f*a reads and writes, the sum reads two and writes one; two lanes are left, and so is the whole history."""
    place = {"ndim": 3, "lags": 3, "leaves": None, "position": 2}

    def counts(name: str):
        operator = registry.operator(name)
        return operator.counts(operator.prepare(SiteConfig(name, D, **place)))

    gate = counts("toy-gate")
    assert (gate.flops, gate.moved, gate.state) == (2 * D, 5 * D, 0)
    assert counts("toy-shrunk").moved == 3 * D
    assert counts("toy-lanes").state == 2 * D
    assert counts("toy-dense").state == 4 * D


class Sums(nn.Module):
    """Sums of several branches, in one expression and in statements."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.h = (nn.Linear(D, D) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(x) + self.g(x)
        y = x + self.f(x)
        y += self.g(x)
        y = y + self.h(x)
        return torch.tanh(y)


@pytest.mark.parametrize("graph", [False, True])
def test_sums_of_several_branches_become_one_call(graph):
    torch.manual_seed(0)
    x = torch.randn(2, 5, D)
    base = Sums().eval()
    source = torch.export.export(base, (x,)).module(check_guards=False) if graph else base
    model = rewrite(source, (x,), variant="toy-gate", init=0.5).double().eval()
    x = x.double()
    base = base.double()
    value = x + 0.5 * (base.f(x) + base.g(x))
    right = torch.tanh(value + 0.5 * (base.f(value) + base.g(value) + base.h(value)))
    near(model(x), right, 1e-12)


def test_an_exact_operator_that_regroups_a_sum_says_so():
    class Whole(Connection):
        name = "toy-whole"
        formula = "x + f"

        def step(self, x: Tensor, f: Tensor) -> Tensor:
            return x + f

    register_operator(Whole)
    try:
        x = torch.randn(2, 5, D)
        from laurel_rewrite.backends.rewriting import apply_plan

        base = Sums()
        sites = detect(base, (x,))
        applied = apply_plan(base, sites, Plan.from_sites(sites, LaurelConfig("toy-whole")), (x,))
        assert all(check.passed for check in applied.checks)
        assert "in another order of adds" in applied.checks[0].tolerance
    finally:
        registry.forget(["toy-whole"])


@pytest.mark.parametrize(
    "name", ["toy-vector", "toy-echo", "toy-dense", "toy-lanes", "toy-ladder", "toy-apart", "toy-behind", "toy-reader"]
)
def test_generate_with_a_cache_is_generate_without(name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
    )
    base = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(1, 64, (2, 6))
    model = moved(rewrite(base, kwargs={"input_ids": ids}, variant=name), 0.1).eval()
    plain = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False, pad_token_id=0)
    for cache in ("dynamic", "static"):
        found = model.generate(ids, max_new_tokens=6, do_sample=False, cache_implementation=cache, pad_token_id=0)
        assert torch.equal(found, plain), cache


@pytest.mark.parametrize("variant", ["rw+lr", "rw+lr+pa"])
def test_initialisers_that_walk_over_modules_leave_the_start(variant):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2)
    ids = torch.randint(1, 64, (2, 6))
    model = rewrite(transformers.GPT2LMHeadModel(config), kwargs={"input_ids": ids}, variant=variant, rank=4)
    before = {name: p.clone() for name, p in model.named_parameters() if ".laurel_" in name}
    model.init_weights()
    model.apply(model._init_weights)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
