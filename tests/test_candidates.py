"""What models are trained for, and what is compared: from one seed all begin alike."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import output, real
from test_lab import GPT, OWN, SMALL
from torch import nn

from laurel_rewrite import ConfigError, LaurelConfig
from laurel_rewrite.lab.candidates import UNCHANGED, Candidate, Source, control, variants
from laurel_rewrite.lab.tasks import CLASSES, MASKED, NEXT, check, logits_of, task_of
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.sources.built import Built
from laurel_rewrite.sources.models import build


def of(name: str) -> Built:
    example = real(name)
    return Built(example.model, example.args, example.kwargs, name)


@pytest.mark.parametrize(
    ("name", "objective", "labels"),
    [("gpt2", NEXT, True), ("llama", NEXT, True), ("bert", MASKED, False), ("resnet18", CLASSES, False)],
)
def test_what_a_model_is_trained_for(name, objective, labels):
    built = of(name)
    task = task_of(built)
    assert (task.objective, task.labels) == (objective, labels)
    assert built.model.training
    if objective == CLASSES:
        with pytest.raises(ConfigError, match="--length is for models that take tokens"):
            task_of(built, 100)


def test_the_loss_of_logits_is_the_models_own():
    built = of("gpt2")
    task = task_of(built, 16)
    ids = torch.randint(0, 90, (3, 16))
    own = task.loss(built.model.eval(), {"input_ids": ids})
    logits = built.model(ids).logits
    expected = nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))
    torch.testing.assert_close(own, expected, rtol=1e-6, atol=0)  # float32, the same sums
    assert math.isfinite(check(task, built.model, {"input_ids": ids}, "gpt2"))


def test_masks_belong_to_the_example_whoever_asks():
    task = task_of(of("bert"), 20)
    data = [{"input_ids": torch.arange(20) + 20 * n} for n in range(3)]
    first, again = task.examples(data, 98), task.examples(data, 98)
    for number in (0, 1, 4):
        item = first[number]
        assert torch.equal(item["input_ids"], again[number]["input_ids"])
        masked = item["input_ids"] == 98
        assert masked.sum() == 3
        assert torch.equal(item["labels"] != -100, masked)
        assert torch.equal(torch.where(masked, item["labels"], item["input_ids"]), data[number % 3]["input_ids"])
    assert not torch.equal(first[1]["labels"], first[4]["labels"])  # the same example, the next time


def test_outputs_without_logits_are_named():
    with pytest.raises(ConfigError, match=r"its outputs are \(2, 3\)"):
        logits_of((torch.zeros(2, 3),), torch.zeros(2, 5, dtype=torch.int64))


def test_candidates_of_a_seed_begin_alike():
    source = Source(lambda: build(GPT, SMALL))
    base = source.model(Candidate(UNCHANGED), 3)
    changed = source.model(Candidate("rw+lr", LaurelConfig("rw+lr", rank=2)), 3)
    own = changed.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in base.state_dict().items())
    assert len(sites_of(changed)) == 4
    ids = torch.randint(0, 256, (2, 32))
    assert torch.equal(output(base.eval(), (ids,), {}), output(changed.eval(), (ids,), {}))
    other = source.model(Candidate(UNCHANGED), 4)
    assert not torch.equal(other.tokens.weight, base.tokens.weight)


def test_a_comment_makes_no_other_model(tmp_path):
    def digest(text: str) -> str:
        (tmp_path / "net.py").write_text(text)
        return Source(lambda: build(str(tmp_path / "net.py"), {})).digest()

    plain = OWN.replace("LOSS", "batch['points'].mean()")
    said = plain.replace("class Net(nn.Module):", 'class Net(nn.Module):  # small\n    """A net."""\n')
    assert digest(said) == digest(plain)
    assert digest(plain.replace("* scale", "/ scale")) != digest(plain)


def test_the_layer_more_has_weights_of_its_own():
    taller = Source(lambda: build(GPT, SMALL)).model(control(), 0)
    assert len(taller.blocks) == 3
    assert not torch.equal(taller.blocks[1].mlp[0].weight, taller.blocks[2].mlp[0].weight)


def test_variants_and_values_make_candidates():
    source = Source(lambda: build(GPT, SMALL))
    found = variants(source, ["rw", "lr+rw", "pa"], {"rank": [2, 4], "history": [2]})
    assert [candidate.name for candidate in found] == ["rw", "rw+lr rank 2", "rw+lr rank 4", "pa rank 2", "pa rank 4"]
    with pytest.raises(ConfigError, match="None of rw has the option depth"):
        variants(source, ["rw"], {"depth": [2]})


# Comparisons
