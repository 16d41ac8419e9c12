"""What graphs are made for: the table, and a CUDA graph's fusions, which onnxruntime's own tools find without a GPU."""

from __future__ import annotations

import ast
import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from conftest import onnx_graph, real, trained
from onnx import helper
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from laurel_rewrite import ConfigError, export_onnx, rewrite_onnx, write_onnx
from laurel_rewrite.app import graph_job, wording
from laurel_rewrite.lowering import lower
from laurel_rewrite.targets import CPU, DEFAULT, target, targets

CUDA = "ort-cuda"
KINDS = "SkipLayerNormalization LayerNormalization BiasGelu FastGelu Gelu Attention MultiHeadAttention EmbedLayerNormalization".split()
D, HEADS = 32, 4


def test_the_table():
    assert [one.name for one in targets()] == ["ort-cpu", CUDA, "portable", "none"]
    assert targets()[0].name == DEFAULT
    for one in targets():
        assert one.lowers + one.keeps_functions + one.writes_nodes == 1
        assert one.lowers == bool(one.passes)
        assert set(one.skippable) < set(one.passes) or not one.passes
    assert (target(DEFAULT).provider, target(CUDA).provider) == (CPU, "CUDAExecutionProvider")
    with pytest.raises(ConfigError, match=r"Unknown target 'ort_cuda'\. Nearest: ort-cuda.*There are ort-cpu, ort-cuda, portable, none"):
        target("ort_cuda")


def test_names_stand_in_the_table_alone():
    """Everything else asks a target what it is; the kit that tests operators names those that it tests."""
    package = Path(__file__).parent.parent / "laurel_rewrite"
    lowered = {one.name for one in targets() if one.lowers}
    found = {
        path.name
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in lowered
    }
    assert found <= {"targets.py", "testing.py"}


def convolution() -> ir.Model:
    nodes = [helper.make_node("Conv", ["x", "w"], ["f"], name="conv"), helper.make_node("Add", ["x", "f"], ["y"], name="sum")]
    model = onnx_graph(nodes, {"x": (2, D, 8, 8)}, "f", w=(D, D, 1, 1))
    weights = np.random.default_rng(0).standard_normal((D, D, 1, 1)).astype(np.float32) / D
    model.graph.initializers["w"].const_value = ir.tensor(weights, name="w")
    return model


@pytest.mark.parametrize(("name", "rank"), [(DEFAULT, 16), (CUDA, 4)])
def test_ranks_are_padded_where_channels_lie_in_blocks(name, rank):
    model = trained(rewrite_onnx(convolution(), variant="rw+lr", rank=4))
    lower(model, target=name)
    assert {value.const_value.shape[0] for key, value in model.graph.initializers.items() if ".down." in key} == {rank}
    at_once = rewrite_onnx(convolution(), variant="rw+lr", rank=4, target=name, verify=False)
    assert {value.const_value.shape[0] for key, value in at_once.graph.initializers.items() if ".down." in key} == {rank}


def test_what_a_target_does_not_do():
    model = rewrite_onnx(convolution(), rank=4, verify=False)
    with pytest.raises(ConfigError, match=r"no pass 'pad-rank' to skip\. Nearest: "):
        lower(model, target=CUDA, skip=["pad-rank"])
    with pytest.raises(ConfigError, match="portable keeps LAuReL as it is"):
        lower(model, target="portable")


