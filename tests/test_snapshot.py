"""What running a model changes is put back."""

from __future__ import annotations

import functools
import random
from collections import OrderedDict, deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from laurel_rewrite import detect, rewrite
from laurel_rewrite.graph.snapshot import preserved, state_bytes


class Cache:
    __slots__ = ("items", "later")

    def __init__(self):
        self.items = [1]


class Messy(nn.Module):
    """Changes whatever a forward pass can change."""

    calls = 0
    seen: list[int] = []  # noqa: RUF012  # shared on purpose

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("count", torch.zeros(2))
        self.register_buffer("average", torch.zeros(4))
        self.plain = torch.full((2,), float("nan"))
        self.sparse = torch.eye(3).to_sparse()
        self.history = [1, 2]
        self.table = {"a": [0], "b": 1}
        self.order = OrderedDict(x=1, y=2)
        self.queue = deque([1, 2], maxlen=2)
        self.array = np.zeros(3)
        self.config = SimpleNamespace(depth=[1])
        self.cache = Cache()
        self.generators = [random.Random(1), np.random.default_rng(1), np.random.RandomState(1), torch.Generator()]
        total = 0

        def counting():
            nonlocal total
            total += 1
            return total

        self.counting = counting

    def forward(self, x):
        with torch.no_grad():
            self.linear.weight.add_(1)
        self.linear.bias.data = torch.ones(4)
        self.linear.weight.requires_grad_(False)
        self.linear.weight.grad = torch.ones(4, 4)
        self.norm(x)
        self.count += 1
        self.average.mul_(0.9).add_(self.linear(x).mean(0))  # has a gradient from here on
        self.plain.fill_(0)
        self.sparse._values().mul_(2)
        self.history.append(self.average)
        self.table["a"].append(1)
        del self.table["b"]
        self.order.move_to_end("x")
        self.queue.append(3)
        self.array += 1
        self.config.depth.append(2)
        self.cache.items, self.cache.later = [], 1
        for draw in (
            random.random,
            np.random.rand,
            lambda: torch.rand(1),
            *(g.random for g in self.generators[:2]),
            self.generators[2].rand,
        ):
            draw()
        torch.rand(1, generator=self.generators[3])
        self.counting()
        self.fresh = nn.Linear(2, 2)
        del self.norm
        self.linear.register_forward_hook(lambda *_: None)
        self.eval()
        type(self).calls += 1
        type(self).later = 1
        self.seen.append(1)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        x.add_(1)
        return x


def state(model, x):
    """Everything that `Messy.forward` changes, in values that can be compared."""
    tensors = [*model.state_dict().values(), model.plain.isnan(), model.sparse.to_dense(), x]
    return (
        [(t.dtype, t.data_ptr(), t.tolist()) for t in tensors[:-3]], [t.tolist() for t in tensors[-3:]],
        [(p.requires_grad, p.grad, p.is_leaf) for p in model.parameters()], model.average.is_leaf,
        model.history, model.table, list(model.order), list(model.queue), model.array.tolist(), model.config.depth,
        model.cache.items, hasattr(model.cache, "later"), list(vars(model)), list(model._modules), len(model.linear._forward_hooks),
        model.training, Messy.calls, hasattr(Messy, "later"), Messy.seen, torch.get_default_dtype(), torch.is_grad_enabled(),
        [model.generators[0].getstate(), model.generators[1].bit_generator.state, model.generators[3].get_state().tolist()],
        model.generators[2].get_state()[1].tolist(), random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),
        model.counting.__closure__[0].cell_contents,
    )  # fmt: skip


@pytest.mark.parametrize("raises", [False, True])
def test_whatever_a_forward_pass_changes_is_put_back(raises):
    model, x = Messy(), torch.randn(3, 4)
    before = [repr(part) for part in state(model, x)]
    parameter, history = model.linear.bias, model.history
    try:
        with preserved(model, x):
            model(x)
            assert not torch.is_grad_enabled()
            if raises:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert raises
    assert [repr(part) for part in state(model, x)] == before
    assert model.linear.bias is parameter
    assert model.history is history
    model.average.mul_(2)  # no graph is left on it
    model(x)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)


