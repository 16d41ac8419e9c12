"""Limits on a result that a user sets: `latency_ratio > 1.05` or `verdict == unresolved` fails a build."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from laurel_rewrite.errors import ConfigError, nearest
from laurel_rewrite.profiling import ITSELF, ONE_MORE, Profile
from laurel_rewrite.profiling.figures import FIGURES
from laurel_rewrite.profiling.latency import VERDICTS, Latency
from laurel_rewrite.profiling.rows import Row

_COMPARED = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_COMPUTED = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


_WORDS = {verdict.replace(" ", "_"): verdict for verdict in VERDICTS}
"""How a limit names a verdict."""
SKIPPED = "skipped"
"""The figure that needs no profile: how many sites the plan has and the result has not."""
VERDICT = "verdict"


_LATENCY: dict[str, Callable[[Latency], Any]] = {
    VERDICT: lambda time: time.verdict,
    "latency_ratio": lambda time: time.ratio,
    "latency_low": lambda time: time.low,
    "latency_high": lambda time: time.high,
    "latency_ms": lambda time: time.median_ms,
}
NAMES = [*_LATENCY, *(figure.limit for figure in FIGURES)]
"""What a limit can name beside `skipped`."""


def figures(row: Row, baseline: Row, time: Latency) -> dict[str, Any]:
    """What a limit can name, for one model at one shape of inputs: ratios to the baseline, counts, and the verdict."""
    found = {figure.limit: figure.against(row, baseline) if figure.ratio else figure.value(row, baseline) for figure in FIGURES}
    return {name: of(time) for name, of in _LATENCY.items()} | found


def check_limit(text: str) -> None:
    """Raise ConfigError unless a limit can be evaluated: comparisons of `NAMES`, `skipped` and numbers, with and, or, not, + - * /.

    The verdict is equal, or not equal, to a word: faster, slower, unresolved, within_noise.
    """
    _value(_parsed(text), dict.fromkeys((*NAMES, SKIPPED), 1.0), text)


def needs_profile(text: str) -> bool:
    """Whether a limit names what only a profile says."""
    return bool(set(_named(_parsed(text))) - {SKIPPED})


def exceeded(text: str, profile: Profile | None, skipped: int = 0) -> list[str]:
    """For each model that a limit holds for, at any of the shapes it was measured at, a sentence with the figures it names.

    Args:
        text: the limit.
        profile: None where nothing was measured: only a limit on `skipped` can hold then.
        skipped: number of sites that could not be rewritten.

    Raises:
        ConfigError: see `check_limit`.
    """
    tree, known = _parsed(text), {SKIPPED: skipped}
    if not needs_profile(text):
        return [f"{text} ({SKIPPED} {skipped})"] if _value(tree, known, text) else []
    if profile is None:
        return []
    timed = any(name.startswith(("latency", VERDICT)) for name in _named(tree))  # other figures are of the first shape alone
    found = []
    for row in profile.rows[1:]:
        if row.name in (ONE_MORE, ITSELF):
            continue
        for time, shape, phase in list(zip(row.latencies, profile.shapes, profile.phases, strict=True))[: None if timed else 1]:
            values = known | figures(row, profile.rows[0], time)
            if _value(tree, values, text):
                named = ", ".join(f"{name} {values[name]:{'' if name == VERDICT else '.4g'}}" for name in _named(tree))
                sizes = phase or ", ".join(f"{name} {size}" for name, size in shape.items())
                at = f" at {sizes}" if timed and len(profile.shapes) > 1 else ""
                found.append(f"{row.name}{at}: {text} ({named})")
    return found


def _named(tree: ast.expr) -> list[str]:
    """The figures that a limit names, once each."""
    return list(dict.fromkeys(node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id not in _WORDS))


def _parsed(text: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ConfigError(f"--fail-if {text!r} is no comparison such as 'latency_ratio > 1.05'.") from error


def _value(node: ast.expr, known: Mapping[str, Any], text: str) -> float:
    match node:
        case ast.Constant(value=int() | float()):
            return float(node.value)  # type: ignore[arg-type]  # the pattern says so
        case ast.Name(id=name):
            if name in (VERDICT, *_WORDS):
                raise ConfigError(
                    f"--fail-if {text!r}: the verdict is compared with a word: 'verdict == unresolved'. Words: {', '.join(_WORDS)}."
                )
            if name not in known:
                raise ConfigError(f"--fail-if {text!r}: there is no figure {name!r}. {nearest(name, (*NAMES, SKIPPED))}")
            return float(known[name])
        case ast.BoolOp(op=op, values=parts):
            found = [_value(one, known, text) for one in parts]  # all of them: an unknown name is an error wherever it stands
            return float(all(found) if isinstance(op, ast.And) else any(found))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return float(not _value(operand, known, text))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, known, text)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _COMPUTED:
            try:
                return float(_COMPUTED[type(op)](_value(left, known, text), _value(right, known, text)))
            except ZeroDivisionError as error:
                raise ConfigError(f"--fail-if {text!r} divides by 0.") from error
        case ast.Compare(left=ast.Name(id=name), ops=[ast.Eq() | ast.NotEq() as op], comparators=[ast.Name(id=word)]) if name == VERDICT:
            if word not in _WORDS:
                raise ConfigError(f"--fail-if {text!r}: there is no verdict {word!r}. {nearest(word, _WORDS)}")
            return float(_COMPARED[type(op)](known[VERDICT], _WORDS[word]))
        case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in _COMPARED for op in ops):
            found = [_value(one, known, text) for one in (left, *others)]
            return float(all(_COMPARED[type(op)](a, b) for op, a, b in zip(ops, found, found[1:], strict=False)))
        case _:
            raise ConfigError(
                f"--fail-if {text!r} is no comparison such as 'latency_ratio > 1.05'; {ast.unparse(node)!r} cannot stand there."
            )
