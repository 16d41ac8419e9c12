"""Each cell of docs/engines.md is run: engine by operator class."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch

from tools.engines.case import CLASSES
from tools.engines.ranks import Ranks
from tools.engines.table import GPU, PAGE, Engine, WrongError, cell, engines

pytestmark = pytest.mark.engines

ENGINES = engines()


@pytest.fixture(scope="module")
def pool():
    """Two processes, which are started for the first engine that takes several."""
    with contextlib.closing(Ranks()) as ranks:
        yield ranks


@pytest.mark.filterwarnings("ignore")  # of the engines' own
@pytest.mark.parametrize("operator", CLASSES)
@pytest.mark.parametrize("name", ENGINES)
def test_a_cell_is_what_its_engine_declares(name, operator, pool, toys):
    engine = ENGINES[name]
    found = cell(engine, operator, pool)
    if engine.gpu and not torch.cuda.is_available():
        assert found == GPU
        pytest.skip(GPU)
    assert found.startswith("works" if engine.refusal(operator) is None else "refused")


def test_the_page_has_these_rows_and_columns_and_no_empty_cell():
    lines = PAGE.read_text().splitlines()
    head = next(line for line in lines if line.startswith("| engine |"))
    assert [word.strip() for word in head.strip("|").split("|")] == ["engine", *CLASSES, "tolerance"]
    rows = [line for line in lines if line.startswith("| **")]
    assert [re.match(r"\| \*\*(.*?)\*\*", row)[1] for row in rows] == list(ENGINES)
    for row, engine in zip(rows, ENGINES.values(), strict=True):
        cells = [cell.strip() for cell in row.strip("|").split("|")][1:-1]
        for operator, found in zip(CLASSES, cells, strict=True):
            expected = re.escape(GPU) if engine.gpu else r"works \(\de[+-]\d\d\)" if engine.refusal(operator) is None else "refused: .+"
            assert re.fullmatch(expected, found), f"{engine.name}, {operator}: {found}"


class Pool:
    """Processes that came to something."""

    def __init__(self, *outcomes):
        self.outcomes = list(outcomes)

    def run(self, engine, operator):
        return self.outcomes


def scaled(by, drop=""):
    def run(case):
        result = case.reference
        return type(result)(
            result.loss, {name: by * gradient for name, gradient in result.gradients.items() if drop not in name or not drop}
        )

    return run


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (Engine("twice", "", scaled(2.0)), "relative error of .* is 1, above 1e-04"),
        (Engine("none", "", scaled(float("nan"))), "relative error of .* is nan"),
        (
            Engine("some", "", scaled(1.0, drop="laurel_0")),
            r"12 parameters have no gradient, model\.layers\.0\.laurel_0\.down\.weight first",
        ),
        (Engine("works", "", scaled(1.0), refuses=(("local", "no"),)), "it should be refused with 'no'"),
        (Engine("dead", "", scaled(1.0), processes=2), "RuntimeError: no memory"),
    ],
)
def test_a_cell_that_is_wrong_is_an_error(engine, message):
    with pytest.raises(WrongError, match=message):
        cell(engine, "local", Pool(("failed", "RuntimeError: no memory"), ("works", None)))


def test_a_process_that_hangs_is_an_error(pool, monkeypatch):
    monkeypatch.setattr("tools.engines.ranks.CELL", 0.0)
    with pytest.raises(WrongError, match="did not end within 0 seconds"):
        cell(ENGINES["DDP"], "local", pool)
    assert not pool.running
