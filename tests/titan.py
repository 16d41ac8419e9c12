"""torchtitan's own trainer on a CPU, started by `test_torchtitan.py` in processes of its own: what it asks of a GPU alone is answered for it.

    python titan.py WORLD STEPS [OPTION ...]

prints a line of JSON for each step: the loss, and what was logged of LAuReL; and one for the groups of the optimiser.
"""

from __future__ import annotations

import collections
import json
import os
import sys
import types
from dataclasses import replace

import torch
from processes import end_group
from torch.distributed.fsdp import FSDPModule


class Data:
    """Random tokens, the same in each run."""

    def __init__(self, rank: int) -> None:
        self.rank, self.at = rank, 0

    def __iter__(self):
        while True:
            generator = torch.Generator().manual_seed(self.at * 10 + self.rank)
            self.at += 1
            tokens = torch.randint(0, 2000, (1, 33), generator=generator)
            yield {"input": tokens[:, :-1]}, tokens[:, 1:]

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def on_a_cpu() -> None:
    """Answer for a device that torchtitan takes for CUDA."""
    import torchtitan.models.llama3.infra.parallelize as parallelize
    import torchtitan.train

    device = types.SimpleNamespace(**{name: getattr(torch.cpu, name) for name in dir(torch.cpu) if not name.startswith("__")})
    device.current_device = lambda: 0
    device.get_device_name = lambda which=None: "cpu"
    device.get_device_properties = lambda which=None: types.SimpleNamespace(total_memory=1 << 34)
    device.memory_stats = lambda which=None: collections.defaultdict(int)
    device.reset_peak_memory_stats = device.empty_cache = lambda *which: None
    for name, module in list(sys.modules.items()):
        if name.startswith("torchtitan"):
            if getattr(module, "device_type", None) == "cuda":
                module.device_type = "cpu"
            if getattr(module, "device_module", None) is torch.cuda:
                module.device_module = device
    torchtitan.train.dist_utils.set_pg_timeouts = lambda **options: None
    plain = parallelize.disable_fsdp_gradient_division

    def without_division(model):
        plain(model)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no other

    parallelize.disable_fsdp_gradient_division = without_division


def main(rank: int, world: int, steps: str, options: list[str]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="localhost", LOG_RANK="0")
    torch.set_num_threads(1)
    from torchtitan.config import ConfigManager
    from torchtitan.protocols.train_spec import get_train_spec, register_train_spec

    on_a_cpu()
    spec = replace(get_train_spec("llama3"), build_tokenizer_fn=None, build_dataloader_fn=lambda **given: Data(rank))
    register_train_spec("llama3", spec)
    given = ["--job.config_file", "config.toml", "--training.steps", steps, "--training.local_batch_size", "1", "--training.seq_len", "32"]
    given += ["--training.mixed_precision_param", "float32", "--metrics.log_freq", "1", "--optimizer.implementation", "foreach"]
    given += ["--lr_scheduler.warmup_steps", "1", "--checkpoint.interval", "2", "--comm.trace_buf_size", "0", *options]
    trainer = sys.modules["torchtitan.train"].Trainer(ConfigManager().parse_args(given))

    def log(metrics, step):
        if rank == 0:
            own = {name: value for name, value in metrics.items() if name.startswith("laurel/")}
            print(json.dumps({"step": step, "loss": metrics["loss_metrics/global_avg_loss"], "learned": own}), flush=True)

    trainer.metrics_processor.logger.log = log
    groups = [(g["name"], len(g["params"]), g["lr"], g["weight_decay"]) for one in trainer.optimizers for g in one.param_groups]
    if rank == 0:
        print(json.dumps({"groups": groups}), flush=True)
    trainer.train()
    del trainer
    end_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(main, (int(sys.argv[1]), sys.argv[2], sys.argv[3:]), nprocs=int(sys.argv[1]))
