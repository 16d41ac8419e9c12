"""The main job for an ONNX file: read, detect, insert, verify in onnxruntime, profile, and only then put the results in their place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from laurel_rewrite import targets
from laurel_rewrite.app import job
from laurel_rewrite.backends.module.saved_folder import PLAN
from laurel_rewrite.backends.module.saving import save_graph
from laurel_rewrite.backends.onnx.surgery import GraphRewrite, away_from_start, inline_laurel
from laurel_rewrite.errors import ConfigError, ExportError
from laurel_rewrite.files.drafts import check_out, replacing
from laurel_rewrite.files.onnx import external, place_onnx, read_onnx, weight_count
from laurel_rewrite.graph.feeds import check_feeds, read_feeds
from laurel_rewrite.lowering import lower
from laurel_rewrite.plan import LaurelConfig, Plan
from laurel_rewrite.profiling import profile
from laurel_rewrite.profiling.latency import USUAL, Effort
from laurel_rewrite.report import HTML, JSON
from laurel_rewrite.report.words import count
from laurel_rewrite.sources.models import require_file
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
    effort: Effort = USUAL,
    force: bool = False,
    listener: job.Listener = job.silent,
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
        effort: how long to measure; 0 seconds for no profile.
        force: replace files in `out` that are no earlier result, too.
        listener: is told of the stages.

    Raises:
        VerificationError: a check failed; the report is its `args[1]`.
        CaptureError, ConfigError, NoSiteError, RewriteError, ExportError: before anything is written; an ExportError of the PyTorch module
            alone comes after the rest was written.
    """
    from laurel_rewrite.backends.onnx.proof import GraphProof

    if (out / NAME).exists() and (out / NAME).samefile(path):
        raise ConfigError(f"The result would replace {path} itself. Choose another folder with --out.")
    made_for = targets.target(target)
    check_out(out, "rewrite", (NAME, PLAN, JSON, HTML), force=force)
    wanted = job.read_plan(plan)
    if weights is not None:
        require_file(weights)
    with listener("read") as stage:
        model = read_onnx(path)
        stage.done(f"{len(model.graph):,} nodes, {count(weight_count(model))} weights")
    given = read_feeds(inputs) if inputs is not None else None
    if given is not None:
        check_feeds(model, given, path)
    with listener("detect") as stage:
        rewrite = GraphRewrite(model, given)
        stage.done(job.counts(rewrite.sites))
    with listener("rewrite") as stage:
        chosen = job.make_plan(rewrite.sites, config, wanted, str(path))
        rewrite.apply(chosen)
        if made_for.writes_nodes or (made_for.keeps_functions and functions == "inline"):
            inline_laurel(rewrite.model)
        report = job.Report(
            str(path), chosen, rewrite.sites, job.parameters(weight_count(model), chosen), out=str(out), notes=list(rewrite.notes)
        )
        stage.done(job.insertion(report))
    read = [path, *(Path(tensor.path) for tensor in external(model)), *(file for file in (weights, inputs) if file is not None)]
    with replacing(out, "rewrite", force=force, keep=read) as draft:
        try:
            with listener("write") as stage:
                file = place_onnx(rewrite.model, draft / (UNLOWERED if made_for.lowers else NAME), external_data=external_data)
                stage.done(file.name)
            proof = GraphProof(path, rewrite, report.checks, inputs=given, seed=config.seed, verify=verify)
            with listener("verify") as stage:
                proof.start(file)
                stage.done(job.verdict(report.checks))
            job.stop_if_failed(report)
            if weights is not None:
                with listener("weights") as stage:
                    _load(rewrite, weights, plan)
                    file = place_onnx(rewrite.model, draft / file.name.removeprefix(f"{draft.name}-"), external_data=external_data)
                    proof.weights(file)
                    stage.done(str(weights))
                job.stop_if_failed(report)
            measured = file
            if made_for.lowers:
                with listener("lower") as stage, away_from_start(file, config.seed) as random:
                    # With random parameters too, for those of the start hide what is lost; and it is them that the profile measures.
                    lowered = [(file, NAME, "lowered against not"), (random, job.PROBE, "lowered against not, random LAuReL")]
                    for source, name, check in lowered[: 2 if (verify or effort.seconds > 0) and random != file else 1]:
                        unlowered = ir.load(source)
                        done = lower(unlowered, target=target, skip=skip, verify=False)
                        measured = place_onnx(unlowered, draft / name, external_data=external_data)
                        proof.lowered(check, source, measured, done.scales, random=source == random, target=target, skip=skip)
                        if name == NAME:
                            file = measured
                    report.notes.append(job.lowered(measured))
                    stage.done(f"{done.sites} LAuReL nodes, {done.folded} branches folded")
                job.stop_if_failed(report)
            (draft / PLAN).write_text(chosen.to_toml(), encoding="utf-8")
            unconverted: ExportError | None = None
            if emit_torch:
                with listener("emit torch") as stage:
                    try:
                        module = _torch_module(rewrite, chosen, weights)
                        proof.torch(module, file)
                        save_graph(module, draft, chosen)
                        stage.done("model.pt")
                    except ExportError as error:
                        unconverted = error
                        stage.done("none")
                job.stop_if_failed(report)
            feeds = given or (proof.original.draws[0] if proof.original is not None else None)
            report.notes += job.verified_elsewhere(made_for) if verify and feeds is not None else []
            if effort.seconds > 0 and verify and feeds is None:
                report.notes.append("Not profiled, for the graph was not run.")
            elif effort.seconds > 0 and (missing := job.not_timed(made_for)):
                report.notes.append(missing)
            elif effort.seconds > 0:
                with listener("profile") as stage:
                    files = [path, measured]
                    if proof.original is not None and proof.original.in_float32 and made_for.on_cpu:
                        files = [
                            write_in_float32(file, draft / f"float32-{name}") for file, name in ((path, "original.onnx"), (measured, NAME))
                        ]
                        report.notes.append(IN_FLOAT32)
                    result = profile(
                        files, names=[path.name if path.name != NAME else f"original {NAME}", NAME], inputs=feeds, **vars(effort), control=True, traces=draft, seed=config.seed,
                        provider=made_for.provider, progress=stage.progress,
                    )  # fmt: skip
                    report.profile = job.renamed(result, {files[0]: path, files[1]: out / NAME})
                    stage.done(f"{result.rows[1].latency.ratio:.3f}x the original's latency")
            for name in (job.PROBE, UNLOWERED, "float32-"):
                for scratch in draft.glob(f"{name}*"):
                    scratch.unlink()
            job.add_report(report, draft)
        finally:
            for twin in out.glob(f"{draft.name}-*"):
                twin.unlink()
    if unconverted is not None:
        raise ExportError(f"{out / NAME} was written, but no PyTorch module: {unconverted}") from unconverted
    return report


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
