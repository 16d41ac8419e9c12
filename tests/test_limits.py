"""Limits on a profile: `--fail-if 'latency_ratio > 1.05'`."""

from __future__ import annotations

import pytest

from laurel_rewrite import ConfigError, profile
from laurel_rewrite.limits import NAMES, check_limit, exceeded, figures


@pytest.fixture(scope="module")
def result(exported):
    return profile([exported("bert")] * 2, seconds=0, min_rounds=2, threads=1, control=True, self_check=True)


def test_every_figure_that_can_be_named(result):
    assert list(figures(result.rows[1], result.rows[0])) == NAMES


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


@pytest.mark.parametrize(
    ("limit", "message"),
    [
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
    words = ["profile", given, given, "--min-time", "0.05", "--no-one-more-layer", "--fail-if"]
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
