"""A pass says what it needs, does one thing, says what it changed; the runner holds it to that."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

Graph = TypeVar("Graph")


@dataclass(frozen=True)
class PassResult(Generic[Graph]):
    """What a pass did: the graph, and one word of identification for each change."""

    graph_module: Graph
    changed: tuple[str, ...]

    @property
    def modified(self) -> bool:
        """Whether it did anything: the question that torch.fx's PassManager asks."""
        return bool(self.changed)


class Pass(ABC, Generic[Graph]):
    """One change to graphs of one kind, made in place.

    ==========  =======  ===================
    method      mutates  raises
    ==========  =======  ===================
    `requires`  no       where it cannot be
    `call`      yes      no
    `ensures`   no       where it went wrong
    ==========  =======  ===================
    """

    def requires(self, graph: Graph) -> None:
        """Check everything that `call` relies on; raise before anything is changed."""

    @abstractmethod
    def call(self, graph: Graph) -> PassResult[Graph]:
        """Change the graph."""

    def ensures(self, result: PassResult[Graph]) -> None:
        """Check what `call` left behind."""

    def __call__(self, graph: Graph) -> PassResult[Graph]:
        self.requires(graph)
        result = self.call(graph)
        self.ensures(result)
        return result
