"""`laurel-rewrite operators`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from laurel_rewrite.app.command_help import Command
from laurel_rewrite.app.operator_options import complete_operator
from laurel_rewrite.app.options import SET, common, complete_model
from laurel_rewrite.app.running import console, print_json, start


@click.command(cls=Command, short_help="list what can stand in their place, and which fit a model")
@click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=complete_operator)
@click.option(
    "--model",
    metavar="MODEL",
    shell_complete=complete_model,
    help="Say which fit it, which start exactly, what they would add, and why others are refused.",
)
@click.option(
    "--operator-file", "operator_files", multiple=True, type=click.Path(path_type=Path), help="Python file that registers operators."
)
@SET
@common
def operators(
    names: tuple[str, ...],
    model: str | None,
    operator_files: tuple[Path, ...],
    settings: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """List the residual operators: formula, start, cost and paper, with a NAME its options, too. Changes nothing.

    With --model, whether each fits that model, as it is without options.
    """
    start(verbose, as_json)
    from laurel_rewrite.app import operator_tables as tables
    from laurel_rewrite.app.progress import Stages
    from laurel_rewrite.operators import registry

    for file in operator_files:
        registry.load_operators(file)
    chosen = [registry.canonical(name) for name in names] or [*registry.operators()]
    if model is None:
        listed = [tables.described(name) for name in chosen]
        print_json({"operators": listed}) if as_json else tables.show_operators(console(), listed, options=bool(names))
        return
    from laurel_rewrite.app import job
    from laurel_rewrite.plan.fits import fits
    from laurel_rewrite.sources.models import parse_settings

    listener = Stages(console(stderr=True), quiet=quiet)
    with listener("detect"):
        sites = job.find_sites(model, parse_settings(settings))
    with listener("fit"):
        found: Any = [fit for fit in fits(sites) if fit.operator in chosen]
    if as_json:
        print_json({"model": model, "connections": len(sites), "operators": [fit.to_dict() for fit in found]})
    else:
        tables.show_fits(console(), model, sites, found)
