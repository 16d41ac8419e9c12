"""Limits on a profile that a user sets: `latency_ratio > 1.05` fails a build."""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping

from laurel_rewrite.errors import ConfigError, nearest
from laurel_rewrite.profiling import ITSELF, ONE_MORE, Profile, Row

_COMPARED = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_COMPUTED = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def figures(row: Row, baseline: Row) -> dict[str, float]:
    """What a limit can name, for one model: ratios to the baseline, and counts."""
    fusions = row.ops.against(baseline.ops)

    def ratio(mine: float, theirs: float) -> float:
        return mine / theirs if theirs else 1.0

    return {
        "latency_ratio": max(time.ratio for time in row.latencies),
        "latency_low": max(time.low for time in row.latencies),
        "latency_high": max(time.high for time in row.latencies),
        "latency_ms": max(time.median_ms for time in row.latencies),
        "activation_ratio": ratio(row.memory.activation_bytes, baseline.memory.activation_bytes),
        "resident_ratio": ratio(row.resident_bytes, baseline.resident_bytes),
        "file_ratio": ratio(row.file_bytes, baseline.file_bytes),
        "flops_ratio": ratio(row.costs.flops, baseline.costs.flops),
        "parameter_ratio": ratio(row.costs.parameters, baseline.costs.parameters),
        "moved_ratio": ratio(row.costs.moved_bytes, baseline.costs.moved_bytes),
        "load_ratio": ratio(row.load_ms, baseline.load_ms),
        "fusions_lost": fusions.lost.total(),
        "ops": row.ops.after.total(),
    }


NAMES = (
    "latency_ratio latency_low latency_high latency_ms activation_ratio resident_ratio file_ratio flops_ratio parameter_ratio moved_ratio load_ratio "
    "fusions_lost ops"
).split()


def check_limit(text: str) -> None:
    """Raise ConfigError unless a limit can be evaluated: comparisons of `NAMES` and numbers, with and, or, not, + - * /."""
    _value(_parsed(text), dict.fromkeys(NAMES, 1.0), text)


def exceeded(text: str, profile: Profile) -> list[str]:
    """For each model that a limit holds for, a sentence with the figures it names. Several shapes count with their worst.

    Raises:
        ConfigError: see `check_limit`.
    """
    tree, baseline = _parsed(text), profile.rows[0]
    found = []
    for row in profile.rows[1:]:
        if row.name in (ONE_MORE, ITSELF):
            continue
        known = figures(row, baseline)
        if _value(tree, known, text):
            named = dict.fromkeys(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
            found.append(f"{row.name}: {text} ({', '.join(f'{name} {known[name]:.4g}' for name in named)})")
    return found


def _parsed(text: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ConfigError(f"--fail-if {text!r} is no comparison such as 'latency_ratio > 1.05'.") from error


def _value(node: ast.expr, known: Mapping[str, float], text: str) -> float:
    match node:
        case ast.Constant(value=int() | float()):
            return float(node.value)  # type: ignore[arg-type]  # the pattern says so
        case ast.Name(id=name):
            if name not in known:
                raise ConfigError(f"--fail-if {text!r}: there is no figure {name!r}. {nearest(name, NAMES)}")
            return known[name]
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
        case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in _COMPARED for op in ops):
            found = [_value(one, known, text) for one in (left, *others)]
            return float(all(_COMPARED[type(op)](a, b) for op, a, b in zip(ops, found, found[1:], strict=False)))
        case _:
            raise ConfigError(
                f"--fail-if {text!r} is no comparison such as 'latency_ratio > 1.05'; {ast.unparse(node)!r} cannot stand there."
            )
