"""The forms in which people write a residual connection: each is rewritten so that it means what it meant, or is refused with the reason."""

from __future__ import annotations

import copy
import functools
import pickle
import sys

import pytest
import torch
import torch.utils.checkpoint
from conftest import away_from_start
from torch import nn

from laurel_rewrite import LaurelError, RewriteError, VerificationError, load, remove, rewrite, save
from laurel_rewrite.errors import TooManyTurnsError
from laurel_rewrite.operator import sites_of

D = 16
REGISTRY: dict[str, type] = {}
FORMS: dict[str, type[nn.Module]] = {}
REFUSED: dict[str, tuple[type[nn.Module], str]] = {}
COUNT = 0


def form(cls):
    FORMS[cls.__name__] = cls
    return cls


def refused(reason):
    def add(cls):
        REFUSED[cls.__name__] = cls, reason
        return cls

    return add


class One(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(D, D)


class Three(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(3))
        self.more = nn.ModuleList(nn.Linear(D, D) for _ in range(3))


# Names and where functions stand


@form
class Alias(One):
    def _impl(self, x):
        return x + self.a(x)

    forward = _impl


@form
class Private(nn.Module):
    def __init__(self):
        super().__init__()
        self.__a = nn.Linear(D, D)

    def forward(self, x):
        return x + self.__a(x)


@form
class PrivateOfAParent(Private):
    pass


class Wrapping(One):
    """Wraps the forward of each subclass, and does its work where that wrapper is the outermost one, as transformers' layers do."""

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        forward = cls.forward

        @functools.wraps(forward)
        def wrapper(self, x):
            outermost = type(self).forward is wrapper
            return 2 * forward(self, x) if outermost else forward(self, x)

        cls.forward = wrapper


@form
class WrappedByABaseClass(Wrapping):
    def forward(self, x):
        return x + self.a(x)


@form
class WrappedTwice(Wrapping):
    def doubled(function):
        @functools.wraps(function)
        def wrapper(self, x):
            return 3 * function(self, x)

        return wrapper

    @doubled
    def forward(self, x):
        return x + self.a(x)


@form
class KeywordsInParentheses(One):
    def forward(self, x):
        return torch.add(input=(x), other=(self.a(x) if self.a.in_features else x))


@form
class PrivateHelper(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

    def __join(self, x, y):
        return x + y

    def forward(self, x):
        x = self.__join(x, self.a(x))
        return self.__join(x, self.b(x))


@form
class StaticMethod(One):
    @staticmethod
    def join(x, y):
        return x + y

    def forward(self, x):
        return self.join(x, self.a(x))


@form
class ClassMethod(One):
    @classmethod
    def join(cls, x, y):
        return x + y

    def forward(self, x):
        return self.join(x, self.a(x))


@form
class Property(One):
    @property
    def joined(self):
        return self.h + self.a(self.h)

    def forward(self, x):
        self.h = x
        try:
            return self.joined
        finally:
            del self.h


@form
class ClassDefault(One):
    FACTOR = 3

    def forward(self, x, n=FACTOR):
        return x + self.a(x) * n


class Registered(One):
    def __init_subclass__(cls, kind, **options):
        super().__init_subclass__(**options)
        if kind in REGISTRY:
            raise ValueError(f"duplicate {kind}")
        REGISTRY[kind] = cls


@form
class OfARegistry(Registered, kind="block"):
    def forward(self, x):
        return x + self.a(x)


def plain_wrapper(function):
    def wrapper(self, *args):
        return function(self, *args)

    return wrapper


@form
class UnnamedWrapper(One):
    @plain_wrapper
    def forward(self, x):
        return x + self.a(x)


class Doubling(One):
    def before(self, x):
        return x * 2


@form
class Super(Doubling):
    def before(self, x):
        return x * 5

    def forward(self, x):
        x = super().before(x)
        return x + self.a(x) * len(__class__.__name__)


@form
class NamesItself(Doubling):
    FACTOR = 2

    def before(self, x):
        return x * 5

    def forward(self, x):
        x = super(NamesItself, self).before(x) * NamesItself.FACTOR  # noqa: UP008  # the point of the test
        return x + self.a(x) if isinstance(self, NamesItself) else x


@form
class ForbidsNewAttributes(One):
    def __init__(self):
        super().__init__()
        self.closed = True

    def __setattr__(self, name, value):
        if "closed" in vars(self) and name not in vars(self):
            raise AttributeError(name)
        super().__setattr__(name, value)

    def __delattr__(self, name):
        raise AttributeError(name)

    def forward(self, x):
        return x + self.a(x)


@form
class AsksAnother(Three):
    """What it has not itself it takes from the module inside it, which has a loop of its own."""

    class Inside(Three):
        def forward(self, x):
            for layer in self.layers:
                x = x + torch.tanh(layer(x))
            return x

    def __init__(self):
        super().__init__()
        self.inner = AsksAnother.Inside()

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x):
        x = self.inner(x)
        for layer in self.more:
            x = x + torch.tanh(layer(x))
        return x


# Containers


@form
class OfALine(nn.Sequential):
    def __init__(self, *layers):
        super().__init__(*(layers or (nn.LayerNorm(D), nn.Linear(D, D))))

    def forward(self, x):
        y = super().forward(x)
        return x + self[-1](y) * len(self)


@form
class OfAList(nn.ModuleList):
    def __init__(self, layers=()):
        super().__init__(layers or (nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)))

    def forward(self, x):
        for layer in self:
            x = x + torch.tanh(layer(x))
        return x


