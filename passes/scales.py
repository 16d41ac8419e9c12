"""How ops read values that are 1/c of what they were, and what scale their results have then.

A scale is a number, or one number a feature: an array that goes with the value by broadcasting, [D] or [C, 1, 1]. A node whose result would be
something else has no answer here, and must read true values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import onnx_ir as ir

from laurel_rewrite.graph.ops.onnx import OPS, SKIP_NORMS
from laurel_rewrite.operators.affine import Affine, Weight, same
from laurel_rewrite.passes.algebra import POINTWISE, Editor, bears, constant_of, is_homogeneous, is_homogeneous_activation
from laurel_rewrite.passes.evaluate_laurel import Forms

Change = Callable[[], None]
_NORMS = frozenset(op for op, kind in OPS.items() if kind.scaleless and op not in SKIP_NORMS) | {"GroupNorm"}
_EPSILON = 1e-5  # their default
_SKIP_NORMS = {"SkipLayerNormalization": 4, "SkipSimplifiedLayerNormalization": 3}
"""Normalisations of a sum of their first two operands and of a bias, here with its position; the fourth output is the sum."""
_SKIP_EPSILON = 1e-12  # their default
_WEIGHTED = {"Conv": None, "ConvTranspose": None, "Gemm": 2, "FusedConv": 3, "FusedGemm": 2, "FusedMatMul": None}
"""Linear in the first operand, with weights in the second, whatever they do with the result; and the position of what they add to it."""
_SUMS = frozenset("Add Sub Concat Sum Max Min".split())
_ARITHMETIC: dict[str, Callable[[Sequence[Weight]], Weight]] = {
    "Mul": lambda scales: scales[0] * scales[1],
    "Div": lambda scales: scales[0] / scales[1],
    "Sqrt": lambda scales: scales[0] ** 0.5,
    "Reciprocal": lambda scales: 1 / scales[0],
}
_BY_ELEMENT = frozenset({"Cast", "Pow", *_ARITHMETIC, *(_SUMS - {"Concat"})})
"""Of an array of scales, which goes with each element, they make one as they make a number of a number."""
_POOLS = frozenset("MaxPool AveragePool GlobalAveragePool GlobalMaxPool".split())
_VIEWS = frozenset("Reshape Flatten Squeeze".split())


class Reader:
    """One node that reads scaled values.

    Args:
        scales: of its inputs.

    Attributes:
        changes: to its constants, for it to do so.
        fits: whether these stay in their types' range.
    """

    def __init__(self, editor: Editor, forms: Forms, node: ir.Node, scales: Sequence[Weight]) -> None:
        self.editor, self.forms, self.node, self.scales = editor, forms, node, scales
        self.constants = [constant_of(value) if _is_one(scale) else None for value, scale in zip(node.inputs, scales, strict=True)]
        self.changes: list[Change] = []
        self.fits = True

    def scales_of_outputs(self) -> Sequence[Weight] | None:
        """The scale of each output, as far as they are not 1; None where the node must read true values."""
        node, op, scales = self.node, self.node.op_type, self.scales
        alone = all(_is_one(scale) for scale in scales[1:])
        if op not in _BY_ELEMENT and any(isinstance(scale, np.ndarray) for scale in scales):
            return self.by_feature(scales[0]) if alone and isinstance(scales[0], np.ndarray) else None
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

    def by_feature(self, scale: np.ndarray) -> Sequence[Weight] | None:
        """The same where the first operand alone has a scale, one a feature."""
        node, op, value = self.node, self.node.op_type, self.node.inputs[0]
        if value is None or value.shape is None:
            return None
        axis, features = len(value.shape) - scale.ndim, scale.reshape(-1)
        if op in POINTWISE or (op in _POOLS and axis == 1) or (op == "ReduceMean" and _averages_beside(node, axis, len(value.shape))):
            return [scale]
        if op in _VIEWS and axis == 1 and all(size == 1 for size in value.shape[2:]) and _is_matrix_of(node.outputs[0], features.size):
            return [features]
        if op == "BatchNormalization" and axis == 1:
            return self.batch_normalisation()
        weights = self.constants[1] if len(self.constants) > 1 else None
        if weights is None:
            return None
        if op == "Conv" and axis == 1:
            self.scale(1, _by_input(features, weights, node.attributes.get_int("group", 1)))
            return []
        if op == "MatMul" and scale.ndim == 1 and len(weights.shape) > 1:
            self.scale(1, features[:, None])
            return []
        if op == "Gemm" and scale.ndim == 1 and not node.attributes.get_int("transA", 0):
            self.scale(1, features if node.attributes.get_int("transB", 0) else features[:, None])
            return []
        return None

    def scale(self, position: int, factor: Weight) -> None:
        """Multiply a constant operand."""
        tensor = self.constants[position]
        assert tensor is not None
        self.fits = self.fits and bears(tensor, factor)
        self.changes.append(partial(self.editor.scale, self.node, position, factor))

    def agree(self, positions: Sequence[int]) -> Weight | None:
        """One scale for operands that are added."""
        data = [p for p in positions if p < len(self.scales) and self.node.inputs[p] is not None]
        branches = {p: form for p in data if (form := _weighted_branch(self.node.inputs[p], self.forms)) is not None}
        fixed = [p for p in data if self.constants[p] is None and p not in branches] or [*branches]
        target = self.scales[fixed[0]] if fixed else 1.0
        for p in data:
            if self.constants[p] is not None:
                self.scale(p, 1 / target)
            elif p in branches:
                factor = self.scales[p] / target
                if isinstance(factor, np.ndarray):
                    return None
                self.changes.append(partial(branches[p].multiply, factor))
            elif not same(self.scales[p], target):
                return None
        return target

    def normalise(self, scale: Weight, default: float) -> float:
        """What is normalised has no scale, behind an epsilon that has its square."""
        assert isinstance(scale, float)
        epsilon = self.node.attributes.get_float("epsilon", default) or 0.0
        self.changes.append(lambda: self.node.attributes.add(ir.AttrFloat32("epsilon", epsilon / scale**2)))
        return 1.0

    def batch_normalisation(self) -> Sequence[Weight] | None:
        training = self.node.attributes.get_int("training_mode", 0)
        if self.constants[1] is None or self.constants[3] is None or training:
            return None
        scale = self.scales[0].reshape(-1) if isinstance(self.scales[0], np.ndarray) else self.scales[0]
        self.scale(1, scale)
        self.scale(3, 1 / scale)
        return []

    def power(self, exponent: float) -> Sequence[Weight] | None:
        try:
            with np.errstate(over="ignore"):
                return [self.scales[0] ** exponent]
        except OverflowError:
            return None

    def product(self) -> Sequence[Weight] | None:
        """W x is free of the scale of x; act(W x + v + z) has that of z, where the activation hands a scale on."""
        node, scales, added = self.node, self.scales, _WEIGHTED[self.node.op_type]
        if added is None or added >= len(scales) or node.inputs[added] is None or self.constants[added] is not None:
            self.scale(1, scales[0])
            return [] if all(_is_one(scale) for scale in scales[1:]) else None
        target = scales[added]
        between = [p for p in range(2, added) if node.inputs[p] is not None]
        free = is_homogeneous_activation(node.attributes.get_string("activation") or "")
        if (not free and not _is_one(target)) or any(self.constants[p] is None for p in between):
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


def _is_one(scale: Weight) -> bool:
    return isinstance(scale, float) and scale == 1.0


def _by_input(features: np.ndarray, weights: ir.TensorProtocol, groups: int) -> np.ndarray:
    """Scales of the channels that a convolution reads, beside its weights, [outputs, channels of a group, ...]."""
    of_groups = features.reshape(groups, -1)
    rows = of_groups if groups == 1 else of_groups.repeat(weights.shape.numpy()[0] // groups, axis=0)
    return rows.reshape(*rows.shape, *(1,) * (len(weights.shape) - 2))


def _averages_beside(node: ir.Node, axis: int, rank: int) -> bool:
    """Whether a mean is over other axes than the features', all of which stay."""
    given = node.inputs[1] if len(node.inputs) > 1 else None
    tensor = ir.convenience.get_const_tensor(given) if given is not None else None
    axes = tensor.numpy().reshape(-1).tolist() if tensor is not None else node.attributes.get_ints("axes", ())
    return bool(axes) and node.attributes.get_int("keepdims", 1) == 1 and all(one % rank != axis for one in axes)


def _is_matrix_of(value: ir.Value, features: int) -> bool:
    return value.shape is not None and len(value.shape) == 2 and value.shape[1] == features
