"""Drawings of a report: figures of Matplotlib, which become SVG in the font and the colours of the page around them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

import matplotlib.style
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from laurel_rewrite.report.words import shortened

COLOURS = (
    "#3d7fc1", "#d9455a", "#2e8b3e", "#a07d00", "#9b59b6", "#2a9485", "#d4663a", "#b5446e", "#808890", "#8a8a2e", "#8070c0", "#a8703a",
)  # fmt: skip
"""Of series: each stands out three to one from white paper and from the dark one."""
MARKERS = "osD^vPX"
INK, DIM, LINE, PAPER = "#010203", "#040506", "#070809", "#0a0b0c"
_OF_THE_PAGE = {INK: "currentColor", DIM: "var(--dim)", LINE: "var(--line)", PAPER: "var(--paper)"}
_HEARD = 24  # notes that a description has
_SIZE = 13  # of text, in pixels of the page
_LETTER = 0.56 * _SIZE
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "laurel-rewrite", "text.parse_math": False, "font.size": _SIZE, "text.color": INK, "axes.labelcolor": INK,
    "axes.titlesize": _SIZE, "axes.titlelocation": "left", "axes.labelsize": _SIZE, "xtick.labelsize": _SIZE - 1, "ytick.labelsize": _SIZE,
    "xtick.color": DIM, "xtick.labelcolor": INK, "ytick.color": DIM, "ytick.labelcolor": INK, "xtick.major.size": 0, "ytick.major.size": 0, "ytick.major.pad": 7, "xaxis.labellocation": "left",
    "axes.grid": True, "axes.axisbelow": True, "axes.edgecolor": LINE, "grid.color": LINE, "axes.spines.right": False, "axes.spines.top": False,
    "axes.formatter.useoffset": False, "axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none", "legend.frameon": False,
    "legend.borderaxespad": 0, "legend.borderpad": 0,
}  # fmt: skip


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's own defaults and ours, whatever is set outside; also a decorator."""
    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # in the font that measures; the browser has others
        yield


def label(text: object, length: int = 44) -> str:
    """A name as a drawing has it: on one line, of characters that can be seen."""
    seen = "".join(letter if letter.isprintable() else " " for letter in shortened(text, length))
    return seen.strip() or "(none)"


def labels(names: Iterable[object]) -> list[str]:
    """Of several names, each told from the others: what looks the same is numbered."""
    found = [*map(label, names)]
    return [one if found.count(one) == 1 else f"{one} ({number})" for number, one in enumerate(found, 1)]


