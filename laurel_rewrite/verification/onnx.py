"""Checks of ONNX graphs in onnxruntime: a changed one computes what the one did that it was made from.

Three things are compared, each on every set of inputs: the values at the sites and the outputs without optimisation, and the outputs as
onnxruntime runs them. Optimised is held against optimised, for fusions round differently. What is allowed is relative to the largest
magnitude of each tensor, be it 1e-9, and more by what the unchanged model shows against itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import fx, nn

from laurel_rewrite.errors import CaptureError, ConfigError
from laurel_rewrite.graph.capture import quiet, training
from laurel_rewrite.graph.feeds import GUESSES, draw_feeds, has_open_sizes
from laurel_rewrite.graph.from_onnx import METADATA
from laurel_rewrite.operators.affine import Weight
from laurel_rewrite.operators.onnx_function import DOMAIN
from laurel_rewrite.sources.inputs import copied_inputs
from laurel_rewrite.verification.checks import Check, check_gradients, tensors_of
from laurel_rewrite.verification.onnx_runs import (
    FLOAT32,
    Feeds,
    NotRun,
    Ran,
    Values,
    apart,
    differences,
    no_kernel,
    run_graph,
    run_onnx,
    run_shaken,
    session_of,
)

__all__ = [
    "attempt",
    "check_lowering",
    "check_moves",
    "check_optimiser",
    "check_rewrite",
    "check_torch",
    "proved",
    "reference",
    "run_onnx",
    "session_of",
]

SPREAD = 20
"""How many times further apart than a model and its copy with other last places two graphs may be: roundings fall at other places."""
LITTLE = 0.1
"""Where differences of this part of a value's largest magnitude have to be allowed, a comparison says little."""
ENOUGH = 100
"""LAuReL's parameters must move the values at the sites by so many tolerances, or a comparison of them says little."""
_SHOWN = 5  # inputs that a detail names


def proved(
    name: str,
    before: Ran,
    after: Path | ir.Model,
    *,
    values: Mapping[str, str],
    scales: Mapping[str, Weight] | None = None,
    exact: bool = False,
    shaken: Callable[[], Ran] | None = None,
) -> tuple[list[Check], Ran | None]:
    """A graph computes what another one, or a PyTorch module, did: the one function that every door asks.

    Args:
        name: of the checks.
        before: what the other one computed, from `reference` or `verify_export`.
        after: the graph.
        values: the site of each inner value to compare, by the value's name, in order.
        scales: c of each value that is 1/c of what it was, as the lowering says it.
        exact: without optimisation bit for bit.
        shaken: what the other one computes with every weight moved in its last place. Called where something differs: what rounding
            alone does in a deep model, this one may do.

    Returns:
        Two checks, without optimisation and with it, and what the graph computed; a failed one and None where it does not run.
    """
    found = attempt(name, after, before, values)
    if isinstance(found, Check):
        return [found], None
    rescaled = scales or {}
    plain = [
        {key: array.astype(np.float64) * rescaled[key] if key in rescaled else array for key, array in run.items()} for run in found.plain
    ]
    tolerance = (max(before.rtol, found.rtol), max(before.atol, found.atol))

    inner = (0.0, 0.0) if exact else tolerance

    def compare(rounding: Mapping[str, float]) -> list[Check]:
        return [
            _compared(f"{name}, not optimised", before.plain, plain, before, inner, {}, values, rounding),
            _compared(f"{name}, optimised", before.optimised, found.optimised, before, tolerance, before.noise, {}, rounding),
        ]

    return _judged(compare, before, None if exact else shaken, values), replace(found, plain=plain)


def attempt(name: str, source: Path | ir.Model, before: Ran, values: Mapping[str, str]) -> Ran | Check:
    """What a graph computes on the inputs of another one, or the check that says why it does not run."""
    try:
        return run_graph(source, before.draws, values)
    except NotRun as why:
        return Check.not_run(name, str(why))
    except Exception as error:  # onnxruntime's exceptions share no base class
        if no_kernel(error):
            return Check.not_run(name, f"onnxruntime has no kernel for it: {_said(error)}")
        return Check(name, False, float("nan"), "", f"onnxruntime does not run it: {_said(error)}")


