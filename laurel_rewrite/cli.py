"""The command. Only click is imported here at the start, so that `--help` answers at once."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from laurel_rewrite import __version__
from laurel_rewrite.errors import ConfigError, LaurelError, NoSiteError, VerificationError

if TYPE_CHECKING:
    from rich.console import Console

_SITE_OPTIONS = ("variant", "rank", "history", "normalize", "init_down", "history_map", "include", "exclude")
_GRAPH_OPTIONS = ("weights", "inputs", "external_data", "verify", "emit_torch")
_VARIANTS = "rw, lr, pa, rw+lr, rw+pa, lr+pa, rw+lr+pa"

_EPILOG = """\b
Another command:
  laurel-rewrite sites MODEL      list the residual connections, and why other additions are none

\b
MODEL:
  model.py                        offers build_model() and example_inputs()
  model.py:FACTORY                the same with another name
  package.module:FACTORY          from an installed package
  hf:NAME                         a transformers architecture, from its configuration
  timm:NAME, torchvision:NAME     an architecture with random weights
  model.onnx                      a graph; the result is a graph too

\b
Exit status: 0 done, 1 a verification failed, 2 usage or configuration, 3 no residual
connection, 4 capture or export failed, 5 an optional package is missing.
"""


def _common(function: Any) -> Any:
    """Options that both commands take."""
    for option in (
        click.option("-v", "--verbose", is_flag=True, help="Log what happens to stderr."),
        click.option("-q", "--quiet", is_flag=True, help="Show no stages."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
        click.option(
            "--set",
            "settings",
            multiple=True,
            metavar="NAME=VALUE",
            help="Argument of the factory, or field of the architecture's configuration.",
        ),
    ):
        function = option(function)
    return function


@click.command(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.option("--variant", default="rw+lr", show_default=True, help=f"LAuReL terms: {_VARIANTS}.")
@click.option("--rank", default=16, show_default=True, help="Rank r of the low-rank maps.")
@click.option("--history", default=3, show_default=True, help="States k that PA reads, the skip included.")
@click.option("--normalize", default="softmax", show_default=True, help="Bound on a and b: softmax, sigmoid, none, paper.")
@click.option("--init-down", default="orthogonal", show_default=True, help="Start of V: orthogonal, xavier.")
@click.option("--history-map", default="low-rank", show_default=True, help="h of PA without LR: low-rank, identity.")
@click.option("--include", multiple=True, metavar="PATTERN", help="Only sites whose id, owner or kind matches.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="No sites whose id, owner or kind matches.")
@click.option("--plan", type=click.Path(path_type=Path), help="Carry out an edited plan.")
@click.option("--plan-out", type=click.Path(path_type=Path), help="Write the plan to this file, and stop.")
@click.option("--dry-run", is_flag=True, help="Show the plan, and stop.")
@click.option("--seed", default=0, show_default=True, help="Seed of the model's and LAuReL's start.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("laurel_out"), show_default=True, help="Folder for the results.")
@click.option("--profile-seconds", default=10.0, show_default=True, help="Time to measure latency; 0 for no profile.")
@click.option(
    "--onnx-functions",
    "functions",
    type=click.Choice(["keep", "inline"]),
    default="keep",
    show_default=True,
    help="With --target portable: LAuReL as local functions, or as ordinary nodes.",
)
@click.option(
    "--target",
    type=click.Choice(["ort-cpu", "portable", "none"]),
    default="ort-cpu",
    show_default=True,
    help="LAuReL in ONNX: lowered to the ops that run fastest in onnxruntime; as functions with parameters, which run anywhere; or as ordinary nodes, nothing folded.",
)
@click.option(
    "--skip-pass",
    "skip",
    multiple=True,
    metavar="PASS",
    help="With --target ort-cpu: a pass to leave out: rescale-stream, fold-branch, pad-rank.",
)
@click.option("--weights", type=click.Path(path_type=Path), help="model.onnx: trained LAuReL parameters (safetensors) to put in.")
@click.option(
    "--inputs", type=click.Path(path_type=Path), help="model.onnx: inputs (.npz) to verify and profile with, instead of random ones."
)
@click.option(
    "--external-data",
    type=click.Choice(["reference", "copy"]),
    help="model.onnx: refer to its external weights, or copy them beside the result. Default: refer where --out allows it.",
)
@click.option("--emit-torch", is_flag=True, help="model.onnx: write a trainable PyTorch module, too.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="model.onnx: compare the graphs in onnxruntime.")
@_common
@click.version_option(__version__, prog_name="laurel-rewrite")
@click.pass_context
def rewrite(
    context: click.Context,
    /,
    model: str,
    plan: Path | None,
    plan_out: Path | None,
    dry_run: bool,
    seed: int,
    out: Path,
    profile_seconds: float,
    functions: str,
    target: str,
    skip: tuple[str, ...],
    settings: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Replace the residual connections of MODEL by LAuReL: write a trainable model, verify it, export it to ONNX and profile it.

    Of an ONNX file it makes an ONNX file, verifies it against the first, and profiles both.
    """
    _start(verbose)
    if plan is not None:
        given = [name for name in _SITE_OPTIONS if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE]
        if given:
            raise ConfigError(f"--plan says what each site gets, so --{given[0].replace('_', '-')} cannot be given with it. Edit the plan.")
    if skip and target != "ort-cpu":
        raise ConfigError("--skip-pass is for --target ort-cpu.")
    if target != "portable" and context.get_parameter_source("functions") is click.core.ParameterSource.COMMANDLINE:
        raise ConfigError("--onnx-functions is for --target portable.")
    for_graphs = {name: options.pop(name) for name in _GRAPH_OPTIONS}
    given = [name for name in _GRAPH_OPTIONS if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE]
    if given and not model.endswith(".onnx"):
        raise ConfigError(f"--{given[0].replace('_', '-')} is for ONNX files, and {model} is none.")
    from laurel_rewrite.plan import LaurelConfig

    config = LaurelConfig(**options, seed=seed)
    from laurel_rewrite import job, terminal
    from laurel_rewrite.models import parse_settings

    listener = terminal.Stages(_console(stderr=True), quiet=quiet)
    if dry_run or plan_out is not None:
        report = job.plan_only(model, config, plan=plan, settings=parse_settings(settings), listener=listener)
        if plan_out is not None:
            _write_plan(plan_out, report.plan.to_toml())
        if as_json:
            _print_json(report.to_dict())
        else:
            terminal.show_plan(_console(), report)
            if plan_out is not None:
                click.echo(f"Written to {plan_out}. Edit it, then: laurel-rewrite {model} --plan {plan_out}")
        return
    try:
        if model.endswith(".onnx"):
            from laurel_rewrite import graph_job

            report = graph_job.run(
                job.graph_file(model, parse_settings(settings)), config, out, plan=plan, functions=functions, target=target, skip=skip,
                seconds=profile_seconds,
                listener=listener, **for_graphs,
            )  # fmt: skip
        else:
            report = job.run(
                model, config, out, plan=plan, settings=parse_settings(settings), functions=functions, target=target, skip=skip,
                seconds=profile_seconds,
                listener=listener,
            )  # fmt: skip
    except VerificationError as error:
        if len(error.args) > 1:
            failed = error.args[1]
            _print_json(failed.to_dict()) if as_json else terminal.show_report(_console(), failed)
        raise
    if as_json:
        _print_json(report.to_dict())
    else:
        terminal.show_report(_console(), report)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.option("--explain", "selector", metavar="SITE|LINE", help="Why an addition is, or is not, a site: an id, a module, or [FILE:]LINE.")
