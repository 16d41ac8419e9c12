"""Latency: ratios that repeat.

Every round runs every candidate once in random order. The figure is the median over rounds of the ratio to the first, with a
bootstrap interval: absolute times drift with the machine, ratios within a round do not. Where a session's memory happens to lie is
worth a per cent or two, so that the sessions are made anew several times, and the interval counts each making as one observation.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from laurel_rewrite.profiling.sessions import Settings, session_of

if TYPE_CHECKING:
    import onnxruntime

BLOCKS = 6  # makings of the sessions
_WARM_UP = 3
_KEPT = 2000
_NORMAL = 1.96
_STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 10: 2.23, 11: 2.20}
"""Quantiles at 97.5 % of the normal distribution, and of Student's by degrees of freedom."""


@dataclass(frozen=True)
class Latency:
    """Time of one candidate.

    Attributes:
        median_ms, p10_ms, p90_ms: of one run, milliseconds.
        ratio, low, high: over the first candidate's: median of the rounds' ratios, and its 95 % bootstrap interval.
        verdict: "baseline", "faster", "slower" or "within noise" (the interval holds 1).
        rounds: number of runs.
        runs_ms: the runs in order; of more than 2,000, every n-th.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    ratio: float
    low: float
    high: float
    verdict: str
    rounds: int
    runs_ms: tuple[float, ...] = field(repr=False)


def measure(
    files: Sequence[Path],
    settings: Settings,
    feeds: Mapping[str, np.ndarray],
    *,
    seconds: float,
    min_rounds: int,
    seed: int,
    progress: Callable[[float], None] | None = None,
) -> tuple[list[Latency], list[float]]:
    """Latencies in the order of the files, and the milliseconds it takes to make a session, its optimisation included.

    Args:
        files: the first is the baseline.
        settings: of all sessions.
        feeds: inputs of all.
        seconds: time for the rounds, after warm-up. There are at least `min_rounds`.
        seed: of order and bootstrap.
        progress: is called with the fraction done.
    """
    order = random.Random(seed)
    blocks: list[np.ndarray] = []
    loads: list[list[float]] = []
    sessions: dict[int, onnxruntime.InferenceSession] = {}
    runs: list[Callable[[], object]] = []
    for block in range(BLOCKS):
        runs.clear()
        sessions.clear()  # before others are made: a model may take half of the memory
        load = [0.0] * len(files)
        for n in order.sample(range(len(files)), len(files)):
            begin = time.perf_counter()
            sessions[n] = session_of(files[n], settings)
            load[n] = time.perf_counter() - begin
        loads.append(load)
        runs += [partial(sessions[n].run, None, feeds) for n in range(len(files))]
        step = None if progress is None else lambda done, block=block: progress((block + done) / BLOCKS)
        blocks.append(interleaved(runs, seconds / BLOCKS, -(-min_rounds // BLOCKS), order, step))
    return summarised(blocks, seed), (1e3 * np.median(loads, axis=0)).tolist()


def interleaved(
    runs: Sequence[Callable[[], object]],
    seconds: float,
    min_rounds: int,
    order: random.Random,
    progress: Callable[[float], None] | None = None,
) -> np.ndarray:
    """Milliseconds of each run, [candidates, rounds], after a warm-up of each."""
    for run in runs:
        for _ in range(_WARM_UP):
            run()
    rounds: list[list[float]] = []
    begin = time.perf_counter()
    while len(rounds) < min_rounds or time.perf_counter() - begin < seconds:
        row = [0.0] * len(runs)
        for n in order.sample(range(len(runs)), len(runs)):
            start = time.perf_counter()
            runs[n]()
            row[n] = 1e3 * (time.perf_counter() - start)
        rounds.append(row)
        if progress is not None:
            progress(min(1.0, min((time.perf_counter() - begin) / max(seconds, 1e-9), len(rounds) / min_rounds)))
    return np.array(rounds).T


def summarised(blocks: Sequence[np.ndarray], seed: int) -> list[Latency]:
    """What blocks of rounds, each from `interleaved`, say of each candidate."""
    result = []
    for n in range(len(blocks[0])):
        times = np.concatenate([block[n] for block in blocks])
        center, low, high = ratio([block[n] / block[0] for block in blocks], seed)
        verdict = "baseline" if n == 0 else "within noise" if low <= 1 <= high else "slower" if center > 1 else "faster"
        p10, median, p90 = (float(value) for value in np.percentile(times, [10, 50, 90]))
        kept = times[:: -(-len(times) // _KEPT)]
        result.append(Latency(median, p10, p90, center, low, high, verdict, len(times), tuple(kept.tolist())))
    return result


def ratio(blocks: Sequence[np.ndarray], seed: int) -> tuple[float, float, float]:
    """Median of the per-round ratios, and the 95 % interval of that median by resampling blocks and the rounds within them.

    A bootstrap of so few blocks is too narrow; it is widened as Student's distribution is wider than the normal one, and a sample of n spreads
    less than what it is drawn from.
    """
    generator = np.random.default_rng(seed)
    center = float(np.median(np.concatenate(list(blocks))))
    medians = []
    for _ in range(1000):
        drawn = generator.integers(0, len(blocks), len(blocks))
        medians.append(np.median(np.concatenate([generator.choice(blocks[b], len(blocks[b])) for b in drawn])))
    low, high = np.percentile(medians, [2.5, 97.5])
    n = len(blocks)
    wider = _STUDENT[n - 1] / _NORMAL * math.sqrt(n / (n - 1)) if n > 1 else 1.0
    return center, center - wider * max(0.0, center - float(low)), center + wider * max(0.0, float(high) - center)
