"""Benchmark: what detection and the main job cost beside an older version, and what share of it each verification has.

    git worktree add ../older COMMIT && python tools/bench_versions.py ../older      # writes a dated table under tools/results/

Every run is a process of its own with one thread; the versions alternate. Times are of the processor, which other work on the machine
moves little: of the process and of those that it starts. A table holds medians over rounds and their ratios.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

HERE = Path(__file__).parent
LLAMA = [
    "num_hidden_layers=8",
    "hidden_size=64",
    "intermediate_size=128",
    "num_attention_heads=4",
    "num_key_value_heads=4",
    "vocab_size=999",
]
BERT = ["num_hidden_layers=8", "hidden_size=64", "intermediate_size=128", "num_attention_heads=4", "vocab_size=999"]
MODELS: dict[str, list[str]] = {
    "hf:gpt2": ["n_layer=8", "n_embd=64", "n_head=4", "vocab_size=999"],
    "hf:llama": LLAMA,
    "hf:bert": BERT,
    "hf:t5": ["num_layers=3", "d_model=64", "d_ff=128", "num_heads=4", "d_kv=16", "vocab_size=999"],
    "hf:cohere": LLAMA,
    "timm:vit_tiny_patch16_224": ["img_size=64"],
    "timm:swin_tiny_patch4_window7_224": ["depths=(2,2,2,2)", "embed_dim=48"],
    "timm:mobilenetv3_small_050": [],
    "torchvision:resnet50": [],
    str(HERE / "examples" / "gpt.py"): ["width=80", "heads=5"],
}
"""MODEL -> settings: the depth of real models, and widths at which torch's own work does not hide ours."""
STEPS = {
    "original and rewritten compared": [
        *(f"laurel_rewrite.backends.{home}:Proof.{name}" for home in ("proof", "module.proof") for name in ("__init__", "of")),
    ],
    "gradients": ["laurel_rewrite.verification.checks:check_gradients"],
    "the other mode rehearsed": ["laurel_rewrite.graph.capture:_Captor._rehearse"],
    "files compared in onnxruntime": ["laurel_rewrite.verification.export:check_export"],
    "exports": ["laurel_rewrite.exporting:Exporter.write"],
}
"""Steps of the main job, and the functions in which they are done."""


def either(name: str, older: str) -> Any:
    """A module by its name, or by the one that it had before the modules lay in packages."""
    try:
        return importlib.import_module(f"laurel_rewrite.{name}")
    except ModuleNotFoundError:
        return importlib.import_module(f"laurel_rewrite.{older}")


