"""Images with classes: scikit-learn's digits, shapes that are drawn, and datasets."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from laurel_rewrite.errors import ConfigError, missing
from laurel_rewrite.lab.splits import SPLITS, Corpus, Example

SHAPES = ("disc", "ring", "square", "frame", "triangle", "cross", "plus", "bars", "half disc", "diamond")
_SIZES = {"train": 50_000, "choose": 2_000, "judge": 10_000}
_DRAWN = 2
"""Raised where what is drawn changes: it is another data set then."""


class _Items(Dataset[Example]):
    """Examples by number."""

    def __init__(self, size: int, item: Callable[[int], tuple[Tensor, int]], shape: tuple[int, ...]) -> None:
        self.size, self.item, self.shape = size, item, shape

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, number: int) -> Example:
        image, label = self.item(number)
        return {"pixel_values": fitted(image, self.shape), "labels": torch.tensor(label)}


def fitted(image: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An image [C, H, W] in another size, and with as many channels: the mean, or repeated.

    Args:
        image: of numbers around 0.
        shape: (C, H, W).
    """
    channels, height, width = shape
    if image.shape[1:] != (height, width):
        image = F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]
    return image if image.shape[0] == channels else image.mean(0, keepdim=True).expand(channels, -1, -1).contiguous()


def digits() -> Corpus:
    """The 1,797 digits of scikit-learn, 8 x 8."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise missing("scikit-learn", "train") from error
    found = load_digits()
    pictures = torch.from_numpy(found.images.astype(np.float32))[:, None] / 8 - 1
    order = np.random.RandomState(0).permutation(len(pictures))  # whose stream numpy never changes
    parts = dict(zip(SPLITS, (order[:1297], order[1297:1497], order[1497:]), strict=True))
    digest = hashlib.sha256(found.images.tobytes() + found.target.tobytes() + order.tobytes()).hexdigest()

    def made(name: str, shape: tuple[int, ...]) -> Dataset[Example]:
        part = parts[name]
        return _Items(len(part), lambda number: (pictures[part[number]], int(found.target[part[number]])), shape)

    return Corpus("builtin:digits", "images", digest, 10, made)


def shapes() -> Corpus:
    """Shapes of any place, size, angle and colour, dark on bright or the reverse, under noise and a line, drawn in the size that the model takes: a
    small ResNet tells nine of ten after 16,000 images, a small ViT half of them."""

    def made(name: str, shape: tuple[int, ...]) -> Dataset[Example]:
        first = SPLITS.index(name) << 32
        size = (min(shape[1], 64), min(shape[2], 64))
        return _Items(_SIZES[name], lambda number: drawn(first + number, size), shape)

    digest = hashlib.sha256(f"{_DRAWN} {SHAPES} {_SIZES}".encode())
    for number in range(len(SHAPES)):
        digest.update(np.round(drawn(number, (32, 32))[0].numpy() * 1e3).astype(np.int16).tobytes())
    return Corpus("builtin:shapes", "images", digest.hexdigest(), len(SHAPES), made)


def drawn(number: int, size: tuple[int, int]) -> tuple[Tensor, int]:
    """An image [3, H, W], and the class of its shape.

    Args:
        number: which decides everything.
        size: height and width.
    """
    generator = np.random.Generator(np.random.PCG64(number))
    label = number % len(SHAPES)
    height, width = size
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    y, x = (y + 0.5) / height * 2 - 1, (x + 0.5) / width * 2 - 1
    radius, angle = generator.uniform(0.4, 0.75), generator.uniform(-0.4, 0.4)
    middle = generator.uniform(-0.3, 0.3, 2)
    u, v = (x - middle[0]) / radius, (y - middle[1]) / radius
    u, v = np.cos(angle) * u + np.sin(angle) * v, np.cos(angle) * v - np.sin(angle) * u
    dark, bright = generator.uniform(-1, -0.1, (3, 1, 1)), generator.uniform(0.1, 1, (3, 1, 1))
    shape, ground = (dark, bright) if generator.uniform() < 0.5 else (bright, dark)
    image = np.where(_inside(SHAPES[label], u, v), shape, ground)
    turn, place = generator.uniform(0, np.pi), generator.uniform(-0.9, 0.9)  # of a line that belongs to no shape
    line = np.abs(np.cos(turn) * x + np.sin(turn) * y - place) < 0.05
    image = np.where(line, generator.uniform(-1, 1, (3, 1, 1)), image)
    noisy = image + generator.normal(0, 0.3, (3, height, width))
    return torch.from_numpy(noisy.astype(np.float32)), label


def _inside(name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether points lie in a shape whose half size is 1."""
    far, wide = np.hypot(u, v), np.maximum(np.abs(u), np.abs(v))
    within: dict[str, Callable[[], Any]] = {
        "disc": lambda: far < 1,
        "ring": lambda: (far < 1) & (far > 0.6),
        "square": lambda: wide < 0.85,
        "frame": lambda: (wide < 0.9) & (wide > 0.55),
        "triangle": lambda: (v < 0.8) & (v > 2 * np.abs(u) - 0.9),
        "cross": lambda: (wide < 0.9) & ((np.abs(u - v) < 0.4) | (np.abs(u + v) < 0.4)),
        "plus": lambda: (wide < 0.95) & ((np.abs(u) < 0.3) | (np.abs(v) < 0.3)),
        "bars": lambda: (wide < 0.95) & (np.abs(u) > 0.35),
        "half disc": lambda: (far < 1) & (v > 0),
        "diamond": lambda: np.abs(u) + np.abs(v) < 1.05,
    }
    return np.asarray(within[name]())


