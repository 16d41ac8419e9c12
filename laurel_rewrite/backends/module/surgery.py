"""What is done to a live module: LAuReL modules go in, classes change, streams are connected; and out again.

The module that owns a site changes its class for a subclass of the same name whose `forward` has that one add replaced, and gets the
LAuReL module as a child. Parameter names, hooks, keyword arguments, caches and checkpointing stay as they were.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import fx, nn

from laurel_rewrite.backends.module import replay
from laurel_rewrite.backends.module.functions import BASE, Rewritten
from laurel_rewrite.detection.site import path_moved
from laurel_rewrite.errors import ConfigError, RewriteError
from laurel_rewrite.operators import registry
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.operators.plain import PlainResidual
from laurel_rewrite.operators.prepared import restore
from laurel_rewrite.operators.protocol import Connection
from laurel_rewrite.operators.state import AtEnd, Fed, Link, Slot, Stream, Tap
from laurel_rewrite.operators.turns import Turns
from laurel_rewrite.plan import Plan
from laurel_rewrite.private import FSDP_WRAPPED, OPTIMIZED, forget_hooks, pytree

RECORD = "_laurel_rewriting"
"""Attribute of a rewritten model, and of what holds all of its sites inside it: its `Rewriting`."""
PREPARED = "_laurel_prepared"
"""Attribute of a model that was prepared for a compiler, and is not rewritten: its `laurel_rewrite.backends.compiled.Prepared`."""
_log = logging.getLogger(__name__)


@dataclass
class Rewriting:
    """What was done to a model, kept with it.

    Attributes:
        plan: what each site got.
        classes: the class of each owner, where they were made from its base's source.
        edits: what these were made from, as data (`replay.recorded`).
        text, names: where they come from a saved file: the file's text, and the owners' classes in it.
        factors: what the operators multiplied weights of their branches by, by site and by the parameter's name.
    """

    plan: Plan
    classes: dict[str, Rewritten]
    edits: dict[str, Any] | None = None
    text: str | None = None
    names: dict[str, str] = field(default_factory=dict)
    factors: dict[str, dict[str, float]] = field(default_factory=dict)

    def operator_files(self) -> dict[str, Path]:
        """The files that its operators were loaded from, by operator; the others come with this package or with a plugin."""
        return {row.variant: row.operator.file for row in self.plan.sites if row.operator.file is not None}

    def made_again(self, model: nn.Module, label: str) -> dict[str, type]:
        """The class of each owner from the edits, without a capture; see `replay.replayed`."""
        edited = replay.replayed(self.edits, model, self.plan.sites, label)
        self.classes = {owner: edit.rewritten for owner, edit in edited.items()}
        return {owner: rewritten.cls for owner, rewritten in self.classes.items()}

    def below(self, path: str) -> Rewriting:
        """The same of a module inside the model: of the sites that it holds."""
        if not path:
            return self
        old = f"{path}."

        def inside(held: Mapping[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in held.items() if f"{name}.".startswith(old)}

        plan = replace(self.plan, sites=tuple(row for row in self.plan.sites if f"{row.owner}.".startswith(old)))
        edits = None if self.edits is None else replay.only(self.edits, inside)
        part = Rewriting(plan, inside(self.classes), edits, self.text, inside(self.names), inside(self.factors))
        return part.moved(old, "")

    def moved(self, old: str, new: str) -> Rewriting:
        """The same with another beginning of all paths."""

        def keys(held: Mapping[str, Any]) -> dict[str, Any]:
            return {path_moved(path, old, new): value for path, value in held.items()}

        edits = None if self.edits is None else replay.moved(self.edits, old, new)
        factors = {site: keys(weights) for site, weights in keys(self.factors).items()}
        return Rewriting(self.plan.moved(old, new), keys(self.classes), edits, self.text, keys(self.names), factors)

    @staticmethod
    def joined(parts: Sequence[Rewriting]) -> Rewriting:
        """That of a model, of those of modules inside that were rewritten one by one, with the model's paths.

        Raises:
            ConfigError: one of several has edited source, or a setting that a plan has one of differs.
        """
        if len(parts) == 1:
            return parts[0]
        if any(part.edits is None or not part.classes for part in parts):
            raise ConfigError("Of several parts of this model that were rewritten, one was loaded from source of its own. Save them apart.")
        edits = replay.joined([part.edits for part in parts if part.edits is not None])
        classes = {owner: cls for part in parts for owner, cls in part.classes.items()}
        factors = {site: weights for part in parts for site, weights in part.factors.items()}
        return Rewriting(Plan.joined([part.plan for part in parts]), classes, edits, factors=factors)

    def __deepcopy__(self, memo: dict[int, Any]) -> Rewriting:
        return replace(self)


class Host(Protocol):
    """A library whose models say in a way of their own what was done to them."""

    def owns(self, module: nn.Module) -> bool:
        """Whether a module is such a model."""

    def adopt(self, module: nn.Module, record: Rewriting) -> None:
        """Say it in one, of the sites that it holds; more than once, where the record changes."""

    def release(self, module: nn.Module) -> None:
        """Undo that, in any module."""


hosts: list[Host] = []


def attribute(module: nn.Module, name: str) -> Any:
    """An attribute of a module, or None; a `__getattr__` of the model's own may raise anything for a name that it does not know."""
    try:
        return getattr(module, name)
    except Exception:
        return None


