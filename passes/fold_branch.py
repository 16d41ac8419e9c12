"""a (W h + v)  ->  (a W) h + (a v): the branch's weight goes into what computes the branch.

Backwards from the branch: through views, pools, ReLU (a > 0) and sums of several branches to the convolutions, products and
normalisations that made it, whose weights and biases are multiplied by a. Exact but for one rounding of each weight. A weight for each
feature goes the same way, but past views, which move features.

Refusals, after which the weight stays one Mul: a value on the way that somebody else reads, or that is an output of the graph; a
producer that is not linear in its weights; quantised weights; weights that a multiple would take out of their type's range.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from laurel_rewrite.operators.affine import Weight, same
from laurel_rewrite.passes.algebra import POINTWISE, Editor, bears, constant_of, is_homogeneous
from laurel_rewrite.passes.base import PassResult
from laurel_rewrite.passes.evaluate_laurel import AFFINE_DOMAIN, Forms
from laurel_rewrite.passes.onnx_pass import OnnxPass

_LINEAR = {
    "Conv": (1, 2), "Gemm": (1, 2), "ConvTranspose": (1, 2), "BatchNormalization": (1, 2), "LayerNormalization": (1, 2), "RMSNormalization": (1,),
    "SimplifiedLayerNormalization": (1,), "InstanceNormalization": (1, 2), "GroupNormalization": (1, 2),
}  # fmt: skip
"""Operators that are linear in these inputs together: weights and, where there is one, bias."""
_PER_FEATURE: dict[int, dict[str, tuple[int, ...]]] = {
    -1: {"MatMul": (1,), **{op: _LINEAR[op] for op in ("Gemm", "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")}},
    1: {op: _LINEAR[op] for op in ("Conv", "BatchNormalization")},
}
"""By the stream's axis: those of them whose constants lie along the features, each on its own."""
_TERMS = frozenset({"Add", "Sub", "Sum", "Concat"})
_FACTORS = frozenset({"MatMul", "Mul"})
_ELEMENTWISE = _TERMS | {"Mul"}
_Change = Callable[[], None]


