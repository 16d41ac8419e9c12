"""x_i = c_i y_i with c_{i+1} = b_i c_i: the skip's weight becomes 1, and b costs nothing.

    x_{i+1} = a f + b (x_i + U V x_i)        y_{i+1} = (a / c_{i+1}) f + y_i + U V y_i

Whoever reads x must then read c y. One walk through the graph, in order, carries the scale of every value: normalisations take it into
epsilon (c^2) and are free of it, linear readers take it into their weights, positively homogeneous ops hand it on, products multiply the
scales of their operands. What is added must have one scale: constants and weighted branches are brought to the stream's, also inside
SkipLayerNormalization and fused convolutions. Anything else reads the value behind one Mul.

Refusals: where more Muls would come in than go out; where a scale leaves what float16 can bear, 2^-6 to 2^6; quantised weights, whose readers get
the Mul.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import onnx_ir as ir

from laurel_rewrite.passes.algebra import constant, constant_of, is_homogeneous, is_homogeneous_activation, scale_constant
from laurel_rewrite.passes.base import Pass, PassResult
from laurel_rewrite.passes.evaluate_laurel import Affine, Forms, same

_NORMS = frozenset(
    "LayerNormalization RMSNormalization SimplifiedLayerNormalization GroupNormalization InstanceNormalization GroupNorm".split()
)
_EPSILON = 1e-5  # their default
_SKIP_NORMS = {"SkipLayerNormalization": 4, "SkipSimplifiedLayerNormalization": 3}
"""Normalisations of a sum of their first two operands and of a bias, here with its position; the fourth output is the sum."""
_SKIP_EPSILON = 1e-12  # their default
_WEIGHTED = {"Conv": None, "ConvTranspose": None, "Gemm": 2, "FusedConv": 3, "FusedGemm": 2, "FusedMatMul": None}
"""Linear in the first operand, with weights in the second, whatever they do with the result; and the position of what they add to it."""
_SUMS = frozenset("Add Sub Concat Sum Max Min".split())
_DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})
_NO_VALUES = frozenset("Shape Size".split())
_HALF_RANGE = (2.0**-6, 2.0**6)
_Change = Callable[[], None]


@dataclass
class _Walk:
    """What a walk found: the scale of each value that is not 1, the changes to make, and what they cost."""

    scales: dict[ir.Value, float] = field(default_factory=dict)
    changes: list[_Change] = field(default_factory=list)
    muls: int = 0
    saved: int = 0
    low: float = 1.0
    high: float = 1.0


class RescaleStream(Pass[ir.Model]):
    """Rescale the streams of `Affine` nodes, in place, where that saves ops.

    Args:
        forms: the linear form of each `Affine` node.

    Attributes:
        note: what was done, in words, with the range of c.
        scales: c of every value that is no longer what it was, by name: it was c times what it is.
    """

    def __init__(self, forms: Forms) -> None:
        self.forms = forms
        self.note = ""
        self.scales: dict[str, float] = {}

    def call(self, graph: ir.Model) -> PassResult[ir.Model]:
        walk = _walked(graph, self.forms)
        half = any(value is not None and value.dtype == ir.DataType.FLOAT16 for node in self.forms for value in node.inputs)
        if half and not (_HALF_RANGE[0] <= walk.low and walk.high <= _HALF_RANGE[1]):
            self.note = f"not rescaled: c would range from {walk.low:.3g} to {walk.high:.3g}, too far for float16"
        elif walk.muls >= walk.saved:
            self.note = f"not rescaled: {walk.muls} readers would need a Mul to save {walk.saved}" if walk.saved else ""
        else:
            for change in walk.changes:
                change()
            self.scales = {str(value.name): scale for value, scale in walk.scales.items()}
            self.note = f"{walk.saved} skip weights became 1, c from {walk.low:.3g} to {walk.high:.3g}, {walk.muls} Muls at readers"
            return PassResult(graph, tuple(str(node.name) for node in self.forms))
        return PassResult(graph, ())


def _walked(model: ir.Model, forms: Forms) -> _Walk:
    walk = _Walk()
    behind: dict[ir.Value, ir.Value] = {}  # value -> c y, computed once
    for node in model.graph:
        captured = {v for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH for v in _outer(a.as_graph())}
        scaled = {value: walk.scales[value] for value in node.inputs if value is not None and value in walk.scales}
        if node in forms:
            _affine(walk, node, forms)
            continue
        for value in captured & set(walk.scales):
            scaled[value] = walk.scales[value]
        if not scaled or node.op_type in _NO_VALUES:
            continue
        found = (
            None
            if captured or node.domain not in _DOMAINS
            else _rule(model, node, [walk.scales.get(v, 1.0) if v is not None else 1.0 for v in node.inputs], forms)
        )
        if found is not None:
            scales, changes = found
            walk.changes += changes
            outputs = zip(node.outputs, scales if isinstance(scales, tuple) else [scales] * len(node.outputs), strict=False)
            walk.scales.update({value: scale for value, scale in outputs if not same(scale, 1.0) and _floating(value)})
            continue
        for value, scale in scaled.items():
            if value not in behind:
                walk.muls += 1
                behind[value] = ir.Value(name=f"{value.name}.true", type=value.type, shape=value.shape)
                walk.changes.append(_restore(model, value, scale, behind[value], node))
            walk.changes.append(_read(node, value, behind[value]))
    for position, value in enumerate(model.graph.outputs):
        if value in walk.scales:
            walk.muls += 1
            walk.changes.append(_output(model, position, value, walk.scales[value]))
    return walk


def _floating(value: ir.Value) -> bool:
    """Not the indices of a maximum, nor the mask of a dropout."""
    return value.dtype is None or value.dtype.is_floating_point()


def _affine(walk: _Walk, node: ir.Node, forms: Forms) -> None:
    form = forms[node]
    scales = [walk.scales.get(value, 1.0) if value is not None else 1.0 for value in node.inputs]
    branches, states = scales[: len(form.alphas)], scales[len(form.alphas) :]
    alphas = [alpha * scale for alpha, scale in zip(form.alphas, branches, strict=True)]
    betas = [beta if beta is None else beta * scale for beta, scale in zip(form.betas, states, strict=True)]
    skip = betas[0] if betas else None
    c = skip if skip is not None and skip > 0 else 1.0
    walk.saved += skip is not None and c == skip and form.betas[0] != 1.0

    def change() -> None:
        form.alphas, form.betas = alphas, betas
        form.downs = [(m, down * states[m]) for m, down in form.downs]
        form.multiply(1 / c)

    walk.changes.append(change)
    if c != 1.0:
        walk.scales[node.outputs[0]] = c
    walk.low, walk.high = min(walk.low, c), max(walk.high, c)


def _rule(model: ir.Model, node: ir.Node, scales: list[float], forms: Forms) -> tuple[float | tuple[float, ...], list[_Change]] | None:
    """The scale of all of a node's outputs, or of each, and the changes that make it so; None where it must read true values."""
    op, first = node.op_type, scales[0]
    constants = [constant_of(value) if scale == 1.0 else None for value, scale in zip(node.inputs, scales, strict=True)]
    others = scales[1:]

    def scaled(position: int, factor: float) -> _Change:
        return partial(scale_constant, model, node, position, factor)

    def agreed(positions: Sequence[int]) -> tuple[float, list[_Change]] | None:
        """One scale for operands that are added."""
        data = [p for p in positions if p < len(scales) and node.inputs[p] is not None]
        branches = {p: form for p in data if (form := _weighted_branch(node.inputs[p], forms)) is not None}
        fixed = [p for p in data if constants[p] is None and p not in branches] or [*branches]
        target = scales[fixed[0]] if fixed else 1.0
        changes: list[_Change] = []
        for p in data:
            if constants[p] is not None:
                changes.append(scaled(p, 1 / target))
            elif p in branches:
                changes.append(partial(branches[p].multiply, scales[p] / target))
            elif not same(scales[p], target):
                return None
        return target, changes

    if is_homogeneous(node) or (op == "Cast" and node.outputs[0].dtype is not None and node.outputs[0].dtype.is_floating_point()):
        return (first, []) if all(scale == 1.0 for scale in others) else None
    if op in _SKIP_NORMS and not any(output.uses() for output in node.outputs[1:3]):
        found = agreed((0, 1, _SKIP_NORMS[op]))
        if found is None:
            return None
        target, changes = found
        epsilon = node.attributes.get_float("epsilon", _SKIP_EPSILON) or 0.0
        return (1.0, 1.0, 1.0, target), [*changes, lambda: node.attributes.add(ir.AttrFloat32("epsilon", epsilon / target**2))]
    if op in _NORMS and all(scale == 1.0 for scale in others) and not any(output.uses() for output in node.outputs[1:]):
        epsilon = node.attributes.get_float("epsilon", _EPSILON) or 0.0
        return 1.0, [lambda: node.attributes.add(ir.AttrFloat32("epsilon", epsilon / first**2))]
    if (
        op == "BatchNormalization"
        and constants[1] is not None
        and constants[3] is not None
        and not node.attributes.get_int("training_mode", 0)
    ):
        return 1.0, [scaled(1, first), scaled(3, 1 / first)]
    if op in _WEIGHTED and constants[1] is not None:
        return _product(node, scales, constants, scaled)
    if op == "MatMul":
        for position in (0, 1):
            if constants[position] is not None:
                return 1.0, [scaled(position, scales[1 - position])]
        return scales[0] * scales[1], []
    if op == "Mul":
        return scales[0] * scales[1], []
    if op == "Div":
        return scales[0] / scales[1], []
    if op == "Sqrt":
        return first**0.5, []
    if op == "Reciprocal":
        return 1 / first, []
    if op == "Pow" and (exponent := constants[1]) is not None and exponent.size == 1:
        return first ** float(exponent.numpy().reshape(())), []
    if op in _SUMS:
        return agreed(range(len(scales)))
    return None


