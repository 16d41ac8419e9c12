"""Checks of ONNX exports: the file in onnxruntime computes what the PyTorch module does, its values at the sites included."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from laurel_rewrite.graph.capture import quiet, training, without_caches
from laurel_rewrite.operators.affine import Weight
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.private import pytree
from laurel_rewrite.sources.inputs import copied_inputs
from laurel_rewrite.sources.past import Past
from laurel_rewrite.verification.checks import Check, tensors_of
from laurel_rewrite.verification.onnx import proved
from laurel_rewrite.verification.onnx_runs import FLOAT32, NotRun, Ran, Values, apart, run_graph, shaken

_HALVES = (torch.float16, torch.bfloat16)
_BATCHES = (3, 5)
_PAST = 1e-3  # of the largest logit, that a token behind a past and in a prompt may differ by in float32: products of other shapes


class Exported(Protocol):
    """A file, the site of each inner value by the value's name, and the values' scales: `laurel_rewrite.exporting.Export`."""

    path: Path
    values: dict[str, str]
    scales: dict[str, Weight]


@dataclass(frozen=True)
class Interface:
    """What a file takes and gives: the sizes of its inputs by name, the names of its outputs; and how its model is called with a past."""

    inputs: Mapping[str, Sequence[int | str]]
    outputs: Sequence[str]
    past: Past | None = None


@dataclass(frozen=True)
class Inputs:
    """One set of inputs, for PyTorch and for onnxruntime."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    feeds: dict[str, np.ndarray]


def check_export(
    model: nn.Module, file: Exported, args: Sequence[Any], kwargs: Mapping[str, Any], *, name: str, seed: int = 0, past: Past | None = None
) -> tuple[list[Check], Ran | None]:
    """An exported file computes what the module does in eval mode, on two sets of inputs of other sizes where it has dynamic ones.

    With a past these are a prompt, one token and several, and the module itself must say the same of a token behind a past and in a whole.

    Args:
        model: is left as it was.
        file: as `laurel_rewrite.exporting.Exporter` writes it.
        args, kwargs: that it was exported with.
        past: how the module is called with one, where the file has it.

    Returns:
        The checks, and what the file computed.
    """
    interface = _interface(file.path, past)
    try:
        draws, expected = _drawn_and_run(model, interface, args, kwargs, file.values, seed)
        shaken = lambda: _computed(_shaken(model), draws, interface, file.values)  # noqa: E731
        checks, ran = proved(name, expected, file.path, values=file.values, scales=file.scales, shaken=shaken)
        if past is not None and ran is not None:
            checks.append(_check_past(f"{name}, a past against the whole", model, file.path, past, expected, seed))
        if any(check.passed is not True for check in checks):
            again = _run(model, draws[0], interface, file.values)
            if any(apart(again[key], array) for key, array in expected.optimised[0].items()):
                raise NotRun("the model differs from itself from run to run in eval mode")
    except NotRun as why:
        return [Check.not_run(name, str(why))], None
    return checks, ran


def _check_past(name: str, model: nn.Module, path: Path, past: Past, ran: Ran, seed: int) -> Check:
    """What is computed of a token does not depend on which others are computed with it, else no past can stand for them; nor on padding.

    In a padded prompt only the last token's logits are compared: those of padding are nobody's.
    """
    whole, behind = past.whole(model, seed)
    with past.calling(model), training(model, False), torch.no_grad(), quiet():
        right, mine = (array_of(model(**inputs)[0][:, -1]) for inputs in (whole, behind))
    feeds = {key: array_of(tensor) for key, tensor in past.tensors(whole).items()}
    found = run_graph(path, [feeds], {}).optimised[0]["logits"][:, -1]
    difference = max(apart(right, mine), apart(right, found)) / max(float(np.abs(right).max()), float(np.finfo(np.float32).tiny))
    allowed = 3 * ran.rtol if ran.half else _PAST
    detail = "the logits of a token behind 7 others, of which 2 are padding in every second row"
    return Check(name, difference <= allowed, difference, f"{allowed:g} of the largest", detail)


