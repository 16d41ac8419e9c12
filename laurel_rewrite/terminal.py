"""What a person sees: stages while they run, tables when they are done."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
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
        for (reason, where, detail), count in sorted(counts.items()):
            table.add_row(reason, Text(where), Text(detail), str(count))
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
        mark = Text("passed", "green") if check.passed else Text("FAILED", "bold red")
        table.add_row(check.name, mark, f"{check.difference:.2g}", check.tolerance, Text(check.detail))
    console.print(table)
    if report.profile is not None:
        conditions = report.profile.conditions
        inputs = ", ".join(f"{name} {value}" for name, value in conditions["inputs"].items())
        table = Table(
            title="Profile in onnxruntime",
            caption=f"{conditions['rounds']} interleaved rounds, {conditions['threads']} threads, {inputs}\n{conditions['cpu']}, onnxruntime {conditions['onnxruntime']}",
            **_STYLE,
        )
        for heading in ("model", "median ms\n(p10-p90)", "ratio\n[95 %]", "verdict", "peak\nactivations", "peak\nresident", "file"):
            left = heading in ("model", "verdict")
            table.add_column(heading, justify="left" if left else "right", no_wrap=heading != "verdict")
        for row in report.profile.rows:
            time = row.latency
            ratio = "1" if time.verdict == "baseline" else f"{time.ratio:.3f}\n[{time.low:.3f}, {time.high:.3f}]"
            table.add_row(
                Text(row.path.rsplit("/", 1)[-1]), f"{time.median_ms:.2f}\n({time.p10_ms:.2f}-{time.p90_ms:.2f})", Text(ratio), time.verdict,
                _bytes(row.memory.activation_bytes), _bytes(row.resident_bytes), _bytes(row.file_bytes),
            )  # fmt: skip
        console.print(table)
        console.print(_ops(report.profile))
    if report.files:
        console.print(Text(f"Written to {report.out}/: {', '.join(report.files)}"))


_STYLE: dict[str, Any] = {"box": box.SIMPLE_HEAD, "title_justify": "left", "title_style": "bold", "caption_justify": "left"}


def _ops(profile: Profile) -> Text:
    """What onnxruntime runs, and which of the baseline's fusions the others keep."""
    baseline = profile.rows[0].ops
    lines = []
    for row in profile.rows:
        line = f"{row.path.rsplit('/', 1)[-1]}: {row.ops.before.total()} ops, {row.ops.after.total()} after optimisation"
        lines.append(line if row is profile.rows[0] else f"{line}; fusions {row.ops.against(baseline)}")
    return Text("\n".join(lines))


def _parameter_line(report: Report) -> str:
    counts = report.parameters
    share = 100 * counts["added"] / max(counts["model"], 1)
    return f"{counts['model']:,} parameters + {counts['added']:,} of LAuReL (+{share:.2f} %)"


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B" if count else "-"
