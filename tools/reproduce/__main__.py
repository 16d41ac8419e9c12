"""Does it help? The paper's table and its open questions, on data that every machine has.

    python -m tools.reproduce paper                    # on two cores within two hours; writes tools/results/reproduce/paper.md
    python -m tools.reproduce paper --scale gpu --minutes 25

A table is a comparison whose runs are kept, one small file each, in tools/results/reproduce/NAME/. Each is one model from one seed; those that
are there already are not made again, so that tables add up over days and machines of one kind. Stopped, the same command goes on.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import click

from laurel_rewrite.app.progress import Stages
from laurel_rewrite.app.running import console
from laurel_rewrite.files.checked import read_json
from laurel_rewrite.lab.candidates import UNCHANGED
from laurel_rewrite.lab.comparing import compare
from laurel_rewrite.lab.comparison import Comparison, Row
from laurel_rewrite.lab.folder import GRAPHS
from laurel_rewrite.lab.judging import ALIKE, BASELINE, BETTER, WORSE
from laurel_rewrite.stages import Listener
from tools.reproduce.tables import GPU_TABLES, TABLES, Table

RESULTS = Path(__file__).parents[1] / "results" / "reproduce"
SCALES = {"cpu": TABLES, "gpu": GPU_TABLES}
_OTHER_SEED = 1000


def rate_of(table: Table, folder: Path, seconds: float | None, listener: Listener) -> float | None:
    """The learning rate of everybody: of those tried the best for the unchanged model, from a seed that is not judged. None if time was over."""
    recipe = {**table.recipe, "tokens": table.recipe["tokens"] // 4}
    found = compare(
        table.model, settings=table.settings, variants=(), one_more_layer=False, seeds=[_OTHER_SEED], rates=table.rates, data=table.data, profile_seconds=0, inspect=0,
        out=folder / "rates", max_seconds=seconds, listener=listener, **recipe,
    )  # fmt: skip
    return found.best(UNCHANGED) if found.done else None


def made(table: Table, folder: Path, seeds: int, seconds: float | None, profile_seconds: float, listener: Listener) -> Comparison | None:
    """The comparison, as far as the time goes."""
    begun = time.monotonic()
    rate = rate_of(table, folder, seconds, listener)
    left = None if seconds is None else seconds - (time.monotonic() - begun)
    if rate is None or (left is not None and left <= 0):
        return None
    return compare(
        table.model, settings=table.settings, variants=(), candidates=table.candidates(), seeds=seeds, rates=rate, data=table.data,
        profile_seconds=profile_seconds, out=folder, max_seconds=left, listener=listener, **table.recipe,
    )  # fmt: skip


def written(table: Table, found: Comparison, folder: Path) -> str:
    """The table in Markdown, with its conditions."""
    about, rows = found.about, found.rows()
    runs = list(found.runs.values())
    seeds = max((row.judgement.seeds for row in rows), default=0)
    words = {verdict: [row.name for row in rows if row.judgement.verdict == verdict] for verdict in (BETTER, WORSE, ALIKE)}
    said = "; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in words.items() if names) or "nothing is judged yet"
    text = [
        f"# {table.question}", "", f"Against the unchanged model, {said}.", "",
        f"`{_model(table)}` ({found.sizes[UNCHANGED].parameters:,} parameters), {about['recipe']['tokens']:,} {about['task']['unit']} of "
        f"{about['data']['name']} (digest {about['data']['digest'][:16]}) a run, learning rate {found.rates[0]:g} for all, the best of "
        f"{', '.join(f'{rate:g}' for rate in table.rates)} for the unchanged model from another seed; {seeds} of {len(found.seeds)} seeds, "
        f"{len(runs)} of {len(found.planned())} runs; {'; '.join(sorted({run.where for run in runs}))}.",
        f"Recipe: {', '.join(f'{name} {value}' for name, value in about['recipe'].items() if value is not None)}.",
        f"Cut: {table.cut}.", *found.notes, "",
        "Loss on the third split, its difference to the unchanged model's paired by seed with the interval of 95 % over seeds (Student), the probability",
        "after Holm; needed: of the tokens, what the unchanged model needs for the same loss. Parameters, FLOPs and latency are ratios to it. What a training",
        f"step costs is in the benchmark of training: these runs were not interleaved.{_served(folder)}", "",
        "| model | loss | difference [95 %] | p | verdict | needed | parameters | FLOPs | latency [95 %] |",
        "|---|---:|---|---:|---|---:|---:|---:|---|", *(_line(row) for row in rows), "",
    ]  # fmt: skip
    return "\n".join(text)


def index(results: Path) -> str:
    """A list of the tables in a folder: what each asks, and what it says."""
    found = []
    for path in sorted(results.glob("*.md")):
        if path.name != "README.md":
            question, _, said, *_ = path.read_text().split("\n")
            found.append(f"* [{question.removeprefix('# ')}]({path.name}) {said}")
    return "\n".join(
        [
            "# Does it help?",
            "",
            "Tables made by `python -m tools.reproduce NAME`: small models, and few seeds, of which each table says how many.",
            "",
            *found,
            "",
        ]
    )


def _served(folder: Path) -> str:
    """The conditions of the latencies, in a sentence."""
    file = folder / GRAPHS
    kept = read_json(file, "The figures of graphs").values() if file.is_file() else ()
    entry = next((one["found"] for one in kept if one["found"]["figures"]), None)
    if entry is None:
        return ""
    about, inputs = entry["conditions"], ", ".join(f"{name} {shape}" for name, shape in entry["shapes"].items())
    return (
        f" Latency is that of the lowered graph in onnxruntime {about['onnxruntime']} ({about['cpu']}, {about['threads']} threads, {inputs}), the median of "
        "interleaved runs."
    )


def _model(table: Table) -> str:
    name = Path(table.model).name if table.model.endswith(".py") else table.model
    return " ".join([name, *(f"--set {key}={value}" for key, value in table.settings.items())])


def _line(row: Row) -> str:
    found = row.judgement
    interval = f"{found.difference:+.4f} [{found.low:+.4f}, {found.high:+.4f}]" if math.isfinite(found.low) else ""
    if found.verdict == BASELINE:
        interval = ""
    p = f"{found.corrected:.3f}" if math.isfinite(found.corrected) else ""
    ratios = " | ".join(f"{ratio:.3f}" for ratio in (row.parameters, row.flops))
    latency = "" if row.size.latency is None else "{:.3f} [{:.3f}, {:.3f}]".format(*row.size.latency)
    loss = f"{found.mean:.4f} ± {found.spread:.4f}" if math.isfinite(found.mean) else ""
    return f"| {row.name} | {loss} | {interval} | {p} | {found.verdict} | {row.needed} | {ratios} | {latency} |"


@click.command()
@click.argument("name", type=click.Choice(sorted(TABLES)))
@click.option("--scale", type=click.Choice(sorted(SCALES)), default="cpu", show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--minutes", type=float, help="After which no run begins; the same command goes on later.")
@click.option("--profile-seconds", default=5.0, show_default=True, help="To measure the latency of each graph; 0 for none.")
@click.option(
    "--results", default=RESULTS, type=click.Path(path_type=Path), help="Folder of the tables.  [default: tools/results/reproduce]"
)
def main(name: str, scale: str, seeds: int, minutes: float | None, profile_seconds: float, results: Path) -> None:
    """Make the table NAME, or more of it."""
    if name not in SCALES[scale]:
        raise click.UsageError(f"{name} has no scale {scale!r}: {', '.join(SCALES[scale])} have.")
    table, folder = SCALES[scale][name], results / (name if scale == "cpu" else f"{name}-{scale}")
    seconds = None if minutes is None else 60 * minutes
    found = made(table, folder, seeds, seconds, profile_seconds, Stages(console(stderr=True), quiet=False))
    if found is None:
        click.echo("The time is over, and no learning rate is chosen yet; the same command goes on.")
        return
    text = written(table, found, folder)
    folder.with_suffix(".md").write_text(text)
    (results / "README.md").write_text(index(results))
    click.echo(text)


if __name__ == "__main__":
    main()
