"""Sizes of ONNX graphs: what inputs say is believed, the rest is inferred anew, and where that is not enough, seen in two runs."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from conftest import onnx_graph
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from toys import D

from laurel_rewrite import ConfigError, NoSiteError, detect, rewrite_onnx, write_onnx
from laurel_rewrite.backends.onnx.surgery import GraphRewrite
from laurel_rewrite.detection.sites import read_onnx_sites
from laurel_rewrite.files.onnx import read_onnx
from laurel_rewrite.graph.capture import quiet
from laurel_rewrite.graph.feeds import draw_feeds, fitting_feeds
from laurel_rewrite.graph.shapes import completed, is_unknown, sizes_of


class Block(nn.Module):
    def __init__(self, inner, outer, stride=1):
        super().__init__()
        self.a, self.b = nn.Conv2d(inner, outer, 3, stride, 1), nn.Conv2d(outer, outer, 3, 1, 1)
        self.norm = nn.BatchNorm2d(outer)
        self.down = nn.Conv2d(inner, outer, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        return torch.relu(self.norm(self.b(torch.relu(self.a(x)))) + self.down(x))


def resnet():
    return nn.Sequential(
        nn.Conv2d(3, D, 7, 2, 3), nn.MaxPool2d(3, 2, 1), Block(D, D), Block(D, D), Block(D, 2 * D, 2), Block(2 * D, 2 * D),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * D, 5),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def torchscript(tmp_path_factory):
    """A residual CNN by PyTorch's older exporter, with every size open that can be: it leaves no shape in the graph."""

    def export(opset):
        path = tmp_path_factory.mktemp("torchscript") / f"{opset}.onnx"
        axes = {"x": {0: "N", 2: "H", 3: "W"}, "y": {0: "N"}}
        with quiet(), torch.no_grad():
            torch.onnx.export(
                resnet(), (torch.randn(2, 3, 32, 32),), path, input_names=["x"], output_names=["y"], dynamo=False, opset_version=opset,
                dynamic_axes=axes,
            )  # fmt: skip
        return path

    return export


@pytest.mark.parametrize("opset", [11, 17, 18])
def test_an_open_height_and_width(opset, torchscript):
    sites = detect(torchscript(opset))
    assert [(site.kind, site.axis, site.dim, site.stream) for site in sites] == [
        ("identity", 1, D, 0), ("identity", 1, D, 0), ("projection", 1, 2 * D, 1), ("identity", 1, 2 * D, 1)
    ]  # fmt: skip
    assert not sites.rejected


def test_names_that_tools_wrote_into_a_file_are_forgotten(torchscript, tmp_path):
    """onnx's inference calls each open size anew; quantisers and optimisers save that."""
    given = tmp_path / "named.onnx"
    proto = onnx.shape_inference.infer_shapes(onnx.load(torchscript(17)), data_prop=True)
    assert any("unk__" in dim.dim_param for value in proto.graph.value_info for dim in value.type.tensor_type.shape.dim)
    onnx.save(proto, given)
    assert len(detect(given)) == 4
    written = ir.load(write_onnx(rewrite_onnx(given, rank=4), tmp_path / "laurel.onnx"))
    assert not any("unk__" in str(value.shape) or "?" in str(value.shape) for node in written.graph for value in node.outputs)


def test_inner_sizes_of_a_former_export_are_forgotten(tmp_path):
    """A batch made open by hand: the inner values still say 1."""
    model = onnx_graph(_pair(), {"x": (1, D)}, "f", w=(D, D))
    model.graph.inputs[0].shape = ir.Shape(["batch", D])
    (site,) = detect(model)
    assert site.shape == ("batch", D)


def _pair():
    return [helper.make_node("MatMul", ["x", "w"], ["f"], name="product"), helper.make_node("Add", ["x", "f"], ["y"], name="sum")]


@pytest.mark.parametrize("size", ["?", "-1", -1, "", "None", "batch-size", "batch size", "9**9**9**9**9", "a" * 5000 + "*"])
def test_what_is_no_size_is_an_open_one(size, tmp_path):
    graph = helper.make_graph(
        _pair(), "graph", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [size, D])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [size, D])],
        [numpy_helper.from_array(torch.randn(D, D).numpy(), "w")],
    )  # fmt: skip
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    model = read_onnx(path)
    assert not any(isinstance(dim, int) and dim < 0 for dim in model.graph.inputs[0].shape)
    (site,) = detect(model)
    assert site.dim == D
    assert isinstance(site.shape[0], str)


