"""The sites of a plan file: tables of what a key may hold, and what applies to a site that does not say everything itself."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from laurel_rewrite.errors import ConfigError, nearest
from laurel_rewrite.files.checked import Kind, anything, checked, list_of, one_of, optional, shown, text, whole
from laurel_rewrite.operators import annealing, registry
from laurel_rewrite.operators.config import CONVOLUTIONS
from laurel_rewrite.operators.turns import EXTRA_TURNS
from laurel_rewrite.plan.sites import MOST_SEED, MOST_TURNS, LaurelConfig, PlanSite

VERSION = 2
_RANGE = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")
_NUMBER = re.compile(r"\d{1,9}")
_SIZE = whole(-1)  # -1 where an old exporter left a size open
_ROW = {
    "id": text(r"(.+\.)?laurel_[0-9]{1,9}(\.[0-9]{1,9})?(@[0-9]{1,9})?", "the owner's path, a dot, and laurel_ with a number"),
    "kind": text(r"[a-z-]+", "a kind of site"),
    "owner": text(),
    "where": text(),
    "shape": list_of(_SIZE, text(), most=64),
    "axis": one_of(-1, 1),
    "dim": whole(),
    "stream": whole(),
    "index": whole(),
    "variant": text(),
    "calls": optional(whole(0), 1),
    "turns": optional(whole(0, MOST_TURNS), 0),
    "holder": optional(text(), ""),
    "side": optional(whole(0, 1), 0),
    "repeats": optional(whole(1), 0),
    "reads": optional(text(), ""),
    "behind": optional(text(), ""),
    "projections": optional(list_of(text(), most=3), []),
    "role": optional(text(), "unknown"),
    "block": optional(text(), ""),
    "owner_class": optional(text(), ""),
}
HEAD = {
    "version": optional(one_of(1, VERSION), VERSION),
    "seed": optional(whole(0, MOST_SEED), 0),
    "model": optional(text(), ""),
    "extra_turns": optional(one_of(*EXTRA_TURNS), "refuse"),
    "include": optional(list_of(text()), []),
    "exclude": optional(list_of(text()), []),
    "defaults": optional(anything(dict), {}),
    "stream": optional(list_of(anything(dict)), []),
    "rule": optional(list_of(anything(dict)), []),
    "site": optional(list_of(anything(dict)), []),
}


def common(sites: Sequence[PlanSite]) -> dict[str, Any]:
    """The operator and options that most of some sites have."""
    settings = Counter((site.variant, tuple(site.options.items())) for site in sites)
    (variant, options), _ = settings.most_common(1)[0]
    return {"variant": variant, **dict(options)}


def row_of(site: PlanSite) -> dict[str, Any]:
    """A site as a plan file says it: without what the file need not say."""
    row = site.to_dict()
    usual = {name: kind.default for name, kind in _ROW.items()} | {"repeats": site.calls}
    return {name: value for name, value in row.items() if name not in usual or value != usual[name]}


class Settings:
    """What the sites of a plan have that do not say it themselves: the defaults, then what the rules say that are of their stream or match them.

    Raises:
        ConfigError: a key that no operator has, or its own has not; a rule that no site is of, or an option in it that none of its sites has.
    """

    def __init__(self, defaults: dict[str, Any], rules: Iterable[dict[str, Any]], origin: str) -> None:
        self.origin = origin
        self.defaults = self._checked(defaults, (), f"{origin}, defaults")
        self.rules = [self._checked(rule, ("stream",) if "stream" in rule else ("match",), f"{origin}, a rule") for rule in rules]
        self.used: list[set[str]] = [set() for _ in self.rules]

    def _checked(self, table: dict[str, Any], keys: tuple[str, ...], label: str) -> dict[str, Any]:
        options = {name: _kind(o.default) for operator in registry.operators().values() for name, o in operator.options.items()}
        known: dict[str, Kind] = {name: optional(kind, None) for name, kind in {"variant": text(), **options}.items()}
        known |= {key: whole() if key == "stream" else text() for key in keys}
        found = {name: value for name, value in checked(table, known, label).items() if value is not None}
        if keys and "variant" in found:
            own = registry.operator(found["variant"]).options
            if foreign := next((name for name in found if name in options and name not in own), None):
                raise ConfigError(f"{label}: {found['variant']} has no option {foreign}. {nearest(foreign, own)}")
        return found

    def of(self, row: dict[str, Any], label: str) -> dict[str, Any]:
        """What applies to a site beside its own keys."""
        tables = [self.defaults] if self.defaults else []
        fitting = [
            number
            for number, rule in enumerate(self.rules)
            if (rule["stream"] == row.get("stream") if "stream" in rule else matches(row, rule["match"]))
        ]
        tables += [self.rules[number] for number in fitting]
        tables.append({name: value for name, value in row.items() if name == "variant"})
        found: dict[str, Any] = {}
        for table in tables:
            found |= table
        try:
            operator = registry.operator(str(found.get("variant", "")))
        except ConfigError as error:
            raise ConfigError(f"{label}: {error}") from error
        for number in fitting:
            self.used[number] |= {"variant", *operator.options}
        options = {name: option.default for name, option in operator.options.items()} if tables[:-1] else {}
        return {**options, **{name: value for name, value in found.items() if name in operator.options}, "variant": operator.name}

    def check_used(self) -> None:
        for rule, used in zip(self.rules, self.used, strict=True):
            what = f"stream {rule['stream']}" if "stream" in rule else f"rule {rule['match']!r}"
            if not used:
                raise ConfigError(f"{self.origin}: no site is of the {what}.")
            if idle := next((name for name in rule if name not in {*used, "stream", "match"}), None):
                raise ConfigError(f"{self.origin}: the {what} says {idle}, which the operators of its sites do not have.")


def config_of(head: dict[str, Any], origin: str) -> LaurelConfig:
    """What a plan file without sites asks for: the defaults and rules, for all sites of a model that `include` and `exclude` leave."""
    defaults, rules = head["defaults"], [*head["stream"], *head["rule"]]
    if "variant" not in Settings(defaults, rules, origin).defaults:
        raise ConfigError(
            f"{origin} lists no site and has no [defaults] with a variant: nothing says what the sites get that no rule is of."
        )
    fields = {name: head[name] for name in ("seed", "extra_turns", "include", "exclude")}
    try:
        return LaurelConfig(**defaults, **fields, rules=rules)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from error


def matches(row: dict[str, Any], pattern: str) -> bool:
    """Whether a pattern is that of a site: of its id, owner, the owner's class, kind or block, or the role of its branch. `{3..7}` in it stands
    for each of these numbers."""
    texts = [str(row.get(name, "")) for name in ("id", "owner", "owner_class", "kind", "block")]
    return pattern in str(row.get("role", "")).split("+") or any(_fits(text, pattern) for text in texts)


def _fits(text: str, pattern: str) -> bool:
    found = _RANGE.search(pattern)
    if found is None:
        return fnmatchcase(text, pattern)
    before, after = pattern[: found.start()], pattern[found.end() :]
    low, high = int(found[1]), int(found[2])
    numbers = dict.fromkeys(number for number in _NUMBER.findall(text) if low <= int(number) <= high)
    return any(_fits(text, f"{before}{number}{after}") for number in numbers)


def label_of(row: Any, number: int) -> str:
    name = row.get("id")
    return shown(name)[1:-1] if isinstance(name, str) else str(number)


def _kind(default: Any) -> Kind:
    """What a plan may hold for an option; the operator says more."""
    if isinstance(default, bool):
        return one_of(False, True)
    if isinstance(default, str):
        return text()
    if isinstance(default, int):
        return whole()
    return Kind("a number", lambda value: isinstance(value, int | float) and not isinstance(value, bool))


def site_of(row: dict[str, Any], label: str) -> PlanSite:
    """A site of a plan; ConfigError where a value is of another type, out of range, or does not fit the others."""
    variant = row.get("variant")
    try:
        operator = registry.operator(variant) if isinstance(variant, str) else None
    except ConfigError as error:
        raise ConfigError(f"{label}: {error}") from error
    known = {} if operator is None else {name: _kind(option.default) for name, option in operator.options.items()}
    # Plans that are older than these options.
    known |= {name: optional(known[name], option.default) for name, option in annealing.OPTIONS.items() if name in known}
    values = checked(row, {**_ROW, **known}, label)
    assert operator is not None
    options = {name: values.pop(name) for name in known}
    try:
        config = LaurelConfig(operator.name, **options)
    except ConfigError as error:
        raise ConfigError(f"{label}: {error}") from error
    for name, option in operator.options.items():
        if option.within_dim and operator.uses_maps and not 1 <= options[name] <= values["dim"]:
            raise ConfigError(f"{label}: {name} {options[name]} is not between 1 and its feature size {values['dim']}.")
    if values["axis"] == 1 and len(values["shape"]) not in CONVOLUTIONS and operator.uses_maps:
        raise ConfigError(f"{label}: maps over axis 1 are convolutions, of 3 to 5 dimensions, and the shape has {len(values['shape'])}.")
    values |= {"variant": operator.name, "options": config.options}
    site = PlanSite(
        **{
            **values,
            "repeats": values["repeats"] or values["calls"],
            "shape": tuple(values["shape"]),
            "projections": tuple(values["projections"]),
        }
    )
    inside = f"{site.owner}." if site.owner else ""
    tail = site.id.removeprefix(inside)
    if not site.id.startswith(inside) or not tail.startswith("laurel_"):
        raise ConfigError(f"{label}: the id does not begin with the owner {shown(site.owner)}.")
    turn = tail.partition("@")[0].partition(".")[2]
    if (site.turns > 0) != bool(turn) or (turn and int(turn) >= site.turns):
        raise ConfigError(f"{label}: the id and turns = {site.turns} disagree; a loop's site ends in the number of its turn.")
    return site
