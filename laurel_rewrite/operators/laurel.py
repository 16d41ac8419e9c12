"""x' = a f(x) + b (x + sum_j g_j U_j V_j x_{i-j}): LAuReL as a PyTorch module.

Source: "LAuReL: Learned Augmented Residual Layer" (ICML 2025); `laurel_rewrite.operators.registry` has the formula of each variant.

Every default start is exact: U = 0 and a = b = 1, so that the module returns what `x + f` returned, bit for bit.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from laurel_rewrite.errors import ConfigError, LaurelError
from laurel_rewrite.operators.config import CONVOLUTIONS, SiteConfig
from laurel_rewrite.operators.state import Link


class Laurel(nn.Module):
    """The learned residual connection of one site.

    Called with the skip `x` and the branch `f`, tensors of one shape whose axis `config.axis` has size `config.dim`; returns
    their learned sum, of that shape. A sum of several branches, `x + f1 + f2`, is `laurel(x, f1, f2)`, or
    `laurel(x, f1) + laurel.branch(f2)` where the source adds them one by one. The result has the dtype and the strides of the plain sum.
    The earlier states that PA reads come by `link` from the earlier sites, or are given as `past`, nearest first.

    Children: `mix` (the scalars of a and b), `down` and `up` (V, [r, D], and U, [D, r], as Linear or 1x1 Conv layers; lists with
    one pair a lag for LR+PA), `g` (one weight a lag).

    Args:
        config: variant and sizes.
        site: id of the site; with `seed` it seeds this module's own generator, so that no site changes another's start.
        seed: the user's seed.
        side: which operand of the source's sum is the skip, 0 or 1; only the memory layout of the result depends on it.
        device, dtype: of the parameters. On the meta device nothing is initialised.
    """

    if TYPE_CHECKING:
        down: Any  # a layer, or a ModuleList of one a lag
        up: Any

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
        self.config = config
        self.site = site
        self.sides: tuple[int, ...] = (side,)  # and of each further branch's sum
        self.link: Link | None = None
        self._low_rank = config.maps > 0
        self._normalize = config.normalize if "rw" in config.terms else None
        self._lags = config.lags
        self._per_lag = {"lr", "pa"} <= config.terms
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        if config.weights:
            self.mix = nn.Parameter(torch.empty(config.weights, **kind))
        if config.lags:
            self.g = nn.Parameter(torch.empty(config.lags, **kind))
        if self._per_lag:
            self.down = nn.ModuleList(_projection(config, config.dim, config.rank, kind) for _ in range(config.maps))
            self.up = nn.ModuleList(_projection(config, config.rank, config.dim, kind) for _ in range(config.maps))
        elif self._low_rank:
            self.down = _projection(config, config.dim, config.rank, kind)
            self.up = _projection(config, config.rank, config.dim, kind)
        self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int = 0) -> None:
        """Set the start: a = b = 1 (1/2 for "paper"), U = 0, V drawn or orthogonal, g = 1/k (0 where h is the identity)."""
        config = self.config
        if any(p.is_meta for p in self.parameters()):
            return
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{self.site}".encode()))
        if config.weights:
            self.mix.zero_()
        if config.lags:
            self.g.fill_(1 / config.history if self._low_rank else 0.0)
        for down, up in self.pairs():
            up.weight.zero_()
            flat = torch.zeros(config.rank, config.dim, device="cpu")
            if config.init_down == "orthogonal":
                columns = torch.arange(config.dim, device="cpu")
                flat[columns % config.rank, columns] = 1 / math.sqrt(config.rank * config.dim)
            else:
                nn.init.xavier_uniform_(flat, generator=generator)
            down.weight.copy_(flat.reshape(down.weight.shape))

    def pairs(self) -> list[tuple[Any, Any]]:
        """The (down, up) layers, one pair a lag for LR+PA, else one or none."""
        if self._per_lag:
            return list(zip(self.down, self.up, strict=True))
        return [(self.down, self.up)] if self._low_rank else []

    def weights(self) -> tuple[Tensor, Tensor]:
        """a and b, tensors of shape (1,); see `weights`."""
        return weights(self.mix, self._normalize or "none")

    def forward(self, x: Tensor, f: Tensor, *more: Tensor, past: Sequence[Tensor | None] | None = None) -> Tensor:
        window = self.states(x) if past is None else _window(x, past)
        skip = x
        if self._lags:
            skip = x + self._augment(window)
        elif self._low_rank:
            skip = x + _apply(self.down, self.up, x)
        if self._normalize is not None:
            skip = _scaled(skip, weights(self.mix, self._normalize)[1])
        out = laid_out(add(skip, self.branch(f), self.sides[0]), x, f, self.sides[0])
        for position, branch in enumerate(more, start=1):
            side = self.sides[position] if position < len(self.sides) else 0
            out = laid_out(add(out, self.branch(branch), side), out, branch, side)
        return out

    def branch(self, f: Tensor) -> Tensor:
        """a f: one more branch of the same sum, of the skip's shape."""
        return f if self._normalize is None else weighted(f, self.mix, self._normalize)

    def add_(self, x: Tensor, f: Tensor) -> Tensor:
        """The learned sum in the memory of the operand that the source added to, for those who see that tensor under another name."""
        if self.sides[0]:
            return f.copy_(self(x, f.clone()))
        return x.copy_(self(x.clone(), f))

    def states(self, x: Tensor) -> list[tuple[int, Tensor]]:
        """The window of PA: (lag, state of the stream) from lag 0, the skip itself, and x is left for the sites after this one.

        Raises:
            LaurelError: an earlier state is missing, or of another pass.
        """
        if self.link is None:
            if self._lags > 1:
                raise LaurelError(f"{self.site or 'This LAuReL module'}: PA reads {self._lags - 1} earlier states, and none were given.")
            return [(0, x)]
        past = self.link.read(x)
        self.link.write(x)
        return _window(x, past)

    def _augment(self, window: list[tuple[int, Tensor]]) -> Tensor:
        """sum_j g_j U_j V_j x_{i-j}, or h(sum_j g_j x_{i-j}) where the lags share one map h."""
        total: Tensor | None = None
        for lag, state in window:
            term = _scaled(state, self.g[lag : lag + 1])
            if self._per_lag:
                term = _apply(self.down[lag], self.up[lag], term)
            total = term if total is None else total + term
        assert total is not None
        return _apply(self.down, self.up, total) if self._low_rank and not self._per_lag else total

    def __prepare_scriptable__(self) -> Laurel:
        raise LaurelError(
            f"{self.site or 'LAuReL'} cannot be compiled by torch.jit.script, whose language has no functions of any number of branches. Use "
            "torch.jit.trace, torch.compile or torch.export, or script the model that laurel_rewrite.remove gives back."
        )

    def extra_repr(self) -> str:
        c = self.config
        parts = [f"variant={c.variant}", f"dim={c.dim}"]
        parts += [f"rank={c.rank}"] if c.maps else []
        parts += [f"lags={c.lags}"] if c.lags else []
        return ", ".join([*parts, f"axis={c.axis}"])


