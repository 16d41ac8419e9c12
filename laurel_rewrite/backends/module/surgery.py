"""What is done to a live module: LAuReL modules go in, classes change, streams are connected; and out again.

The module that owns a site changes its class for a subclass of the same name whose `forward` has that one add replaced, and gets the
LAuReL module as a child. Parameter names, hooks, keyword arguments, caches and checkpointing stay as they were.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from laurel_rewrite.backends.module.functions import BASE, Rewritten
from laurel_rewrite.errors import ConfigError, RewriteError
from laurel_rewrite.operators import registry
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.operators.plain import PlainResidual
from laurel_rewrite.operators.prepared import restore
from laurel_rewrite.operators.protocol import Connection
from laurel_rewrite.operators.state import AtEnd, Fed, Link, Slot, Stream, Tap
from laurel_rewrite.operators.turns import Turns
from laurel_rewrite.plan import Plan

RECORD = "_laurel_rewriting"
"""Attribute of a rewritten model: its `Rewriting`."""
_SAVE_PRETRAINED = "save_pretrained"
_log = logging.getLogger(__name__)


@dataclass
class Rewriting:
    """What was done to a model, kept with it.

    Attributes:
        plan: what each site got.
        classes: the class of each owner, where `rewrite` made it.
        text, names: where `load` built the model: the file's text, and the owners' classes in it.
    """

    plan: Plan
    classes: dict[str, Rewritten]
    text: str | None = None
    names: dict[str, str] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> Rewriting:
        return Rewriting(self.plan, self.classes, self.text, self.names)

    def __reduce__(self) -> tuple[Any, ...]:
        return Rewriting, (self.plan, self.classes, self.text, self.names)


def attribute(module: nn.Module, name: str) -> Any:
    """An attribute of a module, or None; a `__getattr__` of the model's own may raise anything for a name that it does not know."""
    try:
        return getattr(module, name)
    except Exception:
        return None


def rewriting_of(model: nn.Module) -> Rewriting:
    """What was done to a rewritten model; ConfigError where nothing was."""
    record = attribute(model, RECORD)
    if not isinstance(record, Rewriting):
        raise ConfigError(f"This {type(model).__name__} was not made by laurel_rewrite.rewrite or load.")
    return record


# Modules


def install(model: nn.Module, plan: Plan, classes: Mapping[str, type]) -> None:
    """Add the plan's LAuReL modules to a model, change the owners' classes and connect the streams."""
    first = next(iter(model.parameters()), None)
    for row in plan.sites:
        owner = model.get_submodule(row.owner)
        laurel = plan.build(row, _like(owner, first))
        laurel.train(owner.training)
        if row.turns:
            if row.attribute not in owner._modules:  # which a `__getattr__` of its own might take for another module's
                loop = row.id.rsplit(".", 1)[0]
                plain = (PlainResidual(row.side) for _ in range(row.turns))
                nn.Module.__setattr__(owner, row.attribute, Turns(plain, site=loop, share=plan.extra_turns == "share"))
            turns: Any = owner._modules[row.attribute]
            turns[int(row.id.rsplit(".", 1)[1])] = laurel
        else:
            nn.Module.__setattr__(owner, row.attribute, laurel)
        if laurel.needs_input and row.reads:
            laurel.tap = Slot()
            model.get_submodule(row.reads).register_forward_hook(Tap(laurel.tap).after)
    change_classes(model, classes)
    _connect(model, plan)


def change_classes(model: nn.Module, classes: Mapping[str, type]) -> None:
    """Give modules their new classes, by path; not through a `__setattr__` of their own, which may forbid it."""
    for name, cls in classes.items():
        object.__setattr__(model.get_submodule(name), "__class__", cls)


def keep_record(model: nn.Module, record: Rewriting) -> None:
    """Say in a model what was done to it."""
    object.__setattr__(model, RECORD, record)
    if hasattr(type(model), _SAVE_PRETRAINED):
        object.__setattr__(model, _SAVE_PRETRAINED, _SavePretrained(model))


