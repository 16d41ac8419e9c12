"""Accelerate: trained, saved and resumed, alone and in two processes; policies that go by the names of classes."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path

import pytest
import torch
from conftest import away_from_start, real
from processes import together
from torch import nn
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from toys import CASES, D

from laurel_rewrite import check_optimizer, learned, load, param_groups, remove, rewrite, save
from laurel_rewrite.integrations.accelerate import log_learned

pytestmark = pytest.mark.engines

X = torch.randn(6, 4, 5, D, generator=torch.Generator().manual_seed(3))
"""Batches of six steps."""


@pytest.fixture(autouse=True)
def _fresh_state():
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Job:
    """A model with its optimiser, as Accelerate prepares them."""

    def __init__(self, variant: str = "rw+lr", **options) -> None:
        from accelerate import Accelerator

        torch.manual_seed(0)
        blocks = nn.Sequential(*(CASES["plain"].make() for _ in range(3))).eval()
        model = away_from_start(rewrite(blocks, (X[0],), variant=variant, rank=4))
        optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2, weight_decay=0.1, scalar_lr=2.0))
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=6)
        self.accelerator = Accelerator(cpu=True, **options)
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(model, optimizer, schedule)

    def train(self, steps: range, part: slice = slice(None)) -> list[float]:
        losses = []
        for step in steps:
            with self.accelerator.accumulate(self.model):
                loss = self.model(X[step][part]).square().mean()
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses


@pytest.mark.parametrize("options", [{}, {"mixed_precision": "bf16"}, {"gradient_accumulation_steps": 2}], ids=str)
def test_a_resumed_run_goes_on_bit_for_bit(options, tmp_path):
    first = Job("rw+lr+pa", **options)
    assert check_optimizer(first.model, first.optimizer) == []
    first.train(range(4))
    first.accelerator.save_state(str(tmp_path / "state"))
    expected = first.train(range(4, 6))
    second = Job("rw+lr+pa", **options)
    second.accelerator.load_state(str(tmp_path / "state"))
    assert second.train(range(4, 6)) == expected
    assert learned(second.model) == learned(first.model)
    groups = [(group["name"], group["lr"]) for group in second.optimizer.param_groups]
    assert groups == [(group["name"], group["lr"]) for group in first.optimizer.param_groups]


@pytest.mark.parametrize("options", [{}, {"mixed_precision": "bf16"}], ids=str)
def test_what_was_trained_is_saved_and_loaded(options, tmp_path):
    job = Job(**options)
    job.train(range(2))
    model = job.accelerator.unwrap_model(job.model, keep_fp32_wrapper=False)
    save(model, tmp_path)
    again = load(tmp_path).eval()
    assert torch.equal(again(X[0]), model(X[0]))
    assert learned(again) == learned(model)


def test_what_was_learned_is_logged(tmp_path):
    from accelerate.tracking import GeneralTracker

    found: list[tuple[int, dict[str, float]]] = []

    class Tracker(GeneralTracker):
        name = "list"
        requires_logging_directory = False
        tracker = None

        def store_init_configuration(self, values):
            pass

        def log(self, values, step=None, **options):
            found.append((step, values))

    job = Job(log_with=Tracker())
    job.accelerator.init_trackers("project")
    values = log_learned(job.accelerator, job.model, 7)
    assert found == [(7, values)]
    assert set(values) == {f"laurel/{b}.laurel_{n}/{key}" for b in range(3) for n in (0, 1) for key in ("a", "b", "uv")}


# Policies


def differing(how: str) -> nn.Module:
    """A GPT-2 of three blocks, of which two classes have one name."""
    example = real("gpt2")
    left = {"first differs": ["transformer.h.0.laurel_0"], "last is plain": ["transformer.h.2.laurel_0", "transformer.h.2.laurel_1"]}[how]
    return rewrite(example.model, example.args, example.kwargs, rank=4, exclude=left)


@pytest.mark.parametrize("form", ["rewritten", "copied", "pickled", "loaded", "loaded and pickled", "removed"])
@pytest.mark.parametrize("how", ["first differs", "last is plain"])
def test_policies_by_the_name_of_a_class_find_all_blocks(how, form, tmp_path):
    """They take the class of the first block that they find for that of all."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy

    model = differing(how)
    assert len({type(block) for block in model.transformer.h}) == 2
    if form.startswith("loaded"):
        save(model, tmp_path)
        model = load(tmp_path)
    if form == "copied":
        model = copy.deepcopy(model)
    if form.endswith("pickled"):
        model = pickle.loads(pickle.dumps(model))
    if form == "removed":
        model = remove(model)
    blocks = list(model.transformer.h)
    for version in (1, 2):
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=version, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["GPT2Block"]
        )
        if version == 1:
            plugin.set_auto_wrap_policy(model)
            found = [m for m in model.modules() if plugin.auto_wrap_policy(module=m, recurse=False, nonwrapped_numel=1)]
        else:
            policy = fsdp2_prepare_auto_wrap_policy(plugin, model)
            found = [m for m in model.modules() if policy(m)]
        assert found == blocks
    for block in blocks:
        policy = ModuleWrapPolicy({type(block)})
        assert [m for m in model.modules() if policy(m, recurse=False, nonwrapped_numel=1)] == blocks


# In two processes

ONCE = {"step_scheduler_with_optimizer": False}
"""Or Accelerate moves the schedule on by as many steps as there are processes."""


def trained_in_parts(folder: Path, rank: int) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    job = Job("rw+lr+pa", **ONCE)
    part = slice(2 * rank, 2 * rank + 2)
    job.train(range(3), part)
    job.accelerator.save_state(str(folder / "state"))
    job.accelerator.wait_for_everyone()
    expected = job.train(range(3, 6), part)
    job.accelerator.load_state(str(folder / "state"))
    again = job.train(range(3, 6), part)
    right = check_optimizer(job.model, job.optimizer)
    torch.save((job.accelerator.num_processes, expected, again, learned(job.model), right), folder / str(rank))


def test_two_processes_learn_what_one_does(tmp_path):
    alone = Job("rw+lr+pa", **ONCE)
    losses = alone.train(range(6))
    (processes, first, again, mine, right), (_, second, _, other, _) = together(trained_in_parts, tmp_path)
    assert processes == 2
    assert right == []
    assert first == again
    assert mine == other
    # float32, and Adam divides small gradients by their own size: sums in another order show there.
    assert [(a + b) / 2 for a, b in zip(first, second, strict=True)] == pytest.approx(losses[3:], rel=1e-4)
    for site, numbers in learned(alone.model).items():
        assert mine[site] == pytest.approx(numbers, rel=1e-3, abs=1e-5)
