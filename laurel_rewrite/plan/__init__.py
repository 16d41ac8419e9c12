"""The plan: which sites get which operator, as data that a person reads and edits (TOML)."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laurel_rewrite.detection.site import path_moved, portable
from laurel_rewrite.detection.sites import Sites
from laurel_rewrite.errors import ConfigError, NoSiteError, nearest
from laurel_rewrite.files.checked import checked, read_text, shown, toml_of
from laurel_rewrite.files.drafts import replacing
from laurel_rewrite.operators import registry
from laurel_rewrite.operators.config import SiteConfig
from laurel_rewrite.plan.choosing import configured, selected, within_features
from laurel_rewrite.plan.fitting import check_borders, check_stream, is_unfit, places_beside
from laurel_rewrite.plan.preparing import factors_of
from laurel_rewrite.plan.rows import HEAD, VERSION, Settings, common, config_of, label_of, row_of, site_of
from laurel_rewrite.plan.sites import MOST_SEED, MOST_TURNS, LaurelConfig, PlanSite

if TYPE_CHECKING:
    import torch

    from laurel_rewrite.operators.counting import Counts
    from laurel_rewrite.operators.protocol import Connection

__all__ = ["MOST_SEED", "MOST_TURNS", "LaurelConfig", "Plan", "PlanSite", "asked_for", "check_plan_file", "planned", "read_plan"]
_HEADER = """\
# A plan of laurel-rewrite. Every site gets the operator of [defaults], unless a rule or the site itself says another variant or option:
#     [[rule]]
#     match = "attention"  # the role of a branch, or a pattern of ids, owners, their classes, kinds or blocks, where {3..7} are numbers
#     variant = "layerscale"
# or stream = 1 in place of match. Delete a [[site]] to leave that connection as it is; its other keys say what was found, and must stay.
"""


@dataclass(frozen=True)
class Plan:
    """The sites to rewrite, in order of execution, and the seed of their start.

    Attributes:
        extra_turns: see `LaurelConfig`.
        left_out: sites that could not be chosen: the size of their feature axis is unknown, or it is axis 1 of no 3 to 5 dimensions, which
            no convolution maps.
        narrowed: sites whose D is below the rank that was asked for, and what they got, in words.
    """

    sites: tuple[PlanSite, ...]
    seed: int = 0
    model: str = ""
    extra_turns: str = "refuse"
    left_out: tuple[str, ...] = ()
    narrowed: tuple[str, ...] = ()

    def streams(self) -> list[list[PlanSite]]:
        """The sites of each stream, in its order."""
        return list(self._streams.values())

    def before(self, site: PlanSite) -> PlanSite | None:
        """The connection whose state a site reads in its first call; None where its stream begins, or where nothing in it has a history."""
        stream = self._streams[site.stream]
        at = stream.index(site)
        return stream[at - 1] if at and self.has_history(site.stream) else None

    def has_history(self, stream: int) -> bool:
        """Whether anything in a stream reads earlier states."""
        return any(row.operator.uses_history for row in self._streams[stream])

    def lags(self, site: PlanSite) -> int:
        """How many states a site reads at most, the skip included; 1 without history."""
        if not site.operator.uses_history:
            return 1
        stream = self._streams[site.stream]
        before = stream.index(site) + (site.repeats - 1) * sum(row.repeats > 1 for row in stream)
        window = site.operator.connection.window(SiteConfig(site.variant, site.dim, options=site.options))
        return 1 + before if window is None else min(window, 1 + before)

    def leaves(self, site: PlanSite) -> int | None:
        """How many states those after a site read of what there is behind it; None where they read all, however many."""
        if not self.has_history(site.stream):
            return 0
        stream = self._streams[site.stream]
        at = stream.index(site)
        if site.operator.connection.window(SiteConfig(site.variant, site.dim, options=site.options)) is None:
            return None if stream[at + 1 :] or site.repeats > 1 else 0
        if any(row.repeats > 1 for row in stream):
            return max(self.lags(row) for row in stream) - 1
        return max((self.lags(row) - later for later, row in enumerate(stream[at + 1 :], start=1)), default=0)

    @cached_property
    def _streams(self) -> dict[int, list[PlanSite]]:
        streams: dict[int, list[PlanSite]] = {}
        for site in self.sites:
            streams.setdefault(site.stream, []).append(site)
        return streams

    def config(self, site: PlanSite) -> SiteConfig:
        """What the connection of a site is built from."""
        stream = self._streams[site.stream]
        at = stream.index(site)
        apart = [site.operator.separate and bool(row.projections) for row in stream]
        ends = [bool(row.block) and all(later.block != row.block for later in stream[place:]) for place, row in enumerate(stream, start=1)]
        return site.operator.prepare(
            SiteConfig(
                site.variant,
                site.dim,
                axis=site.axis,
                ndim=len(site.shape),
                lags=self.lags(site),
                leaves=self.leaves(site),
                position=at,
                length=len(stream),
                last=site is stream[-1] and site.repeats == 1,
                role=site.role,
                block=sum(ends[:at]),
                starts_block=bool(site.block) and all(row.block != site.block for row in stream[:at]),
                ends_block=ends[at],
                linked=bool(site.behind),
                separate=any(apart[at + 1 : at + 2]),
                fed=at > 0 and apart[at],
                options=site.options,
            )
        )

    def build(self, site: PlanSite, like: torch.Tensor | None) -> Connection:
        """The connection of a site, on the device and of the dtype of a parameter beside it."""
        kind: dict[str, Any] = {"device": like.device, "dtype": like.dtype} if like is not None else {}
        return site.operator.connection(self.config(site), site=site.id, seed=self.seed, side=site.side, **kind)

    def parameters(self) -> int:
        """Number of parameters that the plan adds."""
        return sum(s.operator.parameters(self.config(s)) for s in self.sites)

    def counts(self) -> dict[str, Counts]:
        """What each connection costs for one position, by its id, behind those before it in its stream."""
        import torch

        from laurel_rewrite.operators.counting import counted_stream

        found: dict[str, Counts] = {}
        for rows in self.streams():
            if self.has_history(rows[0].stream):
                made = counted_stream(self.build(row, torch.empty(0, device="meta")).eval() for row in rows)
            else:
                made = [row.operator.counts(self.config(row)) for row in rows]
            found |= {row.id: one for row, one in zip(rows, made, strict=True)}
        return found

    # Making, reading and writing

    @staticmethod
    def from_sites(sites: Sites, config: LaurelConfig) -> Plan:
        """Give every selected site what the configuration says.

        Raises:
            NoSiteError: the model has no residual connection.
            ConfigError: a selector or a rule matches nothing, D is unknown everywhere, or the rank is above every D.
        """
        if not sites.sites:
            raise NoSiteError(sites.why_none())
        calls = Counter(site.module for site in sites)
        repeats = Counter((site.module, site.stream) for site in sites)
        within = {site.module for site in sites if sites.room(site)}
        unique = [site for site in sites if site.id == site.module]
        chosen, left_out = [], []
        for site, own in configured(sites, selected(sites, unique, config), config):
            (left_out.append(f"{site.id} ({site.where})") if is_unfit(registry.operator(own.variant), site) else chosen.append((site, own)))
        if not chosen:
            raise ConfigError(f"No site has a feature axis that maps fit, of known size, the first {left_out[0]}; --variant rw needs none.")
        places = {where: portable(where) for where in {site.where for site, _ in chosen}}
        rows, narrowed = [], []
        for site, own, bounds in within_features(chosen):
            binding, operator = sites.bindings[site.id], registry.operator(own.variant)
            asked, options = own.options, own.options | bounds
            narrowed += [
                f"{site.id}: {name} {value} instead of {asked[name]}, for D is {site.dim}"
                for name, value in bounds.items()
                if value < asked[name]
            ]
            found = {
                "dim": site.dim or 0, "where": places[site.where], "calls": calls[site.module] if site.module not in within else 0,
                "turns": binding.turns if binding.turn is not None else 0, "holder": binding.holder, "side": binding.adds[0][1],
                "repeats": repeats[site.module, site.stream], "variant": own.variant, "options": options,
                **places_beside(sites, site, operator, calls[site.module]),
                "role": sites.spots[site.id].role, "block": sites.spots[site.id].block,
                "owner_class": sites.spots[site.id].owner_class,
            }  # fmt: skip
            rows.append(PlanSite(**{**asdict(site), **found}))
        plan = Plan(tuple(rows), config.seed, extra_turns=config.extra_turns, left_out=tuple(left_out), narrowed=tuple(narrowed))
        plan.check(sites)
        return plan

    def check(self, sites: Sites) -> None:
        """Raise ConfigError unless every site of the plan is one of these, with the same feature axis."""
        known = {site.id: site for site in sites}
        for row in self.sites:
            site = known.get(row.id)
            if site is None:
                raise ConfigError(f"The plan names the site {row.id!r}, which the model does not have. {nearest(row.id, known)}")
            if (site.dim or 0, site.axis, site.owner) != (row.dim, row.axis, row.owner):
                raise ConfigError(
                    f"{row.id}: the plan says axis {row.axis} of size {row.dim}, the model has axis {site.axis} of size {site.dim}. "
                    "Was the plan made for another configuration of the model?"
                )
        for rows in self.streams():
            check_stream(rows, sites)
            for connection in dict.fromkeys(row.operator.connection for row in rows):
                own = [row for row in rows if row.operator.connection is connection]
                if why := connection.unfit([self.config(row) for row in own]):
                    raise ConfigError(f"{own[0].id} ({own[0].where}): {own[0].variant} cannot be in this stream: {why}")
        check_borders({site.id: site for site in self.sites}, self.has_history, sites)
        self.factors(sites)

    def factors(self, sites: Sites) -> dict[str, dict[str, float]]:
        """What the operators multiply weights of their branches by, once, by site and by the parameter's name; see `factors_of`."""
        return factors_of(((row, self.config(row)) for row in self.sites), sites)

    def to_toml(self) -> str:
        """The plan as text."""
        import tomlkit

        notes = "".join(f"# {note}.\n" for note in self.narrowed)
        head: dict[str, Any] = {"version": VERSION, "seed": self.seed}
        if self.model:
            head["model"] = self.model
        if self.extra_turns != "refuse":
            head["extra_turns"] = self.extra_turns
        defaults = common(self.sites)
        streams, rows = [], []
        for sites in self.streams():
            usual = common(sites)
            if own := {name: value for name, value in usual.items() if defaults.get(name) != value}:
                streams.append({"stream": sites[0].stream, **own})
            known = {**(defaults if "variant" not in own else {}), **own}
            for site in sites:
                row = row_of(site)
                mine = {"variant": site.variant, **site.options}
                same = {name for name, value in mine.items() if known.get("variant") == site.variant and known.get(name) == value}
                rows.append({name: value for name, value in row.items() if name not in same})
        order = {site.id: place for place, site in enumerate(self.sites)}
        rows.sort(key=lambda row: order[row["id"]])
        tables = {"defaults": defaults, **({"stream": streams} if streams else {}), "site": rows}
        return _HEADER + notes + "\n" + tomlkit.dumps({**head, **tables})

    @staticmethod
    def from_toml(text: str, origin: str = "the plan") -> Plan:
        """Read a plan, of this version or of the first, whose sites said everything themselves.

        Raises:
            ConfigError: not TOML, an unknown or missing key, a value out of range; the message names the site.
        """
        return Plan.from_data(toml_of(text, origin), origin)

    @staticmethod
    def from_data(data: Any, origin: str) -> Plan:
        """The same of the tables that a plan's text holds."""
        if isinstance(data, dict) and "version" in data and data["version"] not in (1, VERSION):
            raise ConfigError(f"{origin} has version {shown(data['version'])}; this program reads versions 1 and {VERSION}.")
        head = checked(data, HEAD, origin)
        known = Settings(head["defaults"], [*head["stream"], *head["rule"]], origin)
        rows = tuple(
            site_of({**known.of(row, label), **row}, label)
            for row, label in ((row, f"{origin}, site {label_of(row, number)}") for number, row in enumerate(head["site"], start=1))
        )
        known.check_used()
        if not rows:
            raise ConfigError(f"{origin} has no site.")
        if given := next((key for key in ("include", "exclude") if head[key]), None):
            raise ConfigError(f"{origin} lists its sites, so {given} cannot stand in it. Delete sites, or all of them.")
        twice = [name for name, count in Counter(row.id for row in rows).items() if count > 1]
        if twice:
            raise ConfigError(f"{origin} has the site {twice[0]!r} twice.")
        return Plan(rows, seed=head["seed"], model=head["model"], extra_turns=head["extra_turns"])

    @staticmethod
    def read(path: Path | str) -> Plan:
        """Read a plan file; ConfigError where there is none."""
        return Plan.from_toml(read_text(Path(path), "The plan"), str(path))

    def write(self, path: Path, *, force: bool = False) -> None:
        """Write the plan to a file; ConfigError where it cannot be, or where the file is there and says something else."""
        text = self.to_toml()
        if not force and path.exists() and read_text(path, "The plan") != text:
            raise ConfigError(f"{path} is there already, and says something else. Choose another file, or replace it with --force.")
        with replacing(path.parent) as draft:
            (draft / path.name).write_text(text)

    def without(self, ids: Collection[str]) -> Plan:
        """The plan less these sites, and less what shares a stream with one of them where the operator reads the stream's history."""
        streams = {row.stream for row in self.sites if row.id in ids and row.operator.uses_history}
        dropped = {row.id for row in self.sites if row.id in ids or (row.stream in streams and row.operator.uses_history)}
        return replace(self, sites=tuple(row for row in self.sites if row.id not in dropped))

    def only(self, ids: Collection[str]) -> Plan:
        """The plan with these sites alone; a history counts over those of its stream that are left.

        Raises:
            ConfigError: it has none of these, or not all, or an operator that needs its whole stream would lose a part of that.
        """
        known = {row.id for row in self.sites}
        unknown = next((name for name in ids if name not in known), None)
        if unknown is not None:
            raise ConfigError(f"The plan has no site {unknown!r}. {nearest(unknown, known)}")
        if not ids:
            raise ConfigError("A plan needs one site at least, and none was chosen.")
        for rows in self.streams():
            left = [row for row in rows if row.id in ids]
            torn = next((row for row in left if "whole stream" in row.operator.needs), None) if len(left) < len(rows) else None
            if torn is not None:
                missing = next(row.id for row in rows if row.id not in ids)
                raise ConfigError(
                    f"{torn.id}: {torn.variant} needs every connection of its stream, and {missing} is not chosen. Choose all or none."
                )
        return replace(self, sites=tuple(row for row in self.sites if row.id in ids), left_out=(), narrowed=())

    @staticmethod
    def joined(plans: Sequence[Plan]) -> Plan:
        """One plan of those of several modules of a model, with its paths; the seed is the first one's.

        Raises:
            ConfigError: they differ in what becomes of turns that a loop did not have.
        """
        if len({plan.extra_turns for plan in plans}) > 1:
            raise ConfigError("Parts of this model were rewritten with different extra_turns, which a plan has one of.")
        rows: list[PlanSite] = []
        for plan in plans:
            first = 1 + max((row.stream for row in rows), default=-1)
            rows += [replace(row, stream=first + row.stream) for row in plan.sites]
        return replace(plans[0], sites=tuple(rows), left_out=(), narrowed=())

    def moved(self, old: str, new: str) -> Plan:
        """The plan with another beginning of all modules' paths; what holds a pass of a stream and lies outside is the new root."""

        def path(name: str) -> str:
            return path_moved(name, old, new) if name else name

        rows = [
            replace(
                row,
                id=path_moved(row.id, old, new),
                owner=path_moved(row.owner, old, new),
                holder=path_moved(row.holder, old, new) if f"{row.holder}.".startswith(old) else "",
                block=path(row.block),
                reads=path(row.reads),
                behind=path(row.behind),
                projections=tuple(map(path, row.projections)),
            )
            for row in self.sites
        ]
        return replace(self, sites=tuple(rows))

    def with_model(self, model: str) -> Plan:
        """The plan with what the command built, without the folder of a file."""
        prefix, colon, _ = model.partition(":")
        named = colon and prefix.isalpha() and "/" not in prefix
        return replace(self, model=model if named else model.rpartition("/")[2])


