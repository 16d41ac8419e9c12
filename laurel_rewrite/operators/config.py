"""What one site gets, in numbers and words: every operator and every back end reads it, and it knows none of them."""

from __future__ import annotations

from dataclasses import dataclass

CONVOLUTIONS = {3: "Conv1d", 4: "Conv2d", 5: "Conv3d"}
"""What maps axis 1 of a stream, by the stream's number of dimensions."""
NORMALIZE = ("softmax", "sigmoid", "none", "paper")
INIT_DOWN = ("orthogonal", "xavier")
HISTORY_MAP = ("low-rank", "identity")


@dataclass(frozen=True)
class SiteConfig:
    """What one site gets: the operator, and the sizes it needs from the site.

    Attributes:
        variant: name in the registry, such as "rw+lr".
        rank: r, the inner width of the low-rank maps.
        lags: number of stream states the PA term reads, 1 (the skip alone) to k; 0 without PA.
        history: k, the window; g starts at 1/k. `lags` is smaller at the start of a stream.
        dim: D, the size of the feature axis.
        axis: -1 (features last) or 1 (channels first).
        ndim: number of dimensions of the stream, which picks Conv1d, Conv2d or Conv3d where axis is 1.
        normalize: how a and b are bounded: "softmax", "sigmoid", "none" or "paper".
        init_down: start of the down maps V: "orthogonal" or "xavier".
        history_map: h of PA without LR: "low-rank" (one map shared by the lags) or "identity".
    """

    variant: str
    dim: int
    rank: int = 16
    lags: int = 0
    history: int = 3
    axis: int = -1
    ndim: int = 3
    normalize: str = "softmax"
    init_down: str = "orthogonal"
    history_map: str = "low-rank"

    @property
    def terms(self) -> frozenset[str]:
        return frozenset(self.variant.split("+"))

    @property
    def maps(self) -> int:
        """How many low-rank pairs (U, V) the operator holds and applies: one that the lags share is applied to their weighted sum."""
        if {"lr", "pa"} <= self.terms:
            return self.lags
        return int("lr" in self.terms or ("pa" in self.terms and self.history_map == "low-rank"))

    @property
    def weights(self) -> int:
        """How many scalars a and b are made of."""
        return {"sigmoid": 1}.get(self.normalize, 2) if "rw" in self.terms else 0