class FoldBranch(OnnxPass):
    """Fold the weights of `Affine` nodes' branches into what computes them, in place.

    Args:
        forms: the linear form of each `Affine` node.

    Attributes:
        refused: nodes with a branch whose weight could not be folded, and why.
        scales: c of every value on the way, which may be that of another site, by name: it was c times what it is.
    """

    def __init__(self, forms: Forms) -> None:
        self.forms = forms
        self.refused: dict[str, str] = {}
        self.scales: dict[str, float] = {}

    def call(self, graph: ir.Model) -> PassResult[ir.Model]:
        folded, editor = [], Editor(graph)
        for node, form in self.forms.items():
            for position, alpha in enumerate(form.alphas):
                if same(alpha, 1.0):
                    continue
                changes: list[_Change] = []
                seen: Counter[ir.Value] = Counter()
                features = None if isinstance(alpha, float) else _Features(form.axis, form.ndim)
                reason = self._fold(editor, node, position, alpha, changes, seen, features)
                others = (value for value, count in seen.items() if count < len(value.uses()))
                reason = reason or next((f"{value.name} has other readers" for value in others), "")
                if reason:
                    self.refused[str(node.name)] = reason
                    continue
                for change in changes:
                    change()
                if isinstance(alpha, float):
                    for value in seen:
                        self.scales[str(value.name)] = self.scales.get(str(value.name), 1.0) / alpha
                form.alphas[position] = 1.0
                folded.append(str(node.name))
        return PassResult(graph, tuple(folded))

    def _fold(
        self,
        editor: Editor,
        reader: ir.Node,
        position: int,
        factor: Weight,
        changes: list[_Change],
        seen: Counter[ir.Value],
        features: _Features | None,
    ) -> str:
        """Collect the changes that multiply what a node reads at an input; why there are none, or "".

        A value with several readers may be multiplied where all of them want it (`seen` counts them), as the two halves of a roll do.
        """
        value = reader.inputs[position]
        if constant_of(value) is not None:
            return _scale(editor, reader, [position], factor, changes, features)
        node = value.producer() if value is not None else None
        if value is None or node is None:
            return f"{value.name if value is not None else 'nothing'} is an input"
        if value.is_graph_output():
            return f"{value.name} is an output"
        if features is not None and not features.lie_in(value, factor):
            return f"the features of {value.name} are not known to be the stream's"
        seen[value] += 1
        if seen[value] < len(value.uses()):
            return ""
        if node.domain == AFFINE_DOMAIN and isinstance(factor, float):
            changes.append(lambda: self.forms[node].multiply(factor))
            return ""
        if node.domain not in ("", "ai.onnx"):
            return f"{node.op_type} is not known to be linear"
        alone = all(output is value or not output.uses() for output in node.outputs)
        least = factor if isinstance(factor, float) else float(factor.min())
        passes = alone and (features is None or node.op_type in POINTWISE)
        if passes and is_homogeneous(node) and not is_homogeneous(node, least):
            return f"the weight is negative, and {node.op_type} is on the way"
        if passes and is_homogeneous(node, least):
            return self._fold(editor, node, 0, factor, changes, seen, features)
        if node.op_type in _TERMS and (features is None or node.op_type != "Concat"):
            terms = (p for p, operand in enumerate(node.inputs) if operand is not None)
            return next(filter(None, (self._fold(editor, node, p, factor, changes, seen, features) for p in terms)), "")
        if node.op_type in _FACTORS and (features is None or node.op_type in _ELEMENTWISE):
            # One factor of a product, a constant where there is one.
            reason = f"no factor of {node.op_type} {node.name!r} is a constant of the file, or linear in one"
            for p in sorted((0, 1), key=lambda p: constant_of(node.inputs[p]) is None):
                attempt, counts = list(changes), seen.copy()
                refusal = self._fold(editor, node, p, factor, attempt, counts, features)
                if not refusal:
                    changes[:] = attempt
                    seen.update(counts - seen)
                    return ""
                reason = refusal if constant_of(node.inputs[p]) is not None else reason
            return reason
        linear = _LINEAR if features is None else _PER_FEATURE[features.axis]
        positions = [p for p in linear.get(node.op_type, ()) if p < len(node.inputs) and node.inputs[p] is not None]
        if not positions:
            return f"{node.op_type} is not linear in its weights"
        return _scale(editor, node, positions, factor, changes, features)


@dataclass(frozen=True)
class _Features:
    """Where a stream has its features, one weight each."""

    axis: int
    ndim: int

    def lie_in(self, value: ir.Value, factor: Weight) -> bool:
        """Whether a value has as many features as there are weights, at the stream's place."""
        shape = value.shape
        return shape is not None and len(shape) == self.ndim and shape[self.axis] == np.size(factor)

    def beside(self, node: ir.Node, position: int, factor: np.ndarray) -> np.ndarray:
        """The weights in the shape that multiplies a constant operand of a node by feature."""
        tensor = constant_of(node.inputs[position])
        assert tensor is not None
        if node.op_type == "Conv":
            trailing = len(tensor.shape) - 1  # [C, ...] and [C]
        elif node.op_type == "Gemm":
            trailing = 1 if position == 1 and node.attributes.get_int("transB", 0) == 1 else 0
        else:
            trailing = self.ndim - 2 if self.axis == 1 and node.op_type in _ELEMENTWISE else 0
        return factor.reshape(-1, *(1,) * trailing)


def _scale(editor: Editor, node: ir.Node, positions: list[int], factor: Weight, changes: list[_Change], features: _Features | None) -> str:
    """Collect the changes that multiply constants that a node reads; why there are none, or ""."""
    for p in positions:
        tensor = constant_of(node.inputs[p])
        if tensor is None:
            return f"the weights of {node.op_type} {node.name!r} are no constants of the file"
        if not bears(tensor, factor):
            size = float(np.max(np.abs(factor)))
            return f"{size:.2g} would take the weights of {node.op_type} {node.name!r} out of the range of {tensor.dtype.name}"
    for p in positions:
        beside = factor if features is None or isinstance(factor, float) else features.beside(node, p, factor)
        changes.append(partial(editor.scale, node, p, beside))
    return ""
