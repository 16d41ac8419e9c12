"""What is installed: one top-level package, which a folder of the user's called `passes` does not disturb."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source = tmp_path_factory.mktemp("source")
    for name in ("laurel_rewrite", "passes"):
        shutil.copytree(REPOSITORY / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source / name)
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(target.glob("*.whl"))


def test_there_is_one_top_level_name(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"laurel_rewrite"}
    passes = {path.name for path in (REPOSITORY / "passes").glob("*.py")}
    assert {Path(name).name for name in names if name.startswith("laurel_rewrite/passes/")} == passes


def test_a_folder_called_passes_does_no_harm(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "passes").mkdir()
    (tmp_path / "passes" / "__init__.py").write_text("raise ImportError('another one')\n")
    code = (
        f"import sys; sys.path[:0] = ['.', {str(tmp_path / 'site')!r}]\n"
        "import torch, laurel_rewrite\n"
        "from laurel_rewrite.passes import InsertLaurel\n"
        "assert laurel_rewrite.__file__.startswith(sys.path[1]), laurel_rewrite.__file__\n"
        "class Block(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.linear = torch.nn.Linear(8, 8)\n"
        "    def forward(self, x):\n"
        "        return x + self.linear(x)\n"
        "laurel_rewrite.export_onnx(Block(), (torch.randn(2, 8),), None, 'block.onnx')\n"
    )
    (tmp_path / "user.py").write_text(code)
    done = subprocess.run([sys.executable, "user.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "block.onnx").is_file()
