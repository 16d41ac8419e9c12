"""Forms in which people write a residual connection: where the function that holds the sum stands, and what holds it."""

from __future__ import annotations

import functools
import sys

import torch
import torch.utils.checkpoint
from torch import nn

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
