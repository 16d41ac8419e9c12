"""x_i = c_i y_i with c_{i+1} = b_i c_i: the skip's weight becomes 1, and b costs nothing.

    x_{i+1} = a f + b (x_i + U V x_i)        y_{i+1} = (a / c_{i+1}) f + y_i + U V y_i

Whoever reads x must then read c y. One walk through the graph, in order, carries the scale of every value: normalisations take it into
epsilon (c^2) and are free of it, linear readers take it into their weights, positively homogeneous ops hand it on, products multiply the
scales of their operands. What is added must have one scale: constants and weighted branches are brought to the stream's, also inside
SkipLayerNormalization and fused convolutions. Anything else reads the value behind one Mul.

Range: y = x / c must be a number wherever x was one, and so must its square, by which a normalisation divides, and epsilon / c^2. So c stays
within [1/R, R], and the scale of any other value (c^2 behind a square) within [1/R^2, R^2]. Where the next c would leave that, the skip
keeps its weight, one Mul, and c is 1 again. R is a fraction of what the type that holds the value can bear:

    float32, bfloat16, float64   R = 2^20   x up to 2^30 and epsilon from 1e-18: y^2, summed over 2^20 features, stays below 2^120 of 2^128,
                                            epsilon / c^2 above 2^-100 of 2^-126
    float16                      R = 2      half of the room that x had below 65504; squares had little (x below 256), and keep a half too

Refusals: where more Muls would come in than go out; quantised weights, and constants that a multiple would take out of their type's range,
whose readers get the Mul.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import onnx_ir as ir

from laurel_rewrite.graph.ops.onnx import OPS, SKIP_NORMS
from laurel_rewrite.operators.affine import Affine, same
from laurel_rewrite.passes.algebra import Editor, bears, constant_of, is_homogeneous, is_homogeneous_activation
from laurel_rewrite.passes.base import PassResult
from laurel_rewrite.passes.evaluate_laurel import Forms
from laurel_rewrite.passes.onnx_pass import OnnxPass, subgraphs

_NORMS = frozenset(op for op, kind in OPS.items() if kind.scaleless and op not in SKIP_NORMS) | {"GroupNorm"}
_EPSILON = 1e-5  # their default
_SKIP_NORMS = {"SkipLayerNormalization": 4, "SkipSimplifiedLayerNormalization": 3}
"""Normalisations of a sum of their first two operands and of a bias, here with its position; the fourth output is the sum."""
_SKIP_EPSILON = 1e-12  # their default
_WEIGHTED = {"Conv": None, "ConvTranspose": None, "Gemm": 2, "FusedConv": 3, "FusedGemm": 2, "FusedMatMul": None}
"""Linear in the first operand, with weights in the second, whatever they do with the result; and the position of what they add to it."""
_SUMS = frozenset("Add Sub Concat Sum Max Min".split())
_ARITHMETIC: dict[str, Callable[[Sequence[float]], float]] = {
    "Mul": lambda scales: scales[0] * scales[1],
    "Div": lambda scales: scales[0] / scales[1],
    "Sqrt": lambda scales: scales[0] ** 0.5,
    "Reciprocal": lambda scales: 1 / scales[0],
}
_DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})
_NO_VALUES = frozenset("Shape Size".split())
_WIDE, _NARROW = 2.0**20, 2.0
"""R, as above."""
_Change = Callable[[], None]


@dataclass
class _Walk:
    """What a walk found: the scale of each value that is not 1, the changes to make, and what they cost.

    Attributes:
        muls: readers that get a Mul.
        saved: sites whose skip needs none any more.
        reset: sites whose skip keeps one, for c to be 1 again.
        low, high: the range of c.
    """

    editor: Editor
    forms: Forms
    unknown: float
    scales: dict[ir.Value, float] = field(default_factory=dict)
    changes: list[_Change] = field(default_factory=list)
    muls: int = 0
    saved: int = 0
    reset: int = 0
    low: float = 1.0
    high: float = 1.0

    def of(self, values: Iterable[ir.Value | None]) -> list[float]:
        return [self.scales.get(value, 1.0) if value is not None else 1.0 for value in values]

    def bears(self, value: ir.Value, scale: float, power: int = 1) -> bool:
        """Whether a scale is within R^power of the value's type."""
        limit = self.unknown if value.dtype is None else _limit(value.dtype)
        return limit**-power <= scale <= limit**power


