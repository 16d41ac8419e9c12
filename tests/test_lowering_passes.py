"""The passes of the lowering, one by one: what they refuse, what they make of a graph, and random graphs with any of them left out."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from conftest import close, compared, onnx_graph, trained
from hypothesis import HealthCheck, given, settings
from onnx import TensorProto, helper, numpy_helper
from toys import D

from laurel_rewrite import ExportError, detect, export_onnx, rewrite, rewrite_onnx, write_onnx
from laurel_rewrite.lowering import SKIPPABLE, lower
from laurel_rewrite.passes.evaluate_laurel import Affine, EvaluateLaurel
from laurel_rewrite.passes.expand_laurel import ExpandLaurel
from laurel_rewrite.passes.fold_branch import FoldBranch
from laurel_rewrite.passes.rescale_stream import RescaleStream
from laurel_rewrite.verification.onnx import run_onnx

# Refusals


def chain(nodes, folder: Path, *, weights, outputs=("y",), opset: int = 20) -> ir.Model:
    made = helper.make_graph(
        nodes, "graph", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, D])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, D]) for name in outputs],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )  # fmt: skip
    path = folder / "given.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), path)
    return trained(rewrite_onnx(path, variant="rw+lr", rank=4))


W = {"w": np.random.default_rng(0).standard_normal((D, D))}
node = helper.make_node


def test_a_branch_that_somebody_else_reads_keeps_its_weight(tmp_path):
    nodes = [node("Relu", ["x"], ["r"]), node("MatMul", ["r", "w"], ["f"]), node("Add", ["x", "f"], ["y"]), node("Sigmoid", ["f"], ["z"])]
    _, done = compared(chain(nodes, tmp_path, weights=W, outputs=("y", "z")), tmp_path)
    assert done.refused == {"laurel_0": "f has other readers"}
    assert done.folded == 0


def test_a_branch_that_is_not_linear_in_its_weights_keeps_its_weight(tmp_path):
    nodes = [node("MatMul", ["x", "w"], ["m"]), node("Sigmoid", ["m"], ["f"]), node("Add", ["x", "f"], ["y"])]
    _, done = compared(chain(nodes, tmp_path, weights=W), tmp_path)
    assert done.refused == {"laurel_0": "Sigmoid is not linear in its weights"}


def test_quantised_weights_are_refused(tmp_path):
    quantised = {"q": np.random.default_rng(0).integers(-99, 99, (D, D)).astype(np.int8), "zero": np.zeros(1, np.int8)}
    nodes = [
        *(node("Constant", [], [name], value=numpy_helper.from_array(array)) for name, array in quantised.items()),
        node("DequantizeLinear", ["q", "size", "zero"], ["w"], axis=0), node("Relu", ["x"], ["r"]), node("MatMul", ["r", "w"], ["f"]),
        node("Add", ["x", "f"], ["y"]),
    ]  # fmt: skip
    after, done = compared(chain(nodes, tmp_path, weights={"size": np.array([0.01])}), tmp_path)
    assert list(done.refused) == ["laurel_0"]
    assert sum(n.op_type == "DequantizeLinear" for n in ir.load(after).graph) == 1


def test_the_halves_of_a_roll_are_one_value(tmp_path):
    """Swin's shifted windows: two slices of one value, put together the other way round."""
    slices = {"zero": np.array([0]), "cut": np.array([1]), "end": np.array([2]), "axis": np.array([0])}
    nodes = [
        node("MatMul", ["x", "w"], ["m"]), node("Relu", ["m"], ["r"]), node("MatMul", ["r", "w"], ["v"]),
        *(node("Constant", [], [name], value=numpy_helper.from_array(array)) for name, array in slices.items()),
        node("Slice", ["v", "cut", "end", "axis"], ["late"]), node("Slice", ["v", "zero", "cut", "axis"], ["early"]),
        node("Concat", ["late", "early"], ["f"], axis=0), node("Add", ["x", "f"], ["y"]),
    ]  # fmt: skip
    _, done = compared(chain(nodes, tmp_path, weights=W), tmp_path)
    assert (done.folded, done.refused) == (1, {})


