"""FLOPs and parameters of ONNX graphs, against counts by hand."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import fused, slow
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from laurel_rewrite import profile
from laurel_rewrite.files.onnx import weight_count
from laurel_rewrite.graph.feeds import draw_feeds
from laurel_rewrite.profiling import _doubts
from laurel_rewrite.profiling.flops import count_flops
from laurel_rewrite.profiling.latency import Effort
from laurel_rewrite.profiling.sessions import settings
from laurel_rewrite.profiling.traces import graph_of_run, record

B, S, T, P, D = 2, 5, 7, 3, 16
RANDOM = np.random.default_rng(0)
MS = "com.microsoft"


def f(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def u8(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 255, shape).astype(np.uint8)


def i8(*shape: int) -> np.ndarray:
    return RANDOM.integers(-9, 9, shape).astype(np.int8)


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


SCALE = np.float32(0.1)
QUANTISED = {"xs": SCALE, "xz": np.uint8(3)}
RESULT = {"ys": SCALE, "yz": np.uint8(1)}
CACHED = {"q": f(1, 1, 64), "k": f(1, 1, 32), "v": f(1, 1, 32)}
LENGTHS = {"last": ints(3), "total": np.array(4, np.int32)}
GROUPED = {"num_heads": 4, "kv_num_heads": 2}
PLACES = "q k v - - - pk pv"
# name: op, domain, inputs, weights, attributes, FLOPs; "places" names the inputs by position, - where one is left out, "gives" the outputs
CASES = {
    "attention": ("Attention", MS, {"x": f(B, S, D)}, {"w": f(D, 48), "b": f(48)}, {"num_heads": 4}, 2 * B * S * D * 48 + 4 * B * S * S * D),
    "attention, past": (
        "Attention", MS, {"x": f(B, S, D), "past": f(2, B, 4, P, 4)}, {"w": f(D, 48), "b": f(48)},
        {"num_heads": 4, "places": "x w b - past", "gives": "y present"}, 2 * B * S * D * 48 + 4 * B * S * (S + P) * D,
    ),
    "attention, narrow queries": (
        "Attention", MS, {"x": f(B, S, D)}, {"w": f(D, 40), "b": f(40)}, {"num_heads": 4, "qkv_hidden_sizes": [8, 8, 24]},
        2 * B * S * D * 40 + 2 * B * S * S * (8 + 24),
    ),
    "quantised attention": (
        "QAttention", MS, {"x": u8(B, S, D)}, {"w": i8(D, 48), "b": f(48), "xs": SCALE, "ws": SCALE}, {"num_heads": 4},
        2 * B * S * D * 48 + 4 * B * S * S * D,
    ),
    "multi-head": ("MultiHeadAttention", MS, {"q": f(B, S, 16), "k": f(B, T, 16), "v": f(B, T, 24)}, {}, {"num_heads": 4}, 2 * B * S * T * (16 + 24)),
    "multi-head, keys by head": (
        "MultiHeadAttention", MS, {"q": f(B, S, 16), "k": f(B, 4, T, 4), "v": f(B, 4, T, 4)}, {}, {"num_heads": 4}, 4 * B * S * T * 16,
    ),
    "multi-head, past": (
        "MultiHeadAttention", MS, {"q": f(B, S, 16), "k": f(B, T, 16), "v": f(B, T, 16), "pk": f(B, 4, P, 4), "pv": f(B, 4, P, 4)}, {},
        {"num_heads": 4, "places": PLACES, "gives": "y pk2 pv2"}, 4 * B * S * (T + P) * 16,
    ),
    "grouped": (
        "GroupQueryAttention", MS, CACHED | {"pk": f(1, 2, 3, 16), "pv": f(1, 2, 3, 16)} | LENGTHS, {}, GROUPED | {"gives": "y pk2 pv2"}, 4 * 4 * 64,
    ),
    "grouped, packed": (
        "GroupQueryAttention", MS, {"q": f(B, S, 128), "last": ints(S - 1, S - 1), "total": np.array(S, np.int32)}, {},
        GROUPED | {"places": "q - - - - last total", "gives": "y pk2 pv2"}, 4 * B * S * S * 64,
    ),
    "grouped, a cache longer than what is used": (
        "GroupQueryAttention", MS, CACHED | {"pk": f(1, 2, 9, 16), "pv": f(1, 2, 9, 16)} | LENGTHS, {}, GROUPED | {"gives": "y pk2 pv2"}, None,
    ),
    "ONNX attention": ("Attention", "", {"q": f(B, 4, S, 4), "k": f(B, 2, T, 4), "v": f(B, 2, T, 4)}, {}, {}, 4 * B * 4 * S * T * 4),
    "ONNX attention, past": (
        "Attention", "", {"q": f(B, S, 16), "k": f(B, T, 16), "v": f(B, T, 16), "pk": f(B, 4, P, 4), "pv": f(B, 4, P, 4)}, {},
        {"q_num_heads": 4, "kv_num_heads": 4, "places": "q k v - pk pv", "gives": "y pk2 pv2"}, 4 * B * S * (T + P) * 16,
    ),
    "embedding": (
        "EmbedLayerNormalization", MS, {"ids": ints(1, 2, 3).reshape(1, 3)}, {"words": f(9, D), "places": f(9, D), "gamma": f(D), "beta": f(D)},
        {"places": "ids - words places - gamma beta", "gives": "y mask"}, 0,
    ),
    "matmul": ("MatMul", "", {"x": f(B, S, 16)}, {"w": f(16, 9)}, {}, 2 * B * S * 9 * 16),
    "transposed matmul": ("FusedMatMul", MS, {"x": f(B, 16, S)}, {"w": f(B, 16, 9)}, {"transA": 1}, 2 * B * S * 9 * 16),
    "integer matmul": ("MatMulInteger", "", {"x": u8(S, 16)}, {"w": i8(16, 9)}, {}, 2 * S * 9 * 16),
    "quantised matmul": (
        "QLinearMatMul", "", {"x": u8(S, 16)}, QUANTISED | {"w": i8(16, 9), "ws": SCALE, "wz": np.int8(0)} | RESULT, {}, 2 * S * 9 * 16,
    ),
    "matmul of 4 bits": (
        "MatMulNBits", MS, {"x": f(B, S, 32)}, {"w": u8(8, 1, 16), "s": f(8)}, {"K": 32, "N": 8, "bits": 4, "block_size": 32}, 2 * B * S * 32 * 8,
    ),
    "gemm": ("FusedGemm", MS, {"x": f(16, S)}, {"w": f(9, 16), "b": f(9)}, {"transA": 1, "transB": 1, "activation": "Relu"}, 2 * S * 9 * 16),
    "convolution": ("FusedConv", MS, {"x": f(1, 4, 8, 8)}, {"w": f(6, 4, 3, 3), "b": f(6)}, {"activation": "Relu"}, 2 * 6 * 36 * 4 * 9),
    "depthwise": ("Conv", "", {"x": f(1, 4, 8, 8)}, {"w": f(4, 1, 3, 3)}, {"group": 4}, 2 * 4 * 36 * 9),
    "transposed convolution": ("ConvTranspose", "", {"x": f(1, 4, 8, 8)}, {"w": f(4, 6, 3, 3)}, {}, 2 * 4 * 64 * 6 * 9),
    "quantised convolution": (
        "QLinearConv", "", {"x": u8(1, 4, 8, 8)},
        QUANTISED | {"w": i8(6, 4, 3, 3), "ws": SCALE, "wz": np.int8(0)} | RESULT | {"b": np.zeros(6, np.int32)}, {}, 2 * 6 * 36 * 4 * 9,
    ),
    "einsum": ("Einsum", "", {"a": f(B, S, D), "b": f(B, T, D)}, {}, {"equation": "bsd,btd->bst"}, 2 * B * S * T * D),
    "einsum without a sum": ("Einsum", "", {"a": f(B, S), "b": f(B, S)}, {}, {"equation": "bs,bs->bs"}, 0),
    "einsum with dots": ("Einsum", "", {"a": f(B, S, D), "b": f(B, T, D)}, {}, {"equation": "...sd,...td->...st"}, None),
    "lstm": ("LSTM", "", {"x": f(S, B, D)}, {"w": f(1, 32, D), "r": f(1, 32, 8)}, {"hidden_size": 8}, 2 * S * B * 32 * (D + 8)),
}  # fmt: skip


def model_of(nodes, feeds, weights, outputs):
    inputs = [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for name, v in feeds.items()]
    kept = [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "graph", inputs, [onnx.ValueInfoProto(name=name) for name in outputs], kept)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid(MS, 1)], ir_version=11)


def flops_of(path, feeds, folder):
    (trace,) = record([path], settings(1), feeds, folder, seconds=0, level="none")
    return count_flops(graph_of_run(folder / "optimised0.onnx", ir.load(path)), trace, feeds)


@pytest.mark.parametrize("name", CASES)
def test_flops_of_an_op_are_those_counted_by_hand(name, tmp_path):
    """Also where onnxruntime's trace leaves weights out because they are packed, or inputs that are not given, or the node has no name."""
    op, domain, feeds, weights, attributes, expected = CASES[name]
    attributes = dict(attributes)
    places = attributes.pop("places", " ".join([*feeds, *weights])).replace("-", "").split(" ")
    gives = attributes.pop("gives", "y").split()
    nodes = [
        helper.make_node("Constant", [], ["unused"], value_float=1.0),
        helper.make_node(op, places, gives, domain=domain, **attributes),
    ]
    onnx.save(model_of(nodes, feeds, weights, gives[:1]), tmp_path / "model.onnx")
    found = flops_of(tmp_path / "model.onnx", feeds, tmp_path)
    assert list(found.values()) == ([] if name == "embedding" else [expected])


