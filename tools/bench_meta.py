"""Benchmark: what one of a thousand processes needs to build a rewritten model of 70 B parameters, up to its own shard.

    python tools/bench_meta.py [--layers 80] [--processes 1024]     # writes a dated table under tools/results/

A Llama of that size is rewritten on the meta device and saved without weights; each process then loads the folder, on the meta device,
without tracing. The last case goes on: FSDP2 shards each block, and the shard gets memory, in which the connections start. The other
processes are torch's fake process group. Each case is a process of its own, several times; memory is its peak resident set
(`ru_maxrss`), Python, torch and transformers included.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

import click

from laurel_rewrite.profiling import processor

HERE = Path(__file__).parent
_START = """
import json, resource, sys, time
import torch
from laurel_rewrite.sources.built import declare_torchvision_ops
declare_torchvision_ops()
import transformers
import laurel_rewrite
folder, layers, processes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
config = transformers.LlamaConfig(
    hidden_size=8192, intermediate_size=28672, num_hidden_layers=layers, num_attention_heads=64, num_key_value_heads=8, vocab_size=128256,
)
def base():
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config).to(torch.bfloat16)
transformers.LlamaForCausalLM, laurel_rewrite.load, laurel_rewrite.rewrite, laurel_rewrite.save
begin = time.perf_counter()
"""
_END = """
seconds = time.perf_counter() - begin
count = sum(p.numel() for p in model.parameters())
print(json.dumps({"seconds": seconds, "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000, "parameters": count}))
"""
CASES = {
    "the base model alone, on the meta device": "model = base()",
    "rewrite and save it, once": """
model = laurel_rewrite.rewrite(base(), (), {"input_ids": torch.zeros(2, 8, dtype=torch.long, device="meta")}, variant="rw+lr", rank=32, inplace=True)
laurel_rewrite.save(model, folder, weights="none")
""",
    "load the folder": 'model = laurel_rewrite.load(folder, device="meta")',
    "put the folder into a base model": "model = laurel_rewrite.load(folder, base=base())",
    "load it, shard it, memory and start of one shard": """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=processes)
mesh = init_device_mesh("cpu", (processes,))
model = laurel_rewrite.load(folder, device="meta")
for block in model.model.layers:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
model.to_empty(device="cpu")
assert all(float(value.detach().to_local().float().abs().max()) == 0 for name, value in model.named_parameters() if name.endswith("laurel_0.up.weight") and value.to_local().numel())
""",
}


def measure(code: str, folder: Path, layers: int, processes: int) -> dict[str, float]:
    """Seconds and megabytes of one process."""
    words = [sys.executable, "-c", _START + code + _END, str(folder), str(layers), str(processes)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"A process failed: {done.stderr}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--layers", default=80, show_default=True)
@click.option("--processes", default=1024, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="The table's file; by default dated, under tools/results/.")
def main(layers: int, processes: int, rounds: int, out: Path | None) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, code in CASES.items():
            once = name.startswith("rewrite")
            found = [measure(code, Path(scratch) / "out", layers, processes) for _ in range(1 if once else rounds)]
            seconds, megabytes = (statistics.median(row[key] for row in found) for key in ("seconds", "mb"))
            rows.append(f"| {name} | {len(found)} | {found[0]['parameters'] / 1e9:.2f} | {seconds:.1f} | {megabytes:.0f} |")
            click.echo(rows[-1])
        size = sum(file.stat().st_size for file in (Path(scratch) / "out").rglob("*")) / 1e3
    text = "\n".join(
        [
            f"# Building a rewritten Llama of {layers} layers on the meta device, {date.today()}",
            "",
            f"Python {platform.python_version()}, torch {version('torch')}, transformers {version('transformers')}; {processor()}, "
            f"{len(os.sched_getaffinity(0))} cores. Width 8192, bfloat16, {2 * layers} sites, rw+lr of",
            f"rank 32; the folder, without weights, has {size:.0f} kB. Shards of {processes} processes. Medians; seconds without imports; memory is the "
            "process's peak resident set, about 500 MB of which",
            "are the imports.",
            "",
            "| case | runs | B parameters | seconds | peak MB |",
            "|---|---:|---:|---:|---:|",
            *rows,
        ]
    )
    (out or HERE / "results" / f"meta-{date.today()}.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
