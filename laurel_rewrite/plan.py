"""The plan: which sites get which LAuReL, as data that a person reads and edits (TOML)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laurel_rewrite.detection.anatomy import ROLES
from laurel_rewrite.detection.sites import Site, Sites, portable
from laurel_rewrite.errors import ConfigError, NoSiteError, nearest
from laurel_rewrite.files.checked import anything, checked, is_whole, list_of, one_of, optional, read_text, shown, text, toml_of, whole
from laurel_rewrite.files.drafts import replacing
from laurel_rewrite.operators import registry as variants
from laurel_rewrite.operators.config import CONVOLUTIONS, HISTORY_MAP, INIT_DOWN, NORMALIZE, SiteConfig
from laurel_rewrite.operators.turns import EXTRA_TURNS

if TYPE_CHECKING:
    import torch

    from laurel_rewrite.operators.laurel import Laurel

MOST_TURNS = 10_000
"""The largest loop whose turns get LAuReL modules."""
MOST_SEED = 2**63 - 1
_HEADER = """\
# A plan of laurel-rewrite: one [[site]] for each LAuReL module. Delete a site to leave that connection as it is; change its
# variant, rank, history, normalize, init_down or history_map. The other keys say what was found, and must stay.
"""


@dataclass(frozen=True, kw_only=True)
class LaurelConfig:
    """What the sites of a model get.

    Attributes:
        variant: "rw", "lr", "pa" or a sum of them, such as "rw+lr".
        rank: r, the inner width of the low-rank maps, at least 1; a site whose D is smaller gets D, if any site has room for it.
        history: k, how many states of the stream PA reads, the skip included.
        normalize: how a and b are kept bounded: "softmax" (2 softmax(w), sum 2), "sigmoid" (a = 2 sigmoid(w), b = 2 - a), "none"
            (free) or "paper" (softmax(w), which starts at 1/2 and so does not keep the function of the model).
        init_down: start of V: "orthogonal" (the paper's for LLMs) or "xavier" (its for ResNet).
        history_map: h of PA without LR: "low-rank", one map shared by the lags, or "identity".
        extra_turns: what turns of a loop beyond those that were seen do: "refuse", or "share" the last turn's LAuReL.
        include: patterns over site ids, owners, kinds or blocks, or the role of a branch ("attention"); a site must match one. Empty: every
            identity and projection site. See `laurel_rewrite.detection.anatomy.Spot`.
        exclude: patterns; a site must match none.
        seed: of the initialisation; each site draws from (seed, site id).

    Raises:
        ConfigError: every mistake at once.
    """

    variant: str = "rw+lr"
    rank: int = 16
    history: int = 3
    normalize: str = "softmax"
    init_down: str = "orthogonal"
    history_map: str = "low-rank"
    extra_turns: str = "refuse"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        problems: list[str] = []
        try:
            object.__setattr__(self, "variant", variants.canonical(self.variant))
        except ConfigError as error:
            problems.append(str(error))
        for name, known in (
            ("normalize", NORMALIZE),
            ("init_down", INIT_DOWN),
            ("history_map", HISTORY_MAP),
            ("extra_turns", EXTRA_TURNS),
        ):
            if getattr(self, name) not in known:
                problems.append(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}.")
        for name in ("rank", "history"):
            value = getattr(self, name)
            if not is_whole(value) or value < 1:
                problems.append(f"{name} must be a whole number of at least 1, not {shown(value)}.")
        if not is_whole(self.seed) or not 0 <= self.seed <= MOST_SEED:
            problems.append(f"seed must be a whole number from 0 to {MOST_SEED}, not {shown(self.seed)}.")
        for name in ("include", "exclude"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        if problems:
            raise ConfigError(" ".join(problems))


@dataclass(frozen=True)
class PlanSite:
    """One LAuReL module: where it goes and what it is. The fields up to `index` are the site's; see `Site`.

    Attributes:
        calls: how often the model runs it in one forward pass; more than 1 where modules are shared.
        dim: D; 0 where it is unknown, and the variant needs none.
        turns: how many turns its loop has, where the site is one turn of a loop; else 0.
        holder: path of the module whose call is one pass of the stream.
        side: which operand of the sum is the skip, 0 or 1.
        repeats: how often one pass of the stream comes to it; more than 1 where it comes back to a shared module (ALBERT).
    """

    id: str
    kind: str
    owner: str
    where: str
    shape: tuple[int | str, ...]
    axis: int
    dim: int
    stream: int
    index: int
    variant: str
    rank: int
    history: int
    normalize: str
    init_down: str
    history_map: str
    calls: int = 1
    turns: int = 0
    holder: str = ""
    side: int = 0
    repeats: int = 1

    @property
    def attribute(self) -> str:
        """Name of the owner's attribute that holds the LAuReL module, or the list of a loop's turns."""
        name = self.id.removeprefix(f"{self.owner}.") if self.owner else self.id
        return name.split(".")[0]


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

    def past(self, site: PlanSite) -> tuple[str, ...]:
        """Ids of the sites whose skips a PA site reads in its first call, nearest first; the window ends where the stream begins."""
        stream = self._streams[site.stream]
        at = stream.index(site)
        return tuple(row.id for row in stream[max(at - site.history + 1, 0) : at][::-1]) if self._reads_history(site) else ()

    def lags(self, site: PlanSite) -> int:
        """How many states a site reads at most, the skip included; 1 without PA."""
        stream = self._streams[site.stream]
        before = stream.index(site) + (site.repeats - 1) * sum(row.repeats > 1 for row in stream)
        return 1 + min(site.history - 1, before) if self._reads_history(site) else 1

    @staticmethod
    def _reads_history(site: PlanSite) -> bool:
        return variants.operator(site.variant).uses_history

    @cached_property
    def _streams(self) -> dict[int, list[PlanSite]]:
        streams: dict[int, list[PlanSite]] = {}
        for site in self.sites:
            streams.setdefault(site.stream, []).append(site)
        return streams

    def config(self, site: PlanSite) -> SiteConfig:
        """What the operator of a site is built from."""
        operator = variants.operator(site.variant)
        return operator.prepare(
            SiteConfig(
                variant=site.variant,
                dim=site.dim,
                rank=site.rank,
                lags=self.lags(site),
                history=site.history,
                axis=site.axis,
                ndim=len(site.shape),
                normalize=site.normalize,
                init_down=site.init_down,
                history_map=site.history_map,
            )
        )

    def build(self, site: PlanSite, like: torch.Tensor | None) -> Laurel:
        """The LAuReL module of a site, on the device and of the dtype of a parameter beside it."""
        kind = {"device": like.device, "dtype": like.dtype} if like is not None else {}
        module: Laurel = variants.operator(site.variant).module(self.config(site), site=site.id, seed=self.seed, side=site.side, **kind)
        return module

    def parameters(self) -> int:
        """Number of parameters that the plan adds."""
        return sum(variants.operator(s.variant).parameters(self.config(s)) for s in self.sites)

    # Making, reading and writing

    @staticmethod
    def from_sites(sites: Sites, config: LaurelConfig) -> Plan:
        """Give every selected site what the configuration says.

        Raises:
            NoSiteError: the model has no residual connection.
            ConfigError: a selector matches nothing, D is unknown everywhere, or the rank is above every D.
        """
        if not sites.sites:
            raise NoSiteError(sites.why_none())
        calls = Counter(site.module for site in sites)
        repeats = Counter((site.module, site.stream) for site in sites)
        unique = [site for site in sites if site.id == site.module]
        chosen = _select(sites, unique, config)
        uses_rank = variants.operator(config.variant).uses_rank
        left_out = tuple(f"{site.id} ({site.where})" for site in chosen if uses_rank and not _has_maps(site))
        chosen = [site for site in chosen if not uses_rank or _has_maps(site)]
        if not chosen:
            raise ConfigError(f"No site has a feature axis that maps fit, of known size, the first {left_out[0]}; --variant rw needs none.")
        widest = max(chosen, key=lambda site: site.dim or 0)
        if uses_rank and config.rank > (widest.dim or 0):
            others = " No other site has a larger one." if len(chosen) > 1 else ""
            raise ConfigError(f"{widest.id}: rank {config.rank} is above its feature size {widest.dim}.{others}")
        places = {where: portable(where) for where in {site.where for site in chosen}}
        given = {f.name: getattr(config, f.name) for f in fields(config) if f.name in _SETTINGS}
        rows, narrowed = [], []
        for site in chosen:
            binding = sites.bindings[site.id]
            turns = binding.turns if binding.turn is not None else 0
            rank = min(config.rank, site.dim or config.rank) if uses_rank else config.rank
            if rank < config.rank:
                narrowed.append(f"{site.id}: rank {rank} instead of {config.rank}, for D is {site.dim}")
            found = {
                "dim": site.dim or 0, "rank": rank, "where": places[site.where], "calls": calls[site.module], "turns": turns,
                "holder": binding.holder, "side": binding.adds[0][1], "repeats": repeats[site.module, site.stream],
            }  # fmt: skip
            rows.append(PlanSite(**{**asdict(site), **given, **found}))
        return Plan(tuple(rows), seed=config.seed, extra_turns=config.extra_turns, left_out=left_out, narrowed=tuple(narrowed))

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

    def to_toml(self) -> str:
        """The plan as text."""
        import tomlkit

        notes = "".join(f"# {note}.\n" for note in self.narrowed)
        head: dict[str, Any] = {"version": 1, "seed": self.seed}
        if self.model:
            head["model"] = self.model
        if self.extra_turns != "refuse":
            head["extra_turns"] = self.extra_turns
        rows = [{**asdict(site), "shape": list(site.shape)} for site in self.sites]
        return _HEADER + notes + "\n" + tomlkit.dumps({**head, "site": rows})

    @staticmethod
    def from_toml(text: str, origin: str = "the plan") -> Plan:
        """Read a plan.

        Raises:
            ConfigError: not TOML, an unknown or missing key, a value out of range; the message names the site.
        """
        data = toml_of(text, origin)
        if "version" in data and data["version"] != 1:
            raise ConfigError(f"{origin} has version {shown(data['version'])}; this program reads version 1.")
        head = checked(data, _HEAD, origin)
        rows = tuple(_row(row, f"{origin}, site {_label(row, number)}") for number, row in enumerate(head["site"], start=1))
        if not rows:
            raise ConfigError(f"{origin} has no site.")
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
        streams = {row.stream for row in self.sites if row.id in ids and variants.operator(row.variant).uses_history}
        dropped = {row.id for row in self.sites if row.id in ids or (row.stream in streams and variants.operator(row.variant).uses_history)}
        return replace(self, sites=tuple(row for row in self.sites if row.id not in dropped))

    def with_model(self, model: str) -> Plan:
        """The plan with what the command built, without the folder of a file."""
        prefix, colon, _ = model.partition(":")
        named = colon and prefix.isalpha() and "/" not in prefix
        return replace(self, model=model if named else model.rpartition("/")[2])


# Files

_SETTINGS = ("variant", "rank", "history", "normalize", "init_down", "history_map")
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
    "rank": whole(),
    "history": whole(),
    "normalize": text(),
    "init_down": text(),
    "history_map": text(),
    "calls": optional(whole(1), 1),
    "turns": optional(whole(0, MOST_TURNS), 0),
    "holder": optional(text(), ""),
    "side": optional(whole(0, 1), 0),
    "repeats": optional(whole(1), 0),
}
_HEAD = {
    "version": one_of(1),
    "seed": optional(whole(0, MOST_SEED), 0),
    "model": optional(text(), ""),
    "extra_turns": optional(one_of(*EXTRA_TURNS), "refuse"),
    "site": optional(list_of(anything(dict)), []),
}


def check_plan_file(path: Path) -> None:
    """Raise ConfigError where a plan cannot be written, before the work of a capture is done."""
    try:
        folder, inside = path.is_dir(), path.parent.is_dir()
    except OSError as error:  # a name that the file system does not take
        raise ConfigError(f"The plan {str(path)[:80]} cannot be written: {error.strerror}.") from error
    if folder or not inside:
        raise ConfigError(f"The plan {path} cannot be written: {'it is' if folder else f'{path.parent} is not'} a folder.")


def _label(row: Any, number: int) -> str:
    name = row.get("id")
    return shown(name)[1:-1] if isinstance(name, str) else str(number)


def _has_maps(site: Site) -> bool:
    return site.dim is not None and (site.axis != 1 or len(site.shape) in CONVOLUTIONS)


def _row(row: dict[str, Any], label: str) -> PlanSite:
    """A site of a plan; ConfigError where a value is of another type, out of range, or does not fit the others."""
    values = checked(row, _ROW, label)
    try:
        config = LaurelConfig(**{name: values[name] for name in _SETTINGS})
    except ConfigError as error:
        raise ConfigError(f"{label}: {error}") from error
    if not 1 <= config.rank <= values["dim"] and variants.operator(config.variant).uses_rank:
        raise ConfigError(f"{label}: rank {config.rank} is not between 1 and its feature size {values['dim']}.")
    if values["axis"] == 1 and len(values["shape"]) not in CONVOLUTIONS and variants.operator(config.variant).uses_rank:
        raise ConfigError(f"{label}: maps over axis 1 are convolutions, of 3 to 5 dimensions, and the shape has {len(values['shape'])}.")
    site = PlanSite(
        **{**values, "repeats": values["repeats"] or values["calls"], "shape": tuple(values["shape"]), "variant": config.variant}
    )
    inside = f"{site.owner}." if site.owner else ""
    tail = site.id.removeprefix(inside)
    if not site.id.startswith(inside) or not tail.startswith("laurel_"):
        raise ConfigError(f"{label}: the id does not begin with the owner {shown(site.owner)}.")
    turn = tail.partition("@")[0].partition(".")[2]
    if (site.turns > 0) != bool(turn) or (turn and int(turn) >= site.turns):
        raise ConfigError(f"{label}: the id and turns = {site.turns} disagree; a loop's site ends in the number of its turn.")
    return site


def _select(found: Sites, sites: Sequence[Site], config: LaurelConfig) -> list[Site]:
    def matches(site: Site, pattern: str) -> bool:
        spot = found.spots[site.id]
        return pattern in spot.role.split("+") or any(fnmatchcase(text, pattern) for text in (site.id, site.owner, site.kind, spot.block))

    for pattern in (*config.include, *config.exclude):
        if not any(matches(site, pattern) for site in sites):
            names: Iterable[str] = [*(name for site in sites for name in (site.id, site.owner, site.kind)), *ROLES]
            raise ConfigError(f"The selector {pattern!r} matches no site. {nearest(pattern, dict.fromkeys(filter(None, names)))}")
    chosen = [s for s in sites if (any(matches(s, p) for p in config.include) if config.include else s.kind in ("identity", "projection"))]
    chosen = [s for s in chosen if not any(matches(s, p) for p in config.exclude)]
    if not chosen:
        raise ConfigError("The selectors leave no site to rewrite.")
    return chosen
