"""Which operators fit a model: a plan of each is made, and what refuses it is the reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from laurel_rewrite.detection.sites import Sites
from laurel_rewrite.errors import ConfigError
from laurel_rewrite.operators import registry
from laurel_rewrite.plan import LaurelConfig, Plan


@dataclass(frozen=True)
class Fit:
    """How an operator fits a model, with its options as they are where none are given.

    Attributes:
        operator: its name.
        start: "exact", "evaluation", "scale-free" or "inexact", as `laurel_rewrite.operators.protocol.Connection` says, of these connections.
        connections: how many there would be.
        added: parameters that they would bring.
        streams: numbers of the streams that it fits.
        reason: why it fits no stream, or not all; "" where it fits all.
    """

    operator: str
    start: str
    connections: int
    added: int
    streams: tuple[int, ...]
    reason: str

    @property
    def fits(self) -> bool:
        """Whether any stream takes it."""
        return bool(self.streams)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def fits(sites: Sites) -> Iterator[Fit]:
    """Of every registered operator, in their order. Nothing is changed.

    Args:
        sites: of the model.
    """
    for name in registry.operators():
        plan, why = plan_of(sites, name)
        if plan is None:
            yield Fit(name, registry.operator(name).start, 0, 0, (), why)
            continue
        starts = {row.operator.start_of(plan.config(row)) for row in plan.sites}
        start = next(start for start in ("inexact", "scale-free", "evaluation", "exact") if start in starts)
        yield Fit(name, start, len(plan.sites), plan.parameters(), tuple(sorted({row.stream for row in plan.sites})), why)


def plan_of(sites: Sites, name: str, **options: Any) -> tuple[Plan | None, str]:
    """A plan with an operator in the streams that take it, and why the others do not.

    Args:
        sites: of the model.
        name: of the operator.
        options: of it.

    Returns:
        The plan, None where no stream takes it; and the reason, "" where all do.
    """
    widest = max((site.dim or 0 for site in sites), default=0)
    declared = registry.operator(name).options
    options |= {key: min(option.default, widest) for key, option in declared.items() if option.within_dim and widest and key not in options}
    try:
        return Plan.from_sites(sites, LaurelConfig(name, **options)), ""
    except ConfigError as error:
        whole = str(error)
    if len(streams := dict.fromkeys(site.stream for site in sites)) == 1:
        return None, whole
    taken: list[str] = []
    reasons: list[str] = []
    for stream in streams:
        own = tuple(dict.fromkeys(site.module for site in sites if site.stream == stream))
        try:
            Plan.from_sites(sites, LaurelConfig(name, include=own, **options))
            taken += own
        except ConfigError as error:
            reasons.append(str(error))
    if not taken:
        return None, reasons[0]
    return Plan.from_sites(sites, LaurelConfig(name, include=tuple(taken), **options)), reasons[0] if reasons else whole
