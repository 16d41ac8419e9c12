"""Stages while they run: a bar on a terminal, and lines in a log."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from laurel_rewrite.stages import Stage

EVERY = 15.0
"""Seconds after which a log hears of a stage that is still running."""


class Stages:
    """Shows the stages as they run: on a terminal with a bar, elsewhere in a line when one is done, and now and then before that."""

    def __init__(self, console: Console, *, quiet: bool) -> None:
        self.console, self.quiet = console, quiet

    @contextmanager
    def __call__(self, name: str) -> Iterator[Stage]:
        if self.quiet:
            yield _Log(self.console, name)
            return
        with self._bar(name) if self.console.is_terminal else self._lines(name) as stage:
            yield stage

    @contextmanager
    def _bar(self, name: str) -> Iterator[Stage]:
        begin = time.perf_counter()
        bar = Progress(
            SpinnerColumn(), TextColumn(f"{name:<18}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"),
            console=self.console, transient=True,
        )  # fmt: skip
        with bar:
            stage = _Shown(bar)
            yield stage
        mark = (" ✗ ", "bold red") if stage.text.startswith("FAILED") else (" ✓ ", "green")
        self.console.print(Text.assemble(mark, f"{name:<18}", stage.text, (f"  {time.perf_counter() - begin:.1f} s", "dim")))

    @contextmanager
    def _lines(self, name: str) -> Iterator[Stage]:
        log, ended = _Log(self.console, name), threading.Event()

        def report() -> None:
            while not ended.wait(EVERY):
                log.say(f"running{log.state}")

        watch = threading.Thread(target=report, daemon=True)
        watch.start()
        try:
            yield log
        finally:
            ended.set()
            watch.join()
        log.say(log.text or "done")


class _Shown:
    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.task = bar.add_task("", total=None)
        self.text = ""

    def done(self, text: str) -> None:
        self.text = text

    def progress(self, fraction: float, text: str = "") -> None:
        self.bar.update(self.task, total=1.0, completed=fraction, description=escape(text))


class _Log:
    """A stage whose lines go to a log; `state` is how it stands."""

    def __init__(self, console: Console, name: str) -> None:
        self.console, self.name, self.begin = console, name, time.perf_counter()
        self.text = self.state = ""

    def done(self, text: str) -> None:
        self.text = text

    def progress(self, fraction: float, text: str = "") -> None:
        self.state = f", {fraction:.0%}" + (f": {text}" if text else "")

    def say(self, text: str) -> None:
        """A line with the seconds since the stage began; whoever reads the log no more must not stop the work."""
        with contextlib.suppress(OSError, ValueError):
            print(f"{self.name}: {text} ({time.perf_counter() - self.begin:.1f} s)", file=self.console.file, flush=True)
