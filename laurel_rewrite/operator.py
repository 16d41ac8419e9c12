"""x' = a f(x) + b (x + sum_j g_j U_j V_j x_{i-j}): LAuReL as a PyTorch module.

Source: "LAuReL: Learned Augmented Residual Layer" (ICML 2025); `laurel_rewrite.variants` has the formula of each variant.

Every default start is exact: U = 0 and a = b = 1, so that the module returns what `x + f` returned, bit for bit.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laurel_rewrite.errors import ConfigError, LaurelError
from laurel_rewrite.variants import SiteConfig


class Slot:
    """Where a site leaves the skip it read, for the sites after it in the stream.

    One slot a site, not a list that is pushed to: a block that activation checkpointing runs a second time finds in the slots
    of the earlier sites what it found there the first time.
    """

    __slots__ = ("graded", "value")

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self.graded = False

    def clear(self) -> None:
        self.value = None

    def __reduce__(self) -> tuple[type[Slot], tuple[()]]:
        return Slot, ()  # a copy or a pickle of a model carries no activations


class Laurel(nn.Module):
    """The learned residual connection of one site.

    Called with the skip `x` and the branch `f`, tensors of one shape whose axis `config.axis` has size `config.dim`; returns
    their learned sum, of that shape. A sum of several branches, `x + f1 + f2`, is `laurel(x, f1, f2)`, or
    `laurel(x, f1) + laurel.branch(f2)` where the source adds them one by one. The earlier states that PA reads come from the slots
    of the earlier sites, or are given as `past`, nearest first (None where there is none).

    Children: `mix` (the scalars of a and b), `down` and `up` (V, [r, D], and U, [D, r], as Linear or 1x1 Conv layers; lists with
    one pair a lag for LR+PA), `g` (one weight a lag).

    Args:
        config: variant and sizes.
        site: id of the site; with `seed` it seeds this module's own generator, so that no site changes another's start.
        seed: the user's seed.
        device, dtype: of the parameters. On the meta device nothing is initialised.
    """

    down: Any  # a layer, or a ModuleList of one a lag
    up: Any

    def __init__(
        self,
        config: SiteConfig,
        *,
        site: str = "",
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.site = site
        self.slot: Slot | None = None
        self.past: tuple[Slot, ...] = ()
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
        skip = x
        if self._lags:
            skip = x + self._augment(self.states(x) if past is None else _window(x, past))
        elif self._low_rank:
            skip = x + _apply(self.down, self.up, x)
        if self._normalize is None:
            out = f + skip
        else:
            a, b = self.weights()
            out = a.to(f.dtype) * f + b.to(x.dtype) * skip
        for branch in more:
            out = out + self.branch(branch)
        return out

    def branch(self, f: Tensor) -> Tensor:
        """a f: one more branch of the same sum, of the skip's shape."""
        return f if self._normalize is None else weighted(f, self.mix, self._normalize)

    def states(self, x: Tensor) -> list[tuple[int, Tensor]]:
        """The window of PA: (lag, state of the stream) from lag 0, the skip itself, as far as this pass has states."""
        if self.slot is not None and not torch.compiler.is_compiling() and _recomputing():
            self._check_recomputation(x)
        window = _window(x, [slot.value for slot in self.past])
        if self.slot is not None:  # after reading: a shared module reads its own former call
            self.slot.value = x
            self.slot.graded = torch.is_grad_enabled()
        return window

    def _augment(self, window: list[tuple[int, Tensor]]) -> Tensor:
        """sum_j g_j U_j V_j x_{i-j}, or h(sum_j g_j x_{i-j}) where the lags share one map h."""
        total: Tensor | None = None
        for lag, state in window:
            term = self.g[lag : lag + 1].to(state.dtype) * state
            if self._per_lag:
                term = _apply(self.down[lag], self.up[lag], term)
            total = term if total is None else total + term
        assert total is not None
        return _apply(self.down, self.up, total) if self._low_rank and not self._per_lag else total

    def _check_recomputation(self, x: Tensor) -> None:
        """Refuse an activation checkpoint that would give wrong gradients without a word."""
        assert self.slot is not None
        earlier = self.slot.value
        if any(slot.value is not None and not slot.graded for slot in self.past):
            raise LaurelError(
                f"{self.site}: PA reads the states of earlier blocks, and reentrant activation checkpointing keeps no gradient for "
                "them. Use checkpoint(..., use_reentrant=False)."
            )
        # Another pass has other values altogether; the bounds only let through what kernels that are not deterministic change.
        same = earlier is None or (earlier.shape == x.shape and torch.allclose(earlier, x, rtol=1e-2, atol=1e-3, equal_nan=True))
        if not same:
            raise LaurelError(
                f"{self.site}: activation checkpointing runs this block again for an earlier forward pass, whose states PA no "
                "longer has. Run backward before the next forward pass, and do not checkpoint a layer that is shared."
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
    return weights(mix, normalize)[0].to(f.dtype) * f


def _window(x: Tensor, past: Sequence[Tensor | None]) -> list[tuple[int, Tensor]]:
    """(lag, state) from the skip backwards, without the states that there are not."""
    return [(0, x)] + [(lag, state.reshape(x.shape)) for lag, state in enumerate(past, start=1) if state is not None]


class PlainResidual(nn.Module):
    """x + f: a turn of a loop that keeps its plain residual connection."""

    def forward(self, x: Tensor, f: Tensor) -> Tensor:
        return x + f


def _projection(config: SiteConfig, inputs: int, outputs: int, kind: dict[str, Any]) -> nn.Module:
    """A map over the feature axis without bias: Linear where it is last, a 1x1 convolution where it is axis 1.

    Built without its usual initialisation, which would draw from the global generator.
    """
    options = {"bias": False, "device": kind["device"] or torch.get_default_device(), "dtype": kind["dtype"]}
    skip_init: Callable[..., nn.Module] = nn.utils.skip_init
    if config.axis == -1:
        return skip_init(nn.Linear, inputs, outputs, **options)
    conv = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[config.ndim]
    return skip_init(conv, inputs, outputs, 1, **options)


def _apply(down: Any, up: Any, x: Tensor) -> Tensor:
    """U V x in the maps' own dtype, returned in the skip's: a skip may be kept in float32 beside a bfloat16 branch."""
    low: Tensor = up(down(x.to(down.weight.dtype)))
    return low.to(x.dtype)


def _recomputing() -> bool:
    """Whether this runs inside a backward pass, as the second run of a checkpointed block does."""
    return torch._C._current_graph_task_id() != -1


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
