"""Graphs in files: what is wrong is said by name and nothing is written; weights in other files stay where they are or are copied."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import laurel_rewrite.files.onnx
from laurel_rewrite import CaptureError, ConfigError, ExportError, detect, profile, rewrite_onnx, write_onnx
from laurel_rewrite.files.onnx import external, read_onnx

N = 64
WEIGHT = np.random.default_rng(0).standard_normal((N, N)).astype(np.float32)
NODES = [helper.make_node("MatMul", ["x", "w"], ["f"], name="product"), helper.make_node("Add", ["x", "f"], ["y"], name="sum")]


def graph(nodes=NODES, weights=(("w", WEIGHT),), opset: int = 20) -> onnx.ModelProto:
    made = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, N])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, N])],
        [numpy_helper.from_array(array, name) for name, array in weights],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def with_data(folder: Path, location: str = "weights.bin", length: int = WEIGHT.nbytes) -> Path:
    """A file whose weights lie in another one."""
    model = graph()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(length))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    (folder / "weights.bin").write_bytes(WEIGHT.tobytes())
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def truncated(folder: Path) -> bytes:
    data = graph().SerializeToString()
    return data[: len(data) // 2]


def nodes(*made) -> Callable[[Path], bytes]:
    return lambda folder: graph(list(made)).SerializeToString()


def outside(location: str) -> Callable[[Path], bytes]:
    def make(folder: Path) -> bytes:
        (folder.parent / "weights.bin").write_bytes(WEIGHT.tobytes())
        return with_data(folder, location).read_bytes()

    return make


node = helper.make_node
MALFORMED: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "truncated": (truncated, "could not be read as an ONNX graph"),
    "text": (lambda folder: b"hello, world", "could not be read as an ONNX graph"),
    "no bytes": (lambda folder: b"", "holds no graph, or one without nodes"),
    "no nodes": (nodes(), "holds no graph, or one without nodes"),
    "missing data": (lambda folder: with_data(folder, "gone.bin").read_bytes(), r"gone\.bin with the weights of 'w' is missing"),
    "short data": (lambda folder: with_data(folder, length=10**6).read_bytes(), "ends before the weights of 'w' do"),
    "data outside": (outside("../weights.bin"), "outside the model's folder"),
    "absolute path": (outside("/etc/hostname"), "outside the model's folder"),
    "cycle": (nodes(node("MatMul", ["h", "w"], ["f"]), node("Add", ["x", "f"], ["h"]), node("Relu", ["h"], ["y"])), "has a cycle"),
    "unknown op": (nodes(node("Frobnicate", ["x"], ["f"]), node("Add", ["x", "f"], ["y"])), "No Op registered for Frobnicate"),
    "unknown domain": (nodes(node("Frobnicate", ["x"], ["f"], domain="acme"), node("Add", ["x", "f"], ["y"])), "acme"),
    "wrong type": (
        nodes(node("Cast", ["x"], ["i"], to=TensorProto.INT64), node("MatMul", ["i", "w"], ["f"]), node("Add", ["x", "f"], ["y"])),
        "inconsistent type",
    ),
    "wrong shape": (lambda folder: graph(weights=[("w", WEIGHT[:7])]).SerializeToString(), "Incompatible dimensions"),
    "one node name twice": (
        nodes(node("MatMul", ["x", "w"], ["f"], "n"), node("Add", ["x", "f"], ["y"], "n")),
        "node names that stand twice",
    ),
    "one value name twice": (nodes(node("MatMul", ["x", "w"], ["f"]), node("Relu", ["x"], ["f"]), node("Add", ["x", "f"], ["y"])), "'f'"),
    "one weight twice": (
        lambda folder: graph(weights=[("w", WEIGHT), ("w", WEIGHT)]).SerializeToString(),
        "initializer names that stand twice",
    ),
    "an input that is not there": (nodes(node("MatMul", ["nowhere", "w"], ["f"]), node("Add", ["x", "f"], ["y"])), "nowhere"),
    "a future opset": (lambda folder: graph(opset=99).SerializeToString(), "onnxruntime says"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files(name, tmp_path, here):
    make, message = MALFORMED[name]
    folder = tmp_path / "model"
    folder.mkdir()
    data = make(folder)
    (folder / "model.onnx").write_bytes(data)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CaptureError, match=message):
        detect(folder / "model.onnx")
    result = here("model/model.onnx", "--rank", "4", "--profile-seconds", "0", "--out", "model/out")
    assert result.returncode == 4
    assert result.stderr.startswith("Error: model/model.onnx")
    assert len(result.stderr.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_graph_out_of_order_is_put_in_order(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(graph(NODES[::-1]).SerializeToString())
    assert [site.kind for site in detect(path)] == ["identity"]


def outputs(path: Path) -> np.ndarray:
    x = np.random.default_rng(1).standard_normal((2, N)).astype(np.float32)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def locations(path: Path) -> set[str]:
    return {str(tensor.location) for tensor in external(read_onnx(path))}


def test_weights_are_copied_into_another_folder(tmp_path, here):
    (tmp_path / "model").mkdir()
    path = with_data(tmp_path / "model")
    result = here("model/model.onnx", "--rank", "16", "--profile-seconds", "0.1")
    assert result.returncode == 0, result.stderr
    out = tmp_path / "laurel_out"
    results = {
        "laurel.onnx",
        "laurel.onnx.data",
        "weights.bin",
        "plan.toml",
        "report.html",
        "report.json",
        "README.md",
        "laurel_manifest.json",
    }
    assert {p.name for p in out.iterdir()} == results | {"trace-laurel.json", "trace-model.json"}
    assert locations(out / "laurel.onnx") == {"laurel.onnx.data", "weights.bin"}
    assert {p.name for p in path.parent.iterdir()} == {"model.onnx", "weights.bin"}
    np.testing.assert_array_equal(outputs(out / "laurel.onnx"), outputs(path))
    rows = json.loads((out / "report.json").read_text())["profile"]["rows"]
    assert [Path(row["path"]).name for row in rows] == ["model.onnx", "laurel.onnx"]
    assert rows[0]["file_bytes"] > WEIGHT.nbytes


def test_weights_beside_the_result_are_referred_to(tmp_path, here):
    path = with_data(tmp_path)
    result = here("model.onnx", "--rank", "16", "--profile-seconds", "0", "--out", ".")
    assert result.returncode == 0, result.stderr
    assert {p.name for p in tmp_path.iterdir()} == {
        "model.onnx",
        "weights.bin",
        "laurel.onnx",
        "laurel.onnx.data",
        "plan.toml",
        "report.html",
        "report.json",
        "README.md",
        "laurel_manifest.json",
    }
    assert locations(tmp_path / "laurel.onnx") == {"laurel.onnx.data", "weights.bin"}
    np.testing.assert_array_equal(outputs(tmp_path / "laurel.onnx"), outputs(path))
    # Once more, over the first result.
    assert here("model.onnx", "--variant", "rw", "--profile-seconds", "0", "--out", ".").returncode == 0
    np.testing.assert_array_equal(outputs(tmp_path / "laurel.onnx"), outputs(path))


def test_a_reference_from_the_folder_above(tmp_path, here):
    (tmp_path / "model").mkdir()
    path = with_data(tmp_path / "model")
    assert here("model/model.onnx", "--rank", "16", "--profile-seconds", "0", "--out", ".", "--external-data", "reference").returncode == 0
    assert locations(tmp_path / "laurel.onnx") == {"laurel.onnx.data", "model/weights.bin"}
    np.testing.assert_array_equal(outputs(tmp_path / "laurel.onnx"), outputs(path))


def test_a_reference_that_the_format_forbids(tmp_path, here):
    (tmp_path / "model").mkdir()
    with_data(tmp_path / "model")
    result = here("model/model.onnx", "--rank", "16", "--profile-seconds", "0", "--external-data", "reference")
    assert result.returncode == 2
    assert "Choose --out model, or --external-data copy" in result.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"model"}


def test_the_file_itself_is_not_replaced(tmp_path, here):
    path = with_data(tmp_path)
    path.rename(tmp_path / "laurel.onnx")
    result = here("laurel.onnx", "--rank", "4", "--out", ".")
    assert result.returncode == 2
    assert "would replace laurel.onnx itself" in result.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"laurel.onnx", "weights.bin"}


def test_a_failed_verification_leaves_nothing(tmp_path, here, monkeypatch):
    path = with_data(tmp_path)
    monkeypatch.setattr("laurel_rewrite.verification.onnx._distance", lambda *_: float("inf"))
    for out in ("laurel_out", "."):
        result = here(path.name, "--rank", "16", "--profile-seconds", "0", "--out", out)
        assert result.returncode == 1
        assert "Nothing was written" in result.stderr
        assert {p.name for p in tmp_path.iterdir()} == {"model.onnx", "weights.bin"}


def test_a_large_result_gets_a_data_file_that_clashes_with_none(tmp_path, monkeypatch):
    monkeypatch.setattr(laurel_rewrite.files.onnx, "EXTERNAL_DATA_BYTES", 1000)
    path = tmp_path / "model.onnx"
    path.write_bytes(graph().SerializeToString())
    first = write_onnx(rewrite_onnx(path, rank=16), tmp_path / "first.onnx")
    assert locations(first) == {"first.onnx.data"}
    again = ir.load(first)
    extra = ir.Value(name="extra", const_value=ir.tensor(np.ones((N, N), np.float32), name="extra"))
    again.graph.register_initializer(extra)
    (tmp_path / "copy").mkdir()
    copy = write_onnx(again, tmp_path / "copy" / "first.onnx")
    assert locations(copy) == {"first.onnx.data", "first.onnx.1.data"}
    np.testing.assert_array_equal(outputs(copy), outputs(path))


def test_what_cannot_be_written(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(graph().SerializeToString())
    model = rewrite_onnx(path, rank=4)
    with pytest.raises(ExportError, match="there is no folder"):
        write_onnx(model, tmp_path / "nowhere" / "laurel.onnx")
    model.graph.outputs[0].type = ir.TensorType(ir.DataType.INT64)
    with pytest.raises(ExportError, match=r"could not be written as valid ONNX"):
        write_onnx(model, tmp_path / "laurel.onnx")
    assert {p.name for p in tmp_path.iterdir()} == {"model.onnx"}


def test_what_onnxruntime_refuses_is_not_written(tmp_path):
    """onnx's checker passes two nodes of one name."""
    model = ir.from_proto(
        graph([helper.make_node("MatMul", ["x", "w"], ["f"], name="n"), helper.make_node("Add", ["x", "f"], ["y"], name="n")])
    )
    with pytest.raises(ExportError, match=r"onnxruntime does not load it: .* two nodes with same node name"):
        write_onnx(model, tmp_path / "laurel.onnx")
    assert not any(tmp_path.iterdir())


def test_profile_leaves_a_folder_with_weights_as_it_was(tmp_path):
    with_data(tmp_path)
    write_onnx(rewrite_onnx(tmp_path / "model.onnx", rank=16), tmp_path / "laurel.onnx")
    before = {p.name for p in tmp_path.iterdir()}
    result = profile([tmp_path / "model.onnx", tmp_path / "laurel.onnx"], seconds=0.1, min_rounds=6)
    assert len(result.rows) == 2
    assert {p.name for p in tmp_path.iterdir()} == before


def test_options_for_graphs_alone(tmp_path, here):
    result = here("hf:gpt2", "--weights", "x.safetensors")
    assert result.returncode == 2
    assert "--weights is for ONNX files, and hf:gpt2 is none" in result.stderr
    with_data(tmp_path)
    result = here("model.onnx", "--set", "depth=3")
    assert result.returncode == 2
    assert "a graph has no settings" in result.stderr
    with pytest.raises(ConfigError, match="functions must be one of keep, inline"):
        rewrite_onnx(tmp_path / "model.onnx", functions="neither")
