"""x' = a f(x) + b (x + sum_j g_j U_j V_j x_{i-j}): LAuReL, in its seven variants.

Source: "LAuReL: Learned Augmented Residual Layer" (ICML 2025), with x = x_i, the skip of site i:

    RW          a f(x) + b x
    LR          f(x) + U V x + x
    PA          f(x) + x + sum_j g_j h(x_{i-j})                       j = 0 .. k-1
    RW+LR       a f(x) + b (U V x + x)
    RW+PA       a f(x) + b (x + sum_j g_j h(x_{i-j}))
    LR+PA       f(x) + x + sum_j g_j U_j V_j x_{i-j}
    RW+LR+PA    a f(x) + b (x + sum_j g_j U_j V_j x_{i-j})

Every default start is exact: U = 0 and a = b = 1, so that the module returns what `x + f` returned, bit for bit.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from laurel_rewrite.operators import fused
from laurel_rewrite.operators.affine import Affine
from laurel_rewrite.operators.config import Option, SiteConfig
from laurel_rewrite.operators.protocol import Connection
from laurel_rewrite.operators.registry import register_operator
from laurel_rewrite.operators.sums import scaled
from laurel_rewrite.operators.tensors import mapped


class Laurel(Connection):
    """The learned residual connection of one site.

    Its state is the window of PA: the last skips of the stream, nearest first.

    Children: `mix` (the scalars of a and b), `down` and `up` (V, [r, D], and U, [D, r], as Linear or 1x1 Conv layers; lists with
    one pair a lag for LR+PA), `g` (one weight a lag).
    """

    title = "LAuReL"
    paper = "LAuReL: Learned Augmented Residual Layer, ICML 2025"
    reader = "PA"
    rank = Option(16, "Rank r of the low-rank maps", minimum=1, within_dim=True)
    history = Option(3, "States k that PA reads, the skip included", minimum=1)
    normalize = Option("softmax", "Bound on a and b", choices=("softmax", "sigmoid", "none", "paper"))
    init_down = Option("orthogonal", "Start of V", choices=("orthogonal", "xavier"))
    history_map = Option("low-rank", "h of PA without LR", choices=("low-rank", "identity"))

    if TYPE_CHECKING:
        down: Any  # a layer, or a ModuleList of one a lag
        up: Any

    def build(self) -> None:
        config = self.config
        self._normalize = config.normalize if mixes(config) else None
        self._low_rank = maps(config) > 0
        self._per_lag = {"lr", "pa"} <= terms(config)
        if self._normalize is not None:
            self.mix = nn.Parameter(torch.empty(mixes(config)))
        if config.lags:
            self.g = nn.Parameter(torch.empty(config.lags))
        if self._per_lag:
            self.down = nn.ModuleList(self.linear(config.dim, config.rank) for _ in range(maps(config)))
            self.up = nn.ModuleList(self.linear(config.rank, config.dim) for _ in range(maps(config)))
        elif self._low_rank:
            self.down, self.up = self.linear(config.dim, config.rank), self.linear(config.rank, config.dim)

    def initialise(self) -> None:
        """a = b = 1 (1/2 for "paper"), U = 0, V drawn or orthogonal, g = 1/k (0 where h is the identity)."""
        config = self.config
        if self._normalize is not None:
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
                nn.init.xavier_uniform_(flat)
            down.weight.copy_(flat.reshape(down.weight.shape))

    def summed(self, x: Tensor, f: Tensor, *past: Tensor, **given: Tensor) -> tuple[Tensor, ...]:
        """The sum of `skip` and `branch`, in fewer passes where x, f and the maps are plain tensors; a subclass may have others of these."""
        config, pairs = self.config, self.pairs()
        window = [x, *past][: config.lags or 1]
        if type(self) is not Laurel or not fused.fits(window, f, [layer for pair in pairs for layer in pair]):
            result: tuple[Tensor, ...] = super().summed(x, f, *past)
            return result
        a, b = weights(self.mix, self._normalize) if self._normalize is not None else (None, None)
        out = fused.combined(window, f, a, b, self.g if config.lags else None, pairs)
        return out, *(x, *past)[: config.leaves]

    def skip(self, x: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """b (x + ...), and the window for the connection after this one."""
        config = self.config
        skip = x
        if config.lags:
            skip = x + self._augment([x, *past][: config.lags])
        elif self._low_rank:
            skip = x + _apply(self.down, self.up, x)
        if self._normalize is not None:
            skip = scaled(skip, weights(self.mix, self._normalize)[1])
        return skip, *(x, *past)[: config.leaves]

    def branch(self, f: Tensor) -> Tensor:
        """a f."""
        return f if self._normalize is None else scaled(f, weights(self.mix, self._normalize)[0])

    def _augment(self, window: list[Tensor]) -> Tensor:
        """sum_j g_j U_j V_j x_{i-j}, or h(sum_j g_j x_{i-j}) where the lags share one map h."""
        total: Tensor | None = None
        for lag, state in enumerate(window):
            term = scaled(state, self.g[lag : lag + 1])
            if self._per_lag:
                term = _apply(self.down[lag], self.up[lag], term)
            total = term if total is None else total + term
        assert total is not None
        return _apply(self.down, self.up, total) if self._low_rank and not self._per_lag else total

    def pairs(self) -> list[tuple[Any, Any]]:
        """The (down, up) layers, one pair a lag for LR+PA, else one or none."""
        if self._per_lag:
            return list(zip(self.down, self.up, strict=True))
        return [(self.down, self.up)] if self._low_rank else []

    def weights(self) -> tuple[Tensor, Tensor]:
        """a and b, tensors of shape (1,); see `weights`."""
        return weights(self.mix, self._normalize or "none")

    def learned(self) -> dict[str, Tensor]:
        """a, b, g by lag, and the Frobenius norm of U V, by lag where each has its own: |U V|^2 = tr(U'U V V'), of r x r matrices."""
        found = dict(zip("ab", (weight.detach().view(()) for weight in self.weights()), strict=True)) if self._normalize is not None else {}
        if self.config.lags:
            found |= {f"g.{lag}": weight for lag, weight in enumerate(self.g.detach())}
        for lag, (down, up) in enumerate(self.pairs()):
            v, u = (layer.weight.detach().flatten(1).float() for layer in (down, up))
            found[f"uv.{lag}" if self._per_lag else "uv"] = ((u.T @ u) * (v @ v.T)).sum().clamp_min(0).sqrt()
        return found

    def singular_values(self) -> dict[str, Tensor]:
        """Of U V, by lag where each has its own. U = Q R and V' = P S, so they are those of the r x r matrix R S'."""
        found = {}
        for lag, (down, up) in enumerate(self.pairs()):
            u, v = (layer.weight.detach().flatten(1).cpu().double() for layer in (up, down))
            core = torch.linalg.qr(u).R @ torch.linalg.qr(v.T).R.T
            found[f"uv.{lag}" if self._per_lag else "uv"] = torch.linalg.svdvals(core)
        return found

    def depth_weights(self, x: Tensor, f: Tensor, *past: Tensor) -> Tensor | None:
        """g, of the states that there are: x, and the skips before it."""
        return self.g.detach()[: 1 + len(past)] if self.config.lags else None

    def affine(self, states: int) -> Affine | None:
        """b and g go into U and V. Where the lags share one map, U V sum_j g_j s_j is U sum_j (g_j V) s_j: all that is added has r features.
        Where each has its own, their inner features are concatenated, and one U serves them."""
        if not self._low_rank:
            return None
        a, b = (float(weight) for weight in self.weights()) if self._normalize is not None else (1.0, 1.0)
        lags = range(1 + min(states, max(self.config.lags - 1, 0)))
        g = [float(weight) for weight in self.g] if self.config.lags else [1.0]
        down, up = ([_matrix(layer) for layer in side] for side in zip(*self.pairs(), strict=True))
        form = Affine([a], [b] + [None] * states, axis=self.config.axis, ndim=self.config.ndim)
        if self._per_lag:
            form.downs = [(lag, down[lag]) for lag in lags]
            form.up = np.concatenate([b * g[lag] * up[lag] for lag in lags], axis=1)
        else:
            form.downs = [(lag, g[lag] * down[0]) for lag in lags]
            form.up, form.shared = b * up[0], True
        return form

    @classmethod
    def start_of(cls, config: SiteConfig) -> str:
        """With normalize=paper a and b start at 1/2."""
        return "inexact" if mixes(config) and config.normalize == "paper" else "exact"

    @classmethod
    def flops(cls, config: SiteConfig) -> int:
        """4 r D for each low-rank pair, and what the weights cost."""
        scale = 4 if mixes(config) else 1
        return int(config.dim * (4 * config.rank * maps(config) + 2 * config.lags + scale))

    @classmethod
    def window(cls, config: SiteConfig) -> int:
        return int(config.history) if "pa" in terms(config) else 1

    def extra_repr(self) -> str:
        c = self.config
        parts = [f"variant={c.variant}", f"dim={c.dim}"]
        parts += [f"rank={c.rank}"] if self._low_rank else []
        parts += [f"lags={c.lags}"] if c.lags else []
        return ", ".join([*parts, f"axis={c.axis}"])


def terms(config: SiteConfig) -> frozenset[str]:
    """What a variant is the sum of."""
    return frozenset(config.variant.split("+"))


def maps(config: SiteConfig) -> int:
    """How many low-rank pairs (U, V) there are: one that the lags share is applied to their weighted sum."""
    if {"lr", "pa"} <= terms(config):
        return config.lags
    return int("lr" in terms(config) or ("pa" in terms(config) and config.history_map == "low-rank"))


def mixes(config: SiteConfig) -> int:
    """How many scalars a and b are made of."""
    return {"sigmoid": 1}.get(config.normalize, 2) if "rw" in terms(config) else 0


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


def _apply(down: Any, up: Any, x: Tensor) -> Tensor:
    """U V x."""
    return mapped(up, mapped(down, x))


def _matrix(layer: nn.Module) -> np.ndarray:
    weight: Any = layer.weight
    return np.asarray(weight.detach().double().flatten(1).cpu().numpy())


for _name, _formula in {
    "rw": "a*f(x) + b*x",
    "lr": "f(x) + U*V*x + x",
    "pa": "f(x) + x + sum_j g_j*h(x_{i-j})",
    "rw+lr": "a*f(x) + b*(U*V*x + x)",
    "rw+pa": "a*f(x) + b*(x + sum_j g_j*h(x_{i-j}))",
    "lr+pa": "f(x) + x + sum_j g_j*U_j*V_j*x_{i-j}",
    "rw+lr+pa": "a*f(x) + b*(x + sum_j g_j*U_j*V_j*x_{i-j})",
}.items():
    register_operator(Laurel, name=_name, formula=_formula, needs={"maps"} if _name != "rw" else (), reader="PA" if "pa" in _name else "")