@form
class OfADictionary(nn.ModuleDict):
    def __init__(self):
        super().__init__({"a": nn.Linear(D, D), "b": nn.Linear(D, D)})

    def forward(self, x):
        for name, layer in self.items():
            x = x + torch.tanh(layer(x)) * len(name)
        return x * len(self) + sum(len(name) for name in self)


class Processor:
    def __call__(self, module, x):
        return x + module.a(x)


@form
class CallableObject(One):
    def __init__(self):
        super().__init__()
        self.processor = Processor()

    def forward(self, x):
        return self.processor(self, x)


def residual(fn, x):
    return x + fn(x)


@form
class FunctionOfAModule(One):
    def forward(self, x):
        return residual(self.a, x)


@form
class FunctionByAttribute(One):
    def forward(self, x):
        return sys.modules[__name__].residual(self.a, x) if False else FORMS and residual(self.a, x)


@form
class Closure(One):
    def forward(self, x):
        def body(y):
            return y + self.a(y)

        return torch.utils.checkpoint.checkpoint(body, x, use_reentrant=False)


@form
class Lambda(One):
    def forward(self, x):
        return (lambda y: y + self.a(y))(x)


@form
class Held(One):
    def __init__(self):
        super().__init__()
        self.join = torch.add

    def forward(self, x):
        return self.join(x, self.a(x))


# How the sum is written


@form
class Aten(One):
    def forward(self, x):
        return torch.ops.aten.add(x, self.a(x))


@form
class Keywords(One):
    def forward(self, x):
        return torch.add(input=x, other=self.a(x))


@form
class HalfOfTheBranch(One):
    def forward(self, x):
        x = torch.add(x, self.a(x), alpha=0.5)
        return x.add(self.a(x), alpha=2)


@form
class Parentheses(One):
    def forward(self, x):
        return torch.add((self.a(x)), (x))


@form
class Backslash(One):
    def forward(self, x):
        # fmt: off
        y = x \
            + self.a(x)
        return y + \
            self.a(y)
        # fmt: on


@form
class Strings(One):
    def forward(self, x):
        text = """a
b
  c"""
        other = "x y\x0cz"
        return x + self.a(x) * (len(text) + len(other))


@form
class OneLine(Three):
    def forward(self, x):
        # fmt: off
        for f, g in zip(self.layers, self.more, strict=True): x = g(x) + (x + f(x))  # noqa: E701  # the point of the test
        # fmt: on
        return x


# Loops


@form
class LoopOverAMethod(Three):
    def _layer(self, f, x):
        return x + f(x)

    def forward(self, x):
        for f in self.layers:
            x = self._layer(f, x)
        return x


@form
class ParallelInALoop(Three):
    def forward(self, x):
        for f, g in zip(self.layers, self.more, strict=True):
            x = x + f(x) + g(x)
        return x


@form
class Generator(Three):
    def states(self, x):
        for f in self.layers:
            x = x + f(x)
            yield x

    def forward(self, x):
        return list(self.states(x))[-1]


@form
class Comprehension(Three):
    def forward(self, x):
        return torch.stack([torch.tanh(x + f(x)) for f in self.layers])


@form
class Reduce(Three):
    def forward(self, x):
        return functools.reduce(lambda h, f: h + f(h), self.layers, x)


@form
class While(Three):
    def forward(self, x):
        i = 0
        while i < 3:
            x = x + self.layers[i](x)
            i += 1
        return x


