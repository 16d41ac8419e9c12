"""Which weights of the branches the operators of a plan change when they are put in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from laurel_rewrite.detection.branches import LinearMap
from laurel_rewrite.detection.sites import Sites
from laurel_rewrite.errors import ConfigError
from laurel_rewrite.graph.dataflow import Role
from laurel_rewrite.operators.config import BranchMap, SiteConfig
from laurel_rewrite.plan.sites import PlanSite

_A_LAST_MAP = BranchMap(0, 1, "", last=True)


def factors_of(rows: Iterable[tuple[PlanSite, SiteConfig]], sites: Sites) -> dict[str, dict[str, float]]:
    """The factors that differ from 1, by site and by the parameter's name.

    Raises:
        ConfigError: the branch of a site ends in nothing that a factor could be put on, or a parameter is used elsewhere, too.
    """
    found: dict[str, dict[str, float]] = {}
    for row, config in rows:
        if not row.operator.prepares:
            continue
        cls, maps = row.operator.class_of(config), sites.spots[row.id].maps
        places = [BranchMap(index, len(maps), m.projection, m.last) for index, m in enumerate(maps)]
        factors = [cls.prepare_branch(config, place) for place in places]
        asked = "Leave the site out with exclude."
        if not any(m.last for m in maps) and cls.prepare_branch(config, _A_LAST_MAP) != 1.0:
            raise ConfigError(
                f"{row.id} ({row.where}): {row.variant} scales its branch, which ends in no linear map and in no norm. {asked}"
            )
        zeros = sites.flow.zeros  # a multiple of which is the same
        maps = tuple(replace(m, weights=tuple(name for name in m.weights if name not in zeros)) for m in maps)
        changed = [(m, factor) for m, factor in zip(maps, factors, strict=True) if factor != 1.0]
        for linear, _ in changed:
            if not linear.weights:
                raise ConfigError(
                    f"{row.id} ({row.where}): {row.variant} scales the weights of {linear.value}, which are no parameters. {asked}"
                )
            if shared := _used_elsewhere(sites, row, linear, [m for m, _ in changed]):
                raise ConfigError(
                    f"{row.id} ({row.where}): {row.variant} scales {linear.weights[0]}, which {shared} reads, too. Untie it, or leave the site out "
                    "with exclude."
                )
        if changed:
            found[row.id] = {name: factor for linear, factor in changed for name in linear.weights}
    return found


def _used_elsewhere(sites: Sites, row: PlanSite, linear: LinearMap, changed: Sequence[LinearMap]) -> str:
    """Name of a value that reads a parameter of a map and is no map of this connection's branch; "" where there is none."""
    values, readers = sites.flow.values, sites.flow.readers
    own = {
        sites.named(m.value, site)
        for site in sites
        if site.module == row.id
        for m in sites.spots[site.id].maps
        if set(m.weights) & set(linear.weights)
    }
    stack = [value.index for value in values if set(value.weights) & set(linear.weights)]
    for index in stack:  # grows
        value = values[index]
        if not value.data:
            stack += readers[index]
        elif index not in own and index not in sites.flow.opened and not _is_bias_of(sites, index, own):
            return value.name
    return ""


def _is_bias_of(sites: Sites, index: int, own: set[int]) -> bool:
    """Whether a value is one of these maps with something added."""
    values = sites.flow.values
    while index not in own:
        data = [operand for operand in values[index].inputs if values[operand].data]
        if values[index].role not in (Role.SUM, Role.TRANSPARENT) or len(data) != 1:
            return False
        index = data[0]
    return True
