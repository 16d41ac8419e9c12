"""What there is at a site beside the sum: how the stream got there, what the branch is and reads, which block it belongs to.

All of it is read off the dataflow and the modules' paths, and only when somebody asks (`Sites.spots`): finding the sites needs none of it.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from laurel_rewrite.detection.branches import PROJECTIONS, Branch, LinearMap
from laurel_rewrite.detection.descent import Descent
from laurel_rewrite.detection.residuals import Residual
from laurel_rewrite.detection.site import Binding, Site
from laurel_rewrite.detection.ways import descending, is_scaled_by_position, is_statistic, statistics
from laurel_rewrite.graph.dataflow import Dataflow, Role

ROLES = ("attention", "feed-forward", "convolution", "mixer", "unknown")
_SHARE = 20  # values looked at in all branches together, for each value of the graph: nested branches of long skips hold each other


@dataclass(frozen=True)
class Spot:
    """The static facts of a site's place.

    Attributes:
        link: how the skip follows from the output of the connection before it in the stream: "begin" (there is none), "plain" (views and
            casts alone), "norm" or "activation" (one stands between), "other".
        link_end: name of the value in the graph that a norm or activation there gives; "" for other links.
        last_end: the same of the norm or activation behind the last sum of a stream, in its block, where one stands behind every other block;
            "" elsewhere.
        length: how many connections the stream has.
        owner_class: name of the class of the module whose code adds; "" where the graph does not say.
        block: path of the repeated module that the site lies in ("layers.3"), "" where there is none.
        ends_block: the site is the last of its stream in the block.
        role: what the branch does: one of `ROLES`; several with "+" where the sum has branches of several roles.
        evidence: the ops that say so, and the modules that they run in.
        reads: name of the value in the graph that the branch's first mixing op reads: behind its norm, or the skip where it has none.
        normed: a normalisation stands between the stream and that value.
        projections: paths of the modules that make q, k and v, where each is a linear map of its own; else empty.
        maps: the linear maps of the branch, in the order in which they run.
        scale_free: all that reads the sum, but the next connection's skip, is a normalisation: a factor on the stream changes nothing
            there, epsilons aside.
    """

    link: str
    link_end: str
    last_end: str
    length: int
    owner_class: str
    block: str
    ends_block: bool
    role: str
    evidence: str
    reads: str
    normed: bool
    projections: tuple[str, ...]
    maps: tuple[LinearMap, ...]
    scale_free: bool

    @property
    def projected(self) -> tuple[str, ...]:
        """Names of the values that q, k and v are; none where `projections` are none."""
        made = {linear.projection: linear.value for linear in self.maps}
        return tuple(made[name] for name in PROJECTIONS) if self.projections else ()


def spots_of(sites: Sequence[Site], bindings: Mapping[str, Binding], flow: Dataflow, owner: Callable[[int], str]) -> dict[str, Spot]:
    """The spot of each site, by its id.

    Args:
        sites: in order of execution.
        bindings: of each, by its id.
        flow: in which they lie.
        owner: path of the module whose code computed a value of it.
    """
    return _Anatomist(sites, bindings, flow, owner).spots()


class _Anatomist:
    def __init__(self, sites: Sequence[Site], bindings: Mapping[str, Binding], flow: Dataflow, owner: Callable[[int], str]) -> None:
        self.sites, self.bindings, self.flow, self.owner = sites, bindings, flow, owner
        self.values = self.flow.values
        self.descent = Descent(self.flow)
        self.budget = _SHARE * len(self.values)
        self.outputs = {bindings[site.id].residual.output: site for site in sites}
        self.skips = {bindings[site.id].residual.skip for site in sites}
        self.streams: dict[int, list[Site]] = defaultdict(list)
        for site in sites:
            self.streams[site.stream].append(site)

    def spots(self) -> dict[str, Spot]:
        branches_of: dict[str, list[Branch]] = {}
        for site in self.sites:
            residual = self.bindings[site.id].residual
            branches_of[site.id] = [part for branch in residual.branches for part in self._parts(site, residual, branch)]
        roles = {name: "+".join(dict.fromkeys(branch.role for branch in branches)) for name, branches in branches_of.items()}
        blocks = self._blocks(roles)
        classes = {value.owner: value.owner_class for value in self.values if value.owner_class}
        last = {(site.stream, blocks[site.id]): site.id for site in self.sites}
        links = {site.id: self._link(site) for site in self.sites}
        found = {}
        for site in self.sites:
            branches = branches_of[site.id]
            first = branches[0]
            link, link_end = links[site.id]
            found[site.id] = Spot(
                link=link,
                link_end=link_end,
                last_end=self._last_end(site, blocks, links),
                length=len(self.streams[site.stream]),
                owner_class=classes.get(site.owner, ""),
                block=blocks[site.id],
                ends_block=bool(blocks[site.id]) and last[site.stream, blocks[site.id]] == site.id,
                role=roles[site.id],
                evidence="; ".join(dict.fromkeys(branch.evidence for branch in branches if branch.evidence)),
                reads=self.values[first.reads].name,
                normed=first.normed,
                projections=next((branch.projections() for branch in branches if branch.projections()), ()),
                maps=tuple(linear for branch in branches for linear in branch.maps()),
                scale_free=self._scale_free(self.bindings[site.id].residual.output),
            )
        return found

    def _between(self, source: int, target: int) -> list[int]:
        """What lies on ways from one value to another, these included, in topological order; these alone where that is too much to look at."""
        back = sorted(itertools.islice(self.descent.between(source, target), self.budget + 1))
        self.budget -= min(len(back), self.budget)
        return descending(self.flow, source, back) if self.budget else [source, target]

    def _parts(self, site: Site, residual: Residual, branch: int) -> list[Branch]:
        """A branch; or what it is the sum of: an attention beside a feed-forward that are added before they are added to the skip."""
        inside = self._between(residual.source, branch)
        if residual.skip in inside:  # else they part before it, behind a view of the skip's own
            inside = descending(self.flow, residual.skip, [i for i in inside if i >= residual.skip])
        start, members = inside[0], set(inside)
        parts, found = [branch], []
        for index in parts:  # grows
            value = self.values[index]
            read = [o for o in value.inputs if o in members]
            if value.role is Role.TRANSPARENT and len(read) == 1 and read[0] != start:
                parts.append(read[0])
            elif value.role is Role.SUM and len(read) > 1 and start not in read:
                parts += read
            else:
                found.append(index)
        if len(found) < 2:
            return [Branch(self.flow, self.owner, site, inside)]
        return [Branch(self.flow, self.owner, site, self._between(start, part)) for part in found]

    def _link(self, site: Site) -> tuple[str, str]:
        """What stands between the skip and the output of the connection before, and the name of the value that it ends in."""
        if site.index == 0:
            return "begin", ""
        before = self.bindings[self.streams[site.stream][site.index - 1].id].residual.output
        skip = self.bindings[site.id].residual.skip
        kind = self._kind_of([i for i in self._between(before, skip) if i != before], site.axis)
        end = skip
        while self.values[end].role is Role.TRANSPARENT and self.values[end].inputs:
            end = self.values[end].inputs[0]
        return kind, self.values[end].name if kind in ("norm", "activation") else ""

    def _kind_of(self, between: Sequence[int], axis: int) -> str:
        """What some values on the way from one sum to the next are together."""
        kinds = [self.values[i].kind for i in between if self.values[i].role is not Role.TRANSPARENT]
        if not kinds:
            return "plain"
        if any(kind.norm for kind in kinds) or statistics(self.flow, between, axis):
            return "norm"
        return "activation" if all(kind.role is Role.POINTWISE for kind in kinds) else "other"

    def _last_end(self, site: Site, blocks: Mapping[str, str], links: Mapping[str, tuple[str, str]]) -> str:
        """Where the norm or activation behind a stream's last sum ends, if that stands in its block as it does in all others."""
        stream, block = self.streams[site.stream], blocks[site.id]
        others = {links[after.id][0] for before, after in itertools.pairwise(stream) if blocks[before.id] != blocks[after.id]}
        if site is not stream[-1] or not block or len(others) != 1 or not others <= {"norm", "activation"}:
            return ""
        end = -1
        for index, between in self._passed(self.bindings[site.id].residual.output, block):
            if end < 0:
                end = index if self._kind_of(between, site.axis) in others else end
            elif self.owner(index) == self.owner(end) and self._keeps_positions(index):
                end = index
            else:
                break
        return self.values[end].name if end >= 0 else ""

    def _keeps_positions(self, index: int) -> bool:
        """Whether a value is another in the same places: a view, an activation, or it scaled or biased by weights."""
        value = self.values[index]
        return value.role in (Role.TRANSPARENT, Role.POINTWISE) or (
            value.role is Role.SUM and sum(self.values[operand].data for operand in value.inputs) == 1
        )

    def _passed(self, start: int, block: str) -> Iterator[tuple[int, list[int]]]:
        """The values of a block that everything goes through which is computed from another, and for each those on the way to it, it included."""
        flow, between, reach = self.flow, list[int](), start
        queue = [start]
        while queue:
            index = heapq.heappop(queue)
            if index != start:
                if not f"{self.owner(index)}.".startswith(f"{block}."):
                    return
                between.append(index)
                if index >= reach:
                    yield index, list(between)
            if index in flow.outputs:
                return
            readers = {reader for reader in flow.readers[index] if reader in flow.live and self.values[reader].data}
            reach = max(readers | {reach})
            for reader in readers.difference(queue):
                heapq.heappush(queue, reader)

    def _blocks(self, roles: Mapping[str, str]) -> dict[str, str]:
        """For each site the repeated module around it: the deepest numbered one all of whose sisters have the same sites in the stream, by
        their roles; where there is none, the deepest that has such a sister."""
        found = {}
        for sites in self.streams.values():
            inside: dict[str, list[tuple[str, str]]] = defaultdict(list)
            for site in sites:
                for path in numbered(site.owner):
                    inside[path].append((site.id.removeprefix(path), roles[site.id]))
            sisters: dict[str, Counter[tuple[tuple[str, str], ...]]] = defaultdict(Counter)
            for path, content in inside.items():
                sisters[_family(path)][tuple(content)] += 1
            for site in sites:
                around = [(path, sisters[_family(path)]) for path in numbered(site.owner)]
                repeated = [path for path, counts in around if counts[tuple(inside[path])] > 1]
                uniform = [path for path, counts in around if path in repeated and len(counts) == 1]
                found[site.id] = (uniform or repeated or [""])[-1]
        return found

    def _scale_free(self, output: int) -> bool:
        """Whether only normalisations read a sum, and the sums that it is the skip of."""
        flow, axis = self.flow, self.outputs[output].axis
        names, read = [output], False
        for name in names:  # grows by views, and by what is the sum less its mean
            if name in flow.outputs:
                return False
            for reader in flow.readers[name]:
                value = self.values[reader]
                if not value.data:  # its shape alone
                    continue
                if value.role is Role.TRANSPARENT or (value.kind.subtracts and is_scaled_by_position(flow, reader, axis)):
                    names.append(reader)
                elif value.role is Role.SUM and name in self.skips:
                    continue
                elif value.kind.scaleless or is_statistic(flow, reader, axis) or is_scaled_by_position(flow, reader, axis):
                    read = True
                elif not self._only_measures(reader, axis):
                    return False
        return read

    def _only_measures(self, index: int, axis: int) -> bool:
        """Whether a value is a square, or the like, of which only the mean over the features is taken."""
        if self.values[index].role is not Role.POINTWISE or len({o for o in self.values[index].inputs if self.values[o].data}) != 1:
            return False
        return all(is_statistic(self.flow, reader, axis) for reader in self.flow.readers[index])


def numbered(path: str) -> Iterator[str]:
    """The prefixes of a module's path that end in a number ("layers.3", "stage2.b1"), shortest first."""
    parts = path.split(".")
    yield from (".".join(parts[: n + 1]) for n, part in enumerate(parts) if part[-1:].isdigit())


def _family(path: str) -> str:
    """A numbered path without its number: what its sisters have in common."""
    return path.rstrip("0123456789")
