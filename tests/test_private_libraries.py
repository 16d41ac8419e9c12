"""What transformers and the engines promise nobody, by what it does, as the package relies on it: the rest of `laurel_rewrite/private.py`."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from torch import nn

from laurel_rewrite import private


def test_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9, n_positions=8)
    model = private.built_from(transformers.AutoModelForCausalLM, config)
    assert type(model) is type(private.built_from(transformers.GPT2LMHeadModel, config))
    assert type(config) in private.models_of_configurations(transformers.AutoModelForCausalLM)
    assert hasattr(private.models_of_configurations(transformers.AutoModelForCausalLM), "register")
    assert private.models_of_configurations(transformers.GPT2Config) is None
    assert private.attention_of(model.config) == "sdpa"
    assert private.attention_of(private.built_from(transformers.GPT2LMHeadModel, config, attn_implementation="eager").config) == "eager"
    assert private.name_or_path(config) == ""
    model.save_pretrained(tmp_path)
    assert private.name_or_path(transformers.AutoConfig.from_pretrained(tmp_path)) == str(tmp_path)


def test_init_weights_leaves_alone_what_has_the_mark():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9, n_positions=8)
    model = transformers.GPT2Model(config)
    extra = nn.Linear(8, 8)
    other = nn.Linear(8, 8)
    model.extra, model.other = extra, other
    for module in model.modules():
        for thing in (module, *module.parameters(recurse=False)):
            setattr(thing, private.HF_INITIALIZED, module is not other)
    for layer in (extra, other):
        nn.init.constant_(layer.weight, 7.0)
    model.init_weights()
    assert (extra.weight == 7).all()
    assert not (other.weight == 7).any()


def test_accelerate_has_a_state_of_its_own_for_a_while():
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState

    with private.own_accelerator_state():
        accelerate.Accelerator(cpu=True, mixed_precision="bf16")
        before = dict(AcceleratorState._shared_state)
        with private.own_accelerator_state():
            assert accelerate.Accelerator(cpu=True, mixed_precision="no").mixed_precision == "no"
        assert AcceleratorState._shared_state == before
        assert AcceleratorState().mixed_precision == "bf16"


def test_torchtitan_and_onnx2torch_by_their_registries():
    converters = SimpleNamespace(_registry_model_converter_cls={"laurel": object})
    assert "laurel" in private.known_model_converters(converters)
    specs = SimpleNamespace(_extra_train_specs={"llama3": 1})
    private.forget_training_spec(specs, "llama3")
    private.forget_training_spec(specs, "llama3")
    assert specs._extra_train_specs == {}  # the real ones: tests/test_torchtitan.py
    pytest.importorskip("onnx")
    from laurel_rewrite.backends.onnx.converters import onnx2torch

    try:
        onnx2torch()
    except Exception:
        pytest.skip("onnx2torch is not installed")
    registry = sys.modules["onnx2torch.node_converters.registry"]
    description = registry.OperationDescription(domain="", operation_type="Relu", version=14)
    assert description in private.known_converters(registry)
