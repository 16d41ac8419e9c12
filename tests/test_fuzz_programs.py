"""Random programs with residual connections known by construction; `python -m tools.fuzz` makes as many as one likes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tools.fuzz import __main__ as fuzzing
from tools.fuzz import programs
from tools.fuzz.grammar import THEMES, program

SEEDS = range(1, 101)


@pytest.mark.parametrize("part", range(10))
def test_programs_keep_every_promise_of_a_rewrite(part):
    kinds = Counter(programs.run(seed).split(":")[0] for seed in SEEDS[part::10])
    assert kinds["refused"] <= 3  # of ten


FORMER_FAULTS = {
    "an add in place that a view sees, in a graph": 2018,
    "keywords in parentheses": 108,
    "a shared block that begins another stream": 109,
    "a loop that begins another stream": 347,
    "a sum whose skip a block has changed in place": 2567,
}


@pytest.mark.parametrize("name", FORMER_FAULTS)
def test_programs_that_were_faults(name):
    programs.run(FORMER_FAULTS[name])


def test_the_seeds_have_most_themes():
    assert len({program(seed).theme for seed in SEEDS}) >= len(THEMES) - 3


def test_a_program_is_made_of_its_seed_alone():
    assert program(7) == program(7) != program(8)


def test_counts_add_up_over_resumed_runs_and_failures_are_kept(tmp_path, monkeypatch, capsys):
    def run(seed: int) -> str:
        if seed % 3 == 2 and not mended:
            raise AssertionError(f"seed {seed}\nmore")
        return "even" if seed % 2 == 0 else "odd"

    mended = False
    monkeypatch.setattr(programs, "run", run)
    state = tmp_path / "state.json"
    for _ in range(2):
        some = fuzzing.Fuzzing(["programs"], state)
        for _ in range(3):
            some.try_one("programs", some.kinds["programs"].next)
            some.kinds["programs"].next += 1
        some.save()
    kept = json.loads(state.read_text())["programs"]
    assert kept.pop("seconds") > 0
    assert kept == {
        "next": 6,
        "counts": {"even": 2, "odd": 2},
        "failed": {"2": "AssertionError: seed 2", "5": "AssertionError: seed 5"},
    }
    assert "from tools.fuzz.programs import run; run(5)" in capsys.readouterr().out
    mended = True
    again = fuzzing.Fuzzing(["programs"], state)
    again.again()
    kept = json.loads(state.read_text())["programs"]
    assert {key: kept[key] for key in ("next", "counts", "failed")} == {"next": 6, "counts": {"even": 3, "odd": 3}, "failed": {}}
    assert "| programs | 6 |" in again.report()


def test_the_command_says_what_it_tried(tmp_path):
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "tools.fuzz", "--kind", "programs", "--seconds", "0", "--state", str(tmp_path / "state.json")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["programs", "0", "failed", "0"]
