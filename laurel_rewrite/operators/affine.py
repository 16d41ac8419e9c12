"""The linear form of a connection: sum_k alpha_k f_k + sum_m beta_m s_m + U [V_j s_j]_j, with numbers for alpha, beta, U and V.

s_0 = x is the skip, and the others are the state. A weight is one number, or one a feature.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

Weight = float | np.ndarray
"""One number, or a vector of D."""


@dataclass
class Affine:
    """The numbers of a linear connection.

    Attributes:
        alphas: weights of the branches.
        betas: weights of the states; None where only the low-rank maps read a state.
        downs: (m, V_j): state and map, of shape [r, D].
        up: U, [D, r] where the maps share it (`shared`), else [D, r * number of downs]; None where there is no low-rank map.
        axis: feature axis, -1 or 1.
        ndim: of the stream.
    """

    alphas: list[Weight] = field(default_factory=list)
    betas: list[Weight | None] = field(default_factory=list)
    downs: list[tuple[int, np.ndarray]] = field(default_factory=list)
    up: np.ndarray | None = None
    shared: bool = False
    axis: int = -1
    ndim: int = 3

    def multiply(self, factor: Weight) -> None:
        """Multiply what it gives, by a number or by one a feature."""
        self.alphas = [alpha * factor for alpha in self.alphas]
        self.betas = [beta if beta is None else beta * factor for beta in self.betas]
        if self.up is not None:
            self.up = self.up * (factor if isinstance(factor, float) else factor[:, None])


def same(left: Weight, right: Weight) -> bool:
    """Equal but for the rounding of float64: weights that are multiplied and divided come back to 1 no nearer."""
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=1e-9)
    return bool(np.allclose(left, right, rtol=1e-9, atol=0))
