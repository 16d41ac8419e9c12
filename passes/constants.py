"""What passes do with the constants of an ONNX graph: read one, add one, put another in one reader's place."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    """A new initializer, under this name or one like it."""
    taken = model.graph.initializers
    unique, count = name, 0
    while unique in taken:
        count += 1
        unique = f"{name}.{count}"
    value = ir.Value(name=unique, const_value=ir.tensor(array, name=unique))
    value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
    model.graph.register_initializer(value)
    return value


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """A constant's array: of an initializer in the file itself that no caller can set, or of a Constant node."""
    while value is not None and (node := value.producer()) is not None and node.op_type == "Identity":
        value = node.inputs[0]
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if (
        tensor is None
        or value is None
        or value.is_graph_input()
        or isinstance(tensor, ir.ExternalTensor)
        or not tensor.dtype.is_floating_point()
    ):
        return None
    return tensor.numpy()


def replace_constant(model: ir.Model, node: ir.Node, position: int, array: np.ndarray) -> None:
    """Another constant at one input of one node; other readers keep the old one."""
    old = node.inputs[position]
    assert old is not None
    dtype = (old.dtype or ir.DataType.FLOAT).numpy()
    node.replace_input_with(position, constant(model, f"{old.name}.scaled", np.asarray(array, np.float64).astype(dtype)))
