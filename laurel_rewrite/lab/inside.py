"""Inside a rewritten model: what its connections learned, the stream that they carry, and the loss without each of them.

Every figure of the stream is one of a position (a token, a pixel): of the vector along the feature axis, in float32 or what is wider. It is averaged
over the positions, padding among them, then over the calls of a connection, and over batches, each of which counts alike.

The share of a site in the final state z of its stream, what the stream's last connection gives, is that of what the site adds, z_i - x_i (the
result less the skip): <z_i - x_i, z> / <z, z>, summed over the calls of one pass, and without the positions where z = 0. The first skip x_0 has the
share <x_0, z> / <z, z>. Where each result is the next skip, as in pre-norm models, the shares and that of x_0 add up to 1, whatever the operator;
where a norm or activation stands between them, they need not.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from laurel_rewrite.backends.module.surgery import rewriting_of
from laurel_rewrite.errors import ConfigError
from laurel_rewrite.files.written import plain
from laurel_rewrite.graph.capture import training
from laurel_rewrite.graph.snapshot import preserved
from laurel_rewrite.lab.around import PlainSum, Seen, WithoutBranch, standing
from laurel_rewrite.operators.connections import asked, bare, by_path, learned
from laurel_rewrite.operators.plain import adding_plainly
from laurel_rewrite.operators.protocol import Connection
from laurel_rewrite.plan import PlanSite
from laurel_rewrite.verification.runs import seeded

B = TypeVar("B")
_FIGURES = ("skip", "branch", "result", "branch_cosine", "result_cosine", "share")
_Change = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Difference:
    """The loss of a changed model less that of the model itself, batch by batch.

    Attributes:
        loss: the mean over batches; above 0, the change costs.
        error: its standard error over batches; NaN of one batch.
    """

    loss: float
    error: float

    @staticmethod
    def of(differences: Sequence[float]) -> Difference:
        values = torch.tensor(differences, dtype=torch.float64)
        error = values.std().item() / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
        return Difference(values.mean().item(), error)

    def costs(self, errors: float) -> bool:
        """Whether it is above 0 by more than so many standard errors."""
        return self.loss > errors * self.error


@dataclass(frozen=True)
class SiteInside:
    """One connection; a figure that there is none of is NaN.

    Attributes:
        site: its id.
        variant: its operator.
        stream: that it is of, as in the plan.
        calls: in one batch; 0 where the model does not run it.
        learned: see `laurel_rewrite.learned`.
        singular_values: of its low-rank maps, in descending order, by their names in `learned` without the norm: "uv", or "uv.0", "uv.1" by lag.
        depth: attention over depth: how the new value weighs the states of the stream, the newest first; for PA g_0, g_1, ...; empty where the
            operator reads no earlier state, or does not say.
        skip, branch, result: root mean squares of x, of f (the sum of several branches) and of the new value.
        branch_cosine, result_cosine: of f and of the new value with x.
        share: of the final state of its stream.
        without_branch: the loss with zeros in the place of its branch, in all its calls.
        plain: the loss with x + f in the place of its operator; later connections read the states that the stream then has. None where the
            operator needs its whole stream: see `StreamInside.plain`.
    """

    site: str
    variant: str
    stream: int
    calls: float
    learned: dict[str, float]
    singular_values: dict[str, tuple[float, ...]]
    depth: tuple[float, ...]
    skip: float
    branch: float
    result: float
    branch_cosine: float
    result_cosine: float
    share: float
    without_branch: Difference
    plain: Difference | None


@dataclass(frozen=True)
class StreamInside:
    """One stream.

    Attributes:
        stream: its number in the plan.
        sites: its connections, in order of execution.
        start: the share of its first skip in its final state.
        final: root mean square of that.
        plain: the loss with plain sums in all of it.
    """

    stream: int
    sites: tuple[str, ...]
    start: float
    final: float
    plain: Difference


@dataclass(frozen=True)
class Inside:
    """What `inside` measured.

    Attributes:
        loss: of the model itself, the mean over batches.
        batches: how many there were.
        plain: the loss with plain sums everywhere.
        sites: in order of execution, those that never ran last.
        streams: likewise.
    """

    loss: float
    batches: int
    plain: Difference
    sites: tuple[SiteInside, ...]
    streams: tuple[StreamInside, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; what is no finite number is None."""
        found: dict[str, Any] = plain(asdict(self))
        return found


