"""Scales, weights and epsilons stay in the range of their types, however deep the net; names stay unique. Against float64."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from laurel_rewrite import ExportError, rewrite_onnx, write_onnx
from laurel_rewrite.backends.onnx.surgery import inline_laurel
from laurel_rewrite.lowering import Lowering, lower
from laurel_rewrite.passes.algebra import bears
from laurel_rewrite.passes.onnx_pass import check_graph
from laurel_rewrite.verification.onnx import run_onnx
from tools.fuzz.reference import evaluate

D = 8
node = helper.make_node
Weights = dict[str, np.ndarray]


def model_of(nodes, weights: Weights, shape=(2, 3, D), outputs=("y",), dtype: int = TensorProto.FLOAT) -> ir.Model:
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    graph = helper.make_graph(
        nodes, "graph", [helper.make_tensor_value_info("x", dtype, shape)], [helper.make_tensor_value_info(o, dtype, shape) for o in outputs],
        [numpy_helper.from_array(w.astype(kind if w.dtype == np.float64 else w.dtype), name) for name, w in weights.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def with_weight(model: ir.Model, b: float) -> ir.Model:
    """The skip's weight b at every site, 2 - b the branch's, and low-rank maps that do something."""
    generator = np.random.default_rng(1)
    for name, value in model.graph.initializers.items():
        if name.endswith(".mix"):
            value.const_value = ir.tensor(np.array([np.log((2 - b) / b), 0.0]).astype(value.dtype.numpy()), name=name)
        elif name.endswith(".weight"):
            value.const_value = ir.tensor((generator.standard_normal(value.shape.numpy()) / D).astype(value.dtype.numpy()), name=name)
    return model


def lowered_against_float64(model: ir.Model, folder: Path, rtol: float = 1e-4) -> tuple[ir.Model, Lowering]:
    """Lower a copy; onnxruntime computes with it what float64 does without."""
    plain, copy = model.clone(), model.clone()
    inline_laurel(plain)
    (value,) = model.graph.inputs
    feeds = {"x": np.random.default_rng(2).standard_normal(value.shape.numpy()).astype(value.dtype.numpy())}
    done = lower(copy, verify=False)
    after = write_onnx(copy, folder / "after.onnx")
    for optimised in (False, True):
        for found, right in zip(run_onnx(after, feeds, optimised=optimised), evaluate(plain, feeds), strict=True):
            np.testing.assert_allclose(found, right, rtol=0, atol=rtol * np.abs(right).max())
    return copy, done


# Deep nets


def layer_norm(x: str, k: int) -> list:
    return [node("LayerNormalization", [x, "gamma"], [f"n{k}"], axis=-1)]


def root_mean_square(x: str, k: int) -> list:
    return [
        node("Pow", [x, "two"], [f"s{k}"]), node("ReduceMean", [f"s{k}", "last"], [f"m{k}"]), node("Add", [f"m{k}", "epsilon"], [f"e{k}"]),
        node("Sqrt", [f"e{k}"], [f"q{k}"]), node("Div", [x, f"q{k}"], [f"u{k}"]), node("Mul", [f"u{k}", "gamma"], [f"n{k}"]),
    ]  # fmt: skip


def pre_norm(norm, sites: int) -> tuple[list, Weights, tuple[int, ...]]:
    weights = {"two": np.array(2.0), "last": np.array([-1]), "epsilon": np.array(1e-6), "gamma": np.ones(D)}
    nodes = []
    for k in range(sites):
        x = f"x{k}" if k else "x"
        nodes += [
            *norm(x, k),
            node("MatMul", [f"n{k}", f"w{k}"], [f"f{k}"]),
            node("Add", [x, f"f{k}"], [f"x{k + 1}" if k + 1 < sites else "last_x"]),
        ]
        weights[f"w{k}"] = np.random.default_rng(k).standard_normal((D, D)) / np.sqrt(D)
    return [*nodes, *layer_norm("last_x", sites), node("MatMul", [f"n{sites}", "w0"], ["y"])], weights, (2, 3, D)


def fused_norm(sites: int) -> tuple[list, Weights, tuple[int, ...]]:
    """Sums that live in SkipLayerNormalization, whose fourth output goes on."""
    weights = {"gamma": np.ones(D), "beta": np.zeros(D)}
    nodes = [node("MatMul", ["x", "w0"], ["f0"])]
    for k in range(sites):
        x = f"x{k}" if k else "x"
        nodes.append(
            node(
                "SkipLayerNormalization",
                [x, f"f{k}", "gamma", "beta"],
                [f"n{k}", "", "", f"x{k + 1}"],
                domain="com.microsoft",
                epsilon=1e-5,
            )
        )
        nodes.append(node("MatMul", [f"n{k}", f"w{k}"], [f"f{k + 1}" if k + 1 < sites else "y"]))
        weights[f"w{k}"] = np.random.default_rng(k).standard_normal((D, D)) / np.sqrt(D)
    return nodes, weights, (2, 3, D)


def convolutions(sites: int) -> tuple[list, Weights, tuple[int, ...]]:
    weights = {"scale": np.ones(D), "shift": np.full(D, 0.5), "mean": np.full(D, 0.2), "variance": np.full(D, 2.0)}
    nodes = []
    for k in range(sites):
        x = f"x{k}" if k else "x"
        nodes += [
            node("BatchNormalization", [x, "scale", "shift", "mean", "variance"], [f"n{k}"]), node("Relu", [f"n{k}"], [f"r{k}"]),
            node("Conv", [f"r{k}", f"w{k}"], [f"f{k}"]), node("Add", [x, f"f{k}"], [f"x{k + 1}"]),
        ]  # fmt: skip
        weights[f"w{k}"] = np.random.default_rng(k).standard_normal((D, D, 1, 1)) / (4 * D)
    return [*nodes, node("Conv", [f"x{sites}", "w0"], ["y"])], weights, (2, D, 3, 3)


NETS = {
    "layer norm": lambda sites: pre_norm(layer_norm, sites),
    "root mean square": lambda sites: pre_norm(root_mean_square, sites),
    "fused norm": fused_norm,
    "convolutions": convolutions,
}


@pytest.mark.parametrize(("sites", "b"), [(48, 0.54), (96, 1.29), (192, 0.54)])
@pytest.mark.parametrize("net", NETS)
def test_deep_nets_of_one_weight(net, sites, b, tmp_path):
    """0.54^192 is 4e-52, and 1.29^96 is 4e10: c is set back on the way."""
    nodes, weights, shape = NETS[net](sites)
    model = with_weight(rewrite_onnx(model_of(nodes, weights, shape), verify=False, variant="rw"), b)
    copy, done = lowered_against_float64(model, tmp_path)
    every = int(np.log(2.0**20) / abs(np.log(b))) + 1  # sites until c leaves its range
    resets = sites // every
    assert resets > 0
    assert f"set back to 1 by a Mul at {resets} sites, 0 Muls at readers" in done.rescaled
    assert f"{sites - resets} skip weights became 1" in done.rescaled
    ops = Counter(n.op_type for n in nodes)
    assert Counter(n.op_type for n in copy.graph) - ops == Counter({"Mul": resets})


@pytest.mark.parametrize("variant", ["rw+lr", "rw+lr+pa"])
@pytest.mark.parametrize("normalize", ["softmax", "paper"])
def test_deep_nets_of_other_variants(variant, normalize, tmp_path):
    """ "paper" starts at a = b = 1/2."""
    nodes, weights, shape = NETS["layer norm"](96)
    model = rewrite_onnx(model_of(nodes, weights, shape), verify=False, variant=variant, rank=2, normalize=normalize)
    _, done = lowered_against_float64(model if normalize == "paper" else with_weight(model, 0.54), tmp_path)
    assert "set back to 1 by a Mul" in done.rescaled


def test_a_scale_that_only_a_cast_cannot_bear(tmp_path):
    """The stream is float32 and may be scaled far; its reader is float16, and gets true values."""
    nodes, weights = [], {"gamma": np.ones(D)}
    for k in range(8):
        x = f"x{k}" if k else "x"
        nodes += [*layer_norm(x, k), node("MatMul", [f"n{k}", "w"], [f"f{k}"]), node("Add", [x, f"f{k}"], [f"x{k + 1}"])]
    nodes += [
        node("Cast", ["x8"], ["half"], to=TensorProto.FLOAT16),
        node("MatMul", ["half", "h"], ["g"]),
        node("Cast", ["g"], ["y"], to=1),
    ]
    weights |= {"w": np.eye(D), "h": np.eye(D, dtype=np.float16)}
    model = with_weight(rewrite_onnx(model_of(nodes, weights), verify=False, variant="rw"), 0.25)
    _, done = lowered_against_float64(model, tmp_path, rtol=2e-3)  # float16 has 11 bits
    assert done.rescaled.endswith("1 Muls at readers")


def test_powers_of_a_scale_stay_in_range(tmp_path):
    """c^12 of c = 2^-5 would be a weight of 2^60."""
    weights = {"gamma": np.ones(D), "w": np.eye(D), "twelve": np.array(12.0)}
    nodes = []
    for k in range(5):
        x = f"x{k}" if k else "x"
        nodes += [*layer_norm(x, k), node("MatMul", [f"n{k}", "w"], [f"f{k}"]), node("Add", [x, f"f{k}"], [f"x{k + 1}"])]
    nodes += [node("Pow", ["x5", "twelve"], ["p"]), node("MatMul", ["p", "w"], ["y"])]
    model = with_weight(rewrite_onnx(model_of(nodes, weights), verify=False, variant="rw"), 0.5)
    copy, done = lowered_against_float64(model, tmp_path)
    assert done.rescaled.endswith("1 Muls at readers")
    assert max(float(np.abs(v.const_value.numpy()).max()) for v in copy.graph.initializers.values()) < 100


# Weights


@pytest.mark.parametrize(
    ("dtype", "largest", "factor", "expected"),
    [
        (ir.DataType.FLOAT16, 6e4, 2.0, False), (ir.DataType.FLOAT16, 3e4, 2.0, True), (ir.DataType.FLOAT16, 1e-4, 0.5, False),
        (ir.DataType.FLOAT16, 1e-6, 2.0, True), (ir.DataType.FLOAT16, 0.0, 1e9, True), (ir.DataType.FLOAT, -3.4e38, 2.0, False),
        (ir.DataType.FLOAT, 1e-37, 2.0**-20, False), (ir.DataType.BFLOAT16, 1e38, 2.0, True), (ir.DataType.BFLOAT16, 1e38, 8.0, False),
        (ir.DataType.FLOAT, -np.inf, 0.5, True),
    ],
)  # fmt: skip
def test_what_a_type_bears(dtype, largest, factor, expected):
    assert bears(ir.tensor(np.array([0.0, largest]).astype(dtype.numpy()), dtype=dtype), factor) is expected


def test_weights_that_would_leave_their_type_keep_a_mul(tmp_path):
    """In float16 2e-4 a is no normal number: the weight of the branch stays a Mul."""
    generator = np.random.default_rng(0)
    nodes = [
        node("Relu", ["x"], ["r"]),
        node("MatMul", ["r", "w"], ["f"]),
        node("Add", ["x", "f"], ["s"]),
        node("MatMul", ["s", "v"], ["y"]),
    ]
    weights = {"w": generator.uniform(1e-4, 2e-4, (D, D)), "v": generator.standard_normal((D, D))}
    model = with_weight(rewrite_onnx(model_of(nodes, weights, dtype=TensorProto.FLOAT16), verify=False, variant="rw"), 1.8)
    _, done = lowered_against_float64(model, tmp_path, rtol=5e-3)  # float16 has 11 bits
    (reason,) = done.refused.values()
    assert re.fullmatch(r"0\.11 would take the weights of MatMul '.*' out of the range of FLOAT16", reason)


def test_an_epsilon_that_would_leave_its_type_stays(tmp_path):
    """A root mean square in float16: 1e-4 / c^2 would be no normal number, so this norm reads true values."""
    weights = {"two": np.array(2.0), "last": np.array([-1]), "epsilon": np.array(1e-4), "gamma": np.ones(D), "w": np.eye(D), "v": np.eye(D)}
    nodes = [node("Relu", ["x"], ["r"]), node("MatMul", ["r", "w"], ["f"]), node("Add", ["x", "f"], ["s"]), *root_mean_square("s", 0)]
    nodes += [node("MatMul", ["n0", "v"], ["g"]), node("Add", ["s", "g"], ["t"]), *layer_norm("t", 9), node("MatMul", ["n9", "v"], ["y"])]
    model = with_weight(rewrite_onnx(model_of(nodes, weights, dtype=TensorProto.FLOAT16), verify=False, variant="rw"), 1.35)
    copy, _ = lowered_against_float64(model, tmp_path, rtol=5e-3)  # float16 has 11 bits
    kept = [n.inputs[1].const_value.numpy() for n in copy.graph if n.op_type == "Add" and n.inputs[1].const_value is not None]
    np.testing.assert_allclose(kept, 1e-4, rtol=1e-2)  # as float16 has it


def test_low_rank_maps_share_what_one_of_them_cannot_hold(tmp_path):
    """U of 1e-6 is subnormal in float16, and V of 50 is not."""
    nodes = [node("MatMul", ["x", "w"], ["m"]), node("Tanh", ["m"], ["f"]), node("Add", ["x", "f"], ["y"])]
    model = rewrite_onnx(model_of(nodes, {"w": np.eye(D)}, dtype=TensorProto.FLOAT16), verify=False, variant="lr+pa", rank=2)
    parameters = {n: v for n, v in model.graph.initializers.items() if "laurel_0." in n}
    for name, value in parameters.items():
        number = {"down": 50.0, "up": 1e-4}.get(name.split(".")[1], 0.01)
        value.const_value = ir.tensor(np.full(value.shape.numpy(), number, np.float16), name=name)
    copy, _ = lowered_against_float64(model, tmp_path, rtol=5e-3)  # float16 has 11 bits
    sizes = [float(v.const_value.numpy().max()) for n, v in copy.graph.initializers.items() if "laurel_0." in n]
    assert min(sizes) > 1e-3


# Names


def test_an_output_that_is_read_by_something_that_needs_true_values(tmp_path):
    """One Mul serves the reader and the output, under a name of its own."""
    nodes, weights = [], {"gamma": np.ones(D), "w": np.eye(D)}
    for k in range(4):
        x = f"x{k}" if k else "x"
        nodes += [*layer_norm(x, k), node("MatMul", [f"n{k}", "w"], [f"f{k}"]), node("Add", [x, f"f{k}"], [f"x{k + 1}"])]
    nodes += [node("Tanh", ["x2"], ["t"]), *layer_norm("x4", 9), node("MatMul", ["n9", "w"], ["y"])]
    model = with_weight(rewrite_onnx(model_of(nodes, weights, outputs=("t", "x2", "y")), verify=False, variant="rw"), 0.8)
    copy, done = lowered_against_float64(model, tmp_path)
    assert [value.name for value in copy.graph.outputs] == ["t", "x2", "y"]
    assert done.rescaled.endswith("1 Muls at readers")
    assert Counter(n.op_type for n in copy.graph)["Mul"] == 1


def test_names_that_the_graph_has_already(tmp_path):
    nodes = [
        node("Relu", ["x"], ["laurel_0/Mul_0.out"], name="laurel_0"), node("MatMul", ["laurel_0/Mul_0.out", "laurel_0.weight"], ["m"], name="s/rescaled"),
        node("Tanh", ["m"], ["s.true"], name="laurel_0/Mul_0"), node("Add", ["x", "s.true"], ["s"], name="laurel_0/Add_1"),
        node("MatMul", ["s", "laurel_0.weight"], ["s.unscaled"]), node("Sigmoid", ["s"], ["s.scale"]),
        node("Add", ["s.unscaled", "s.scale"], ["y"]),
    ]  # fmt: skip
    model = with_weight(rewrite_onnx(model_of(nodes, {"laurel_0.weight": np.eye(D)}, outputs=("y", "s")), verify=False, variant="rw"), 0.7)
    copy, _ = lowered_against_float64(model, tmp_path)
    names = [n.name for n in copy.graph if n.name]
    assert len(set(names)) == len(names)


def test_what_is_no_graph_is_refused():
    def graph(*nodes) -> ir.Model:
        return model_of(nodes, {"w": np.eye(D)})

    check_graph(graph(node("Relu", ["x"], ["a"], name="one"), node("Relu", ["a"], ["y"], name="two")))
    with pytest.raises(ExportError, match="Two nodes have the name 'one'; the second is a Tanh"):
        check_graph(graph(node("Relu", ["x"], ["a"], name="one"), node("Tanh", ["a"], ["y"], name="one")))
    model = graph(node("Relu", ["x"], ["a"]), node("Relu", ["a"], ["y"]))
    first, second = model.graph
    second.outputs[0].name = "w"
    with pytest.raises(ExportError, match=r"The name 'w' of an output of the Relu '.*' stands for another value already"):
        check_graph(model)
    second.outputs[0].name = "y"
    model.graph.remove(second)
    model.graph.insert_before(first, second)
    with pytest.raises(ExportError, match=r"'a' is read by the Relu '.*', where it is not computed yet"):
        check_graph(model)
