"""Every error a user can meet, each with the exit code the command gives it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class LaurelError(Exception):
    """Base of all errors raised on purpose; `exit_code` is the command's exit status."""

    exit_code = 1

    @classmethod
    def section(cls) -> str:
        """Where `docs/troubleshooting.md` says what raises it and how to mend it; a subclass from elsewhere has that of its base here."""
        return next(base.__name__.lower() for base in cls.__mro__ if base.__module__ == __name__)


class VerificationError(LaurelError):
    """The rewritten model does not compute what it must.

    Attributes:
        checks: what was verified until then.
    """

    exit_code = 1
    checks: tuple[Any, ...] = ()


class TooManyTurnsError(LaurelError):
    """A loop of a rewritten model runs more turns than it has LAuReL modules for."""

    exit_code = 2


class LimitError(LaurelError):
    """A limit that the user set on the profile was exceeded; everything was written."""

    exit_code = 1


class ConfigError(LaurelError, ValueError):
    """A request that cannot be meant: an unknown variant, a rank out of range, a selector that matches nothing."""

    exit_code = 2


class RewriteError(LaurelError):
    """A site that this back end cannot rewrite, with the reason. Raised before anything is changed."""

    exit_code = 2


class NoSiteError(LaurelError):
    """The model has no residual connection to rewrite."""

    exit_code = 3


class CaptureError(LaurelError):
    """The model could not be built, called or captured as a graph."""

    exit_code = 4


class ExportError(LaurelError):
    """The model could not be written as ONNX."""

    exit_code = 4


class MissingPackageError(LaurelError):
    """An optional package is needed and absent."""

    exit_code = 5


def missing(package: str, extra: str | None) -> MissingPackageError:
    """The error for an optional package that is absent, with the extra of ours that brings it, where one does."""
    ours = "" if extra is None else f'pip install "laurel-rewrite[{extra}]" or '
    return MissingPackageError(f"This needs {package}: {ours}pip install {package}.")


FOREIGN = (Exception, SystemExit)
"""What other people's code may raise when it is imported, called or unpickled: `sys.exit()` in a model must not end us as a success."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that offers the known names closest to `name`, or all of a short list."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or names[:8]
    return f"Nearest: {', '.join(close)}." if close else "There is none to choose from."


def reason(error: BaseException) -> str:
    """An error in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
