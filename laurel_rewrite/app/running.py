"""What every command does around its work: say what happens, print, stop where a limit is exceeded."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from laurel_rewrite.errors import ConfigError, LimitError
from laurel_rewrite.sources import is_onnx

if TYPE_CHECKING:
    from rich.console import Console

    from laurel_rewrite.profiling import Profile


def start(verbose: bool, as_json: bool) -> None:
    if as_json:  # what a model's code prints must not stand before the result
        context = click.get_current_context()
        context.obj = sys.stdout
        context.with_resource(contextlib.redirect_stdout(sys.stderr))
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, format="%(name)s: %(message)s", stream=sys.stderr)
    if not verbose:
        import warnings

        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        warnings.simplefilter("ignore")  # of the libraries a model is made of: nothing a user of this command can mend


def first_process() -> bool:
    """Whether this is the one of several processes that speaks for all: launchers number them so."""
    return os.environ.get("RANK", "0") == "0"


def console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    console = Console(file=sys.stderr if stderr else sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = 160
    return console


def print_json(data: dict[str, Any]) -> None:
    click.echo(json.dumps(data, indent=1, default=str), file=click.get_current_context().obj)


def check_limits(limits: Sequence[str]) -> bool:
    """Whether there are limits on what a profile says; ConfigError where one cannot be evaluated."""
    if not limits:
        return False
    from laurel_rewrite.profiling.limits import check_limit, needs_profile

    for limit in limits:
        check_limit(limit)
    return any(map(needs_profile, limits))


def stop_if_exceeded(limits: Sequence[str], result: Profile | None, skipped: int = 0) -> None:
    from laurel_rewrite.profiling.limits import exceeded

    found = [line for limit in limits for line in exceeded(limit, result, skipped)]
    if found:
        raise LimitError("; ".join(found))


def only_for_onnx(model: str, *given: str) -> None:
    if any(given) and not is_onnx(model):
        raise ConfigError(f"--{given[0].replace('_', '-')} is for ONNX files, and {model} is none.")