@pytest.mark.parametrize("op", ["Relu", "Abs", "LeakyRelu"])
def test_a_negative_weight_does_not_pass_what_only_a_positive_one_passes(op, tmp_path):
    nodes = [node("MatMul", ["x", "w"], ["m"]), node(op, ["m"], ["f"]), node("Add", ["x", "f"], ["y"])]
    chain(nodes, tmp_path, weights=W)
    model = rewrite_onnx(tmp_path / "given.onnx", variant="rw", normalize="none")
    mix = model.graph.initializers["laurel_0.mix"]
    mix.const_value = ir.tensor(np.array([-1.5, 0.25], np.float32), name=mix.name)  # a = -0.5, b = 1.25
    _, done = compared(model, tmp_path)
    assert done.refused == {"laurel_0": f"the weight is negative, and {op} is on the way"}


def test_an_initializer_that_callers_may_set_is_no_constant(tmp_path):
    nodes = [
        node("MatMul", ["x", "w"], ["m"]),
        node("Relu", ["m"], ["r"]),
        node("MatMul", ["r", "w"], ["f"]),
        node("Add", ["x", "f"], ["y"]),
    ]
    chain(nodes, tmp_path, weights=W)
    given = onnx.load(tmp_path / "given.onnx")
    given.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [D, D]))
    onnx.save(given, tmp_path / "given.onnx")
    model = trained(rewrite_onnx(tmp_path / "given.onnx", variant="rw"))
    before = write_onnx(model, tmp_path / "before.onnx")
    lower(model)
    after = write_onnx(model, tmp_path / "after.onnx")
    feeds = {name: np.random.default_rng(4).standard_normal(shape).astype(np.float32) for name, shape in (("x", (2, D)), ("w", (D, D)))}
    close(run_onnx(after, feeds, optimised=True), run_onnx(before, feeds, optimised=True))


def test_a_shared_weight_is_scaled_for_one_reader_alone(tmp_path):
    nodes = [
        node("MatMul", ["x", "w"], ["m"]), node("Relu", ["m"], ["r"]), node("MatMul", ["r", "w"], ["f"]), node("Add", ["x", "f"], ["s"]),
        node("MatMul", ["s", "w"], ["y"]),
    ]  # fmt: skip
    after, done = compared(chain(nodes, tmp_path, weights=W), tmp_path)
    assert done.folded == 1
    assert len([n for n in ir.load(after).graph.initializers if n.startswith("w")]) == 3  # as it was, with a, and with c


def test_a_stream_whose_readers_are_not_linear_is_not_rescaled(tmp_path):
    nodes = [
        node("Relu", ["x"], ["r"]), node("MatMul", ["r", "w"], ["f"]), node("Add", ["x", "f"], ["s"]), node("Sigmoid", ["s"], ["u"]),
        node("MatMul", ["u", "w"], ["g"]), node("Add", ["s", "g"], ["y"]),
    ]  # fmt: skip
    _, done = compared(chain(nodes, tmp_path, weights=W), tmp_path)
    assert done.rescaled == "not rescaled: 2 readers would need a Mul to save 2"


def test_weights_in_other_files_are_read_only_where_they_change(tmp_path):
    nodes = [
        node("MatMul", ["x", "v"], ["m"]), node("Relu", ["m"], ["r"]), node("MatMul", ["r", "w"], ["f"]), node("Add", ["x", "f"], ["s"]),
        node("MatMul", ["s", "w"], ["y"]),
    ]  # fmt: skip
    model = chain(nodes, tmp_path, weights=W | {"v": W["w"] / 2})
    ir.save(model, tmp_path / "model.onnx", external_data="weights.bin", size_threshold_bytes=512)
    given = ir.load(tmp_path / "model.onnx")
    done = lower(given)
    assert (done.folded, done.refused) == (1, {})
    kinds = {name: isinstance(value.const_value, ir.ExternalTensor) for name, value in given.graph.initializers.items()}
    assert kinds["v"]
    assert not kinds["w.scaled"]
    x = np.random.default_rng(1).standard_normal((2, D)).astype(np.float32)
    before = run_onnx(write_onnx(model, tmp_path / "before.onnx"), {"x": x}, optimised=False)
    close(run_onnx(write_onnx(given, tmp_path / "lowered.onnx"), {"x": x}, optimised=True), before)
    sizes = {file.name: file.stat().st_size for file in tmp_path.glob("lowered*")}
    assert set(sizes) == {"lowered.onnx", "lowered.onnx.data"}


