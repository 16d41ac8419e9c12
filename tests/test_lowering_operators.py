"""Operators other than LAuReL in the lowering: weights per feature fold into what makes the features, and what is not linear is left alone."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import close, trained
from onnx import TensorProto, helper, numpy_helper

from laurel_rewrite import rewrite_onnx, write_onnx
from laurel_rewrite.lowering import lower
from laurel_rewrite.profiling.sessions import session_of, settings
from laurel_rewrite.verification.onnx import run_onnx

D = 6
RNG = np.random.default_rng(0)
node = helper.make_node
pytestmark = pytest.mark.usefixtures("toys")


def weights(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Positive, so that a variance may be among them."""
    return {name: RNG.uniform(0.5, 1.5, shape).astype(np.float32) for name, shape in shapes.items()}


def graph(nodes, constants, shape) -> ir.Model:
    made = helper.make_graph(
        nodes, "graph", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)], [numpy_helper.from_array(a, n) for n, a in constants.items()],
    )  # fmt: skip
    return ir.from_proto(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def compared(model: ir.Model, x: np.ndarray, tmp_path):
    """The same numbers before the lowering and after it, and what it did."""
    before = write_onnx(model, tmp_path / "before.onnx")
    done = lower(model, verify=False)
    after = write_onnx(model, tmp_path / "after.onnx")
    for optimised in (False, True):
        close(run_onnx(after, {"x": x}, optimised=optimised), run_onnx(before, {"x": x}, optimised=False))
    return done, [n.op_type for n in model.graph]


LAST, FIRST = (2, 5, D), (2, D, 4, 4)
FOLDS = {
    "product": (LAST, [node("MatMul", ["x", "w"], ["f"])], {"w": (D, D)}),
    "product and bias": (LAST, [node("MatMul", ["x", "w"], ["m"]), node("Add", ["m", "b"], ["f"])], {"w": (D, D), "b": (D,)}),
    "bias first": (LAST, [node("MatMul", ["x", "w"], ["m"]), node("Add", ["b", "m"], ["f"])], {"w": (D, D), "b": (1, 1, D)}),
    "one bias for all": (LAST, [node("MatMul", ["x", "w"], ["m"]), node("Add", ["m", "b"], ["f"])], {"w": (D, D), "b": (1,)}),
    "less a constant": (LAST, [node("MatMul", ["x", "w"], ["m"]), node("Sub", ["m", "b"], ["f"])], {"w": (D, D), "b": (D,)}),
    "relu": (LAST, [node("MatMul", ["x", "w"], ["m"]), node("Relu", ["m"], ["f"])], {"w": (D, D)}),
    "two products": (
        LAST, [node("MatMul", ["x", "w"], ["m"]), node("MatMul", ["x", "v"], ["n"]), node("Add", ["m", "n"], ["f"])], {"w": (D, D), "v": (D, D)},
    ),
    "layer norm": (LAST, [node("LayerNormalization", ["x", "w", "b"], ["f"], axis=-1)], {"w": (D,), "b": (D,)}),
    "gemm": ((3, D), [node("Gemm", ["x", "w", "b"], ["f"], transB=1, alpha=0.5)], {"w": (D, D), "b": (D,)}),
    "gemm, not transposed": ((3, D), [node("Gemm", ["x", "w"], ["f"])], {"w": (D, D)}),
    "convolution": (FIRST, [node("Conv", ["x", "w", "b"], ["f"], pads=[1, 1, 1, 1])], {"w": (D, D, 3, 3), "b": (D,)}),
    "grouped": (FIRST, [node("Conv", ["x", "w"], ["f"], group=D, pads=[1, 1, 1, 1])], {"w": (D, 1, 3, 3)}),
    "batch norm": (FIRST, [node("BatchNormalization", ["x", "w", "b", "m", "v"], ["f"])], dict.fromkeys("wbmv", (D,))),
    "constant per channel": (FIRST, [node("Conv", ["x", "w"], ["c"]), node("Add", ["c", "b"], ["f"])], {"w": (D, D, 1, 1), "b": (D, 1, 1)}),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDS)
def test_weights_per_feature_fold(name, tmp_path):
    shape, nodes, shapes = FOLDS[name]
    model = trained(rewrite_onnx(graph([*nodes, node("Add", ["x", "f"], ["y"])], weights(**shapes), shape), variant="toy-vector"))
    done, ops = compared(model, RNG.standard_normal(shape).astype(np.float32), tmp_path)
    assert (done.folded, done.refused) == (1, {})
    assert ops.count("Mul") == 1  # of the skip


STAY = {
    "features on axis 1 of a norm over both": (LAST, [node("LayerNormalization", ["x", "w", "b"], ["f"], axis=1)], {"w": (5, D), "b": (5, D)}),
    "one feature for all": (LAST, [node("MatMul", ["x", "w"], ["m"]), node("Add", ["m", "x"], ["s"]), node("Sub", ["s", "x"], ["f"])], {"w": (D, 1)}),
    "a view": (LAST, [node("MatMul", ["x", "w"], ["m"]), node("Reshape", ["m", "to"], ["f"])], {"w": (D, D)}),
    "not linear": (LAST, [node("MatMul", ["x", "w"], ["m"]), node("Tanh", ["m"], ["f"])], {"w": (D, D)}),
    "transposed convolution": (FIRST, [node("ConvTranspose", ["x", "w"], ["f"])], {"w": (D, D, 1, 1)}),
}  # fmt: skip


@pytest.mark.parametrize("name", STAY)
def test_weights_per_feature_that_stay_a_product(name, tmp_path):
    shape, nodes, shapes = STAY[name]
    constants = weights(**shapes) | {"to": np.array(shape, np.int64)}
    model = trained(rewrite_onnx(graph([*nodes, node("Add", ["x", "f"], ["y"])], constants, shape), variant="toy-vector", include="*"))
    done, _ = compared(model, RNG.standard_normal(shape).astype(np.float32), tmp_path)
    assert done.folded == 0
    assert done.refused


def test_what_is_linear_only_as_far_as_it_was_tried_stays_a_function(tmp_path):
    """Drawn numbers are small; a bound of 100 is met by none of them."""
    nodes = [node("MatMul", ["x", "w"], ["f"]), node("Add", ["x", "f"], ["y"])]
    model = rewrite_onnx(graph(nodes, weights(w=(D, D)), LAST), variant="toy-bounded")
    done, _ = compared(model, 1000 * RNG.standard_normal(LAST).astype(np.float32), tmp_path)
    assert (done.sites, len(done.kept)) == (0, 1)
    assert onnx.load(tmp_path / "after.onnx").functions


BLOCK = [
    node("LayerNormalization", ["x{0}", "g", "b"], ["n{0}"], axis=-1), node("MatMul", ["n{0}", "w"], ["m{0}"]),
    node("Tanh", ["m{0}"], ["f{0}"]), node("Add", ["x{0}", "f{0}"], ["x{1}"]),
]  # fmt: skip


def blocks(count: int) -> ir.Model:
    """Pre-norm blocks, and a norm behind them."""
    nodes = [
        node(one.op_type, *([name.format(place, place + 1) for name in side] for side in (one.input, one.output)), **({"axis": -1} if len(one.input) > 2 else {}))
        for place in range(count) for one in BLOCK
    ]  # fmt: skip
    nodes[0].input[0] = nodes[3].input[0] = "x"
    return graph([*nodes, node("LayerNormalization", [f"x{count}", "g", "b"], ["y"], axis=-1)], weights(w=(D, D), g=(D,), b=(D,)), LAST)


@pytest.mark.parametrize(("variant", "alone"), [("attnres", True), ("dca", True), ("hc", False)])
def test_functions_make_few_passes_over_the_stream(variant, alone, tmp_path):
    """No sum of theirs is fused with the norm behind it, for that kernel is slow; products with a vector are one op."""
    model = trained(rewrite_onnx(blocks(3), variant=variant))
    untouched = model.clone()
    done, _ = compared(model, RNG.standard_normal(LAST).astype(np.float32), tmp_path)
    assert done.kept
    bodies = [[inner.op_type for inner in function] for function in model.functions.values()]
    assert not any("Pow" in body or ("MatMul" not in body and variant == "attnres") for body in bodies)
    fused = []
    for one, skip in ((untouched, ["tighten-functions"]), (model, [])):
        if skip:
            lower(one, skip=skip)
        session_of(write_onnx(one, tmp_path / "model.onnx"), settings(1), optimised=tmp_path / "optimised.onnx")
        fused.append([inner.op_type for inner in onnx.load(tmp_path / "optimised.onnx").graph.node].count("SkipLayerNormalization"))
    assert (fused[0] > 0) is alone  # where the norm alone reads what a function gives
    assert fused[1] == 0
