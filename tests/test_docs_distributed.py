"""The page about several devices runs: its blocks in order, in two processes, and their gradients are those of one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
from pages import ROOT, blocks

pytestmark = pytest.mark.engines

CHECKED = """
nn.functional.mse_loss(model(batch), target).backward()
right = {name: p.grad for name, p in model.named_parameters()}


def close(found, rtol=1e-4):
    for name, value in found.items():  # float32 in another order of sums; bfloat16 has 8 bits
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        assert (value - right[name]).norm() <= rtol * max(right[name].norm(), 0.01), name


close({name.removeprefix("module."): p.grad for name, p in replica.named_parameters()})
close({name: p.grad for name, p in sharded.named_parameters()}, rtol=0.2)
close({name: p.grad for name, p in parallel.named_parameters()})
close({name: p.grad for name, p in stage.named_parameters()})
assert torch.allclose(gradient, right["blocks.0.laurel_0.mix"], rtol=1e-4, atol=1e-7)  # float32, a sum over two devices
distributed.destroy_process_group()
print("done")
"""


def test_the_blocks_run_in_two_processes(tmp_path):
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks(ROOT / "docs" / "distributed.md", "python", "two processes")) + CHECKED)
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    store = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, script],
            cwd=tmp_path,
            env={**os.environ, **store, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=180)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    for text in said:
        assert text.strip().endswith("done"), text
