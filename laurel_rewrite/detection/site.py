"""One site: a residual connection, how it hangs in graph and source, and where that is in words; and a sum that is none."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from laurel_rewrite.detection.residuals import Residual
from laurel_rewrite.graph.capture import Call


@dataclass(frozen=True)
class Site:
    """One residual connection.

    Attributes:
        id: owner's module path, `laurel_` and an ordinal: where the LAuReL module goes, and so the prefix of its parameters'
            names. A loop adds ".turn"; a further call of a shared module adds "@call".
        kind: "identity" (x + f(x)), "projection" (ResNet's downsample) or "partial" (the skip is a slice of what the branch reads).
        owner: path of the module whose code adds; "" is the model itself.
        where: "file:line" of the add.
        shape: of the sum, as captured.
        axis: feature axis, -1 or 1.
        dim: D, its size; None where unknown.
        stream: number of the stream.
        index: position in the stream, from 0.
    """

    id: str
    kind: str
    owner: str
    where: str
    shape: tuple[int | str, ...]
    axis: int
    dim: int | None
    stream: int
    index: int

    @property
    def module(self) -> str:
        """Path of the LAuReL module, which the calls of a shared module have in common."""
        return self.id.split("@")[0]


@dataclass(frozen=True)
class Rejected:
    """A sum that is no site: where it stands, the module whose code adds, the reason, and the particulars."""

    where: str
    owner: str
    reason: str
    detail: str


Adds = tuple[tuple[str, int, Call | None], ...]


@dataclass(frozen=True)
class Binding:
    """How a site hangs in the captured graph and in the source; the back ends work from it.

    Attributes:
        residual: the sum in the dataflow.
        adds: the binary adds from the skip outwards: graph node, operand (0 or 1) that holds the skip, recorded call or None.
        twins: the adds of other places where the source writes the same connection, of which a pass runs one.
        turn: which execution of its source line in one call of the owner this is, None where there is one only.
        turns: how many executions there are.
        holder: path of the module whose call is one pass of the site's stream.
    """

    residual: Residual
    adds: Adds
    twins: tuple[Adds, ...] = ()
    turn: int | None = None
    turns: int = 1
    holder: str = ""

    @property
    def places(self) -> tuple[Adds, ...]:
        """The adds of every place where the source writes the connection."""
        return (self.adds, *self.twins)


def short(where: str) -> str:
    """The last two parts of a file's path, and the line: enough to find it."""
    path, colon, line = where.rpartition(":")
    return "/".join(path.split("/")[-2:]) + colon + line if "/" in path else where


def path_moved(path: str, old: str, new: str) -> str:
    """A module's path with another beginning: seen from a module inside (old = "inside.", new = ""), or from one around (the reverse)."""
    inside = f"{path}.".removeprefix(old) if path else ""
    return f"{new}{inside}".removesuffix(".")


def portable(where: str) -> str:
    """ "file:line" without what is true on one machine only: the path of the file's module, such as "timm/layers/mlp.py:40".

    A file that is no imported module keeps its name alone.
    """
    path, colon, line = where.rpartition(":")
    if not os.path.isabs(path):
        return where
    for folder in ("/site-packages/", "/dist-packages/"):
        if folder in path:
            return path.rpartition(folder)[2] + colon + line
    name = next((name for name, module in list(sys.modules.items()) if getattr(module, "__file__", None) == path), "")
    depth = name.count(".") + (path.endswith("/__init__.py") and name != "__main__")
    return "/".join(path.split("/")[-1 - depth :]) + colon + line
