"""One model, the same sites: captured by `torch.export`, by `fx.symbolic_trace`, from ONNX as it is exported and as onnxscript optimises it."""

from __future__ import annotations

import json
from collections import Counter

import onnx_ir as ir
import onnxscript.optimizer
import pytest
import torch
from conftest import LIGHT, LLAMA, light, onnx_graph, slow, yolo
from onnx import TensorProto, helper
from torch import fx, nn
from toys import D

from laurel_rewrite import CaptureError, detect
from laurel_rewrite.detection.sites import Sites, sites_of_onnx
from laurel_rewrite.graph.capture import quiet, without_caches
from laurel_rewrite.graph.from_onnx import dataflow_from_onnx
from laurel_rewrite.sources.models import build

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 99}
GPT = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 99}
MODELS: dict[str, dict[str, object]] = {
    "timm:test_resnet": {},
    "timm:mobilenetv3_small_050": {},
    "timm:test_nfnet": {},
    "timm:test_byobnet": {},
    "timm:test_mambaout": {},
    "timm:test_vit_relpos": {},
    "timm:levit_128s": {},
    "timm:mobilevitv2_050": {},
    "timm:edgenext_xx_small": {},
    "timm:swin_tiny_patch4_window7_224": {"depths": (2, 2), "num_heads": (3, 6), "embed_dim": 24},
    "timm:dpn48b": {},
    "timm:repvgg_a0": {},
    "hf:gpt2": GPT,
    "hf:albert": {**SMALL, "embedding_size": 16},
    "hf:llama": {**LLAMA, "num_hidden_layers": 2},
    "hf:gemma2": {**LLAMA, "num_hidden_layers": 2, "head_dim": 8},
    "hf:t5": {"num_layers": 2, "d_model": 32, "d_ff": 64, "num_heads": 4, "d_kv": 8, "vocab_size": 99},
    "hf:mamba": {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 99},
}
NOT_TRACEABLE = {name for name in MODELS if name.startswith("hf:")} | {
    "timm:mobilevitv2_050",
    "timm:edgenext_xx_small",
    "timm:test_vit_relpos",
}
"""`fx.symbolic_trace` fails on their control flow."""
LARGE = {
    "timm:levit_128s",
    "timm:mobilevitv2_050",
    "timm:edgenext_xx_small",
    "timm:dpn48b",
    "timm:repvgg_a0",
    "timm:mobilenetv3_small_050",
    "timm:test_nfnet",
    "hf:llama",
    "hf:gemma2",
}


def table(sites: Sites, *, ids: bool) -> list[tuple[object, ...]]:
    return [(s.id if ids else "", s.kind, s.shape, s.axis, s.dim, s.stream, s.index) for s in sites]


@pytest.mark.parametrize("spec", [slow(spec) if spec in LARGE else spec for spec in MODELS])
def test_every_capture_gives_the_same_sites(spec):
    built = build(spec, MODELS[spec])
    with torch.no_grad():
        for parameter in built.model.parameters():  # equal weights would be merged by the optimiser
            parameter.copy_(torch.randn_like(parameter) * 0.02)
    found = detect(built.model, built.args, built.kwargs)
    # The calls of a shared module cannot be told apart in ONNX.
    ids = not any("@" in site.id for site in found)
    expected = table(found, ids=ids)
    assert expected or spec == "timm:repvgg_a0"

    model = built.model.eval()
    if spec not in NOT_TRACEABLE:
        assert table(detect(fx.symbolic_trace(model), built.args, built.kwargs), ids=ids) == expected
    with quiet(), without_caches(model), torch.no_grad():
        exported = torch.onnx.export(model, built.args, kwargs=built.kwargs, dynamo=True, verbose=False, optimize=False).model
    assert table(detect(exported), ids=ids) == expected
    with quiet():
        onnxscript.optimizer.optimize(exported)
    assert table(detect(exported), ids=ids) == expected


# Graphs that no exporter of PyTorch wrote


