"""LAuReL in graphs that others wrote: the start is exact, trained weights give what PyTorch gives, and nothing else changes."""

from __future__ import annotations

import copy
import json
from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from conftest import away_from_start, close, light, onnx_graph, output, real, slow, trained, yolo
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from toys import CASES, D

from laurel_rewrite import (
    CaptureError,
    ConfigError,
    NoSiteError,
    RewriteError,
    detect,
    export_onnx,
    remove,
    rewrite,
    rewrite_onnx,
    save,
    write_onnx,
)
from laurel_rewrite.graph.feeds import draw_feeds
from laurel_rewrite.graph.from_onnx import METADATA
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.verification.onnx import run_onnx

X = np.random.default_rng(5).standard_normal((2, D)).astype(np.float32)
W = np.random.default_rng(6).standard_normal((D, D)).astype(np.float32)
VARIANTS = ["rw", "lr", "pa", "rw+lr", "rw+pa", "lr+pa", "rw+lr+pa"]


# Graphs of others


GRAPHS = {"resnet50": 16, "shufflenet": 13, "yolo": 6}


@pytest.mark.parametrize(
    ("name", "variant"),
    [("yolo", "rw+lr+pa"), ("shufflenet", "rw"), ("resnet50", "rw+lr+pa"), *(slow("yolo", variant) for variant in VARIANTS[:-1])],
)
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
    probe = write_onnx(trained(written), tmp_path / "probe.onnx")
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
@pytest.mark.parametrize("name", ["gpt2", "resnet18"])
def test_functions_or_nodes(name, functions, exported, tmp_path):
    given = exported(name)
    feeds = draw_feeds(ir.load(given))
    expected = write_onnx(trained(rewrite_onnx(given, variant="rw+lr+pa", rank=4)), tmp_path / "expected.onnx")
    model = trained(rewrite_onnx(given, variant="rw+lr+pa", rank=4, functions=functions))
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


def trained_in_pytorch(model, args, kwargs, steps=3):
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


ROUND_TRIPS = ["gpt2", "resnet18", slow("cohere"), slow("llama"), slow("t5")]


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_weights_trained_in_pytorch(name, exported, tmp_path):
    """Train in PyTorch, put the weights into the ONNX graph of the base model: it computes what the export of the trained model does."""
    example = real(name)
    better = rewrite(example.model.train(), example.args, example.kwargs, variant="rw+lr+pa", rank=4)
    trained_in_pytorch(better, example.args, example.kwargs)
    expected = export_onnx(better, example.args, example.kwargs, tmp_path / "expected.onnx")
    base = exported(name)
    if name == "resnet18":  # whose statistics have moved
        base = export_onnx(remove(copy.deepcopy(better)), example.args, example.kwargs, tmp_path / "base.onnx")
    save(better, tmp_path / "trained")
    model = rewrite_onnx(base, variant="rw+lr+pa", rank=4, weights=tmp_path / "trained" / "model.safetensors")
    path = write_onnx(model, tmp_path / "laurel.onnx")
    feeds = draw_feeds(ir.load(base), seed=3)
    for optimised in (False, True):
        close(run_onnx(path, feeds, optimised=optimised), run_onnx(expected, feeds, optimised=optimised))
    start = run_onnx(base, feeds, optimised=False)
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(start, run_onnx(path, feeds, optimised=False), strict=True))


@pytest.mark.parametrize(
    "name", ["plain", "parallel", "parallel_skip_last", "parallel_skip_middle", "post_norm", "images", "loop", "helper"]
)
def test_both_doors_write_the_same(name, tmp_path):
    """The export of a rewritten model, and the rewrite of the base model's export, with the same random parameters."""
    case = CASES[name]
    x, model = torch.randn(case.shape), case.make()
    base = export_onnx(model, (x,), None, tmp_path / "base.onnx")
    for variant in VARIANTS:
        _compare_doors(model, x, base, variant, tmp_path)


def _compare_doors(model, x, base, variant, tmp_path):
    better = away_from_start(rewrite(model, (x,), variant=variant, rank=4)).eval()
    save_file({k: v.contiguous() for k, v in better.state_dict().items()}, tmp_path / "w.safetensors")
    path = write_onnx(rewrite_onnx(base, variant=variant, rank=4, weights=tmp_path / "w.safetensors"), tmp_path / "laurel.onnx")
    other = torch.randn((3, *x.shape[1:]))
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
    [(7, {}, 9), (8, {}, 9), (9, {}, 9), (11, {}, 11), (13, {"normalize": "none"}, 13), (22, {"normalize": "none"}, 22)],
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


def test_sums_in_subgraphs_are_sites(tmp_path):
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
    assert [(site.id, site.where) for site in sites] == [
        ("choice.then_branch.laurel_0", "inside in choice.then_branch"),
        ("laurel_0", "y"),
    ]
    assert not sites.rejected
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
    with pytest.raises(ConfigError, match="maps fit, of known size, the first laurel_0"):
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
    assert "Left out, for no maps fit their feature axis, or its size is unknown: laurel_0" in result.stdout
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

    given = exported("resnet18")

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.left = [draw_feeds(ir.load(given), seed=seed) for seed in range(2)]

        def get_next(self):
            return self.left.pop() if self.left else None

    quantised = tmp_path / "quantised.onnx"
    quantize_static(given, quantised, Reader())
    sites = detect(quantised)
    assert Counter(site.kind for site in sites) == {"identity": 5, "projection": 3}
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


# The command


def test_the_job(exported, tmp_path, here):
    given = exported("gpt2")
    result = here(
        str(given), "--variant", "rw+lr", "--rank", "4", "--profile-seconds", "0", "--target", "portable", "--onnx-functions", "inline"
    )
    assert result.returncode == 0, result.stderr
    assert {p.name for p in (tmp_path / "laurel_out").iterdir()} == {
        "laurel.onnx",
        "plan.toml",
        "report.html",
        "report.json",
        "README.md",
        "laurel_manifest.json",
    }
    report = json.loads((tmp_path / "laurel_out" / "report.json").read_text())
    assert [check["passed"] for check in report["verification"]] == [True] * 4
    assert report["verification"][0]["difference"] == 0
    assert len(report["plan"]["sites"]) == 6
    assert not ir.load(tmp_path / "laurel_out" / "laurel.onnx").functions
    assert "start, not optimised" in result.stdout
    # An edited plan, and trained weights.
    plan = (tmp_path / "laurel_out" / "plan.toml").read_text().replace('variant = "rw+lr"', 'variant = "rw"', 1)
    (tmp_path / "plan.toml").write_text(plan)
    model = trained(rewrite_onnx(given, plan=str(tmp_path / "plan.toml")))
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
