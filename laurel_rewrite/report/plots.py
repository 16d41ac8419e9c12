"""The plots of the report, in Plotly. Names from graphs are escaped, for Plotly reads a little HTML in labels."""

from __future__ import annotations

import html
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from laurel_rewrite.report.words import places, settings, shortened

_SHOWN_OPS = 12
_SHOWN_RUNS = 400
_REACH = 4  # interquartile ranges that a plot of runs shows beyond the quartiles
COLOURS = (
    "#4477aa",
    "#ee6677",
    "#228833",
    "#ccbb44",
    "#66ccee",
    "#aa3377",
    "#999933",
    "#882255",
    "#44aa99",
    "#dd7788",
    "#7766aa",
    "#bb8844",
)
"""Paul Tol's bright scheme and neighbours, which colour-blind readers can tell apart."""
REST = "#a0a0a0"


def figures(data: Mapping[str, Any]) -> dict[str, go.Figure]:
    """Plots by the name of their place on the page; those there is nothing for are left out."""
    found: dict[str, go.Figure] = {}
    if data.get("sites") and data.get("plan"):
        found["streams"] = _streams(data)
    profile = data.get("profile")
    if profile:
        rows = profile["rows"]
        if len(rows) > 1:
            found["ratios"] = _ratios(rows, places(profile["shapes"], profile["phases"]))
        found["runs"] = _runs(rows)
        found["ops"] = _ops(rows)
        found["memory"] = _memory(rows)
        sited = [row for row in rows if row["time"]["sites"]]
        if sited:
            found["sites"] = _sites(sited)
        found["modules"] = _modules(sited[0] if sited else rows[-1])
    if data.get("training"):
        found["training"] = _training(data["training"]["rows"])
    return found


def label(text: object, length: int = 44) -> str:
    """A name as Plotly takes it."""
    return html.escape(shortened(text, length)) or "(none)"


def empty(height: int, **layout: Any) -> go.Figure:
    """A figure without traces."""
    figure = go.Figure()
    figure.update_layout(
        height=height, margin={"l": 8, "r": 8, "t": 8, "b": 40}, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
        colorway=list(COLOURS), font={"family": "system-ui, sans-serif", "size": 13}, hoverlabel={"align": "left"},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "xanchor": "left", "x": 0, "traceorder": "normal"}, **layout,
    )  # fmt: skip
    axes = {"gridcolor": "rgba(128,128,128,0.25)", "zerolinecolor": "rgba(128,128,128,0.5)", "automargin": True}
    figure.update_xaxes(**axes)
    figure.update_yaxes(**axes)
    return figure


def rows_of(count: int, *, bars: int = 1, extra: int = 0, **layout: Any) -> go.Figure:
    """A figure of so many rows from the top, each with room for its bars."""
    figure = empty(90 + extra + 34 * count * bars, **layout)
    return figure.update_yaxes(range=[count - 0.5, -0.5])


def _ratios(rows: Sequence[Mapping[str, Any]], measured: Sequence[str]) -> go.Figure:
    names = [label(row["name"]) for row in rows[1:]]
    figure = rows_of(len(names), bars=len(measured))
    for number, place in enumerate(measured):
        _add_ratios(figure, names, [row["latencies"][number] for row in rows[1:]], place)
    return around(figure, 1.0, "latency over the baseline's, with its 95 % interval", legend=len(measured) > 1)


def _add_ratios(figure: go.Figure, names: Sequence[str], times: Sequence[Mapping[str, Any]], series: str) -> None:
    marks(figure, names, [(time["ratio"], time["low"], time["high"]) for time in times], label(series))


def marks(figure: go.Figure, names: Sequence[str], found: Sequence[tuple[float, float, float]], series: str) -> None:
    """A mark with its interval in each row.

    Args:
        found: by name, the middle and both ends.
    """
    above, below = [high - middle for middle, _, high in found], [middle - low for middle, low, _ in found]
    figure.add_scatter(
        x=[middle for middle, *_ in found], y=names, mode="markers", marker={"size": 11}, name=series, hovertemplate="%{y}: %{x:.4f}<extra></extra>",
        error_x={"type": "data", "symmetric": False, "array": above, "arrayminus": below},
    )  # fmt: skip


def around(figure: go.Figure, value: float, title: str, *, legend: bool) -> go.Figure:
    """With a line at what means no difference."""
    figure.add_vline(x=value, line_dash="dot", line_color=REST)
    figure.update_xaxes(title=title)
    return figure.update_layout(scattermode="group", showlegend=legend)


