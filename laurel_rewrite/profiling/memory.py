"""Memory, each figure named for what it is: what the ops ask of onnxruntime's arena, and what a process takes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from laurel_rewrite.profiling.sessions import Settings, session_of


def arena_bytes(path: Path, settings: Settings, feeds: Mapping[str, np.ndarray], folder: Path) -> int:
    """Peak of the bytes that ops had requested from the arena at the end of a node (arena on, memory pattern off), in a run of its own."""
    session = session_of(path, settings, trace=folder / "memory")
    for _ in range(2):
        session.run(None, feeds)
    events = json.loads(Path(session.end_profiling()).read_text())
    figures = [int(e["args"].get("mem_bytes_requested_in_use", 0)) for e in events if e.get("cat") == "Node" and "args" in e]
    return max(figures, default=0)


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
    """Peak resident memory (VmHWM) of a fresh process that loads the model and runs it; 0 where the system has no such figure."""
    if not Path("/proc/self/status").exists():
        return 0
    inputs = folder / "inputs.npz"
    np.savez(inputs, allow_pickle=False, **feeds)
    words = [str(path), str(inputs), str(settings.threads), settings.provider]
    done = subprocess.run([sys.executable, "-c", _FRESH, *words], capture_output=True, text=True, check=False)
    return int(done.stdout.strip() or 0) if done.returncode == 0 else 0