def test_a_failure_to_restore_is_said_and_the_rest_is_put_back():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.array = np.zeros(2)
            self.values = [1]

    model = Holder()

    def spoil():
        with preserved(model):
            model.array += 1
            model.array.flags.writeable = False
            model.values.append(2)

    with pytest.raises(RuntimeError, match=r"1 part.* could not be put back"):
        spoil()
    assert model.values == [1]


def test_shared_memory_is_counted_once_and_the_meta_device_not_at_all():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    assert state_bytes(model) == 2 * 8 * 8 * 4
    model[1].weight = model[0].weight
    model.view = model[0].weight.data[0]
    assert state_bytes(model) == 8 * 8 * 4
    assert state_bytes(model.to("meta")) == 8 * 4 * 8  # the view is a plain attribute, and stays where it was
    with preserved(nn.Linear(2, 2, device="meta")):
        pass


def test_without_values_parameters_are_not_copied_and_the_rest_comes_back():
    model = nn.Linear(2, 2)
    model.plain = torch.zeros(2)
    with preserved(model, values=False):
        model.weight.data.fill_(7)
        model.plain.fill_(7)
        model.kept = model.weight
    assert model.weight.eq(7).all()
    assert not model.plain.any()
    assert not hasattr(model, "kept")


MASKS: dict[int, torch.Tensor] = {}
SEEN: list[torch.Tensor] = []
LAST: torch.Tensor | None = None
COUNTS = torch.zeros(2)


class Made(OrderedDict):
    """Gives a new object each time it is asked, as transformers' table of activations does."""

    def __getitem__(self, key):
        return super().__getitem__(key)()


TABLE = Made(a=list, b=dict)


@functools.lru_cache
def angles(size: int) -> torch.Tensor:
    return torch.arange(size).float()


@functools.cache
def untouched() -> int:
    return 1


class Store:
    """A cache of its own."""

    kept: dict[int, torch.Tensor] = {}  # noqa: RUF012  # shared on purpose
    latest: torch.Tensor | None = None

    @classmethod
    def ones(cls, size: int) -> torch.Tensor:
        cls.latest = cls.kept.setdefault(size, torch.ones(size))
        return cls.latest


def mask(size: int) -> torch.Tensor:
    if size not in MASKS:
        MASKS[size] = Store.ones(size)
    return MASKS[size]


class Global(nn.Module):
    """Keeps what it needs again in global variables, some of them through functions of the same file."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        global LAST, FRESH
        LAST = FRESH = x.mean()
        SEEN.append(x)
        COUNTS.add_(1)
        TABLE["a"].append(1)
        return x + self.linear(x) * mask(4) * angles(4) * untouched()


def in_globals() -> tuple:
    return (
        dict(MASKS),
        list(SEEN),
        LAST,
        COUNTS.tolist(),
        angles.cache_info().currsize,
        "FRESH" in globals(),
        list(dict.items(TABLE)),
        Store.latest,
        dict(Store.kept),
    )


def test_what_a_model_keeps_in_global_variables_is_put_back():
    model = Global()
    untouched()
    before = in_globals()
    with preserved(model):
        model(torch.randn(2, 4))
        assert in_globals() != before
    assert in_globals() == before
    assert untouched.cache_info().currsize == 1  # no new entry, and so none is lost


def test_no_stand_in_is_left_in_global_variables():
    """A cache that a capture filled with tensors without values made the user's own model return such."""
    model = Global()
    x = torch.randn(2, 4)
    assert len(detect(model, (x,))) == 1
    assert not MASKS
    assert not SEEN
    assert type(rewrite(model, (x,), variant="rw")(x)) is torch.Tensor
    assert type(model(x)) is torch.Tensor
    angles.cache_clear()
    MASKS.clear()
    SEEN.clear()
    Store.kept.clear()
    Store.latest = None
