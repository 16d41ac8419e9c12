"""x + f in the place of an operator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from laurel_rewrite.operators.config import SiteConfig
from laurel_rewrite.operators.protocol import Connection
from laurel_rewrite.operators.sums import add


class Plain(Connection):
    """x + f in the place of another connection, to see what an insertion does without the operator."""

    name = "plain"
    formula = "x + f"

    @staticmethod
    def like(other: Connection) -> Plain:
        """For the place of another connection."""
        facts = other.config.but(variant=Plain.name, lags=0, leaves=0, linked=False, separate=False, fed=False).to_dict()
        return Plain(SiteConfig(**{name: value for name, value in facts.items() if name not in other.config.options}), site=other.site)

    def skip(self, x: Tensor, *state: Tensor) -> Tensor:
        return x

    def branch(self, f: Tensor) -> Tensor:
        return f


@contextlib.contextmanager
def adding_plainly(connections: Iterable[Connection]) -> Iterator[None]:
    """Connections add x + f for a while, and hand on no state: for all of a stream that has a history, or none."""
    changed = list(connections)
    try:
        for module in changed:
            module.plain = True
            module.branch = _as_it_is  # type: ignore[method-assign]  # on the instance: a further branch of the sum is asked for alone
        yield
    finally:
        for module in changed:
            module.plain = False
            vars(module).pop("branch", None)


def _as_it_is(f: Tensor) -> Tensor:
    return f


class PlainResidual(nn.Module):
    """x + f: a turn of a loop that keeps its plain residual connection."""

    def __init__(self, side: int = 0) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor, f: Tensor) -> Tensor:
        return add(x, f, self.side)