class RescaleStream(OnnxPass):
    """Rescale the streams of `Affine` nodes, in place, where that saves ops.

    Args:
        forms: the linear form of each `Affine` node.

    Attributes:
        note: what was done, in words, with the range of c.
        saved, resets, readers: skips whose weight became 1, those at which c is set back to 1 by a Mul, and other Muls that came in.
        scales: c of every value that is no longer what it was, by name: it was c times what it is.
    """

    def __init__(self, forms: Forms) -> None:
        self.forms = forms
        self.note = ""
        self.saved = self.resets = self.readers = 0
        self.scales: dict[str, float] = {}

    def call(self, graph: ir.Model) -> PassResult[ir.Model]:
        walk = _walked(graph, self.forms)
        if walk.muls >= walk.saved:
            self.note = f"not rescaled: {walk.muls} readers would need a Mul to save {walk.saved}" if walk.saved else ""
            return PassResult(graph, ())
        for change in walk.changes:
            change()
        self.scales = {str(value.name): scale for value, scale in walk.scales.items()}
        self.saved, self.resets, self.readers = walk.saved, walk.reset, walk.muls
        reset = f", set back to 1 by a Mul at {walk.reset} sites" if walk.reset else ""
        self.note = f"{walk.saved} skip weights became 1, c from {walk.low:.3g} to {walk.high:.3g}{reset}, {walk.muls} Muls at readers"
        return PassResult(graph, tuple(str(node.name) for node in self.forms))


def _limit(dtype: ir.DataType) -> float:
    return _NARROW if dtype == ir.DataType.FLOAT16 or dtype.bitwidth < 16 else _WIDE


def _walked(model: ir.Model, forms: Forms) -> _Walk:
    given = [*model.graph.inputs, *model.graph.initializers.values()]
    types = {value.dtype for value in given if value.dtype is not None and value.dtype.is_floating_point()}
    walk = _Walk(Editor(model), forms, min(map(_limit, types), default=_WIDE))
    behind: dict[ir.Value, ir.Value] = {}  # value -> c y, computed once
    for node in model.graph:
        if node in forms:
            _affine(walk, node)
            continue
        captured = [value for graph in subgraphs(node) for value in _outer(graph) if value in walk.scales]
        read = {value: walk.scales[value] for value in (*node.inputs, *captured) if value is not None and value in walk.scales}
        if not read or node.op_type in _NO_VALUES:
            continue
        if not captured and node.domain in _DOMAINS and _handed_on(walk, node):
            continue
        for value, scale in read.items():
            if value not in behind:
                walk.muls += 1
                behind[value] = ir.Value(name=walk.editor.name(f"{value.name}.true"), type=value.type, shape=value.shape)
                walk.changes.append(partial(_restore, walk.editor, value, scale, behind[value], node))
            walk.changes.append(partial(_read, node, value, behind[value]))
    for value in dict.fromkeys(model.graph.outputs):
        if value in walk.scales:
            walk.muls += value not in behind
            walk.changes.append(partial(_output, walk.editor, value, walk.scales[value], behind.get(value)))
    return walk


def _affine(walk: _Walk, node: ir.Node) -> None:
    form, output = walk.forms[node], node.outputs[0]
    scales = walk.of(node.inputs)
    branches, states = scales[: len(form.alphas)], scales[len(form.alphas) :]
    alphas = [alpha * scale for alpha, scale in zip(form.alphas, branches, strict=True)]
    betas = [beta if beta is None else beta * scale for beta, scale in zip(form.betas, states, strict=True)]
    c = 1.0
    if betas and isinstance(betas[0], float) and betas[0] > 0:
        if walk.bears(output, betas[0]):
            c = betas[0]
            walk.saved += not same(form.betas[0] or 0.0, 1.0)
        else:
            walk.reset += 1

    def change() -> None:
        form.alphas, form.betas = alphas, betas
        form.downs = [(m, down * states[m]) for m, down in form.downs]
        form.multiply(1 / c)

    walk.changes.append(change)
    if not same(c, 1.0):
        walk.scales[output] = c
    walk.low, walk.high = min(walk.low, c), max(walk.high, c)


