"""The checks fail when what they check is broken."""

from __future__ import annotations

import torch
from conftest import real
from toys import CASES, D

from laurel_rewrite import rewrite
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.verification.checks import Check, check_gradients
from laurel_rewrite.verification.export import draw
from laurel_rewrite.verification.runs import check_start

X = (torch.randn(2, 5, D),)


def test_a_good_rewrite_passes(tmp_path):
    model = CASES["plain"].make()
    better = rewrite(model, X, variant="rw+lr+pa", rank=4)
    assert all(c.passed and c.difference == 0 for c in check_start(model, better, X, {}))
    assert check_gradients(better, X, {}).passed


def test_another_start_fails():
    model = CASES["plain"].make()
    better = rewrite(model, X, rank=4)
    better.laurel_1.mix.data[0] = 1e-3
    checks = check_start(model, better, X, {})
    assert [c.passed for c in checks] == [False, False]
    assert checks[0].difference > 0


def test_another_order_of_random_numbers_fails():
    class Reordered(CASES["plain"].make().__class__):
        def forward(self, x):
            torch.rand(1)
            return super().forward(x)

    model = CASES["plain"].make()
    other = Reordered()
    other.load_state_dict(model.state_dict())
    evaluated, trained = check_start(model, other, X, {})
    assert evaluated.passed
    assert not trained.passed


def test_changed_running_statistics_fail():
    model = CASES["images"].make()
    images = (torch.randn(2, 3, 8, 8),)
    better = rewrite(model, images, rank=4)
    better.down[1].momentum = 0.5
    checks = check_start(model, better, images, {})
    assert [c.passed for c in checks] == [True, False]


def test_checks_keep_buffers_and_modes():
    example = real("resnet18")
    better = rewrite(example.model, example.args, rank=4).eval()
    before = {k: v.clone() for k, v in better.state_dict().items()}
    check_start(example.model, better, example.args, {})
    check_gradients(better, example.args, {})
    assert not better.training
    assert all(torch.equal(before[k], v) for k, v in better.state_dict().items())


def test_a_parameter_without_a_gradient_fails():
    better = rewrite(CASES["plain"].make(), X, rank=4)
    better.laurel_0.up.weight.requires_grad_(False)
    check = check_gradients(better, X, {})
    assert not check.passed
    assert "laurel_0.up.weight" in check.detail


def test_the_insertion_is_verified_where_the_start_is_declared_inexact():
    model = CASES["plain"].make()
    checks = check_start(model, rewrite(model, X, rank=4, normalize="paper"), X, {})
    assert all(check.passed and "at which normalize=paper starts" in check.detail for check in checks)


def test_drawn_inputs_keep_type_and_range():
    generator = torch.Generator().manual_seed(0)
    ids = draw(torch.tensor([[3, 9], [4, 5]]), (50, 50), generator)
    assert ids.dtype == torch.int64
    assert (ids.min(), ids.max()) == (3, 9)
    assert draw(torch.ones(2, 3, dtype=torch.bool), (4, 5), generator).all()
    assert sites_of(torch.nn.Linear(2, 2)) == {}


def test_a_check_that_was_not_run_is_no_pass():
    check = Check.not_run("laurel.onnx", "no kernel")
    assert (check.outcome, check.passed, check.failed) == ("not run", None, False)
    assert [Check("", passed, 0.0, "").outcome for passed in (True, False, None)] == ["passed", "FAILED", "says little"]
    assert check.to_dict()["outcome"] == "not run"
