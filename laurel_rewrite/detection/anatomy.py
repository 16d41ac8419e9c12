"""What there is at a site beside the sum: how the stream got there, what the branch is and reads, which block it belongs to.

All of it is read off the dataflow and the modules' paths, and only when somebody asks (`Sites.spots`): finding the sites needs none of it.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from laurel_rewrite.detection.descent import Descent
from laurel_rewrite.detection.residuals import Residual
from laurel_rewrite.detection.site import Binding, Site
from laurel_rewrite.graph.dataflow import Dataflow, Role

ROLES = ("attention", "feed-forward", "convolution", "mixer", "unknown")
_REACH = 12  # pointwise ops between a softmax and the product that its weights go into
_SHARE = 20  # values looked at in all branches together, for each value of the graph: nested branches of long skips hold each other


@dataclass(frozen=True)
class Spot:
    """The static facts of a site's place.

    Attributes:
        link: how the skip follows from the output of the connection before it in the stream: "begin" (there is none), "plain" (views and
            casts alone), "norm" or "activation" (one stands between), "other".
        link_end: name of the value in the graph that a norm or activation there gives; "" for other links.
        length: how many connections the stream has.
        block: path of the repeated module that the site lies in ("layers.3"), "" where there is none.
        ends_block: the site is the last of its stream in the block.
        role: what the branch does: one of `ROLES`; several with "+" where the sum has branches of several roles.
        evidence: the ops that say so, and the modules that they run in.
        reads: name of the value in the graph that the branch's first mixing op reads: behind its norm, or the skip where it has none.
        normed: a normalisation stands between the stream and that value.
        projections: paths of the modules that make q, k and v, where each is a linear map of its own; else empty.
        maps: names of the values in the graph that these give.
        scale_free: all that reads the sum, but the next connection's skip, is a normalisation: a factor on the stream changes nothing
            there, epsilons aside.
    """

    link: str
    link_end: str
    length: int
    block: str
    ends_block: bool
    role: str
    evidence: str
    reads: str
    normed: bool
    projections: tuple[str, ...]
    maps: tuple[str, ...]
    scale_free: bool


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
        branches_of: dict[str, list[_Branch]] = {}
        for site in self.sites:
            residual = self.bindings[site.id].residual
            branches_of[site.id] = [part for branch in residual.branches for part in self._parts(site, residual, branch)]
        roles = {name: "+".join(dict.fromkeys(branch.role for branch in branches)) for name, branches in branches_of.items()}
        blocks = self._blocks(roles)
        last = {(site.stream, blocks[site.id]): site.id for site in self.sites}
        found = {}
        for site in self.sites:
            branches = branches_of[site.id]
            first = branches[0]
            link, link_end = self._link(site)
            maps = next((branch.projections for branch in branches if branch.projections), ())
            found[site.id] = Spot(
                link=link,
                link_end=link_end,
                length=len(self.streams[site.stream]),
                block=blocks[site.id],
                ends_block=bool(blocks[site.id]) and last[site.stream, blocks[site.id]] == site.id,
                role=roles[site.id],
                evidence="; ".join(dict.fromkeys(branch.evidence for branch in branches if branch.evidence)),
                reads=self.values[first.reads].name,
                normed=first.normed,
                projections=tuple(self.owner(index) for index in maps),
                maps=tuple(self.values[index].name for index in maps),
                scale_free=self._scale_free(self.bindings[site.id].residual.output),
            )
        return found

    def _between(self, source: int, target: int) -> list[int]:
        """What lies on ways from one value to another, these included, in topological order; these alone where that is too much to look at."""
        back = sorted(itertools.islice(self.descent.between(source, target), self.budget + 1))
        self.budget -= min(len(back), self.budget)
        return descending(self.flow, source, back) if self.budget else [source, target]

    def _parts(self, site: Site, residual: Residual, branch: int) -> list[_Branch]:
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
            return [_Branch(self, site, inside)]
        return [_Branch(self, site, self._between(start, part)) for part in found]

    def _link(self, site: Site) -> tuple[str, str]:
        """What stands between the skip and the output of the connection before, and the name of the value that it ends in."""
        if site.index == 0:
            return "begin", ""
        before = self.bindings[self.streams[site.stream][site.index - 1].id].residual.output
        skip = self.bindings[site.id].residual.skip
        between = [i for i in self._between(before, skip) if i != before]
        kinds = [self.values[i].kind for i in between if self.values[i].role is not Role.TRANSPARENT]
        if not kinds:
            return "plain", ""
        end = skip
        while self.values[end].role is Role.TRANSPARENT and self.values[end].inputs:
            end = self.values[end].inputs[0]
        if any(kind.norm for kind in kinds) or statistics(self.flow, between, site.axis):
            return "norm", self.values[end].name
        return ("activation", self.values[end].name) if all(kind.role is Role.POINTWISE for kind in kinds) else ("other", "")

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
                if value.role is Role.TRANSPARENT or (value.kind.subtracts and is_scaled_by_position(flow, reader, axis)):
                    names.append(reader)
                elif value.role is Role.SUM and name in self.skips:
                    continue
                elif value.kind.norm or is_statistic(flow, reader, axis) or is_scaled_by_position(flow, reader, axis):
                    read = True
                elif not self._only_measures(reader, axis):
                    return False
        return read

    def _only_measures(self, index: int, axis: int) -> bool:
        """Whether a value is a square, or the like, of which only the mean over the features is taken."""
        if self.values[index].role is not Role.POINTWISE or len({o for o in self.values[index].inputs if self.values[o].data}) != 1:
            return False
        return all(is_statistic(self.flow, reader, axis) for reader in self.flow.readers[index])


class _Branch:
    """One branch: the values between where it leaves the stream and the sum."""

    def __init__(self, anatomist: _Anatomist, site: Site, inside: list[int]) -> None:
        self.site, self.source, self.inside = site, inside[0], inside
        self.flow, self.values, self.owner = anatomist.flow, anatomist.values, anatomist.owner
        self.members = set(inside)
        self.shape = self.values[self.source].shape or ()
        self.feature = len(self.shape) - 1 if site.axis == -1 else site.axis
        self.axes = self._follow_axes()
        self.statistics = statistics(self.flow, self.inside, site.axis)
        self.attention = self._attention()
        self.role, deciding = self._role()
        self.evidence = self._evidence(deciding)
        self.reads, self.normed = self._entry()
        self.projections = self._projections()

    def _evidence(self, deciding: Sequence[int]) -> str:
        words = [f"{self.values[i].op} in {owner}" if (owner := self.owner(i)) else self.values[i].op for i in deciding]
        return ", ".join(dict.fromkeys(words))

    def _follow_axes(self) -> dict[int, tuple[int | None, ...]]:
        """Which dimension of the stream each dimension of a value is, for as long as that is known."""
        axes: dict[int, tuple[int | None, ...]] = {self.source: tuple(range(len(self.shape)))}
        for i in self.inside[1:]:
            value = self.values[i]
            before = next((o for o in value.inputs if o in axes and o in self.members), None)
            if before is None or value.shape is None:
                continue
            known = axes[before]
            if value.role is Role.TRANSPARENT:
                if value.axes is not None:
                    axes[i] = tuple(known[a] if a is not None and a < len(known) else None for a in value.axes)
            elif len(value.shape) == len(known):
                axes[i] = known
        return axes

    def _attention(self) -> tuple[int, ...]:
        """The ops that mix positions by weights computed from data: one, or a softmax between two products."""
        for i in self.inside:
            value = self.values[i]
            if value.kind.attends:
                return (i,)
            if value.kind.softmax:
                read = [j for j in ahead(self.flow, i) if j in self.members and self._is_product(j)]
                scores = next((j for j in behind(self.flow, i) if j in self.members and self._is_product(j)), None)
                if read and scores is not None:
                    return (scores, i, read[0])
        return ()

    def _is_product(self, index: int) -> bool:
        """Whether a value is a product of two tensors that both depend on data."""
        value = self.values[index]
        return value.role is Role.MIXING and not value.kind.softmax and sum(self.values[o].data for o in value.inputs) >= 2

    def _role(self) -> tuple[str, Sequence[int]]:
        """The branch's role, and the values that say so."""
        if self.attention:
            return "attention", self.attention
        mixing = [i for i in self.inside[1:] if self.values[i].role is Role.MIXING and not self.values[i].kind.norm]
        mixing = [i for i in mixing if i not in self.statistics]
        wide = [i for i in mixing if self.values[i].kind.wide and self.values[i].kind.axis is not None]
        products = [i for i in mixing if self._is_product(i) and not self.values[i].kind.linear]
        if wide and not products:
            return "convolution", wide[:1]
        features = [i for i in mixing if self._over_features(i)]
        positions = products + [i for i in mixing if i not in set(features)] + [i for i in self.inside[1:] if self._takes_positions(i)]
        if any(self.values[i].kind.routes for i in mixing):
            return ("feed-forward", features[:2]) if features else ("unknown", ())
        if positions:
            return "mixer", positions[:1]
        return ("feed-forward", features[:2]) if features else ("unknown", ())

    def _takes_positions(self, index: int) -> bool:
        """Whether a value is a part of another along the positions: a recurrence written out, a shift of tokens."""
        value = self.values[index]
        operand = self.values[value.inputs[0]] if value.inputs else value
        if value.role is not Role.SLICE or value.shape is None or operand.shape is None or operand.index not in self.axes:
            return False
        known = self.axes[operand.index]
        if len(value.shape) < len(operand.shape):  # one position, where the features are left whole
            return known[-1] == self.feature and value.shape[-1] == operand.shape[-1]
        return any(a != b and of not in (self.feature, None) for of, a, b in zip(known, value.shape, operand.shape, strict=False))

    def _over_features(self, index: int) -> bool:
        """Whether a linear op combines features alone."""
        value = self.values[index]
        if value.kind.axis is None or not value.kind.linear or value.kind.upsample or value.kind.pools:
            return False
        operand = next((o for o in value.inputs if o in self.members), None)
        known = self.axes.get(operand) if operand is not None else None
        if known is None or len(known) <= max(value.kind.axis, -value.kind.axis - 1):
            return True  # behind a reshape: rows of features, as far as can be seen
        return known[value.kind.axis] in (self.feature, None)

    def _entry(self) -> tuple[int, bool]:
        """The last single value, in the stream's own form, that all of the branch goes through before its first mixing op that is no norm."""
        entry, normed = self.source, False
        passed = False  # a norm since the source
        farthest = self.source
        readers = self.flow.readers
        identity = tuple(range(len(self.shape)))
        for i in self.inside:
            value = self.values[i]
            if i != self.source:
                if value.role is Role.MIXING and not value.kind.norm and i not in self.statistics:
                    break
                if value.role is Role.SLICE or (value.role is Role.SUM and sum(o in self.members for o in value.inputs) > 1):
                    break
                passed = passed or value.kind.norm or i in self.statistics
                if farthest <= i and value.shape == self.shape and self.axes.get(i) == identity:
                    entry, normed = i, passed
            farthest = max([farthest, *(r for r in readers[i] if r in self.members)])
        return entry, normed

    def _projections(self) -> tuple[int, ...]:
        """The maps of q, k and v, where three linear ones read the branch's input."""
        if not self.attention:
            return ()
        if len(self.attention) == 1:
            operands = list(self.values[self.attention[0]].inputs[:3])
        else:
            scores, softmax, read = (self.values[i] for i in self.attention)
            weights = {softmax.index, *ahead(self.flow, softmax.index)}
            operands = [*scores.inputs[:2], *(o for o in read.inputs[:2] if o not in weights)][:3]
        maps = [self._map_behind(operand) for operand in operands]
        found = [index for index in maps if index is not None]
        if len(found) != 3 or len(set(found)) != 3:
            return ()
        return tuple(found)

    def _map_behind(self, operand: int) -> int | None:
        """The linear map of the branch's input that an operand comes from; None where there is none, or more than one."""
        found: set[int] = set()
        stack, seen = [operand], {operand}
        while stack:
            value = self.values[stack.pop()]
            if value.index not in self.members:
                continue
            if value.role is Role.MIXING and value.kind.linear and value.kind.axis is not None and not value.kind.norm:
                found.add(value.index)
                continue
            for o in value.inputs:
                if o not in seen:
                    seen.add(o)
                    stack.append(o)
        return found.pop() if len(found) == 1 else None


