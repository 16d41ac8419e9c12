"""The README runs: its Python blocks in order, and its commands parse."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from laurel_rewrite.app import cli

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.S)
SHELL = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.S) for line in block.splitlines() if line]


def test_the_python_blocks_run(tmp_path):
    """As a script in a file, as a reader would have them; the first is a fragment of one's own file."""
    script = tmp_path / "readme.py"
    script.write_text("\n".join(PYTHON[1:]))
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "x the baseline's latency" in done.stdout
    assert "layers.2.laurel_1 identity (2, 16, 64) stream 0, position 5" in done.stdout


def test_the_fragment_is_a_model_file(tmp_path):
    (tmp_path / "fragment.py").write_text(
        "import torch\nclass MyModel(torch.nn.Linear):\n    def __init__(self): super().__init__(64, 64)\n" + PYTHON[0]
    )
    code = "from laurel_rewrite.sources.models import build; print(type(build('fragment.py').model).__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "MyModel", done.stderr


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("laurel-rewrite")])
def test_the_commands_parse(line):
    words = shlex.split(line, comments=True)[1:]
    command = cli.COMMANDS.get(words[0], cli.rewrite)
    context = command.make_context("laurel-rewrite", words[words[0] in cli.COMMANDS :])
    assert isinstance(context, click.Context)


def test_the_explanation_is_what_the_command_prints():
    assert (ROOT / "tests" / "golden" / "explain_gpt.txt").read_text().strip() in TEXT


def test_every_make_target_that_is_named_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:^|`)make (\w+)", TEXT, re.M))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M)


def test_every_export_is_documented():
    import inspect

    import laurel_rewrite

    for name in laurel_rewrite.__all__:
        assert inspect.getdoc(getattr(laurel_rewrite, name)), name
