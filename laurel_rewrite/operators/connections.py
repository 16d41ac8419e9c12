"""The connections in a model: where they are, how they are trained, and what they learned."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from laurel_rewrite.errors import ConfigError
from laurel_rewrite.operators.protocol import Connection
from laurel_rewrite.private import OPTIMIZED, WRAPPERS, flattened_by_fsdp, fsdp_ran

MIXING = "mixing"
"""What the name of a group of mixing weights begins with."""
_ADVICE = "build it from laurel_rewrite.param_groups(model, lr=..., weight_decay=...)"
_log = logging.getLogger(__name__)


def sites_of(model: nn.Module) -> dict[str, Connection]:
    """The connections in `model` by module path; one that is shared appears once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Connection)}


def refuse_second_time(model: nn.Module) -> None:
    """Raise ConfigError where the model has connections of ours."""
    present = sites_of(model)
    if present:
        raise ConfigError(
            f"The model was rewritten already: it has {len(present)} connections, the first at {next(iter(present))!r}. "
            "Call laurel_rewrite.remove(model) first."
        )


# What they learned


@torch.no_grad()
def learned(model: nn.Module) -> dict[str, dict[str, float]]:
    """What a model's connections learned, to be logged: for LAuReL `a`, `b`, `g` by lag and the Frobenius norm of U V.

    Where the parameters are spread over processes (FSDP, tensor parallel), this is a collective: every rank calls it, and gets the same.

    Args:
        model: a rewritten model, as it is or wrapped (FSDP, DDP, torch.compile, activation checkpointing).

    Returns:
        By site, the path of its module without the names of wrappers, what `Connection.learned` gives.

    Raises:
        ConfigError: parameters on the meta device have no values yet.
    """
    values = asked(model, lambda connection: connection.learned())
    sites: dict[str, dict[str, float]] = {}
    numbers = torch.stack(list(_on_one_device(values.values()))).tolist() if values else []  # one wait for the device, not one a number
    for (path, key), number in zip(values, numbers, strict=True):
        sites.setdefault(path, {})[key] = number
    return sites


@torch.no_grad()
def asked(model: nn.Module, question: Callable[[Connection], Mapping[str, Tensor]]) -> dict[tuple[str, str], Tensor]:
    """What each connection of a model answers, by site and name, in float32; its parameters are whole while it is asked. Else as `learned`."""
    values: dict[tuple[str, str], Tensor] = {}
    units = _units(model)
    for unit in units.values():
        if not fsdp_ran(unit):  # no forward ran yet; outer units come first, and the one that is asked first would take itself for the root
            with unit.summon_full_params(unit, recurse=False, writeback=False):
                pass
    for path, module in by_path(model).items():
        with _whole(units, module):
            if any(parameter.is_meta for parameter in module.parameters()):
                raise ConfigError(
                    f"{path}: its parameters are on the meta device, and have learned nothing yet. Load or initialise them first."
                )
            values |= {
                (path, key): value.to(torch.float32, copy=True) for key, value in question(module).items()
            }  # views of what goes away
    return values


def by_path(model: nn.Module) -> dict[str, Connection]:
    """The connections of a model that may be wrapped, by path without the names of wrappers."""
    return {unwrapped(name): module for name, module in sites_of(bare(model)).items()}


def unwrapped(path: str) -> str:
    """A path, of a module or a parameter, as it was before engines wrapped modules."""
    return ".".join(part for part in path.split(".") if part not in WRAPPERS)


def bare(model: nn.Module) -> nn.Module:
    """What is inside wrappers that change nothing of a call of one process: replicas, and a compilation around these."""
    while isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel) or OPTIMIZED in model._modules:
        model = model.get_submodule(OPTIMIZED if OPTIMIZED in model._modules else "module")
    return model


def _on_one_device(values: Iterable[Tensor]) -> Iterator[Tensor]:
    first: torch.device | None = None
    for value in values:
        first = first or value.device
        yield value.to(first)


@contextlib.contextmanager
def _whole(units: Mapping[int, Any], connection: Connection) -> Iterator[None]:
    """The parameters of a connection as whole tensors, wherever their parts lie."""
    with contextlib.ExitStack() as stack:
        for unit in {units[id(module)]: None for module in connection.modules() if id(module) in units}:
            stack.enter_context(unit.summon_full_params(unit, recurse=False, writeback=False))
        spread = [
            (m, name, p) for m in connection.modules() for name, p in m._parameters.items() if p is not None and hasattr(p, "full_tensor")
        ]
        try:
            for module, name, parameter in spread:  # parts that were offloaded go where the processes can exchange them
                part: Any = parameter.detach()
                module._parameters[name] = nn.Parameter(part.to(part.device_mesh.device_type).full_tensor(), requires_grad=False)
            yield
        finally:
            for module, name, parameter in spread:
                module._parameters[name] = parameter