def reference(source: Path | ir.Model, *, values: Mapping[str, str], inputs: Feeds | None = None, seed: int = 0) -> Ran:
    """What a graph computes on inputs that are drawn until it runs with them: two sets, of different sizes where it leaves sizes open.

    Args:
        inputs: the one set to take instead.

    Raises:
        NotRun: there is no kernel, not enough memory, or it runs with none of the drawn inputs.
        CaptureError: onnxruntime cannot load it.
        ConfigError: it does not run with the given inputs, or its outputs are not numbers then.
    """
    if inputs is not None:
        try:
            return _numbers(run_graph(source, [inputs], values))
        except NotRun:
            raise
        except Exception as error:  # onnxruntime's exceptions share no base class
            _refuse_unloadable(source, error)
            raise ConfigError(f"{_called(source)} does not run with these inputs: {_said(error)}. Give others with --inputs.") from error
    model = ir.load(source) if isinstance(source, Path) else source
    reason = ""
    for number, guess in enumerate(GUESSES if has_open_sizes(model) else GUESSES[:2]):  # without open sizes, only other numbers
        first = draw_feeds(model, seed=seed + 2 * number, **asdict(guess))
        smaller = replace(guess, batch=guess.batch + (guess.batch > 1), length=max(1, guess.length * 3 // 4))
        for other in (smaller, guess):
            second = draw_feeds(model, seed=seed + 2 * number + 1, **asdict(other))
            try:
                return _numbers(run_graph(source, [first, second], values))
            except NotRun:
                raise
            except Exception as error:  # onnxruntime's exceptions share no base class
                _refuse_unloadable(source, error)
                reason = reason or _said(error)
    raise NotRun(f"{_called(source)} runs with none of the drawn inputs ({reason}); give some with --inputs")


def check_lowering(before: ir.Model, after: ir.Model, scales: Mapping[str, Weight]) -> list[Check]:
    """A lowered model computes what it did before, on drawn inputs."""
    sites = {node.outputs[0].name: node.metadata_props.get(f"{METADATA}site", "") for node in before.graph if node.domain == DOMAIN}
    values = {name: site for name, site in sites.items() if name}
    try:
        ran = reference(before, values=values)
        shaken = partial(run_shaken, before, ran.draws, values)
        return proved("lowered against not", ran, after, values=values, scales=scales, shaken=shaken)[0]
    except NotRun as why:
        return [Check.not_run("lowered against not", str(why))]


def check_rewrite(before: Path | ir.Model, after: ir.Model, values: Mapping[str, str], *, exact: bool) -> list[Check]:
    """A rewritten model at its start computes what the given one does, on drawn inputs."""
    try:
        ran = reference(before, values=values)
        return proved("start", ran, after, values=values, exact=exact, shaken=partial(run_shaken, before, ran.draws, values))[0]
    except NotRun as why:
        return [Check.not_run("start", str(why))]


def check_moves(before: Ran, random: Ran, values: Mapping[str, str], connections: Mapping[str, nn.Module]) -> list[Check]:
    """Other LAuReL parameters move the values at the sites, or where none can be seen the outputs, so far that a fault in them would show.

    A connection without parameters may stay; no check where all are.
    """
    name = "random LAuReL against its start"
    learned = {site for site, connection in connections.items() if any(True for _ in connection.parameters())}
    if not learned:
        return []
    values = {key: site for key, site in values.items() if site.partition("@")[0] in learned}
    seen = [key for key in values if all(key in run for run in (*before.plain, *random.plain))]
    moved = {key: _moved(before, random, key) for key in seen or before.plain[0]}
    least = min(moved, key=lambda key: moved[key]) if seen else max(moved, key=lambda key: moved[key], default="")
    tolerances = moved.get(least, 0.0)
    difference = max((apart(a[least], b[least]) / _scale(a[least]) for a, b in zip(before.plain, random.plain, strict=True)), default=0.0)
    place = (
        f"{values.get(least, least)} moves by {tolerances:.3g} tolerances, the least of {len(seen)} sites" if seen else "no site is seen"
    )
    if tolerances < ENOUGH:
        place = f"{place}; what is compared below says little"
    return [Check(name, True if tolerances >= ENOUGH else None, difference, f"at least {ENOUGH} tolerances", place)]


def check_optimiser(name: str, ran: Ran, before: Ran, shaken: Callable[[], Ran]) -> Check:
    """onnxruntime's optimiser keeps what a graph computes, but for what it does to the graph that it was made from; `shaken` as in `proved`."""
    if any(np.isnan(array).any() for run in ran.plain for array in run.values() if array.dtype.kind == "f"):
        return Check(name, False, float("nan"), "", "the outputs are not numbers")
    outputs = [{key: run[key] for key in ran.optimised[0]} for run in ran.plain]
    compare = lambda rounding: [_compared(name, outputs, ran.optimised, ran, (ran.rtol, ran.atol), before.noise, {}, rounding)]  # noqa: E731
    return _judged(compare, ran, shaken, {})[0]


def check_torch(module: fx.GraphModule, ran: Ran, shaken: Callable[[], Ran], *, seed: int = 0) -> list[Check]:
    """A PyTorch module made from a rewritten graph equals it in eval mode, and its LAuReL parameters have gradients; `shaken` as in `proved`."""
    args = [torch.from_numpy(array) for array in ran.draws[0].values()]
    with training(module, False), torch.no_grad(), quiet():
        found = [tensor.numpy() for tensor in tensors_of(module(*copied_inputs(args, {})[0]))]
    names = list(ran.optimised[0])
    expected = [{name: ran.plain[0][name] for name in names}]
    ours = [dict(zip(names, found, strict=False))]
    one = replace(ran, draws=ran.draws[:1])
    compare = lambda rounding: [_compared("PyTorch against ONNX", expected, ours, one, (ran.rtol, ran.atol), ran.noise, {}, rounding)]  # noqa: E731
    return [*_judged(compare, ran, shaken, {}), check_gradients(module, args, {}, seed=seed)]


# Comparing


def _judged(
    compare: Callable[[Mapping[str, float]], list[Check]], before: Ran, shaken: Callable[[], Ran] | None, values: Mapping[str, str]
) -> list[Check]:
    """Checks; where one fails, they are made again with what rounding alone does to each value, in units of its largest magnitude.

    That takes another run to find out. What it does to a value is at least what it does to the sites before: in a deep model they are
    samples of the same growing differences.
    """
    checks = compare({})
    if shaken is None or not any(check.failed for check in checks):
        return checks
    try:
        other = shaken()
    except Exception:  # of onnxruntime or a foreign model: then there is no more to say
        return checks
    runs = list(zip((*before.plain, *before.optimised), (*other.plain, *other.optimised), strict=True))
    rounding: dict[str, float] = {}
    so_far = 0.0
    for key in _order(before.plain[0], values):
        pairs = [(one[key], two[key]) for one, two in runs if key in one and key in two and one[key].dtype.kind == "f"]
        so_far = max([so_far, *(apart(one, two) / _scale(one) for one, two in pairs)])
        if pairs:
            rounding[key] = so_far
    return compare(rounding)


def _compared(
    name: str,
    expected: Sequence[Values],
    found: Sequence[Values],
    before: Ran,
    tolerance: tuple[float, float],
    noise: Mapping[str, float],
    values: Mapping[str, str],
    rounding: Mapping[str, float],
) -> Check:
    """Every tensor of every run; the first site that differs is named, or the first output. Both sides may have the noise, and round."""
    worst, first, excess, rounded = 0.0, "", 0.0, 0.0
    for feeds, theirs, mine in zip(before.draws, expected, found, strict=True):
        for key in _order(theirs, values):
            if key not in mine and key in values:
                continue  # fused away
            a, b = theirs[key], mine.get(key, np.asarray("nothing"))
            difference = apart(a, b)
            if difference / _scale(a) > worst:
                worst = difference / _scale(a)
            allowed = 2 * noise.get(key, 0.0)
            far = not first and _distance(a, b, *tolerance, allowed) > 1
            spread = SPREAD * rounding.get(key, 0.0)
            if far and _distance(a, b, *tolerance, allowed + spread * _scale(a)) <= 1:
                rounded = max(rounded, spread)
            elif far:
                first = f"{_shapes(feeds)}: {values[key]} is the first that differs" if key in values else f"{_shapes(feeds)}: output {key}"
            excess = max(excess, allowed / _scale(a))
    seen = sum(all(key in run for run in (*expected, *found)) for key in values)
    what = f"{seen} of {len(values)} sites and the outputs" if values else "the outputs"
    detail = first or "; ".join([what, *map(_shapes, before.draws)])
    says_little = not first and rounded > LITTLE
    if says_little:
        detail = f"rounding alone moves the values by {rounded / SPREAD:.2g} of their largest magnitude; {detail}"
    return Check(name, None if says_little else not first, worst, _allowed(*tolerance, excess, rounded), detail)


def _order(values: Values, sites: Mapping[str, str]) -> Iterator[str]:
    """The sites first, in order."""
    yield from (key for key in sites if key in values)
    yield from (key for key in values if key not in sites)


def _distance(expected: np.ndarray, found: np.ndarray, rtol: float, atol: float, noise: float = 0.0) -> float:
    """Largest difference in units of what is allowed: rtol |y| + atol max |y|, and the noise."""
    difference = differences(expected, found)
    if not difference.any():
        return 0.0
    if not np.isfinite(difference).all():
        return float("inf")
    finite = _finite(expected)
    allowed = rtol * finite + (atol * float(finite.max(initial=0.0)) + noise)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.max(np.where(difference > 0, difference / allowed, 0.0)))


def _moved(before: Ran, random: Ran, key: str) -> float:
    """How many tolerances a value moves by, at most."""
    pairs = ((a[key], b[key]) for a, b in zip(before.plain, random.plain, strict=True) if key in b)
    tolerance = FLOAT32 if before.half else (before.rtol, before.atol)  # plain is in float32 there, and what is told by it
    return max((_distance(a, b, *tolerance) for a, b in pairs), default=0.0)


def _finite(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "fiub":
        return np.zeros(())
    magnitudes = np.abs(array.astype(np.float64))
    return np.asarray(np.where(np.isfinite(magnitudes), magnitudes, 0.0))


def _scale(array: np.ndarray) -> float:
    """Largest magnitude; 1 for zeros."""
    return float(_finite(array).max(initial=0.0)) or 1.0


def _allowed(rtol: float, atol: float, noise: float, rounded: float) -> str:
    if not rtol and not atol:
        return "max |difference| = 0"
    allowed = f"{rtol:.0e} |y| + {atol:.0e} max|y|"
    allowed += f" + {noise:.1e} max|y|, which the unchanged model shows against itself" if noise > atol / 10 else ""
    return allowed + (f" + {rounded:.1e} max|y|, for what its weights' last places make" if rounded else "")


def _shapes(feeds: Feeds) -> str:
    """Inputs in words; of a decoder with a past, which has two for each layer, the first ones."""
    shown = [f"{key}{list(value.shape)}" for key, value in list(feeds.items())[:_SHOWN]]
    return ", ".join([*shown, *([f"{len(feeds) - _SHOWN} more"] if len(feeds) > _SHOWN else [])])


def _numbers(ran: Ran) -> Ran:
    if any(np.isnan(array).any() for run in ran.optimised for array in run.values() if array.dtype.kind == "f"):
        raise ValueError("its outputs are not numbers with these inputs")
    return ran


def _refuse_unloadable(source: Path | ir.Model, error: Exception) -> None:
    """Raise where it is not the inputs: NotRun where onnxruntime has no kernel, CaptureError where it cannot load the file."""
    if no_kernel(error):
        raise NotRun(f"onnxruntime has no kernel for it: {_said(error)}") from error
    if isinstance(source, Path):
        try:
            session_of(source)
        except Exception as second:  # onnxruntime's exceptions share no base class
            raise CaptureError(f"onnxruntime cannot load {source}: {_said(second)}") from second


def _called(source: Path | ir.Model) -> str:
    return str(source) if isinstance(source, Path) else "The graph"


def _said(error: BaseException) -> str:
    return str(error)[:300].rstrip(". \n")
