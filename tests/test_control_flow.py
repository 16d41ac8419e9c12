"""Connections in the subgraphs of control flow in fx graphs: cond, scan, while_loop and map, held against plain Python."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._higher_order_ops import while_loop
from torch._higher_order_ops.map import map as mapped
from torch._higher_order_ops.scan import scan
from toys import D

import laurel_rewrite
from laurel_rewrite import ConfigError, RewriteError, detect, rewrite
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


@pytest.mark.parametrize("variant", ["rw", "lr", "rezero", "layerscale", "gated", "lr-normed", "delta", "fixup"])
@pytest.mark.parametrize("name", ["cond", "scan"])
def test_local_operators_train_there(name, variant):
    """The connection itself, called by plain Python with parameters of its own, says what is right."""
    options = {"rank": 4} if "lr" in variant else {}
    torch.manual_seed(1)
    model = MODELS[name]().double()
    args = doubled(model.inputs)
    graph = moved(rewrite(graph_of(model, args), args, variant=variant, **options))
    for path, weights in graph.named_parameters():  # which fixup scales
        if "laurel" not in path:
            model.get_parameter(path).data.copy_(weights.detach())
    own = {site: copy.deepcopy(module) for site, module in sites_of(graph).items()}

    def at(name, x, f):
        connection = own["first.laurel_0" if name == "first" else f"{BLOCK[MODEL]}.laurel_0"]
        return connection(x, f, n=x) if connection.needs_input else connection(x, f)

    MODEL = name
    right, found = model.by_hand(at, *args), graph(*args)
    near(found.detach(), right.detach(), 1e-10)
    gradients_of(model, right)
    gradients = gradients_of(graph, found)
    for site, connection in own.items():
        for key, parameter in connection.named_parameters():
            if parameter.grad is not None:
                near(gradients[f"{site}.{key}"], parameter.grad, 1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_a_rewritten_graph_is_copied_exported_and_compiled(name):
    _, graph, args = made(name)
    right = graph(*args).detach()
    twin = copy.deepcopy(graph)
    assert list(twin.state_dict()) == list(graph.state_dict())
    near(twin(*args).detach(), right, 1e-10)
    with torch.no_grad():
        for module in sites_of(twin).values():
            for parameter in module.parameters():
                parameter.add_(1.0)
    assert (twin(*args) - right).abs().max() > 1e-3
    near(graph(*args).detach(), right, 1e-10)
    near(graph_of(graph, args)(*args).detach(), right, 1e-10)
    torch._dynamo.reset()
    near(torch.compile(graph, backend="eager", fullgraph=True)(*args).detach(), right, 1e-10)


def test_it_trains():
    _, graph, args = made("nested")
    optimizer = torch.optim.AdamW(laurel_rewrite.param_groups(graph, lr=1e-2, weight_decay=0.1))
    losses = []
    for _ in range(10):
        loss = graph(*args).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert len(laurel_rewrite.learned(graph)) == 2


# Streams


class Deep(Model):
    """Two blocks behind a map, in one side of a condition."""

    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: self.map(self.block(self.first(self.map(x)))), lambda x: self.map(x), (x,))


@pytest.mark.parametrize("variant", ["pa", "hc", "attnres"])
def test_a_stream_within_one_subgraph_has_a_history(variant):
    model, (x,) = Deep().double(), doubled(Deep.inputs)
    graph = moved(rewrite(graph_of(model, (x,)), (x,), variant=variant, **({"rank": 4} if variant == "pa" else {})))
    first, second = (copy.deepcopy(module) for module in sites_of(graph).values())
    for given in (x.abs(), -x.abs()):
        found, right = graph(given), model.map(given)
        if given.sum() > 0:
            y, state = first.connect(right, model.first.branch(right), state=())
            y, _ = second.connect(y, model.block.branch(y), state=state)
            right = model.map(y)
        near(found.detach(), right.detach(), 1e-10)
        if given.sum() > 0:
            gradients_of(model, right)
            gradients = gradients_of(graph, found)
            for connection, site in ((first, "cond.true.laurel_0"), (second, "cond.true.laurel_1")):
                for key, parameter in connection.named_parameters():
                    if parameter.grad is not None:
                        near(gradients[f"{site}.{key}"], parameter.grad, 1e-10)


@pytest.mark.parametrize("name", MODELS)
@STRICT
def test_a_stream_that_crosses_a_border_is_refused_before_anything_changes(name, strict):
    model = MODELS[name]()
    graph = graph_of(model, model.inputs, strict)
    before = list(graph.state_dict())
    if name in ("scan", "mapped"):  # a map, or the slices of a state, begin another stream
        rewrite(graph, model.inputs, variant="pa", rank=4, exclude="first.*")
        return
    with pytest.raises(ConfigError, match="across the border of a subgraph of control flow"):
        rewrite(graph, model.inputs, variant="pa", rank=4)
    rewrite(graph, model.inputs, variant="pa", rank=4, include="first.*")  # in one graph
    assert list(graph.state_dict()) == before


# What is refused, and what is none


def test_random_draws_are_refused():
    graph = graph_of(Cond(), Cond.inputs)
    with pytest.raises(RewriteError, match="draws random numbers"):
        rewrite(graph, Cond.inputs, variant="stochastic-depth")
    rewrite(graph, Cond.inputs, variant="stochastic-depth", include="first.*")


class Around(Model):
    """A condition in a region, and a region in a condition."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            x = torch.cond(x.sum() > 0, lambda x: self.block(x), lambda x: self.map(x), (x,))
        return x


