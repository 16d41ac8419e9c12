"""`Dataflow` from any `fx.Graph`: an exported program's, a `symbolic_trace`'s, a hand-made one.

Every node whose result is a tensor needs its shape, in `meta["val"]` (torch.export) or `meta["tensor_meta"]` (ShapeProp).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from laurel_rewrite.graph.dataflow import Dataflow, OpKind, Role, Value
from laurel_rewrite.graph.fx_nodes import class_of, discrete, owner_of, shape_of
from laurel_rewrite.graph.ops.rules import (
    DETACH,
    LINEAR,
    MIXING,
    POINTWISE,
    SLICE,
    SOURCE,
    STRUCTURE,
    TRANSPARENT,
    cut,
    placed,
    reshaped_axes,
    scaled,
)
from laurel_rewrite.graph.ops.torch import (
    DRAWS,
    IGNORED,
    LEAF_MODULES,
    LIKE,
    MAYBE_OPERAND,
    OPS,
    PICKS,
    POINTWISE_MODULES,
    PRODUCTS,
    SCALES,
    SHAPE_ONLY,
    SUMS,
    VIEWS,
)
from laurel_rewrite.graph.regions import ENTRY, ROOM, end_of_room
from laurel_rewrite.graph.rooms import Entry, enter, leave
from laurel_rewrite.private import SET_GRAD, OpOverload, schema_of


def dataflow_from_fx(
    graph: fx.Graph,
    modules: Callable[[str], torch.nn.Module] | None = None,
    parameters: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Dataflow, dict[fx.Node, int]]:
    """Read a graph.

    Args:
        graph: nodes with shapes in their metadata, and no regions (`regions.flattened`).
        modules: the module of a `call_module` target.
        parameters: of placeholders that hold parameters, buffers and constants rather than data, the names of parameters in the model.

    Returns:
        The dataflow, and the value that each node computed (before any later in-place change to it).
    """
    return _Reader(graph, modules, parameters).read()


class _Reader:
    """Canonicalises while it reads: in-place ops become new values, a view that was taken before such a change is read anew, and two equal
    views of one value are one value. What leaves a no_grad region is detached there."""

    def __init__(self, graph: fx.Graph, modules: Callable[[str], torch.nn.Module] | None, parameters: Mapping[str, str]) -> None:
        self.graph = graph
        self.modules = modules
        self.parameters = parameters
        self.flow = Dataflow()
        self.computed: dict[fx.Node, int] = {}  # what the node itself computed
        self.current: dict[fx.Node, int] = {}  # what its tensor holds now
        self.base: dict[fx.Node, fx.Node] = {}  # node -> the node whose memory it may share
        self.parent: dict[fx.Node, fx.Node] = {}  # view -> what it views
        self.version: dict[fx.Node, int] = {}  # base -> number of in-place changes so far
        self.seen: dict[fx.Node, int] = {}  # node -> the version that `current` reflects
        self.known: dict[tuple[str, Any], tuple[str, bool]] = {}  # a target's base name, and whether it mutates
        self.views: dict[tuple[Any, ...], int] = {}  # op, operands and arguments of a view -> its value
        self.recording = True  # of gradients: False inside a no_grad region
        self.entries: dict[fx.Node, Entry[int]] = {}  # of the placeholders of rooms
        self.exits: dict[fx.Node, list[list[int | None]]] = {}  # control flow -> what each of its rooms gives for each of its results
        self.detached: dict[int, int] = {}  # what a no_grad region computed -> that as it is read outside

    def read(self) -> tuple[Dataflow, dict[fx.Node, int]]:
        for node in self.graph.nodes:
            if node.op == "output":
                self.flow.outputs.update(self._read(operand) for operand in node.all_input_nodes)
            elif ENTRY in node.meta:
                self._enter(node)
            elif node.target is end_of_room:
                self._leave_room(node)
            else:
                self._add(node)
                self._join_result(node)
        written = [base for base in self.version if base.op in ("placeholder", "get_attr")]
        self.flow.outputs.update(self._read(base) for base in written)  # the caller sees what its tensors hold then
        return self.flow, self.computed

    def _enter(self, node: fx.Node) -> None:
        """A placeholder of a room."""
        entry: Entry[fx.Node] = node.meta[ENTRY]
        known = self.entries[node] = entry.given(None if entry.operand not in self.current else self._read(entry.operand))
        shape, floating = shape_of(node)
        self.computed[node] = self.current[node] = enter(self.flow, known, node.name, node.meta[ROOM], shape, floating=floating)
        self.seen[node] = 0

    def _leave_room(self, node: fx.Node) -> None:
        op: Any = node.args[0]
        given = [self._read(result) if isinstance(result, fx.Node) else None for result in _listed(node.args[1])]
        leave(self.flow, [self.computed[op]], [(self.entries[inside], self.computed[inside]) for inside in _listed(node.args[2])], given)
        self.exits.setdefault(op, []).append([given[place] for place in node.meta[ROOM]])

    def _join_result(self, node: fx.Node) -> None:
        """One of the results of control flow is what its rooms give."""
        arguments: tuple[Any, ...] = (*node.args, None, None)
        source, place = arguments[:2]
        for results in self.exits.get(source, ()) if isinstance(source, fx.Node) and isinstance(place, int) else ():
            self.flow.join(self.computed[node], [index for index in results[place : place + 1] if index is not None])

    def _target(self, node: fx.Node) -> tuple[str, bool]:
        """Base name of the node's op, and whether it mutates; asked once for each target of the graph."""
        key = (node.op, node.target)
        if key not in self.known:
            self.known[key] = base_name(node, self.modules), mutates(node)
        return self.known[key]

    def _add(self, node: fx.Node) -> None:
        op, writes = self._target(node)
        if op == SET_GRAD.__name__:
            self.recording = bool(node.args[0])
        if op in IGNORED:
            return
        computed, values = self.computed, self.flow.values
        if op in SUMS:  # the same tensor twice is two operands
            operands = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, fx.Node) and a in computed]
        else:
            operands = [operand for operand in node.all_input_nodes if operand in computed]
            if op in LIKE:
                operands = operands[:1]
        inputs = [self._read(operand) for operand in operands]
        if op == "copy":  # what was there before is gone
            inputs = inputs[1:]
        if self.recording:
            inputs = [self._leave(index) for index in inputs]
        shape, floating = shape_of(node)
        if op == "setitem" and inputs:
            shape, floating = values[inputs[0]].shape, values[inputs[0]].floating
        if node.op in ("placeholder", "get_attr"):
            kind, data = SOURCE, node.op == "placeholder" and node.name not in self.parameters
        else:
            kind, data = self._kind(node, op, inputs, shape), op not in SHAPE_ONLY and any(values[i].data for i in inputs)
        if discrete(node):
            kind = cut(kind)
        reads = kind.role in (Role.TRANSPARENT, Role.SLICE) or op in PICKS
        view = self._view(node, op, inputs) if reads and not writes and op not in DRAWS else None
        if view in self.views:
            self._settle(node, op, self.views[view], operands)
            return
        owner, run, existing = owner_of(node)
        room = node.meta.get(ROOM, "")
        owner_class = class_of(node)
        where, trace = placed(node.meta.get("stack_trace") or getattr(node, "stack_trace", None) or "", inside=bool(room))
        marks = node.meta.get("custom") or {}
        value = self.flow.add(
            node.name, op, kind, inputs, shape=shape, floating=floating, data=data, owner=owner or room, owner_class=owner_class, existing=existing,
            where=where, room=room, trace=trace, run=run, weights=self._weights(node),
            recorded=self.recording and "laurel_unrecorded" not in marks, call=marks.get("laurel_call") if op in SUMS else None,
        )  # fmt: skip
        if kind.role is Role.TRANSPARENT and inputs:
            value.axes = _axes(node, op, values[inputs[0]], value)
        if view is not None:
            self.views[view] = value.index
        if writes and operands:
            self._mutate(operands[0], value)
        self._settle(node, op, value.index, operands)

    def _weights(self, node: fx.Node) -> tuple[str, ...]:
        """Names of the parameters that a node holds, or that the module has which it calls."""
        target = str(node.target)
        if node.op == "call_module" and self.modules is not None:
            return tuple(f"{target}.{name}" for name, _ in self.modules(target).named_parameters())
        if node.op == "get_attr" and self.modules is not None:
            path, _, name = target.rpartition(".")
            return (target,) if name in self.modules(path)._parameters else ()
        return (name,) if (name := self.parameters.get(node.name, "")) else ()

    def _settle(self, node: fx.Node, op: str, index: int, operands: list[fx.Node]) -> None:
        """The node computed this value, in memory of its own or of its first operand."""
        if operands and (op in VIEWS or self._target(node)[1]):
            self.base[node], self.parent[node] = self._base(operands[0]), operands[0]
        self.computed[node] = self.current[node] = index
        self.seen[node] = self.version.get(self._base(node), 0)

    def _view(self, node: fx.Node, op: str, inputs: list[int]) -> tuple[Any, ...]:
        """What two views of one value have in common: op, operands and arguments."""
        arguments = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: self.current.get(n, n.name))
        return op, node.target, tuple(inputs), str(arguments), self.recording

    def _leave(self, index: int) -> int:
        """The value as it is read outside of the no_grad region that computed it."""
        before = self.flow.values[index]
        if before.recorded or not before.data:
            return index
        if index not in self.detached:
            self.detached[index] = self.flow.add(
                f"{before.name}_detached", "detach", DETACH, [index], shape=before.shape, floating=before.floating, data=True,
                axes=before.shape and tuple(range(len(before.shape))), owner=before.owner, existing=before.existing, where=before.where,
            ).index  # fmt: skip
        return self.detached[index]

    def _base(self, node: fx.Node) -> fx.Node:
        return self.base.get(node, node)

    def _read(self, node: fx.Node) -> int:
        """The value that the node's tensor holds now."""
        base = self._base(node)
        version = self.version.get(base, 0)
        if self.seen[node] < version and node in self.parent:
            before = self.flow.values[self.computed[node]]
            fresh = self.flow.add(
                before.name, before.op, before.kind, [self._read(self.parent[node])], shape=before.shape, floating=before.floating,
                data=True, axes=before.axes, owner=before.owner, existing=before.existing, where=before.where,
            )  # fmt: skip
            if self._target(node)[1]:  # its memory is its parent's
                fresh.kind = TRANSPARENT
            self.current[node] = fresh.index
            self.seen[node] = version
        return self.current[node]

    def _mutate(self, target: fx.Node, value: Value) -> None:
        """`value` was written into the memory of `target`."""
        base = self._base(target)
        self.version[base] = version = self.version.get(base, 0) + 1
        written, node = value.index, target
        while node is not base:
            parent = self.parent[node]
            same = self._target(node)[1]  # an in-place op's result is its target
            whole = same or self.flow.values[self.computed[node]].role is Role.TRANSPARENT
            self.current[node], self.seen[node] = written, version
            before = self.flow.values[self.current[parent]]
            if not (same or before.shape == value.shape):
                inputs = [written] if whole else [before.index, written]
                written = self.flow.add(
                    f"{parent.name}_after", "update", TRANSPARENT if whole else STRUCTURE, inputs, shape=before.shape,
                    floating=before.floating, data=True, owner=value.owner,
                ).index  # fmt: skip
            node = parent
        self.current[base], self.seen[base] = written, version

    def _kind(self, node: fx.Node, op: str, inputs: list[int], shape: tuple[int | str, ...] | None) -> OpKind:
        """The table's row, specialised to this use."""
        values = self.flow.values
        first = values[inputs[0]] if inputs else None
        if op == "unknown_module":
            return MIXING
        kind = OPS.get(op, POINTWISE)
        if op in SUMS:
            scalar = [a for a in node.args[:2] if isinstance(a, int | float) and not isinstance(a, bool)]
            return TRANSPARENT if scalar == [0] else kind  # sum([...]) begins with 0
        if op in SCALES:
            return self._scale(node, op, [values[i] for i in inputs]) or kind
        if op == "getitem" and first is not None:
            if first.shape is None:  # one of several results: each piece of a split is a slice of its own
                return first.kind if first.role is Role.SLICE else kind
            return SLICE if first.shape != shape else kind
        if kind.role is Role.SLICE and first is not None and first.shape == shape:
            return TRANSPARENT
        if op in ("expand", "expand_as", "copy") and first is not None and first.shape != shape:
            return STRUCTURE
        if kind.norm and op in ("layer_norm", "rms_norm", "native_layer_norm"):
            normalized = self._normalized_shape(node)
            if normalized is not None and len(normalized) != 1:
                return replace(kind, axis=1, vote=1)
        if op.startswith("conv") and kind.linear:
            return replace(kind, wide=self._kernel(node, inputs) != {1})
        if op in ("matmul", "mm", "bmm", "einsum") and len(inputs) == 2 and not values[inputs[1]].data:
            return LINEAR
        if op == "mean" and first is not None and first.shape is not None:
            dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
            if dims in ([-1], -1, [len(first.shape) - 1]):
                return replace(kind, axis=-1, vote=1)
        return kind

    def _scale(self, node: fx.Node, op: str, operands: list[Value]) -> OpKind | None:
        if op not in PRODUCTS and not (isinstance(node.args[0], fx.Node) and operands and operands[0].data):
            return None  # a number divided by data
        if len(operands) == 1 and any(isinstance(a, int | float) for a in (*node.args, *node.kwargs.values())):
            return TRANSPARENT
        return scaled(operands, learned=any(o.name.startswith("p_") for o in operands))

    def _normalized_shape(self, node: fx.Node) -> list[int] | None:
        if node.op == "call_module":
            return list(getattr(self._module(node), "normalized_shape", ())) or None
        shape = node.args[1] if len(node.args) > 1 else node.kwargs.get("normalized_shape")
        return list(shape) if isinstance(shape, list | tuple) else None

    def _kernel(self, node: fx.Node, inputs: list[int]) -> set[int | str]:
        if node.op == "call_module":
            kernel = getattr(self._module(node), "kernel_size", ())
            return set(kernel)
        weight = self.flow.values[inputs[1]] if len(inputs) > 1 else None
        return set(weight.shape[2:]) if weight is not None and weight.shape is not None else set()

    def _module(self, node: fx.Node) -> torch.nn.Module | None:
        return self.modules(str(node.target)) if self.modules is not None else None


