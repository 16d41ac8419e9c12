"""The converters of ONNX operators: what they compute is what onnxruntime computes, over their attributes and versions."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from conftest import close
from onnx import TensorProto, helper, numpy_helper

from laurel_rewrite import ExportError
from laurel_rewrite.backends.onnx import sizes
from laurel_rewrite.backends.onnx.converters import Registry
from laurel_rewrite.backends.onnx.emit_torch import to_torch
from laurel_rewrite.verification.onnx import session_of

rng = np.random.default_rng(0)
X = rng.standard_normal((2, 3, 5, 6)).astype(np.float32)
ROWS = rng.standard_normal((4, 6)).astype(np.float32)
QKV = [rng.standard_normal((2, heads, length, 8)).astype(np.float32) for heads, length in ((4, 3), (2, 5), (2, 5))]
PACKED = [array.transpose(0, 2, 1, 3).reshape(2, array.shape[2], -1) for array in QKV]
IDS = np.array([[0, -1], [2, 1]])
INFINITE = np.float32([np.inf, 1, np.inf, 1, np.inf, 1])
WEIGHT = rng.standard_normal((4, 3, 3, 3)).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def floats(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def graph(op: str, opset: int, operands: list[Any], attributes: dict[str, Any], outputs: int = 1) -> ir.Model:
    """One node; its first operand is an input, the others are constants, and None is left out."""
    names = ["" if array is None else f"i{position}" for position, array in enumerate(operands)]
    node = helper.make_node(op, names, [f"o{i}" for i in range(outputs)], **attributes)
    given = [(name, array) for name, array in zip(names, operands, strict=True) if name]
    inputs = [helper.make_tensor_value_info(given[0][0], helper.np_dtype_to_tensor_dtype(given[0][1].dtype), given[0][1].shape)]
    made = helper.make_graph(
        [node], "graph", inputs, [onnx.ValueInfoProto(name=name) for name in node.output],
        [numpy_helper.from_array(array, name) for name, array in given[1:]],
    )  # fmt: skip
    return read(made, opset)


def read(made: onnx.GraphProto, opset: int) -> ir.Model:
    """With the types of what it computes."""
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def case(op: str, opset: int, *operands: Any, outputs: int = 1, **attributes: Any) -> Any:
    shown = "-".join(f"{name}={value}" for name, value in attributes.items() if not isinstance(value, TensorProto))
    return pytest.param(op, opset, list(operands), attributes, outputs, id=f"{op}{opset}-{shown}")


REDUCTIONS = "Sum Mean Max Min Prod L1 L2 LogSumExp SumSquare".split()
CASES = [
    case("Trilu", 14, X), case("Trilu", 14, X, np.array(1)), case("Trilu", 20, X, np.array(-1), upper=0), case("Trilu", 20, ROWS > 0, upper=0),
    case("Reshape", 5, X, ints(0, -1, 6)), case("Reshape", 14, X, ints(6, 30), allowzero=1),
    case("Expand", 13, X[:, :1], ints(2, 1, 3, 1, 6)[1:]), case("Expand", 13, X[0, :, :1], ints(2, 1, 4, 1)),
    case("Expand", 13, X[:1] > 0, ints(2, 1, 1, 1)),
    case("Squeeze", 11, X[:, :1], axes=[-3]), case("Squeeze", 13, X[:1, :1], ints(0, -3)), case("Squeeze", 23, X[:1, :1]),
    case("Unsqueeze", 11, X, axes=[0, 5]), case("Unsqueeze", 13, X, ints(-1, 1)), case("Unsqueeze", 24, X, ints(2)),
    case("Flatten", 13, X, axis=0), case("Flatten", 13, X, axis=-1), case("Flatten", 13, X),
    case("Slice", 9, X, axes=[1, 3], starts=[0, -4], ends=[2, -1]), case("Slice", 13, X, ints(1, 4), ints(2**62, 1), ints(1, -1), ints(1, -2)),
    case("Slice", 13, X, ints(-1), ints(-(2**63)), ints(2), ints(-1)), case("Slice", 13, X, ints(0, 1), ints(1, -1)),
    case("Split", 11, X, axis=3, split=[1, 2, 3], outputs=3), case("Split", 13, X, ints(2, 4), axis=-1, outputs=2),
    case("Split", 18, X, axis=2, num_outputs=2, outputs=2), case("Split", 18, X, axis=1, num_outputs=1),
    case("Tile", 13, X, ints(1, 2, 1, 3)),
    case("ConstantOfShape", 9, ints(2, 3)), case("ConstantOfShape", 23, ints(2), value=helper.make_tensor("v", TensorProto.BOOL, [1], [1])),
    case("Range", 11, np.array(1), np.array(9), np.array(3)), case("Range", 11, np.array(0, np.float32), np.float32(1), np.float32(0.25)),
    case("Pad", 2, X, pads=[0, 1, 0, 2, 0, 0, 0, 1], value=2.0), case("Pad", 13, X, ints(0, 0, 1, 0, 0, 0, 0, 2), np.float32(3)),
    *(case("Pad", 19, X, ints(2, 3, 1, 4), None, ints(2, -1), mode=mode) for mode in ("reflect", "edge", "wrap")),
    case("GatherElements", 13, ROWS, IDS, axis=1), case("GatherND", 13, X, IDS[:1]), case("GatherND", 13, X, ints(0, -1)[:, None], batch_dims=1),
    case("GatherND", 12, X, np.array([[[1, 2], [0, 0], [4, -1]]] * 2), batch_dims=2),
    *(case("ScatterElements", 18, ROWS, IDS, floats(2, 2), axis=1, reduction=how) for how in ("none", "add", "mul", "max", "min")),
    *(case("ScatterND", 18, ROWS, ints(0, -1)[:, None], floats(2, 6), reduction=how) for how in ("none", "add", "mul", "max", "min")),
    case("TopK", 11, X, ints(2), axis=1, largest=0, outputs=2), case("NonZero", 13, ROWS * (ROWS > 0)),
    *(case("CumSum", 14, X, np.array(-1), exclusive=a, reverse=b) for a in (0, 1) for b in (0, 1)),
    *(case(f"Reduce{name}", 13, X, axes=[1, -1], keepdims=0) for name in REDUCTIONS if name != "Sum"),
    *(case(f"Reduce{name}", 18, X, ints(-2, 1)) for name in REDUCTIONS), *(case(f"Reduce{name}", 18, X, keepdims=0) for name in REDUCTIONS),
    case("ReduceSum", 13, X, noop_with_empty_axes=1), case("ReduceLogSum", 18, np.abs(X), ints(0)), case("ReduceMax", 20, ROWS > 0, ints(1)),
    *(case(name, 9, ROWS) for name in ("Asinh", "Cosh", "Sinh")), case("Atanh", 9, np.tanh(ROWS)), case("Acosh", 9, 1 + np.abs(ROWS)),
    case("Mish", 18, ROWS), case("Gelu", 20, ROWS), case("Gelu", 20, ROWS, approximate="tanh"), case("Swish", 24, ROWS, alpha=1.5),
    case("Clip", 6, ROWS, min=-0.5, max=0.5), case("Clip", 13, ROWS, None, np.float32(0.5)), case("Clip", 13, ROWS, np.float32(0)),
    case("Cast", 13, ROWS, to=TensorProto.BOOL), case("Cast", 21, ROWS, to=TensorProto.INT64), case("CastLike", 19, ROWS, ints(1)),
    *(case("IsInf", 20, ROWS * INFINITE, detect_negative=a, detect_positive=b) for a in (0, 1) for b in (0, 1)),
    case("Gemm", 13, ROWS, floats(5, 6), floats(5), transB=1, alpha=0.5, beta=2.0), case("Gemm", 13, ROWS, floats(4, 3), transA=1),
    case("LayerNormalization", 17, X, floats(6), floats(6), epsilon=1e-3), case("LayerNormalization", 17, X, floats(5, 6), axis=2),
    case("LayerNormalization", 17, X, floats(6), axis=-2),
    case("RMSNormalization", 23, X, floats(6)), case("RMSNormalization", 23, X, floats(5, 6), axis=2, epsilon=1e-3),
    case("InstanceNormalization", 6, X, floats(3), floats(3), epsilon=1e-3), case("InstanceNormalization", 22, X[..., 0], floats(3), floats(3)),
    case("GroupNormalization", 21, np.repeat(X, 2, 1), floats(6), floats(6), num_groups=3),
    case("Attention", 23, *QKV), case("Attention", 23, *QKV, is_causal=1, scale=0.5), case("Attention", 23, *QKV, floats(3, 5), softcap=2.0),
    case("Attention", 23, *QKV, floats(2, 1, 3, 5) > -1), case("Attention", 23, *PACKED, q_num_heads=4, kv_num_heads=2),
    case("Attention", 23, *QKV, None, floats(2, 2, 4, 8), floats(2, 2, 4, 8), is_causal=1, outputs=3),
    case("RotaryEmbedding", 23, X[..., :4], floats(9, 2), floats(9, 2), np.arange(10).reshape(2, 5) % 9),
    case("RotaryEmbedding", 23, X, floats(2, 5, 2), floats(2, 5, 2), interleaved=1, rotary_embedding_dim=4),
    case("RotaryEmbedding", 23, PACKED[0], floats(2, 3, 4), floats(2, 3, 4), num_heads=4),
]  # fmt: skip


@pytest.mark.parametrize(("op", "opset", "operands", "attributes", "outputs"), CASES)
def test_an_operator_is_what_onnxruntime_computes(op, opset, operands, attributes, outputs):
    model = graph(op, opset, operands, attributes, outputs)
    _compare(model, operands[0])


def _compare(model: ir.Model, array: np.ndarray) -> None:
    module = to_torch(model).eval()
    with torch.no_grad():
        found = module(torch.from_numpy(np.asarray(array)))
    expected = session_of(ir.to_proto(model)).run(None, {"i0": array})
    found = [tensor.numpy() for tensor in (found if isinstance(found, tuple) else (found,))]
    assert [array.dtype for array in found] == [array.dtype for array in expected]
    close([np.asarray(array, dtype=np.float64) for array in found], [np.asarray(array, dtype=np.float64) for array in expected], 1e-5, 1e-6)


WHERE = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "half_pixel_symmetric")
MODES = [{"mode": mode, "coordinate_transformation_mode": where} for mode in ("linear", "cubic") for where in WHERE]
MODES += [
    {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": how}
    for how in ("floor", "ceil", "round_prefer_ceil")
]
MODES += [{"mode": "nearest"}, {"mode": "cubic", "cubic_coeff_a": -0.5, "exclude_outside": 1}]
MODES += [{"mode": mode, "antialias": 1} for mode in ("linear", "cubic")]


@pytest.mark.parametrize("attributes", MODES, ids=str)
@pytest.mark.parametrize("to", [ints(2, 3, 9, 8), ints(2, 3, 3, 4), np.float32([1, 1, 2, 1.5])], ids=str)
def test_resize(attributes, to):
    scales = to.dtype == np.float32
    _compare(graph("Resize", 19, [X, None, to if scales else None, *([] if scales else [to])], attributes), X)


@pytest.mark.parametrize(
    "attributes",
    [
        {"pads": [1, 0, 2, 1]},
        {"auto_pad": "SAME_LOWER", "strides": [2, 1]},
        {"strides": [1, 3], "auto_pad": "SAME_UPPER"},
        {"dilations": [1, 2]},
    ],
)
def test_a_convolution_with_weights_that_two_nodes_read(attributes):
    """They stay one parameter."""
    nodes = [helper.make_node("Conv", ["i0", "w"], ["a"], **attributes), helper.make_node("Neg", ["i0"], ["n"])]
    nodes += [helper.make_node("Conv", ["n", "w"], ["b"], **attributes), helper.make_node("Max", ["a", "b"], ["o"])]
    made = helper.make_graph(
        nodes, "graph", [helper.make_tensor_value_info("i0", TensorProto.FLOAT, X.shape)], [onnx.ValueInfoProto(name="o")],
        [numpy_helper.from_array(WEIGHT, "w")],
    )  # fmt: skip
    model = read(made, 20)
    _compare(model, X)
    assert [tuple(p.shape) for p in to_torch(model).parameters()] == [WEIGHT.shape]


def test_what_a_converter_does_not_know_is_refused():
    with pytest.raises(ExportError, match="Trilu with diagonal"):
        to_torch(graph("Trilu", 14, [X], {"diagonal": 1}))


def test_the_registry_is_left_as_it_was():
    """Others in this process may use onnx2torch as it is."""
    registry = Registry()
    before = dict(registry._converters)
    to_torch(graph("Expand", 13, [X[:, :1], ints(2, 3, 1, 1)], {}))
    assert registry._converters == before


SIZES = {
    "Add": ([3, [4, 5]], [7, 8]), "Sub": ([[4, 5], 1], [3, 4]), "Mul": ([2, 3], 6), "Div": ([[7, -7], 2], [3, -3]), "Mod": ([7, 3], 1), "Neg": ([4], -4),
    "Min": ([3, [2, 5]], [2, 3]), "Max": ([3, 4, 1], 4), "Gather": ([[4, 5, 6], -1], 6), "Concat": ([[1], [2, 3]], [1, 2, 3]),
    "Slice": ([[4, 5, 6], [1], [2**62]], [5, 6]), "Squeeze": ([[4]], 4), "Unsqueeze": ([4, [0]], [4]), "Reshape": ([4, [-1]], [4]),
}  # fmt: skip


@pytest.mark.parametrize("op", SIZES)
def test_sizes_are_computed_in_integers(op):
    operands, expected = SIZES[op]
    before = copy.deepcopy(operands)
    assert sizes.OPERATORS[op](*operands, **({"axis": 0} if op == "Concat" else {})) == expected
    assert operands == before