def read_plan(path: Path | str) -> Plan | LaurelConfig:
    """What a plan file asks for: a plan, or, where it lists no site, a configuration for all sites of a model.

    Raises:
        ConfigError: see `Plan.from_toml`.
    """
    origin = str(path)
    data = toml_of(read_text(Path(path), "The plan"), origin)
    if isinstance(data, dict) and data.get("site") in (None, []):
        return config_of(checked(data, HEAD, origin), origin)
    return Plan.from_data(data, origin)


def asked_for(plan: Plan | Path | str | None, **config: Any) -> Plan | LaurelConfig:
    """A plan, the one in a file, or a configuration where there is none; ConfigError where somebody gives both."""
    if plan is None:
        return LaurelConfig(**config)
    usual = {name: one.default for name, one in inspect.signature(LaurelConfig).parameters.items()}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
    if said := next((name for name, value in given.items() if name not in usual or value != usual[name]), None):
        raise ConfigError(f"A plan says what each site gets, so {said} cannot be given with it. Edit the plan.")
    return plan if isinstance(plan, Plan) else read_plan(plan)


def planned(sites: Sites, asked: Plan | LaurelConfig) -> Plan:
    """The plan for these sites that is asked for: one that is given, or of a configuration."""
    return Plan.from_sites(sites, asked) if isinstance(asked, LaurelConfig) else asked


def check_plan_file(path: Path) -> None:
    """Raise ConfigError where a plan cannot be written, before the work of a capture is done."""
    try:
        folder, inside = path.is_dir(), path.parent.is_dir()
    except OSError as error:  # a name that the file system does not take
        raise ConfigError(f"The plan {str(path)[:80]} cannot be written: {error.strerror}.") from error
    if folder or not inside:
        raise ConfigError(f"The plan {path} cannot be written: {'it is' if folder else f'{path.parent} is not'} a folder.")
