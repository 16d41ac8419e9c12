"""What candidates cost as ONNX graphs in onnxruntime, each beside the unchanged model's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx_ir as ir

from laurel_rewrite.errors import LaurelError
from laurel_rewrite.exporting import Exporter
from laurel_rewrite.graph.capture import quiet
from laurel_rewrite.lab.candidates import UNCHANGED, Candidate, Source
from laurel_rewrite.profiling import profile
from laurel_rewrite.profiling.limits import figures
from laurel_rewrite.verification.export import widened


@dataclass(frozen=True)
class Served:
    """A candidate's graph beside the unchanged model's, both from the start; its connections are moved off theirs for the measurement.

    Attributes:
        figures: as limits name them (`laurel_rewrite.profiling.limits.NAMES`); empty where it could not be measured.
        shapes: of the inputs.
        conditions: of the measurement.
        problem: why it could not be, in words.
        precise: it was measured again, for a budget.
    """

    figures: Mapping[str, Any] = field(default_factory=dict)
    shapes: Mapping[str, str] = field(default_factory=dict)
    conditions: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""
    precise: bool = False

    @property
    def latency(self) -> tuple[float, float, float] | None:
        """Its ratio to the unchanged model's, with the ends of its interval; None where it was not measured."""
        if not self.figures:
            return None
        return self.figures["latency_ratio"], self.figures["latency_low"], self.figures["latency_high"]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Graphs:
    """Measures candidates.

    Args:
        source: of the unchanged model.
        seed: that all start from.
        seconds: of interleaved runs of each with the unchanged model's graph.
        shape: of an example that is trained on; the graphs get one such. Empty: sizes that `profile` chooses.
        folder: for the graphs.
    """

    def __init__(self, source: Source, seed: int, seconds: float, shape: Sequence[int], folder: Path) -> None:
        self.source, self.seed, self.seconds, self.shape = source, seed, seconds, shape
        self.folder = folder

    def served(self, candidate: Candidate, settle: Callable[[Served], float | None] = lambda found: None) -> Served:
        """A candidate's figures.

        Args:
            candidate: any but the unchanged model.
            settle: of what was measured, how precise it must be to be of use (see `profile`); None where it is. For this it is measured again,
                for ten times as long at most.
        """
        try:
            with quiet():
                files = [self._baseline, self._exported(candidate, "candidate.onnx")]
                found = self._measured(files, candidate.name, None)
                precision = settle(found)
                if precision is None:
                    return found
                again = self._measured(files, candidate.name, precision)
                return replace(again, precise=True)
        except LaurelError as error:
            return Served(problem=f"{type(error).__name__}: {str(error.args[0])[:300]}")

    def _measured(self, files: list[Path], name: str, precision: float | None) -> Served:
        found = profile(
            files, names=[UNCHANGED, name], shapes=self._sizes, seconds=self.seconds, precision=precision, max_seconds=10 * self.seconds
        )
        baseline, row = found.rows
        return Served(figures(row, baseline, row.latency), found.shapes[0], found.conditions)

    @cached_property
    def _baseline(self) -> Path:
        return self._exported(Candidate(UNCHANGED), "baseline.onnx")

    @cached_property
    def _sizes(self) -> dict[str, list[int]]:
        """Of the open sizes of a graph's inputs."""
        if not self.shape:
            return {}
        inputs = ir.load(self._baseline).graph.inputs
        sizes = (
            (size, real) for given in inputs if given.shape is not None for size, real in zip(given.shape, (1, *self.shape), strict=False)
        )
        return {str(size.value): [real] for size, real in sizes if isinstance(size, ir.SymbolicDim) and size.value is not None}

    def _exported(self, candidate: Candidate, name: str) -> Path:
        built = self.source.base(self.seed)
        args, kwargs = widened(built.args, built.kwargs)
        return Exporter(self.source.model(candidate, self.seed), args, kwargs).write(self.folder / name).path
