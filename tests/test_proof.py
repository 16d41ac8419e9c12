"""What `rewrite` proves before it returns: nothing wrong gets out, and the model is as it was, whatever happens."""

from __future__ import annotations

import logging
import time

import pytest
import torch
from torch import nn

from laurel_rewrite import VerificationError, rewrite
from laurel_rewrite.backends.proof import first_wrong
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.operators.families.laurel import Laurel

D = 16


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear, self.dropout = nn.BatchNorm1d(D), nn.Linear(D, D), nn.Dropout(0.3)

    def forward(self, x):
        return x + self.dropout(self.linear(self.norm(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(5))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def broken(monkeypatch):
    """An operator that is wrong at one site."""
    original = Laurel.forward

    def forward(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        return out + 1e-3 if self.site == "blocks.3.laurel_0" else out

    monkeypatch.setattr(Laurel, "forward", forward)


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("inplace", [False, True])
def test_a_wrong_result_is_an_error_that_names_the_first_site(broken, inplace):
    model = Net()
    model.blocks[0].register_forward_hook(lambda *_: None)
    before, classes = state(model), [type(m) for m in model.modules()]
    random = torch.random.get_rng_state()
    with pytest.raises(VerificationError, match=r"The first site with which it differs is blocks\.3\.laurel_0") as caught:
        rewrite(model, (torch.randn(4, D, generator=torch.Generator().manual_seed(0)),), rank=4, inplace=inplace)
    assert any(check.failed for check in caught.value.checks)
    assert [type(m) for m in model.modules()] == classes
    after = state(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(torch.random.get_rng_state(), random)


def test_a_wrong_site_may_be_left_out(broken):
    model = Net()
    better = rewrite(model, (torch.randn(4, D),), rank=4, unsupported="skip")
    assert list(sites_of(better)) == [f"blocks.{n}.laurel_0" for n in (0, 1, 2, 4)]


def test_verification_changes_nothing():
    model, x = Net(), torch.randn(4, D)
    before, random = state(model), torch.random.get_rng_state()
    better = rewrite(model, (x,), rank=4)
    assert torch.equal(torch.random.get_rng_state(), random)
    for net in (model, better):
        assert net.training
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items() if "laurel" not in key)


class Unsteady(Net):
    def forward(self, x):
        return super().forward(x) + time.perf_counter() % 1


def test_a_model_that_differs_from_itself_is_not_verified_and_that_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        better = rewrite(Unsteady(), (torch.randn(4, D),), rank=4)
    assert len(sites_of(better)) == 5
    assert "not verified" in caplog.text
    assert "differs from itself" in caplog.text


def test_a_model_that_does_not_fit_twice_is_not_verified_and_that_is_said(caplog, monkeypatch):
    monkeypatch.setattr("laurel_rewrite.backends.proof.fits_twice", lambda model: False)
    with caplog.at_level(logging.WARNING):
        rewrite(Net(), (torch.randn(4, D),), rank=4)
    assert "the model's 0.0 GiB do not fit into memory twice" in caplog.text


class Layout(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(D, D, 3, padding=1)

    def forward(self, x):
        return x + self.conv(x.transpose(1, 2)).transpose(1, 2)


def test_strides_are_part_of_the_claim(monkeypatch):
    x = torch.randn(3, 6, D)
    better = rewrite(Layout(), (x,), rank=4)
    assert better(x).stride() == Layout()(x).stride()
    monkeypatch.setattr("laurel_rewrite.operators.protocol.laid_out", lambda out, *_: out.transpose(1, 2).contiguous().transpose(1, 2))
    with pytest.raises(VerificationError, match=r"\(96, 16, 1\) became \(96, 1, 6\)"):
        rewrite(Layout(), (x,), rank=4)


def test_shapes_are_compared_on_the_meta_device():
    with torch.device("meta"):
        model, x = Layout(), torch.randn(3, 6, D)
    better = rewrite(model, (x,), rank=4)
    assert better(x).is_meta


def test_a_search_by_halving_finds_the_first():
    for count in range(1, 12):
        for wrong in range(1, count + 1):
            assert first_wrong(count, lambda k, wrong=wrong: k >= wrong) == wrong
