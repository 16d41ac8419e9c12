"""torchtitan: its own trainer with the converter, in two processes; `make test-torchtitan` installs it, for the tests alone."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import away_from_start, slow
from pages import ROOT, blocks
from torch import nn
from toys import CASES, D

from laurel_rewrite import ConfigError, MissingPackageError, rewrite
from laurel_rewrite.integrations import torchtitan

pytestmark = pytest.mark.engines

PAGE = ROOT / "docs" / "torchtitan.md"
X = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(3))
_FOUND = subprocess.run([sys.executable, "-c", "import torchtitan.train"], capture_output=True, text=True, check=False)
installed = pytest.mark.skipif(
    _FOUND.returncode != 0, reason=f"torchtitan cannot be imported: {_FOUND.stderr.strip().splitlines()[-1] if _FOUND.stderr else ''}"
)


def titan(folder: Path, world: int, steps: int, *options: str) -> tuple[list[list], list[dict]]:
    """A run of the trainer with the page's module and configuration; the optimiser's groups, and what was logged."""
    module, _ = blocks(PAGE, "python", "torchtitan")
    (config,) = blocks(PAGE, "toml", "torchtitan")
    (folder / "titan_laurel.py").write_text(module)
    (folder / "config.toml").write_text(config)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(Path(__file__).with_name("titan.py")), str(world), str(steps), *options]
    environment = {**os.environ, "MASTER_PORT": str(port), "PYTHONPATH": path}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return lines[0]["groups"], lines[1:]


@installed
@pytest.mark.parametrize("mode", ["full", slow("none")])
def test_the_trainer_trains_checkpoints_and_goes_on(mode, tmp_path):
    options = ["--checkpoint.enable", "--laurel.variant", "rw+lr+pa", "--activation_checkpoint.mode", mode]
    groups, whole = titan(tmp_path, 2, 4, *options)
    assert [(name, count, decay) for name, count, _, decay in groups] == [("others", 123, 0.1), ("mixing", 24, 0.0)]
    assert [line["step"] for line in whole] == [1, 2, 3, 4]
    names = {name.rpartition("/")[2] for name in whole[0]["learned"]}
    assert names == {"a", "b", "g.0", "g.1", "g.2", "uv.0", "uv.1", "uv.2"}
    assert all(0.9 < line["learned"]["laurel/layers.5.laurel_1/a"] < 1.1 for line in whole)  # from a start of 1
    assert 0 < whole[0]["learned"]["laurel/layers.5.laurel_1/uv.2"] < 0.1  # from U = 0
    shutil.rmtree(tmp_path / "outputs" / "checkpoint" / "step-4")
    _, again = titan(tmp_path, 2, 4, *options)
    assert again == whole[2:]


@installed
def test_the_pages_blocks_run(tmp_path):
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks(PAGE, "python", "torchtitan")))
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "12"


@pytest.mark.skipif(_FOUND.returncode == 0, reason="torchtitan is installed")
def test_without_torchtitan_the_extra_is_named():
    with pytest.raises(MissingPackageError, match=r'torchtitan.*pip install "laurel-rewrite\[torchtitan\]"'):
        torchtitan.register("llama3")


def test_a_torchtitan_without_converters_is_refused(tmp_path, monkeypatch):
    (tmp_path / "torchtitan" / "protocols").mkdir(parents=True)
    (tmp_path / "torchtitan" / "__init__.py").write_text("__version__ = '0.3.0'\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchtitan"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"torchtitan 0\.3\.0 has no model converters, .*torchtitan>=0\.2\.2"):
        torchtitan.register("llama3")
    for name in ("torchtitan", "torchtitan.protocols"):
        monkeypatch.delitem(sys.modules, name, raising=False)


# The converter without torchtitan


def converter(monkeypatch, *, tp: bool = False, pp: bool = False, **settings) -> torchtitan.LaurelConverter:
    monkeypatch.setattr(torchtitan, "_warn_unless_registered", lambda name: None)
    job = types.SimpleNamespace(laurel=torchtitan.Laurel(**settings), model=types.SimpleNamespace(name="toy"))
    return torchtitan.LaurelConverter(job, types.SimpleNamespace(tp_enabled=tp, pp_enabled=pp))


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x)


class Toy(nn.Module):
    """A model as torchtitan has them: tokens in, and a method that initialises its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, D)
        self.blocks = nn.Sequential(CASES["plain"].make(), CASES["plain"].make(), Last())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.embedding(tokens))

    def init_weights(self, buffer_device=None) -> None:
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()


@pytest.mark.parametrize("variant", ["rw+lr", "rw+lr+pa"])
def test_a_model_that_gets_its_memory_later_has_the_start(variant, monkeypatch):
    with torch.device("meta"):
        model = Toy()
    converter(monkeypatch, variant=variant, rank=4, seed=5).convert(model)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    model.init_weights(buffer_device=None)
    expected = rewrite(Toy(), (torch.zeros(2, 16, dtype=torch.long),), variant=variant, rank=4, seed=5)
    for name, value in expected.state_dict().items():
        if "laurel" in name:
            assert torch.equal(model.state_dict()[name], value), name
    assert not any(p.isnan().any() for p in model.parameters())


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tp": True}, "tensor_parallel_degree to 1"),
        ({"pp": True, "variant": "pa", "rank": 4}, "which a pipeline stage does not have. Choose an operator without history"),
        ({"variant": "toy-shrunk", "include": ["blocks.2*"]}, "scales weights of its branch when it is put in"),
        ({"rank": 0}, "rank"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(given, words, monkeypatch):
    with torch.device("meta"):
        model = Toy()
    with pytest.raises(ConfigError, match=words):
        converter(monkeypatch, **given).convert(model)


class Container(list):
    """As torchtitan's: the optimisers of a job."""


@pytest.mark.parametrize("each", [False, True])
def test_mixing_weights_leave_the_groups_of_the_engine(each):
    """Also where there is an optimiser for each parameter, as for steps inside backward."""

    def build(parts, decay):
        (model,) = parts
        sets = [[p] for p in model.parameters()] if each else [list(model.parameters())]
        return Container(torch.optim.AdamW(one, lr=1e-2, weight_decay=decay) for one in sets)

    model = away_from_start(rewrite(CASES["plain"].make(), (X,), variant="rw+lr+pa", rank=4))
    container = torchtitan.build_optimizers(build, 2.0, [model], 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for optimizer in container for g in optimizer.param_groups for p in g["params"]}
    mixing = {f"laurel_{n}.{w}" for n in (0, 1) for w in ("mix", "g")}
    assert found == {name: (2e-2, 0.0) if name in mixing else (1e-2, 0.1) for name in names.values()}
    model(X).square().mean().backward()
    for optimizer in container:
        optimizer.step()
