"""Sites: the residual connections of one model, by stable ids, and the sums that are none, with reasons."""

from __future__ import annotations

import contextlib
import gc
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import fx

from laurel_rewrite.detection.anatomy import Spot, spots_of
from laurel_rewrite.detection.residuals import REASONS, Refusal, find_residuals
from laurel_rewrite.detection.rooms import Calls, crossings
from laurel_rewrite.detection.site import Binding, Rejected, Site
from laurel_rewrite.detection.streams import find_places
from laurel_rewrite.detection.ways import between
from laurel_rewrite.errors import CaptureError, nearest
from laurel_rewrite.graph.capture import Call, Capture, parameters_of
from laurel_rewrite.graph.dataflow import Dataflow
from laurel_rewrite.graph.from_fx import dataflow_from_fx
from laurel_rewrite.graph.regions import flattened, nested, rooms_of
from laurel_rewrite.private import STATIC_INPUT, FakeTensorMode

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir

    from laurel_rewrite.graph.from_onnx import OnnxFlow


@dataclass
class Sites:
    """What detection found. Iterating gives the sites.

    Attributes:
        sites: the residual connections, in order of execution.
        rejected: the other sums, with reasons.
        bindings: how each site hangs in the graph, by id.
        refusals: the other sums in the dataflow, in the order of `rejected`.
        flow: the dataflow that was searched.
        calls: the recorded calls that its values refer to.
        notes: sentences for the user: where the modes differ, and what could not be seen.
        crossings: streams that are one but for the border of a control-flow subgraph between them: the former's and the latter's, with the ids of
            the sites there.
    """

    sites: list[Site] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    bindings: dict[str, Binding] = field(default_factory=dict, repr=False)
    refusals: list[Refusal] = field(default_factory=list, repr=False)
    flow: Dataflow = field(default_factory=Dataflow, repr=False)
    calls: Sequence[Call] = field(default=(), repr=False)
    notes: tuple[str, ...] = ()
    crossings: dict[tuple[int, int], tuple[str, str]] = field(default_factory=dict, repr=False)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    @overload
    def __getitem__(self, key: int | str) -> Site: ...
    @overload
    def __getitem__(self, key: slice) -> list[Site]: ...
    def __getitem__(self, key: int | str | slice) -> Site | list[Site]:
        """The site at a position in the order of execution, or of an id; those of a slice."""
        if isinstance(key, int | slice):
            return self.sites[key]
        for site in self.sites:
            if site.id == key:
                return site
        raise KeyError(f"There is no site {key!r}. {nearest(key, [site.id for site in self.sites])}")

    @cached_property
    def spots(self) -> dict[str, Spot]:
        """The facts of each site's place that finding it did not need, by id."""
        return spots_of(self.sites, self.bindings, self.flow, self.owner)

    def call(self, index: int) -> Call | None:
        """The recorded call that computed a value of the dataflow."""
        position = self.flow.values[index].call
        return self.calls[position] if position is not None and position < len(self.calls) else None

    def owner(self, index: int) -> str:
        """Path of the module whose code computed a value."""
        call = self.call(index)
        return call.owner if call is not None else self.flow.values[index].owner

    @cached_property
    def _by_name(self) -> dict[tuple[str, bool], int]:
        return {(value.name, self._in_second(value.index)): value.index for value in self.flow.values}

    def _in_second(self, index: int) -> bool:
        return self.flow.second is not None and index >= self.flow.second

    def named(self, name: str, site: Site) -> int:
        """The value of a name in the graph that a site lies in."""
        return self._by_name[name, self._in_second(self.bindings[site.id].residual.output)]

    def read_by(self, site: Site) -> int:
        """The value that a site's branch reads first: behind its norm, or the skip."""
        return self.named(self.spots[site.id].reads, site)

    def way_in(self, site: Site, start: int) -> list[int]:
        """The values by which a branch comes from `start` to what it reads first, in order, without the former."""
        return [index for index in between(self.flow, start, self.read_by(site)) if index != start]

    def after(self, site: Site, steps: int = 1) -> Site | None:
        """The next connection of a site's stream; the one before it for -1 steps."""
        return next((other for other in self.sites if (other.stream, other.index) == (site.stream, site.index + steps)), None)

    def room(self, site: Site) -> str:
        """Path of the subgraph of control flow that a site lies in; "" in the graph itself."""
        return self.flow.values[self.bindings[site.id].residual.output].room

    def where(self, index: int) -> str:
        """ "file:line" of a value, or its name in a graph without source lines."""
        call = self.call(index)
        return call.where if call is not None else self.flow.values[index].where or self.flow.values[index].name

    def lines(self, index: int) -> list[str]:
        """ "file:line" of a value and of the calls of helpers that led to it."""
        call = self.call(index)
        return [self.where(index)] if call is None else [f"{span.filename}:{span.line}" for span in call.steps]

    def existing(self) -> str:
        """Where the model has LAuReL of its own already, for the user; "" where it has none."""
        owners = dict.fromkeys(rejected.owner for rejected in self.rejected if rejected.reason == "existing LAuReL")
        inner = [owner for owner in owners if not any(other.startswith(f"{owner}.") for other in owners)]
        if not inner:
            return ""
        more = f" and {len(inner) - 3} more" if len(inner) > 3 else ""
        return f"The model has LAuReL of its own, which is left as it is: {', '.join(inner[:3])}{more}."

    def undecided(self) -> str:
        """How many sums may be residual connections for all that is known of their sizes, and the way out; "" where there is none."""
        count = sum(rejected.reason in ("open sizes", "unknown shape") for rejected in self.rejected)
        return (
            f"{count} of {len(self.rejected)} other additions were refused only because their open sizes could not be shown equal: "
            "fix the sizes in the graph, or give inputs that it runs with (--inputs)."
            if count
            else ""
        )

    def why_none(self) -> str:
        """Why there is no site, for the user."""
        undecided = self.undecided()
        if undecided:
            return f"Whether there is a residual connection is not known. {undecided}"
        reasons = Counter(rejected.reason for rejected in self.rejected)
        common = reasons.most_common(1)
        rule = f". {REASONS[common[0][0]][0].upper()}{REASONS[common[0][0]][1:]}" if common else ""
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(4))
        counted = f"Of its {len(self.rejected)} additions: {why}{rule}." if why else "It has no addition at all."
        return " ".join(["The model has no residual connection.", counted, *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """As `laurel-rewrite sites --json` prints it."""
        return {
            "sites": [{**asdict(site), **asdict(self.spots[site.id])} for site in self.sites],
            "rejected": [asdict(rejected) for rejected in self.rejected],
            "notes": list(self.notes),
        }


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection for a while: detection makes millions of small objects that live on, and each pass would walk them all."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@_uncollected()
def sites_of_program(program: torch.export.ExportedProgram) -> Sites:
    """The sites of an exported program."""
    graph = flattened(program.graph)
    flow, _ = dataflow_from_fx(graph, parameters=parameters_of(program))
    return _sites(flow, (), graph)


@_uncollected()
def sites_of_capture(captured: Capture) -> Sites:
    """The sites of a captured model, with source positions."""
    graph = flattened(captured.graph, rooms=False)  # whose sums stand in functions that the model's code passes on
    flow, _ = dataflow_from_fx(graph, parameters=captured.parameters)
    return _sites(flow, captured.calls, graph)


@_uncollected()
def sites_of_graph(module: fx.GraphModule, *, rooms: bool = True) -> Sites:
    """The sites of an `fx.GraphModule` whose nodes carry shapes; parameters are its `get_attr` nodes, and the inputs of which TorchDynamo says so.
    Those in the subgraphs of control flow are left out where `rooms` is False."""
    graph = flattened(module.graph, rooms=rooms)
    static = [node.name for node in graph.nodes if node.op == "placeholder" and _is_static(node)]
    flow, _ = dataflow_from_fx(graph, module.get_submodule, dict(zip(static, static, strict=True)))
    called = dict.fromkeys(str(n.target) for n in graph.nodes if n.op == "call_module")
    closed = [name for name in called if isinstance(module.get_submodule(name), fx.GraphModule)]
    notes = tuple(f"{name} is a graph that is called several times: it was not looked into, and stays as it is." for name in closed)
    return replace(_sites(flow, ()), notes=notes)


@_uncollected()
def sites_of_onnx(model: onnx_ir.Model, feeds: Mapping[str, np.ndarray] | None = None) -> Sites:
    """The sites of an ONNX model, which stays as it is; see `read_onnx_sites`."""
    return read_onnx_sites(model, feeds)[0]


def read_onnx_sites(model: onnx_ir.Model, feeds: Mapping[str, np.ndarray] | None = None) -> tuple[Sites, OnnxFlow, onnx_ir.Model]:
    """The sites of an ONNX model, how they hang in its graph, and the graph that was read: a copy where functions had to be inlined or
    shapes inferred.

    Args:
        model: stays as it is.
        feeds: inputs that it runs with, by name, for sizes that cannot be inferred. None draws them where they are needed.

    Raises:
        CaptureError: the nodes are not in topological order.
    """
    from laurel_rewrite.graph.from_onnx import dataflow_from_onnx
    from laurel_rewrite.graph.observed import observe_sizes
    from laurel_rewrite.graph.shapes import completed

    given = model
    try:
        model = completed(model)
    except Exception as error:  # onnx's, onnx-ir's and the inference's exceptions share no base class
        raise CaptureError(f"The graph could not be read: {type(error).__name__}: {str(error)[:400]}") from error
    read = dataflow_from_onnx(model.graph)
    sites = _sites(read.flow, ())
    if sites.undecided() or _has_unknown_sizes(read.flow):
        if model is given:
            model = model.clone()
        if observe_sizes(model, feeds):
            read = dataflow_from_onnx(model.graph)
            sites = _sites(read.flow, ())
    return sites, read, model


def _has_unknown_sizes(flow: Dataflow) -> bool:
    """Whether a size that nobody knows stands where a stream may flow: it would part streams, or hide their features."""
    return any(
        value.shape is None or any(isinstance(size, str) and size.startswith("?") for size in value.shape)
        for value in flow.values
        if value.data and value.floating
    )


def _is_static(node: fx.Node) -> bool:
    """Whether TorchDynamo made an input of a parameter or buffer."""
    return STATIC_INPUT in (node.meta.get("tensor_dict") or {})


def with_shapes(module: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> None:
    """Give the nodes of a graph their shapes, where they have none."""
    from torch.fx.passes.shape_prop import ShapeProp

    if any(n.meta.keys() & {"val", "example_value", "tensor_meta"} for n in module.graph.nodes if n.op.startswith("call")):
        return
    if not args and not kwargs:
        raise CaptureError(
            "The graph's nodes carry no shapes: pass example inputs, or run torch.fx.passes.shape_prop.ShapeProp on it first."
        )
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    given = dict(zip((n.target for n in placeholders), args, strict=False)) | dict(kwargs or {})
    try:
        inputs = [given[n.target] if n.target in given else n.args[0] for n in placeholders]
        # On fake tensors: shapes only, no compute, no change to a buffer.
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        ShapeProp(module, fake_mode=mode).propagate(*inputs)
        for node in module.graph.nodes:
            if (inner := nested(node)) is not None:
                with mode:
                    operands: Any = fx.node.map_arg([node.args, node.kwargs], _like)
                with_shapes(inner, *operands)
            for room in rooms_of(node):
                with mode:
                    outside: list[Any] = [_like(e.operand) if isinstance(e.operand, fx.Node) else e.operand for e in room.entries]
                    operands = [value[0] if e.sliced else value for value, e in zip(outside, room.entries, strict=True)]
                body: Any = room.graph.owning_module
                with_shapes(body, operands, None)
    except Exception as error:
        raise CaptureError(f"The graph could not be run with the given inputs: {type(error).__name__}: {error}") from error


def _like(node: fx.Node) -> Any:
    """A tensor like the one that a node gives, whose shape is known."""
    meta: Any = node.meta.get("tensor_meta")
    return torch.empty(meta.shape, dtype=meta.dtype) if meta is not None else None


def _stack(node: fx.Node) -> tuple[tuple[str, str], ...]:
    """The calls of modules that a node was computed in, from the model inwards: which call, and the module's path. A Sequential may be
    looped over instead of called."""
    stack = node.meta.get("nn_module_stack") or {}
    return tuple((str(key), path) for key, (path, cls) in stack.items() if not str(cls).endswith("Sequential"))


def _holder(stacks: Sequence[tuple[tuple[str, str], ...]]) -> str:
    """The deepest module that computes all these in one call."""
    holder = ""
    for calls in zip(*stacks, strict=False):
        if len(set(calls)) > 1:
            break
        holder = calls[0][1]
    return holder


def _sites(flow: Dataflow, calls: Sequence[Call], graph: fx.Graph | None = None) -> Sites:
    residuals, refusals = find_residuals(flow)
    values = flow.values
    sites = Sites(refusals=refusals, flow=flow, calls=calls)

    def line(index: int) -> tuple[str, int, Any] | None:
        """The owner, which of its calls, and the expression there; None where the graph does not say."""
        call, value = sites.call(index), values[index]
        if call is not None:
            return call.owner, call.owner_call, call.steps
        return (value.owner, value.run, (value.trace, value.room) if value.room else value.trace) if value.trace else None

    lines = [line(residual.adds[0][0]) for residual in residuals]
    places = find_places(flow, residuals, [key and key[2] for key in lines])
    # How often each line ran, sites or not: a loop's turns. Without recorded calls a line may hold several adds, and only sites count.
    runs: dict[tuple[Any, ...], dict[int, int]] = defaultdict(dict)
    for index in range(len(values)) if calls else (residual.adds[0][0] for residual in residuals):
        key = line(index) if not calls or sites.call(index) is not None else None
        if key is not None:
            runs[key][index] = len(runs[key])
    ordinals: dict[tuple[str, int], dict[Any, int]] = defaultdict(dict)
    tied: dict[str, int] = defaultdict(int)
    added: dict[int, list[str]] = defaultdict(list)
    shared = Calls(flow)
    for residual, place in zip(residuals, places, strict=True):
        adds = tuple((values[node].name, side, sites.call(node)) for node, side in residual.adds)
        inner = residual.adds[0][0]  # where the skip is added
        owner, where, shape = sites.owner(inner), sites.where(inner), values[residual.output].shape or ()
        key = line(inner)
        if key not in runs:
            key = None
        # The steps of a recorded call begin in its owner; a trace begins outside, so that it differs from call to call.
        known = ordinals[owner, 0 if sites.call(inner) is not None else values[inner].run]
        ordinal = known.setdefault(key[2] if key is not None else residual.output, len(known))
        turns = len(runs[key]) if key is not None else 1
        turn = runs[key][inner] if key is not None and turns > 1 else None
        path = f"{owner}.laurel_{ordinal}" if owner else f"laurel_{ordinal}"
        if turn is not None:
            path += f".{turn}"
        path, turn, turns = shared.first(residual, place, (path, turn, turns))
        name = path if not tied[path] else f"{path}@{tied[path]}"
        tied[path] += 1
        sites.sites.append(Site(name, residual.kind, owner, where, shape, place.axis, place.dim, place.stream, place.index))
        sites.bindings[name] = Binding(residual, adds, turn=turn, turns=turns)
        added[place.stream].append(values[inner].name)
    nodes = {node.name: node for node in graph.nodes} if graph is not None else {}
    holders = {stream: _holder([_stack(nodes[name]) for name in names]) if nodes else "" for stream, names in added.items()}
    for site in sites:
        sites.bindings[site.id] = replace(sites.bindings[site.id], holder=holders[site.stream])
    sites.crossings = {
        streams: (sites.sites[before].id, sites.sites[after].id) for streams, (before, after) in crossings(flow, residuals, places).items()
    }
    sites.rejected = [Rejected(sites.where(r.output), sites.owner(r.output), r.reason, r.detail) for r in refusals]
    return sites
