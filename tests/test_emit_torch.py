"""Trainable PyTorch modules of ONNX graphs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from conftest import close, light, onnx_graph, slow, trained, yolo
from onnx import helper, numpy_helper
from toys import CASES, D

from laurel_rewrite import (
    ExportError,
    detect,
    export_onnx,
    load,
    write_onnx,
)
from laurel_rewrite.backends.onnx import emit_torch
from laurel_rewrite.graph.feeds import draw_feeds
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.verification.onnx import run_onnx


@pytest.mark.parametrize("name", ["gpt2", "bert", "resnet18", "yolo", "shufflenet", slow("t5"), slow("llama"), slow("vit_small")])
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
    from laurel_rewrite.backends.onnx.emit_torch import to_torch
    from laurel_rewrite.backends.onnx.surgery import GraphRewrite
    from laurel_rewrite.files.onnx import read_onnx
    from laurel_rewrite.plan import LaurelConfig, Plan

    surgery = GraphRewrite(read_onnx(given))
    plan = Plan.from_sites(surgery.sites, LaurelConfig(**config))
    surgery.apply(plan, split=True)
    trained(surgery.model)
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


def _saved(nodes, shapes, path, **weights):
    onnx.save(ir.to_proto(onnx_graph(nodes, shapes, **weights)), path)
    return path


def test_a_module_that_does_not_run_leaves_the_onnx_result(tmp_path, here):
    """onnx2torch makes a Flatten of one dimension into one that raises."""
    nodes = [
        helper.make_node("Flatten", ["v"], ["r"], axis=0),
        helper.make_node("MatMul", ["x", "w"], ["f"]),
        helper.make_node("Mul", ["f", "r"], ["g"]),
        helper.make_node("Relu", ["g"], ["h"]),
        helper.make_node("Add", ["x", "h"], ["y"]),
    ]
    _saved(nodes, {"x": (2, D), "v": (D,)}, tmp_path / "model.onnx", w=(D, D))
    result = here("model.onnx", "--rank", "4", "--profile-seconds", "0", "--emit-torch")
    assert result.returncode == 4
    assert "laurel.onnx was written, but no PyTorch module: " in result.stderr
    assert (tmp_path / "laurel_out" / "laurel.onnx").exists()
    assert not (tmp_path / "laurel_out" / "model.pt").exists()


@pytest.mark.parametrize("words", [(), ("--no-verify",)])
def test_a_module_is_compared_in_every_case(words, tmp_path, here, monkeypatch):
    """A conversion that is wrong."""
    right = emit_torch.to_torch

    def wrong(model, plan):
        module = right(model, plan)
        next(iter(sites_of(module).values())).mix.data[0] += 0.1
        return module

    monkeypatch.setattr(emit_torch, "to_torch", wrong)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["f"]),
        helper.make_node("Add", ["x", "f"], ["y"]),
    ]
    proto = ir.to_proto(onnx_graph(nodes, {"x": (2, D)}, w=(D, D)))
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(torch.randn(D, D).numpy(), "w"))
    onnx.save(proto, tmp_path / "model.onnx")
    result = here("model.onnx", "--rank", "4", "--profile-seconds", "0", "--emit-torch", *words)
    assert result.returncode in (1, 4)
    assert "PyTorch" in result.stderr
    assert not (tmp_path / "laurel_out" / "model.pt").exists()
