"""Who descends from whom in a dataflow, and how: plainly, through a mixing op, or only where no gradient passes.

Topological order bounds every walk back: an ancestor of a value comes before it. Each walk spares the later ones what it has seen,
so that many walks together take time near-linear in the size of the graph.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence

from laurel_rewrite.graph.dataflow import Dataflow, Role

PLAIN, MIXED, CUT = 1, 2, 4  # bits: reached without, with a mixing op on the way, or through a cut
CARRIED = PLAIN | MIXED  # a gradient passes
_WIDTH = 3  # bits a start
_ANY = CARRIED | CUT
_ENTRIES = 16  # a region with more ways out than this is walked each time


class Descent:
    """Walks over one dataflow."""

    def __init__(self, flow: Dataflow) -> None:
        self.values = flow.values
        self.jumps: dict[int, tuple[int, list[tuple[int, int]]]] = {}  # start -> lowest value passed, where the region is left and how

    def ways(self, starts: Sequence[int], targets: Iterable[int]) -> dict[int, int]:
        """For each target, how each start descends from it: three bits a start, start 0 lowest.

        One walk back in reverse topological order, down to the lowest target. A walk leaves a jump at each start: what lies between
        the start and the floor is passed in one step by every later walk that looks for nothing in between. So nested regions and
        long-range sums (a U-Net, a tower beside a tower) are walked once, not once for each sum.
        """
        wanted = sorted(set(targets))
        floor = wanted[0]
        ways: dict[int, int] = {}
        heap: list[int] = []
        below: dict[int, int] = {}  # reached, but not walked through
        for position, start in enumerate(starts):
            if start not in ways:
                heapq.heappush(heap, -start)
            ways[start] = ways.get(start, 0) | PLAIN << _WIDTH * position
        plains = every(PLAIN, len(starts))
        lowest = max(starts)
        while heap:
            node = -heapq.heappop(heap)
            reached = ways[node]
            while wanted and wanted[-1] >= node:
                wanted.pop()
            if node <= floor:
                below[node] = below.get(node, 0) | reached
                continue
            lowest = min(lowest, node)
            jump = self.jumps.get(node)
            if jump is not None and (not wanted or wanted[-1] < jump[0]):
                lowest = min(lowest, jump[0])
                steps = [(entry, _through(reached, how, plains)) for entry, how in jump[1]]
            else:
                value = self.values[node]
                how = CUT if value.kind.cut else MIXED if value.role is Role.MIXING else PLAIN
                carried = _through(reached, how, plains)
                steps = [(operand, carried) for operand in value.inputs if self.values[operand].data]
            for operand, carried in steps:
                if operand < floor:
                    below[operand] = below.get(operand, 0) | carried
                elif operand in ways:
                    ways[operand] |= carried
                else:
                    ways[operand] = carried
                    heapq.heappush(heap, -operand)
        for position, start in enumerate(starts):
            entries = [(entry, how) for entry, mask in below.items() if (how := mask >> _WIDTH * position & _ANY)]
            if start > floor and len(entries) <= _ENTRIES:
                self.jumps[start] = (lowest, entries)
        return {target: ways.get(target, 0) for target in targets}

    def between(self, source: int, index: int, *, upsampled: bool = True) -> Iterator[int]:
        """`index` and its ancestors down to `source`, as far as a gradient passes; without `upsampled`, as far as nothing is enlarged."""
        found, stack = {index}, [index]
        while stack:
            value = self.values[stack.pop()]
            yield value.index
            if value.index == source or value.kind.cut or (value.kind.upsample and not upsampled):
                continue
            for operand in value.inputs:
                if operand >= source and operand not in found and self.values[operand].data:
                    found.add(operand)
                    stack.append(operand)


def every(how: int, starts: int) -> int:
    """These bits for each of so many starts."""
    return how * (((1 << _WIDTH * starts) - 1) // _ANY)


def without(ways: int, position: int) -> int:
    """The ways of the other starts."""
    return ways & ~(_ANY << _WIDTH * position)


def by(ways: int, how: int) -> list[int]:
    """The starts that descend in one of these ways."""
    return [position for position in range(-(-ways.bit_length() // _WIDTH)) if ways >> _WIDTH * position & how]


def _through(reached: int, how: int, plains: int) -> int:
    """The ways behind a step of this kind: plain ones stay what they are, a mixing op mixes, behind a cut all is cut."""
    ways = reached if how & PLAIN else 0
    if how & MIXED:
        ways |= (reached & plains) << 1 | reached & (plains << 1 | plains << 2)
    if how & CUT:
        ways |= (reached & plains) << 2 | (reached & plains << 1) << 1 | reached & plains << 2
    return ways
