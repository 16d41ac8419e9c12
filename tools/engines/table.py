"""The table: engines by operator classes. Each cell is run, and is what its engine declares, or it is an error."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from laurel_rewrite.errors import LaurelError
from tools.engines.case import CLASSES, Case, Result

EXACT = "float32 in another order of sums", 1e-4
HALF = "bfloat16, which has 8 bits, and 12 sums after one another", 0.25
MODULES = ("single", "precision", "checkpointing", "data_parallel", "tensor_parallel", "pipelines", "libraries", "checkpoints", "folders")
"""Modules beside this one that declare engines, in the order of the table."""
GPU = "needs a GPU, and was not run"


@dataclass(frozen=True)
class Engine:
    """One row.

    Attributes:
        name, what: of the row, and in one line what is done.
        run: gives loss and gradients of a case; in each process, where there are several.
        processes: how many it takes.
        tolerance: why a result may differ from the plain process's, and by how much.
        refuses: operator class -> a regular expression that the refusal's message has.
        gpu: it runs on a GPU alone.
    """

    name: str
    what: str
    run: Callable[[Case], Result]
    processes: int = 1
    tolerance: tuple[str, float] = EXACT
    refuses: tuple[tuple[str, str], ...] = ()
    gpu: bool = False

    def refusal(self, operator: str) -> str | None:
        """What the message of its refusal has; None where it works."""
        return dict(self.refuses).get(operator)


_engines: dict[str, Engine] = {}


def engine(
    name: str,
    what: str,
    *,
    processes: int = 1,
    tolerance: tuple[str, float] = EXACT,
    refuses: dict[str, str] | None = None,
    gpu: bool = False,
) -> Callable[[Callable[[Case], Result]], Callable[[Case], Result]]:
    """Declare an engine; see `Engine`."""

    def declare(run: Callable[[Case], Result]) -> Callable[[Case], Result]:
        _engines[name] = Engine(name, what, run, processes, tolerance, tuple((refuses or {}).items()), gpu)
        return run

    return declare


def engines() -> dict[str, Engine]:
    """All engines by name, in the order of the table."""
    for module in MODULES:
        importlib.import_module(f"tools.engines.{module}")
    return dict(_engines)


class WrongError(Exception):
    """A cell is not what its engine declares."""


def cell(engine: Engine, operator: str, pool: object) -> str:
    """Run one cell, and say what it came to.

    Args:
        pool: the processes for engines that take several; see `tools.engines.ranks.Ranks`.

    Raises:
        WrongError: gradients are wrong or missing, a refusal is missing or another one, or it ended in an error or a hang.
    """
    if engine.gpu and not torch.cuda.is_available():
        return GPU
    where = f"{engine.name}, {operator}"
    expected = engine.refusal(operator)
    try:
        outcomes = pool.run(engine.name, operator) if engine.processes > 1 else [tried(engine, operator)]
    except TimeoutError as error:
        raise WrongError(f"{where}: {error}") from None
    refusals = [text for kind, text in outcomes if kind == "refused"]
    if failed := [text for kind, text in outcomes if kind == "failed"]:
        raise WrongError(f"{where}: {failed[0]}")
    if expected is not None:
        if not any(re.search(expected, text) for text in refusals):
            raise WrongError(f"{where}: it should be refused with {expected!r}: {outcomes}")
        text = next(text for text in refusals if re.search(expected, text))
        return f"refused: {shortened(text)}"
    if refusals:
        raise WrongError(f"{where}: {refusals[0]}")
    found = [found for _, found in outcomes]
    missing = set(Case(operator).reference.gradients) - {name for one in found for name in one.names}
    if missing:
        raise WrongError(f"{where}: {len(missing)} parameters have no gradient, {min(missing)} first")
    worst = max(found, key=lambda one: one.error if one.error == one.error else float("inf"))
    if not worst.error <= engine.tolerance[1]:
        raise WrongError(f"{where}: the relative error of {worst.worst} is {worst.error:.3g}, above {engine.tolerance[1]:.0e}")
    return f"works ({worst.error:.0e})"


def tried(engine: Engine, operator: str) -> tuple[str, object]:
    """One process's part of a cell: ("works", what it found), ("refused", message) or ("failed", message)."""
    case = Case(operator)
    try:
        return "works", case.found(engine.run(case))
    except Exception as error:  # whatever an engine raises is its cell's outcome
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:  # torch's pipelines wrap what a stage raises
            chain.append(cause)
        if ours := [one for one in chain if isinstance(one, LaurelError)]:
            return "refused", str(ours[0])
        return "failed", f"{type(chain[-1]).__name__}: {str(chain[-1])[:600]}"


def shortened(text: str) -> str:
    """A refusal without the site's name, up to the way to mend it."""
    first = text.split(": ", 1)[-1]
    return re.split(r"(?<=[a-z])\. |: ", first)[0].rstrip(".").replace("|", "/")


def written(cells: dict[tuple[str, str], str]) -> str:
    """The page."""
    lines = [
        "# Engines",
        "",
        "What the engines that people train with make of a rewritten model. `python -m tools.engines` runs each cell and writes this page; "
        "`tests/test_engines.py` runs them too. The model is a small Llama of transformers, whose connections' parameters are moved off their start. "
        "*Works* is followed by the largest relative error of the loss and of any parameter's gradient (relative to its norm, or to 1 % of the largest gradient's) against one "
        "plain process in float32, which is below the row's tolerance.",
        "",
        "| operator class | operator |",
        "|---|---|",
        *(f"| {name} | `{variant}` |" for name, variant in CLASSES.items()),
        "",
        f"| engine | {' | '.join(CLASSES)} | tolerance |",
        f"|---|{'---|' * len(CLASSES)}---|",
    ]
    for name, row in engines().items():
        found = " | ".join(cells[name, operator] for operator in CLASSES)
        lines.append(f"| **{name}**: {row.what} | {found} | {row.tolerance[1]:g} |")
    reasons = {tolerance: why for why, tolerance in (row.tolerance for row in engines().values())}
    lines += ["", "Tolerances: " + "; ".join(f"{tolerance:g}: {why}" for tolerance, why in sorted(reasons.items())) + "."]
    return "\n".join(lines) + "\n"


PAGE = Path(__file__).parents[2] / "docs" / "engines.md"
