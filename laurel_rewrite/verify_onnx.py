"""Checks of ONNX files in onnxruntime: they equal the PyTorch module, or the file that they were made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from laurel_rewrite.capture import quiet, training, without_caches
from laurel_rewrite.errors import CaptureError, ConfigError
from laurel_rewrite.exporting import widened
from laurel_rewrite.verify import Check, check_gradients, tensors_of

if TYPE_CHECKING:
    import onnxruntime

RTOL, ATOL = 1e-4, 1e-5
"""ONNX against PyTorch in float32: |difference| <= ATOL * max(1, max |reference|) + RTOL * |reference|."""


def check_onnx(model: nn.Module, path: Path, args: Sequence[Any], kwargs: Mapping[str, Any], *, name: str, seed: int = 0) -> list[Check]:
    """The ONNX file in onnxruntime equals the model in eval mode, at two shapes other than the captured ones where it has dynamic ones."""
    session = session_of(path)
    checks = []
    for number, (feeds, call_args, call_kwargs, shapes) in enumerate(_variations(session, args, kwargs, seed)):
        with training(model, False), without_caches(model), torch.no_grad(), quiet():
            expected = tensors_of(model(*call_args, **call_kwargs))
        tolerance = f"rtol {RTOL:.0e}, atol {ATOL:.0e} x max(1, max|y|)"
        try:
            found = [torch.from_numpy(np.asarray(value)) for value in session.run(None, feeds)]
        except Exception as error:  # onnxruntime's exceptions share no base class
            checks.append(Check(f"{name}, shape {number + 1}", False, float("nan"), tolerance, f"{shapes}: {str(error)[:300]}"))
            continue
        worst, passed = 0.0, len(found) == len(expected)
        for mine, theirs in zip(expected, found, strict=False):
            if mine.shape != theirs.shape:
                passed = False
                continue
            difference, allowed = (mine.double() - theirs.double()).abs(), RTOL * mine.double().abs()
            scale = max(1.0, mine.double().abs().max().item() if mine.numel() else 1.0)
            passed = passed and bool((difference <= allowed + ATOL * scale).all())
            worst = max(worst, (difference.max().item() / scale) if mine.numel() else 0.0)
        checks.append(Check(f"{name}, shape {number + 1}", passed, worst, tolerance, shapes))
    return checks


def check_graph_start(original: Path, rewritten: Path, feeds: Mapping[str, np.ndarray], *, exact: bool) -> list[Check]:
    """At the start a rewritten ONNX file equals the one it was made from, in onnxruntime: bit for bit without optimisation where LAuReL
    adds in the order of the original (`exact`), within a tolerance with it, for fusions differ.

    Raises:
        CaptureError: onnxruntime cannot load the original.
        ConfigError: the original does not run with these inputs, or its outputs are not numbers.
    """
    checks = []
    try:
        session_of(original)
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise CaptureError(f"onnxruntime cannot load {original}: {str(error)[:400]}") from error
    for optimised in (False, True):
        try:
            expected = run_onnx(original, feeds, optimised=optimised)
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise ConfigError(f"{original} does not run with these inputs: {str(error)[:300]}. Give others with --inputs.") from error
        if any(np.isnan(array).any() for array in expected if array.dtype.kind == "f"):
            raise ConfigError(f"The outputs of {original} are not numbers with these inputs. Give others with --inputs.")
        name = f"start, onnxruntime {'optimised' if optimised else 'without optimisation'}"
        strict = exact and not optimised
        checks.append(_compared(name, rewritten, feeds, expected, _graph_tolerance(original, strict=strict), optimised=optimised))
    return checks


def check_graph_random(original: Path, rewritten: Path, feeds: Mapping[str, np.ndarray]) -> Check:
    """A rewritten file whose LAuReL parameters are random: onnxruntime's optimiser keeps its function, and that is not the original's."""
    before, expected = (run_onnx(path, feeds, optimised=False) for path in (original, rewritten))
    tolerance = _graph_tolerance(original, trained=False)
    check = _compared("random LAuReL, optimised against not", rewritten, feeds, expected, tolerance, optimised=True)
    if all(np.array_equal(a, b) for a, b in zip(before, expected, strict=True)):  # a model whose weights are all zeros, for instance
        return replace(check, detail=f"{check.detail}; says little, for no residual connection moves the outputs")
    return check


def check_graph_weights(rewritten: Path, feeds: Mapping[str, np.ndarray]) -> Check:
    """A rewritten file with trained LAuReL parameters: its outputs are numbers, and onnxruntime's optimiser keeps them."""
    name = "trained LAuReL, optimised against not"
    plain = run_onnx(rewritten, feeds, optimised=False)
    if any(np.isnan(array).any() for array in plain if array.dtype.kind == "f"):
        return Check(name, False, float("nan"), "", "with these weights the outputs are not numbers")
    return _compared(name, rewritten, feeds, plain, _graph_tolerance(rewritten), optimised=True)


def check_same(name: str, before: Path, after: Path, feeds: Mapping[str, np.ndarray]) -> Check:
    """A lowered file computes what the file that it was made from does."""
    return _compared(name, after, feeds, run_onnx(before, feeds, optimised=False), _graph_tolerance(before), optimised=True)


def check_torch(module: nn.Module, rewritten: Path, feeds: Mapping[str, np.ndarray], *, seed: int = 0) -> list[Check]:
    """A PyTorch module made from a rewritten file equals it in eval mode, and its LAuReL parameters have gradients."""
    args = [torch.from_numpy(array) for array in feeds.values()]
    with training(module, False), torch.no_grad(), quiet():
        found = [tensor.numpy() for tensor in tensors_of(module(*args))]
    expected = run_onnx(rewritten, feeds, optimised=False)
    check = _difference_of("PyTorch against ONNX", found, expected, _graph_tolerance(rewritten), _shapes(feeds))
    return [check, check_gradients(module, args, {}, seed=seed)]


