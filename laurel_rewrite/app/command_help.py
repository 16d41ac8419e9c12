"""The help of the command, in whole words at any width of the terminal. Only click is imported, so that it answers at once."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from typing import Any

import click

_NARROW = 70  # columns; below, a text stands under its term instead of beside it
_HYPHEN = "\u2011"  # the one that lines are not broken at: an option stays whole
_COMMANDS = (
    ("laurel-rewrite sites MODEL", "list the residual connections, and why other additions are none"),
    ("laurel-rewrite operators", "list the operators: formula, start, cost, options, and which fit a model"),
    ("laurel-rewrite compare MODEL", "whether it helps: trains models side by side, from the same seeds"),
    ("laurel-rewrite inspect DIR", "looks inside what compare trained: which sites gain"),
    ("laurel-rewrite profile A B ...", "latency, memory and more of ONNX files in onnxruntime, side by side"),
)
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
EPILOG: dict[str, Sequence[tuple[str, str]]] = {"Other commands": _COMMANDS, "MODEL": _MODELS, "Exit status": _STATUS}


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


class Command(click.Command):
    """A command whose help fits the terminal.

    Args:
        sections: lists of terms and texts by title, below the options.
    """

    context_class = _Context

    def __init__(self, name: str | None, *, sections: dict[str, Sequence[tuple[str, str]]] | None = None, **settings: Any) -> None:
        super().__init__(name, **settings | {"context_settings": {"help_option_names": ["-h", "--help"]}})
        self.sections = sections or {}

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, rows in self.sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)
