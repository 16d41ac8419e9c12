"""Sums of several branches whose adds run one by one, in the place of which an operator gets all branches at once."""

from __future__ import annotations

from torch import Tensor, nn

from laurel_rewrite.errors import LaurelError
from laurel_rewrite.operators.state import Slot
from laurel_rewrite.operators.sums import add


class SumInParts(nn.Module):
    """What a connection that is not additive does at each add of its sum.

    Attributes:
        held: skip and branches of a sum whose outermost add comes later.
    """

    site: str
    sides: tuple[int, ...]
    plain: bool

    def __init__(self) -> None:
        super().__init__()
        self.held = Slot()

    def first_add(self, x: Tensor, f: Tensor) -> Tensor:
        """The innermost add of a sum of several branches, of an operator that is not additive: it stays, and is held for `last_add`."""
        self.held.value = (x, f)
        return add(x, f, self.sides[0])

    def next_branch(self, f: Tensor) -> Tensor:
        """A branch that is added in between: it is added as it is, and held, too."""
        x, held = self._held()
        self.held.value = (x, held + f)
        return f

    def last_add(self, x: Tensor, f: Tensor) -> Tensor:
        """The new value in the place of the outermost add, of the skip and the sum of the branches, in another order of adds than the source's."""
        skip, held = self._held()
        self.held.value = None
        out: Tensor = self(skip, held + f)
        return add(x, f, 0) if self.plain else out

    def _held(self) -> tuple[Tensor, ...]:
        if self.held.value is None:
            raise LaurelError(f"{self.site}: an outer add of this sum ran without the inner ones.")
        return self.held.value