def test_a_scale_that_float16_cannot_bear(tmp_path):
    """Twenty sites with b = 0.8 would scale the stream by 0.01; every fourth sets it back."""
    x = torch.randn(2, 5, D, dtype=torch.float16)

    class Deep(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.LayerNorm(D), torch.nn.Linear(D, D)) for _ in range(20))

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x)
            return x.sum(1)

    model = rewrite(Deep().half(), (x,), variant="rw").eval()
    for name, parameter in model.named_parameters():
        if name.endswith(".mix"):
            parameter.data = torch.tensor([np.log(1.5), 0.0], dtype=torch.float16)
    path = export_onnx(model, (x,), None, tmp_path / "model.onnx", target="portable")
    lowered = ir.load(path)
    done = lower(lowered)
    assert done.rescaled == "15 skip weights became 1, c from 0.512 to 1, set back to 1 by a Mul at 5 sites, 0 Muls at readers"
    after = write_onnx(lowered, tmp_path / "after.onnx")
    # float16 has 11 bits, and in each of twenty layers the two sides round at other places
    close(run_onnx(after, {"x": x.numpy()}, optimised=False), run_onnx(path, {"x": x.numpy()}, optimised=False), rtol=5e-2, atol=5e-3)


def test_parameters_that_are_no_constants(tmp_path):
    nodes = [node("MatMul", ["x", "w"], ["f"]), node("Relu", ["f"], ["r"]), node("Add", ["x", "r"], ["y"])]
    model = chain(nodes, tmp_path, weights=W)
    laurel = next(n for n in model.graph if n.domain == "laurel_rewrite")
    free = ir.Value(name="free", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2]))
    model.graph.inputs.append(free)
    laurel.replace_input_with(2, free)
    with pytest.raises(ExportError, match="laurel_0: the LAuReL parameters are no constants"):
        lower(model)
    laurel.metadata_props.clear()
    with pytest.raises(ExportError, match="does not say what it computes"):
        EvaluateLaurel({})(model)


# What the passes make of a graph


