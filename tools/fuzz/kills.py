"""Processes that are killed while they write results: what is there afterwards is the old result or the new one, whole.

    run(seed)     one case; what was killed and what was there then, or an exception: a fault

Three writers are killed at a random moment of their work: a folder of many files, `save`, and the whole command. Each writes over an
earlier result, beside a file of the user's.
"""

from __future__ import annotations

import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import laurel_rewrite
from laurel_rewrite.files.drafts import reading, replacing
from laurel_rewrite.files.manifest import MANIFEST, Manifest
from laurel_rewrite.operators.connections import sites_of

WIDTH = 8
OWN, NOTE = "notes.txt", "the user's"
DRAFT = ".laurel-"
"""What a killed writer leaves behind begins so, until the next one removes it."""
COMMAND = [sys.executable, "-m", "laurel_rewrite", "net.py", "--rank", "2", "--profile-seconds", "0.2", "--out", "out"]
NET = f"""
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear({WIDTH}, {WIDTH}) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).relu()
        return x

def model():
    return Net()

def example_inputs():
    return (torch.randn(2, {WIDTH}),)
"""


class Fault(Exception):
    """What must not happen, with the seed of the case."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x)


def run(seed: int) -> str:
    """Kill one writer. Returns which, and whether the old result, the new one or none was there; raises Fault."""
    draw = random.Random(seed)
    name = draw.choices(list(_WRITERS), (6, 6, 1))[0]
    with tempfile.TemporaryDirectory() as scratch:
        try:
            return f"{name}: {_WRITERS[name](draw, Path(scratch))}"
        except Exception as error:
            raise Fault(f"seed {seed}, {name}: {type(error).__name__}: {error}") from error


# Writers in a child of this process, which has imported everything already


def _files(draw: random.Random, folder: Path) -> str:
    """Many files, in folders of their own, of which each result has others."""

    def write(result: str) -> None:
        with replacing(folder, "rewrite") as made:
            for n in range(draw.randrange(5, 40)):
                path = made / (f"{n}.txt" if n % 3 else f"{result}/{n}.txt")
                path.parent.mkdir(exist_ok=True)
                path.write_text(result)

    def read() -> str:
        found = [path for path in folder.rglob("*.txt") if path.name != OWN and not path.relative_to(folder).parts[0].startswith(DRAFT)]
        texts = {path.read_text() for path in found}
        assert len(texts) <= 1, f"files of {len(texts)} results at once"
        return texts.pop() if texts else "none"

    return _killed(draw, folder, write, read)


@functools.cache
def _models() -> dict[str, nn.Module]:
    """One model, with the mix of its first site telling one result from another."""
    torch.manual_seed(0)
    base = nn.Sequential(*(Block() for _ in range(4)))
    made = {name: laurel_rewrite.rewrite(base, (torch.randn(2, WIDTH),), rank=2) for name in ("old", "new", "next")}
    for number, model in enumerate(made.values()):
        for module in sites_of(model).values():
            nn.init.constant_(module.mix, float(number))
    return made


def _save(draw: random.Random, folder: Path) -> str:
    models = _models()

    def read() -> str:
        if not (folder / "plan.toml").exists():
            return "none"
        numbers = {module.mix[0].item() for module in sites_of(laurel_rewrite.load(folder)).values()}
        assert len(numbers) == 1, f"weights of several results at once: {numbers}"
        return list(models)[int(numbers.pop())]

    return _killed(draw, folder, lambda result: laurel_rewrite.save(models[result], folder), read)


def _killed(draw: random.Random, folder: Path, write: Callable[[str], object], read: Callable[[], str]) -> str:
    (folder / OWN).write_text(NOTE)
    old = draw.random() < 0.7
    start = time.monotonic()
    if old:
        write("old")
        took = time.monotonic() - start
    else:
        took = draw.uniform(0.001, 0.02)
    child = os.fork()
    if not child:
        try:
            write("new")
        finally:
            os._exit(0)
    time.sleep(draw.uniform(0, 1.3 * took))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with reading(folder):
        _whole(folder)
    found = read()
    assert found in ({"old", "new"} if old else {"none", "new"}), f"{found} is there, and {'' if old else 'no '}old result was"
    write("next")
    assert read() == "next"
    _whole(folder)
    _clean(folder)
    return found


def _whole(folder: Path) -> None:
    """Every file of the manifest is there with its digest, and the user's own one as it was."""
    manifest = Manifest.read(folder)
    wrong = [] if manifest is None else [name for name in manifest.files if not manifest.holds(folder, name)]
    assert not wrong, f"not what the manifest says: {wrong}"
    assert (folder / OWN).read_text() == NOTE


def _clean(folder: Path) -> None:
    manifest = Manifest.read(folder)
    assert manifest is not None
    left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {OWN, MANIFEST, *manifest.files}
    assert not left, f"left behind: {sorted(left)}"
    hidden = [path.name for path in folder.iterdir() if path.name.startswith(DRAFT)]
    assert not hidden, f"left behind: {hidden}"


# The command, in a process of its own


@functools.cache
def _result() -> tuple[Path, float]:
    """A folder with a whole result of the command, and how many seconds it took."""
    folder = Path(tempfile.mkdtemp(prefix="laurel-fuzz-"))
    (folder / "net.py").write_text(NET)
    start = time.monotonic()
    _finish(folder)
    return folder, time.monotonic() - start


def _command(draw: random.Random, folder: Path) -> str:
    made, took = _result()
    shutil.copytree(made, folder, dirs_exist_ok=True)
    out = folder / "out"
    (out / OWN).write_text(NOTE)
    before = Manifest.read(out)
    rank = str(draw.choice((2, 3)))
    process = subprocess.Popen(
        [*COMMAND, "--rank", rank], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    time.sleep(draw.uniform(0, 1.1 * took))
    process.kill()
    process.wait()
    _nobody_left(folder)
    with reading(out):
        _whole(out)
    found = "old" if Manifest.read(out) == before else "new"
    laurel_rewrite.load(out)
    _finish(folder, "--rank", rank)
    _whole(out)
    _clean(out)
    left = {path.name for path in folder.iterdir()} - {"net.py", "out", "__pycache__"}
    assert not left, f"left beside the folder: {sorted(left)}"
    return found


def _finish(folder: Path, *words: str) -> None:
    done = subprocess.run([*COMMAND, *words], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-500:]}"


def _nobody_left(folder: Path, patience: float = 10.0) -> None:
    """The processes that the command had started end by themselves."""
    deadline = time.monotonic() + patience
    while left := [pid for pid in os.listdir("/proc") if pid.isdigit() and _works_in(pid, folder)]:
        assert time.monotonic() < deadline, f"{len(left)} process(es) of the killed command live on"
        time.sleep(0.1)


def _works_in(pid: str, folder: Path) -> bool:
    try:
        return Path(os.readlink(f"/proc/{pid}/cwd")).is_relative_to(folder)
    except OSError:  # it has ended, or is somebody else's
        return False


_WRITERS: dict[str, Callable[[random.Random, Path], str]] = {"files": _files, "save": _save, "command": _command}
