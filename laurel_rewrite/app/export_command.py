"""`laurel-rewrite export FOLDER`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from laurel_rewrite.app.command_help import Command
from laurel_rewrite.app.options import FUNCTIONS, SKIP_PASS, TARGET, WITH_PAST, check_target, common
from laurel_rewrite.app.running import console, print_json, start
from laurel_rewrite.errors import ConfigError


@click.command(cls=Command, short_help="write what was trained, a folder, as ONNX")
@click.argument("folder", type=click.Path(path_type=Path), metavar="FOLDER")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("laurel.onnx"), show_default=True, metavar="FILE", help="The ONNX file."
)
@click.option("--force", is_flag=True, help="Replace a file at --out.")
@TARGET
@FUNCTIONS
@SKIP_PASS
@WITH_PAST
@click.option(
    "--inputs", type=click.Path(path_type=Path), help="Inputs (.npz) by the names of forward's arguments, where FOLDER knows none."
)
@click.option("--verify/--no-verify", default=True, show_default=True, help="Compare the file with the model in onnxruntime.")
@common
@click.pass_context
def export(
    context: click.Context,
    /,
    folder: Path,
    out: Path,
    force: bool,
    inputs: Path | None,
    *,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **given: Any,
) -> None:
    """Write the model of FOLDER as ONNX, with the weights that it was saved with, and compare both.

    FOLDER is what laurel_rewrite.save or the main job wrote, or save_pretrained of a rewritten model of transformers.
    """
    start(verbose, as_json)
    check_target(context, given)
    if out.exists() and not force:
        raise ConfigError(f"{out} is there already. Give another file, --out, or replace it, --force.")
    from laurel_rewrite.app.progress import Stages
    from laurel_rewrite.app.trained import trained
    from laurel_rewrite.exporting import export_onnx

    listener = Stages(console(stderr=True), quiet=quiet)
    with listener("load") as stage:
        one = trained(folder, inputs)
        stage.done(type(one.model).__name__)
    with listener("export, verify" if given["verify"] else "export") as stage:
        export_onnx(
            one.model, one.args, one.kwargs, out, target=given["target"], functions=given["functions"], skip=given["skip"],
            past=given["with_past"], verify=given["verify"],
        )  # fmt: skip
        stage.done(str(out))
    files = [str(file) for file in (out, out.with_name(f"{out.name}.data")) if file.exists()]
    if as_json:
        print_json({"folder": str(folder), "files": files, "target": given["target"], "verified": given["verify"]})
    else:
        click.echo(f"Written to {', '.join(files)}")