def weights(mix: Tensor, normalize: str) -> tuple[Tensor, Tensor]:
    """a and b, tensors of shape (1,), from the scalars w that they are made of.

    softmax: 2 softmax(w); sigmoid: a = 2 sigmoid(w), b = 2 - a; none: 1 + w, free; paper: softmax(w), which starts at 1/2.
    Each but the last is written so that w = 0 is the plain residual, towards which weight decay pulls.
    """
    if normalize == "sigmoid":
        a = 2 * torch.sigmoid(mix)
        return a, 2 - a
    if normalize == "none":
        both = 1 + mix
    else:
        both = torch.softmax(mix, 0)
        if normalize == "softmax":
            both = 2 * both
    return both[:1], both[1:]


def weighted(f: Tensor, mix: Tensor, normalize: str) -> Tensor:
    """a f."""
    return _scaled(f, weights(mix, normalize)[0])


def _scaled(x: Tensor, weight: Tensor) -> Tensor:
    """A weight of shape (1,) times x. A nested tensor, which torch.nn.TransformerEncoder makes of a padded batch, takes only a number."""
    if isinstance(x, Tensor) and x.is_nested:  # which a value that fx traces is not
        weight = weight.squeeze(0)
    return weight.to(x.dtype) * x


def _window(x: Tensor, past: Sequence[Tensor | None]) -> list[tuple[int, Tensor]]:
    """(lag, state) from the skip backwards, in its shape and dtype, without the states that there are not."""
    return [(0, x)] + [(lag, state_like(state, x)) for lag, state in enumerate(past, start=1) if state is not None]


