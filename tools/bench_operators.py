"""Benchmark: what each operator costs beside the plain model, in a training step and in onnxruntime.

    python tools/bench_operators.py [--model gpt2] [--operator hc ...] [--measure eager ...] [--seconds 15]

Some operators at a time stand beside the unchanged model; steps, and runs of the exported graphs, are interleaved in random order, and ratios
have 95 % intervals (`laurel_rewrite.profiling`); of one thread, its CPU time is measured. The unchanged model stands there once more as a
control. The parameters of operators are off their start. Results are kept in `tools/results/operators-cost.json`, so that a run goes on where
the last one stopped; `--again` measures anew. The table is `operators-cost.md`, beside it.
"""

from __future__ import annotations

import gc
import json
import math
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from laurel_rewrite.plan import Plan
    from laurel_rewrite.profiling.latency import Latency

RESULTS = Path(__file__).parent / "results"
_IMAGE, _LENGTH, _VOCABULARY = 224, 128, 1024
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("hf:gpt2", {"use_cache": False, "vocab_size": _VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}),
    "vit-small": ("timm:vit_small_patch16_224", {}),
    "resnet50": ("torchvision:resnet50", {}),
}
"""By name: the MODEL and its settings. GPT-2 small has a small vocabulary: what its head costs is the same with every operator."""
PUBLISHED = {
    "attnres --block-size 4": "under 1.04 in training, under 1.02 in inference",
    "muddformer": "1.004 in FLOPs",
    "rw+lr": "1.01 to 1.02 in inference",
}
"""What the papers say of an operator's cost."""
CHOICES: dict[str, dict[str, Any]] = {
    "attnres --block-size 4": {"block_size": 4},
    "denseformer --dilation 4 --period 5": {"dilation": 4, "period": 5},
}
"""Operators with other options than their defaults, by what the table calls them."""
CONTROL = "unchanged again"
MEASURES = ("eager", "onnxruntime", "compiled")
_TRIPLE = 3  # A backward pass reads and computes twice what the forward pass does.


