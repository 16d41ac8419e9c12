"""What is said of losses by seed: no more than they allow."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from laurel_rewrite.lab.judging import holm, judged, paired_t, tokens_for


def table(*rows: list[float | None]) -> dict[str, dict[int, float | None]]:
    return {name: dict(enumerate(row)) for name, row in zip(["baseline", "one", "other"], rows, strict=False)}


def verdicts(*rows: list[float | None]) -> list[str]:
    return [judgement.verdict for judgement in judged(table(*rows), "baseline")]


def test_the_interval_and_the_probability_are_those_of_the_paired_test():
    generator = np.random.default_rng(0)
    base, other = generator.normal(2, 0.1, 5), generator.normal(1.95, 0.1, 5)
    low, high, p = paired_t((other - base).tolist())
    expected = stats.ttest_rel(other, base)
    interval = expected.confidence_interval(0.95)
    assert p == pytest.approx(expected.pvalue, rel=1e-9)  # the same formula, in double precision
    assert (low, high) == pytest.approx((interval.low, interval.high), rel=1e-9)


def test_holm_is_as_in_his_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02], rel=1e-12)
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_what_is_shared_by_a_seed_is_taken_out():
    """Seeds differ by more than the models, and always by the same."""
    base = [2.0, 2.5, 3.0]
    assert verdicts(base, [x - 0.01 - 0.0001 * n for n, x in enumerate(base)]) == ["baseline", "better"]
    assert verdicts(base, [x + 0.01 + 0.0001 * n for n, x in enumerate(base)]) == ["baseline", "worse"]
    assert verdicts(base, [2.1, 2.4, 3.05]) == ["baseline", "not told apart"]


def test_equal_losses_are_not_told_apart_and_an_equal_step_is():
    assert verdicts([2.0, 3.0], [2.0, 3.0]) == ["baseline", "not told apart"]
    assert verdicts([2.0, 3.0], [1.5, 2.5]) == ["baseline", "better"]


def test_one_seed_is_not_judged_and_a_failure_is_a_result():
    assert verdicts([2.0], [1.0]) == ["baseline", "one seed: not judged"]
    one, failed = judged(table([2.0, 2.0, 2.0], [1.0, None, 1.1]), "baseline")
    assert (failed.verdict, failed.failed, failed.seeds) == ("failed", 1, 2)
    assert failed.mean == pytest.approx(1.05, rel=1e-12)
    assert one.failed == 0
    assert verdicts([None, None], [1.0, 1.2]) == ["baseline", "one seed: not judged"]
    assert math.isnan(judged(table([2.0], [None]), "baseline")[1].mean)


def test_more_candidates_make_each_verdict_harder():
    generator = np.random.default_rng(1)
    base = [2.0, 2.1, 2.2]
    better = [1.95, 2.06, 2.14]
    assert verdicts(base, better)[1] == "better"
    noise = [(np.array(base) + generator.normal(0, 0.05, 3)).tolist() for _ in range(3)]
    losses = {"baseline": base, "better": better, **{str(n): row for n, row in enumerate(noise)}}
    found = judged({name: dict(enumerate(row)) for name, row in losses.items()}, "baseline")
    assert found[1].corrected > found[1].p
    assert found[1].verdict == "not told apart"


def test_equal_models_are_told_apart_in_one_of_twenty_tables():
    """1000 tables of four candidates that are all the baseline: the standard error of the share is 0.7 %."""
    generator = np.random.default_rng(2)
    wrong = 0
    for _ in range(1000):
        losses = {str(n): dict(enumerate(generator.normal(2, 0.01, 3))) for n in range(5)}
        wrong += any(judgement.verdict in ("better", "worse") for judgement in judged(losses, "0"))
    assert 0.01 <= wrong / 1000 <= 0.07


def test_the_tokens_that_a_curve_needs():
    curve = [(100.0, 4.0), (200.0, 3.0), (300.0, 2.0)]
    assert tokens_for(2.5, curve) == pytest.approx(250, rel=1e-12)
    assert tokens_for(5.0, curve) == 100
    assert tokens_for(1.9, curve) is None
