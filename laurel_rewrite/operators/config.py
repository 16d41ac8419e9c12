"""What a connection is built from: its operator, the static facts of its place, and its options as they are declared. Torch is not needed for any of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from laurel_rewrite.files.checked import is_whole, shown

CONVOLUTIONS = {3: "Conv1d", 4: "Conv2d", 5: "Conv3d"}
"""What maps axis 1 of a stream, by the stream's number of dimensions."""
_FACTS = {
    "axis": -1,
    "ndim": 3,
    "lags": 0,
    "leaves": None,
    "position": 0,
    "length": 0,
    "first": None,
    "last": None,
    "block": 0,
    "starts_block": False,
    "ends_block": False,
    "role": "unknown",
    "linked": False,
    "separate": False,
    "fed": False,
}


@dataclass(frozen=True)
class Option:
    """One option of an operator: an option of the command, a key of the plan, a row of documentation and report.

    Attributes:
        default: its value where none is given; says its type, too (bool, int, float or str).
        help: one line for the user.
        choices: the words it may be; empty for any.
        minimum, maximum: of a number.
        within_dim: it cannot be more than D: a narrower site gets D.
    """

    default: Any
    help: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    within_dim: bool = False

    def problem(self, name: str, value: Any) -> str:
        """Why a value cannot be meant, in a sentence; "" where it can."""
        if self.choices:
            return "" if value in self.choices else f"{name} must be one of {', '.join(self.choices)}, not {value!r}."
        if isinstance(self.default, bool):
            return "" if isinstance(value, bool) else f"{name} must be true or false, not {shown(value)}."
        if isinstance(self.default, str):
            return "" if isinstance(value, str) else f"{name} must be a word, not {shown(value)}."
        whole = isinstance(self.default, int)
        fits = is_whole(value) if whole else isinstance(value, int | float) and not isinstance(value, bool) and value == value
        if fits and (self.minimum is None or value >= self.minimum) and (self.maximum is None or value <= self.maximum):
            return ""
        bounds = [f"of at least {self.minimum}"] if self.minimum is not None else []
        bounds += [f"at most {self.maximum}"] if self.maximum is not None else []
        return f"{name} must be a {'whole ' if whole else ''}number{' ' + ' and '.join(bounds) if bounds else ''}, not {shown(value)}."


@dataclass(frozen=True)
class BranchMap:
    """A linear map over the features in a branch, as an operator is asked about it.

    Attributes:
        index, count: it is the number `index` of `count`, in the order in which they run.
        projection: which of "q", "k" and "v" it makes for an attention ("qkv" where it makes all); "" for none.
        last: a factor on its weight and bias is one on the branch (the norm at the end of a branch counts as such a map, too).
    """

    index: int
    count: int
    projection: str
    last: bool


class SiteConfig:
    """What the connection of one site is built from; it does not change. The options are attributes beside the facts: `config.rank`.

    Attributes:
        variant: name of the operator in the registry, such as "rw+lr".
        dim: D, the size of the feature axis.
        axis: -1 (features last) or 1 (channels first).
        ndim: number of dimensions of the stream.
        lags: how many states of the stream it sees, the skip included; 0 where the operator has no history.
        leaves: how many states those after it read of what it leaves; 0 where nobody reads any (the last of a stream), None where they read all.
        position: how many connections of the stream come before it.
        length: how many connections the stream has; 0 where that is unknown.
        first, last: of its stream, where nothing else is said. A `step` that looks at these, and not at positions, is compiled once for equal blocks.
        block: how many repeated blocks of its stream end before it.
        starts_block, ends_block: it is the first, the last of its stream in such a block.
        role: what its branch does; see `laurel_rewrite.detection.anatomy.ROLES`.
        linked: a norm or an activation stands between it and the next connection, and what is behind that is given to `read`.
        separate: the next branch has queries, keys and values of their own: what it reads may be returned as `Reads`.
        fed: its own branch is such a one, and the state before it begins with what q, k and v read.
        options: of the operator, by name.
    """

    variant: str
    dim: int
    axis: int
    ndim: int
    lags: int
    leaves: int | None
    position: int
    length: int
    first: bool
    last: bool
    block: int
    starts_block: bool
    ends_block: bool
    role: str
    linked: bool
    separate: bool
    fed: bool
    options: dict[str, Any]

    def __init__(self, variant: str, dim: int, **given: Any) -> None:
        given |= dict(given.pop("options", {}))
        facts = {name: given.pop(name, default) for name, default in _FACTS.items()}
        for name, derived in {"first": facts["position"] == 0, "last": facts["leaves"] == 0}.items():
            facts[name] = derived if facts[name] is None else facts[name]
        # Plain attributes: a step may read them while torch.compile traces it.
        self.__dict__.update(variant=variant, dim=dim, **facts, **given, options=given)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{self.__dict__.get('variant')} has no option {name!r}.")

    def to_dict(self) -> dict[str, Any]:
        """As a node's metadata hold it; `SiteConfig(**data)` reads it."""
        return {"variant": self.variant, "dim": self.dim, **{name: getattr(self, name) for name in _FACTS}, **self.options}

    def but(self, **changes: Any) -> SiteConfig:
        """The same with other facts or options."""
        kept = self.to_dict()
        for name, source in (("first", "position"), ("last", "leaves")):
            if source in changes:
                del kept[name]
        return SiteConfig(**{**kept, **changes})

    def __repr__(self) -> str:
        return f"SiteConfig({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SiteConfig) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(tuple(sorted(self.to_dict().items(), key=lambda item: item[0])))

    def __reduce__(self) -> tuple[Any, ...]:
        return _config, (self.to_dict(),)


class Watched(SiteConfig):
    """The same, and which facts somebody read of it: what a connection did not look at makes no difference to it."""

    def __init__(self, config: SiteConfig) -> None:
        super().__init__(**config.to_dict())
        self.__dict__["_read"] = set()

    def __getattribute__(self, name: str) -> Any:
        if name in _FACTS:
            object.__getattribute__(self, "__dict__")["_read"].add(name)
        return object.__getattribute__(self, name)

    def read_alone(self) -> SiteConfig:
        """The configuration with the facts that were read, and the others as they are where nothing is known."""
        facts = self.__dict__
        return SiteConfig(facts["variant"], facts["dim"], **{name: facts[name] for name in facts["_read"]}, options=facts["options"])


def no_blocks(stream: Sequence[SiteConfig], least: int = 1) -> str:
    """Why an operator that acts where blocks end has nothing to do in a stream; "" where there are as many as it needs."""
    found = sum(config.ends_block for config in stream)
    return "" if found >= least else f"it acts where repeated blocks end, {least} of them at least, and here are {found}."


FACTS = frozenset({"variant", "dim", "options", "to_dict", "but", *_FACTS})
"""What an option cannot be called."""


def _config(data: dict[str, Any]) -> SiteConfig:
    return SiteConfig(**data)
