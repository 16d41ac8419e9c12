"""Which sites somebody chose, and what each of them gets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from laurel_rewrite.detection.anatomy import ROLES
from laurel_rewrite.detection.site import Site
from laurel_rewrite.detection.sites import Sites
from laurel_rewrite.errors import ConfigError, nearest
from laurel_rewrite.operators import registry
from laurel_rewrite.plan.rows import Settings, matches
from laurel_rewrite.plan.sites import LaurelConfig


def selected(found: Sites, sites: Sequence[Site], config: LaurelConfig) -> list[Site]:
    """Those that `include` and `exclude` leave.

    Raises:
        ConfigError: a pattern matches nothing, or nothing is left.
    """

    def fits(site: Site, pattern: str) -> bool:
        return matches(_described(found, site), pattern)

    for pattern in (*config.include, *config.exclude):
        if not any(fits(site, pattern) for site in sites):
            names: Iterable[str] = [
                *(name for site in sites for name in (site.id, site.owner, site.kind, found.spots[site.id].owner_class)),
                *ROLES,
            ]
            raise ConfigError(f"The selector {pattern!r} matches no site. {nearest(pattern, dict.fromkeys(filter(None, names)))}")
    chosen = [s for s in sites if (any(fits(s, p) for p in config.include) if config.include else s.kind in ("identity", "projection"))]
    chosen = [s for s in chosen if not any(fits(s, p) for p in config.exclude)]
    if not chosen:
        raise ConfigError("The selectors leave no site to rewrite.")
    return chosen


def configured(found: Sites, sites: Sequence[Site], config: LaurelConfig) -> list[tuple[Site, LaurelConfig]]:
    """Each site with what it gets: the configuration, or what the rules make of it.

    Raises:
        ConfigError: a rule is of no site, or cannot be meant.
    """
    if not config.rules:
        return [(site, config) for site in sites]
    settings = Settings({"variant": config.variant, **config.options}, config.rules, "The configuration")
    rows = []
    for site in sites:
        asked = settings.of(_described(found, site), site.id)
        try:
            rows.append((site, config.but(asked.pop("variant"), **asked)))
        except ConfigError as error:
            raise ConfigError(f"{site.id}: {error}") from error
    settings.check_used()
    return rows


def within_features(chosen: Sequence[tuple[Site, LaurelConfig]]) -> Iterator[tuple[Site, LaurelConfig, dict[str, int]]]:
    """Sites, what they get, and those of its options that a site's D bounds: where D is too small for what is asked they are D, if any site that
    gets the same has room.

    Raises:
        ConfigError: none has.
    """
    alike: dict[Any, list[Site]] = {}
    for site, config in chosen:
        alike.setdefault((config.variant, *config.options.items()), []).append(site)
    widest = {asked: max(sites, key=lambda site: site.dim or 0) for asked, sites in alike.items()}
    for site, config in chosen:
        operator, asked = registry.operator(config.variant), (config.variant, *config.options.items())
        bounded = {name: config.options[name] for name, option in operator.options.items() if option.within_dim and operator.uses_maps}
        most = widest[asked].dim or 0
        for name, value in bounded.items():
            if value > most:
                others = " No other site has a larger one." if len(alike[asked]) > 1 else ""
                raise ConfigError(f"{widest[asked].id}: {name} {value} is above its feature size {widest[asked].dim}.{others}")
        yield site, config, {name: min(value, site.dim or 0) for name, value in bounded.items()}


def _described(sites: Sites, site: Site) -> dict[str, Any]:
    """A site as a pattern sees it."""
    spot = sites.spots[site.id]
    return {**asdict(site), "role": spot.role, "block": spot.block, "owner_class": spot.owner_class}
