"""LAuReL in graphs that others wrote: the start is exact, trained weights give what PyTorch gives, and nothing else changes."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from conftest import away_from_start, close, light, onnx_graph, output, real, yolo
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from toys import CASES, D

from laurel_rewrite import (
    CaptureError,
    ConfigError,
    ExportError,
    NoSiteError,
    RewriteError,
    detect,
    export_onnx,
    load,
    remove,
    rewrite,
    rewrite_onnx,
    save,
    write_onnx,
)
from laurel_rewrite.dialects.onnx import METADATA
from laurel_rewrite.feeds import draw_feeds
from laurel_rewrite.operator import sites_of
from laurel_rewrite.verify import run_onnx

VARIANTS = ["rw", "lr", "pa", "rw+lr", "rw+pa", "lr+pa", "rw+lr+pa"]


def randomised(model: ir.Model, seed: int = 0) -> ir.Model:
    """LAuReL parameters of a rewritten model away from their start, equal for equal shapes in equal order."""
    generator = np.random.default_rng(seed)
    for name, value in model.graph.initializers.items():
        if "laurel_" in name:
            array = value.const_value.numpy()
            noise = generator.standard_normal(array.shape) * (0.3 if array.ndim == 1 else 0.1)
            value.const_value = ir.tensor((array + noise).astype(array.dtype), name=name)
    return model


# Graphs of others


GRAPHS = {"resnet50": 16, "shufflenet": 13, "yolo": 6}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", GRAPHS)
def test_third_party_graphs(name, variant, tmp_path):
    given = yolo() if name == "yolo" else light(name)
    model = ir.load(given)
    feeds = draw_feeds(model)
    path = write_onnx(rewrite_onnx(given, variant=variant, rank=4), tmp_path / "laurel.onnx")
    written = ir.load(path)
    sites = [node for node in written.graph if node.domain == "laurel_rewrite"]
    assert len(sites) == GRAPHS[name]
    for a, b in zip(run_onnx(path, feeds, optimised=False), run_onnx(given, feeds, optimised=False), strict=True):
        np.testing.assert_array_equal(a, b)
    close(run_onnx(path, feeds, optimised=True), run_onnx(given, feeds, optimised=True))
    probe = write_onnx(randomised(written), tmp_path / "probe.onnx")
    close(run_onnx(probe, feeds, optimised=True), run_onnx(probe, feeds, optimised=False))


def test_inputs_and_outputs_stay_and_nodes_say_what_they_are(exported, tmp_path):
    given = exported("t5")
    path = write_onnx(rewrite_onnx(given, variant="rw+lr", rank=4), tmp_path / "laurel.onnx")
    before, after = (onnxruntime.InferenceSession(p, providers=["CPUExecutionProvider"]) for p in (given, path))
    for kind in ("get_inputs", "get_outputs"):
        a, b = ([(i.name, i.type, i.shape) for i in getattr(s, kind)()] for s in (before, after))
        assert a == b
    model = ir.load(path)
    known = {site.id for site in detect(given)}
    nodes = {node.name: node for node in model.graph if node.domain == "laurel_rewrite"}
    assert set(nodes) == known
    for name, node in nodes.items():
        assert node.metadata_props[f"{METADATA}site"] == name
        assert node.metadata_props[f"{METADATA}variant"] == "rw+lr"
        assert node.metadata_props[f"{METADATA}rank"] == "4"
        assert all(value.name.startswith(f"{name}.") for value in node.inputs[2:])
    assert model.opset_imports["laurel_rewrite"] == 1
    assert model.opset_imports[""] == ir.load(given).opset_imports[""]


@pytest.mark.parametrize("functions", ["keep", "inline"])
@pytest.mark.parametrize("name", ["gpt2", "resnet50"])
def test_functions_or_nodes(name, functions, exported, tmp_path):
    given = exported(name)
    feeds = draw_feeds(ir.load(given))
    expected = write_onnx(randomised(rewrite_onnx(given, variant="rw+lr+pa", rank=4)), tmp_path / "expected.onnx")
    model = randomised(rewrite_onnx(given, variant="rw+lr+pa", rank=4, functions=functions))
    assert bool(model.functions) == (functions == "keep")
    assert len({node.name for node in model.graph if node.name}) == sum(bool(node.name) for node in model.graph)
    path = write_onnx(model, tmp_path / "laurel.onnx")
    for a, b in zip(run_onnx(path, feeds, optimised=False), run_onnx(expected, feeds, optimised=False), strict=True):
        np.testing.assert_array_equal(a, b)
    sites = Counter(node.metadata_props.get(f"{METADATA}site") for node in ir.load(path).graph)
    assert set(filter(None, sites)) == {site.id for site in detect(given)}
    with pytest.raises(ConfigError, match="rewritten already"):
        rewrite_onnx(path)


# The same parameters in PyTorch and in ONNX


def trained(model, args, kwargs, steps=3):
    """LAuReL's parameters after a few steps; the base's stay."""
    laurels = [p for module in sites_of(model).values() for p in module.parameters()]
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is p for p in laurels))
    optimizer = torch.optim.Adam(laurels, lr=0.05)
    for _ in range(steps):
        result = model(*args, **(kwargs or {}))
        leaf = result if isinstance(result, torch.Tensor) else result[0] if isinstance(result, tuple) else result.logits
        leaf.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


ROUND_TRIPS = ["gpt2", "llama", "t5", "resnet50", "cohere"]


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_weights_trained_in_pytorch(name, tmp_path):
    """Train in PyTorch, put the weights into the ONNX graph of the base model: it computes what the export of the trained model does."""
    example = real(name)
    better = rewrite(example.model.train(), example.args, example.kwargs, variant="rw+lr+pa", rank=4)
    trained(better, example.args, example.kwargs)
    expected = export_onnx(better, example.args, example.kwargs, tmp_path / "expected.onnx")
    base = export_onnx(remove(copy.deepcopy(better)), example.args, example.kwargs, tmp_path / "base.onnx")
    save(better, tmp_path / "trained")
    model = rewrite_onnx(base, variant="rw+lr+pa", rank=4, weights=tmp_path / "trained" / "model.safetensors")
    path = write_onnx(model, tmp_path / "laurel.onnx")
    feeds = draw_feeds(ir.load(base), seed=3)
    for optimised in (False, True):
        close(run_onnx(path, feeds, optimised=optimised), run_onnx(expected, feeds, optimised=optimised))
    start = run_onnx(base, feeds, optimised=False)
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(start, run_onnx(path, feeds, optimised=False), strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "name", ["plain", "parallel", "parallel_skip_last", "parallel_skip_middle", "post_norm", "images", "loop", "helper"]
)
def test_both_doors_write_the_same(name, variant, tmp_path):
    """The export of a rewritten model, and the rewrite of the base model's export, with the same random parameters."""
    case = CASES[name]
    x = torch.randn(case.shape)
    better = away_from_start(rewrite(case.make(), (x,), variant=variant, rank=4)).eval()
    base = export_onnx(remove(copy.deepcopy(better)), (x,), None, tmp_path / "base.onnx")
    save_file({k: v.contiguous() for k, v in better.state_dict().items()}, tmp_path / "w.safetensors")
    path = write_onnx(rewrite_onnx(base, variant=variant, rank=4, weights=tmp_path / "w.safetensors"), tmp_path / "laurel.onnx")
    other = torch.randn((3, *case.shape[1:]))
    close(run_onnx(path, {"x": other.numpy()}, optimised=True), [output(better, (other,)).numpy()])


