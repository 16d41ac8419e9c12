"""Models of transformers in processes of their own: killed and resumed, and tensor parallel by its own plan."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import away_from_start, output, real
from processes import together
from torch.distributed.tensor import DTensor

from laurel_rewrite import rewrite
from laurel_rewrite.integrations.transformers import transformers
from laurel_rewrite.operators.connections import sites_of

pytestmark = pytest.mark.engines
STEPS, LAST = 6, 4  # all, and that of the last checkpoint before the process is killed


class Killed(transformers.TrainerCallback):
    """By the system, in the step after a checkpoint."""

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == LAST:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, *, killed: bool = False, resumes: bool = False) -> None:
    """As a script would; what it comes to is in the folder's result.pt."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    example = real("gpt2")
    model = rewrite(example.model, example.args, example.kwargs, variant="rw+lr+pa", rank=4)
    words = torch.randint(0, 90, (32, 8), generator=torch.Generator().manual_seed(0))
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2, weight_decay=0.1,
        save_steps=2, report_to="none", disable_tqdm=True, logging_steps=1, use_cpu=True, dataloader_num_workers=0,
    )  # fmt: skip
    data: Any = [{"input_ids": row, "labels": row} for row in words]
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[Killed()] if killed else None)
    trainer.train(resume_from_checkpoint=resumes)
    torch.save((trainer.model.state_dict(), [row["loss"] for row in trainer.state.log_history if "loss" in row]), folder / "result.pt")


def in_a_process(folder: Path, **options: bool) -> int | None:
    """The exit code."""
    process = multiprocessing.get_context("spawn").Process(target=train, args=(folder,), kwargs=options)
    process.start()
    process.join()
    return process.exitcode


def test_a_run_that_is_killed_and_resumed_reaches_the_same_weights(tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert in_a_process(whole) == 0
    assert in_a_process(part, killed=True) == -signal.SIGKILL
    assert not (part / "result.pt").exists()
    assert (part / f"checkpoint-{LAST}").is_dir()
    assert in_a_process(part, resumes=True) == 0
    (weights, losses), (expected, of_whole) = (torch.load(folder / "result.pt") for folder in (part, whole))
    assert losses == of_whole
    assert len(losses) == STEPS
    assert list(weights) == list(expected)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def load_in_parallel(folder: Path, rank: int, saved: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        saved, distributed_config=transformers.distributed.DistributedConfig(tp_plan="auto")
    ).eval()
    example = real("llama")
    with torch.no_grad():
        found = output(model, example.other_args, example.other_kwargs)
    parts = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    torch.save((found, parts, list(sites_of(model))), folder / str(rank))


def test_from_pretrained_splits_a_rewritten_model_by_its_own_plan(tmp_path):
    example = real("llama")
    model = away_from_start(rewrite(example.model, example.args, example.kwargs, variant="rw+lr+pa", rank=4)).eval()
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "ranks").mkdir()
    expected = output(model, example.other_args, example.other_kwargs)
    for found, parts, sites in together(load_in_parallel, tmp_path / "ranks", tmp_path / "saved"):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # float32, sums in two parts
        assert sites == list(sites_of(model))
        assert len(parts) >= 7 * len(model.model.layers)
        assert not any("laurel" in name for name in parts)
