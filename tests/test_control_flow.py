"""Connections in the subgraphs of control flow in fx graphs: cond, scan, while_loop and map, held against plain Python."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._higher_order_ops import while_loop
from torch._higher_order_ops.map import map as mapped
from torch._higher_order_ops.scan import scan
from toys import D

from laurel_rewrite import ConfigError, rewrite
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.testing import gradients_of, moved, near

STRICT = pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(D, D), nn.Linear(D, D)

    def branch(self, x):
        return self.down(torch.relu(self.up(x)))

    def forward(self, x):
        return x + self.branch(x)


class Model(nn.Module):
    """Its forward is captured; `by_hand` does the same in Python's words, with `at` in the place of the sums."""

    inputs = (torch.randn(3, D),)
    others = (torch.randn(5, D),)

    def __init__(self):
        super().__init__()
        self.first, self.block, self.map = Block(), Block(), nn.Linear(D, D)


class Cond(Model):
    def forward(self, x):
        x = self.first(x)
        return torch.cond(x.sum() > 0, lambda x: self.block(x) * 2, lambda x: self.block(self.map(x)), (x,))

    def by_hand(self, at, x):
        x = at("first", x, self.first.branch(x))
        flag = x.sum() > 0
        y = x if flag else self.map(x)
        return at("block", y, self.block.branch(y)) * (2 if flag else 1)


class Scan(Model):
    inputs = torch.randn(3, D), torch.randn(4, 3, D)
    others = torch.randn(5, D), torch.randn(7, 5, D)

    def forward(self, x, more):
        def step(carry, new):
            carry = self.map(self.block(carry)) + new
            return carry, carry.tanh()

        return torch.cat([x.unsqueeze(0) for x in scan(step, self.first(x), more)[:1]] + [scan(step, x, more)[1]])

    def by_hand(self, at, x, more):
        def turns(carry):
            for new in more:
                carry = self.map(at("block", carry, self.block.branch(carry))) + new
                yield carry

        *_, last = turns(at("first", x, self.first.branch(x)))
        return torch.cat([last.unsqueeze(0), torch.stack([carry.tanh() for carry in turns(x)])])


class While(Model):
    inputs = torch.randn(3, D), torch.tensor(2)
    others = torch.randn(3, D), torch.tensor(5)

    def forward(self, x, count):
        _, y = while_loop(lambda turn, _: turn < count, lambda turn, x: (turn + 1, self.block(x)), (torch.tensor(0), self.first(x)))
        return self.map(y)

    def by_hand(self, at, x, count):
        x = at("first", x, self.first.branch(x))
        for _ in range(int(count)):
            x = at("block", x, self.block.branch(x))
        return self.map(x)


class Mapped(Model):
    inputs = (torch.randn(4, 3, D),)
    others = (torch.randn(6, 3, D),)

    def forward(self, x):
        return mapped(lambda part: self.block(self.map(part)), self.first(x))

    def by_hand(self, at, x):
        parts = [self.map(part) for part in at("first", x, self.first.branch(x))]
        return torch.stack([at("block", part, self.block.branch(part)) for part in parts])


class Nested(Model):
    """A condition in a loop: the parameters go through both."""

    inputs, others = Scan.inputs, Scan.others

    def forward(self, x, more):
        def step(carry, new):
            carry = torch.cond(new.sum() > 0, lambda x: self.block(x), lambda x: self.map(self.block(x)), (carry,)) * 0.5
            return carry, carry.clone()

        return scan(step, self.first(x), more)[0]

    def by_hand(self, at, x, more):
        x = at("first", x, self.first.branch(x))
        for new in more:
            x = at("block", x, self.block.branch(x))
            x = (x if new.sum() > 0 else self.map(x)) * 0.5
        return x


MODELS = {cls.__name__.lower(): cls for cls in (Cond, Scan, While, Mapped, Nested)}
BLOCK = {"cond": "cond.true", "scan": "scan.body", "while": "while_loop.body", "mapped": "map_impl.body", "nested": "scan.body.cond.true"}
"""What the graph calls the block where it does not name modules in subgraphs."""


def graph_of(model, args, strict=False):
    dims = [dict.fromkeys(range(arg.ndim - 1), torch.export.Dim.AUTO) for arg in args]
    return torch.export.export(model, args, dynamic_shapes=dims, strict=strict).module(check_guards=False)


def doubled(args):
    return tuple(arg.double() if arg.is_floating_point() else arg for arg in args)


def made(name, variant="rw+lr", strict=False, **options):
    """A model, and its rewritten graph with parameters off their start."""
    torch.manual_seed(1)
    model = MODELS[name]().double()
    args = doubled(model.inputs)
    options |= {"rank": 4} if "lr" in variant else {}
    graph = rewrite(graph_of(model, args, strict), args, variant=variant, **options)
    return model, moved(graph), args


def at_by_hand(graph, block):
    """x + f in the formula of rw+lr, with the parameters of a graph's connections, which are leaves of their own."""
    own = {site: {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters()} for site, module in sites_of(graph).items()}

    def at(name, x, f):
        p = own["first.laurel_0" if name == "first" else f"{block}.laurel_0"]
        a, b = 2 * torch.softmax(p["mix"], 0)
        return a * f + b * (x + x @ p["down.weight"].T @ p["up.weight"].T)

    return at, own


def compare(model, graph, block, args):
    at, own = at_by_hand(graph, block)
    model.zero_grad()
    right = model.by_hand(at, *args)
    expected = gradients_of(model, right)
    expected |= {f"{site}.{name}": p.grad for site, tensors in own.items() for name, p in tensors.items() if p.grad is not None}
    found = graph(*args)
    near(found.detach(), right.detach(), 1e-10)
    gradients = gradients_of(graph, found)
    assert any("laurel" in name for name in expected)
    for name, value in expected.items():
        near(gradients[name], value, 1e-10)
    assert all(value.abs().max() < 1e-10 for name, value in gradients.items() if name not in expected)


@STRICT
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_of_plain_python(name, strict):
    model, graph, args = made(name, strict=strict)
    block = "block" if strict else BLOCK[name]
    assert list(sites_of(graph)) == ["first.laurel_0", f"{block}.laurel_0"]
    for given in (args, doubled(model.others), tuple(-arg if arg.is_floating_point() else arg for arg in args)):
        compare(model, graph, block, given)


@pytest.mark.parametrize("name", MODELS)
def test_a_graph_is_exact_at_the_start_and_as_it_was(name):
    torch.manual_seed(1)
    model = MODELS[name]()
    given = graph_of(model, model.inputs)
    code = [module.code for module in given.modules() if isinstance(module, torch.fx.GraphModule)]
    graph = rewrite(given, model.inputs, rank=4)
    assert torch.equal(graph(*model.others), model(*model.others))
    assert code == [module.code for module in given.modules() if isinstance(module, torch.fx.GraphModule)]
    with pytest.raises(ConfigError, match="rewritten already"):
        rewrite(graph, model.inputs, rank=4)