@form
class TakenNames(Three):
    def forward(self, x):
        iter, next, laurel_0 = 0, None, 3  # noqa: F841  # the point of the test
        for f in self.layers:
            x = x + f(x)
            iter += laurel_0
        return x * iter


@form
class EverySecondTurn(Three):
    def forward(self, x):
        for i, f in enumerate([*self.layers, *self.more]):
            if i % 2:
                x = x + f(x)
        return x


# In place


@form
class NoAlias(One):
    def forward(self, x):
        y = self.a(x)
        y += x
        return torch.relu(y)


@form
class SecondName(One):
    def forward(self, x):
        x = x * 2
        y = x
        x += self.a(x)
        return y


@form
class View(One):
    def forward(self, x):
        h = x * 2
        v = h.view(-1, D)
        h += self.a(h)
        return v


@form
class PartOfATensor(One):
    def forward(self, x):
        h = x * 2
        t = h[:, 1:]
        t += self.a(t)
        return h


@form
class ViewAsAStatement(One):
    def forward(self, x):
        h = x * 2
        h.view(-1, D).add_(self.a(h.view(-1, D)))
        return h


@form
class TargetWithASideEffect(One):
    def index(self):
        self.asked = getattr(self, "asked", 0) + 1
        return 0

    def forward(self, x):
        self.asked = 0
        states = [x * 2]
        states[self.index()] += self.a(states[0])
        return states[0] + self.asked


@form
class BranchIsSeen(One):
    def forward(self, x):
        y = self.a(x)
        z = y
        y += x
        return z


@form
class OwnInput(One):
    def forward(self, x):
        x += self.a(x)
        return x * 2


class _InPlaceBlock(One):
    def forward(self, h):
        h.add_(self.a(h))


@form
class CallersTensor(One):
    def __init__(self):
        super().__init__()
        self.block = _InPlaceBlock()

    def forward(self, x):
        h = self.a(x)
        self.block(h)
        return h


@form
class KeepsAnActivation(One):
    def forward(self, x):
        self.map = self.a(x)
        return x + self.map


# Refused


@refused("which is not rewritten; write it with")
class Starred(One):
    def forward(self, x):
        args = (x, self.a(x))
        return torch.add(*args)


@refused("which is not rewritten; write it with")
class SumOfAList(One):
    def forward(self, x):
        return sum([x, self.a(x)])


@refused("one expression serves two sites|cannot be found by name|cannot be rewritten")
class OneLambdaTwice(Three):
    def forward(self, x):
        join = lambda f, y: y + f(y)  # noqa: E731  # the point of the test
        return join(self.layers[1], join(self.layers[0], x))


class _Join(nn.Module):
    def forward(self, x, y):
        return x + y


@refused("its module is called with the skip as one operand, and again as another")
class ModuleWithTheSkipOnEitherSide(Three):
    def __init__(self):
        super().__init__()
        self.join = _Join()

    def forward(self, x):
        x = self.join(x, self.layers[0](x))
        return self.join(self.layers[1](x), x)


@refused("residual_laurel")  # the copy is called without what the partial object holds
class Partial(One):
    def __init__(self):
        super().__init__()
        self.joined = functools.partial(residual, self.a)

    def forward(self, x):
        return self.joined(x)


def joined(a, b):
    return a + b


@refused("one expression serves two sites")
class HelperWithTheSkipOnEitherSide(Three):
    def forward(self, x):
        x = joined(x, self.layers[0](x))
        return joined(self.layers[1](x), x)


class Reversible(torch.autograd.Function):
    """Keeps no activations: its backward computes them again from the output, as the plain sum allows."""

    @staticmethod
    def forward(ctx, x, block):
        ctx.block, ctx.y = block, block(x)
        return ctx.y.clone()

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.y
        for _ in range(8):
            x = ctx.y - 0.1 * torch.tanh(ctx.block.a(x))
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = x + 0.1 * torch.tanh(ctx.block.a(x))
        return torch.autograd.grad(y, x, gradient)[0], None


class _Inverted(One):
    def forward(self, x):
        return x + 0.1 * torch.tanh(self.a(x))


@refused("torch.autograd.Function with its own backward")
class InsideAFunctionOfItsOwnBackward(One):
    def __init__(self):
        super().__init__()
        self.block = _Inverted()

    def forward(self, x):
        return Reversible.apply(self.a(x), self.block)


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
    if len(modules) == 3:
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
