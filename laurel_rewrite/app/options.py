"""Options that several commands have."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click
from click.shell_completion import CompletionItem

from laurel_rewrite.app.command_help import CONFIG, PRINT_CONFIG
from laurel_rewrite.app.config_file import FILE
from laurel_rewrite.app.operator_options import builtin_options
from laurel_rewrite.errors import ConfigError
from laurel_rewrite.sources import libraries
from laurel_rewrite.targets import DEFAULT, targets
from laurel_rewrite.targets import target as find_target


def seconds_of(context: click.Context, parameter: click.Parameter, value: float) -> float:
    if not 0 <= value < math.inf:  # nan is neither
        raise click.BadParameter("it must be a number of seconds, 0 or more.")
    return value


SET = click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="Argument of the factory, or field of the architecture's configuration."
)
FAIL_IF = click.option(
    "--fail-if",
    "limits",
    multiple=True,
    metavar="LIMIT",
    help="Exit with 1 where this holds for a profiled graph: 'latency_ratio > 1.05', or 'verdict == unresolved' for an interval too wide to say "
    "more. Also latency_low, latency_high, activation_ratio, resident_ratio, file_ratio, flops_ratio, fusions_lost, ..., and 'skipped > 0'.",
)


PRECISION = click.option(
    "--precision",
    type=float,
    metavar="FRACTION",
    help="Measure on until every interval reaches no farther from its ratio: 0.02 is 2 %. At most for --max-time.",
)
MAX_TIME = click.option(
    "--max-time",
    "max_seconds",
    default=120.0,
    show_default=True,
    metavar="SECONDS",
    help="With --precision: seconds to measure at most at each shape.",
)


def parse_shapes(words: Sequence[str]) -> dict[str, list[int]]:
    """ "batch=1,8" -> {"batch": [1, 8]}.

    Raises:
        ConfigError: a word of another form.
    """
    shapes: dict[str, list[int]] = {}
    for word in words:
        name, equals, sizes = word.partition("=")
        try:
            shapes[name] = [int(size) for size in sizes.split(",")]
        except ValueError as error:
            raise ConfigError(f"--shape takes NAME=SIZE[,SIZE...], for instance batch=1,8; not {word!r}.") from error
        if not name or not equals:
            raise ConfigError(f"--shape takes NAME=SIZE[,SIZE...], for instance batch=1,8; not {word!r}.")
    return shapes


def profile_seconds(default: float, words: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """How long onnxruntime is measured, of every command that does it."""
    return click.option("--profile-seconds", default=default, show_default=True, callback=seconds_of, metavar="SECONDS", help=words)


SHAPE = click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="NAME=SIZE[,SIZE...]",
    help="Measure at these sizes of an open dimension: batch=1,8. All combinations.",
)
THREADS = click.option(
    "--threads", type=click.IntRange(1), metavar="COUNT", help="Threads of a measured run.  [default: one a core, at most 4]"
)


def provider(default: str | None, usual: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Where it is measured; `usual` says in words where that is if nobody says."""
    return click.option(
        "--provider", default=default, metavar="NAME", help=f"Execution provider of onnxruntime to measure on.  [default: {usual}]"
    )


PROMPT = click.option(
    "--prompt", type=click.IntRange(1), metavar="TOKENS", help="Of decoders with a past: measure the prefill of a prompt of so many tokens."
)
PAST = click.option("--past", type=click.IntRange(1), metavar="TOKENS", help="Of the same: measure decoding, one token behind so many.")


_LOWERED = " or ".join(target.name for target in targets() if target.lowers)
_KEPT = " or ".join(target.name for target in targets() if target.keeps_functions)
_SKIPPABLE = dict.fromkeys(name for target in targets() for name in target.skippable)

WITH_PAST = click.option(
    "--with-past",
    is_flag=True,
    help="Write a causal decoder's graphs with keys and values of earlier tokens as inputs, and profile prefill and decoding apart.",
)
FUNCTIONS = click.option(
    "--onnx-functions",
    "functions",
    type=click.Choice(["keep", "inline"]),
    default="keep",
    show_default=True,
    help=f"With --target {_KEPT}: LAuReL as local functions, or as ordinary nodes.",
)
TARGET = click.option(
    "--target",
    type=click.Choice([target.name for target in targets()]),
    metavar="NAME",
    default=DEFAULT,
    show_default=True,
    help=f"LAuReL in ONNX: {'; '.join(f'{target.name}: {target.help}' for target in targets())}.",
)
SKIP_PASS = click.option(
    "--skip-pass",
    "skip",
    multiple=True,
    metavar="PASS",
    help=f"With --target {_LOWERED}: a pass to leave out: {', '.join(_SKIPPABLE)}.",
)


def check_target(context: click.Context, given: Mapping[str, Any]) -> None:
    """Raise ConfigError where options of an export do not go with its target."""
    made_for = find_target(given["target"])
    if was_given(context, "skip") and not made_for.lowers:
        raise ConfigError(f"--skip-pass is for --target {_LOWERED}.")
    if was_given(context, "functions") and not made_for.keeps_functions:
        raise ConfigError(f"--onnx-functions is for --target {_KEPT}.")


def was_given(context: click.Context, name: str) -> bool:
    """Whether a parameter stands on the command line."""
    return context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


FORCE = click.option(
    "--force",
    is_flag=True,
    help="Replace files in --out that are no earlier result, or were changed since, and another plan at --plan-out.",
)


def complete_model(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """What a shell offers for MODEL: files, and the libraries' prefixes."""
    prefixes = [CompletionItem(f"{name}:") for name in libraries() if name.startswith(incomplete)]
    return [CompletionItem(incomplete, type="file"), *prefixes]


def common(function: Any) -> Any:
    """Options that all commands take."""
    for option in (
        click.option("-v", "--verbose", is_flag=True, help="Log what happens to stderr."),
        click.option("-q", "--quiet", is_flag=True, help="Show no stages."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
        click.option(
            PRINT_CONFIG, is_flag=True, expose_value=False, help="Print the value of every option and where it is from, and stop."
        ),
        click.option(CONFIG, metavar="FILE", expose_value=False, help=f"File of options.  [default: {FILE}, where there is one]"),
    ):
        function = option(function)
    return function


def operator_options(*, several: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options of this package's operators; `several`: of several values each."""

    def added(function: Any) -> Callable[..., Any]:
        for option in reversed(builtin_options(several=several).values()):
            function.__click_params__.append(option)
        return function  # type: ignore[no-any-return]  # click decorates in place

    return added
