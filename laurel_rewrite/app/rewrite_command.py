"""`laurel-rewrite MODEL`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from laurel_rewrite import __version__
from laurel_rewrite.app.command_help import EPILOG
from laurel_rewrite.app.operator_options import USUAL, VARIANTS, OperatorCommand, complete_operator, given_options
from laurel_rewrite.app.options import (
    FAIL_IF,
    FORCE,
    FUNCTIONS,
    MAX_TIME,
    PAST,
    PRECISION,
    PROMPT,
    SET,
    SHAPE,
    SKIP_PASS,
    TARGET,
    THREADS,
    WITH_PAST,
    check_target,
    common,
    complete_model,
    operator_options,
    parse_shapes,
    profile_seconds,
    provider,
    was_given,
)  # fmt: skip
from laurel_rewrite.app.running import check_limits, console, only_for_onnx, print_json, start, stop_if_exceeded
from laurel_rewrite.errors import ConfigError, VerificationError
from laurel_rewrite.sources import is_onnx
from laurel_rewrite.targets import target as find_target

if TYPE_CHECKING:
    from laurel_rewrite.app.job import Report
    from laurel_rewrite.app.measuring import Measuring
    from laurel_rewrite.plan import LaurelConfig
    from laurel_rewrite.stages import Listener

_SITE_OPTIONS = ("variant", "include", "exclude")
_GRAPH_OPTIONS = ("weights", "inputs", "external_data", "verify", "emit_torch")


@click.command(cls=OperatorCommand, sections=EPILOG)
@click.argument("model", shell_complete=complete_model)
@click.option("--variant", default=USUAL, show_default=True, metavar="NAME", shell_complete=complete_operator, help=VARIANTS)
@click.option(
    "--operator-file", "operator_files", multiple=True, type=click.Path(path_type=Path), help="Python file that registers operators."
)
@operator_options()
@click.option("--include", multiple=True, metavar="PATTERN", help="Only sites whose id, owner, its class, kind, block or role matches.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="No sites whose id, owner, kind, block or role matches.")
@click.option("--plan", type=click.Path(path_type=Path), help="What each site gets, or rules for that: see --plan-out.")
@click.option("--plan-out", type=click.Path(path_type=Path), help="Write the plan to this file, and stop.")
@click.option("--dry-run", is_flag=True, help="Show the plan, and what other variants and ranks would add, and stop.")
@click.option(
    "--unsupported",
    type=click.Choice(["skip", "refuse"]),
    default="skip",
    show_default=True,
    help="What to do with sites whose source cannot be edited: leave them as they are and say so, or refuse the whole.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of the model's and LAuReL's start.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("laurel_out"), show_default=True, help="Folder for the results.")
@FORCE
@profile_seconds(10.0, "Time to measure latency at each shape; 0 for no profile.")
@SHAPE
@THREADS
@provider(None, "that of --target")
@PRECISION
@MAX_TIME
@click.option(
    "--allow-inference-graph", is_flag=True, help="model.pt2: take a program of evaluation mode, without what that export left out."
)
@WITH_PAST
@PROMPT
@PAST
@click.option("--train", is_flag=True, help="Measure training steps too, eager and compiled.")
@FAIL_IF
@FUNCTIONS
@TARGET
@SKIP_PASS
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
@SET
@common
@click.version_option(__version__, prog_name="laurel-rewrite")
@click.pass_context
def rewrite(context: click.Context, /, model: str, *, as_json: bool, quiet: bool, verbose: bool, **given: Any) -> None:
    """Replace the residual connections of MODEL by LAuReL: write a trainable model, verify it, export it to ONNX and profile it.

    Of an ONNX file it makes an ONNX file, verifies it against the first, and profiles both. An exported program (model.pt2) is written as PyTorch
    source first, which is then rewritten as any other.
    """
    start(verbose, as_json)
    _check(context, model, given)
    measured = check_limits(given["limits"])
    if given["profile_seconds"] == 0 and (measured or given["precision"] is not None):
        raise ConfigError(f"{'--fail-if' if measured else '--precision'} needs a profile, and --profile-seconds 0 leaves it out.")
    from laurel_rewrite.plan import LaurelConfig

    options = given_options(context, given, [given["variant"]])
    config = LaurelConfig(given["variant"], include=given["include"], exclude=given["exclude"], seed=given["seed"], **options)
    from laurel_rewrite.app import terminal
    from laurel_rewrite.app.progress import Stages

    listener = Stages(console(stderr=True), quiet=quiet)
    if given["dry_run"] or given["plan_out"] is not None:
        _plan_only(model, config, given, listener, as_json=as_json)
        return
    measuring = _measuring(given)
    if measured and (missing := measuring.missing(find_target(given["target"]))):
        raise ConfigError(f"--fail-if needs a profile. {missing}")
    try:
        report = _main_job(model, config, given, measuring, listener)
    except VerificationError as error:
        if len(error.args) > 1:
            failed = error.args[1]
            print_json(failed.to_dict()) if as_json else terminal.show_report(console(), failed)
        raise
    if as_json:
        print_json(report.to_dict())
    else:
        terminal.show_report(console(), report)
    stop_if_exceeded(given["limits"], report.profile, len(report.skipped))


def _check(context: click.Context, model: str, given: Mapping[str, Any]) -> None:
    """Raise ConfigError where options do not go together."""

    def said(*names: str) -> list[str]:
        return [name for name in names if was_given(context, name)]

    if given["plan"] is not None and (others := said(*_SITE_OPTIONS, *given_options(context, given, [given["variant"]]))):
        raise ConfigError(f"--plan says what each site gets, so --{others[0].replace('_', '-')} cannot be given with it. Edit the plan.")
    check_target(context, given)
    only_for_onnx(model, *said(*_GRAPH_OPTIONS))
    if said("allow_inference_graph") and not model.endswith(".pt2"):
        raise ConfigError("--allow-inference-graph is for exported programs (model.pt2).")
    if given["shapes"] and given["inputs"] is not None:
        raise ConfigError("--shape is for inputs that are drawn, and --inputs gives them.")
    for name in ("train", "with_past"):
        if said(name) and is_onnx(model):
            raise ConfigError(f"--{name.replace('_', '-')} is for models in PyTorch, and an ONNX file is none.")
    if not given["with_past"] and (lengths := said("prompt", "past")):
        raise ConfigError(f"--{lengths[0]} is for graphs with a past: give --with-past, too.")


def _plan_only(model: str, config: LaurelConfig, given: Mapping[str, Any], listener: Listener, *, as_json: bool) -> None:
    """Show the plan and what others would add, or write it."""
    from laurel_rewrite.app import job, terminal
    from laurel_rewrite.plan import check_plan_file
    from laurel_rewrite.sources.models import parse_settings

    plan, plan_out = given["plan"], given["plan_out"]
    if plan_out is not None:
        check_plan_file(plan_out)
    settings = parse_settings(given["settings"])
    report = job.plan_only(model, config, plan=plan, settings=settings, inputs=given["inputs"], listener=listener)
    others = job.configurations(report, config) if given["dry_run"] and plan is None else []
    if plan_out is not None:
        report.plan.write(plan_out, force=given["force"])
    if as_json:
        print_json(report.to_dict() | ({"configurations": others} if others else {}))
        return
    terminal.show_plan(console(), report)
    if others:
        terminal.show_configurations(console(), report.plan, others)
    if plan_out is not None:
        click.echo(f"Written to {plan_out}. Edit it, then: laurel-rewrite {model} --plan {plan_out}")


def _measuring(given: Mapping[str, Any]) -> Measuring:
    from laurel_rewrite.app.measuring import Measuring
    from laurel_rewrite.profiling.latency import Effort

    effort = Effort(given["profile_seconds"], precision=given["precision"], max_seconds=given["max_seconds"])
    return Measuring(effort, parse_shapes(given["shapes"]), given["threads"], given["provider"] or "")


def _main_job(model: str, config: LaurelConfig, given: Mapping[str, Any], measuring: Measuring, listener: Listener) -> Report:
    """Of a model, or of a graph in a file."""
    from laurel_rewrite.app import graph_job, job
    from laurel_rewrite.sources.models import parse_settings

    settings = parse_settings(given["settings"])
    shared = {name: given[name] for name in ("plan", "functions", "target", "skip", "force")}
    if is_onnx(model):
        own = {name: given[name] for name in _GRAPH_OPTIONS}
        return graph_job.run(job.graph_file(model, settings), config, given["out"], measuring=measuring, listener=listener, **shared, **own)
    own = {name: given[name] for name in ("train", "unsupported", "allow_inference_graph")}
    own["with_past"] = (given["prompt"], given["past"]) if given["with_past"] else None
    return job.run(model, config, given["out"], settings=settings, measuring=measuring, listener=listener, **shared, **own)
