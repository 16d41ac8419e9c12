"""The lowered graph computes what the unlowered one does, and onnxruntime fuses it as it fuses the baseline."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from conftest import LIGHT, away_from_start, close, compared, fused, light, onnx_graph, output, slow, trained
from onnx import helper
from onnxscript.rewriter.ort_fusions.rms_normalization import fuse_rms_normalization
from onnxscript.rewriter.ort_fusions.skip_normalization import fuse_skip_layer_normalization, fuse_skip_rms_normalization
from toys import CASES, D

from laurel_rewrite import ConfigError, export_onnx, rewrite, rewrite_onnx
from laurel_rewrite.files.manifest import MANIFEST
from laurel_rewrite.lowering import lower
from laurel_rewrite.profiling.fusions import count_ops
from laurel_rewrite.profiling.sessions import session_of
from laurel_rewrite.profiling.sessions import settings as settings_of
from laurel_rewrite.verification.onnx import run_onnx

VARIANTS = ["rw", "lr", "pa", "rw+lr", "rw+pa", "lr+pa", "rw+lr+pa"]


def run_as(path: Path, folder: Path) -> Counter[str]:
    """What onnxruntime makes of a file, by op."""
    session_of(path, settings_of(), optimised=folder / "optimised.onnx")
    return count_ops(ir.load(path), ir.load(folder / "optimised.onnx")).after


MODELS = ["resnet18", "vit_small", "gpt2", "bert", "llama", "t5", "falcon", "cohere"]


@pytest.mark.parametrize(
    ("name", "variant"),
    [("gpt2", variant) for variant in VARIANTS]
    + [(name, "rw+lr+pa") for name in ("resnet18", "vit_small", "bert", "llama", "falcon")]
    + [slow("resnet18", variant) for variant in VARIANTS[:-1]]
    + [slow("t5", "rw+lr+pa"), slow("cohere", "rw+lr+pa")],
)
def test_the_same_values(name, variant, exported, tmp_path):
    model = trained(rewrite_onnx(exported(name), variant=variant, rank=4))
    _, done = compared(model, tmp_path)
    if "rw" in variant:
        assert done.sites == done.folded
        assert not done.refused
        assert "0 Muls at readers" in done.rescaled


@pytest.mark.parametrize("name", [*MODELS[:-1], slow(MODELS[-1])])
def test_weighted_residuals_cost_nothing(name, exported, tmp_path):
    """RW ends as the baseline's very ops."""
    model = trained(rewrite_onnx(exported(name), variant="rw"))
    after, _ = compared(model, tmp_path)
    assert run_as(after, tmp_path) == run_as(exported(name), tmp_path)


@pytest.mark.parametrize("name", ["resnet18", "bert", "gpt2", "vit_small"])
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
    base = run_as(exported("resnet18"), tmp_path)
    assert sum(base.values()) == 25
    after, _ = compared(trained(rewrite_onnx(exported("resnet18"), variant="rw+lr", rank=4)), tmp_path)
    assert run_as(after, tmp_path) - base == Counter({"Conv": 16})
    assert not base - run_as(after, tmp_path)


@pytest.mark.parametrize(
    ("variant", "normalize", "history_map"),
    [(variant, "softmax", "low-rank") for variant in VARIANTS]
    + [("rw+lr+pa", normalize, "low-rank") for normalize in ("sigmoid", "none", "paper")]
    + [("pa", "softmax", "identity"), ("rw+pa", "paper", "identity"), ("rw+lr", "none", "low-rank")]
    + [slow("rw", normalize, "low-rank") for normalize in ("sigmoid", "none", "paper")]
    + [slow(variant, "softmax", "identity") for variant in ("rw+pa", "lr+pa", "rw+lr+pa")],
)
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
    model = trained(rewrite_onnx(exported("resnet18"), variant="rw+lr", rank=4))
    after, _done = compared(model, tmp_path, skip=skip)
    lowered = ir.load(after)
    muls = sum(node.op_type == "Mul" for node in lowered.graph)
    assert muls == 8 * (("rescale-stream" in skip) + ("fold-branch" in skip))
    ranks = {v.const_value.shape[0] for n, v in lowered.graph.initializers.items() if ".down." in n}
    assert ranks == ({4} if "pad-rank" in skip else {16})
    with pytest.raises(ConfigError, match=r"no pass 'fold-branches' to skip\. Nearest: fold-branch"):
        lower(model.clone(), skip=["fold-branches"])


def test_onnx_graphs_by_the_command(exported, tmp_path, here):
    result = here(str(exported("gpt2")), "--rank", "4", "--profile-seconds", "0.2")
    assert result.returncode == 0, result.stderr
    assert "lowered against not, random LAuReL" in result.stdout
    files = {
        "laurel.onnx",
        "plan.toml",
        "report.html",
        "README.md",
        "report.json",
        "trace-gpt2.json",
        "trace-laurel.json",
        "trace-one-more-layer.json",
    } | {MANIFEST}
    assert {p.name for p in (tmp_path / "laurel_out").iterdir()} == files
    lowered = ir.load(tmp_path / "laurel_out" / "laurel.onnx")
    assert not lowered.functions
    assert "Softmax" not in {n.op_type for n in lowered.graph if "laurel" in str(n.name)}  # no weight is left to compute
    assert "the weight of f(x) costs nothing at 6 of the 6 connections that have one: the layer that computes f(x) has it" in " ".join(
        result.stdout.split()
    )
    assert "the weight of x costs nothing at 6: the layers that read the sum have it" in " ".join(result.stdout.split())
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
        helper.make_node("MatMul", ["x", "w"], ["f"]), helper.make_node("Relu", ["f"], ["r"]),
        helper.make_node("SkipLayerNormalization", ["x", "r", "gamma", "beta"], ["y"], name="fused", domain="com.microsoft"),
    ]  # fmt: skip
    model = onnx_graph(nodes, {"x": (2, 5, D)}, "f r", w=(D, D), gamma=(D,), beta=(D,))
    generator = np.random.default_rng(0)
    for name in ("w", "gamma", "beta"):
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(generator.standard_normal(tuple(value.shape)).astype(np.float32), name=name)
    after, done = compared(trained(rewrite_onnx(model, variant="rw+lr", rank=4)), tmp_path)
    assert "SkipLayerNormalization" in {n.op_type for n in ir.load(after).graph}
    assert done.folded == 1