def inside(model: nn.Module, batches: Iterable[B], loss: Callable[[nn.Module, B], Tensor]) -> Inside:
    """Look inside a rewritten model, in eval mode and without gradients; modes, hooks, buffers and random states are as they were afterwards, also
    where the loss raises.

    A batch is run twice, once more with each site's branch left out, once with each site's sum put back, and once with the sums of each stream:
    all from one random state, so that differences are of the change alone. What was compiled runs eager. In several processes each looks at the
    batches that it is given, of which all have the same number where parameters are spread over them (FSDP).

    A model that was never rewritten has no connections to look at; a copy of it that is rewritten with variant "rw" computes the same at its start,
    bit for bit, and has them.

    Args:
        model: what `rewrite` or `load` returned, as it is or wrapped as it is trained.
        batches: what `loss` takes, one after the other; two or more for standard errors.
        loss: of the model and a batch, one number. It gets the model without what replicates it (DDP), and brings the batch to its device.

    Raises:
        ConfigError: the model was not made by `rewrite` or `load`, or is a graph; there is no batch; the loss is not one number; parameters are on
            the meta device.
    """
    if isinstance(model, fx.GraphModule):
        raise ConfigError("A rewritten graph has no record of its streams; rewrite the module that it was made from, and look inside that.")
    rows = {row.id: row for row in rewriting_of(model).plan.sites}
    target = bare(model)
    connections = {name: module for name, module in by_path(model).items() if name in rows}
    weights = learned(model)
    spectra = asked(model, lambda connection: connection.singular_values())
    meter = _Meter(target, rows, connections)
    with _buffers_kept(target), training(target, False), torch.no_grad(), _eagerly():
        for batch in batches:
            meter.measure(functools.partial(_number, loss, target, batch))
    if not meter.losses:
        raise ConfigError("There is no batch to look at the model with. An iterator that was read before is empty.")
    return meter.found(weights, {key: tuple(value.tolist()) for key, value in spectra.items()})


def gaining(found: Inside, *, errors: float = 2.0) -> list[str]:
    """The sites whose operator helps: with x + f in its place the loss is higher by more than so many standard errors over batches. Where an
    operator needs its whole stream, all sites of a stream that helps.

    Each was measured in the model as it was trained, with the others as they are. `rewriting_of(model).plan.only(sites)` is a plan with these alone
    (`laurel_rewrite.backends.module.surgery`), which `rewrite(base, inputs, plan=...)` takes, and its `write` makes the file that `--plan` reads.

    Raises:
        ConfigError: there was one batch, which has no standard error.
    """
    if found.batches < 2:
        raise ConfigError("One batch has no standard error, and says of no site whether it gains. Look inside with two or more.")
    whole = {stream.stream for stream in found.streams if stream.plain.costs(errors)}
    return [site.site for site in found.sites if (site.plain.costs(errors) if site.plain is not None else site.stream in whole)]


# Measuring


