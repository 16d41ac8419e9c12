"""Whose code an addition stands in: methods, functions, replaced forwards, modules behind slices and under two names."""

from __future__ import annotations

import functools
import types

import pytest
from torch import nn
from toys import D, Net, X

from laurel_rewrite import detect


def residual(fn, x):
    return x + fn(x)


def add_norm(norm, x, y):
    return norm(x + y)


def undecorated(forward):
    def inner(self, x):
        return forward(self, x)

    return inner


class Unwrapped(Net):
    @undecorated
    def forward(self, x):
        return x + self.a(x)


class Alias(Net):
    def _impl(self, x):
        return x + self.a(x)

    forward = _impl


class Property(Net):
    @property
    def out(self):
        return self.held + self.a(self.held)

    def forward(self, x):
        self.held = x
        return self.out


class Static(Net):
    @staticmethod
    def merge(layer, x):
        return x + layer(x)

    def forward(self, x):
        return self.merge(self.a, x)


def test_a_function_that_takes_a_module_is_no_method_of_it():
    for model in (Net(lambda s, x: residual(s.a, x)), Net(lambda s, x: add_norm(s.norm, x, s.a(x))), Static(None)):
        sites = detect(model, (X,))
        assert [site.id for site in sites] == ["laurel_0"]
        (call,) = [sites.bindings["laurel_0"].adds[0][2]]
        assert call.owner == ""
        assert call.steps[0].code is type(model).forward.__code__
        assert len(call.steps) > 1


@pytest.mark.parametrize("cls", [Unwrapped, Alias, Property])
def test_methods_are_methods_whatever_decorates_them(cls):
    assert [(site.id, site.owner) for site in detect(cls(None), (X,))] == [("laurel_0", "")]


def test_a_replaced_forward_belongs_to_its_module():
    def replaced(self, x):
        return x + self.b(x)

    for forward in (types.MethodType, functools.partial):
        model = nn.Sequential(Net(None), Net(None))
        model[1].forward = forward(replaced, model[1])
        model[0].forward = functools.wraps(Net.forward)(functools.partial(replaced, model[0]))
        assert [site.owner for site in detect(model, (X,))] == ["0", "1"]


class Block(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.linear, self.act = nn.Linear(D, D), act

    def forward(self, x):
        return x + self.act(self.linear(x))


@pytest.mark.parametrize("holder", [lambda blocks: nn.Sequential(*blocks), nn.ModuleList])
def test_modules_behind_a_slice_have_their_paths(holder):
    class Sliced(nn.Module):
        def __init__(self):
            super().__init__()
            act = nn.SiLU()  # shared: the export works with stand-ins of all modules
            self.blocks = holder([Block(act) for _ in range(4)])

        def forward(self, x):
            for block in self.blocks[1:][:2]:
                x = block(x)
            return self.blocks[-1](x)

    model = Sliced()
    sites = detect(model, (X,))
    assert [site.owner for site in sites] == ["blocks.1", "blocks.2", "blocks.3"]
    for value in sites.flow.values:
        model.get_submodule(value.owner)


def test_a_block_under_two_names_is_one_module():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = Block(nn.ReLU())
            self.second = self.first

        def forward(self, x):
            return self.second(self.first(x))

    assert [site.id for site in detect(Twice(), (X,))] == ["first.laurel_0", "first.laurel_0@1"]
