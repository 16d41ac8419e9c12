"""One more layer by the graph is one more layer by the configuration."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from conftest import onnx_graph, real, slow
from onnx import helper
from torch import nn
from toys import CASES, D

from laurel_rewrite import detect, export_onnx, profile
from laurel_rewrite.profiling import ONE_MORE
from laurel_rewrite.profiling.one_more_layer import one_more_layer
from laurel_rewrite.profiling.training import one_more_block
from laurel_rewrite.sources.models import build
from laurel_rewrite.verification.onnx import run_onnx

SMALL = {
    "gpt2": {"n_embd": 32, "n_head": 4, "vocab_size": 99, "n_positions": 256},
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 99},
    "bert": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 99},
}
LAYERS = {"gpt2": "n_layer", "llama": "num_hidden_layers", "bert": "num_hidden_layers"}


def small(name: str, layers: int):
    built = build(f"hf:{name}", SMALL[name] | {LAYERS[name]: layers})
    return built.model, {key: value[:, :7] for key, value in built.kwargs.items()}


def figures(path):
    (row,) = profile([path], seconds=0, min_rounds=1, threads=1).rows
    return row.costs.flops, row.costs.parameters, row.ops.after


@pytest.mark.parametrize(("name", "layers"), [("bert", 2), slow("gpt2", 2), slow("llama", 3)])
def test_it_costs_what_the_larger_configuration_costs(name, layers, tmp_path):
    torch.manual_seed(0)
    paths = []
    for count in (layers, layers + 1):
        model, kwargs = small(name, count)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()  # the exporter shares parameters that are equal
        paths.append(export_onnx(model, (), kwargs, tmp_path / f"{count}.onnx"))
    made = one_more_layer(ir.load(paths[0]))
    assert made is not None
    ir.save(made[0], tmp_path / "made.onnx")
    onnx.checker.check_model(tmp_path / "made.onnx", full_check=True)
    assert figures(tmp_path / "made.onnx") == figures(paths[1])


def test_the_copy_computes(tmp_path):
    """Against PyTorch with the block twice."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.GELU()) for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x)
            return x.mean(1)

    model, x = Net(), torch.randn(2, 5, D)
    path = export_onnx(model, (x,), None, tmp_path / "model.onnx")
    made, sites = one_more_layer(ir.load(path))
    assert len(sites) == 1
    ir.save(made, tmp_path / "made.onnx")
    (found,) = run_onnx(tmp_path / "made.onnx", {"x": x.numpy()}, optimised=True)
    model.layers.insert(1, model.layers[1])  # the last block between two states of the stream
    with torch.no_grad():  # onnxruntime against PyTorch in float32, as everywhere
        np.testing.assert_allclose(found, model(x).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "vit_small", slow("t5")])
def test_real_architectures(name, exported):
    model = ir.load(exported(name))
    before = [n.op_type for n in model.graph]
    made, sites = one_more_layer(model)
    assert [n.op_type for n in model.graph] == before
    assert len(detect(made)) == len(detect(model)) + len(sites)
    assert len(sites) == {"resnet18": 1, "vit_small": 2, "t5": 3}[name]


def test_where_there_is_no_block():
    nodes = [
        helper.make_node("Relu", ["x"], ["m"]),
        helper.make_node("MatMul", ["m", "w"], ["f"]),
        helper.make_node("Add", ["x", "f"], ["y"]),
    ]
    model = onnx_graph(nodes, {"x": (2, 5, D)}, "m f", w=(D, D))
    assert one_more_layer(model) is None


def test_the_profile_has_it_and_says_where_it_cannot(exported, tmp_path):
    result = profile([exported("gpt2")], seconds=0, min_rounds=1, threads=1, control=True)
    assert [row.name for row in result.rows] == ["gpt2.onnx", ONE_MORE]
    path = export_onnx(CASES["child"].make(), (torch.randn(2, 5, D),), None, tmp_path / "one.onnx")
    result = profile([path], seconds=0, min_rounds=1, threads=1, control=True)
    assert len(result.rows) == 1
    assert result.warnings == (
        "There is no model with one more layer: no two states of a residual stream have one shape, so that no block can be copied.",
    )


def test_a_copy_that_does_not_run_is_left_out(exported, monkeypatch):
    def broken(model):
        made, sites = one_more_layer(model)
        next(n for n in made.graph if n.op_type == "MatMul").replace_input_with(1, None)
        return made, sites

    monkeypatch.setattr("laurel_rewrite.profiling.one_more_layer", broken)
    result = profile([exported("gpt2")], seconds=0, min_rounds=1, threads=1, control=True)
    assert len(result.rows) == 1
    assert result.warnings[0].startswith("There is no model with one more layer: ")


@pytest.mark.parametrize("name", ["gpt2", "resnet18", "bert"])
def test_in_pytorch(name):
    example = real(name)
    owners = [site.owner for site in detect(example.model, example.args, example.kwargs) if site.kind == "identity"]
    before = sum(p.numel() for p in example.model.parameters())
    taller = one_more_block(example.model, owners, example.args, example.kwargs)
    after = sum(p.numel() for p in taller.parameters())
    blocks = {"gpt2": "transformer.h", "resnet18": "layer4", "bert": "bert.encoder.layer"}
    last = taller.get_submodule(blocks[name])[-1]
    assert after - before == sum(p.numel() for p in last.parameters())
    assert sum(p.numel() for p in example.model.parameters()) == before
    assert one_more_block(CASES["plain"].make(), [""], (torch.randn(2, 5, D),), {}) is None


def test_a_block_that_the_model_does_not_run_is_no_layer():
    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.depth = 3

        def forward(self, x):
            for block in self.blocks[: self.depth]:
                x = x + block(x)
            return x

    assert one_more_block(Counted(), [f"blocks.{n}" for n in range(3)], (torch.randn(2, 4),), {}) is None