def seconds() -> float:
    """Processor time of this process and of those that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def measured(call: Callable[[], Any]) -> float:
    begin = seconds()
    call()
    return seconds() - begin


def watch(spent: Counter[str]) -> None:
    """Count the time of each step that this version has."""
    for step, places in STEPS.items():
        for place in places:
            module, _, path = place.partition(":")
            *outer, name = path.split(".")
            with contextlib.suppress(ImportError, AttributeError):
                holder = functools.reduce(getattr, outer, importlib.import_module(module))
                watched = _counted(getattr(holder, name), step, spent)
                setattr(holder, name, watched)
                for other in list(sys.modules.values()) if not outer else ():  # who has imported it by name
                    if getattr(other, "__name__", "").startswith("laurel_rewrite") and name in vars(other):
                        setattr(other, name, watched)


def _counted(function: Callable[..., Any], step: str, spent: Counter[str]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        begin = seconds()
        try:
            return function(*args, **kwargs)
        finally:
            spent[step] += seconds() - begin

    return call


def one(model: str) -> dict[str, Any]:
    """Detection and the main job of one model, in this process."""
    import torch

    from laurel_rewrite import detect

    cli, models = either("app.cli", "cli"), either("sources.models", "models")
    either("app.job", "job")  # which is watched
    torch.set_num_threads(1)
    warm = torch.nn.Linear(4, 4)
    with contextlib.suppress(Exception):
        detect(warm, (torch.randn(2, 4),))
    built = models.build(model, models.parse_settings(MODELS[model]))
    detection = measured(lambda: detect(built.model, built.args, built.kwargs))
    spent: Counter[str] = Counter()
    watch(spent)
    words = [word for setting in MODELS[model] for word in ("--set", setting)]

    def run() -> None:
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                cli.main([model, *words, "--variant", "rw+lr+pa", "--rank", "4", "--profile-seconds", "0", "--out", f"{out}/out"])
            except SystemExit as end:
                if end.code:
                    raise click.ClickException(f"the job ended with {end.code}") from end

    return {"detection": detection, "job": measured(run), "steps": spent}


def table(rows: dict[str, list[list[dict[str, Any]]]], old: str, rounds: int) -> str:
    """The table in Markdown: rows hold, by model, the runs of the older and of this version."""
    middle = {
        model: [{key: statistics.median(run[key] for run in runs) for key in ("detection", "job")} for runs in versions]
        for model, versions in rows.items()
    }
    ratios = {key: {model: new[key] / before[key] for model, (before, new) in middle.items()} for key in ("detection", "job")}
    lines = [
        f"# Detection and the main job beside an older version, {date.today()}",
        "",
        f"Older: {old}. Python {platform.python_version()}, torch {version('torch')}, onnxruntime {version('onnxruntime')}; one thread, {os.cpu_count()} "
        f"cores; medians of {rounds} rounds in which the versions alternate; seconds of the processor.",
        "The main job is `--variant rw+lr+pa --rank 4 --profile-seconds 0`: a profile, ten seconds by default, would be the same in both.",
        "",
        "| model | detection, older | now | ratio | main job, older | now | ratio |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for model, (before, new) in middle.items():
        cells = [f"{before[key]:.2f} | {new[key]:.2f} | {ratios[key][model]:.2f}" for key in ("detection", "job")]
        lines.append(f"| {Path(model).name} | {' | '.join(cells)} |")
    lines += ["", "| goal | | median ratio |", "|---|---|---:|"]
    for key, most in (("detection", 2.0), ("job", 1.3)):
        value = statistics.median(ratios[key].values())
        lines.append(f"| {key}: at most {most} times | {'met' if value <= most else 'MISSED'} | {value:.2f} |")
    lines += ["", "| step of the main job now | median share | largest |", "|---|---:|---:|"]
    for step in STEPS:
        shares = [statistics.median(run["steps"].get(step, 0) / run["job"] for run in versions[1]) for versions in rows.values()]
        lines.append(f"| {step} | {100 * statistics.median(shares):.1f} % | {100 * max(shares):.1f} % |")
    return "\n".join(lines) + "\n"


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("older", type=click.Path(exists=True, file_okay=False, path_type=Path), required=False)
@click.option("--model", "only", help="Measure one model in this process, and print it as JSON.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "results" / f"versions-{date.today()}.md")
def main(older: Path | None, only: str | None, rounds: int, out: Path) -> None:
    if only is not None:
        click.echo(json.dumps(one(only)))
        return
    if older is None:
        raise click.UsageError("Say where the older version is checked out.")
    commit = subprocess.run(
        ["git", "log", "-1", "--format=%h of %cs"], cwd=older, capture_output=True, text=True, check=True
    ).stdout.strip()
    rows: dict[str, list[list[dict[str, Any]]]] = {model: [[], []] for model in MODELS}
    for _ in range(rounds):
        for model, versions in rows.items():
            for checkout, runs in zip((older.resolve(), HERE.parent), versions, strict=True):
                environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
                begin = time.monotonic()
                command = [sys.executable, __file__, "--model", model]
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise click.ClickException(f"{model} in {checkout}: {done.stderr[-800:]}")
                runs.append(json.loads(done.stdout.splitlines()[-1]))
                click.echo(
                    f"{model} {checkout.name}: {runs[-1]['detection']:.1f} s, {runs[-1]['job']:.1f} s ({time.monotonic() - begin:.0f} s)",
                    err=True,
                )
        out.write_text(table(rows, commit, len(next(iter(rows.values()))[0])))
    click.echo(out.read_text())


if __name__ == "__main__":
    main()
