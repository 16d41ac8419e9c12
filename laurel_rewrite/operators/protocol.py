"""What a residual operator is: a `Connection`, the module that stands at a site in the place of x + f.

A new operator is one class and one registration, in a file of its own:

    @register_operator
    class Gate(Connection):
        name = "gate"
        formula = "x + a*f"
        start = "inexact"
        init = Option(0.1, "start of a")

        def build(self):
            self.a = nn.Parameter(torch.full((1,), self.config.init))

        def step(self, x, f):
            return x + self.a * f

The command, the plan, the module, fx and ONNX back ends, lowering, saving, verification, profile and report know it by its name then.
`laurel_rewrite.testing.check_operator` holds it to what this page says.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from laurel_rewrite.errors import LaurelError
from laurel_rewrite.operators import annealing
from laurel_rewrite.operators.between_graphs import BetweenGraphs
from laurel_rewrite.operators.config import CONVOLUTIONS, BranchMap, Option, SiteConfig
from laurel_rewrite.operators.parts import SumInParts
from laurel_rewrite.operators.reads import Reads, parted
from laurel_rewrite.operators.starting import built_in_float32, mark_started, own_draws, put_start
from laurel_rewrite.operators.state import FED, Link, Slot
from laurel_rewrite.operators.sums import add, laid_out, laid_out_like, state_like

if TYPE_CHECKING:
    from laurel_rewrite.operators.affine import Affine

STARTS = ("exact", "evaluation", "scale-free", "inexact")
_SHORT = 8
"""Up to so many numbers of a parameter are logged one by one."""
NEEDS = ("features", "maps", "plain links", "norms between", "whole stream", "features last", "branch input", "attention", "projections")


class Connection(BetweenGraphs, SumInParts):
    """A residual operator; at a site, the module that computes what x + f was.

    Called with the skip `x` and the branch `f`, tensors of one shape whose axis `config.axis` has size `config.dim`; returns the new value of
    the stream, of that shape, with the dtype and the strides of the plain sum. A sum of several branches, `x + f1 + f2`, is
    `connection(x, f1, f2)`. What an operator needs beyond the stream goes past the model's own code as its *state*: tensors of the stream's
    shape behind any number of leading dimensions, which the next connection of the stream gets.

    A subclass defines `step`; or, where it is a sum of something of x and something of f, `skip` and `branch` instead, and then a sum of
    several branches keeps the source's order of adds. These depend on their tensors, the module's parameters and buffers, `self.training` and
    torch's generator alone, and change none of their arguments. `step` may return `Reads` where `config.separate`, and is asked once more, as
    `read`, behind a norm or an activation that stands between two connections, where `config.linked`.

    Class data:
        name: on the command line and in plans.
        title: what its ONNX functions are called by; the class's name where it is empty.
        formula: in one line, of x, f and parameters.
        paper: where it comes from.
        start: "exact" (at its start the model computes what it computed), "evaluation" (in evaluation mode), "scale-free" (where every reader
            of the stream is a normalisation, up to its epsilon) or "inexact".
        needs: of `NEEDS`: "features" (D is known), "maps" (and the axis fits linear maps: `self.linear`), "plain links" (no norm or
            activation between two connections), "norms between" (a norm between any two), "whole stream" (every connection of it), "features last", "branch input" (`step` and
            `skip` get it as the keyword `n`: what the branch's first mixing op reads, behind its norm where it has one), "attention" (a branch
            of the stream is one), "projections" (each attention of the stream has separate ones).
        separate: it returns `Reads` where it can.
        reader: name of what reads earlier states, for messages; "" where nothing does.
        reads_last: it is asked by `read` behind the norm of the last sum, too, where the blocks of a stream end in one.
        grows: its state has more tensors from connection to connection; such a block, compiled alone, is several graphs.
        lead: how many leading dimensions a state has in front of the stream's.
        rate: factor on the learning rate of its parameters.

    Args:
        config: operator, place and options.
        site: id of the site; with `seed` it seeds this module's own start, so that no site changes another's.
        seed: the user's seed.
        side: which operand of the source's sum is the skip, 0 or 1; only the memory layout of the result depends on it.
        device, dtype: of the parameters. On the meta device nothing is initialised.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    formula: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    start: ClassVar[str] = "exact"
    needs: ClassVar[frozenset[str]] = frozenset()
    reader: ClassVar[str] = ""
    separate: ClassVar[bool] = False
    reads_last: ClassVar[bool] = False
    grows: ClassVar[bool] = False
    lead: ClassVar[int] = 0
    rate: ClassVar[float] = 1.0
    declared: ClassVar[dict[str, Option]] = annealing.OPTIONS

    def __new__(cls, *args: Any, **kwargs: Any) -> Connection:
        config = args[0] if args else kwargs.get("config")  # none where a copy is made
        if config is not None and annealing.is_annealed(config.options) and not issubclass(cls, annealing.Annealing):
            cls = annealing.annealed(cls)  # type: ignore[arg-type]  # a class is hashable
        made: Connection = super().__new__(cls)
        return made

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = {name: value for name, value in vars(cls).items() if isinstance(value, Option)}
        for name in own:  # it is `self.config.NAME`; the class keeps the declaration
            delattr(cls, name)
        every = {name: option for base in reversed(cls.__mro__) for name, option in vars(base).get("declared", {}).items()} | own
        cls.declared = {name: option for name, option in every.items() if name not in annealing.OPTIONS} | annealing.OPTIONS
        cls.needs = frozenset(cls.needs)

    def __init__(
        self,
        config: SiteConfig,
        *,
        site: str = "",
        seed: int = 0,
        side: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.leave_graphs()
        missing = {name: option.default for name, option in self.declared.items() if name not in config.options}
        self.config = config.but(**missing) if missing else config
        self.site = site
        self.seed = seed
        self.sides: tuple[int, ...] = (side,)  # and of each further branch's sum
        self.link: Link | None = None
        self.tap: Slot | None = None  # where the branch's input is left; None where that is the skip
        self.regrouped = False  # it takes the place of several adds, and sums the branches first
        self.plain = False  # x + f alone, for a while: what the insertion does without the operator
        self.prepared: dict[str, tuple[float, Tensor]] = {}  # weights of the branch by name: their factor, and what they were
        meta = device is not None and torch.device(device).type == "meta"
        with built_in_float32("meta" if meta else "cpu"), own_draws(site, seed), torch.no_grad():
            self.build()
            if not meta:
                self.initialise()
        for child in self.modules():
            if child is not self and hasattr(child, "reset_parameters"):  # which sharding asks modules for, one by one
                vars(child)["reset_parameters"] = self.reset_parameters
        self.to(device=device or torch.get_default_device(), dtype=dtype or torch.get_default_dtype())
        mark_started(self)

    # What an operator defines

    def build(self) -> None:
        """Make parameters and submodules, in float32."""

    def initialise(self) -> None:
        """Set the start, where `build` did not; what is random draws from torch's generator, which is the site's own here."""

    def step(self, x: Tensor, f: Tensor, *state: Tensor) -> Any:
        """The new value of the stream, or it and the state for the next connection; `state` is empty at a stream's first."""
        return self.summed(x, f, *state)

    def skip(self, x: Tensor, *state: Tensor) -> Any:
        """What the skip brings to the sum, and the state; of an operator that is a sum of this and of `branch`."""
        raise NotImplementedError  # nobody asks an operator that does not define it

    def branch(self, f: Tensor) -> Tensor:
        """What a branch brings to the sum."""
        raise NotImplementedError  # nobody asks an operator that does not define it

    def summed(self, x: Tensor, f: Tensor, *state: Tensor, **given: Tensor) -> Any:
        """The sum of `skip` and `branch`, and the state; an operator may know a faster way to the same."""
        term, left = parted(self.skip(x, *state, **given))
        return add(term, self.branch(f), self.sides[0]), *left

    def read(self, y: Tensor, *state: Tensor) -> Any:
        """What everything reads behind the norm or activation that follows, of what that gave and of the state that `step` left; and the state
        for the next connection. Its operator sees its whole stream."""
        raise NotImplementedError  # nobody asks an operator that does not define it

    def affine(self, states: int) -> Affine | None:
        """The linear form of one branch, the skip and so many states, for the lowering, where there are maps over the features; None to have
        it found by probing `step`, which weights alone are."""
        return None

    @classmethod
    def start_of(cls, config: SiteConfig) -> str:
        """The start, where it depends on the options."""
        return cls.start

    @classmethod
    def unfit(cls, stream: Sequence[SiteConfig]) -> str:
        """Why it cannot be at these connections, all of this operator in one stream and in order, in a sentence; "" where it can."""
        return ""

    @classmethod
    def prepare_branch(cls, config: SiteConfig, place: BranchMap) -> float:
        """A factor on the weight and bias of one linear map of the branch, once, when the operator is put in; 1 leaves it as it is."""
        return 1.0

    @classmethod
    def flops(cls, config: SiteConfig) -> int | None:
        """FLOPs (a multiply and an add are two) for one position (token, pixel) of one site; None to have them counted."""
        return None

    @classmethod
    def window(cls, config: SiteConfig) -> int | None:
        """How many states of the stream it sees at most, the skip included; None for all. 1 where it has no history."""
        return None if cls.reader else 1

    # What it has then

    @classmethod
    def defines(cls, name: str) -> bool:
        """Whether it has its own of what an operator may define."""
        own, general = (getattr(one, name) for one in (cls, Connection))
        return getattr(own, "__func__", own) is not getattr(general, "__func__", general)  # which TorchDynamo reads in control flow, too

    @property
    def additive(self) -> bool:
        """Whether a further branch can be added to what there is."""
        return self.defines("branch")

    def learned(self) -> dict[str, Tensor]:
        """What there is to log of its parameters, as scalars: small ones by their values, `a` or `g.0`, `g.1`, others by their root mean square."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.named_parameters():
            value = parameter.detach()
            if value.numel() > _SHORT:
                found[name] = value.float().square().mean().sqrt()
            else:
                found |= {f"{name}.{place}" if value.numel() > 1 else name: number for place, number in enumerate(value.flatten())}
        return found

    def singular_values(self) -> dict[str, Tensor]:
        """Those of its low-rank maps, in descending order, by the names that `learned` gives these; none where it has no such map."""
        return {}

    def depth_weights(self, x: Tensor, f: Tensor, *state: Tensor) -> Tensor | None:
        """How the new value weighs the states of its stream, the newest first, to be looked at: of shape [states], or [states, ...] where
        positions differ. None where it reads no earlier state, or cannot say."""
        return None

    @property
    def needs_input(self) -> bool:
        """Whether it reads what the branch reads."""
        return "branch input" in self.needs

    @property
    def keeps_branches(self) -> bool:
        """Whether a further branch is added as it is."""
        shape = [1] * self.config.ndim
        shape[self.config.axis] = max(self.config.dim, 1)
        probe = torch.empty(shape, device=next((p.device for p in self.parameters()), None))
        return self.additive and type(self).branch(self, probe) is probe

    @property
    def has_maps(self) -> bool:
        """Whether it has the low-rank maps that its options give it."""
        return "rank" in self.declared and any(parameter.ndim > 1 for parameter in self.parameters())

    def reset_parameters(self) -> None:
        """Set the start, from configuration, site and seed alone; not before all parameters have left the meta device."""
        if not any(p.is_meta for p in self.parameters()):
            put_start(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Connection:
        """Of nn.Module; what leaves the meta device (`to_empty`) has no values, and gets its start at once: no engine knows how to."""
        empty = any(p.is_meta for p in self.parameters())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch types it not
        if empty:
            self.reset_parameters()
        return self

    def linear(self, inputs: int, outputs: int) -> Any:
        """A map over the feature axis without bias, not initialised: Linear where it is last, a 1x1 convolution where it is axis 1."""
        skip_init: Callable[..., nn.Module] = nn.utils.skip_init
        if self.config.axis == -1:
            return skip_init(nn.Linear, inputs, outputs, bias=False, device=torch.get_default_device())
        made = getattr(nn, CONVOLUTIONS[self.config.ndim])
        return skip_init(made, inputs, outputs, 1, bias=False, device=torch.get_default_device())

    def per_feature(self, vector: Tensor) -> Tensor:
        """A vector of D numbers in a shape that multiplies the stream."""
        return vector if self.config.axis == -1 else vector.view(-1, *(1,) * (self.config.ndim - 2))

    def forward(
        self,
        x: Tensor,
        f: Tensor | None = None,
        *more: Tensor,
        past: Sequence[Tensor | None] | None = None,
        state: Sequence[Tensor] | None = None,
        n: Tensor | None = None,
    ) -> Any:
        """The new value of the stream; where `state` is given (a graph has it as an edge), the value and the state behind it. `past` is a
        state, too, behind which none is asked for. `n` is the branch's input, where the operator needs it and nothing else brings it. Without
        a branch, what is read behind the link that x is the end of."""
        if f is None:
            return self.at_end(x) if state is None else self.connect_behind(x, self.shaped(state, x, fed=False))
        if n is None and self.needs_input:
            n = self.branch_input(x)
        if state is not None:
            return self.connect(x, f, *more, state=self.shaped(state, x), n=n)
        if past is None and self.splits_graphs():
            return self.between_graphs(x, f, *more, n=n)
        given = self.states(x) if past is None else self.shaped(past, x)
        out, left = self.connect(x, f, *more, state=given, n=n)
        if self.link is not None:
            self.link.write(x, left)
        return out

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's
        self.leave_graphs()

    def branch_input(self, x: Tensor) -> Tensor:
        """What the branch reads, which its norm left, once for each call; x where it has no norm.

        Raises:
            LaurelError: the norm has not run.
        """
        tap = self.tap
        if tap is None:
            return x
        if tap.value is None:
            raise LaurelError(
                f"{self.site}: {self.config.variant} reads what the branch reads, and its norm has not run since the last call. Call the block as a "
                "whole, and keep the norm inside one checkpoint with the sum."
            )
        (n,) = tap.value
        tap.value = None
        return n

    def at_end(self, y: Tensor) -> Any:
        """What is read behind the norm or activation that y is the end of, from the state that this connection itself left."""
        if self.splits_graphs():
            return self.between_graphs(y)
        if self.link is None:
            return self.connect_behind(y, ())[0]
        out, left = self.connect_behind(y, self.shaped(self.link.at_end(), y, fed=False))
        self.link.write_at_end(left)
        return out

    def connect(
        self, x: Tensor, f: Tensor, *more: Tensor, state: Sequence[Tensor], n: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The new value and the state behind it, from the state before it, wherever that comes from: the graph back ends call this. Both states
        begin with what q, k and v read, where they do not read the value itself."""
        if self.plain:
            out = self.plain_sum(x, f, *more)
            return out, (out,) * self.reads_left
        if self.config.fed:
            state = state[FED:]
        given: dict[str, Any] = {"n": n} if self.needs_input else {}
        if not self.additive:
            side = self.sides[-1]
            for position, branch in enumerate(more, start=1):
                f = add(f, branch, self.sides[position] if position < len(self.sides) else 0)
            out, left = self._read_apart(self.step(x, f, *state, **given), offered=self.reads_left > 0)
            return laid_out(out.to(torch.promote_types(x.dtype, f.dtype)), x, f, side), left
        total, left = parted(self.summed(x, f, *state, **given))
        out = laid_out(total, x, f, self.sides[0])
        for position, branch in enumerate(more, start=1):
            side = self.sides[position] if position < len(self.sides) else 0
            out = laid_out(add(out, self.branch(branch), side), out, branch, side)
        return out, left

    def plain_sum(self, x: Tensor, *branches: Tensor) -> Tensor:
        """x + f, what stood here before the operator."""
        sides = (*self.sides, *[0] * len(branches))
        return functools.reduce(lambda out, pair: add(out, *pair), zip(branches, sides, strict=False), x)

    def connect_behind(self, y: Tensor, state: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The same of `read`: what takes the place of y, and the state behind it."""
        if self.plain:
            return y, (y,) * (FED * self.config.separate)
        out, left = self._read_apart(self.read(y, *state), offered=self.config.separate)
        return laid_out_like(out.to(y.dtype), y), left

    def _read_apart(self, result: Any, *, offered: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The value alone, and what the next branch reads instead of it, where that is offered, in front of the state."""
        value, left = parted(result)
        if not isinstance(value, Reads):
            return value, ((value,) * FED if offered else ()) + left
        if not offered:
            raise LaurelError(
                f"{self.site}: {self.config.variant} returned Reads, and the next branch has no separate queries, keys and values that "
                "could read them, or `read` is asked for them behind a norm. Ask config.separate and config.linked, and declare separate = True."
            )
        return value[0], (*value[1:], *left)

    @property
    def reads_left(self) -> int:
        """How many values at the head of the state behind it are what the next branch reads."""
        return FED if self.config.separate and not self.config.linked else 0

    def add_(self, x: Tensor, f: Tensor) -> Tensor:
        """The learned sum in the memory of the operand that the source added to, for those who see that tensor under another name."""
        if self.sides[0]:
            return f.copy_(self(x, f.clone()))
        return x.copy_(self(x.clone(), f))

    def states(self, x: Tensor) -> tuple[Tensor, ...]:
        """The state that the connection before this one left, in the shape of the skip.

        Raises:
            LaurelError: it is missing, or of another pass.
        """
        if self.link is None:
            if self.config.lags > 1:
                what = self.reader or self.config.variant
                raise LaurelError(
                    f"{self.site or 'This LAuReL module'}: {what} reads {self.config.lags - 1} earlier states, and none were given."
                )
            return ()
        return self.shaped(self.link.read(x), x)

    def shaped(self, state: Iterable[Tensor | None], x: Tensor, *, fed: bool | None = None) -> tuple[Tensor, ...]:
        """States in the shape and dtype of the skip, without those that there are not; `fed`: they begin with what q, k and v read."""
        first = FED if (self.config.fed if fed is None else fed) else 0
        found = (value for value in state if value is not None)
        return tuple(state_like(value, x, self.lead if place >= first else 0, self.reader) for place, value in enumerate(found))

    def __prepare_scriptable__(self) -> Connection:
        raise LaurelError(
            f"{self.site or 'LAuReL'} cannot be compiled by torch.jit.script, whose language has no functions of any number of branches. Use "
            "torch.jit.trace, torch.compile or torch.export, or script the model that laurel_rewrite.remove gives back."
        )

    def extra_repr(self) -> str:
        c = self.config
        return ", ".join(
            [f"variant={c.variant}", f"dim={c.dim}", *(f"{name}={value}" for name, value in c.options.items()), f"axis={c.axis}"]
        )