@dataclass(frozen=True)
class Base:
    """The unchanged model, with an input for it."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def base_of(name: str) -> Base:
    from laurel_rewrite.sources.models import build

    torch.manual_seed(0)
    model = build(*MODELS[name]).model
    if name == "gpt2":
        return Base(model, (), {"input_ids": torch.randint(0, _VOCABULARY, (1, _LENGTH))})
    return Base(model, (torch.randn(1, 3, _IMAGE, _IMAGE),), {})


def rewritten(base: Base, operator: str) -> tuple[nn.Module | None, dict[str, Any]]:
    """The model with an operator, or none where it is refused; and what is known of it without a measurement."""
    from laurel_rewrite import detect, rewrite
    from laurel_rewrite.plan.fits import plan_of
    from laurel_rewrite.testing import moved

    if operator == CONTROL:
        return base.model, {"parameters": 0, "gigabytes": 0.0, "flops": 0.0}
    plan, reason = plan_of(detect(base.model, base.args, base.kwargs), operator.split()[0], **CHOICES.get(operator, {}))
    if plan is None:
        return None, {"refused": reason}
    model = moved(rewrite(base.model, base.args, base.kwargs, plan=plan, verify=False), 0.02)
    return model, {"parameters": plan.parameters(), "connections": len(plan.sites), **work(plan, base)}


def work(plan: Plan, base: Base) -> dict[str, float]:
    """What a forward pass moves in the operator's ops beyond the plain sums, GB in float32, and what it computes, over the plain model's FLOPs."""
    counts, elements, flops = plan.counts(), 0, 0
    for row in plan.sites:
        positions = math.prod(int(size) for size in row.shape) // row.dim
        elements += max(counts[row.id].moved - 3 * row.dim, 0) * positions
        flops += counts[row.id].flops * positions
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        base.model(*base.args, **base.kwargs)
    return {"gigabytes": 4e-9 * elements, "flops": flops / counter.get_total_flops()}


def bandwidth(megabytes: int = 64) -> float:
    """GB/s that one addition of two tensors reads and writes."""
    one, other = torch.rand(2, megabytes * 250_000)
    out, best = torch.empty_like(one), math.inf
    for _ in range(10):
        began = time.thread_time()
        torch.add(one, other, out=out)
        best = min(best, time.thread_time() - began)
    return 3 * megabytes * 1e-3 / best


def measured(what: str, base: Base, models: dict[str, nn.Module], seconds: float, cached: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """What one way of running says of each operator."""
    from laurel_rewrite import export_onnx
    from laurel_rewrite.profiling.latency import Effort, measure
    from laurel_rewrite.profiling.sessions import session_of, settings
    from laurel_rewrite.profiling.training import profile_training

    seconds *= len(models) + 1
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    if what == "onnxruntime":
        if not cached.exists():
            export_onnx(base.model.eval(), base.args, base.kwargs, cached, verify=False)
        with tempfile.TemporaryDirectory() as folder:
            paths = [cached, *(Path(folder) / f"{place}.onnx" for place in range(len(models)))]
            for model, path in zip(models.values(), paths[1:], strict=True):
                export_onnx(model.eval(), base.args, base.kwargs, path, verify=False)
            setting = settings(torch.get_num_threads())
            names = [one.name for one in session_of(cached, setting).get_inputs()]
            feeds = {name: value.numpy() for name, value in zip(names, (*base.args, *base.kwargs.values()), strict=True)}
            times, _ = measure(paths, setting, feeds, Effort(seconds), seed=0, clock=clock)
        for operator, latency in zip(models, times[1:], strict=True):
            yield operator, {**interval(latency), "plain_ms": times[0].median_ms}
        return
    found = profile_training({"plain": base.model, **models}, base.args, base.kwargs, seconds=seconds, modes=(what,), clock=clock)
    torch.compiler.reset()
    if found.notes:
        raise RuntimeError("; ".join(found.notes))
    for operator, step in zip(models, found.rows[1:], strict=True):
        yield (
            operator,
            {**interval(step.step), "saved": step.saved_bytes / found.rows[0].saved_bytes, "plain_ms": found.rows[0].step.median_ms},
        )


def interval(time: Latency) -> dict[str, float]:
    return {"ratio": time.ratio, "low": time.low, "high": time.high, "rounds": time.rounds}


def table(known: dict[str, Any]) -> str:
    """In Markdown."""
    lines = [
        "# What operators cost",
        "",
        "Ratios to the unchanged model with 95 % intervals; see `tools/bench_operators.py` for how they are measured. Saved is what autograd keeps "
        "for backward. A bound is what a run would take if the operator's ops, before they are lowered, did nothing but read and write their "
        "activations, each for itself, at the bandwidth of one addition, and multiply at the rate of the plain model; three passes for a training "
        "step. Products of small matrices are slower than that, and what is lowered, fused or stays in a cache is faster. - is not measured.",
        "",
        "GPT-2 small with 1,024 words, batch 1, 128 tokens; ViT-small and ResNet-50, batch 1, 224 x 224. float32.",
        "",
    ]
    for conditions in dict.fromkeys(row["conditions"] for row in known.values()):
        lines += [f"{conditions}.", ""]
    lines += [
        "| model | operator | training step, eager | bound | compiled | saved | onnxruntime | bound | parameters | published |",
        "|---|---|---|---:|---|---:|---|---:|---:|---|",
    ]
    for key, row in known.items():
        name, _, operator = key.partition(" ")
        if "refused" in row:
            lines.append(f"| {name} | {operator} | refused: {row['refused']} | | | | | | | |")
            continue
        eager, fast, served = (_shown(row.get(what)) for what in ("eager", "compiled", "onnxruntime"))
        training, running = (f"{_bound(row, *what):.3f}" if what[0] in row else "-" for what in (("eager", _TRIPLE), ("onnxruntime", 1)))
        saved = f"{row['eager']['saved']:.3f}" if "eager" in row else "-"
        lines.append(
            f"| {name} | {operator} | {eager} | {training} | {fast} | {saved} | {served} | {running} | {row['parameters']:,} | "
            f"{PUBLISHED.get(operator, '')} |"
        )
    return "\n".join(lines) + "\n"


def _bound(row: dict[str, Any], what: str, passes: int) -> float:
    moving = 1e3 * passes * row["gigabytes"] / row[what]["bandwidth"]
    return float(1 + moving / row[what]["plain_ms"] + row["flops"])


def _shown(found: dict[str, float] | None) -> str:
    return "-" if found is None else f"{found['ratio']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--model", "names", multiple=True, type=click.Choice([*MODELS]), default=[*MODELS], show_default=True)
@click.option("--operator", "operators", multiple=True, help="Some; by default all, and those of the table with options.")
@click.option("--measure", "measures", multiple=True, type=click.Choice(MEASURES), default=MEASURES[:2], show_default=True)
@click.option("--seconds", default=15.0, show_default=True, help="For each ratio.")
@click.option("--together", default=4, show_default=True, help="Operators that are measured at a time.")
@click.option("--threads", default=1, show_default=True, help="Of torch and onnxruntime.")
@click.option("--again", is_flag=True, help="Measure what is known, too.")
def main(
    names: tuple[str, ...], operators: tuple[str, ...], measures: tuple[str, ...], seconds: float, together: int, threads: int, again: bool
) -> None:
    from laurel_rewrite.operators import registry
    from laurel_rewrite.profiling import processor
    from laurel_rewrite.sources.built import declare_torchvision_ops

    declare_torchvision_ops()
    torch.set_num_threads(threads)
    torch._dynamo.config.recompile_limit = 64  # all models share one forward
    file = RESULTS / "operators-cost.json"
    known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    conditions = f"{date.today()}: Python {platform.python_version()}, torch {version('torch')}, onnxruntime {version('onnxruntime')}, {processor()}, {threads} thread(s)"

    def kept() -> None:
        file.write_text(json.dumps(known, indent=1) + "\n")
        (RESULTS / "operators-cost.md").write_text(table(known))

    with tempfile.TemporaryDirectory() as scratch:
        for what in measures:
            for name in names:
                base, wanted = None, [*(operators or (CONTROL, *registry.operators(), *CHOICES))]
                left = [one for one in wanted if again or not {what, "refused"} & known.get(f"{name} {one}", {}).keys()]
                for place in range(0, len(left), together):
                    base = base or base_of(name)
                    began, models = time.perf_counter(), {}
                    for operator in left[place : place + together]:
                        model, facts = rewritten(base, operator)
                        row = known.setdefault(f"{name} {operator}", {})
                        row |= {**facts, "conditions": conditions}
                        if model is not None:
                            models[operator] = model
                    rate = bandwidth()  # of the same minutes as the times that the bound stands beside
                    for operator, found in measured(what, base, models, seconds, Path(scratch) / f"{name}.onnx") if models else ():
                        known[f"{name} {operator}"][what] = {**found, "bandwidth": rate}
                        click.echo(f"{what} {name} {operator}: {_shown(found)}")
                    kept()
                    del model, models
                    gc.collect()  # modules and their optimisers are cycles, of a gigabyte each
                    click.echo(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