def test_weights_that_do_not_fit(exported, tmp_path):
    given, file = exported("gpt2"), tmp_path / "w.safetensors"
    model = rewrite_onnx(given, rank=4)
    tensors = {n: torch.from_numpy(v.const_value.numpy().copy()) for n, v in model.graph.initializers.items() if "laurel_" in n}

    def refused(state, message, **options):
        save_file(state, file)
        with pytest.raises(ConfigError, match=message):
            rewrite_onnx(given, weights=file, **{"rank": 4, **options})

    first = next(iter(tensors))
    refused({k: v for k, v in tensors.items() if k != first}, f"lacks 1 of {len(tensors)} LAuReL parameters, the first '{first}'")
    refused(tensors | {"transformer.h.9.laurel_0.mix": torch.zeros(2)}, "has 1 LAuReL parameters that this plan has not")
    refused(tensors, "is of shape .* and the plan gives it", rank=8)
    refused(tensors, "has .* that this plan has not", exclude="transformer.h.1.*")
    file.write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match="could not be read as safetensors"):
        rewrite_onnx(given, rank=4, weights=file)
    save_file(tensors | {"transformer.wte.weight": torch.zeros(3)}, file)  # other tensors are none of ours
    rewrite_onnx(given, rank=4, weights=file)


# Fused graphs


