"""The help of the command, in whole words at any width of the terminal. Only click is imported, so that it answers at once."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click
from click.shell_completion import CompletionItem

from laurel_rewrite.app.config_file import RENAMED, as_toml, effective, plain, read_config
from laurel_rewrite.command_line import WORDS

CONFIG, PRINT_CONFIG = "--config", "--print-config"
_ANSWERS = frozenset(("-h", "--help", "--version"))
"""Options that a file which cannot be read must not stand before."""
_FILE, _PRINT = "laurel_rewrite.config_file", "laurel_rewrite.print_config"
_WHOLE = 200  # characters of a command's line; click cuts longer ones

_NARROW = 70  # columns; below, a text stands under its term instead of beside it
_HYPHEN = "\u2011"  # the one that lines are not broken at: an option stays whole
_MODELS = (
    ("model.py", "offers build_model() and example_inputs()"),
    ("model.py:FACTORY", "the same with another name"),
    ("package.module:FACTORY", "from an installed package"),
    ("hf:FOLDER", "a transformers checkpoint, with its weights"),
    ("hf:NAME, timm:NAME, torchvision:NAME", "an architecture, with random weights"),
    ("model.onnx", "a graph; the result is a graph too"),
)
_STATUS = (
    ("0", "done"),
    ("1", "a verification failed or --fail-if held"),
    ("2", "usage or configuration"),
    ("3", "no residual connection"),
    ("4", "capture or export failed"),
    ("5", "an optional package is missing"),
    ("70", "an error of this program's own"),
)
EPILOG: dict[str, Sequence[tuple[str, str]]] = {"MODEL": _MODELS, "Exit status": _STATUS}


class _Formatter(click.HelpFormatter):
    def __init__(self, indent_increment: int = 2, width: int | None = None, max_width: int | None = None) -> None:
        columns = min(shutil.get_terminal_size().columns, max_width or 80)
        super().__init__(indent_increment, width or max(columns - 2, 20), max_width)

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        whole = [(term, text.replace("-", _HYPHEN)) for term, text in rows]
        super().write_dl(whole, col_max if self.width >= _NARROW else 4, col_spacing)

    def write(self, string: str) -> None:
        super().write(string.replace(_HYPHEN, "-"))


class _Context(click.Context):
    formatter_class = _Formatter

    @property
    def command_path(self) -> str:
        """Without the space before the name of the main job, which is none."""
        return super().command_path.rstrip()


class Command(click.Command):
    """A command whose help fits the terminal, and whose options may stand in a file.

    Args:
        sections: lists of terms and texts by title, below the options.
    """

    context_class = _Context

    def __init__(self, name: str | None, *, sections: dict[str, Sequence[tuple[str, str]]] | None = None, **settings: Any) -> None:
        super().__init__(name, **settings | {"context_settings": {"help_option_names": ["-h", "--help"]}})
        self.sections = sections or {}

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing and any(parameter.required for parameter in self.params):
            args = ["--help"]
        ctx.meta[_PRINT] = PRINT_CONFIG in args
        file = None
        if not ctx.resilient_parsing and not _ANSWERS & set(args):
            names = values_of(args, CONFIG)
            file = ctx.meta[_FILE] = read_config(names[-1] if names else None, str(self.name), self._verbs(ctx))
        self.prepare(ctx, args, file.values if file is not None else {})
        if file is not None:
            ctx.default_map = file.defaults(self.get_params(ctx))
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            new = RENAMED.get(error.option_name.removeprefix("--"))
            if new is None or f"--{new}" not in {name for parameter in self.params for name in parameter.opts}:
                raise
            raise click.UsageError(f"{error.message} It is called --{new} now.", ctx) from error
        except click.BadParameter as error:
            if file is not None and error.param is not None and is_from_file(ctx, str(error.param.name)):
                raise file.refused(error.param, error.message) from error
            raise

    def prepare(self, ctx: click.Context, args: list[str], values: Mapping[str, Any]) -> None:
        """Do what must be done before options are read: `values` are those of a file, as it has them."""

    def planned(self, ctx: click.Context) -> tuple[dict[str, Any], str]:
        """What a plan says of options, by their names, and the plan's name."""
        return {}, ""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        found = super().get_params(ctx)
        return [_not_required(parameter) for parameter in found] if ctx.meta.get(_PRINT) else found

    def invoke(self, ctx: click.Context) -> Any:
        if not ctx.meta.get(_PRINT):
            return super().invoke(ctx)
        values = effective(ctx, ctx.meta.get(_FILE), *self.planned(ctx))
        if ctx.params.get("as_json"):
            found = {one.name: {"value": plain(one.value), "source": one.source} for one in values}
            click.echo(json.dumps({str(self.name): found}, indent=1))
        else:
            click.echo(as_toml(str(self.name), values))
        return None

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_help_text(ctx, formatter)
        if ctx.parent is not None and ctx.info_name == "":
            with formatter.section("Other commands, each with --help"):
                formatter.write_dl([(name, command.get_short_help_str(_WHOLE)) for name, command in _group(ctx).items() if name])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, rows in self.sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)

    def _verbs(self, ctx: click.Context) -> list[str]:
        """The names of all commands, where this is one of them."""
        return sorted({str(self.name), *(str(command.name) for command in _group(ctx).values())})


class Verbs(click.Group):
    """Commands by their words; what begins with none of these words is the command without one."""

    context_class = _Context

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[WORDS] = list(args)
        begins = bool(args) or not ctx.resilient_parsing  # else the first word is being typed
        if begins and (not args or args[0] not in self.commands):
            args = ["", *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in self.commands if name]

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The words, and what may stand there of the command without one."""
        main = self.commands[""]
        with main.make_context("", [], parent=ctx, resilient_parsing=True) as inner:
            first = next(parameter for parameter in main.get_params(inner) if isinstance(parameter, click.Argument))
            models = first.shell_complete(inner, incomplete) if not incomplete.startswith("-") else []
            options = main.shell_complete(inner, incomplete)
        words = [CompletionItem(name, help=command.get_short_help_str()) for name, command in self.commands.items() if name]
        return [*models, *(word for word in words if word.value.startswith(incomplete)), *options]


def _group(ctx: click.Context) -> Mapping[str, click.Command]:
    root = ctx.find_root().command
    return root.commands if isinstance(root, click.Group) else {}


def _not_required(parameter: click.Parameter) -> click.Parameter:
    """The same, which may be left out."""
    found = copy.copy(parameter)
    found.required = False
    return found


def is_from_file(ctx: click.Context, name: str) -> bool:
    """Whether a parameter's value is that of the configuration."""
    return ctx.get_parameter_source(name) is click.core.ParameterSource.DEFAULT_MAP


def values_of(args: Sequence[str], option: str) -> list[str]:
    """The values of an option before click has read it."""
    found = [value for name, value in itertools.pairwise(args) if name == option]
    return found + [arg.removeprefix(f"{option}=") for arg in args if arg.startswith(f"{option}=")]