def run_onnx(path: Path, feeds: Mapping[str, np.ndarray], *, optimised: bool) -> list[np.ndarray]:
    """The outputs of an ONNX file in onnxruntime; random operators draw the same numbers in every call."""
    import onnxruntime

    onnxruntime.set_seed(0)
    found: list[np.ndarray] = []
    stack = session_of(path, optimised=optimised).run(None, dict(feeds))[::-1]
    while stack:  # sequences and maps are flattened
        value = stack.pop()
        stack += [*reversed(value)] if isinstance(value, list) else [*reversed(value.values())] if isinstance(value, dict) else []
        if not isinstance(value, list | dict):
            found.append(np.asarray(value))
    return found


def _graph_tolerance(path: Path, *, strict: bool = False, trained: bool = True) -> tuple[float, float]:
    """rtol and atol for a file's outputs: zero where strict, else by its coarsest type.

    A fused integer op may round to the next step, and float16 has 11 bits; parameters that nobody trained (`trained=False`) spread both.
    """
    import onnx_ir as ir

    if strict:
        return 0.0, 0.0
    nodes = list(ir.load(path).graph)
    types = {value.dtype for node in nodes for value in node.inputs if value is not None}
    spread = 1 if trained else 5
    if any("Quantize" in node.op_type or node.op_type.startswith("QLinear") for node in nodes):
        return 0.0, spread * 5e-2
    return (spread * 1e-2, spread * 2e-3) if types & {ir.DataType.FLOAT16, ir.DataType.BFLOAT16} else (RTOL, ATOL)


def _compared(
    name: str,
    path: Path,
    feeds: Mapping[str, np.ndarray],
    expected: Sequence[np.ndarray],
    tolerance: tuple[float, float],
    *,
    optimised: bool,
) -> Check:
    try:
        found = run_onnx(path, feeds, optimised=optimised)
    except Exception as error:  # onnxruntime's exceptions share no base class
        return Check(name, False, float("nan"), "", f"{_shapes(feeds)}: {str(error)[:300]}")
    return _difference_of(name, found, expected, tolerance, _shapes(feeds))


def _shapes(feeds: Mapping[str, np.ndarray]) -> str:
    return ", ".join(f"{key}{list(value.shape)}" for key, value in feeds.items())


def _difference_of(
    name: str, found: Sequence[np.ndarray], expected: Sequence[np.ndarray], tolerance: tuple[float, float], detail: str
) -> Check:
    rtol, atol = tolerance
    allowed = f"rtol {rtol:.0e}, atol {atol:.0e} x max(1, max|y|)" if rtol or atol else "max |difference| = 0"
    worst, passed = 0.0, len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=False):
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype or mine.dtype.kind not in "fiub":
            passed = passed and np.array_equal(mine, theirs)
            continue
        a, b = mine.astype(np.float64), theirs.astype(np.float64)
        with np.errstate(invalid="ignore"):
            difference = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
        finite = np.where(np.isfinite(b), np.abs(b), 0.0)
        scale = max(1.0, float(finite.max(initial=0.0)))
        passed = passed and bool((difference <= rtol * finite + atol * scale).all())
        worst = max(worst, float(difference.max(initial=0.0)) / scale)
    return Check(name, passed, worst, allowed, detail)


def session_of(path: Path, *, optimised: bool = True) -> onnxruntime.InferenceSession:
    """An onnxruntime session on the CPU that says nothing below errors."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


# Inputs


def _variations(
    session: onnxruntime.InferenceSession, args: Sequence[Any], kwargs: Mapping[str, Any], seed: int
) -> Iterator[tuple[dict[str, np.ndarray], tuple[Any, ...], dict[str, Any], str]]:
    """Feeds for onnxruntime with the same inputs for PyTorch, at two shapes."""
    args, kwargs = widened(tuple(args), dict(kwargs))
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    inputs = session.get_inputs()
    named = {key: i for i, leaf in enumerate(leaves) for key, value in kwargs.items() if value is leaf}
    where = {info.name: named.get(info.name, tensors[n] if n < len(tensors) else -1) for n, info in enumerate(inputs)}
    for number, batch in enumerate((3, 5)):
        generator = torch.Generator().manual_seed(seed + number)
        sizes: dict[str, int] = {}
        for info in inputs:
            for position, dim in enumerate(info.shape):
                if isinstance(dim, str) and dim not in sizes:
                    traced = leaves[where[info.name]].shape[position]
                    sizes[dim] = batch if position == 0 else max(2, traced * 3 // 4 if number == 0 else traced // 2 + 1)
        changed = list(leaves)
        for info in inputs:
            like = leaves[where[info.name]]
            shape = [sizes[dim] if isinstance(dim, str) else dim for dim in info.shape]
            changed[where[info.name]] = draw(like, shape, generator)
        new_args, new_kwargs = pytree.tree_unflatten(changed, spec)
        feeds = {info.name: changed[where[info.name]].cpu().numpy() for info in inputs}
        shapes = ", ".join(f"{info.name}{list(feeds[info.name].shape)}" for info in inputs)
        shapes += "" if sizes else " (no dynamic dimension)"
        yield feeds, tuple(new_args), new_kwargs, shapes


def draw(like: Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Random values of a tensor's type and range, in another shape."""
    if like.is_floating_point():
        spread = float(like.float().std()) if like.numel() > 1 else 1.0
        return (torch.randn(list(shape), generator=generator) * (spread or 1.0) + float(like.float().mean())).to(like.dtype)
    low, high = int(like.min()), int(like.max())
    return torch.randint(low, high + 1, list(shape), generator=generator).to(like.dtype)
