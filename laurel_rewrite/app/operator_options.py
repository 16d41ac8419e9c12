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
VARIANTS = (
    f"Operator: {', '.join(OPERATORS)}, or one of a plugin or file. Its options: --variant NAME --help, or laurel-rewrite operators NAME."
)
"""Help of `--variant`."""
USUAL = "rw+lr"
"""The operator where none is named."""
_ADDED = "laurel_rewrite.operator_options"


class _Several(click.ParamType[list[Any]]):
    """Values of a kind, with commas between them."""

    def __init__(self, kind: type) -> None:
        self.kind, self.name = click.types.convert_type(kind), f"{click.types.convert_type(kind).name}[,...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Any]:
        return [self.kind.convert(word.strip(), param, ctx) for word in str(value).split(",")]


def option_of(name: str, declared: Mapping[str, Any], *, several: bool = False) -> click.Option:
    """A declaration as an option of the command; what is not given is left to the operator."""
    default, choices = declared["default"], declared["choices"]
    words = f"{declared['help']}: {', '.join(choices)}." if choices else f"{declared['help']}."
    kind = type(default) if isinstance(default, bool | int | float) else str
    shown = str(default).lower() if isinstance(default, bool) else default
    taken: Any = _Several(kind) if several else kind
    return click.Option([f"--{name.replace('_', '-')}", name], default=None, type=taken, help=f"{words}  [default: {shown}]")


def builtin_options(*, several: bool = False) -> dict[str, click.Option]:
    """One option a name, of all operators of this package."""
    found: dict[str, click.Option] = {}
    for operator in OPERATORS.values():
        for name, declared in operator["options"].items():
            found.setdefault(name, option_of(name, declared, several=several))
    return found


class OperatorCommand(Command):
    """A command that takes the options of the operators that its `--variant` names, wherever they are registered.

    Args:
        several: whether it takes several variants, and several values of their options.
    """

    def __init__(self, name: str | None, *, several: bool = False, **settings: Any) -> None:
        super().__init__(name, **settings)
        self.several = several

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given, files = _values(args, "--variant"), _values(args, "--operator-file")
        own = [sorted(name.split("+")) for name in OPERATORS]
        self._show_options_of(given or [USUAL])
        if files or any(sorted(name.strip().lower().split("+")) not in own for name in (given if self.several else given[-1:])):
            from dataclasses import asdict

            from laurel_rewrite.operators.registry import load_operators, operators

            for file in files:
                load_operators(file)
            known = {parameter.name for parameter in self.params}
            added = {
                name: option_of(name, asdict(option), several=self.several)
                for operator in operators().values()
                for name, option in operator.options.items()
                if name not in known
            }
            ctx.meta[_ADDED] = added
        return super().parse_args(ctx, args)

    def _show_options_of(self, variants: Sequence[str]) -> None:
        """Have the help show the options of these operators alone, with their own words and defaults."""
        words = [sorted(word.strip().lower().split("+")) for name in variants for word in name.split(",")]
        shown: dict[str, Any] = {}
        for name, operator in OPERATORS.items():
            if sorted(name.split("+")) in words:
                shown = {**operator["options"], **shown}
        every = builtin_options(several=self.several)
        for parameter in self.params:
            if isinstance(parameter, click.Option) and parameter.name in every:
                parameter.hidden = parameter.name not in shown
                if not parameter.hidden:
                    parameter.help = option_of(parameter.name, shown[parameter.name]).help

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*super().get_params(ctx), *ctx.meta.get(_ADDED, {}).values()]


def given_options(context: click.Context, values: Mapping[str, Any]) -> dict[str, Any]:
    """The options of operators among a command's values that somebody gave."""
    names = {*builtin_options(), *context.meta.get(_ADDED, {})}
    return {name: value for name, value in values.items() if name in names and value is not None}


def _values(args: Sequence[str], option: str) -> list[str]:
    found = [value for name, value in itertools.pairwise(args) if name == option]
    return found + [arg.removeprefix(f"{option}=") for arg in args if arg.startswith(f"{option}=")]
