"""Lightning: configure_model, the callback, checkpoints."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest
import torch
from conftest import away_from_start
from processes import together
from torch import nn
from toys import CASES, D

from laurel_rewrite import ConfigError, learned, load, param_groups, rewrite, save
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.sources.built import declare_torchvision_ops

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its import, and of torchvision's
    declare_torchvision_ops()
    import lightning.pytorch as pl

    from laurel_rewrite.integrations.lightning import LogLearned

pytestmark = [
    pytest.mark.engines,
    pytest.mark.filterwarnings("ignore:.*(num_workers|does not have many workers|tensorboardX|LeafSpec|number of training batches|checkpoint directory|GPU available|barebones).*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]  # fmt: skip
X = torch.randn(12, 2, 5, D, generator=torch.Generator().manual_seed(3))
"""Batches of twelve steps."""


class Batches:
    """A loader that goes on where it stood, inside an epoch, too."""

    def __init__(self) -> None:
        self.at = 0

    def __len__(self) -> int:
        return len(X)

    def __iter__(self):
        while self.at < len(X):
            self.at += 1
            yield X[self.at - 1]

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def blocks() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(*(CASES["plain"].make() for _ in range(2)))
    for module in made.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return made


class Task(pl.LightningModule):
    def __init__(self, source: str = "", groups: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = None
        self.losses: list[float] = []
        self.devices: set[str] = set()

    def configure_model(self) -> None:
        if self.model is None:
            if self.hparams.source:
                meta = torch.get_default_device().type == "meta"
                self.model = load(self.hparams.source, device="meta" if meta else None)
            else:
                model = rewrite(blocks(), (torch.randn(2, 5, D),), variant="rw+lr+pa", rank=4, inplace=True)
                self.model = away_from_start(model) if torch.get_default_device().type == "cpu" else model
            self.devices |= {p.device.type for p in self.model.parameters()}

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        loss = self.model(batch).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = param_groups(self.model, lr=1e-2, weight_decay=0.1) if self.hparams.groups else self.model.parameters()
        return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)


def fit(task: Task, steps: int, folder: Path, *callbacks: pl.Callback, path: Path | None = None, **options) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "log_every_n_steps": 1}
    given = {"accelerator": "cpu", "devices": 1, "logger": False, **quiet, **options}
    trainer = pl.Trainer(max_steps=steps, default_root_dir=folder, callbacks=list(callbacks), **given)
    trainer.fit(task, Batches(), ckpt_path=path)
    return trainer


class Recorder(pl.loggers.logger.Logger):
    name, version = "list", 0

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, dict[str, float]]] = []

    def log_hyperparams(self, *args, **kwargs) -> None:
        pass

    def log_metrics(self, metrics, step=None) -> None:
        self.found.append((step, {key: value for key, value in metrics.items() if key.startswith("laurel/")}))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_was_learned_is_logged_every_few_steps(accumulate, tmp_path):
    recorder, task = Recorder(), Task()
    fit(task, 4 // accumulate, tmp_path, LogLearned(every=2), logger=recorder, accumulate_grad_batches=accumulate)
    logged = [values for _, values in recorder.found if values]
    assert (
        len({values["laurel/model.0.laurel_0/a"] for values in logged}) == 2 // accumulate
    )  # Lightning logs a value until there is a new one
    assert logged[-1] == {
        f"laurel/model.{site}/{key}": value for site, values in learned(task.model).items() for key, value in values.items()
    }
    with pytest.raises(ConfigError, match="every must be at least 1"):
        LogLearned(every=0)


class Annealed(Task):
    def configure_model(self) -> None:
        if self.model is None:
            self.model = rewrite(blocks(), (torch.randn(2, 5, D),), variant="layerscale", anneal="linear", anneal_steps=10)


def test_the_steps_of_annealing_are_counted_and_go_on(tmp_path):
    first, then = Annealed(), Annealed()
    fit(first, 2, tmp_path, LogLearned(), accumulate_grad_batches=2).save_checkpoint(tmp_path / "at_2.ckpt")
    assert {int(site.annealed) for site in sites_of(first).values()} == {2}
    fit(then, 5, tmp_path, LogLearned(), path=tmp_path / "at_2.ckpt", accumulate_grad_batches=2)
    assert {int(site.annealed) for site in sites_of(then).values()} == {5}


@pytest.mark.parametrize("groups", [True, False])
def test_an_optimiser_that_decays_mixing_weights_is_said_at_the_start(groups, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="laurel_rewrite"):
        fit(Task(groups=groups), 1, tmp_path, LogLearned())
    assert any("mixing weights decay" in message for message in caplog.messages) == (not groups)


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    whole, first, second = Task(), Task(), Task()
    fit(whole, 12, tmp_path)
    fit(first, 6, tmp_path).save_checkpoint(tmp_path / "half.ckpt")
    fit(second, 12, tmp_path, path=tmp_path / "half.ckpt")
    assert first.losses + second.losses == whole.losses
    assert learned(second.model) == learned(whole.model)


def test_a_checkpoint_is_a_rewritten_model(tmp_path):
    task = Task()
    fit(task, 2, tmp_path).save_checkpoint(tmp_path / "task.ckpt")
    again = Task.load_from_checkpoint(tmp_path / "task.ckpt")
    assert torch.equal(again.model.eval()(X[0]), task.model.eval()(X[0]))
    assert learned(again.model) == learned(task.model)


def test_a_saved_model_goes_on_in_lightning(tmp_path):
    model = away_from_start(rewrite(blocks(), (X[0],), variant="rw+lr+pa", rank=4))
    save(model, tmp_path / "model")
    task = Task(source=str(tmp_path / "model"))
    fit(task, 2, tmp_path)
    expected = Task()
    expected.model = model
    fit(expected, 2, tmp_path)
    assert task.losses == expected.losses


@pytest.mark.parametrize("source", [False, True])
def test_configure_model_works_on_the_meta_device(source, tmp_path):
    """As a strategy asks for it that makes room for the weights later."""
    save(rewrite(blocks(), (X[0],), variant="rw+lr+pa", rank=4), tmp_path / "model")
    task = Task(source=str(tmp_path / "model") if source else "")
    with torch.device("meta"):
        task.configure_model()
    assert task.devices == {"meta"}
    assert [name for name, _ in task.named_parameters()] == [f"model.{name}" for name, _ in load(tmp_path / "model").named_parameters()]


# In two processes


def fitted_in_parts(folder: Path, rank: int) -> None:
    task = Task()
    trainer = fit(task, 2, folder, LogLearned(every=1), devices=2, strategy="ddp", use_distributed_sampler=False)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("laurel/")}
    torch.save((logged, task.losses, trainer.world_size), folder / str(rank))


def test_two_processes_log_what_one_would(tmp_path):
    """Both read the same batches, so that averages are what one process has. (Lightning's FSDP refuses to run without a GPU.)"""
    alone = Task()
    fit(alone, 2, tmp_path)
    expected = {f"laurel/model.{site}/{key}": value for site, values in learned(alone.model).items() for key, value in values.items()}
    for logged, losses, processes in together(fitted_in_parts, tmp_path):
        assert processes == 2
        assert losses == pytest.approx(alone.losses, rel=1e-4)  # float32 in another order of sums, behind a step of Adam
        assert logged == pytest.approx(expected, rel=1e-3, abs=1e-5)
