"""Limits on a profile: `--fail-if 'latency_ratio > 1.05'`."""

from __future__ import annotations

from dataclasses import replace

import pytest

from laurel_rewrite import ConfigError, profile
from laurel_rewrite.profiling.limits import NAMES, check_limit, exceeded, figures, needs_profile


@pytest.fixture(scope="module")
def result(exported):
    return profile([exported("bert")] * 2, seconds=0, min_rounds=2, threads=1, control=True, self_check=True)


def test_every_figure_that_can_be_named(result):
    assert list(figures(result.rows[1], result.rows[0], result.rows[1].latency)) == NAMES


@pytest.mark.parametrize(
    ("limit", "holds"),
    [
        ("flops_ratio > 1.05", False),
        ("flops_ratio >= 1", True),
        ("0.5 < flops_ratio < 2", True),
        ("not flops_ratio == 1", False),
        ("fusions_lost > 0 or parameter_ratio != 1", False),
        ("fusions_lost == 0 and (flops_ratio - 1) * 100 < 3", True),
        ("-flops_ratio < 0", True),
    ],
)
def test_limits(limit, holds, result):
    check_limit(limit)
    found = exceeded(limit, result)
    assert bool(found) == holds
    assert len(found) <= 1  # neither the model with one more layer nor the first again


def test_the_sentence_names_the_figures(result):
    (line,) = exceeded("flops_ratio + fusions_lost >= 1", result)
    assert line.endswith(": flops_ratio + fusions_lost >= 1 (flops_ratio 1, fusions_lost 0)")


def at_two_shapes(result, **changes):
    """The same profile as if the second model had been measured at two shapes: [0.98, 1.01], and what is given."""
    first = replace(result.rows[1].latency, ratio=1.0, low=0.98, high=1.01, verdict="within noise")
    row = replace(result.rows[1], latencies=(first, replace(first, **changes)))
    baseline = replace(result.rows[0], latencies=result.rows[0].latencies * 2)
    return replace(result, rows=(baseline, row), shapes=({"x": "float32[1]"}, {"x": "float32[8]"}), phases=("", ""))


WIDE = {"ratio": 1.01, "low": 0.904, "high": 1.139, "verdict": "unresolved"}
SLOW = {"ratio": 1.1, "low": 1.06, "high": 1.139, "verdict": "slower"}


@pytest.mark.parametrize(
    ("limit", "changes", "holds"),
    [
        ("latency_low > 1.05", WIDE, False),
        ("verdict == unresolved", WIDE, True),
        ("latency_low > 1.05 or verdict == unresolved", WIDE, True),
        ("verdict != within_noise", WIDE, True),
        ("verdict == slower", WIDE, False),
        ("verdict == slower", SLOW, True),
        ("verdict == unresolved", SLOW, False),
        ("not verdict == faster", SLOW, True),
        ("verdict == within_noise", SLOW, True),
        ("latency_ratio < 0.99", SLOW, False),
    ],
)
def test_a_limit_can_name_the_verdict_and_holds_where_it_does_at_any_shape(limit, changes, holds, result):
    check_limit(limit)
    assert bool(exceeded(limit, at_two_shapes(result, **changes))) == holds


def test_the_sentence_names_the_shape(result):
    (line,) = exceeded("verdict == unresolved or latency_high > 2", at_two_shapes(result, **WIDE))
    assert line.endswith(" at x float32[8]: verdict == unresolved or latency_high > 2 (verdict unresolved, latency_high 1.139)")
    (line,) = exceeded("ops > 1", at_two_shapes(result, **WIDE))  # which is known for the first alone
    assert " at " not in line


def test_skipped_sites_need_no_profile():
    check_limit("skipped > 0")
    assert not needs_profile("skipped > 0")
    assert needs_profile("skipped > 0 or verdict == slower")
    assert exceeded("skipped > 0", None, 3) == ["skipped > 0 (skipped 3)"]
    assert exceeded("skipped > 0", None, 0) == exceeded("verdict == slower", None, 3) == []


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("verdict == slowr", "no verdict 'slowr'. Nearest: slower"),
        ("verdict > slower", "the verdict is compared with a word"),
        ("verdict", "the verdict is compared with a word"),
        ("latency_ratio == slower", "the verdict is compared with a word"),
        ("verdict == 1", "the verdict is compared with a word"),
        ("latency_ratio >", "is no comparison such as"),
        ("latency > 1", "no figure 'latency'. Nearest: latency_"),
        ("flops_ratio > 0 or speed > 2", "no figure 'speed'"),
        ("__import__('os').system('true')", "cannot stand there"),
        ("'a' > 1", "cannot stand there"),
        ("ops / 0 > 1", "divides by 0"),
        ("(" * 400 + "1" + ")" * 400, "is no comparison"),
    ],
)
def test_what_is_no_limit(limit, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.").replace("(", r"\(")):
        check_limit(limit)


def test_the_command_fails_after_it_has_written(exported, tmp_path, here):
    given = str(exported("bert"))
    words = ["profile", given, given, "--profile-seconds", "0.05", "--no-one-more-layer", "--fail-if"]
    result = here(*words, "ops > 1")
    assert result.returncode == 1
    assert "ops > 1 (ops" in result.stderr
    assert (tmp_path / "laurel_profile" / "report.html").exists()
    assert here(*words, "flops_ratio > 1.01").returncode == 0
    assert here(*words, "flops > 1.01").returncode == 2
    main = here(given, "--rank", "4", "--profile-seconds", "0.05", "--fail-if", "flops_ratio > 1")
    assert main.returncode == 1
    assert "laurel.onnx: flops_ratio > 1" in main.stderr
    assert here(given, "--profile-seconds", "0", "--fail-if", "ops > 1").returncode == 2
