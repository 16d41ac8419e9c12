"""Memory, each figure named for what it is: what ops ask of onnxruntime's arena, what the graph needs at least, what a process takes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from laurel_rewrite.profiling.sessions import Settings
from laurel_rewrite.profiling.traces import Trace

_RETURNING = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""What makes glibc return memory at once; without these its thresholds move with what was freed before, and the peak with them."""
_EXPLAINED = 0.1
"""Difference between the arena's peak and the live values' that needs an explanation."""
_VIEWS = frozenset("Reshape Squeeze Unsqueeze Flatten Identity".split())
_IN_PLACE: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(_VIEWS, (0,)),
    **dict.fromkeys("Add Sub Mul Div".split(), (0, 1)),
    **dict.fromkeys(
        "Relu Sigmoid Tanh Neg Abs Sqrt Exp Erf Clip HardSwish HardSigmoid LeakyRelu Elu QuickGelu Cast Softmax BatchNormalization".split(),
        (0,),
    ),
    "Conv": (3,),
    "FusedConv": (3,),
}
"""Inputs whose memory onnxruntime may write the output to."""


@dataclass(frozen=True)
class Memory:
    """Memory of one model for one shape of inputs.

    Attributes:
        activation_bytes: peak of the bytes that ops had requested from the arena at the end of a node (arena on, memory pattern off),
            without what it held before the first: values, and what ops need to work. Inputs are the caller's.
        weight_bytes: what the arena held before the first node: weights, as far as onnxruntime keeps them there.
        live_bytes: peak of the values that are still needed, computed from the graph that onnxruntime runs.
        note: why activations and live values differ, where they do by more than 10 %.
    """

    activation_bytes: int
    weight_bytes: int
    live_bytes: int
    note: str = ""


def memory_of(optimised: ir.Model, trace: Trace) -> Memory:
    """Memory of the ops of a graph.

    Args:
        optimised: the graph that onnxruntime runs.
        trace: of its runs.
    """
    buffers = _Buffers(optimised, trace)
    weights: int | None = None
    activation, peak, extra, at = 0, 0, 0, ""
    for node in optimised.graph:
        traced = trace.nodes.get(node.name or "")
        if traced is None:
            continue
        if weights is None:
            weights = traced.requested_bytes - traced.output_bytes
        requested, live = traced.requested_bytes - weights, buffers.run(node, traced.output_bytes)
        activation, peak = max(activation, requested), max(peak, live)
        if requested - live > extra:
            extra, at = requested - live, f"{node.op_type} {node.name}"
    note = ""
    if activation - peak > _EXPLAINED * activation:
        note = (
            f"onnxruntime keeps memory for later values of the same size, and some ops need work space: {extra:,} bytes more than the live "
            f"values after {at}"
        )
    elif peak - activation > _EXPLAINED * activation:
        note = "ops write into the memory of their inputs more often than is known here"
    return Memory(activation, weights or 0, peak, note)


class _Buffers:
    """Which memory the values of a graph lie in, as nodes run one after another."""

    def __init__(self, model: ir.Model, trace: Trace) -> None:
        self.readers: Counter[ir.Value] = Counter(model.graph.outputs)  # whose own reader comes after the run
        for node in model.graph:
            if node.name in trace.nodes:
                self.readers.update({value for value in node.inputs if value is not None})
        self.buffer: dict[ir.Value, int] = {}
        self.sizes: dict[int, int] = {}
        self.needed: Counter[int] = Counter()

    def run(self, node: ir.Node, written: int) -> int:
        """The bytes alive when a node ends that writes so many."""
        inputs = {value for value in node.inputs if value is not None and value in self.buffer}
        shared = self._shared(node, written)
        if shared is None:
            shared = len(self.sizes) and max(self.sizes) + 1
            self.sizes[shared] = written
        for output in node.outputs:
            self.buffer[output] = shared
            self.needed[shared] += self.readers[output]
        live = sum(self.sizes.values())
        for value in inputs:
            self.needed[self.buffer[value]] -= 1
        for number in {shared, *(self.buffer[value] for value in inputs)}:
            if self.needed[number] <= 0:
                self.sizes.pop(number, None)
        return live

    def _shared(self, node: ir.Node, written: int) -> int | None:
        """The memory of an input that the output takes over: a view's always, an elementwise op's where nobody else needs it."""
        candidates = [node.inputs[p] for p in _IN_PLACE.get(node.op_type, ()) if p < len(node.inputs)]
        for value in candidates:
            number = self.buffer.get(value) if value is not None else None
            if number is None or number not in self.sizes:
                continue
            if node.op_type in _VIEWS or (self.needed[number] == 1 and self.sizes[number] == written):
                return number
        return None


_FRESH = """
import sys, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.log_severity_level = 3
options.intra_op_num_threads = int(sys.argv[3])
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=[sys.argv[4]])
feeds = dict(numpy.load(sys.argv[2]))
for _ in range(2):
    session.run(None, feeds)
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"):
        print(int(line.split()[1]) * 1024)
"""


def resident_bytes(path: Path, settings: Settings, feeds: Mapping[str, np.ndarray], folder: Path) -> int:
    """Peak resident memory (VmHWM) of a fresh process that loads the model and runs it; 0 where the system has no such figure.

    glibc is told to return memory at once: what it keeps otherwise depends on how threads happen to meet, and is some per cent more or less.
    """
    if not Path("/proc/self/status").exists():
        return 0
    inputs = folder / "inputs.npz"
    np.savez(inputs, allow_pickle=False, **feeds)
    words = [sys.executable, "-c", _FRESH, str(path), str(inputs), str(settings.threads), settings.provider]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, **_RETURNING})
    return int(done.stdout.strip() or 0) if done.returncode == 0 else 0
