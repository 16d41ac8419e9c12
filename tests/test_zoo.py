"""The fixed sample of the survey, as `tools/zoo.py --sample` runs it: counts that nobody here made up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import slow

TOOLS = Path(__file__).parent.parent / "tools"
EXPECTED = json.loads((TOOLS / "zoo.json").read_text())


def zoo(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOLS / "zoo.py"), *words], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("part", [0, slow(1)])
def test_the_sample_shows_no_differences(part):
    names = EXPECTED["sample"][part::2]
    result = zoo(*names)
    rows = [line for line in result.stdout.splitlines() if line.startswith("ok ")]
    assert len(rows) == len(names), result.stdout
    assert "* differences: 0" in result.stdout
    assert result.returncode == 0


def test_a_difference_fails(tmp_path):
    """With a wrong number in its table, the tool says so, and exits with 1."""
    for name in ("zoo.py", "zoo.json"):
        (tmp_path / name).write_text((TOOLS / name).read_text().replace('"timm:test_vit": [12, 0]', '"timm:test_vit": [11, 0]'))
    result = subprocess.run([sys.executable, tmp_path / "zoo.py", "timm:test_vit"], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "DIFF timm:test_vit" in result.stdout
    assert "12 / 11" in result.stdout


def test_a_model_that_cannot_be_built_is_a_failure_with_its_cause(tmp_path):
    result = zoo("timm:nothing", "hf:bert:x", "--out", str(tmp_path / "table.md"))
    assert result.returncode == 1
    assert "FAIL timm:nothing" in result.stdout
    assert "FAIL hf:bert:x" in result.stdout
    assert "not captured: 2 of 2" in (tmp_path / "table.md").read_text()


def test_every_model_of_the_sample_is_counted():
    assert set(EXPECTED["sample"]) <= set(EXPECTED["models"])
    assert len(EXPECTED["sample"]) >= 25
