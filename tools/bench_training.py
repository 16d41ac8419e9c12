"""Benchmark: a training step with LAuReL beside the model's own, beside one more layer, and beside what its FLOPs alone would cost.

    python tools/bench_training.py [--dim 256] [--layers 8] [--seconds 60]     # writes a dated table under tools/results/

A step is forward, loss, backward and AdamW on a small Llama. The steps of all models run interleaved in random order
(`laurel_rewrite.profiling.training`), eager and compiled, on a GPU where there is one. The bound is the FLOPs of the products of a step over
the baseline's; operations are those that an eager forward and backward pass runs, views aside. `--dim` and `--layers` may be given several
times; the default is what two CPU cores manage.
"""

from __future__ import annotations

import platform
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from laurel_rewrite.profiling.training import TrainingRow

HERE = Path(__file__).parent
VARIANTS = ("rw", "lr", "pa", "rw+lr", "rw+lr+pa")
AGAIN, MORE = "baseline again", "one more layer"
VOCABULARY = 2048


class Operations(TorchDispatchMode):
    """Counts what runs and is no view."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def models(variants: tuple[str, ...], dim: int, layers: int, rank: int, history: int, ids: torch.Tensor) -> dict[str, nn.Module]:
    """By name, the baseline first. LAuReL has weights of trained size: at its start a product with zeros might be cheaper."""
    from laurel_rewrite import rewrite
    from laurel_rewrite.sources.models import build
    from laurel_rewrite.testing import moved

    settings = {
        "num_hidden_layers": layers, "hidden_size": dim, "intermediate_size": dim * 8 // 3 // 16 * 16, "num_attention_heads": dim // 64,
        "num_key_value_heads": dim // 64, "vocab_size": VOCABULARY, "use_cache": False,
    }  # fmt: skip
    base = build("hf:llama", settings).model
    given: dict[str, Any] = {"input_ids": ids}
    found = {"baseline": base, AGAIN: base}
    for variant in variants:
        found[variant] = moved(rewrite(base, (), given, variant=variant, rank=rank, history=history, verify=False), 0.02)
    return {**found, MORE: build("hf:llama", {**settings, "num_hidden_layers": layers + 1}).model}


def work(model: nn.Module, ids: torch.Tensor) -> tuple[int, int]:
    """FLOPs of products, and operations, of a forward and a backward pass."""
    with FlopCounterMode(display=False) as flops, Operations() as operations:
        model(input_ids=ids).logits.square().mean().backward()
    model.zero_grad()
    return flops.get_total_flops(), operations.count


def line(row: TrainingRow, baseline: TrainingRow, place: str, bound: float, operations: int) -> str:
    step = row.step
    peak = f"{row.peak_bytes / baseline.peak_bytes:.3f}" if baseline.peak_bytes else "-"
    return (
        f"| {place} | {row.mode} | {row.name} | {step.median_ms:.1f} | {step.ratio:.3f} [{step.low:.3f}, {step.high:.3f}] | {step.verdict} | {bound:.3f} | "
        f"{row.saved_bytes / baseline.saved_bytes:.3f} | {peak} | {operations if row.mode == 'eager' else '-'} | {row.parameters / baseline.parameters:.3f} | {step.rounds} |"
    )


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--variant", "variants", multiple=True, default=VARIANTS, show_default=True)
@click.option("--dim", "dims", type=click.IntRange(64), multiple=True, default=(256,), show_default=True, help="Features D.")
@click.option(
    "--layers", "depths", type=click.IntRange(1), multiple=True, default=(8,), show_default=True, help="Layers, of two sites each."
)
@click.option("--rank", default=32, show_default=True)
@click.option("--history", default=3, show_default=True)
@click.option("--batch", default=8, show_default=True)
@click.option("--length", default=128, show_default=True, help="Tokens of a sequence.")
@click.option("--seconds", default=60.0, show_default=True, help="For the steps of one size and mode.")
@click.option("--threads", default=1, show_default=True, help="Of torch, on a CPU.")
@click.option("--out", type=click.Path(path_type=Path), help="The table's file; by default dated, under tools/results/.")
def main(
    variants: tuple[str, ...],
    dims: tuple[int, ...],
    depths: tuple[int, ...],
    rank: int,
    history: int,
    batch: int,
    length: int,
    seconds: float,
    threads: int,
    out: Path | None,
) -> None:
    from laurel_rewrite.profiling import processor
    from laurel_rewrite.profiling.training import profile_training
    from laurel_rewrite.sources.built import declare_torchvision_ops

    declare_torchvision_ops()
    torch.set_num_threads(threads)
    torch._dynamo.config.recompile_limit = 64  # all models share one forward
    alone = threads == 1 and not torch.cuda.is_available()
    lines = [
        f"# A training step with LAuReL, {date.today()}",
        "",
        f"Python {platform.python_version()}, torch {version('torch')}, transformers {version('transformers')}; {processor()}, {threads} thread(s)",
        f"of torch{', CPU time of that thread' if alone else ', elapsed time'}; Llama in float32, {VOCABULARY} words, batch {batch}, {length} tokens; rank {rank}, k = {history}.",
        f"Ratios are medians over interleaved rounds, {seconds:.0f} s a size and mode, with 95 % intervals. Saved is what autograd keeps for backward, peak what",
        "the device's allocator gave out; both, and the FLOPs and parameters, over the baseline's.",
        "",
        "| D, layers | mode | model | ms | ratio | verdict | FLOP bound | saved | peak | operations | parameters | rounds |",
        "|---|---|---|---:|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for dim in dims:
        for layers in depths:
            torch.manual_seed(0)
            ids = torch.randint(0, VOCABULARY, (batch, length))
            found = models(variants, dim, layers, rank, history, ids)
            costs = {name: work(model, ids) for name, model in found.items()}
            result = profile_training(
                found, (), {"input_ids": ids}, seconds=seconds, clock=time.thread_time if alone else time.perf_counter
            )
            for row in result.rows:
                baseline = next(one for one in result.rows if one.mode == row.mode)
                flops, operations = costs[row.name]
                lines.append(line(row, baseline, f"{dim}, {layers} on {result.device}", flops / costs["baseline"][0], operations))
                click.echo(lines[-1])
            lines += [f"\n{note}" for note in result.notes]
            torch.compiler.reset()
    (out or HERE / "results" / f"training-{date.today()}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
