"""What the sites of a model get: as somebody asks for it, and site by site."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from laurel_rewrite.detection.site import Site
from laurel_rewrite.errors import ConfigError
from laurel_rewrite.files.checked import is_whole, shown
from laurel_rewrite.operators import registry
from laurel_rewrite.operators.registry import Operator
from laurel_rewrite.operators.turns import EXTRA_TURNS

MOST_TURNS = 10_000
"""The largest loop whose turns get LAuReL modules."""
MOST_SEED = 2**63 - 1


@dataclass(frozen=True, init=False)
class LaurelConfig:
    """What the sites of a model get.

    Attributes:
        variant: name of an operator: "rw", "lr", "pa" or a sum of them, such as "rw+lr", or any other that is registered.
        options: of the operator, which are attributes, too: `config.rank`. Those of LAuReL:

            * rank: r, the inner width of the low-rank maps, at least 1; a site whose D is smaller gets D, if any site has room for it.
            * history: k, how many states of the stream PA reads, the skip included.
            * normalize: how a and b are kept bounded: "softmax" (2 softmax(w), sum 2), "sigmoid" (a = 2 sigmoid(w), b = 2 - a), "none"
              (free) or "paper" (softmax(w), which starts at 1/2 and so does not keep the function of the model).
            * init_down: start of V: "orthogonal" (the paper's for LLMs) or "xavier" (its for ResNet).
            * history_map: h of PA without LR: "low-rank", one map shared by the lags, or "identity".

        extra_turns: what turns of a loop beyond those that were seen do: "refuse", or "share" the last turn's LAuReL.
        include: patterns over site ids, owners, their classes, kinds or blocks, or the role of a branch ("attention"); a site must match
            one. `{3..7}` stands for these numbers: "model.layers.{3..7}". Empty: every identity and projection site. See
            `laurel_rewrite.detection.anatomy.Spot`.
        exclude: patterns; a site must match none.
        seed: of the initialisation; each site draws from (seed, site id).
        rules: what some sites get instead, the later rule before the earlier one: a pattern as for `include`, or a stream's number, with a
            variant, options of it, or both: `{"match": "attention", "variant": "layerscale"}`, `{"stream": 1, "rank": 4}`.

    Raises:
        ConfigError: every mistake at once.
    """

    variant: str
    extra_turns: str
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    seed: int
    rules: tuple[dict[str, Any], ...]
    options: dict[str, Any]

    def __init__(
        self,
        variant: str = "rw+lr",
        *,
        extra_turns: str = "refuse",
        include: str | Iterable[str] = (),
        exclude: str | Iterable[str] = (),
        seed: int = 0,
        rules: Sequence[Mapping[str, Any]] = (),
        **options: Any,
    ) -> None:
        problems: list[str] = []
        try:
            variant = registry.canonical(variant)
            options = registry.checked_options(variant, options)
        except ConfigError as error:
            problems.append(str(error))
            if variant not in registry.operators():  # its options are then what some operator calls so
                known = {name: option for other in registry.operators().values() for name, option in other.options.items()}
                problems += [known[name].problem(name, value) for name, value in options.items() if name in known]
        if extra_turns not in EXTRA_TURNS:
            problems.append(f"extra_turns must be one of {', '.join(EXTRA_TURNS)}, not {extra_turns!r}.")
        if not is_whole(seed) or not 0 <= seed <= MOST_SEED:
            problems.append(f"seed must be a whole number from 0 to {MOST_SEED}, not {shown(seed)}.")
        if isinstance(rules, str | Mapping) or not all(
            isinstance(rule, Mapping) and ("match" in rule) != ("stream" in rule) for rule in rules
        ):
            problems.append(f"rules must be a list of tables, each with match or stream, not {shown(rules)}.")
        if any(problems):
            raise ConfigError(" ".join(filter(None, problems)))
        given = {
            "variant": variant, "extra_turns": extra_turns, "include": (include,) if isinstance(include, str) else tuple(include),
            "exclude": (exclude,) if isinstance(exclude, str) else tuple(exclude), "seed": seed, "rules": tuple(dict(rule) for rule in rules), "options": options,
        }  # fmt: skip
        for name, value in given.items():
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        return _option(self, name)

    def but(self, variant: str, **options: Any) -> LaurelConfig:
        """The same with another operator, its options and other fields, and without rules; of the options it keeps those that the operator has."""
        kept = {name: value for name, value in self.options.items() if name in registry.operator(variant).options}
        chosen: dict[str, Any] = {"extra_turns": self.extra_turns, "include": self.include, "exclude": self.exclude, "seed": self.seed}
        return LaurelConfig(variant, **{**chosen, **kept, **options})


def _option(holder: Any, name: str) -> Any:
    """An option as an attribute."""
    try:
        return object.__getattribute__(holder, "options")[name]
    except KeyError:
        raise AttributeError(f"There is no option {name!r}.") from None


@dataclass(frozen=True)
class PlanSite(Site):
    """One connection: the site where it goes, and what it is.

    Attributes:
        variant: name of the operator.
        options: of the operator, which are attributes, too.
        calls: how often the model runs it in one forward pass; more than 1 where modules are shared, 0 where control flow says how often.
        dim: D; 0 where it is unknown, and the operator needs none.
        turns: how many turns its loop has, where the site is one turn of a loop; else 0.
        holder: path of the module whose call is one pass of the stream.
        side: which operand of the sum is the skip, 0 or 1.
        repeats: how often one pass of the stream comes to it; more than 1 where it comes back to a shared module (ALBERT).
        reads: path of the module that gives what the branch reads, for operators that need it; "" where that is the skip.
        behind: path of the module (in a graph, name of the value) that ends the norm or activation between this connection and the next, for
            operators that are asked again there; "" where they follow each other directly.
        projections: the same of q, k and v of its branch, for operators that give these what they read apart; empty where it has none.
        role, block, owner_class: of its place; see `laurel_rewrite.detection.anatomy.Spot`.
    """

    dim: int
    variant: str
    options: dict[str, Any] = field(default_factory=dict)
    calls: int = 1
    turns: int = 0
    holder: str = ""
    side: int = 0
    repeats: int = 1
    reads: str = ""
    behind: str = ""
    projections: tuple[str, ...] = ()
    role: str = "unknown"
    block: str = ""
    owner_class: str = ""

    def __getattr__(self, name: str) -> Any:
        return _option(self, name)

    @property
    def attribute(self) -> str:
        """Name of the owner's attribute that holds the LAuReL module, or the list of a loop's turns."""
        name = self.id.removeprefix(f"{self.owner}.") if self.owner else self.id
        return name.split(".")[0]

    @property
    def operator(self) -> Operator:
        return registry.operator(self.variant)

    def changed_options(self) -> dict[str, Any]:
        """The options that are not at their defaults."""
        return {name: value for name, value in self.options.items() if value != self.operator.options[name].default}

    def to_dict(self) -> dict[str, Any]:
        """As plans and reports hold it: the options stand beside the facts."""
        row: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if name == "options":
                row |= value
            elif value or name not in ("reads", "behind", "projections"):
                row[name] = list(value) if isinstance(value, tuple) else value
        return row
