"""What of a rewritten model trains: counted, and chosen."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toys import D

import laurel_rewrite
from laurel_rewrite.errors import ConfigError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        x = x + self.a(x)
        return x + self.b(x)


def rewritten(**options) -> nn.Module:
    return laurel_rewrite.rewrite(Net(), (torch.randn(2, D),), **{"variant": "rw+lr", "rank": 2, **options})


BASE, LAUREL = 2 * (D * D + D), 2 * (2 + 2 * 2 * D)


def test_a_summary_counts_each_parameter_once():
    model = rewritten()
    found = laurel_rewrite.summary(model)
    assert (found.connections, found.laurel, found.base, found.total) == (2, LAUREL, BASE, LAUREL + BASE)
    assert (found.trainable, found.trainable_laurel, found.percent) == (LAUREL + BASE, LAUREL, 100)
    model.a.weight = model.b.weight
    model.a.bias.requires_grad_(False)
    tied = laurel_rewrite.summary(model)
    assert (tied.base, tied.trainable) == (BASE - D * D, LAUREL + BASE - D * D - D)
    assert laurel_rewrite.summary(torch.compile(rewritten())) == found
    assert f"2 connections with {LAUREL:,} parameters, base model {BASE:,}; trainable {found.total:,} of {found.total:,} (100 %)" == str(
        found
    )


def test_a_frozen_base_stays_and_the_connections_train(tmp_path):
    model = rewritten()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = laurel_rewrite.freeze_base(model)
    assert (found.trainable, found.trainable_laurel) == (LAUREL, LAUREL)
    assert found == laurel_rewrite.summary(model)
    optimizer = torch.optim.AdamW(laurel_rewrite.param_groups(model, lr=0.1, weight_decay=0.1))
    assert not laurel_rewrite.check_optimizer(model, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, D)).square().mean().backward()
        optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "laurel_" in name}
    laurel_rewrite.save(model, tmp_path / "trained", weights="operators")
    base = Net()
    base.load_state_dict({name: value for name, value in before.items() if "laurel_" not in name})
    again = laurel_rewrite.load(tmp_path / "trained", base=base)
    x = torch.randn(3, D)
    torch.testing.assert_close(again.eval()(x), model.eval()(x), rtol=0, atol=0)
    model.requires_grad_(True)
    assert laurel_rewrite.summary(model).percent == 100


def test_connections_that_were_frozen_train_again():
    model = rewritten().requires_grad_(False)
    assert laurel_rewrite.freeze_base(model).trainable == LAUREL


def test_there_must_be_something_to_train():
    with pytest.raises(ConfigError, match="was not rewritten"):
        laurel_rewrite.summary(Net())
    with pytest.raises(ConfigError, match="was not rewritten"):
        laurel_rewrite.freeze_base(Net())
    with pytest.raises(ConfigError, match="nothing would train"):
        laurel_rewrite.freeze_base(laurel_rewrite.rewrite(Net(), (torch.randn(2, D),), variant="stochastic-depth"))
