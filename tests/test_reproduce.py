"""The tool that makes the tables of results: they add up over calls."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from click.testing import CliRunner

from laurel_rewrite.lab.runs import Recipe
from laurel_rewrite.sources.models import build
from tools.reproduce import __main__ as reproduce
from tools.reproduce.tables import GPU_TABLES, TABLES, each

pytestmark = [pytest.mark.engines, pytest.mark.usefixtures("one_thread")]
REPOSITORY = Path(__file__).parent.parent


@pytest.mark.parametrize("name", TABLES)
def test_a_table_can_be_made(name, monkeypatch):
    """Its model is built, has its candidates' sites, and at least a million tokens (of images: pixels) are trained on; half as many where there are 120
    runs."""
    monkeypatch.chdir(REPOSITORY)
    table = TABLES[name]
    built = build(table.model, table.settings)
    positions = 1 if "length" in table.recipe else built.args[0][0, 0].numel()
    assert table.recipe["tokens"] * positions >= (500_000 if name == "registry" else 1_000_000)
    names = [candidate.name for candidate in table.candidates()]
    assert len(names) == len(set(names)) > 1
    Recipe(**table.recipe)


def test_the_large_scale_is_of_the_papers_size(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    table = GPU_TABLES["paper"]
    assert build(table.model, table.settings, device="meta").parameters == pytest.approx(157e6, rel=0.02)


def test_tables_add_up_over_calls(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    small = {"width": 16, "depth": 2, "heads": 2, "vocabulary": 256, "dropout": 0.0}
    tiny = dataclasses.replace(
        TABLES["paper"], settings=small, candidates=each("rw"), rates=(1e-3, 1e-2),
        recipe={"tokens": 512, "length": 32, "batch": 4, "evaluations": 2},
    )  # fmt: skip
    monkeypatch.setitem(reproduce.TABLES, "paper", tiny)
    words = ["paper", "--results", str(tmp_path), "--profile-seconds", "0", "--seeds"]
    done = CliRunner().invoke(reproduce.main, [*words, "2", "--minutes", "0"], catch_exceptions=False)
    assert "no learning rate is chosen yet" in done.output
    for seeds, seen in (("1", "1 of 1 seeds, 3 of 3 runs"), ("2", "2 of 2 seeds, 6 of 6 runs")):
        done = CliRunner().invoke(reproduce.main, [*words, seeds], catch_exceptions=False)
        assert done.exit_code == 0
        assert seen in done.output
    text = (tmp_path / "paper.md").read_text()
    assert "learning rate 0.01 for all" in text
    assert "](paper.md) Against the unchanged model, " in (tmp_path / "README.md").read_text()
    assert str(REPOSITORY) not in text
    assert len(list((tmp_path / "paper" / "runs").iterdir())) == 6
    assert str(REPOSITORY) not in (tmp_path / "paper" / "comparison.json").read_text()
