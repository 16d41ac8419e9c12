"""The figures of one model beside its latency, in one table: limits, `report.json`, the page and the terminal read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from laurel_rewrite.profiling.rows import Row


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        key: in `report.json`; a limit names its ratio to the baseline, `KEY_ratio`, or itself where it has none.
        heading: of its column.
        form: how it is shown: "count", "size" (bytes), "ms" or "number".
        value: of a model, beside the baseline.
        ratio: its ratio to the baseline's says something.
        least: whether more is there than could be counted.
        brief: the terminal shows it, too.
    """

    key: str
    heading: str
    form: str
    value: Callable[[Row, Row], float]
    ratio: bool = True
    least: Callable[[Row], bool] = lambda row: False
    brief: bool = False

    @property
    def limit(self) -> str:
        """What a limit calls it."""
        return f"{self.key}_ratio" if self.ratio else self.key

    def against(self, row: Row, baseline: Row) -> float | None:
        """Its ratio to the baseline's; None where it has none."""
        whole = self.value(baseline, baseline)
        return None if not self.ratio else self.value(row, baseline) / whole if whole else 1.0

    def to_dict(self, row: Row, baseline: Row) -> dict[str, Any]:
        """As `report.json` holds it."""
        facts = {"key": self.key, "heading": self.heading, "form": self.form, "brief": self.brief}
        return {**facts, "value": self.value(row, baseline), "ratio": self.against(row, baseline), "least": self.least(row)}


FIGURES = (
    Figure("flops", "FLOPs", "count", lambda row, _: row.costs.flops, least=lambda row: bool(row.costs.uncounted), brief=True),
    Figure("parameter", "parameters", "count", lambda row, _: row.costs.parameters, brief=True),
    Figure("moved", "bytes moved", "size", lambda row, _: row.costs.moved_bytes),
    Figure("activation", "activations", "size", lambda row, _: row.memory.activation_bytes, brief=True),
    Figure("resident", "resident peak", "size", lambda row, _: row.resident_bytes, brief=True),
    Figure("file", "file", "size", lambda row, _: row.file_bytes, brief=True),
    Figure("load", "load ms", "ms", lambda row, _: row.load_ms),
    Figure("ops", "ops run", "number", lambda row, _: row.ops.after.total(), ratio=False),
    Figure("fusions_lost", "fusions lost", "number", lambda row, baseline: row.ops.against(baseline.ops).lost.total(), ratio=False),
)


def figures_of(row: Row, baseline: Row) -> list[dict[str, Any]]:
    """All figures of a model, in the order of the table."""
    return [figure.to_dict(row, baseline) for figure in FIGURES]
