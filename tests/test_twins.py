"""One connection that the source writes twice, for train mode and for eval mode: one LAuReL at both places."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import away_from_start
from torch import nn
from torch.utils.checkpoint import checkpoint

from laurel_rewrite import detect, load, remove, rewrite, save
from laurel_rewrite.operators.connections import sites_of

D = 16
X = torch.randn(3, 5, D, generator=torch.Generator().manual_seed(1))


def residual(block, x):
    if block.training:
        return x + F.dropout(block.a(x), 0.0)
    return x + block.a(x)


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)


class InPlace(Base):
    def forward(self, x):
        x = torch.relu(x)
        if self.training:
            x += F.dropout(self.a(x), 0.0)
        else:
            x = torch.add(x, self.a(x))
        return x + self.b(torch.relu(x))


class Checkpointed(Base):
    def forward(self, x):
        x = torch.relu(x)
        x = x + checkpoint(self.a, x, use_reentrant=False) if self.training else x + self.a(x)
        return x + self.b(torch.relu(x))


class EarlyReturn(Base):
    def inner(self, x):
        if not self.training:
            return x + self.a(x)
        return x + F.dropout(self.a(x), 0.0)

    def forward(self, x):
        x = self.inner(torch.relu(x))
        return x + self.b(torch.relu(x))


class Helper(Base):
    def forward(self, x):
        x = residual(self, torch.relu(x))
        return x + self.b(torch.relu(x))


TWINS = {cls.__name__: cls for cls in (InPlace, Checkpointed, EarlyReturn, Helper)}


def expected(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """2 a f + 2 b (x + U V x), twice, of the very modules."""
    x = torch.relu(x)
    for laurel, branch in ((model.laurel_0, model.a), (model.laurel_1, lambda y: model.b(torch.relu(y)))):
        weights = 2 * torch.softmax(laurel.mix, 0)
        x = weights[0] * branch(x) + weights[1] * (x + x @ laurel.down.weight.T @ laurel.up.weight.T)
    return x


@pytest.mark.parametrize("name", TWINS)
def test_both_places_have_one_laurel(name, tmp_path):
    model = TWINS[name]()
    sites = detect(model, (X,))
    assert [site.id for site in sites] == ["laurel_0", "laurel_1"]
    (note,) = sites.notes
    assert note.startswith("1 residual connection (laurel_0), the first at ")
    assert note.endswith("of which each mode runs one: one LAuReL stands at both.")
    better = away_from_start(rewrite(model, (X,), variant="rw+lr", rank=4))
    assert len(sites_of(better)) == 2
    save(better, tmp_path / "saved")
    for one in (better, load(tmp_path / "saved")):
        for train in (False, True):
            one.train(train)
            torch.testing.assert_close(one(X), expected(one, X), rtol=1e-5, atol=1e-5)  # float32, another order of products
    torch.testing.assert_close(remove(better).eval()(X), model.eval()(X), rtol=0, atol=0)


@pytest.mark.parametrize("name", TWINS)
def test_what_is_trained_acts_in_eval_mode_with_earlier_states_too(name):
    better = rewrite(TWINS[name](), (X,), variant="rw+lr+pa", rank=4).train()
    better(X).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for n, p in better.named_parameters() if "mix" in n or "up" in n)
    away_from_start(better)
    torch.testing.assert_close(better.train()(X), better.eval()(X), rtol=1e-6, atol=1e-6)  # the dropout drops nothing


def test_beside_connections_that_one_mode_alone_has():
    """The twin stands once in the order; what train mode adds more has a LAuReL and a note of its own."""

    class More(Base):
        def __init__(self):
            super().__init__()
            self.c = nn.Linear(D, D)

        def forward(self, x):
            x = x + F.dropout(self.a(x), 0.0) if self.training else x + self.a(x)
            x = x + self.b(torch.relu(x))
            return x + self.c(torch.relu(x)) if self.training else x

    sites = detect(More(), (X,))
    assert [site.id for site in sites] == ["laurel_0", "laurel_1", "laurel_2"]
    assert len(sites.notes) == 2
    better = rewrite(More(), (X,), variant="rw", rank=4)
    called = {name: [] for name in sites_of(better)}
    for name, laurel in sites_of(better).items():
        laurel.register_forward_hook(lambda *_, name=name: called[name].append(better.training))
    for train in (False, True):
        better.train(train)(X)
    assert called == {"laurel_0": [False, True], "laurel_1": [False, True], "laurel_2": [True]}


def test_connections_of_other_parameters_are_two():
    class Heads(Base):
        def forward(self, x):
            if self.training:
                return x + self.a(x)
            return x + self.b(x)

    sites = detect(Heads(), (X,))
    assert len(sites) == 2
    assert "what is trained does not act in eval mode" in sites.notes[-1]


def test_another_order_of_the_operands_is_another_connection():
    class Turned(Base):
        def forward(self, x):
            if self.training:
                return x + self.a(x)
            return self.a(x) + x

    assert len(detect(Turned(), (X,))) == 2


def test_the_run_on_concrete_values_sees_them_too():
    class ByValue(Base):
        def forward(self, x):
            if x.sum().item() > 1e9:  # no export follows it
                return x
            x = x + F.dropout(self.a(x), 0.0) if self.training else x + self.a(x)
            return x + self.b(torch.relu(x))

    sites = detect(ByValue(), (X,))
    assert [site.id for site in sites] == ["laurel_0", "laurel_1"]
    better = away_from_start(rewrite(ByValue(), (X,), variant="rw+lr", rank=4))
    for train in (False, True):
        torch.testing.assert_close(better.train(train)(X.relu()), expected(better, X), rtol=1e-5, atol=1e-5)
