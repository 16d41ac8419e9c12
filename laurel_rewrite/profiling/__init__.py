"""What ONNX graphs cost in onnxruntime, side by side: latency, memory, where the time goes, FLOPs and fusions."""

from __future__ import annotations

import contextlib
import itertools
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from laurel_rewrite.backends.onnx.surgery import away_from_start
from laurel_rewrite.errors import CaptureError, ConfigError, LaurelError
from laurel_rewrite.files.checked import require_file
from laurel_rewrite.files.onnx import external, read_onnx, write_onnx
from laurel_rewrite.graph.feeds import Guess, check_feeds, fitting_feeds, phases, shape_grid
from laurel_rewrite.profiling import latency
from laurel_rewrite.profiling.attribution import against, attribute
from laurel_rewrite.profiling.costs import costs_of
from laurel_rewrite.profiling.figures import figures_of
from laurel_rewrite.profiling.flops import count_flops
from laurel_rewrite.profiling.fusions import count_ops
from laurel_rewrite.profiling.latency import MOST_SECONDS, RESOLVED, Effort, Latency
from laurel_rewrite.profiling.memory import Memory, memory_of, resident_bytes
from laurel_rewrite.profiling.one_more_layer import one_more_layer
from laurel_rewrite.profiling.rows import Row
from laurel_rewrite.profiling.sessions import CPU, Settings, check_runs, conditions, processor, session_of, settings
from laurel_rewrite.profiling.traces import graph_of_run, record

__all__ = ["Profile", "Row", "processor", "profile"]

ONE_MORE = "one more layer"
ITSELF = "the same again"
_USUAL = Guess(batch=1, length=128)
_TRACED = 0.2  # of the time, for profiled runs


@dataclass(frozen=True)
class Profile:
    """Rows in the order of the paths.

    Attributes:
        rows: the first is the baseline.
        shapes: of the inputs by name, for each latency of a row.
        phases: what a decoder with a past does at each shape, in words; "" where that was not asked for.
        conditions: what was measured with.
        warnings: what makes the figures doubtful, in sentences.
    """

    rows: tuple[Row, ...]
    shapes: tuple[dict[str, str], ...]
    phases: tuple[str, ...]
    conditions: dict[str, Any]
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "rows": [{**row.to_dict(self.rows[0]), "figures": figures_of(row, self.rows[0])} for row in self.rows],
            "shapes": list(self.shapes),
            "phases": list(self.phases),
            "conditions": self.conditions,
            "warnings": list(self.warnings),
        }


def profile(
    paths: Sequence[Path | str],
    *,
    names: Sequence[str] | None = None,
    inputs: Mapping[str, np.ndarray] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    prompt: int | None = None,
    past: int | None = None,
    seconds: float = 10.0,
    min_rounds: int = 20,
    precision: float | None = None,
    max_seconds: float = MOST_SECONDS,
    threads: int | None = None,
    provider: str = CPU,
    control: bool = False,
    self_check: bool = False,
    traces: Path | None = None,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Profile:
    """Measure ONNX files against the first of them.

    LAuReL parameters that are still at their start are replaced by random ones for the measurement, in a temporary copy: a runtime
    deletes a multiplication by 1, and then one would measure another graph.

    Args:
        paths: two or more files with the same inputs; the first is the baseline. One alone gives absolute figures.
        names: to call them by; None takes the files' names, with folders where they are equal.
        inputs: by name. None draws them (`fitting_feeds`): open sizes are 1 for the batch and 128 for a sequence, or where the first model does
            not run with these, others that it runs with.
        shapes: sizes to measure at, all combinations, by the names of open sizes: {"batch": [1, 8]}.
        prompt: of decoders with a past (`export_onnx(past=True)`): measure the prefill, so many tokens behind no past.
        past: of the same: measure the decoding, one token behind a past of so many. With `prompt` too, both are measured, each at every
            one of the shapes.
        seconds: time for the rounds at each shape, after warm-up (`--profile-seconds` of the command). There are at least `min_rounds`.
        precision: measure on until every 95 % interval reaches no farther from its ratio than this fraction of it (0.02 is 2 %), or
            `max_seconds` are over at that shape; then a warning says so.
        threads: of one run. None: as many as the process may use, at most 4.
        provider: execution provider.
        control: add the first model with one more layer.
        self_check: add the first model once more, which must be within noise.
        traces: folder for raw traces, in Chrome's trace format, which Perfetto opens.
        seed: of inputs, order and bootstrap.
        progress: is called with the fraction done.

    Raises:
        ConfigError: a file is missing or cannot be loaded, or the inputs do not fit; there is no such provider, open size or past; seconds
            or precision are no such numbers.
    """
    effort = Effort(seconds, min_rounds, precision, max_seconds)
    options = settings(threads, provider)
    files, models = _read(paths)
    points = _points(models[0], inputs, shapes or {}, prompt, past)
    feeds = [dict(inputs)] if inputs is not None else _drawn(files[0], models[0], options, [sizes for _, sizes in points], seed)
    for (file, model), one in itertools.product(zip(files, models, strict=True), feeds):
        check_feeds(model, one, file)
    rows_of = list(names) if names is not None else _names(files)
    warnings: list[str] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="laurel-profile-")))
        measured = [stack.enter_context(away_from_start(file, seed, inline=True)) for file in files]
        if control:
            made = _one_more(stack, models[0], files[0], folder, options, feeds)
            if isinstance(made, Path):
                rows_of, files, measured = [*rows_of, ONE_MORE], [*files, made], [*measured, made]
            else:
                warnings.append(made)
        if self_check:
            rows_of, files, measured = [*rows_of, ITSELF], [*files, files[0]], [*measured, measured[0]]
        _check_all(files, measured, options, feeds)
        timings = []
        for number, one in enumerate(feeds):
            step = None if progress is None else lambda done, number=number: progress((number + done) / len(feeds))
            timings.append(latency.measure(measured, options, one, effort, seed=seed, progress=step))
        rows = _rows(rows_of, files, measured, timings, options, feeds, folder, seconds, seed)
        _keep_traces(folder, traces, rows_of)
    described = tuple({name: f"{value.dtype}{list(value.shape)}" for name, value in one.items()} for one in feeds)
    warnings += _doubts(rows, options, effort, [phase for phase, _ in points])
    made_with = conditions(options) | {"rounds": rows[0].latency.rounds, "inputs": described[0], "seed": seed}
    return Profile(rows, described, tuple(phase for phase, _ in points), made_with, tuple(warnings))


