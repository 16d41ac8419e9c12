"""Profiled runs: what each node takes in time and memory. Profiling slows small ops, so that latencies are never read from these."""

from __future__ import annotations

import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from laurel_rewrite.profiling.sessions import Settings, session_of

CONTAINERS = frozenset({"If", "Loop", "Scan", "SequenceMap"})
"""Ops whose time includes that of the nodes in them, which have events of their own."""
_KERNEL = "_kernel_time"
_WARM_UP = 2
_MOST_RUNS = 30  # a trace that a browser still opens


@dataclass
class TracedNode:
    """One node of an optimised graph in the runs.

    Attributes:
        op: its type.
        provider: the execution provider that ran it.
        inputs, outputs: shapes.
        moved_bytes: that it reads, weights included, and writes.
        output_bytes: that it writes.
        requested_bytes: that all ops hold of the arena when it ends.
        ms: time, median over runs.
    """

    op: str
    provider: str
    inputs: list[list[int]]
    outputs: list[list[int]]
    moved_bytes: int
    output_bytes: int
    requested_bytes: int
    ms: float = 0.0


@dataclass(frozen=True)
class Trace:
    """What one model's profiled runs say.

    Attributes:
        nodes: by name, in the order of execution.
        total_ms: of a profiled run, median.
    """

    nodes: dict[str, TracedNode]
    total_ms: float

    @property
    def providers(self) -> dict[str, int]:
        """Number of nodes by the execution provider that ran them."""
        return dict(Counter(node.provider for node in self.nodes.values()))


def record(
    files: Sequence[Path],
    settings: Settings,
    feeds: Mapping[str, np.ndarray],
    folder: Path,
    *,
    seconds: float,
    seed: int = 0,
    level: str = "all",
) -> list[Trace]:
    """Run models with onnxruntime's profiler, interleaved in random order.

    Args:
        files: of the models.
        settings: of the sessions.
        feeds: inputs.
        folder: receives for each model, by its position, the raw trace `trace0.json`, in Chrome's format, which Perfetto opens, and the
            optimised graph `optimised0.onnx`.
        seconds: time for the runs; there are at least 3 of each model, and at most 30.
        seed: of the order.
        level: of optimisation, see `session_of`.
    """
    order = random.Random(seed)
    sessions = [
        session_of(file, settings, trace=folder / f"trace{n}", optimised=folder / f"optimised{n}.onnx", level=level)
        for n, file in enumerate(files)
    ]
    begin, rounds = time.perf_counter(), 0
    while rounds < _WARM_UP + 3 or (rounds < _MOST_RUNS and time.perf_counter() - begin < seconds):
        for n in order.sample(range(len(sessions)), len(sessions)):
            sessions[n].run(None, feeds)
        rounds += 1
    traces = []
    for n, session in enumerate(sessions):
        raw = Path(session.end_profiling()).replace(folder / f"trace{n}.json")
        traces.append(_read(json.loads(raw.read_text(encoding="utf-8", errors="replace"))))
    return traces


def graph_of_run(path: Path, model: ir.Model) -> ir.Model:
    """The graph that a session ran, its nodes named as in the trace.

    A node without a name is called by its op and its number among the nodes of the file there, constants aside.

    Args:
        path: of the graph that the session wrote.
        model: the file that it read.
    """
    graph = ir.load(path)
    numbers = {node.outputs[0].name: n for n, node in enumerate(node for node in model.graph if node.op_type != "Constant")}
    for node in graph.graph:
        if not node.name and node.outputs[0].name in numbers:
            node.name = f"{node.op_type}_{numbers[node.outputs[0].name]}"
    return graph


def _read(events: list[dict[str, Any]]) -> Trace:
    runs = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("name") == "model_run")[_WARM_UP:]
    kernels = sorted((e for e in events if e.get("cat") == "Node" and e["name"].endswith(_KERNEL)), key=lambda e: (e["ts"], -e["dur"]))
    nodes: dict[str, TracedNode] = {}
    times: dict[str, list[float]] = defaultdict(list)  # of each run
    spent: Counter[str] = Counter()
    run, container_ends = 0, 0
    for event in kernels:
        while run < len(runs) and event["ts"] >= runs[run][1]:
            _end(spent, times)
            run += 1
        if run == len(runs) or event["ts"] < runs[run][0] or event["ts"] < container_ends:
            continue
        name, node = event["name"].removesuffix(_KERNEL), _traced(event["args"])
        if node.op in CONTAINERS:
            container_ends = event["ts"] + event["dur"]
        if name in nodes:
            node.requested_bytes = max(node.requested_bytes, nodes[name].requested_bytes)
        nodes[name] = node
        spent[name] += event["dur"]
    _end(spent, times)
    for name, microseconds in times.items():
        nodes[name].ms = float(np.median(microseconds)) / 1e3
    return Trace(nodes, float(np.median([end - start for start, end in runs])) / 1e3)


def _end(spent: Counter[str], times: dict[str, list[float]]) -> None:
    for name, microseconds in spent.items():
        times[name].append(microseconds)
    spent.clear()


def _traced(arguments: dict[str, Any]) -> TracedNode:
    def shapes(key: str) -> list[list[int]]:
        return [next(iter(entry.values()), []) for entry in arguments.get(key, [])]

    read, written = int(arguments.get("activation_size", 0)) + int(arguments.get("parameter_size", 0)), int(arguments.get("output_size", 0))
    return TracedNode(
        arguments["op_name"], arguments.get("provider", ""), shapes("input_type_shape"), shapes("output_type_shape"), read + written, written,
        int(arguments.get("mem_bytes_requested_in_use", 0)),
    )  # fmt: skip
