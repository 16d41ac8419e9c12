"""A model that was built, and what its builders share."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from laurel_rewrite.errors import CaptureError, ConfigError, MissingPackageError, missing, nearest
from laurel_rewrite.sources import libraries

TRAINED_BY = ("loss", "dataset")
"""Names of functions in a model's file: `loss(model, batch)` gives a scalar, `dataset(split)` a map-style dataset."""
_stubs: list[Any] = []


@dataclass
class Built:
    """A model with inputs of its forward.

    Attributes:
        spec: the MODEL it was built from.
        settings: what was set with `--set`.
        files: source files beside the model's own that its classes need, by path relative to the model's folder.
        folder: of the checkpoint that its weights are from, where they are from one.
        offers: functions that the model's file offers for training, of `TRAINED_BY`.
        notes: sentences for the user on how it came about.
        resizable: whether it runs with other sizes of batch than that of its inputs.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    spec: str
    settings: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    folder: Path | None = None
    offers: dict[str, Callable[..., Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    resizable: bool = True

    @property
    def weights(self) -> str:
        """Where the weights are from, in words; "" where that is the model's own affair."""
        if self.folder is not None:
            return f"weights of {self.folder.name}"
        return "random weights" if self.spec.partition(":")[0] in libraries() else ""

    @property
    def parameters(self) -> int:
        """Number of parameters of the model."""
        return sum(p.numel() for p in self.model.parameters())


def made_on(device: str, build: Callable[[], Any]) -> Any:
    """What `build` makes, on a device."""
    if device == "cpu":
        return build()
    try:
        with torch.device(device):
            return build()
    except NotImplementedError:  # some compute their sizes with tensors, as RegNet does, and the meta device has no values to read
        return build().to(device)


def unbuilt(label: str, settings: Mapping[str, Any], error: Exception) -> ConfigError | CaptureError:
    """What to raise where a library does not build an architecture: with settings, it is these that cannot be meant."""
    if not settings:
        return CaptureError(f"{label} could not be built: {type(error).__name__}: {error}")
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    refused = re.match(r"(\w+)\.__init__\(\)", str(error))
    cls = {**frame.f_globals, **frame.f_locals}.get(refused[1]) if refused else None
    cls = cls or next((v for v in frame.f_locals.values() if refused and isinstance(v, type) and v.__name__ == refused[1]), None)
    known = inspect.signature(cls).parameters if isinstance(cls, type) else ()
    return ConfigError(f"{label}: {error}. {near_argument(error, known)}".rstrip())


def near_argument(error: BaseException, known: Iterable[str]) -> str:
    """The argument names nearest to the one that a call complains of; "" where it complains of something else."""
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    return nearest(found[1], known) if found else ""


def require(package: str) -> None:
    """Raise MissingPackageError unless a package is installed; torchvision's import is made ready."""
    if importlib.util.find_spec(package) is None:
        raise missing(package, "zoo")
    if importlib.util.find_spec("torchvision") is not None:
        declare_torchvision_ops()


def declare_torchvision_ops() -> None:
    """Let torchvision be imported beside a PyTorch that it has no compiled ops for, by declaring the two ops that its import wants."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch types it not
        for op in ("nms", "qnms"):
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _stubs.append(library)
        importlib.import_module("torchvision")
    except ImportError as error:
        raise MissingPackageError(f"torchvision is installed but cannot be imported: {error}") from error