def _units(model: nn.Module) -> dict[int, Any]:
    """The units of FSDP1: of each module the innermost, by the module's id."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return {}
    from torch.distributed.fsdp import FullyShardedDataParallel

    return {id(module): unit for unit in FullyShardedDataParallel.fsdp_modules(model) for module in unit.modules()}


# How they are trained


def param_groups(model: nn.Module, *, lr: float, weight_decay: float, scalar_lr: float = 1.0) -> list[dict[str, Any]]:
    """Optimiser groups in which mixing weights, those of connections that are no maps over the features (a, b, g), have a group of their own.

    They are few, each weights the whole stream, and decay would undo what they learn. Public code for such weights
    (modded-nanogpt, nanochat) gives them no decay, or next to none, and a learning rate of their own, from 1/100 of that of the matrices to
    several times as much; the paper gives none. Hence a factor, which is 1 unless one chooses.

    Args:
        model: any module, sharded or not; every parameter that requires a gradient is in exactly one group.
        lr: learning rate of all groups, times the `rate` that an operator declares for its own.
        weight_decay: of the matrices; vectors (norms, biases) and mixing weights get 0, as usual in pre-training.
        scalar_lr: factor on the learning rate of mixing weights.

    Returns:
        Dictionaries for optimisers that take groups, each with a "name" for logs: "matrices", "vectors", "mixing", and where an operator
        declares a rate of 0.1 "matrices*0.1", "mixing*0.1". Groups that would be empty are left out. An optimiser for matrices alone, such as
        Muon, takes the groups whose names begin with that word, and another the rest.

    Raises:
        ConfigError: FSDP1 made one flat parameter of several, so that they cannot be told from each other.
    """
    shapes = _shapes(model)
    owners = {id(p): module for module in sites_of(model).values() for p in module.parameters()}
    groups: dict[str, dict[str, Any]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        owner, shape = owners.get(id(parameter)), shapes.get(id(parameter), parameter.shape)
        kind = MIXING if owner is not None and _mixes(owner, shape) else "matrices" if len(shape) > 1 else "vectors"
        rate = 1.0 if owner is None else owner.rate
        name = kind if rate == 1.0 else f"{kind}*{rate:g}"
        if name not in groups:
            factor = rate * (scalar_lr if kind == MIXING else 1.0)
            groups[name] = {"params": [], "lr": lr * factor, "weight_decay": weight_decay if kind == "matrices" else 0.0, "name": name}
        groups[name]["params"].append(parameter)
    order = ("matrices", "vectors", MIXING)
    return sorted(groups.values(), key=lambda group: order.index(group["name"].partition("*")[0]))


def _mixes(owner: Connection, shape: torch.Size) -> bool:
    """Whether a parameter weights whole states; a map over the features has two axes or more, one of them the features'."""
    return len(shape) < 2 or (owner.config.dim > 0 and owner.config.dim not in shape)


def _shapes(model: nn.Module) -> dict[int, torch.Size]:
    """Shapes of parameters that FSDP1 flattened, by id."""
    shapes: dict[int, torch.Size] = {}
    for unit in dict.fromkeys(_units(model).values()):
        flattened = flattened_by_fsdp(unit)
        if flattened is None:
            raise ConfigError(
                "FSDP1 made one flat parameter of many, which cannot get learning rates and decay of their own. Wrap with use_orig_params=True."
            )
        shapes |= {id(parameter): shape for parameter, shape in flattened}
    return shapes


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer]) -> list[str]:
    """Whether an optimiser trains the connections of a model as it should; what is wrong is logged as warnings, too.

    Args:
        model: a rewritten model as it is trained: wrapped and sharded where it is.
        optimizer: one, or all that train the model.

    Returns:
        A sentence for each thing that is wrong: mixing weights that decay, connections' parameters that no group has (because the optimiser
        was built before the model was rewritten or sharded, for instance), and parameters without values, on the meta device.

    Raises:
        ConfigError: FSDP1 made one flat parameter of several.
    """
    optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
    groups = [group for one in optimizers for group in one.param_groups]
    decay = {id(p): group.get("weight_decay") or 0.0 for group in groups for p in group["params"]}
    shapes = _shapes(model)
    decayed: list[tuple[str, float]] = []
    missing: list[str] = []
    for name, module in sites_of(model).items():
        for key, parameter in module.named_parameters(prefix=name):
            if not parameter.requires_grad:
                continue
            if id(parameter) not in decay:
                missing.append(key)
            elif decay[id(parameter)] and _mixes(module, shapes.get(id(parameter), parameter.shape)):
                decayed.append((key, decay[id(parameter)]))
    own = {id(p) for p in model.parameters()}
    foreign = sum(id(p) not in own for group in groups for p in group["params"])
    meta = sum(p.is_meta for group in groups for p in group["params"])
    found = []
    if decayed:
        found.append(
            f"{len(decayed)} mixing weights decay, {decayed[0][0]} by {decayed[0][1]:g} first, away from what they learned: {_ADVICE}."
        )
    if missing:
        stale = f"; it has {foreign} parameters that the model has not, from before it was rewritten, sharded or moved" if foreign else ""
        found.append(
            f"The optimiser trains {len(missing)} parameters of connections not at all, {missing[0]} first{stale}: {_ADVICE}, last of all."
        )
    if meta:
        found.append(f"{meta} parameters of the optimiser are on the meta device, without values: give them values, and then build it.")
    for sentence in found:
        _log.warning("%s", sentence)
    return found
