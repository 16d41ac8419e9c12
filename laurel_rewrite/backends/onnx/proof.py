"""The checks of a rewritten ONNX file, stage by stage, in one report. What a file computed is kept for the stage that compares with it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from torch import fx

from laurel_rewrite.backends.onnx.surgery import GraphRewrite, away_from_start
from laurel_rewrite.errors import ExportError
from laurel_rewrite.lowering import lower
from laurel_rewrite.operators.affine import Weight
from laurel_rewrite.verification.checks import Check
from laurel_rewrite.verification.onnx import attempt, check_moves, check_optimiser, check_torch, proved, reference
from laurel_rewrite.verification.onnx_runs import FLOAT32, NotRun, Ran, in_float32, run_shaken


class GraphProof:
    """Checks of files that were made from one.

    Args:
        path: of the original.
        rewrite: which the files were written from.
        checks: what is found out is added to these.
        inputs: of the user, instead of drawn ones.
        seed: of what is drawn.
        verify: compare numbers; else only that they were not compared is added.

    Attributes:
        original: what the original computed; None where it was not run.
    """

    def __init__(
        self, path: Path, rewrite: GraphRewrite, checks: list[Check], *, inputs: Mapping[str, np.ndarray] | None, seed: int, verify: bool
    ) -> None:
        self.path, self.rewrite, self.checks = path, rewrite, checks
        self.seed, self.inputs = seed, inputs
        self.original: Ran | None = None
        self._kept: dict[Path | None, Ran] = {}  # by file; None is the one with random parameters
        if not verify:
            checks.append(Check.not_run("numbers", "not asked for; the files passed onnx's structural checks"))
            return
        try:
            self.original = reference(path, values=rewrite.values, inputs=inputs, seed=seed)
        except NotRun as why:
            checks.append(Check.not_run("numbers", f"{why}; the files passed onnx's structural checks"))

    def start(self, file: Path) -> None:
        """The start is the original's function, and other parameters are another one, which onnxruntime's optimiser keeps."""
        if self.original is None:
            return
        exact = self.rewrite.exact_start()
        own = exact is self.rewrite.model
        checks, ran = proved(
            "start",
            self.original,
            file if own else exact,
            values=self.rewrite.values,
            exact=self.rewrite.exact,
            shaken=self._shaken(self.path),
        )
        self.checks += checks
        if ran is not None and own:
            self._kept[file] = ran
        with away_from_start(file, self.seed) as random:
            found = attempt("random LAuReL", random, self.original, self.rewrite.values)
            if isinstance(found, Check):
                self.checks.append(found)
                return
            self._kept[None] = found
            self.checks += [
                *check_moves(self.original, found, self.rewrite.values, self.rewrite.connections),
                check_optimiser("random LAuReL, optimised against not", found, self.original, self._shaken(random)),
            ]

    def weights(self, file: Path) -> None:
        """With trained parameters the outputs are numbers, which onnxruntime's optimiser keeps."""
        self._kept.clear()
        if self.original is None:
            return
        found = attempt("trained LAuReL", file, self.original, self.rewrite.values)
        if isinstance(found, Check):
            self.checks.append(found)
            return
        self._kept[file] = found
        self.checks.append(check_optimiser("trained LAuReL, optimised against not", found, self.original, self._shaken(file)))

    def lowered(
        self, name: str, source: Path, file: Path, scales: Mapping[str, Weight], *, random: bool, target: str, skip: Collection[str] = ()
    ) -> None:
        """A lowered file computes what the file that it was made from does.

        In half precision rounding would hide faults, so that the same lowering of the copy in float32 must show that, too.
        """
        if self.original is None:
            return
        before = self._kept.pop(None if random else source, None) or attempt(name, source, self.original, self.rewrite.values)
        if isinstance(before, Check):
            self.checks.append(before)
            return
        self.checks += proved(name, before, file, values=self.rewrite.values, scales=scales, shaken=self._shaken(source))[0]
        if before.half:
            given = ir.from_proto(in_float32(onnx.load(source, load_external_data=False), source.parent))
            wide = given.clone()
            done = lower(wide, target=target, skip=skip, verify=False)
            rtol, atol = FLOAT32
            outputs = [{key: run[key] for key in before.optimised[0]} for run in before.plain]
            exact = replace(before, optimised=outputs, rtol=rtol, atol=atol, noise={})
            self.checks += proved(
                f"{name}, as a copy in float32", exact, wide, values=self.rewrite.values, scales=done.scales, shaken=self._shaken(given)
            )[0]

    def _shaken(self, source: Path | ir.Model) -> Callable[[], Ran]:
        """A graph with its weights moved in their last places, on the inputs of the original."""
        assert self.original is not None
        return partial(run_shaken, source, self.original.draws, self.rewrite.values)

    def torch(self, module: fx.GraphModule, file: Path) -> None:
        """A PyTorch module made from the same graph computes what a file does. Others convert the operators, so that this is always shown.

        Raises:
            ExportError: the module does not run, or the file does not, which it is to be compared with.
        """
        name = "PyTorch against ONNX"
        try:
            original = self.original or reference(self.path, values={}, inputs=self.inputs, seed=self.seed)
        except NotRun as why:
            raise ExportError(f"it could not be compared with the graph: {why}.") from why
        found = attempt(name, file, original, {})
        shaken = partial(run_shaken, file, original.draws)
        try:
            self.checks += [found] if isinstance(found, Check) else check_torch(module, found, shaken, seed=self.seed)
        except Exception as error:  # of foreign modules
            raise ExportError(f"what onnx2torch made of the graph does not run: {type(error).__name__}: {error}") from error