def _product(
    node: ir.Node, scales: list[float], constants: list[ir.TensorProtocol | None], scaled: Callable[[int, float], _Change]
) -> tuple[float, list[_Change]] | None:
    """W x is free of the scale of x; act(W x + v + z) has that of z, where the activation hands a scale on."""
    added = _WEIGHTED[node.op_type]
    if added is None or added >= len(scales) or node.inputs[added] is None or constants[added] is not None:
        return (1.0, [scaled(1, scales[0])]) if all(scale == 1.0 for scale in scales[1:]) else None
    target, between = scales[added], range(2, added)
    free = is_homogeneous_activation(node.attributes.get_string("activation") or "")
    if (not free and target != 1.0) or any(node.inputs[p] is not None and constants[p] is None for p in between):
        return None
    return target, [scaled(1, scales[0] / target), *(scaled(p, 1 / target) for p in between if node.inputs[p] is not None)]


def _weighted_branch(value: ir.Value | None, forms: Forms) -> Affine | None:
    """The form behind a value that is a weighted branch and nothing else, for one reader."""
    producer = value.producer() if value is not None else None
    form = forms.get(producer) if producer is not None else None
    if value is None or form is None or form.betas or len(value.uses()) != 1 or value.is_graph_output():
        return None
    return form


def _restore(model: ir.Model, value: ir.Value, scale: float, result: ir.Value, node: ir.Node) -> _Change:
    def change() -> None:
        dtype = (value.dtype or ir.DataType.FLOAT).numpy()
        factor = constant(model, f"{value.name}.scale", np.asarray(scale, dtype))
        model.graph.insert_before(node, ir.Node("", "Mul", [value, factor], outputs=[result], name=f"{value.name}/rescaled"))

    return change


