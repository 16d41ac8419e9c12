"""The plots of the report. What stands in rows has its names on the left and its figures written behind it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from laurel_rewrite.report.drawing import COLOURS, DIM, MARKERS, PAPER, Drawing, label, labels, style
from laurel_rewrite.report.words import places, settings

_SHOWN_OPS = 12
_SHOWN_SITES = 100
_SHOWN_MODULES = 32
_DEPTH = 5  # of modules
_REACH = 4  # interquartile ranges that a plot of runs shows beyond the quartiles
_FAR = 20  # median deviations beyond which a value would squeeze the others
_WIDTH = 620
_BAR = 18  # pixels of a row's height, for each of what stands in it
_BETWEEN = 12  # rows

Interval = tuple[float, float, float]
"""The middle, and both ends."""


@style()
def figures(data: Mapping[str, Any]) -> dict[str, Drawing]:
    """Plots by the name of their place on the page; those there is nothing for are left out."""
    found: dict[str, Drawing] = {}
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


def in_sight(values: Sequence[float]) -> tuple[float, float]:
    """The lowest and the highest of the values that are not so far off that nothing could be told of the others."""
    middle = statistics.median(values)
    reach = _FAR * statistics.median(abs(value - middle) for value in values)
    near = [value for value in values if not reach or abs(value - middle) <= reach]
    return min(near), max(near)


def margins(low: float, high: float, share: float = 0.06) -> tuple[float, float]:
    """Limits of an axis with room at its ends."""
    room = share * (high - low) or share * abs(high) or 1.0
    return low - room, high + room


def _rows(names: Sequence[str], *, each: int = 1) -> Drawing:
    """Axes with a row for each name, from the top, in which so many things have room."""
    count = max(len(names), 1)
    drawing = Drawing(_WIDTH, (_BAR * each + _BETWEEN) * count)
    (axes,) = drawing.axes
    axes.set_ylim(count - 0.5, -0.5)
    axes.set_yticks(range(len(names)), names)
    axes.grid(visible=False, axis="y")
    return drawing


def _names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return labels(row["name"] for row in rows)


def _offset(number: int, each: int) -> float:
    """Where one of several things stands in its row."""
    return (number - (each - 1) / 2) * _BAR / (_BAR * each + _BETWEEN)


def intervals(names: Sequence[str], series: Mapping[str, Sequence[Interval | None]], line: float, title: str, form: str) -> Drawing:
    """In each row a mark with its interval for every series, around a line at what means no difference. An interval that would squeeze the others leaves
    the picture; its figures stand behind it all the same."""
    drawing = _rows(names, each=len(series))
    (axes,) = drawing.axes
    known = [(number, row, *found) for number, one in enumerate(series.values()) for row, found in enumerate(one) if found]
    if known:
        ends = [end for _, _, _, *both in known for end in both]
        low, high = in_sight([end - line for end in ends])
        axes.set_xlim(margins(min(line, line + low), max(line, line + high)))
    entries = {}
    for number, row, middle, low, high in known:
        place, colour = row + _offset(number, len(series)), COLOURS[number % len(COLOURS)]
        axes.plot([low, high], [place, place], color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot([low, high], [place, place], color=colour, linestyle="none", marker="|", markersize=9, markeredgewidth=2)
        (mark,) = axes.plot([middle], [place], color=colour, linestyle="none", marker=MARKERS[number % len(MARKERS)], markersize=8)
        text = f"{middle:{form}} [{low:{form}}, {high:{form}}]"
        _behind(drawing, place, text)
        drawing.note(mark, f"{names[row]}: {text}")
        entries[[*series][number]] = mark
    axes.axvline(line, color=DIM, linestyle=":")
    axes.set_xlabel(title)
    if len(series) > 1 and entries:
        drawing.legend(entries)
    return drawing


def _behind(drawing: Drawing, place: float, text: str) -> None:
    """Figures in a column to the right of the axes."""
    axes = drawing.axes[0]
    axes.annotate(
        text, (1, place), (10, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center", annotation_clip=False
    )


def bars(
    names: Sequence[str], series: Mapping[str, Sequence[float | None]], form: Callable[[float], str], title: str, notes: Mapping[tuple[str, int], str] | None = None,
) -> Drawing:  # fmt: skip
    """In each row a bar for every series, with its figure behind it.

    Args:
        notes: by series and row, what else is to be said of a bar.
    """
    drawing = _rows(names, each=len(series))
    (axes,) = drawing.axes
    entries: dict[str, Any] = {}
    for number, (name, values) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        entries[name] = Rectangle((0, 0), 1, 1, color=colour)
        for row, value in enumerate(values):
            if value is not None:
                place = row + _offset(number, len(series))
                (bar,) = axes.barh([place], [value], _BAR * 0.8 / (_BAR * len(series) + _BETWEEN), color=colour)
                _at_end(drawing, value, place, form(value))
                if notes and (name, row) in notes:
                    drawing.note(bar, notes[name, row])
    axes.axvline(0, color=DIM, linewidth=1)
    axes.set_xlabel(title)
    if len(series) > 1:
        drawing.legend(entries)
    return drawing


def _at_end(drawing: Drawing, value: float, place: float, text: str) -> None:
    """Figures behind the end of a bar, or behind nought for one that goes to the left."""
    drawing.axes[0].annotate(text, (max(value, 0), place), (5, 0), textcoords="offset points", va="center", annotation_clip=False)


def _ratios(rows: Sequence[Mapping[str, Any]], measured: Sequence[str]) -> Drawing:
    series = {place: [_interval(row["latencies"][number]) for row in rows[1:]] for number, place in enumerate(labels(measured))}
    return intervals(_names(rows[1:]), series, 1.0, "latency over the baseline's, with its 95 % interval", ".3f")


def _interval(time: Mapping[str, Any]) -> Interval:
    return time["ratio"], time["low"], time["high"]


def _training(rows: Sequence[Mapping[str, Any]]) -> Drawing:
    """As ratios, a series a mode."""
    others = [row for row in rows if row["step"]["verdict"] != "baseline"]
    found = {(row["mode"], row["name"]): _interval(row["step"]) for row in others}
    modes, names = ([*dict.fromkeys(row[key] for row in others)] for key in ("mode", "name"))
    series = {label(mode): [found.get((mode, name)) for name in names] for mode in modes}
    return intervals([*map(label, names)], series, 1.0, "time of a training step over the baseline's, with its 95 % interval", ".3f")


def _runs(rows: Sequence[Mapping[str, Any]]) -> Drawing:
    """A box a model: quartiles, whiskers to the last run within one and a half of their distance, and the runs beyond. How many runs are too far off to be
    shown is said behind."""
    drawing = _rows(_names(rows))
    (axes,) = drawing.axes
    boxes = [_Box(row["latencies"][0]["runs_ms"]) for row in rows]
    low, high = margins(min(box.first for box in boxes), max(box.last for box in boxes), 0.03)
    axes.set_xlim(low, high)
    for place, box in enumerate(boxes):
        colour = COLOURS[place % len(COLOURS)]
        axes.plot(box.whiskers, [place, place], color=colour, linewidth=1.5)
        axes.plot(box.whiskers, [place, place], color=colour, linestyle="none", marker="|", markersize=9, markeredgewidth=1.5)
        (bar,) = axes.barh(
            [place], [box.upper - box.lower], 0.5, left=[box.lower], facecolor=PAPER, edgecolor=colour, linewidth=2, zorder=3
        )
        drawing.note(bar, f"{label(rows[place]['name'])}: median {box.median:.3f} ms, quartiles {box.lower:.3f} and {box.upper:.3f} ms")
        axes.plot([box.median, box.median], [place - 0.25, place + 0.25], color=colour, linewidth=2.5, solid_capstyle="butt", zorder=4)
        shown = [run for run in box.outliers if low <= run <= high]
        axes.plot(shown, [place] * len(shown), color=colour, linestyle="none", marker="o", markersize=3.5, markerfacecolor="none")
        beyond = [run for run in box.outliers if not low <= run <= high]
        if beyond:
            _behind(drawing, place, f"{len(beyond)} beyond, to {max(beyond):.4g} ms")
    axes.set_xlabel("milliseconds a run")
    return drawing


class _Box:
    """Of runs: quartiles, whiskers, outliers, and from where to where a plot shows them."""

    def __init__(self, runs: Sequence[float]) -> None:
        self.lower, self.median, self.upper = statistics.quantiles(runs, n=4, method="inclusive") if len(runs) > 1 else [runs[0]] * 3
        spread = self.upper - self.lower
        inside = [run for run in runs if self.lower - 1.5 * spread <= run <= self.upper + 1.5 * spread]
        self.whiskers = min(inside), max(inside)
        self.outliers = [run for run in runs if not self.whiskers[0] <= run <= self.whiskers[1]]
        self.first, self.last = max(min(runs), self.lower - _REACH * spread), min(max(runs), self.upper + _REACH * spread)


def _ops(rows: Sequence[Mapping[str, Any]]) -> Drawing:
    """A row an op, a bar a model; those that take least together."""
    totals: dict[str, float] = {}
    for row in rows:
        for op, ms in row["time"]["by_op"].items():
            totals[op] = totals.get(op, 0.0) + ms
    order = sorted(totals, key=lambda op: -totals[op])
    shown, rest = order[:_SHOWN_OPS], order[_SHOWN_OPS:]
    names = [*map(label, shown), *([f"{len(rest)} others"] if rest else [])]
    series = {}
    for name, row in zip(_names(rows), rows, strict=True):
        times = row["time"]["by_op"]
        series[name] = [*map(times.get, shown), *([sum(times.get(op, 0.0) for op in rest)] if rest else [])]
    return bars(names, series, "{:.3f}".format, "milliseconds, from profiled runs, scaled to the median latency")


def _memory(rows: Sequence[Mapping[str, Any]]) -> Drawing:
    kinds = {
        "activations: peak of the arena, weights aside": "activation_bytes",
        "values alive: peak, from the graph": "live_bytes",
    }
    series = {name: [row["memories"][0][key] / (1 << 20) for row in rows] for name, key in kinds.items()}
    return bars(_names(rows), series, "{:.2f}".format, "MiB")


def _sites(rows: Sequence[Mapping[str, Any]]) -> Drawing:
    """A row a site, a bar a model; of very many sites those that take most."""
    found = {(number, site["site"]): site for number, row in enumerate(rows) for site in row["time"]["sites"]}
    ids = list(dict.fromkeys(site for _, site in found))
    costly = (
        sorted(ids, key=lambda site: -max(found[key]["ms"] for key in found if key[1] == site))[:_SHOWN_SITES]
        if len(ids) > _SHOWN_SITES
        else ids
    )
    shown = [site for site in ids if site in set(costly)]
    series, notes = {}, {}
    for number, name in enumerate(_names(rows)):
        series[name] = [found[number, site]["ms"] if (number, site) in found else None for site in shown]
        for place, site in enumerate(shown):
            if (number, site) in found:
                one = found[number, site]
                notes[name, place] = (
                    f"{label(site, 80)}: {one['ms']:.4f} ms, {one['nodes']} ops of its own, sum absorbed into {label(one['into'] or 'nothing', 60)}"
                )
    few = "" if len(shown) == len(ids) else f", the {len(shown)} of {len(ids)} sites that take most"
    return bars([*map(label, shown)], series, "{:.4f}".format, f"ms more than the baseline{few}", notes)


def _modules(row: Mapping[str, Any]) -> Drawing:
    """Times by module path, what is inside a module under it; those that take most, a colour a depth."""
    totals: dict[str, float] = {}
    for path, ms in row["time"]["by_module"].items():
        parts = str(path).split(".") if path else [""]
        for depth in range(1, min(len(parts), _DEPTH) + 1):
            key = ".".join(parts[:depth])
            totals[key] = totals.get(key, 0.0) + ms
    most = set(sorted(totals, key=lambda path: -totals[path])[:_SHOWN_MODULES])
    shown = sorted(most, key=[*_as_tree(totals)].index)
    whole = sum(row["time"]["by_module"].values())
    drawing = _rows([label(path) if path else "in no module" for path in shown])
    (axes,) = drawing.axes
    for place, path in enumerate(shown):
        colour = COLOURS[path.count(".") % len(COLOURS)]
        axes.barh([place], [totals[path]], 0.5, color=colour)
        _at_end(drawing, totals[path], place, f"{totals[path]:.3f} ms, {100 * totals[path] / (whole or 1):.1f} %")
    few = "" if len(shown) == len(totals) else f"; the {len(shown)} of {len(totals)} modules that take most"
    axes.set_xlabel(f"milliseconds in {label(row['name'])}, {whole:.3f} in all{few}")
    return drawing


def _as_tree(paths: Mapping[str, Any]) -> list[str]:
    """Paths in their order, each followed by what is inside it."""
    children: dict[str, list[str]] = {}
    for path in paths:
        children.setdefault(path.rpartition(".")[0] if path else "", []).append(path)

    def walk(path: str) -> list[str]:
        return [path, *(one for child in children.get(path, []) for one in walk(child))]

    return [one for top in children.get("", []) for one in (walk(top) if top else [top])]


def _streams(data: Mapping[str, Any]) -> Drawing:
    """A line a stream, a mark a site; filled where LAuReL was put in."""
    planned = {site["id"]: site for site in data["plan"]["sites"]}
    streams: dict[int, list[Mapping[str, Any]]] = {}
    for site in data["sites"]:
        streams.setdefault(site["stream"], []).append(site)
    drawing = _rows([f"stream {number}: D {sites[0]['dim'] or '?'}" for number, sites in streams.items()])
    (axes,) = drawing.axes
    size = max(3.0, min(11.0, 0.6 * _WIDTH / (1 + max(site["index"] for site in data["sites"]))))
    for row, sites in enumerate(streams.values()):
        colour = COLOURS[row % len(COLOURS)]
        axes.plot([site["index"] for site in sites], [row] * len(sites), color=colour, linewidth=1.5)
        for site in sites:
            plan = planned.get(site["id"])
            (mark,) = axes.plot(
                [site["index"]],
                [row],
                color=colour,
                marker="o",
                markersize=size,
                markerfacecolor=colour if plan else PAPER,
                markeredgewidth=2,
            )
            treated = ", ".join(filter(None, (plan["variant"], settings(plan)))) if plan else "left as it is"
            drawing.note(mark, f"{label(site['id'], 80)}: {label(site['kind'])}, {'x'.join(map(str, site['shape']))}, {treated}")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.set_xlabel("position of the residual connection in its stream")
    return drawing
