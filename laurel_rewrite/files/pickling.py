"""Pickles of models whose parts Python or PyTorch would not pickle: parametrised modules (weight_norm), and enumerations of C++."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from laurel_rewrite.private import enumeration_member, is_enumeration, parametrise_again, state_without_old_hooks


class Pickler(pickle.Pickler):
    """A pickler that reduces by recipe what has none of its own."""

    def reducer_override(self, thing: Any) -> Any:
        if isinstance(thing, nn.Module) and parametrize.is_parametrized(thing):
            return _parametrised, (parametrize.type_before_parametrizations(thing), state_without_old_hooks(thing))
        if is_enumeration(thing):  # of pybind11
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
    return enumeration_member(enumeration, name)


def _parametrised(base: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    """A module whose tensors are computed from others: the parametrisation is registered anew on the bare module."""
    module = base.__new__(base)
    module.__dict__.update(state)
    parametrise_again(module)
    return module
