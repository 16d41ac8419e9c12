"""The lowered graph computes what the unlowered one does, and onnxruntime fuses it as it fuses the baseline."""

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
from conftest import LIGHT, away_from_start, close, fused, light, onnx_graph, output, trained
from hypothesis import HealthCheck, given, settings
from onnx import TensorProto, helper, numpy_helper
from onnxscript.rewriter.ort_fusions.rms_normalization import fuse_rms_normalization
from onnxscript.rewriter.ort_fusions.skip_normalization import fuse_skip_layer_normalization, fuse_skip_rms_normalization
from toys import CASES, D

from laurel_rewrite import ConfigError, ExportError, detect, export_onnx, rewrite, rewrite_onnx, write_onnx
from laurel_rewrite.feeds import draw_feeds
from laurel_rewrite.lowering import SKIPPABLE, lower
from laurel_rewrite.profiling.fusions import count_ops
from laurel_rewrite.profiling.sessions import session_of
from laurel_rewrite.profiling.sessions import settings as settings_of
from laurel_rewrite.verify import run_onnx
from passes.evaluate_laurel import Affine, EvaluateLaurel
from passes.expand_laurel import ExpandLaurel
from passes.fold_branch import FoldBranch
from passes.rescale_stream import RescaleStream

VARIANTS = ["rw", "lr", "pa", "rw+lr", "rw+pa", "lr+pa", "rw+lr+pa"]


def compared(model: ir.Model, folder: Path, *, skip=(), seed: int = 3, **drawn) -> tuple[Path, object]:
    """Lower a copy, and compare both in onnxruntime with and without its optimiser. The lowered file, and what was done."""
    before = write_onnx(model, folder / "before.onnx")
    lowered = model.clone()
    done = lower(lowered, skip=skip)
    assert not lowered.functions
    assert {node.domain for node in lowered.graph} <= {node.domain for node in model.graph}
    after = write_onnx(lowered, folder / "after.onnx")
    feeds = draw_feeds(model, seed=seed, **drawn)
    expected = run_onnx(before, feeds, optimised=False)
    for optimised in (False, True):
        close(run_onnx(after, feeds, optimised=optimised), expected)
    return after, done


def run_as(path: Path, folder: Path) -> Counter[str]:
    """What onnxruntime makes of a file, by op."""
    session_of(path, settings_of(), optimised=folder / "optimised.onnx")
    return count_ops(ir.load(path), ir.load(folder / "optimised.onnx")).after