class _SavePretrained:
    """`save_pretrained` of a rewritten model. What `from_pretrained` builds from such a folder has no LAuReL, and takes its weights for
    superfluous: so it is refused, unless `state_dict` is given, as trainers do, who read their checkpoints into the model that they have."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        name, fate = type(self.model).__name__, "from_pretrained would read this folder as the model without LAuReL"
        if "state_dict" not in kwargs:
            raise ConfigError(
                f"{name}: {fate}. Write it with laurel_rewrite.save(model, folder), which laurel_rewrite.load reads; as a checkpoint for a "
                "model that was rewritten in the same way, give the weights: save_pretrained(folder, state_dict=model.state_dict())."
            )
        _log.warning("%s: %s; read its weights into a model that was rewritten in the same way, with load_state_dict", name, fate)
        return getattr(type(self.model), _SAVE_PRETRAINED)(self.model, *args, **kwargs)


def remove(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Undo `rewrite`: classes, keys and outputs are again what they were.

    Args:
        model: what `rewrite` or `load` returned.
        inplace: change `model` itself; else a copy.

    Raises:
        ConfigError: the model was not rewritten, or a module's class was changed again since.
    """
    if not sites_of(model):
        raise ConfigError(f"This {type(model).__name__} has no LAuReL module to remove.")
    if isinstance(model, fx.GraphModule):
        raise ConfigError("LAuReL cannot be removed from a graph; keep the graph from before the pass.")
    for name, module in model.named_modules():
        if BASE not in vars(type(module)) and any(BASE in vars(cls) for cls in type(module).__mro__):
            raise ConfigError(
                f"The class of {name or 'the model'} was changed to {type(module).__name__} after the rewrite (a parametrisation, or sharding); "
                "undo that before LAuReL is removed."
            )
    model = model if inplace else copied(model)
    connections = sites_of(model)
    restore(model, connections.values())
    kept = [name for name, module in connections.items() if not module.prepared and registry.operator(module.config.variant).prepares]
    if kept:
        _log.warning("the weights of %d branches, that of %s first, stay as their operator left them", len(kept), kept[0])
    take_out(model)
    return model


def take_out(model: nn.Module) -> None:
    """Take the connections, their hooks and the owners' classes out of a model; its weights stay as they are."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Connection | Turns):
                nn.Module.__delattr__(module, name)
        _disconnect(module)
        base = vars(type(module)).get(BASE)
        if base is not None:
            object.__setattr__(module, "__class__", base)
    for name in (RECORD, _SAVE_PRETRAINED):
        vars(model).pop(name, None)


def copied(model: nn.Module) -> nn.Module:
    """A deep copy. Activations that a module keeps (attention maps, for drawing) are copied without their history.

    Raises:
        RewriteError: something in the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for leaf in pytree.tree_leaves({k: v for k, v in vars(module).items() if k not in ("_parameters", "_modules")}):
            if isinstance(leaf, torch.Tensor) and not leaf.is_leaf:
                memo[id(leaf)] = leaf.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever a member's own copying raises
        raise RewriteError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {str(error)[:300]}). Change it itself: inplace=True."
        ) from error


def _like(owner: nn.Module, first: torch.Tensor | None) -> torch.Tensor | None:
    """A parameter whose device and dtype a new one beside it should have."""
    floating = (p for p in owner.parameters() if p.is_floating_point())
    return next(floating, first)


def _connect(model: nn.Module, plan: Plan) -> None:
    """Give the connections of each stream with a history their links, and the module whose call is a pass the hooks that begin and end it."""
    for rows in plan.streams():
        if not plan.has_history(rows[0].stream):
            continue
        shared = any(row.repeats > 1 for row in rows)
        holder = model.get_submodule(rows[0].holder)
        ring = Slot()  # of all connections, where some are called again and again
        slots: dict[str, Slot | None] = {row.id: ring if shared else None if plan.leaves(row) == 0 else Slot() for row in rows}
        stream = Stream([ring] if shared else [slot for slot in slots.values() if slot is not None], shared=shared, holder=rows[0].holder)
        stream.module = weakref.ref(holder)
        for index, row in enumerate(rows):
            module: Any = model.get_submodule(row.id)
            before = plan.before(row)
            read = ring if shared and (before is not None or row.repeats > 1) else slots[before.id] if before is not None else None
            reader = rows[0].operator.connection.reader
            behind = before is not None and bool(before.behind)
            module.link = Link(row.id, stream, slots[row.id], read, needs=index > 0, reader=reader, behind=behind, fed=module.config.fed)
            if row.behind:
                model.get_submodule(row.behind).register_forward_hook(AtEnd(module).after)
            for place, path in enumerate(row.projections if module.config.fed else ()):
                parent, _, name = path.rpartition(".")
                norm = model.get_submodule(row.reads) if row.reads else None
                hook = Fed(module, place, norm, model.get_submodule(parent), name).before
                model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)
        holder.register_forward_pre_hook(stream.before)
        holder.register_forward_hook(stream.after, always_call=True)


def _disconnect(module: nn.Module) -> None:
    """Take the hooks of `_connect` off a module."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Stream | Tap | AtEnd | Fed)]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)
            module._forward_pre_hooks_with_kwargs.pop(key, None)
