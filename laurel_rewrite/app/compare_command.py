"""`laurel-rewrite compare MODEL`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from laurel_rewrite.app.operator_options import OPERATORS, USUAL, OperatorCommand, Several, complete_operator, given_options
from laurel_rewrite.app.options import FORCE, SET, common, complete_model, operator_options, profile_seconds, seconds_of
from laurel_rewrite.app.running import console, first_process, print_json, start
from laurel_rewrite.errors import ConfigError, LimitError

_UNITS = {"": 1, "k": 1_000, "m": 1_000_000, "g": 1_000_000_000, "b": 1_000_000_000}
_PASSED = (
    "tokens", "seeds", "rates", "data", "tokenizer", "include", "exclude", "one_more_layer", "self_check", "profile_seconds", "inspect", "max_seconds",
    "out", "force",
)  # fmt: skip
_RECIPE = ("batch", "length", "accumulate", "precision", "compile", "weight_decay", "warmup", "evaluations")


class _Count(click.ParamType[int]):
    """A whole number, such as 20M."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgb]?)", str(value).strip().lower().replace("_", "").replace(",", ""))
        if found is None:
            self.fail(f"{value!r} is no number such as 200000, 200k or 20M.", param, ctx)
        return round(float(found[1]) * _UNITS[found[2]])


def _rates(context: click.Context, parameter: click.Parameter, value: tuple[list[float], ...]) -> tuple[float, ...]:
    return tuple(rate for rates in value for rate in rates)


@click.command(cls=OperatorCommand, several=True, short_help="does it help? train MODEL with and without, and judge")
@click.argument("model", shell_complete=complete_model)
@click.option(
    "--variant",
    "variants",
    multiple=True,
    shell_complete=complete_operator,
    metavar="NAME",
    help=f"Operator; several times for several: {', '.join(OPERATORS)}, or others.  [default: {USUAL}; with --search LAuReL's]",
)
@click.option(
    "--operator-file", "operator_files", multiple=True, type=click.Path(path_type=Path), help="Python file that registers operators."
)
@operator_options(several=True)
@click.option("--plan", "plans", multiple=True, type=click.Path(path_type=Path), help="A model of this plan, too; its name is the file's.")
@click.option("--tokens", type=_Count(), required=True, metavar="COUNT", help="To train each model on, 200k or 20M; of images, how many.")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Trainings of each model. With one, nothing is judged.")
@click.option(
    "--lr", "rates", type=Several(float), multiple=True, default=("1e-3",), show_default=True, callback=_rates, metavar="RATE[,RATE...]",
    help="Learning rates. Of several, each model is judged at its own best, by the loss on the second split.",
)  # fmt: skip
@click.option(
    "--data", default="builtin", show_default=True, metavar="DATA",
    help="builtin (sources of Python packages; for images scikit-learn's digits), builtin:shapes, a file or folder of text, or datasets:NAME.",
)  # fmt: skip
@click.option("--tokenizer", type=click.Path(path_type=Path), help="File of tokenizers.  [default: bytes]")
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True, help="Examples of a step, over all processes.")
@click.option("--length", type=click.IntRange(2), help="Tokens of an example.  [default: as in the model's example inputs]")
@click.option("--accumulate", type=click.IntRange(1), default=1, show_default=True, help="Parts that a batch is computed in.")
@click.option("--precision", type=click.Choice(["no", "bf16", "fp16"]), default="no", show_default=True, help="Mixed precision.")
@click.option("--compile", is_flag=True, help="Compile the models.")
@click.option("--weight-decay", default=0.1, show_default=True, help="Of matrices.")
@click.option("--warmup", type=click.FloatRange(0, 1), default=0.05, show_default=True, help="Share of the steps.")
@click.option("--evaluations", type=click.IntRange(1), default=16, show_default=True, help="Points of a curve.")
@click.option("--include", multiple=True, metavar="PATTERN", help="Only sites whose id, owner, its class, kind, block or role matches.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="No sites whose id, owner, kind, block or role matches.")
@click.option(
    "--one-more-layer/--no-one-more-layer",
    "one_more_layer",
    default=True,
    show_default=True,
    help="Train the model with one more layer, too.",
)
@click.option("--self-check", is_flag=True, help="The unchanged model against itself, from another start: they must not be told apart.")
@profile_seconds(2.0, "Time to measure each graph's latency in onnxruntime; 0 for none.")
@click.option(
    "--inspect", type=int, default=4, show_default=True, help="Batches to look inside the trained models with, for the report; 0 for none."
)
@click.option(
    "--search",
    is_flag=True,
    help="Search variants (all, or those given), ranks (4 to 32, or those given) and places, compare the best alone, and write plan.toml.",
)
@click.option(
    "--budget", "budgets", multiple=True, metavar="LIMIT",
    help="Of a search: 'latency_ratio <= 1.02', judged by its interval's upper end, 'parameters <= 1%' more, or another figure of --fail-if.",
)  # fmt: skip
@click.option("--trials", type=click.IntRange(1), default=24, show_default=True, help="Of a search: models to train, most not to the end.")
@click.option(
    "--max-time",
    "max_seconds",
    type=float,
    callback=lambda c, p, v: None if v is None else seconds_of(c, p, v),
    help="Seconds after which no run begins; the same command goes on later.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("laurel_comparison"), show_default=True, help="Folder; an earlier one goes on."
)
@FORCE
@SET
@common
@click.pass_context
def compare(context: click.Context, /, model: str, *, as_json: bool, quiet: bool, verbose: bool, **given: Any) -> None:
    """Does it help? Train MODEL unchanged, with one more layer and with operators, from the same seeds on the same batches, and judge.

    Under `accelerate launch -m laurel_rewrite compare ...` it trains on several processes or GPUs. Stopped, the same command goes on.
    """
    start(verbose, as_json)
    from laurel_rewrite.app import lab_tables
    from laurel_rewrite.app.progress import Stages
    from laurel_rewrite.lab.candidates import Candidate
    from laurel_rewrite.lab.comparing import compare as train
    from laurel_rewrite.lab.folder import PLAN
    from laurel_rewrite.sources import is_graph
    from laurel_rewrite.sources.models import parse_settings

    if is_graph(model):
        raise ConfigError(f"{model} is a graph, and only models in PyTorch are trained.")
    if given["budgets"] and not given["search"]:
        raise ConfigError("--budget is for a --search.")
    searched = [name for name, operator in OPERATORS.items() if operator["family"] == "laurel"]
    usual = searched if given["search"] else () if given["plans"] else (USUAL,)
    variants = given["variants"] or tuple(usual)
    options = given_options(context, given, variants)
    found = train(
        model, variants=variants, candidates=[Candidate.of_plan(path) for path in given["plans"]],
        settings=parse_settings(given["settings"]), search=given["trials"] if given["search"] else None, budget=given["budgets"],
        listener=Stages(console(stderr=True), quiet=quiet or not first_process()), **{name: given[name] for name in (*_RECIPE, *_PASSED)}, **options,
    )  # fmt: skip
    if as_json and first_process():
        print_json(found.to_dict())
    elif first_process():
        lab_tables.show_comparison(console(), found)
        plan = f", {PLAN}" if found.chosen is not None else ""
        click.echo(f"Written to {given['out']}/: report.html, report.json{plan}" + ("" if found.done else "; the same command goes on"))
    if found.search is not None and found.search.done and not found.search.finalists:
        raise LimitError(found.search.failure)
