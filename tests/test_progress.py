"""What a log hears of a job that is running."""

from __future__ import annotations

import io
import json
import re
import time

import pytest
from rich.console import Console
from test_cli import NET

from laurel_rewrite.app import progress
from laurel_rewrite.app.progress import Stages


@pytest.fixture
def log() -> Console:
    return Console(file=io.StringIO())


def lines(console: Console) -> list[str]:
    return [re.sub(r"\d+\.\d s", "S", line) for line in console.file.getvalue().splitlines()]


def test_a_stage_is_a_line(log):
    stages = Stages(log, quiet=False)
    with stages("detect") as stage:
        stage.done("12 sites")
    with stages("[fit]"):
        pass
    assert lines(log) == ["detect: 12 sites (S)", "[fit]: done (S)"]


def test_a_long_stage_is_heard_of_now_and_then(log, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.05)
    with Stages(log, quiet=False)("profile") as stage:
        stage.progress(0.25, "loss 3")
        for _ in range(200):
            time.sleep(0.01)
            if len(lines(log)) >= 2:
                break
        stage.done("1.01x")
    assert lines(log)[:2] == ["profile: running, 25%: loss 3 (S)"] * 2
    assert lines(log)[-1] == "profile: 1.01x (S)"


def test_a_stage_that_fails_says_nothing_of_its_end(log):
    with pytest.raises(ZeroDivisionError), Stages(log, quiet=False)("export"):
        1 / 0  # noqa: B018
    assert lines(log) == []


def test_a_log_that_is_closed_stops_nobody(log):
    with Stages(log, quiet=False)("export"):
        log.file.close()


def test_quiet_is_silent_and_json_is_alone_on_its_output(here, tmp_path):
    (tmp_path / "net.py").write_text(NET)
    words = ("net.py", "--rank", "4", "--profile-seconds", "0", "--json")
    told = here(*words)
    assert json.loads(told.stdout)["parameters"]
    assert re.search(r"^verify ONNX: \d+ checks passed.* \(\d+\.\d s\)$", told.stderr, re.M)
    silent = here(*words, "--quiet")
    assert json.loads(silent.stdout)["parameters"]
    assert silent.stderr == ""
