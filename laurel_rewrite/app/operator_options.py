"""The options of operators as options of the command. Those of this package's own are known without torch; others are imported when named."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import click

from laurel_rewrite.app.command_help import Command

OPERATORS: dict[str, Any] = json.loads(files("laurel_rewrite.operators").joinpath("builtin.json").read_text())
"""Formula and options of this package's operators, by name; written by `tools/list_operators.py`."""
_ADDED = "laurel_rewrite.operator_options"


def option_of(name: str, declared: Mapping[str, Any]) -> click.Option:
    """A declaration as an option of the command; what is not given is left to the operator."""
    default, choices = declared["default"], declared["choices"]
    words = f"{declared['help']}: {', '.join(choices)}." if choices else f"{declared['help']}."
    kind = type(default) if isinstance(default, bool | int | float) else str
    shown = str(default).lower() if isinstance(default, bool) else default
    return click.Option([f"--{name.replace('_', '-')}", name], default=None, type=kind, help=f"{words}  [default: {shown}]")


def builtin_options() -> dict[str, click.Option]:
    """One option a name, of all operators of this package."""
    found: dict[str, click.Option] = {}
    for operator in OPERATORS.values():
        for name, declared in operator["options"].items():
            found.setdefault(name, option_of(name, declared))
    return found


class OperatorCommand(Command):
    """A command that takes the options of the operator that its `--variant` names, wherever that is registered."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        variant, files = _value(args, "--variant"), _values(args, "--operator-file")
        if files or (variant and sorted(variant.strip().lower().split("+")) not in [sorted(name.split("+")) for name in OPERATORS]):
            from dataclasses import asdict

            from laurel_rewrite.operators.registry import load_operators, operators

            for file in files:
                load_operators(file)
            known = {parameter.name for parameter in self.params}
            added = {
                name: option_of(name, asdict(option))
                for operator in operators().values()
                for name, option in operator.options.items()
                if name not in known
            }
            ctx.meta[_ADDED] = added
        return super().parse_args(ctx, args)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*super().get_params(ctx), *ctx.meta.get(_ADDED, {}).values()]


def given_options(context: click.Context, values: Mapping[str, Any]) -> dict[str, Any]:
    """The options of operators among a command's values that somebody gave."""
    names = {*builtin_options(), *context.meta.get(_ADDED, {})}
    return {name: value for name, value in values.items() if name in names and value is not None}


def _values(args: Sequence[str], option: str) -> list[str]:
    found = [value for name, value in itertools.pairwise(args) if name == option]
    return found + [arg.removeprefix(f"{option}=") for arg in args if arg.startswith(f"{option}=")]


def _value(args: Sequence[str], option: str) -> str:
    return (_values(args, option) or [""])[-1]