GOLDEN = {
    "rw": ("rw", [node("Relu", ["n"], ["r"]), node("MatMul", ["r", "w"], ["f"])]),
    "rw+lr": ("rw+lr", [node("Relu", ["n"], ["r"]), node("MatMul", ["r", "w"], ["f"])]),
    "kept": ("rw", [node("Sigmoid", ["n"], ["f"])]),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_graphs(name, tmp_path, golden):
    """The graph before the first pass and after each."""
    variant, branch = GOLDEN[name]
    nodes = [
        node("LayerNormalization", ["x", "gamma"], ["n"], axis=-1), *branch, node("Add", ["x", "f"], ["s"]),
        node("LayerNormalization", ["s", "gamma"], ["t"], axis=-1), node("MatMul", ["t", "w"], ["y"]),
    ]  # fmt: skip
    chain(nodes, tmp_path, weights=W | {"gamma": np.ones(D)})
    model = trained(rewrite_onnx(tmp_path / "given.onnx", variant=variant, rank=4))
    compared(model, tmp_path)
    forms = {}
    stages = [f"as it is\n{shown(model, forms)}"]
    for one in (EvaluateLaurel(forms), RescaleStream(forms), FoldBranch(forms), ExpandLaurel(forms)):
        one(model)
        stages.append(f"{type(one).__name__}\n{shown(model, forms)}")
    golden(f"lowered_{name.replace('+', '_')}.txt", "\n".join(stages))


def shown(model: ir.Model, forms: dict[ir.Node, Affine]) -> str:
    lines = []
    for n in model.graph:
        epsilon = f"  epsilon {n.attributes['epsilon'].as_float():.3g}" if "epsilon" in n.attributes else ""
        form = forms.get(n)
        numbers = f"  alphas {form.alphas}, betas {form.betas}, rank {len(form.downs[0][1]) if form.downs else 0}" if form else ""
        numbers = re.sub(r"\d\.\d+", lambda m: f"{float(m[0]):.4f}", numbers)
        lines.append(f"  {n.outputs[0].name} = {n.op_type}({', '.join(str(v.name) for v in n.inputs if v is not None)}){epsilon}{numbers}")
    return "\n".join(lines) + "\n"


# Random graphs


UNARY = ["Relu", "Sigmoid", "MatMul", "LayerNormalization", "Abs", "Neg", "Softmax", "Mul", "AddBias", "Tanh", "Reshape", "Transpose"]
steps = st.lists(
    st.tuples(st.sampled_from([*UNARY, "Site", "Site", "Add"]), st.integers(0, 30), st.integers(0, 30)), min_size=4, max_size=18
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=steps, seed=st.integers(0, 3), variant=st.sampled_from(["rw", "rw+lr", "rw+lr+pa"]), skip=st.sets(st.sampled_from(SKIPPABLE)))
def test_random_graphs(plan, seed, variant, skip, tmp_path):
    """Values stay, whatever reads the streams, and whichever passes there are."""
    generator = np.random.default_rng(seed)
    nodes, values, weights = [], ["x"], {}

    def put(op: str, *inputs: str, **attributes) -> str:
        values.append(f"v{len(nodes)}")  # a node has one output
        nodes.append(node(op, list(inputs), [values[-1]], **attributes))
        return values[-1]

    def weight(array: np.ndarray) -> str:
        weights[f"w{len(weights)}"] = array
        return f"w{len(weights) - 1}"

    for op, left, right in plan:
        a, b = values[-1 - left % len(values)], values[-1 - right % len(values)]
        if op == "MatMul":
            put(op, a, weight(generator.standard_normal((D, D)) / 4))
        elif op == "LayerNormalization":
            put(op, a, weight(generator.uniform(0.5, 1.5, D)), axis=-1)
        elif op == "Mul":
            put(op, a, weight(generator.uniform(0.5, 1.5, D)))
        elif op == "AddBias":
            put("Add", a, weight(generator.standard_normal(D)))
        elif op == "Reshape":
            put("Reshape", put("Reshape", a, "flat"), "back")
            del values[-2]  # of another shape
        elif op == "Transpose":
            put("Transpose", put("Transpose", a, perm=[1, 0]), perm=[1, 0])
            del values[-2]
        elif op == "Site":
            put("Add", a, put("Relu", put("MatMul", a, weight(generator.standard_normal((D, D)) / 4))))
        elif op == "Add":
            put("Add", a, b)
        else:
            put(op, a)
    made = helper.make_graph(
        nodes, "graph", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, D])],
        [helper.make_tensor_value_info(values[-1], TensorProto.FLOAT, [2, D])],
        [
            *(numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()),
            numpy_helper.from_array(np.array([2 * D]), "flat"), numpy_helper.from_array(np.array([2, D]), "back"),
        ],
    )  # fmt: skip
    path = tmp_path / "given.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    if not len(detect(path)):
        return
    model = trained(rewrite_onnx(path, variant=variant, rank=4), seed)
    before = write_onnx(model, tmp_path / "before.onnx")
    lowered = model.clone()
    lower(lowered, skip=skip)
    after = write_onnx(lowered, tmp_path / "after.onnx")
    feeds = {"x": generator.standard_normal((2, D)).astype(np.float32)}
    close(
        run_onnx(after, feeds, optimised=False), run_onnx(before, feeds, optimised=False), rtol=1e-3, atol=1e-4
    )  # up to 18 random ops in float32, each of which may enlarge what the weights' rounding left


