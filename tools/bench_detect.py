"""Benchmark: time and memory of detection on growing graphs, beside `replace_pattern` of torch.fx on the same graphs.

    python tools/bench_detect.py            # writes a dated table under tools/results/

Every case runs in a process of its own, pinned to one core. In it, detection and `torch.fx.subgraph_rewriter.replace_pattern` (the
pattern is one add) alternate; the table holds the medians. Memory is the peak resident set of the process during the first detection
(Linux: VmHWM, reset before it), torch and the graph included; beside it the peak of detection's own objects (tracemalloc, another run).
"""

from __future__ import annotations

import copy
import ctypes
import gc
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from laurel_rewrite.profiling import processor

HERE = Path(__file__).parent
STACKS = (1_000, 10_000, 100_000)
SHAPES = {
    "stack": "x = x + linear(gelu(linear(norm(x))))",
    "towers": "two stacks side by side, summed with each other after every block",
    "ladder": "an encoder's every block is added to the decoder's in reverse order (a U-Net)",
    "memory": "one input of the model is added after every other block",
}
CASES = (
    [f"stack:{size}" for size in STACKS] + ["towers:100000", "ladder:100000", "memory:100000"] + ["hf:gpt2", "timm:vit_base_patch16_224"]
)
PATTERN_SECONDS = 30
"""`replace_pattern` is stopped after this, and not tried again."""


def synthetic(shape: str, nodes: int) -> Any:
    """An `fx.GraphModule` of about this many nodes with shapes in its metadata."""
    import torch
    from torch import fx
    from torch._subclasses.fake_tensor import FakeTensorMode

    aten = torch.ops.aten
    graph = fx.Graph()
    with FakeTensorMode():
        val = torch.empty(2, 8, 16)

    def put(node: fx.Node) -> fx.Node:
        node.meta["val"] = val
        return node

    weight = put(graph.get_attr("weight"))

    def branch(x: fx.Node) -> fx.Node:
        y = put(graph.call_function(aten.layer_norm.default, (x, [16])))
        y = put(graph.call_function(aten.linear.default, (y, weight)))
        y = put(graph.call_function(aten.gelu.default, (y,)))
        return put(graph.call_function(aten.linear.default, (y, weight)))

    def add(x: fx.Node, y: fx.Node) -> fx.Node:
        return put(graph.call_function(aten.add.Tensor, (x, y)))

    x = put(graph.placeholder("x"))
    other = put(graph.placeholder("other"))
    if shape == "stack":
        while len(graph.nodes) < nodes:
            x = add(x, branch(x))
    elif shape == "towers":
        while len(graph.nodes) < nodes:
            x, other = add(x, branch(x)), add(other, branch(other))
            x = add(branch(x), branch(other))
    elif shape == "ladder":
        skips = []
        while len(graph.nodes) < nodes // 2:
            x = branch(x)
            skips.append(x)
        while skips:
            x = add(branch(x), skips.pop())
    elif shape == "memory":
        while len(graph.nodes) < nodes:
            x = add(x, branch(x))
            x = add(branch(x), other)
    graph.output(x)
    root = torch.nn.Module()
    root.weight = torch.nn.Parameter(torch.empty(16, 16))
    return fx.GraphModule(root, graph)


def exported(spec: str) -> tuple[Any, float]:
    """The graph of a whole architecture and the seconds of its capture."""
    from laurel_rewrite.graph.capture import capture
    from laurel_rewrite.sources.models import build

    built = build(spec, device="meta")
    begin = time.perf_counter()
    (captured, *_), _ = capture(built.model, built.args, built.kwargs)
    return captured, time.perf_counter() - begin