def test_shapes_are_inferred_and_nothing_is_changed():
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["f"]),
        helper.make_node("Relu", ["f"], ["r"]),
        helper.make_node("Add", ["x", "r"], ["y"]),
    ]
    model = onnx_graph(nodes, {"x": ("batch", D)}, w=(D, D), b=(D,))
    (site,) = detect(model)
    assert (site.kind, site.shape, site.axis, site.dim, site.where) == ("identity", ("batch", D), -1, D, "y")
    assert next(value.shape for node in model.graph for value in node.outputs) is None


def test_an_n_ary_sum_operator():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["f"]),
        helper.make_node("Relu", ["f"], ["r"]),
        helper.make_node("MatMul", ["x", "w"], ["e"]),
        helper.make_node("Sum", ["r", "e", "x"], ["y"]),
    ]
    sites = detect(onnx_graph(nodes, {"x": (2, D)}, w=(D, D)))
    assert [site.kind for site in sites] == ["identity"]
    binding = sites.bindings["laurel_0"]
    assert binding.adds == (("y", 2, None),)
    assert len(binding.residual.branches) == 2


def test_a_fused_skip_and_normalisation():
    """onnxruntime's SkipLayerNormalization holds the sum; its fourth output is the stream."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["f"]),
        helper.make_node(
            "SkipLayerNormalization", ["x", "f", "gamma", "beta", "bias"], ["n", "", "", "s"], name="fused", domain="com.microsoft"
        ),
        helper.make_node("MatMul", ["n", "w"], ["g"]),
        helper.make_node("SkipSimplifiedLayerNormalization", ["s", "g", "gamma"], ["y"], name="last", domain="com.microsoft"),
    ]
    sites = detect(onnx_graph(nodes, {"x": (2, 5, D)}, "f n s g", w=(D, D), gamma=(D,), beta=(D,), bias=(D,)))
    assert [(site.kind, site.axis, site.dim, site.stream, site.index) for site in sites] == [
        ("identity", -1, D, 0, 0),
        ("identity", -1, D, 0, 1),
    ]


def test_a_convolution_with_a_fused_sum():
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("FusedConv", ["r", "w", "b", "x"], ["y"], domain="com.microsoft", activation="Relu", kernel_shape=[1, 1]),
    ]
    (site,) = detect(onnx_graph(nodes, {"x": (2, D, 4, 4)}, "r", w=(D, D, 1, 1), b=(D,)))
    assert (site.kind, site.axis, site.dim) == ("identity", 1, D)


def test_subgraphs_read_what_they_capture():
    """What an If computes from the stream is a branch; the sum inside it is one of its own."""
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
        helper.make_node("If", ["flag"], ["f"], then_branch=inner, else_branch=other),
        helper.make_node("Add", ["x", "f"], ["y"]),
    ]
    sites = detect(onnx_graph(nodes, {"x": (2, D)}, w=(D, D)))
    assert [site.where for site in sites] == ["inside in If.then_branch", "y"]


def test_quantised_skips_are_transparent():
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["d"]),
        helper.make_node("MatMul", ["d", "w"], ["f"]),
        helper.make_node("Add", ["f", "d"], ["y"]),
    ]
    (site,) = detect(onnx_graph(nodes, {"x": (2, D)}, w=(D, D), scale=()))
    assert (site.kind, site.axis, site.dim) == ("identity", -1, D)


def test_local_functions_are_read_inline():
    function = helper.make_function(
        "local", "Block", ["x", "w"], ["y"],
        [helper.make_node("MatMul", ["x", "w"], ["f"]), helper.make_node("Add", ["x", "f"], ["y"])], [helper.make_opsetid("", 20)],
    )  # fmt: skip
    graph = helper.make_graph(
        [helper.make_node("Block", ["x", "w"], ["h"], domain="local"), helper.make_node("Block", ["h", "w"], ["y"], domain="local")],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (2, D)), helper.make_tensor_value_info("w", TensorProto.FLOAT, (D, D))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (2, D))],
    )
    proto = helper.make_model(graph, functions=[function], opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("local", 1)])
    model = ir.serde.deserialize_model(proto)
    sites = sites_of_onnx(model)
    assert [(site.kind, site.stream, site.index) for site in sites] == [("identity", 0, 0), ("identity", 0, 1)]
    assert len(model.functions) == 1  # the model itself is as it was


@pytest.mark.parametrize("name", LIGHT)
def test_graphs_of_another_framework(name):
    """Caffe2's, as the onnx package ships them: opsets from 7 on, no shapes inside."""
    sites = detect(light(name))
    assert Counter(site.kind for site in sites) == LIGHT[name]
    assert all(site.axis == 1 and site.dim == site.shape[1] for site in sites)