def rewriting_of(model: nn.Module) -> Rewriting:
    """What was done to a rewritten model, or to the parts of a library's model; ConfigError where nothing was, or where something else is
    around it."""
    inner = unwrapped(model)
    record = vars(inner).get(RECORD)
    if isinstance(record, Rewriting):
        return record
    if sites_of(inner) and any(host.owns(inner) for host in hosts):
        return _of_parts(inner)
    inside = next((name for name, module in model.named_modules() if RECORD in vars(module)), None)
    hint = f" What is inside, at {inside!r}, was: take off what is around it (merge an adapter), or use that module." if inside else ""
    raise ConfigError(f"This {type(model).__name__} was not made by laurel_rewrite.rewrite or load.{hint}")


def _of_parts(model: nn.Module) -> Rewriting:
    """That of a model whose parts were rewritten, each by itself, and put in their places.

    Raises:
        ConfigError: it has a connection that came from elsewhere, or the parts' records do not go together.
    """
    parts: dict[str, Rewriting] = {}
    for path, module in model.named_modules():
        if RECORD in vars(module) and not any(f"{path}.".startswith(f"{outer}.") for outer in parts):
            parts[path] = vars(module)[RECORD].moved("", f"{path}." if path else "")
    known = {row.id for part in parts.values() for row in part.plan.sites}
    foreign = next((name for name in sites_of(model) if name not in known), None)
    if foreign is not None:
        raise ConfigError(
            f"The connection {foreign} of this {type(model).__name__} was made in another model, and what was done there is not known here."
        )
    return Rewriting.joined(list(parts.values()))


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers of PyTorch: for data-parallel training, sharding or compilation."""
    while type(model).__module__.partition(".")[0] == "torch":
        inner = next((model._modules[name] for name in ("module", FSDP_WRAPPED, OPTIMIZED) if name in model._modules), None)
        if inner is None or RECORD in vars(model):
            break
        model = inner
    return model


def original_class(module: nn.Module) -> type:
    """A module's class before the rewrite, and before what shards it changed the class again."""
    cls = next(cls for cls in type(module).__mro__ if not cls.__module__.startswith("torch.distributed."))
    base: type = vars(cls).get(BASE, cls)
    return base


# Modules


def install(model: nn.Module, plan: Plan, classes: Mapping[str, type]) -> None:
    """Add the plan's LAuReL modules to a model, change the owners' classes and connect the streams."""
    for row, laurel in zip(plan.sites, attach(model, plan), strict=True):
        if laurel.needs_input and row.reads:
            laurel.tap = Slot()
            model.get_submodule(row.reads).register_forward_hook(Tap(laurel.tap).after)
    change_classes(model, classes)
    _connect(model, plan)


def attach(model: nn.Module, plan: Plan) -> list[Connection]:
    """Give the owners of a plan's sites their LAuReL modules as children; returns these."""
    made = []
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
        made.append(laurel)
    return made


def change_classes(model: nn.Module, classes: Mapping[str, type]) -> None:
    """Give modules their new classes, by path; not through a `__setattr__` of their own, which may forbid it."""
    for name, cls in classes.items():
        object.__setattr__(model.get_submodule(name), "__class__", cls)


def keep_record(model: nn.Module, record: Rewriting) -> None:
    """Say in a model what was done to it; and of its part, in what holds all of the sites inside it (the model inside a wrapper that is taken off)
    and in each model of a library."""
    owners = [row.owner.split(".") if row.owner else [] for row in record.plan.sites]
    paths = {".".join(parts[:length]) for parts in owners for length in range(len(parts) + 1)}
    for path in sorted(paths, key=len, reverse=True):  # what they share, such as a configuration, speaks of the outermost
        module = model.get_submodule(path)
        own = [host for host in hosts if host.owns(module)]
        depth = path.count(".") + 1 if path else 0
        if own or all(".".join(parts[:depth]) == path for parts in owners):
            part = record.below(path)
            object.__setattr__(module, RECORD, part)
            for host in own:
                host.adopt(module, part)


def remove(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Undo `rewrite`: classes, keys and outputs are again what they were.

    Args:
        model: what `rewrite` or `load` returned.
        inplace: change `model` itself; else a copy.

    Raises:
        ConfigError: the model was not rewritten, or a module's class was changed again since.
    """
    if not sites_of(model):
        raise ConfigError(f"This {type(model).__name__} has no connection to remove: it was not rewritten.")
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
        for host in hosts:
            host.release(module)
        base = vars(type(module)).get(BASE)
        if base is not None:
            object.__setattr__(module, "__class__", base)
        for record in (RECORD, PREPARED):
            vars(module).pop(record, None)


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
        slots: dict[str, Slot | None] = {
            row.id: ring if shared else None if plan.leaves(row) == 0 and not row.behind else Slot() for row in rows
        }
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
    forget_hooks(module, lambda hook: isinstance(getattr(hook, "__self__", None), Stream | Tap | AtEnd | Fed))
