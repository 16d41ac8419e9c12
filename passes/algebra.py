"""What passes know of ops that multiples pass through, and do with constants: find one, add one, multiply the one that a node reads."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

_HOMOGENEOUS = frozenset(
    """
    Identity Relu LeakyRelu PRelu Abs Neg Reshape Transpose Squeeze Unsqueeze Flatten Slice Expand Tile Gather GatherElements GatherND Dropout
    MaxPool AveragePool GlobalAveragePool GlobalMaxPool ReduceMean ReduceSum ReduceMax ReduceMin DepthToSpace SpaceToDepth Split Trilu
    """.split()
)
_ONLY_POSITIVE = frozenset("Relu LeakyRelu PRelu Abs MaxPool GlobalMaxPool ReduceMax ReduceMin".split())


def is_homogeneous(node: ir.Node, factor: float = 1.0) -> bool:
    """Whether f(c x) = c f(x) in the first operand, for a factor c of this sign."""
    if node.op_type == "Pad":
        value = node.inputs[2] if len(node.inputs) > 2 else None
        filling = constant_of(value)
        zeros = value is None or (filling is not None and not filling.numpy().any())
        return zeros or node.attributes.get_string("mode", "constant") != "constant"
    return node.op_type in _HOMOGENEOUS and (factor > 0 or node.op_type not in _ONLY_POSITIVE)


def is_homogeneous_activation(name: str) -> bool:
    """The same of an activation inside a fused node, for positive factors; no activation is one."""
    return not name or name in _HOMOGENEOUS


def constant(model: ir.Model, name: str, tensor: np.ndarray | ir.TensorProtocol) -> ir.Value:
    """A new initializer, under this name or one like it."""
    taken = model.graph.initializers
    unique, count = name, 0
    while unique in taken:
        count += 1
        unique = f"{name}.{count}"
    if isinstance(tensor, np.ndarray):
        tensor = ir.tensor(tensor, name=unique)
    tensor.name = unique
    value = ir.Value(name=unique, const_value=tensor)
    value.shape, value.dtype = ir.Shape(tensor.shape.numpy()), tensor.dtype
    model.graph.register_initializer(value)
    return value


def constant_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """A floating-point constant: an initializer that no caller can set, or what a Constant node gives."""
    while value is not None and (node := value.producer()) is not None and node.op_type == "Identity":
        value = node.inputs[0]
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if tensor is None or value is None or value.is_graph_input() or not tensor.dtype.is_floating_point():
        return None
    return tensor


def scaled(tensor: ir.TensorProtocol, factor: float) -> ir.TensorProtocol:
    """A multiple, computed when it is written: weights in other files are read one at a time then, and only if they change."""

    def compute() -> ir.TensorProtocol:
        return ir.tensor((np.asarray(tensor.numpy(), np.float64) * factor).astype(tensor.numpy().dtype), dtype=tensor.dtype)

    return ir.LazyTensor(compute, dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()))


def scale_constant(model: ir.Model, node: ir.Node, position: int, factor: float) -> None:
    """Multiply the constant that one input of one node reads; other readers keep the old one."""
    value = node.inputs[position]
    tensor = constant_of(value)
    assert value is not None
    assert tensor is not None
    if factor != 1.0:
        node.replace_input_with(position, constant(model, f"{str(value.name).removesuffix('.scaled')}.scaled", scaled(tensor, factor)))
