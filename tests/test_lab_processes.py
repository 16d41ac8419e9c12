"""Comparisons in processes of their own: killed and resumed, and on two of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import EXAMPLES
from test_lab import GPT, SMALL

pytestmark = pytest.mark.engines
PROCESSES = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]


@pytest.fixture
def words(tmp_path) -> list[str]:
    (tmp_path / "text.txt").write_text("".join(f"{n * n} is the square of {n}\n" for n in range(1500)))
    given = [f"--set={name}={value}" for name, value in {**SMALL, "dropout": 0.0}.items()]
    asked = [
        "--variant",
        "rw+lr+pa",
        "--rank",
        "2",
        "--tokens",
        "2560",
        "--seeds",
        "2",
        "--batch",
        "4",
        "--length",
        "32",
        "--no-one-more-layer",
        "--profile-seconds",
        "0",
    ]
    return ["-m", "laurel_rewrite", "compare", GPT, *given, *asked, "--data", str(tmp_path / "text.txt")]


def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent.parent)}


def run(tmp_path: Path, *words: str) -> None:
    done = subprocess.run([sys.executable, *words], env=environment(tmp_path), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:3000] + done.stderr[-3000:]  # that of a launcher begins with the reason


def numbers(out: Path) -> list:
    runs = json.loads((out / "report.json").read_text())["comparison"]["runs"]
    return [(one["candidate"], one["seed"], [point["train"] for point in one["curve"]], one["judge"], one["learned"]) for one in runs]


def test_a_comparison_that_is_killed_comes_to_the_same_numbers(words, tmp_path):
    run(tmp_path, *words, "--out", str(tmp_path / "whole"))
    process = subprocess.Popen([sys.executable, *words, "--out", str(tmp_path / "part")], env=environment(tmp_path))
    deadline = time.monotonic() + 120
    while not ((tmp_path / "part" / "state" / "run.json").exists() and list((tmp_path / "part" / "runs").glob("*.json"))):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(list((tmp_path / "part" / "runs").glob("*.json"))) < 4
    run(tmp_path, *words, "--out", str(tmp_path / "part"))
    assert numbers(tmp_path / "part") == numbers(tmp_path / "whole")


def test_two_processes_come_to_the_losses_of_one(words, tmp_path):
    run(tmp_path, *words, "--out", str(tmp_path / "one"))
    run(tmp_path, *PROCESSES, *words, "--out", str(tmp_path / "two"))
    one, two = numbers(tmp_path / "one"), numbers(tmp_path / "two")
    assert [row[:2] for row in one] == [row[:2] for row in two]
    for (*_, curve, judge, _), (*_, other, found, _) in zip(one, two, strict=True):
        assert other == pytest.approx(curve, rel=1e-5)  # float32, gradients in another order of addition, over 20 steps
        assert found == pytest.approx(judge, rel=1e-5)
    report = json.loads((tmp_path / "two" / "report.json").read_text())["comparison"]
    assert {run["where"].partition(",")[2].partition(",")[0].strip() for run in report["runs"]} == {"2 processes"}


def test_two_processes_search_as_one(words, tmp_path):
    asked = [*words, "--search", "--trials", "2", "--budget", "flops_ratio <= 2", "--profile-seconds", "0.05", "--seeds", "1"]
    run(tmp_path, *asked, "--out", str(tmp_path / "one"))
    run(tmp_path, *PROCESSES, *asked, "--out", str(tmp_path / "two"))
    one, two = (json.loads((tmp_path / out / "report.json").read_text())["comparison"]["search"] for out in ("one", "two"))
    assert one["finalists"] == two["finalists"]
    for trial, other in zip(one["trials"], two["trials"], strict=True):
        assert {**trial, "loss": 0, "difference": 0} == {**other, "loss": 0, "difference": 0}
        assert other["loss"] == pytest.approx(trial["loss"], rel=1e-5)  # float32, gradients in another order of addition


PARTING = """
import atexit, json, os
import torch
from laurel_rewrite.lab.runs import Recipe, accelerator_of

def threads():
    return len(os.listdir("/proc/self/task"))

def train():
    with accelerator_of(Recipe(tokens=64, batch=2)) as accelerator:
        model = accelerator.prepare(torch.nn.Linear(4, 4))
        model(torch.ones(2, 4)).sum().backward()
        counts.append(threads())
        accelerator.free_memory()

counts = [threads()]
atexit.register(lambda: open(f"threads.{os.environ['RANK']}", "w").write(json.dumps([*counts, threads()])))
train()
train()
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted by Linux's files")
def test_processes_part_before_python_ends(tmp_path):
    (tmp_path / "parting.py").write_text(PARTING)
    run(tmp_path, *PROCESSES, str(tmp_path / "parting.py"))
    for rank in (0, 1):
        before, first, second, after = json.loads((tmp_path / f"threads.{rank}").read_text())
        assert before == after < first == second  # none of the group's threads is left, and two trainings have one group
