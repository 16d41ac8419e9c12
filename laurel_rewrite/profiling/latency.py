"""Latency: ratios that repeat.

Every round runs every model once in random order. The figure is the median over rounds of the ratio to the first model, with a
bootstrap interval: absolute times drift with the machine, ratios within a round do not. Where a session's memory happens to lie is
worth a per cent or two, so that the sessions are made anew several times, and the interval counts each making as one observation.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from laurel_rewrite.profiling.sessions import Settings, session_of

BLOCKS = 6  # makings of the sessions
_WARM_UP = 3


@dataclass(frozen=True)
class Latency:
    """Latency of one model.

    Attributes:
        median_ms, p10_ms, p90_ms: of one run, milliseconds.
        ratio, low, high: over the first model's: median of the rounds' ratios, and its 95 % bootstrap interval.
        verdict: "baseline", "faster", "slower" or "within noise" (the interval holds 1).
        load_ms: median time to make a session, its optimisation included, milliseconds.
        runs_ms: every run, in order.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    ratio: float
    low: float
    high: float
    verdict: str
    load_ms: float
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
) -> list[Latency]:
    """Latencies in the order of the files.

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
    for block in range(BLOCKS):
        step = None if progress is None else lambda done, block=block: progress((block + done) / BLOCKS)
        times, load = _interleaved(files, settings, feeds, seconds / BLOCKS, -(-min_rounds // BLOCKS), order, step)
        blocks.append(times)
        loads.append(load)
    result = []
    for n in range(len(files)):
        times = np.concatenate([block[n] for block in blocks]) * 1e3
        center, low, high = ratio([block[n] / block[0] for block in blocks], seed)
        verdict = "baseline" if n == 0 else "within noise" if low <= 1 <= high else "slower" if center > 1 else "faster"
        p10, median, p90 = (float(value) for value in np.percentile(times, [10, 50, 90]))
        load_ms = 1e3 * float(np.median([load[n] for load in loads]))
        result.append(Latency(median, p10, p90, center, low, high, verdict, load_ms, tuple(times.tolist())))
    return result


def _interleaved(
    files: Sequence[Path],
    settings: Settings,
    feeds: Mapping[str, np.ndarray],
    seconds: float,
    min_rounds: int,
    order: random.Random,
    progress: Callable[[float], None] | None,
) -> tuple[np.ndarray, list[float]]:
    """Seconds of each run, [models, rounds], in sessions made for this call in random order; and the seconds it took to make each."""
    made, load = {}, [0.0] * len(files)
    for n in order.sample(range(len(files)), len(files)):
        begin = time.perf_counter()
        made[n] = session_of(files[n], settings)
        load[n] = time.perf_counter() - begin
    sessions = [made[n] for n in range(len(files))]
    for session in sessions:
        for _ in range(_WARM_UP):
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
    return np.array(rounds).T, load


def ratio(blocks: Sequence[np.ndarray], seed: int) -> tuple[float, float, float]:
    """Median of the per-round ratios, and the 95 % interval of that median by resampling blocks and the rounds within them."""
    generator = np.random.default_rng(seed)
    medians = []
    for _ in range(1000):
        drawn = generator.integers(0, len(blocks), len(blocks))
        medians.append(np.median(np.concatenate([generator.choice(blocks[b], len(blocks[b])) for b in drawn])))
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(np.median(np.concatenate(list(blocks)))), float(low), float(high)