def _interface(path: Path, past: Past | None) -> Interface:
    graph = onnx.load(path, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    sizes = {info.name: [d.dim_param or d.dim_value for d in info.type.tensor_type.shape.dim] for info in graph.input}
    return Interface({name: shape for name, shape in sizes.items() if name not in weights}, [info.name for info in graph.output], past)


def _drawn_and_run(
    model: nn.Module, interface: Interface, args: Sequence[Any], kwargs: Mapping[str, Any], values: Mapping[str, str], seed: int
) -> tuple[list[Inputs], Ran]:
    """Sets of inputs that a module takes, of other sizes than the given ones or else of theirs, and what it computes with them.

    Raises:
        NotRun: it takes none of them.
    """
    if interface.past is not None:
        named = [(inputs, interface.past.tensors(inputs)) for inputs in interface.past.draws(model, seed)]
        draws = [Inputs((), inputs, {key: array_of(tensor) for key, tensor in tensors.items()}) for inputs, tensors in named]
        return draws, _computed(model, draws, interface, values)
    reason = ""
    for other in (True, False):
        draws = [_drawn(interface, args, kwargs, seed + number, number if other else None) for number in range(len(_BATCHES))]
        try:
            return draws, _computed(model, draws, interface, values)
        except NotRun:
            raise
        except Exception as error:  # whatever a foreign model raises
            reason = reason or f"{type(error).__name__}: {str(error)[:200]}"
    raise NotRun(f"the model does not run with drawn inputs: {reason}")


def _computed(model: nn.Module, draws: Sequence[Inputs], interface: Interface, values: Mapping[str, str]) -> Ran:
    """What a module computes. One in half precision is held against its copy in float32 too, which says how far it rounds."""
    plain = optimised = [_run(model, one, interface, values) for one in draws]
    types = {tensor.dtype for tensor in (*model.parameters(), *model.buffers())}
    half = bool(types & set(_HALVES))
    if half:
        with contextlib.suppress(Exception):  # a foreign model that cannot be copied, or fixes its types, is taken as it is
            wide = copy.deepcopy(model).float()
            plain = [_run(wide, _widened(one), interface, values) for one in draws]
    outputs = [{key: run[key] for key in interface.outputs} for run in optimised]
    noise = {key: max(apart(a[key], b[key]) for a, b in zip(plain, outputs, strict=True)) for key in interface.outputs}
    rtol, atol = (8e-2, 16e-3) if torch.bfloat16 in types else (1e-2, 2e-3) if half else FLOAT32
    return Ran([one.feeds for one in draws], plain, outputs, rtol, atol, half, noise=noise)


def _shaken(model: nn.Module) -> nn.Module:
    """A copy with every weight moved in its last place."""
    other = copy.deepcopy(model)
    generator = np.random.default_rng(0)
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            if tensor.is_floating_point():
                moved = shaken(array_of(tensor).astype(np.float64), torch.finfo(tensor.dtype).eps, generator)
                tensor.copy_(torch.from_numpy(moved))
    return other


def _run(model: nn.Module, inputs: Inputs, interface: Interface, values: Mapping[str, str]) -> Values:
    """The outputs by the file's names, and the results of LAuReL modules by the names of the values that they are in the file."""
    seen: dict[str, Tensor] = {}
    calls: Counter[str] = Counter()

    def hook(site: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def keep(module: nn.Module, given: Any, result: Tensor) -> None:
            seen[numbered(site, calls)] = result.detach().clone()  # which an operation in place may change

        return keep

    handles = [module.register_forward_hook(hook(site)) for site, module in sites_of(model).items()]
    try:
        called = without_caches(model) if interface.past is None else interface.past.calling(model)
        with training(model, False), called, torch.no_grad(), quiet():
            args, kwargs = copied_inputs(inputs.args, inputs.kwargs)
            outputs = tensors_of(model(*args, **kwargs))
    finally:
        for handle in handles:
            handle.remove()
    if len(outputs) != len(interface.outputs):
        raise NotRun(f"the model returns {len(outputs)} tensors, and the file {len(interface.outputs)}")
    found = {key: array_of(seen[site]) for key, site in values.items() if site in seen}
    return found | dict(zip(interface.outputs, map(array_of, outputs), strict=True))


def numbered(site: str, calls: Counter[str]) -> str:
    """The site of the next call of its module; counts it."""
    calls[site] += 1
    return site if calls[site] == 1 else f"{site}@{calls[site] - 1}"


def array_of(tensor: Tensor, *, float32: bool = True) -> np.ndarray:
    """The numbers of a tensor; half precision in float32, for numpy has no bfloat16."""
    array: np.ndarray = (tensor.float() if float32 and tensor.dtype in _HALVES else tensor).detach().cpu().numpy()
    return array


# Inputs


def widened(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The inputs with a batch of 2 where every tensor has a batch of 1."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim]
    if not tensors or any(t.shape[0] != 1 for t in tensors):
        return args, kwargs
    double = lambda leaf: torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.ndim else leaf  # noqa: E731  # a leaf function
    widened_args, widened_kwargs = pytree.tree_map(double, (args, kwargs))
    return widened_args, widened_kwargs


def _drawn(interface: Interface, args: Sequence[Any], kwargs: Mapping[str, Any], seed: int, number: int | None) -> Inputs:
    """Inputs like the given ones, with new numbers; of the number-th other sizes, or of theirs."""
    # A tensor that is given twice is two inputs.
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, widened(tuple(args), dict(kwargs)))
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    named = {key: i for i, leaf in enumerate(leaves) for key, value in kwargs.items() if value is leaf}
    where = {name: named.get(name, tensors[n] if n < len(tensors) else -1) for n, name in enumerate(interface.inputs)}
    generator = torch.Generator().manual_seed(seed)
    sizes: dict[str, int] = {}
    for name, shape in interface.inputs.items():
        for position, dim in enumerate(shape):
            if isinstance(dim, str) and dim not in sizes:
                traced = leaves[where[name]].shape[position]
                other = traced if number is None else max(2, traced * 3 // 4 if number == 0 else traced // 2 + 1)
                sizes[dim] = other if position or number is None else _BATCHES[number]
    for name, shape in interface.inputs.items():
        like = leaves[where[name]]
        leaves[where[name]] = draw(like, [sizes[dim] if isinstance(dim, str) else dim for dim in shape], generator)
    new_args, new_kwargs = pytree.tree_unflatten(leaves, spec)
    return Inputs(tuple(new_args), new_kwargs, {name: array_of(leaves[where[name]]) for name in interface.inputs})


def _widened(inputs: Inputs) -> Inputs:
    """The inputs in float32 where they are in half precision."""
    widen = lambda leaf: leaf.float() if isinstance(leaf, Tensor) and leaf.dtype in _HALVES else leaf  # noqa: E731  # a leaf function
    args, kwargs = pytree.tree_map(widen, (inputs.args, inputs.kwargs))
    return replace(inputs, args=args, kwargs=kwargs)


def draw(like: Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Random values of a tensor's type and range, in another shape."""
    if like.is_floating_point():
        wide = like.float()
        spread, low, high = (float(wide.std()), *map(float, wide.aminmax())) if like.numel() > 1 else (1.0, -torch.inf, torch.inf)
        numbers = torch.randn(list(shape), generator=generator) * (spread or 1.0) + float(wide.mean())
        return (numbers.clamp(low, high) if spread else numbers).to(like.dtype)
    low, high = int(like.min()), int(like.max())
    return torch.randint(low, high + 1, list(shape), generator=generator).to(like.dtype)
