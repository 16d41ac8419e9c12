"""Function bodies  ->  the same with fewer passes over the stream in onnxruntime's CPU kernels, which each read and write whole tensors.

    ReduceSum(Mul(v, q), -1)   ->  MatMul(v, q as [D, 1]), q one value a feature: nothing of the stream's size is written
    Pow(v, 2)                  ->  Mul(v, v)
    Add, as the last op        ->  Sum

The last: onnxruntime makes a SkipLayerNormalization of an Add in front of a LayerNormalization, which takes many times as long as the two do on a
CPU. In a plain net the sum is read by the stream, too, so that it leaves them alone; what an operator with a history lets the next branch read
is read by that alone.

Condition: a function of this package, with opset 18 or later. Two products of one sum may differ in their last bits; the verification of the lowering
compares.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from laurel_rewrite.operators.onnx_function import CALL, DOMAIN, Call
from laurel_rewrite.passes.base import PassResult
from laurel_rewrite.passes.onnx_pass import OnnxPass

_ELEMENTWISE = frozenset("Identity Mul Add Sub Div Neg Cast Exp Sigmoid Tanh Sqrt Reciprocal".split())
_SUMMED = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE})
"""What its kernel for Sum takes."""


class TightenFunctions(OnnxPass):
    """Rewrite the bodies of a model's functions, in place; `changed` are their names."""

    def call(self, graph: ir.Model) -> PassResult[ir.Model]:
        calls = {node.op_identifier(): node for node in graph.graph.all_nodes() if node.domain == DOMAIN}
        changed = [function.name for key, function in graph.functions.items() if key in calls and _tightened(function, calls[key])]
        return PassResult(graph, tuple(changed))


def _tightened(function: ir.Function, node: ir.Node) -> bool:
    """Whether anything of a function was changed that a node calls."""
    vectors = _vectors(function, node, Call.from_json(node.metadata_props[CALL]))
    floats = {inner for inner, value in zip(function.outputs, node.outputs, strict=True) if value.dtype in _SUMMED}
    changed = False
    for inner in list(function):
        if inner.op_type == "ReduceSum":
            changed |= _as_product(function, inner, vectors)
        elif inner.op_type == "Pow" and _is(_second(inner), 2):
            _replaced(function, inner, ir.Node("", "Mul", [inner.inputs[0]] * 2, num_outputs=1))
            changed = True
        elif inner.op_type == "Add" and inner.outputs[0] in floats:
            _replaced(function, inner, ir.Node("", "Sum", inner.inputs, num_outputs=1))
            changed = True
    return changed


def _vectors(function: ir.Function, node: ir.Node, call: Call) -> set[ir.Value]:
    """Values with one number a feature, by the shapes of the parameters."""
    given = dict(zip(function.inputs, node.inputs, strict=True))
    shapes = {inner: value.shape for inner, value in [*given.items()][call.operand_count :] if value is not None}
    found = {inner for inner, shape in shapes.items() if shape is not None and len(shape) == 1 and shape[0] == call.config.dim}
    for inner in function:
        if inner.op_type in _ELEMENTWISE and inner.inputs and all(value in found for value in inner.inputs):
            found.update(inner.outputs)
    return found


def _second(node: ir.Node) -> ir.Value | None:
    return node.inputs[1] if len(node.inputs) > 1 else None


def _is(value: ir.Value | None, number: int) -> bool:
    constant = ir.convenience.get_const_tensor(value) if value is not None else None
    return constant is not None and constant.numpy().reshape(-1).tolist() == [number]


def _as_product(function: ir.Function, node: ir.Node, vectors: set[ir.Value]) -> bool:
    """Whether a sum over the last axis, which stays with size 1, is that of a product with a vector, and now a MatMul."""
    product = node.inputs[0].producer() if node.inputs[0] is not None else None
    keeps = node.attributes["keepdims"].as_int() if "keepdims" in node.attributes else 1
    if not _is(_second(node), -1) or not keeps or product is None:
        return False
    sides = [value in vectors for value in product.inputs]
    if (
        product.op_type != "Mul"
        or sorted(sides) != [False, True]
        or len(product.outputs[0].uses()) > 1
        or product.outputs[0] in function.outputs
    ):
        return False
    vector, value = product.inputs[sides.index(True)], product.inputs[sides.index(False)]
    column = _inserted(function, node, "Reshape", vector, _inserted(function, node, "Constant", value=np.array([-1, 1])))
    _replaced(function, node, ir.Node("", "MatMul", [value, column], num_outputs=1))
    function.remove(product, safe=True)
    return True


def _inserted(function: ir.Function, place: ir.Node, kind: str, *inputs: ir.Value | None, **attributes: np.ndarray) -> ir.Value:
    """The value of a new node in front of another, with a name that no value of the function has."""
    made = [ir.AttrTensor(name, ir.tensor(array)) for name, array in attributes.items()]
    node = ir.Node("", kind, inputs, made, num_outputs=1)
    value = node.outputs[0]
    value.name = f"{place.outputs[0].name}_{kind.lower()}"
    function.insert_before(place, node)
    return value


def _replaced(function: ir.Function, before: ir.Node, node: ir.Node) -> None:
    """Put a node in the place of another, under whose name its value is known."""
    value, old = node.outputs[0], before.outputs[0]
    value.name, value.type, value.shape = old.name, old.type, old.shape
    function.insert_before(before, node)
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    function.remove(before, safe=True)
