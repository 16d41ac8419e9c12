"""What data is: three splits, and a digest, so that results from different data are never put side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor
from torch.utils.data import Dataset

SPLITS = ("train", "choose", "judge")
"""Learning rates and stops are chosen on the second; verdicts come from the third."""
Example = dict[str, Tensor]


@dataclass(frozen=True)
class Corpus:
    """Data of one kind.

    Attributes:
        name: as it was asked for.
        kind: "tokens", "images", or "own" of a model's file.
        digest: SHA-256 of what is trained and judged on, its split included.
        classes: how many words there are (ids from 0), or classes of images; 0 where that is unknown.
        made: gives the examples of a split, of a shape: (T,) for tokens, (C, H, W) for images.
        versions: of the packages that it is from.
    """

    name: str
    kind: str
    digest: str
    classes: int
    made: Callable[[str, tuple[int, ...]], Dataset[Example]]
    versions: dict[str, str] = field(default_factory=dict)

    def split(self, name: str, shape: tuple[int, ...]) -> Dataset[Example]:
        """Map-style, with a length.

        Args:
            name: of `SPLITS`.
            shape: of an example. Tokens come in windows that do not overlap.

        Returns:
            Items {"input_ids": int64[T]}, or {"pixel_values": float32[C, H, W], "labels": int64}.
        """
        return self.made(name, shape)
