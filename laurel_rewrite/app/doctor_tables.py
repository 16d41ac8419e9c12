"""What the terminal shows of an installation."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from laurel_rewrite import __version__
from laurel_rewrite.app.doctor import Findings, Package
from laurel_rewrite.app.tables import show_table

_WORKS = {True: ("works", "green"), False: ("fails", "bold red"), None: ("unknown", "yellow")}


def show_findings(console: Console, found: Findings) -> None:
    """Versions, the machine, and what works."""
    python = found.python
    show_table(
        console,
        f"laurel-rewrite {__version__}, Python {python.installed}"
        + ("" if python.state == "ok" else f" ({python.state}: {python.wanted})"),
        ("package", "installed", "wanted", "extra", ""),
        [(one.name, one.installed or "-", one.wanted, one.extra, _state(one)) for one in found.packages],
    )
    machine = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    machine.add_column(style="bold", no_wrap=True)
    machine.add_column(overflow="fold")
    for name, text in found.machine.items():
        machine.add_row(name, Text(text))
    console.print(machine)
    console.print()
    for trial in found.trials:
        word, style = _WORKS[trial.works]
        console.print(Text.assemble((f"{word:<8}", style), trial.name, (f"  {trial.seconds:.1f} s", "dim")))
        if not trial.works:
            console.print(Padding(Text(trial.detail), (0, 0, 0, 8)))
    for note in found.notes:
        console.print(Text(note, style="yellow"))


def _state(package: Package) -> Text:
    if package.state == "ok":
        return Text("ok", style="green")
    return Text("missing" if not package.installed else package.state, style="yellow" if package.extra else "bold red")