def fused(path: Path, folder: Path) -> Path:
    """The graph after onnxruntime's fusions, as people save it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "fused.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return folder / "fused.onnx"


FUSED = {"resnet50": "FusedConv", "bert": "SkipLayerNormalization", "gpt2": "Gelu", "llama": "SkipSimplifiedLayerNormalization"}


@pytest.mark.parametrize("variant", ["rw", "lr", "rw+lr+pa"])
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
    paths = [write_onnx(randomised(rewrite_onnx(p, variant=variant, rank=4)), tmp_path / f"{n}.onnx") for n, p in enumerate((given, other))]
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
    model = randomised(rewrite_onnx(given, rank=4))
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
        run_onnx(write_onnx(randomised(ir.load(path)), tmp_path / "r.onnx"), feeds, optimised=True), run_onnx(given, feeds, optimised=True),
        strict=True))  # fmt: skip


# Versions, functions, subgraphs, unknown sizes


def old_graph(opset: int, ir_version: int) -> onnx.ModelProto:
    made = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["f"]), helper.make_node("Relu", ["f"], ["r"]), helper.make_node("Add", ["r", "x"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, D]), helper.make_tensor_value_info("w", TensorProto.FLOAT, [D, D])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, D])], [numpy_helper.from_array(W, "w")],
    )  # fmt: skip
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


@pytest.mark.parametrize(
    ("opset", "options", "raised"),
    [(7, {}, 9), (8, {}, 9), (9, {}, 9), (11, {}, 11), (13, {"normalize": "none"}, 15), (22, {"normalize": "none"}, 22)],
)
def test_versions_are_raised_where_needed(opset, options, raised, tmp_path, here):
    given = tmp_path / "model.onnx"
    onnx.save(old_graph(opset, 3), given)
    model = rewrite_onnx(given, rank=4, **options)
    assert (model.opset_imports[""], model.ir_version) == (raised, 10)
    path = write_onnx(model, tmp_path / "laurel.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["x"]
    assert not session.get_overridable_initializers()  # in IR version 3 nobody could set them either, and constants are folded
    np.testing.assert_array_equal(run_onnx(path, {"x": X}, optimised=False)[0], run_onnx(given, {"x": X}, optimised=False)[0])
    words = [word for key, value in options.items() for word in (f"--{key}", value)]
    said = here("model.onnx", "--rank", "4", "--profile-seconds", "0", *words).stdout
    assert (f"The opset was raised from {opset} to {raised}" in said) == (raised > opset)
    assert "The IR version was raised from 3 to 10" in said


def test_a_sum_in_a_local_function():
    function = helper.make_function(
        "local", "Block", ["x", "w"], ["y"],
        [helper.make_node("MatMul", ["x", "w"], ["f"]), helper.make_node("Add", ["x", "f"], ["y"])], [helper.make_opsetid("", 20)],
    )  # fmt: skip
    made = helper.make_graph(
        [helper.make_node("Block", ["x", "w"], ["h"], domain="local"), helper.make_node("Block", ["h", "w"], ["y"], domain="local")],
        "graph", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, D])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, D])], [numpy_helper.from_array(W, "w")],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("local", 1)]
    given = ir.from_proto(helper.make_model(made, functions=[function], opset_imports=opsets, ir_version=10))
    model = rewrite_onnx(given, variant="rw+lr+pa", rank=4)
    assert len(given.functions) == 1
    assert sum(node.domain == "laurel_rewrite" for node in model.graph) == 2
    assert {function.domain for function in model.functions.values()} == {"laurel_rewrite"}


def test_sums_in_subgraphs_are_listed_and_left_alone(tmp_path):
    inner = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["f"]), helper.make_node("Add", ["x", "f"], ["inside"])],
        "then", [], [helper.make_tensor_value_info("inside", TensorProto.FLOAT, (2, D))],
    )  # fmt: skip
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["passed"])], "else", [], [helper.make_tensor_value_info("passed", TensorProto.FLOAT, (2, D))]
    )
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["total"], keepdims=0),
        helper.make_node("Cast", ["total"], ["flag"], to=TensorProto.BOOL),
        helper.make_node("If", ["flag"], ["f"], then_branch=inner, else_branch=other, name="choice"),
        helper.make_node("Add", ["x", "f"], ["y"]),
    ]
    given = onnx_graph(nodes, {"x": (2, D)}, w=(D, D))
    sites = detect(given)
    assert [(r.reason, r.where) for r in sites.rejected] == [("subgraph", "inside in choice")]
    path = write_onnx(rewrite_onnx(given, rank=4), tmp_path / "laurel.onnx")
    np.testing.assert_array_equal(run_onnx(path, {"x": X}, optimised=False)[0], 2 * X)  # the weights are zeros


def test_a_site_whose_feature_size_is_unknown(tmp_path, here):
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("MatMul", ["r", "r"], ["f"]),
        helper.make_node("Add", ["x", "f"], ["y"]),
    ]
    made = helper.make_graph(
        nodes, "graph", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "n"])],
    )  # fmt: skip
    given = tmp_path / "model.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), given)
    (site,) = detect(given)
    assert site.dim is None
    with pytest.raises(ConfigError, match="unknown at every site, the first laurel_0"):
        rewrite_onnx(given, rank=4)
    result = here("model.onnx", "--variant", "rw", "--profile-seconds", "0")  # which needs no size
    assert result.returncode == 0, result.stderr
    wide = onnx.load(given)
    wide.graph.initializer.append(numpy_helper.from_array(W, "w"))
    extra = [
        helper.make_node("MatMul", ["z", "w"], ["g"]),
        helper.make_node("Relu", ["g"], ["h"]),
        helper.make_node("Add", ["h", "z"], ["u"]),
    ]
    wide.graph.node.extend(extra)
    wide.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [2, D]))
    wide.graph.output.append(helper.make_tensor_value_info("u", TensorProto.FLOAT, [2, D]))
    onnx.save(wide, given)
    result = here("model.onnx", "--rank", "4", "--profile-seconds", "0")
    assert result.returncode == 0, result.stderr
    assert "Left out, for their feature axis is of unknown size: laurel_0" in result.stdout
    assert [s["id"] for s in json.loads((tmp_path / "laurel_out" / "report.json").read_text())["plan"]["sites"]] == ["laurel_1"]


def test_refusals(tmp_path):
    blocked = onnx_graph([helper.make_node("ReorderInput", ["x"], ["y"], domain="com.microsoft.nchwc")], {"x": (2, D, 4, 4)})
    with pytest.raises(CaptureError, match="optimised by onnxruntime for one machine"):
        rewrite_onnx(blocked)
    with pytest.raises(NoSiteError, match="no residual connection"):
        rewrite_onnx(light("vgg19"))
    weighted = [
        helper.make_node("Relu", ["x"], ["r"]), helper.make_node("MatMul", ["r", "w"], ["f"]),
        helper.make_node("Gemm", ["x", "w", "f"], ["y"], beta=0.5, name="last"),
    ]  # fmt: skip
    with pytest.raises(RewriteError, match="computed inside the Gemm 'last', which weights its operands"):
        rewrite_onnx(onnx_graph(weighted, {"x": (2, D)}, w=(D, D)), rank=4)


def test_quantised_and_half_precision_graphs(exported, tmp_path):
    """onnxruntime's own quantiser, which writes ReLU as the zero point."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    given = exported("resnet50")

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.left = [draw_feeds(ir.load(given), seed=seed) for seed in range(2)]

        def get_next(self):
            return self.left.pop() if self.left else None

    quantised = tmp_path / "quantised.onnx"
    quantize_static(given, quantised, Reader())
    sites = detect(quantised)
    assert Counter(site.kind for site in sites) == {"identity": 12, "projection": 4}
    assert [(s.stream, s.index) for s in sites] == [(s.stream, s.index) for s in detect(given)]
    feeds = draw_feeds(ir.load(given))
    path = write_onnx(rewrite_onnx(quantised, variant="rw+lr+pa", rank=4), tmp_path / "laurel.onnx")
    for a, b in zip(run_onnx(path, feeds, optimised=False), run_onnx(quantised, feeds, optimised=False), strict=True):
        np.testing.assert_array_equal(a, b)
    x = torch.randn(2, 5, D, dtype=torch.float16)
    half = export_onnx(CASES["plain"].make().half(), (x,), None, tmp_path / "half.onnx")
    path = write_onnx(rewrite_onnx(half, rank=4), tmp_path / "half_laurel.onnx")
    assert {v.dtype for n, v in ir.load(path).graph.initializers.items() if "laurel" in n} == {ir.DataType.FLOAT16}
    for a, b in zip(*(run_onnx(p, {"x": x.numpy()}, optimised=False) for p in (path, half)), strict=True):
        np.testing.assert_array_equal(a, b)


