"""`laurel-rewrite doctor`."""

from __future__ import annotations

import click

from laurel_rewrite.app.command_help import Command
from laurel_rewrite.app.options import common, seconds_of
from laurel_rewrite.app.running import console, print_json, start


@click.command(cls=Command, short_help="say what is installed, what is missing, and what works here")
@click.option(
    "--wait",
    default=13.0,
    show_default=True,
    callback=seconds_of,
    metavar="SECONDS",
    help="For torch.compile, which is slow the first time.",
)
@common
def doctor(wait: float, as_json: bool, quiet: bool, verbose: bool) -> None:
    """Say what is installed and what is missing, what the machine has, and what works here: small things are really tried.

    Exit status 0 where a model can be rewritten, verified, exported and run in onnxruntime, else 1.
    """
    start(verbose, as_json)
    from laurel_rewrite.app.doctor import examine
    from laurel_rewrite.app.doctor_tables import show_findings
    from laurel_rewrite.app.progress import Stages

    found = examine(wait=wait, listener=Stages(console(stderr=True), quiet=quiet))
    if as_json:
        print_json(found.to_dict())
    else:
        show_findings(console(), found)
    if not found.healthy:
        click.get_current_context().exit(1)
