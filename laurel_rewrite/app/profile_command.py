"""`laurel-rewrite profile A.onnx B.onnx`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from laurel_rewrite.app.command_help import Command
from laurel_rewrite.app.options import (
    FAIL_IF,
    FORCE,
    MAX_TIME,
    PAST,
    PRECISION,
    PROMPT,
    SHAPE,
    THREADS,
    common,
    parse_shapes,
    profile_seconds,
    provider,
)
from laurel_rewrite.app.running import check_limits, console, print_json, start, stop_if_exceeded


@click.command(cls=Command, short_help="measure ONNX files side by side: latency, memory and more")
@click.argument("models", nargs=-1, required=True, metavar="BASELINE [OTHER ...]", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=Path("laurel_profile"), show_default=True, help="Folder for the report.")
@FORCE
@profile_seconds(10.0, "Time to measure latency at each shape.")
@SHAPE
@PROMPT
@PAST
@click.option("--inputs", type=click.Path(path_type=Path), help="Inputs (.npz), instead of random ones.")
@PRECISION
@MAX_TIME
@THREADS
@provider("CPU", "CPU")
@click.option(
    "--one-more-layer/--no-one-more-layer", "control", default=True, show_default=True, help="The first model with one more layer, too."
)
@click.option("--self-check", is_flag=True, help="The first model against itself, too: it must be within noise.")
@click.option("--seed", default=0, show_default=True, help="Seed of inputs, order and intervals.")
@FAIL_IF
@common
def profile(
    models: tuple[Path, ...],
    out: Path,
    profile_seconds: float,
    shapes: tuple[str, ...],
    inputs: Path | None,
    limits: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Measure ONNX files against the first: latency with intervals, memory, where the time goes, FLOPs, fusions. Writes report.html and
    report.json.

    A folder of a rewritten model, as laurel_rewrite.save, the main job and save_pretrained write it, is exported for it; as the first, beside the same
    model without LAuReL.
    """
    start(verbose, as_json)
    check_limits(limits)
    from laurel_rewrite.app import profile_job, terminal
    from laurel_rewrite.app.progress import Stages

    listener = Stages(console(stderr=True), quiet=quiet)
    sizes = parse_shapes(shapes)
    data, result = profile_job.run(models, out, seconds=profile_seconds, shapes=sizes, inputs=inputs, listener=listener, **options)
    if as_json:
        print_json(data)
    else:
        terminal.show_profile(console(), result)
        click.echo(f"Written to {out}/: {', '.join(data['files'])}")
    stop_if_exceeded(limits, result)
