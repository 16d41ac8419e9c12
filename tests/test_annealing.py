"""Annealing: any operator takes over from the plain sum, step by step, and a checkpoint goes on where it was."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import laurel_rewrite
from laurel_rewrite import ConfigError, advance_annealing, learned, rewrite
from laurel_rewrite.operators.annealing import Annealing
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.testing import Stack, check_operator, equal, gradients_of, moved, near
from laurel_rewrite.testing.stacks import AttentionStack

D = 16
STEPS = 8


def annealed(variant: str, stack: type = Stack, **options: object):
    torch.manual_seed(0)
    base = stack().eval()
    x = torch.randn(2, 5, D)
    better = rewrite(base, (x,), variant=variant, anneal="linear", anneal_steps=STEPS, **options)
    return base, moved(better).eval().double(), torch.randn(3, 4, D, dtype=torch.float64)


def steps_done(model: torch.nn.Module, count: int) -> None:
    for module in sites_of(model).values():
        module.annealed.fill_(count)


@pytest.mark.parametrize(("variant", "stack"), [("gru", Stack), ("layerscale", Stack), ("hc", Stack), ("dca", AttentionStack)])
def test_it_begins_as_the_model_and_ends_as_the_operator(variant, stack):
    base, model, x = annealed(variant, stack)
    steps_done(model, 0)
    near(model(x), base.double()(x), 1e-12)
    steps_done(model, STEPS + 5)
    torch.manual_seed(0)
    alone = rewrite(stack().eval(), (torch.randn(2, 5, D),), variant=variant).double().eval()
    for name, module in sites_of(alone).items():
        own = sites_of(model)[name].state_dict()
        del own["annealed"]
        module.load_state_dict(own)
    near(model(x), alone(x), 1e-12)
    equal(gradients_of(model, model(x)), gradients_of(alone, alone(x)), 1e-10)


@pytest.mark.parametrize(("shape", "share"), [("linear", 0.25), ("cosine", 0.14644660940672624)])
def test_a_quarter_of_the_way(shape, share):
    """x' = (1 - t) (x + f) + t ((1 - T) x + T f), by hand."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, D)
    model = moved(rewrite(Stack(), (x,), variant="highway", anneal=shape, anneal_steps=STEPS)).double().eval()
    steps_done(model, STEPS // 4)
    value = x = x.double()
    for block in model.blocks:
        for connection, branch in ((block.laurel_0, block.f), (block.laurel_1, block.g)):
            f = branch(value)
            gate = torch.sigmoid(value @ connection.weight.weight.T + connection.bias)
            value = (1 - share) * (value + f) + share * (gate * f + (1 - gate) * value)
    near(model(x), model.head(model.norm(value)), 1e-10)


def test_steps_are_counted_and_kept(tmp_path):
    _, model, x = annealed("rezero")
    steps_done(model, 0)
    assert advance_annealing(model) == 6
    assert advance_annealing(model, 2) == 6
    assert {float(values["t"]) for values in learned(model).values()} == {3 / STEPS}
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(isinstance(module, Annealing) for module in sites_of(other).values())
        assert torch.equal(other(x), model(x))
    laurel_rewrite.save(model, tmp_path / "saved")
    again = laurel_rewrite.load(tmp_path / "saved").eval()
    assert torch.equal(again(x), model(x))
    assert advance_annealing(Stack()) == 0


def test_an_export_on_the_way_warns(tmp_path, caplog):
    _, model, _ = annealed("rezero")
    model = model.float()
    x = torch.randn(2, 5, D)
    steps_done(model, 3)
    laurel_rewrite.export_onnx(model, (x,), None, tmp_path / "on_the_way.onnx")
    assert f"on_the_way.onnx: annealing is at step 3 of {STEPS}" in caplog.text
    caplog.clear()
    steps_done(model, STEPS)
    laurel_rewrite.export_onnx(model, (x,), None, tmp_path / "there.onnx")
    laurel_rewrite.export_onnx(Stack(), (x,), None, tmp_path / "plain.onnx")
    assert "annealing" not in caplog.text


def test_weights_of_the_branch_are_left_as_they_were():
    """deepnorm and fixup scale them, which no step would take back."""
    base = Stack()
    before = base.state_dict()
    better = rewrite(base, (torch.randn(2, 5, D),), variant="fixup", anneal="linear", anneal_steps=2)
    assert all(torch.equal(better.state_dict()[name], value) for name, value in before.items())


def test_the_laws_hold():
    check_operator("rw+lr", {"anneal": "cosine", "anneal_steps": 9})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anneal": "linear"}, "anneal needs anneal_steps"),
        ({"anneal_steps": 5}, "anneal_steps needs anneal, linear or cosine"),
        ({"anneal": "slowly", "anneal_steps": 5}, "anneal must be one of none, linear, cosine"),
        ({"anneal": "linear", "anneal_steps": -1}, "anneal_steps must be a whole number of at least 0"),
    ],
)
def test_no_schedule_is_refused_before_anything_is_changed(options, message):
    model = Stack()
    with pytest.raises(ConfigError, match=message):
        rewrite(model, (torch.randn(2, 5, D),), variant="rezero", inplace=True, **options)
    assert not sites_of(model)