class Inside(Model):
    def forward(self, x):
        def quiet(x):
            with torch.autocast("cpu", enabled=False):
                return self.block(x)

        return torch.cond(x.sum() > 0, quiet, lambda x: self.map(x), (x,))


def test_regions_around_a_condition_and_inside():
    x = torch.randn(3, D)
    graph = moved(rewrite(graph_of(Around(), (x,)), (x,), rank=4))
    (site,) = sites_of(graph)
    found = graph(x.abs())
    gradients = gradients_of(graph, found)
    assert sum(site in name and value.abs().max() > 0 for name, value in gradients.items()) == 3
    twin = copy.deepcopy(graph)
    near(twin(x.abs()).detach(), found.detach(), 1e-6)
    inside = graph_of(Inside(), (x,))
    if any("autocast" in str(node.target) for module in inside.modules() if hasattr(module, "graph") for node in module.graph.nodes):
        with pytest.raises(RewriteError, match="region"):
            rewrite(inside, (x,), rank=4)


def test_programs_have_the_sites_of_their_graphs():
    program = torch.export.export(Cond(), Cond.inputs, strict=False)
    assert [site.id for site in detect(program)] == [site.id for site in detect(program.module(check_guards=False))]
    assert [site.id for site in detect(program)] == ["first.laurel_0", "cond.true.laurel_0", "cond.true.laurel_0@1"]
    assert isinstance(rewrite(program, rank=4), torch.fx.GraphModule)


class NoSites(Model):
    """Sums of what comes from outside, of what an activation gives, and of slices of weights."""

    def forward(self, x):
        f = torch.relu(self.map(x))
        y = torch.cond(x.sum() > 0, lambda x, f: x + f, lambda x, f: x + torch.tanh(x), (x, f))
        return scan(lambda c, w: ((c * 0.5).tanh() + c, c + w), y, self.map.weight[:, None].expand(D, 3, D))[1]


def test_sums_that_are_no_residual_connections_there_are_none():
    x = torch.randn(3, D)
    sites = detect(torch.export.export(NoSites(), (x,), strict=False))
    assert not sites.sites
    assert [rejected.reason for rejected in sites.rejected] == ["no common ancestor", "pointwise", "pointwise", "not data-dependent"]


class Unlearnt(Model):
    """The one's result is counted, the other's is not read."""

    def forward(self, x):
        y = torch.cond(x.sum() > 0, lambda x: self.block(x), lambda x: self.map(x), (x,))
        return self.map(x) * y.argmax()


def test_what_does_not_learn_is_no_site():
    sites = detect(torch.export.export(Unlearnt(), Unlearnt.inputs, strict=False))
    assert [(site.id, rejected.reason) for site in sites for rejected in sites.rejected] == []
    assert [rejected.reason for rejected in sites.rejected] == ["no gradient"]


def test_a_subgraph_that_two_ops_run_is_left_alone():
    graph = graph_of(Cond(), Cond.inputs)
    (op,) = (node for node in graph.graph.nodes if "cond" in str(node.target))
    with graph.graph.inserting_after(op):
        graph.graph.node_copy(op)
    graph.recompile()
    assert [rejected.reason for rejected in detect(graph).rejected] == ["subgraph"] * 4


def test_a_model_itself_is_rewritten_outside_of_control_flow_alone():
    sites = detect(Cond(), Cond.inputs)
    assert [site.id for site in sites] == ["first.laurel_0"]
    assert {rejected.reason for rejected in sites.rejected} == {"subgraph"}


def test_graphs_without_shapes():
    graph = torch.export.export(Cond(), Cond.inputs, strict=False).module(check_guards=False)
    for module in graph.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.clear()
    with pytest.raises(laurel_rewrite.CaptureError, match="no shapes"):
        detect(graph)
    assert [site.dim for site in detect(graph, Cond.inputs)] == [D, D, D]
