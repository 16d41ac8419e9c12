"""The main job for an ONNX file: read, detect, insert, verify in onnxruntime, profile, and only then put the results in their place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from laurel_rewrite import targets
from laurel_rewrite.app import job
from laurel_rewrite.app.job import USUAL
from laurel_rewrite.app.measuring import Measuring
from laurel_rewrite.app.wording import counts, verdict, verified_elsewhere
from laurel_rewrite.backends.module.saved_folder import PLAN
from laurel_rewrite.backends.module.saving import save_graph
from laurel_rewrite.backends.onnx.surgery import GraphRewrite, away_from_start, inline_laurel
from laurel_rewrite.errors import ConfigError, ExportError
from laurel_rewrite.files.checked import require_file
from laurel_rewrite.files.drafts import check_out, replacing
from laurel_rewrite.files.onnx import external, place_onnx, read_onnx, weight_count
from laurel_rewrite.graph.feeds import check_feeds, read_feeds
from laurel_rewrite.lowering import lower
from laurel_rewrite.plan import LaurelConfig, Plan, read_plan
from laurel_rewrite.profiling import profile
from laurel_rewrite.report import HTML, JSON
from laurel_rewrite.report.card import CARD
from laurel_rewrite.report.words import count, numbered
from laurel_rewrite.stages import Listener, silent
from laurel_rewrite.verification.onnx_runs import IN_FLOAT32, write_in_float32

if TYPE_CHECKING:
    from torch import fx

NAME = "laurel.onnx"
UNLOWERED = "unlowered.onnx"


def run(
    path: Path,
    config: LaurelConfig,
    out: Path,
    *,
    plan: Path | None = None,
    weights: Path | None = None,
    functions: str = "keep",
    target: str = targets.DEFAULT,
    skip: tuple[str, ...] = (),
    external_data: str | None = None,
    inputs: Path | None = None,
    verify: bool = True,
    emit_torch: bool = False,
    measuring: Measuring = USUAL,
    force: bool = False,
    listener: Listener = silent,
) -> job.Report:
    """Rewrite an ONNX file. `laurel.onnx` and the rest appear in `out` when everything has passed; else nothing does.

    Args:
        path: of the file, which stays as it is.
        config, plan: what the sites get; a plan in a file instead of the configuration.
        out: folder for the results.
        weights: trained LAuReL parameters (safetensors), instead of the start.
        target, functions: see `laurel_rewrite.export_onnx`.
        skip: passes of a target that lowers to leave out.
        external_data: see `graph_files.write_onnx`.
        inputs: an .npz file for verification and profile; else they are drawn (`feeds`).
        verify: run the original and the result in onnxruntime and compare.
        emit_torch: write a trainable PyTorch module as well, which `laurel_rewrite.load(out)` gives.
        measuring: how to measure.
        force: replace files in `out` that are no earlier result, too.
        listener: is told of the stages.

    Raises:
        VerificationError: a check failed; the report is its `args[1]`.
        CaptureError, ConfigError, NoSiteError, RewriteError, ExportError: before anything is written; an ExportError of the PyTorch module
            alone comes after the rest was written.
    """
    if (out / NAME).exists() and (out / NAME).samefile(path):
        raise ConfigError(f"The result would replace {path} itself. Choose another folder with --out.")
    made_for = targets.target(target)
    check_out(out, "rewrite", (NAME, PLAN, JSON, HTML, CARD), force=force)
    asked = config if plan is None else read_plan(plan)
    if weights is not None:
        require_file(weights)
    with listener("read") as stage:
        model, given = _read(path, inputs)
        stage.done(f"{len(model.graph):,} nodes, {count(weight_count(model))} weights")
    with listener("detect") as stage:
        rewrite = GraphRewrite(model, given)
        stage.done(counts(rewrite.sites))
    with listener("rewrite") as stage:
        chosen = job.make_plan(rewrite.sites, asked, str(path))
        rewrite.apply(chosen)
        if made_for.writes_nodes or (made_for.keeps_functions and functions == "inline"):
            inline_laurel(rewrite.model)
        added = job.parameters(weight_count(model), chosen)
        report = job.Report(str(path), chosen, rewrite.sites, added, out=str(out), notes=list(rewrite.notes))
        stage.done(job.insertion(report))
    with replacing(
        out, "rewrite", force=force, keep=[path, *(Path(t.path) for t in external(model)), *filter(None, (weights, inputs))]
    ) as draft:
        work = _Work(path, rewrite, report, draft, made_for, skip, external_data, listener)
        try:
            work.write(given, config.seed, verify)
            if weights is not None:
                work.load(weights, plan)
            if made_for.lowers:
                work.lower(config.seed, with_random=verify or measuring.wanted)
            unconverted = work.emit_torch(weights) if emit_torch else None
            work.profile(given, measuring, config.seed, verify)
            work.finish()
        finally:
            for twin in out.glob(f"{draft.name}-*"):
                twin.unlink()
    if unconverted is not None:
        raise ExportError(f"{out / NAME} was written, but no PyTorch module: {unconverted}") from unconverted
    return report


def _read(path: Path, inputs: Path | None) -> tuple[ir.Model, dict[str, np.ndarray] | None]:
    """A graph, and inputs for it where there is a file of them."""
    model = read_onnx(path)
    given = read_feeds(inputs) if inputs is not None else None
    if given is not None:
        check_feeds(model, given, path)
    return model, given


class _Work:
    """A rewritten graph on its way into a draft folder, stage by stage; what is found out goes into the report.

    Attributes:
        file: the result so far.
        measured: what a profile measures: the same off its start.
    """

    def __init__(
        self,
        path: Path,
        rewrite: GraphRewrite,
        report: job.Report,
        draft: Path,
        target: targets.Target,
        skip: tuple[str, ...],
        external_data: str | None,
        listener: Listener,
    ) -> None:
        self.path, self.rewrite, self.report, self.draft = path, rewrite, report, draft
        self.target, self.skip, self.external_data, self.listener = target, skip, external_data, listener

    def write(self, inputs: Mapping[str, np.ndarray] | None, seed: int, verify: bool) -> None:
        """The graph at its start, which computes what the original does."""
        from laurel_rewrite.backends.onnx.proof import GraphProof

        with self.listener("write") as stage:
            self.file = self.measured = self._placed(UNLOWERED if self.target.lowers else NAME)
            stage.done(self.file.name)
        self.proof = GraphProof(self.path, self.rewrite, self.report.checks, inputs=inputs, seed=seed, verify=verify)
        with self.listener("verify") as stage:
            self.proof.start(self.file)
            stage.done(verdict(self.report.checks))
        job.stop_if_failed(self.report)

    def load(self, weights: Path, plan: Path | None) -> None:
        """Trained parameters in the place of the start."""
        with self.listener("weights") as stage:
            _load(self.rewrite, weights, plan)
            self.file = self.measured = self._placed(self.file.name.removeprefix(f"{self.draft.name}-"))
            self.proof.weights(self.file)
            stage.done(str(weights))
        job.stop_if_failed(self.report)

    def lower(self, seed: int, *, with_random: bool) -> None:
        """With random parameters too, for those of the start hide what is lost; and it is them that the profile measures."""
        with self.listener("lower") as stage, away_from_start(self.file, seed) as random:
            lowered = [(self.file, NAME, "lowered against not"), (random, job.PROBE, "lowered against not, random LAuReL")]
            for source, name, check in lowered[: 2 if with_random and random != self.file else 1]:
                graph = ir.load(source)
                done = lower(graph, target=self.target.name, skip=self.skip, verify=False)
                self.measured = place_onnx(graph, self.draft / name, external_data=self.external_data)
                self.proof.lowered(
                    check, source, self.measured, done.scales, random=source == random, target=self.target.name, skip=self.skip
                )
                if name == NAME:
                    result = self.measured
            self.file = result
            self.report.notes.append(job.lowered(self.measured))
            stage.done(f"{numbered(done.sites, 'connection')} as fast ops")
        job.stop_if_failed(self.report)

    def emit_torch(self, weights: Path | None) -> ExportError | None:
        """A PyTorch module of the same graph; why there is none."""
        unconverted: ExportError | None = None
        with self.listener("emit torch") as stage:
            try:
                module = _torch_module(self.rewrite, self.report.plan, weights)
                self.proof.torch(module, self.file)
                save_graph(module, self.draft, self.report.plan)
                stage.done("model.pt")
            except ExportError as error:
                unconverted = error
                stage.done("none")
        job.stop_if_failed(self.report)
        return unconverted

    def profile(self, given: Mapping[str, np.ndarray] | None, measuring: Measuring, seed: int, verify: bool) -> None:
        """Measure the result beside the original, on the target's provider; or say why not."""
        original, notes = self.proof.original, self.report.notes
        feeds = given or (original.draws[0] if original is not None else None)
        notes += verified_elsewhere(self.target) if verify and feeds is not None else []
        if not measuring.wanted:
            return
        if verify and feeds is None:
            notes.append("Not profiled, for the graph was not run.")
            return
        if missing := measuring.missing(self.target):
            notes.append(missing)
            return
        with self.listener("profile") as stage:
            files = [self.path, self.measured]
            if original is not None and original.in_float32 and self.target.on_cpu:
                named = ((self.path, "original.onnx"), (self.measured, NAME))
                files = [write_in_float32(file, self.draft / f"float32-{name}") for file, name in named]
                notes.append(IN_FLOAT32)
            names = [self.path.name if self.path.name != NAME else f"original {NAME}", NAME]
            result = profile(
                files, names=names, inputs=None if measuring.shapes else feeds, shapes=measuring.shapes, **measuring.options(self.target), control=True,
                traces=self.draft, seed=seed, progress=stage.progress,
            )  # fmt: skip
            self.report.profile = job.renamed(result, {files[0]: self.path, files[1]: Path(self.report.out) / NAME})
            stage.done(f"{result.rows[1].latency.ratio:.3f}x the original's latency")

    def finish(self) -> None:
        """Leave the results alone, with the report beside them."""
        (self.draft / PLAN).write_text(self.report.plan.to_toml(), encoding="utf-8")
        for name in (job.PROBE, UNLOWERED, "float32-"):
            for scratch in self.draft.glob(f"{name}*"):
                scratch.unlink()
        job.add_report(self.report, self.draft)

    def _placed(self, name: str) -> Path:
        return place_onnx(self.rewrite.model, self.draft / name, external_data=self.external_data)


def _load(rewrite: GraphRewrite, weights: Path, plan: Path | None) -> None:
    """Put trained parameters in; where they do not fit, and nobody said what they were trained as, name the plan beside them."""
    try:
        rewrite.load(weights)
    except ConfigError as error:
        beside = weights.parent / PLAN
        if plan is not None or not beside.is_file():
            raise
        raise ConfigError(f"{error} Beside it lies {beside}, which says what was trained: --plan {beside}") from error


def _torch_module(first: GraphRewrite, plan: Plan, weights: Path | None) -> fx.GraphModule:
    """The same rewrite once more, with whole sums at the sites, which modules can take the place of."""
    from laurel_rewrite.backends.onnx.emit_torch import to_torch

    rewrite = first.again()
    rewrite.apply(plan, split=True)
    if weights is not None:
        rewrite.load(weights)
    return to_torch(rewrite.model, plan)