def test_a_residual_connection_in_a_branch_is_compared_in_its_own_scale(tmp_path):
    """The outer weight goes through the inner sum, whose value is then another multiple of what it was."""
    nodes = [
        node("Relu", ["x"], ["r"]), node("MatMul", ["r", "w"], ["m"]), node("Relu", ["m"], ["f"]), node("Add", ["r", "f"], ["inner"]),
        node("Relu", ["inner"], ["g"]), node("Add", ["r", "g"], ["y"]),
    ]  # fmt: skip
    model = onnx_graph(nodes, {"x": (2, D)}, "r m f inner g", w=(D, D))
    array = np.random.default_rng(0).standard_normal((D, D)).astype(np.float32)
    model.graph.initializers["w"].const_value = ir.tensor(array, name="w")
    rewritten = trained(rewrite_onnx(model, variant="rw"))
    done = lower(rewritten)
    assert (done.sites, done.folded) == (2, 2)


# What a weight passes


IMAGE = (2, D, 6, 6)
PRODUCERS = {
    "convolution": [node("Conv", ["r", "k3", "v"], ["f"], pads=[1, 1, 1, 1])],
    "grouped": [node("Conv", ["r", "k3g", "v"], ["f"], pads=[1, 1, 1, 1], group=2)],
    "depthwise": [node("Conv", ["r", "k3d"], ["f"], pads=[1, 1, 1, 1], group=D)],
    "transposed": [node("ConvTranspose", ["r", "k3", "v"], ["f"], pads=[1, 1, 1, 1])],
    "batch norm": [node("Conv", ["r", "k1"], ["c"]), node("BatchNormalization", ["c", "v", "v", "v", "p"], ["f"])],
    "layer scale": [node("Conv", ["r", "k1"], ["c"]), node("Mul", ["c", "s"], ["f"])],
    "two terms": [node("Conv", ["r", "k1"], ["c"]), node("Sub", ["c", "d"], ["f"])],
    "views": [
        node("Conv", ["r", "k1"], ["c"]), node("Transpose", ["c"], ["t"], perm=[0, 2, 3, 1]), node("Reshape", ["t", "flat"], ["u"]),
        node("Reshape", ["u", "back"], ["w"]), node("Transpose", ["w"], ["f"], perm=[0, 3, 1, 2]),
    ],
    "dropout": [node("Conv", ["r", "k1"], ["c"]), node("Dropout", ["c"], ["f", ""])],
    "relu behind": [node("Conv", ["r", "k1"], ["c"]), node("Relu", ["c"], ["f"])],
    "padding": [node("Conv", ["r", "k3", "v"], ["c"]), node("Pad", ["c", "pads"], ["f"])],
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCERS)
def test_producers_take_the_weight(name, tmp_path):
    """And the reader behind the sum takes the scale of the stream."""
    generator = np.random.default_rng(0)
    weights = {
        "k3": (D, D, 3, 3), "k3g": (D, D // 2, 3, 3), "k3d": (D, 1, 3, 3), "k1": (D, D, 1, 1), "v": (D,), "s": (D, 1, 1),
    }  # fmt: skip
    arrays = {key: generator.standard_normal(shape).astype(np.float32) for key, shape in weights.items()}
    arrays |= {"p": np.full(D, 2.0, np.float32), "d": generator.standard_normal((1, D, 1, 1)).astype(np.float32)}
    arrays |= {"flat": np.array([2, 36, D]), "back": np.array([2, 6, 6, D]), "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])}
    nodes = [node("Relu", ["x"], ["r"]), *PRODUCERS[name], node("Add", ["x", "f"], ["y0"]), node("Conv", ["y0", "k1"], ["y"])]
    made = helper.make_graph(
        nodes, "graph", [helper.make_tensor_value_info("x", TensorProto.FLOAT, IMAGE)], [helper.make_tensor_value_info("y", TensorProto.FLOAT, IMAGE)],
        [numpy_helper.from_array(array, key) for key, array in arrays.items()],
    )  # fmt: skip
    path = tmp_path / "given.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    after, done = compared(trained(rewrite_onnx(path, variant="rw")), tmp_path)
    assert (done.folded, done.refused) == (1, {})
    assert "0 Muls at readers" in done.rescaled
    ops = Counter(n.op_type for n in ir.load(after).graph)
    assert ops == Counter(n.op_type for n in nodes)
