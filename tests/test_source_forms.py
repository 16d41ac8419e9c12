"""The forms in which people write a residual connection: each is rewritten so that it means what it meant, or is refused with the reason."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.utils.checkpoint
from conftest import away_from_start
from forms import FORMS, REFUSED, REGISTRY, Alias, CallableObject, D, OfARegistry, One, Processor, Three
from forms_of_sums import NoAlias, OwnInput
from torch import nn

from laurel_rewrite import LaurelError, RewriteError, VerificationError, load, remove, rewrite, save
from laurel_rewrite.errors import TooManyTurnsError
from laurel_rewrite.operators.connections import sites_of


def inputs(seed=0):
    return torch.randn(3, 6, D, generator=torch.Generator().manual_seed(seed))


def trains(model, x):
    """Whether a model has gradients at all: some add in place to what their own branch needs for backward."""
    try:
        model(x.clone()).square().mean().backward()
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("name", FORMS)
def test_a_form_means_what_it_meant(name, tmp_path):
    torch.manual_seed(0)
    model = FORMS[name]().eval()
    better = rewrite(model, (inputs(),), rank=4).eval()
    x = inputs(1)[:2]
    assert torch.equal(better(x.clone()), model(x.clone()))
    away_from_start(better)
    moved = better(x.clone())
    assert not torch.allclose(moved, model(x.clone()), rtol=1e-3, atol=1e-3)  # LAuReL is called
    if trains(model, x):
        moved.square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for m in sites_of(better).values() for p in m.parameters())
    assert torch.equal(remove(better)(x.clone()), model(x.clone()))
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(better))(x.clone()), moved)
        if name != "KeepsAnActivation":  # which torch refuses to copy
            assert torch.equal(copy.deepcopy(better)(x.clone()), moved)
        if name not in ("KeepsAnActivation", "Held"):  # what the module holds cannot be pickled, for its base either
            save(better, tmp_path / "saved")
            assert torch.equal(load(tmp_path / "saved").eval()(x.clone()), moved)


@pytest.mark.parametrize("name", REFUSED)
def test_a_form_is_refused_with_the_reason(name):
    cls, reason = REFUSED[name]
    model = cls()
    before = dict(vars(model))
    with pytest.raises(LaurelError, match=reason):
        rewrite(model, (inputs(),), rank=4, inplace=True)
    assert type(model) is cls
    assert vars(model) == before


def test_a_registry_keeps_the_original():
    rewrite(OfARegistry(), (inputs(),), rank=4)
    assert REGISTRY["block"] is OfARegistry


def test_what_the_caller_gave_changes_as_it_did():
    model = OwnInput().eval()
    better = away_from_start(rewrite(model, (inputs(),), rank=4).eval())
    x, y = inputs(1), inputs(1)
    with torch.no_grad():
        result = better(x)
    assert torch.equal(result, x * 2)
    assert not torch.equal(x, y)


def test_an_add_in_place_that_nobody_else_sees_needs_no_copy():
    better = rewrite(NoAlias(), (inputs(),), rank=4)
    assert "add_" not in type(better).forward.__code__.co_names


def test_without_verification_every_add_in_place_stays_one():
    better = rewrite(NoAlias(), (inputs(),), rank=4, verify=False)
    assert "add_" in type(better).forward.__code__.co_names


class Steps(One):
    def forward(self, x, steps=2):
        for _ in range(steps):
            x = x + torch.tanh(self.a(x))
        return x


def test_more_turns_than_seen_are_an_error_or_share_the_last():
    x = inputs(1)
    strict = rewrite(Steps(), (inputs(),), rank=4)
    with pytest.raises(TooManyTurnsError, match=r"laurel_0: the loop has more turns than the 2"):
        strict(x, 4)
    shared = away_from_start(rewrite(Steps(), (inputs(),), variant="rw", extra_turns="share").eval())
    a, b = ([float(w.detach()) for w in m.weights()] for m in sites_of(shared).values())
    expected = x
    for weights in (a, b, b, b):
        expected = weights[0] * torch.tanh(shared.a(expected)) + weights[1] * expected
    assert torch.allclose(shared(x, 4), expected, rtol=1e-5, atol=1e-6)


class CheckpointsAFunctionOfEachTurn(Three):
    def forward(self, x, turns=3):
        for layer in self.layers[:turns]:
            x = torch.utils.checkpoint.checkpoint(lambda h, layer=layer: h + torch.tanh(layer(h)), x, use_reentrant=False)
        return x


@pytest.mark.parametrize(("extra", "turns"), [("refuse", 3), ("refuse", 1), ("share", 3)])
def test_a_turn_that_a_checkpoint_runs_again_takes_no_other_turns_module(extra, turns):
    better = away_from_start(rewrite(CheckpointsAFunctionOfEachTurn(), (inputs(),), variant="rw", extra_turns=extra))
    with pytest.raises(LaurelError, match="laurel_0: activation checkpointing runs a turn of this loop again"):
        better(inputs(), turns).sum().backward()


class Skipping(Three):
    def forward(self, x):
        for i, f in enumerate(self.layers):
            if self.training and i == 1:
                continue
            x = x + f(x)
        return x


def test_a_turn_that_is_passed_by_takes_no_other_turns_module():
    better = rewrite(Skipping(), (inputs(),), variant="rw")
    modules = sites_of(better)
    assert len(modules) == 3
    called = []
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    better.train()(inputs())
    assert called == ["laurel_0.0", "laurel_0.2"]


def test_an_object_put_in_another_ones_place_is_no_silent_change():
    class Other(Processor):
        pass

    better = rewrite(CallableObject(), (inputs(),), rank=4)
    better.processor = Other()
    with pytest.raises(TypeError, match="rewrite the model anew"):
        better(inputs())


class Mixed(nn.Module):
    """Two sites that can be rewritten around one that cannot."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(D, D) for _ in range(3))

    def forward(self, x):
        x = x + self.a(x)
        x = sum([x, self.b(x)])
        return x + self.c(x)


def test_one_refused_site_does_not_stop_the_others(caplog):
    with pytest.raises(RewriteError, match=r"1 site\(s\) cannot be rewritten"):
        rewrite(Mixed(), (inputs(),), rank=4)
    model = Mixed().eval()
    better = rewrite(model, (inputs(),), rank=4, unsupported="skip").eval()
    assert len(sites_of(better)) == 2
    assert "skipped" in caplog.text
    assert torch.equal(better(inputs(1)), model(inputs(1)))


def test_a_skipped_site_takes_its_stream_along_where_history_is_read():
    with pytest.raises(LaurelError, match="None of the 3 sites can be rewritten"):
        rewrite(Mixed(), (inputs(),), variant="pa", rank=4, unsupported="skip")


class CallsTheParent(Alias):
    def forward(self, x):
        return super().forward(x) * 2


def test_a_connection_that_is_never_called_is_no_success():
    with pytest.raises((VerificationError, RewriteError), match=r"laurel_0|through super"):
        rewrite(CallsTheParent(), (inputs(),), rank=4)
