"""Operators other than LAuReL in the lowering: weights per feature fold into what makes the features, and what is not linear is left alone."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import close, trained
from onnx import TensorProto, helper, numpy_helper

from laurel_rewrite import rewrite_onnx, write_onnx
from laurel_rewrite.lowering import SKIPPABLE, lower
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
    "layer scale": (LAST, [node("MatMul", ["x", "w"], ["m"]), node("Mul", ["m", "b"], ["f"])], {"w": (D, D), "b": (D,)}),
    "layer scale of channels": (
        FIRST, [node("ConvTranspose", ["x", "w"], ["c"]), node("Mul", ["b", "c"], ["f"])], {"w": (D, D, 1, 1), "b": (D, 1, 1)},
    ),
    "one number": (
        LAST, [node("MatMul", ["x", "w"], ["m"]), node("Tanh", ["m"], ["t"]), node("Mul", ["t", "b"], ["f"])], {"w": (D, D), "b": (1,)},
    ),
    "a gate": (
        LAST, [node("MatMul", ["x", "v"], ["u"]), node("Sigmoid", ["u"], ["g"]), node("MatMul", ["x", "w"], ["m"]), node("Mul", ["g", "m"], ["f"])],
        {"v": (D, D), "w": (D, D)},
    ),
    "constant per channel": (FIRST, [node("Conv", ["x", "w"], ["c"]), node("Add", ["c", "b"], ["f"])], {"w": (D, D, 1, 1), "b": (D, 1, 1)}),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDS)
def test_weights_per_feature_fold(name, tmp_path):
    shape, nodes, shapes = FOLDS[name]
    model = trained(rewrite_onnx(graph([*nodes, node("Add", ["x", "f"], ["y"])], weights(**shapes), shape), variant="toy-vector"))
    done, ops = compared(model, RNG.standard_normal(shape).astype(np.float32), tmp_path)
    assert (done.folded, done.refused) == (1, {})
    assert ops.count("Mul") == 1 + [one.op_type for one in nodes].count("Mul")  # of the skip


# Weights per feature of the skip, which those take that read the sum

SITES = {
    LAST: [
        node("MatMul", ["x", "u"], ["f0"]), node("Add", ["x", "f0"], ["x1"]),
        node("MatMul", ["x1", "u"], ["f1"]), node("Add", ["x1", "f1"], ["x2"]),
    ],
    FIRST: [
        node("Conv", ["x", "k"], ["f0"]), node("Add", ["x", "f0"], ["x1"]), node("Relu", ["x1"], ["r1"]),
        node("Conv", ["r1", "k"], ["f1"]), node("Add", ["r1", "f1"], ["x2"]),
    ],
}  # fmt: skip
TAKE = {
    "product": (LAST, [node("MatMul", ["x2", "w"], ["y"])], {"w": (D, 3)}),
    "relu and product": (LAST, [node("Relu", ["x2"], ["r"]), node("MatMul", ["r", "w"], ["y"])], {"w": (D, 3)}),
    "squares": (LAST, [node("Mul", ["x2", "x2"], ["s"]), node("Sqrt", ["s"], ["r"]), node("MatMul", ["r", "w"], ["y"])], {"w": (D, 3)}),
    "sums": (LAST, [node("Add", ["x2", "b"], ["s"]), node("Sub", ["s", "x2"], ["t"]), node("MatMul", ["t", "w"], ["y"])], {"w": (D, 3), "b": (D,)}),
    "layer scale": (LAST, [node("Mul", ["x2", "b"], ["s"]), node("MatMul", ["s", "w"], ["y"])], {"w": (D, 3), "b": (D,)}),
    "convolution": (FIRST, [node("Conv", ["x2", "w", "b"], ["y"], pads=[1, 1, 1, 1])], {"w": (4, D, 3, 3), "b": (4,)}),
    "grouped": (FIRST, [node("Conv", ["x2", "w"], ["y"], group=2)], {"w": (4, D // 2, 3, 3)}),
    "depthwise": (FIRST, [node("Conv", ["x2", "w"], ["y"], group=D)], {"w": (2 * D, 1, 3, 3)}),
    "batch norm": (FIRST, [node("BatchNormalization", ["x2", "w", "b", "m", "v"], ["y"])], dict.fromkeys("wbmv", (D,))),
    "pools": (
        FIRST,
        [
            node("Relu", ["x2"], ["r"]), node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2]), node("AveragePool", ["p"], ["q"], kernel_shape=[2, 2]),
            node("Conv", ["q", "w"], ["y"]),
        ],
        {"w": (4, D, 1, 1)},
    ),
    "pooled features": (
        FIRST, [node("GlobalAveragePool", ["x2"], ["p"]), node("Flatten", ["p"], ["q"]), node("Gemm", ["q", "w"], ["y"], transB=1)], {"w": (3, D)},
    ),
    "averaged features": (
        FIRST,
        [node("ReduceMean", ["x2", "axes"], ["p"]), node("Reshape", ["p", "to"], ["q"]), node("Gemm", ["q", "w", "b"], ["y"], alpha=0.5)],
        {"w": (D, 3), "b": (3,)},
    ),
    "a gate": (
        FIRST,
        [
            node("GlobalAveragePool", ["x"], ["p"]), node("Sigmoid", ["p"], ["g"]), node("Mul", ["x2", "g"], ["s"]), node("Conv", ["s", "w"], ["y"]),
        ],
        {"w": (4, D, 1, 1)},
    ),
}  # fmt: skip


def streamed(shape, nodes, shapes, variant: str = "toy-vector") -> ir.Model:
    """Two connections with one weight a feature each, and what reads them; the shapes between are known."""
    constants = weights(u=(D, D), k=(D, D, 1, 1), **shapes) | {
        "axes": np.array([2, -1]),
        "features": np.array([1]),
        "last": np.array([-1]),
        "to": np.array([2, D]),
    }
    made = graph([*SITES[shape], *nodes], constants, shape)
    proto = ir.to_proto(made)
    del proto.graph.output[0].type.tensor_type.shape.dim[:]
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    return trained(rewrite_onnx(ir.from_proto(onnx.shape_inference.infer_shapes(proto)), variant=variant))


@pytest.mark.parametrize("name", TAKE)
def test_readers_take_the_skips_weight_per_feature(name, tmp_path):
    shape, nodes, shapes = TAKE[name]
    done, ops = compared(streamed(shape, nodes, shapes), RNG.standard_normal(shape).astype(np.float32), tmp_path)
    assert (done.unweighted, done.multiplied, done.folded) == (2, 0, 2)
    assert ops.count("Mul") == [one.op_type for one in nodes].count("Mul")


REFUSE = {
    "norm": (LAST, [node("LayerNormalization", ["x2", "w"], ["y"])], {"w": (D,)}),
    "sum over the features": (LAST, [node("ReduceSum", ["x2", "last"], ["y"])], {}),
    "mean over the features": (FIRST, [node("ReduceMean", ["x2", "features"], ["y"])], {}),
    "the larger of two": (LAST, [node("Max", ["x2", "x"], ["s"]), node("MatMul", ["s", "w"], ["y"])], {"w": (D, 3)}),
    "transposed": (FIRST, [node("Transpose", ["x2"], ["t"], perm=[0, 1, 3, 2]), node("Conv", ["t", "w"], ["y"])], {"w": (4, D, 1, 1)}),
    "view": (FIRST, [node("Flatten", ["x2"], ["q"]), node("MatMul", ["q", "w"], ["y"])], {"w": (16 * D, 3)}),
    "product over positions": (FIRST, [node("MatMul", ["x2", "w"], ["y"])], {"w": (4, 3)}),
    "gemm over rows": (LAST, [node("Flatten", ["x2"], ["q"], axis=2), node("Gemm", ["q", "w"], ["y"], transA=1)], {"w": (10, 3)}),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSE)
def test_readers_that_need_the_true_sum_get_it(name, tmp_path):
    shape, nodes, shapes = REFUSE[name]
    done, ops = compared(streamed(shape, nodes, shapes), RNG.standard_normal(shape).astype(np.float32), tmp_path)
    assert (done.unweighted, done.multiplied) == (2, 1)
    assert ops.count("Mul") == 1


def test_a_negative_weight_of_one_feature_stays_a_product(tmp_path):
    model = streamed(*TAKE["convolution"])
    for name, value in model.graph.initializers.items():
        if "laurel_0" in name:
            array = value.const_value.numpy().copy()
            array[2] = -1.5
            value.const_value = ir.tensor(array, name=name)
    done, ops = compared(model, RNG.standard_normal(FIRST).astype(np.float32), tmp_path)
    assert (done.unweighted, done.multiplied) == (1, 0)
    assert ops.count("Mul") == 1


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


# Random graphs

POINTS = ["Relu", "Sigmoid", "Neg", "Abs"]
POOLS = ["MaxPool", "AveragePool"]
OPS = [*POINTS, *POOLS, "Conv", "BatchNormalization", "Mul", "Bias", "Gate", "Add", "Max", "Transpose", "InstanceNormalization"]
back = st.sampled_from([0, 0, 0, 0, 1, 2, 5])  # mostly what was computed last
steps = st.lists(st.tuples(st.sampled_from([*OPS, *["Site"] * 6]), back, back), max_size=14)


@hypothesis.settings(max_examples=80, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    plan=steps, seed=st.integers(0, 3), skip=st.sets(st.sampled_from(SKIPPABLE)), variant=st.sampled_from(["toy-vector", "rw-vector"])
)
def test_random_graphs_of_images(plan, seed, skip, variant, tmp_path):
    """Values stay, whatever reads streams with a weight for each channel, and whichever passes there are."""
    generator = np.random.default_rng(seed)
    nodes, values, constants = [], ["x"], {}

    def put(op: str, *inputs: str, **attributes) -> str:
        nodes.append(node(op, list(inputs), [f"v{len(nodes)}"], **attributes))
        return nodes[-1].output[0]

    def constant(*shape: int, low: float = 0.5) -> str:
        constants[f"w{len(constants)}"] = generator.uniform(low, 1.5, shape).astype(np.float32)
        return f"w{len(constants) - 1}"

    def convolved(value: str, groups: int) -> str:
        return put("Conv", value, constant(D, D // groups, 3, 3, low=-1.5), constant(D), pads=[1, 1, 1, 1], group=groups)

    for op, left, right in [("Site", 0, 0), *plan, ("Site", 0, 0), ("Conv", 0, 0)]:
        a, b = values[-1 - left % len(values)], values[-1 - right % len(values)]
        vectors = [constant(D) for _ in range({"BatchNormalization": 4, "InstanceNormalization": 2}.get(op, 0))]
        values.append(
            put("Add", a, convolved(put("Relu", a), 1)) if op == "Site"
            else convolved(a, (1, 2, D)[right % 3]) if op == "Conv"
            else put(op, a, kernel_shape=[3, 3], pads=[1, 1, 1, 1]) if op in POOLS
            else put("Mul", a, constant(D, 1, 1)) if op == "Mul"
            else put("Add", constant(1, D, 1, 1), a) if op == "Bias"
            else put("Mul", a, put("Sigmoid", put("GlobalAveragePool", b))) if op == "Gate"
            else put(op, a, b) if op in ("Add", "Max")
            else put("Transpose", a, perm=[0, 1, 3, 2]) if op == "Transpose"
            else put(op, a, *vectors)
        )  # fmt: skip
    nodes.append(node("Identity", [values[-1]], ["y"]))
    source = onnx.shape_inference.infer_shapes(ir.to_proto(graph(nodes, constants, FIRST)))
    model = trained(rewrite_onnx(ir.from_proto(source), variant=variant), seed)
    before = write_onnx(model, tmp_path / "before.onnx")
    hypothesis.event(f"{lower(model, skip=skip, verify=False).unweighted} weights of skips became 1")
    after = write_onnx(model, tmp_path / "after.onnx")
    feeds = {"x": generator.standard_normal(FIRST).astype(np.float32)}
    found, right = (run_onnx(path, feeds, optimised=False) for path in (after, before))
    close(found, right, rtol=1e-3, atol=1e-4)  # up to 16 random ops in float32, each of which may enlarge what the weights' rounding left
