"""onnxruntime sessions that can be compared: the same options, pinned threads, no spinning."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from laurel_rewrite.errors import ConfigError, nearest

if TYPE_CHECKING:
    import onnxruntime

CPU = "CPUExecutionProvider"


@dataclass(frozen=True)
class Settings:
    """What all sessions of a comparison have in common.

    Attributes:
        threads: of one run.
        provider: execution provider; what it does not run, onnxruntime runs on the CPU.
    """

    threads: int
    provider: str = CPU


def has_provider(name: str) -> bool:
    """Whether this onnxruntime has an execution provider."""
    import onnxruntime

    return name in onnxruntime.get_available_providers()


def settings(threads: int | None = None, provider: str = CPU) -> Settings:
    """Checked settings.

    Args:
        threads: None for as many as the process may use, at most 4.
        provider: its name, with or without "ExecutionProvider".

    Raises:
        ConfigError: this onnxruntime has no such provider.
    """
    import onnxruntime

    available = onnxruntime.get_available_providers()
    names = {name.lower(): name for full in available for name in (full, full.removesuffix("ExecutionProvider"))}
    found = names.get(provider.lower())
    if found is None:
        short = [name.removesuffix("ExecutionProvider") for name in available]
        raise ConfigError(f"This onnxruntime has no execution provider {provider!r}. {nearest(provider, short)}")
    full = found if found in available else f"{found}ExecutionProvider"
    return Settings(threads or min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1), full)


def session_of(
    path: Path, settings: Settings, *, trace: Path | None = None, optimised: Path | None = None, level: str = "all"
) -> onnxruntime.InferenceSession:
    """A session.

    Args:
        path: of the file.
        settings: see `Settings`.
        trace: profile every node, into files that begin so; the memory pattern is off then, so that each tensor is asked for singly.
        optimised: write the graph that onnxruntime runs to this file, its weights beside it.
        level: of optimisation: "all", "extended" without the layouts of one kind of machine, or "none".

    Raises:
        ConfigError: onnxruntime cannot load the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4 if optimised is not None else 3  # it warns that such a file is for one machine, as it is
    options.intra_op_num_threads = settings.threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = {
        "all": levels.ORT_ENABLE_ALL, "extended": levels.ORT_ENABLE_EXTENDED, "none": levels.ORT_DISABLE_ALL,
    }[level]  # fmt: skip
    if trace is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(trace)
        options.enable_mem_pattern = False
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{optimised.name}.data")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=[settings.provider])
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise ConfigError(f"onnxruntime cannot load {path}: {str(error)[:400]}") from error


def check_runs(path: Path, session: onnxruntime.InferenceSession, feeds: Mapping[str, np.ndarray]) -> None:
    """Raise ConfigError where a file does not run with these inputs."""
    try:
        session.run(None, dict(feeds))
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise ConfigError(f"{path} does not run with these inputs: {str(error)[:300]}") from error


def conditions(settings: Settings) -> dict[str, Any]:
    """Where and with what a measurement was made."""
    import onnxruntime

    return {
        "onnxruntime": onnxruntime.__version__,
        "provider": settings.provider,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": settings.threads,
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def processor() -> str:
    """Name of the CPU."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
