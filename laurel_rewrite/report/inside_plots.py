"""The plot of what is inside trained models, over depth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from laurel_rewrite.report.plots import COLOURS, empty, label

_Site = Mapping[str, Any]
_QUANTITIES: dict[str, tuple[Callable[[_Site], float | None], Callable[[_Site], float | None]]] = {
    "loss more with the plain sum": (lambda site: (site["plain"] or {}).get("loss"), lambda site: (site["plain"] or {}).get("error")),
    "loss more without the branch": (lambda site: site["without_branch"]["loss"], lambda site: site["without_branch"]["error"]),
    "share of the final state": (lambda site: site["share"], lambda site: None),
    "skip, rms": (lambda site: site["skip"], lambda site: None),
    "branch, rms": (lambda site: site["branch"], lambda site: None),
    "cosine of branch and skip": (lambda site: site["branch_cosine"], lambda site: None),
}
_TICKS = 12
_LEARNED = 8  # scalars and norms, of all that there are


def depth_profile(found: Sequence[Mapping[str, Any]]) -> go.Figure | None:
    """One quantity at a time over the sites in order, a line a model; None where nothing was seen.

    Args:
        found: as reports hold it.
    """
    models = [(one["name"], one["inside"]["sites"]) for one in found if one["inside"] and one["inside"]["sites"]]
    if not models:
        return None
    order = list(dict.fromkeys(site["site"] for _, sites in sorted(models, key=lambda one: -len(one[1])) for site in sites))
    names = list(dict.fromkeys(name for _, sites in models for site in sites for name in site["learned"]))[:_LEARNED]
    quantities = {**_QUANTITIES, **{f"learned: {name}": (_learned(name), lambda site: None) for name in names}}
    figure = empty(420)
    owners: list[str] = []
    for quantity, (value, error) in quantities.items():
        for number, (name, sites) in enumerate(models):
            placed = [(order.index(site["site"]), site) for site in sites if value(site) is not None]
            if not placed:
                continue
            errors = [2 * (error(site) or 0.0) for _, site in placed]
            figure.add_scatter(
                x=[depth for depth, _ in placed], y=[value(site) for _, site in placed], mode="lines+markers", name=label(name), visible=not owners or quantity == owners[0],
                line={"color": COLOURS[number % len(COLOURS)]}, error_y={"type": "data", "array": errors, "visible": any(errors)},
                text=[label(site["site"], 60) for _, site in placed], hovertemplate="%{fullData.name}, %{text}: %{y:.4f}<extra></extra>",
            )  # fmt: skip
            owners.append(quantity)
    shown = list(dict.fromkeys(owners))
    buttons = [
        {"label": quantity, "method": "update", "args": [{"visible": [one == quantity for one in owners]}, {"yaxis.title.text": quantity}]}
        for quantity in shown
    ]
    figure.update_layout(updatemenus=[{"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.2, "yanchor": "top"}], showlegend=True)
    ticks = range(0, len(order), -(-len(order) // _TICKS))
    figure.update_xaxes(tickvals=list(ticks), ticktext=[label(order[place], 30) for place in ticks], tickangle=-40)
    return figure.update_yaxes(title=shown[0])


def _learned(name: str) -> Callable[[_Site], float | None]:
    return lambda site: site["learned"].get(name)
