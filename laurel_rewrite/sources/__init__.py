"""MODEL and its inputs: what the word on the command line stands for."""

from __future__ import annotations

import pkgutil
from pathlib import Path


def libraries() -> tuple[str, ...]:
    """The prefixes of MODEL that name a package of architectures: the files of the folder `libraries`."""
    return tuple(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent / "libraries")]))


def is_onnx(model: str) -> bool:
    """Whether a MODEL is an ONNX file."""
    return Path(model).suffix == ".onnx"


def is_graph(model: str) -> bool:
    """Whether a MODEL is a graph in a file, ONNX or an exported program."""
    return is_onnx(model) or Path(model).suffix == ".pt2"
