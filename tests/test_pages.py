"""The README and the pages of `docs` run: their Python blocks in order, and their commands parse."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import click
import pytest
from pages import FRESH, PAGES, ROOT, blocks, run

from laurel_rewrite.app import cli

README = PAGES[0]
COMMANDS = {line for page in PAGES for text in blocks(page, "sh") for line in text.splitlines() if line.startswith("laurel-rewrite")}
PRINTS = {
    "README.md": ("x the baseline's latency", "layers.2.laurel_1 identity (2, 16, 64) stream 0, position 5"),
    "decoders.md": ("True\n", "decoding: "),
    "compare.md": ("one more layer", "baseline"),
    "lightning.md": ("'laurel/model.layers.1.laurel_1/uv':",),
    "transformers.md": ("{'laurel/transformer.h.1.laurel_1/a': ", "transformer.h.0.laurel_0"),
}
"""What a page's blocks print among other things."""


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=page.name, marks=[pytest.mark.engines] * (page != README)) for page in PAGES if blocks(page, "python")],
)
def test_the_python_blocks_run(page, tmp_path):
    done = run(page, tmp_path)
    assert done.returncode == 0, done.stderr
    for text in PRINTS.get(page.name, ()):
        assert text in done.stdout
    if blocks(page, "python", FRESH):
        again = run(page, tmp_path, FRESH)
        assert again.returncode == 0, again.stderr
        assert again.stdout.startswith("the quick brown")


def test_the_fragment_is_a_model_file(tmp_path):
    (fragment,) = blocks(README, "python", "a model's file")
    (tmp_path / "fragment.py").write_text(
        "import torch\nclass MyModel(torch.nn.Linear):\n    def __init__(self): super().__init__(64, 64)\n" + fragment
    )
    code = "from laurel_rewrite.sources.models import build; print(type(build('fragment.py').model).__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "MyModel", done.stderr


@pytest.mark.parametrize("line", sorted(COMMANDS))
def test_the_commands_parse(line):
    words = shlex.split(line, comments=True)[1:]
    command = cli.COMMANDS.get(words[0], cli.rewrite)
    context = command.make_context("laurel-rewrite", words[words[0] in cli.COMMANDS :])
    assert isinstance(context, click.Context)


def test_the_explanation_is_what_the_command_prints():
    assert (ROOT / "tests" / "golden" / "explain_gpt.txt").read_text().strip() in README.read_text()


def test_every_make_target_that_is_named_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:^|`)make ([\w-]+)", README.read_text() + (ROOT / "CONTRIBUTING.md").read_text(), re.M))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M)


def test_every_page_is_named_in_the_readme():
    for page in PAGES[1:]:
        assert f"](docs/{page.name})" in README.read_text(), page.name


def test_every_export_is_documented():
    import inspect

    import laurel_rewrite

    for name in laurel_rewrite.__all__:
        assert inspect.getdoc(getattr(laurel_rewrite, name)), name
