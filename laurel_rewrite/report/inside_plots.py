"""The plot of what is inside trained models, over depth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from laurel_rewrite.report.drawing import COLOURS, DIM, MARKERS, Drawing, label

_Site = Mapping[str, Any]
_Value = Callable[[_Site], float | None]
_QUANTITIES: dict[str, tuple[_Value, _Value]] = {
    "loss more, plain sum": (lambda site: (site["plain"] or {}).get("loss"), lambda site: (site["plain"] or {}).get("error")),
    "loss more, no branch": (lambda site: site["without_branch"]["loss"], lambda site: site["without_branch"]["error"]),
    "share of the final state": (lambda site: site["share"], lambda site: None),
    "skip, rms": (lambda site: site["skip"], lambda site: None),
    "branch, rms": (lambda site: site["branch"], lambda site: None),
    "cosine of branch and skip": (lambda site: site["branch_cosine"], lambda site: None),
}
_LEARNED = 8  # scalars and norms, of all that there are
_COLUMNS = 4
_WIDTH = 200
_SITE = 20  # pixels of a site's height, and at least that much between their names
_HEIGHT = 900  # where there are many sites they stand closer
_NOTED = 2000  # marks that have notes


def depth_profile(found: Sequence[Mapping[str, Any]]) -> Drawing | None:
    """The sites in order, from the top; beside them what was measured, quantity by quantity, a line a model. None where nothing was seen.

    Args:
        found: as reports hold it.
    """
    models = {one["name"]: one["inside"]["sites"] for one in found if one["inside"] and one["inside"]["sites"]}
    if not models:
        return None
    order = list(dict.fromkeys(site["site"] for sites in sorted(models.values(), key=lambda sites: -len(sites)) for site in sites))
    names = list(dict.fromkeys(name for sites in models.values() for site in sites for name in site["learned"]))[:_LEARNED]
    quantities = {**_QUANTITIES, **{f"learned: {name}": (_learned(name), lambda site: None) for name in names}}
    shown = [one for one, (value, _) in quantities.items() if any(value(site) is not None for sites in models.values() for site in sites)]
    pitch = min(_SITE, _HEIGHT / len(order))
    drawing = Drawing(_WIDTH, max(3 * _SITE, pitch * len(order)), count=len(shown), columns=_COLUMNS, gap=(24, 76))
    noted = len(shown) * sum(map(len, models.values())) <= _NOTED
    entries: dict[str, Any] = {}
    for place, (axes, quantity) in enumerate(zip(drawing.axes, shown, strict=True)):
        _name_sites(axes, order, named=place % _COLUMNS == 0, every=-(-_SITE // int(pitch or 1)))
        axes.set_title(label(quantity, 30))
        for number, (name, sites) in enumerate(models.items()):
            entries[label(name)] = _draw_model(drawing, axes, label(name), sites, quantities[quantity], order, number, noted=noted)
        low, high = axes.get_xlim()
        if low < 0 < high:
            axes.axvline(0, color=DIM, linestyle=":", linewidth=1)
    drawing.legend(entries, above=30)
    return drawing


def _learned(name: str) -> _Value:
    return lambda site: site["learned"].get(name)


def _name_sites(axes: Axes, order: Sequence[str], *, named: bool, every: int) -> None:
    """Sites down the axis, and their ids in the first column."""
    places = range(0, len(order), every)
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.set_yticks(places, [label(order[place]) for place in places] if named else [""] * len(places))
    axes.locator_params(axis="x", nbins=4)


def _draw_model(
    drawing: Drawing, axes: Axes, name: str, sites: Sequence[_Site], quantity: tuple[_Value, _Value], order: Sequence[str], number: int, *, noted: bool,
) -> Any:  # fmt: skip
    """The line of a model with bars of two standard errors; returns what a legend shows of it."""
    value, error = quantity
    colour, shape = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    placed = [(value(site), order.index(site["site"]), 2 * (error(site) or 0.0), label(site["site"], 60)) for site in sites]
    known = [(x, *others) for x, *others in placed if x is not None]
    for x, y, room, _ in known:
        if room:
            axes.plot([x - room, x + room], [y, y], color=colour, linewidth=1.2)
    axes.plot([x for x, *_ in known], [y for _, y, *_ in known], color=colour, linewidth=1.2)
    (marks,) = axes.plot([x for x, *_ in known], [y for _, y, *_ in known], color=colour, linestyle="none", marker=shape, markersize=5)
    if noted and known:
        drawing.note(marks, *(f"{name}, {site}: {x:.4f}" + (f" ± {room:.4f}" if room else "") for x, _, room, site in known))
    (shown,) = axes.plot([], [], color=colour, linewidth=1.2, marker=shape, markersize=5)
    return shown
