"""The engines that people train in: what each needs to be a home for rewritten models, a file each.

Nothing else of this package imports these, and each imports its engine only when it is used.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from laurel_rewrite.errors import missing


def required(module: str, extra: str) -> Any:
    """A module of an optional package.

    Raises:
        MissingPackageError: the package, which this extra brings, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise missing(error.name or module, extra) from error


def log_names(learned: Mapping[str, Mapping[str, float]], prefix: str = "laurel") -> dict[str, float]:
    """What `laurel_rewrite.learned` gives, under one name each for a log: `laurel/model.layers.0.laurel_0/a`."""
    return {f"{prefix}/{site}/{name}": value for site, values in learned.items() for name, value in values.items()}