# PyTorch from ONNX


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "llama", "vit_small", "resnet50", "yolo", "shufflenet"])
def test_a_trainable_module(name, exported, tmp_path):
    """What onnx2torch makes of the graph, with LAuReL modules at the same sites, computes what onnxruntime does, and trains."""
    given = yolo() if name == "yolo" else light(name) if name == "shufflenet" else exported(name)
    module, model = emitted(given, tmp_path, variant="rw+lr+pa", rank=4)
    assert set(sites_of(module)) == {site.id for site in detect(given)}
    feeds = draw_feeds(ir.load(given), seed=2, batch=3)
    expected = run_onnx(write_onnx(model, tmp_path / "laurel.onnx"), feeds, optimised=False)
    args = [torch.from_numpy(array) for array in feeds.values()]
    with torch.no_grad():
        found = module.eval()(*args)
    close([t.numpy() for t in (found if isinstance(found, tuple | list) else [found])], expected)
    weights = sum(p.numel() for p in module.parameters())
    assert weights > 0.9 * sum(v.const_value.size for v in ir.load(given).graph.initializers.values())
    result = module.train()(*args)
    loss = (result[0] if isinstance(result, tuple | list) else result).float().square().mean()
    loss.backward()
    assert all(p.grad is not None for n, p in module.named_parameters() if ".mix" in n or ".up." in n)


