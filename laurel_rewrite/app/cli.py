"""The command. Only click is imported here at the start, so that `--help` answers at once."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from laurel_rewrite import __version__
from laurel_rewrite.app.command_help import EPILOG, Command
from laurel_rewrite.app.operator_options import OPERATORS, OperatorCommand, builtin_options, given_options
from laurel_rewrite.errors import CaptureError, ConfigError, LaurelError, LimitError, NoSiteError, VerificationError
from laurel_rewrite.targets import DEFAULT, targets
from laurel_rewrite.targets import target as find_target

if TYPE_CHECKING:
    from rich.console import Console

    from laurel_rewrite.profiling import Profile

_SITE_OPTIONS = ("variant", "include", "exclude")
_GRAPH_OPTIONS = ("weights", "inputs", "external_data", "verify", "emit_torch")

_LOWERED = " or ".join(target.name for target in targets() if target.lowers)
_KEPT = " or ".join(target.name for target in targets() if target.keeps_functions)
_SKIPPABLE = dict.fromkeys(name for target in targets() for name in target.skippable)

_SET = click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="Argument of the factory, or field of the architecture's configuration."
)
_FAIL_IF = click.option(
    "--fail-if",
    "limits",
    multiple=True,
    metavar="LIMIT",
    help="Exit with 1 where this holds for a profiled graph: 'latency_ratio > 1.05', or 'verdict == unresolved' for an interval too wide to say "
    "more. Also latency_low, latency_high, activation_ratio, resident_ratio, file_ratio, flops_ratio, fusions_lost, ..., and 'skipped > 0'.",
)


_PRECISION = click.option(
    "--precision",
    type=float,
    metavar="FRACTION",
    help="Measure on until every interval reaches no farther from its ratio: 0.02 is 2 %. At most for --max-time.",
)
_MAX_TIME = click.option(
    "--max-time", "max_seconds", default=120.0, show_default=True, help="With --precision: seconds to measure at most at each shape."
)


_FORCE = click.option(
    "--force",
    is_flag=True,
    help="Replace files in --out that are no earlier result, or were changed since, and another plan at --plan-out.",
)


def _seconds(context: click.Context, parameter: click.Parameter, value: float) -> float:
    if not 0 <= value < math.inf:  # nan is neither
        raise click.BadParameter("it must be a number of seconds, 0 or more.")
    return value


def _common(function: Any) -> Any:
    """Options that all commands take."""
    for option in (
        click.option("-v", "--verbose", is_flag=True, help="Log what happens to stderr."),
        click.option("-q", "--quiet", is_flag=True, help="Show no stages."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    ):
        function = option(function)
    return function


def _operator_options(function: Any) -> Any:
    for option in reversed(builtin_options().values()):
        function.__click_params__.append(option)
    return function


@click.command(cls=OperatorCommand, sections=EPILOG)
@click.argument("model")
@click.option("--variant", default="rw+lr", show_default=True, help=f"Operator: {', '.join(OPERATORS)}, or one of a plugin or file.")
@click.option(
    "--operator-file", "operator_files", multiple=True, type=click.Path(path_type=Path), help="Python file that registers operators."
)
@_operator_options
@click.option("--include", multiple=True, metavar="PATTERN", help="Only sites whose id, owner, kind, block or role (attention) matches.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="No sites whose id, owner, kind, block or role matches.")
@click.option("--plan", type=click.Path(path_type=Path), help="Carry out an edited plan.")
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
@_FORCE
@click.option("--profile-seconds", default=10.0, show_default=True, callback=_seconds, help="Time to measure latency; 0 for no profile.")
@_PRECISION
@_MAX_TIME
@click.option("--train", is_flag=True, help="Measure training steps too, eager and compiled.")
@_FAIL_IF
@click.option(
    "--onnx-functions",
    "functions",
    type=click.Choice(["keep", "inline"]),
    default="keep",
    show_default=True,
    help=f"With --target {_KEPT}: LAuReL as local functions, or as ordinary nodes.",
)
@click.option(
    "--target",
    type=click.Choice([target.name for target in targets()]),
    metavar="NAME",
    default=DEFAULT,
    show_default=True,
    help=f"LAuReL in ONNX: {'; '.join(f'{target.name}: {target.help}' for target in targets())}.",
)
@click.option(
    "--skip-pass",
    "skip",
    multiple=True,
    metavar="PASS",
    help=f"With --target {_LOWERED}: a pass to leave out: {', '.join(_SKIPPABLE)}.",
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
@_SET
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
    unsupported: str,
    seed: int,
    out: Path,
    profile_seconds: float,
    precision: float | None,
    max_seconds: float,
    train: bool,
    force: bool,
    limits: tuple[str, ...],
    functions: str,
    target: str,
    skip: tuple[str, ...],
    settings: tuple[str, ...],
    operator_files: tuple[Path, ...],
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Replace the residual connections of MODEL by LAuReL: write a trainable model, verify it, export it to ONNX and profile it.

    Of an ONNX file it makes an ONNX file, verifies it against the first, and profiles both.
    """
    _start(verbose, as_json)
    if plan is not None:
        given = [name for name in _SITE_OPTIONS if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE]
        given += given_options(context, options)
        if given:
            raise ConfigError(f"--plan says what each site gets, so --{given[0].replace('_', '-')} cannot be given with it. Edit the plan.")
    made_for = find_target(target)
    if skip and not made_for.lowers:
        raise ConfigError(f"--skip-pass is for --target {_LOWERED}.")
    if not made_for.keeps_functions and context.get_parameter_source("functions") is click.core.ParameterSource.COMMANDLINE:
        raise ConfigError(f"--onnx-functions is for --target {_KEPT}.")
    for_graphs = {name: options.pop(name) for name in _GRAPH_OPTIONS}
    given = [name for name in _GRAPH_OPTIONS if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE]
    _only_for_onnx(model, *given)
    if train and model.endswith(".onnx"):
        raise ConfigError("--train is for models in PyTorch, and an ONNX file is none.")
    measured = _check_limits(limits)
    if profile_seconds == 0 and (measured or precision is not None):
        raise ConfigError(f"{'--fail-if' if measured else '--precision'} needs a profile, and --profile-seconds 0 leaves it out.")
    from laurel_rewrite.plan import LaurelConfig, check_plan_file

    chosen = given_options(context, options)
    config = LaurelConfig(options["variant"], include=options["include"], exclude=options["exclude"], seed=seed, **chosen)
    from laurel_rewrite.app import job, terminal
    from laurel_rewrite.profiling.latency import Effort
    from laurel_rewrite.sources.models import parse_settings

    effort = Effort(profile_seconds, precision=precision, max_seconds=max_seconds)
    listener = terminal.Stages(_console(stderr=True), quiet=quiet)
    if dry_run or plan_out is not None:
        if plan_out is not None:
            check_plan_file(plan_out)
        report = job.plan_only(model, config, plan=plan, settings=parse_settings(settings), inputs=for_graphs["inputs"], listener=listener)
        others = job.configurations(report, config) if dry_run and plan is None else []
        if plan_out is not None:
            report.plan.write(plan_out, force=force)
        if as_json:
            _print_json(report.to_dict() | ({"configurations": others} if others else {}))
        else:
            terminal.show_plan(_console(), report)
            if others:
                terminal.show_configurations(_console(), others)
            if plan_out is not None:
                click.echo(f"Written to {plan_out}. Edit it, then: laurel-rewrite {model} --plan {plan_out}")
        return
    if measured and (missing := job.not_timed(made_for)):
        raise ConfigError(f"--fail-if needs a profile. {missing}")
    try:
        if model.endswith(".onnx"):
            from laurel_rewrite.app import graph_job

            report = graph_job.run(
                job.graph_file(model, parse_settings(settings)), config, out, plan=plan, functions=functions, target=target, skip=skip,
                effort=effort, force=force,
                listener=listener, **for_graphs,
            )  # fmt: skip
        else:
            report = job.run(
                model, config, out, plan=plan, settings=parse_settings(settings), functions=functions, target=target, skip=skip,
                effort=effort, train=train, force=force, unsupported=unsupported, listener=listener,
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
    _stop_if_exceeded(limits, report.profile, len(report.skipped))


def _only_for_onnx(model: str, *given: str) -> None:
    if any(given) and not model.endswith(".onnx"):
        raise ConfigError(f"--{given[0].replace('_', '-')} is for ONNX files, and {model} is none.")


@click.command(cls=Command)
@click.argument("model")
@click.option("--explain", "selector", metavar="SITE|LINE", help="Why an addition is, or is not, a site: an id, a module, or [FILE:]LINE.")
@click.option("--inputs", type=click.Path(path_type=Path), help="model.onnx: inputs (.npz) for sizes that cannot be inferred.")
@click.option("--graph", "drawing", type=click.Path(path_type=Path), metavar="FILE", help="Draw streams, sites and branches: .svg, .dot.")
@_SET
@_common
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
    _start(verbose, as_json)
    from laurel_rewrite.app import job, terminal
    from laurel_rewrite.detection.drawing import check_format, draw
    from laurel_rewrite.detection.explaining import explain
    from laurel_rewrite.sources.models import parse_settings

    if drawing is not None:
        check_format(drawing)
    _only_for_onnx(model, "inputs" if inputs is not None else "")
    listener = terminal.Stages(_console(stderr=True), quiet=quiet)
    with listener("detect"):
        found = job.find_sites(model, parse_settings(settings), inputs)
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


@click.command(cls=Command)
@click.argument("models", nargs=-1, required=True, metavar="BASELINE.onnx [OTHER.onnx ...]", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=Path("laurel_profile"), show_default=True, help="Folder for the report.")
@_FORCE
@click.option(
    "--min-time", "seconds", default=10.0, show_default=True, callback=_seconds, help="Seconds of interleaved rounds at each shape."
)
@click.option(
    "--shape", "shapes", multiple=True, metavar="NAME=SIZE[,SIZE...]", help="Sizes of an open dimension: batch=1,8. All combinations."
)
@click.option("--inputs", type=click.Path(path_type=Path), help="Inputs (.npz), instead of random ones.")
@_PRECISION
@_MAX_TIME
@click.option("--threads", type=click.IntRange(1), help="Threads of a run.  [default: as many as there are cores, at most 4]")
@click.option("--provider", default="CPU", show_default=True, help="Execution provider of onnxruntime.")
@click.option(
    "--one-more-layer/--no-one-more-layer", "control", default=True, show_default=True, help="The first model with one more layer, too."
)
@click.option("--self-check", is_flag=True, help="The first model against itself, too: it must be within noise.")
@click.option("--seed", default=0, show_default=True, help="Seed of inputs, order and intervals.")
@_FAIL_IF
@_common
def profile(
    models: tuple[Path, ...],
    out: Path,
    shapes: tuple[str, ...],
    inputs: Path | None,
    limits: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Measure ONNX files against the first: latency with intervals, memory, where the time goes, FLOPs, fusions. Writes report.html and
    report.json."""
    _start(verbose, as_json)
    _check_limits(limits)
    from laurel_rewrite.app import profile_job, terminal

    listener = terminal.Stages(_console(stderr=True), quiet=quiet)
    data, result = profile_job.run(models, out, shapes=profile_job.parse_shapes(shapes), inputs=inputs, listener=listener, **options)
    if as_json:
        _print_json(data)
    else:
        terminal.show_profile(_console(), result)
        click.echo(f"Written to {out}/: {', '.join(data['files'])}")
    _stop_if_exceeded(limits, result)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `laurel-rewrite`: the default action is `rewrite`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    word = given[0] if given and given[0] in COMMANDS else ""
    command, rest = (COMMANDS[word], given[1:]) if word else (rewrite, given)
    name = f"laurel-rewrite {word}".strip()
    try:
        command.main(rest or ["--help"], prog_name=name, standalone_mode=False)
        sys.stdout.flush()
    except (click.exceptions.Abort, KeyboardInterrupt):
        _stop("Interrupted.", 130)
    except click.ClickException as error:
        error.show()
        sys.exit(ConfigError.exit_code)
    except LaurelError as error:
        _stop(f"{'Nothing to do' if isinstance(error, NoSiteError) else 'Error'}: {error.args[0]}", error.exit_code)
    except SystemExit as error:  # our own are raised below: this one is a model's, or click's own for a reader that is gone
        if isinstance(error.__context__, BrokenPipeError):
            raise
        _stop(f"Error: the model's code ended the program with sys.exit({error.code!r}). Nothing was written.", CaptureError.exit_code)
    except BrokenPipeError:  # the reader has seen enough
        _drop_stdout()
        sys.exit(1)
    except OSError as error:
        if error.filename is not None or error.errno != errno.ENOSPC:
            _unexpected(error, rest)
        _drop_stdout()
        _stop(f"Error: the output cannot be printed: {error.strerror}.", ConfigError.exit_code)
    except Exception as error:  # the last net; a traceback would say as little to a user
        _unexpected(error, rest)
    except BaseException as error:  # which no code of ours raises
        _stop(f"Error: the model's code raised {type(error).__name__}: {error}. Nothing was written.", CaptureError.exit_code)


def _unexpected(error: Exception, arguments: Sequence[str]) -> None:
    if {"-v", "--verbose"} & set(arguments):
        traceback.print_exc()
    first = next(iter(str(error).strip().splitlines()), "")[:300]
    _stop(f"Internal error: {type(error).__name__}: {first}. Please report it, with the traceback that --verbose shows.", 70)


def _stop(message: str, code: int) -> None:
    with contextlib.suppress(OSError):  # standard error may be full or closed, too
        click.echo(message, err=True)
    sys.exit(code)


def _drop_stdout() -> None:
    """Let nothing be written at the end, which would fail once more."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


COMMANDS = {"sites": sites, "profile": profile}


def _check_limits(limits: Sequence[str]) -> bool:
    """Whether there are limits on what a profile says; ConfigError where one cannot be evaluated."""
    if not limits:
        return False
    from laurel_rewrite.profiling.limits import check_limit, needs_profile

    for limit in limits:
        check_limit(limit)
    return any(map(needs_profile, limits))


def _stop_if_exceeded(limits: Sequence[str], result: Profile | None, skipped: int = 0) -> None:
    from laurel_rewrite.profiling.limits import exceeded

    found = [line for limit in limits for line in exceeded(limit, result, skipped)]
    if found:
        raise LimitError("; ".join(found))


def _start(verbose: bool, as_json: bool) -> None:
    if as_json:  # what a model's code prints must not stand before the result
        context = click.get_current_context()
        context.obj = sys.stdout
        context.with_resource(contextlib.redirect_stdout(sys.stderr))
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, format="%(name)s: %(message)s", stream=sys.stderr)
    if not verbose:
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
    click.echo(json.dumps(data, indent=1, default=str), file=click.get_current_context().obj)
