"""What passes know of ops that multiples pass through, of constants and the range of their types, and how they add to a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy

import ml_dtypes
import numpy as np
import onnx_ir as ir

from laurel_rewrite.operators.affine import Weight, same
from laurel_rewrite.passes.onnx_pass import names_of

_HOMOGENEOUS = frozenset(
    """
    Identity Relu LeakyRelu PRelu Abs Neg Reshape Transpose Squeeze Unsqueeze Flatten Slice Expand Tile Gather GatherElements GatherND Dropout
    MaxPool AveragePool GlobalAveragePool GlobalMaxPool ReduceMean ReduceSum ReduceMax ReduceMin DepthToSpace SpaceToDepth Split Trilu
    """.split()
)
POINTWISE = frozenset({"Identity", "Relu", "LeakyRelu", "Dropout"})
"""Those of them that a factor for each element passes through, too."""
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


def constant_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """A floating-point constant: an initializer that no caller can set, or what a Constant node gives."""
    while value is not None and (node := value.producer()) is not None and node.op_type == "Identity":
        value = node.inputs[0]
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if tensor is None or value is None or value.is_graph_input() or not tensor.dtype.is_floating_point():
        return None
    return tensor


class _Scaled(ir.LazyTensor):
    """A multiple, computed when it is written: weights in other files are read one at a time then, and only if they change."""

    __slots__ = ("base", "factor")

    def __init__(self, base: ir.TensorProtocol, factor: Weight) -> None:
        self.base, self.factor = base, factor
        shape = np.broadcast_shapes(tuple(base.shape.numpy()), np.shape(factor))
        super().__init__(self._compute, dtype=base.dtype, shape=ir.Shape(shape))

    def _compute(self) -> ir.TensorProtocol:
        array = self.base.numpy()
        return ir.tensor((np.asarray(array, np.float64) * self.factor).astype(array.dtype), dtype=self.base.dtype)


def scaled(tensor: ir.TensorProtocol, factor: Weight) -> ir.TensorProtocol:
    """A multiple of a constant, by a number or by an array that its shape goes with; a multiple of a multiple is rounded once."""
    return _Scaled(tensor.base, tensor.factor * factor) if isinstance(tensor, _Scaled) else _Scaled(tensor, factor)


def bears(tensor: ir.TensorProtocol, factor: Weight) -> bool:
    """Whether a multiple of a constant keeps its precision: it stays finite, and its largest element normal, whose last bit is then not
    less than what the smaller ones lose."""
    if isinstance(tensor, _Scaled):
        factor, tensor = tensor.factor * factor, tensor.base
    sizes = np.abs(np.asarray(factor, np.float64))
    return all(fits(tensor.numpy(), tensor.dtype, float(size)) for size in {float(sizes.min()), float(sizes.max())})


def fits(array: np.ndarray, dtype: ir.DataType, factor: float = 1.0) -> bool:
    """The same of the multiple of an array that is written in a type."""
    largest, limits = _largest(array), ml_dtypes.finfo(dtype.numpy())  # type: ignore[no-untyped-call]
    grows = abs(factor) >= 1.0 and array.dtype == dtype.numpy()
    multiple = largest * abs(factor)
    return largest == 0.0 or (multiple <= float(limits.max) and (grows or multiple >= float(limits.tiny)))


def _largest(array: np.ndarray) -> float:
    """The largest size of a finite element, 0 where there is none."""
    if not array.size:
        return 0.0
    largest = max(abs(float(array.min())), abs(float(array.max())))
    if not math.isfinite(largest):
        wide = np.abs(array.astype(np.float64))
        largest = float(wide[np.isfinite(wide)].max(initial=0.0))
    return largest


class Editor:
    """Adds constants and nodes to a model, under names that it does not have yet."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self._taken = names_of(model)

    def name(self, wanted: str) -> str:
        """This name, or one like it."""
        unique, count = wanted, 0
        while unique in self._taken:
            count += 1
            unique = f"{wanted}.{count}"
        self._taken.add(unique)
        return unique

    def constant(self, name: str, tensor: np.ndarray | ir.TensorProtocol) -> ir.Value:
        """A new initializer."""
        unique = self.name(name)
        if isinstance(tensor, np.ndarray):
            tensor = ir.tensor(tensor, name=unique)
        tensor.name = unique
        value = ir.Value(name=unique, const_value=tensor)
        value.shape, value.dtype = ir.Shape(tensor.shape.numpy()), tensor.dtype
        self.model.graph.register_initializer(value)
        return value

    def scale(self, node: ir.Node, position: int, factor: Weight) -> None:
        """Multiply the constant that one input of one node reads; other readers keep the old one."""
        value = node.inputs[position]
        tensor = constant_of(value)
        assert value is not None
        assert tensor is not None
        if not same(factor, 1.0):
            node.replace_input_with(position, self.constant(f"{str(value.name).removesuffix('.scaled')}.scaled", scaled(tensor, factor)))

    def insert(
        self,
        before: ir.Node,
        op: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        like: ir.Value | None = None,
        attributes: Mapping[str, int] | None = None,
    ) -> ir.Value:
        """The output of a new node in front of another, of the type and shape of a value."""
        new = ir.Node("", op, inputs, ir.convenience.convert_attributes(attributes or {}), num_outputs=1, name=self.name(name))
        output, graph = new.outputs[0], before.graph
        output.name = self.name(f"{name}.out")
        if like is not None:
            output.type, output.shape = copy(like.type), like.shape  # a value's dtype is changed in its type
        assert graph is not None
        graph.insert_before(before, new)
        return output
