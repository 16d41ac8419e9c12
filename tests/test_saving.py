"""Saved and loaded again, without tracing, in this process and in a fresh one."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import away_from_start, output, real
from torch import nn
from toys import CASES, D

import laurel_rewrite
from laurel_rewrite import ConfigError, load, remove, rewrite, save
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.sources.models import build

FILES = {"modeling_laurel.py", "model.safetensors", "plan.toml", "laurel_config.json", "laurel_manifest.json"}


@pytest.mark.parametrize("name", ["gpt2", "bert", "falcon_sequential", "t5"])
def test_transformers_models_come_back_from_their_configuration(name, tmp_path):
    example = real(name)
    model = away_from_start(rewrite(example.model, example.args, example.kwargs, variant="rw+lr+pa", rank=4))
    save(model, tmp_path / "out")
    generates = {"generation_config.json"} if example.model.can_generate() else set()
    assert {p.name for p in (tmp_path / "out").iterdir()} == FILES | {"base_config.json"} | generates
    loaded = load(tmp_path / "out")
    assert loaded.training
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert torch.equal(output(loaded, example.other_args, example.other_kwargs), output(model, example.other_args, example.other_kwargs))
    if name == "gpt2":  # tied weights stay tied
        assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_what_a_configuration_of_transformers_leaves_out_comes_back_too(tmp_path):
    example = real("gpt2")
    example.model.set_attn_implementation("eager")
    example.model.generation_config.max_length = 77
    save(rewrite(example.model, example.args, example.kwargs, rank=4), tmp_path)
    loaded = load(tmp_path)
    assert loaded.config._attn_implementation == "eager"
    assert loaded.generation_config.max_length == 77


@pytest.mark.parametrize("spec", ["torchvision:resnet18", "timm:vit_tiny_patch16_224", "hf:gptj"])
def test_named_architectures_come_back_from_their_name(spec, tmp_path):
    settings = {"n_layer": 2, "n_embd": 32, "n_head": 4, "rotary_dim": 4, "vocab_size": 99} if spec == "hf:gptj" else {}
    built = build(spec, settings)
    model = away_from_start(rewrite(built.model, built.args, built.kwargs, rank=4))
    save(model, tmp_path, built=built)
    assert {p.name for p in tmp_path.iterdir()} == FILES
    assert json.loads((tmp_path / "laurel_config.json").read_text())["model"]["spec"] == spec
    kwargs = {k: v % 90 for k, v in built.kwargs.items()}
    assert torch.equal(output(load(tmp_path), built.args, kwargs), output(model, built.args, kwargs))


@pytest.mark.parametrize("name", ["helper", "loop", "tied", "images", "transformer_layer"])
def test_any_importable_module_comes_back_from_its_skeleton(name, tmp_path):
    case = CASES[name]
    x = torch.randn(case.shape)
    model = away_from_start(rewrite(case.make(), (x,), variant="rw+lr+pa", rank=4))
    save(model, tmp_path)
    assert (tmp_path / "skeleton.pt").stat().st_size < 60_000  # no weights in it
    loaded = load(tmp_path)
    assert torch.equal(output(loaded, (x,)), output(model, (x,)))
    assert all(p.is_contiguous() for p in loaded.parameters())


def test_load_on_the_meta_device_reads_no_weights(tmp_path):
    example = real("gpt2")
    save(rewrite(example.model, (), example.kwargs, rank=4), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    model = load(tmp_path, device="meta")
    assert all(p.is_meta for p in model.parameters())
    assert len(sites_of(model)) == 6


def test_a_loaded_model_trains_is_saved_again_and_can_be_undone(tmp_path):
    example = real("llama")
    save(rewrite(example.model, (), example.kwargs, variant="rw+lr+pa", rank=4), tmp_path / "one")
    model = load(tmp_path / "one")
    away_from_start(model)
    model(**example.kwargs, labels=example.kwargs["input_ids"]).loss.backward()
    assert all(p.grad is not None for m in sites_of(model).values() for p in m.parameters())
    save(model, tmp_path / "two")
    again = load(tmp_path / "two")
    assert torch.equal(output(again, (), example.kwargs), output(model, (), example.kwargs))
    base = remove(again)
    assert torch.equal(output(base, (), example.kwargs), output(example.model, (), example.kwargs))
    assert type(base) is type(example.model)


def test_a_file_travels_with_its_folder(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "travelling_layers.py").write_text(
        "import torch\n\n\nclass Layer(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.linear = torch.nn.Linear(16, 16)\n\n"
        "    def forward(self, x):\n        return x + self.linear(x)\n"
    )
    (source / "travelling.py").write_text(
        "import torch\nfrom travelling_layers import Layer\n\n\ndef build_model():\n    return torch.nn.Sequential(Layer(), Layer())\n\n\ndef example_inputs():\n    return (torch.randn(2, 16),)\n"
    )
    built = build(str(source / "travelling.py"))
    model = away_from_start(rewrite(built.model, built.args, rank=4))
    out = tmp_path / "out"
    save(model, out, built=built)
    assert {"travelling.py", "travelling_layers.py"} <= {p.name for p in out.iterdir()}
    for file in source.iterdir():
        if file.suffix == ".py":
            file.unlink()
    x = torch.randn(3, 16)
    (tmp_path / "x.pt").write_bytes(b"")
    torch.save((x, output(model, (x,))), tmp_path / "x.pt")
    code = (
        f"import laurel_rewrite, torch; x, y = torch.load({str(tmp_path / 'x.pt')!r}); model = laurel_rewrite.load({str(out)!r}).eval(); "
        "assert torch.equal(model(x), y); print('same')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout.strip() == "same", done.stderr


def test_dtypes_are_kept(tmp_path):
    model = rewrite(CASES["plain"].make().to(torch.bfloat16), (torch.randn(2, 5, D, dtype=torch.bfloat16),), rank=4)
    save(model, tmp_path)
    assert {p.dtype for p in load(tmp_path).parameters()} == {torch.bfloat16}


def test_an_edited_class_is_what_is_loaded(tmp_path):
    x = torch.randn(2, 5, D)
    model = rewrite(CASES["child"].make(), (x,), rank=4)
    save(model, tmp_path)
    file = tmp_path / "modeling_laurel.py"
    file.write_text(file.read_text().replace("return self.laurel_0(x, self.f(x))", "return 2 * self.laurel_0(x, self.f(x))"))
    assert torch.equal(output(load(tmp_path), (x,)), 2 * output(model, (x,)))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "plan.toml").unlink(), "plan.toml is missing"),
        (lambda d: (d / "laurel_config.json").write_text("{"), "is damaged"),
        (
            lambda d: (d / "laurel_config.json").write_text((d / "laurel_config.json").read_text() + " "),
            "not the file that was written with",
        ),
        (lambda d: (d / "model.safetensors").write_bytes(b"\0" * 999), "not the file that was written with the others"),
        (lambda d: (d / "laurel_manifest.json").write_text("[]"), "must be a table"),
        (lambda d: (d / "modeling_laurel.py").write_text("class Other: pass\n"), "has no class Plain"),
        (lambda d: (d / "skeleton.pt").unlink(), "skeleton.pt cannot be read"),
        (lambda d: (d / "plan.toml").write_text((d / "plan.toml").read_text().replace("rank = 4", "rank = 2")), "does not fit the model"),
    ],
)
def test_damage_is_named(damage, message, tmp_path):
    save(rewrite(CASES["plain"].make(), (torch.randn(2, 5, D),), rank=4), tmp_path)
    damage(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path)


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(ConfigError, match="was not made by laurel_rewrite"):
        save(CASES["plain"].make(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with torch.device("meta"):
        model, x = CASES["plain"].make(), torch.randn(2, 5, D)
    with pytest.raises(ConfigError, match="meta device"):
        save(rewrite(model, (x,), rank=4), tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        save(rewrite(CASES["plain"].make(), (torch.randn(2, 5, D),), rank=4), tmp_path / "file")


def test_importing_the_package_is_light():
    code = "import sys, laurel_rewrite, laurel_rewrite.app.cli; print([m for m in ('torch', 'onnxruntime', 'rich', 'onnx') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    assert set(laurel_rewrite.__all__) <= set(dir(laurel_rewrite))
    assert all(getattr(laurel_rewrite, name) is not None for name in laurel_rewrite.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = laurel_rewrite.nothing


class Parametrised(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        self.conv = nn.utils.parametrizations.spectral_norm(nn.Conv1d(16, 16, 1))
        self.kernel = torch.nn.attention.SDPBackend.MATH

    def forward(self, x):
        x = x + self.linear(x)
        return x + self.conv(x.transpose(1, 2)).transpose(1, 2)


def test_parametrised_modules_and_enumerations_are_saved(tmp_path):
    x = torch.randn(2, 5, 16)
    better = away_from_start(rewrite(Parametrised(), (x,), rank=4).eval())
    save(better, tmp_path)
    again = load(tmp_path).eval()
    assert torch.equal(again(x), better(x))
    assert again.kernel == better.kernel


def test_a_loaded_model_pickles(tmp_path):
    """In a process that never saw the folder, too."""
    example = real("gpt2")
    save(away_from_start(rewrite(example.model, (), example.kwargs, variant="rw+lr+pa", rank=4)), tmp_path / "saved")
    model = load(tmp_path / "saved").eval()
    torch.save(model, tmp_path / "model.pt")
    torch.save(example.kwargs, tmp_path / "inputs.pt")
    shutil.rmtree(tmp_path / "saved")
    code = (
        "import sys, torch, warnings; warnings.simplefilter('ignore');"
        "from laurel_rewrite.sources.built import declare_torchvision_ops; declare_torchvision_ops();"
        "model, inputs = (torch.load(f'{sys.argv[1]}/{n}.pt', weights_only=False) for n in ('model', 'inputs'));"
        "torch.save(model(**inputs).logits, f'{sys.argv[1]}/logits.pt')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert torch.allclose(torch.load(tmp_path / "logits.pt"), model(**example.kwargs).logits, rtol=1e-5, atol=1e-6)


def test_models_of_one_folder_that_is_loaded_twice_pickle(tmp_path):
    case = CASES["helper"]
    x = torch.randn(case.shape)
    save(away_from_start(rewrite(case.make(), (x,), rank=4)), tmp_path)
    loaded = [load(tmp_path), load(tmp_path)]
    for model in loaded:
        assert torch.equal(output(pickle.loads(pickle.dumps(model)), (x,)), output(model, (x,)))


def test_an_owner_without_a_class_in_the_folder_is_refused(tmp_path):
    """Its connections would be there, and nothing would call them."""
    save(rewrite(CASES["plain"].make(), (torch.randn(2, 5, D),), rank=4), tmp_path)
    config = json.loads((tmp_path / "laurel_config.json").read_text())
    config["classes"] = {}
    (tmp_path / "laurel_config.json").write_text(json.dumps(config))
    (tmp_path / "laurel_manifest.json").unlink()
    with pytest.raises(ConfigError, match="no class is named for the model, so that its connections would not be called"):
        load(tmp_path)
