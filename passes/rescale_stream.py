"""x_i = c_i y_i with c_{i+1} = b_i c_i: the skip's weight becomes 1, and b costs nothing.

    x_{i+1} = a f + b (x_i + U V x_i)        y_{i+1} = (a / c_{i+1}) f + y_i + U V y_i

A weight for each feature makes c one number a feature, which ReLU, pools and convolutions bear (a ResNet), and normalisations do not (a
transformer): both are tried, with those weights and without.

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

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import onnx_ir as ir

from laurel_rewrite.operators.affine import Affine, Weight, same
from laurel_rewrite.passes.algebra import Editor
from laurel_rewrite.passes.base import PassResult
from laurel_rewrite.passes.evaluate_laurel import Forms
from laurel_rewrite.passes.onnx_pass import OnnxPass, subgraphs
from laurel_rewrite.passes.scales import Change, Reader

_DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})
_NO_VALUES = frozenset("Shape Size".split())
_WIDE, _NARROW = 2.0**20, 2.0
"""R, as above."""


@dataclass
class _Walk:
    """What a walk found: the scale of each value that is not 1, the changes to make, and what they cost.

    Attributes:
        features: whether skips with a weight for each feature are rescaled.
        behind: c y, computed once, of a value.
        muls: readers that get a Mul.
        saved: sites whose skip needs none any more.
        reset: sites whose skip keeps one, for c to be 1 again.
        low, high: the range of c.
    """

    editor: Editor
    forms: Forms
    unknown: float
    features: bool
    scales: dict[ir.Value, Weight] = field(default_factory=dict)
    behind: dict[ir.Value, ir.Value] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    muls: int = 0
    saved: int = 0
    reset: int = 0
    low: float = 1.0
    high: float = 1.0

    def of(self, values: Iterable[ir.Value | None]) -> list[Weight]:
        return [self.scales.get(value, 1.0) if value is not None else 1.0 for value in values]

    def bears(self, value: ir.Value, scale: Weight, power: int = 1) -> bool:
        """Whether a scale is within R^power of the value's type."""
        limit = self.unknown if value.dtype is None else _limit(value.dtype)
        return bool(limit**-power <= np.min(scale) and np.max(scale) <= limit**power)

    def restore(self, node: ir.Node, read: Iterable[ir.Value]) -> None:
        """Let a node, and the graphs in it, read true values."""
        for value in read:
            if value not in self.behind:
                self.muls += 1
                self.behind[value] = ir.Value(name=self.editor.name(f"{value.name}.true"), type=value.type, shape=value.shape)
                self.changes.append(partial(_restore, self.editor, value, self.scales[value], self.behind[value], node))
            self.changes.append(partial(_read, node, value, self.behind[value]))


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
        self.scales: dict[str, Weight] = {}

    def call(self, graph: ir.Model) -> PassResult[ir.Model]:
        vectors = any(isinstance(beta, np.ndarray) for form in self.forms.values() for beta in form.betas)
        walks = [_walked(graph, self.forms, features=way) for way in ([False, True] if vectors else [False])]
        walk = max(walks, key=lambda one: one.saved - one.muls)
        if walk.muls >= walk.saved:
            tried = walks[-1]  # all that could be rescaled
            self.note = f"not rescaled: {tried.muls} readers would need a Mul to save {tried.saved}" if tried.saved else ""
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


def _walked(model: ir.Model, forms: Forms, *, features: bool) -> _Walk:
    given = [*model.graph.inputs, *model.graph.initializers.values()]
    types = {value.dtype for value in given if value.dtype is not None and value.dtype.is_floating_point()}
    walk = _Walk(Editor(model), forms, min(map(_limit, types), default=_WIDE), features)
    for node in model.graph:
        if node in forms:
            _affine(walk, node)
            continue
        captured = [value for graph in subgraphs(node) for value in _outer(graph) if value in walk.scales]
        read = dict.fromkeys(value for value in (*node.inputs, *captured) if value is not None and value in walk.scales)
        if not read or node.op_type in _NO_VALUES:
            continue
        if captured or node.domain not in _DOMAINS or not _handed_on(walk, node):
            walk.restore(node, read)
    for value in dict.fromkeys(model.graph.outputs):
        if value in walk.scales:
            walk.muls += value not in walk.behind
            walk.changes.append(partial(_output, walk.editor, value, walk.scales[value], walk.behind.get(value)))
    return walk


def _affine(walk: _Walk, node: ir.Node) -> None:
    form, output = walk.forms[node], node.outputs[0]
    walk.restore(
        node, strange := [value for value in dict.fromkeys(node.inputs) if value is not None and not _lies(walk.of([value])[0], form)]
    )
    scales = [1.0 if value in strange else _flat(scale) for value, scale in zip(node.inputs, walk.of(node.inputs), strict=True)]
    branches, states = scales[: len(form.alphas)], scales[len(form.alphas) :]
    alphas = [alpha * scale for alpha, scale in zip(form.alphas, branches, strict=True)]
    betas = [beta if beta is None else beta * scale for beta, scale in zip(form.betas, states, strict=True)]
    c: Weight = 1.0
    skip = betas[0] if betas else None
    if skip is not None and np.min(skip) > 0 and (walk.features or isinstance(skip, float)):
        if walk.bears(output, skip):
            c = skip
            walk.saved += not (form.betas[0] is not None and same(form.betas[0], 1.0))
        else:
            walk.reset += 1

    def change() -> None:
        form.alphas, form.betas = alphas, betas
        form.downs = [(m, down * states[m]) for m, down in form.downs]
        form.multiply(1 / c)

    walk.changes.append(change)
    if not same(c, 1.0):
        walk.scales[output] = c if isinstance(c, float) else c.reshape(-1, *(1,) * (form.ndim - 2 if form.axis == 1 else 0))
    walk.low, walk.high = min(walk.low, float(np.min(c))), max(walk.high, float(np.max(c)))


def _lies(scale: Weight, form: Affine) -> bool:
    """Whether an array of scales lies at the features of a stream."""
    return isinstance(scale, float) or scale.ndim == (form.ndim - 1 if form.axis == 1 else 1)


def _flat(scale: Weight) -> Weight:
    return scale if isinstance(scale, float) else scale.reshape(-1)


def _handed_on(walk: _Walk, node: ir.Node) -> bool:
    """Whether a node can read scaled values; the scales of what it gives then and the changes that make them so are noted."""
    reader = Reader(walk.editor, walk.forms, node, walk.of(node.inputs))
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


def _restore(editor: Editor, value: ir.Value, scale: Weight, result: ir.Value, before: ir.Node | None = None) -> None:
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


def _output(editor: Editor, value: ir.Value, scale: Weight, true: ir.Value | None) -> None:
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