class Block(nn.Module):
    """Attention as onnxruntime's tools know it, and an MLP, normalised before or after."""

    def __init__(self, *, before: bool) -> None:
        super().__init__()
        self.before = before
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)
        self.first, self.second = nn.LayerNorm(D), nn.LayerNorm(D)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(x.shape[0], x.shape[1], HEADS, D // HEADS) for layer in (self.q, self.k, self.v))
        weights = torch.softmax(q.transpose(1, 2) @ k.permute(0, 2, 3, 1) / (D // HEADS) ** 0.5, -1)
        return self.o((weights @ v.transpose(1, 2)).transpose(1, 2).reshape(x.shape[0], x.shape[1], D))

    def forward(self, x: Tensor) -> Tensor:
        if self.before:
            x = x + self.attend(self.first(x))
            return x + self.down(nn.functional.gelu(self.up(self.second(x))))
        x = self.first(x + self.attend(x))
        return self.second(x + self.down(nn.functional.gelu(self.up(x))))


def transformer(*, before: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D), Block(before=before), Block(before=before), nn.LayerNorm(D)).eval()


def fused(path: Path, kind: str, heads: int, size: int) -> Path:
    """The graph after onnxruntime's fusions for a GPU, as people save it; they need none."""
    optimizer = pytest.importorskip("onnxruntime.transformers.optimizer")
    model = optimizer.optimize_model(str(path), model_type=kind, num_heads=heads, hidden_size=size, opt_level=0, use_gpu=True)
    after = path.with_suffix(f".{kind}.onnx")
    model.save_model_to_file(str(after))
    return after


def ops(model: Path | ir.Model) -> Counter[str]:
    """The kinds of fused ops, and how many took a bias in as well."""
    graph = (ir.load(model) if isinstance(model, Path) else model).graph
    found = Counter(node.op_type for node in graph if node.op_type in KINDS)
    found["with bias"] = sum(node.op_type == "SkipLayerNormalization" and len(node.inputs) > 4 for node in graph)
    return found


@pytest.mark.parametrize(
    ("name", "kind", "heads", "size", "expected"), [("gpt2", "gpt2", 4, 32, "FastGelu"), ("vit_small", "vit", 6, 384, "BiasGelu")]
)
def test_fusions_of_half_precision_are_kept(name, kind, heads, size, expected, tmp_path):
    example = real(name)
    for key, parameter in example.model.named_parameters():
        if key.endswith("bias"):  # the exporter drops those of 0
            parameter.data.normal_(0, 0.1)
    args, kwargs = pytree.tree_map(lambda leaf: leaf.half() if leaf.is_floating_point() else leaf, (example.args, example.kwargs))
    path = export_onnx(example.model.half(), args, kwargs, tmp_path / "baseline.onnx", verify=False)
    baseline = ops(fused(path, kind, heads, size))
    assert baseline["SkipLayerNormalization"] == example.sites
    assert baseline["with bias"] > 0
    assert baseline[expected] == example.sites // 2
    for variant in ("rw", "rw+lr", "rw+lr+pa"):
        model = trained(rewrite_onnx(path, variant=variant, rank=4, verify=False))
        lower(model, target=CUDA, verify=False)
        after = ops(fused(write_onnx(model, tmp_path / f"{variant}.onnx"), kind, heads, size))
        assert after["with bias"] >= baseline["with bias"]
        assert after | {"with bias": 0} == baseline | {"with bias": 0}


@pytest.mark.parametrize("before", [True, False])
def test_attention_stays_where_the_baseline_is_fused_first(before, tmp_path):
    """A low-rank term beside the skip hides attention from the tools, which ask that the skip be what is normalised."""
    model, x = transformer(before=before).half(), torch.randn(2, 5, D).half()
    path = export_onnx(model, (x,), None, tmp_path / "baseline.onnx", verify=False)
    given = fused(path, "bert", HEADS, D)
    baseline = ops(given)
    assert baseline["Attention"] == 2
    assert baseline["SkipLayerNormalization"] == baseline["with bias"] == 4
    for variant in ("rw", "rw+lr", "rw+lr+pa"):
        graph = trained(rewrite_onnx(given, variant=variant, rank=4))
        lower(graph, target=CUDA)
        assert ops(graph) == baseline
    late = trained(rewrite_onnx(path, variant="rw+lr", rank=4, verify=False))
    lower(late, target=CUDA, verify=False)
    found = ops(fused(write_onnx(late, tmp_path / "late.onnx"), "bert", HEADS, D))
    assert found == baseline - Counter(Attention=2)


MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(32, 32), nn.LayerNorm(32)
    def forward(self, x):
        return self.norm(x + self.layer(x))

def build_model():
    return Net()

def example_inputs():
    return (torch.randn(2, 5, 32),)
"""


@pytest.mark.parametrize("kind", ["graph", "model"])
def test_what_cannot_be_timed_here_is_verified_and_said(kind, here, tmp_path, monkeypatch):
    monkeypatch.setattr(wording, "has_provider", lambda name: name == CPU)
    if kind == "graph":
        write_onnx(convolution(), tmp_path / "net.onnx")
    (tmp_path / "net.py").write_text(MODEL)
    words = ["net.onnx" if kind == "graph" else "net.py", "--rank", "4", "--target", CUDA]
    done = here(*words, "--profile-seconds", "0.1")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "laurel_out" / "report.json").read_text())
    assert report["profile"] is None
    assert not list((tmp_path / "laurel_out").glob("trace*"))
    assert report["verification"]
    assert all(check["passed"] for check in report["verification"])
    notes = " ".join(report["notes"])
    assert "Not timed: ort-cuda is for the CUDAExecutionProvider, which this onnxruntime has not" in notes
    assert "Verified on the CPUExecutionProvider" in notes
    lowered = ir.load(tmp_path / "laurel_out" / "laurel.onnx")
    assert not lowered.functions
    done = here(*words, "--fail-if", "latency_ratio > 2", "--force")
    assert done.returncode == 2
    assert "--fail-if needs a profile. Not timed" in done.stderr


def test_what_can_be_timed_is_timed_on_the_provider_it_is_for(here, tmp_path, monkeypatch):
    asked = []

    def profile(*_paths, **options):
        asked.append(options["provider"])
        raise ConfigError("timed")

    monkeypatch.setattr(wording, "has_provider", lambda name: True)
    monkeypatch.setattr(graph_job, "profile", profile)
    write_onnx(convolution(), tmp_path / "net.onnx")
    for name in (CUDA, DEFAULT):
        assert here("net.onnx", "--rank", "4", "--target", name).returncode == 2
    assert asked == ["CUDAExecutionProvider", CPU]
