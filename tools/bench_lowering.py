"""Benchmark: latency of LAuReL in onnxruntime, lowered and not, beside the plain residual and beside what its FLOPs alone would cost.

    python tools/bench_lowering.py [--seconds 60] [--threads 2] [MODEL ...]     # writes a dated table under tools/results/

All files of one model run interleaved in random order (`laurel_rewrite.profile`), with LAuReL parameters of trained size. "naive" is the
rewritten graph with LAuReL as functions, which onnxruntime inlines; "lowered" is `--target ort-cpu`. The bound is the FLOPs of the model
with LAuReL over those without.
"""

from __future__ import annotations

import math
import platform
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from laurel_rewrite.profiling import Row

HERE = Path(__file__).parent
SMALL_LLAMA = {
    "num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 12,
    "vocab_size": 16000,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "torchvision:resnet50": {},
    "timm:convnext_tiny": {},
    "timm:mobilenetv3_large_100": {},
    "timm:vit_small_patch16_224": {},
    "timm:swin_tiny_patch4_window7_224": {},
    "hf:gpt2": {},
    "hf:bert": {},
    "hf:llama": SMALL_LLAMA,
}
GRAPHS = [("rw", "lowered"), ("lr", "lowered"), ("rw+lr", "naive"), ("rw+lr", "lowered"), ("rw+lr+pa", "lowered")]
RANK = 16


def trained_like(model: ir.Model) -> None:
    """a and b in [0.5, 1.5], and matrices of trained size: at its start a runtime would delete what LAuReL adds."""
    generator = np.random.default_rng(0)
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if ".laurel_" not in f".{name}" or tensor is None:
            continue
        array = tensor.numpy()
        if name.endswith(".mix"):
            a = generator.uniform(0.5, 1.5)
            array = np.array([math.log(a / (2 - a)), 0.0])
        elif array.ndim > 1:
            array = generator.standard_normal(array.shape) * 0.5 / math.sqrt(max(array.shape[:2]))
        value.const_value = ir.tensor(array.astype(tensor.dtype.numpy()), name=name)


def measure(spec: str, seconds: float, threads: int) -> list[str]:
    from laurel_rewrite import export_onnx, profile, rewrite_onnx, write_onnx
    from laurel_rewrite.lowering import lower
    from laurel_rewrite.sources.models import build

    built = build(spec, MODELS.get(spec, {}))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = [export_onnx(built.model, built.args, built.kwargs, folder / "baseline.onnx")]
        for variant, kind in GRAPHS:
            model = rewrite_onnx(files[0], variant=variant, rank=RANK)
            trained_like(model)
            if kind == "lowered":
                lower(model)
            files.append(write_onnx(model, folder / f"{variant}-{kind}.onnx"))
        rows = profile(files, seconds=seconds, threads=threads).rows
    return [line(spec, variant, kind, row, rows[0]) for row, (variant, kind) in zip(rows, [("-", "baseline"), *GRAPHS], strict=True)]


def line(spec: str, variant: str, kind: str, row: Row, baseline: Row) -> str:
    """One line of the table. What the time more is spent on: ops whose sum differs by 0.5 % of the baseline's time or more."""
    found, base, time = row.ops.after, baseline.ops.after, row.latency
    more = ", ".join(f"{op} {found[op] - base[op]:+d}" for op in sorted(found | base) if found[op] != base[op]) or "the same"
    now, before = row.attribution.by("op"), baseline.attribution.by("op")
    spent = {op: now.get(op, 0.0) - before.get(op, 0.0) for op in now | before}
    where = ", ".join(
        f"{op} {ms:+.2f}" for op, ms in sorted(spent.items(), key=lambda i: -i[1]) if abs(ms) >= 0.005 * baseline.latency.median_ms
    )
    bound = row.costs.flops / baseline.costs.flops
    return (
        f"| {spec} | {variant} | {kind} | {time.median_ms:.2f} | {time.ratio:.3f} [{time.low:.3f}, {time.high:.3f}] | {time.verdict} "
        f"| {bound:.3f} | {found.total()} | {more} | {where or '-'} |"
    )


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("models", nargs=-1)
@click.option("--seconds", default=60.0, show_default=True, help="For the rounds of one model.")
@click.option("--threads", default=2, show_default=True, help="Of a run.")
@click.option("--out", type=click.Path(path_type=Path), help="The table's file; by default dated, under tools/results/.")
def main(models: tuple[str, ...], seconds: float, threads: int, out: Path | None) -> None:
    from laurel_rewrite.profiling import processor
    from laurel_rewrite.sources.built import declare_torchvision_ops

    declare_torchvision_ops()
    lines = [
        f"# Latency of LAuReL in onnxruntime, {date.today()}",
        "",
        f"Python {platform.python_version()}, onnxruntime {version('onnxruntime')}, torch {version('torch')}; {processor()}, {threads} threads, no",
        f"spinning; batch 1, sequence 128; rank {RANK}, a and b in [0.5, 1.5]. Ratios are medians over interleaved rounds, {seconds:.0f} s a model, with",
        "95 % intervals. Ops are those that onnxruntime runs after its own optimisation, against the baseline's; the times by op are from profiled",
        "runs, scaled to the latency. Lines are written as they are measured.",
        "",
        "| model | variant | graph | ms | ratio | verdict | FLOP bound | ops | against the baseline | where the time differs, ms |",
        "|---|---|---|---:|---|---|---:|---:|---|---|",
    ]
    for spec in models or MODELS:
        for row in measure(spec, seconds, threads):
            click.echo(row)
            lines.append(row)
    (out or HERE / "results" / f"lowering-{date.today()}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
