"""One plan through every door: the module, the fx graph of its export, the exported program as source, what torch.compile captures, the ONNX graph."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch
from conftest import slow
from safetensors.torch import save_file
from torch.utils import _pytree as pytree

from laurel_rewrite import compile_backend, detect, export_onnx, prepare, rewrite, write_onnx
from laurel_rewrite.backends.onnx.surgery import GraphRewrite
from laurel_rewrite.graph.capture import quiet, without_caches
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.plan import LaurelConfig, Plan
from laurel_rewrite.sources.models import build
from laurel_rewrite.testing import moved
from laurel_rewrite.verification.onnx_runs import run_onnx

AUTO = torch.export.Dim.AUTO
_BERT = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 99}
_LLAMA = {**_BERT, "num_key_value_heads": 2}
ARCHITECTURES = [
    ("hf:llama", _LLAMA, "rw+lr+pa"),
    slow("torchvision:resnet18", {}, "rw+lr"),
    slow("hf:gpt2", {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 99}, "hc"),
    slow("hf:bert", _BERT, "denseformer"),
    slow("hf:qwen3", {**_LLAMA, "head_dim": 16}, "attnres"),
    slow("hf:mistral", _LLAMA, "gated"),
    slow("hf:t5", {"num_layers": 2, "num_decoder_layers": 2, "d_model": 32, "d_ff": 64, "num_heads": 2, "vocab_size": 99}, "rw+lr"),
    slow("hf:opt", {"num_hidden_layers": 2, "hidden_size": 32, "ffn_dim": 64, "num_attention_heads": 2, "vocab_size": 99, "word_embed_proj_dim": 32}, "x0"),
    slow("timm:vit_tiny_patch16_224", {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32, "patch_size": 8}, "rw+lr+pa"),
    slow("timm:convnext_atto", {"depths": (1, 1, 2, 1), "dims": (16, 16, 32, 32)}, "highway"),
    slow("timm:swin_tiny_patch4_window7_224", {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "img_size": 56, "window_size": 7, "drop_path_rate": 0.0}, "rw-vector"),
    slow("timm:mixer_s32_224", {"img_size": 64}, "rw+lr+pa"),
]  # fmt: skip

OTHER_KERNELS = {"torchvision:resnet18", "hf:t5", "timm:mixer_s32_224"}
"""Where onnxruntime's sums of products round so differently from PyTorch's that both are held against float64 instead."""


def first(model, args, kwargs):
    with without_caches(model), torch.no_grad():
        out = model(*args, **kwargs)
    return next(leaf for leaf in pytree.tree_leaves(dict(out) if hasattr(out, "keys") else out) if isinstance(leaf, torch.Tensor))


@pytest.mark.parametrize(("name", "settings", "variant"), ARCHITECTURES)
def test_all_doors_give_the_same_numbers(name, settings, variant, tmp_path):
    torch.manual_seed(0)
    built = build(name, settings)
    model, args, kwargs = built.model.eval(), built.args, built.kwargs
    with torch.no_grad():
        for parameter in model.parameters():  # some heads start at zero
            parameter.add_(0.02 * torch.randn_like(parameter))
    options = {"rank": 4} if "lr" in variant else {"streams": 2} if variant == "hc" else {}
    plan = Plan.from_sites(detect(model, args, kwargs), LaurelConfig(variant, **options))
    edited = moved(rewrite(model, args, kwargs, plan=plan, verify=False)).eval()
    trained = {key: value for key, value in edited.state_dict().items() if "laurel_" in key}
    wide = pytree.tree_map_only(torch.Tensor, lambda x: torch.cat([x, x.flip(0)[:1]]) if x.ndim else x, (args, kwargs))
    expected = first(edited, *wide)
    assert (expected - first(model, *wide)).abs().max() > 1e-4

    def near(found, door):
        # float32; ids, streams and parameters are the same, and so is the order of operations but for several branches of one sum
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=lambda text: f"{door}: {text}")

    sizes = pytree.tree_map_only(torch.Tensor, lambda x: {0: AUTO} if x.ndim else None, (args, kwargs))
    with quiet(), without_caches(model):
        program = torch.export.export(model.train(), args, kwargs, strict=False, dynamic_shapes=(*sizes[0], *sizes[1].values()))
        evaluated = torch.export.export(model.eval(), args, kwargs, strict=False, dynamic_shapes=(*sizes[0], *sizes[1].values()))

    graph = rewrite(
        evaluated, plan=Plan.from_sites(detect(evaluated.module(check_guards=False)), LaurelConfig(variant, **options)), verify=False
    )
    assert list(sites_of(graph)) == list(sites_of(edited))
    graph.load_state_dict(trained, strict=False)
    near(first(graph, *wide), "fx")

    torch.export.save(program, tmp_path / "model.pt2")
    source = build(str(tmp_path / "model.pt2"))
    unflattened = rewrite(source.model, source.args, source.kwargs, variant=variant, **options)
    assert list(sites_of(unflattened)) == list(sites_of(edited))
    missing = unflattened.load_state_dict(edited.state_dict(), strict=False)
    assert not any("laurel" in key for key in (*missing.missing_keys, *missing.unexpected_keys))
    near(first(unflattened.eval(), *wide), "program")

    torch._dynamo.reset()
    ready = prepare(model, args, kwargs, plan=plan, verify=False)
    ready.load_state_dict(edited.state_dict())
    near(first(torch.compile(ready, backend=compile_backend(ready, inner="aot_eager")), *wide), "torch.compile")

    base = export_onnx(model, args, kwargs, tmp_path / "base.onnx")
    onnx = GraphRewrite(ir.load(base))
    onnx.apply(Plan.from_sites(onnx.sites, LaurelConfig(variant, **options)))
    save_file(trained, tmp_path / "trained.safetensors")
    onnx.load(tmp_path / "trained.safetensors")
    file = write_onnx(onnx.model, tmp_path / "laurel.onnx")
    inputs = [value.name for value in ir.load(file).graph.inputs]
    given = [leaf.numpy() for leaf in pytree.tree_leaves(wide) if isinstance(leaf, torch.Tensor)]
    found = torch.from_numpy(run_onnx(file, dict(zip(inputs, given, strict=True)), optimised=False)[0])
    if name not in OTHER_KERNELS:
        near(found, "ONNX")
        return
    doubled = pytree.tree_map_only(torch.Tensor, lambda x: x.double() if x.is_floating_point() else x, wide)
    exact = first(edited.double(), *doubled)
    torch_off, onnx_off = (float((result - exact).abs().max()) for result in (expected, found))
    assert onnx_off <= 4 * torch_off, f"ONNX is {onnx_off:g} from what float64 says, PyTorch {torch_off:g}"
