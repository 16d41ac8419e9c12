"""Latency and memory of ONNX graphs in onnxruntime, side by side: ratios that repeat, and figures named for what they are.

One session a model, the same options and pinned threads, no spinning, a warm-up; then every round runs every model once in random
order. The figure is the median over rounds of the ratio to the first model, with a bootstrap interval: absolute times drift with the
machine, ratios within a round do not. Where a session's memory happens to lie is worth a per cent or two, so that the sessions are
made anew several times, and the interval counts each making as one observation.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from laurel_rewrite.errors import ConfigError
from laurel_rewrite.feeds import check_feeds, draw_feeds
from laurel_rewrite.graph_files import external
from laurel_rewrite.onnx_surgery import away_from_start

if TYPE_CHECKING:
    import onnx_ir as ir
    import onnxruntime

_BLOCKS = 6  # makings of the sessions


@dataclass(frozen=True)
class Row:
    """One model's figures.

    Attributes:
        path: of the file.
        median_ms, p10_ms, p90_ms: latency of one run, milliseconds.
        ratio, low, high: latency over the first model's: median of the rounds' ratios and its 95 % bootstrap interval.
        verdict: "baseline", "faster", "slower" or "within noise" (the interval holds 1).
        activation_bytes: peak of the bytes that ops had requested from the arena at the end of a node (arena on, memory pattern
            off), from a run of its own.
        resident_bytes: peak resident memory (VmHWM) of a fresh process that loads the model and runs it; 0 where the system has
            no such figure.
        file_bytes: the file and its external data.
    """

    path: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    ratio: float
    low: float
    high: float
    verdict: str
    activation_bytes: int
    resident_bytes: int
    file_bytes: int


@dataclass(frozen=True)
class Profile:
    """Rows in the order of the paths, and the conditions they were measured under."""

    rows: tuple[Row, ...]
    conditions: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {"rows": [asdict(row) for row in self.rows], "conditions": self.conditions}


def profile(
    paths: Sequence[Path | str],
    *,
    inputs: Mapping[str, np.ndarray] | None = None,
    seconds: float = 10.0,
    min_rounds: int = 20,
    threads: int | None = None,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Profile:
    """Measure ONNX files against the first of them.

    LAuReL parameters that are still at their start are replaced by random ones for the measurement, in a temporary copy: a runtime
    deletes a multiplication by 1, and then one would measure another graph.

    Args:
        paths: two or more files with the same inputs; the first is the baseline. One alone gives absolute figures.
        inputs: by name. None draws them (`draw_feeds`): dynamic dimensions are 1 for the batch and 128 for a sequence.
        seconds: time for the rounds, after warm-up. There are at least `min_rounds`.
        threads: of one run. None: as many as the process may use, at most 4.
        seed: of inputs, order and bootstrap.
        progress: is called with the fraction done.

    Raises:
        ConfigError: a file is missing or cannot be loaded, or the inputs do not fit.
    """
    files = [Path(path) for path in paths]
    for file in files:
        if not file.is_file():
            raise ConfigError(f"There is no file {file} to profile.")
    if not files:
        raise ConfigError("profile takes at least one ONNX file.")
    threads = threads or min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    order = random.Random(seed)
    models = [_load(file) for file in files]
    feeds = dict(inputs) if inputs is not None else draw_feeds(models[0], seed=seed, batch=1, length=128)
    for file, model in zip(files, models, strict=True):
        check_feeds(model, feeds, file)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="laurel-profile-"))
        measured = [stack.enter_context(away_from_start(file, seed)) for file in files]
        for file, copy in zip(files, measured, strict=True):
            _check_runs(file, _session(copy, threads), feeds)
        blocks = []
        for block in range(_BLOCKS):
            step = None if progress is None else lambda done, block=block: progress((block + done) / _BLOCKS)
            blocks.append(_interleave(measured, threads, feeds, seconds / _BLOCKS, -(-min_rounds // _BLOCKS), order, step))
        activation = [_activation_bytes(file, threads, feeds, folder) for file in measured]
        resident = [_resident_bytes(file, threads, feeds, folder) for file in measured]
    rows = []
    for n, file in enumerate(files):
        times = np.concatenate([block[n] for block in blocks])
        ratio, low, high = _ratio([block[n] / block[0] for block in blocks], seed)
        verdict = "baseline" if n == 0 else "within noise" if low <= 1 <= high else "slower" if ratio > 1 else "faster"
        p10, median, p90 = np.percentile(times, [10, 50, 90]) * 1e3
        rows.append(
            Row(
                str(file),
                float(median),
                float(p10),
                float(p90),
                ratio,
                low,
                high,
                verdict,
                activation[n],
                resident[n],
                _file_bytes(file, models[n]),
            )
        )
    return Profile(tuple(rows), _conditions(threads, sum(block.shape[1] for block in blocks), feeds, seed))


# Latency


def _session(path: Path, threads: int, *, profile_prefix: str = "") -> onnxruntime.InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if profile_prefix:
        options.enable_profiling = True
        options.profile_file_prefix = profile_prefix
        options.enable_mem_pattern = False
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise ConfigError(f"onnxruntime cannot load {path}: {str(error)[:400]}") from error


def _interleave(
    files: Sequence[Path],
    threads: int,
    feeds: Mapping[str, np.ndarray],
    seconds: float,
    min_rounds: int,
    order: random.Random,
    progress: Callable[[float], None] | None,
) -> np.ndarray:
    """Seconds of each run, [models, rounds], in sessions made for this call in random order."""
    made = {n: _session(files[n], threads) for n in order.sample(range(len(files)), len(files))}
    sessions = [made[n] for n in range(len(files))]
    for session in sessions:
        for _ in range(3):
            session.run(None, feeds)
    rounds: list[list[float]] = []
    begin = time.perf_counter()
    while len(rounds) < min_rounds or time.perf_counter() - begin < seconds:
        row = [0.0] * len(sessions)
        for n in order.sample(range(len(sessions)), len(sessions)):
            start = time.perf_counter()
            sessions[n].run(None, feeds)
            row[n] = time.perf_counter() - start
        rounds.append(row)
        if progress is not None:
            progress(min(1.0, min((time.perf_counter() - begin) / max(seconds, 1e-9), len(rounds) / min_rounds)))
    return np.array(rounds).T


def _ratio(blocks: Sequence[np.ndarray], seed: int) -> tuple[float, float, float]:
    """Median of the per-round ratios, and the 95 % interval of that median by resampling blocks and the rounds within them."""
    generator = np.random.default_rng(seed)
    medians = []
    for _ in range(1000):
        drawn = generator.integers(0, len(blocks), len(blocks))
        medians.append(np.median(np.concatenate([generator.choice(blocks[b], len(blocks[b])) for b in drawn])))
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(np.median(np.concatenate(list(blocks)))), float(low), float(high)


# Memory


def _activation_bytes(path: Path, threads: int, feeds: Mapping[str, np.ndarray], folder: str) -> int:
    session = _session(path, threads, profile_prefix=str(Path(folder) / "memory"))
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
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
feeds = dict(numpy.load(sys.argv[2]))
for _ in range(2):
    session.run(None, feeds)
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"):
        print(int(line.split()[1]) * 1024)
"""


