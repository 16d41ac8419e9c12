"""The options of operators as options of the command. Those of this package's own are known without torch; others are imported when named."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import click

from laurel_rewrite.app.command_help import Command, is_from_file, values_of
from laurel_rewrite.files.checked import read_text, toml_of

OPERATORS: dict[str, Any] = json.loads(files("laurel_rewrite.operators").joinpath("builtin.json").read_text())
"""Formula and options of this package's operators, by name; written by `tools/list_operators.py`."""
VARIANTS = (
    f"Operator: {', '.join(OPERATORS)}, or one of a plugin or file. Its options: --variant NAME --help, or laurel-rewrite operators NAME."
)
"""Help of `--variant`."""
USUAL = "rw+lr"
"""The operator where none is named."""
_ADDED = "laurel_rewrite.operator_options"


def complete_operator(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """What a shell offers for the name of an operator: this package's own, which are known without importing them."""
    return [name for name in OPERATORS if name.startswith(incomplete)]


class Several(click.ParamType[list[Any]]):
    """Values of a kind, with commas between them."""

    several = True

    def __init__(self, kind: type) -> None:
        self.kind, self.name = click.types.convert_type(kind), f"{click.types.convert_type(kind).name}[,...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Any]:
        return [self.kind.convert(word.strip(), param, ctx) for word in str(value).split(",")]


class OperatorOption(click.Option):
    """An option of operators: it has no value where none is given, and what is `usual` is the operator's affair."""

    usual: Any = None


def option_of(name: str, declared: Mapping[str, Any], *, several: bool = False) -> OperatorOption:
    """A declaration as an option of the command; what is not given is left to the operator."""
    default, choices = declared["default"], declared["choices"]
    words = f"{declared['help']}: {', '.join(choices)}." if choices else f"{declared['help']}."
    kind = type(default) if isinstance(default, bool | int | float) else str
    shown = str(default).lower() if isinstance(default, bool) else default
    taken: Any = Several(kind) if several else kind
    option = OperatorOption([f"--{name.replace('_', '-')}", name], default=None, type=taken, help=f"{words}  [default: {shown}]")
    option.usual = default
    return option


def builtin_options(*, several: bool = False) -> dict[str, OperatorOption]:
    """One option a name, of all operators of this package."""
    found: dict[str, OperatorOption] = {}
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

    def prepare(self, ctx: click.Context, args: list[str], values: Mapping[str, Any]) -> None:
        given = values_of(args, "--variant") or _texts(values.get("variant"))
        files = values_of(args, "--operator-file") or _texts(values.get("operator-file"))
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

    def _show_options_of(self, variants: Sequence[str]) -> None:
        """Have the help show the options of these operators alone, with their own words and defaults."""
        words = [sorted(word.strip().lower().split("+")) for name in variants for word in name.split(",")]
        shown: dict[str, Any] = {}
        for name, operator in OPERATORS.items():
            if sorted(name.split("+")) in words:
                shown = {**operator["options"], **shown}
        every = builtin_options(several=self.several)
        for parameter in self.params:
            if isinstance(parameter, OperatorOption) and parameter.name in every:
                parameter.hidden = parameter.name not in shown
                if not parameter.hidden:
                    of_this = option_of(parameter.name, shown[parameter.name])
                    parameter.help, parameter.usual = of_this.help, of_this.usual

    def planned(self, ctx: click.Context) -> tuple[dict[str, Any], str]:
        path = ctx.params.get("plan")
        if path is None:  # of several plans each is a model of its own
            return {}, ""
        defaults = toml_of(read_text(path, "The plan"), str(path)).get("defaults")
        said = {name.replace("_", "-"): value for name, value in defaults.items()} if isinstance(defaults, dict) else {}
        return said, str(path)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*super().get_params(ctx), *ctx.meta.get(_ADDED, {}).values()]


def given_options(context: click.Context, values: Mapping[str, Any], variants: Sequence[str]) -> dict[str, Any]:
    """The options of operators among a command's values that somebody gave.

    Args:
        context: of the command.
        values: of its parameters.
        variants: the operators that they are for: a configuration may speak of others, too, and what is theirs is left out.
    """
    names = {*builtin_options(), *context.meta.get(_ADDED, {})}
    given = {name: value for name, value in values.items() if name in names and value is not None}
    configured = [name for name in given if is_from_file(context, name)]
    if configured:
        from laurel_rewrite.operators.registry import operator

        taken = {name for variant in variants for name in operator(variant).options}
        given = {name: value for name, value in given.items() if name in taken or name not in configured}
    return given


def _texts(value: Any) -> list[str]:
    """A text, or those of a list."""
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]
