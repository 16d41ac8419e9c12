"""transformers, all the way: what was rewritten saves, loads, trains and generates as its own models do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import away_from_start, output, real
from torch import nn

import laurel_rewrite
from laurel_rewrite import ConfigError, remove, rewrite
from laurel_rewrite.integrations.transformers import LaurelCallback, transformers
from laurel_rewrite.operators import registry
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.sources.models import build

AUTO = {"gpt2": "AutoModelForCausalLM", "llama": "AutoModelForCausalLM", "bert": "AutoModelForMaskedLM", "t5": "AutoModelForSeq2SeqLM"}


def moved(name: str, variant: str = "rw+lr+pa") -> tuple[nn.Module, Any]:
    example = real(name)
    return away_from_start(rewrite(example.model, example.args, example.kwargs, variant=variant, rank=4)).eval(), example


def same(found: nn.Module, right: nn.Module, example: Any) -> bool:
    return torch.equal(*(output(model, example.other_args, example.other_kwargs) for model in (found, right)))


# Folders


@pytest.mark.parametrize("name", AUTO)
def test_auto_classes_give_back_what_was_saved(name, tmp_path):
    model, example = moved(name)
    if name == "bert":  # for pre-training it has two heads
        heads = transformers.BertForMaskedLM(example.model.config)
        model = away_from_start(rewrite(heads, (), example.kwargs, variant="rw+lr+pa", rank=4)).eval()
    model.save_pretrained(tmp_path)
    found = getattr(transformers, AUTO[name]).from_pretrained(tmp_path)
    assert list(found.state_dict()) == list(model.state_dict())
    assert same(found, model, example)
    again = type(model).from_pretrained(tmp_path)
    assert type(again) is type(found)
    assert same(again, model, example)
    plain = remove(again)
    assert type(plain).__module__.startswith("transformers.models")
    assert not hasattr(plain.config, "laurel")
    assert not sites_of(plain)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_another_head_has_the_same_stream(name, tmp_path):
    """As for fine-tuning: paths begin otherwise there, and its own weights are new."""
    model, example = moved(name)
    model.save_pretrained(tmp_path / "pretrained")
    body = transformers.AutoModel.from_pretrained(tmp_path / "pretrained").eval()
    expected = model.base_model(**example.kwargs).last_hidden_state
    assert torch.equal(body(**example.kwargs).last_hidden_state, expected)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "pretrained").eval()
    assert torch.equal(classifier.base_model(**example.kwargs).last_hidden_state, expected)
    body.save_pretrained(tmp_path / "body")
    back = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "body").eval()
    assert torch.equal(back.base_model(**example.kwargs).last_hidden_state, expected)
    model.base_model.save_pretrained(tmp_path / "inside")
    inside = transformers.AutoModel.from_pretrained(tmp_path / "inside").eval()
    assert torch.equal(inside(**example.kwargs).last_hidden_state, expected)


def test_each_of_several_models_inside_one_saves_its_own_part(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = real("gpt2").model, real("llama").model

        def forward(self, input_ids):
            return self.one(input_ids).logits + self.other(input_ids).logits

    example = real("gpt2")
    both = away_from_start(rewrite(Two(), (example.kwargs["input_ids"],), variant="rw+lr+pa", rank=4)).eval()
    for name in ("one", "other"):
        model = getattr(both, name)
        model.save_pretrained(tmp_path / name)
        assert same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name), model, example)
    t5 = real("t5")
    model = away_from_start(rewrite(t5.model, (), t5.kwargs, variant="rw+lr+pa", rank=4)).eval()
    assert [row["id"] for row in model.encoder.config.laurel["plan"]["site"]] == [
        f"block.{n}.layer.{m}.laurel_0" for n in (0, 1) for m in (0, 1)
    ]


def rewritten_part(model: nn.Module, path: str, *args: Any, **kwargs: Any) -> None:
    part = rewrite(model.get_submodule(path), args, kwargs, variant="rw+lr+pa", rank=4, inplace=True)  # tied weights stay tied
    model.set_submodule(path, part)


def parts_of_gpt2() -> tuple[nn.Module, Any]:
    example = real("gpt2")
    rewritten_part(example.model, "transformer", **example.kwargs)
    return example.model, example


def parts_of_t5() -> tuple[nn.Module, Any]:
    """Two, one after the other, each a stream of its own."""
    example = real("t5")
    ids, hidden = example.kwargs["input_ids"], torch.randn(*example.kwargs["input_ids"].shape, example.model.config.d_model)
    rewritten_part(example.model, "decoder", input_ids=ids, encoder_hidden_states=hidden, use_cache=False)
    rewritten_part(example.model, "encoder", input_ids=ids)
    return example.model, example


def parts_of_llama() -> tuple[nn.Module, Any]:
    """Layers, which are no PreTrainedModel."""
    example = real("llama")
    body = example.model.model
    x = torch.randn(2, 5, body.config.hidden_size)
    places = torch.arange(5)[None]
    for number in (1, 0):
        rewritten_part(body, f"layers.{number}", x, position_embeddings=body.rotary_emb(x, places))
    return example.model, example


@pytest.mark.parametrize("made", [parts_of_gpt2, parts_of_t5, parts_of_llama])
def test_a_model_around_rewritten_parts_saves_them(made, tmp_path):
    model, example = made()
    away_from_start(model).eval()
    expected = output(model, example.other_args, example.other_kwargs)
    model.save_pretrained(tmp_path / "first")
    found = getattr(transformers, AUTO[example.model.config.model_type]).from_pretrained(tmp_path / "first")
    assert list(found.state_dict()) == list(model.state_dict())
    assert list(sites_of(found)) == list(sites_of(model))
    assert torch.equal(output(found, example.other_args, example.other_kwargs), expected)
    assert torch.equal(output(model, example.other_args, example.other_kwargs), expected)
    found.save_pretrained(tmp_path / "again")
    first, again = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "again"))
    assert first["laurel"] == again["laurel"]
    laurel_rewrite.save(model, tmp_path / "own")
    own = laurel_rewrite.load(tmp_path / "own").eval()
    assert torch.equal(output(own, example.other_args, example.other_kwargs), expected)
    plain = remove(model)
    assert not hasattr(plain.config, "laurel")
    plain.save_pretrained(tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["model_type"] == plain.config.model_type


def test_a_connection_that_came_from_another_model_cannot_be_saved(tmp_path):
    model, _ = moved("gpt2")
    other = real("gpt2").model
    other.transformer.h[1] = model.transformer.h[1]
    with pytest.raises(ConfigError, match=r"The connection transformer\.h\.1\.laurel_0 of this GPT2LMHeadModel was made in another model"):
        other.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


ELSEWHERE = """
import sys, torch
from laurel_rewrite.sources.built import declare_torchvision_ops
declare_torchvision_ops()
import transformers
folder, how, threads = sys.argv[1:]
torch.set_num_threads(int(threads))  # bit for bit is asked, and how a sum is cut depends on them
if how == "imported":
    import laurel_rewrite.integrations.transformers
