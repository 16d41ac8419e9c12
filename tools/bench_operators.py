"""Benchmark: what each operator costs beside the plain model, in a training step and in onnxruntime.

    python tools/bench_operators.py [--model gpt2] [--operator hc ...] [--compile] [--seconds 20]

One operator after another stands beside the unchanged model, and that once more as a control: steps, and runs of the exported graphs, are
interleaved in random order, and ratios have 95 % intervals (`laurel_rewrite.profiling`). The parameters of operators are off their start.
Results are kept in `tools/results/operators-cost.json`, so that a run goes on where the last one stopped; `--again` measures anew. The table is
`operators-cost.md`, beside it.
"""

from __future__ import annotations

import json
import platform
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch

RESULTS = Path(__file__).parent / "results"
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gpt2": ("hf:gpt2", {"use_cache": False}, {"batch": 1, "length": 128}),
    "vit-small": ("timm:vit_small_patch16_224", {}, {"batch": 2}),
    "resnet50": ("torchvision:resnet50", {}, {"batch": 2}),
}
"""By name: the MODEL, its settings, and the inputs that it is measured with."""
PUBLISHED = {
    "attnres --block-size 4": "under 4 % in training, under 2 % in inference, in blocks",
    "muddformer": "0.4 % of the computation",
}
"""What the papers say of an operator's cost."""
CHOICES: dict[str, dict[str, Any]] = {
    "attnres --block-size 4": {"block_size": 4},
    "denseformer --dilation 4 --period 5": {"dilation": 4, "period": 5},
}
"""Operators with other options than their defaults, by what the table calls them."""
CONTROL = "unchanged again"


def inputs_of(name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Args and kwargs of a forward."""
    sizes = MODELS[name][2]
    if name == "gpt2":
        return (), {"input_ids": torch.randint(0, 50257, (sizes["batch"], sizes["length"]))}
    return (torch.randn(sizes["batch"], 3, 224, 224),), {}


def measured(name: str, operator: str, *, seconds: float, compiled: bool) -> dict[str, Any]:
    """One line of the table."""
    from laurel_rewrite import detect, export_onnx, profile, rewrite
    from laurel_rewrite.plan.fits import plan_of
    from laurel_rewrite.profiling.training import profile_training
    from laurel_rewrite.sources.models import build
    from laurel_rewrite.testing import moved

    torch.manual_seed(0)
    spec, settings, _ = MODELS[name]
    base = build(spec, settings).model
    args, kwargs = inputs_of(name)
    sites = detect(base, args, kwargs)
    plan, reason = (None, "") if operator == CONTROL else plan_of(sites, operator.split()[0], **CHOICES.get(operator, {}))
    if plan is None and operator != CONTROL:
        return {"refused": reason}
    other = base if plan is None else moved(rewrite(base, args, kwargs, plan=plan, verify=False), 0.02)
    found: dict[str, Any] = {"parameters": plan.parameters() if plan else 0}
    if plan is not None:
        counts = plan.counts().values()
        found |= {"state": max(one.state for one in counts), "moved": sum(one.moved for one in counts)}
    for mode in ("eager", "compiled") if compiled else ("eager",):
        result = profile_training({"baseline": base, operator: other}, args, kwargs, seconds=seconds, modes=(mode,))
        step = result.rows[-1].step
        found[mode] = {
            "ratio": step.ratio,
            "low": step.low,
            "high": step.high,
            "saved": result.rows[-1].saved_bytes / result.rows[0].saved_bytes,
        }
        torch.compiler.reset()
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{place}.onnx" for place in ("baseline", "other")]
        for model, path in zip((base, other), paths, strict=True):
            export_onnx(model.eval(), args, kwargs, path)
        latency = profile(paths, seconds=seconds).rows[-1].latency
        found["onnxruntime"] = {"ratio": latency.ratio, "low": latency.low, "high": latency.high}
    return found


def table(known: dict[str, Any]) -> str:
    """In Markdown."""
    lines = [
        "# What operators cost",
        "",
        "Ratios to the unchanged model with 95 % intervals; see `tools/bench_operators.py` for how they are measured. Saved is what autograd keeps for "
        "backward. A cell of another day was measured on another day: each line has its own unchanged model beside it.",
        "",
        "| model | operator | training step, eager | compiled | saved | onnxruntime | parameters | published | date |",
        "|---|---|---|---|---:|---|---:|---|---|",
    ]
    for key, row in known.items():
        name, _, operator = key.partition(" ")
        if "refused" in row:
            lines.append(f"| {name} | {operator} | refused: {row['refused']} | | | | | | {row['date']} |")
            continue
        eager, fast, served = (_interval(row.get(what)) for what in ("eager", "compiled", "onnxruntime"))
        published = PUBLISHED.get(operator, "")
        lines.append(
            f"| {name} | {operator} | {eager} | {fast} | {row['eager']['saved']:.3f} | {served} | {row['parameters']:,} | {published} | {row['date']} |"
        )
    return "\n".join(lines) + "\n"


def _interval(found: dict[str, float] | None) -> str:
    return "-" if found is None else f"{found['ratio']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--model", "names", multiple=True, type=click.Choice([*MODELS]), default=[*MODELS], show_default=True)
@click.option("--operator", "operators", multiple=True, help="Some; by default all, and those of the table with options.")
@click.option("--compile", "compiled", is_flag=True, help="Compiled training steps, too.")
@click.option("--seconds", default=20.0, show_default=True, help="For each ratio.")
@click.option("--threads", default=1, show_default=True, help="Of torch.")
@click.option("--again", is_flag=True, help="Measure what is known, too.")
def main(names: tuple[str, ...], operators: tuple[str, ...], compiled: bool, seconds: float, threads: int, again: bool) -> None:
    from laurel_rewrite.operators import registry
    from laurel_rewrite.profiling import processor
    from laurel_rewrite.sources.built import declare_torchvision_ops

    declare_torchvision_ops()
    torch.set_num_threads(threads)
    file = RESULTS / "operators-cost.json"
    known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for name in names:
        for operator in operators or (CONTROL, *registry.operators(), *CHOICES):
            key = f"{name} {operator}"
            if key in known and not again:
                continue
            began = time.perf_counter()
            row = measured(name, operator, seconds=seconds, compiled=compiled)
            conditions = f"Python {platform.python_version()}, torch {version('torch')}, onnxruntime {version('onnxruntime')}, {processor()}, {threads} thread(s)"
            known[key] = {**row, "seconds": seconds, "conditions": conditions, "date": str(date.today())}
            file.write_text(json.dumps(known, indent=1) + "\n")
            (RESULTS / "operators-cost.md").write_text(table(known))
            click.echo(f"{key}: {json.dumps(row)[:200]} in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