def emitted(given: Path, folder: Path, **config):
    """The module of a rewritten graph with random LAuReL parameters, and that graph."""
    from laurel_rewrite.emit_torch import to_torch
    from laurel_rewrite.graph_files import read_onnx
    from laurel_rewrite.onnx_surgery import GraphRewrite
    from laurel_rewrite.plan import LaurelConfig, Plan

    surgery = GraphRewrite(read_onnx(given))
    plan = Plan.from_sites(surgery.sites, LaurelConfig(**config))
    surgery.apply(plan, split=True)
    randomised(surgery.model)
    return to_torch(surgery.model, plan), surgery.model


@pytest.mark.parametrize("variant", ["rw+lr", "lr+pa"])
@pytest.mark.parametrize("name", ["parallel", "parallel_skip_middle", "images", "loop"])
def test_every_branch_is_weighted_in_the_module(name, variant, tmp_path):
    case = CASES[name]
    x = torch.randn(case.shape)
    given = export_onnx(case.make(), (x,), None, tmp_path / "base.onnx")
    module, model = emitted(given, tmp_path, variant=variant, rank=4)
    expected = run_onnx(write_onnx(model, tmp_path / "laurel.onnx"), {"x": x.numpy()}, optimised=False)
    with torch.no_grad():
        close([module.eval()(x).numpy()], expected)