# Walks


def between(flow: Dataflow, start: int, end: int) -> list[int]:
    """What lies on ways from one value to another, these included, in topological order."""
    return descending(flow, start, sorted(Descent(flow).between(start, end)))


def descending(flow: Dataflow, source: int, among: Sequence[int]) -> list[int]:
    """A value and those that are computed from it among others, which are in topological order."""
    found = {source: None}
    for index in among:
        if any(o in found for o in flow.values[index].inputs):
            found[index] = None
    return list(found)


def statistics(flow: Dataflow, inside: Sequence[int], axis: int) -> set[int]:
    """Those of these values that are statistics; see `is_statistic`."""
    return {index for index in inside if is_statistic(flow, index, axis)}


def is_statistic(flow: Dataflow, index: int, axis: int) -> bool:
    """Whether a value is one number for each position, such as the mean square that a normalisation written out divides by."""
    value = flow.values[index]
    if value.role is not Role.MIXING or value.kind.norm or value.kind.softmax or value.shape is None:
        return False
    if sum(flow.values[o].data for o in value.inputs) != 1:
        return False
    operand = flow.values[value.inputs[0]].shape
    if operand is None or len(operand) != len(value.shape) or not -len(operand) <= axis < len(operand):
        return False
    rest = (n for n in range(len(operand)) if n != axis % len(operand))
    return value.shape[axis] == 1 != operand[axis] and all(operand[n] == value.shape[n] for n in rest)