def base_name(node: fx.Node, modules: Callable[[str], torch.nn.Module] | None = None) -> str:
    """The op's name in the table: `aten.add_.Tensor`, `operator.iadd`, `Tensor.add_` and `torch.add` are all "add"."""
    target: Any = node.target
    if node.op in ("placeholder", "get_attr", "output"):
        return node.op
    if node.op == "call_module":
        name = type(modules(str(target))).__name__ if modules is not None else ""
        return LEAF_MODULES.get(name, "relu" if name in POINTWISE_MODULES else "unknown_module")
    if node.op == "call_method":
        name = str(target)
    elif isinstance(target, OpOverload):
        name = target.overloadpacket.__name__
    else:
        name = getattr(target, "__name__", str(target)).removeprefix("aten.").split(".")[0]
    if name in OPS:
        return name
    bare = name.rstrip("_") or name
    return "add" if bare in SUMS else bare


def mutates(node: fx.Node) -> bool:
    """Whether the node writes into its first operand."""
    target: Any = node.target
    if isinstance(target, OpOverload):
        return schema_of(target).is_mutable and not target.overloadpacket.__name__.startswith("_assert")
    name = target if node.op == "call_method" else getattr(target, "__name__", "")
    if node.op == "call_method":
        return bool(name.endswith("_")) and not name.endswith("__")
    return node.op == "call_function" and name in ("iadd", "imul", "isub", "itruediv", "setitem")


