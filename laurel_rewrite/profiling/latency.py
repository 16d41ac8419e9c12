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

from laurel_rewrite.errors import ConfigError
from laurel_rewrite.profiling.sessions import Settings, session_of

if TYPE_CHECKING:
    import onnxruntime

VERDICTS = ("faster", "within noise", "unresolved", "slower")
RESOLVED = 0.05
"""How far an interval may reach from its ratio, as a fraction of it, to say that there is no difference."""
BLOCKS = 6  # makings of the sessions, at least
MOST_SECONDS = 120.0  # for a precision
_WARM_UP = 3
_KEPT = 2000
_NORMAL = 1.96
_STUDENT = {
    1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 10: 2.23, 12: 2.18, 15: 2.13, 20: 2.09, 30: 2.04, 60: 2.00,
}  # fmt: skip
"""Quantiles at 97.5 % of the normal distribution, and of Student's by degrees of freedom; those between take the next smaller one's."""


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        seconds: for the rounds at one shape of inputs, after warm-up.
        min_rounds: that there are whatever the time.
        precision: measure on until every interval reaches no farther from its ratio than this fraction of it; None to stop after `seconds`.
        max_seconds: for `precision`, at one shape of inputs. The block of rounds that is running then is ended.

    Raises:
        ConfigError: a time that is no finite number of 0 or more, or a precision that is not between 0 and 1.
    """

    seconds: float = 10.0
    min_rounds: int = 20
    precision: float | None = None
    max_seconds: float = MOST_SECONDS

    def __post_init__(self) -> None:
        for seconds in (self.seconds, self.max_seconds):
            if not 0 <= seconds < math.inf:
                raise ConfigError(f"The seconds to measure must be a number of 0 or more, not {seconds}.")
        if self.precision is not None and not 0 < self.precision < 1:
            raise ConfigError(f"The precision must lie between 0 and 1, for instance 0.02 for 2 %; not {self.precision}.")


USUAL = Effort()


@dataclass(frozen=True)
class Latency:
    """Time of one candidate.

    Attributes:
        median_ms, p10_ms, p90_ms: of one run, milliseconds.
        ratio, low, high: over the first candidate's: median of the rounds' ratios, and its 95 % bootstrap interval.
        verdict: "baseline"; "faster" or "slower" where the interval does not hold 1; "within noise" where it does and reaches no farther than
            `RESOLVED` from the ratio; else "unresolved": there may be a difference, and it was not measured long enough to tell.
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

    @property
    def precision(self) -> float:
        """How far the interval reaches from the ratio, to the farther side, as a fraction of the ratio."""
        return reach(self.ratio, self.low, self.high)


def measure(
    files: Sequence[Path],
    settings: Settings,
    feeds: Mapping[str, np.ndarray],
    effort: Effort,
    *,
    seed: int,
    progress: Callable[[float], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[Latency], list[float]]:
    """Latencies in the order of the files, and the milliseconds it takes to make a session, its optimisation included.

    Args:
        files: the first is the baseline.
        settings: of all sessions.
        feeds: inputs of all.
        effort: how long to measure.
        seed: of order and bootstrap.
        progress: is called with the fraction done of what is measured in any case.
        clock: what a run is measured by, see `interleaved`.
    """
    order = random.Random(seed)
    blocks: list[np.ndarray] = []
    loads: list[list[float]] = []
    sessions: dict[int, onnxruntime.InferenceSession] = {}
    runs: list[Callable[[], object]] = []
    begin = time.perf_counter()
    while True:
        runs.clear()
        sessions.clear()  # before others are made: a model may take half of the memory
        load = [0.0] * len(files)
        for n in order.sample(range(len(files)), len(files)):
            start = time.perf_counter()
            sessions[n] = session_of(files[n], settings)
            load[n] = time.perf_counter() - start
        loads.append(load)
        runs += [partial(sessions[n].run, None, feeds) for n in range(len(files))]
        before = len(blocks)
        step = None if progress is None else lambda done, before=before: progress(min(1.0, (before + done) / BLOCKS))
        blocks.append(interleaved(runs, effort.seconds / BLOCKS, -(-effort.min_rounds // BLOCKS), order, step, clock))
        if len(blocks) < BLOCKS:
            continue
        found = summarised(blocks, seed)
        goal, late = effort.precision, time.perf_counter() - begin >= effort.max_seconds
        if goal is None or late or all(one.precision <= goal for one in found):
            return found, (1e3 * np.median(loads, axis=0)).tolist()


def interleaved(
    runs: Sequence[Callable[[], object]],
    seconds: float,
    min_rounds: int,
    order: random.Random,
    progress: Callable[[float], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> np.ndarray:
    """Milliseconds of each run, [candidates, rounds], after a warm-up of each.

    `clock` is what a run is measured by: on a machine that others use, too, `time.thread_time` of one thread leaves their share out.
    """
    for run in runs:
        for _ in range(_WARM_UP):
            run()
    rounds: list[list[float]] = []
    begin = time.perf_counter()
    done = 0.0
    while done < 1:
        row = [0.0] * len(runs)
        for n in order.sample(range(len(runs)), len(runs)):
            start = clock()
            runs[n]()
            row[n] = 1e3 * (clock() - start)
        rounds.append(row)
        # The loop ends by the very figure that is told: told by another look at the clock, the last one may fall short of 1.
        done = min(1.0, (time.perf_counter() - begin) / max(seconds, 1e-9), len(rounds) / max(min_rounds, 1))
        if progress is not None:
            progress(done)
    return np.array(rounds).T


def summarised(blocks: Sequence[np.ndarray], seed: int) -> list[Latency]:
    """What blocks of rounds, each from `interleaved`, say of each candidate."""
    result = []
    for n in range(len(blocks[0])):
        times = np.concatenate([block[n] for block in blocks])
        center, low, high = ratio([block[n] / block[0] for block in blocks], seed)
        verdict = "baseline" if n == 0 else verdict_of(center, low, high)
        p10, median, p90 = (float(value) for value in np.percentile(times, [10, 50, 90]))
        kept = times[:: -(-len(times) // _KEPT)]
        result.append(Latency(median, p10, p90, center, low, high, verdict, len(times), tuple(kept.tolist())))
    return result


def verdict_of(center: float, low: float, high: float) -> str:
    """What an interval says of a ratio, see `Latency`."""
    if not low <= 1 <= high:
        return "slower" if center > 1 else "faster"
    return "within noise" if reach(center, low, high) <= RESOLVED else "unresolved"


def reach(center: float, low: float, high: float) -> float:
    """How far an interval reaches from its center, to the farther side, as a fraction of the center."""
    return max(high - center, center - low) / center


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
    student = _STUDENT[max(known for known in _STUDENT if known < n)] if n > 1 else _NORMAL
    wider = student / _NORMAL * math.sqrt(n / (n - 1)) if n > 1 else 1.0
    return center, center - wider * max(0.0, center - float(low)), center + wider * max(0.0, float(high) - center)
