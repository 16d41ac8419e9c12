"""What a searched candidate may cost: `latency_ratio <= 1.02`, `parameters <= 1%`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from laurel_rewrite.errors import ConfigError, nearest
from laurel_rewrite.lab.serving import Served
from laurel_rewrite.profiling.limits import NAMES, VERDICT

PARAMETERS = "parameters"
"""Those added, over the unchanged model's: the one figure that needs no graph."""
_JUDGED_BY = {"latency_ratio": "latency_high"}
_FORM = re.compile(r"\s*(\w+)\s*<=?\s*(-?\d+(?:\.\d+)?(?:e-?\d+)?)\s*(%?)\s*")


@dataclass(frozen=True)
class Budget:
    """One limit.

    Attributes:
        text: as it was given.
        name: of the figure, as a limit of a profile names it, or "parameters".
        limit: what it may be at most.
    """

    text: str
    name: str
    limit: float

    @staticmethod
    def parse(text: str) -> Budget:
        """Read one.

        Raises:
            ConfigError: it is no NAME <= NUMBER, or there is no such figure.
        """
        found = _FORM.fullmatch(text)
        if found is None:
            raise ConfigError(f"--budget {text!r} is no limit such as 'latency_ratio <= 1.02' or 'parameters <= 1%'.")
        name, number, percent = found.groups()
        known = [PARAMETERS, *(one for one in NAMES if one != VERDICT)]
        if name not in known:
            raise ConfigError(f"--budget {text!r}: there is no figure {name!r}. {nearest(name, known)}")
        return Budget(text, name, float(number) / (100 if percent else 1))

    @property
    def of_graph(self) -> bool:
        """Whether it takes an ONNX graph to say."""
        return self.name != PARAMETERS

    def value(self, figures: Mapping[str, Any]) -> float:
        """What is judged: of a latency's ratio the upper end of its interval."""
        return float(figures[_JUDGED_BY.get(self.name, self.name)])

    def over(self, figures: Mapping[str, Any]) -> float:
        """How far the value is above the limit, as a share of it (of 1, where that is 0); 0 or less is within."""
        return (self.value(figures) - self.limit) / (abs(self.limit) or 1.0)

    def precision(self, found: Served) -> float | None:
        """How precise a latency must be to tell on which side it is; None where that is told, or would be told against the candidate."""
        if self.name != "latency_ratio" or found.latency is None:
            return None
        ratio, _, high = found.latency
        return (self.limit - ratio) / ratio if ratio < self.limit < high else None


def parsed(texts: Sequence[str], profile_seconds: float) -> tuple[Budget, ...]:
    """Budgets, of which some need graphs to be measured for so long.

    Raises:
        ConfigError: see `Budget.parse`; or no graph is measured.
    """
    budgets = tuple(map(Budget.parse, texts))
    needing = next((budget.text for budget in budgets if budget.of_graph), None)
    if needing is not None and profile_seconds == 0:
        raise ConfigError(f"--budget {needing!r} needs a profile, and --profile-seconds 0 leaves it out.")
    return budgets


def precision_for(budgets: tuple[Budget, ...], found: Served) -> float | None:
    """The finest that any of them asks for."""
    return min((one for budget in budgets if (one := budget.precision(found)) is not None), default=None)


def excess(budgets: tuple[Budget, ...], figures: Mapping[str, Any]) -> float:
    """How far a candidate is above the limit that it misses most; minus infinity without limits."""
    return max((budget.over(figures) for budget in budgets), default=-math.inf)
