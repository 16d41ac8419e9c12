"""The main job: capture, rewrite, export, verify, profile, and only then put the results in their place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laurel_rewrite import targets
from laurel_rewrite.app.measuring import Measuring
from laurel_rewrite.app.wording import counts, verdict, verified_elsewhere
from laurel_rewrite.backends import Skipped
from laurel_rewrite.backends.module.saved_folder import CONFIG, MODELING, PLAN, WEIGHTS
from laurel_rewrite.command_line import without_folders
from laurel_rewrite.detection.detecting import detect
from laurel_rewrite.detection.site import portable
from laurel_rewrite.detection.sites import Sites
from laurel_rewrite.errors import ConfigError, VerificationError
from laurel_rewrite.files.checked import require_file
from laurel_rewrite.files.drafts import check_out, replacing
from laurel_rewrite.files.manifest import MANIFEST
from laurel_rewrite.graph.feeds import read_feeds
from laurel_rewrite.operators import registry
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.plan import LaurelConfig, Plan, planned, read_plan
from laurel_rewrite.profiling import ONE_MORE, Profile, profile
from laurel_rewrite.profiling.training import Training, one_more_block, profile_training
from laurel_rewrite.report import HTML, JSON, write_report
from laurel_rewrite.report.card import CARD, card
from laurel_rewrite.report.words import count as number
from laurel_rewrite.report.words import numbered
from laurel_rewrite.sources import is_graph, is_onnx
from laurel_rewrite.sources.built import Built
from laurel_rewrite.sources.models import build
from laurel_rewrite.sources.past import Past
from laurel_rewrite.stages import Listener, Stage, silent
from laurel_rewrite.verification.checks import Check, check_gradients, failure, randomized
from laurel_rewrite.verification.export import array_of, check_export, widened
from laurel_rewrite.verification.onnx import check_moves
from laurel_rewrite.verification.onnx_runs import IN_FLOAT32, session_of, write_in_float32

if TYPE_CHECKING:
    from torch import nn

USUAL = Measuring()
PROBE = "probe.onnx"
RANKS = (4, 8, 16, 32, 64)  # that a dry run compares
_PROMPT, _PAST = 128, 512  # tokens that a decoder is measured at
FILES = ("baseline.onnx", "laurel.onnx", MODELING, WEIGHTS, PLAN, CONFIG, JSON, HTML, CARD)


@dataclass
class Report:
    """Everything the job found out, as `report.json` holds it."""

    model: str
    plan: Plan
    sites: Sites
    parameters: dict[str, int]
    skipped: tuple[Skipped, ...] = ()
    checks: list[Check] = field(default_factory=list)
    profile: Profile | None = None
    training: Training | None = None
    out: str = ""
    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Nothing failed."""
        return not any(check.failed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return {
            "title": without_folders(self.model),
            "model": without_folders(self.model),
            **{key: _anywhere(rows) for key, rows in self.sites.to_dict().items()},
            "plan": {
                "seed": self.plan.seed,
                "sites": _anywhere([site.to_dict() for site in self.plan.sites]),
                "left_out": self.plan.left_out,
            },
            "skipped": _anywhere([asdict(site) for site in self.skipped]),
            "parameters": self.parameters,
            "notes": [*self.sites.notes, *self.plan.narrowed, *self.notes],
            "verification": [check.to_dict() for check in self.checks],
            "profile": self.profile.to_dict() if self.profile is not None else None,
            "training": self.training.to_dict() if self.training is not None else None,
            "out": self.out,
            "files": self.files,
        }


def _anywhere(rows: list[Any]) -> list[Any]:
    """Rows whose places say nothing of this machine's folders."""
    return [{**row, "where": portable(row["where"])} if isinstance(row, dict) else row for row in rows]


def find_sites(spec: str, settings: Mapping[str, Any], inputs: Path | None = None) -> Sites:
    """The sites of what a MODEL names: Python, an architecture, or a graph in a file, whose inputs may lie in an .npz file."""
    if not is_graph(spec):
        return _build_and_detect(spec, settings)[1]
    return detect(graph_file(spec, settings), None if inputs is None else read_feeds(inputs))


def graph_file(spec: str, settings: Mapping[str, Any]) -> Path:
    """The file of a graph; ConfigError where there is none, or where settings are given."""
    if settings:
        raise ConfigError("--set is for models that are built; a graph has no settings.")
    require_file(Path(spec))
    return Path(spec)


def _build_and_detect(spec: str, settings: Mapping[str, Any]) -> tuple[Built, Sites]:
    """On the meta device where the model allows it: a large architecture needs no memory for this."""
    from laurel_rewrite.errors import CaptureError

    try:
        built = _build(spec, settings, device="meta", inference=True)
        return built, detect(built.model, built.args, built.kwargs)
    except CaptureError:
        built = _build(spec, settings, inference=True)
        return built, detect(built.model, built.args, built.kwargs)


def _build(spec: str, settings: Mapping[str, Any] | None, *, device: str = "cpu", inference: bool = False) -> Built:
    """A model with a batch of 2 or more: a batch of 1 hides broadcasts, and batch normalisation cannot train on it."""
    built = build(spec, settings, device=device, inference=inference)
    if built.resizable:
        built.args, built.kwargs = widened(built.args, built.kwargs)
    return built


def make_plan(sites: Sites, asked: Plan | LaurelConfig, model: str) -> Plan:
    """The plan of a configuration, or a given one, checked against the model."""
    plan = planned(sites, asked)
    if asked is plan:
        plan.check(sites)
        return plan
    return plan.with_model(model)


def plan_only(
    spec: str,
    config: LaurelConfig,
    *,
    plan: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    inputs: Path | None = None,
    listener: Listener = silent,
) -> Report:
    """Detection and plan, nothing more; `inputs` of an ONNX file are an .npz file."""
    asked = config if plan is None else read_plan(plan)
    with listener("detect") as stage:
        if is_onnx(spec):
            from laurel_rewrite.files.onnx import read_onnx, weight_count

            model = read_onnx(graph_file(spec, settings or {}))
            count, sites = weight_count(model), detect(model, None if inputs is None else read_feeds(inputs))
        else:
            built, sites = _build_and_detect(spec, settings or {})
            count = built.parameters
        stage.done(counts(sites))
    chosen = make_plan(sites, asked, spec)
    return Report(spec, chosen, sites, parameters(count, chosen))


def configurations(report: Report, config: LaurelConfig) -> list[dict[str, Any]]:
    """What other variants and ranks would add to the same model: one capture serves to choose among them."""
    found = []
    for variant, operator in registry.operators().items():
        costs: list[dict[str, Any]] = []
        for rank in RANKS if "rank" in operator.options else (None,):
            options = {} if rank is None else {"rank": rank}
            try:
                plan = Plan.from_sites(report.sites, config.but(variant, **options))
            except ConfigError:  # a rank above the size of a feature axis
                break
            costs.append({"variant": variant, "rank": rank, **parameters(report.parameters["model"], plan)})
        ranked = len({cost["added"] for cost in costs}) > 1
        found += costs if ranked else [cost | {"rank": None} for cost in costs[:1]]
    return found


def run(
    spec: str,
    config: LaurelConfig,
    out: Path,
    *,
    plan: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    functions: str = "keep",
    target: str = targets.DEFAULT,
    skip: tuple[str, ...] = (),
    measuring: Measuring = USUAL,
    train: bool = False,
    with_past: tuple[int | None, int | None] | None = None,
    unsupported: str = "skip",
    allow_inference_graph: bool = False,
    force: bool = False,
    listener: Listener = silent,
) -> Report:
    """Do the main job for a model in Python, or for an exported program, which becomes one; `graph_job.run` does it for an ONNX file.

    The files appear in `out` when everything has passed; else nothing does. Sites that cannot be rewritten keep their plain sum and are
    reported, or with `unsupported="refuse"` stop the job. `force` replaces files there that are no earlier result, too.

    `with_past` writes graphs of a decoder with a past, and profiles them at a prompt and a past of so many tokens; None is 128 and 512, or
    what the model has positions for.

    Raises:
        VerificationError: a check failed; the report is its `args[1]`.
        NoSiteError: there is no residual connection, or none that can be rewritten.
    """
    from laurel_rewrite.backends.module.saving import save

    made_for = targets.target(target)
    check_out(out, "rewrite", FILES, force=force)
    asked = config if plan is None else read_plan(plan)
    with listener("build") as stage:
        built = _built(spec, settings, config.seed, inference=allow_inference_graph)
        model, args, kwargs = built.model, built.args, built.kwargs
        behind = Past.of(model, args, kwargs) if with_past is not None else None
        stage.done(", ".join(filter(None, (type(model).__name__, f"{number(built.parameters)} parameters", built.weights))))
    with listener("detect") as stage:
        sites = detect(model, args, kwargs)
        stage.done(counts(sites))
    with listener("rewrite, verify") as stage:
        chosen = make_plan(sites, asked, spec)
        report = Report(spec, chosen, sites, parameters(built.parameters, chosen), out=str(out), notes=[*built.notes])
        rewritten = _rewritten(report, built, unsupported)
        stage.done(f"{insertion(report)}, {verdict(report.checks)}" + (f", {len(report.skipped)} skipped" if report.skipped else ""))
    with listener("verify gradients") as stage:
        report.checks.append(check_gradients(rewritten, args, kwargs, seed=config.seed))
        stage.done(verdict(report.checks[-1:]))
    stop_if_failed(report)
    with replacing(out, "rewrite", force=force, keep=built.files.values()) as draft:
        exports = _Exports(built, rewritten, draft, made_for, functions, skip, behind)
        with listener("export") as stage:
            exports.write()
            stage.done("baseline.onnx, laurel.onnx")
        with listener("verify ONNX") as stage:
            checks = exports.checked(config.seed)
            report.checks += checks
            report.notes += exports.notes
            stage.done(verdict(checks))
        stop_if_failed(report)
        with listener("save") as stage:
            save(rewritten, draft, built=built)
            stage.done(f"{MODELING}, weights, plan")
        if measuring.wanted and (missing := measuring.missing(made_for)):
            report.notes.append(missing)
        elif measuring.wanted:
            with listener("profile") as stage:
                report.profile = exports.profiled(out, measuring, config.seed, stage, report.notes, with_past)
                stage.done(f"{', '.join(f'{time.ratio:.3f}x' for time in report.profile.rows[1].latencies)} the baseline's latency")
        if train:
            with listener("training") as stage:
                report.training = _train(model, rewritten, sites, built, measuring.effort.seconds or 10.0, config.seed)
                stage.done(_steps(report.training))
        for file in draft.glob(f"{PROBE}*"):
            file.unlink()
        add_report(report, draft)
    return report


def _built(spec: str, settings: Mapping[str, Any] | None, seed: int, *, inference: bool) -> Built:
    """The model of a MODEL, with values, and no connection of ours in it yet."""
    import torch

    from laurel_rewrite.operators.connections import refuse_second_time

    torch.manual_seed(seed)
    built = _build(spec, settings, inference=inference)
    refuse_second_time(built.model)
    if any(tensor.is_meta for tensor in (*built.model.parameters(), *built.model.buffers())):
        raise ConfigError(
            f"{spec} is on the meta device: it has no values to verify and to export. Build it on the CPU, or see it with --dry-run."
        )
    return built


def _rewritten(report: Report, built: Built, unsupported: str) -> nn.Module:
    """The rewritten model; the report says then what was done, and what was verified."""
    from laurel_rewrite.backends.rewriting import apply_plan

    try:
        applied = apply_plan(built.model, report.sites, report.plan, built.args, built.kwargs, unsupported=unsupported)
    except VerificationError as error:
        report.checks = list(error.checks)
        raise VerificationError(error.args[0], report) from error
    report.plan, report.skipped = applied.plan, applied.skipped
    report.parameters = parameters(built.parameters, applied.plan)
    report.checks += applied.checks
    rewritten: nn.Module = applied.model
    return rewritten


class _Exports:
    """The model and the rewritten one as ONNX, and a copy of the latter off its start, in a draft folder.

    Attributes:
        notes: sentences for the report.
    """

    def __init__(
        self,
        built: Built,
        rewritten: nn.Module,
        draft: Path,
        target: targets.Target,
        functions: str,
        skip: tuple[str, ...],
        past: Past | None,
    ) -> None:
        from laurel_rewrite.exporting import Exporter

        self.built, self.rewritten, self.draft, self.target, self.past = built, rewritten, draft, target, past
        self.plain = Exporter(built.model, built.args, built.kwargs, past=past)
        self.exporter = Exporter(rewritten, built.args, built.kwargs, functions=functions, target=target.name, skip=skip, past=past)
        self.notes: list[str] = []

    def write(self) -> None:
        self.baseline = self.plain.write(self.draft / "baseline.onnx")
        self.laurel = self.exporter.write(self.draft / "laurel.onnx")

    def checked(self, seed: int) -> list[Check]:
        """Whether the files compute what the models do, also off the start, which hides most faults."""
        args, kwargs, past = self.built.args, self.built.kwargs, self.past
        with randomized(self.rewritten, seed):
            self.probe = self.exporter.write(self.draft / PROBE)
            checks, random = check_export(self.rewritten, self.probe, args, kwargs, name="laurel.onnx, random LAuReL", seed=seed, past=past)
        self.notes += verified_elsewhere(self.target) + ([lowered(self.probe.path)] if self.target.lowers else [])
        more, self.start = check_export(self.rewritten, self.laurel, args, kwargs, name="laurel.onnx", seed=seed, past=past)
        if self.start is not None and random is not None:
            checks += check_moves(self.start, random, self.laurel.values, sites_of(self.rewritten))
        return checks + more + check_export(self.built.model, self.baseline, args, kwargs, name="baseline.onnx", seed=seed, past=past)[0]

    def profiled(
        self, out: Path, measuring: Measuring, seed: int, stage: Stage, notes: list[str], lengths: tuple[int | None, int | None] | None
    ) -> Profile:
        """With random parameters: at its start a runtime would delete what LAuReL adds, and one would measure another graph."""
        files = [self.baseline.path, self.probe.path]
        if self.start is not None and self.start.in_float32:
            files = [write_in_float32(file, self.draft / f"{PROBE}-{file.name}") for file in files]
            notes.append(IN_FLOAT32)
        measured = _lengths(self.built.model, *lengths) if lengths is not None else {}
        if lengths is None and not measuring.shapes:
            measured["inputs"] = _feeds(files[0], self.built)
        found = profile(
            files, names=["baseline.onnx", "laurel.onnx"], **measured, shapes=measuring.shapes, **measuring.options(self.target), control=True,
            traces=self.draft, seed=seed, progress=stage.progress,
        )  # fmt: skip
        return renamed(found, {files[0]: out / "baseline.onnx", files[1]: out / "laurel.onnx", self.draft: out})


def add_report(report: Report, draft: Path) -> None:
    """List the files of a draft folder, and add the report and its card to them."""
    report.files = sorted({*(str(f.relative_to(draft)) for f in draft.rglob("*") if f.is_file()), JSON, HTML, CARD, MANIFEST})
    written = write_report(report.to_dict(), draft)
    (draft / CARD).write_text(card(written), encoding="utf-8")


def stop_if_failed(report: Report) -> None:
    """Raise VerificationError with the report where a check failed."""
    failed = [check for check in report.checks if check.failed]
    if failed:
        raise VerificationError(failure(failed[0]), report)


def _feeds(path: Path, built: Built) -> dict[str, Any]:
    """The model's own example inputs, for the profile."""
    import torch

    from laurel_rewrite.private import pytree

    leaves = [leaf for leaf in pytree.tree_leaves((built.args, built.kwargs)) if isinstance(leaf, torch.Tensor)]
    inputs = session_of(path).get_inputs()
    given = {info.name: built.kwargs.get(info.name, leaves[n]) for n, info in enumerate(inputs)}
    return {info.name: array_of(given[info.name], float32="float16" not in info.type) for info in inputs}


def _lengths(model: nn.Module, prompt: int | None, past: int | None) -> dict[str, Any]:
    """At which lengths a decoder with a past is measured; usual ones stay within its positions."""
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None) or math.inf
    return {"prompt": prompt or min(_PROMPT, most), "past": past or min(_PAST, most - 1)}


