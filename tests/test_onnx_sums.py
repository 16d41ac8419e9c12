"""Every form a residual sum takes in a graph: fused nodes, trees and chains, products that add."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import close, fused, slow, trained
from onnx import TensorProto, helper, numpy_helper
from toys import D

from laurel_rewrite import (
    detect,
    rewrite_onnx,
    write_onnx,
)
from laurel_rewrite.graph.feeds import draw_feeds
from laurel_rewrite.verification.onnx import run_onnx

FUSED = {"resnet18": "FusedConv", "bert": "SkipLayerNormalization", "gpt2": "Gelu", "llama": "SkipSimplifiedLayerNormalization"}


@pytest.mark.parametrize("variant", ["rw", "rw+lr+pa", slow("lr")])
@pytest.mark.parametrize("name", FUSED)
def test_sums_inside_fused_nodes(name, variant, exported, tmp_path):
    """The graph after onnxruntime's fusions has the same sites; with the same LAuReL parameters it computes the same."""
    given = exported(name)
    other = fused(given, tmp_path)
    assert name in ("gpt2", "llama") or FUSED[name] in {node.op_type for node in ir.load(other).graph}
    assert Counter(s.kind for s in detect(other)) == Counter(s.kind for s in detect(given))
    feeds = draw_feeds(ir.load(given))
    start = write_onnx(rewrite_onnx(other, variant=variant, rank=4), tmp_path / "start.onnx")
    for a, b in zip(run_onnx(start, feeds, optimised=False), run_onnx(other, feeds, optimised=False), strict=True):
        np.testing.assert_array_equal(a, b)
    paths = [write_onnx(trained(rewrite_onnx(p, variant=variant, rank=4)), tmp_path / f"{n}.onnx") for n, p in enumerate((given, other))]
    close(*(run_onnx(path, feeds, optimised=False) for path in paths))


def test_a_fused_node_stays_fused(exported, tmp_path):
    """What adds and normalises in one node goes on doing so; LAuReL weights its operands."""
    other = fused(exported("bert"), tmp_path)
    before, after = (Counter(n.op_type for n in m.graph) for m in (ir.load(other), rewrite_onnx(other, variant="rw+lr", rank=4)))
    assert before["SkipLayerNormalization"] == after["SkipLayerNormalization"] > 0


X = np.random.default_rng(5).standard_normal((2, D)).astype(np.float32)
W = np.random.default_rng(6).standard_normal((D, D)).astype(np.float32)
NODES = {
    "sum, skip last": [helper.make_node("Relu", ["m"], ["r"]), helper.make_node("Sum", ["m", "r", "x"], ["y"])],
    "sum, skip first": [helper.make_node("Relu", ["m"], ["r"]), helper.make_node("Sum", ["x", "m", "r"], ["y"])],
    "sum, skip in the middle": [helper.make_node("Relu", ["m"], ["r"]), helper.make_node("Sum", ["r", "x", "m"], ["y"])],
    "tree": [helper.make_node("Relu", ["m"], ["r"]), helper.make_node("Add", ["m", "r"], ["s"]), helper.make_node("Add", ["s", "x"], ["y"])],
    "chain": [helper.make_node("Relu", ["m"], ["r"]), helper.make_node("Add", ["x", "m"], ["s"]), helper.make_node("Add", ["r", "s"], ["y"])],
    "gemm": [helper.make_node("Relu", ["m"], ["r"]), helper.make_node("Gemm", ["r", "w", "x"], ["y"], transB=1)],
    "gemm, skip inside": [
        helper.make_node("Relu", ["x"], ["r"]), helper.make_node("MatMul", ["r", "w"], ["f"]), helper.make_node("Gemm", ["x", "w", "f"], ["y"]),
    ],
    "fused gemm": [helper.make_node("FusedGemm", ["m", "w", "x"], ["y"], domain="com.microsoft", activation="Relu")],
}  # fmt: skip


