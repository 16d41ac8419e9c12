"""What a person sees: stages while they run, tables when they are done."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from laurel_rewrite.explaining import Explanation
from laurel_rewrite.job import Report, Stage
from laurel_rewrite.profiling import Profile
from laurel_rewrite.profiling.training import Training
from laurel_rewrite.report import count, part, shortened, size
from laurel_rewrite.sites import Sites, short


class Stages:
    """Shows the stages on a terminal as they run; in a pipe it shows nothing."""

    def __init__(self, console: Console, *, quiet: bool) -> None:
        self.console = console
        self.shown = console.is_terminal and not quiet

    @contextmanager
    def __call__(self, name: str) -> Iterator[Stage]:
        begin = time.perf_counter()
        bar = Progress(
            SpinnerColumn(), TextColumn(f"{name:<18}"), BarColumn(), TimeElapsedColumn(), console=self.console, transient=True,
            disable=not self.shown,
        )  # fmt: skip
        with bar:
            stage = _Shown(bar)
            yield stage
        if self.shown:
            seconds = time.perf_counter() - begin
            mark = (" ✗ ", "bold red") if stage.text.startswith("FAILED") else (" ✓ ", "green")
            self.console.print(Text.assemble(mark, f"{name:<18}", stage.text, (f"  {seconds:.1f} s", "dim")))


class _Shown:
    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.task = bar.add_task("", total=None)
        self.text = ""

    def done(self, text: str) -> None:
        self.text = text

    def progress(self, fraction: float) -> None:
        self.bar.update(self.task, total=1.0, completed=fraction)


def show_sites(console: Console, model: str, sites: Sites) -> None:
    """The table of sites and, below, the other additions by reason."""
    table = Table(title=f"{model}: {len(sites)} residual connections", **_STYLE)
    for heading, justify in (
        ("site", "left"),
        ("kind", "left"),
        ("shape", "left"),
        ("axis", "right"),
        ("D", "right"),
        ("stream", "right"),
        ("where", "left"),
    ):
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]  # a literal
    for site in sites:
        shape = "x".join(map(str, site.shape))
        table.add_row(
            Text(site.id), site.kind, shape, str(site.axis), str(site.dim or "?"), f"{site.stream}:{site.index}", Text(short(site.where))
        )
    if sites.sites:
        console.print(table)
    counts = Counter((r.reason, short(r.where), r.detail) for r in sites.rejected)
    if counts:
        table = Table(title=f"{len(sites.rejected)} other additions", **_STYLE)
        for heading in ("reason", "where", "detail"):
            table.add_column(heading, overflow="fold")
        table.add_column("times", justify="right")
        for (reason, where, detail), times in sorted(counts.items()):
            table.add_row(reason, Text(where), Text(detail), str(times))
        console.print(table)
    if not sites.sites:
        console.print("No residual connection was found.")


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
    table = Table(title=f"Plan for {report.model}", **_STYLE)
    for heading, justify in (("sites", "right"), ("variant", "left"), ("rank", "right"), ("D", "right"), ("first site", "left")):
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]  # a literal
    groups: dict[tuple[str, int, int], list[str]] = {}
    for site in report.plan.sites:
        groups.setdefault((site.variant, site.rank, site.dim), []).append(site.id)
    for (variant, rank, dim), ids in groups.items():
        table.add_row(str(len(ids)), variant, str(rank), str(dim), Text(ids[0]))
    console.print(table)
    console.print(_parameter_line(report))
    if report.plan.left_out:
        console.print(Text(f"Left out, for their feature axis is of unknown size: {', '.join(report.plan.left_out)}", style="yellow"))
    for note in report.notes:
        console.print(Text(note))


def show_report(console: Console, report: Report) -> None:
    """What was rewritten, whether it is right, what it costs, and where it lies."""
    show_plan(console, report)
    table = Table(title="Verification", **_STYLE)
    for heading in ("check", "", "difference", "allowed", "detail"):
        table.add_column(heading, justify="right" if heading == "difference" else "left", no_wrap=heading in ("check", "", "difference"))
    for check in report.checks:
        mark = Text(check.outcome, {True: "green", False: "bold red", None: "yellow"}[check.passed])
        table.add_row(
            check.name, mark, "" if check.outcome == "not run" else f"{check.difference:.2g}", check.tolerance, Text(check.detail)
        )
    console.print(table)
    if report.profile is not None:
        show_profile(console, report.profile)
    if report.training is not None:
        show_training(console, report.training)
    if report.files:
        console.print(Text(f"Written to {report.out}/: {', '.join(report.files)}"))


def show_profile(console: Console, profile: Profile) -> None:
    """The figures of each model, and of the shapes it was measured at."""
    conditions, baseline = profile.conditions, profile.rows[0]
    table = Table(
        title="Profile in onnxruntime",
        caption=f"{conditions['rounds']} interleaved rounds, {conditions['threads']} threads, {conditions['provider']}; {_sizes(profile.shapes[0])}\n"
        f"{conditions['cpu']}, onnxruntime {conditions['onnxruntime']}",
        **_STYLE,
    )
    for heading in (
        "model",
        "median ms\n(p10-p90)",
        "ratio\n[95 %]",
        "verdict",
        "FLOPs",
        "parameters",
        "peak\nactivations",
        "peak\nresident",
        "file",
    ):
        left = heading in ("model", "verdict")
        table.add_column(heading, justify="left" if left else "right", no_wrap=heading not in ("model", "verdict"), overflow="fold")
    for row in profile.rows:
        for number, (one, shape) in enumerate(zip(row.latencies, profile.shapes, strict=True)):
            ratio = "1" if one.verdict == "baseline" else f"{one.ratio:.3f}\n[{one.low:.3f}, {one.high:.3f}]"
            name = Text(shortened(row.name, 60)) if len(profile.shapes) == 1 else Text(f"{shortened(row.name, 60)}\n{_sizes(shape)}")
            rest = (
                f"{count(row.costs.flops)}\n{part(row.costs.flops, baseline.costs.flops)}",
                f"{count(row.costs.parameters)}\n{part(row.costs.parameters, baseline.costs.parameters)}",
                size(row.memory.activation_bytes), size(row.resident_bytes), size(row.file_bytes),
            )  # fmt: skip
            figures = (f"{one.median_ms:.2f}\n({one.p10_ms:.2f}-{one.p90_ms:.2f})", Text(ratio), one.verdict)
            table.add_row(name, *figures, *(rest if number == 0 else ()))
    console.print(table)
    for row in profile.rows:
        line = f"{shortened(row.name, 60)}: {row.ops.before.total()} ops, {row.ops.after.total()} after optimisation"
        console.print(Text(line if row is baseline else f"{line}; fusions {row.ops.against(baseline.ops)}"))
        sites = row.attribution.sites
        if sites:
            dearest = max(sites, key=lambda site: site.ms)
            console.print(
                Text(
                    f"  {len(sites)} sites take {sum(site.ms for site in sites):+.3f} ms, most {shortened(dearest.site, 60)} ({dearest.ms:+.4f} ms); "
                    f"{row.attribution.left_over_ms:+.3f} ms of the difference belong to none"
                )
            )
    for warning in profile.warnings:
        console.print(Text(warning, style="yellow"))


def show_training(console: Console, training: Training) -> None:
    """Time and memory of training steps."""
    table = Table(title="Training steps in PyTorch", caption=f"forward, backward and AdamW, interleaved; {training.device}", **_STYLE)
    for heading in ("model", "mode", "median ms\n(p10-p90)", "ratio\n[95 %]", "verdict", "kept for\nbackward", "device\npeak"):
        table.add_column(heading, justify="left" if heading in ("model", "mode", "verdict") else "right")
    for row in training.rows:
        step = row.step
        ratio = "1" if step.verdict == "baseline" else f"{step.ratio:.3f}\n[{step.low:.3f}, {step.high:.3f}]"
        times = f"{step.median_ms:.2f}\n({step.p10_ms:.2f}-{step.p90_ms:.2f})"
        table.add_row(Text(row.name), row.mode, times, Text(ratio), step.verdict, size(row.saved_bytes), size(row.peak_bytes))
    console.print(table)
    for note in training.notes:
        console.print(Text(note, style="yellow"))


def _sizes(shape: Mapping[str, str]) -> str:
    return ", ".join(f"{shortened(name, 40)} {value}" for name, value in shape.items())


_STYLE: dict[str, Any] = {"box": box.SIMPLE_HEAD, "title_justify": "left", "title_style": "bold", "caption_justify": "left"}


def _parameter_line(report: Report) -> str:
    counts = report.parameters
    share = 100 * counts["added"] / max(counts["model"], 1)
    return f"{counts['model']:,} parameters + {counts['added']:,} of LAuReL (+{share:.2f} %)"