class _Meter:
    """Measures a model batch by batch.

    Args:
        model: in eval mode while it is measured.
        rows: of its plan, by site.
        connections: by site.
    """

    def __init__(self, model: nn.Module, rows: dict[str, PlanSite], connections: dict[str, Connection]) -> None:
        self.model, self.rows, self.connections = model, rows, connections
        self.losses: list[float] = []
        self.order: dict[str, None] = {}  # of execution
        self.calls: Counter[str] = Counter()
        self.figures: dict[str, list[list[float]]] = defaultdict(list)  # one row a batch
        self.depth: dict[str, list[list[float]]] = defaultdict(list)  # likewise
        self.streams: dict[int, list[list[float]]] = defaultdict(list)  # likewise
        of: dict[int, list[Connection]] = defaultdict(list)
        for name, module in connections.items():
            of[rows[name].stream].append(module)
        self.changes: dict[tuple[str, Any], _Change] = {}
        for name, module in connections.items():
            self.changes["without_branch", name] = functools.partial(standing, [WithoutBranch(module)])
            if "whole stream" not in rows[name].operator.needs:
                self.changes["plain", name] = functools.partial(standing, [PlainSum(module)])
        for stream, modules in of.items():
            self.changes["plain stream", stream] = functools.partial(adding_plainly, modules)
        self.changes["plain", None] = functools.partial(adding_plainly, list(connections.values()))
        self.differences: dict[tuple[str, Any], list[float]] = defaultdict(list)  # one a batch

    def measure(self, number: Callable[[], float]) -> None:
        """One batch, whose loss `number` gives."""
        finals: dict[tuple[int, int], Tensor] = {}
        for _ in range(2):  # the first run is for the final states, which need not be kept beside all that lead to them
            log = _Log(self.rows, finals)
            with log.passes_of(self.model), standing(Seen(name, module, log) for name, module in self.connections.items()):
                whole = number()
            finals = log.finals
        self.losses.append(whole)
        for name, calls in log.figures.items():
            self.order.setdefault(name)
            self.calls[name] += len(calls)
            passes = log.passes[self.rows[name].holder] or 1
            figures = torch.stack(calls)
            self.figures[name].append([*figures[:, :-1].mean(0).tolist(), figures[:, -1].sum().item() / passes])
        for name, several in log.depth.items():
            most = max(len(weights) for weights in several)
            by_lag = [[weights[lag] for weights in several if len(weights) > lag] for lag in range(most)]
            self.depth[name].append([torch.stack(weights).mean().item() for weights in by_lag])
        for stream, starts in log.starts.items():
            self.streams[stream].append(torch.stack(starts).mean(0).tolist())
        for (what, where), change in self.changes.items():
            loss = whole
            if where not in self.connections or where in log.figures:  # else it does not run
                with change():
                    loss = number()
            self.differences[what, where].append(loss - whole)

    def found(self, weights: dict[str, dict[str, float]], spectra: dict[tuple[str, str], tuple[float, ...]]) -> Inside:
        """What all batches together say."""
        order = [*self.order, *(name for name in self.connections if name not in self.order)]
        sites = [self._site(name, weights.get(name, {}), {key: s for (site, key), s in spectra.items() if site == name}) for name in order]
        streams = []
        for stream in dict.fromkeys(site.stream for site in sites):
            start, final = _means(self.streams[stream]) or (math.nan, math.nan)
            names = tuple(site.site for site in sites if site.stream == stream)
            streams.append(StreamInside(stream, names, start, final, self._difference("plain stream", stream)))
        (loss,) = _means([[loss] for loss in self.losses])
        return Inside(loss, len(self.losses), self._difference("plain", None), tuple(sites), tuple(streams))

    def _site(self, name: str, weights: dict[str, float], spectra: dict[str, tuple[float, ...]]) -> SiteInside:
        row, figures = self.rows[name], _means(self.figures[name]) or [math.nan] * len(_FIGURES)
        named: dict[str, Any] = dict(zip(_FIGURES, figures, strict=True))
        named |= {"learned": weights, "singular_values": spectra, "depth": tuple(_means(self.depth[name]))}
        calls = self.calls[name] / len(self.losses)
        without, plain = self._difference("without_branch", name), None
        if ("plain", name) in self.changes:
            plain = self._difference("plain", name)
        return SiteInside(name, row.variant, row.stream, calls, without_branch=without, plain=plain, **named)

    def _difference(self, what: str, where: Any) -> Difference:
        return Difference.of(self.differences[what, where])