def test_the_model_that_is_read_stays_as_it_is():
    model = onnx_graph(_pair(), {"x": ("n", D)}, w=(D, D))
    model.graph.outputs[0].shape = ir.Shape(["Addy_dim_0", "Addy_dim_1"])
    read = completed(model)
    assert str(model.graph.outputs[0].shape) == str(read.graph.outputs[0].shape) == "[Addy_dim_0,Addy_dim_1]"
    assert sizes_of(read.graph.outputs[0]) == ("n", D)
    assert model.graph.node("product").outputs[0].shape is None


# Sizes that no inference knows


def _reshaped(before=(), given=None, **tables):
    """x + reshape(x W), where the shape goes through a comparison, as the older exporter writes `expand`; behind other nodes, with an input
    and tables of theirs."""
    nodes = [
        *before,
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("Shape", ["m"], ["s"]),
        helper.make_node("Equal", ["s", "minus"], ["e"]),
        helper.make_node("Where", ["e", "ones", "s"], ["t"]),
        helper.make_node("Reshape", ["m", "t"], ["f"]),
        helper.make_node("Add", ["x", "f"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "graph", [given or helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length", D])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", "b", "c"])],
        [numpy_helper.from_array(array, name) for name, array in {**tables, "w": torch.randn(D, D).numpy()}.items()]
        + [numpy_helper.from_array(np.full(3, n), name) for name, n in (("minus", -1), ("ones", 1))],
    )  # fmt: skip
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def test_two_runs_settle_what_inference_leaves_unknown():
    model = _reshaped()
    reshape = next(node for node in completed(model).graph if node.op_type == "Reshape").outputs[0]
    assert all(is_unknown(size) for size in sizes_of(reshape))
    (site,) = detect(model)
    assert (site.shape, site.axis, site.dim) == (("batch", "length", D), -1, D)
    assert str(model.graph.outputs[0].shape) == "[a,b,c]"


def test_inputs_of_ones_own_settle_sizes():
    feeds = {"x": np.ones((3, 5, D), np.float32)}
    sites, _, _ = read_onnx_sites(_reshaped(), feeds)
    assert [site.dim for site in sites] == [D]
    wrong = {"x": np.ones((3, 5, D + 1), np.float32)}
    sites, _, _ = read_onnx_sites(_reshaped(), wrong)
    assert [rejected.reason for rejected in sites.rejected] == ["open sizes"]


def test_inputs_of_ones_own_from_python_and_by_the_command(tmp_path, here):
    """A graph that no drawn inputs fit: its indices must be 97 and 98."""
    model = _reshaped()
    assert len(detect(model, {"x": np.ones((3, 5, D), np.float32)})) == 1
    with pytest.raises(ConfigError, match=r"takes the inputs \['x'\], not \['z'\]"):
        detect(model, {"z": np.ones((3, 5, D), np.float32)})
    with pytest.raises(ConfigError, match="by their names"):
        detect(model, np.ones((3, 5, D), np.float32))
    write_onnx(_for_few_indices(), tmp_path / "model.onnx")
    np.savez(tmp_path / "inputs.npz", i=np.array([[97, 98, 97], [98, 98, 97]]))
    assert "Whether there is a residual connection is not known" in " ".join(here("sites", "model.onnx").stdout.split())
    given = ["model.onnx", "--json", "--inputs", "inputs.npz"]
    assert len(json.loads(here("sites", *given).stdout)["sites"]) == 1
    assert len(json.loads(here(*given, "--dry-run", "--rank", "4").stdout)["plan"]["sites"]) == 1
    done = here("sites", "net.py", "--inputs", "inputs.npz")
    assert done.returncode == 2
    assert "--inputs is for ONNX files" in done.stderr


def _for_few_indices():
    """`_reshaped` behind two tables that have two rows in common, so that most indices are out of range."""
    nodes = [
        helper.make_node("Gather", ["low", "i"], ["l"]),
        helper.make_node("Sub", ["i", "first"], ["j"]),
        helper.make_node("Gather", ["high", "j"], ["h"]),
        helper.make_node("Add", ["l", "h"], ["x"]),
    ]
    indices = helper.make_tensor_value_info("i", TensorProto.INT64, ["batch", "length"])
    return _reshaped(nodes, indices, low=torch.randn(99, D).numpy(), high=torch.randn(2, D).numpy(), first=np.array(97))