def is_scaled_by_position(flow: Dataflow, index: int, axis: int) -> bool:
    """Whether a value combines a tensor with one number for each of its positions: the end of a normalisation written out."""
    value = flow.values[index]
    if value.role is not Role.POINTWISE or value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return False
    shapes = [flow.values[o].shape for o in value.inputs if flow.values[o].data]
    smaller = [s for s in shapes if s is not None and len(s) == len(value.shape) and s[axis] == 1 != value.shape[axis]]
    return len(shapes) == 2 and len(smaller) == 1


def numbered(path: str) -> Iterator[str]:
    """The prefixes of a module's path that end in a number ("layers.3", "stage2.b1"), shortest first."""
    parts = path.split(".")
    yield from (".".join(parts[: n + 1]) for n, part in enumerate(parts) if part[-1:].isdigit())


def _family(path: str) -> str:
    """A numbered path without its number: what its sisters have in common."""
    return path.rstrip("0123456789")


def ahead(flow: Dataflow, start: int) -> list[int]:
    """What reads a value, through pointwise ops and views, up to the next mixing ops, these included."""
    found: dict[int, None] = {}
    level = [start]
    for _ in range(_REACH):
        level = [r for r in dict.fromkeys(r for name in level for r in flow.readers[name]) if r not in found]
        found |= dict.fromkeys(level)
        level = [r for r in level if flow.values[r].role in (Role.TRANSPARENT, Role.POINTWISE)]
    return list(found)


def behind(flow: Dataflow, start: int) -> list[int]:
    """What a value is computed from, down to the next mixing ops, these included."""
    found: dict[int, None] = {}
    level = [start]
    for _ in range(_REACH):
        level = [o for o in dict.fromkeys(o for name in level for o in flow.values[name].inputs) if o not in found and flow.values[o].data]
        found |= dict.fromkeys(level)
        level = [o for o in level if flow.values[o].role is not Role.MIXING]
    return list(found)
