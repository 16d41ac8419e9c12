"""Modules that are unlike others: that cannot be copied, keep computed weights, answer for names, or forbid subclasses."""

from __future__ import annotations

import multiprocessing
import operator
import threading

import pytest
import torch
from conftest import away_from_start
from torch import nn

from laurel_rewrite import ConfigError, RewriteError, load, remove, rewrite, save
from laurel_rewrite.operators.connections import sites_of

D = 16
example_inputs = (torch.randn(2, 5, D),)  # of a module whose factories a saved folder may name
X = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(1))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(D, D)

    def forward(self, x):
        return x + self.a(x)


class Weighted(nn.Module):
    """Adds, and has a weight of its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D) / 4)

    def forward(self, x):
        return x + torch.tanh(x @ self.weight)


class Locked(Plain):
    """A lock can neither be copied nor pickled."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


class Answers(Plain):
    """Raises KeyError for a name that it does not know."""

    def __init__(self):
        super().__init__()
        self.__dict__["more"] = {}

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return self.__dict__["more"][name]


class NoSubclass(Plain):
    def __init_subclass__(cls, **options):
        raise TypeError("there are no subclasses")


def test_what_cannot_be_copied_is_changed_itself(tmp_path):
    for cls in (Locked, Answers):
        with pytest.raises(RewriteError, match=rf"{cls.__name__} cannot be copied .* Change it itself: inplace=True"):
            rewrite(cls(), (X,), rank=4)
        model = cls()
        before = model(X)
        better = rewrite(model, (X,), rank=4, inplace=True)
        assert better is model
        assert torch.equal(better(X), before)
        assert not torch.equal(away_from_start(better)(X), before)
        with pytest.raises(ConfigError, match=r'Say how with factory="package\.module:function"'):
            save(better, tmp_path / "without")
        for factory, reason in (("nowhere", "is no factory"), ("toys:CASES", "does not define both CASES and example_inputs")):
            with pytest.raises(ConfigError, match=reason):
                save(better, tmp_path / "without", factory=factory)
        assert not (tmp_path / "without").exists()
        save(better, tmp_path / cls.__name__, factory=f"{__name__}:{cls.__name__}")
        assert torch.equal(load(tmp_path / cls.__name__)(X), better(X))
        assert not sites_of(remove(better, inplace=True))


def test_a_class_that_forbids_subclasses(tmp_path):
    better = away_from_start(rewrite(NoSubclass(), (X,), rank=4))
    save(better, tmp_path)
    assert torch.equal(load(tmp_path)(X), better(X))


def test_an_owner_whose_class_a_parametrisation_made_is_not_saved(tmp_path):
    better = rewrite(nn.utils.parametrizations.weight_norm(Weighted()), (X,), rank=4)
    with pytest.raises(RewriteError, match="ParametrizedWeighted was made while the program ran"):
        save(better, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_weights_that_are_computed_before_each_call():
    model = Plain()
    nn.utils.weight_norm(model.a)
    better = rewrite(model, (X,), rank=4)
    assert torch.equal(better(X), model(X))
    away_from_start(better)(X).square().mean().backward()
    assert better.a.weight_g.grad.abs().max() > 0
    assert torch.equal(remove(better)(X), model(X))


def test_a_spawned_worker_gets_a_rewritten_model():
    better = away_from_start(rewrite(Plain(), (X,), rank=4)).requires_grad_(False)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert torch.equal(pool.apply(operator.call, (better, X)), better(X))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("variant", ["rw", "rw+lr", "rw+lr+pa"])
def test_a_padded_batch_that_torch_makes_a_nested_tensor_of(variant):
    """nn.TransformerEncoder does so in eval mode without gradients; with gradients it takes the other way."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 4, 32, batch_first=True), 3).eval()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    better = rewrite(model, (X,), rank=4, variant=variant).eval()
    with torch.no_grad():
        assert torch.equal(better(X, src_key_padding_mask=padding), model(X, src_key_padding_mask=padding))
    expected = away_from_start(better)(X, src_key_padding_mask=padding)
    with torch.no_grad():
        found = better(X, src_key_padding_mask=padding)
    torch.testing.assert_close(found[~padding], expected[~padding], rtol=1e-5, atol=1e-5)  # float32, another kernel for attention
    assert not found[padding].any()