class Drawing:
    """Axes of a fixed size in pixels, from the top; names around them take the room that they need."""

    def __init__(self, width: float, height: float, *, count: int = 1, columns: int = 1, gap: tuple[float, float] = (0, 0)) -> None:
        """
        Args:
            count: of axes.
            columns: in which they stand, row by row.
            gap: between columns, and between rows.
        """
        columns = min(columns, count)
        rows = -(-count // columns)
        whole = columns * width + (columns - 1) * gap[0], rows * height + (rows - 1) * gap[1]
        self.figure = Figure(figsize=(whole[0] / 72, whole[1] / 72), dpi=72)
        self.axes: list[Axes] = []
        for number in range(count):
            row, column = divmod(number, columns)
            left, top = column * (width + gap[0]), row * (height + gap[1])
            self.axes.append(self.figure.add_axes((left / whole[0], 1 - (top + height) / whole[1], width / whole[0], height / whole[1])))
        self._width, self._height = whole
        self._notes: list[Sequence[str]] = []

    def note(self, artist: Artist, *texts: str) -> None:
        """What is said where somebody points at an artist, or at each mark of a line."""
        artist.set_gid(f"note-{len(self._notes)}")
        self._notes.append(texts)

    def legend(self, entries: Mapping[str, Any], *, above: float = 8) -> None:
        """Above the axes, in as many columns as there is room for.

        Args:
            entries: artists by their names.
            above: pixels between it and the axes.
        """
        columns = int(self._width // (max(map(len, entries)) * _LETTER + 44)) or 1
        self.figure.legend(
            [*entries.values()],
            [*entries],
            loc="lower left",
            bbox_to_anchor=(0, 1 + above / self._height),
            ncols=min(columns, len(entries)),
        )

    @style()
    def svg(self, name: str, title: str) -> Markup:
        """The element `<svg>`.

        Args:
            name: with which its ids begin.
            title: which says what is to be seen.
        """
        file = io.StringIO()
        self.figure.savefig(file, format="svg", bbox_inches="tight", pad_inches=14 / 72, metadata={"Date": None})
        root = ElementTree.fromstring(file.getvalue())
        for parent in root.iter():
            for child in [child for child in parent if _local(child.tag) in ("metadata", "style")]:
                parent.remove(child)
        for element in root.iter():
            _in_the_page(element)
        _say(root, self._notes)
        _own_ids(root, name)
        width, height = (f"{float(size):.0f}" for size in root.attrib["viewBox"].split()[2:])
        _head(root, name, title, [text for texts in self._notes for text in texts])
        root.attrib |= {"width": width, "height": height, "stroke-linejoin": "round", "role": "img"}
        return Markup(ElementTree.tostring(root, encoding="unicode"))  # escaped: a writer of XML made it


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _in_the_page(element: ElementTree.Element) -> None:
    """Without namespaces, in the page's colours and font, and coordinates to the tenth of a pixel."""
    element.tag = _local(element.tag)
    given = {_local(name): value for name, value in element.attrib.items()}
    element.attrib.clear()
    element.attrib |= given
    if element.text and not element.text.strip():
        element.text = None
    element.tail = None
    if "style" in given:
        pairs = [pair.partition(": ") for pair in given["style"].split("; ")]
        element.set("style", ";".join(f"{name}:{_OF_THE_PAGE.get(value, value)}" for name, _, value in pairs if name != "font-family"))
    for name in {"d", "x", "y"} & given.keys():
        element.set(name, " ".join(map(_rounded, given[name].split())))
    if given.get("transform", "").startswith("rotate(-0 "):
        del element.attrib["transform"]


def _rounded(word: str) -> str:
    return word if word.isalpha() else f"{float(word):.1f}".removesuffix(".0")


def _say(root: ElementTree.Element, notes: Sequence[Sequence[str]]) -> None:
    """Puts notes where they belong: at the whole artist, or at each of its marks."""
    places = {element.get("id"): element for element in root.iter("g")}
    for number, texts in enumerate(notes):
        place = places[f"note-{number}"]
        marks = [place] if len(texts) == 1 else [*place.iter("use")]
        for mark, text in zip(marks, texts, strict=True):
            title = ElementTree.Element("title")
            title.text = text
            mark.insert(0, title)


def _own_ids(root: ElementTree.Element, name: str) -> None:
    """Ids that something refers to, beginning with a name; the others go."""
    referring = [(element, key, *value.partition("#")) for element in root.iter() for key, value in element.items() if "#" in value and key in ("href", "clip-path")]  # fmt: skip
    used = {after.removesuffix(")") for *_, after in referring}
    for element, key, before, sign, after in referring:
        element.set(key, f"{before}{sign}{name}-{after}")
    for element in root.iter():
        own = element.attrib.pop("id", None)
        if own in used:
            element.set("id", f"{name}-{own}")


def _head(root: ElementTree.Element, name: str, title: str, notes: Sequence[str]) -> None:
    """A title, and what the marks say, for those who hear the page."""
    said = {"title": title, **({"desc": "; ".join(notes[:_HEARD])} if notes else {})}
    for place, (tag, text) in enumerate(said.items()):
        element = ElementTree.Element(tag, id=f"{name}-{tag}")
        element.text = text
        root.insert(place, element)
    root.set("aria-labelledby", " ".join(f"{name}-{tag}" for tag in said))