def _handed_on(walk: _Walk, node: ir.Node) -> bool:
    """Whether a node can read scaled values; the scales of what it gives then and the changes that make them so are noted."""
    reader = _Reader(walk, node)
    found = reader.scales_of_outputs()
    if found is None or not reader.fits:
        return False
    outputs = {value: scale for value, scale in zip(node.outputs, found, strict=False) if not same(scale, 1.0) and _floating(value)}
    if not all(walk.bears(value, scale, power=2) for value, scale in outputs.items()):
        return False
    walk.changes += reader.changes
    walk.scales |= outputs
    return True


def _floating(value: ir.Value) -> bool:
    return value.dtype is None or value.dtype.is_floating_point()


class _Reader:
    """One node that reads scaled values.

    Attributes:
        changes: to its constants, for it to do so.
        fits: whether these stay in their types' range.
    """

    def __init__(self, walk: _Walk, node: ir.Node) -> None:
        self.walk, self.node = walk, node
        self.scales = walk.of(node.inputs)
        self.constants = [constant_of(value) if scale == 1.0 else None for value, scale in zip(node.inputs, self.scales, strict=True)]
        self.changes: list[_Change] = []
        self.fits = True

    def scales_of_outputs(self) -> Sequence[float] | None:
        """The scale of each output, as far as they are not 1; None where the node must read true values."""
        node, op, scales = self.node, self.node.op_type, self.scales
        alone = all(scale == 1.0 for scale in scales[1:])
        if is_homogeneous(node):  # MaxPool's indices and Dropout's mask have no scale
            return [scales[0]] * (len(node.outputs) if op == "Split" else 1) if alone else None
        if op == "Cast" and node.outputs[0].dtype is not None and node.outputs[0].dtype.is_floating_point():
            return scales
        if op in _SKIP_NORMS and not any(output.uses() for output in node.outputs[1:3]):
            target = self.agree((0, 1, _SKIP_NORMS[op]))
            return None if target is None else [self.normalise(target, _SKIP_EPSILON), 1.0, 1.0, target]
        if op in _NORMS and alone and not any(output.uses() for output in node.outputs[1:]):
            return [self.normalise(scales[0], _EPSILON)]
        if op == "BatchNormalization" and alone:
            return self.batch_normalisation()
        if op in _WEIGHTED and self.constants[1] is not None:
            return self.product()
        if op == "MatMul" and (fixed := [p for p in (0, 1) if self.constants[p] is not None]):
            self.scale(fixed[0], scales[1 - fixed[0]])
            return []
        if op == "MatMul":
            return [scales[0] * scales[1]]
        if op in _ARITHMETIC:
            return [_ARITHMETIC[op](scales)]
        if op == "Pow" and (exponent := self.constants[1]) is not None and exponent.size == 1:
            return self.power(float(exponent.numpy().reshape(())))
        if op in _SUMS:
            target = self.agree(range(len(scales)))
            return None if target is None else [target]
        return None

    def scale(self, position: int, factor: float) -> None:
        """Multiply a constant operand."""
        tensor = self.constants[position]
        assert tensor is not None
        self.fits = self.fits and bears(tensor, factor)
        self.changes.append(partial(self.walk.editor.scale, self.node, position, factor))

    def agree(self, positions: Sequence[int]) -> float | None:
        """One scale for operands that are added."""
        data = [p for p in positions if p < len(self.scales) and self.node.inputs[p] is not None]
        branches = {p: form for p in data if (form := _weighted_branch(self.node.inputs[p], self.walk.forms)) is not None}
        fixed = [p for p in data if self.constants[p] is None and p not in branches] or [*branches]
        target = self.scales[fixed[0]] if fixed else 1.0
        for p in data:
            if self.constants[p] is not None:
                self.scale(p, 1 / target)
            elif p in branches:
                self.changes.append(partial(branches[p].multiply, self.scales[p] / target))
            elif not same(self.scales[p], target):
                return None
        return target

    def normalise(self, scale: float, default: float) -> float:
        """What is normalised has no scale, behind an epsilon that has its square."""
        epsilon = self.node.attributes.get_float("epsilon", default) or 0.0
        self.changes.append(lambda: self.node.attributes.add(ir.AttrFloat32("epsilon", epsilon / scale**2)))
        return 1.0

    def batch_normalisation(self) -> Sequence[float] | None:
        training = self.node.attributes.get_int("training_mode", 0)
        if self.constants[1] is None or self.constants[3] is None or training:
            return None
        self.scale(1, self.scales[0])
        self.scale(3, 1 / self.scales[0])
        return []

    def power(self, exponent: float) -> Sequence[float] | None:
        try:
            return [self.scales[0] ** exponent]
        except OverflowError:
            return None

    def product(self) -> Sequence[float] | None:
        """W x is free of the scale of x; act(W x + v + z) has that of z, where the activation hands a scale on."""
        node, scales, added = self.node, self.scales, _WEIGHTED[self.node.op_type]
        if added is None or added >= len(scales) or node.inputs[added] is None or self.constants[added] is not None:
            self.scale(1, scales[0])
            return [] if all(scale == 1.0 for scale in scales[1:]) else None
        target = scales[added]
        between = [p for p in range(2, added) if node.inputs[p] is not None]
        free = is_homogeneous_activation(node.attributes.get_string("activation") or "")
        if (not free and target != 1.0) or any(self.constants[p] is None for p in between):
            return None
        self.scale(1, scales[0] / target)
        for p in between:
            self.scale(p, 1 / target)
        return [target]