MODELS = ["resnet50", "vit_small", "gpt2", "bert", "llama", "t5", "falcon", "cohere"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_the_same_values(name, variant, exported, tmp_path):
    model = trained(rewrite_onnx(exported(name), variant=variant, rank=4))
    _, done = compared(model, tmp_path)
    if "rw" in variant:
        assert done.sites == done.folded
        assert not done.refused
        assert "0 Muls at readers" in done.rescaled


@pytest.mark.parametrize("name", MODELS)
def test_weighted_residuals_cost_nothing(name, exported, tmp_path):
    """RW ends as the baseline's very ops."""
    model = trained(rewrite_onnx(exported(name), variant="rw"))
    after, _ = compared(model, tmp_path)
    assert run_as(after, tmp_path) == run_as(exported(name), tmp_path)


@pytest.mark.parametrize("name", ["resnet50", "bert", "gpt2", "vit_small"])
def test_weighted_residuals_cost_nothing_in_graphs_that_were_fused_before(name, exported, tmp_path):
    """SkipLayerNormalization and FusedConv hold the sums, and their operands have the scale of the stream."""
    given = fused(exported(name), tmp_path)
    model = trained(rewrite_onnx(given, variant="rw"))
    after, done = compared(model, tmp_path)
    assert not done.refused
    assert "0 Muls at readers" in done.rescaled
    assert run_as(after, tmp_path) == run_as(given, tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_fusions_of_onnxscript_find_the_same_places(name, exported, tmp_path):
    """People who fuse skips and normalisations before onnxruntime does can go on doing so."""
    fuse = (fuse_rms_normalization, fuse_skip_layer_normalization, fuse_skip_rms_normalization)
    counts = {}
    for variant in ("", "rw", "rw+lr"):
        model = ir.load(exported(name)) if not variant else trained(rewrite_onnx(exported(name), variant=variant, rank=4))
        lower(model)
        counts[variant] = [one(model) for one in fuse]
    assert counts["rw"] == counts["rw+lr"] == counts[""]
    assert sum(counts[""][1:]) >= 6


def test_the_optimised_resnet_is_the_baselines_and_two_convolutions_a_site(exported, tmp_path):
    base = run_as(exported("resnet50"), tmp_path)
    assert sum(base.values()) == 58
    after, _ = compared(trained(rewrite_onnx(exported("resnet50"), variant="rw+lr", rank=4)), tmp_path)
    assert run_as(after, tmp_path) - base == Counter({"Conv": 32})
    assert not base - run_as(after, tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("normalize", ["softmax", "sigmoid", "none", "paper"])
@pytest.mark.parametrize("history_map", ["low-rank", "identity"])
def test_every_option_of_the_operator(variant, normalize, history_map, tmp_path):
    """Against PyTorch, which knows nothing of the lowering."""
    x = torch.randn(2, 5, D)
    model = away_from_start(
        rewrite(CASES["loop"].make(), (x,), variant=variant, rank=4, normalize=normalize, history_map=history_map)
    ).eval()
    path = export_onnx(model, (x,), None, tmp_path / "model.onnx")
    other = torch.randn(3, 7, D)
    close(run_onnx(path, {"x": other.numpy()}, optimised=True), [output(model, (other,)).numpy()])


@pytest.mark.parametrize("name", ["parallel", "parallel_skip_middle", "post_norm", "images", "sequence_1d", "tied", "helper"])
def test_every_way_to_write_a_sum(name, tmp_path):
    case = CASES[name]
    x = torch.randn(case.shape)
    model = away_from_start(rewrite(case.make(), (x,), variant="rw+lr+pa", rank=4)).eval()
    path = export_onnx(model, (x,), None, tmp_path / "model.onnx")
    other = torch.randn(3, *case.shape[1:])
    close(run_onnx(path, {"x": other.numpy()}, optimised=True), [output(model, (other,)).numpy()])


@pytest.mark.parametrize("name", [name for name, kinds in LIGHT.items() if kinds])
def test_graphs_of_another_framework(name, tmp_path):
    compared(trained(rewrite_onnx(light(name), variant="rw+lr", rank=4)), tmp_path)


@pytest.mark.parametrize("skip", [["rescale-stream"], ["fold-branch"], ["pad-rank"], ["rescale-stream", "fold-branch"]])
def test_passes_can_be_left_out(skip, exported, tmp_path, here):
    model = trained(rewrite_onnx(exported("resnet50"), variant="rw+lr", rank=4))
    after, _done = compared(model, tmp_path, skip=skip)
    lowered = ir.load(after)
    muls = sum(node.op_type == "Mul" for node in lowered.graph)
    assert muls == 16 * (("rescale-stream" in skip) + ("fold-branch" in skip))
    ranks = {v.const_value.shape[0] for n, v in lowered.graph.initializers.items() if ".down." in n}
    assert ranks == ({4} if "pad-rank" in skip else {16})
    with pytest.raises(ConfigError, match=r"no pass 'fold-branches' to skip\. Nearest: fold-branch"):
        lower(model.clone(), skip=["fold-branches"])


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
    """Twenty sites with b = 0.5 would scale the stream by 2^-20."""
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
            parameter.data = torch.tensor([np.log(3.0), 0.0], dtype=torch.float16)
    path = export_onnx(model, (x,), None, tmp_path / "model.onnx", target="portable")
    lowered = ir.load(path)
    done = lower(lowered)
    assert done.rescaled.startswith("not rescaled: c would range from 9.")
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
    next(iter(model.functions.values())).metadata_props.clear()
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


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


def test_onnx_graphs_by_the_command(exported, tmp_path, here):
    result = here(str(exported("gpt2")), "--rank", "4", "--profile-seconds", "0.2")
    assert result.returncode == 0, result.stderr
    assert "lowered against not, random LAuReL" in result.stdout
    files = {"laurel.onnx", "plan.toml", "report.html", "report.json", "trace-gpt2.json", "trace-laurel.json", "trace-one-more-layer.json"}
    assert {p.name for p in (tmp_path / "laurel_out").iterdir()} == files
    lowered = ir.load(tmp_path / "laurel_out" / "laurel.onnx")
    assert not lowered.functions
    assert "Softmax" not in {n.op_type for n in lowered.graph if "laurel" in str(n.name)}  # no weight is left to compute
    assert "6 branches have their weight in what computes them. Streams: 6 skip weights became 1, c from" in result.stdout
    assert "0 lost" in result.stdout
    result = here("laurel_out/laurel.onnx", "--out", "again")
    assert result.returncode == 2
    assert "rewritten already" in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target", "portable", "--skip-pass", "fold-branch"], "--skip-pass is for --target ort-cpu"),
        (["--onnx-functions", "inline"], "--onnx-functions is for --target portable"),
        (["--skip-pass", "fold"], "There is no pass 'fold' to skip. Nearest: fold-branch"),
    ],
)
def test_options_that_do_not_fit(words, message, exported, here):
    result = here(str(exported("gpt2")), *words)
    assert result.returncode == 2
    assert message in result.stderr


@pytest.mark.parametrize(("target", "functions"), [("portable", True), ("none", False)])
def test_other_targets_keep_the_parameters(target, functions, exported, tmp_path, here):
    result = here(str(exported("gpt2")), "--rank", "4", "--target", target, "--profile-seconds", "0")
    assert result.returncode == 0, result.stderr
    model = ir.load(tmp_path / "laurel_out" / "laurel.onnx")
    assert bool(model.functions) == functions
    assert sum(name.endswith(".mix") for name in model.graph.initializers) == 6


def test_what_onnx_graph_helpers_make_is_lowered_too(tmp_path):
    """Sums inside fused nodes keep their node, and the weights go to its operands."""
    nodes = [
        node("MatMul", ["x", "w"], ["f"]), node("Relu", ["f"], ["r"]),
        node("SkipLayerNormalization", ["x", "r", "gamma", "beta"], ["y"], name="fused", domain="com.microsoft"),
    ]  # fmt: skip
    model = onnx_graph(nodes, {"x": (2, 5, D)}, "f r", w=(D, D), gamma=(D,), beta=(D,))
    generator = np.random.default_rng(0)
    for name in ("w", "gamma", "beta"):
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(generator.standard_normal(tuple(value.shape)).astype(np.float32), name=name)
    after, done = compared(trained(rewrite_onnx(model, variant="rw+lr", rank=4)), tmp_path)
    assert "SkipLayerNormalization" in {n.op_type for n in ir.load(after).graph}
    assert done.folded == 1


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
