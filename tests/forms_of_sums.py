"""Forms in which people write a residual connection: the sum itself, in loops, in place; and those that are refused."""

from __future__ import annotations

import functools

import torch
import torch.utils.checkpoint
from forms import D, One, Three, form, refused, residual
from torch import nn

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


class _InPlaceAndOn(One):
    def forward(self, h):
        h += self.a(h)
        return h * 2


@form
class AddsToWhatABlockChanged(One):
    """The branch, which is evaluated first, changes the skip, and only the sum reads it then."""

    def __init__(self):
        super().__init__()
        self.block = _InPlaceAndOn()

    def forward(self, x):
        h = torch.relu(x)
        return self.a(self.block(h)) + h


@form
class KeepsAnActivation(One):
    def forward(self, x):
        self.map = self.a(x)
        return x + self.map


@form
class LooksAtItsChildren(One):
    def forward(self, x):
        for child in self.children():
            assert isinstance(child, nn.Module)
        return x + self.a(x)


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


@refused("calls every child of its module, and LAuReL modules would be among them")
class CallsItsChildren(One):
    def forward(self, x):
        h = x
        for _, child in self.named_children():
            h = child(h)
        return x + h


@refused("calls every child of its module, and LAuReL modules would be among them")
class CallsItsChildrenInAComprehension(One):
    def forward(self, x):
        return x + sum(child(x) for child in self._modules.values())


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
