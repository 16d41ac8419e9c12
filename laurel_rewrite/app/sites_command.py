"""`laurel-rewrite sites MODEL`."""

from __future__ import annotations

from pathlib import Path

import click

from laurel_rewrite.app.command_help import Command
from laurel_rewrite.app.options import SET, common, complete_model
from laurel_rewrite.app.running import console, only_for_onnx, print_json, start


@click.command(cls=Command, short_help="list the residual connections, and why other sums are none")
@click.argument("model", shell_complete=complete_model)
@click.option("--explain", "selector", metavar="SITE|LINE", help="Why an addition is, or is not, a site: an id, a module, or [FILE:]LINE.")
@click.option("--inputs", type=click.Path(path_type=Path), help="model.onnx: inputs (.npz) for sizes that cannot be inferred.")
@click.option("--graph", "drawing", type=click.Path(path_type=Path), metavar="FILE", help="Draw streams, sites and branches: .svg, .dot.")
@SET
@common
def sites(
    model: str,
    selector: str | None,
    inputs: Path | None,
    drawing: Path | None,
    settings: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """List the residual connections of MODEL, and every other addition with the reason why it is none. Changes nothing.

    MODEL may be a graph here, too: an .onnx or a .pt2 file.
    """
    start(verbose, as_json)
    from laurel_rewrite.app import job, terminal
    from laurel_rewrite.app.progress import Stages
    from laurel_rewrite.detection.drawing import check_format, draw
    from laurel_rewrite.detection.explaining import explain
    from laurel_rewrite.sources.models import parse_settings

    if drawing is not None:
        check_format(drawing)
    only_for_onnx(model, "inputs" if inputs is not None else "")
    listener = Stages(console(stderr=True), quiet=quiet)
    with listener("detect"):
        found = job.find_sites(model, parse_settings(settings), inputs)
    explanations = explain(found, selector) if selector is not None else None
    if drawing is not None:
        draw(found, drawing, f"{model}: {len(found)} residual connections")
    if as_json:
        print_json(found.to_dict() if explanations is None else {"explanations": [e.to_dict() for e in explanations]})
    elif explanations is not None:
        terminal.show_explanations(console(), explanations)
    else:
        terminal.show_sites(console(), model, found)
    if drawing is not None:
        click.echo(f"Drawn to {drawing}.", err=True)
