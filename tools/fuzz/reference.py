"""ONNX graphs in float64, by torch functions and nothing of this project: what the other ways to compute a graph are held against.

Every floating-point number is a float64 here, whatever the graph calls it; a Cast to another such type does nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional as F


def evaluate(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs of a model without local functions.

    Raises:
        KeyError: an operator that is not known here.
    """
    values = {value: _exact(torch.from_numpy(feeds[str(value.name)])) for value in model.graph.inputs if value.name in feeds}
    return [tensor.numpy() for tensor in _run(model.graph, values)]


def _exact(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _constant(tensor: ir.TensorProtocol) -> Tensor:
    array = np.asarray(tensor.numpy())
    return torch.from_numpy(array.astype(np.float64) if tensor.dtype.is_floating_point() else array.copy())


def _run(graph: ir.Graph, values: dict[ir.Value, Tensor]) -> list[Tensor]:
    """One graph; `values` are its inputs, and all that it can see outside."""
    for value in graph.initializers.values():
        if value not in values:
            assert value.const_value is not None
            values[value] = _constant(value.const_value)
    for node in graph:
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        inputs = [values[value] if value is not None and value.name else None for value in node.inputs]
        if node.op_type == "If":
            assert inputs[0] is not None
            results: Any = _run(attributes["then_branch" if bool(inputs[0]) else "else_branch"], dict(values))
        elif node.op_type == "Loop":
            results = _loop(attributes["body"], inputs, values)
        else:
            results = _OPS[node.op_type](attributes, *inputs)
        for value, result in zip(node.outputs, results if isinstance(results, list | tuple) else [results], strict=False):
            values[value] = result
    return [values[value] for value in graph.outputs]


def _loop(body: ir.Graph, inputs: Sequence[Tensor | None], values: Mapping[ir.Value, Tensor]) -> list[Tensor]:
    """Values that are carried from turn to turn; the condition stays true."""
    turns, _, *carried = inputs
    assert turns is not None
    for turn in range(int(turns)):
        given = zip(body.inputs, (torch.tensor(turn), torch.tensor(True), *carried), strict=True)
        _, *carried = _run(body, {**values, **{value: tensor for value, tensor in given if tensor is not None}})
    return [tensor for tensor in carried if tensor is not None]


_Attributes = Mapping[str, Any]


def _ints(tensor: Tensor) -> list[int]:
    return [int(number) for number in tensor.reshape(-1)]


def _activated(a: _Attributes, value: Tensor) -> Tensor:
    return {"": lambda v: v, "Relu": torch.relu, "Tanh": torch.tanh, "Sigmoid": torch.sigmoid}[a.get("activation", "")](value)


def _conv(a: _Attributes, x: Tensor, w: Tensor, b: Tensor | None = None, z: Tensor | None = None) -> Tensor:
    spatial = x.ndim - 2
    pads = a.get("pads", [0] * 2 * spatial)
    padded = F.pad(x, [side for axis in reversed(range(spatial)) for side in (pads[axis], pads[axis + spatial])])
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[spatial]
    result = convolve(padded, w, b, tuple(a.get("strides", [1] * spatial)), groups=a.get("group", 1))
    return _activated(a, result if z is None else result + z)


def _gemm(a: _Attributes, x: Tensor, w: Tensor, c: Tensor | None = None) -> Tensor:
    left, right = (x.T if a.get("transA") else x), (w.T if a.get("transB") else w)
    result = a.get("alpha", 1.0) * left @ right
    return _activated(a, result if c is None else result + a.get("beta", 1.0) * c)


def _fused_matmul(a: _Attributes, x: Tensor, y: Tensor) -> Tensor:
    left, right = (x.mT if a.get("transA") else x), (y.mT if a.get("transB") else y)
    return a.get("alpha", 1.0) * (left @ right)


def _rms(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


def _skip_layer_norm(
    a: _Attributes, x: Tensor, skip: Tensor, weight: Tensor, beta: Tensor | None = None, bias: Tensor | None = None
) -> Any:
    total = x + skip if bias is None else x + skip + bias
    return F.layer_norm(total, total.shape[-1:], weight, beta, a.get("epsilon", 1e-12)), None, None, total


def _skip_rms_norm(a: _Attributes, x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    total = x + skip if bias is None else x + skip + bias
    return _rms(total, weight, a.get("epsilon", 1e-12)), None, None, total


def _reshape(a: _Attributes, x: Tensor, shape: Tensor) -> Tensor:
    return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(_ints(shape))])


def _slice(a: _Attributes, x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor, steps: Tensor | None = None) -> Tensor:
    by = [1] * starts.numel() if steps is None else _ints(steps)
    for start, end, axis, step in zip(*map(_ints, (starts, ends, axes)), by, strict=True):
        x = x[(slice(None),) * (axis % x.ndim) + (slice(start, end, step),)]
    return x


def _split(a: _Attributes, x: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
    return x.split(_ints(sizes), a.get("axis", 0))


def _reduced(of: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda a, x, axes: of(x, _ints(axes), keepdim=bool(a.get("keepdims", 1)))


def _cast(a: _Attributes, x: Tensor) -> Tensor:
    return _exact(x) if ir.DataType(a["to"]).is_floating_point() else x.long()


def _layer_norm(a: _Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, a.get("epsilon", 1e-5))


_OPS: dict[str, Callable[..., Any]] = {
    "Add": lambda a, x, y: x + y,
    "Sub": lambda a, x, y: x - y,
    "Mul": lambda a, x, y: x * y,
    "Div": lambda a, x, y: x / y,
    "Sum": lambda a, *xs: sum(xs),
    "Max": lambda a, x, y: torch.maximum(x, y),
    "Min": lambda a, x, y: torch.minimum(x, y),
    "Pow": lambda a, x, y: x**y,
    "Sqrt": lambda a, x: x.sqrt(),
    "Reciprocal": lambda a, x: 1 / x,
    "Exp": lambda a, x: x.exp(),
    "Abs": lambda a, x: x.abs(),
    "Neg": lambda a, x: -x,
    "Relu": lambda a, x: x.relu(),
    "LeakyRelu": lambda a, x: F.leaky_relu(x, a.get("alpha", 0.01)),
    "Sigmoid": lambda a, x: x.sigmoid(),
    "Tanh": lambda a, x: x.tanh(),
    "Erf": lambda a, x: x.erf(),
    "Gelu": lambda a, x: F.gelu(x),
    "Softmax": lambda a, x: x.softmax(a.get("axis", -1)),
    "Clip": lambda a, x, low, high: x.clamp(low, high),
    "Identity": lambda a, x: x,
    "Dropout": lambda a, x, *_: x,
    "Cast": _cast,
    "CastLike": lambda a, x, y: _exact(x),
    "Constant": lambda a: _constant(a["value"]),
    "Shape": lambda a, x: torch.tensor(x.shape),
    "Reshape": _reshape,
    "Transpose": lambda a, x: x.permute(a["perm"]),
    "Flatten": lambda a, x: x.reshape(math.prod(x.shape[: a.get("axis", 1)]), -1),
    "Unsqueeze": lambda a, x, axes: x.unsqueeze(_ints(axes)[0]),
    "Squeeze": lambda a, x, axes: x.squeeze(_ints(axes)[0]),
    "Concat": lambda a, *xs: torch.cat(xs, a["axis"]),
    "Split": _split,
    "Slice": _slice,
    "Gather": lambda a, x, i: x.index_select(a.get("axis", 0), i.reshape(-1)),
    "ReduceMean": _reduced(torch.mean),
    "ReduceSum": _reduced(torch.sum),
    "GlobalAveragePool": lambda a, x: x.mean((2, 3), keepdim=True),
    "MaxPool": lambda a, x: F.max_pool2d(x, a["kernel_shape"], a.get("strides"), a["pads"][0]),
    "MatMul": lambda a, x, y: x @ y,
    "FusedMatMul": _fused_matmul,
    "Gemm": _gemm,
    "FusedGemm": _gemm,
    "Conv": _conv,
    "FusedConv": _conv,
    "BatchNormalization": lambda a, x, w, b, mean, var: F.batch_norm(x, mean, var, w, b, eps=a.get("epsilon", 1e-5)),
    "InstanceNormalization": lambda a, x, w, b: F.instance_norm(x, weight=w, bias=b, eps=a.get("epsilon", 1e-5)),
    "LayerNormalization": _layer_norm,
    "SimplifiedLayerNormalization": lambda a, x, w: _rms(x, w, a.get("epsilon", 1e-5)),
    "SkipLayerNormalization": _skip_layer_norm,
    "SkipSimplifiedLayerNormalization": _skip_rms_norm,
}
"""What each operator gives for its attributes and operands."""
