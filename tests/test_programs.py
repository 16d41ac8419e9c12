"""Exported programs as models: source that computes what the program does, and trains."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from conftest import slow
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from laurel_rewrite import CaptureError, ConfigError, rewrite
from laurel_rewrite.graph.capture import quiet, without_caches
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.sources.models import build
from laurel_rewrite.sources.programs.source import source_of
from laurel_rewrite.testing import Stack
from laurel_rewrite.testing.stacks import D

AUTO = torch.export.Dim.AUTO
X = torch.randn(2, 5, D)
_SMALL = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 99}


def exported(model, args, kwargs=None, *, train=True, dynamic=True):
    kwargs = kwargs or {}
    sizes = pytree.tree_map_only(torch.Tensor, lambda x: {0: AUTO} if x.ndim else None, (args, kwargs)) if dynamic else None
    with quiet(), without_caches(model):
        return torch.export.export(
            model.train(train), args, kwargs, strict=False, dynamic_shapes=None if sizes is None else (*sizes[0], *sizes[1].values())
        )


def saved(model, args, kwargs=None, *, folder, **how):
    path = folder / "model.pt2"
    torch.export.save(exported(model, args, kwargs, **how), path)
    return path


def wider(tree):
    return pytree.tree_map_only(torch.Tensor, lambda x: torch.cat([x, x.flip(0)[:1]]) if x.ndim else x, tree)


def leaves(model, args, kwargs, seed=0):
    torch.manual_seed(seed)
    with without_caches(model):
        out = model(*args, **kwargs)
    return [leaf for leaf in pytree.tree_leaves(dict(out) if hasattr(out, "keys") else out) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("hf:llama", {**_SMALL, "num_key_value_heads": 2}),
        ("torchvision:resnet18", {}),
        slow("hf:gpt2", {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 99}),
        slow("hf:bert", _SMALL),
        slow("hf:t5", {"num_layers": 2, "num_decoder_layers": 2, "d_model": 32, "d_ff": 64, "num_heads": 2, "vocab_size": 99}),
        slow("hf:albert", _SMALL),
        slow(
            "hf:opt",
            {
                "num_hidden_layers": 2,
                "hidden_size": 32,
                "ffn_dim": 64,
                "num_attention_heads": 2,
                "vocab_size": 99,
                "word_embed_proj_dim": 32,
            },
        ),
        slow("timm:vit_tiny_patch16_224", {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32, "patch_size": 8}),
        slow(
            "timm:swin_tiny_patch4_window7_224",
            {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "img_size": 56, "window_size": 7, "drop_path_rate": 0.0},
        ),
        slow("timm:convnext_atto", {}),
        slow("torchvision:mobilenet_v3_small", {}),
        slow("timm:mixer_s32_224", {}),
    ],
)
def test_architectures(name, settings, tmp_path):
    """Held against the model that was exported, in both modes, at another batch than the traced one."""
    built = build(name, settings)
    with torch.no_grad():
        for parameter in built.model.parameters():  # some heads start at zero
            parameter.add_(0.02 * torch.randn_like(parameter))
    path = saved(built.model, built.args, built.kwargs, folder=tmp_path)
    found = build(str(path))
    names = [key for key, _ in built.model.named_parameters()]
    assert sorted(key for key, _ in found.model.named_parameters()) == sorted(names)
    args, kwargs = wider((built.args, built.kwargs))
    for train in (False, True):
        one, two = built.model.train(train), found.model.train(train)
        for right, left in zip(leaves(one, args, kwargs), leaves(two, args, kwargs), strict=True):
            assert right.abs().max() > 1e-3
            # float32: the same kernels in the same order, but for dropouts that are functions in one and modules in the other
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
    better = rewrite(found.model, found.args, found.kwargs, variant="rw+lr", rank=4)
    assert len(sites_of(better)) == len(sites_of(rewrite(built.model, built.args, built.kwargs, variant="rw+lr", rank=4, verify=False)))


def module_of(text, folder):
    file = folder / "written_program.py"
    file.write_text(text)
    spec = importlib.util.spec_from_file_location("written_program", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_alike_modules_share_a_class(tmp_path):
    text = source_of(exported(Stack(5), (X,)), "A stack.")
    assert text.count("\nclass ") == 3  # the branch, the block, the stack
    assert "nn.ModuleList([Block() for _ in range(5)])" in text
    module = module_of(text, tmp_path)
    assert module.example_inputs()["x"].shape == X.shape


class Nested(nn.Module):
    """Inputs and outputs in structures, regions, a tied weight, a buffer, and a module that is called twice."""

    def __init__(self):
        super().__init__()
        self.f, self.g = nn.Linear(D, D), nn.Linear(D, D)
        self.g.weight = self.f.weight
        self.drop = nn.Dropout(0.5)
        self.register_buffer("scale", torch.full((D,), 0.5), persistent=False)
        self.towers = nn.ModuleDict({"a": nn.Sequential(nn.Linear(D, D), nn.GELU("tanh")), "b": nn.Identity()})

    def forward(self, pair, *, factor=None, words):
        x, more = pair["x"], pair["more"][0]
        with torch.no_grad():
            mean = x.mean(-1, keepdim=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.f(x)
        x = x + self.drop(h.float()) - mean
        x = x + F.dropout(self.towers["a"](x), 0.25, self.training) * self.scale
        x = x + F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.1 if self.training else 0.0)[0]
        return {"out": self.f(self.f(x)) + self.g(more), "words": [words.clamp(min=1), (x[..., 2:-1:2], torch.where(x > 0, x, 0.0))]}


def test_structures_regions_and_modes(tmp_path):
    model = Nested()
    kwargs = {"factor": None, "words": torch.tensor([[1, 2], [0, 4]])}
    args = ({"x": X, "more": (torch.randn(2, 5, D),)},)
    path = tmp_path / "nested.pt2"
    torch.export.save(torch.export.export(model, args, kwargs, strict=False), path)
    found = build(str(path))
    assert found.model.g.weight is found.model.f.weight
    text = found.files["nested_program.py"].read_text()
    assert "with torch.autocast" in text
    assert "with torch.set_grad_enabled(False)" in text
    for train in (True, False):
        model.train(train), found.model.train(train)
        for right, left in zip(leaves(model, args, kwargs), leaves(found.model, args, kwargs), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
    found.model.train()
    sum(leaf.float().sum() for leaf in leaves(found.model, args, kwargs)).backward()
    assert all(parameter.grad is not None for parameter in found.model.parameters())


class Moded(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5)

    def forward(self, x):
        return x + self.drop(self.norm(self.conv(x)))


def test_a_program_of_evaluation_is_asked_for(tmp_path):
    x = torch.randn(3, 4, 6, 6)
    path = saved(Moded(), (x,), folder=tmp_path, train=False)
    with pytest.raises(CaptureError, match=r"exported in evaluation mode.*attention dropout.*--allow-inference-graph"):
        build(str(path))
    found = build(str(path), inference=True)
    assert "attention dropout" in found.notes[0]
    assert found.model.training
    before = found.model.norm.running_mean.clone()
    assert not torch.equal(leaves(found.model, (x,), {}, 0)[0], leaves(found.model, (x,), {}, 1)[0])
    assert not torch.equal(found.model.norm.running_mean, before)


def test_fixed_sizes_are_said(tmp_path):
    found = build(str(saved(Stack(), (X,), folder=tmp_path, dynamic=False)))
    assert f"the sizes of its inputs are fixed at (2, 5, {D})" in found.notes[0]
    assert not found.resizable


class Dropping(nn.Module):
    """Stochastic depth in code of its own, which an export in train mode has whatever the mode is afterwards."""

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(D, D)

    def forward(self, x):
        f = self.f(x)
        if self.training:
            f = f * f.new_empty(f.shape[0], 1, 1).bernoulli_(0.5).div_(0.5)
        return x + f


def test_random_draws_of_evaluation_are_said(tmp_path):
    found = build(str(saved(Dropping(), (X,), folder=tmp_path)))
    assert "it draws random numbers in evaluation, too, for its own code does (bernoulli_: stochastic depth, noise)" in found.notes[0]


class Branching(nn.Module):
    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))


class Changing(nn.Module):
    def forward(self, x):
        x.add_(1)
        return x + torch.tanh(x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: exported(Branching(), (X,), dynamic=False), "cond, which is not written as source"),
        (lambda: exported(Moded(), (torch.randn(2, 4, 6, 6),)).run_decompositions(), "was decomposed: its buffers"),
        (lambda: exported(Changing(), (X.clone(),), dynamic=False).run_decompositions(), "changes its inputs"),
    ],
)
def test_graphs_that_no_model_can_be_made_of(make, message, tmp_path):
    path = tmp_path / "model.pt2"
    torch.export.save(make(), path)
    with pytest.raises(CaptureError, match=message):
        build(str(path))


@pytest.mark.parametrize("name", ["w = print('seen')\n        ", "class", "__x", "a b"])
def test_names_that_are_code_are_refused(name, tmp_path):
    """A file may be anybody's."""

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(D, D)
            self.register_parameter(name, nn.Parameter(torch.ones(D)))

        def forward(self, x):
            return x + self.f(x) * self._parameters[name]

    path = saved(Named(), (X,), folder=tmp_path)
    with pytest.raises(CaptureError, match=r"is no name in Python|could not be read"):
        build(str(path))


