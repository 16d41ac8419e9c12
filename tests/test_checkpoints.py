"""Which weights a folder has, where they come from, and which model they go into: base to rewritten and back, shards, no values at all."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from conftest import away_from_start, output, real
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from toys import CASES, D

from laurel_rewrite import ConfigError, load, remove, rewrite, save
from laurel_rewrite.operators.connections import sites_of

OTHER = 7  # seed of another base model


def base(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return CASES["plain"].make()


def moved(variant: str = "rw+lr+pa") -> nn.Module:
    return away_from_start(rewrite(base(), (torch.randn(2, 5, D),), variant=variant, rank=4))


def x() -> torch.Tensor:
    return torch.randn(3, 4, D, generator=torch.Generator().manual_seed(1))


def test_the_weights_of_connections_alone_go_into_any_base_model(tmp_path):
    model = moved()
    save(model, tmp_path, weights="operators")
    names = set(load_file(tmp_path / "laurel.safetensors"))
    assert names == {f"{site}.{name}" for site, c in sites_of(model).items() for name, _ in c.named_parameters()}
    assert not (tmp_path / "model.safetensors").exists()
    assert json.loads((tmp_path / "laurel_config.json").read_text())["weights"] == "operators"

    other = base(OTHER)
    expected = output(other, (x(),))
    right = copy.deepcopy(other)
    better = load(tmp_path, base=other)
    assert better is other
    for name, parameter in right.named_parameters():
        assert torch.equal(better.get_parameter(name), parameter)
    for name in names:
        assert torch.equal(better.get_parameter(name), model.get_parameter(name))
    assert not torch.equal(output(better, (x(),)), expected)
    assert torch.equal(output(remove(better), (x(),)), expected)
    model.load_state_dict(better.state_dict())
    assert torch.equal(output(better, (x(),)), output(model, (x(),)))
    save(better, tmp_path / "whole")
    assert torch.equal(output(load(tmp_path / "whole"), (x(),)), output(better, (x(),)))


def test_a_whole_folder_gives_a_base_model_its_connections_alone(tmp_path):
    save(moved("rw+lr"), tmp_path)
    other = base(OTHER).bfloat16()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    better = load(tmp_path, base=other)
    assert all(torch.equal(better.state_dict()[name], value) for name, value in before.items())
    assert {p.dtype for p in better.parameters()} == {torch.bfloat16}
    with pytest.raises(ConfigError, match="was rewritten already"):
        load(tmp_path, base=better)


@pytest.mark.parametrize("kept", ["operators", "none"])
def test_too_few_weights_are_an_error_that_says_what_to_give(kept, tmp_path):
    save(moved(), tmp_path, weights=kept)
    with pytest.raises(ConfigError, match=r"load\(folder, base=model\)"):
        load(tmp_path)
    empty = load(tmp_path, device="meta")
    assert all(p.is_meta for p in empty.parameters())
    empty.to_empty(device="cpu")
    model = rewrite(base(), (torch.randn(2, 5, D),), variant="rw+lr+pa", rank=4)
    for site, connection in sites_of(empty).items():
        for name, parameter in connection.named_parameters():
            assert torch.equal(parameter, model.get_parameter(f"{site}.{name}"))
    with pytest.raises(ConfigError, match="weights must be one of all, operators, none"):
        save(moved(), tmp_path / "other", weights="some")


def test_a_model_without_values_is_saved_without_or_with_those_that_are_given(tmp_path):
    model = moved()
    empty = copy.deepcopy(model).to("meta")
    with pytest.raises(ConfigError, match=r'is on the meta device and has no values to save.*weights="none"'):
        save(empty, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    save(empty, tmp_path / "recipe", weights="none")
    save(empty, tmp_path / "out", state_dict=model.state_dict())
    assert torch.equal(output(load(tmp_path / "out"), (x(),)), output(model, (x(),)))
    started = load(tmp_path / "recipe", base=base(OTHER))
    assert torch.equal(output(started, (x(),)), output(base(OTHER), (x(),)))  # an exact start


@pytest.mark.parametrize("wrong", ["missing", "unknown", "shape", "kind"])
def test_a_state_dict_of_another_model_is_refused(wrong, tmp_path):
    model = moved()
    state = dict(model.state_dict())
    first = next(iter(state))
    if wrong == "missing":
        del state[first]
    elif wrong == "unknown":
        state["module." + first] = state[first]
    elif wrong == "shape":
        state[first] = state[first][:1]
    else:
        state[first] = "no tensor"
    with pytest.raises(ConfigError, match="state dict"):
        save(model, tmp_path / "out", state_dict=state)
    assert not (tmp_path / "out").exists()


def test_tied_weights_and_views_are_written_once(tmp_path):
    example = real("gpt2")
    model = away_from_start(rewrite(example.model, example.args, example.kwargs, rank=4))
    save(model, tmp_path, state_dict=model.state_dict())
    assert len(load_file(tmp_path / "model.safetensors")) == len(model.state_dict()) - 1
    loaded = load(tmp_path)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert torch.equal(output(loaded, (), example.other_kwargs), output(model, (), example.other_kwargs))


def test_weights_that_were_tied_once_are_named(tmp_path):
    """As where a rewritten copy of the model's body was put in its place: the head keeps the first one's embedding."""
    example = real("gpt2")
    example.model.transformer = rewrite(example.model.transformer, (), example.kwargs, rank=4)
    save(example.model, tmp_path)
    with pytest.raises(ConfigError, match=r"own for lm_head.weight and transformer.wte.weight, which are one in the model"):
        load(tmp_path)


@pytest.mark.parametrize("fault", ["torn", "another", "version", "weights"])
def test_a_folder_that_does_not_fit_leaves_the_base_model_as_it_was(fault, tmp_path):
    save(moved(), tmp_path, weights="operators")
    other = base(OTHER)
    config = tmp_path / "laurel_config.json"
    if fault == "torn":
        file = tmp_path / "laurel.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    elif fault == "another":
        other = nn.Sequential(nn.Linear(D, D))
    elif fault == "version":
        config.write_text(config.read_text().replace('"format": 2', '"format": 9'))
    else:
        (tmp_path / "laurel.safetensors").unlink()
    before, classes = copy.deepcopy(other.state_dict()), [type(module) for module in other.modules()]
    with pytest.raises(ConfigError):
        load(tmp_path, base=other)
    assert list(other.state_dict()) == list(before)
    assert [type(module) for module in other.modules()] == classes


# Adapters


def lora(model: nn.Module) -> nn.Module:
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return adapted


def test_a_model_that_an_adapter_was_merged_into_is_saved(tmp_path):
    """Adapted before the rewrite, so that what is inside the wrapper is what is left."""
    example = real("gpt2")
    adapted = lora(example.model)
    model = away_from_start(rewrite(adapted, (), example.kwargs, variant="rw+lr+pa", rank=4))
    expected = output(model, (), example.other_kwargs)
    merged = model.merge_and_unload()
    torch.testing.assert_close(output(merged, (), example.other_kwargs), expected, rtol=1e-5, atol=1e-5)  # float32 in another order
    save(merged, tmp_path / "ours")
    merged.save_pretrained(tmp_path / "theirs")
    found = type(merged).from_pretrained(tmp_path / "theirs")
    for again in (load(tmp_path / "ours"), found):
        assert torch.equal(output(again, (), example.other_kwargs), output(merged, (), example.other_kwargs))


def test_what_stands_around_a_rewritten_model_is_named(tmp_path):
    example = real("gpt2")
    adapted = lora(away_from_start(rewrite(example.model, (), example.kwargs, rank=4)))
    with pytest.raises(ConfigError, match=r"What is inside, at 'base_model\.model', was: take off what is around it"):
        save(adapted, tmp_path)
    merged = adapted.merge_and_unload()
    save(merged, tmp_path)
    assert torch.equal(output(load(tmp_path), (), example.other_kwargs), output(merged, (), example.other_kwargs))


def test_a_part_of_a_model_is_saved_by_itself(tmp_path):
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = base(), nn.Linear(D, 2)

        def forward(self, x):
            return self.head(self.encoder(x))

    torch.manual_seed(0)
    model = away_from_start(rewrite(Classifier(), (torch.randn(2, 5, D),), variant="rw+lr+pa", rank=4))
    save(model.encoder, tmp_path)
    assert torch.equal(output(load(tmp_path), (x(),)), output(model.encoder, (x(),)))


def test_wrappers_of_torch_are_looked_through(tmp_path):
    model = moved()
    save(nn.DataParallel(torch.compile(model, backend="eager")), tmp_path)
    assert torch.equal(output(load(tmp_path), (x(),)), output(model, (x(),)))