kwargs, expected = torch.load(folder + "/expected.pt")
cls = transformers.GPT2LMHeadModel if how == "by its own class" else transformers.AutoModelForCausalLM
model = cls.from_pretrained(folder, **({"trust_remote_code": True} if how == "trusted" else {})).eval()
print("same" if torch.equal(model(**kwargs).logits, expected) else "other")
"""


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("imported", "same"),
        ("trusted", "same"),
        ("neither", "trust_remote_code=True"),
        ("by its own class", "were rewritten by laurel-rewrite"),
    ],
)
def test_a_fresh_process_has_laurel_or_an_error(how, said, tmp_path):
    """Never the model without it: transformers alone drops the weights that it does not know, with a report."""
    model, example = moved("gpt2")
    model.save_pretrained(tmp_path)
    torch.save((dict(example.kwargs), model(**example.kwargs).logits), tmp_path / "expected.pt")
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path), how, str(torch.get_num_threads())],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )
    assert said in (done.stdout if said == "same" else done.stderr), done.stderr
    assert (done.returncode == 0) == (said == "same")


def test_an_edited_source_is_for_those_who_trust_it(tmp_path):
    model, example = moved("gpt2", "rw+lr")
    model.save_pretrained(tmp_path)
    source = tmp_path / "modeling_laurel.py"
    text = source.read_text()
    assert "self.laurel_1(residual, feed_forward_hidden_states)" in text
    source.write_text(text.replace("self.laurel_1(residual, feed_forward_hidden_states)", "residual + feed_forward_hidden_states"))
    with pytest.raises(ConfigError, match="was edited, so that what runs is that file's own: load it with trust_remote_code=True"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    trusted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert not same(trusted, model, example)
    trusted.save_pretrained(tmp_path / "again")
    with pytest.raises(ConfigError, match="its classes were edited"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert same(again, trusted, example)


OPERATOR = """
import torch
from torch import nn
from laurel_rewrite import Connection, register_operator

