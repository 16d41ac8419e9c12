"""What a long job tells of its stages; who listens, shows it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Stage(Protocol):
    """A stage that is running."""

    def done(self, text: str) -> None:
        """What came of it, at its end."""

    def progress(self, fraction: float, text: str = "") -> None:
        """How much of it is done, and how it stands."""


class _Silent:
    def done(self, text: str) -> None:
        pass

    def progress(self, fraction: float, text: str = "") -> None:
        pass


Listener = Callable[[str], AbstractContextManager[Stage]]
"""Called with the name of a stage."""


def silent(name: str) -> AbstractContextManager[Stage]:
    """A listener that shows nothing."""
    return nullcontext(_Silent())