@fx.wrap
def state_like(state: Tensor, x: Tensor) -> Tensor:
    """A state in the shape and dtype of the skip; LaurelError where it has another size."""
    if not torch.compiler.is_compiling() and state.numel() != x.numel():
        shapes = f"a state of shape {list(state.shape)} beside a skip of shape {list(x.shape)}"
        raise LaurelError(f"PA reads {shapes}: with these inputs the stream changes its size. Use a variant without pa.")
    if state.is_nested and x.is_nested:  # which may have neither a shape nor strides
        return state.to(x.dtype)
    return state.reshape(x.shape).to(x.dtype)


def add(x: Tensor, f: Tensor, side: int) -> Tensor:
    """x + f, or f + x where side is 1: the same numbers, in the memory layout of the first."""
    return f + x if side else x + f


@fx.wrap
def laid_out(out: Tensor, x: Tensor, f: Tensor, side: int) -> Tensor:
    """`out` with the strides that `add(x, f, side)` has, whatever operator computed it from them.

    Mostly it has them: this mends what torch's rules make of expanded, strided and broadcast operands. A compiled graph has its own layouts.
    """
    if torch.compiler.is_compiling() or out.is_nested or x.stride() == f.stride() == out.stride():
        return out
    strides = _strides_of_sum(x, f, side)
    return out if out.stride() == strides else out.new_empty_strided(out.shape, strides).copy_(out)


def _strides_of_sum(x: Tensor, f: Tensor, side: int) -> tuple[int, ...]:
    """By torch's rules: a memory format that both operands have, else what its general rule says, which the meta device knows alone."""
    formats = [torch.contiguous_format, *{4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(x.ndim, [])]
    for layout in formats:
        if x.shape == f.shape and x.is_contiguous(memory_format=layout) and f.is_contiguous(memory_format=layout):
            return torch.empty(x.shape, device="meta", memory_format=layout).stride()
    left, right = (torch.empty_strided(t.shape, t.stride(), device="meta") for t in (x, f))
    return add(left, right, side).stride()


class PlainResidual(nn.Module):
    """x + f: a turn of a loop that keeps its plain residual connection."""

    def __init__(self, side: int = 0) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor, f: Tensor) -> Tensor:
        return add(x, f, self.side)


def _projection(config: SiteConfig, inputs: int, outputs: int, kind: dict[str, Any]) -> nn.Module:
    """A map over the feature axis without bias: Linear where it is last, a 1x1 convolution where it is axis 1.

    Built without its usual initialisation, which would draw from the global generator.
    """
    options = {"bias": False, "device": kind["device"] or torch.get_default_device(), "dtype": kind["dtype"]}
    skip_init: Callable[..., nn.Module] = nn.utils.skip_init
    if config.axis == -1:
        return skip_init(nn.Linear, inputs, outputs, **options)
    return skip_init(getattr(nn, CONVOLUTIONS[config.ndim]), inputs, outputs, 1, **options)


def _apply(down: Any, up: Any, x: Tensor) -> Tensor:
    """U V x in the maps' own dtype, returned in the skip's: a skip may be kept in float32 beside a bfloat16 branch."""
    weight = down.weight  # of a quantised layer it is packed, or a method
    dtype = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else x.dtype
    low: Tensor = up(down(x.to(dtype)))
    return low.to(x.dtype)


def sites_of(model: nn.Module) -> dict[str, Laurel]:
    """The LAuReL modules in `model` by module path; one that is shared appears once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Laurel)}


def refuse_second_time(model: nn.Module) -> None:
    """Raise ConfigError where the model has LAuReL modules of ours."""
    present = sites_of(model)
    if present:
        raise ConfigError(
            f"The model was rewritten already: it has {len(present)} LAuReL modules, the first at {next(iter(present))!r}. "
            "Call laurel_rewrite.remove(model) first."
        )


def param_groups(model: nn.Module, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Optimiser groups in which the scalars of LAuReL (a, b, g) and all other vectors get no weight decay.

    Args:
        model: any module; every parameter that requires a gradient is in exactly one group.
        lr: learning rate of all groups. The paper gives none of its own for LAuReL.
        weight_decay: of the matrices; vectors (norms, biases, mix, g) get 0, as usual in pre-training.

    Returns:
        Two dictionaries for `torch.optim` constructors: decayed parameters, then those without decay.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim >= 2 else plain).append(parameter)
    return [
        {"params": decayed, "lr": lr, "weight_decay": weight_decay},
        {"params": plain, "lr": lr, "weight_decay": 0.0},
    ]