def _resident_bytes(path: Path, threads: int, feeds: Mapping[str, np.ndarray], folder: str) -> int:
    if not Path("/proc/self/status").exists():
        return 0
    inputs = Path(folder) / "inputs.npz"
    np.savez(inputs, allow_pickle=False, **feeds)
    done = subprocess.run([sys.executable, "-c", _FRESH, str(path), str(inputs), str(threads)], capture_output=True, text=True, check=False)
    return int(done.stdout.strip() or 0) if done.returncode == 0 else 0


def _file_bytes(path: Path, model: ir.Model) -> int:
    """The file and the files with its external weights."""
    return path.stat().st_size + sum(file.stat().st_size for file in {Path(tensor.path) for tensor in external(model)})


def _load(path: Path) -> ir.Model:
    import onnx_ir as ir

    try:
        return ir.load(path)
    except Exception as error:  # protobuf's and onnx-ir's exceptions share no base class
        raise ConfigError(f"{path} is no ONNX model: {type(error).__name__}: {error}") from error


def _check_runs(path: Path, session: onnxruntime.InferenceSession, feeds: Mapping[str, np.ndarray]) -> None:
    try:
        session.run(None, dict(feeds))
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise ConfigError(f"{path} does not run with these inputs: {str(error)[:300]}") from error


def _conditions(threads: int, rounds: int, feeds: Mapping[str, np.ndarray], seed: int) -> dict[str, Any]:
    import onnxruntime

    return {
        "onnxruntime": onnxruntime.__version__,
        "provider": "CPUExecutionProvider",
        "cpu": processor(),
        "threads": threads,
        "rounds": rounds,
        "inputs": {name: f"{value.dtype}{list(value.shape)}" for name, value in feeds.items()},
        "seed": seed,
        "date": time.strftime("%Y-%m-%d"),
    }


def processor() -> str:
    """Name of the CPU."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
