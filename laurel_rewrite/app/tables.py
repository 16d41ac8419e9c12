"""Tables at any width of the terminal. Of this package nothing else is imported, so that they can be shown where it does not work."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text


def show_table(
    console: Console,
    title: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[str | Text]],
    caption: str = "",
    cut: Collection[str] = (),
) -> None:
    """A table where it fits the width; else of each row two paragraphs: its first cell, and indented the others with their headings.

    Args:
        console: to print on.
        title, caption: above and below.
        headings: of the columns; one that ends in ">" is set to the right.
        rows: cells.
        cut: rows that hold a cell with such a text have their second paragraph cut to one line.
    """
    table = Table(title=Text(title), caption=caption or None, **_STYLE)
    for heading in headings:
        table.add_column(heading.removesuffix(">"), justify="right" if heading.endswith(">") else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    table.caption, measured = None, table.__rich_measure__(console, console.options.update(width=_WIDEST))
    if measured.maximum <= console.width:
        table.caption = caption or None
        console.print(table)
        return
    console.print(Text(f"\n{title}", style="bold"))
    names = ["", *(heading.removesuffix(">").partition("\n")[0] for heading in headings[1:])]
    for first, *others in rows:
        console.print(_line(first))
        cells = [
            Text.assemble((f"{name} ", "dim") if name else "", _line(cell))
            for name, cell in zip(names[1:], others, strict=True)
            if str(cell)
        ]
        if any(str(cell) in cut for cell in others):
            console.print(Padding(Text(" · ", "dim").join(cells), (0, 0, 0, 2)), no_wrap=True, overflow="ellipsis")
        else:
            console.print(Padding(_packed(cells, console.width - 2), (0, 0, 0, 2)))
    if caption:
        console.print(Text(caption, style="italic dim"))
    console.print()


def _packed(cells: Sequence[Text], width: int) -> Text:
    """Cells one behind the other, each whole on a line where it fits one."""
    lines: list[Text] = []
    for cell in cells:
        joined = Text(" · ", "dim").join([lines[-1], cell]) if lines else cell
        lines[-1:] = [joined] if joined.cell_len <= width or not lines else [lines[-1], cell]
    return Text("\n").join(lines)


def _line(cell: str | Text) -> Text:
    """The lines of a cell in one."""
    return Text(" ").join(Text(str(cell), cell.style if isinstance(cell, Text) else "").split("\n"))


_WIDEST = 10_000  # columns, to find out how wide a table would like to be
_STYLE: dict[str, Any] = {"box": box.SIMPLE_HEAD, "title_justify": "left", "title_style": "bold", "caption_justify": "left"}
