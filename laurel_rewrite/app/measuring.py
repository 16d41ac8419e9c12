"""How a job measures its graphs in onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from laurel_rewrite.app.wording import not_timed
from laurel_rewrite.profiling.latency import USUAL, Effort
from laurel_rewrite.profiling.sessions import settings
from laurel_rewrite.targets import Target


@dataclass(frozen=True)
class Measuring:
    """What `laurel_rewrite.profile` is asked for.

    Attributes:
        effort: how long to measure; 0 seconds for no profile.
        shapes: sizes to measure at by the names of open ones, instead of those of the example inputs.
        threads: of one run; None for the usual number.
        provider: execution provider; "" for that of the target.

    Raises:
        ConfigError: this onnxruntime has no such provider.
    """

    effort: Effort = USUAL
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    threads: int | None = None
    provider: str = ""

    def __post_init__(self) -> None:
        if self.provider:
            settings(self.threads, self.provider)

    @property
    def wanted(self) -> bool:
        """Whether to measure at all."""
        return self.effort.seconds > 0

    def missing(self, target: Target) -> str:
        """Why a graph for a target is not measured here, in a sentence for the user; "" where it is."""
        return "" if self.provider else not_timed(target)

    def options(self, target: Target) -> dict[str, Any]:
        """Arguments of `laurel_rewrite.profile`."""
        return {**vars(self.effort), "threads": self.threads, "provider": self.provider or target.provider}