def _runs(rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    figure = rows_of(len(rows), showlegend=False)
    ends: list[float] = []
    for row in rows:
        runs = row["latencies"][0]["runs_ms"]
        step = -(-len(runs) // _SHOWN_RUNS)
        figure.add_box(x=runs[::step], name=label(row["name"]), boxpoints="outliers", orientation="h", hoverinfo="x")
        low, high = statistics.quantiles(runs, n=4)[::2] if len(runs) > 1 else (runs[0], runs[0])
        reach = _REACH * (high - low)
        ends += [max(min(runs), low - reach), min(max(runs), high + reach)]
    margin = 0.03 * (max(ends) - min(ends)) or 0.03 * max(ends)  # a run that was interrupted would squeeze the others
    figure.update_xaxes(title="milliseconds a run", range=[min(ends) - margin, max(ends) + margin])
    return figure


def _ops(rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    names = [label(row["name"]) for row in rows]
    totals: dict[str, float] = {}
    for row in rows:
        for op, ms in row["time"]["by_op"].items():
            totals[op] = totals.get(op, 0.0) + ms
    shown = sorted(totals, key=lambda op: -totals[op])[:_SHOWN_OPS]
    figure = rows_of(len(rows), extra=40, barmode="stack")
    for number, op in enumerate(shown):
        times = [row["time"]["by_op"].get(op, 0.0) for row in rows]
        figure.add_bar(x=times, y=names, name=label(op, 28), orientation="h", marker_color=COLOURS[number % len(COLOURS)])
    rest = [sum(ms for op, ms in row["time"]["by_op"].items() if op not in shown) for row in rows]
    if any(rest):
        figure.add_bar(x=rest, y=names, name="others", orientation="h", marker_color=REST)
    figure.update_traces(hovertemplate="%{y}<br>%{fullData.name}: %{x:.3f} ms<extra></extra>")
    figure.update_xaxes(title="milliseconds, from profiled runs, scaled to the median latency")
    return figure


def _memory(rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    names = [label(row["name"]) for row in rows]
    figure = rows_of(len(rows), bars=2, barmode="group")
    for key, name in (
        ("activation_bytes", "activations: peak of the arena, weights aside"),
        ("live_bytes", "values alive: peak, from the graph"),
    ):
        figure.add_bar(x=[row["memories"][0][key] / (1 << 20) for row in rows], y=names, name=name, orientation="h")
    figure.update_traces(hovertemplate="%{y}: %{x:.2f} MiB<extra></extra>")
    figure.update_xaxes(title="MiB")
    return figure


def _sites(rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    ids = list(dict.fromkeys(site["site"] for row in rows for site in row["time"]["sites"]))
    figure = empty(110 + 22 * len(ids) * len(rows), barmode="group")
    for row in rows:
        sites = row["time"]["sites"]
        figure.add_bar(
            y=[label(site["site"]) for site in sites], x=[site["ms"] for site in sites], name=label(row["name"]), orientation="h",
            customdata=[[label(site["site"], 80), site["nodes"], label(site["into"] or "nothing", 60)] for site in sites],
            hovertemplate="%{customdata[0]}: %{x:.4f} ms<br>%{customdata[1]} ops of its own, sum absorbed into %{customdata[2]}<extra></extra>",
        )  # fmt: skip
    figure.update_yaxes(range=[len(ids) - 0.5, -0.5])
    figure.update_xaxes(title="ms more than the baseline")
    return figure


def _modules(row: Mapping[str, Any]) -> go.Figure:
    """Times by module path, as an icicle."""
    totals: dict[str, float] = {"": 0.0}
    for path, ms in row["time"]["by_module"].items():
        parts = str(path).split(".") if path else []
        for depth in range(len(parts) + 1):
            key = ".".join(parts[:depth])
            totals[key] = totals.get(key, 0.0) + ms
    keys = list(totals)
    figure = empty(380)
    figure.add_icicle(
        ids=[f"m{keys.index(key)}" for key in keys], labels=[label(key.rpartition(".")[2], 24) if key else label(row["name"]) for key in keys],
        parents=["" if not key else f"m{keys.index(key.rpartition('.')[0])}" for key in keys], values=list(totals.values()), branchvalues="total",
        customdata=[label(key or "the model", 90) for key in keys], tiling={"orientation": "v"}, maxdepth=5,
        hovertemplate="%{customdata}<br>%{value:.3f} ms, %{percentRoot:.1%}<extra></extra>",
    )  # fmt: skip
    return figure


def _streams(data: Mapping[str, Any]) -> go.Figure:
    """A line a stream, a mark a site; filled where LAuReL was put in."""
    planned = {site["id"]: site for site in data["plan"]["sites"]}
    streams: dict[int, list[Mapping[str, Any]]] = {}
    for site in data["sites"]:
        streams.setdefault(site["stream"], []).append(site)
    figure = empty(110 + 30 * len(streams), showlegend=False)
    for row, (number, sites) in enumerate(streams.items()):
        treated = [planned.get(site["id"]) for site in sites]
        figure.add_scatter(
            x=[site["index"] for site in sites], y=[row] * len(sites), mode="lines+markers", name=f"stream {number}",
            marker={
                "size": 14, "color": COLOURS[row % len(COLOURS)], "line": {"width": 2, "color": COLOURS[row % len(COLOURS)]},
                "symbol": ["circle" if plan else "circle-open" for plan in treated],
            },
            customdata=[
                [label(site["id"], 80), site["kind"], "x".join(map(str, site["shape"])), ", ".join(filter(None, (plan["variant"], settings(plan)))) if plan else "left as it is"]
                for site, plan in zip(sites, treated, strict=True)
            ],
            hovertemplate="%{customdata[0]}<br>%{customdata[1]}, %{customdata[2]}<br>%{customdata[3]}<extra></extra>",
        )  # fmt: skip
    titles = [f"{number}: D {sites[0]['dim'] or '?'}" for number, sites in streams.items()]
    figure.update_yaxes(tickvals=list(range(len(streams))), ticktext=titles, autorange="reversed", title="stream", showgrid=False)
    figure.update_xaxes(title="position of the residual connection in its stream", rangemode="tozero")
    return figure


def _training(rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    others = [row for row in rows if row["step"]["verdict"] != "baseline"]
    figure = rows_of(len({row["name"] for row in others}), bars=2)
    for mode in dict.fromkeys(row["mode"] for row in others):
        here = [row for row in others if row["mode"] == mode]
        _add_ratios(figure, [label(row["name"]) for row in here], [row["step"] for row in here], mode)
    return around(figure, 1.0, "time of a training step over the baseline's, with its 95 % interval", legend=True)
