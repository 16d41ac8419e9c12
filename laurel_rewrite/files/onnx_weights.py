"""Which of an ONNX graph's initializers are parameters of the model, and how many: by the ops that read them."""

from __future__ import annotations

import ast
from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir

_KIND = "pkg.torch.export.graph_signature.InputSpec.kind"  # which torch's exporter says of what it did not fold
_FOLDED = "pkg.onnxscript.optimizer.folded_from"
_HUGE = 1e30  # a mask's entry, no weight


def note_kinds(model: ir.Model, parameters: Collection[str], buffers: Collection[str]) -> None:
    """Say of what an export folded, too, whether it was made from parameters; else nobody can tell weights from tables behind it."""
    for value in model.graph.initializers.values():
        made_from = sources(value)
        if made_from and _KIND not in value.metadata_props:
            kind = "PARAMETER" if made_from & set(parameters) else "BUFFER" if made_from & set(buffers) else "CONSTANT_TENSOR"
            value.metadata_props[_KIND] = kind


def sources(value: ir.Value) -> set[str]:
    """Names of the values that an optimiser folded an initializer from; none where it was given."""
    text = value.metadata_props.get(_FOLDED)
    return set(ast.literal_eval(text)) if text is not None else set()


def is_trained(value: ir.Value) -> bool:
    """Whether training changes an initializer: as the exporter says, or else where it has floating-point numbers, and is no mask."""
    tensor = value.const_value
    if tensor is None or not tensor.dtype.is_floating_point():
        return False
    kind = value.metadata_props.get(_KIND)
    if kind is not None:
        return kind == "PARAMETER"
    return tensor.size > 1 and bool(np.abs(tensor.numpy()).max() < _HUGE)


def parameters_of(value: ir.Value) -> int:
    """How many numbers of an initializer are parameters of the model.

    Floating-point numbers are, but for the scales of quantised tensors. Integers are where an op multiplies by them or restores numbers from
    them, also behind a lookup or a view; shapes, indices and zero points are not. Of numbers packed into bytes each counts.
    """
    tensor = value.const_value
    if tensor is None:
        return 0
    uses = list(value.uses())
    if tensor.dtype.is_floating_point():
        return 0 if uses and all(_is_scale(node, position) for node, position in uses) else int(tensor.size)
    return max((_weights(tensor, node, position) for node, position in uses), default=0)


def _is_scale(node: ir.Node, position: int) -> bool:
    """Whether an op reads a scale there; the scale of weights may be multiplied by that of what they multiply."""
    if node.op_type == "Mul" and (other := node.inputs[1 - position]) is not None:
        producer = other.producer()
        return producer is not None and producer.op_type == "DynamicQuantizeLinear"
    return position in _SCALES.get(node.op_type, ())


def _weights(tensor: ir.TensorProtocol, node: ir.Node, position: int) -> int:
    """How many weights an op reads from a tensor of integers; 0 where it reads none."""
    size = int(tensor.size)
    if position in _WEIGHTS.get(node.op_type, ()):
        return size
    if node.op_type in _PACKED and position == 1:  # a row's bytes are filled up to whole blocks
        return node.attributes["K"].as_int() * node.attributes["N"].as_int()
    if node.op_type == "GatherBlockQuantized" and position == 0:
        return size * 8 // (node.attributes.get_int("bits", 4) or 4) if tensor.dtype == ir.DataType.UINT8 else size
    if node.op_type == "Cast" and _small_matrix(tensor):
        return size if ir.DataType(node.attributes["to"].as_int()).is_floating_point() else 0
    if node.op_type in _CARRIERS and position == 0:
        return max((_weights(tensor, user, at) for user, at in node.outputs[0].uses()), default=0)
    return 0


def _small_matrix(tensor: ir.TensorProtocol) -> bool:
    """Whether a tensor has more than one row and column of small integers: no size, index or zero point of a channel."""
    return tensor.dtype.itemsize <= 1 and sum(size > 1 for size in tensor.shape.numpy()) > 1


_PACKED = frozenset("MatMulNBits MatMulBnb4 MatMulFpQ4".split())
_CARRIERS = frozenset("Gather Reshape Transpose Squeeze Unsqueeze Identity".split())
"""Ops that give again some of the numbers of their first input."""
_WEIGHTS: Mapping[str, tuple[int, ...]] = {
    "DequantizeLinear": (0,), "MatMulInteger": (0, 1), "ConvInteger": (1,), "MatMulInteger16": (0, 1), "MatMulIntegerToFloat": (0, 1),
    "DynamicQuantizeMatMul": (1,), "DynamicQuantizeLSTM": (1, 2), "QLinearMatMul": (0, 3), "QLinearConv": (3, 8), "QGemm": (3, 6), "QAttention": (1,),
    "QEmbedLayerNormalization": (2, 3, 4, 5, 6), "QLinearAdd": (0, 3), "QLinearMul": (0, 3), "QMoE": (2, 5, 8),
}  # fmt: skip
"""Inputs whose integers are weights."""
_SCALES: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys("QuantizeLinear DequantizeLinear".split(), (1,)), "MatMulIntegerToFloat": (2, 3), "DynamicQuantizeMatMul": (2,),
    "DynamicQuantizeLSTM": (8, 10), **dict.fromkeys("QLinearMatMul QLinearConv QLinearAdd QLinearMul".split(), (1, 4, 6)), "QGemm": (1, 4, 7),
    "QAttention": (3, 4), "QEmbedLayerNormalization": (8, 9, 10, 11, 12), "QMoE": (3, 6, 9), "GatherBlockQuantized": (2,),
    **dict.fromkeys(_PACKED, (2,)),
}  # fmt: skip
"""Inputs that are scales of quantised tensors."""
