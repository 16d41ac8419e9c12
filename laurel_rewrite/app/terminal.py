"""What a person sees of a job when it is done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from laurel_rewrite.app.job import Report
from laurel_rewrite.app.tables import show_table
from laurel_rewrite.backends.module.saved_folder import MODELING
from laurel_rewrite.detection.explaining import Explanation
from laurel_rewrite.detection.site import short
from laurel_rewrite.detection.sites import Sites
from laurel_rewrite.plan import Plan
from laurel_rewrite.profiling import Profile
from laurel_rewrite.profiling.figures import FIGURES, Figure
from laurel_rewrite.profiling.latency import Latency
from laurel_rewrite.profiling.rows import Row
from laurel_rewrite.profiling.training import Training
from laurel_rewrite.report.words import figure, numbered, places, shortened, size, sizes_of, skipped_of


def show_sites(console: Console, model: str, sites: Sites) -> None:
    """The table of sites and, below, the other additions by reason."""
    if sites.sites:
        rows = [
            (
                site.id, site.kind, sites.spots[site.id].role, "x".join(map(str, site.shape)), f"{site.dim or '?'} ({site.axis})", f"{site.stream}:{site.index}",
                short(site.where),
            )
            for site in sites
        ]  # fmt: skip
        show_table(
            console,
            f"{model}: {numbered(len(sites), 'residual connection')}",
            ("site", "kind", "branch", "shape", "D (axis)>", "stream>", "where"),
            rows,
            _LEGEND,
        )
    counts = Counter((r.reason, short(r.where), r.detail) for r in sites.rejected)
    if counts:
        rejected = [(*words, str(times)) for words, times in sorted(counts.items())]
        show_table(
            console,
            f"{numbered(len(sites.rejected), 'other addition')}: no residual connection",
            ("reason", "where", "detail", "times>"),
            rejected,
        )
    for note in filter(None, (sites.existing(), *(sites.notes if sites.sites else [sites.why_none()]))):
        console.print(Text(note))


def show_explanations(console: Console, explanations: list[Explanation]) -> None:
    """Each verdict once, with its facts; those of the same line and verdict are counted under the first."""
    groups: dict[tuple[str, str, str], list[Explanation]] = {}
    for explanation in explanations:
        groups.setdefault((explanation.where, explanation.verdict, explanation.rule), []).append(explanation)
    for (where, verdict, rule), alike in groups.items():
        first = alike[0]
        found = "is a residual connection" if first.id else "is no residual connection"
        console.print(Text.assemble((first.id or short(where), "bold"), f" {found}: ", (verdict, "green" if first.id else "yellow")))
        console.print(Text(f"  {rule}"))
        console.print(Text(f"  {short(where)}" + (f"    {first.code}" if first.code else ""), style="cyan"))
        table = Table(box=None, show_header=False, padding=(0, 1, 0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for label, fact in first.facts:
            table.add_row(label, Text(fact))
        console.print(table)
        if len(alike) > 1:
            names = [e.id or e.owner for e in alike[1:]]
            shown = ", ".join(names[:4]) + (f", and {len(names) - 4} more" if len(names) > 4 else "")
            console.print(Text(f"  The same for {len(names)} more: {shown}", style="dim"))
        console.print()


def show_plan(console: Console, report: Report) -> None:
    """The plan in groups of equal treatment."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for site in report.plan.sites:
        words = ", ".join(f"{name} {value}" for name, value in site.changed_options().items() if name != "rank")
        rank = str(site.options.get("rank", "")) if site.operator.uses_maps else ""
        groups.setdefault((site.variant, rank, words, str(site.dim)), []).append(site.id)
    columns = ["first site", "sites>", "variant", "rank>", "options", "features>"]
    empty = {column for place, column in enumerate(columns[2:]) if all(not group[place] for group in groups)}
    rows = [
        (ids[0], str(len(ids)), *(text for text, column in zip(group, columns[2:], strict=True) if column not in empty))
        for group, ids in groups.items()
    ]
    show_table(console, f"Plan for {report.model}", tuple(column for column in columns if column not in empty), rows)
    console.print(_parameter_line(report))
    if report.plan.left_out:
        console.print(
            Text(f"Left out, for no maps fit their feature axis, or its size is unknown: {', '.join(report.plan.left_out)}", style="yellow")
        )
    for note in (*report.sites.notes, *report.plan.narrowed, *report.notes):
        console.print(Text(note))


def show_configurations(console: Console, plan: Plan, found: Sequence[Mapping[str, Any]]) -> None:
    """What other variants and ranks would add: each rank of the plan's own operators, the least and the most of the others."""
    own = {site.variant for site in plan.sites}
    of_one = [[one for one in found if one["variant"] == name] for name in dict.fromkeys(one["variant"] for one in found)]
    groups = [[one] for ones in of_one for one in ones if one["variant"] in own]
    groups += [ones if len(ones) == 1 else [ones[0], ones[-1]] for ones in of_one if ones[0]["variant"] not in own]

    rows = []
    for group in groups:
        shares = (100 * one["added"] / max(one["model"], 1) for one in group)
        columns = (
            [str(one["rank"] or "") for one in group],
            [f"{one['added']:,}" for one in group],
            [f"{share:.2f}" for share in shares],
            [f"{one['added_flops_per_position']:,}" for one in group],
        )
        ranks, added, share, flops = (" to ".join(dict.fromkeys(column)) for column in columns)
        rows.append((group[0]["variant"], ranks, added, f"{share} %", flops))
    show_table(console, "Other configurations", ("variant", "rank>", "parameters>", "of the model's>", "FLOPs a position>"), rows)


