"""Benchmark: a decoder as it is deployed, one graph with keys and values of earlier tokens: the prompt and each token after it, with LAuReL and without.

    python tools/bench_decoding.py [--seconds 60] [--threads 2] [--prompt 128] [--past 512]     # writes a dated table under tools/results/

The model is a GPT-2 small with random weights. Graphs are written by `export_onnx(past=True)` for onnxruntime's CPU, with LAuReL of trained
size; all run interleaved in random order, and the plain one twice, which says what the machine can tell apart. The goal for decoding with
rw+lr is a ratio of 1.01.
"""

from __future__ import annotations

import platform
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from laurel_rewrite.profiling import Profile, Row

HERE = Path(__file__).parent
VARIANTS = {"rw": {}, "rw+lr": {"rank": 16}}
GOAL = 1.01
NAMES = ["plain", *VARIANTS, "plain again"]
_SHOWN = 0.002  # of the plain latency, that an op must take more to be named


def graphs(folder: Path, layers: int, width: int) -> list[Path]:
    """The plain decoder and the rewritten ones, lowered."""
    import torch

    from laurel_rewrite import export_onnx, rewrite
    from laurel_rewrite.sources.models import build
    from laurel_rewrite.testing import moved

    torch.manual_seed(0)
    built = build("hf:gpt2", {"n_layer": layers, "n_embd": width})
    model, inputs = built.model.eval(), built.kwargs
    files = [export_onnx(model, (), inputs, folder / "plain.onnx", past=True)]
    for variant, options in VARIANTS.items():
        better = moved(rewrite(model, (), inputs, variant=variant, **options), 0.02)  # weights of GPT-2 are of this size
        files.append(export_onnx(better, (), inputs, folder / f"{variant}.onnx", past=True))
    return [*files, files[0]]


def line(phase: str, name: str, row: Row, plain: Row) -> str:
    """One line of the table: what it takes, and which ops and sites it is spent on."""
    time, ops, before = row.latency, row.ops.after, plain.ops.after
    added = ", ".join(f"{op} {ops[op] - before[op]:+d}" for op in sorted(ops | before) if ops[op] != before[op]) or "the same"
    now, then = row.attribution.by("op"), plain.attribution.by("op")
    spent = sorted(((now.get(op, 0.0) - then.get(op, 0.0), op) for op in now | then), reverse=True)
    where = ", ".join(f"{op} {ms:+.3f}" for ms, op in spent if abs(ms) >= _SHOWN * plain.latency.median_ms) or "-"
    sites = row.attribution.sites
    of_sites = f"{sum(site.ms for site in sites):+.3f} in {len(sites)} sites, {row.attribution.left_over_ms:+.3f} in none" if sites else "-"
    return (
        f"| {phase} | {name} | {time.median_ms:.3f} | {time.ratio:.3f} [{time.low:.3f}, {time.high:.3f}] | {time.verdict} "
        f"| {row.costs.flops / plain.costs.flops:.4f} | {row.memory.activation_bytes / plain.memory.activation_bytes:.3f} | {added} | {where} | {of_sites} |"
    )


def verdict(decoding: Profile) -> str:
    """Whether the goal is met, as far as the interval says."""
    time = decoding.rows[NAMES.index("rw+lr")].latency
    met = "met" if time.high <= GOAL else "missed" if time.low > GOAL else "open"
    return f"Goal of decoding with rw+lr, at most {GOAL} of the plain model: {met}, {time.ratio:.3f} [{time.low:.3f}, {time.high:.3f}]."


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--seconds", default=60.0, show_default=True, help="For the rounds of each phase.")
@click.option("--threads", default=2, show_default=True, help="Of a run.")
@click.option("--prompt", default=128, show_default=True, help="Tokens of the prefill.")
@click.option("--past", default=512, show_default=True, help="Tokens that one is decoded behind.")
@click.option("--layers", default=12, show_default=True, help="Of the decoder.")
@click.option("--width", default=768, show_default=True, help="Of its stream.")
@click.option("--out", type=click.Path(path_type=Path), help="The table's file; by default dated, under tools/results/.")
def main(seconds: float, threads: int, prompt: int, past: int, layers: int, width: int, out: Path | None) -> None:
    from laurel_rewrite import profile
    from laurel_rewrite.profiling import processor
    from laurel_rewrite.sources.built import declare_torchvision_ops

    declare_torchvision_ops()
    lines = [
        f"# Decoding with LAuReL in onnxruntime, {date.today()}",
        "",
        f"Python {platform.python_version()}, onnxruntime {version('onnxruntime')}, torch {version('torch')}; {processor()}, {threads} threads, no",
        f"spinning; batch 1, float32. GPT-2 of {layers} layers, {width} wide, one graph for both phases; rank {VARIANTS['rw+lr']['rank']}. Ratios are",
        f"medians over interleaved rounds, {seconds:.0f} s a phase, with 95 % intervals. Times by op and by site are from profiled runs, scaled to the",
        f"latency, in ms; ops that differ by {100 * _SHOWN:g} % of the plain latency or more.",
        "",
        "| phase | graph | ms | ratio | verdict | FLOPs | activations | ops against the plain graph's | where the time differs, ms | sites, ms |",
        "|---|---|---:|---|---|---:|---:|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        files = graphs(Path(scratch), layers, width)
        found = None
        for lengths in (
            {"prompt": prompt},
            {"past": past},
        ):  # one after the other: where the time goes is told of the first phase of a profile
            found = profile(files, names=NAMES, seconds=seconds, threads=threads, **lengths)
            for name, row in zip(NAMES, found.rows, strict=True):
                lines.append(line(found.phases[0], name, row, found.rows[0]))
                click.echo(lines[-1])
        assert found is not None
        lines += ["", verdict(found), *found.warnings]
        click.echo(verdict(found))
    (out or HERE / "results" / f"decoding-{date.today()}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