def of_dataset(label: str, dataset: Any) -> Corpus:
    """The columns "image" and "label" of a dataset of `datasets`, split by a fixed permutation, 90, 5 and 5 per cent.

    Raises:
        ConfigError: there are no such columns, or they hold something else.
    """
    columns = list(getattr(dataset, "column_names", ()))
    if not {"image", "label"} <= set(columns):
        raise ConfigError(f"{label} has no columns 'image' and 'label': its columns are {', '.join(map(str, columns)) or 'unknown'}.")
    labels = list(dataset["label"])
    for number, one in enumerate(labels):
        if not isinstance(one, int) or one < 0:
            raise ConfigError(
                f"{label}: the label of row {number} is {one!r}, and must be a number from 0 (-1 stands for none in many data sets)."
            )
    order = np.random.RandomState(0).permutation(len(dataset))
    cuts = (0, len(dataset) * 90 // 100, len(dataset) * 95 // 100, len(dataset))
    parts = {name: order[first:last] for name, first, last in zip(SPLITS, cuts, cuts[1:], strict=False)}
    found = hashlib.sha256(np.asarray([*labels, *order]).tobytes())
    for stored in _stored(label, dataset):
        found.update(len(stored).to_bytes(8, "big") + stored)

    def made(name: str, shape: tuple[int, ...]) -> Dataset[Example]:
        def item(number: int) -> tuple[Tensor, int]:
            pixels = np.asarray(dataset[int(parts[name][number])]["image"].convert("RGB"), np.float32)
            return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1, labels[parts[name][number]]

        return _Items(len(parts[name]), item, shape)

    return Corpus(label, "images", found.hexdigest(), max(labels, default=-1) + 1, made)


def _stored(label: str, dataset: Any) -> Iterator[bytes]:
    """The images as they are kept: decoding them would take as long as an epoch."""
    from datasets import Image

    if not isinstance(dataset.features["image"], Image):
        raise ConfigError(f"{label}: its column 'image' holds no images, but {dataset.features['image']}.")
    for number, row in enumerate(dataset.select_columns("image").cast_column("image", Image(decode=False))):
        kept = row["image"]
        try:
            yield kept["bytes"] if kept["bytes"] is not None else Path(kept["path"]).read_bytes()
        except (TypeError, OSError) as error:  # None, or a file that is gone
            raise ConfigError(f"{label}: row {number} has no image that can be read: {kept!r:.120}.") from error


BUILTIN: dict[str, Callable[[], Corpus]] = {"digits": digits, "shapes": shapes}
