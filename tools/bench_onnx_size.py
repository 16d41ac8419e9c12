"""Benchmark: time and memory to rewrite an ONNX file with 20 GB of external weights.

    python tools/bench_onnx_size.py [--gigabytes 20] [--folder DIR]     # writes a dated table under tools/results/

The model is a decoder of plain ONNX operators; its weights are one sparse file of zeros, which takes no space on most file systems. Each
case is the command in a process of its own, several times. Memory is that process's peak resident set (`ru_maxrss`), Python, torch and
the onnx packages included. The copy's case writes the 20 GB, and depends on the disk.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

import click
import onnx_ir as ir

from laurel_rewrite.profiling import processor

HERE = Path(__file__).parent
WIDTH, TOKENS = 8192, 128
SECONDS, MEGABYTES = 30, 1000
"""The goal."""
_RUN = """
import json, resource, sys, time
from laurel_rewrite.app import cli
begin = time.perf_counter()
try:
    cli.main(sys.argv[1:])
    status = 0
except SystemExit as stop:
    status = int(stop.code or 0)
print(json.dumps({"status": status, "seconds": time.perf_counter() - begin, "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000}))
"""


def decoder(folder: Path, gigabytes: float) -> tuple[Path, int]:
    """A model of pre-norm blocks, x + attention(norm(x)) and x + mlp(norm(x)), float16; its path and its number of blocks."""
    blocks = math.ceil(gigabytes * 1e9 / (2 * 12 * WIDTH * WIDTH))
    weights = folder / "weights.bin"
    initializers: list[ir.Value] = []
    offset = 0

    def weight(name: str, *shape: int) -> ir.Value:
        nonlocal offset
        size = 2 * math.prod(shape)
        tensor = ir.ExternalTensor(weights.name, offset, size, ir.DataType.FLOAT16, shape=ir.Shape(shape), name=name, base_dir=folder)
        offset += size
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT16), const_value=tensor)
        initializers.append(value)
        return value

    tape = ir.tape.Tape()
    x = inputs = ir.Value(name="x", shape=ir.Shape(["batch", TOKENS, WIDTH]), type=ir.TensorType(ir.DataType.FLOAT16))
    for block in range(blocks):
        n = tape.op("LayerNormalization", [x, weight(f"{block}.norm1", WIDTH)], {"axis": -1})
        q, k, v = (tape.op("MatMul", [n, weight(f"{block}.{name}", WIDTH, WIDTH)]) for name in "qkv")
        scores = tape.op("Softmax", [tape.op("MatMul", [q, tape.op("Transpose", [k], {"perm": [0, 2, 1]})])], {"axis": -1})
        x = tape.op("Add", [x, tape.op("MatMul", [tape.op("MatMul", [scores, v]), weight(f"{block}.o", WIDTH, WIDTH)])])
        n = tape.op("LayerNormalization", [x, weight(f"{block}.norm2", WIDTH)], {"axis": -1})
        up = tape.op("Relu", [tape.op("MatMul", [n, weight(f"{block}.up", WIDTH, 4 * WIDTH)])])
        x = tape.op("Add", [x, tape.op("MatMul", [up, weight(f"{block}.down", 4 * WIDTH, WIDTH)])])
    x.name, x.shape, x.type = "y", inputs.shape, inputs.type
    graph = ir.Graph([inputs], [x], nodes=list(tape.nodes), initializers=initializers, opset_imports={"": 20}, name="decoder")
    with weights.open("wb") as file:
        file.truncate(offset)
    path = folder / "model.onnx"
    ir.save(ir.Model(graph, ir_version=10), path)
    return path, blocks


def measure(*words: str) -> dict[str, float]:
    """Seconds and megabytes of one run of the command."""
    done = subprocess.run([sys.executable, "-c", _RUN, *words, "--quiet", "--json"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"The command failed: {done.stderr}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    if result["status"]:
        raise SystemExit(f"The command failed: {done.stderr}")
    return result


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--gigabytes", default=20.0, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Where the model is made; by default a temporary folder.")
@click.option("--out", type=click.Path(path_type=Path), help="The table's file; by default dated, under tools/results/.")
def main(gigabytes: float, rounds: int, folder: Path | None, out: Path | None) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        place = Path(scratch)
        path, blocks = decoder(place, gigabytes)
        size = (place / "weights.bin").stat().st_size
        rewrite = [str(path), "--variant", "rw+lr", "--rank", "16", "--target", "portable", "--no-verify", "--profile-seconds", "0"]
        rows = []
        for name, words, count, bound in (
            ("sites: detection alone", ["sites", str(path)], rounds, True),
            ("--external-data reference", [*rewrite, "--out", str(place), "--external-data", "reference"], rounds, True),
            ("--external-data copy", [*rewrite, "--out", str(place / "copied"), "--external-data", "copy"], 1, False),
        ):
            found = []
            for _ in range(count):
                found.append(measure(*words))
                shutil.rmtree(place / "copied", ignore_errors=True)
            seconds, megabytes = (statistics.median(row[key] for row in found) for key in ("seconds", "mb"))
            met = ("yes" if seconds < SECONDS and megabytes < MEGABYTES else "NO") if bound else "no goal: the disk's time"
            rows.append(f"| {name} | {count} | {seconds:.1f} | {megabytes:.0f} | {met} |")
            click.echo(rows[-1])
    packages = ", ".join(f"{name} {version(name)}" for name in ("onnx", "onnx-ir", "onnx-shape-inference", "torch"))
    text = "\n".join(
        [
            f"# Rewriting {size / 1e9:.1f} GB of external weights, {date.today()}",
            "",
            f"Python {platform.python_version()}, {packages}; {processor()}, {len(os.sched_getaffinity(0))} cores. A decoder of {blocks} blocks of",
            f"width {WIDTH}, float16, {2 * blocks} sites, rw+lr of rank 16; its weights are a sparse file. Without verification and profile, which",
            "run the model. Medians of whole runs, imports included; memory is the process's peak resident set.",
            "",
            f"| case | runs | seconds | peak MB | under {SECONDS} s and {MEGABYTES} MB |",
            "|---|---:|---:|---:|---|",
            *rows,
        ]
    )
    (out or HERE / "results" / f"onnx-size-{date.today()}.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