def _read(paths: Sequence[Path | str]) -> tuple[list[Path], list[ir.Model]]:
    """Files and what is in them; ConfigError where one is missing or cannot be loaded, or where there is none."""
    files = [Path(path) for path in paths]
    for file in files:
        require_file(file)
    if not files:
        raise ConfigError("profile takes at least one ONNX file.")
    return files, [_load(file) for file in files]


def _points(
    model: ir.Model, inputs: Mapping[str, np.ndarray] | None, shapes: Mapping[str, Sequence[int]], prompt: int | None, past: int | None
) -> list[tuple[str, dict[str, int]]]:
    """The sizes to measure at, each with what a decoder does there; ConfigError where there are none such, or inputs were given."""
    if inputs is not None and (shapes or prompt is not None or past is not None):
        raise ConfigError("Sizes to measure at are for inputs that are drawn, and these were given.")
    asked = phases(model, prompt, past) or {"": {}}
    return [(phase, sizes | shape) for phase, sizes in asked.items() for shape in shape_grid(model, shapes)]


def _keep_traces(folder: Path, traces: Path | None, names: Sequence[str]) -> None:
    """Raw traces where somebody wants them, by the names of the rows."""
    for number, name in enumerate(names if traces is not None else ()):
        assert traces is not None
        (folder / f"trace{number}.json").replace(traces / f"trace-{_file_name(name)}.json")


def _one_more(
    stack: contextlib.ExitStack,
    model: ir.Model,
    file: Path,
    folder: Path,
    options: Settings,
    feeds: Sequence[Mapping[str, np.ndarray]],
) -> Path | str:
    """The file of a model with one more layer, as long as the stack holds it; or why there is none, in a sentence."""
    try:
        made = stack.enter_context(_control(model, file, folder))
        for one in feeds:
            check_runs(made, session_of(made, options), one)
    except LaurelError as error:
        return f"There is no model with one more layer: {error}"
    return made


def _check_all(files: Sequence[Path], measured: Sequence[Path], options: Settings, feeds: Sequence[Mapping[str, np.ndarray]]) -> None:
    """Raise ConfigError where a file does not run with inputs."""
    for file, copy in zip(files, measured, strict=True):
        session = session_of(copy, options)
        for one in feeds:
            check_runs(file, session, one)