@pytest.mark.parametrize("name", NODES)
def test_every_form_of_a_sum(name, tmp_path):
    """a f + b (x + U V x) against numpy, and the exact start."""
    made = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["m"]), *NODES[name]], "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", D])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", D])], [numpy_helper.from_array(W, "w")],
    )  # fmt: skip
    given = tmp_path / "model.onnx"
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(made, opset_imports=opsets, ir_version=10), given)
    (site,) = detect(given)
    plain = run_onnx(given, {"x": X}, optimised=False)[0]
    start = write_onnx(rewrite_onnx(given, rank=4), tmp_path / "start.onnx")
    if name == "gemm, skip inside":  # its product and its sum are in one kernel in the original
        np.testing.assert_allclose(run_onnx(start, {"x": X}, optimised=False)[0], plain, rtol=1e-6, atol=1e-5)  # values of about 50
    else:
        np.testing.assert_array_equal(run_onnx(start, {"x": X}, optimised=False)[0], plain)
    model = trained(rewrite_onnx(given, rank=4))
    values = {n: v.const_value.numpy().astype(np.float64) for n, v in model.graph.initializers.items()}
    a, b = 2 * np.exp(values["laurel_0.mix"]) / np.exp(values["laurel_0.mix"]).sum()
    x, w = X.astype(np.float64), W.astype(np.float64)
    m = x @ w
    relu = lambda v: np.maximum(v, 0)  # noqa: E731
    skip = x @ w if name == "gemm, skip inside" else x
    branch = {"gemm": relu(m) @ w.T, "gemm, skip inside": relu(x) @ w, "fused gemm": m @ w}.get(name, m + relu(m))
    expected = a * branch + b * (skip + skip @ values["laurel_0.down.weight"].T @ values["laurel_0.up.weight"].T)
    if name == "fused gemm":
        expected = relu(expected)
    for optimised in (False, True):
        found = run_onnx(write_onnx(model, tmp_path / "laurel.onnx"), {"x": X}, optimised=optimised)
        np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-4)  # float32 against float64, values of about 50
    assert site.dim == D


@pytest.mark.parametrize("activation", [("Relu", []), ("LeakyRelu", [0.1]), ("Clip", [-1.0, 2.0]), ("HardSigmoid", [0.2, 0.5]), ("", [])])
def test_a_shortcut_inside_a_fused_convolution(activation, tmp_path):
    """The skip is the convolution itself, which LAuReL has to read: product, sum and activation come apart."""
    name, parameters = activation
    attributes = ({"activation": name} if name else {}) | ({"activation_params": parameters} if parameters else {})
    generator = np.random.default_rng(0)
    weights = {
        "w": generator.standard_normal((D, D, 1, 1)),
        "v": generator.standard_normal((D, D, 3, 3)) * 0.2,
        "b": generator.standard_normal(D),
    }
    made = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "v"], ["c"], pads=[1, 1, 1, 1]), helper.make_node("Relu", ["c"], ["r"]),
            helper.make_node("Conv", ["r", "v"], ["f"], pads=[1, 1, 1, 1]),
            helper.make_node("FusedConv", ["x", "w", "b", "f"], ["y"], domain="com.microsoft", name="last", **attributes),
        ],
        "graph", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", D, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array.astype(np.float32), key) for key, array in weights.items()],
    )  # fmt: skip
    given = tmp_path / "model.onnx"
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(made, opset_imports=opsets, ir_version=8), given)
    (site,) = detect(given)
    assert (site.kind, site.axis, site.dim) == ("projection", 1, D)
    feeds = {"x": generator.standard_normal((2, D, 4, 4)).astype(np.float32)}
    path = write_onnx(rewrite_onnx(given, rank=4), tmp_path / "laurel.onnx")
    # The convolution no longer adds f into its own accumulator: another order of rounding in float32.
    close(run_onnx(path, feeds, optimised=False), run_onnx(given, feeds, optimised=False), rtol=1e-5, atol=1e-6)
    assert any(np.abs(a - b).max() > 1e-2 for a, b in zip(
        run_onnx(write_onnx(trained(ir.load(path)), tmp_path / "r.onnx"), feeds, optimised=True), run_onnx(given, feeds, optimised=True),
        strict=True))  # fmt: skip
