"""Captures: on concrete values, over both modes, and with the model left as it was."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from conftest import real
from torch import nn
from toys import D, Net, X, kinds

from laurel_rewrite import CaptureError, detect
from laurel_rewrite.graph import capture as capturing
from laurel_rewrite.graph.capture import capture


def table(sites):
    return [(s.id, s.kind, s.owner, s.where, s.shape, s.axis, s.dim, s.stream, s.index) for s in sites]


@pytest.fixture
def only_runs(monkeypatch):
    """No export works."""

    def fail(*args, **kwargs):
        raise RuntimeError("not today")

    monkeypatch.setattr(torch.export, "export", fail)


# One run on concrete values


def largest(s, x):
    return x * 2 if x.abs().max() > 100 else x


class Spiky(nn.Module):
    """A kernel that has no backward, as some attention kernels on CPU."""

    def forward(self, x):
        if torch.is_grad_enabled():
            raise NotImplementedError("no backward here")
        return x.softmax(-1)


class Scripted(Net):
    def __init__(self, body):
        super().__init__(body)
        self.s = torch.jit.script(nn.Sequential(nn.Linear(D, D), nn.ReLU()))


class Ungraded(Net):
    def __init__(self, body):
        super().__init__(body)
        self.s = Spiky()


BY_VALUE = {
    "a branch on values": (Net, lambda s, x: largest(s, x) + s.a(largest(s, x))),
    "a number read from a tensor": (Net, lambda s, x: (y := x[:, : int(x.argmax(-1).max()) * 0 + 5], y + s.a(y))[1]),
    "all() of a mask": (Net, lambda s, x: x + s.a(x) if all((x > -100).flatten()) else x),
    "a list of values": (Net, lambda s, x: x + s.a(x) * len(x.flatten().tolist())),
    "numpy in between": (Net, lambda s, x: x + s.a(x) * float(np.abs(x.detach().numpy()).max())),
    "data of a tensor": (Net, lambda s, x: x + s.a(x) * x.data.abs().mean()),
    "a scripted part": (Scripted, lambda s, x: x + s.s(x)),
    "a kernel without backward": (Ungraded, lambda s, x: x + s.s(s.a(x))),
}


@pytest.mark.parametrize("name", BY_VALUE)
def test_what_an_export_cannot_capture_is_run_once(name):
    make, body = BY_VALUE[name]
    assert kinds(detect(make(body), (X,))) == {"identity": 1}


@pytest.mark.parametrize("bound", [-1e9, 1e9])
def test_what_one_run_cannot_see_is_said(bound):
    sites = detect(Net(lambda s, x: x + s.a(x) if x.sum() > bound else x), (X,))
    assert len(sites) == (bound < 0)
    assert "branches that this run did not take were not seen" in sites.notes[0]
    assert bound < 0 or sites.notes[0] in sites.why_none()


@pytest.mark.parametrize("name", ["gpt2", "vit_small", "resnet18", "cohere"])
def test_a_run_finds_what_an_export_finds(name, request):
    example = real(name)
    exported = detect(example.model, example.args, example.kwargs)
    request.getfixturevalue("only_runs")
    ran = detect(example.model, example.args, example.kwargs)
    assert table(ran) == table(exported)
    assert ran.bindings.keys() == exported.bindings.keys()
    for site in ran:
        a, b = ran.bindings[site.id], exported.bindings[site.id]
        assert [(side, call) for _, side, call in a.adds] == [(side, call) for _, side, call in b.adds]
        assert (a.turn, a.turns, a.holder) == (b.turn, b.turns, b.holder)


def test_a_run_follows_buffers_that_are_changed_in_place(only_runs):
    class Cached(Net):
        def __init__(self):
            super().__init__(None)
            self.register_buffer("cache", torch.zeros(2, 5, D))
            self.kept = torch.zeros(2, 5, D)

        def forward(self, x):
            self.cache.copy_(x)
            self.kept.copy_(self.cache)
            return self.kept + self.a(self.cache)

    model = Cached()
    assert len(detect(model, (X,))) == 1
    assert not model.cache.any()
    assert not model.kept.any()


def test_a_run_finds_tensors_in_objects_of_any_class(only_runs):
    class Batch:
        def __init__(self, x):
            self.x = x

    class Boxed(Net):
        def forward(self, batch):
            return Batch(batch.x + self.a(batch.x))

    assert kinds(detect(Boxed(None), (Batch(X),))) == {"identity": 1}


def test_sizes_that_depend_on_values_are_those_of_the_inputs():
    class Packed(Net):
        def forward(self, x, mask):
            padded = x.new_zeros(4, 6, D)
            padded[mask] = torch.tanh(self.a(x))
            return x + padded[mask]

    class Halves(Net):
        def forward(self, x, mask):
            x = x[mask]
            return x + self.a(x)

    mask = torch.arange(24).view(4, 6) < 18
    (site,) = detect(Packed(None), (torch.randn(18, D), mask))
    assert site.shape == (18, D)
    (site,) = detect(Halves(None), (torch.randn(4, 6, D), mask))
    assert site.shape == (18, D)
    (site,) = detect(Halves(None).to("meta"), (torch.randn(4, 6, D, device="meta"), mask.to("meta")))
    assert site.shape[0].startswith("?")


# Modes


class Drops(nn.Module):
    """Layer drop by a random generator that no graph sees."""

    def __init__(self, draw):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(6))
        self.draw = draw

    def forward(self, x):
        for layer in self.layers:
            if self.training and self.draw() < 0.5:
                continue
            x = x + layer(x)
        return x


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: torch.rand(1).item()])
def test_layers_that_train_mode_drops_at_random_are_found(draw):
    random.seed(1)
    np.random.seed(0)
    model = Drops(draw)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    sites = detect(model, (X,))
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert [site.id for site in sites] == [f"laurel_0.{turn}" for turn in range(6)]
    assert {sites.bindings[site.id].turns for site in sites} == {6}
    assert all("were not run in train mode" in note for note in sites.notes)
    assert len(sites.notes) == (draw in (random.random, np.random.rand))  # no export looks behind a value, and eval mode draws none


class Heads(Net):
    """Three connections in train mode, two others in eval mode, one in both."""

    def forward(self, x):
        x = x + self.a(x)
        if self.training:
            for layer in (self.b, self.a, self.b):
                x = x + layer(x)
            return x
        y = x + self.b(torch.relu(x))
        return y + self.a(y)


def test_what_either_mode_runs_is_found():
    sites = detect(Heads(None), (X,))
    assert [site.id for site in sites] == ["laurel_0", "laurel_2", "laurel_3", "laurel_1.0", "laurel_1.1", "laurel_1.2"]
    assert len({site.where for site in sites}) == 4
    assert len(sites.notes) == 3
    assert "what is trained does not act in eval mode" in sites.notes[-1]
    assert all(name in sites.notes[-1] for name in ("laurel_1.0", "laurel_2", "laurel_3"))
    sites.flow.check()
    for site in sites:
        binding = sites.bindings[site.id]
        assert sites.where(binding.residual.adds[0][0]) == site.where
        assert binding.adds[0][2] in sites.calls
    by_stream = {}
    for site in sites:
        by_stream.setdefault(site.stream, []).append(site.index)
    assert all(positions == list(range(len(positions))) for positions in by_stream.values())


def test_a_loop_counts_in_the_mode_that_turns_more_often():
    class Longer(Net):
        def forward(self, x):
            for _ in range(1 if self.training else 3):
                x = x + self.a(x)
            if self.training:
                for layer in (self.a, self.b, self.a, self.b):
                    x = x + torch.relu(layer(x))
            return x

    sites = detect(Longer(None), (X,))
    assert sorted(site.id for site in sites) == [f"laurel_0.{k}" for k in range(3)] + [f"laurel_1.{k}" for k in range(4)]
    assert {sites.bindings[f"laurel_0.{k}"].turns for k in range(3)} == {3}


def test_one_capture_is_enough_where_the_modes_run_the_same_sums():
    captured, notes = capture(Net(lambda s, x: torch.dropout(x, 0.5, s.training) + s.a(x)), (X,))
    assert len(captured) == 1
    assert not notes


def test_a_mode_that_cannot_run_is_said():
    class TrainOnly(Net):
        def forward(self, x):
            if not self.training:
                raise RuntimeError("no targets")
            return x + self.a(x)

    sites = detect(TrainOnly(None), (X,))
    assert len(sites) == 1
    assert sites.notes == ("What eval mode adds is not known: RuntimeError: no targets.",)


# The model is left as it was


def test_nothing_is_left_on_the_model():
    class Keeps(Net):
        def __init__(self):
            super().__init__(None)
            self.kept = []

        def forward(self, x):
            self.h = self.a(x)
            self.h += x
            self.kept.append(self.h)
            random.random()
            return self.h

    model = Keeps()
    before, state = list(vars(model)), random.getstate()
    assert len(detect(model, (X,))) == 1
    assert list(vars(model)) == before
    assert model.kept == []
    assert random.getstate() == state


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_a_forward_that_raises_is_explained_and_leaves_nothing(error):
    class Fails(Net):
        def forward(self, x):
            self.h = x + self.a(x)
            self.norm.weight.data.zero_()
            raise error("far too late")

    model = Fails(None)
    with pytest.raises(CaptureError, match=r"far too late. The model cannot be called with these inputs"):
        detect(model, (X,))
    assert not hasattr(model, "h")
    assert model.norm.weight.all()
    assert model.training


def test_tensors_beside_parameters_are_left_as_they_were():
    class Counts(Net):
        def __init__(self):
            super().__init__(None)
            self.plain = torch.zeros(3)
            self.register_buffer("count", torch.zeros(3))

        def forward(self, x):
            self.plain.add_(1)
            self.plain.copy_(self.count + 1)
            self.count.copy_(self.plain)
            return x + self.a(x)

    model = Counts()
    detect(model, (X,))
    assert not model.plain.any()
    assert not model.count.any()


def test_inputs_are_left_as_they_were():
    x = X.clone()
    detect(Net(lambda s, x: x.add_(s.a(x) * (2 if x.sum() > 0 else 1))), (x,))
    assert torch.equal(x, X)


# What cannot be done


def test_a_model_without_values_is_not_run():
    model = Net(BY_VALUE["a branch on values"][1]).to("meta")
    with pytest.raises(CaptureError, match="a model on the meta device has no values to run with"):
        detect(model, (X.to("meta"),))


def test_a_model_larger_than_memory_is_not_run(monkeypatch):
    monkeypatch.setattr(capturing, "fits_twice", lambda *_: False)
    with pytest.raises(CaptureError, match="does not fit into memory twice"):
        detect(Net(BY_VALUE["a branch on values"][1]), (X,))


def test_a_model_that_runs_and_cannot_be_traced_is_told_from_wrong_inputs():
    class Fussy(Net):
        def forward(self, x):
            if torch._C._len_torch_function_stack():
                raise RuntimeError("watched")
            return x + self.a(x)

    with pytest.raises(CaptureError, match=r"The model itself runs with these inputs"):
        detect(Fussy(None), (X,))


# Inputs


@pytest.mark.parametrize("given", [X, [X], {"x": X}, (X,)])
def test_inputs_may_be_a_tensor_a_list_or_a_dictionary(given):
    class Named(Net):
        def forward(self, x):
            return x + self.a(x)

    assert len(detect(Named(None), given)) == 1
