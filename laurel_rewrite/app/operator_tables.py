"""What the terminal shows of operators."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from laurel_rewrite.app.tables import show_table
from laurel_rewrite.detection.sites import Sites
from laurel_rewrite.operators import registry
from laurel_rewrite.operators.config import SiteConfig
from laurel_rewrite.operators.counting import counted_stream
from laurel_rewrite.operators.registry import Operator
from laurel_rewrite.plan.fits import Fit
from laurel_rewrite.report.words import numbered

STARTS = {
    "exact": "exact",
    "evaluation": "exact in evaluation",
    "scale-free": "exact for readers behind a norm",
    "inexact": "another function than x + f",
}
"""Starts in words."""
_DIM = 768
_LENGTH = 24


def described(name: str) -> dict[str, Any]:
    """What is known of an operator; its costs are those of a stream of 12 blocks of two connections, with D = 768."""
    operator = registry.operator(name)
    stream = [operator.prepare(config) for config in _stream(operator)]
    counts = counted_stream(operator.connection(config, device="meta").eval() for config in stream)
    return {
        "name": name,
        "formula": operator.formula,
        "start": operator.start_of(stream[0]),
        "paper": operator.paper,
        "text": " ".join((inspect.getdoc(operator.connection) or "").partition("\n\n")[0].split()),
        "needs": sorted(operator.needs),
        "parameters": sum(operator.parameters(config) for config in stream),
        "flops": sum(one.flops for one in counts) / len(counts),
        "moved": sum(one.moved for one in counts) / len(counts),
        "state": max(one.state for one in counts),
        "options": {
            key: {"default": option.default, "help": option.help, "choices": list(option.choices)}
            for key, option in operator.options.items()
        },
    }


def _stream(operator: Operator) -> list[SiteConfig]:
    """12 blocks of an attention and a feed-forward part."""
    found, window = [], operator.connection.window(operator.prepare(SiteConfig(operator.name, _DIM)))
    for at in range(_LENGTH):
        ends, last = at % 2 == 1, at == _LENGTH - 1
        facts: dict[str, Any] = {
            "position": at, "length": _LENGTH, "block": at // 2, "starts_block": not ends, "ends_block": ends, "role": "feed-forward" if ends else "attention",
            "lags": at + 1 if window is None else min(at + 1, window), "leaves": 0 if last else None if window is None else window - 1,
            "separate": operator.separate and ends and not last, "fed": operator.separate and not ends and at > 0,
        }  # fmt: skip
        found.append(SiteConfig(operator.name, _DIM, **facts))
    return found


def show_operators(console: Console, listed: Sequence[Mapping[str, Any]], *, options: bool) -> None:
    """A paragraph an operator."""
    for one in listed:
        console.print(Text.assemble((one["name"], "bold"), "  ", one["formula"]))
        cost = f"{one['parameters']:,} parameters, {one['moved'] / _DIM:.1f} D moved"
        state = f", {one['state'] / _DIM:.0f} D kept" if one["state"] else ""
        lines = [Text(f"start: {STARTS[one['start']]} · {cost}{state}"), Text(one["paper"], style="dim")] if one["paper"] else [Text(cost)]
        if options:
            lines.append(Text(one["text"]))
            for key, option in one["options"].items():
                choices = f": {', '.join(option['choices'])}" if option["choices"] else ""
                lines.append(Text(f"--{key.replace('_', '-')}  {option['help']}{choices} [{option['default']}]"))
        for line in lines:
            console.print(Padding(line, (0, 0, 0, 2)))
    console.print(
        Text(
            f"\nparameters: of all {_LENGTH} connections of a model of 12 blocks with D = {_DIM} features; moved: numbers that a connection reads and writes at "
            "each position (a plain sum 3 D); kept: what it hands on to the next.",
            style="italic dim",
        )
    )


def show_fits(console: Console, model: str, sites: Sites, found: Sequence[Fit]) -> None:
    """Those that fit, and why the others do not."""
    fitting = [fit for fit in found if fit.fits]
    rows = [(fit.operator, STARTS[fit.start], str(fit.connections), f"{fit.added:,}") for fit in fitting]
    streams = len({site.stream for site in sites})
    title = f"{model}: {numbered(len(sites), 'residual connection')}, and {len(fitting)} of {len(found)} operators that fit"
    if rows:
        show_table(console, title, ("operator", "start", "sites>", "parameters>"), rows)
    else:
        console.print(Text(title, style="bold"))
    for fit in found:
        if fit.reason:
            where = f" in {streams - len(fit.streams)} of {streams} streams" if fit.fits else ""
            console.print(Text.assemble((fit.operator, "bold"), f" does not fit{where}: {fit.reason}"))
