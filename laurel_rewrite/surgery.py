"""The module back end: put LAuReL into a live `nn.Module`, and take it out again.

The module that owns a site changes its class for a subclass of the same name whose `forward` has that one add replaced, and gets the
LAuReL module as a child. Parameter names, hooks, keyword arguments, caches and checkpointing stay as they were.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from laurel_rewrite.capture import Call
from laurel_rewrite.errors import ConfigError, RewriteError
from laurel_rewrite.operator import Laurel, PlainResidual, refuse_second_time, sites_of
from laurel_rewrite.plan import LaurelConfig, Plan
from laurel_rewrite.sites import Sites, detect
from laurel_rewrite.source import BASE, Change, Rewritten, rewrite_class
from laurel_rewrite.state import connect, disconnect

RECORD = "_laurel_rewriting"
"""Attribute of a rewritten model: its `Rewriting`."""


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
        # Classes made here cannot be pickled; `save` writes their source.
        return Rewriting, (self.plan, {}, self.text, self.names)


def rewrite(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    variant: str = "rw+lr",
    rank: int = 16,
    history: int = 3,
    normalize: str = "softmax",
    init_down: str = "orthogonal",
    history_map: str = "low-rank",
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    plan: Plan | str | None = None,
    inplace: bool = False,
    seed: int = 0,
) -> nn.Module:
    """Replace the residual connections of a model by LAuReL. At the start it computes what it computed, bit for bit.

    Args:
        model: a module on any device (meta included) whose classes have their source at hand, or an `fx.GraphModule`.
        args, kwargs: inputs of its forward, for the capture; a batch of 2 or more.
        variant, rank, history, normalize, init_down, history_map, include, exclude, seed: see `LaurelConfig`.
        plan: an edited plan, or the path of one, instead of the above.
        inplace: change `model` itself; else a copy.

    Returns:
        The model with LAuReL modules as children of the sites' owners; they are on the owner's device and of its dtype. An old
        state dict loads with `strict=False`, and only LAuReL keys are missing.

    Raises:
        ConfigError: the request cannot be meant (`LaurelConfig`), or the model was rewritten already.
        NoSiteError: no residual connection.
        CaptureError: the model cannot be captured with these inputs.
        RewriteError: a site stands where it cannot be rewritten. The model is as it was.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> layer = nn.TransformerEncoderLayer(32, 4, batch_first=True)
        >>> better = rewrite(layer, (torch.randn(2, 5, 32),), variant="rw+lr", rank=4)
        >>> [name for name, _ in better.named_children() if name.startswith("laurel")]
        ['laurel_0', 'laurel_1']
    """
    if plan is None:
        config = LaurelConfig(
            variant=variant, rank=rank, history=history, normalize=normalize, init_down=init_down, history_map=history_map,
            include=(include,) if isinstance(include, str) else tuple(include),
            exclude=(exclude,) if isinstance(exclude, str) else tuple(exclude), seed=seed,
        )  # fmt: skip
    refuse_second_time(model)
    sites = detect(model, args, kwargs)
    if plan is None:
        plan = Plan.from_sites(sites, config)
    elif not isinstance(plan, Plan):
        plan = Plan.read(plan)
    return apply_plan(model, sites, plan, inplace=inplace)


def apply_plan(model: nn.Module, sites: Sites, plan: Plan, *, inplace: bool = False) -> nn.Module:
    """Carry out a plan on the model that `sites` were found in; see `rewrite`. Everything is checked before anything changes."""
    plan.check(sites)
    if isinstance(model, fx.GraphModule):
        from laurel_rewrite.passes.insert_laurel import InsertLaurel

        return InsertLaurel(plan)(model if inplace else copy.deepcopy(model)).graph_module
    classes = rewritten_classes(model, sites, plan)
    target = model if inplace else copy.deepcopy(model)
    install(target, plan, {owner: rewritten.cls for owner, rewritten in classes.items()})
    setattr(target, RECORD, Rewriting(plan, classes))
    return target


def rewriting_of(model: nn.Module) -> Rewriting:
    """What was done to a rewritten model; ConfigError where nothing was."""
    record = getattr(model, RECORD, None)
    if not isinstance(record, Rewriting):
        raise ConfigError(f"This {type(model).__name__} was not made by laurel_rewrite.rewrite or load.")
    return record


# Classes


def rewritten_classes(model: nn.Module, sites: Sites, plan: Plan) -> dict[str, Rewritten]:
    """For each owner in the plan its new class; owners of one class with the same sites share it.

    Raises:
        RewriteError: with every site that cannot be rewritten, and why.
    """
    changes: dict[str, list[Change]] = defaultdict(list)
    problems: list[str] = []
    calls: dict[str, list[Call]] = defaultdict(list)
    for row in plan.sites:
        binding = sites.bindings[row.id]
        adds = [(call.steps, side) for _, side, call in binding.adds if call is not None and call.owner == row.owner]
        if row.kind == "partial":
            problems.append(f"{row.id} ({row.where}): the skip is a slice of what the branch reads")
        elif len(adds) != len(binding.adds):
            problems.append(f"{row.id} ({row.where}): its sum is spread over several modules, or was not made by Python code")
        else:
            change = Change(row.attribute, tuple(adds), binding.turn is not None)
            others = [c for c in changes[row.owner] if c.name == change.name]
            if others and others[0] != change:
                problems.append(f"{row.id} ({row.where}): the turns of its loop differ")
            elif not others:
                changes[row.owner].append(change)
    for call in sites.calls:
        calls[call.owner].append(call)
    result: dict[str, Rewritten] = {}
    cache: dict[tuple[Any, ...], Rewritten] = {}
    for owner, wanted in changes.items():
        module = model.get_submodule(owner)
        key = (type(module), tuple(wanted))
        try:
            if "forward" in vars(module):
                raise RewriteError(f"the forward of {owner or 'the model'} was replaced on the instance, so its class has no say")
            taken = [change.name for change in wanted if hasattr(module, change.name)]
            if taken:
                raise RewriteError(f"{owner or 'the model'} has an attribute {taken[0]!r} already")
            if key not in cache:
                cache[key] = rewrite_class(type(module), wanted, calls[owner])
            result[owner] = cache[key]
        except RewriteError as error:
            problems.append(f"{', '.join(f'{owner}.{c.name}'.lstrip('.') for c in wanted)}: {error}")
    if problems:
        shown = "\n  ".join(problems[:8]) + (f"\n  and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise RewriteError(f"{len(problems)} site(s) cannot be rewritten in the source; leave them out with exclude:\n  {shown}")
    return result


# Modules


def install(model: nn.Module, plan: Plan, classes: Mapping[str, type]) -> None:
    """Add the plan's LAuReL modules to a model, change the owners' classes and connect the streams."""
    first = next(iter(model.parameters()), None)
    for row in plan.sites:
        owner = model.get_submodule(row.owner)
        laurel = plan.build(row, _like(owner, first))
        laurel.train(owner.training)
        if row.turns:
            if not hasattr(owner, row.attribute):
                setattr(owner, row.attribute, nn.ModuleList(PlainResidual(row.side) for _ in range(row.turns)))
            getattr(owner, row.attribute)[int(row.id.rsplit(".", 1)[1])] = laurel
        else:
            setattr(owner, row.attribute, laurel)
    for name, cls in classes.items():
        model.get_submodule(name).__class__ = cls
    connect(model, plan)


def remove(model: nn.Module) -> nn.Module:
    """Undo `rewrite`: classes, keys and outputs are again what they were. Changes `model` and returns it.

    Raises:
        ConfigError: the model was not rewritten.
    """
    if not sites_of(model):
        raise ConfigError(f"This {type(model).__name__} has no LAuReL module to remove.")
    if isinstance(model, fx.GraphModule):
        raise ConfigError("LAuReL cannot be removed from a graph; keep the graph from before the pass.")
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            turns = isinstance(child, nn.ModuleList) and any(isinstance(m, Laurel) for m in child)
            if isinstance(child, Laurel) or turns:
                delattr(module, name)
        disconnect(module)
        base = vars(type(module)).get(BASE)
        if base is not None:
            module.__class__ = base
    if hasattr(model, RECORD):
        delattr(model, RECORD)
    return model


def _like(owner: nn.Module, first: torch.Tensor | None) -> torch.Tensor | None:
    """A parameter whose device and dtype a new one beside it should have."""
    floating = (p for p in owner.parameters() if p.is_floating_point())
    return next(floating, first)