@register_operator
class Halved(Connection):
    name = "halved"
    formula = "x + a*f"
    start = "exact"

    def build(self):
        self.a = nn.Parameter(torch.ones(1))

    def step(self, x, f):
        return x + self.a * f
"""
KNOWN = """
import sys
from laurel_rewrite.sources.built import declare_torchvision_ops
declare_torchvision_ops()
import laurel_rewrite.integrations.transformers
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **({"trust_remote_code": True} if sys.argv[2] == "trusted" else {}))
print(float(model.transformer.h[0].laurel_0.a))
"""


def test_an_operator_of_a_file_comes_with_the_model(tmp_path):
    example = real("gpt2")
    (tmp_path / "halved.py").write_text(OPERATOR)
    laurel_rewrite.load_operators(tmp_path / "halved.py")
    try:
        model = rewrite(example.model, (), example.kwargs, variant="halved")
        with torch.no_grad():
            model.transformer.h[0].laurel_0.a.fill_(0.5)
        model.save_pretrained(tmp_path / "saved")
    finally:
        registry.forget(["halved"])
    (tmp_path / "halved.py").unlink()
    trusted, not_trusted = (
        subprocess.run([sys.executable, "-c", KNOWN, str(tmp_path / "saved"), how], capture_output=True, text=True, timeout=300)
        for how in ("trusted", "not")
    )
    assert trusted.stdout.strip().endswith("0.5"), trusted.stderr
    assert "the operator 'halved' is not known here" in not_trusted.stderr


def edited(config: dict[str, Any], *path: Any, value: Any) -> None:
    for key in path[:-1]:
        config = config[key]
    config[path[-1]] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("laurel", "edits", "functions", 0, "digest"), "0" * 64, "is not the one that was edited; it belongs to another version"),
        (("laurel", "edits", "spans", 0, 2), 999, "cannot be edited as it was|damaged edits"),
        (
            ("laurel", "edits", "classes", 0, "owners", 0),
            "transformer.h.9",
            "names the module 'transformer.h.9'.* Nearest: transformer.h.2",
        ),
        (("laurel", "edits", "classes", 0, "changes", 0, "name"), "x; import os", "name must be a name"),
        (("laurel", "edits"), 5, "edits must be a table, not 5"),
        (("laurel", "edits", "classes", 0), 5, "must be a table, not 5|classes must be"),
        (("laurel", "plan", "site", 0, "owner"), "transformer.h.9", "the id does not begin with the owner"),
        (("laurel", "plan", "defaults", "variant"), "rw+lrr", "rw\\+lrr"),
        (("laurel", "version"), 7, "version must be one of 1, not 7"),
        (("laurel", "base_type"), "gpt22", "knows no model of type 'gpt22'"),
        (("laurel",), None, "must be a table, not None"),
        (("n_layer",), 2, "names the module 'transformer.h.2'"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(path, value, message, tmp_path):
    model, _ = moved("gpt2", "rw+lr")
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    edited(config, *path, value=value)
    file.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_weights_that_a_checkpoint_has_not_start_as_they_should(tmp_path):
    example = real("gpt2")
    example.model.save_pretrained(tmp_path)
    model = rewrite(example.model, example.args, example.kwargs, variant="rw+lr", rank=4)
    found = type(model).from_pretrained(tmp_path, config=model.config)
    assert same(found, example.model, example)
    for site, connection in sites_of(found).items():
        for name, parameter in connection.named_parameters():
            assert torch.equal(parameter, model.get_parameter(f"{site}.{name}"))
    fresh = transformers.AutoModelForCausalLM.from_config(model.config)
    assert list(fresh.state_dict()) == list(model.state_dict())


def test_a_checkpoint_is_a_model_of_the_command(tmp_path):
    example = real("gpt2")
    example.model.save_pretrained(tmp_path / "base")
    built = build(f"hf:{tmp_path / 'base'}")
    assert built.weights == "weights of base"
    assert build("hf:gpt2", {"n_layer": 1, "n_embd": 8, "n_head": 1, "vocab_size": 9}).weights == "random weights"
    assert same(built.model, example.model, example)
    laurel_rewrite.save(rewrite(built.model, built.args, built.kwargs, rank=4), tmp_path / "out", built=built)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    assert same(laurel_rewrite.load(tmp_path / "out"), example.model, example)
    with pytest.raises(ConfigError, match=r"is no folder with a config\.json"):
        build(f"hf:{tmp_path / 'base'}")
    with pytest.raises(ConfigError, match="--set is for architectures with random ones"):
        build(f"hf:{tmp_path / 'elsewhere'}", {"n_layer": 1})
    (tmp_path / "elsewhere" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ConfigError, match="could not be loaded"):
        build(f"hf:{tmp_path / 'elsewhere'}")


# Training


class Lines(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, 90, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def trainer(folder: Path, model: nn.Module, steps: int, **options: Any) -> Any:
    args = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, weight_decay=0.1, logging_steps=1,
        save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, seed=1, dataloader_pin_memory=False,
    )  # fmt: skip
    return transformers.Trainer(model, args, train_dataset=Lines(), **options)


def losses(done: Any) -> list[float]:
    return [row["loss"] for row in done.state.log_history if "loss" in row]


def test_trainer_trains_saves_and_resumes_to_the_same_losses(tmp_path, caplog, capsys, monkeypatch):
    def begun() -> nn.Module:
        example = real("gpt2")
        return rewrite(example.model, example.args, example.kwargs, variant="rw+lr+pa", rank=4)

    reporter = Reporter()
    monkeypatch.setattr(transformers.trainer, "get_reporting_integration_callbacks", lambda report_to: [reporter])
    whole = trainer(tmp_path / "whole", begun(), 6, callbacks=[LaurelCallback(every=2)])
    whole.train()
    mixing = {id(p) for c in sites_of(whole.model).values() for p in c.parameters() if p.ndim < 2}
    decayed, plain = whole.optimizer.param_groups
    assert decayed["weight_decay"] == 0.1
    assert not mixing & {id(p) for p in decayed["params"]}
    assert mixing <= {id(p) for p in plain["params"]}
    assert "mixing weights" not in caplog.text  # no warning
    logged = [row for row in whole.state.log_history if "laurel/transformer.h.0.laurel_0/a" in row]
    assert [row["step"] for row in logged] == [1, 3, 5]
    assert [key in row for row in reporter.seen if "loss" in row for key in logged[0] if key.startswith("laurel/")].count(True) == 3 * 42
    assert "laurel/" not in capsys.readouterr().out
    assert logged[0]["laurel/transformer.h.0.laurel_0/a"] != logged[-1]["laurel/transformer.h.0.laurel_0/a"]

    part = trainer(tmp_path / "part", begun(), 6)
    part.add_callback(Stop())
    part.train()
    assert len(losses(part)) == 4
    resumed = trainer(tmp_path / "part", begun(), 6)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    assert all(torch.equal(*pair) for pair in zip(resumed.model.parameters(), whole.model.parameters(), strict=True))

    checkpoint = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "part" / "checkpoint-6")
    example = real("gpt2")
    assert same(checkpoint, resumed.model, example)


def test_trainer_counts_the_steps_of_annealing(tmp_path):
    example = real("gpt2")
    model = rewrite(example.model, example.args, example.kwargs, variant="layerscale", anneal="linear", anneal_steps=9)
    trainer(tmp_path, model, 2).train()
    resumed = trainer(tmp_path, model, 3)
    resumed.train(resume_from_checkpoint=True)
    assert {int(site.annealed) for site in sites_of(resumed.model).values()} == {3}


class Reporter(transformers.TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


class Stop(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 4


def test_a_callback_warns_of_an_optimiser_that_decays_mixing_weights(tmp_path, caplog):
    model, _ = moved("gpt2", "rw")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    trainer(tmp_path, model, 1, optimizers=(optimizer, None), callbacks=[LaurelCallback()]).train()
    assert "param_groups" in caplog.text


# Generation


@pytest.mark.parametrize("variant", ["rw+lr", "rw+lr+pa"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_every_kind_of_generation_is_that_without_a_cache(name, variant):
    model, _ = moved(name, variant)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    ids = torch.randint(3, 90, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # padded on the left
    given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    plain = model.generate(**given, use_cache=False)
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}, {"cache_implementation": "dynamic"}):
        assert torch.equal(model.generate(**given, **options), plain), options
    beams = model.generate(**given, num_beams=3, use_cache=False)
    assert torch.equal(model.generate(**given, num_beams=3), beams)
    one = {"input_ids": ids[1:2], "max_new_tokens": 6, "do_sample": False}
    assistant = real(name).model.eval()
    assistant.generation_config.pad_token_id = 0
    assert torch.equal(model.generate(**one, assistant_model=assistant), plain[1:2])