def test_a_weight_that_two_nodes_read_is_one_parameter(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("MatMul", ["m", "w"], ["f"]),
        helper.make_node("Add", ["x", "f"], ["y"]),
    ]
    given = tmp_path / "model.onnx"
    onnx.save(ir.to_proto(onnx_graph(nodes, {"x": (2, D)}, w=(D, D))), given)
    module, _ = emitted(given, tmp_path, rank=4)
    assert [p.shape for n, p in module.named_parameters() if "laurel" not in n] == [(D, D)]


def test_operators_that_cannot_be_converted_are_named(tmp_path):
    nodes = [
        helper.make_node("Det", ["s"], ["d"]), helper.make_node("Relu", ["x"], ["r"]), helper.make_node("MatMul", ["r", "w"], ["f"]),
        helper.make_node("Mul", ["f", "d"], ["g"]), helper.make_node("FastGelu", ["g"], ["h"], domain="com.microsoft"),
        helper.make_node("Add", ["x", "h"], ["y"]),
    ]  # fmt: skip
    given = tmp_path / "model.onnx"
    onnx.save(ir.to_proto(onnx_graph(nodes, {"x": (2, D)}, w=(D, D), s=(3, 3))), given)
    with pytest.raises(ExportError, match=r"onnx2torch cannot convert com\.microsoft::FastGelu"):
        emitted(given, tmp_path, rank=4)


def test_emit_torch_by_the_command(exported, tmp_path, here, monkeypatch):
    given = exported("gpt2")
    result = here(str(given), "--rank", "4", "--profile-seconds", "0", "--emit-torch")
    assert result.returncode == 0, result.stderr
    assert "PyTorch against ONNX" in result.stdout
    assert {"model.pt", "laurel.onnx", "plan.toml", "laurel_config.json"} <= {p.name for p in (tmp_path / "laurel_out").iterdir()}
    module = load(tmp_path / "laurel_out")
    assert module.training
    ids = torch.randint(0, 99, (2, 7))
    with torch.no_grad():
        close([module(ids).numpy()], run_onnx(tmp_path / "laurel_out" / "laurel.onnx", {"input_ids": ids.numpy()}, optimised=False))
    real_find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "onnx2torch" else real_find(name, *rest))
    result = here(str(given), "--rank", "4", "--profile-seconds", "0", "--emit-torch", "--out", "other")
    assert result.returncode == 5
    assert "pip install 'laurel-rewrite[emit-torch]'" in result.stderr
    assert not (tmp_path / "other").exists()


# The command


