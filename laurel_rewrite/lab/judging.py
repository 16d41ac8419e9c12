"""What may be said of losses that were reached from the same seeds: paired differences, their intervals over seeds, corrected for their number.

A seed is one sample, whatever number of batches its loss is a mean of. The interval is Student's for the mean of the paired differences, n - 1
degrees of freedom; the probabilities of all comparisons with the baseline are corrected after Holm (1979).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from laurel_rewrite.errors import missing

ALPHA = 0.05
"""The probability with which equal models are told apart, over all comparisons of a table; intervals hold 1 - ALPHA each."""
BETTER, WORSE, ALIKE, ONE_SEED, FAILED, BASELINE = "better", "worse", "not told apart", "one seed: not judged", "failed", "baseline"


@dataclass(frozen=True)
class Judgement:
    """Of one candidate against the baseline.

    Attributes:
        mean: of its losses over seeds; nan where it reached none.
        spread: their standard deviation; nan with fewer than two.
        difference: mean of its losses less the baseline's, over the seeds that both have.
        low, high: the interval of the difference that holds it with 95 %.
        p: probability of a difference as large between equal models; corrected, of any such in the table.
        seeds: how many both have.
        failed: in how many seeds it reached no loss.
        verdict: one of the words above. "failed" where it failed in some seed and the baseline did not.
    """

    name: str
    mean: float
    spread: float
    difference: float
    low: float
    high: float
    p: float
    corrected: float
    seeds: int
    failed: int
    verdict: str


def judged(losses: Mapping[str, Mapping[int, float | None]], baseline: str) -> list[Judgement]:
    """The candidates against one of them.

    Args:
        losses: by candidate and seed; None where it failed.
        baseline: the candidate that the others are compared with.
    """
    paired = {name: _differences(found, losses[baseline]) for name, found in losses.items()}
    tested = {name: paired_t(found) for name, found in paired.items() if name != baseline and len(found) > 1}
    corrected = dict(zip(tested, holm([p for *_, p in tested.values()]), strict=True))
    return [_judgement(name, losses, baseline, paired[name], tested.get(name), corrected.get(name, math.nan)) for name in losses]


def _differences(losses: Mapping[int, float | None], baseline: Mapping[int, float | None]) -> list[float]:
    pairs = ((loss, baseline.get(seed)) for seed, loss in losses.items())
    return [loss - other for loss, other in pairs if loss is not None and other is not None]


def _judgement(
    name: str,
    losses: Mapping[str, Mapping[int, float | None]],
    baseline: str,
    differences: Sequence[float],
    tested: tuple[float, float, float] | None,
    corrected: float,
) -> Judgement:
    reached = [loss for loss in losses[name].values() if loss is not None]
    low, high, p = tested or (math.nan,) * 3
    difference = float(np.mean(differences)) if differences else math.nan
    failed = [seed for seed, loss in losses[name].items() if loss is None]
    if name == baseline:
        verdict = BASELINE
    elif any(losses[baseline].get(seed) is not None for seed in failed):
        verdict = FAILED
    elif tested is None:
        verdict = ONE_SEED
    else:
        verdict = ALIKE if corrected >= ALPHA else BETTER if difference < 0 else WORSE
    return Judgement(
        name,
        float(np.mean(reached)) if reached else math.nan,
        float(np.std(reached, ddof=1)) if len(reached) > 1 else math.nan,
        difference,
        low,
        high,
        p,
        corrected,
        len(differences),
        len(failed),
        verdict,
    )


def paired_t(differences: Sequence[float]) -> tuple[float, float, float]:
    """The interval of the mean of differences, and the probability of one as large where the true one is 0.

    Args:
        differences: two or more.
    """
    try:
        from scipy import stats
    except ModuleNotFoundError as error:
        raise missing("scipy", "train") from error
    n = len(differences)
    mean = float(np.mean(differences))
    deviation = float(np.std(differences, ddof=1)) / math.sqrt(n)
    reach = float(stats.t.ppf(1 - ALPHA / 2, n - 1)) * deviation
    p = 2 * float(stats.t.sf(abs(mean) / deviation, n - 1)) if deviation else float(mean == 0)
    return mean - reach, mean + reach, p


def holm(probabilities: Sequence[float]) -> list[float]:
    """Probabilities corrected for their number (Holm, A simple sequentially rejective multiple test procedure, 1979)."""
    corrected = [0.0] * len(probabilities)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(probabilities)), key=lambda place: probabilities[place])):
        largest = max(largest, min(1.0, (len(probabilities) - rank) * probabilities[place]))
        corrected[place] = largest
    return corrected


def tokens_for(loss: float, curve: Sequence[tuple[float, float]]) -> float | None:
    """Where a curve first reaches a loss, between its points on a straight line.

    Args:
        loss: to be reached.
        curve: pairs of tokens and loss, tokens ascending.

    Returns:
        Tokens; None where it does not.
    """
    for place, (tokens, here) in enumerate(curve):
        if here <= loss:
            if place == 0:
                return tokens
            before, above = curve[place - 1]
            return before + (tokens - before) * (above - loss) / (above - here)
    return None
