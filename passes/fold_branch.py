"""a (W h + v)  ->  (a W) h + (a v): the branch's weight goes into what computes the branch.

Backwards from the branch: through views, pools, ReLU (a > 0) and sums of several branches to the convolutions, products and
normalisations that made it, whose weights and biases are multiplied by a. Exact but for one rounding of each weight.

Refusals, after which the weight stays one Mul: a value on the way that somebody else reads, or that is an output of the graph; a
producer that is not linear in its weights; quantised weights; weights that a multiple would take out of their type's range.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

import numpy as np
import onnx_ir as ir

from laurel_rewrite.operators.affine import Affine, Weight, same
from laurel_rewrite.passes.algebra import Editor, bears, constant_of, is_homogeneous
from laurel_rewrite.passes.base import PassResult
from laurel_rewrite.passes.evaluate_laurel import AFFINE_DOMAIN, Forms
from laurel_rewrite.passes.onnx_pass import OnnxPass

_LINEAR = {
    "Conv": (1, 2), "Gemm": (1, 2), "ConvTranspose": (1, 2), "BatchNormalization": (1, 2), "LayerNormalization": (1, 2), "RMSNormalization": (1,),
    "SimplifiedLayerNormalization": (1,), "InstanceNormalization": (1, 2), "GroupNormalization": (1, 2),
}  # fmt: skip
"""Operators that are linear in these inputs together: weights and, where there is one, bias."""
_POINTWISE = frozenset({"Identity", "Relu", "LeakyRelu", "Dropout"})
_LAST_NORMS = frozenset({"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"})
_TERMS = frozenset({"Add", "Sub", "Sum", "Concat"})
_FACTORS = frozenset({"MatMul", "Mul"})
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
                if isinstance(alpha, float):
                    reason = self._fold(editor, node, position, alpha, changes, seen)
                else:
                    reason = self._fold_vector(form, editor, node, position, alpha, changes, seen)
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

    def _fold_vector(
        self,
        form: Affine,
        editor: Editor,
        reader: ir.Node,
        position: int,
        factor: np.ndarray,
        changes: list[_Change],
        seen: Counter[ir.Value],
    ) -> str:
        """The same for one weight a feature, on the way to what gives these features: no view may move them."""
        value = reader.inputs[position]
        node = value.producer() if value is not None else None
        if value is None or node is None or node.domain not in ("", "ai.onnx"):
            return f"{value.name if value is not None else 'nothing'} is made by nothing that is known to be linear"
        if value.is_graph_output():
            return f"{value.name} is an output"
        seen[value] += 1
        if seen[value] < len(value.uses()):
            return ""
        if node.op_type in _POINTWISE and all(output is value or not output.uses() for output in node.outputs):
            if (factor <= 0).any() and node.op_type in ("Relu", "LeakyRelu"):
                return f"a weight is negative, and {node.op_type} is on the way"
            return self._fold_vector(form, editor, node, 0, factor, changes, seen)
        if node.op_type in ("Add", "Sub"):
            for place, operand in enumerate(node.inputs):
                tensor = constant_of(operand)
                if tensor is None:
                    reason = self._fold_vector(form, editor, node, place, factor, changes, seen)
                else:
                    ones = (1,) * (form.ndim - 2) if form.axis == 1 else ()
                    reason = _scale(editor, node, [place], factor.reshape(-1, *ones), changes)
                if reason:
                    return reason
            return ""
        positions = [1] if node.op_type == "MatMul" else [p for p in _LINEAR.get(node.op_type, ()) if p < len(node.inputs)]
        positions = [p for p in positions if node.inputs[p] is not None]
        shapes = [_shape_of_weights(node, p, form.axis, node.inputs[p]) for p in positions]
        if not positions or None in shapes:
            return f"{node.op_type} is not known to give each feature by weights of its own"
        for place, shape in zip(positions, shapes, strict=True):
            assert shape is not None
            if reason := _scale(editor, node, [place], factor.reshape(shape), changes):
                return reason
        return ""

    def _fold(self, editor: Editor, reader: ir.Node, position: int, factor: float, changes: list[_Change], seen: Counter[ir.Value]) -> str:
        """Collect the changes that multiply what a node reads at an input; why there are none, or "".

        A value with several readers may be multiplied where all of them want it (`seen` counts them), as the two halves of a roll do.
        """
        value = reader.inputs[position]
        if constant_of(value) is not None:
            return _scale(editor, reader, [position], factor, changes)
        node = value.producer() if value is not None else None
        if value is None or node is None:
            return f"{value.name if value is not None else 'nothing'} is an input"
        if value.is_graph_output():
            return f"{value.name} is an output"
        seen[value] += 1
        if seen[value] < len(value.uses()):
            return ""
        if node.domain == AFFINE_DOMAIN:
            changes.append(lambda: self.forms[node].multiply(factor))
            return ""
        if node.domain not in ("", "ai.onnx"):
            return f"{node.op_type} is not known to be linear"
        alone = all(output is value or not output.uses() for output in node.outputs)
        if alone and is_homogeneous(node) and not is_homogeneous(node, factor):
            return f"the weight is negative, and {node.op_type} is on the way"
        if alone and is_homogeneous(node, factor):
            return self._fold(editor, node, 0, factor, changes, seen)
        if node.op_type in _TERMS:
            reasons = (self._fold(editor, node, p, factor, changes, seen) for p, operand in enumerate(node.inputs) if operand is not None)
            return next(filter(None, reasons), "")
        if node.op_type in _FACTORS:  # one factor of a product, a constant where there is one
            reason = f"no factor of {node.op_type} {node.name!r} is a constant of the file, or linear in one"
            for p in sorted((0, 1), key=lambda p: constant_of(node.inputs[p]) is None):
                attempt, counts = list(changes), seen.copy()
                refusal = self._fold(editor, node, p, factor, attempt, counts)
                if not refusal:
                    changes[:] = attempt
                    seen.update(counts - seen)
                    return ""
                reason = refusal if constant_of(node.inputs[p]) is not None else reason
            return reason
        positions = [p for p in _LINEAR.get(node.op_type, ()) if p < len(node.inputs) and node.inputs[p] is not None]
        if not positions:
            return f"{node.op_type} is not linear in its weights"
        return _scale(editor, node, positions, factor, changes)


def _shape_of_weights(node: ir.Node, position: int, axis: int, value: ir.Value | None) -> tuple[int, ...] | None:
    """Where the features that a node gives lie in one of its constants: the shape of a vector that multiplies it; None where that is unknown."""
    rank = len(value.shape) if value is not None and value.shape is not None else None
    if rank is None:
        return None
    if axis == 1:
        if node.op_type == "Conv":
            return (-1, *(1,) * (rank - 1)) if position == 1 else (-1,)
        return (-1,) if node.op_type == "BatchNormalization" else None
    if node.op_type == "Gemm":
        return (-1, 1) if position == 1 and (node.attributes.get_int("transB") or 0) else (-1,)
    whole = (node.attributes.get_int("axis", -1) or -1) == -1
    return (-1,) if node.op_type == "MatMul" or (node.op_type in _LAST_NORMS and whole) else None


def _scale(editor: Editor, node: ir.Node, positions: list[int], factor: Weight, changes: list[_Change]) -> str:
    """Collect the changes that multiply constants that a node reads; why there are none, or ""."""
    tensors = [constant_of(node.inputs[p]) for p in positions]
    if any(tensor is None for tensor in tensors):
        return f"the weights of {node.op_type} {node.name!r} are no constants of the file"
    for tensor in tensors:
        if tensor is not None and not bears(tensor, factor):
            return f"{np.max(np.abs(factor)):.2g} would take the weights of {node.op_type} {node.name!r} out of the range of {tensor.dtype.name}"
    changes += [partial(editor.scale, node, p, factor) for p in positions]
    return ""
