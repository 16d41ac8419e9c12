"""A drawing that a person can check by eye: every site a circle in the colour of its stream, the skip a thick edge, the branch a box.

What lies between sites is drawn as boxes that name its ops. Graphviz lays out (through pygraphviz, which brings it along).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

from laurel_rewrite.detection.site import Site
from laurel_rewrite.detection.sites import Sites
from laurel_rewrite.errors import ConfigError, MissingPackageError
from laurel_rewrite.graph.dataflow import Role, Value

FORMATS = (".svg", ".dot")
_COLOURS = ("#8dd3c7", "#fdb462", "#80b1d3", "#fb8072", "#b3de69", "#bebada", "#fccde5", "#ffed6f")
_SHOWN = 8  # ops of a box that are spelled out
_FONT = "Helvetica,Arial,sans-serif"


def draw(sites: Sites, path: Path, title: str = "") -> None:
    """Write the streams, sites and branches to a file.

    Args:
        sites: from `detect`.
        path: ends in .svg (a picture) or .dot (Graphviz source, for other formats or changes by hand).
        title: heading of the picture.

    Raises:
        ConfigError: the ending is another, or the file cannot be written.
        MissingPackageError: pygraphviz is not installed.
    """
    check_format(path)
    graph = graph_of(sites, title)
    # A drawing that fails leaves no half-written file.
    text = graph.to_string() if path.suffix == ".dot" else graph.draw(format="svg", prog="dot").decode()
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"The drawing {path} cannot be written: {error.strerror}.") from error


def check_format(path: Path) -> None:
    """Raise ConfigError unless the path ends in a known format."""
    if path.suffix not in FORMATS:
        raise ConfigError(f"A drawing ends in {' or '.join(FORMATS)}, not {path.name!r}.")


def graph_of(sites: Sites, title: str = "") -> Any:
    """The drawing as a `pygraphviz.AGraph`: nodes `site:ID`, `box:N` and `end:N`; skip edges have the class "skip"."""
    try:
        import pygraphviz
    except ImportError as error:
        raise MissingPackageError('A drawing needs pygraphviz: pip install "laurel-rewrite[draw]" or pip install pygraphviz.') from error
    graph = pygraphviz.AGraph(directed=True, strict=False, name="laurel_rewrite")
    graph.graph_attr.update(rankdir="TB", fontname=_FONT, label=_text(title), labelloc="t", nodesep="0.35", ranksep="0.3", bgcolor="white")
    graph.node_attr.update(fontname=_FONT, fontsize="11")
    graph.edge_attr.update(color="#555555", arrowsize="0.6")
    _Picture(sites, graph).paint()
    return graph


class _Picture:
    """Contracts the dataflow: sites, the values where skip and branch part, inputs and outputs stay, the rest becomes boxes."""

    def __init__(self, sites: Sites, graph: Any) -> None:
        self.sites = sites
        self.flow = sites.flow
        self.graph = graph
        self.nodes: dict[int, str] = {}  # value -> node of the drawing
        self.boxes = 0

    def paint(self) -> None:
        for site in self.sites:
            self._site(site)
        residuals = [binding.residual for binding in self.sites.bindings.values()]
        inputs = [v for v in self.flow.values if v.data and not v.inputs]
        for value in inputs:
            self.nodes[value.index] = self._node(f"end:{value.name}", f"{value.name}\n{_shape(value)}", shape="ellipse")
        # A value where skip and branch part is the end of the box that computes it.
        sources = sorted({r.source for r in residuals} - set(self.nodes))
        for index in sources:
            self.nodes[index] = f"box:{self.boxes}"
            self.boxes += 1
        # Where a stream goes on through an activation or a norm, the edge into that box is the stream, too.
        carried = {r.source for site, r in zip(self.sites, residuals, strict=True) if site.index and r.kind == "identity"}
        for index in sources:
            self._box(self.nodes[index], *self._segment(self.flow.values[index].inputs, index), skip=index in carried)
        for site, residual in zip(self.sites, residuals, strict=True):
            end = f"site:{site.id}"
            self._connect([residual.skip], end, skip=True)
            for branch in residual.branches:
                self._connect([branch], end)
        outputs = [i for i in sorted(self.flow.outputs) if self.flow.values[i].data]
        if outputs:
            self._connect(outputs, self._node("end:outputs", "outputs", shape="ellipse"))

    def _site(self, site: Site) -> None:
        size = f"D {site.dim}" if site.dim is not None else "D unknown"
        label = f"+ {site.id}\n{site.kind}, {'x'.join(map(str, site.shape))}\nstream {site.stream}:{site.index}, axis {site.axis}, {size}"
        residual = self.sites.bindings[site.id].residual
        self.nodes[residual.output] = self._node(
            f"site:{site.id}", label, shape="box", style="rounded,filled", fillcolor=_COLOURS[site.stream % len(_COLOURS)],
            penwidth="1.5", tooltip=_text(site.where),
        )  # fmt: skip

    def _node(self, name: str, label: str, **attributes: str) -> str:
        self.graph.add_node(name, label=_text(label), **attributes)
        return name

    def _segment(self, ends: Iterable[int], last: int | None = None) -> tuple[list[Value], list[int]]:
        """The values from the nodes of the drawing down to `ends`, in order, and the values of these nodes."""
        inside: set[int] = set() if last is None else {last}
        starts: set[int] = set()
        stack = [end for end in ends if self.flow.values[end].data]
        while stack:
            index = stack.pop()
            if index in self.nodes:
                starts.add(index)
            elif index not in inside:
                inside.add(index)
                stack.extend(i for i in self.flow.values[index].inputs if self.flow.values[i].data)
        return [self.flow.values[i] for i in sorted(inside)], sorted(starts)

    def _connect(self, ends: list[int], node: str, *, skip: bool = False) -> None:
        inside, starts = self._segment(ends)
        if any(value.role is not Role.TRANSPARENT for value in inside):
            box = f"box:{self.boxes}"
            self.boxes += 1
            self._box(box, inside, starts, skip=skip)
            self._edge(box, node, skip=skip)
        else:
            for start in starts:
                self._edge(self.nodes[start], node, skip=skip)

    def _box(self, name: str, inside: list[Value], starts: list[int], *, skip: bool = False) -> None:
        self._node(name, _summary(inside), shape="box", style="filled", fillcolor="#f4f4f4", color="#999999", fontsize="10",
                   tooltip=_text(inside[-1].where or inside[-1].name))  # fmt: skip
        for start in starts:
            self._edge(self.nodes[start], name, skip=skip)

    def _edge(self, start: str, end: str, *, skip: bool) -> None:
        style = {"penwidth": "3", "color": "#222222", "class": "skip", "weight": "10"} if skip else {}
        self.graph.add_edge(start, end, **style)


def _summary(values: list[Value]) -> str:
    """The module that the ops have in common, and the ops that matter, runs collapsed."""
    shown = [value for value in values if value.role in (Role.MIXING, Role.POINTWISE, Role.SUM)]
    # A view or a dropout at the border belongs to the module before or around.
    owners = [value.owner.split(".") for value in shown or values if value.owner]
    shared = takewhile(lambda names: len(set(names)) == 1, zip(*owners, strict=False))
    module = ".".join(names[0] for names in shared)
    ops = list(_runs(value.op for value in shown))
    if len(ops) > _SHOWN:
        ops = [*ops[: _SHOWN - 1], f"{len(ops) - _SHOWN} more", ops[-1]]
    lines = [" · ".join(ops[i : i + 4]) for i in range(0, len(ops), 4)]
    return "\n".join(([module] if module else []) + (lines or [values[-1].op]))


def _runs(ops: Iterable[str]) -> Iterator[str]:
    for op, run in groupby(ops):
        count = len(list(run))
        yield op if count == 1 else f"{op}\u00d7{count}"


def _shape(value: Value) -> str:
    return "x".join(map(str, value.shape)) if value.shape is not None else "?"


def _text(text: str) -> str:
    """Text that Graphviz shows as it is: it knows escapes, entities and, in angle brackets, HTML."""
    safe = text.replace("\\", "\\\\").replace("&", "&amp;")
    return f" {safe}" if safe.startswith("<") else safe
