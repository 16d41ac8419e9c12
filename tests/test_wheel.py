"""What is installed: one top-level package with all of its modules, which a folder of the user's called `passes` does not disturb."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
USER = """
import sys
import torch, laurel_rewrite
from laurel_rewrite.passes import InsertLaurel
assert laurel_rewrite.__file__.startswith(sys.prefix), laurel_rewrite.__file__

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
    def forward(self, x):
        return x + self.linear(x)

model, example_inputs = Block(), (torch.randn(2, 8),)
laurel_rewrite.export_onnx(model, example_inputs, None, "block.onnx")
"""


def done(*command: str | Path, cwd: Path) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # which may name a checkout
    ran = subprocess.run([str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    return ran.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """A source archive, and the wheel that is built of what is in that."""
    source = tmp_path_factory.mktemp("source")
    for name in ("laurel_rewrite", "passes"):
        shutil.copytree(REPOSITORY / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source / name)
    target = tmp_path_factory.mktemp("dist")
    done(sys.executable, "-m", "build", "--outdir", target, source, cwd=target)
    return {path.suffix: path for path in target.iterdir()}


def test_there_is_one_top_level_name_with_every_module(archives):
    names = zipfile.ZipFile(archives[".whl"]).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"laurel_rewrite"}
    files = {
        str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "laurel_rewrite").rglob("*") if path.is_file() and path.suffix != ".pyc"
    }
    files |= {f"laurel_rewrite/{path.relative_to(REPOSITORY)}" for path in (REPOSITORY / "passes").glob("*.py")}
    assert {name for name in names if ".dist-info/" not in name} == files
    with tarfile.open(archives[".gz"]) as archive:
        assert files <= {name.split("/", 1)[-1] for name in archive.getnames()}


def test_an_index_would_take_both(archives):
    done(sys.executable, "-m", "twine", "check", "--strict", *archives.values(), cwd=archives[".whl"].parent)


def test_it_works_outside_of_the_repository(archives, tmp_path):
    """In an environment of its own, that has the packages which this one has; beside a package `passes` of the user's."""
    home = tmp_path / "environment"
    venv.create(home, with_pip=False)
    paths = {"base": str(home), "platbase": str(home)}
    site = Path(sysconfig.get_path("purelib", "venv", paths))
    python = Path(sysconfig.get_path("scripts", "venv", paths)) / "python"
    done(sys.executable, "-m", "pip", "--python", home, "install", "--quiet", "--no-deps", archives[".whl"], cwd=tmp_path)
    (site / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")  # behind what the wheel brought
    (tmp_path / "passes").mkdir()
    (tmp_path / "passes" / "__init__.py").write_text("raise ImportError('another one')\n")
    (tmp_path / "user.py").write_text(USER)
    done(python, "user.py", cwd=tmp_path)
    assert (tmp_path / "block.onnx").is_file()
    shown = done(python.parent / "laurel-rewrite", "user.py", "--variant", "rw", "--profile-seconds", "0", cwd=tmp_path)
    assert "laurel_out" in shown
    assert (tmp_path / "laurel_out" / "modeling_laurel.py").is_file()