def _weighted_branch(value: ir.Value | None, forms: Forms) -> Affine | None:
    """The form behind a value that is a weighted branch and nothing else, for one reader."""
    producer = value.producer() if value is not None else None
    form = forms.get(producer) if producer is not None else None
    if value is None or form is None or form.betas or len(value.uses()) != 1 or value.is_graph_output():
        return None
    return form


def _restore(editor: Editor, value: ir.Value, scale: float, result: ir.Value, before: ir.Node | None = None) -> None:
    """c y, in front of a node or at the end."""
    dtype = value.dtype or ir.DataType.FLOAT
    factor = editor.constant(f"{value.name}.scale", ir.tensor(np.asarray(scale, dtype.numpy()), dtype=dtype))
    mul = ir.Node("", "Mul", [value, factor], outputs=[result], name=editor.name(f"{value.name}/rescaled"))
    if before is None:
        editor.model.graph.append(mul)
    else:
        editor.model.graph.insert_before(before, mul)


def _read(node: ir.Node, value: ir.Value, other: ir.Value) -> None:
    for reader in (node, *(inner for graph in subgraphs(node) for inner in graph.all_nodes())):
        for position, operand in enumerate(reader.inputs):
            if operand is value:
                reader.replace_input_with(position, other)


def _output(editor: Editor, value: ir.Value, scale: float, true: ir.Value | None) -> None:
    """A graph output keeps its name, and the value behind it gets another."""
    if true is None:
        true = ir.Value(type=value.type, shape=value.shape)
        _restore(editor, value, scale, true)
    true.name, value.name = value.name, editor.name(f"{value.name}.unscaled")
    outputs = editor.model.graph.outputs
    for position, output in enumerate(outputs):
        if output is value:
            outputs[position] = true


def _outer(graph: ir.Graph) -> list[ir.Value]:
    """What a subgraph reads that it does not compute, in the order of reading."""
    nodes = list(graph.all_nodes())
    inside = {*graph.inputs, *graph.initializers.values(), *(output for node in nodes for output in node.outputs)}
    return [value for node in nodes for value in node.inputs if value is not None and value not in inside]