def _drawn(path: Path, model: ir.Model, options: Settings, points: Sequence[Mapping[str, int]], seed: int) -> list[dict[str, np.ndarray]]:
    """Inputs that a model runs with, for each choice of sizes."""
    session = session_of(path, options)

    def run(feeds: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
        session.run(None, dict(feeds))
        return ()  # numbers that are not finite take no less time

    return [fitting_feeds(model, run, seed=seed, first=[_USUAL], sizes=sizes) for sizes in points]


def _rows(
    names: Sequence[str],
    files: Sequence[Path],
    measured: Sequence[Path],
    timings: Sequence[tuple[list[Latency], list[float]]],
    options: Settings,
    feeds: Sequence[Mapping[str, np.ndarray]],
    folder: Path,
    seconds: float,
    seed: int,
) -> tuple[Row, ...]:
    models = [ir.load(copy) for copy in measured]
    later = [_memories(measured, models, options, one, folder, seed) for one in feeds[1:]]
    plain = record(measured, options, feeds[0], folder, seconds=0, seed=seed, level="none")
    flops = [
        count_flops(graph_of_run(folder / f"optimised{number}.onnx", model), trace, feeds[0])
        for number, (model, trace) in enumerate(zip(models, plain, strict=True))
    ]
    traces = record(measured, options, feeds[0], folder, seconds=seconds * _TRACED, seed=seed)
    rows: list[Row] = []
    for number, (name, file, copy) in enumerate(zip(names, files, measured, strict=True)):
        model, optimised = models[number], graph_of_run(folder / f"optimised{number}.onnx", models[number])
        attribution = attribute(model, optimised, traces[number], timings[0][0][number].median_ms)
        rows.append(
            Row(
                name=name,
                path="" if name == ONE_MORE else str(file),
                latencies=tuple(latencies[number] for latencies, _ in timings),
                load_ms=timings[0][1][number],
                memories=(memory_of(optimised, traces[number]), *(memories[number] for memories in later)),
                residents=tuple(resident_bytes(copy, options, one, folder) for one in feeds),
                file_bytes=_file_bytes(file),
                ops=count_ops(model, optimised),
                costs=costs_of(model, flops[number], plain[number], traces[number], attribution),
                attribution=against(attribution, rows[0].attribution) if rows else attribution,
                providers=traces[number].providers,
            )
        )
    return tuple(rows)


def _memories(
    measured: Sequence[Path], models: Sequence[ir.Model], options: Settings, feeds: Mapping[str, np.ndarray], folder: Path, seed: int
) -> list[Memory]:
    """Memory of each model for one shape of inputs; what is in the folder of the traces is written anew by those that are kept."""
    traces = record(measured, options, feeds, folder, seconds=0, seed=seed)
    return [
        memory_of(graph_of_run(folder / f"optimised{number}.onnx", model), trace)
        for number, (model, trace) in enumerate(zip(models, traces, strict=True))
    ]


@contextlib.contextmanager
def _control(model: ir.Model, path: Path, folder: Path) -> Iterator[Path]:
    """The model with one more layer in a file; beside the first for a while where that has weights in other files.

    Raises:
        CaptureError: the graph cannot be read, or has no layer that could be copied.
    """
    made = one_more_layer(model)
    if made is None:
        raise CaptureError("no two states of a residual stream have one shape, so that no block can be copied.")
    if not external(model):
        yield write_onnx(made[0], folder / "control.onnx")
        return
    file = path.with_name(f".laurel-control-{path.name}")
    try:
        ir.save(made[0], file)
        yield file
    finally:
        file.unlink(missing_ok=True)


def _names(files: Sequence[Path]) -> list[str]:
    """The files' names, with so many folders that they differ."""
    for parts in range(1, 9):
        names = ["/".join(file.resolve().parts[-parts:]) for file in files]
        if len(set(names)) == len(names):
            return names
    return [f"{file} ({number})" for number, file in enumerate(files, start=1)]


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name.removesuffix(".onnx"))[-80:]


def _doubts(rows: Sequence[Row], options: Settings, effort: Effort, phases: Sequence[str]) -> list[str]:
    """What makes the figures doubtful."""
    found = []
    for row in rows:
        for time, phase in zip(row.latencies, phases, strict=True):
            found += _doubt(row.name, f", {phase}" if phase else "", time, effort)
        elsewhere = sum(count for provider, count in row.providers.items() if provider != options.provider)
        if elsewhere:
            found.append(f"{row.name}: {elsewhere} of {sum(row.providers.values())} nodes ran on {CPU}, not on {options.provider}.")
        if row.costs.uncounted:
            names = ", ".join(row.costs.uncounted)
            found.append(f"{row.name}: the FLOPs of {names} are not counted, so that there are at least {row.costs.flops:,}.")
    return found


def _doubt(name: str, phase: str, time: Latency, effort: Effort) -> list[str]:
    between = f"[{time.low:.3f}, {time.high:.3f}]"
    if name == ITSELF and time.verdict != "within noise":
        return [
            f"A model against itself{phase} is {time.ratio:.3f} {between}, {time.verdict}: the machine is too noisy to say more. Measure longer, or on a "
            "quiet machine."
        ]
    if effort.precision is not None and time.precision > effort.precision:
        return [
            f"{name}{phase}: the ratio lies in {between}; a precision of {100 * effort.precision:g} % was not reached in {effort.max_seconds:g} seconds."
        ]
    if time.precision > RESOLVED:
        return [
            f"{name}{phase}: {time.verdict}, and the ratio is only known to lie in {between}. Measure longer (--profile-seconds), or until it is "
            f"known well enough (--precision {RESOLVED:g})."
        ]
    return []


def _file_bytes(path: Path) -> int:
    """The file and the files with its external weights."""
    return path.stat().st_size + sum(file.stat().st_size for file in {Path(tensor.path) for tensor in external(ir.load(path))})


def _load(path: Path) -> ir.Model:
    try:
        return read_onnx(path)
    except CaptureError as error:
        raise ConfigError(error.args[0]) from error