def is_seen_elsewhere(node: fx.Node, modules: Callable[[str], torch.nn.Module], besides: Collection[fx.Node] = ()) -> bool:
    """Whether what a node writes into its first operand may be read under another name later, or by the caller of the graph.

    Args:
        modules: gets a module by its path.
        besides: nodes whose reading does not count.
    """
    written = node.args[0]
    assert isinstance(written, fx.Node)
    base, names = written, {node}
    while (held := _memory_of(base, modules)) is not None:
        base = held
    if base.op in ("placeholder", "get_attr"):
        return True
    stack = [base]
    while stack:
        name = stack.pop()
        names.add(name)
        stack += [user for user in name.users if user not in names and _memory_of(user, modules) is name]
    return any(user > node and user not in besides for name in names - {written, node} for user in name.users)


def _memory_of(node: fx.Node, modules: Callable[[str], torch.nn.Module]) -> fx.Node | None:
    """The operand whose memory a node's result may lie in."""
    operands = node.all_input_nodes
    name = base_name(node, modules) if operands else ""
    return operands[0] if operands and (name in VIEWS or name in MAYBE_OPERAND or mutates(node)) else None


def _listed(values: Any) -> list[Any]:
    return list(values) if isinstance(values, list | tuple) else [values]


def _axes(node: fx.Node, op: str, operand: Value, result: Value) -> tuple[int | None, ...] | None:
    """Which dimension of the operand each dimension of the result is."""
    if operand.shape is None or result.shape is None:
        return None
    before, after = operand.shape, result.shape
    rank = len(before)
    if op in ("permute", "transpose", "t", "numpy_T", "T", "mT", "adjoint", "swapaxes", "swapdims", "movedim", "moveaxis"):
        order = list(range(rank))
        args = list(node.args[1:]) or list(node.kwargs.values())
        if op == "permute":
            dims = args[0] if len(args) == 1 and isinstance(args[0], list | tuple) else args
            return tuple(int(d) % rank for d in dims)  # type: ignore[arg-type]  # permute takes ints
        if op in ("transpose", "swapaxes", "swapdims") and len(args) >= 2:
            a, b = int(args[0]) % rank, int(args[1]) % rank  # type: ignore[arg-type]  # transpose takes ints
            order[a], order[b] = order[b], order[a]
            return tuple(order)
        if op in ("mT", "adjoint"):
            order[-1], order[-2] = order[-2], order[-1]
            return tuple(order)
        return tuple(reversed(order)) if op != "movedim" and op != "moveaxis" else None
    return reshaped_axes(before, after)
