"""The plots of a comparison: curves, differences with their intervals, and quality against cost."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from laurel_rewrite.report.drawing import COLOURS, DIM, MARKERS, PAPER, Drawing, label, labels, style
from laurel_rewrite.report.inside_plots import depth_profile
from laurel_rewrite.report.plots import in_sight, intervals, margins

_COSTS = {"parameters": "parameters", "flops": "FLOPs", "seconds": "time of a step", "latency": "latency"}
_SIZE = {"width": 470, "height": 300}
_GAP = (90, 70)
_MARKED = 16  # points of a curve
_BEST = 8  # trials that are named
_PLAIN = 56  # the number of those that are not: grey, and round

_Curves = Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]


@style()
def comparison_figures(data: Mapping[str, Any]) -> dict[str, Drawing]:
    """Plots of a comparison by the name of their place; those there is nothing for are left out."""
    rows, found = data["rows"], {}
    curves = {name: _Curve(seeds) for name, seeds in _curves(data).items()}
    if any(curve.tokens for curve in curves.values()):
        found["curves"] = _drawn_curves({name: curve for name, curve in curves.items() if curve.tokens}, data["task"]["unit"])
    judged = [row for row in rows if row["judgement"]["low"] is not None]
    if judged:
        found["differences"] = _differences(judged)
    placed = [row for row in rows if row["judgement"]["mean"] is not None]
    if len(placed) > 1:
        found["costs"] = _costs(placed)
    if data["search"] and any(trial["loss"] is not None for trial in data["search"]["trials"]):
        found["search"] = _search(data["search"])
    inside = depth_profile(data["inside"], [row["name"] for row in rows])
    if inside is not None:
        found["inside"] = inside
    return found


def _curves(data: Mapping[str, Any]) -> _Curves:
    """Of each candidate the curves at the learning rate that it is judged at, one a seed."""
    found = {}
    for row in data["rows"]:
        runs = [run for run in data["runs"] if run["candidate"] == row["name"] and run["base_rate"] == row["rate"] and run["curve"]]
        if runs:
            found[row["name"]] = [run["curve"] for run in runs]
    return found


class _Curve:
    """The mean of a candidate's seeds, and the band of all of them."""

    def __init__(self, seeds: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        points = range(min(map(len, seeds)))
        losses = [[curve[n]["choose"] for curve in seeds if curve[n]["choose"] is not None] for n in points]
        shown = [n for n in points if losses[n]]
        self.tokens = [seeds[0][n]["tokens"] for n in shown]
        self.mean = [statistics.fmean(losses[n]) for n in shown]
        self.low, self.high = ([end(losses[n]) for n in shown] for end in (min, max))


def _drawn_curves(curves: Mapping[str, _Curve], unit: str) -> Drawing:
    """All of the training, and beside it the second half alone, where the curves lie close to each other."""
    longest = max(curve.tokens[-1] for curve in curves.values())
    starts = [0.0, longest / 2] if any(sum(at >= longest / 2 for at in curve.tokens) > 1 for curve in curves.values()) else [0.0]
    lowest, highest = in_sight([curve.mean[-1] for curve in curves.values()])
    seen = [curve for curve in curves.values() if lowest <= curve.mean[-1] <= highest]
    drawing = Drawing(**_SIZE, count=len(starts), columns=2, gap=_GAP)
    for axes, start, title in zip(drawing.axes, starts, ("all of it", "the second half"), strict=False):
        ends = [end for curve in seen for at, *both in zip(curve.tokens, curve.low, curve.high, strict=True) if at >= start for end in both]
        low, high = margins(min(ends), max(ends))
        axes.set_ylim(low, high)
        axes.set_xlim(margins(start, longest, 0.03))
        entries = {}
        for number, (name, curve) in enumerate(zip(labels(curves), curves.values(), strict=True)):
            entries[name] = _draw_curve(drawing, axes, name, curve, number, start)
        _quantities(axes, f"{unit} trained on", "loss on the second split")
        axes.set_title(title)
    drawing.legend(entries, above=30)
    return drawing


def _draw_curve(drawing: Drawing, axes: Axes, name: str, curve: _Curve, number: int, start: float) -> Any:
    """A curve from some number of tokens on; returns what a legend shows of it."""
    colour, shape = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    axes.fill_between(curve.tokens, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(curve.tokens, curve.mean, color=colour, linewidth=1.5)
    low, high = axes.get_ylim()
    points = [(at, loss) for at, loss in zip(curve.tokens, curve.mean, strict=True) if at >= start and low <= loss <= high]
    points = [*reversed(points[:: -max(1, -(-len(points) // _MARKED))])]
    if points:
        marks = axes.plot(*zip(*points, strict=True), color=colour, linestyle="none", marker=shape, markersize=6)
        drawing.note(marks[0], *(f"{name}: {loss:.4f} at {at:,.0f}" for at, loss in points))
    (shown,) = axes.plot([], [], color=colour, linewidth=1.5, marker=shape, markersize=6)
    return shown


def _quantities(axes: Axes, x: str, y: str) -> None:
    """What the axes measure; large numbers in groups of three."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.locator_params(axis="x", nbins=5)
    if axes.get_xlim()[1] >= 1e4:
        axes.xaxis.set_major_formatter("{x:,.0f}")


def _differences(rows: Sequence[Mapping[str, Any]]) -> Drawing:
    found = [(one["difference"], one["low"], one["high"]) for one in (row["judgement"] for row in rows)]
    return intervals(
        labels(row["name"] for row in rows), {"": found}, 0.0, "loss less the baseline's, paired by seed, with its 95 % interval", "+.4f"
    )


def _search(search: Mapping[str, Any]) -> Drawing:
    """What each came to, less the unchanged model after the same tokens, against the cost that is limited first (or the parameters added); the front of
    those that were trained to the end is joined, and named."""
    names = [budget.partition("<")[0].strip() for budget in search["budgets"]]
    cost = next((name for name in names if any(name in trial["figures"] for trial in search["trials"])), "parameters")
    tried = [trial for trial in search["trials"] if trial["difference"] is not None and cost in trial["figures"]]
    tried.sort(key=lambda trial: (trial["figures"][cost], trial["difference"]))
    places = {state: [trial for trial in tried if trial["state"] == state] for state in ("trained", "stopped early")}
    front = _front((trial["figures"][cost], trial["difference"]) for trial in places["trained"])
    drawing = Drawing(560, 320)
    (axes,) = drawing.axes
    _join(axes, front)
    entries: dict[str, Any] = {}
    for state, trials in places.items():
        for trial in trials:
            x, y, name = trial["figures"][cost], trial["difference"], label(trial["candidate"])
            named = state == "trained" and (x, y) in front and len(entries) < _BEST
            mark = _point(axes, x, y, len(entries)) if named else _point(axes, x, y, _PLAIN, filled=state == "trained")
            drawing.note(mark, f"{name}, {state}, {trial['tokens']:,} trained on: {x:.4g}, {y:+.4f}")
            entries.setdefault(name if named else state, mark)
    axes.axhline(0, color=DIM, linestyle=":")
    axes.annotate("the unchanged model", (1, 0), (-4, 4), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right")
    _quantities(axes, "parameters added, as a share" if cost == "parameters" else label(cost), "loss less the unchanged model's")
    if entries:
        drawing.legend(entries)
    return drawing


def _costs(rows: Sequence[Mapping[str, Any]]) -> Drawing:
    """Loss against each cost; what no other is below and left of is joined. A loss that would squeeze the others leaves the picture."""
    costs = [cost for cost in _COSTS if sum(row[cost] is not None for row in rows) > 1]
    limits = in_sight([row["judgement"]["mean"] for row in rows])
    drawing = Drawing(**_SIZE, count=len(costs), columns=2, gap=_GAP)
    entries: dict[str, Any] = {}
    for axes, cost in zip(drawing.axes, costs, strict=True):
        named = enumerate(zip(labels(row["name"] for row in rows), rows, strict=True))
        found = [(row[cost], row["judgement"]["mean"], number, name) for number, (name, row) in named if row[cost] is not None]
        _join(axes, _front(sorted((x, y) for x, y, *_ in found)))
        for x, y, number, name in found:
            far = not limits[0] <= y <= limits[1]
            mark = entries[f"{name}: {y:.4g}, out of sight" if far else name] = _point(axes, x, y, number)
            if not far:
                drawing.note(mark, f"{name}: {x:.4f} of the baseline's {_COSTS[cost]}, loss {y:.4f}")
        axes.set_ylim(margins(*limits))
        _quantities(axes, f"{_COSTS[cost]} over the baseline's", "loss on the third split")
    drawing.legend(entries)
    return drawing


def _point(axes: Axes, x: float, y: float, number: int, *, filled: bool = True) -> Any:
    """A mark whose colour and shape are those of a number."""
    colour, shape = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    (mark,) = axes.plot([x], [y], color=colour, linestyle="none", marker=shape, markersize=9, markerfacecolor=colour if filled else PAPER)
    return mark


def _join(axes: Axes, front: Sequence[tuple[float, float]]) -> None:
    """A staircase through the points that have nothing better at their cost."""
    axes.step([x for x, _ in front], [y for _, y in front], where="post", color=DIM, linestyle=":", linewidth=1.5)


def _front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of points in the order of their cost, those that have nothing better at it."""
    best: list[tuple[float, float]] = []
    for x, y in points:
        if not best or y < best[-1][1]:
            best.append((x, y))
    return best
