"""The weights of a rewritten model in a file: all, or those of its connections alone; from one process or from the shards of several."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laurel_rewrite.backends.module.surgery import unwrapped
from laurel_rewrite.errors import ConfigError, LaurelError, nearest
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.private import saved_buffers

_log = logging.getLogger(__name__)


def is_sharded(model: nn.Module, given: Mapping[str, Any] | None = None) -> bool:
    """Whether several processes hold parts of the parameters, or of those that are given in their place."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    if any(isinstance(value, DTensor) for value in (model.parameters() if given is None else given.values())):
        return True
    return given is None and any(isinstance(module, FullyShardedDataParallel) for module in model.modules())


def whole_weights(model: nn.Module, given: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """All weights by name, none of them a shard; of a sharded model on the first process alone, and all processes must call this.

    Args:
        model: as `laurel_rewrite.save` takes it.
        given: a state dict of the model instead, whole or of DTensors.

    Raises:
        ConfigError: the state dict is not the model's, or the model has no values.
    """
    if given is None and is_sharded(model):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        # Flat parameters of FSDP1 that are on the CPU already end the process when they are to be offloaded there.
        elsewhere = any(p.device.type != "cpu" for p in model.parameters())
        gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=elsewhere))
        return {name: value for name, value in gathered.items() if isinstance(value, Tensor)}
    inner = unwrapped(model)
    found: dict[str, Any] = dict(inner.state_dict() if given is None else given)
    for name, value in found.items():
        if hasattr(value, "full_tensor"):
            found[name] = value.full_tensor()
        elif not isinstance(value, Tensor) or hasattr(value, "local_shards"):
            kind = type(value).__name__
            raise ConfigError(
                f"The state dict's {name} is a {kind}: give whole tensors (StateDictType.FULL_STATE_DICT of FSDP1) or DTensors."
            )
        if found[name].is_meta:
            raise ConfigError(
                f'{name} is on the meta device and has no values to save. Give them (state_dict=...), or save the model without: weights="none".'
            )
    if given is not None:
        _check_names(inner, found)
    return found


def _check_names(model: nn.Module, given: Mapping[str, Tensor]) -> None:
    own = dict(model.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        own |= {f"{prefix}{name}": buffer for name in saved_buffers(module) if (buffer := module._buffers[name]) is not None}
    there = {id(own[name]) for name in given if name in own}
    missing = [name for name, tensor in own.items() if id(tensor) not in there]
    unknown = [name for name in given if name not in own]
    wrong = [name for name in given if name in own and own[name].shape != given[name].shape]
    if missing or unknown or wrong:
        what = f"has no {missing[0]}" if missing else f"names {unknown[0]}" if unknown else f"has {wrong[0]} in another shape"
        hint = nearest(missing[0], unknown) if missing and unknown else ""
        raise ConfigError(f"The state dict is not this model's: it {what}. {hint}".rstrip())


def of_connections(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the connections alone."""
    prefixes = tuple(f"{site}." for site in sites_of(unwrapped(model)))
    return {name: value for name, value in weights.items() if name.startswith(prefixes)}


def write_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write a file of safetensors. What shares memory is written under its first name alone, and the others beside it as the format's
    `save_model` does."""
    from safetensors.torch import save_file

    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    places: dict[tuple[Any, ...], str] = {}
    for name, value in weights.items():
        place = (value.device, value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride())
        if value.numel() and place in places:
            aliases[name] = places[place]
        else:
            places[place] = name
            kept[name] = value.detach().clone() if _is_part(value) else value.detach()
    try:
        save_file({name: value.contiguous() for name, value in kept.items()}, str(path), {"format": "pt", **aliases})
    except Exception as error:  # safetensors' own, for a full disk too
        raise ConfigError(f"The weights could not be written: {type(error).__name__}: {str(error)[:300]}") from error


def _is_part(value: Tensor) -> bool:
    return value.untyped_storage().nbytes() != value.numel() * value.element_size()


@contextlib.contextmanager
def by_one_process(*, shared: bool) -> Iterator[bool]:
    """Whether this process is the one that writes; what it raises, all raise.

    Args:
        shared: the processes hold the model together, and all are here. Else each writes what it was asked to.
    """
    if not shared:
        yield True
        return
    first = torch.distributed.get_rank() == 0
    problem: list[str | None] = [None]
    try:
        yield first
    except LaurelError as error:
        problem = [str(error)]
        raise
    except BaseException as error:
        problem = [f"{type(error).__name__}: {error}"]
        raise
    finally:
        if first:
            torch.distributed.broadcast_object_list(problem, 0)
    if not first:
        torch.distributed.broadcast_object_list(problem, 0)
        if problem[0] is not None:
            raise ConfigError(f"The first process could not write: {problem[0]}")


def load_weights(model: nn.Module, path: Path) -> None:
    """Read all weights of a model from a file."""
    from safetensors import safe_open
    from safetensors.torch import load_model

    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    seen: dict[int, str] = {}
    try:
        with safe_open(str(path), "pt") as file:
            for key in file.keys():  # noqa: SIM118  # not a dict
                tensor = own.get(key)
                given = file.get_slice(key)
                if tensor is not None and seen.setdefault(id(tensor), key) != key:
                    raise ConfigError(
                        f"{path} has weights of their own for {seen[id(tensor)]} and {key}, which are one in the model: they were taken apart "
                        "before it was saved, as where a copy of one module was put in. Tie them again and save."
                    )
                wanted = _DTYPES.get(given.get_dtype())
                if tensor is None or list(given.get_shape()) != list(tensor.shape):
                    continue  # load_model says all of them
                if wanted is None and tensor.dtype.is_floating_point:
                    raise ConfigError(f"{path}: {key} is of type {given.get_dtype()}, and the model's of {tensor.dtype}.")
                if wanted is not None and (tensor.dtype != wanted or not tensor.is_contiguous()):
                    tensor.data = torch.empty(tensor.shape, dtype=wanted, device=tensor.device)
        load_model(model, str(path))
    except RuntimeError as error:
        raise ConfigError(f"{path} does not fit the model: {str(error)[:600]}") from error
    except ConfigError:
        raise
    except Exception as error:  # safetensors', whose exception has no public base class, and the file system's
        raise ConfigError(f"{path} could not be read as safetensors: {type(error).__name__}: {str(error)[:300]}") from error


def load_connections(model: nn.Module, path: Path) -> None:
    """Read the weights of the connections, and no others, from a file that may have more."""
    from safetensors import safe_open

    own = of_connections(model, model.state_dict())
    try:
        with safe_open(str(path), "pt") as file:
            names = set(file.keys())
            missing = [name for name in own if name not in names]
            if missing:
                raise ConfigError(f"{path} does not fit the model: it has no {missing[0]}. {nearest(missing[0], names)}")
            with torch.no_grad():
                for name, tensor in own.items():
                    value = file.get_tensor(name)
                    if value.shape != tensor.shape:
                        raise ConfigError(f"{path}: {name} has shape {list(value.shape)}, and the model's {list(tensor.shape)}.")
                    tensor.copy_(value)
    except ConfigError:
        raise
    except Exception as error:  # safetensors', whose exception has no public base class, and the file system's
        raise ConfigError(f"{path} could not be read as safetensors: {type(error).__name__}: {str(error)[:300]}") from error


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
