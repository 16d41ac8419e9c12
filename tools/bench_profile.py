"""Benchmark of the profiler itself: is a model against its own copy 1.00, is a small slowdown seen, is memory the same each time?

    python tools/bench_profile.py [--seconds 10] [--runs 20]      # writes a dated table under tools/results/

The slowdown is planted: ResNet-50 with some more FLOPs, in residual connections that get low-rank maps.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path

import click

HERE = Path(__file__).parent
PLANTED = ("layer3.*",)


def cases(folder: Path) -> Iterator[tuple[str, Path]]:
    """A vision model of 30 ms and a language model of 10 ms a run, roughly."""
    from laurel_rewrite import export_onnx
    from laurel_rewrite.sources.built import declare_torchvision_ops
    from laurel_rewrite.sources.models import build

    declare_torchvision_ops()
    for name, spec, settings in (
        ("ResNet-50", "torchvision:resnet50", {}),
        ("GPT-2, 2 layers", "hf:gpt2", {"n_layer": 2, "vocab_size": 1000}),
    ):
        built = build(spec, settings)
        yield name, export_onnx(built.model, built.args, built.kwargs, folder / f"{spec.split(':')[1]}.onnx")


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--seconds", default=10.0, show_default=True, help="Of each profile.")
@click.option("--runs", default=20, show_default=True, help="Profiles of each pair.")
@click.option("--out", type=click.Path(path_type=Path), help="The table's file; by default dated, under tools/results/.")
def main(seconds: float, runs: int, out: Path | None) -> None:
    from bench_lowering import trained_like

    from laurel_rewrite import profile, rewrite_onnx, write_onnx
    from laurel_rewrite.detection.detecting import detect
    from laurel_rewrite.lowering import lower
    from laurel_rewrite.plan import LaurelConfig, Plan
    from laurel_rewrite.profiling import processor

    lines = [
        f"# The profiler against itself, {date.today()}",
        "",
        f"Python {platform.python_version()}, onnxruntime {version('onnxruntime')}; {processor()}, 2 threads; {runs} profiles of {seconds:.0f} s each, one after",
        "another. A pair of equal models should be within noise in 19 of 20; memory is that of the first model in all profiles.",
        "",
        "| pair | ratios, smallest to largest | widest interval | faster | within noise | slower | activations, bytes | resident peak, MiB |",
        "|---|---|---:|---:|---:|---:|---|---|",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pairs = []
        for name, path in cases(folder):
            pairs.append((f"{name} and itself", path, path))
            if name == "ResNet-50":
                plan = Plan.from_sites(detect(path), LaurelConfig(variant="lr", rank=16, include=PLANTED))
                model = rewrite_onnx(path, plan=plan)
                trained_like(model)
                lower(model)
                pairs.append(
                    (
                        f"{name} and the same with low-rank maps in {len(plan.sites)} of 16 sites",
                        path,
                        write_onnx(model, folder / "planted.onnx"),
                    )
                )
        for name, first, second in pairs:
            results = [profile([first, second], seconds=seconds, threads=2, seed=seed).rows for seed in range(runs)]
            times = [rows[1].latency for rows in results]
            verdicts = [sum(time.verdict == verdict for time in times) for verdict in ("faster", "within noise", "slower")]
            ratios = sorted(time.ratio for time in times)
            activations = sorted({rows[0].memory.activation_bytes for rows in results})
            resident = [rows[0].resident_bytes / (1 << 20) for rows in results]
            lines.append(
                f"| {name} | {ratios[0]:.3f} to {ratios[-1]:.3f} | {max(time.high - time.low for time in times):.3f} | "
                f"{' | '.join(map(str, verdicts))} | {', '.join(f'{n:,}' for n in activations)} | {min(resident):.1f} to {max(resident):.1f} |"
            )
            click.echo(lines[-1])
    (out or HERE / "results" / f"profile-{date.today()}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