def test_the_job(exported, tmp_path, here):
    given = exported("gpt2")
    result = here(
        str(given), "--variant", "rw+lr", "--rank", "4", "--profile-seconds", "0", "--target", "portable", "--onnx-functions", "inline"
    )
    assert result.returncode == 0, result.stderr
    assert {p.name for p in (tmp_path / "laurel_out").iterdir()} == {"laurel.onnx", "plan.toml", "report.html", "report.json"}
    report = json.loads((tmp_path / "laurel_out" / "report.json").read_text())
    assert [check["passed"] for check in report["verification"]] == [True] * 3
    assert report["verification"][0]["difference"] == 0
    assert len(report["plan"]["sites"]) == 6
    assert not ir.load(tmp_path / "laurel_out" / "laurel.onnx").functions
    assert "start, onnxruntime without optimisation" in result.stdout
    # An edited plan, and trained weights.
    plan = (tmp_path / "laurel_out" / "plan.toml").read_text().replace('variant = "rw+lr"', 'variant = "rw"', 1)
    (tmp_path / "plan.toml").write_text(plan)
    model = randomised(rewrite_onnx(given, plan=str(tmp_path / "plan.toml")))
    tensors = {n: torch.from_numpy(v.const_value.numpy().copy()) for n, v in model.graph.initializers.items() if "laurel_" in n}
    save_file(tensors, tmp_path / "w.safetensors")
    result = here(str(given), "--plan", "plan.toml", "--weights", "w.safetensors", "--profile-seconds", "0", "--target", "portable")
    assert result.returncode == 0, result.stderr
    assert "trained LAuReL, optimised against not" in result.stdout
    feeds = draw_feeds(ir.load(given))
    expected = write_onnx(model, tmp_path / "expected.onnx")
    for a, b in zip(*(run_onnx(p, feeds, optimised=False) for p in (tmp_path / "laurel_out" / "laurel.onnx", expected)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_inputs_of_ones_own(exported, tmp_path, here):
    given = exported("gpt2")
    np.savez(tmp_path / "good.npz", input_ids=np.arange(12).reshape(3, 4))
    result = here(str(given), "--rank", "4", "--profile-seconds", "0", "--inputs", "good.npz")
    assert result.returncode == 0, result.stderr
    assert "input_ids[3, 4]" in result.stdout
    np.savez(tmp_path / "high.npz", input_ids=np.full((2, 4), 10**6))
    np.savez(tmp_path / "type.npz", input_ids=np.zeros((2, 4), np.float32))
    np.savez(tmp_path / "name.npz", ids=np.zeros((2, 4), np.int64))
    (tmp_path / "text.npz").write_text("no arrays")
    for name, message in (
        ("high", "does not run with these inputs"),
        ("type", "'input_ids' is of type int64, not float32"),
        ("name", r"takes the inputs ['input_ids'], not ['ids']"),
        ("text", "could not be read as .npz"),
    ):
        result = here(str(given), "--rank", "4", "--profile-seconds", "0", "--out", "other", "--inputs", f"{name}.npz")
        assert result.returncode == 2
        assert message in result.stderr
    assert not (tmp_path / "other").exists()


def test_inputs_are_drawn_to_fit(exported):
    ids = draw_feeds(ir.load(exported("bert")), batch=64)
    assert ids["input_ids"].max() < 99
    assert len(np.unique(ids["input_ids"])) > 50
    made = helper.make_graph(
        [helper.make_node("Identity", [name], [f"{name}_"]) for name in ("image", "attention_mask", "past", "sized", "pixels")], "graph",
        [
            helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, "height", "width"]),
            helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "past_length + length"]),
            helper.make_tensor_value_info("past", TensorProto.FLOAT, ["batch", 4, "past_length", 8]),
            helper.make_tensor_value_info("sized", TensorProto.BOOL, ["batch", "length"]),
            helper.make_tensor_value_info("pixels", TensorProto.UINT8, [2, 8, 8, 3]),
        ],
        [helper.make_tensor_value_info(f"{n}_", t, None) for n, t in (("image", 1), ("attention_mask", 7), ("past", 1), ("sized", 9), ("pixels", 2))],
    )  # fmt: skip
    feeds = draw_feeds(ir.from_proto(helper.make_model(made)), batch=3, length=10)
    assert {name: value.shape for name, value in feeds.items()} == {
        "image": (3, 3, 64, 64), "attention_mask": (3, 14), "past": (3, 4, 4, 8), "sized": (3, 10), "pixels": (2, 8, 8, 3),
    }  # fmt: skip
    assert feeds["attention_mask"].min() == 1
    assert feeds["pixels"].max() > 200