def show_report(console: Console, report: Report) -> None:
    """What was left out, what was rewritten, whether it is right, what it costs, and where it lies."""
    if report.skipped:
        console.print(Text(skipped_of(len(report.skipped), len(report.plan.sites)), style="bold yellow"))
        for site in report.skipped:
            console.print(Padding(Text.assemble((site.id, "bold"), f" ({short(site.where)}): {site.reason}"), (0, 0, 0, 2)))
    show_plan(console, report)
    checks = [
        (
            check.name, Text(check.outcome, {True: "green", False: "bold red", None: "yellow"}[check.passed]),
            "" if check.outcome == "not run" else f"{check.difference:.2g}", check.tolerance, check.detail,
        )
        for check in report.checks
    ]  # fmt: skip
    show_table(console, "Verification", ("check", "", "difference>", "allowed", "detail"), checks, _CHECKED, cut={"passed"})
    if report.profile is not None:
        show_profile(console, report.profile)
    if report.training is not None:
        show_training(console, report.training)
    if report.files:
        console.print(Text(f"Written to {report.out}/: {', '.join(report.files)}"))
        if MODELING in report.files:
            console.print(Text(f"Look at report.html; train what laurel_rewrite.load({report.out!r}) gives."))


def show_profile(console: Console, profile: Profile) -> None:
    """The figures of each model, and of the shapes it was measured at."""
    conditions, baseline = profile.conditions, profile.rows[0]
    several, at = len(profile.shapes) > 1 or bool(profile.phases[0]), places(profile.shapes, profile.phases)
    times = [
        (f"{shortened(row.name, 60)}\n{at[n]}", *_timed(one), *_memory(row, baseline, n))
        if several
        else (shortened(row.name, 60), *_timed(one))
        for row in profile.rows
        for n, one in enumerate(row.latencies)
    ]
    caption = (
        f"{conditions['rounds']} interleaved rounds, {conditions['threads']} threads, {conditions['provider']}; {sizes_of(profile.shapes[0])}; "
        f"{conditions['cpu']}, onnxruntime {conditions['onnxruntime']}"
    )
    show_table(console, "Profile in onnxruntime", ("model", *_TIMED, *(_MEMORY if several else ())), times, caption)
    brief = [one for one in FIGURES if one.brief]
    costs = [(shortened(row.name, 60), *(_figure(one, row, baseline) for one in brief)) for row in profile.rows]
    show_table(console, "Cost", ("model", *(f"{one.heading}>" for one in brief)), costs)
    for row in profile.rows:
        line = f"{shortened(row.name, 60)}: {row.ops.before.total()} ops, {row.ops.after.total()} after optimisation"
        console.print(Text(line if row is baseline else f"{line}; of the baseline's fused ops {row.ops.against(baseline.ops)}"))
        sites = row.attribution.sites
        if sites:
            dearest = max(sites, key=lambda site: site.ms)
            console.print(
                Text(
                    f"  in the traced runs its {numbered(len(sites), 'connection')} take {sum(site.ms for site in sites):+.3f} ms more than the sums, most "
                    f"of it {shortened(dearest.site, 60)} ({dearest.ms:+.4f} ms); {row.attribution.left_over_ms:+.3f} ms are elsewhere"
                )
            )
    for warning in profile.warnings:
        console.print(Text(warning, style="yellow"))


def show_training(console: Console, training: Training) -> None:
    """Time and memory of training steps."""
    rows = [(row.name, row.mode, *_timed(row.step), size(row.saved_bytes), size(row.peak_bytes)) for row in training.rows]
    headings = ("model", "mode", *_TIMED, "kept for\nbackward>", "device\npeak>")
    show_table(console, "Training steps in PyTorch", headings, rows, f"forward, backward and AdamW, interleaved; {training.device}")
    for note in training.notes:
        console.print(Text(note, style="yellow"))


_LEGEND = (
    "kind: identity adds x itself, projection what a layer makes of it; branch: what f is; D: features, and the axis that has them; stream: the chain of "
    "sums that it belongs to, and its place there"
)
_CHECKED = (
    "exact start: before training it computes what the original does; random LAuReL: the same graph with new parameters off their start, where a "
    "mistake would show; optimised: by onnxruntime"
)
_MEMORY = ("activations>", "resident\npeak>")


def _memory(row: Row, baseline: Row, number: int) -> tuple[str, str]:
    """Memory at the n-th shape, and over the baseline's."""
    pairs = (
        (row.memories[number].activation_bytes, baseline.memories[number].activation_bytes),
        (row.residents[number], baseline.residents[number]),
    )
    activations, resident = (f"{size(own)}\n{own / whole:.3f}" if whole else size(own) for own, whole in pairs)
    return activations, resident


def _figure(one: Figure, row: Row, baseline: Row) -> str:
    ratio = one.against(row, baseline)
    least = "at least " if one.least(row) else ""
    return f"{least}{figure(one.value(row, baseline), one.form)}" + ("" if ratio is None else f"\n{ratio:.3f}")


_TIMED = ("median ms\n(p10-p90)>", "ratio\n[95 %]>", "verdict")


def _timed(time: Latency) -> tuple[str, str, Text]:
    ratio = "1" if time.verdict == "baseline" else f"{time.ratio:.3f}\n[{time.low:.3f}, {time.high:.3f}]"
    style = {"faster": "green", "slower": "red", "unresolved": "yellow"}.get(time.verdict, "")
    return f"{time.median_ms:.2f}\n({time.p10_ms:.2f}-{time.p90_ms:.2f})", ratio, Text(time.verdict, style)


def _parameter_line(report: Report) -> str:
    counts = report.parameters
    share = 100 * counts["added"] / max(counts["model"], 1)
    return f"{counts['model']:,} parameters + {counts['added']:,} of LAuReL (+{share:.2f} %)"
