"""Pickles of models whose parts Python or PyTorch would not pickle: parametrised modules (weight_norm), and enumerations of C++."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize


class Pickler(pickle.Pickler):
    """A pickler that reduces by recipe what has none of its own."""

    def reducer_override(self, thing: Any) -> Any:
        if isinstance(thing, nn.Module) and parametrize.is_parametrized(thing):
            state = {**thing.__dict__, "_load_state_dict_pre_hooks": OrderedDict()}  # for checkpoints of older ways to parametrise
            return _parametrised, (parametrize.type_before_parametrizations(thing), state)
        if getattr(torch._C, type(thing).__qualname__, None) is type(thing) and hasattr(type(thing), "__members__"):  # of pybind11
            return _member, (type(thing).__qualname__, thing.name)
        return NotImplemented


MODULE = SimpleNamespace(
    __name__=__name__,
    Pickler=Pickler,
    Unpickler=pickle.Unpickler,
    dumps=pickle.dumps,
    loads=pickle.loads,
    load=pickle.load,
    dump=pickle.dump,
)
"""For `torch.save(..., pickle_module=MODULE)`; what it writes any pickle module reads."""


def _member(enumeration: str, name: str) -> Any:
    return getattr(getattr(torch._C, enumeration), name)


def _parametrised(base: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    """A module whose tensors are computed from others: the parametrisation is registered anew on the bare module."""
    module = base.__new__(base)
    module.__dict__.update(state)
    inject: Callable[..., None] = parametrize._inject_new_class
    inject(module)
    for name in module.parametrizations:  # type: ignore[union-attr]  # a ModuleDict
        parametrize._inject_property(module, name)
    return module