def test_settings_and_files_that_are_not_there(tmp_path):
    with pytest.raises(ConfigError, match="a graph has no settings"):
        build("model.pt2", {"n": 1})
    with pytest.raises(ConfigError, match="There is no file"):
        build(str(tmp_path / "none.pt2"))


def test_from_one_process_to_another(tmp_path, here):
    """Saved here, rewritten by the command, trained and exported in a process that knows the folder alone."""
    (tmp_path / "x").mkdir()
    path = saved(Stack(), (X,), folder=tmp_path)
    done = here(str(path), "--variant", "rw+lr", "--rank", "4", "--profile-seconds", "0", "--out", str(tmp_path / "out"), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert all(check["passed"] is not False for check in report["verification"])
    code = f"""
import torch, onnxruntime, laurel_rewrite
model = laurel_rewrite.load({str(tmp_path / "out")!r})
x = torch.randn(4, 5, {D})
optimizer = torch.optim.AdamW(laurel_rewrite.param_groups(model, lr=1e-2, weight_decay=0.0))
losses = []
for step in range(20):
    loss = (model(x) - 1).square().mean()
    loss.backward(); optimizer.step(); optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < 0.5 * losses[0], losses
laurel_rewrite.export_onnx(model.eval(), (x,), None, {str(tmp_path / "trained.onnx")!r})
session = onnxruntime.InferenceSession({str(tmp_path / "trained.onnx")!r})
other = torch.randn(3, 5, {D})
found = session.run(None, {{session.get_inputs()[0].name: other.numpy()}})[0]
torch.testing.assert_close(torch.from_numpy(found), model(other).detach(), rtol=1e-4, atol=1e-5)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "x", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