def _steps(training: Training) -> str:
    """What a training step costs, in words."""
    ratios = (row for row in training.rows if row.step.verdict != "baseline")
    return "; ".join(f"{row.mode}, {row.name}: {row.step.ratio:.3f}x" for row in ratios)


def _train(model: nn.Module, rewritten: nn.Module, sites: Sites, built: Built, seconds: float, seed: int) -> Training:
    """Training steps of the model, the rewritten one, and the model with one more layer."""
    models = {"baseline": model, "laurel": rewritten}
    taller = one_more_block(model, [site.owner for site in sites if site.kind == "identity"], built.args, built.kwargs)
    if taller is not None:
        models[ONE_MORE] = taller
    return profile_training(models, built.args, built.kwargs, seconds=seconds, seed=seed)


def renamed(result: Profile, places: Mapping[Path, Path]) -> Profile:
    """The profile with the files where they will be: a file or a folder -> its later place."""

    def place(path: Path) -> Path:
        return places.get(path) or (places[path.parent] / path.name if path.parent in places else path)

    return replace(result, rows=tuple(replace(row, path=str(place(Path(row.path))) if row.path else "") for row in result.rows))


def lowered(path: Path) -> str:
    """What the lowering says it did to a file."""
    import onnx_ir as ir

    from laurel_rewrite.lowering import NOTES

    random = " (with random LAuReL parameters; those of the start cost less)" if PROBE in path.name else ""
    said = ir.load(path).metadata_props.get(NOTES, "")
    return f"In the graph to deploy{random}: {said}." if said else f"The graph to deploy{random} has LAuReL as ordinary ops."


def parameters(model: int, plan: Plan) -> dict[str, int]:
    """What the plan adds to a model of so many parameters."""
    counts = plan.counts()
    return {
        "model": model,
        "added": plan.parameters(),
        "added_flops_per_position": sum(counts[site.id].flops * site.calls for site in plan.sites),
        "state_per_position": max((one.state for one in counts.values()), default=0),
    }


def insertion(report: Report) -> str:
    """In words: how many modules, and what they add."""
    share = 100 * report.parameters["added"] / max(report.parameters["model"], 1)
    return f"{numbered(len(report.plan.sites), 'connection')}, +{share:.2f} % parameters"
