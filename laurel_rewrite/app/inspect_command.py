"""`laurel-rewrite inspect DIR`."""

from __future__ import annotations

from pathlib import Path

import click

from laurel_rewrite.app.command_help import Command
from laurel_rewrite.app.options import common
from laurel_rewrite.app.running import console, print_json, start
from laurel_rewrite.errors import ConfigError


@click.command(cls=Command, short_help="look inside what compare trained: which sites gain")
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--candidate", metavar="NAME", help="One of those compared.  [default: all that have an operator]")
@click.option("--batches", type=click.IntRange(2), default=8, show_default=True, help="Of the third split, to look with.")
@click.option("--plan-out", type=click.Path(path_type=Path), help="Write a plan of those sites alone that gain; of one candidate.")
@click.option("--force", is_flag=True, help="Replace another plan at --plan-out.")
@common
def inspect(
    folder: Path, candidate: str | None, batches: int, plan_out: Path | None, force: bool, as_json: bool, quiet: bool, verbose: bool
) -> None:
    """Look inside the models that `compare` trained, site by site: what was learned, the stream, and what each site is worth."""
    start(verbose, as_json)
    from laurel_rewrite.app import lab_tables
    from laurel_rewrite.app.progress import Stages
    from laurel_rewrite.lab.inspecting import inspect as look
    from laurel_rewrite.plan import check_plan_file

    if plan_out is not None:
        check_plan_file(plan_out)
    listener = Stages(console(stderr=True), quiet=quiet)
    with listener("inspect") as stage:
        found = look(folder, candidate=candidate, batches=batches)
        stage.done(f"{len(found)} models")
    if plan_out is not None and len(found) > 1:
        raise ConfigError(f"--plan-out is of one candidate. Give --candidate: {', '.join(one.name for one in found)}.")
    if as_json:
        print_json({"inspected": [one.to_dict() for one in found]})
    else:
        for one in found:
            lab_tables.show_inside(console(), one)
    if plan_out is not None:
        one = found[0]
        if one.plan is None:
            raise ConfigError(f"No plan was written: of the sites of {one.name}, {'all' if one.gaining else 'none'} gain.")
        one.plan.write(plan_out, force=force)
        click.echo(f"Written to {plan_out}: {len(one.plan.sites)} of {len(one.inside.sites)} sites.", err=as_json)
