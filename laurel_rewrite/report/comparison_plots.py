"""The plots of a comparison: curves, differences with their intervals, and quality against cost."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from laurel_rewrite.report.inside_plots import depth_profile
from laurel_rewrite.report.plots import COLOURS, REST, around, empty, label, marks, rows_of

_COSTS = {"parameters": "parameters", "flops": "FLOPs", "seconds": "time of a step", "latency": "latency"}


def comparison_figures(data: Mapping[str, Any]) -> dict[str, go.Figure]:
    """Plots of a comparison by the name of their place; those there is nothing for are left out."""
    rows, found = data["rows"], {}
    curves = _curves(data)
    if curves:
        found["curves"] = _drawn_curves(curves, data)
    judged = [row for row in rows if row["judgement"]["low"] is not None]
    if judged:
        found["differences"] = _differences(judged)
    placed = [row for row in rows if row["judgement"]["mean"] is not None]
    if len(placed) > 1:
        found["costs"] = _costs(placed)
    if data["search"] and any(trial["loss"] is not None for trial in data["search"]["trials"]):
        found["search"] = _search(data["search"])
    inside = depth_profile(data["inside"])
    if inside is not None:
        found["inside"] = inside
    return found


def _curves(data: Mapping[str, Any]) -> dict[str, list[Sequence[Mapping[str, Any]]]]:
    """Of each candidate the curves at the learning rate that it is judged at, one a seed."""
    found: dict[str, list[Sequence[Mapping[str, Any]]]] = {}
    for row in data["rows"]:
        runs = [run for run in data["runs"] if run["candidate"] == row["name"] and run["base_rate"] == row["rate"] and run["curve"]]
        if runs:
            found[row["name"]] = [run["curve"] for run in runs]
    return found


def _drawn_curves(curves: Mapping[str, list[Sequence[Mapping[str, Any]]]], data: Mapping[str, Any]) -> go.Figure:
    figure = empty(420)
    for number, (name, seeds) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = range(min(map(len, seeds)))
        tokens = [seeds[0][n]["tokens"] for n in points]
        losses = [[curve[n]["choose"] for curve in seeds if curve[n]["choose"] is not None] for n in points]
        shown = [n for n in points if losses[n]]
        high, low = ([end(losses[n]) for n in shown] for end in (max, min))
        x = [tokens[n] for n in shown]
        if len(seeds) > 1:
            figure.add_scatter(
                x=[*x, *reversed(x)], y=[*high, *reversed(low)], fill="toself", mode="none", fillcolor=colour, opacity=0.15, legendgroup=name,
                showlegend=False, hoverinfo="skip",
            )  # fmt: skip
        figure.add_scatter(
            x=x, y=[statistics.fmean(losses[n]) for n in shown], mode="lines", name=label(name), legendgroup=name, line={"color": colour},
            hovertemplate="%{fullData.name}: %{y:.4f}<br>%{x:,.0f}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title=f"{data['task']['unit']} trained on")
    return figure.update_yaxes(title="loss on the second split")


def _differences(rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    figure = rows_of(len(rows), showlegend=False)
    found = [row["judgement"] for row in rows]
    marks(figure, [label(row["name"]) for row in rows], [(one["difference"], one["low"], one["high"]) for one in found], "")
    return around(figure, 0.0, "loss less the baseline's, paired by seed, with its 95 % interval", legend=False)


def _search(search: Mapping[str, Any]) -> go.Figure:
    """What each came to, less the unchanged model after the same tokens, against the cost that is limited first (or the parameters added); the front of
    those that were trained to the end is joined."""
    figure = empty(420)
    names = [budget.partition("<")[0].strip() for budget in search["budgets"]]
    cost = next((name for name in names if any(name in trial["figures"] for trial in search["trials"])), "parameters")
    tried = [trial for trial in search["trials"] if trial["difference"] is not None and cost in trial["figures"]]
    for state, colour, symbol in (("trained", COLOURS[0], "circle"), ("stopped early", REST, "circle-open")):
        found = sorted(
            (trial for trial in tried if trial["state"] == state), key=lambda trial: (trial["figures"][cost], trial["difference"])
        )
        x, y = [trial["figures"][cost] for trial in found], [trial["difference"] for trial in found]
        if state == "trained":
            _join_front(figure, x, y)
        figure.add_scatter(
            x=x, y=y, mode="markers", name=state, marker={"size": 10, "color": colour, "symbol": symbol},
            text=[f"{label(trial['candidate'])}, {trial['tokens']:,} trained on" for trial in found],
            hovertemplate="%{text}<br>%{x:.4g}, %{y:+.4f}<extra></extra>",
        )  # fmt: skip
    figure.add_hline(0, line={"color": REST, "width": 1}, annotation_text="the unchanged model")
    figure.update_xaxes(title="parameters added, as a share" if cost == "parameters" else cost)
    return figure.update_yaxes(title="loss less the unchanged model's")


def _join_front(figure: go.Figure, x: Sequence[float], y: Sequence[float], *, visible: bool = True) -> None:
    """A line through the points that have nothing better at their cost, of points in the order of that."""
    best = [n for n, value in enumerate(y) if all(value < other for other in y[:n])]
    line = {"color": REST, "dash": "dot", "shape": "hv"}
    figure.add_scatter(
        x=[x[n] for n in best], y=[y[n] for n in best], mode="lines", hoverinfo="skip", showlegend=False, visible=visible, line=line
    )


def _costs(rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Loss against each cost, one at a time; what no other is below and left of is joined."""
    figure = empty(420, showlegend=False)
    costs = [cost for cost in _COSTS if sum(row[cost] is not None for row in rows) > 1]
    for cost in costs:
        placed = sorted((row for row in rows if row[cost] is not None), key=lambda row: (row[cost], row["judgement"]["mean"]))
        x, y = [row[cost] for row in placed], [row["judgement"]["mean"] for row in placed]
        _join_front(figure, x, y, visible=cost == costs[0])
        figure.add_scatter(
            x=x, y=y, mode="markers+text", visible=cost == costs[0],
            text=[label(row["name"], 24) for row in placed], textposition=[("top center", "bottom center")[n % 2] for n in range(len(placed))], marker={"size": 11, "color": COLOURS[0]},
            hovertemplate="%{text}<br>%{x:.4f} of the baseline's, loss %{y:.4f}<extra></extra>",
        )  # fmt: skip
    buttons = [
        {
            "label": _COSTS[cost], "method": "update",
            "args": [{"visible": [shown == cost for shown in costs for _ in range(2)]}, {"xaxis.title.text": f"{_COSTS[cost]} over the baseline's"}],
        }
        for cost in costs
    ]  # fmt: skip
    figure.update_layout(
        updatemenus=[{"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.15, "yanchor": "top", "type": "buttons", "direction": "right"}]
    )
    figure.update_xaxes(title=f"{_COSTS[costs[0]]} over the baseline's")
    return figure.update_yaxes(title="loss on the third split")
