"""A copy of an ONNX model that can be read: local functions inlined, every shape that can be inferred."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnx_shape_inference import ShapeInferenceContext, infer_symbolic_shapes, registry

from laurel_rewrite.capture import quiet

_CONTRIB = "com.microsoft"
_ALIKE = {"FusedConv": ("Conv", 3), "FusedGemm": ("Gemm", 3)}
"""onnxruntime's fusions that the inference does not know: what the shape is that of, and how many inputs that takes."""


def completed(model: ir.Model) -> ir.Model:
    """The model itself where nothing is to be done, else a copy; tensors are shared, and large ones not read.

    onnx's own inference comes first, for it knows every operator of the standard; the symbolic one goes on behind onnxruntime's.

    Raises:
        ValueError, RuntimeError: the nodes are not in topological order, or the shapes that the graph gives contradict each other.
    """
    if model.functions:
        model = common.InlinePass()(model.clone()).model
    for infer in (_onnx, _symbolic):
        if _lacks_shapes(model):
            with quiet():
                model = infer(model.clone())
    return model


def _lacks_shapes(model: ir.Model) -> bool:
    return any(value.name and (value.shape is None or value.dtype is None) for node in model.graph for value in node.outputs)


def _onnx(model: ir.Model) -> ir.Model:
    return common.ShapeInferencePass()(model).model


def _symbolic(model: ir.Model) -> ir.Model:
    for op in _ALIKE:
        if registry.get(_CONTRIB, op, 1) is None:
            registry.register(_CONTRIB, op)(_like)
    infer_symbolic_shapes(model, warn_on_missing=False)
    return model


def _like(context: ShapeInferenceContext, node: ir.Node) -> None:
    op, inputs = _ALIKE[node.op_type]
    infer = registry.get("", op, context.opset)
    twin = ir.Node("", op, node.inputs[:inputs], node.attributes.values(), num_outputs=1)
    try:
        if infer is not None:
            infer(context, twin)
        context.set_shape_and_dtype(node.outputs[0], twin.outputs[0].shape, twin.outputs[0].dtype)
    finally:
        for position in range(len(twin.inputs)):
            twin.replace_input_with(position, None)