def _read(node: ir.Node, value: ir.Value, other: ir.Value) -> _Change:
    def change() -> None:
        for position, operand in enumerate(node.inputs):
            if operand is value:
                node.replace_input_with(position, other)
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                for inner in attribute.as_graph().all_nodes():
                    for position, operand in enumerate(inner.inputs):
                        if operand is value:
                            inner.replace_input_with(position, other)

    return change


def _output(model: ir.Model, position: int, value: ir.Value, scale: float) -> _Change:
    """A graph output keeps its name, and the value behind it gets another."""

    def change() -> None:
        dtype = (value.dtype or ir.DataType.FLOAT).numpy()
        factor = constant(model, f"{value.name}.scale", np.asarray(scale, dtype))
        true = ir.Node("", "Mul", [value, factor], num_outputs=1, name=f"{value.name}/rescaled")
        true.outputs[0].type, true.outputs[0].shape = value.type, value.shape
        model.graph.append(true)
        name, value.name = value.name, f"{value.name}.unscaled"
        true.outputs[0].name = name
        model.graph.outputs[position] = true.outputs[0]

    return change


def _outer(graph: ir.Graph) -> set[ir.Value]:
    nodes = list(graph.all_nodes())
    inside = {*graph.inputs, *graph.initializers.values(), *(output for node in nodes for output in node.outputs)}
    return {value for node in nodes for value in node.inputs if value is not None and value not in inside}