def test_sums_whose_sizes_stay_open_are_not_called_different():
    """A graph that onnxruntime cannot load: whether the sizes are equal cannot be seen."""
    model = onnx_graph([helper.make_node("Mix", ["x"], ["f"], domain="mine"), helper.make_node("Add", ["x", "f"], ["y"])], {"x": ("n", D)})
    model.opset_imports["mine"] = 1
    value = model.graph[0].outputs[0]
    value.shape, value.dtype = ir.Shape(["m", D]), ir.DataType.FLOAT
    (rejected,) = detect(model).rejected
    assert rejected.reason == "open sizes"
    with pytest.raises(NoSiteError, match=r"1 of 1 other additions were refused only because .*--inputs"):
        rewrite_onnx(model, rank=4)
    value.shape = ir.Shape([1, D])
    assert [rejected.reason for rejected in detect(model).rejected] == ["broadcast"]


def test_nodes_that_share_a_name_get_names_of_their_own():
    first, second = _pair()
    first.name = second.name = "node"
    rewriting = GraphRewrite(onnx_graph([first, second], {"x": ("n", D)}, w=(D, D)))
    assert [node.name for node in rewriting.model.graph] == ["node", "node_2"]
    assert rewriting.notes == ["1 nodes had the name of another one, and got names of their own."]


def test_a_quantised_sum_says_what_to_give_instead():
    nodes = [
        helper.make_node("QLinearAdd", ["x", "s", "z", "x", "s", "z", "s", "z"], ["q"], domain="com.microsoft"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "graph", [helper.make_tensor_value_info("x", TensorProto.UINT8, [2, D])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, D])],
        [numpy_helper.from_array(np.float32(0.1), "s"), numpy_helper.from_array(np.uint8(3), "z")],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    with pytest.raises(NoSiteError, match=r"1 integer\. .*QLinearAdd.*QDQ"):
        rewrite_onnx(ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=8)))


def test_a_target_from_python():
    given = onnx_graph(_pair(), {"x": ("n", D)}, w=(D, D))
    assert rewrite_onnx(given, rank=4).functions
    for target in ("ort-cpu", "none"):
        assert {node.domain for node in rewrite_onnx(given, rank=4, target=target).graph} == {""}
    with pytest.raises(ConfigError, match="Unknown target 'tpu'"):
        rewrite_onnx(given, target="tpu")


def test_inputs_are_drawn_by_names_and_kinds():
    inputs = {
        "pixel_values": (TensorProto.FLOAT, ["batch", 3, "height", "width"]), "position_ids": (TensorProto.INT64, ["batch", "length"]),
        "input_lengths": (TensorProto.INT64, ["batch"]), "past": (TensorProto.FLOAT, ["batch", 2, "past_length", 4]),
        "sr": (TensorProto.INT64, []), "attention_mask": (TensorProto.FLOAT, ["batch", "total_length"]),
    }  # fmt: skip
    graph = helper.make_graph(
        [helper.make_node("Identity", [name], [f"{name}_"]) for name in inputs], "graph",
        [helper.make_tensor_value_info(name, *of) for name, of in inputs.items()],
        [helper.make_tensor_value_info(f"{name}_", of[0], None) for name, of in inputs.items()],
    )  # fmt: skip
    feeds = draw_feeds(ir.from_proto(helper.make_model(graph)), past=0, length=5)
    assert feeds["pixel_values"].min() >= 0 and feeds["pixel_values"].max() <= 1
    assert feeds["position_ids"].tolist() == [[0, 1, 2, 3, 4]] * 2
    assert feeds["input_lengths"].tolist() == [5, 5]
    assert feeds["past"].shape == (2, 2, 0, 4)
    assert feeds["sr"] == 16000
    assert feeds["attention_mask"].tolist() == [[1.0] * 5] * 2


def test_inputs_that_fit_are_found_among_guesses():
    model = onnx_graph(_pair(), {"x": ("batch", "length")}, w=(D, D))
    tried = []

    def run(feeds):
        tried.append(feeds["x"].shape)
        if feeds["x"].shape[0] != 1:
            raise ValueError("batch_size must be 1")
        return [np.full(1, np.nan if len(tried) < 3 else 0.0)]

    assert fitting_feeds(model, run)["x"].shape[0] == 1
    assert len(tried) > 2

    def never(feeds):
        raise ValueError("never")

    with pytest.raises(ConfigError, match=r"No inputs were found .*: never"):
        fitting_feeds(model, never)
    huge = onnx_graph(_pair(), {"x": (2**40, D)}, w=(D, D))
    with pytest.raises(ConfigError, match=r"'x' of shape \[1099511627776, 16\] is too large"):
        draw_feeds(huge)


def test_a_stream_of_one_dimension():
    """A vector that a linear layer reads has features; one that nothing of the kind reads may be a batch of numbers."""
    model = onnx_graph(_pair(), {"x": (D,)}, w=(D, D))
    (site,) = detect(model)
    assert (site.axis, site.dim) == (-1, D)
    assert rewrite_onnx(model, rank=4).functions