@pytest.mark.parametrize("name", ["bert", slow("gpt2")])
def test_fused_attention_has_the_flops_of_its_parts(name, exported, tmp_path):
    path = exported(name)
    after = fused(path, tmp_path)
    assert {node.op_type for node in ir.load(after).graph} & {"Attention", "FusedMatMul", "MultiHeadAttention"}
    feeds = draw_feeds(ir.load(path), batch=2, length=9)
    plain, joined = profile([path, after], inputs=feeds, seconds=0, min_rounds=1, threads=1).rows
    assert joined.costs.flops == plain.costs.flops > 0
    assert not joined.costs.uncounted


def test_products_that_are_not_counted_are_said(tmp_path):
    """A product in a loop, whose ops a trace does not tell apart."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("MatMul", ["s", "w"], ["t"])], "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []), helper.make_tensor_value_info("go", TensorProto.BOOL, []),
         helper.make_tensor_value_info("s", TensorProto.FLOAT, [4, 4])],
        [helper.make_tensor_value_info("on", TensorProto.BOOL, []), helper.make_tensor_value_info("t", TensorProto.FLOAT, [4, 4])],
    )  # fmt: skip
    nodes = [helper.make_node("Loop", ["n", "", "x"], ["l"], body=body), helper.make_node("MatMul", ["l", "w"], ["y"])]
    model = model_of(nodes, {"x": f(4, 4)}, {"n": np.array(20), "w": np.eye(4, dtype=np.float32)}, ["y"])
    onnx.save(model, tmp_path / "loop.onnx")
    (row,) = profile([tmp_path / "loop.onnx"], seconds=0, min_rounds=1, threads=1).rows
    assert row.costs.flops == 2 * 4 * 4 * 4
    assert dict(row.costs.uncounted) == {"Loop": 1}
    assert _doubts([row], settings(1), Effort(), [""]) == ["loop.onnx: the FLOPs of Loop are not counted, so that there are at least 128."]


def test_nodes_without_a_name_have_their_time_and_memory(tmp_path):
    nodes = [
        helper.make_node("Constant", [], ["one"], value_float=1.0), helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("Add", ["c", "one"], ["a"]),
        helper.make_node("Relu", ["a"], ["r"]), helper.make_node("ReduceMean", ["r"], ["y"]),
    ]  # fmt: skip
    model = model_of(nodes, {"x": f(1, 16, 32, 32)}, {"w": f(16, 16, 3, 3)}, ["y"])
    onnx.save(model, tmp_path / "nameless.onnx")
    (row,) = profile([tmp_path / "nameless.onnx"], seconds=0, min_rounds=1, threads=1).rows
    assert row.costs.flops == 2 * 16 * 30 * 30 * 16 * 9
    assert row.memory.live_bytes >= 4 * 16 * 30 * 30
    assert {node.value for node in row.attribution.nodes} >= {"r", "y"}  # of the ops that were not fused


@pytest.fixture(scope="module")
def perceptron(tmp_path_factory):
    folder = tmp_path_factory.mktemp("perceptron")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="first"), helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "v"], ["y"], name="second"),
    ]  # fmt: skip
    model = model_of(nodes, {"x": f(2, 32)}, {"w": f(32, 64), "v": f(64, 32)}, ["y"])
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 32]))
    model.opset_import[0].version = 21
    model.ir_version = 10
    onnx.save(model, folder / "float.onnx")
    return folder / "float.onnx"


class Reader(quantization.CalibrationDataReader):
    def __init__(self) -> None:
        self.left = [{"x": f(2, 32)} for _ in range(3)]

    def get_next(self):
        return self.left.pop() if self.left else None


@pytest.mark.parametrize("way", ["dynamic", "QDQ", "QOperator", "4 bits"])
def test_quantised_weights_are_parameters_and_their_scales_are_none(way, perceptron, tmp_path):
    path = tmp_path / "quantised.onnx"
    if way == "dynamic":
        quantization.quantize_dynamic(perceptron, path, per_channel=True)
    elif way == "4 bits":
        done = MatMulNBitsQuantizer(onnx.load(perceptron), block_size=16, is_symmetric=False)
        done.process()
        onnx.save(done.model.model, path)
    else:
        quantization.quantize_static(perceptron, path, Reader(), quant_format=quantization.QuantFormat[way], per_channel=True)
    assert any(not value.const_value.dtype.is_floating_point() for value in ir.load(path).graph.initializers.values())
    assert weight_count(ir.load(path)) == weight_count(ir.load(perceptron)) == 2 * 32 * 64
    rows = profile([perceptron, path], seconds=0, min_rounds=1, threads=1).rows
    assert [row.costs.parameters for row in rows] == [2 * 32 * 64] * 2


def test_integers_that_are_no_weights_are_not_counted():
    nodes = [
        helper.make_node("DequantizeLinear", ["table", "scale", "zero"], ["t"]), helper.make_node("Gather", ["t", "ids"], ["g"]),
        helper.make_node("Gather", ["bytes", "ids"], ["b"]), helper.make_node("DequantizeLinear", ["b", "scale", "zero"], ["d"]),
        helper.make_node("Cast", ["stored"], ["s"], to=TensorProto.FLOAT), helper.make_node("Cast", ["sizes"], ["z"], to=TensorProto.FLOAT),
        helper.make_node("Sum", ["g", "d", "s", "z"], ["a"]), helper.make_node("Reshape", ["a", "shape"], ["y"]),
    ]  # fmt: skip
    weights = {
        "table": i8(9, 4), "bytes": i8(7, 4), "stored": i8(2, 4), "scale": SCALE, "zero": np.int8(0), "ids": np.array([1, 2]),
        "sizes": np.array([[1, 2, 3, 4]]), "shape": np.array([8]),
    }  # fmt: skip
    assert weight_count(ir.serde.deserialize_model(model_of(nodes, {}, weights, ["y"]))) == 9 * 4 + 7 * 4 + 2 * 4