def within(seconds: int, work: Callable[[], Any]) -> bool:
    """Whether the work ended within this time; else it is stopped."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        work()
    except TimeoutError:
        return False
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return True


def case(name: str, rounds: int) -> dict[str, Any]:
    """One line of the table, measured in this process."""
    import torch
    from torch import fx
    from torch.fx.subgraph_rewriter import replace_pattern

    from laurel_rewrite.detection.sites import sites_of_capture, sites_of_graph

    torch.set_num_threads(1)
    kind, _, size = name.partition(":")
    capture = None
    if kind in SHAPES:
        graph_module = synthetic(kind, int(size))

        def detect() -> Any:
            return sites_of_graph(graph_module)
    else:
        captured, capture = exported(name)
        graph_module = fx.GraphModule(torch.nn.Module(), captured.graph)

        def detect() -> Any:
            return sites_of_capture(captured)

    def resident(line: str) -> float:
        """VmRSS, what is resident now, or VmHWM, the peak of it, in MiB."""
        status = Path("/proc/self/status").read_text()
        return int(next(text.split()[1] for text in status.splitlines() if text.startswith(line))) / 1024

    def add(x: Any, y: Any) -> Any:
        return torch.ops.aten.add.Tensor(x, y)

    def replacement(x: Any, y: Any) -> Any:
        return torch.ops.aten.add.Tensor(y, x)

    # What making the graph left behind, and its peak, are not detection's.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    found = detect()
    peak = resident("VmHWM")
    tracemalloc.start()
    detect()
    objects = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    nodes, sites = len(graph_module.graph.nodes), len(found)
    # A graph of its own to replace in: what is replaced has no shapes, and detection would have less to do there.
    other = synthetic(kind, int(size)) if kind in SHAPES else copy.deepcopy(graph_module)
    detection: list[float] = []
    patterns: list[float] = []
    stopped = False
    for _ in range(rounds):
        begin = time.perf_counter()
        detect()
        detection.append(time.perf_counter() - begin)
        if not stopped:
            begin = time.perf_counter()
            stopped = not within(PATTERN_SECONDS, partial(replace_pattern, other, add, replacement))
            patterns.append(time.perf_counter() - begin)
    assert len(detect()) == sites
    return {
        "case": name,
        "nodes": nodes,
        "sites": sites,
        "detection": statistics.median(detection),
        "pattern": statistics.median(patterns),
        "stopped": stopped,
        "peak": peak,
        "objects": objects,
        "capture": capture,
        "rounds": rounds,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The table in Markdown, with what it was made under and the goals."""
    lines = [
        f"# Detection: time and memory, {date.today()}",
        "",
        f"Python {platform.python_version()}, torch {version('torch')}, {processor()}; one core, one thread, one process a case; medians of "
        f"{min(row['rounds'] for row in rows)} to {max(row['rounds'] for row in rows)} rounds in which detection and `replace_pattern` (one add) alternate.",
        f"`replace_pattern` is stopped after {PATTERN_SECONDS} s. Detection is everything after the capture: reading the graph, residual connections, streams, sites.",
        "",
        *(f"* {name}: {text}" for name, text in SHAPES.items()),
        "",
        "| graph | nodes | sites | detection s | µs a node | peak MiB | objects MiB | replace_pattern s | µs a node | capture s | detection % of capture |",
        "|---|" + "---:|" * 10,
    ]
    for row in rows:
        more = "> " if row["stopped"] else ""
        each, pattern = 1e6 * row["detection"] / row["nodes"], 1e6 * row["pattern"] / row["nodes"]
        capture, share = (
            ("-", "-") if row["capture"] is None else (f"{row['capture']:.2f}", f"{100 * row['detection'] / row['capture']:.1f}")
        )
        lines.append(
            f"| {row['case']} | {row['nodes']} | {row['sites']} | {row['detection']:.4f} | {each:.1f} | {row['peak']:.0f} | {row['objects']:.1f} "
            f"| {more}{row['pattern']:.3f} | {more}{pattern:.1f} | {capture} | {share} |"
        )
    by_case = {row["case"]: row for row in rows}
    largest, middle = by_case["stack:100000"], by_case["stack:10000"]
    growth = largest["detection"] / middle["detection"]
    slower = [row["case"] for row in rows if row["detection"] > row["pattern"]]
    shares = [row["detection"] / row["capture"] for row in rows if row["capture"] is not None]
    goals = [
        ("100,000 nodes in under 3 s", largest["detection"] < 3, f"{largest['detection']:.2f} s"),
        ("100,000 nodes in under 1 GB", largest["peak"] < 1e9 / 2**20, f"{largest['peak']:.0f} MiB, torch and the graph included"),
        ("10,000 to 100,000 nodes: at most 12 times the time", growth <= 12, f"{growth:.1f} times"),
        ("never slower a node than replace_pattern", not slower, ", ".join(slower) or "in no case"),
        ("at most 5 % of the capture's time", max(shares) <= 0.05, f"{100 * max(shares):.1f} %"),
    ]
    lines += ["", "| goal | | measured |", "|---|---|---|"]
    lines += [f"| {goal} | {'met' if met else 'MISSED'} | {measured} |" for goal, met, measured in goals]
    return "\n".join(lines) + "\n"


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--case", "only", help="Measure one case in this process and print it as JSON.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "results" / f"detect-{date.today()}.md")
def main(only: str | None, rounds: int, out: Path) -> None:
    if only is not None:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        click.echo(json.dumps(case(only, rounds)))
        return
    rows = []
    for name in CASES:
        command = [sys.executable, __file__, "--case", name, "--rounds", str(rounds)]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))
        click.echo(f"{name}: {rows[-1]['detection']:.3f} s, replace_pattern {rows[-1]['pattern']:.3f} s", err=True)
    out.write_text(table(rows))
    click.echo(out.read_text())


if __name__ == "__main__":
    main()