@click.option("--graph", "drawing", type=click.Path(path_type=Path), metavar="FILE", help="Draw streams, sites and branches: .svg, .dot.")
@_common
def sites(
    model: str,
    selector: str | None,
    drawing: Path | None,
    settings: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """List the residual connections of MODEL, and every other addition with the reason why it is none. Changes nothing.

    MODEL may be a graph here, too: an .onnx or a .pt2 file.
    """
    _start(verbose)
    from laurel_rewrite import job, terminal
    from laurel_rewrite.drawing import check_format, draw
    from laurel_rewrite.explaining import explain
    from laurel_rewrite.models import parse_settings

    if drawing is not None:
        check_format(drawing)
    listener = terminal.Stages(_console(stderr=True), quiet=quiet)
    with listener("detect"):
        found = job.find_sites(model, parse_settings(settings))
    explanations = explain(found, selector) if selector is not None else None
    if drawing is not None:
        draw(found, drawing, f"{model}: {len(found)} residual connections")
    if as_json:
        _print_json(found.to_dict() if explanations is None else {"explanations": [e.to_dict() for e in explanations]})
    elif explanations is not None:
        terminal.show_explanations(_console(), explanations)
    else:
        terminal.show_sites(_console(), model, found)
    if drawing is not None:
        click.echo(f"Drawn to {drawing}.", err=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `laurel-rewrite`: the default action is `rewrite`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command, rest = (sites, given[1:]) if given[:1] == ["sites"] else (rewrite, given)
    name = "laurel-rewrite sites" if command is sites else "laurel-rewrite"
    try:
        command.main(rest or ["--help"], prog_name=name, standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("Interrupted.", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(ConfigError.exit_code)
    except LaurelError as error:
        label = "Nothing to do" if isinstance(error, NoSiteError) else "Error"
        click.echo(f"{label}: {error.args[0]}", err=True)
        sys.exit(error.exit_code)


def _start(verbose: bool) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, format="%(name)s: %(message)s", stream=sys.stderr)
    if not verbose:
        import os
        import warnings

        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        warnings.simplefilter("ignore")  # of the libraries a model is made of: nothing a user of this command can mend


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    console = Console(file=sys.stderr if stderr else sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = 160
    return console


def _print_json(data: dict[str, Any]) -> None:
    click.echo(json.dumps(data, indent=1, default=str))


def _write_plan(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"The plan {path} cannot be written: {error.strerror}.") from error
