"""Latency, memory and fusions of ONNX graphs in onnxruntime, side by side."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from laurel_rewrite.errors import ConfigError
from laurel_rewrite.feeds import check_feeds, draw_feeds
from laurel_rewrite.graph_files import external
from laurel_rewrite.onnx_surgery import away_from_start
from laurel_rewrite.profiling import latency
from laurel_rewrite.profiling.fusions import Ops, ops_of
from laurel_rewrite.profiling.latency import Latency
from laurel_rewrite.profiling.memory import arena_bytes, resident_bytes
from laurel_rewrite.profiling.sessions import CPU, check_runs, conditions, processor, session_of, settings

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Profile", "Row", "processor", "profile"]


@dataclass(frozen=True)
class Row:
    """One model's figures.

    Attributes:
        path: of the file.
        latency: see `Latency`.
        arena_bytes: peak of the bytes that ops had requested from the arena at the end of a node (arena on, memory pattern off), from a
            run of its own: activations and what ops need to work.
        resident_bytes: peak resident memory (VmHWM) of a fresh process that loads the model and runs it; 0 where the system has
            no such figure.
        file_bytes: the file and its external data.
        ops: before and after onnxruntime's optimisation, and what it fused.
    """

    path: str
    latency: Latency
    arena_bytes: int
    resident_bytes: int
    file_bytes: int
    ops: Ops

    def to_dict(self, baseline: Row) -> dict[str, Any]:
        return {
            "path": self.path,
            "latency": asdict(self.latency),
            "arena_bytes": self.arena_bytes,
            "resident_bytes": self.resident_bytes,
            "file_bytes": self.file_bytes,
            "ops": vars(self.ops),
            "fusions": vars(self.ops.against(baseline.ops)),
        }


@dataclass(frozen=True)
class Profile:
    """Rows in the order of the paths, and the conditions they were measured under."""

    rows: tuple[Row, ...]
    conditions: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {"rows": [row.to_dict(self.rows[0]) for row in self.rows], "conditions": self.conditions}


def profile(
    paths: Sequence[Path | str],
    *,
    inputs: Mapping[str, np.ndarray] | None = None,
    seconds: float = 10.0,
    min_rounds: int = 20,
    threads: int | None = None,
    provider: str = CPU,
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
        provider: execution provider.
        seed: of inputs, order and bootstrap.
        progress: is called with the fraction done.

    Raises:
        ConfigError: a file is missing or cannot be loaded, or the inputs do not fit; there is no such provider.
    """
    files = [Path(path) for path in paths]
    for file in files:
        if not file.is_file():
            raise ConfigError(f"There is no file {file} to profile.")
    if not files:
        raise ConfigError("profile takes at least one ONNX file.")
    options = settings(threads, provider)
    models = [_load(file) for file in files]
    feeds = dict(inputs) if inputs is not None else draw_feeds(models[0], seed=seed, batch=1, length=128)
    for file, model in zip(files, models, strict=True):
        check_feeds(model, feeds, file)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="laurel-profile-")))
        measured = [stack.enter_context(away_from_start(file, seed)) for file in files]
        for file, copy in zip(files, measured, strict=True):
            check_runs(file, session_of(copy, options), feeds)
        latencies, runs = latency.measure(
            measured, options, feeds, seconds=seconds, min_rounds=min_rounds, seed=seed, progress=progress
        )  # fmt: skip
        rows = tuple(
            Row(
                str(file),
                figures,
                arena_bytes(copy, options, feeds, folder),
                resident_bytes(copy, options, feeds, folder),
                _file_bytes(file, model),
                ops_of(copy, options, folder),
            )
            for file, copy, model, figures in zip(files, measured, models, latencies, strict=True)
        )
    shapes = {name: f"{value.dtype}{list(value.shape)}" for name, value in feeds.items()}
    return Profile(rows, conditions(options) | {"rounds": len(runs[0]), "inputs": shapes, "seed": seed})


def _file_bytes(path: Path, model: ir.Model) -> int:
    """The file and the files with its external weights."""
    return path.stat().st_size + sum(file.stat().st_size for file in {Path(tensor.path) for tensor in external(model)})


def _load(path: Path) -> ir.Model:
    import onnx_ir as ir

    try:
        return ir.load(path)
    except Exception as error:  # protobuf's and onnx-ir's exceptions share no base class
        raise ConfigError(f"{path} is no ONNX model: {type(error).__name__}: {error}") from error
