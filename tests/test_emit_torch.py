"""Trainable PyTorch modules of ONNX graphs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from conftest import close, light, onnx_graph, slow, trained, yolo
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from toys import CASES, D

from laurel_rewrite import (
    ExportError,
    detect,
    export_onnx,
    load,
    rewrite,
    write_onnx,
)
from laurel_rewrite.backends.module.surgery import rewriting_of
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


def test_a_module_that_does_not_run_leaves_the_onnx_result(tmp_path, here):
    """Resize with boxes to crop, which is seen when it runs."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["f"]),
        helper.make_node("Resize", ["f", "roi", "scales"], ["g"], mode="linear", coordinate_transformation_mode="tf_crop_and_resize"),
        helper.make_node("Relu", ["g"], ["h"]),
        helper.make_node("Add", ["x", "h"], ["y"]),
    ]
    proto = ir.to_proto(onnx_graph(nodes, {"x": (2, D)}, w=(D, D), roi=(4,), scales=(2,)))
    for initializer, values in zip(proto.graph.initializer[1:], ([0, 0, 1, 1], [1, 1]), strict=True):
        initializer.CopyFrom(numpy_helper.from_array(np.float32(values), initializer.name))
    onnx.save(proto, tmp_path / "model.onnx")
    result = here("model.onnx", "--rank", "4", "--profile-seconds", "0", "--emit-torch")
    assert result.returncode == 4, result.stderr
    assert "laurel.onnx was written, but no PyTorch module: " in result.stderr
    assert "tf_crop_and_resize" in result.stderr
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


class CausalGPT(nn.Module):
    """A GPT as people write it: a triangular mask (Trilu), a head that is the embedding's matrix, an own scale, and a table that does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(19, D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.norm, self.mlp = nn.LayerNorm(D), nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(approximate="tanh"), nn.Linear(2 * D, D))
        self.scale = nn.Parameter(torch.tensor(0.3))
        self.register_buffer("rates", torch.rand(D))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = x + torch.sin(torch.arange(ids.shape[1])[:, None] * self.rates)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        scores = (q @ k.transpose(1, 2) * self.scale.exp()).masked_fill(~seen, float("-inf"))
        x = x + self.out(scores.softmax(-1) @ v)
        x = x + self.mlp(x)
        return nn.functional.linear(x, self.embedding.weight)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, D, 3, padding=1), nn.Conv2d(D, D, 3, padding=1, groups=2)
        self.norm, self.head = nn.GroupNorm(2, D), nn.Linear(D, 5)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear")
        self.register_buffer("blur", torch.full((D, 1, 3, 3), 1 / 9))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.conv2d(self.stem(x), self.blur, padding=1, groups=D)
        x = self.up(nn.functional.max_pool2d(x, 2))
        x = x + self.conv(self.norm(x)).relu()
        return self.head(x.mean((2, 3)))


class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(19, D)
        self.encoder, self.decoder, self.cross = nn.Linear(D, D), nn.Linear(D, D), nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, ids: Tensor, decoder_ids: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.embedding(ids)
        memory = memory + self.encoder(memory).relu()
        y = self.embedding(decoder_ids)
        y = y + self.cross(y, memory, memory, need_weights=False)[0]
        return y + self.decoder(y).relu(), memory


def _ids(batch: int, length: int) -> Tensor:
    return torch.randint(0, 19, (batch, length))


WAYS = {
    "causal": (CausalGPT, lambda batch, less: (_ids(batch, 9 - less),)),
    "convolutions": (Convolutions, lambda batch, less: (torch.randn(batch, 3, 8, 8),)),
    "encoder_decoder": (EncoderDecoder, lambda batch, less: (_ids(batch, 9 - less), _ids(batch, 7 - less))),
}


@pytest.mark.parametrize("target", ["", "portable", slow("none")])
@pytest.mark.parametrize("name", WAYS)
def test_to_onnx_and_back_and_trained_and_to_onnx_again(name, target, tmp_path):
    """The module is the model at other sizes, all that trained trains, and its own graph is as dynamic."""
    make, inputs = WAYS[name]
    args, others = inputs(2, 0), inputs(3, 2)
    model, plan = make(), None
    if target:
        model = rewrite(model, args, variant="rw+lr", rank=2)
        plan = rewriting_of(model).plan if target == "portable" else None
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    path = export_onnx(model, args, None, tmp_path / "first.onnx", target=target or "ort-cpu")
    module = emit_torch.to_torch(ir.load(path), plan)
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        close(_arrays(module.eval()(*others)), _arrays(model.eval()(*others)), rtol=1e-5)
    optimizer = torch.optim.Adam(module.train().parameters(), 1e-3)
    losses = []
    for _ in range(3):
        loss = sum(output.square().mean() for output in _outputs(module(*others)))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
        optimizer.step()
    assert losses == sorted(losses, reverse=True)
    again = export_onnx(module, others, None, tmp_path / "second.onnx")
    names = [value.name for value in ir.load(again).graph.inputs]
    feeds = dict(zip(names, (tensor.numpy() for tensor in args), strict=True))
    with torch.no_grad():
        close(run_onnx(again, feeds, optimised=True), _arrays(module.eval()(*args)))


def _outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _arrays(result: Tensor | tuple[Tensor, ...]) -> list[np.ndarray]:
    return [tensor.numpy() for tensor in _outputs(result)]


def test_parameters_and_buffers_are_what_they_were(tmp_path):
    """The names of the graph's initializers; the embedding is the head, and a table stays a buffer."""
    model = CausalGPT()
    module = emit_torch.to_torch(ir.load(export_onnx(model, (_ids(2, 9),), None, tmp_path / "model.onnx")))
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    assert parameters["initializers.embedding_weight"].shape == (19, D)
    assert sum(p.shape in ((19, D), (D, 19)) for p in parameters.values()) == 1
    assert any(p.numel() == 1 and torch.allclose(p, model.scale.exp()) for p in parameters.values())
    assert any(torch.equal(b, model.rates) for b in buffers.values())
    assert not any(torch.equal(p, model.rates) for p in parameters.values() if p.shape == (D,))
    assert module.to("meta")(_ids(3, 5).to("meta")).shape == (3, 5, 19)  # what it makes itself lies where it does


class Twice(nn.Module):
    """A block that is called twice, with matrices that an exporter takes for two."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 80, bias=False), nn.Linear(80, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + self.down(self.up(x).relu())
        return x


def test_a_matrix_that_was_folded_twice_is_one_parameter(tmp_path):
    model, x = Twice(), torch.randn(2, 5, D)
    module = emit_torch.to_torch(ir.load(export_onnx(model, (x,), None, tmp_path / "model.onnx")))
    assert sum(p.numel() for p in module.parameters()) == 2 * 80 * D
    with torch.no_grad():
        close([module(x).numpy()], [model(x).numpy()], rtol=1e-5)


def test_every_output_is_returned(tmp_path):
    """One node's results, out of order; and an input."""
    nodes = [helper.make_node("Split", ["x"], ["a", "b"], axis=1, num_outputs=2), helper.make_node("Neg", ["a"], ["c"])]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("b", "c", "x", "b")]
    model = helper.make_graph(nodes, "graph", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("n", 4))], outputs)
    module = emit_torch.to_torch(ir.from_proto(helper.make_model(model, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)))
    x = torch.randn(3, 4)
    close(_arrays(module(x)), _arrays((x[:, 2:], -x[:, :2], x, x[:, 2:])), 0, 0)
