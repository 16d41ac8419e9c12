"""The plot of what is inside trained models, over depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from laurel_rewrite.report.drawing import COLOURS, DIM, MARKERS, Drawing, label, labels

_Site = Mapping[str, Any]
_Value = Callable[[_Site], float | None]
_QUANTITIES: dict[str, tuple[_Value, _Value]] = {
    "loss more with the plain sum": (lambda site: (site["plain"] or {}).get("loss"), lambda site: (site["plain"] or {}).get("error")),
    "loss more without the branch": (lambda site: site["without_branch"]["loss"], lambda site: site["without_branch"]["error"]),
    "share of the final state": (lambda site: site["share"], lambda site: None),
    "skip, rms": (lambda site: site["skip"], lambda site: None),
    "branch, rms": (lambda site: site["branch"], lambda site: None),
    "cosine of branch and skip": (lambda site: site["branch_cosine"], lambda site: None),
}
_LEARNED = 8  # scalars and norms, of all that there are
_COLUMNS = 4  # at most
_WIDTH = 190
_SITE = 20  # pixels of a site's height
_NAME = 16  # pixels at least between names
_HEIGHT = 900  # where there are many sites they stand closer
_NOTED = 2000  # marks, each with a note; where there would be more, few are drawn, without
_FEW = 40  # of a line


def depth_profile(found: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Drawing | None:
    """The sites in order, from the top; beside them what was measured, quantity by quantity, a line a model. None where nothing was seen.

    Args:
        found: as reports hold it.
        names: of all that was compared, whose colours are those of their numbers.
    """
    models = {one["name"]: one["inside"]["sites"] for one in found if one["inside"] and one["inside"]["sites"]}
    if not models:
        return None
    order = list(dict.fromkeys(site["site"] for sites in sorted(models.values(), key=lambda sites: -len(sites)) for site in sites))
    learned = list(dict.fromkeys(name for sites in models.values() for site in sites for name in site["learned"]))[:_LEARNED]
    quantities = {**_QUANTITIES, **{f"learned: {name}": (_learned(name), lambda site: None) for name in learned}}
    shown = [one for one, (value, _) in quantities.items() if any(value(site) is not None for sites in models.values() for site in sites)]
    if not shown:
        return None
    columns = -(-len(shown) // -(-len(shown) // _COLUMNS))
    pitch = min(_SITE, _HEIGHT / len(order))
    drawing = Drawing(_WIDTH, max(3 * _SITE, pitch * len(order)), count=len(shown), columns=columns, gap=(48, 76))
    noted = len(shown) * sum(map(len, models.values())) <= _NOTED
    entries: dict[str, Any] = {}
    for place, (axes, quantity) in enumerate(zip(drawing.axes, shown, strict=True)):
        _name_sites(axes, order, named=place % columns == 0, every=math.ceil(_NAME / pitch))
        axes.set_title(label(quantity, 30))
        for shown_as, (name, sites) in zip(labels(models), models.items(), strict=True):
            entries[shown_as] = _draw_model(drawing, axes, shown_as, sites, quantities[quantity], order, names.index(name), noted=noted)
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
    axes.locator_params(axis="x", nbins=3)


def _draw_model(
    drawing: Drawing, axes: Axes, name: str, sites: Sequence[_Site], quantity: tuple[_Value, _Value], order: Sequence[str], number: int, *, noted: bool,
) -> Any:  # fmt: skip
    """The line of a model with bars of two standard errors; returns what a legend shows of it."""
    value, error = quantity
    colour, shape = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    known = [(found, order.index(site["site"]), site) for site in sites if (found := value(site)) is not None]
    across, down = [found for found, *_ in known], [place for _, place, _ in known]
    rooms = [2 * (error(site) or 0.0) for *_, site in known]
    bars = [(end, y) for x, y, room in zip(across, down, rooms, strict=True) if room for end in (x - room, x + room, math.nan)]
    axes.plot([x for x, _ in bars], [y for _, y in bars], color=colour, linewidth=1.2)
    axes.plot(across, down, color=colour, linewidth=1.2)
    every = 1 if noted else math.ceil(len(known) / _FEW) or 1
    (marks,) = axes.plot(across, down, color=colour, linestyle="none", marker=shape, markersize=5, markevery=every)
    if noted and known:
        texts = [f"{name}, {label(site['site'], 60)}: {x:.4f}" for x, _, site in known]
        drawing.note(marks, *(f"{text} ± {room:.4f}" if room else text for text, room in zip(texts, rooms, strict=True)))
    (shown,) = axes.plot([], [], color=colour, linewidth=1.2, marker=shape, markersize=5)
    return shown