class _Log:
    """The figures of one run of the model, on the devices where they were computed.

    Args:
        rows: of the plan, by site.
        known: the final state of each pass of each stream, from a run before; without it no figure is made.

    Attributes:
        finals: the same of this run.
        passes: how often each module was called whose call is a pass, by path.
        figures: of each call of each site, `_FIGURES`.
        depth: of each call, the weights of the states.
        starts: of each pass of a stream, the share of its first skip, and the root mean square of the final state.
    """

    def __init__(self, rows: dict[str, PlanSite], known: dict[tuple[int, int], Tensor]) -> None:
        self.rows, self.known = rows, known
        self.finals: dict[tuple[int, int], Tensor] = {}
        self.passes: Counter[str] = Counter()
        self.figures: dict[str, list[Tensor]] = defaultdict(list)
        self.depth: dict[str, list[Tensor]] = defaultdict(list)
        self.starts: dict[int, list[Tensor]] = defaultdict(list)
        self.last: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # the last sum of each stream, to which a branch may be added

    @contextlib.contextmanager
    def passes_of(self, model: nn.Module) -> Iterator[None]:
        """Count the passes of the streams for a while."""
        with contextlib.ExitStack() as stack:
            for path in {row.holder for row in self.rows.values()}:
                handle = model.get_submodule(path).register_forward_pre_hook(lambda *_, path=path: self.passes.update([path]))
                stack.callback(handle.remove)
            yield

    def summed(self, site: str, x: Tensor, f: Tensor, out: Tensor, depth: Tensor | None) -> None:
        row = self.rows[site]
        x, f, out = (_dense(value) for value in (x, f, out))
        key = row.stream, self.passes[row.holder]
        begins = key not in self.finals
        self.finals[key] = out.clone()  # the model may change it in place
        if not self.known:
            return
        final = self.known.get(key)
        if begins:
            size = _share(x, final, row.axis) if final is None else _vectors(final, row.axis).square().mean(-1).sqrt().mean()
            self.starts[row.stream].append(torch.stack([_share(x, final, row.axis), size.to(x.device)]))
        self.last[row.stream] = x, f, out
        self.figures[site].append(_figures(x, f, out, final, row.axis))
        if depth is not None:
            own = depth.detach().to(torch.float32, copy=True)  # a view of parameters that go away when they are sharded again
            self.depth[site].append(own.flatten(1).mean(1) if own.ndim > 1 else own)

    def added(self, site: str, f: Tensor, term: Tensor) -> None:
        row = self.rows[site]
        key = row.stream, self.passes[row.holder]
        self.finals[key] = self.finals[key] + _dense(term)
        if not self.known:
            return
        x, before, out = self.last[row.stream]
        self.last[row.stream] = x, before + _dense(f), out + _dense(term)
        self.figures[site][-1] = _figures(*self.last[row.stream], self.known.get(key), row.axis)


def _figures(x: Tensor, f: Tensor, out: Tensor, final: Tensor | None, axis: int) -> Tensor:
    vectors = [_vectors(value, axis) for value in (x, f, out)]
    sizes = [value.square().mean(-1).sqrt() for value in vectors]
    cosines = [nn.functional.cosine_similarity(value, vectors[0], dim=-1) for value in vectors[1:]]
    return torch.stack([*(value.mean() for value in (*sizes, *cosines)), _share(out - x, final, axis)])


def _share(part: Tensor, final: Tensor | None, axis: int) -> Tensor:
    """Of a part of a final state; NaN where the stream has another form there, so that positions are not known to be the same."""
    vectors = _vectors(part, axis)
    reshaped = final is not None and axis == -1 and final.shape[-1] == part.shape[-1] and final.numel() == part.numel()
    if final is None or not (reshaped or final.shape == part.shape):
        return vectors.new_full((), math.nan)
    whole = _vectors(final.to(part.device), axis)
    size = whole.square().sum(-1)
    there = size > 0
    return torch.where(there, (vectors * whole).sum(-1) / size, 0).sum() / there.sum()


def _vectors(value: Tensor, axis: int) -> Tensor:
    """The vectors of all positions, [positions, D]."""
    moved = value.movedim(axis, -1)
    return moved.reshape(-1, moved.shape[-1]).to(torch.promote_types(value.dtype, torch.float32))


def _dense(value: Tensor) -> Tensor:
    """The positions that there are in a nested tensor, which torch.nn.TransformerEncoder makes of a padded batch."""
    return value.values().reshape(-1, value.size(-1)) if value.is_nested else value


def _means(rows: Sequence[Sequence[float]]) -> list[float]:
    """Of each column, over the rows that have it."""
    most = max(map(len, rows), default=0)
    columns = [[row[place] for row in rows if len(row) > place] for place in range(most)]
    return [torch.tensor(column, dtype=torch.float64).mean().item() for column in columns]


def _number(loss: Callable[[nn.Module, B], Tensor], model: nn.Module, batch: B) -> float:
    """The loss of a batch, from a random state that is always the same; batches that are drawn as they are asked for are drawn from their own."""
    with preserved():
        seeded(0)
        value = loss(model, batch)
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(f"The loss gave {what}. Let it return one number, as a tensor: the mean over the batch.")
    return float(value)


@contextlib.contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Buffers with their values, where a forward counts in them: a copy of the parameters, which may be in shards, no forward asks for."""
    held = [(m._buffers, name, b, b.clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffers, name, buffer, before in held:
                buffers[name] = buffer.copy_(before)


@contextlib.contextmanager
def _eagerly() -> Iterator[None]:
    """What was compiled runs as it is written: a graph does not ask who stands in front of a connection."""
    with contextlib.ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing was
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