def test_a_detector_from_the_field():
    """YOLOv8n, exported by PyTorch's older exporter, whose node names hold the module paths."""
    sites = detect(yolo())
    assert [site.id for site in sites][:2] == ["model.2.m.0.laurel_0", "model.4.m.0.laurel_0"]
    assert Counter(site.kind for site in sites) == {"identity": 6}


@pytest.mark.parametrize("spec", ["timm:test_resnet", "timm:test_vit_relpos", "hf:t5", "hf:bert"])
def test_pytorchs_older_exporter(spec, tmp_path):
    built = build(spec, MODELS.get(spec, SMALL))
    with torch.no_grad():
        for parameter in built.model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.02)
    expected = [(s.id, s.kind, s.axis, s.dim, s.stream, s.index) for s in detect(built.model, built.args, built.kwargs)]
    path = tmp_path / "model.onnx"
    with quiet(), without_caches(built.model), torch.no_grad():
        torch.onnx.export(built.model.eval(), built.args, path, kwargs=built.kwargs, dynamo=False, opset_version=17)
    assert [(s.id, s.kind, s.axis, s.dim, s.stream, s.index) for s in detect(path)] == expected


def test_the_dataflow_is_in_order(tmp_path):
    built = build("timm:test_vit")
    with quiet(), torch.no_grad():
        exported = torch.onnx.export(built.model.eval(), built.args, dynamo=True, verbose=False)
    read = dataflow_from_onnx(exported.model.graph)
    read.flow.check()
    assert all(read.flow.values[i].name == value.name for value, i in read.index.items())
    path = tmp_path / "model.onnx"
    exported.save(path)
    assert table(detect(path), ids=True) == table(detect(exported.model), ids=True)


def test_a_file_that_is_no_model(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(CaptureError, match=r"model\.onnx could not be read as an ONNX graph"):
        detect(path)
    with pytest.raises(CaptureError, match=r"nothing\.pt2 could not be read as an exported program"):
        detect(tmp_path / "nothing.pt2")


def test_graphs_in_files_by_the_command(tmp_path, here):
    """The same table from both files; the exported program keeps its source lines."""
    built = build("timm:test_vit")
    expected = [(site.id, site.kind) for site in detect(built.model, built.args)]
    program = torch.export.export(built.model, built.args)
    torch.export.save(program, tmp_path / "model.pt2")
    with quiet(), torch.no_grad():
        torch.onnx.export(built.model.eval(), built.args, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    for name in ("model.pt2", "model.onnx"):
        result = here("sites", name, "--json")
        found = json.loads(result.stdout)["sites"]
        assert [(site["id"], site["kind"]) for site in found] == expected
    result = here("sites", "model.onnx", "--explain", "blocks.0")
    assert "blocks.0.laurel_0 is a residual connection: identity" in result.stdout
    assert here("sites", "model.onnx", "--set", "depth=3").returncode == 2
    assert here("sites", "missing.onnx").returncode == 2


def test_a_batch_and_a_length_that_vary_in_onnx():

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(D), nn.Linear(D, D)

        def forward(self, x):
            return x + self.linear(self.norm(x))

    dynamic = ({0: "batch", 1: "length"},)
    with quiet():
        exported = torch.onnx.export(Block().eval(), (torch.randn(2, 5, D),), dynamo=True, verbose=False, dynamic_shapes=dynamic)
    (site,) = detect(exported.model)
    assert (site.kind, site.shape, site.axis, site.dim) == ("identity", ("batch", "length", D), -1, D)
